"""Reference implementation of ``mixed_score``."""

from __future__ import annotations

import torch
from torch import Tensor

from lsgm_fast.reference._broadcast import Scalar, compute_dtype, per_sample


def mixed_score(eps: Tensor, z: Tensor, mixing_logit: Tensor | None, r: Scalar) -> Tensor:
    """Mixed noise prediction ``(1 - a) r z + a eps`` with ``a = sigmoid(mixing_logit)``.

    The first term is the optimal noise prediction for a standard-normal data distribution, so the network
    models only what departs from it (paper, section 3.2).

    Args:
        eps: (B, C, H, W), the network's noise prediction.
        z: (B, C, H, W), the noisy latent.
        mixing_logit: broadcastable to (1, C, 1, 1), or None for an unmixed prediction (``a = 1``).
        r: number, 0-d or (B,): mixing coefficient, ``sqrt(var) / S^2`` (``sqrt(var)`` for the VPSDE).

    Returns:
        Tensor of z's shape and dtype, evaluated in at least float32.
    """
    dtype = compute_dtype(z, eps)
    network = eps.to(dtype)
    if mixing_logit is None:
        return network.to(z.dtype)
    a = torch.sigmoid(mixing_logit.to(dtype))
    component = per_sample(r, z, dtype, "r") * z.to(dtype)
    return ((1 - a) * component + a * network).to(z.dtype)
