"""Sampling from the forward diffusion."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks
from lsgm_fast.reference.diffuse import diffuse as reference


@define_op(reference)
def diffuse(
    z0: torch.Tensor,
    noise: torch.Tensor,
    m: torch.Tensor | float,
    var: torch.Tensor | float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``z_t = m z_0 + sqrt(var) noise``, a draw from q(z_t | z_0).

    Args:
        z0, noise: (B, C, H, W). m, var: 0-d or (B,), mean coefficient and variance at time t.

    Returns:
        (B, C, H, W), dtype of z0; arithmetic in float32 or wider.

    Raises:
        ValueError: shapes do not match.

    Source: LSGM, section 2 and Appendix B.
    """
    _checks.same_shape("diffuse", z0=z0, noise=noise)
    _checks.per_sample("diffuse", z0, m=m, var=var)
