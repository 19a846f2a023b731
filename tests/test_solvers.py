"""The sampling loops: rk45 against SciPy itself, the torchdiffeq baselines, and ancestral sampling."""

from __future__ import annotations

import importlib
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from host_reads import HostReads
from scipy.integrate import solve_ivp

from lsgm_fast.config import SDEConfig
from lsgm_fast.dispatch import record
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling import (
    HEUN,
    RK23,
    RK45,
    SOLVERS,
    Progress,
    ScoreTerm,
    SolverError,
    ode,
    runge_kutta,
    sample_ancestral,
    solution,
    solve_fixed,
    solve_ode,
)
from lsgm_fast.sde import build_sde

# --- problems: name -> (dy/dt, solution at t given y at 0 or None) --------------------------------------------


def _exponential(t, y):
    return -1.3 * y


def _harmonic(t, y):
    x, v = y.chunk(2, 1)
    return torch.cat([v, -25.0 * x], 1)


def _time_dependent(t, y):
    return -3.0 * math.cos(9.0 * t) * y + t


def _stiffish(t, y):
    return -200.0 * (y - math.cos(3.0 * t)) - 3.0 * math.sin(3.0 * t)


def _nonlinear(t, y):
    return torch.sin(4.0 * y) * (1.0 + 10.0 * t) - torch.tanh(3.0 * y)


def _switching(t, y):
    return y * (8.0 if 0.4 < t < 0.7 else -0.5)


PROBLEMS = {
    "exponential": _exponential,
    "harmonic": _harmonic,
    "time-dependent": _time_dependent,
    "stiffish": _stiffish,
    "nonlinear": _nonlinear,
    "switching": _switching,
}
INTERVALS = {"forward": (0.0, 1.0), "backward": (1.0, 1e-5), "short": (0.3, 0.3001), "long": (0.0, 4.0)}


def _initial(batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 2, 3, 5, generator=generator, dtype=torch.float64)


def _scipy(drift, z1, t_start, t_end, tol):
    """SciPy's own solve: result, the time of every evaluation, and its accepted times."""
    times: list[float] = []

    def fun(t, y):
        times.append(float(t))
        return drift(float(t), torch.from_numpy(y).view_as(z1)).reshape(-1).numpy()

    result = solve_ivp(fun, (t_start, t_end), z1.reshape(-1).numpy(), method="RK45", rtol=tol, atol=tol)
    return result, times


def _check_against_scipy(drift, z1, t_start, t_end, tol):
    times: list[float] = []

    def recording(t, z):
        times.append(t)
        return drift(t, z)

    ours = solve_ode(recording, z1, t_start=t_start, t_end=t_end, solver="rk45", rtol=tol, atol=tol)
    theirs, their_times = _scipy(drift, z1, t_start, t_end, tol)
    assert theirs.status == 0
    assert ours.nfe == theirs.nfev == len(times) == 2 + 6 * (ours.accepted + ours.rejected)
    # Every evaluation time equal means equal steps, accepted and rejected, with equal t and h. The error estimate
    # is a difference of stages: rounding of 1e-16 in them is 1e-16 / tol in its norm, hence in the step sizes.
    # A step size that differs by so little moves the state by its share of the local error.
    close = 1e-10 + 2e-15 / tol
    state_close = max(1e-10, 1e-5 * tol)
    np.testing.assert_allclose(times, their_times, rtol=0, atol=close)
    accepted = [step for step in ours.steps if step.accepted]
    assert len(accepted) == ours.accepted == len(theirs.t) - 1
    assert len(ours.steps) == ours.accepted + ours.rejected
    np.testing.assert_allclose([s.t for s in accepted], theirs.t[:-1], rtol=0, atol=close)
    np.testing.assert_allclose([s.h for s in accepted], np.diff(theirs.t), rtol=0, atol=close)
    np.testing.assert_allclose(
        ours.z.reshape(-1).numpy(), theirs.y[:, -1], rtol=state_close, atol=state_close
    )
    assert times[-1] == t_end
    return ours


@pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS.keys())
@pytest.mark.parametrize("drift", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_rk45_takes_scipys_steps(drift, interval):
    _check_against_scipy(drift, _initial(), *interval, tol=1e-5)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-7, 1e-10])
@pytest.mark.parametrize("name", ["nonlinear", "stiffish"])
def test_rk45_over_tolerances(name, tol):
    _check_against_scipy(PROBLEMS[name], _initial(), 1.0, 1e-6, tol)


def test_the_cases_exercise_rejected_steps():
    rejected = [solve_ode(f, _initial(), t_start=0.0, t_end=4.0).rejected for f in PROBLEMS.values()]
    assert max(rejected) >= 3


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_rk45_batches(batch):
    _check_against_scipy(_nonlinear, _initial(batch), 1.0, 1e-3, 1e-4)


def test_rk45_zero_drift_and_zero_state_take_scipys_first_step():
    zero = torch.zeros(2, 2, 1, 1, dtype=torch.float64)
    _check_against_scipy(lambda t, y: torch.zeros_like(y), zero, 0.0, 1.0, 1e-5)
    _check_against_scipy(lambda t, y: torch.ones_like(y), zero, 0.0, 1.0, 1e-5)


@pytest.mark.parametrize("name", ["vpsde", "geometric_sde", "sub_vpsde"])
def test_rk45_on_a_diffusion_with_a_gaussian_answer(name):
    """Data N(0, s^2): the probability flow maps z(1) to a known multiple of itself."""
    sde = build_sde(SDEConfig(name=name, sigma2_0=3e-5 if name == "geometric_sde" else 0.0))
    s2 = 0.3

    def total_variance(t):
        t = torch.tensor(t, dtype=torch.float64)
        return sde.mean_coef(t) ** 2 * s2 + sde.var(t)

    def drift(t, z):
        at = torch.tensor(t, dtype=torch.float64)
        return sde.f(at) * z + 0.5 * sde.g2(at) * z / total_variance(t)

    z1 = _initial()
    got = _check_against_scipy(drift, z1, 1.0, 1e-4, 1e-6)
    expected = z1 * torch.sqrt(total_variance(1e-4) / total_variance(1.0))
    assert (got.z - expected).abs().max() < 2e-4


def test_error_falls_with_the_tolerance():
    z1 = _initial()
    errors, nfes = [], []
    for tol in (1e-3, 1e-5, 1e-7, 1e-9):
        got = solve_ode(_exponential, z1, t_start=0.0, t_end=2.0, rtol=tol, atol=tol)
        errors.append((got.z - z1 * math.exp(-2.6)).abs().max().item())
        nfes.append(got.nfe)
    assert all(a > 5 * b for a, b in pairwise(errors))
    assert nfes == sorted(nfes)
    assert errors[-1] < 1e-8


def test_float32_state_stays_close_and_the_drift_sees_float32():
    seen = set()

    def drift(t, z):
        seen.add(z.dtype)
        return _nonlinear(t, z)

    z1 = _initial()
    exact = solve_ode(_nonlinear, z1, t_end=1e-5, rtol=1e-3, atol=1e-3)
    got = solve_ode(drift, z1.float(), t_end=1e-5, rtol=1e-3, atol=1e-3, state_dtype=torch.float32)
    assert seen == {torch.float32}
    assert got.z.dtype == torch.float32
    assert got.nfe == exact.nfe
    assert (got.z.double() - exact.z).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_state_is_float64_by_default_and_the_result_has_the_input_dtype(dtype):
    seen = set()

    def drift(t, z):
        seen.add(z.dtype)
        return -z.float()  # a float32 network

    z1 = _initial().to(dtype)
    got = solve_ode(drift, z1, t_end=0.0, rtol=1e-8, atol=1e-8)
    assert seen == {torch.float64}
    assert got.z.dtype == dtype
    expected = z1.double() * math.e
    assert ((got.z.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def test_the_input_is_not_written_to_and_may_have_any_layout():
    z1 = _initial().to(memory_format=torch.channels_last)
    before = z1.clone()
    got = solve_ode(_nonlinear, z1, t_end=1e-5)
    assert torch.equal(z1, before)
    assert torch.equal(got.z, solve_ode(_nonlinear, z1.contiguous(), t_end=1e-5).z)


def test_no_autograd_graph_is_kept():
    z1 = _initial().requires_grad_()
    assert not solve_ode(_nonlinear, z1, t_end=0.5).z.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_empty_batch_and_empty_interval(solver):
    def drift(t, z):
        raise AssertionError("no evaluation is needed")

    empty = torch.empty(0, 2, 3, 3)
    got = solve_ode(drift, empty, t_end=1e-5, solver=solver)
    assert got.z.shape == empty.shape and got.nfe == 0
    z1 = _initial()
    assert torch.equal(solve_ode(drift, z1, t_start=0.5, t_end=0.5, solver=solver).z, z1)


def _score_term(name: str = "vpsde", parity: str = "exact") -> ScoreTerm:
    """A small nonlinear "network" on (B, 2, 3, 5) states."""

    def predict(z, t):
        return torch.tanh(z) * (1.0 + t.to(z.dtype)).reshape(-1, 1, 1, 1)

    sde = build_sde(SDEConfig(name=name, sigma2_0=3e-5, parity=parity))
    return ScoreTerm(predict, sde, torch.tensor([-1.0, 0.5]).reshape(1, 2, 1, 1))


@pytest.mark.parametrize("solver", ["rk45", "rk23"])
def test_one_number_per_attempted_step_travels_to_the_host(solver):
    with HostReads() as reads:
        got = solve_ode(_score_term("geometric_sde"), _initial(), t_end=1e-5, rtol=1e-4, solver=solver)
    assert got.rejected > 0
    assert reads.count <= got.accepted + got.rejected + 1  # a norm that chooses the first step


def test_a_fixed_grid_reads_nothing_back():
    with HostReads() as reads:
        got = solve_fixed(_score_term(), _initial(), torch.linspace(1.0, 1e-3, 20).tolist())
    assert reads.count == 0 and got.nfe == 2 * 19 and got.accepted == 19


# --- a score network's ODE: the solver combines the parts ------------------------------------------------------

SDES = ["vpsde", "geometric_sde", "sub_vpsde", "vesde"]


@pytest.mark.parametrize("solver", ["rk45", "rk23"])
@pytest.mark.parametrize("name", SDES)
def test_a_score_term_takes_the_steps_of_its_plain_drift(name, solver):
    term = _score_term(name)
    z1 = _initial() * term.sde.prior_std
    ours = solve_ode(term, z1, t_end=1e-3, solver=solver, rtol=1e-5, atol=1e-5)
    plain = solve_ode(lambda t, z: term(t, z), z1, t_end=1e-3, solver=solver, rtol=1e-5, atol=1e-5)
    assert ours.nfe == plain.nfe
    assert [s.accepted for s in ours.steps] == [s.accepted for s in plain.steps]
    np.testing.assert_allclose([s.h for s in ours.steps], [s.h for s in plain.steps], rtol=1e-6)
    torch.testing.assert_close(ours.z, plain.z, rtol=1e-7, atol=1e-7)


def test_a_score_term_calls_the_network_alone_and_with_one_time_per_sample():
    seen = []
    term = _score_term()

    def predict(z, t):
        seen.append((z.shape, t.shape, z.dtype))
        return term.predict(z, t)

    with record() as log:
        got = solve_ode(ScoreTerm(predict, term.sde, term.mixing_logit), _initial(), t_end=1e-3)
    assert set(seen) == {((3, 2, 3, 5), (3,), torch.float64)} and len(seen) == got.nfe
    attempts = got.accepted + got.rejected
    calls = {name: sum(n for (op, _), n in log.counts.items() if op == name) for name, _ in log.counts}
    assert calls == {
        "score_drift": 2,  # the first evaluation and the one that chooses the first step
        "rk_stage": 1 + attempts,
        "rk_drift_stage": 5 * attempts,
        "rk_drift_finish": attempts,
        "rk_control": attempts,
    }


def test_published_formulas_are_not_combined():
    with record() as log:
        solve_ode(_score_term(parity="published"), _initial(), t_end=1e-3)
    assert not any(name.startswith("rk_drift") for name, _ in log.counts)


@pytest.mark.parametrize("evaluation", [3, 8, 14])
def test_a_score_network_that_is_not_finite_is_named(evaluation):
    times = []
    term = _score_term()

    def predict(z, t):
        times.append(float(t[0]))
        out = term.predict(z, t)
        if len(times) == evaluation:
            out[0, 1, 2, 3] = math.nan
        return out

    with pytest.raises(NonFiniteError) as caught:
        solve_ode(ScoreTerm(predict, term.sde, term.mixing_logit), _initial(), t_end=1e-3)
    found = re.search(r"step (\d+), stage (\d+) of 7, at t = ([^:]+): the drift returned", str(caught.value))
    step, stage = (evaluation - 3) // 6 + 1, (evaluation - 3) % 6 + 2
    assert (int(found[1]), int(found[2])) == (step, stage)
    assert float(found[3]) == pytest.approx(times[evaluation - 1], abs=1e-12)


@pytest.mark.parametrize(("solver", "tableau"), [("rk45", "RK45"), ("rk23", "RK23")])
def test_a_diffusions_ode_takes_scipys_steps(solver, tableau):
    """The fused path against SciPy itself, on a term."""
    term, z1 = _score_term("geometric_sde"), _initial()
    ours = solve_ode(term, z1, t_end=1e-3, solver=solver, rtol=1e-4, atol=1e-4)
    theirs = solve_ivp(
        lambda t, y: term(float(t), torch.from_numpy(y).view_as(z1)).reshape(-1).numpy(),
        (1.0, 1e-3),
        z1.reshape(-1).numpy(),
        method=tableau,
        rtol=1e-4,
        atol=1e-4,
    )
    assert ours.nfe == theirs.nfev and ours.rejected > 0
    accepted = [step for step in ours.steps if step.accepted]
    np.testing.assert_allclose([s.t + s.h for s in accepted], theirs.t[1:], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.z.reshape(-1).numpy(), theirs.y[:, -1], rtol=1e-7, atol=1e-7)


# --- fixed grids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tableau", "order"), [(HEUN, 2), (RK23, 3), (RK45, 5)])
@pytest.mark.parametrize("kind", ["plain", "term"])
def test_a_fixed_grid_converges_at_the_methods_order(kind, tableau, order):
    drift = _nonlinear if kind == "plain" else _score_term("sub_vpsde")
    exact = solve_ode(drift, _initial(), t_end=0.3, rtol=1e-11, atol=1e-11).z
    errors = []
    for steps in (16, 32):
        grid = torch.linspace(1.0, 0.3, steps + 1, dtype=torch.float64).tolist()
        got = solve_fixed(drift, _initial(), grid, tableau=tableau)
        assert got.nfe == len(tableau.b) * steps
        errors.append(float((got.z - exact).norm()))
    assert errors[1] < errors[0] / 2 ** (order - 0.7) or errors[1] < 1e-10


def test_a_fixed_grid_names_the_step_that_went_wrong():
    def drift(t, z):
        return z * (math.nan if t < 0.45 else 1.0)

    with pytest.raises(NonFiniteError, match=r"after step 3 of 4, at t = 0\.25"):
        solve_fixed(drift, _initial(), [1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("times", [[1.0], [1.0, 1.0], [1.0, math.nan], []])
def test_a_fixed_grid_needs_steps(times):
    with pytest.raises(ValueError, match="times must be at least two"):
        solve_fixed(_nonlinear, _initial(), times)


# --- progress and interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5"])
def test_callback_follows_every_attempt(solver):
    seen: list[Progress] = []
    got = solve_ode(_nonlinear, _initial(), t_end=1e-5, solver=solver, callback=seen.append)
    assert len(seen) == got.accepted + got.rejected
    assert [p.nfe for p in seen] == list(range(8, got.nfe + 1, 6))
    assert seen[-1].fraction == pytest.approx(1.0) and seen[-1].t == pytest.approx(1e-5)
    assert all(-1e-9 <= p.fraction <= 1 + 1e-9 for p in seen)


@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5"])
def test_keyboard_interrupt_from_the_callback_propagates(solver):
    calls = []

    def stop(progress):
        calls.append(progress)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve_ode(_nonlinear, _initial(), t_end=1e-5, solver=solver, callback=stop)
    assert len(calls) == 2


# --- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5"])
@pytest.mark.parametrize("evaluation", [1, 2, 3, 5, 8, 9, 20])
def test_non_finite_drift_is_named(solver, evaluation, bad):
    times = []

    def drift(t, z):
        times.append(t)
        out = _nonlinear(t, z)
        if len(times) == evaluation:
            out[0, 1, 2, 3] = bad
        return out

    with pytest.raises(NonFiniteError) as caught:
        solve_ode(drift, _initial(), t_end=1e-5, solver=solver)
    message = str(caught.value)
    step, stage = (
        (0, evaluation) if evaluation <= 2 else ((evaluation - 3) // 6 + 1, (evaluation - 3) % 6 + 2)
    )
    assert f"step {step}, stage {stage}" in message
    assert f"at t = {times[evaluation - 1]!r}" in message


def test_a_non_finite_initial_state_is_named():
    z1 = _initial()
    z1[1, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"initial state .*step 0.* at t = 1\.0"):
        solve_ode(_exponential, z1, t_end=1e-5)


def test_an_overflowing_error_norm_with_finite_stages_is_a_rejected_step():
    """Only the last stage of a step that reaches t = 1 is large: finite, but its square is not in float32."""
    attempts = []

    def drift(t, z):
        return torch.full_like(z, 1e25 if t == 1.0 else 0.0)

    with pytest.raises(SolverError, match="max_steps = 40"):
        solve_ode(
            drift,
            torch.zeros(1, 1, 1, 1),
            t_start=0.0,
            t_end=1.0,
            state_dtype=torch.float32,
            max_steps=40,
            callback=attempts.append,
        )
    assert len(attempts) == 40 and attempts[-1].t > 0.99


def test_a_singular_drift_ends_in_a_clear_error():
    def drift(t, z):
        return torch.sign(z) * 1e3  # jumps across 0 for ever smaller steps

    with pytest.raises(SolverError, match=r"smaller than the spacing of numbers|max_steps"):
        solve_ode(lambda t, z: 1.0 / (z - 0.5), torch.full((1, 1), 1.0).double(), t_end=-1.0, max_steps=3000)
    with pytest.raises(SolverError, match=r"max_steps = 5 steps and reached t = "):
        solve_ode(drift, _initial(), t_end=1e-5, max_steps=5)


def test_scipy_giving_up_is_an_error_too():
    with pytest.raises(SolverError, match="gave up|max_steps"):
        solve_ode(
            lambda t, z: 1.0 / (z - 0.5),
            torch.full((1, 1), 1.0).double(),
            t_end=-1.0,
            solver="scipy",
            max_steps=3000,
        )


@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5"])
def test_a_drift_of_the_wrong_shape(solver):
    with pytest.raises(ValueError, match=r"shape \(3, 1, 3, 5\) for a state of shape \(3, 2, 3, 5\)"):
        solve_ode(lambda t, z: z[:, :1], _initial(), t_end=1e-5, solver=solver)


@pytest.mark.parametrize("solver", ["rk45", "dopri5"])
def test_a_device_without_float64(monkeypatch, solver):
    monkeypatch.setattr(solution, "supports_float64", lambda device: False)
    with pytest.raises(ValueError, match=r"no float64.*state_dtype=torch\.float32"):
        solve_ode(_exponential, _initial().float(), t_end=1e-5, solver=solver)
    got = solve_ode(_exponential, _initial().float(), t_end=1e-5, solver=solver, state_dtype=torch.float32)
    assert got.z.dtype == torch.float32


def test_float64_support_is_known():
    assert solution.supports_float64(torch.device("cpu"))
    assert solution.supports_float64(torch.device("cuda", 0))
    assert not solution.supports_float64(torch.device("mps"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "rk54"}, "unknown solver 'rk54'.*did you mean 'rk45'"),
        ({"rtol": -1.0}, "rtol must be finite and not negative, got -1.0"),
        ({"atol": math.nan}, "atol must be finite"),
        ({"rtol": 0.0, "atol": 0.0}, "both 0"),
        ({"t_end": math.inf}, "t_end must be finite"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"state_dtype": torch.float16}, r"state_dtype must be .* got torch\.float16"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        solve_ode(_exponential, _initial(), **{"t_end": 1e-5, **change})


def test_an_integer_state_is_refused():
    with pytest.raises(ValueError, match=r"floating-point tensor, got torch\.int64"):
        solve_ode(_exponential, torch.ones(2, 2, dtype=torch.int64), t_end=1e-5)


def test_a_relative_tolerance_below_float64_is_raised_as_scipy_does():
    with pytest.warns(UserWarning, match="too small"):
        got = solve_ode(_exponential, _initial(), t_end=0.9, rtol=1e-20, atol=1e-6)
    assert (
        got.nfe
        == solve_ode(_exponential, _initial(), t_end=0.9, rtol=runge_kutta.SMALLEST_RTOL, atol=1e-6).nfe
    )


# --- torchdiffeq baselines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_the_published_path_takes_the_same_steps_as_rk45(drift):
    z1 = _initial()
    ours = solve_ode(drift, z1, t_end=1e-5, solver="rk45")
    published = solve_ode(drift, z1, t_end=1e-5, solver="scipy")
    assert published.nfe == ours.nfe
    assert [s.accepted for s in published.steps] == [s.accepted for s in ours.steps]
    np.testing.assert_allclose([s.t for s in published.steps], [s.t for s in ours.steps], atol=1e-10)
    np.testing.assert_allclose([s.h for s in published.steps], [s.h for s in ours.steps], atol=1e-10)
    torch.testing.assert_close(published.z, ours.z, rtol=1e-10, atol=1e-10)


def test_the_published_path_shows_the_drift_the_input_dtype():
    seen = set()

    def drift(t, z):
        seen.add((z.dtype, type(t)))
        return -z

    got = solve_ode(drift, _initial().float(), t_end=1e-5, solver="scipy")
    assert seen == {(torch.float32, float)}
    assert got.z.dtype == torch.float32


def test_auto_is_rk45():
    auto = solve_ode(_nonlinear, _initial(), t_end=1e-5, solver="auto")
    assert torch.equal(auto.z, solve_ode(_nonlinear, _initial(), t_end=1e-5, solver="rk45").z)
    assert ode.resolve_solver("auto") == "rk45"


@pytest.mark.parametrize("interval", [(1.0, 1e-5), (1.0, 0.9999), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dopri5_never_leaves_the_interval(interval, dtype):
    times = []

    def drift(t, z):
        times.append(t)
        return -0.5 * z

    z1 = _initial()
    t_start, t_end = interval
    got = solve_ode(drift, z1, t_start=t_start, t_end=t_end, solver="dopri5", state_dtype=dtype)
    assert min(times) >= min(interval) and max(times) <= max(interval)
    assert got.nfe == len(times) == 2 + 6 * (got.accepted + got.rejected)
    assert (got.z - z1 * math.exp(-0.5 * (t_end - t_start))).abs().max() < 1e-4


def test_plain_dopri5_does_leave_it():
    """The reason for the option that the baseline sets: without it the variance would be taken at t < 0."""
    torchdiffeq = importlib.import_module("torchdiffeq")
    times = []

    def drift(t, z):
        times.append(float(t))
        return -0.5 * z

    torchdiffeq.odeint(
        drift, _initial(), torch.tensor([1.0, 1e-5]).double(), method="dopri5", rtol=1e-3, atol=1e-3
    )
    assert min(times) < 0


@pytest.mark.parametrize("solver", ["scipy", "dopri5"])
def test_missing_torchdiffeq(monkeypatch, solver):
    def missing(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'needs the package torchdiffeq.*solver="rk45"'):
        solve_ode(_exponential, _initial(), t_end=1e-5, solver=solver)


# --- ancestral ----------------------------------------------------------------------------------------------


def _network(z, t):
    assert t.shape == (z.shape[0],)
    return torch.tanh(z) * (0.5 + t.to(z.dtype).view(-1, 1, 1, 1))


def _naive_ancestral(sde, z, logit, noises, steps, variance, temperature):
    abar = [1.0] + [
        1.0 - sde.var(torch.tensor(k / steps, dtype=torch.float64)).item() for k in range(1, steps + 1)
    ]
    beta = [0.0] + [1.0 - abar[k] / abar[k - 1] for k in range(1, steps + 1)]
    a = torch.sigmoid(logit)
    for i, k in enumerate(range(steps, 0, -1)):
        t = torch.full((z.shape[0],), k / steps, dtype=torch.float64)
        root = math.sqrt(1 - abar[k])
        eps = (1 - a) * root * z + a * _network(z, t)
        if k == 1:
            return ((z - root * eps) / math.sqrt(abar[1])).clamp(-3, 3)
        std = math.sqrt(beta[k] if variance == "beta" else beta[k] * (1 - abar[k - 1]) / (1 - abar[k]))
        z = (z - beta[k] * eps / root) / math.sqrt(1 - beta[k]) + temperature * std * noises[i]
    raise AssertionError


@pytest.mark.parametrize("variance", ["beta", "beta_post"])
@pytest.mark.parametrize("name", ["vpsde", "geometric_sde", "sub_vpsde"])
def test_ancestral_against_a_naive_loop(name, variance):
    sde = build_sde(SDEConfig(name=name, sigma2_0=3e-5 if name == "geometric_sde" else 1e-4))
    steps = 16
    generator = torch.Generator().manual_seed(1)
    z1, *noises = torch.randn(steps + 1, 3, 4, 2, 3, generator=generator, dtype=torch.float64)
    logit = torch.linspace(-4, 1, 4, dtype=torch.float64).view(1, 4, 1, 1)
    asked, seen = [], []

    def noise_fn(i):
        asked.append(i)
        return noises[i]

    got = sample_ancestral(
        _network,
        z1,
        sde=sde,
        mixing_logit=logit,
        steps=steps,
        noise_fn=noise_fn,
        temperature=0.7,
        variance=variance,
        callback=seen.append,
    )
    expected = _naive_ancestral(sde, z1, logit, noises, steps, variance, 0.7)
    assert (got.z - expected).abs().max() < 1e-10
    assert asked == list(range(steps - 1))
    assert got.nfe == got.accepted == len(got.steps) == steps and got.rejected == 0
    assert [p.nfe for p in seen] == list(range(1, steps + 1)) and seen[-1].fraction == 1.0
    single = sample_ancestral(
        _network,
        z1.float(),
        sde=sde,
        mixing_logit=logit.float(),
        steps=steps,
        noise_fn=lambda i: noises[i].float(),
        temperature=0.7,
        variance=variance,
    )
    assert single.z.dtype == torch.float32
    assert torch.linalg.vector_norm(single.z - expected) < 1e-4 * torch.linalg.vector_norm(expected)


def _run(**change):
    arguments = {
        "sde": build_sde(SDEConfig()),
        "steps": 20,
        "noise_fn": lambda i: torch.zeros(2, 4, 2, 2),
    }
    score = change.pop("score", _network)
    z1 = change.pop("z1", torch.ones(2, 4, 2, 2))
    return sample_ancestral(score, z1, **{**arguments, **change})


@pytest.mark.parametrize("bad_step", [1, 7, 16, 17, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ancestral_names_the_step_that_went_wrong(bad_step, bad):
    calls = []

    def score(z, t):
        calls.append(t[0].item())
        return torch.full_like(z, bad) if len(calls) == bad_step else torch.zeros_like(z)

    with pytest.raises(NonFiniteError, match=rf"step {bad_step} of 20, at t = {(21 - bad_step) / 20}"):
        _run(score=score)
    assert len(calls) <= bad_step + 15


def test_ancestral_clamps_and_keeps_its_input():
    z1 = torch.full((2, 4, 2, 2), 50.0)
    got = _run(z1=z1, score=lambda z, t: torch.zeros_like(z))
    assert got.z.max() == 3.0
    assert (z1 == 50.0).all()


def test_ancestral_empty_batch():
    assert _run(z1=torch.empty(0, 4, 2, 2)).z.shape == (0, 4, 2, 2)


def test_ancestral_interrupt():
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(callback=stop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variance": "beta_pos"}, "unknown ancestral variance 'beta_pos'.*did you mean 'beta_post'"),
        ({"temperature": -0.5}, "temperature must be finite and not negative, got -0.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"sde": None}, "exactly one of sde and schedule"),
        ({"noise_fn": lambda i: torch.zeros(2, 4, 2, 3)}, r"noise_fn\(0\) returned shape \(2, 4, 2, 3\)"),
        ({"score": lambda z, t: z[:1]}, r"network returned shape \(1, 4, 2, 2\)"),
        ({"z1": torch.ones(2, 4, 2, 2, dtype=torch.int64)}, "floating-point tensor"),
    ],
)
def test_ancestral_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        _run(**change)
