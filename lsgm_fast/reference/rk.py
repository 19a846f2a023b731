"""Reference implementations of the Runge-Kutta operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsgm_fast.reference import _broadcast
from lsgm_fast.reference._broadcast import Scalar, compute_dtype
from lsgm_fast.reference.score_drift import score_drift

# The step control's block of float64 numbers, in this order along its last dimension.
CONTROL_FIELDS = ("t", "h", "t_next", "retried", "signal", "accepted", "rejected", "norm")


def linear_combination(k: Tensor, coefficients: Sequence[float], y: Tensor) -> Tensor:
    """``sum_i coefficients[i] k[i]`` in the dtype in which a step of the state ``y`` is evaluated.

    Stages with a zero coefficient are not read.
    """
    n = len(coefficients)
    if n == 0 or k.shape[0] < n or k.shape[1:] != y.shape:
        raise ValueError(
            f"k must hold at least {max(n, 1)} stages of shape {tuple(y.shape)}, one per coefficient, "
            f"got shape {tuple(k.shape)} for {n} coefficients"
        )
    dtype = compute_dtype(y, k)
    used = [(stage, c) for stage, c in zip(k[:n], coefficients, strict=True) if c != 0]
    if not used:
        return torch.zeros_like(y, dtype=dtype)
    total = used[0][0].to(dtype) * used[0][1]
    for stage, c in used[1:]:
        total = total.add(stage.to(dtype), alpha=c)
    return total


def rk_stage(y: Tensor, k: Tensor, a: Sequence[float], h: Scalar) -> Tensor:
    """State at which a Runge-Kutta stage is evaluated, ``y + h sum_i a[i] k[i]``.

    Args:
        y: state (B, ...).
        k: (>= n, *y.shape), stage derivatives; of the first n those with ``a[i] != 0`` are read.
        a: n numbers, one row of the Butcher tableau.
        h: signed step size: a number, 0-d or (B,).

    Returns:
        Tensor of y's shape and dtype, evaluated in at least float32.

    Raises:
        ValueError: ``k`` does not hold ``len(a)`` stages of y's shape, or ``h`` has another shape.
    """
    increment = linear_combination(k, a, y)
    increment = increment * _broadcast.per_sample(h, y, increment.dtype, "h")
    return (y.to(increment.dtype) + increment).to(y.dtype)


def rk_finish(
    y: Tensor,
    k: Tensor,
    b: Sequence[float],
    e: Sequence[float],
    h: Scalar,
    rtol: float,
    atol: float,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Solution of an embedded Runge-Kutta step and the scaled norm of its error estimate.

    ``y_new = y + h sum_i b[i] k[i]``, ``error = h sum_i e[i] k[i]`` and
    ``norm = sqrt(mean((error / (atol + rtol max(|y|, |y_new|)))^2))`` (Hairer, Norsett and Wanner, Solving
    Ordinary Differential Equations I, section II.4). A step is acceptable where ``norm < 1``.

    Args:
        y: state at the start of the step, (B, ...).
        k: (>= max(len(b), len(e)), *y.shape), stage derivatives.
        b, e: weights of the solution and of the difference from the embedded solution.
        h: signed step size: a number, 0-d or (B,).
        rtol, atol: relative and absolute tolerance.
        per_sample: one norm per sample instead of one over the whole batch.

    Returns:
        ``(y_new, norm)``: y's shape and dtype; 0-d or (B,), in the dtype of the evaluation (at least
        float32). The norm of an empty state is 0.

    Raises:
        ValueError: ``k`` holds too few stages or stages of another shape, or ``h`` has another shape.
    """
    y_new = rk_stage(y, k, b, h)
    error = linear_combination(k, e, y)
    dtype = error.dtype
    error = error * _broadcast.per_sample(h, y, dtype, "h")
    # The norm compares the states that the solver keeps, so the new one counts as rounded to y's dtype.
    scale = atol + torch.maximum(y.to(dtype).abs(), y_new.to(dtype).abs()) * rtol
    ratio = (error / scale).square()
    if per_sample:
        ratio = ratio.flatten(1) if ratio.ndim > 1 else ratio[:, None]
        return y_new, torch.sqrt(ratio.sum(1) / max(ratio.shape[1], 1))
    return y_new, torch.sqrt(ratio.sum() / max(ratio.numel(), 1))


def rk_drift_stage(
    eps: Tensor,
    z: Tensor,
    mixing_logit: Tensor | None,
    p: Scalar,
    q: Scalar,
    r: Scalar,
    y: Tensor,
    k: Tensor,
    stage: int,
    a: Sequence[float],
    h: Scalar,
) -> None:
    """A stage's derivative and the state at which the next one is evaluated, both in place.

    ``k[stage] = p z + alpha q (eps - r z)`` (``score_drift``), then ``z = y + h sum_i a[i] k[i]`` (``rk_stage``).

    Args:
        eps: (B, C, ...), the network's output at z.
        z: state of this stage; overwritten with that of the next.
        mixing_logit, p, q, r: as for ``score_drift``.
        y: state at the start of the step.
        k: (S, *y.shape), stage derivatives; ``k[stage]`` is written.
        a, h: as for ``rk_stage``; ``a`` may have a coefficient for the new stage.
    """
    k[stage] = score_drift(eps, z, mixing_logit, p, q, r)
    z.copy_(rk_stage(y, k, a, h))


def rk_drift_finish(
    eps: Tensor,
    z: Tensor,
    mixing_logit: Tensor | None,
    p: Scalar,
    q: Scalar,
    r: Scalar,
    y: Tensor,
    k: Tensor,
    stage: int,
    b: Sequence[float],
    e: Sequence[float],
    h: Scalar,
    rtol: float,
    atol: float,
    per_sample: bool = False,
) -> Tensor:
    """The last stage's derivative, the solution and the error's norm.

    ``k[stage] = p z + alpha q (eps - r z)``, then ``z`` and the norm as ``rk_finish`` gives them.

    Args:
        eps, z, mixing_logit, p, q, r, y, k, stage: as for ``rk_drift_stage``; z is overwritten with the solution.
        b, e, h, rtol, atol, per_sample: as for ``rk_finish``.

    Returns:
        The norm, as from ``rk_finish``.
    """
    k[stage] = score_drift(eps, z, mixing_logit, p, q, r)
    y_new, norm = rk_finish(y, k, b, e, h, rtol, atol, per_sample)
    z.copy_(y_new)
    return norm


def rk_control(
    control: Tensor,
    norm: Tensor,
    t_end: float,
    exponent: float = -0.2,
    safety: float = 0.9,
    min_factor: float = 0.2,
    max_factor: float = 10.0,
) -> Tensor:
    """Accept or reject an attempted step, and choose the next one (SciPy's ``RungeKutta`` controller).

    The step is accepted where ``norm < 1``. The next step size is the last one times ``safety norm^exponent``, at
    most ``max_factor`` times (1 where this step was a second attempt) and, after a rejection, at least
    ``min_factor`` times; a step that would pass ``t_end`` ends there.

    Args:
        control: (..., 8) float64, fields ``CONTROL_FIELDS``: start and signed size of the attempted step, where it
            ends, 1 where it was a further attempt, the signal, counts of accepted and rejected steps, last norm.
        norm: (...), norm of the attempted step's error.
        t_end: where the integration ends. exponent: -1 / (order of the error estimate + 1).
        safety, min_factor, max_factor: of the controller.

    Returns:
        The control of the next attempt. ``signal`` is what a host needs to know: the new ``t`` (the old one after a
        rejection, ``t_end`` at the end), NaN where the norm is not finite, infinity where the next attempt would be
        smaller than ten spacings of numbers at t. A control with ``h = 0`` has arrived and stays as it is.
    """
    t, h, t_next, retried, _, accepted, rejected, _ = control.unbind(-1)
    norm = norm.to(control.dtype)
    finite = torch.isfinite(norm)
    accept = norm < 1
    factor = safety * norm**exponent
    grow = torch.clamp(factor, max=max_factor)
    grow = torch.where(retried > 0, torch.clamp(grow, max=1.0), grow)
    shrink = torch.where(finite, torch.clamp(factor, min=min_factor), min_factor)
    size = h.abs() * torch.where(accept, grow, shrink)
    start = torch.where(accept, t_next, t)
    direction = torch.sign(h)
    # A spacing of numbers has no derivative (and nextafter none in PyTorch 2.11).
    here = start.detach()
    smallest = 10 * (torch.nextafter(here, direction.detach() * math.inf) - here).abs()
    too_small = ~accept & (size < smallest)
    size = torch.where(accept, torch.maximum(size, smallest), size)
    end = start + direction * size
    end = torch.where(direction * (end - t_end) > 0, t_end, end)
    signal = torch.where(finite, torch.where(too_small, math.inf, start), math.nan)
    fields = (
        start,
        end - start,
        end,
        (~accept).to(t.dtype),
        signal,
        accepted + accept,
        rejected + ~accept,
        norm,
    )
    return torch.where((h != 0)[..., None], torch.stack(fields, dim=-1), control)
