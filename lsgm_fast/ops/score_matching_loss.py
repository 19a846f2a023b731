"""Weighted denoising score matching: the prior's objective and the cross entropy in one pass."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks
from lsgm_fast.reference.score_matching_loss import score_matching_loss as reference


@define_op(reference)
def score_matching_loss(
    pred: torch.Tensor,
    noise: torch.Tensor,
    weight_p: torch.Tensor | float,
    weight_q: torch.Tensor | float | None = None,
    const: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weighted squared error of the noise prediction, summed per sample and kept per element.

    ``p_loss_b = sum_chw weight_p (pred - noise)^2``; ``cross_entropy = weight_q (pred - noise)^2 + const`` elementwise.

    Args:
        pred, noise: (B, C, H, W). weight_p, weight_q: 0-d, (1,) or (B,); weight_q None leaves the second result out.
        const: the cross entropy's constant per element, ``(1 + ln(2 pi var(time_eps))) / 2`` (nats).

    Returns:
        ``(p_loss (B,), cross_entropy (B, C, H, W) or None)``, float32 or wider.

    Raises:
        ValueError: shapes do not match.

    Source: LSGM, Theorem 1 and equation 9; Appendix G.6.
    """
    _checks.same_shape("score_matching_loss", pred=pred, noise=noise)
    _checks.per_sample("score_matching_loss", pred, weight_p=weight_p)
    if weight_q is not None:
        _checks.per_sample("score_matching_loss", pred, weight_q=weight_q)
