"""The mixed noise prediction of LSGM."""

from __future__ import annotations

import torch

from lsgm_fast import reference
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks


@define_op(reference.mixed_score)
def mixed_score(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    r: torch.Tensor | float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``(1 - a) r z + a eps`` with ``a = sigmoid(mixing_logit)`` per channel.

    ``r z`` is the noise prediction that is optimal for a standard-normal prior; the network corrects it. ``a = 1``
    where ``mixing_logit`` is None.

    Args:
        eps: (B, C, H, W) network output. z: (B, C, H, W) noisy latent. mixing_logit: (1, C, 1, 1) or None.
        r: 0-d or (B,), ``sqrt(var) / S^2`` of the SDE.

    Returns:
        (B, C, H, W), dtype of z; arithmetic in float32 or wider.

    Raises:
        ValueError: shapes do not match.

    Source: LSGM, section 3.2 ("Mixing normal and neural score functions"), equation 8.
    """
    _checks.same_shape("mixed_score", eps=eps, z=z)
    _checks.mixing_logit("mixed_score", z, mixing_logit)
    _checks.per_sample("mixed_score", z, r=r)
