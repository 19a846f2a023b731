"""BatchNorm followed by Swish: the normalisation of every NVAE cell."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.bn_swish import bn_swish as reference


@define_op(reference)
def bn_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    batch_stats: bool,
    eps: float = 1e-5,
    swish: bool = True,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BatchNorm over (N, H, W), then Swish.

    ``u = (x - mean) / sqrt(var + eps) * weight + bias``; ``y = u * sigmoid(u)``, or ``y = u`` without ``swish``.

    Args:
        x: (N, C, H, W), any floating dtype; statistics and arithmetic are float32 or wider.
        weight, bias, running_mean, running_var: (C,).
        batch_stats: normalise with the statistics of ``x`` (biased variance) instead of the running ones.
        eps: added to the variance (1e-5 in NVAE).
        swish: apply the activation.

    Returns:
        ``(y, mean, var)``: y like x; mean and *unbiased* variance of the batch, for the caller to update running
        statistics with (this function changes nothing), or the running statistics themselves.

    Raises:
        ValueError: x is not 4-D or the parameters do not have C entries.

    Source: Vahdat & Kautz 2020 (NVAE), section 3.2; used by LSGM, Appendix G.
    """
    if x.dim() != 4 or weight.shape != (x.shape[1],):
        raise ValueError(
            f"bn_swish expects x (N, C, H, W) and weight (C,), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
