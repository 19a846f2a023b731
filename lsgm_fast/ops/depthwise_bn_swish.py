"""5x5 depthwise convolution with a per-channel affine and Swish in front and behind."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.depthwise_bn_swish import depthwise_bn_swish as reference


@define_op(reference)
def depthwise_bn_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int = 1,
    pre_scale: torch.Tensor | None = None,
    pre_shift: torch.Tensor | None = None,
    post_scale: torch.Tensor | None = None,
    post_shift: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``y = post( depthwise_conv( pre(x) ) )`` with ``pre(x) = swish(x * pre_scale + pre_shift)``, ``post`` alike.

    A BatchNorm with running statistics is such an affine: ``scale = weight / sqrt(var + eps)``,
    ``shift = bias - mean * scale``. Where a pair is None, that side is the identity. The zero padding applies to the
    activated input, as in a sequence of layers.

    Args:
        x: (N, C, H, W). weight: (C, 1, K, K), K odd (5 in NVAE), "same" padding K // 2. stride: 1 or 2.
        pre_scale, pre_shift, post_scale, post_shift: (C,) or None, given in pairs.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)), dtype of x.

    Raises:
        ValueError: shapes do not match, the stride is not 1 or 2, or only one of a pair is given.

    Source: Vahdat & Kautz 2020 (NVAE), Figure 3a (residual cell of the generative model).
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[:2] != (x.shape[1], 1):
        raise ValueError(
            "depthwise_bn_swish expects x (N, C, H, W) and weight (C, 1, K, K), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    if (pre_scale is None) != (pre_shift is None) or (post_scale is None) != (post_shift is None):
        raise ValueError("scale and shift must be given together")
