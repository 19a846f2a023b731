"""Reference GroupNorm followed by Swish, with an optional per-sample channel bias in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def group_norm_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-6,
    channel_bias: torch.Tensor | None = None,
    swish: bool = True,
) -> torch.Tensor:
    if channel_bias is not None:
        x = x + channel_bias[:, :, None, None]
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if swish else y
