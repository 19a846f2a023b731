"""The end of a Runge-Kutta step: solution, embedded error and its norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.rk_finish import rk_finish as reference


@define_op(reference)
def rk_finish(
    y: torch.Tensor,
    k: torch.Tensor,
    b: Sequence[float],
    e: Sequence[float],
    h: float,
    rtol: float,
    atol: float,
    per_sample: bool = False,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y_new = y + h sum b_i k_i`` and the norm of the embedded error ``h sum e_i k_i``.

    ``norm = sqrt(mean((error / (atol + rtol max(|y|, |y_new|)))^2))``, over everything, or per sample.

    Args:
        y: (B, ...) state. k: (S, *y.shape), S >= max(len(b), len(e)). b: weights of the solution. e: weights of the
            error (solution minus embedded solution). h: step size, signed. rtol, atol: tolerances.

    Returns:
        ``(y_new, norm)``: y_new like y; norm 0-d, or (B,) with ``per_sample``. An empty batch has norm 0.

    Raises:
        ValueError: k does not hold enough stages of y's shape.

    Source: Hairer, Norsett & Wanner, Solving ODEs I, section II.4; SciPy's RK45.
    """
    stages = max(len(b), len(e))
    if k.shape[1:] != y.shape or k.shape[0] < stages:
        raise ValueError(f"rk_finish expects k (>= {stages}, {tuple(y.shape)}), got {tuple(k.shape)}")
