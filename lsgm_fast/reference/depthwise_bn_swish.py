"""Reference depthwise 5x5 convolution with affine and Swish around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def depthwise_bn_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int = 1,
    pre_scale: torch.Tensor | None = None,
    pre_shift: torch.Tensor | None = None,
    post_scale: torch.Tensor | None = None,
    post_shift: torch.Tensor | None = None,
) -> torch.Tensor:
    if pre_scale is not None and pre_shift is not None:
        x = F.silu(torch.addcmul(pre_shift.view(1, -1, 1, 1), x, pre_scale.view(1, -1, 1, 1)))
    y = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, weight.shape[0])
    if post_scale is not None and post_shift is not None:
        y = F.silu(torch.addcmul(post_shift.view(1, -1, 1, 1), y, post_scale.view(1, -1, 1, 1)))
    return y
