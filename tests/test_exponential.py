"""Adaptive exponential steps for the mixed score's ODE, and ``solver="auto"``."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from gaussian import LOGIT, SDES, T_END, draw, flow, gaussian_term, variance
from recorded import TRAINED_DIGITS

import lsgm_fast
from lsgm_fast.dispatch import record
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling import ScoreTerm, SolverError, solve_exponential, solve_ode
from lsgm_fast.sampling.automatic import choose, equivalent_tolerance
from lsgm_fast.sde import build_sde


def error(z, exact):
    return float((z - exact).norm() / exact.norm())


def switching(sde):
    """A network that changes fast for the samples of large mean, so that their steps are their own."""

    def predict(z, t):
        t = t.to(z.dtype).reshape(-1, 1, 1, 1)
        return torch.sin(12.0 * t * z.flatten(1).mean(1).reshape(-1, 1, 1, 1)) * z

    return ScoreTerm(predict, sde, LOGIT)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SDES)
def test_the_error_follows_the_tolerance(name, order, control):
    sde = build_sde(SDES[name])
    term, z1 = gaussian_term(sde), draw(sde)
    exact, counts = flow(sde, z1, T_END), []
    for tol in (1e-2, 1e-4) if order > 1 else (1e-2, 1e-3):
        got = solve_exponential(term, z1, t_end=T_END, rtol=tol, atol=tol, order=order, control=control)
        assert error(got.z, exact) < 10 * tol
        counts.append(got.nfe)
        assert sum(s.accepted for s in got.steps) == got.accepted
    assert counts[0] < counts[1] < (1000 if order == 1 else 200)
    if control == "joint":
        assert got.nfe == 1 + len(got.steps) == 1 + got.accepted + got.rejected


@pytest.mark.parametrize("times", [(1.0, T_END), (T_END, 1.0)])
def test_steps_lead_from_start_to_end(times):
    sde = build_sde(SDES["vpsde"])
    got = solve_exponential(switching(sde), draw(sde), t_start=times[0], t_end=times[1], rtol=1e-3, atol=1e-3)
    assert got.rejected > 0
    taken = [s for s in got.steps if s.accepted]
    assert taken[0].t == times[0] and taken[-1].t + taken[-1].h == pytest.approx(times[1], abs=1e-15)
    assert all(a.t + a.h == pytest.approx(b.t, abs=1e-15) for a, b in pairwise(taken))
    assert all((s.error_norm < 1) == s.accepted for s in got.steps)


@pytest.mark.parametrize("name", SDES)
def test_a_sample_does_not_depend_on_its_batch(name):
    sde = build_sde(SDES[name])
    term, z1 = switching(sde), draw(sde, 5)
    sizes = []

    def predict(z, t):
        sizes.append(len(z))
        return term.predict(z, t)

    options = {"t_end": T_END, "rtol": 1e-3, "atol": 1e-3, "control": "per_sample"}
    together = solve_exponential(ScoreTerm(predict, sde, LOGIT), z1, **options)
    alone = [solve_exponential(term, z1[i : i + 1], **options) for i in range(5)]
    torch.testing.assert_close(together.z, torch.cat([s.z for s in alone]), rtol=1e-9, atol=1e-9)
    assert len({s.nfe for s in alone}) > 1, "the samples should differ in effort"
    assert together.nfe == max(s.nfe for s in alone) and together.accepted == sum(s.accepted for s in alone)
    # The network sees those alone that are on their way.
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == sum(s.nfe for s in alone)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_extrapolation_to_0(control):
    sde = build_sde(SDES["vpsde"])
    term, z1 = gaussian_term(sde), draw(sde)
    options = {"t_end": 1e-3, "rtol": 1e-5, "atol": 1e-5, "control": control}
    plain = solve_exponential(term, z1, **options)
    further = solve_exponential(term, z1, extrapolate=True, **options)
    exact = plain.z * (variance(sde, 0.0) / variance(sde, 1e-3)).sqrt()  # the flow from there
    assert further.nfe == plain.nfe and error(further.z, exact) < 0.1 * error(plain.z, exact)


def test_dtypes_kernels_and_the_callback():
    sde = build_sde(SDES["vpsde"])
    term, z1, seen = gaussian_term(sde), draw(sde), []
    exact = solve_exponential(term, z1, t_end=T_END, rtol=1e-3, atol=1e-3, callback=seen.append)
    with record() as log:
        half = solve_exponential(term, z1.half(), t_end=T_END, rtol=1e-3, atol=1e-3)
    assert half.z.dtype == torch.float16 and error(half.z.double(), exact.z) < 3e-3
    assert {op for op, _ in log.counts} == {"multistep_update"}
    assert [p.nfe for p in seen] == list(range(2, exact.nfe + 1))
    assert seen[-1].fraction == 1.0 and seen[-1].t == T_END
    assert all(a.fraction <= b.fraction for a, b in pairwise(seen))


def test_what_is_refused():
    sde = build_sde(SDES["vpsde"])
    term, z1 = gaussian_term(sde), draw(sde)
    options = {"t_end": T_END, "rtol": 1e-3, "atol": 1e-3}
    for change, message in [
        ({"order": 5}, "order must be from 1 to 4, got 5"),
        ({"control": "each"}, "unknown control 'each'"),
        ({"rtol": -1.0}, r"rtol must be finite and not negative, got -1\.0"),
        ({"rtol": 0.0, "atol": 0.0}, "both 0"),
        ({"first_step": 0.0}, r"first_step must lie in \(0, 1\], got 0\.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            solve_exponential(term, z1, **{**options, **change})
    with pytest.raises(SolverError, match=r"max_steps = 3 steps and reached t = 0\.\d+ of 0\.05"):
        solve_exponential(term, z1, **{**options, "rtol": 1e-6, "atol": 1e-6}, max_steps=3)
    empty = solve_exponential(term, z1[:0], **options)
    assert empty.z.shape == (0, 3, 2, 5) and empty.nfe == 0


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_nan_and_stalls_are_named(control):
    sde = build_sde(SDES["vpsde"])
    z1 = draw(sde, 3)

    def broken(z, t):
        late = (t < 0.5).reshape(-1, 1, 1, 1) & (z == z)
        late[0] = False
        return torch.where(late, math.nan, 0.0 * z)

    options = {"t_end": T_END, "rtol": 1e-3, "atol": 1e-3, "control": control}
    sample = "" if control == "joint" else " of sample 1"
    with pytest.raises(NonFiniteError, match=rf"output{sample} in step \d+, at t = 0\.\d+ \(step from t = "):
        solve_exponential(ScoreTerm(broken, sde, LOGIT), z1, **options)

    def jump(z, t):
        return torch.where((t < 0.5).reshape(-1, 1, 1, 1), 1e3, 0.0 * z)

    sample = "" if control == "joint" else r" of sample \d"
    with pytest.raises(
        SolverError, match=rf"stalls{sample} at t = 0\.5\d* \(step \d+, error .* times the tol"
    ):
        solve_exponential(ScoreTerm(jump, sde, LOGIT), z1, **{**options, "rtol": 1e-6, "atol": 1e-6})


def test_trained_digits_in_few_evaluations():
    """On a trained model: the published solver's accuracy at a fraction of its evaluations."""
    model = lsgm_fast.load(TRAINED_DIGITS)
    z1 = lsgm_fast.random.normal(5, range(16), "prior", model.latent_shape)
    exact = solve_ode(model._term(), z1, t_end=model.sampling.ode_eps, rtol=1e-7, atol=1e-7).z
    for tol, evaluations in ((1e-2, 5), (1e-3, 18)):
        z, info = model.sample_latents(16, noise=z1, tol=tol, solver="rk45")
        fixed, own = model.sample_latents(16, noise=z1, evaluations=evaluations)
        assert own.solver == "exponential" and own.nfe == evaluations < info.nfe / 3
        assert error(fixed, exact) < error(z, exact)
        chosen, own = model.sample_latents(16, noise=z1, tol=tol)
        assert own.solver == "exponential" and own.nfe < info.nfe / 2
        assert error(chosen, exact) < error(z, exact)
        assert f"rk45 at {tol:g}" in own.reason


def test_what_auto_stands_for():
    assert choose(None, 7, 1e-5).evaluations == 7
    assert choose(1e-2, None, 1e-5).tol == 1e-2
    assert choose(None, None, 1e-4) == choose(1e-4, None, 1e-5)
    assert 1e-5 < equivalent_tolerance(1e-5) < equivalent_tolerance(1e-4) < 1e-2
    assert equivalent_tolerance(0.1) == 0.1
    assert (choose(1e-7, None, 1e-5).solver, choose(1e-7, None, 1e-5).tol) == ("rk45", 1e-7)
    with pytest.raises(ValueError, match=r"tol=0\.1 and evaluations=3 exclude each other"):
        choose(0.1, 3, 1e-5)
