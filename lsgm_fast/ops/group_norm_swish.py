"""GroupNorm followed by Swish: the normalisation of every NCSN++ block."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.group_norm_swish import group_norm_swish as reference


@define_op(reference)
def group_norm_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-6,
    channel_bias: torch.Tensor | None = None,
    swish: bool = True,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """GroupNorm of ``x + channel_bias`` with affine, then Swish.

    ``v = x + channel_bias``; ``u = (v - mean_g) / sqrt(var_g + eps) * weight + bias``; ``y = u * sigmoid(u)``
    (``y = u`` without ``swish``). Mean and biased variance over the C/groups channels and all pixels of a sample.

    Args:
        x: (N, C, H, W). weight, bias: (C,). groups: divides C. eps: 1e-6 in NCSN++.
        channel_bias: (N, C) projected time embedding, or None.

    Returns:
        (N, C, H, W); statistics are float32 or wider.

    Raises:
        ValueError: shapes do not match or groups does not divide C.

    Source: Song et al. 2021 (NCSN++), Appendix H; LSGM, Appendix G.
    """
    if x.dim() != 4 or x.shape[1] % groups != 0 or weight.shape != (x.shape[1],):
        raise ValueError(
            f"group_norm_swish expects x (N, C, H, W), weight (C,) and groups dividing C, "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {groups}"
        )
    if channel_bias is not None and channel_bias.shape != x.shape[:2]:
        raise ValueError(f"channel_bias must be {tuple(x.shape[:2])} (N, C), got {tuple(channel_bias.shape)}")
