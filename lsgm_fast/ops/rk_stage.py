"""One stage of an explicit Runge-Kutta method."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.rk_stage import rk_stage as reference


@define_op(reference)
def rk_stage(
    y: torch.Tensor, k: torch.Tensor, a: Sequence[float], h: float, *, backend: str | None = None
) -> torch.Tensor:
    """``y + h sum_i a_i k_i``: the state at which the next stage is evaluated.

    Args:
        y: state. k: (S, *y.shape), stages stored contiguously, S >= len(a). a: row of the tableau.
        h: step size, signed.

    Returns:
        Like y.

    Raises:
        ValueError: k does not hold len(a) stages of y's shape.
    """
    if k.shape[1:] != y.shape or k.shape[0] < len(a):
        raise ValueError(f"rk_stage expects k (>= {len(a)}, {tuple(y.shape)}), got {tuple(k.shape)}")
