"""Methods over given times as programs: orders, identities with the published formulas, grids."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from gaussian import LOGIT, SDES, T_END, draw, flow, gaussian_term, variance
from scipy.integrate import quad

from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling import (
    GRIDS,
    METHODS,
    ScoreTerm,
    natural_grid,
    plan,
    run_program,
    solve_ode,
    time_grid,
)
from lsgm_fast.sampling.methods import exponential_weights, extrapolated
from lsgm_fast.sde import build_sde

EXPONENTIAL = [name for name in METHODS if name.startswith("exponential")]


def solve(method, term, z1, times):
    return run_program(plan(method, term, times), term, z1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SDES)
def test_order_of_convergence_on_gaussian_data(name, method):
    sde, described = build_sde(SDES[name]), METHODS[method]
    term, z1 = gaussian_term(sde), draw(sde)
    exact, errors = flow(sde, z1, T_END), []
    for evaluations in (48, 96, 192):
        times = time_grid(described.grid, sde, evaluations // described.evaluations, 1.0, T_END)
        got = solve(method, term, z1, times)
        assert got.nfe == evaluations and got.accepted == len(times) - 1
        errors.append(float((got.z - exact).norm() / exact.norm()))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert max(rates) > described.order - 0.35, (errors, rates)


@pytest.mark.parametrize("method", EXPONENTIAL)
@pytest.mark.parametrize("name", SDES)
def test_the_linear_part_is_exact(name, method):
    """A network whose output does not change: one step is the answer."""
    sde = build_sde(SDES[name])
    z1 = draw(sde)
    constant = torch.linspace(-1, 1, z1[0].numel(), dtype=torch.float64).reshape(z1[0].shape).expand_as(z1)
    term = ScoreTerm(lambda z, t: constant, sde, LOGIT)
    exact = solve_ode(term, z1, t_end=T_END, rtol=1e-12, atol=1e-12).z
    for times in ([1.0, T_END], natural_grid(sde, 7, 1.0, T_END), [1.0, 0.8, 0.1, T_END]):
        torch.testing.assert_close(solve(method, term, z1, times).z, exact, rtol=1e-8, atol=1e-8)
    back = solve(method, term, exact, [T_END, 1.0])  # and against the flow of time
    torch.testing.assert_close(back.z, z1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logit", [LOGIT, None])
def test_ddim_is_the_published_one(logit):
    sde = build_sde(SDES["vpsde"])
    times = natural_grid(sde, 5, 1.0, T_END)
    term = ScoreTerm(lambda z, t: torch.sin(z) * t.reshape(-1, 1, 1, 1), sde, logit)
    z = z1 = draw(sde)
    a = 1.0 if logit is None else torch.sigmoid(logit)
    for t, t_next in pairwise(times):
        eps = term.predict(z, torch.full((2,), t, dtype=torch.float64))
        eps = (1 - a) * sde.mixed_r(t) * z + a * eps
        # Song, Meng & Ermon 2021, equation 12 with sigma = 0.
        predicted = (z - sde.var(t).sqrt() * eps) / sde.mean_coef(t)
        z = sde.mean_coef(t_next) * predicted + sde.var(t_next).sqrt() * eps
    torch.testing.assert_close(solve("ddim", term, z1, times).z, z, rtol=1e-10, atol=1e-10)
    if logit is None:  # without mixing, order 1 of the exponential methods is DDIM
        (first,) = plan("exponential", term, times[:2]).stages[0].updates
        (ddim,) = plan("ddim", term, times[:2]).stages[0].updates
        torch.testing.assert_close(first.weights[0], ddim.weights[0])


def published_data_prediction(term, z, t):
    a, sde = torch.sigmoid(term.mixing_logit), term.sde
    eps = term.predict(z, torch.full((len(z),), t, dtype=torch.float64))
    eps = (1 - a) * sde.mixed_r(t) * z + a * eps
    return (z - sde.var(t).sqrt() * eps) / sde.mean_coef(t)


def test_dpm_solver_2m_is_the_published_one():
    """Lu et al. 2022b, algorithm 2."""
    sde = build_sde(SDES["vpsde"])
    term = ScoreTerm(lambda z, t: torch.sin(z) * t.reshape(-1, 1, 1, 1), sde, LOGIT)
    times = time_grid("log_snr", sde, 5, 1.0, T_END)
    level = [float(torch.log(sde.mean_coef(t) / sde.var(t).sqrt())) for t in times]
    z = z1 = draw(sde)
    known = []
    for n, (t, t_next) in enumerate(pairwise(times)):
        known.append(published_data_prediction(term, z, t))
        h = level[n + 1] - level[n]
        d = known[n]
        if n:
            r = (level[n] - level[n - 1]) / h
            d = (1 + 1 / (2 * r)) * known[n] - 1 / (2 * r) * known[n - 1]
        ratio = sde.var(t_next).sqrt() / sde.var(t).sqrt()
        z = ratio * z - sde.mean_coef(t_next) * math.expm1(-h) * d
    torch.testing.assert_close(solve("dpmpp_2m", term, z1, times).z, z, rtol=1e-9, atol=1e-9)


def test_unipc_of_order_2_on_two_steps_is_the_published_one():
    """Zhao et al. 2023: UniC after the second evaluation (its coefficient 1/2), then UniP of order 2."""
    sde = build_sde(SDES["vpsde"])
    term = ScoreTerm(lambda z, t: torch.sin(z) * t.reshape(-1, 1, 1, 1), sde, LOGIT)
    times = time_grid("log_snr", sde, 2, 1.0, T_END)
    level = [float(torch.log(sde.mean_coef(t) / sde.var(t).sqrt())) for t in times]
    h0, h1 = level[1] - level[0], level[2] - level[1]
    sigma, m = [sde.var(t).sqrt() for t in times], [sde.mean_coef(t) for t in times]
    z0 = draw(sde)
    x0 = published_data_prediction(term, z0, times[0])
    predicted = sigma[1] / sigma[0] * z0 - m[1] * math.expm1(-h0) * x0
    x1 = published_data_prediction(term, predicted, times[1])
    rho = (1 - (1 + h0) * math.exp(-h0)) / (h0 * -math.expm1(-h0))  # the published system for one unknown
    assert 0 < rho < 1
    corrected = predicted - m[1] * math.expm1(-h0) * 0.5 * (x1 - x0)
    slope = (x0 - x1) / (-h0 / h1)
    z2 = sigma[2] / sigma[1] * corrected - m[2] * math.expm1(-h1) * (x1 + 0.5 * slope)
    torch.testing.assert_close(solve("unipc", term, z0, times).z, z2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_weights_integrate_polynomials_of_their_degree(count):
    sde = build_sde(SDES["geometric_sde"])
    mixing = torch.tensor([0.4], dtype=torch.float64)
    times = torch.tensor(natural_grid(sde, 6, 0.9, 0.2), dtype=torch.float64)
    nodes = times[-2 - torch.arange(count)][None]
    _, weights = exponential_weights(sde, mixing, mixing, times[-2:-1], times[-1:], nodes)
    u, s = sde.u(times), float(sde.s2(times[-1]).sqrt())
    end = float(u[-1])
    for degree in range(count):
        exact, _ = quad(
            lambda v, degree=degree: s * 0.4 * (math.cosh(v) / math.cosh(end)) ** 0.4 * v**degree,
            float(u[-2]),
            end,
            epsabs=1e-14,
        )
        got = float((weights[:, 0, 0] * sde.u(nodes[0]) ** degree).sum())
        assert got == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_run_it_and_agree(method):
    sde = build_sde(SDES["vpsde"])
    term, z1 = gaussian_term(sde), draw(sde).float()
    times = time_grid(METHODS[method].grid, sde, 6, 1.0, T_END)
    with use_backend("reference"):
        plain = solve(method, term, z1, times).z
    with record() as log:
        got = solve(method, term, z1, times)
    assert {op for op, _ in log.counts} == {"multistep_update"}
    assert got.z.dtype == torch.float32
    torch.testing.assert_close(got.z, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", EXPONENTIAL)
def test_extrapolation_to_0_costs_nothing_and_comes_closer(method):
    sde = build_sde(SDES["vpsde"])
    term, z1 = gaussian_term(sde), draw(sde)
    times = natural_grid(sde, 200, 1.0, 1e-3)
    program = extrapolated(plan(method, term, times), term)
    with_it, without = run_program(program, term, z1), solve(method, term, z1, times)
    assert with_it.nfe == without.nfe
    exact = without.z * (variance(sde, 0.0) / variance(sde, 1e-3)).sqrt()  # the flow from there
    assert (with_it.z - exact).norm() < 0.1 * (without.z - exact).norm()
    with pytest.raises(ValueError, match="extrapolation needs an exponential method, got 'dpmpp_2m'"):
        extrapolated(plan("dpmpp_2m", term, times), term)


# -- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_grids_are_equal_steps_of_their_variable(name):
    sde = build_sde(SDES[name])
    variables = {
        "uniform": lambda t: t,
        "quadratic": torch.sqrt,
        "log_snr": lambda t: torch.log(sde.mean_coef(t) / sde.var(t).sqrt()),
        "natural": lambda t: sde.u(t).pow(1 / 1.5),
    }
    assert set(variables) == set(GRIDS)
    for grid, variable in variables.items():
        times = time_grid(grid, sde, 9, 1.0, 1e-4)
        assert len(times) == 10 and times[0] == 1.0 and times[-1] == 1e-4
        assert all(a > b for a, b in pairwise(times))
        steps = variable(torch.tensor(times, dtype=torch.float64)).diff()
        torch.testing.assert_close(steps, steps.mean().expand(9), rtol=1e-4, atol=1e-9)
    for power in (1.0, 3.0):
        u = sde.u(torch.tensor(natural_grid(sde, 9, 1.0, 1e-4, power), dtype=torch.float64)).pow(1 / power)
        torch.testing.assert_close(u.diff(), u.diff().mean().expand(9), rtol=1e-4, atol=1e-9)
    assert time_grid("natural", sde, 7, 1.0, 1e-4) == natural_grid(sde, 7, 1.0, 1e-4, 2.0)


def test_what_is_refused():
    sde = build_sde(SDES["vpsde"])
    term, z1 = gaussian_term(sde), draw(sde)
    with pytest.raises(ValueError, match="unknown method 'dpmp_2m'.*did you mean 'dpmpp_2m'"):
        plan("dpmp_2m", term, [1.0, 0.5])
    with pytest.raises(ValueError, match="times must be at least two"):
        plan("exponential", term, [1.0])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        natural_grid(sde, 0, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"power must be positive, got -1\.0"):
        natural_grid(sde, 3, 1.0, 0.1, -1.0)
    with pytest.raises(ValueError, match=r"t_start must lie in \[0, 1\], got 1\.5"):
        time_grid("uniform", sde, 3, 1.5, 0.1)
    with pytest.raises(ValueError, match="nothing to divide"):
        time_grid("uniform", sde, 3, 0.5, 0.5)
    with pytest.raises(ValueError, match="unknown grid 'logsnr'.*did you mean 'log_snr'"):
        time_grid("logsnr", sde, 3, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"grid 'log_snr' does not exist from t = 1\.0 to 0\.0"):
        time_grid("log_snr", sde, 3, 1.0, 0.0)
    broken = ScoreTerm(lambda z, t: z * (math.nan if float(t[0]) < 0.6 else 1.0), sde, LOGIT)
    with pytest.raises(NonFiniteError, match=r"after step 2 of 3, at t = 0\.25"):
        solve("exponential", broken, z1, [1.0, 0.5, 0.25, 0.1])
    flat = ScoreTerm(lambda z, t: z[:, :1], sde, LOGIT)
    with pytest.raises(ValueError, match="they must be equal"):
        solve("ddim", flat, z1, [1.0, 0.5])
    empty = solve("exponential", term, z1[:0], [1.0, 0.5])
    assert empty.z.shape == (0, 3, 2, 5) and empty.nfe == 0
