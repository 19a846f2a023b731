"""Reference implementation of ``score_matching_loss``."""

from __future__ import annotations

from torch import Tensor

from lsgm_fast.reference._broadcast import Scalar, compute_dtype, per_sample


def score_matching_loss(
    pred: Tensor, noise: Tensor, weight_p: Scalar, weight_q: Scalar | None = None, const: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Weighted denoising score matching: the prior's loss and the encoder's cross entropy in one pass.

    ``p_loss_b = sum_chw weight_p (pred - noise)^2`` and, per element,
    ``cross_entropy = weight_q (pred - noise)^2 + const`` (paper, theorem 1 and section 3.3).

    Args:
        pred: (B, C, H, W), noise prediction.
        noise: (B, C, H, W), the noise that was added.
        weight_p: number, 0-d, (1,) or (B,): weight of the prior's objective.
        weight_q: the same for the encoder's objective, or None to leave the cross entropy out.
        const: constant per element, in nats (``SDE.cross_entropy_const``).

    Returns:
        ``(p_loss, cross_entropy)``: (B,) and (B, C, H, W) or None; both float32, or float64 where an input
        is (half-precision sums over a latent would lose the loss), in nats.
    """
    dtype = compute_dtype(pred, noise)
    squared = (pred.to(dtype) - noise.to(dtype)).square()
    weighted = per_sample(weight_p, pred, dtype, "weight_p") * squared
    p_loss = weighted.flatten(1).sum(1)
    if weight_q is None:
        return p_loss, None
    return p_loss, per_sample(weight_q, pred, dtype, "weight_q") * squared + const
