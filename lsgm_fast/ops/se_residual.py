"""Squeeze-and-excitation gate and the scaled residual add that ends every NVAE cell."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.se_residual import se_residual as reference


@define_op(reference)
def se_residual(
    skip: torch.Tensor,
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    scale: float = 0.1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``skip + scale * gate * x``, ``gate = sigmoid(W2 relu(W1 mean_hw(x) + b1) + b2)`` per sample and channel.

    Args:
        skip, x: (N, C, H, W). reduce_weight: (R, C), reduce_bias: (R,). expand_weight: (C, R), expand_bias: (C,).
        scale: residual scaling (0.1 in NVAE).

    Returns:
        (N, C, H, W). The gate is computed in float32 or wider.

    Raises:
        ValueError: shapes do not match.

    Source: Vahdat & Kautz 2020 (NVAE), section 3.2; Hu et al. 2018.
    """
    if skip.shape != x.shape or x.dim() != 4:
        raise ValueError(
            f"se_residual expects skip and x of one shape (N, C, H, W), got {tuple(skip.shape)} and {tuple(x.shape)}"
        )
    hidden, channels = reduce_weight.shape
    if channels != x.shape[1] or expand_weight.shape != (channels, hidden):
        raise ValueError(
            f"se_residual expects reduce_weight (R, {x.shape[1]}) and expand_weight ({x.shape[1]}, R), "
            f"got {tuple(reduce_weight.shape)} and {tuple(expand_weight.shape)}"
        )
