"""Samplers of the reverse-time SDE, on Gaussian data: there every step is linear and every variance is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from gaussian import DATA_VARIANCE, LOGIT, SDES, T_END, gaussian_term, variance
from host_reads import HostReads

from lsgm_fast import random
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling import ScoreTerm, SolverError, natural_grid
from lsgm_fast.sampling.stochastic import (
    reverse_coefficients,
    solve_adaptive_sde,
    solve_euler_maruyama,
    solve_predictor_corrector,
)
from lsgm_fast.sde import SDE, build_sde


def _wavy(sde: SDE) -> ScoreTerm:
    """A network that is not linear, for comparisons of one path."""
    return ScoreTerm(lambda z, t: torch.sin(2.0 * z) * (1.0 + t.reshape(-1, 1, 1, 1)), sde, LOGIT)


def _score(term: ScoreTerm, z: torch.Tensor, t: float) -> torch.Tensor:
    """The mixed score as LSGM writes it."""
    sde, a = term.sde, torch.sigmoid(LOGIT)
    eps = term.predict(z, torch.full((len(z),), t, dtype=z.dtype))
    return -((1 - a) * sde.mixed_r(t) * z + a * eps) / sde.var(t).sqrt()


def _drift(term: ScoreTerm, z: torch.Tensor, t: float) -> torch.Tensor:
    """Song et al. 2021, equation 6."""
    return term.sde.f(t) * z - term.sde.g2(t) * _score(term, z, t)


def _marginal(sde: SDE, batch: int, shape: tuple[int, ...] = (3, 2, 5)) -> torch.Tensor:
    """Draws of z at t = 1."""
    draws = random.normal(3, range(batch), "z1", shape, dtype=torch.float64)
    return variance(sde, 1.0).sqrt() * draws


def _draws(batch: int, shape: tuple[int, ...] = (3, 2, 5), dtype: torch.dtype = torch.float64):
    return lambda i: random.normal(7, range(batch), "noise", shape, dtype=torch.float64, substream=i).to(
        dtype
    )


def _own_draws(shape: tuple[int, ...] = (3, 2, 5), offset: int = 0):
    """For the adaptive solver: a function of the sample and its attempt."""
    return lambda attempt, indices: random.normal(
        7, indices + offset, "noise", shape, dtype=torch.float64, substream=attempt
    )


# --- Euler-Maruyama -------------------------------------------------------------------------------------------------


def _exact_variance(sde: SDE, times: list[float], **options) -> torch.Tensor:
    """Variance of what the solver returns, per channel, without sampling.

    The scheme is linear in the initial state and in every draw, so the variance is the sum of the squared responses to
    a unit of each. Sample 0 has a unit in its initial state, sample i + 1 in draw i.
    """
    steps = len(times) - 1
    z1 = torch.zeros(steps + 1, 3, 1, 1, dtype=torch.float64)
    z1[0] = variance(sde, 1.0).sqrt()

    def noise_fn(i):
        unit = torch.zeros_like(z1)
        unit[i + 1] = 1.0
        return unit

    z = solve_euler_maruyama(gaussian_term(sde), z1, times, noise_fn=noise_fn, **options).z
    return z.square().sum(0).flatten()


@pytest.mark.parametrize("name", SDES)
def test_euler_maruyama_is_of_weak_order_1(name):
    sde = build_sde(SDES[name])
    true = variance(sde, T_END)
    errors = [
        _exact_variance(sde, natural_grid(sde, steps, 1.0, T_END), denoise=False) - true
        for steps in (128, 256, 512)
    ]
    assert errors[-1].abs().max() < 0.02 * true
    for before, after in pairwise(errors):
        torch.testing.assert_close(torch.log2(before / after), torch.ones_like(before), rtol=0, atol=0.15)


def test_denoising_leaves_out_the_last_noise():
    sde = build_sde(SDES["vpsde"])
    times = natural_grid(sde, 32, 1.0, T_END)
    last = sde.g2(times[-2]) * (times[-2] - times[-1])
    with_noise, without = (_exact_variance(sde, times, denoise=flag) for flag in (False, True))
    torch.testing.assert_close(with_noise - without, last.expand(3), rtol=1e-9, atol=0)
    # The temperature is the factor on all the noise there is.
    hot, cold = (_exact_variance(sde, times, temperature=factor) for factor in (2.0, 0.0))
    torch.testing.assert_close(hot - cold, 4.0 * (without - cold), rtol=1e-9, atol=0)
    calls = []
    run = _draws(2)
    solve_euler_maruyama(_wavy(sde), _marginal(sde, 2), times, noise_fn=lambda i: calls.append(i) or run(i))
    assert calls == list(range(31))


def test_euler_maruyama_with_random_numbers():
    """3e5 numbers: the variance that the responses to units predict, within 4 standard deviations of its estimate."""
    sde = build_sde(SDES["vpsde"])
    times = natural_grid(sde, 40, 1.0, T_END)
    shape = (3, 10, 10)
    got = solve_euler_maruyama(
        gaussian_term(sde), _marginal(sde, 1000, shape), times, noise_fn=_draws(1000, shape), denoise=False
    )
    expected = _exact_variance(sde, times, denoise=False)
    sampled = got.z.square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(sampled, expected, rtol=4 * math.sqrt(2 / 1e5), atol=0)
    assert got.nfe == got.accepted == len(got.steps) == 40 and got.rejected == 0


@pytest.mark.parametrize("name", SDES)
def test_euler_maruyama_is_the_formula(name):
    sde = build_sde(SDES[name])
    term, z1, times = _wavy(sde), _marginal(sde, 2), natural_grid(sde, 6, 1.0, T_END)
    noise, z = _draws(2), z1
    for n, (t, t_next) in enumerate(pairwise(times)):
        z = z - (t - t_next) * _drift(term, z, t) + math.sqrt(t - t_next) * 0.7 * sde.g2(t).sqrt() * noise(n)
    got = solve_euler_maruyama(term, z1, times, noise_fn=noise, temperature=0.7, denoise=False)
    torch.testing.assert_close(got.z, z, rtol=1e-10, atol=1e-10)


def test_without_mixing():
    sde = build_sde(SDES["vpsde"])
    mixed, plain = _wavy(sde), ScoreTerm(_wavy(sde).predict, sde, None)
    always = ScoreTerm(mixed.predict, sde, torch.full((1, 3, 1, 1), 60.0, dtype=torch.float64))
    z1, times = _marginal(sde, 2), [1.0, 0.8, 0.5]
    for solve in (solve_euler_maruyama, solve_predictor_corrector):
        expected = solve(always, z1, times, noise_fn=_draws(2)).z
        torch.testing.assert_close(solve(plain, z1, times, noise_fn=_draws(2)).z, expected)
    expected = solve_adaptive_sde(always, z1, t_end=0.9, noise_fn=_own_draws()).z
    torch.testing.assert_close(solve_adaptive_sde(plain, z1, t_end=0.9, noise_fn=_own_draws()).z, expected)


# --- predictor-corrector --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_predictor_corrector_is_algorithms_1_to_5(name):
    sde = build_sde(SDES[name])
    term, z1, times = _wavy(sde), _marginal(sde, 3), natural_grid(sde, 6, 1.0, T_END)
    noise, z, draw = _draws(3), z1, 0
    for t, t_next in pairwise(times):
        z = (
            z
            - (t - t_next) * _drift(term, z, t)
            + math.sqrt(t - t_next) * 0.7 * sde.g2(t).sqrt() * noise(draw)
        )
        draw += 1
        alpha = (sde.mean_coef(t) / sde.mean_coef(t_next)) ** 2
        for _ in range(2):
            score = _score(term, z, t_next)
            ratio = noise(draw).flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
            size = 2 * alpha * (0.16 * ratio) ** 2
            z = z + size * score + torch.sqrt(2 * size) * 0.7 * noise(draw)
            draw += 1
    got = solve_predictor_corrector(term, z1, times, noise_fn=noise, corrector_steps=2, temperature=0.7)
    torch.testing.assert_close(got.z, z, rtol=1e-9, atol=1e-9)
    assert got.nfe == draw == 18 and got.accepted == len(got.steps) == 6


def test_alpha_is_that_of_the_discrete_chain():
    """alpha_i = 1 - beta_i of the paper's VP chain, beta_i = beta(t_i) / N, up to the square of beta_i."""
    sde = build_sde(SDES["vpsde"])
    step = 1e-3
    for t in (1.0, 0.5, 0.01):
        alpha = float((sde.mean_coef(t) / sde.mean_coef(t - step)) ** 2)
        assert alpha == pytest.approx(1 - step * float(sde.beta(t)), abs=(step * 20) ** 2)


@pytest.mark.parametrize("name", SDES)
def test_predictor_corrector_ends_with_the_true_variance(name):
    """1.2e5 numbers: the true variance, but for the bias of Langevin steps of this size, 1 / (1 - alpha snr^2)."""
    sde = build_sde(SDES[name])
    times = natural_grid(sde, 150, 1.0, T_END)
    shape, batch, snr = (3, 20, 20), 100, 0.16
    got = solve_predictor_corrector(
        gaussian_term(sde), _marginal(sde, batch, shape), times, noise_fn=_draws(batch, shape), snr=snr
    )
    sampled = float(got.z.square().mean())
    deviation = math.sqrt(2 / got.z.numel())
    # The variance of the discrete recursion. |noise| / |score| is V / sqrt(v), as the score is -z / V.
    v = float(variance(sde, 1.0))
    for t, t_next in pairwise(times):
        h, true = t - t_next, float(variance(sde, t_next))
        v *= (1 - h * float(sde.f(t) + sde.g2(t) / variance(sde, t))) ** 2
        v += h * float(sde.g2(t))
        alpha = float((sde.mean_coef(t) / sde.mean_coef(t_next)) ** 2)
        size = 2 * alpha * snr**2 * true**2 / v
        v = (1 - size / true) ** 2 * v + 2 * size
    assert sampled == pytest.approx(v, rel=4 * deviation)
    # What the predictor's own error leaves is below half a percent.
    assert sampled == pytest.approx(true / (1 - alpha * snr**2), rel=4 * deviation + 0.005)
    assert got.nfe == 300


# --- adaptive -------------------------------------------------------------------------------------------------------


def _algorithm_1(term, z, t_end, noise_of, rtol=0.01, atol=0.0078, h=0.01, temperature=1.0):
    """Algorithm 1 of Jolicoeur-Martineau et al. 2021 for one sample (1, C, H, W): state and (t, h, E) of attempts."""
    t, previous, attempts = 1.0, z, []
    h = min(h, t - t_end)
    while t > t_end:
        draw = temperature * math.sqrt(h) * noise_of(len(attempts))
        after = t_end if h == t - t_end else t - h
        first = z - h * _drift(term, z, t) + float(term.sde.g2(t)) ** 0.5 * draw
        other = z - h * _drift(term, first, after) + float(term.sde.g2(after)) ** 0.5 * draw
        second = (first + other) / 2
        scale = (rtol * torch.maximum(first.abs(), previous.abs())).clamp_min(atol)
        error = float(((first - second) / scale).norm()) / math.sqrt(z.numel())
        attempts.append((t, h, error))
        if error <= 1:
            z, previous, t = second, first, after
        h = min(t - t_end, 0.9 * h * error**-0.9)
    return z, attempts


@pytest.mark.parametrize("name", SDES)
def test_adaptive_is_algorithm_1(name):
    sde = build_sde(SDES[name])
    term, z1, noise = _wavy(sde), _marginal(sde, 3), _own_draws()
    got = solve_adaptive_sde(term, z1, t_end=0.5, rtol=0.05, noise_fn=noise, temperature=0.8)
    paths = []
    for i in range(3):
        z, attempts = _algorithm_1(
            term, z1[i : i + 1], 0.5, lambda k, i=i: noise(k, torch.tensor([i])), 0.05, temperature=0.8
        )
        torch.testing.assert_close(got.z[i : i + 1], z, rtol=1e-7, atol=1e-7)
        paths.append(attempts)
    longest = max(paths, key=len)
    assert got.nfe == 2 * len(longest) == 2 * len(got.steps)
    for step, (t, h, error) in zip(got.steps, longest, strict=True):
        assert (step.t, -step.h, step.error_norm) == pytest.approx((t, h, error), rel=1e-6)
        assert step.accepted == (error <= 1)
    assert got.accepted + got.rejected == len(longest) and got.rejected > 0
    assert got.accepted == sum(error <= 1 for _, _, error in longest)


def test_a_path_does_not_depend_on_the_rest_of_the_batch():
    sde = build_sde(SDES["vpsde"])
    z1 = _marginal(sde, 7)
    sizes: list[int] = []
    inner = _wavy(sde)

    def predict(z, t):
        assert t.shape == z.shape[:1]
        sizes.append(len(z))
        return inner.predict(z, t)

    whole = solve_adaptive_sde(ScoreTerm(predict, sde, LOGIT), z1, t_end=0.3, noise_fn=_own_draws())
    # Samples arrive at different times, and the network then sees the others alone.
    assert len(sizes) == whole.nfe and sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 7 and 0 < sizes[-1] < 7 and len(set(sizes)) > 2
    again = solve_adaptive_sde(inner, z1, t_end=0.3, noise_fn=_own_draws())
    assert torch.equal(again.z, whole.z) and again.steps == whole.steps
    most = 0
    for part in (slice(0, 2), slice(2, 3), slice(3, 7)):
        got = solve_adaptive_sde(inner, z1[part], t_end=0.3, noise_fn=_own_draws(offset=part.start))
        torch.testing.assert_close(got.z, whole.z[part], rtol=1e-9, atol=1e-9)
        most = max(most, got.nfe)
    assert most == whole.nfe


@pytest.mark.parametrize("name", SDES)
def test_adaptive_ends_with_the_true_variance(name):
    """1.2e5 numbers at the tolerances that are the defaults."""
    sde = build_sde(SDES[name])
    shape = (3, 20, 20)
    got = solve_adaptive_sde(
        gaussian_term(sde), _marginal(sde, 100, shape), t_end=T_END, noise_fn=_own_draws(shape)
    )
    # 4 standard deviations of the estimate.
    expected = float(variance(sde, T_END))
    assert float(got.z.square().mean()) == pytest.approx(expected, rel=4 * math.sqrt(2 / got.z.numel()))
    assert 50 < got.nfe < 500


def test_the_bias_of_fresh_noise_after_a_rejection():
    """What the docstring warns of: with 6 numbers per sample the error estimate follows the draw."""
    sde = build_sde(SDES["vpsde"])
    shape = (3, 1, 2)
    got = solve_adaptive_sde(
        gaussian_term(sde), _marginal(sde, 4000, shape), t_end=T_END, noise_fn=_own_draws(shape), rtol=0.05
    )
    excess = float(got.z.square().mean() / variance(sde, T_END)) - 1
    assert 0.1 < excess < 0.3


def test_a_smaller_tolerance_takes_smaller_steps():
    sde = build_sde(SDES["vpsde"])
    shape = (3, 8, 8)
    z1 = _marginal(sde, 4, shape)
    counts = [
        solve_adaptive_sde(
            gaussian_term(sde), z1, t_end=T_END, noise_fn=_own_draws(shape), rtol=tol, atol=tol
        ).nfe
        for tol in (0.1, 0.02, 0.004)
    ]
    assert counts[0] < 0.6 * counts[1] < 0.36 * counts[2]


def test_adaptive_progress():
    sde = build_sde(SDES["vpsde"])
    seen = []
    got = solve_adaptive_sde(
        _wavy(sde), _marginal(sde, 3), t_end=0.5, noise_fn=_own_draws(), callback=seen.append
    )
    assert [p.nfe for p in seen] == list(range(2, got.nfe + 2, 2))
    assert all(a.fraction <= b.fraction and a.t >= b.t for a, b in pairwise(seen))
    assert seen[-1].t == 0.5 and seen[-1].fraction == 1.0


# --- all of them ----------------------------------------------------------------------------------------------------

TIMES = [1.0, 0.7, 0.4, 0.2]
SOLVERS = {
    "euler-maruyama": lambda term, z1, dtype=torch.float64, **more: solve_euler_maruyama(
        term, z1, TIMES, noise_fn=_draws(len(z1), dtype=dtype), **more
    ),
    "predictor-corrector": lambda term, z1, dtype=torch.float64, **more: solve_predictor_corrector(
        term, z1, TIMES, noise_fn=_draws(len(z1), dtype=dtype), **more
    ),
    "adaptive": lambda term, z1, dtype=torch.float64, **more: solve_adaptive_sde(
        term, z1, t_end=0.2, noise_fn=lambda k, i: _own_draws()(k, i).to(dtype), **more
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_dtypes_and_kernels(solver):
    sde = build_sde(SDES["vpsde"])
    z1 = _marginal(sde, 2)
    exact = SOLVERS[solver](gaussian_term(sde), z1)
    assert exact.z.dtype == torch.float64
    with record() as log:
        # The network is in half precision here, the draws in double: the update is fused all the same.
        term = gaussian_term(sde)
        half = ScoreTerm(lambda z, t: term.predict(z, t).bfloat16(), sde, LOGIT)
        SOLVERS[solver](half, z1.float())
    assert "multistep_update" in {op for op, _ in log.counts}
    with use_backend("reference"), record() as plain:
        SOLVERS[solver](term, z1.float())
    assert {backend for _, backend in plain.counts} == {"reference"}
    assert "reference" not in {backend for _, backend in log.counts}
    single = SOLVERS[solver](term, z1.float())
    assert single.z.dtype == torch.float32
    torch.testing.assert_close(single.z.double(), exact.z, rtol=1e-3, atol=1e-4)
    low = SOLVERS[solver](term, z1.bfloat16())
    assert low.z.dtype == torch.bfloat16
    assert torch.equal(SOLVERS[solver](term, z1.float(), torch.float32).z, single.z)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_empty_batch(solver):
    sde = build_sde(SDES["vpsde"])
    for shape in ((0, 3, 2, 5), (2, 3, 0, 5)):
        z1 = torch.zeros(shape)
        got = SOLVERS[solver](gaussian_term(sde), z1)
        assert got.z.shape == shape and got.z.dtype == torch.float32 and got.z is not z1
        assert (got.nfe, got.accepted, got.rejected, got.steps) == (0, 0, 0, [])


@pytest.mark.parametrize(
    ("solver", "where"),
    [
        ("euler-maruyama", r"after step 2 of 3, at t = 0\.4$"),
        ("predictor-corrector", r"after step 2 of 3, at t = 0\.4$"),
        ("adaptive", r"of sample 1 at step \d+, from t = 0\.\d+ to 0\.[56]\d*$"),
    ],
)
def test_nan_is_reported(solver, where):
    sde = build_sde(SDES["vpsde"])

    def predict(z, t):
        broken = (t < 0.6).reshape(-1, 1, 1, 1) & (torch.arange(len(z)) == 1).reshape(-1, 1, 1, 1)
        # 0.7 is where the second step starts, and what its corrector sees is below 0.6.
        start = (t == 0.7).reshape(-1, 1, 1, 1) if solver == "euler-maruyama" else False
        return torch.where(broken | start, math.nan, 0.1 * z)

    with pytest.raises(NonFiniteError, match=where):
        SOLVERS[solver](ScoreTerm(predict, sde, LOGIT), _marginal(sde, 2))


def test_nan_ends_a_long_solve_early():
    sde = build_sde(SDES["vpsde"])
    calls = []
    term = ScoreTerm(lambda z, t: calls.append(t) or z * math.nan, sde, LOGIT)
    times = torch.linspace(1.0, 0.1, 101).tolist()
    with pytest.raises(NonFiniteError, match="after step 1 of 100"):
        solve_euler_maruyama(term, _marginal(sde, 1), times, noise_fn=_draws(1))
    assert len(calls) == 16


@pytest.mark.parametrize("solve", [solve_euler_maruyama, solve_predictor_corrector])
def test_steps_read_nothing_back(solve):
    """All that the host looks up is whether there was a NaN, once in 16 steps, and the coefficients at the start."""
    sde = build_sde(SDES["vpsde"])
    draws = _draws(2)
    noise = [draws(i) for i in range(2 * 16)]
    reads = []
    for steps in (2, 16):
        with HostReads() as counter:
            got = solve(
                _wavy(sde),
                _marginal(sde, 2),
                natural_grid(sde, steps, 1.0, T_END),
                noise_fn=noise.__getitem__,
            )
        assert got.accepted == steps
        reads.append(counter.count)
    assert reads[0] == reads[1]


def test_a_solve_that_does_not_arrive():
    sde = build_sde(SDES["vpsde"])
    z1 = _marginal(sde, 2)
    with pytest.raises(
        SolverError, match=r"sample \d reached t = 0\.9\d* of 0\.1 in max_steps = 3 steps.*error"
    ):
        solve_adaptive_sde(_wavy(sde), z1, t_end=0.1, noise_fn=_own_draws(), max_steps=3)
    wild = ScoreTerm(lambda z, t: 1e30 * torch.sin(1e9 * z), sde, LOGIT)
    with pytest.raises(
        SolverError, match=r"smaller than the spacing of numbers at t = 1\.0 \(step \d+, error"
    ):
        solve_adaptive_sde(wild, z1, t_end=0.1, noise_fn=_own_draws())


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_all_refuse(solver):
    sde = build_sde(SDES["vpsde"])
    term, z1 = _wavy(sde), _marginal(sde, 2)
    with pytest.raises(ValueError, match="temperature must be finite and not negative, got -1"):
        SOLVERS[solver](term, z1, temperature=-1.0)
    with pytest.raises(ValueError, match=r"floating-point tensor \(B, C, ...\), got torch.int64"):
        SOLVERS[solver](term, z1.long())
    with pytest.raises(ValueError, match=r"floating-point tensor \(B, C, ...\), got torch.float64 \(4,\)"):
        SOLVERS[solver](term, torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="they must be equal"):
        SOLVERS[solver](ScoreTerm(lambda z, t: z[:1], sde, LOGIT), z1)


def test_what_is_refused():
    sde = build_sde(SDES["vpsde"])
    term, z1 = _wavy(sde), _marginal(sde, 2)
    for solve in (solve_euler_maruyama, solve_predictor_corrector):
        with pytest.raises(ValueError, match=r"times must fall.*\[0\.2, 0\.5\]"):
            solve(term, z1, [0.2, 0.5], noise_fn=_draws(2))
        with pytest.raises(ValueError, match="times must be at least two"):
            solve(term, z1, [1.0], noise_fn=_draws(2))
        with pytest.raises(ValueError, match=r"noise_fn\(0\) returned shape \(1, 3, 2, 5\), expected \(2, 3"):
            solve(term, z1, TIMES, noise_fn=_draws(1))
        for beyond in ([1.1, 0.5], [1.0, -0.1]):
            with pytest.raises(ValueError, match="times must fall, from 1 at most to 0 at least"):
                solve(term, z1, beyond, noise_fn=_draws(2))
    for snr in (0.0, math.inf):
        with pytest.raises(ValueError, match="snr must be finite and positive, got"):
            solve_predictor_corrector(term, z1, TIMES, noise_fn=_draws(2), snr=snr)
    for count in (0, 1.5):
        with pytest.raises(ValueError, match=f"corrector_steps must be .* at least 1, got {count}"):
            solve_predictor_corrector(term, z1, TIMES, noise_fn=_draws(2), corrector_steps=count)
    with pytest.raises(ValueError, match=r"noise_fn\(0, indices\) returned shape"):
        solve_adaptive_sde(term, z1, t_end=0.1, noise_fn=lambda k, i: z1[:1])
    with pytest.raises(ValueError, match=r"no finite coefficients at t = 0\.0"):
        solve_adaptive_sde(term, z1, t_end=0.0, noise_fn=_own_draws())
    for times in ({"t_end": 1.0}, {"t_end": -0.1}, {"t_end": 0.1, "t_start": 1.5}, {"t_end": math.nan}):
        with pytest.raises(ValueError, match="times must satisfy 0 <= t_end < t_start <= 1"):
            solve_adaptive_sde(term, z1, noise_fn=_own_draws(), **times)
    bad = {"rtol": -1.0, "atol": 0.0, "safety": 0.0, "exponent": math.inf, "first_step": -0.1, "max_steps": 0}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            solve_adaptive_sde(term, z1, t_end=0.1, noise_fn=_own_draws(), **{name: value})


def test_steps_to_the_very_end():
    """Euler-Maruyama evaluates nothing at its last time, so 0 is one; the sub-VP coefficients have a limit there."""
    vp, sub_vp = (build_sde(SDES[name]) for name in ("vpsde", "sub_vpsde"))
    times = natural_grid(vp, 400, 1.0, 1e-4)
    found = _exact_variance(vp, [*times[:-1], 0.0])
    torch.testing.assert_close(found, torch.full_like(found, DATA_VARIANCE), rtol=0.03, atol=0)
    a = torch.sigmoid(LOGIT).flatten()
    linear, network, g = reverse_coefficients(_wavy(sub_vp), a, torch.zeros(1, dtype=torch.float64))
    beta = float(sub_vp.beta(0.0))
    torch.testing.assert_close(linear, torch.full((1, 3), -beta / 2, dtype=torch.float64))
    torch.testing.assert_close(network, 2 * beta * a[None])
    assert float(g) == 0.0
