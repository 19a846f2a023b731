"""Reference BatchNorm followed by Swish."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bn_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    batch_stats: bool,
    eps: float = 1e-5,
    swish: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if batch_stats:
        # momentum 1 turns fresh buffers into exactly the statistics of this batch (variance unbiased).
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    else:
        mean, var = running_mean, running_var
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    return (F.silu(y) if swish else y), mean, var
