"""Ancestral (DDPM) sampling of the discretised diffusion."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsgm_fast import ops, trace
from lsgm_fast.discretisation import VARIANCES, DDPMSchedule, discretise
from lsgm_fast.errors import NonFiniteError, unknown_name
from lsgm_fast.sampling.solution import Callback, Progress, Solution, StepRecord

if TYPE_CHECKING:
    from lsgm_fast.sde import SDE

LATENT_LIMIT = 3.0
_CHECK_EVERY = 16


@torch.no_grad()
def sample_ancestral(
    score: Callable[[Tensor, Tensor], Tensor],
    z1: Tensor,
    *,
    sde: SDE | None = None,
    schedule: DDPMSchedule | None = None,
    mixing_logit: Tensor | None = None,
    steps: int = 1000,
    noise_fn: Callable[[int], Tensor],
    temperature: float = 1.0,
    variance: str = "beta",
    callback: Callback | None = None,
) -> Solution:
    """Ancestral sampling with T steps (Ho et al. 2020, algorithm 2), as the published LSGM discretises its SDEs.

    With ``abar_k = 1 - var(k / T)`` and ``beta_k = 1 - abar_k / abar_{k-1}``, for k = T, ..., 1:
    ``z <- (z - beta_k eps / sqrt(1 - abar_k)) / sqrt(1 - beta_k) + temperature std_k noise``, where ``eps`` is the
    mixed prediction with ``r = sqrt(1 - abar_k)``. The last step adds no noise and is clamped to [-3, 3].

    Args:
        score: the network, ``score(z, t)`` with t of shape (B,), ``k / T``.
        z1: initial state (B, C, H, W), already at the prior's scale and temperature.
        sde, schedule: the diffusion, or its discretisation where that is at hand; exactly one of them.
        mixing_logit: (1, C, 1, 1) or None.
        steps: T, the number of network evaluations (ignored with ``schedule``).
        noise_fn: ``noise_fn(i)`` gives the standard-normal draw, of z1's shape, of the i-th step taken
            (i = 0 at t = 1). Not called for the last step, which adds none.
        temperature: factor on the noise of every step.
        variance: ``"beta"`` (std_k = sqrt(beta_k)) or ``"beta_post"`` (the posterior's variance).
        callback: called with a ``Progress`` after every step.

    Returns:
        Solution with the state in z1's dtype; its step records hold no error norm.

    Raises:
        ValueError: unknown variance, both or neither of sde and schedule, a non-positive number of steps, or a
            network output or draw of the wrong shape.
        NonFiniteError: the state became NaN or infinite (names the first such step and its time). Looked up
            every 16 steps, since each look waits for the device.
    """
    if variance not in VARIANCES:
        raise unknown_name("ancestral variance", variance, VARIANCES)
    if not z1.is_floating_point():
        raise ValueError(f"the initial state must be a floating-point tensor, got {z1.dtype}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if (sde is None) == (schedule is None):
        raise ValueError("pass exactly one of sde and schedule")
    if schedule is None:
        assert sde is not None
        schedule = discretise(sde, steps)
    started = time.perf_counter()
    steps = schedule.steps
    z = z1
    if z.numel() == 0:
        return Solution(z=z.clone(), nfe=0, accepted=0, rejected=0, seconds=0.0)

    # All per-step numbers that the device needs are sent in one transfer, ahead of the loop.
    work = torch.promote_types(z.dtype, torch.float32)
    times = schedule.t.flip(0).to(dtype=work).to(z.device)
    r = (1.0 - schedule.alpha_bar).sqrt().flip(0).to(dtype=work).to(z.device)
    finite = torch.ones(steps, dtype=torch.bool, device=z.device)
    records: list[StepRecord] = []
    for i in range(steps):
        k = steps - i
        trace.step(i, k / steps)
        c_x, c_eps, c_noise = schedule.step_coefficients(k, variance)
        eps = score(z, times[i].expand(z.shape[0]))
        if eps.shape != z.shape:
            raise ValueError(f"the network returned shape {tuple(eps.shape)} for a state of {tuple(z.shape)}")
        history, coefficients = [ops.mixed_score(eps, z, mixing_logit, r[i])], [c_eps]
        if k > 1:
            noise = noise_fn(i)
            if noise.shape != z.shape:
                raise ValueError(
                    f"noise_fn({i}) returned shape {tuple(noise.shape)}, expected {tuple(z.shape)}"
                )
            history.append(noise.to(device=z.device, dtype=z.dtype))
            coefficients.append(c_noise * temperature)
        z = ops.multistep_update(z, c_x, history, coefficients)
        finite[i] = torch.isfinite(z).all()
        if i % _CHECK_EVERY == _CHECK_EVERY - 1 or k == 1:
            _raise_if_not_finite(finite, i + 1, steps)
        records.append(StepRecord(t=k / steps, h=-1.0 / steps, error_norm=math.nan, accepted=True))
        if callback is not None:
            callback(Progress(fraction=(i + 1) / steps, t=(k - 1) / steps, nfe=i + 1))
    z = z.clamp(-LATENT_LIMIT, LATENT_LIMIT)
    return Solution(
        z=z, nfe=steps, accepted=steps, rejected=0, seconds=time.perf_counter() - started, steps=records
    )


def _raise_if_not_finite(finite: Tensor, done: int, steps: int) -> None:
    flags = finite[:done].tolist()
    if not all(flags):
        first = flags.index(False)
        raise NonFiniteError(
            f"NaN or infinity in the state after ancestral step {first + 1} of {steps}, "
            f"at t = {(steps - first) / steps!r}"
        )
