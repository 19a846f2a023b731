"""The drift of the probability-flow ODE with the mixed score, one form for every SDE."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks
from lsgm_fast.reference.score_drift import score_drift as reference


@define_op(reference)
def score_drift(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``dz/dt = p z + a q (eps - r z)`` with ``a = sigmoid(mixing_logit)`` per channel (1 where None).

    Equals ``f z + g^2 / (2 sqrt(var)) * mixed_score`` with ``p = f + g^2 / (2 S^2)``, ``q = g^2 / (2 sqrt(var))``,
    ``r = sqrt(var) / S^2``, without the cancellation between the two terms.

    Args:
        eps: (B, C, H, W) network output, any floating dtype. z: (B, C, H, W) state.
        mixing_logit: (1, C, 1, 1) or None. p, q, r: 0-d or (B,), from :meth:`lsgm_fast.sde.SDE.drift_coefficients`.

    Returns:
        (B, C, H, W), dtype of z; arithmetic in float32 or wider.

    Raises:
        ValueError: shapes do not match.

    Source: LSGM, equations 2 and 8; Song et al. 2021, equation 13.
    """
    _checks.same_shape("score_drift", eps=eps, z=z)
    _checks.mixing_logit("score_drift", z, mixing_logit)
    _checks.per_sample("score_drift", z, p=p, q=q, r=r)
