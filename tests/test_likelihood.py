"""Log-likelihood of latents by the probability-flow ODE."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import LOGIT, SDES, gaussian_term, variance
from recorded import TRAINED_DIGITS
from scipy.integrate import quad, solve_ivp
from torch import nn

import lsgm_fast
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling import ScoreTerm, SolverError
from lsgm_fast.sampling.likelihood import bits_per_dim, linear_log_det, log_prior
from lsgm_fast.sde import SDE, build_sde

MIXING = torch.sigmoid(LOGIT)
T_START = 1e-4


def _latents(batch: int = 2, shape: tuple[int, ...] = (3, 1, 2)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def _log_normal(z: torch.Tensor, variance: torch.Tensor | float) -> torch.Tensor:
    normal = torch.distributions.Normal(torch.zeros((), dtype=z.dtype), math.sqrt(variance))
    return normal.log_prob(z).flatten(1).sum(dim=1)


def _gaussian_log_p(sde: SDE, z0: torch.Tensor, t_start: float) -> torch.Tensor:
    """That of the data at t_start, but for the prior that the model has in place of the data's density at t = 1."""
    start, end = variance(sde, t_start), variance(sde, 1.0)
    z1 = z0 * (end / start).sqrt()
    return _log_normal(z0, start) - _log_normal(z1, end) + _log_normal(z1, sde.prior_std**2)


class _Network(nn.Module):
    """A small smooth network whose Jacobian has every element."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.last = nn.Conv2d(8, channels, 3, padding=1)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        self.double()

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        dtype = self.first.weight.dtype
        hidden = torch.tanh(self.first(z.to(dtype)) + t.to(dtype).reshape(-1, 1, 1, 1))
        return self.last(hidden)


def _network_term(name: str = "vpsde") -> ScoreTerm:
    return ScoreTerm(_Network(), build_sde(SDES[name]), LOGIT)


# --- the value ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_start", [0.05, 1e-5])
@pytest.mark.parametrize("name", SDES)
def test_gaussian_data(name, t_start):
    sde = build_sde(SDES[name])
    z0 = _latents()
    exact = _gaussian_log_p(sde, z0, t_start)
    got, solution = log_prior(gaussian_term(sde), z0, t_start=t_start, exact_trace=True, rtol=1e-9, atol=1e-9)
    assert got.shape == (2,) and got.dtype == torch.float64
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)
    # The prior is the data's density at t = 1 up to 1 - m(1)^2 (geometric: its final variance is 0.999; VE: 100).
    torch.testing.assert_close(got, _log_normal(z0, variance(sde, t_start)), rtol=0, atol=0.02)
    z1 = z0 * (variance(sde, 1.0) / variance(sde, t_start)).sqrt()
    torch.testing.assert_close(solution.z, z1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SDES)
def test_the_linear_part_in_closed_form(name):
    sde = build_sde(SDES[name])
    for a in (0.0, 0.3, 1.0):

        def divergence(t, a=a):
            p, q, r = sde.drift_coefficients(t)
            return float(p - a * q * r)

        points = [0.01, 0.5, 0.9, 0.99]
        expected, _ = quad(divergence, T_START, 1.0, epsabs=1e-12, epsrel=1e-12, limit=400, points=points)
        got = linear_log_det(sde, torch.tensor([a], dtype=torch.float64), T_START, 1.0)
        assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("name", ["vpsde with variance", "geometric_sde", "sub_vpsde", "vesde"])
def test_a_nonlinear_network_against_dense_jacobians(name):
    """The drift in its first form, f z + g^2 / (2 sqrt(var)) mixed, its whole Jacobian, and SciPy."""
    term = _network_term(name)
    sde, z0 = term.sde, _latents(1, (3, 1, 2))
    got, _ = log_prior(term, z0, t_start=0.02, t_end=0.9, exact_trace=True, rtol=1e-8, atol=1e-8)

    def flow(z, t):
        z = z.reshape(z0.shape)
        eps = term.predict(z, torch.full((1,), t, dtype=torch.float64))
        mixed = (1 - MIXING) * sde.mixed_r(t) * z + MIXING * eps
        return (sde.f(t) * z + sde.g2(t) / (2 * sde.var(t).sqrt()) * mixed).flatten()

    jacobian = torch.func.jacrev(flow)

    def augmented(t, y):
        z = torch.from_numpy(y[:-1].copy())
        with torch.no_grad():
            return [*flow(z, t).tolist(), float(jacobian(z, t).trace())]

    end = solve_ivp(augmented, (0.02, 0.9), [*z0.flatten().tolist(), 0.0], rtol=1e-8, atol=1e-8).y[:, -1]
    z1 = torch.from_numpy(end[None, :-1].copy())
    expected = _log_normal(z1, sde.prior_std**2) + end[-1]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SDES)
def test_the_density_integrates_to_1(name):
    sde = build_sde(SDES[name])
    logit = torch.tensor(0.3, dtype=torch.float64).reshape(1, 1, 1, 1)

    def predict(z, t):
        t = t.reshape(-1, 1, 1, 1)
        return sde.var(t).sqrt() / variance(sde, t) * z + 0.3 * torch.tanh(2 * z / sde.s2(t).sqrt() - t)

    term = ScoreTerm(predict, sde, logit)
    z0 = torch.linspace(-8, 8, 2001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    log_p, _ = log_prior(term, z0, t_start=0.01, rtol=1e-6, atol=1e-6)
    assert float(torch.trapezoid(log_p.exp(), z0.flatten())) == pytest.approx(1.0, abs=1e-3)


def test_a_mixture_of_two_normals_without_mixing():
    sde = build_sde(SDES["vpsde"])
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([-1.0, 1.2], dtype=torch.float64)
    variances = torch.tensor([0.1, 0.2], dtype=torch.float64)

    def log_density(z, t):
        t = t.reshape(-1, 1)
        std = (sde.mean_coef(t).square() * variances + sde.var(t)).sqrt()
        parts = torch.distributions.Normal(sde.mean_coef(t) * means, std).log_prob(z.reshape(-1, 1))
        return torch.logsumexp(weights.log() + parts, dim=1)

    def predict(z, t):
        score = torch.func.grad(lambda x: log_density(x, t).sum())(z)
        return -sde.var(t).sqrt().reshape(-1, 1, 1, 1) * score

    z0 = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64).reshape(-1, 1, 1, 1)
    log_p, _ = log_prior(ScoreTerm(predict, sde), z0, t_start=T_START, rtol=1e-7, atol=1e-7)
    expected = log_density(z0, torch.tensor([T_START], dtype=torch.float64))
    # At t = 1 the data's mean is still m(1) 0.54 = 0.004, which the prior does not know.
    torch.testing.assert_close(log_p, expected, rtol=0, atol=0.02)


# --- probes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_one_rademacher_probe_is_exact_for_a_diagonal_jacobian(name):
    term, z0 = gaussian_term(build_sde(SDES[name])), _latents()
    exact, _ = log_prior(term, z0, t_start=0.01, exact_trace=True)
    got, _ = log_prior(term, z0, t_start=0.01, seed=5)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    gaussian, _ = log_prior(term, z0, t_start=0.01, probe="gaussian", seed=5)
    assert ((gaussian - exact).abs() > 1e-3).all()


def test_gaussian_probes_are_unbiased():
    """Mean and spread of the estimate on Gaussian data, where the trace is known and the same for every z."""
    sde = build_sde(SDES["vpsde"])
    n = 4000
    z0 = _latents(1).expand(n, -1, -1, -1)
    log_p, _ = log_prior(gaussian_term(sde), z0, t_start=0.01, probe="gaussian", rtol=1e-4, atol=1e-4)
    ratio = 0.5 * float((variance(sde, 1.0) / variance(sde, 0.01)).log())
    integrals = ratio - linear_log_det(sde, MIXING, 0.01, 1.0).expand(1, 3, 1, 2)  # per element
    # A normal v has v^2 of spread 2.
    spread = 2.0 * float(integrals.square().sum())
    error = float(log_p.mean() - _gaussian_log_p(sde, z0[:1], 0.01))
    assert abs(error) < 4 * math.sqrt(spread / n) < 0.05 * abs(float(integrals.sum()))
    assert float(log_p.var()) == pytest.approx(spread, rel=0.2)


def test_the_mixing_stands_where_the_variance_is_lowest():
    """diag(a) J symmetric, as for a trained score: the variance is that of the symmetric matrix, the least possible."""
    sde = build_sde(SDES["vpsde"])
    n = 4000
    symmetric = torch.tensor([[0.2, 0.1, -0.15], [0.1, 0.1, 0.2], [-0.15, 0.2, 0.3]], dtype=torch.float64)

    def predict(z, t):
        return torch.einsum("ij,bjhw->bihw", symmetric, z) / MIXING

    z0 = _latents(1, (3, 1, 1)).expand(n, -1, -1, -1)
    term = ScoreTerm(predict, sde, LOGIT)
    log_p, _ = log_prior(term, z0, t_start=0.01, rtol=1e-4, atol=1e-4)
    exact, _ = log_prior(term, z0[:1], t_start=0.01, exact_trace=True)
    factor, _ = quad(lambda t: float(sde.drift_coefficients(t)[1]), 0.01, 1.0)

    def variance(matrix):
        return factor**2 * float((matrix + matrix.T).triu(1).square().sum())

    least = variance(symmetric)
    root = MIXING.flatten().sqrt()
    assert variance(symmetric * root / root[:, None]) > 2 * least  # the square root of a on both sides
    assert float(log_p.var()) == pytest.approx(least, rel=0.1)
    assert float(log_p.mean() - exact) == pytest.approx(0.0, abs=4 * math.sqrt(least / n))


def test_several_probes_average_single_ones():
    term, z0 = _network_term(), _latents()
    vectors = [_latents(2).roll(k, dims=1) for k in range(3)]
    options = {"t_start": 0.01, "rtol": 1e-8, "atol": 1e-8}
    got, _ = log_prior(term, z0, probes=3, probe_fn=vectors.__getitem__, **options)
    single = [log_prior(term, z0, probe_fn=lambda _, v=v: v, **options)[0] for v in vectors]
    torch.testing.assert_close(got, torch.stack(single).mean(dim=0), rtol=1e-7, atol=1e-7)
    assert (single[0] - single[1]).abs().min() > 1e-3


@pytest.mark.parametrize("solver", ["rk23", "rk45"])
def test_fresh_probes_out_of_the_step_control(solver):
    """Steps are those of the exact trace, whatever the probes are; the mean is right, and the spread smaller."""
    term, n = _network_term(), 300
    z0 = _latents(1).expand(n, -1, -1, -1)
    options = {"t_start": 0.1, "rtol": 1e-4, "atol": 1e-4, "solver": solver, "trace_in_control": False}
    exact, steps = log_prior(term, z0[:1], exact_trace=True, **options)
    fixed, _ = log_prior(term, z0, **options)
    fresh, solution = log_prior(term, z0, fresh_probes=True, **options)
    # To rounding: the error norm is the mean over another number of samples.
    assert [s.h for s in solution.steps] == pytest.approx([s.h for s in steps.steps], rel=1e-9)
    for log_p in (fixed, fresh):
        assert abs(float(log_p.mean() - exact)) < 4 * float(log_p.std()) / math.sqrt(n) + 1e-3
    assert 0.0 < float(fresh.std()) < 0.7 * float(fixed.std())
    # Where the probes take no part, leaving the determinant out changes no more than the tolerance allows.
    whole, _ = log_prior(term, z0[:1], exact_trace=True, **{**options, "trace_in_control": True})
    torch.testing.assert_close(exact, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SDES)
def test_the_mean_of_fresh_probes_is_the_closed_form(name):
    """On Gaussian data, within four standard errors of 400 samples; the errors average out along t."""
    sde, n = build_sde(SDES[name]), 400
    z0 = _latents(1).expand(n, -1, -1, -1)
    options = {"t_start": 0.01, "rtol": 1e-3, "atol": 1e-3, "probe": "gaussian"}
    fixed, once = log_prior(gaussian_term(sde), z0, **options)
    fresh, again = log_prior(gaussian_term(sde), z0, fresh_probes=True, **options)
    exact = float(_gaussian_log_p(sde, z0[:1], 0.01))
    for log_p in (fixed, fresh):
        error = float(log_p.std()) / math.sqrt(n)
        assert abs(float(log_p.mean()) - exact) < 4 * error + 1e-2
    assert float(fresh.std()) < float(fixed.std())
    assert again.nfe >= once.nfe


def test_which_probes_an_evaluation_has():
    """The first evaluation's are those of the solve with fixed ones; every later one has others."""
    term, z0 = _network_term(), _latents()
    asked = []

    def probe_fn(k):
        asked.append(k)
        return torch.ones_like(z0)

    _, solution = log_prior(
        term, z0, t_start=0.1, probes=2, fresh_probes=True, probe_fn=probe_fn, rtol=1e-3, atol=1e-3
    )
    assert asked == list(range(2 * solution.nfe))
    drawn = [
        lsgm_fast.random.normal(5, range(2), "trace.probe", z0.shape[1:], substream=k) for k in range(2000)
    ]
    options = {"t_start": 0.1, "probe": "gaussian", "fresh_probes": True, "rtol": 1e-2, "atol": 1e-2}
    got, counted = log_prior(term, z0, seed=5, **options)
    assert counted.nfe < 2000
    assert torch.equal(got, log_prior(term, z0, probe_fn=drawn.__getitem__, **options)[0])
    assert ((got - log_prior(term, z0, seed=5, **{**options, "fresh_probes": False})[0]).abs() > 1e-3).all()


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_a_sample_keeps_its_probe_in_any_batch(probe):
    term, z0 = _network_term(), _latents(3)
    options = {"t_start": 0.01, "rtol": 1e-7, "atol": 1e-7, "probe": probe, "probes": 2, "seed": 9}
    whole, _ = log_prior(term, z0, **options)
    assert torch.equal(whole, log_prior(term, z0, **options)[0])
    part, _ = log_prior(term, z0[1:], first_index=1, **options)
    torch.testing.assert_close(part, whole[1:], rtol=0, atol=1e-5)
    other, _ = log_prior(term, z0[1:], **options)
    assert ((other - whole[1:]).abs() > 1e-3).all()
    for change in ({"seed": 10}, {"probes": 1}):
        again, _ = log_prior(term, z0, **{**options, **change})
        assert ((again - whole).abs() > 1e-3).all()


# --- tolerance, dtypes, modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["rk45", "rk23", "scipy", "dopri5"])
def test_every_solver_meets_its_tolerance(solver):
    sde = build_sde(SDES["vpsde"])
    z0 = _latents()
    exact = _gaussian_log_p(sde, z0, 0.01)
    errors = []
    for tol in (1e-3, 1e-6):
        seen = []
        got, solution = log_prior(
            gaussian_term(sde), z0, t_start=0.01, solver=solver, rtol=tol, atol=tol, callback=seen.append
        )
        errors.append(float((got - exact).abs().max()))
        assert seen[-1].fraction == pytest.approx(1.0) and seen[-1].nfe == solution.nfe > 0
    assert errors[1] < min(1e-4, errors[0] / 10), errors


def test_dtypes():
    network = _Network()
    sde = build_sde(SDES["vpsde"])
    z0 = _latents().to(torch.bfloat16)
    exact, reference = log_prior(ScoreTerm(network, sde, LOGIT), z0.double(), t_start=0.01)
    assert reference.z.dtype == torch.float64
    # float32: the error is that of the tolerance. bfloat16 has 8 bits.
    for dtype, close in ((torch.float32, 0.02), (torch.bfloat16, 0.3)):
        seen = set()

        def predict(z, t, dtype=dtype, seen=seen):
            seen.add(z.dtype)
            eps = network.to(dtype)(z, t)
            assert eps.dtype == dtype
            return eps

        term = ScoreTerm(predict, sde, LOGIT.to(dtype))
        got, solution = log_prior(term, z0, t_start=0.01, rtol=1e-3, atol=1e-3)
        assert got.dtype == torch.float64 and solution.z.dtype == torch.bfloat16
        assert seen == {torch.float64}
        torch.testing.assert_close(got, exact, rtol=0, atol=close)
        seen.clear()
        low, _ = log_prior(term, z0, t_start=0.01, rtol=1e-3, atol=1e-3, state_dtype=torch.float32)
        assert low.dtype == torch.float32 and seen == {torch.float32}
        torch.testing.assert_close(low.double(), exact, rtol=0, atol=close)
        network.double()


def test_gradients_stay_inside():
    term = _network_term()
    network = term.predict
    network.first.weight.grad = torch.ones_like(network.first.weight)
    z0 = _latents().requires_grad_()
    log_p, solution = log_prior(term, z0, t_start=0.1, probes=2)
    assert not log_p.requires_grad and not solution.z.requires_grad and z0.grad is None
    assert torch.equal(network.first.weight.grad, torch.ones_like(network.first.weight))
    assert all(p.grad is None for p in network.parameters() if p is not network.first.weight)
    assert all(p.requires_grad for p in network.parameters())


def test_callers_without_gradients():
    term, z0 = _network_term(), _latents()
    expected, _ = log_prior(term, z0, t_start=0.1)
    with torch.no_grad():
        assert torch.equal(log_prior(term, z0, t_start=0.1)[0], expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inside = z0 * 1.0
        assert inside.is_inference()
        got, solution = log_prior(term, inside, t_start=0.1)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(got, expected) and not solution.z.is_inference()


def test_a_trained_model():
    """Trained on digits: their latents are likelier than normal draws, as the model sees it, and probes agree."""
    model = lsgm_fast.load(TRAINED_DIGITS)
    assert model.mixing_logit.requires_grad
    z0, _ = model.sample_latents(4, seed=1)
    noise = lsgm_fast.random.normal(2, range(4), "prior", model.latent_shape)
    options = {"t_start": model.sampling.ode_eps, "rtol": 1e-3, "atol": 1e-3}
    log_p, solution = log_prior(model._term(), z0, **options)
    rough, _ = log_prior(model._term(), noise, **options)
    assert log_p.mean() > rough.mean()
    # The flow that generated z0, backwards.
    torch.testing.assert_close(
        solution.z,
        lsgm_fast.random.normal(1, range(4), "prior", model.latent_shape).to(z0.dtype),
        rtol=0,
        atol=0.1,
    )
    assert all(p.grad is None for p in model.parameters())


# --- what is refused ---------------------------------------------------------------------------------------------


def test_an_empty_batch():
    for options in ({}, {"exact_trace": True}, {"probe": "gaussian"}):
        log_p, solution = log_prior(_network_term(), _latents()[:0], t_start=0.1, **options)
        assert log_p.shape == (0,) and log_p.dtype == torch.float64
        assert solution.z.shape == (0, 3, 1, 2) and solution.nfe == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_start": -0.1}, r"0 <= t_start < t_end <= 1, got t_start = -0\.1 and t_end = 1\.0"),
        ({"t_start": 0.5, "t_end": 0.5}, r"got t_start = 0\.5 and t_end = 0\.5"),
        ({"t_end": 1.5}, r"t_end = 1\.5"),
        ({"t_start": math.nan}, "t_start = nan"),
        ({"probe": "rademaker"}, "unknown probe 'rademaker'.*did you mean 'rademacher'"),
        ({"probes": 0}, "probes must be at least 1, got 0"),
        ({"exact_trace": True, "probe_fn": lambda k: None}, "leave probe_fn and fresh_probes out"),
        ({"exact_trace": True, "fresh_probes": True}, "leave probe_fn and fresh_probes out"),
        (
            {"probe_fn": lambda k: torch.ones(2, 3)},
            r"probe_fn\(0\) returned shape \(2, 3\), expected \(2, 3, 1, 2\)",
        ),
        (
            {"state_dtype": torch.float16},
            "state_dtype must be torch.float32 or torch.float64, got torch.float16",
        ),
        ({"solver": "rk54"}, "unknown solver 'rk54'"),
        ({"rtol": -1.0}, r"rtol must be finite and not negative, got -1\.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        log_prior(_network_term(), _latents(), **{"t_start": 0.1, **options})


def test_bad_latents_and_terms():
    term, z0 = _network_term(), _latents()
    with pytest.raises(ValueError, match="z0 must be a floating-point tensor, got torch.int64"):
        log_prior(term, z0.long(), t_start=0.1)
    for bad in (z0.flatten(), z0[..., :0]):
        with pytest.raises(ValueError, match=r"z0 must be \(B, C, \.\.\.\)"):
            log_prior(term, bad, t_start=0.1)
    with pytest.raises(ValueError, match=r"mixing_logit must be \(1, C, 1, 1\) for x \(2, 2, 1, 2\)"):
        log_prior(term, z0[:, :2], t_start=0.1)
    published = ScoreTerm(term.predict, term.sde.with_parity("published"), LOGIT)
    with pytest.raises(ValueError, match='needs the formulas of parity="exact", got parity="published"'):
        log_prior(published, z0, t_start=0.1)
    with pytest.raises(ValueError, match=r"expects tensors of one shape, got .*\(2, 2, 1, 2\)"):
        log_prior(ScoreTerm(lambda z, t: z[:, :2], term.sde, LOGIT), z0, t_start=0.1, probe_fn=lambda k: z0)


def test_a_network_that_hides_its_gradient():
    sde, z0, weight = build_sde(SDES["vpsde"]), _latents(), torch.ones((), requires_grad=True)
    for predict in (torch.no_grad()(lambda z, t: z * weight), lambda z, t: z.detach() * weight):
        with pytest.raises(ValueError, match="has no gradient with respect to z"):
            log_prior(ScoreTerm(predict, sde, LOGIT), z0, t_start=0.1)


def test_what_is_not_finite():
    sde, z0 = build_sde(SDES["vpsde"]), _latents()
    term = ScoreTerm(lambda z, t: z * (math.nan if float(t[0]) > 0.6 else 1.0), sde, LOGIT)
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in step \d+, stage \d of 7, at t = 0\."):
        log_prior(term, z0, t_start=0.1)
    # Finite output, infinite derivative: only the trace shows it.
    cusp = ScoreTerm(lambda z, t: (z - z.detach()).abs().sqrt(), sde, LOGIT)
    with pytest.raises(NonFiniteError, match=r"the drift's first evaluation .* at t = 0\.1"):
        log_prior(cusp, z0, t_start=0.1)
    z0[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="the initial state"):
        log_prior(_network_term(), z0, t_start=0.1)


def test_a_solve_that_takes_too_many_steps():
    with pytest.raises(SolverError, match="attempted max_steps = 2 steps"):
        log_prior(_network_term(), _latents(), t_start=0.1, max_steps=2)


# --- bits per dimension ------------------------------------------------------------------------------------------


def test_bits_per_dim():
    # A uniform density over [0, 1]^D in 256 levels is 8 bits each, and so is the probability of one of its images.
    density, probability = torch.zeros(2), torch.full((2,), -12 * math.log(256.0))
    torch.testing.assert_close(bits_per_dim(density, 12, bins=256), torch.full((2,), 8.0))
    torch.testing.assert_close(bits_per_dim(probability, 12), torch.full((2,), 8.0))
    with pytest.raises(ValueError, match="dims must be at least 1, got 0"):
        bits_per_dim(density, 0)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        bits_per_dim(density, 12, bins=0)
