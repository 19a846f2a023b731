"""Reference implementation of ``rk_finish``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsgm_fast.reference.rk_stage import linear_combination


def rk_finish(
    y: Tensor,
    k: Tensor,
    b: Sequence[float],
    e: Sequence[float],
    h: Tensor | float,
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
        h: signed step size, a number or a 0-d tensor.
        rtol, atol: relative and absolute tolerance.
        per_sample: one norm per sample instead of one over the whole batch.

    Returns:
        ``(y_new, norm)``: y's shape and dtype; 0-d or (B,), in the dtype of the evaluation (at least
        float32). The norm of an empty state is 0.

    Raises:
        ValueError: ``k`` holds too few stages or stages of another shape.
    """
    increment = linear_combination(k, b, y) * h
    error = linear_combination(k, e, y) * h
    start = y.to(increment.dtype)
    y_new = start + increment
    # The norm compares the states that the solver keeps, so the new one is rounded to y's dtype first.
    y_new = y_new.to(y.dtype)
    scale = atol + torch.maximum(start.abs(), y_new.to(increment.dtype).abs()) * rtol
    ratio = (error / scale).square()
    if per_sample:
        ratio = ratio.flatten(1) if ratio.ndim > 1 else ratio[:, None]
        return y_new, torch.sqrt(ratio.sum(1) / max(ratio.shape[1], 1))
    return y_new, torch.sqrt(ratio.sum() / max(ratio.numel(), 1))
