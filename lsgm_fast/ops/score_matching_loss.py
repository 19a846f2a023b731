"""Weighted denoising score matching: the prior's objective and the cross entropy in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks, _prepare
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
    if noise.shape != pred.shape:  # asked here, as it is nearly never so: the call costs a microsecond
        _checks.same_shape("score_matching_loss", pred=pred, noise=noise)
    if weight_q is None:
        _checks.per_sample("score_matching_loss", pred, weight_p=weight_p)
    else:
        _checks.per_sample("score_matching_loss", pred, weight_p=weight_p, weight_q=weight_q)


def _reasons(
    pred: torch.Tensor,
    noise: torch.Tensor,
    weight_p: torch.Tensor | float,
    weight_q: torch.Tensor | float | None = None,
    const: float = 0.0,
) -> list[str]:
    why = []
    if pred.dim() < 2:
        why.append(f"pred has shape {tuple(pred.shape)}: expected (B, C, ...)")
    if isinstance(const, torch.Tensor):
        why.append("const is a tensor: expected a number")
    why += _prepare.unsupported_dtypes(pred=pred, noise=noise)
    why += _prepare.other_device(pred.device, noise=noise)
    return why + _prepare.time_gradient(weight_p=weight_p, weight_q=weight_q)


# Elements from which the kernel pays on the CPU: forward and backward together, and the forward sum alone. With the
# cross entropy and without gradients it always does.
_CPU_TRAINING_BREAK_EVEN = 65536
_CPU_SUM_BREAK_EVEN = 16384


def _small(
    pred: torch.Tensor,
    noise: torch.Tensor,
    weight_p: torch.Tensor | float,
    weight_q: torch.Tensor | float | None = None,
    const: float = 0.0,
) -> list[str]:
    if torch.is_grad_enabled() and (pred.requires_grad or noise.requires_grad):
        least, kind = _CPU_TRAINING_BREAK_EVEN, "with gradients"
    elif weight_q is None:
        least, kind = _CPU_SUM_BREAK_EVEN, "without a cross entropy"
    else:
        return []
    if pred.numel() < least:
        return [f"{kind} it pays from {least} elements, here are {pred.numel()}"]
    return []


def _to_kernel(
    pred: torch.Tensor,
    noise: torch.Tensor,
    weight_p: torch.Tensor | float,
    weight_q: torch.Tensor | float | None = None,
    const: float = 0.0,
) -> tuple[Any, ...]:
    memory_format = _prepare.dense_format(pred)
    return (
        pred.contiguous(memory_format=memory_format),
        noise.contiguous(memory_format=memory_format),
        _prepare.scalar(weight_p, pred.device),
        None if weight_q is None else _prepare.scalar(weight_q, pred.device),
        const,
    )


def _arithmetic(pred: torch.Tensor, noise: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (pred.dtype, noise.dtype) else torch.float32


def _fake(
    pred: torch.Tensor,
    noise: torch.Tensor,
    weight_p: torch.Tensor,
    weight_q: torch.Tensor | None,
    const: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _arithmetic(pred, noise)
    p_loss = pred.new_empty(pred.shape[0], dtype=dtype)
    if weight_q is None:
        return p_loss, pred.new_empty(0, dtype=dtype)
    return p_loss, torch.empty_like(pred, dtype=dtype)


def _finish(results: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    # A schema has no optional results: (0,), which is no latent's shape, stands for none.
    p_loss, cross_entropy = results
    return p_loss, cross_entropy if cross_entropy.dim() > 1 else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    # Training uses one of the results: the other's gradient is absent, not a tensor of zeros to be read.
    ctx.set_materialize_grads(False)


def _constant_per_sample(grad: torch.Tensor) -> bool:
    """Whether each sample is one number spread out, as from a sum over it: not worth writing out to be read."""
    return all(
        stride == 0 for size, stride in zip(grad.shape[1:], grad.stride()[1:], strict=True) if size > 1
    )


def _gradients(
    ctx: Any,
    call: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    grad_p: torch.Tensor | None,
    grad_ce: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    pred, noise, weight_p, weight_q = ctx.saved_tensors
    for_pred, for_noise = ctx.needs_input_grad[:2]
    if weight_q is None:
        grad_ce = None
    if grad_p is None and grad_ce is None:
        return None, None, None, None, None
    if grad_ce is not None:
        if grad_ce.numel() and _constant_per_sample(grad_ce):
            grad_ce = grad_ce.flatten(1).select(1, 0)
        else:
            grad_ce = grad_ce.contiguous(memory_format=_prepare.dense_format(pred))
    of_pred, of_noise = call(grad_p, grad_ce, pred, noise, weight_p, weight_q, for_pred, for_noise)
    return of_pred if for_pred else None, of_noise if for_noise else None, None, None, None


def _fake_backward(
    grad_p: torch.Tensor | None,
    grad_ce: torch.Tensor | None,
    pred: torch.Tensor,
    noise: torch.Tensor,
    weight_p: torch.Tensor,
    weight_q: torch.Tensor | None,
    for_pred: bool,
    for_noise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(pred) if for_pred else pred.new_empty(0),
        torch.empty_like(noise) if for_noise else noise.new_empty(0),
    )


fused.register(
    score_matching_loss,
    schema="(Tensor pred, Tensor noise, Tensor weight_p, Tensor? weight_q, float const) -> (Tensor, Tensor)",
    fake=_fake,
    prepare=_to_kernel,
    finish=_finish,
    reasons=_reasons,
    priorities={"cpu": 30, "triton": 20},
    auto_reasons={"cpu": _small},
    backward=fused.Backward(
        schema="(Tensor? grad_p, Tensor? grad_ce, Tensor pred, Tensor noise, Tensor weight_p, Tensor? weight_q, "
        "bool for_pred, bool for_noise) -> (Tensor, Tensor)",
        fake=_fake_backward,
        save=_save,
        gradients=_gradients,
    ),
)
