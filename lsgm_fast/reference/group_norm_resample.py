"""Reference GroupNorm and Swish with resampling by two behind them: two operations, one after the other."""

from __future__ import annotations

import torch

import lsgm_fast  # its `ops` import this module


def group_norm_resample(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    direction: str,
    fir: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    y = lsgm_fast.ops.group_norm_swish(x, weight, bias, groups, eps)
    return lsgm_fast.ops.fir_resample(y, direction, fir)
