"""Reference weight normalisation of a list of convolution weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def weight_norm(
    weights: Sequence[torch.Tensor], log_norms: Sequence[torch.Tensor], eps: float = 1e-5
) -> list[torch.Tensor]:
    return [
        w * (torch.exp(g) / (torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True) + eps))
        for w, g in zip(weights, log_norms, strict=True)
    ]
