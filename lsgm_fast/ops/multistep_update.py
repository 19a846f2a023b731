"""Linear combination of a state and its history."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks
from lsgm_fast.reference.multistep_update import multistep_update as reference


@define_op(reference)
def multistep_update(
    y: torch.Tensor,
    c_y: float | torch.Tensor,
    history: Sequence[torch.Tensor],
    coefficients: Sequence[float | torch.Tensor],
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``c_y y + sum_i c_i history_i``: the update of multistep, exponential and ancestral methods.

    Args:
        y: (B, C, H, W). history: tensors of y's shape. c_y, coefficients: numbers or (1, C, 1, 1) tensors.

    Returns:
        Like y; arithmetic in float32 or wider.

    Raises:
        ValueError: shapes do not match, or not one coefficient per history entry.
    """
    if len(history) != len(coefficients):
        raise ValueError(
            f"multistep_update got {len(history)} history entries and {len(coefficients)} coefficients"
        )
    for h in history:
        _checks.same_shape("multistep_update", y=y, history=h)
