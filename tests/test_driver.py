"""Every solver by name, through the model."""

from __future__ import annotations

import pytest
import torch

import lsgm_fast
from lsgm_fast.sampling import ADAPTIVE, BUDGETED, Request
from lsgm_fast.sampling.driver import evaluations_per_step

STOCHASTIC = ("ancestral", "euler_maruyama", "predictor_corrector", "adaptive_sde")


@pytest.fixture(scope="module")
def model():
    return lsgm_fast.load("demo")


@pytest.fixture(scope="module")
def exact(model):
    return model.sample_latents(2, seed=1, solver="rk45", tol=1e-5, ode_eps=1e-3)[0]


@pytest.mark.parametrize("solver", [s for s in (*ADAPTIVE, *BUDGETED) if s not in STOCHASTIC])
def test_every_ode_solver_ends_at_the_same_latents(model, exact, solver):
    # DOP853 takes its tolerances at their word, and with a float32 network those end at 1e-4.
    options = {"tol": 1e-4} if solver in ADAPTIVE else {"evaluations": 96, "grid": "quadratic"}
    z, info = model.sample_latents(2, seed=1, solver=solver, ode_eps=1e-3, **options)
    assert info.solver == solver and (info.nfe == 96 or solver in ADAPTIVE)
    assert z.dtype == exact.dtype == torch.float32
    error = float((z - exact).norm() / exact.norm())
    assert error < (0.1 if solver in ("euler", "ddim") else 0.02)


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_every_sde_solver_draws_latents_of_the_right_size(model, solver):
    options = {"tol": 0.1} if solver == "adaptive_sde" else {"evaluations": 60}
    z, info = model.sample_latents(3, seed=1, solver=solver, **options)
    again, _ = model.sample_latents(3, seed=1, solver=solver, **options)
    assert torch.equal(z, again) and info.nfe > 0
    assert 0.7 < float(z.var()) < 1.4
    alone, _ = model.sample_latents(1, seed=1, first_index=2, solver=solver, **options)
    if solver != "predictor_corrector":  # its step size is the batch's
        torch.testing.assert_close(alone, z[2:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", BUDGETED)
def test_budgets_are_whole_steps(solver):
    request = Request(solver)
    request.check()
    assert not request.adaptive
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Request(solver, evaluations=0).check()
    per_step = evaluations_per_step(solver)
    Request(solver, evaluations=3 * per_step).check()
    if per_step > 1:
        with pytest.raises(ValueError, match=f"a multiple of {per_step} for solver='{solver}'"):
            Request(solver, evaluations=3 * per_step + 1).check()
