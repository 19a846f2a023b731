"""The mixed noise prediction of LSGM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks, _prepare
from lsgm_fast.reference.mixed_score import mixed_score as reference


@define_op(reference)
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
        ValueError: shapes do not match. TypeError: z is not floating-point.

    Source: LSGM, section 3.2 ("Mixing normal and neural score functions"), equation 8.
    """
    # Called at every evaluation of a sampler: what is nearly always true is asked first.
    if eps.shape != z.shape:
        _checks.same_shape("mixed_score", eps=eps, z=z)
    if not (z.is_floating_point() or z.is_complex()):
        raise TypeError(f"mixed_score expects a floating-point z, got {z.dtype}")
    _checks.mixing_logit("mixed_score", z, mixing_logit)
    if isinstance(r, torch.Tensor) and r.dim() > 0:
        _checks.per_sample("mixed_score", z, r=r)


def _reasons(
    eps: torch.Tensor, z: torch.Tensor, mixing_logit: torch.Tensor | None, r: torch.Tensor | float
) -> list[str]:
    why = []
    if mixing_logit is None:
        why.append("mixing_logit is None: the result is eps, there is nothing to fuse")
    why += _prepare.unsupported_dtypes(eps=eps, z=z)
    why += _prepare.other_device(z.device, eps=eps, mixing_logit=mixing_logit)
    return why + _prepare.time_gradient(r=r)


# Elements from which forward and backward together pay on the CPU; without gradients the kernel always does.
_CPU_TRAINING_BREAK_EVEN = 65536


def _small_training_step(
    eps: torch.Tensor, z: torch.Tensor, mixing_logit: torch.Tensor | None, r: torch.Tensor | float
) -> list[str]:
    if (
        z.numel() < _CPU_TRAINING_BREAK_EVEN
        and torch.is_grad_enabled()
        and (
            eps.requires_grad or z.requires_grad or (mixing_logit is not None and mixing_logit.requires_grad)
        )
    ):
        return [f"with gradients it pays from {_CPU_TRAINING_BREAK_EVEN} elements, here are {z.numel()}"]
    return []


def _to_kernel(
    eps: torch.Tensor, z: torch.Tensor, mixing_logit: torch.Tensor, r: torch.Tensor | float
) -> tuple[torch.Tensor, ...]:
    memory_format = _prepare.dense_format(z)
    return (
        eps.contiguous(memory_format=memory_format),
        z.contiguous(memory_format=memory_format),
        _prepare.logit(mixing_logit),
        _prepare.scalar(r, z.device),
    )


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(
    ctx: Any, call: Callable[..., tuple[torch.Tensor, ...]], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    eps, z, mixing_logit, r = ctx.saved_tensors
    grad = grad.contiguous(memory_format=_prepare.dense_format(z))
    return (*call(grad, eps, z, mixing_logit, r), None)


fused.register(
    mixed_score,
    schema="(Tensor eps, Tensor z, Tensor mixing_logit, Tensor r) -> Tensor",
    fake=lambda eps, z, mixing_logit, r: torch.empty_like(z),
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
    auto_reasons={"cpu": _small_training_step},
    backward=fused.Backward(
        schema="(Tensor grad, Tensor eps, Tensor z, Tensor mixing_logit, Tensor r) -> (Tensor, Tensor, Tensor)",
        fake=lambda grad, eps, z, mixing_logit, r: (
            torch.empty_like(eps),
            torch.empty_like(z),
            torch.empty_like(mixing_logit),
        ),
        save=_save,
        gradients=_gradients,
    ),
)
