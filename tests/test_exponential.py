"""Exponential Adams-Bashforth steps for the mixed score's ODE."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad

import lsgm_fast
from lsgm_fast.config import SDEConfig
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling import ScoreTerm, natural_grid, solve_exponential, solve_ode
from lsgm_fast.sampling.exponential import MAX_ORDER, coefficients
from lsgm_fast.sde import SDE, build_sde

SDES = {
    "vpsde": SDEConfig(),
    "vpsde with variance": SDEConfig(sigma2_0=1e-3),
    "geometric_sde": SDEConfig(name="geometric_sde", sigma2_0=3e-5, sigma2_min=3e-5),
    "sub_vpsde": SDEConfig(name="sub_vpsde"),
    "vesde": SDEConfig(name="vesde", sigma2_0=1e-2, sigma2_min=1e-2, sigma2_max=100.0),
}
LOGIT = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64).reshape(1, 3, 1, 1)
DATA_VARIANCE = 0.3
T_END = 0.05


def _noise(sde: SDE, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return sde.prior_std * torch.randn(batch, 3, 2, 5, generator=generator, dtype=torch.float64)


def _variance(sde: SDE, t: torch.Tensor | float) -> torch.Tensor:
    return sde.mean_coef(t).square() * DATA_VARIANCE + sde.var(t)


def _gaussian(sde: SDE) -> ScoreTerm:
    """Data N(0, DATA_VARIANCE): the network that makes the mixed prediction exact for every channel."""
    a = torch.sigmoid(LOGIT)

    def predict(z, t):
        t = t.to(torch.float64).reshape(-1, 1, 1, 1)
        exact = sde.var(t).sqrt() / _variance(sde, t) * z
        return (exact - (1 - a) * sde.mixed_r(t) * z) / a

    return ScoreTerm(predict, sde, LOGIT)


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
@pytest.mark.parametrize("name", SDES)
def test_order_of_convergence_on_gaussian_data(name, order):
    """z(t) is proportional to the standard deviation at t, in closed form."""
    sde = build_sde(SDES[name])
    z1 = _noise(sde)
    exact = z1 * (_variance(sde, T_END) / _variance(sde, 1.0)).sqrt()
    errors = []
    for steps in (64, 128, 256):
        got = solve_exponential(_gaussian(sde), z1, natural_grid(sde, steps, 1.0, T_END), order=order)
        assert got.nfe == got.accepted == steps
        errors.append(float((got.z - exact).norm() / exact.norm()))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    # The first step is of order 1: of the higher orders two remain, except where it hardly counts.
    expected = order if "vpsde" in name else min(order, 2)
    assert max(rates) > expected - 0.35, (errors, rates)


@pytest.mark.parametrize("name", SDES)
def test_the_linear_part_is_exact(name):
    """A network whose output does not change: one step of any order is the answer."""
    sde = build_sde(SDES[name])
    z1 = _noise(sde)
    constant = torch.linspace(-1, 1, z1[0].numel(), dtype=torch.float64).reshape(z1[0].shape).expand_as(z1)
    term = ScoreTerm(lambda z, t: constant, sde, LOGIT)
    exact = solve_ode(term, z1, t_end=T_END, rtol=1e-12, atol=1e-12).z
    for times in ([1.0, T_END], natural_grid(sde, 7, 1.0, T_END), [1.0, 0.8, 0.1, T_END]):
        got = solve_exponential(term, z1, times, order=3)
        torch.testing.assert_close(got.z, exact, rtol=1e-8, atol=1e-8)
    back = solve_exponential(term, exact, [T_END, 1.0])  # and against the flow of time
    torch.testing.assert_close(back.z, z1, rtol=1e-6, atol=1e-6)


def test_order_1_without_mixing_is_ddim():
    sde = build_sde(SDES["vpsde"])
    z1 = _noise(sde)
    times = natural_grid(sde, 5, 1.0, T_END)
    term = ScoreTerm(lambda z, t: torch.sin(z) * t.reshape(-1, 1, 1, 1), sde, None)
    z = z1
    for t, t_next in pairwise(times):
        eps = term.predict(z, torch.full((2,), t, dtype=torch.float64))
        # Song, Meng & Ermon 2021, equation 12 with sigma = 0.
        predicted = (z - sde.var(t).sqrt() * eps) / sde.mean_coef(t)
        z = sde.mean_coef(t_next) * predicted + sde.var(t_next).sqrt() * eps
    torch.testing.assert_close(solve_exponential(term, z1, times, order=1).z, z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_the_weights_of_every_order_add_up(order):
    """An output that does not change is extrapolated exactly, so the sum of the weights has no order."""
    sde = build_sde(SDES["vpsde"])
    a = torch.tensor([0.03, 0.5, 1.0], dtype=torch.float64)
    times = natural_grid(sde, 6, 1.0, 1e-3)
    (_, first), (_, other) = (coefficients(sde, a, times, k) for k in (1, order))
    for n, (row, sums) in enumerate(zip(other, first, strict=True)):
        assert len(row) == min(n + 1, order)
        torch.testing.assert_close(sum(row), sums[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_the_weights_integrate_polynomials_of_their_order(order):
    sde = build_sde(SDES["geometric_sde"])
    mixing = 0.4
    times = natural_grid(sde, 6, 0.9, 0.2)
    u = sde.u(torch.tensor(times, dtype=torch.float64))
    s = float(sde.s2(times[-1]).sqrt())
    _, history = coefficients(sde, torch.tensor([mixing], dtype=torch.float64), times, order)
    end = float(u[-1])
    for degree in range(order):
        exact, _ = quad(
            lambda v, degree=degree: s * mixing * (math.cosh(v) / math.cosh(end)) ** mixing * v**degree,
            float(u[-2]),
            end,
            epsabs=1e-14,
        )
        got = sum(float(w) * float(u[-2 - j]) ** degree for j, w in enumerate(history[-1]))
        assert got == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", SDES)
def test_the_natural_grid(name):
    sde = build_sde(SDES[name])
    for power in (1.0, 1.5, 3.0):
        times = natural_grid(sde, 9, 1.0, 1e-4, power)
        assert len(times) == 10 and times[0] == 1.0 and times[-1] == 1e-4
        assert all(a > b for a, b in pairwise(times))
        u = sde.u(torch.tensor(times, dtype=torch.float64)).pow(1 / power)
        torch.testing.assert_close(u.diff(), u.diff().mean().expand(9), rtol=1e-4, atol=1e-9)


def test_kernels_run_it_and_agree():
    sde = build_sde(SDES["vpsde"])
    term, z1, times = _gaussian(sde), _noise(sde).float(), natural_grid(sde, 6, 1.0, T_END)
    with use_backend("reference"):
        plain = solve_exponential(term, z1, times).z
    with record() as log:
        got = solve_exponential(term, z1, times)
    assert log.counts.total() == 6 and {op for op, _ in log.counts} == {"multistep_update"}
    assert got.z.dtype == torch.float32
    torch.testing.assert_close(got.z, plain, rtol=1e-5, atol=1e-6)


def test_trained_digits_in_few_evaluations():
    """On the embedded model: the published solver's accuracy at a fraction of its evaluations."""
    model = lsgm_fast.load("demo")
    z1 = lsgm_fast.random.normal(5, range(16), "prior", model.latent_shape)
    eps = model.sampling.ode_eps
    exact = solve_ode(model._term(), z1, t_end=eps, rtol=1e-7, atol=1e-7).z

    def error(z):
        return float((z - exact).norm() / exact.norm())

    for tol, evaluations in ((1e-2, 5), (1e-3, 18)):
        z, info = model.sample_latents(16, noise=z1, tol=tol)
        ours, own = model.sample_latents(16, noise=z1, evaluations=evaluations)
        assert own.solver == "exponential" and own.nfe == evaluations < info.nfe / 3
        assert error(ours) < error(z), (tol, error(ours), error(z))


def test_what_is_refused():
    sde = build_sde(SDES["vpsde"])
    term, z1 = _gaussian(sde), _noise(sde)
    with pytest.raises(ValueError, match="order must be from 1 to 4, got 5"):
        solve_exponential(term, z1, [1.0, 0.5], order=5)
    with pytest.raises(ValueError, match="times must be at least two"):
        solve_exponential(term, z1, [1.0])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        natural_grid(sde, 0, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"power must be positive, got -1\.0"):
        natural_grid(sde, 3, 1.0, 0.1, -1.0)
    broken = ScoreTerm(lambda z, t: z * (math.nan if float(t[0]) < 0.6 else 1.0), sde, LOGIT)
    with pytest.raises(NonFiniteError, match=r"after step 2 of 3, at t = 0\.25"):
        solve_exponential(broken, z1, [1.0, 0.5, 0.25, 0.1])
    empty = solve_exponential(term, z1[:0], [1.0, 0.5])
    assert empty.z.shape == (0, 3, 2, 5) and empty.nfe == 0
