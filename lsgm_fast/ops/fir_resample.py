"""Up- and downsampling by two with the [1, 3, 3, 1] filter of NCSN++, or plain nearest / mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.errors import unknown_name
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.fir_resample import fir_resample as reference


@define_op(reference)
def fir_resample(
    x: torch.Tensor,
    direction: str,
    fir: bool = True,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Resample by two in height and width.

    With ``fir``: ``down`` convolves with ``outer(k, k) / 64``, k = [1, 3, 3, 1], zero padding 1, stride 2; ``up``
    inserts zeros and convolves with ``4 * outer(k, k) / 64``. Per axis: down
    ``y[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8``; up ``y[2i] = (x[i-1] + 3 x[i]) / 4``,
    ``y[2i+1] = (3 x[i] + x[i+1]) / 4``. Without: nearest neighbour / 2x2 mean.

    With ``factor`` and ``shift`` every element becomes ``u = x * factor + shift``, then ``u * sigmoid(u)`` first: what
    a GroupNorm with Swish does once its statistics are known. The zeros beside the image are not activated.

    Args:
        x: (N, C, H, W), any floating dtype, H and W even for ``"down"``; arithmetic is float32 or wider.
        direction: ``"up"`` or ``"down"``.
        fir: with the filter.
        factor, shift: (N, C), float32 or float64; both or none.

    Returns:
        (N, C, 2H, 2W) or (N, C, H/2, W/2), dtype of x, under autocast too.

    Raises:
        ValueError: unknown direction, odd size on the way down, or factor and shift are not a pair of that shape.

    Source: Song et al. 2021, Appendix H.1 (anti-aliased resampling, Zhang 2019).
    """
    if direction not in ("up", "down"):
        raise unknown_name("resampling direction", direction, ("up", "down"))
    if x.dim() != 4 or (direction == "down" and (x.shape[2] % 2 or x.shape[3] % 2)):
        raise ValueError(f"fir_resample expects (N, C, H, W), even H and W to go down, got {tuple(x.shape)}")
    if (factor is None) != (shift is None):
        raise ValueError("factor and shift must be given together")
    for name, t in (("factor", factor), ("shift", shift)):
        if t is not None and (t.shape != x.shape[:2] or t.dtype not in (torch.float32, torch.float64)):
            raise ValueError(
                f"{name} is {t.dtype} of shape {tuple(t.shape)}: expected float32 or float64 and {tuple(x.shape[:2])}"
            )


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reasons(
    x: torch.Tensor,
    direction: str,
    fir: bool = True,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> list[str]:
    why = []
    if x.dtype not in _DTYPES:
        why.append(f"x has dtype {x.dtype}: float32, bfloat16 and float16 are supported")
    if factor is None or shift is None:
        return why
    for name, t in (("factor", factor), ("shift", shift)):
        if t.dtype != torch.float32:
            why.append(f"{name} has dtype {t.dtype}: float32 is supported")
    why += _prepare.other_device(x.device, factor=factor, shift=shift)
    if torch.is_grad_enabled() and (x.requires_grad or factor.requires_grad or shift.requires_grad):
        why.append("a gradient through factor and shift is wanted: there is no backward of the activation")
    return why


# Elements of the larger image from which the kernel pays on the CPU without the filter, in the contiguous format.
_CPU_PLAIN_BREAK_EVEN = 16384


def _slower(
    x: torch.Tensor,
    direction: str,
    fir: bool = True,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> list[str]:
    if fir or factor is not None:
        return []
    if _prepare.dense_format(x) == torch.channels_last:
        return ["without the filter, in channels_last: PyTorch's own is about as fast or faster"]
    elements = x.numel() * (4 if direction == "up" else 1)
    if elements < _CPU_PLAIN_BREAK_EVEN:
        return [
            f"without the filter it pays from {_CPU_PLAIN_BREAK_EVEN} elements of the larger image, here are {elements}"
        ]
    return []


def _to_kernel(
    x: torch.Tensor,
    direction: str,
    fir: bool = True,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    return (
        x.contiguous(memory_format=_prepare.dense_format(x)),
        None if factor is None else factor.contiguous(),
        None if shift is None else shift.contiguous(),
        direction == "up",
        fir,
    )


def _resized(x: torch.Tensor, up: bool) -> torch.Tensor:
    samples, channels, height, width = x.shape
    size = (2 * height, 2 * width) if up else (height // 2, width // 2)
    return torch.empty(
        (samples, channels, *size), dtype=x.dtype, device=x.device, memory_format=_prepare.dense_format(x)
    )


def _fake(
    x: torch.Tensor, factor: torch.Tensor | None, shift: torch.Tensor | None, up: bool, fir: bool
) -> torch.Tensor:
    return _resized(x, up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, factor, _, ctx.up, ctx.fir = inputs
    if factor is not None:
        raise RuntimeError("fir_resample with factor and shift has no gradient: use the reference")
    ctx.memory_format = _prepare.dense_format(x)


def _gradients(
    ctx: Any, call: Callable[..., torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grad_x = call(grad.contiguous(memory_format=ctx.memory_format), ctx.up, ctx.fir)
    return grad_x, None, None, None, None


fused.register(
    fir_resample,
    schema="(Tensor x, Tensor? factor, Tensor? shift, bool up, bool fir) -> Tensor",
    fake=_fake,
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
    auto_reasons={"cpu": _slower},
    # The transpose of one way is a multiple of the other, so backward only reads the gradient.
    backward=fused.Backward(
        schema="(Tensor grad, bool up, bool fir) -> Tensor",
        fake=lambda grad, up, fir: _resized(grad, not up),
        save=_save,
        gradients=_gradients,
    ),
)
