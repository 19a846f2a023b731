"""Euler, RK4 and DOP853, and step control per sample, on problems with a solution in closed form."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian import LOGIT, SDES, T_END, gaussian_term, variance
from host_reads import HostReads
from scipy.integrate import solve_ivp

from lsgm_fast.dispatch import use_backend
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling import Progress, ScoreTerm, SolverError, StepRecord, solve_fixed, solve_ode
from lsgm_fast.sampling.runge_kutta import solve_adaptive
from lsgm_fast.sampling.tableaus import DOP853, EULER, HEUN, RK4, RK23, RK45
from lsgm_fast.sde import SDE, build_sde

F32, F64 = torch.float32, torch.float64


def _noise(sde: SDE, batch: int = 5) -> torch.Tensor:
    """Samples of very different size, so that their steps differ."""
    generator = torch.Generator().manual_seed(3)
    size = 10.0 ** torch.linspace(-1.5, 1.5, batch, dtype=F64).reshape(-1, 1, 1, 1)
    return size * sde.prior_std * torch.randn(batch, 3, 2, 5, generator=generator, dtype=F64)


def _exact(sde: SDE, z: torch.Tensor, t: float = 1.0, t_end: float = T_END) -> torch.Tensor:
    return z * (variance(sde, t_end) / variance(sde, t)).sqrt()


def _gaussian(sde: SDE, seen: list[tuple[torch.Tensor, torch.Tensor]] | None = None) -> ScoreTerm:
    """Gaussian data, in the dtype of the state; ``seen`` gets what the network was called with."""
    term = gaussian_term(sde)

    def predict(z, t):
        if seen is not None:
            seen.append((z.clone(), t.clone()))
        assert t.shape == z.shape[:1]
        return term.predict(z, t).to(z.dtype)

    return ScoreTerm(predict, sde, LOGIT)


def _waves(sde: SDE) -> ScoreTerm:
    """A network that is not linear: with the geometric SDE the samples' steps differ and some are rejected."""

    def predict(z, t):
        return torch.tanh(z) * (1.0 + t.to(z.dtype)).reshape(-1, 1, 1, 1)

    return ScoreTerm(predict, sde, LOGIT)


def _smooth(t, y):
    return torch.sin(2.0 * y) * (1.0 + t) - 0.5 * y


def _initial(batch: int = 2) -> torch.Tensor:
    return torch.linspace(-1.5, 2.0, 6 * batch, dtype=F64).reshape(batch, 3, 2, 1)


# -- tableaus ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tableau", [EULER, RK4, DOP853, RK45, RK23, HEUN], ids=lambda t: t.name)
def test_the_tableaus_are_consistent(tableau):
    assert len(tableau.c) == tableau.stages and all(len(row) <= i for i, row in enumerate(tableau.a))
    # The literals of DOP853 reach 43, which leaves 1e-14.
    np.testing.assert_allclose([sum(row) for row in tableau.a], tableau.c, rtol=0, atol=1e-14)
    assert sum(tableau.b) == pytest.approx(1.0, abs=1e-14)
    assert not tableau.reuses_last or tableau.a[-1] == tableau.b
    for weights in (tableau.e, tableau.e_low):
        assert sum(weights) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize(
    ("tableau", "order", "steps"),
    [(EULER, 1, 32), (RK4, 4, 32), (DOP853, 8, 2)],
    ids=["Euler", "RK4", "DOP853"],
)
@pytest.mark.parametrize("kind", ["plain", "term"])
def test_a_fixed_grid_converges_at_the_methods_order(kind, tableau, order, steps):
    """z(t) of Gaussian data in closed form; without a term y' = cos(3 t) y, y = exp(sin(3 t) / 3)."""
    if kind == "term":
        sde = build_sde(SDES["sub_vpsde"])
        drift, start, end = _gaussian(sde), 1.0, 0.4
        z1 = _noise(sde)
        exact = _exact(sde, z1, start, end)
    else:
        drift, start, end, z1 = (lambda t, y: math.cos(3.0 * t) * y), 0.0, 0.8, _initial()
        exact = z1 * math.exp(math.sin(2.4) / 3.0)
    errors = []
    for n in (steps, 2 * steps, 4 * steps):
        grid = torch.linspace(start, end, n + 1, dtype=F64).tolist()
        got = solve_fixed(drift, z1, grid, tableau=tableau)
        assert got.nfe == len(tableau.b) * n and got.accepted == n
        errors.append(float((got.z - exact).norm() / exact.norm()))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert order - 0.4 < rates[-1] < order + 1.2, (errors, rates)


def test_one_step_of_euler_and_of_rk4_by_hand():
    y, h = _initial(), -0.25
    k1 = _smooth(1.0, y)
    torch.testing.assert_close(solve_fixed(_smooth, y, [1.0, 0.75], tableau=EULER).z, y + h * k1)
    k2 = _smooth(0.875, y + h / 2 * k1)
    k3 = _smooth(0.875, y + h / 2 * k2)
    k4 = _smooth(0.75, y + h * k3)
    got = solve_fixed(_smooth, y, [1.0, 0.75], tableau=RK4)
    torch.testing.assert_close(got.z, y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


@pytest.mark.parametrize("tableau", [EULER, RK4], ids=lambda t: t.name)
def test_without_an_error_estimate_there_are_no_adaptive_steps(tableau):
    with pytest.raises(ValueError, match=rf"{tableau.name} has no error estimate .* solve_fixed"):
        _adaptive(_smooth, _initial(), tableau)


def _adaptive(drift, z1, tableau, **changes):
    arguments = {"t_start": 1.0, "t_end": T_END, "rtol": 1e-5, "atol": 1e-5, "state_dtype": F64}
    arguments |= {"callback": None, "max_steps": 1000, "tableau": tableau}
    with torch.no_grad():
        return solve_adaptive(drift, z1, **{**arguments, **changes})


# -- DOP853 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", ["plain", "term", "rejecting"])
def test_dop853_takes_scipys_steps(kind, backend, tol):
    sde, geometric = build_sde(SDES["vpsde"]), build_sde(SDES["geometric_sde"])
    drift, z1, interval = {
        "plain": (_smooth, _initial(), (0.0, 3.0)),
        "term": (_gaussian(sde), _noise(sde), (1.0, T_END)),
        "rejecting": (_waves(geometric), _noise(geometric), (1.0, 1e-3)),
    }[kind]
    with use_backend(backend or "auto"):
        ours = solve_ode(
            drift, z1, t_start=interval[0], t_end=interval[1], solver="dop853", rtol=tol, atol=tol
        )
    theirs = solve_ivp(
        lambda t, y: drift(float(t), torch.from_numpy(y).view_as(z1)).reshape(-1).numpy(),
        interval,
        z1.reshape(-1).numpy(),
        method="DOP853",
        rtol=tol,
        atol=tol,
    )
    assert ours.nfe == theirs.nfev == 2 + 12 * (ours.accepted + ours.rejected)
    assert ours.rejected > 0 or kind != "rejecting" or tol == 1e-3
    ends = [s.t + s.h for s in ours.steps if s.accepted]
    # The error is a difference of stages: rounding of 1e-16 in them is 1e-16 / tol in its norm, thus in the steps.
    np.testing.assert_allclose(ends, theirs.t[1:], rtol=0, atol=1e-9 + 1e-14 / tol)
    np.testing.assert_allclose(ours.z.reshape(-1).numpy(), theirs.y[:, -1], rtol=1e-7, atol=tol)


@pytest.mark.parametrize("name", SDES)
def test_dop853_is_right_and_cheaper_than_rk45_at_tight_tolerances(name):
    sde = build_sde(SDES[name])
    z1 = _noise(sde)[2:3]
    exact = _exact(sde, z1)
    results = {
        solver: solve_ode(_gaussian(sde), z1, t_end=T_END, solver=solver, rtol=1e-9, atol=1e-9)
        for solver in ("dop853", "rk45")
    }
    assert results["dop853"].nfe < results["rk45"].nfe
    assert ((results["dop853"].z - exact).abs() / (1 + exact.abs())).max() < 2e-9


def test_dop853_without_a_drift_makes_no_error():
    z1 = _initial()
    got = solve_ode(lambda t, y: torch.zeros_like(y), z1, t_end=0.0, solver="dop853")
    assert torch.equal(got.z, z1) and got.rejected == 0 and {s.error_norm for s in got.steps} == {0.0}


def test_dop853_names_what_is_not_finite():
    times = []

    def drift(t, y):
        times.append(t)
        out = _smooth(t, y)
        if len(times) == 2 + 12 + 5:
            out[1, 0, 0, 0] = math.nan
        return out

    with pytest.raises(NonFiniteError, match=r"step 2, stage 6 of 13, at t = ") as caught:
        solve_ode(drift, _initial(), t_end=0.0, solver="dop853")
    assert f"t = {times[-8]!r}: the drift returned" in str(caught.value)


def test_dop853_with_a_float32_state():
    sde = build_sde(SDES["vpsde"])
    z1 = _noise(sde, 3).float()
    got = solve_ode(_gaussian(sde), z1, t_end=T_END, solver="dop853", rtol=1e-4, atol=1e-4, state_dtype=F32)
    torch.testing.assert_close(got.z.double(), _exact(sde, z1.double()), rtol=1e-3, atol=1e-3)


# -- a step size for every sample -------------------------------------------------------------------------------------


def _by_sample(steps: list[StepRecord], t_end: float) -> list[list[StepRecord]]:
    """The records of the samples: the last of each arrives."""
    out: list[list[StepRecord]] = [[]]
    for step in steps:
        out[-1].append(step)
        if step.accepted and step.t + step.h == pytest.approx(t_end, abs=1e-14):
            out.append([])
    assert out.pop() == []
    return out


@pytest.mark.parametrize("solver", ["rk45", "rk23", "dop853"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_sample_does_not_depend_on_the_others(backend, solver):
    sde = build_sde(SDES["geometric_sde"])
    z1 = _noise(sde)
    options = {"t_end": 1e-3, "solver": solver, "rtol": 1e-4, "atol": 1e-4, "control": "per_sample"}
    with use_backend(backend or "auto"):
        together = solve_ode(_waves(sde), z1, **options)
        alone = [solve_ode(_waves(sde), z1[i : i + 1], **options) for i in range(len(z1))]
        joint = [
            solve_ode(_waves(sde), z1[i : i + 1], **{**options, "control": "joint"}) for i in range(len(z1))
        ]
        turned = solve_ode(_waves(sde), z1.flip(0), **options)
    torch.testing.assert_close(together.z, turned.z.flip(0), rtol=1e-9, atol=1e-12)
    records = _by_sample(together.steps, 1e-3)
    attempts = [len(steps) for steps in records]
    assert len(set(attempts)) >= 3 and together.rejected > 0  # or the samples would be alike
    assert together.accepted == sum(a.accepted for a in alone)
    assert together.rejected == sum(a.rejected for a in alone)
    assert together.nfe == max(a.nfe for a in alone)
    for i, (steps, *others) in enumerate(zip(records, alone, joint, strict=True)):
        for other in others:  # alone, both kinds of control are the same
            torch.testing.assert_close(together.z[i : i + 1], other.z, rtol=1e-9, atol=1e-12)
            assert [s.accepted for s in steps] == [s.accepted for s in other.steps]
            for field in ("t", "h", "error_norm"):
                ours, theirs = ([getattr(s, field) for s in found] for found in (steps, other.steps))
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", ["rk45", "rk23", "dop853"])
@pytest.mark.parametrize("name", SDES)
def test_per_sample_on_gaussian_data(name, solver):
    sde = build_sde(SDES[name])
    z1 = _noise(sde)
    # DOP853's long steps at loose tolerances can err by far more than it estimates.
    tol = {"rk23": 1e-4, "rk45": 1e-6, "dop853": 1e-8}[solver]
    got = solve_ode(_gaussian(sde), z1, t_end=T_END, solver=solver, rtol=tol, atol=tol, control="per_sample")
    exact = _exact(sde, z1)
    assert ((got.z - exact).abs() / (1 + exact.abs())).max() < 30 * tol
    back = solve_ode(
        _gaussian(sde),
        exact,
        t_start=T_END,
        t_end=1.0,
        solver=solver,
        rtol=tol,
        atol=tol,
        control="per_sample",
    )
    # What is below the tolerance at T_END grows with the standard deviation.
    growth = float((variance(sde, 1.0) / variance(sde, T_END)).sqrt())
    assert ((back.z - z1).abs() / (1 + z1.abs())).max() < 30 * tol * max(1.0, growth)


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_those_that_arrive_leave_the_batch(order):
    sde = build_sde(SDES["vpsde"])
    z1 = _noise(sde)[{"rising": [0, 1, 2, 3, 4], "falling": [4, 3, 2, 1, 0], "mixed": [2, 4, 0, 3, 1]}[order]]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    progress: list[Progress] = []
    got = solve_ode(
        _gaussian(sde, seen),
        z1,
        t_end=T_END,
        rtol=1e-6,
        atol=1e-3,
        control="per_sample",
        callback=progress.append,
    )
    sizes = [len(z) for z, _ in seen]
    attempts = [len(steps) for steps in _by_sample(got.steps, T_END)]
    assert len(set(attempts)) >= 3
    under_way = [sum(n > i for n in attempts) for i in range(max(attempts))]
    assert sizes == [5, 5] + [n for n in under_way for _ in range(6)]
    assert got.nfe == len(seen) == 2 + 6 * max(attempts)
    assert len(set(seen[2][1].tolist())) > 1  # the times differ
    torch.testing.assert_close(got.z, _exact(sde, z1), rtol=1e-3, atol=5e-3)
    # The callback follows the sample that is furthest behind.
    assert len(progress) == max(attempts) and progress[-1] == Progress(fraction=1.0, t=T_END, nfe=got.nfe)
    assert all(a.fraction <= b.fraction for a, b in pairwise(progress))


def test_a_method_whose_last_stage_is_not_reused():
    sde = build_sde(SDES["geometric_sde"])
    z1 = _noise(sde)
    got = _adaptive(_waves(sde), z1, HEUN, rtol=1e-3, atol=1e-3, control="per_sample")
    alone = [_adaptive(_waves(sde), z1[i : i + 1], HEUN, rtol=1e-3, atol=1e-3) for i in range(len(z1))]
    assert [len(s) for s in _by_sample(got.steps, T_END)] == [len(a.steps) for a in alone]
    torch.testing.assert_close(got.z, torch.cat([a.z for a in alone]), rtol=1e-9, atol=1e-12)


def test_one_transfer_per_attempted_step():
    sde = build_sde(SDES["geometric_sde"])
    z1 = _noise(sde)
    with HostReads() as reads:
        got = solve_ode(_waves(sde), z1, t_end=1e-3, control="per_sample")
    assert got.rejected > 0 and reads.count == 0  # the transfers by tolist() are counted below
    calls = []
    original = torch.Tensor.tolist

    def counted(self):
        calls.append(self.shape)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", counted)
        solve_ode(_waves(sde), z1, t_end=1e-3, control="per_sample")
    attempts = max(len(steps) for steps in _by_sample(got.steps, 1e-3))
    # One for the first step, one per attempt, two for the records.
    assert len(calls) == 1 + attempts + 2 and all(shape.numel() <= 5 for shape in calls[1:-2])


@pytest.mark.parametrize("state_dtype", [F32, F64])
def test_dtypes_and_determinism(state_dtype):
    sde = build_sde(SDES["vpsde"])
    z1 = _noise(sde, 4).float()
    before = z1.clone()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    options = {
        "t_end": T_END,
        "rtol": 1e-4,
        "atol": 1e-4,
        "state_dtype": state_dtype,
        "control": "per_sample",
    }
    got = solve_ode(_gaussian(sde, seen), z1, **options)
    assert {z.dtype for z, _ in seen} == {state_dtype} and got.z.dtype == F32
    assert torch.equal(z1, before)
    torch.testing.assert_close(got.z.double(), _exact(sde, z1.double()), rtol=1e-3, atol=1e-3)
    again = solve_ode(_gaussian(sde), z1, **options)
    assert torch.equal(again.z, got.z) and again.steps == got.steps
    cl = z1.to(memory_format=torch.channels_last)
    assert torch.equal(solve_ode(_gaussian(sde), cl, **options).z, got.z)


def test_published_formulas():
    """Not combined by the solver, and float32: the term itself is called, with a time for each sample."""
    sde = build_sde(SDES["vpsde"].replace(parity="published"))
    z1 = _noise(sde, 3)
    got = solve_ode(_gaussian(sde), z1, t_end=T_END, rtol=1e-3, atol=1e-3, control="per_sample")
    torch.testing.assert_close(got.z, _exact(sde, z1), rtol=1e-2, atol=1e-2)
    assert len({len(steps) for steps in _by_sample(got.steps, T_END)}) > 1


def test_nothing_to_do():
    sde = build_sde(SDES["vpsde"])
    got = solve_ode(_gaussian(sde), torch.empty(0, 3, 2, 5), t_end=T_END, control="per_sample")
    assert got.z.shape == (0, 3, 2, 5) and got.nfe == 0
    z1 = _noise(sde)
    got = solve_ode(_gaussian(sde), z1, t_start=0.5, t_end=0.5, control="per_sample")
    assert torch.equal(got.z, z1) and got.nfe == 0


def test_a_sample_of_zeros_beside_others():
    sde = build_sde(SDES["vpsde"])
    z1 = _noise(sde)
    z1[1] = 0.0
    got = solve_ode(_gaussian(sde), z1, t_end=T_END, rtol=1e-4, control="per_sample")
    assert (got.z[1] == 0).all()
    torch.testing.assert_close(got.z, _exact(sde, z1), rtol=1e-3, atol=1e-3)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["rk45", "dop853"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("call", [3, 5, 20])
def test_a_network_that_is_not_finite_is_named(call, bad, solver):
    """Where the sample lies in the batch changes as others leave it; its number does not."""
    sde = build_sde(SDES["vpsde"])
    term, calls = _gaussian(sde), []
    stages = 6 if solver == "rk45" else 12
    z1 = _noise(sde)

    def predict(z, t):
        calls.append(t.tolist())
        out = term.predict(z, t)
        if len(calls) == call:
            out[-1, 1, 1, 2] = bad  # the last, which has most to do
        return out

    with pytest.raises(NonFiniteError) as caught:
        solve_ode(ScoreTerm(predict, sde, LOGIT), z1, t_end=T_END, solver=solver, control="per_sample")
    step, stage = (call - 3) // stages + 1, (call - 3) % stages + 2
    pattern = rf"step {step} of sample 4, stage {stage} of {stages + 1}, at t = ([^:]+): the drift returned"
    found = re.search(pattern, str(caught.value))
    assert found is not None, str(caught.value)
    assert float(found[1]) == pytest.approx(calls[call - 1][-1], abs=1e-12)


def test_a_sample_that_goes_wrong_after_others_left_is_named():
    sde = build_sde(SDES["vpsde"])
    term = _gaussian(sde)

    def predict(z, t):
        out = term.predict(z, t)
        return out * math.nan if len(z) == 1 else out

    with pytest.raises(NonFiniteError, match=r"step \d+ of sample 1, stage 2 of 7"):
        solve_ode(ScoreTerm(predict, sde, LOGIT), _noise(sde)[[0, 4, 2]], t_end=T_END, control="per_sample")


@pytest.mark.parametrize("call", [1, 2])
def test_the_first_evaluations_and_the_initial_state_are_named(call):
    sde = build_sde(SDES["vpsde"])
    term, calls = _gaussian(sde), []

    def predict(z, t):
        calls.append(t[2].item())
        out = term.predict(z, t)
        if len(calls) == call:
            out[2, 0, 0, 0] = math.nan
        return out

    with pytest.raises(NonFiniteError, match=rf"sample 2 \(step 0, stage {call}") as caught:
        solve_ode(ScoreTerm(predict, sde, LOGIT), _noise(sde), t_end=T_END, control="per_sample")
    assert f"at t = {calls[call - 1]!r}" in str(caught.value)
    z1 = _noise(sde)
    z1[3, 1, 0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"initial state of sample 3 \(step 0, stage 1\) .* at t = 1\.0"):
        solve_ode(_gaussian(sde), z1, t_end=T_END, control="per_sample")


def test_a_sample_that_stalls_is_named():
    sde = build_sde(SDES["vpsde"])
    term = _gaussian(sde)

    def predict(z, t):
        # Of the large sample alone, from t = 0.5 on: noise too large for any step.
        wild = (z[:, 0, 0, 0] > 50) & (t < 0.5)
        return term.predict(z, t) + 1e20 * torch.sin(1e6 * z) * wild.reshape(-1, 1, 1, 1)

    z1 = _noise(sde, 3)
    z1[1] = 1e3
    with pytest.raises(
        SolverError, match=r"spacing of numbers at t = 0\.\d+ \(sample 1, step \d+, h = "
    ) as caught:
        solve_ode(ScoreTerm(predict, sde, LOGIT), z1, t_end=T_END, control="per_sample")
    assert "rtol = 1e-05" in str(caught.value)


def test_too_many_steps_name_the_sample_that_is_furthest_behind():
    sde = build_sde(SDES["vpsde"])
    with pytest.raises(
        SolverError, match=r"max_steps = 9 steps of each sample, and sample 4 reached t = 0\.\d+ of"
    ):
        solve_ode(_gaussian(sde), _noise(sde), t_end=T_END, max_steps=9, rtol=1e-8, control="per_sample")
    three = _noise(sde)[[0, 1, 4]]
    options = {"t_end": T_END, "control": "per_sample"}
    attempts = [len(s) for s in _by_sample(solve_ode(_gaussian(sde), three, **options).steps, T_END)]
    assert max(attempts[:2]) < attempts[2]
    with pytest.raises(SolverError, match=r"and sample 2 reached .* \(1 of 3 did not arrive\)"):
        solve_ode(_gaussian(sde), three, max_steps=attempts[2] - 1, **options)
    assert solve_ode(_gaussian(sde), three, max_steps=attempts[2], **options).nfe == 2 + 6 * attempts[2]


def test_an_overflowing_norm_with_finite_stages_is_a_rejected_step():
    """The second sample's network is huge in one call: finite in float32, its square is not."""
    sde = build_sde(SDES["vpsde"])
    term, calls = _gaussian(sde), []

    def predict(z, t):
        calls.append(len(z))
        out = term.predict(z, t)
        if len(calls) == 8:  # the last stage of the first step
            out[1] = 1e25
        return out

    z1 = _noise(sde, 3)
    got = solve_ode(
        ScoreTerm(predict, sde, LOGIT),
        z1,
        t_end=T_END,
        rtol=1e-3,
        atol=1e-3,
        state_dtype=F32,
        control="per_sample",
    )
    first = [steps[0] for steps in _by_sample(got.steps, T_END)]
    assert [s.accepted for s in first] == [True, False, True] and not math.isfinite(first[1].error_norm)
    torch.testing.assert_close(got.z, _exact(sde, z1), rtol=1e-2, atol=1e-2)


def test_bad_arguments():
    sde = build_sde(SDES["vpsde"])
    z1 = _noise(sde)
    with pytest.raises(ValueError, match=r"unknown step control 'per_smaple'.*did you mean 'per_sample'"):
        solve_ode(_gaussian(sde), z1, t_end=T_END, control="per_smaple")
    with pytest.raises(ValueError, match=r'control="per_sample" .* got function, expected a ScoreTerm'):
        solve_ode(_smooth, z1, t_end=T_END, control="per_sample")
    for solver in ("scipy", "dopri5"):
        with pytest.raises(ValueError, match=rf"needs one of the solvers rk45, rk23, dop853, got '{solver}'"):
            solve_ode(_gaussian(sde), z1, t_end=T_END, solver=solver, control="per_sample")
    term = _gaussian(sde)
    narrow = ScoreTerm(lambda z, t: term.predict(z, t)[:, : 3 if len(z) == 5 else 1], sde, LOGIT)
    message = r"returned shape \(([1-4]), 1, 2, 5\) for a state of shape \(\1, 3, 2, 5\)"
    with pytest.raises(ValueError, match=message):  # once samples have left
        solve_ode(narrow, z1, t_end=T_END, control="per_sample")
