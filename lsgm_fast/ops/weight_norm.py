"""Weight normalisation of all convolutions of a model at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.weight_norm import weight_norm as reference


@define_op(reference)
def weight_norm(
    weights: Sequence[torch.Tensor],
    log_norms: Sequence[torch.Tensor],
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """``W_k = exp(g_k) * V_k / (||V_k||_2 + eps)`` per output filter k, for every pair of the two lists.

    Args:
        weights: V, each (C_out, C_in, K, K). log_norms: g, each (C_out, 1, 1, 1).
        eps: added to the norm (1e-5 in NVAE).

    Returns:
        The normalised weights, in order.

    Raises:
        ValueError: the lists differ in length or a pair in its number of filters.

    Source: Vahdat & Kautz 2020 (NVAE), section 3.3; Salimans & Kingma 2016.
    """
    if len(weights) != len(log_norms):
        raise ValueError(f"weight_norm got {len(weights)} weights and {len(log_norms)} log norms")
    for w, g in zip(weights, log_norms, strict=True):
        if w.dim() != 4 or g.shape != (w.shape[0], 1, 1, 1):
            raise ValueError(
                "weight_norm expects (C_out, C_in, K, K) and (C_out, 1, 1, 1), "
                f"got {tuple(w.shape)} and {tuple(g.shape)}"
            )
