"""Reference residual cell of the NVAE, one layer after another; every layer is an operation of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import lsgm_fast  # its `ops` import this module


def affine(norm: Sequence[torch.Tensor], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, shift) of a BatchNorm with running statistics: weight, bias, running mean, running variance."""
    weight, bias, mean, var = norm
    factor = weight * torch.rsqrt(var + eps)
    return factor, bias - mean * factor


def nvae_cell(
    x: torch.Tensor,
    skip: torch.Tensor,
    convs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    squeeze_excite: Sequence[torch.Tensor],
    stride: int = 1,
    up: bool = False,
    batch_stats: bool = False,
    eps: float = 1e-5,
    scale: float = 0.1,
) -> torch.Tensor:
    def normalise(x: torch.Tensor, i: int, swish: bool = True) -> torch.Tensor:
        weight, bias, mean, var = norms[4 * i : 4 * i + 4]
        return lsgm_fast.ops.bn_swish(x, weight, bias, mean, var, batch_stats, eps, swish)[0]

    if len(convs) == 3:
        expand, depthwise, project = convs
        x = F.conv2d(normalise(x, 0, swish=False), expand)
        if batch_stats:
            # Repeated pixels have the mean and the variance of those that are repeated.
            x = normalise(x, 1)
        if up:
            x = lsgm_fast.ops.fir_resample(x, "up", fir=False)
        if batch_stats:
            # The statistics behind the depthwise convolution need its output.
            x = normalise(lsgm_fast.ops.depthwise_bn_swish(x, depthwise, stride), 2)
        else:
            x = lsgm_fast.ops.depthwise_bn_swish(
                x, depthwise, stride, *affine(norms[4:8], eps), *affine(norms[8:12], eps)
            )
        y = normalise(F.conv2d(x, project), 3, swish=False)
    else:
        first, second = convs
        x = normalise(x, 0)
        bias = biases[0] if len(biases) == 2 else None
        x = lsgm_fast.ops.up_conv2d(x, first, bias) if up else F.conv2d(x, first, bias, stride, 1)
        y = F.conv2d(normalise(x, 1), second, biases[-1], 1, 1)
    if squeeze_excite:
        reduce, reduce_bias, expand, expand_bias = squeeze_excite
        return lsgm_fast.ops.se_residual(skip, y, reduce, reduce_bias, expand, expand_bias, scale)
    return torch.add(skip, y, alpha=scale)
