"""Configurations: round trips, defaults, and what they refuse."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lsgm_fast.config import LSGMConfig, SamplingConfig, ScoreConfig, SDEConfig, VAEConfig
from lsgm_fast.errors import unknown_name
from lsgm_fast.presets import PRESETS, get_preset

TINY = PRESETS["tiny-binary"]


@pytest.mark.parametrize("name", list(PRESETS))
def test_json_round_trip(name):
    config = PRESETS[name]
    text = json.dumps(config.to_dict())
    back = LSGMConfig.from_dict(json.loads(text))
    assert back == config
    assert hash(back) == hash(config)  # tuples came back as tuples


def test_round_trip_of_a_vae_alone():
    config = TINY.replace(score=None)
    back = LSGMConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert back.score is None


def test_missing_options_take_their_defaults():
    assert SDEConfig.from_dict({"name": "vesde"}) == SDEConfig(name="vesde")
    assert LSGMConfig.from_dict({}) == LSGMConfig()
    values = TINY.to_dict()
    del values["sde"]
    assert LSGMConfig.from_dict(values).sde == SDEConfig()


def test_configurations_are_frozen_and_replace_copies():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.vae = VAEConfig()
    changed = TINY.sde.replace(beta_end=10.0)
    assert (changed.beta_end, TINY.sde.beta_end) == (10.0, 20.0)


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match=r"unknown SDEConfig option 'beta_strt'.*did you mean 'beta_start'"):
        SDEConfig.from_dict({"beta_strt": 0.1})
    values = TINY.to_dict()
    values["vae"]["grups_per_scale"] = 3
    with pytest.raises(ValueError, match=r"VAEConfig option.*did you mean 'groups_per_scale'"):
        LSGMConfig.from_dict(values)
    with pytest.raises(ValueError, match="expects a dictionary, got list"):
        LSGMConfig.from_dict([])


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            SDEConfig,
            {"name": "vp_sde"},
            r"unknown SDE 'vp_sde'.*'vpsde', 'geometric_sde', 'sub_vpsde', 'vesde'",
        ),
        (SDEConfig, {"name": "geometric"}, r"did you mean 'geometric_sde'"),
        (SDEConfig, {"parity": "publishd"}, r"'exact', 'published'; did you mean 'published'"),
        (SDEConfig, {"sigma2_0": 1.0}, r"sigma2_0 must be in \[0, 1\), got 1.0"),
        (SDEConfig, {"time_eps": -0.1}, r"time_eps must be in \[0, 1\), got -0.1"),
        (SDEConfig, {"beta_start": 30.0}, r"beta_start <= beta_end, got 30.0 and 20.0"),
        (SDEConfig, {"beta_start": 0.0}, r"0 < beta_start"),
        (SDEConfig, {"sigma2_min": 2.0}, r"sigma2_min < sigma2_max, got 2.0 and 0.999"),
        (VAEConfig, {"architecture": "res_bnelu"}, r"cell architecture 'res_bnelu'.*'res_mbconv'"),
        (
            VAEConfig,
            {"decoder_distribution": "mixture"},
            r"decoder distribution 'mixture'.*'mixture_logistic'",
        ),
        (
            VAEConfig,
            {"channel_mult": (1, 2, 4)},
            r"preprocess_blocks \+ latent_scales = 2 entries, got \(1, 2, 4\)",
        ),
        (
            VAEConfig,
            {"postprocess_blocks": 2},
            r"postprocess_blocks must equal preprocess_blocks.*got 2 and 1",
        ),
        (VAEConfig, {"image_size": 31}, r"multiple of 2 .*got 31"),
        (VAEConfig, {"num_bits": 4}, r"between 5 and 8, got 4"),
        (VAEConfig, {"num_bits": 9}, r"between 5 and 8, got 9"),
        (ScoreConfig, {"resample": "far"}, r"unknown resampling 'far'.*did you mean 'fir'"),
        (ScoreConfig, {"embedding": "position"}, r"time embedding 'position'.*did you mean 'positional'"),
        (ScoreConfig, {"latent_size": 10}, r"multiple of 4 for 3 levels, got 10"),
        (SamplingConfig, {"bn": "runing"}, r"'running', 'batch'; did you mean 'running'"),
        (SamplingConfig, {"ode_eps": 0.0}, r"ode_eps must be in \(0, 1\), got 0.0"),
        (SamplingConfig, {"ode_eps": 1.0}, r"ode_eps must be in \(0, 1\), got 1.0"),
        (SamplingConfig, {"tol": 0.0}, r"tol must be positive, got 0.0"),
    ],
)
def test_refused_values(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)
    with pytest.raises(ValueError, match=message):
        kind.from_dict(values)


@pytest.mark.parametrize("kind", [SDEConfig, SamplingConfig])
def test_nan_is_refused(kind):
    for field in dataclasses.fields(kind):
        if isinstance(field.default, float):
            with pytest.raises(ValueError, match="nan"):
                kind(**{field.name: float("nan")})


def test_vae_and_score_network_must_fit():
    with pytest.raises(ValueError, match=r"\(8, 8, 8\) but the score network expects \(9, 8, 8\)"):
        TINY.replace(score=TINY.score.replace(latent_channels=9))


def test_latent_shape():
    assert VAEConfig().latent_shape == (180, 16, 16)
    assert TINY.vae.latent_shape == (8, 8, 8)


def test_unknown_preset_lists_all_and_the_closest():
    with pytest.raises(ValueError, match="did you mean 'cifar10-fid'") as error:
        get_preset("cifar10-fdi")
    for name in PRESETS:
        assert repr(name) in str(error.value)


def test_unknown_name_without_a_close_one_makes_no_suggestion():
    message = str(unknown_name("solver", "zzz", ["rk45", "scipy"]))
    assert message == "unknown solver 'zzz': expected one of 'rk45', 'scipy'"
    assert "did you mean 'rk45'" in str(unknown_name("solver", "rk54", ["rk45", "scipy"]))
    assert "'7'" not in str(unknown_name("solver", 7, ["rk45"]))
