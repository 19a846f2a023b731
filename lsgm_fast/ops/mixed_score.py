"""The mixed noise prediction of LSGM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks
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


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _reasons(
    eps: torch.Tensor, z: torch.Tensor, mixing_logit: torch.Tensor | None, r: torch.Tensor | float
) -> list[str]:
    why = []
    device = z.device
    if mixing_logit is None:
        why.append("mixing_logit is None: the result is eps, there is nothing to fuse")
    elif mixing_logit.device != device:
        why.append(f"mixing_logit is on {mixing_logit.device}, z on {device}")
    if eps.dtype not in _DTYPES or z.dtype not in _DTYPES:
        why.append(f"dtypes {eps.dtype} and {z.dtype}: float32, float64, bfloat16 and float16 are supported")
    if eps.device != device:
        why.append(f"eps is on {eps.device}, z on {device}")
    if isinstance(r, torch.Tensor) and r.requires_grad and torch.is_grad_enabled():
        why.append("r requires a gradient: it is a function of time, not learned")
    return why


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


def _dense_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last where x is exactly that, else contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _prepare(
    eps: torch.Tensor, z: torch.Tensor, mixing_logit: torch.Tensor, r: torch.Tensor | float
) -> tuple[torch.Tensor, ...]:
    memory_format = _dense_format(z)
    if not isinstance(r, torch.Tensor):
        r = torch.full((), r, dtype=torch.float64, device=z.device)
    elif r.device != z.device or r.dtype not in (torch.float32, torch.float64):
        r = r.to(z.device, torch.float32)
    if mixing_logit.dtype not in (torch.float32, torch.float64):
        mixing_logit = mixing_logit.float()
    return (
        eps.contiguous(memory_format=memory_format),
        z.contiguous(memory_format=memory_format),
        mixing_logit.contiguous(),
        r.contiguous(),
    )


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(
    ctx: Any, call: Callable[..., tuple[torch.Tensor, ...]], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    eps, z, mixing_logit, r = ctx.saved_tensors
    grad = grad.contiguous(memory_format=_dense_format(z))
    return (*call(grad, eps, z, mixing_logit, r), None)


fused.register(
    mixed_score,
    schema="(Tensor eps, Tensor z, Tensor mixing_logit, Tensor r) -> Tensor",
    fake=lambda eps, z, mixing_logit, r: torch.empty_like(z),
    prepare=_prepare,
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
