"""The end of a residual block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks, _prepare
from lsgm_fast.reference.residual_add import residual_add as reference


@define_op(reference)
def residual_add(
    x: torch.Tensor, h: torch.Tensor, scale: float, *, backend: str | None = None
) -> torch.Tensor:
    """``(x + h) * scale``: the skip path and the residual path of a block, added and brought back to unit variance.

    Args:
        x: (B, C, H, W), the block's input. h: of x's shape, what its layers made of it. scale: 1/sqrt(2) in NCSN++.

    Returns:
        Like x; of the wider dtype where those of x and h differ. Arithmetic in float32 or wider.

    Raises:
        ValueError: shapes do not match.

    Source: Song et al. 2021, Appendix H ("rescale skip connections").
    """
    if x.shape != h.shape:
        _checks.same_shape("residual_add", x=x, h=h)


def _reasons(x: torch.Tensor, h: torch.Tensor, scale: float) -> list[str]:
    why = _prepare.unsupported_dtypes(x=x, h=h) + _prepare.other_device(x.device, h=h)
    if x.dtype != h.dtype:
        why.append(f"x is {x.dtype} and h {h.dtype}: one dtype is supported")
    if isinstance(scale, torch.Tensor):
        why.append("scale is a tensor: expected a number")
    return why


# Elements from which the kernel pays on the CPU: alone, and forward and backward together.
_CPU_BREAK_EVEN = 131072
_CPU_TRAINING_BREAK_EVEN = 2097152


def _not_worth_it(x: torch.Tensor, h: torch.Tensor, scale: float) -> list[str]:
    if x.stride() != h.stride():
        return ["x and h lie in two orders of memory: a copy of one costs what the kernel saves"]
    if torch.is_grad_enabled() and (x.requires_grad or h.requires_grad):
        least, kind = _CPU_TRAINING_BREAK_EVEN, "with gradients"
    else:
        least, kind = _CPU_BREAK_EVEN, "without gradients"
    if x.numel() < least:
        return [f"{kind} it pays from {least} elements, here are {x.numel()}"]
    return []


def _to_kernel(x: torch.Tensor, h: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    memory_format = _prepare.dense_format(x)
    return x.contiguous(memory_format=memory_format), h.contiguous(memory_format=memory_format), scale


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.scale = inputs[2]


def _gradients(
    ctx: Any, call: Callable[..., torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    both = call(grad.contiguous(memory_format=_prepare.dense_format(grad)), ctx.scale)
    for_x, for_h = ctx.needs_input_grad[:2]
    return both if for_x else None, both if for_h else None, None


fused.register(
    residual_add,
    schema="(Tensor x, Tensor h, float scale) -> Tensor",
    fake=lambda x, h, scale: torch.empty_like(x),
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
    auto_reasons={"cpu": _not_worth_it},
    backward=fused.Backward(
        schema="(Tensor grad, float scale) -> Tensor",
        fake=lambda grad, scale: torch.empty_like(grad),
        save=_save,
        gradients=_gradients,
    ),
)
