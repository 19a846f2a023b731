"""Samplers for the reverse-time SDE of the mixed score: Euler-Maruyama, predictor-corrector and adaptive steps.

The score of the mixed prediction is ``-((1 - a) r z + a e) / sqrt(var)``, e being the network's output. Put into the
reverse SDE ``dz = [f z - g^2 score] dt + g dw`` (Song et al. 2021, equation 6; t falls) it gives, per channel,

    dz = (l z + w e) dt + g dw,     l = f + (1 - a) g^2 / S^2,     w = a g^2 / sqrt(var),

so that a step of Euler-Maruyama is one linear combination of the state, the network's output and the noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from lsgm_fast import ops, trace
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling import solution as _solution
from lsgm_fast.sampling.solution import Callback, CountedDrift, Progress, Solution, SolverError, StepRecord
from lsgm_fast.sampling.terms import ScoreTerm

AdaptiveNoise: TypeAlias = Callable[[int, Tensor], Tensor]
"""``noise_fn(attempt, indices)``: standard normals (len(indices), C, ...) of the samples at these positions."""

_CHECK_EVERY = 16


def reverse_coefficients(term: ScoreTerm, a: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(l, w, g) of ``dz = (l z + w e) dt + g dw`` at the times t (N,): (N, C), (N, C) and (N,), all float64.

    Raises:
        ValueError: one of them is not finite, as at t = 0 for a VPSDE with sigma2_0 = 0.
    """
    sde = term.sde
    g2 = sde.g2(t)
    # q is g^2 / (2 sqrt(var)), also where both vanish.
    _, q, _ = sde.drift_coefficients(t)
    linear = sde.f(t)[:, None] + (1.0 - a) * (g2 / sde.s2(t))[:, None]
    network = a * (2.0 * q)[:, None]
    finite = torch.isfinite(linear).all(1) & torch.isfinite(network).all(1) & torch.isfinite(g2)
    if not finite.all():
        where = float(t[~finite][0])
        raise ValueError(
            f"the reverse SDE of {sde.name} with sigma2_0={sde.sigma2_0} has no finite coefficients at t = {where!r}: "
            "the network's part is infinite where the variance is 0, so stop at a time above 0"
        )
    return linear, network, g2.sqrt()


def _check_state(z1: Tensor, temperature: float) -> None:
    if not z1.is_floating_point() or z1.dim() < 2:
        raise ValueError(
            f"the initial state must be a floating-point tensor (B, C, ...), got {z1.dtype} {tuple(z1.shape)}"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")


def _checked_draw(noise: Tensor, call: str, like: Tensor) -> Tensor:
    if noise.shape != like.shape:
        raise ValueError(f"{call} returned shape {tuple(noise.shape)}, expected {tuple(like.shape)}")
    return noise.to(device=like.device, dtype=like.dtype)


def _evaluate(calls: CountedDrift, term: ScoreTerm, z: Tensor, t: Tensor) -> Tensor:
    """The network's output, in the state's dtype: the fused update wants one dtype for all that it adds."""
    return calls.counted(term.predict(z, t.expand(z.shape[0]))).to(z.dtype)


class _FixedSteps:
    """What the two solvers over given times share: Euler-Maruyama steps, draws, checks and the result."""

    def __init__(
        self,
        term: ScoreTerm,
        z1: Tensor,
        times: Sequence[float],
        noise_fn: Callable[[int], Tensor],
        temperature: float,
        callback: Callback | None,
    ) -> None:
        _check_state(z1, temperature)
        self.times = _solution.checked_times(times)
        falling = all(after < before for before, after in pairwise(self.times))
        if not falling or self.times[0] > 1.0 or self.times[-1] < 0.0:
            raise ValueError(
                "times must fall, from 1 at most to 0 at least, since the reverse SDE runs from noise to data: "
                f"got {self.times}"
            )
        self.term = term
        self.temperature = temperature
        self.noise_fn = noise_fn
        self.callback = callback
        self.started = time.perf_counter()
        self.dtype = z1.dtype
        self.z = z1.to(torch.promote_types(z1.dtype, torch.float32))
        self.steps = len(self.times) - 1 if z1.numel() else 0
        self.calls = CountedDrift(term, z1.shape)
        self.draws = 0
        t = torch.tensor(self.times, dtype=torch.float64)
        size = -t.diff()
        linear, network, g = reverse_coefficients(term, term.mixing, t[:-1])
        self.c_noise = (temperature * size.sqrt() * g).tolist()
        # Everything that the device needs is sent ahead of the loop.
        self.stamps, self.r, self.c_z, self.c_e = _solution.send(
            self.z, t, term.sde.mixed_r(t), 1.0 - size[:, None] * linear, -size[:, None] * network
        )
        self.channels = (1, -1, *(1,) * (z1.dim() - 2))
        self.finite = torch.ones(self.steps, dtype=torch.bool, device=z1.device)

    def network(self, n: int) -> Tensor:
        """The network's output at the present state and ``times[n]``."""
        return _evaluate(self.calls, self.term, self.z, self.stamps[n])

    def draw(self) -> Tensor:
        noise = _checked_draw(self.noise_fn(self.draws), f"noise_fn({self.draws})", self.z)
        self.draws += 1
        return noise

    def predict(self, n: int, *, noisy: bool) -> None:
        """The state at ``times[n + 1]`` by a step of Euler-Maruyama."""
        history, coefficients = [self.network(n)], [self.c_e[n].view(self.channels)]
        if noisy:
            history.append(self.draw())
            coefficients.append(self.c_noise[n])
        self.z = ops.multistep_update(self.z, self.c_z[n].view(self.channels), history, coefficients)

    def finish(self, n: int) -> None:
        """Step n is done: watch for NaN, tell the caller."""
        self.finite[n] = torch.isfinite(self.z).all()
        # Each look waits for the device.
        if n % _CHECK_EVERY == _CHECK_EVERY - 1 or n == self.steps - 1:
            _solution.raise_if_not_finite(self.finite, self.times)
        if self.callback is not None:
            first, now, last = self.times[0], self.times[n + 1], self.times[-1]
            self.callback(Progress(fraction=(now - first) / (last - first), t=now, nfe=self.calls.nfe))

    def solution(self) -> Solution:
        return Solution(
            z=self.z.to(self.dtype, copy=self.steps == 0),
            nfe=self.calls.nfe,
            accepted=self.steps,
            rejected=0,
            seconds=time.perf_counter() - self.started,
            steps=_solution.fixed_steps(self.times) if self.steps else [],
        )


@torch.no_grad()
def solve_euler_maruyama(
    term: ScoreTerm,
    z1: Tensor,
    times: Sequence[float],
    *,
    noise_fn: Callable[[int], Tensor],
    temperature: float = 1.0,
    denoise: bool = True,
    callback: Callback | None = None,
) -> Solution:
    """The reverse SDE over given times, one evaluation of the network per step.

    ``z <- z - h (l z + w e) + temperature sqrt(h) g noise`` with h the time that a step covers and (l, w, g) where it
    starts. Of weak order 1.

    Args:
        term: the score network and its SDE.
        z1: state at ``times[0]``, (B, C, ...), already at the prior's scale and temperature.
        times: falling, in [0, 1], such as from :func:`~lsgm_fast.sampling.natural_grid`; the last may be 0.
        noise_fn: ``noise_fn(i)`` gives the standard-normal draw, of z1's shape, of the i-th step.
        temperature: factor on the noise of every step.
        denoise: no noise in the last step, as score_sde returns its samples: their variance is then too small by that
            of this noise, ``h g^2``. False: the last step is like every other.
        callback: called with a ``Progress`` after every step.

    Returns:
        Solution with the state in z1's dtype (computed in float32 or wider); its step records hold no error norm.

    Raises:
        ValueError: times that do not fall or where a coefficient is infinite, a bad temperature, a state that is not
            (B, C, ...) of floating-point numbers, a network output or draw of the wrong shape.
        NonFiniteError: the state became NaN or infinite (names the first such step and its time). Looked up every 16
            steps, since each look waits for the device.

    Source: Song et al. 2021, equation 6 and appendix G; LSGM, equation 8.
    """
    run = _FixedSteps(term, z1, times, noise_fn, temperature, callback)
    for n in range(run.steps):
        trace.step(n, run.times[n])
        run.predict(n, noisy=not denoise or n < run.steps - 1)
        run.finish(n)
    return run.solution()


def _mean_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1).mean()


@torch.no_grad()
def solve_predictor_corrector(
    term: ScoreTerm,
    z1: Tensor,
    times: Sequence[float],
    *,
    noise_fn: Callable[[int], Tensor],
    snr: float = 0.16,
    corrector_steps: int = 1,
    temperature: float = 1.0,
    callback: Callback | None = None,
) -> Solution:
    """Predictor-corrector sampling: after each Euler-Maruyama step, steps of Langevin dynamics at the time reached.

    The corrector is ``z <- z + d score + temperature sqrt(2 d) noise`` with
    ``d = 2 alpha (snr |noise| / |score|)^2``. The norms are those of a sample, averaged over the batch: a sample
    depends on those it is drawn with, as in the paper. ``alpha = (m(t) / m(t_next))^2`` of the step just made: 1 for
    VE, and alpha_i of the paper's discrete VP chain for VP.

    Langevin steps of that size have a bias of their own: on Gaussian data the variance that they keep is
    ``1 / (1 - alpha snr^2)`` times the true one, 2.6% too much for 0.16. Smaller snr takes it away.

    Args:
        term, z1, temperature, callback: as for :func:`solve_euler_maruyama`.
        times: falling. The network is evaluated at all of them but the first also by the corrector.
        noise_fn: ``noise_fn(i)`` gives the i-th standard-normal draw, of z1's shape; ``1 + corrector_steps`` draws a
            step, the predictor's first.
        snr: r, the signal-to-noise ratio of the corrector's steps.
        corrector_steps: M, corrector steps after each predictor step, at least 1.

    Returns:
        Solution with the state in z1's dtype; ``nfe`` is ``1 + corrector_steps`` times the steps. Its step records
        hold no error norm. The last corrector's noise stays in the state.

    Raises:
        ValueError: as :func:`solve_euler_maruyama`, or snr or corrector_steps out of range.
        NonFiniteError: as :func:`solve_euler_maruyama`; also where the score is 0 everywhere, since the corrector's
            step is then infinite.

    Source: Song et al. 2021, algorithms 1 to 5.
    """
    if not (math.isfinite(snr) and snr > 0):
        raise ValueError(f"snr must be finite and positive, got {snr}")
    if not isinstance(corrector_steps, int) or corrector_steps < 1:
        raise ValueError(
            f"corrector_steps must be a whole number of at least 1, got {corrector_steps!r}: "
            "solve_euler_maruyama has none"
        )
    run = _FixedSteps(term, z1, times, noise_fn, temperature, callback)
    t = torch.tensor(run.times, dtype=torch.float64)
    m, std = term.sde.mean_coef(t), term.sde.var(t[1:]).sqrt()
    alpha = (m[:-1] / m[1:]).square()
    # With score = -mixed / std: d score and sqrt(2 d) noise, but for the ratio of the norms of noise and mixed.
    towards = (-2.0 * snr**2 * alpha * std).tolist()
    spread = (2.0 * snr * temperature * alpha.sqrt() * std).tolist()
    for n in range(run.steps):
        trace.step(n, run.times[n])
        run.predict(n, noisy=True)
        for _ in range(corrector_steps):
            mixed = ops.mixed_score(run.network(n + 1), run.z, term.mixing_logit, run.r[n + 1])
            noise = run.draw()
            # The norms stay on the device, and with them the coefficients.
            ratio = _mean_norm(noise) / _mean_norm(mixed)
            run.z = ops.multistep_update(
                run.z, 1.0, [mixed, noise], [towards[n] * ratio.square(), spread[n] * ratio]
            )
        run.finish(n)
    return run.solution()


@torch.no_grad()
def solve_adaptive_sde(
    term: ScoreTerm,
    z1: Tensor,
    *,
    t_start: float = 1.0,
    t_end: float,
    noise_fn: AdaptiveNoise,
    rtol: float = 0.01,
    atol: float = 0.0078,
    safety: float = 0.9,
    exponent: float = 0.9,
    first_step: float = 0.01,
    temperature: float = 1.0,
    max_steps: int = 10_000,
    callback: Callback | None = None,
) -> Solution:
    """The reverse SDE to a tolerance, every sample with time and steps of its own.

    With D(z, t) = l z + w e the drift, an attempt from t to t - h is

        z'  = z - h D(z, t) + sqrt(h) g(t) noise                                      (Euler-Maruyama)
        z'' = (z' + z - h D(z', t - h) + sqrt(h) g(t - h) noise) / 2                  (improved Euler)
        E   = sqrt(mean(((z' - z'') / max(atol, rtol max(|z'|, |z'_prev|)))^2))       (one for each sample)

    Where E <= 1 the sample goes on from z'' and remembers z' as z'_prev; elsewhere it stays. Then h becomes
    ``min(t - t_end, safety h E^-exponent)``. Samples that have arrived leave the batch, and the network sees the others
    alone. The path of a sample does not depend on the samples it is drawn with.

    Each attempt has fresh noise, as in the paper. After a rejection that favours noise which opposes the drift, a bias
    that a smaller tolerance does not remove: on Gaussian data, at the default tolerances, the variance is 13 to 31% too
    large for samples of 6 elements, 3.5 to 6% for 30, 1 to 1.4% for 96, and within 0.3% for 300. Use this solver for
    states of many elements.

    Args:
        term: the score network and its SDE; ``predict`` is called with a different time for each sample.
        z1: state at ``t_start``, (B, C, ...), already at the prior's scale and temperature.
        t_start, t_end: times, ``t_end < t_start``; the network is evaluated at ``t_end`` too.
        noise_fn: ``noise_fn(attempt, indices)`` gives standard normals (len(indices), C, ...): the draws for this
            attempt (0, 1, ...) of the samples at these positions of z1 (int64, on the CPU, rising). Every sample makes
            its k-th attempt in the k-th round, so with
            ``lsgm_fast.random.normal(seed, indices, name, shape, substream=attempt)`` the noise is the sample's own.
        rtol: the paper's recommendation; 0.02 and 0.05 are faster.
        atol: positive; the paper takes one 8-bit step of a pixel, 2/256 for images in [-1, 1]. For latents of about
            unit variance, which the mixed score assumes, it does as well: rtol |z| and atol are equal at |z| = 0.78, so
            atol rules within about a standard deviation of 0 and rtol beyond. For latents of another scale multiply it
            by that.
        safety, exponent, first_step: of the step size, positive; the paper's values.
        temperature: factor on the noise.
        max_steps: largest number of attempts of a sample.
        callback: called with a ``Progress`` after every round of attempts; ``t`` and ``fraction`` are those of the
            sample furthest behind.

    Returns:
        Solution with the state in z1's dtype. ``nfe`` counts network calls, two for each round of attempts, whatever
        the number of samples in it. ``steps`` is the path of the sample that arrived last (of several the first one).
        It took part in all calls, so ``len(steps) == accepted + rejected == nfe / 2``.

    Raises:
        ValueError: a tolerance, time or other number out of range, a bad state, a wrong shape, or a coefficient that
            is infinite at ``t_end``.
        NonFiniteError: NaN or infinity in an error estimate (names attempt, t and sample).
        SolverError: a step fell below the resolution of time, or ``max_steps`` attempts were not enough.

    Source: Jolicoeur-Martineau et al. 2021, "Gotta Go Fast When Generating Data with Score-Based Models", algorithm 1.
    """
    _check_state(z1, temperature)
    if not 0.0 <= t_end < t_start <= 1.0:
        raise ValueError(
            f"times must satisfy 0 <= t_end < t_start <= 1, got t_start={t_start}, t_end={t_end}"
        )
    if not (math.isfinite(rtol) and rtol >= 0):
        raise ValueError(f"rtol must be finite and not negative, got {rtol}")
    positive = {"atol": atol, "safety": safety, "exponent": exponent, "first_step": first_step}
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and positive, got {value}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    started = time.perf_counter()
    a = term.mixing
    reverse_coefficients(term, a, torch.tensor([t_start, t_end], dtype=torch.float64))
    z = z1.to(torch.promote_types(z1.dtype, torch.float32))
    result = torch.empty_like(z)
    calls = CountedDrift(term, z.shape)
    ones = (1,) * (z.dim() - 2)
    # The step control is on the host, which must know who is left in the batch. These have an entry for each of them.
    batch = z.shape[0] if z.numel() else 0
    active = torch.arange(batch)
    t = torch.full((batch,), t_start, dtype=torch.float64)
    h = torch.full_like(t, min(first_step, t_start - t_end))
    euler_before = z
    rounds: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    while len(active) > 0:
        attempt = len(rounds)
        if attempt == max_steps:
            late = int(t.argmax())
            error = rounds[-1][3][torch.searchsorted(rounds[-1][0], active[late])]
            raise SolverError(
                f"sample {int(active[late])} reached t = {float(t[late])!r} of {t_end!r} in max_steps = {max_steps} "
                f"steps, the last with error {float(error):.3g}: raise rtol = {rtol}, atol = {atol} or max_steps"
            )
        trace.step(attempt, t)
        t_next = torch.where(h >= t - t_end, t_end, t - h)
        linear, network, g = reverse_coefficients(term, a, torch.cat([t, t_next]))
        (l1, l2), (w1, w2), (g1, g2) = linear.chunk(2), network.chunk(2), g.chunk(2)
        size, root = h[:, None], temperature * h.sqrt()
        now, then, c_z, c_e, c_noise, d_z, d_e, d_noise = _solution.send(
            z,
            t,
            t_next,
            (1.0 - size * l1).reshape(len(t), -1, *ones),
            (-size * w1).reshape(len(t), -1, *ones),
            root * g1,
            (0.5 - 0.5 * size * l2).reshape(len(t), -1, *ones),
            (-0.5 * size * w2).reshape(len(t), -1, *ones),
            0.5 * root * g2,
        )
        noise = _checked_draw(noise_fn(attempt, active), f"noise_fn({attempt}, indices)", z)
        calls.shape = z.shape
        euler = ops.multistep_update(z, c_z, [_evaluate(calls, term, z, now), noise], [c_e, c_noise])
        output = _evaluate(calls, term, euler, then)
        improved = ops.multistep_update(euler, d_z, [z, output, noise], [0.5, d_e, d_noise])
        scale = (rtol * torch.maximum(euler.abs(), euler_before.abs())).clamp_min(atol)
        norm = ((euler - improved) / scale).square().flatten(1).mean(1).sqrt()
        # What the host waits for: the next sizes of the batch and of the steps depend on it.
        error = norm.cpu().double()
        if not torch.isfinite(error).all():
            bad = int(torch.isfinite(error).logical_not().nonzero()[0])
            raise NonFiniteError(
                f"NaN or infinity in the error estimate of sample {int(active[bad])} at step {attempt + 1}, "
                f"from t = {float(t[bad])!r} to {float(t_next[bad])!r}"
            )
        rounds.append((active, t, h, error))
        accepted = (norm <= 1.0).view(-1, 1, *ones)
        z = torch.where(accepted, improved, z)
        euler_before = torch.where(accepted, euler, euler_before)
        t = torch.where(error <= 1.0, t_next, t)
        left = t > t_end
        h = torch.minimum(t - t_end, safety * h * error**-exponent)
        stalled = left & (t - h == t)
        if stalled.any():
            bad = int(stalled.nonzero()[0])
            raise SolverError(
                f"sample {int(active[bad])} needs a step smaller than the spacing of numbers at t = {float(t[bad])!r} "
                f"(step {attempt + 1}, error {float(error[bad]):.3g}): raise rtol = {rtol} and atol = {atol}, or stop "
                "earlier"
            )
        if callback is not None:
            behind = float(t.max())
            fraction = (t_start - behind) / (t_start - t_end)
            callback(Progress(fraction=fraction, t=behind, nfe=calls.nfe))
        if not left.all():
            arrived, rest = ((flags.nonzero()[:, 0]).to(z.device) for flags in (~left, left))
            result[active[~left].to(z.device)] = z[arrived]
            z, euler_before = z[rest], euler_before[rest]
            active, t, h = active[left], t[left], h[left]
    steps = _path(rounds)
    accepted_steps = sum(step.accepted for step in steps)
    return Solution(
        z=result.to(z1.dtype),
        nfe=calls.nfe,
        accepted=accepted_steps,
        rejected=len(steps) - accepted_steps,
        seconds=time.perf_counter() - started,
        steps=steps,
    )


def _path(rounds: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[StepRecord]:
    """The attempts of the first sample of the last round."""
    steps = []
    for active, *columns in rounds:
        row = torch.searchsorted(active, rounds[-1][0][:1])
        t, h, error = (float(column[row]) for column in columns)
        steps.append(StepRecord(t=t, h=-h, error_norm=error, accepted=error <= 1.0))
    return steps
