"""Reference GroupNorm followed by Swish, with a per-sample channel bias or a residual sum in front."""

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
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = x.to(dtype)
    if channel_bias is not None:
        v = v + channel_bias.to(dtype)[:, :, None, None]
    y = F.group_norm(v, groups, weight.to(dtype), bias.to(dtype), eps)
    return (F.silu(y) if swish else y).to(x.dtype)


def group_norm_swish_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    scale: float,
    eps: float = 1e-6,
    swish: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    result = torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.promote_types(result, torch.float32)
    v = ((x.to(dtype) + residual.to(dtype)) * scale).to(result)
    return v, group_norm_swish(v, weight, bias, groups, eps, None, swish)


def group_norm_swish_affine(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = x.to(dtype).unflatten(1, (groups, -1)).flatten(2)
    mean = v.mean(dim=2)
    var = (v - mean[:, :, None]).square().mean(dim=2)
    spread = x.shape[1] // groups
    factor = torch.rsqrt(var + eps).repeat_interleave(spread, dim=1) * weight.to(dtype)
    return factor, bias.to(dtype) - mean.repeat_interleave(spread, dim=1) * factor
