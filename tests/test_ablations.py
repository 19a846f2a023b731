"""The ablations: what is compared, runs that are done once, statistics by hand, the record."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lsgm_fast
from lsgm_fast import random
from lsgm_fast.config import SDEConfig
from lsgm_fast.data import DataConfig, batches, open_data
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.evaluation import evaluate_nelbo
from lsgm_fast.models import NVAE
from lsgm_fast.presets import get_preset
from lsgm_fast.sde import build_sde
from lsgm_fast.training import RECIPES, Result, Trainer, TrainingConfig
from lsgm_fast.training.latents import largest_squared_distance
from lsgm_fast.training.recipes import Recipe
from lsgm_fast.weighting import IW_MODES, iw_quantities

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import ablations, measure

QUICK = [
    "--recipe",
    "tiny",
    "--seeds",
    "2",
    "--samples",
    "12",
    "--draws",
    "1",
    "--dry-run",
    "--commit",
    "abc",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Blobs of 8x8 pixels in three places, a network for them, two steps."""
    generator = np.random.default_rng(0)
    labels = np.arange(45) % 3
    y, x = np.mgrid[:8, :8]
    centre = 1.5 + 2.5 * labels + generator.uniform(-1, 1, 45)
    pixels = 255 * np.exp(-((x - centre[:, None, None]) ** 2 + (y - 3.5) ** 2) / 3)
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, images=pixels.astype(np.uint8), labels=labels)
    base = RECIPES["digits14"]
    model = get_preset("tiny-digits14")
    assert model.score is not None
    vae = model.vae.replace(
        image_size=8,
        crop=0,
        encoder_channels=4,
        decoder_channels=4,
        channel_mult=(1, 1),
        preprocess_blocks=1,
        postprocess_blocks=1,
        latents_per_group=1,
    )
    score = model.score.replace(latent_channels=2, channels=8, channel_mult=(1,))
    changes: dict[str, Any] = {
        "model": model.replace(vae=vae, score=score),
        "data": DataConfig(str(path), binarise="dynamic", held_out=12),
        "batch_size": 4,
        "steps": 2,
        "warmup_steps": 1,
    }
    return Recipe(base.vae.replace(**changes), base.lsgm.replace(**changes))


@pytest.fixture
def run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """The command, with the tiny recipe: exit code and record."""
    monkeypatch.setitem(RECIPES, "tiny", recipe)

    def command(ablation: str, *arguments: str, out: Path = tmp_path) -> tuple[int, dict[str, Any]]:
        code = ablations.main([ablation, *QUICK, "--out", str(out), *arguments])
        path = out / measure.machine_name("cpu") / f"ablation-{ablation}.json"
        return code, json.loads(path.read_text()) if path.exists() else {}

    return command


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[TrainingConfig]:
    """The configuration of every step that is done."""
    done: list[TrainingConfig] = []
    one_step = Trainer._one_step

    def counted(self: Trainer, stream: Any) -> dict[str, Any]:
        done.append(self.config)
        return one_step(self, stream)

    monkeypatch.setattr(Trainer, "_one_step", counted)
    return done


def nothing() -> float:
    raise AssertionError("not to be measured")


# -- what is compared -----------------------------------------------------------------------------------------------


def test_the_recipe_is_of_14x14_digits() -> None:
    recipe = RECIPES["digits14"]
    assert recipe.vae.model == recipe.lsgm.model and recipe.vae.data == recipe.lsgm.data
    assert recipe.vae.data.size == 14 and recipe.vae.model.vae.dims == 14 * 14


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_variants_differ_from_one_another_and_are_defined(name: str) -> None:
    base = RECIPES["digits14"].lsgm
    found = ablations.ABLATIONS[name](base, lambda: 50.0)
    described = [json.dumps(config.to_dict(), sort_keys=True) for config in found.values()]
    assert len(set(described)) == len(described) >= 2
    for config in found.values():
        assert (config.steps, config.seed, config.data) == (base.steps, base.seed, base.data)
        objective = config.objective
        for mode in {objective.p_mode, objective.q_mode} - {"reweight"}:
            rho = torch.tensor([0.1, 0.9])
            of = iw_quantities(build_sde(config.model.sde), rho, mode, subvp_like_vp=objective.subvp_like_vp)
            assert bool(torch.isfinite(of.weight_p).all() and torch.isfinite(of.weight_q).all())


def test_variants() -> None:
    base = RECIPES["digits14"].lsgm

    def of(name: str, largest: Callable[[], float] = nothing) -> list[TrainingConfig]:
        return list(ablations.ABLATIONS[name](base, largest).values())

    scores = [config.model.score for config in of("mixing")]
    assert [(s.mixed_prediction, s.mixing_logit_init) for s in scores if s is not None] == [
        *((True, logit) for logit in (-3.0, -6.0, 0.0)),
        (False, -3.0),
    ]
    assert [config.objective.train_vae for config in of("stages")] == [True, False]
    assert {config.objective.p_mode for config in of("weightings")} == set(IW_MODES)
    assert [config.objective.algorithm for config in of("algorithms")] == [3, 2, 2, 1]
    sdes = [config.model.sde for config in of("sdes", lambda: 50.0)]
    assert [sde.name for sde in sdes] == ["vpsde", "sub_vpsde", "geometric_sde", "vesde"]
    assert sdes[0] == SDEConfig() and sdes[3].sigma2_max == 50.0
    # The same run is the baseline of all, or a part of it.
    assert all(base in of(name, lambda: 50.0) for name in ablations.ABLATIONS)


# -- the largest distance -------------------------------------------------------------------------------------------


def test_largest_squared_distance(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = NVAE(recipe.vae.model.vae)
    images = torch.rand(7, 1, 8, 8)
    vae.train()
    statistics = {name: value.clone() for name, value in vae.state_dict().items()}
    found = largest_squared_distance(vae, images.split(3), seed=5)
    assert vae.training and all(torch.equal(value, statistics[n]) for n, value in vae.state_dict().items())
    vae.eval()
    latents = []
    for i in range(7):
        noise = [random.normal(5, [i], "distance", s, substream=k) for k, s in enumerate(vae.group_shapes)]
        groups = vae.encode(vae.preprocess_images(images[i : i + 1]), noise)
        latents.append(torch.cat([group.eps for group in groups], dim=1).flatten().detach().double())
    expected = max(float((a - b).square().sum()) for a in latents for b in latents)
    assert expected > 1.0
    assert found == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("lsgm_fast.training.latents._ROWS", 2)
    assert largest_squared_distance(vae, [images], seed=5) == pytest.approx(expected, rel=1e-5)
    assert largest_squared_distance(vae, [images], seed=6) != pytest.approx(expected, rel=1e-3)


def test_largest_squared_distance_of_nothing(recipe: Recipe) -> None:
    vae = NVAE(recipe.vae.model.vae)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        largest_squared_distance(vae, [torch.rand(1, 1, 8, 8)], seed=0)
    with torch.no_grad():
        next(vae.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="the largest distance between two latents is nan"):
        largest_squared_distance(vae, [torch.rand(3, 1, 8, 8)], seed=0)


# -- statistics -----------------------------------------------------------------------------------------------------


def test_difference_by_hand() -> None:
    # 0.5, 0.5 and 2: mean 1, s^2 = 3/4, standard error 1/2; t(2, 97.5%) = 4.3027
    difference = ablations.Difference.of({0: 1.0, 1: 2.0, 2: 4.0, 7: 99.0}, {2: 2.0, 1: 1.5, 0: 0.5})
    assert difference is not None and difference.low is not None and difference.high is not None
    assert difference.mean == pytest.approx(1.0)
    assert (difference.low, difference.high) == (
        pytest.approx(1 - 4.3027 / 2, abs=1e-4),
        pytest.approx(1 + 4.3027 / 2, abs=1e-4),
    )
    assert not difference.shown
    assert ablations.Difference(1.0, 0.5, 1.5).shown and ablations.Difference(-1.0, -2.0, -0.1).shown
    assert ablations.Difference.of({0: 1.0}, {0: 3.0}) == ablations.Difference(-2.0, None, None)
    assert not ablations.Difference(-2.0, None, None).shown
    assert ablations.Difference.of({0: 1.0}, {1: 3.0}) is None


def test_table_by_hand() -> None:
    def both(nelbo: float, frechet: float) -> dict[str, float]:
        return {"nelbo": nelbo, "kl": 1.0, "frechet": frechet}

    found = ablations.Measured(
        "stages",
        (0, 1),
        {"a": {0: both(10.0, 1.0), 1: both(12.0, 3.0)}, "b": {0: both(11.0, 1.5), 1: both(13.0, 2.5)}},
        {"a": {}, "b": {1: "oh"}},
        {0: {"nelbo": 20.0}, 1: {"nelbo": 20.0}},
        {},
    )
    # Standard errors |x - y| / 2; differences 1 and 1, and 0.5 and -0.5 with t(1, 97.5%) = 12.7062
    assert ablations.table(found).splitlines() == [
        "| variant | seeds | NELBO | minus baseline | classifier Frechet distance | minus baseline |",
        "|---|---|---|---|---|---|",
        "| a | 2 | 11.00 +- 1.00 |  | 2.000 +- 1.000 |  |",
        "| b | 2 | 12.00 +- 1.00 | +1.00 [1.00, 1.00] | 2.000 +- 0.500 | +0.000 [-6.353, 6.353] |",
        "",
        "The VAE alone, with N(0, I): NELBO 20.00 +- 0.00.",
        "1 of 2 intervals leave 0 out; were there no differences at all, about 0.1 would, by chance.",
        "Failed: b, seed 1: oh",
    ]


# -- the whole ------------------------------------------------------------------------------------------------------


def test_record_table_and_plot(
    run: Any, recipe: Recipe, steps: list[TrainingConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, record = run("stages")
    assert code == 0 and record["dry_run"] and record["name"] == "ablation-stages"
    assert [(s.stage, s.seed, s.objective.train_vae) for s in steps[::2]] == [
        (stage, seed, joint)
        for seed in (0, 1)
        for stage, joint in (("vae", True), ("lsgm", True), ("lsgm", False))
    ]
    assert len(steps) == 12
    assert record["settings"]["table"] == capsys.readouterr().out.splitlines()
    joint, frozen = record["cases"]
    assert [case["parameters"]["variant"] for case in record["cases"]] == ["end to end", "two stages"]
    assert joint["parameters"]["seeds"] == [0, 1] and joint["parameters"]["steps"] == 2
    for name in ablations.FIGURES:
        values = [case["figures"][name]["values"] for case in record["cases"]]
        assert frozen["figures"][f"{name}_difference"]["values"] == pytest.approx(
            [b - a for a, b in zip(*values, strict=True)]
        )
        assert f"{name}_difference" not in joint["figures"]

    # An evaluation of one model, by hand.
    (folder,) = {
        path.parent
        for path in tmp_path.glob("lsgm-*/config.yaml")
        if "train_vae: false" in (text := path.read_text()) and "\nseed: 1\n" in text
    }
    data = recipe.vae.data.replace(binarise="static")
    held_out = batches(open_data(data, "held_out"), data, batch_size=5, seed=3, train=False)
    report = evaluate_nelbo(lsgm_fast.load(folder / "model.safetensors"), held_out)
    assert frozen["figures"]["nelbo"]["values"][1] == pytest.approx(report.nelbo.mean, rel=1e-5)
    assert frozen["figures"]["kl"]["values"][1] == pytest.approx(report.kl.mean, rel=1e-5)
    plot = tmp_path / measure.machine_name("cpu") / "ablation-stages.svg"
    drawn = plot.read_bytes()
    assert drawn.startswith(b"<?xml")

    # Again: nothing is trained or evaluated, and the plot is the same file.
    steps.clear()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/figures-*.json")}
    assert len(times) == 6
    assert run("stages")[1]["cases"] == record["cases"]
    assert not steps and plot.read_bytes() == drawn
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/figures-*.json")} == times
    # Another evaluation is made anew, of the same models.
    more = run("stages", "--draws", "2")[1]
    assert not steps and more["cases"][0]["figures"]["nelbo"] != joint["figures"]["nelbo"]
    # What two ablations share is trained once, and the VESDE is set by the VAE's own latents.
    record = run("sdes", "--seeds", "1")[1]
    assert [config.model.sde.name for config in steps[::2]] == ["sub_vpsde", "geometric_sde", "vesde"]
    (largest,) = tmp_path.glob("vae-*/largest.json")
    measured_ = json.loads(largest.read_text())["largest_squared_distance"]
    assert record["cases"][3]["parameters"]["sde"]["sigma2_max"] == measured_ > 1.0
    assert record["cases"][0]["figures"]["nelbo"]["values"] == joint["figures"]["nelbo"]["values"][:1]


def test_goes_on_where_it_was_stopped(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run("stages", "--seeds", "1", out=tmp_path / "whole")[1]
    one_step, done = Trainer._one_step, [0]

    def stopping(self: Trainer, stream: Any) -> dict[str, Any]:
        done[0] += 1
        self._stop = done[0] == 3  # the first of two steps of stage 2
        return one_step(self, stream)

    monkeypatch.setattr(Trainer, "_one_step", stopping)
    out = tmp_path / "stopped"
    assert run("stages", "--seeds", "1", out=out) == (130, {})
    assert "the same command goes on" in capsys.readouterr().err
    code, record = run("stages", "--seeds", "1", out=out)
    assert code == 0 and done == [6]
    assert record["cases"] == expected["cases"]


def test_a_variant_that_breaks_down(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Trainer.run

    def broken(self: Trainer) -> Result:
        if not self.config.objective.train_vae and self.config.seed >= broken_from:
            raise NonFiniteError("step 2: the loss is NaN\nmore")
        return train(self)

    monkeypatch.setattr(Trainer, "run", broken)
    broken_from = 1
    code, record = run("stages")
    joint, frozen = record["cases"]
    assert code == 0 and joint["failures"] == []
    assert frozen["failures"] == ["seed 1: step 2: the loss is NaN"] and frozen["parameters"]["seeds"] == [0]
    assert len(frozen["figures"]["nelbo_difference"]["values"]) == 1
    assert record["settings"]["table"][-1] == "Failed: two stages, seed 1: step 2: the loss is NaN"
    broken_from = 0
    record = run("stages")[1]
    assert {f["kind"] for f in record["cases"][1]["figures"].values()} == {"not_measured"}
    assert record["settings"]["table"][3] == "| two stages | 0 |  |  |  |  |"


def test_minutes(run: Any, steps: list[TrainingConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "seconds", lambda trainer, stream: 0.5)
    minutes = ("--seeds", "1", "--vae-minutes", "0.025", "--minutes", "0.016")
    record = run("stages", *minutes)[1]
    assert (record["settings"]["vae_steps"], record["settings"]["steps"]) == (3, 2)
    assert record["settings"]["step_seconds"] == {"vae": 0.5, "lsgm": 0.5}
    assert [config.steps for config in steps] == [3, 3, 3, 2, 2, 2, 2]
    assert {config.warmup_steps for config in steps} == {0}
    # Not measured again: a machine that is busier now must not start other runs.
    monkeypatch.setattr(ablations, "seconds", lambda trainer, stream: nothing())
    assert run("stages", *minutes)[1]["settings"] == record["settings"]
    assert len(steps) == 7
    # One stage alone: the other has the recipe's steps.
    settings = run("stages", "--seeds", "1", "--steps", "1")[1]["settings"]
    assert (settings["vae_steps"], settings["steps"], settings["step_seconds"]) == (2, 1, {})


def test_warm_up_is_at_most_a_tenth() -> None:
    config = RECIPES["digits14"].lsgm
    assert config.warmup_steps == 100
    for steps, warmup in ((5000, 100), (250, 25)):
        short = ablations.shortened(config, steps)
        assert (short.steps, short.warmup_steps) == (steps, warmup)
    assert ablations.shortened(config.replace(warmup_steps=None), 50).warmup_steps is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixings"], "invalid choice: 'mixings'"),
        (["mixing", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["mixing", "--samples", "9"], "--samples must be at least 10, got 9"),
        (["mixing", "--draws", "0"], "--draws must be at least 1, got 0"),
        (["mixing", "--minutes", "0"], "--minutes must be positive, got 0.0"),
        (["mixing", "--steps", "5", "--minutes", "1"], "not allowed with argument --steps"),
        (["mixing", "--vae-steps", "0"], "--vae-steps must be at least 1, got 0"),
        (["mixing", "--vae-minutes", "-1"], "--vae-minutes must be positive, got -1.0"),
        (["mixing", "--minutes", "nan"], "--minutes must be positive, got nan"),
        (["mixing", "--recipe", "digit14"], "did you mean 'digits14'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        ablations.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err
