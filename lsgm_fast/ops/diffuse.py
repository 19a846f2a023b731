"""Sampling from the forward diffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks, _prepare
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
    if noise.shape != z0.shape:  # asked here, as it is nearly never so: the call costs a microsecond
        _checks.same_shape("diffuse", z0=z0, noise=noise)
    _checks.per_sample("diffuse", z0, m=m, var=var)


def _reasons(
    z0: torch.Tensor, noise: torch.Tensor, m: torch.Tensor | float, var: torch.Tensor | float
) -> list[str]:
    why = [] if z0.dim() else ["z0 is 0-d: expected (B, ...)"]
    why += _prepare.unsupported_dtypes(z0=z0, noise=noise)
    why += _prepare.other_device(z0.device, noise=noise)
    return why + _prepare.time_gradient(m=m, var=var)


# Elements from which forward and backward together pay on the CPU; without gradients the kernel always does.
_CPU_TRAINING_BREAK_EVEN = 196608


def _small_training_step(
    z0: torch.Tensor, noise: torch.Tensor, m: torch.Tensor | float, var: torch.Tensor | float
) -> list[str]:
    if (
        z0.numel() < _CPU_TRAINING_BREAK_EVEN
        and torch.is_grad_enabled()
        and (z0.requires_grad or noise.requires_grad)
    ):
        return [f"with gradients it pays from {_CPU_TRAINING_BREAK_EVEN} elements, here are {z0.numel()}"]
    return []


def _to_kernel(
    z0: torch.Tensor, noise: torch.Tensor, m: torch.Tensor | float, var: torch.Tensor | float
) -> tuple[torch.Tensor, ...]:
    memory_format = _prepare.dense_format(z0)
    return (
        z0.contiguous(memory_format=memory_format),
        noise.contiguous(memory_format=memory_format),
        _prepare.scalar(m, z0.device),
        _prepare.scalar(var, z0.device),
    )


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    z0, noise, m, var = inputs
    ctx.save_for_backward(m, var)
    ctx.memory_format = _prepare.dense_format(z0)
    ctx.dtypes = z0.dtype, noise.dtype


def _gradients(
    ctx: Any, call: Callable[..., torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    m, var = ctx.saved_tensors
    grad = grad.contiguous(memory_format=ctx.memory_format)
    z0_dtype, noise_dtype = ctx.dtypes
    of_z0 = call(grad, m, z0_dtype) if ctx.needs_input_grad[0] else None
    of_noise = call(grad, var.double().sqrt(), noise_dtype) if ctx.needs_input_grad[1] else None
    return of_z0, of_noise, None, None


fused.register(
    diffuse,
    schema="(Tensor z0, Tensor noise, Tensor m, Tensor var) -> Tensor",
    fake=lambda z0, noise, m, var: torch.empty_like(z0),
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30, "triton": 20},
    auto_reasons={"cpu": _small_training_step},
    backward=fused.Backward(
        schema="(Tensor grad, Tensor factor, ScalarType dtype) -> Tensor",
        fake=lambda grad, factor, dtype: torch.empty_like(grad, dtype=dtype),
        save=_save,
        gradients=_gradients,
    ),
)
