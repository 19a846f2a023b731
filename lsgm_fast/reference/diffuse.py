"""Reference implementation of ``diffuse``."""

from __future__ import annotations

import torch
from torch import Tensor

from lsgm_fast.reference._broadcast import Scalar, compute_dtype, per_sample


def diffuse(z0: Tensor, noise: Tensor, m: Scalar, var: Scalar) -> Tensor:
    """A draw from the diffusion's marginal, ``m z0 + sqrt(var) noise`` (paper, section 2).

    Args:
        z0: (B, C, H, W), the clean latent.
        noise: (B, C, H, W), standard-normal draws.
        m, var: number, 0-d or (B,): mean coefficient and variance at each sample's time.

    Returns:
        Tensor of z0's shape and dtype, evaluated in at least float32.
    """
    dtype = compute_dtype(z0, noise)
    m = per_sample(m, z0, dtype, "m")
    var = per_sample(var, z0, dtype, "var")
    std = torch.sqrt(var) if isinstance(var, Tensor) else var**0.5
    return (m * z0.to(dtype) + std * noise.to(dtype)).to(z0.dtype)
