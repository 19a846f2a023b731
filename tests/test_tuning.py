"""Grids optimised for one model, and that they travel with it."""

from __future__ import annotations

import json

import pytest
import torch
from gaussian import LOGIT, SDES, draw

import lsgm_fast
from lsgm_fast import cli
from lsgm_fast.config import SamplingConfig
from lsgm_fast.sampling import ScoreTerm, natural_grid, optimise_grid, plan, run_program, solve_ode
from lsgm_fast.sde import build_sde


def late(sde):
    """A network whose output changes where the natural grid has long steps."""
    return ScoreTerm(lambda z, t: torch.tanh(40.0 * (t.reshape(-1, 1, 1, 1) - 0.8)) + 0.1 * z, sde, LOGIT)


def test_a_tuned_grid_is_better_on_new_noise():
    sde = build_sde(SDES["vpsde"])
    term, noise, seen = late(sde), draw(sde, 8), []
    tuned = optimise_grid(term, noise, 5, 1e-3, trials=120, callback=lambda n, best: seen.append((n, best)))
    assert tuned.error_after < 0.7 * tuned.error_before
    assert tuned.times[0] == 1.0 and tuned.times[-1] == 1e-3 and len(tuned.times) == 6
    assert len(seen) <= 120 and [n for n, _ in seen] == list(range(1, len(seen) + 1))
    new = draw(sde, 12)[8:]
    exact = solve_ode(term, new, t_end=1e-3, rtol=1e-7, atol=1e-7).z
    errors = [
        float((run_program(plan("exponential", term, times), term, new).z - exact).norm())
        for times in (natural_grid(sde, 5, 1.0, 1e-3), tuned.times)
    ]
    assert errors[1] < errors[0]


def test_what_does_not_help_is_not_kept():
    sde = build_sde(SDES["vpsde"])
    constant = ScoreTerm(lambda z, t: torch.ones_like(z), sde, LOGIT)  # every grid is exact
    tuned = optimise_grid(constant, draw(sde, 4), 3, 1e-3, trials=5)
    assert tuned.error_after <= tuned.error_before < 1e-4
    with pytest.raises(ValueError, match="at least 2 noise samples"):
        optimise_grid(constant, draw(sde, 1), 3, 1e-3)
    with pytest.raises(ValueError, match="steps must be at least 2"):
        optimise_grid(constant, draw(sde, 2), 1, 1e-3)


def test_a_model_keeps_its_grids(tmp_path, capsys):
    out = tmp_path / "new" / "digits.safetensors"
    options = ["--evaluations", "3", "--number", "4", "--trials", "8", "--device", "cpu", "--json"]
    assert cli.main(["tune", "demo", str(out), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["error_after"] <= report["error_before"] and len(report["times"]) == 4
    model = lsgm_fast.load(out)
    assert model.sampling.grid_of(3) == tuple(report["times"]) and model.sampling.grid_of(4) is None
    z, info = model.sample_latents(2, evaluations=3)
    same, _ = model.sample_latents(2, solver="exponential", grid=report["times"])
    assert info.nfe == 3 and torch.equal(z, same)
    other, _ = model.sample_latents(2, evaluations=3, ode_eps=1e-2)
    assert not torch.equal(z, other)
    assert cli.main(["tune", "demo", str(tmp_path / "x.pt"), *options]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_grids_in_a_configuration():
    config = SamplingConfig().with_grid([1.0, 0.5, 1e-5]).with_grid([1.0, 0.3, 1e-5]).with_grid([1.0, 1e-5])
    assert config.grids == ((1.0, 0.3, 1e-5), (1.0, 1e-5))
    assert SamplingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong in ([1.0], [1.0, 0.5], [0.9, 1e-5], [1.0, 0.2, 0.4, 1e-5]):
        with pytest.raises(ValueError, match="a grid must fall from 1.0 to ode_eps"):
            SamplingConfig(grids=(tuple(wrong),))
