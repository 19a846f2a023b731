"""5x5 depthwise convolution with a per-channel affine and Swish in front and behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.depthwise_bn_swish import depthwise_bn_swish as reference


@define_op(reference)
def depthwise_bn_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int = 1,
    pre_scale: torch.Tensor | None = None,
    pre_shift: torch.Tensor | None = None,
    post_scale: torch.Tensor | None = None,
    post_shift: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``y = post( depthwise_conv( pre(x) ) )`` with ``pre(x) = swish(x * pre_scale + pre_shift)``, ``post`` alike.

    A BatchNorm with running statistics is such an affine: ``scale = weight / sqrt(var + eps)``,
    ``shift = bias - mean * scale``. Where a pair is None, that side is the identity. The zero padding applies to the
    activated input, as in a sequence of layers.

    Args:
        x: (N, C, H, W). weight: (C, 1, K, K), K odd (5 in NVAE), "same" padding K // 2. stride: 1 or 2.
        pre_scale, pre_shift, post_scale, post_shift: (C,) or None, given in pairs.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)), dtype of x.

    Raises:
        ValueError: shapes do not match, the stride is not 1 or 2, or only one of a pair is given.

    Source: Vahdat & Kautz 2020 (NVAE), Figure 3a (residual cell of the generative model).
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[:2] != (x.shape[1], 1):
        raise ValueError(
            "depthwise_bn_swish expects x (N, C, H, W) and weight (C, 1, K, K), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    if (pre_scale is None) != (pre_shift is None) or (post_scale is None) != (post_shift is None):
        raise ValueError("scale and shift must be given together")


SIZE = 5
"""Kernel size of the fused kernels."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast would convert a convolution's inputs to, or None."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def _wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _reasons(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int = 1,
    pre_scale: torch.Tensor | None = None,
    pre_shift: torch.Tensor | None = None,
    post_scale: torch.Tensor | None = None,
    post_shift: torch.Tensor | None = None,
) -> list[str]:
    affines = {
        "pre_scale": pre_scale,
        "pre_shift": pre_shift,
        "post_scale": post_scale,
        "post_shift": post_shift,
    }
    given = {"weight": weight, **{name: t for name, t in affines.items() if t is not None}}
    why = []
    if weight.shape[2:] != (SIZE, SIZE):
        why.append(f"a kernel of {weight.shape[2]}x{weight.shape[3]}: {SIZE}x{SIZE} is supported")
    why += _prepare.other_device(x.device, **given)
    cast = _autocast_dtype(x)
    if cast is None:
        found = {"x": x, **given}
        if x.dtype not in _DTYPES or any(t.dtype != x.dtype for t in given.values()):
            dtypes = ", ".join(f"{name} {t.dtype}" for name, t in found.items())
            why.append(f"dtypes {dtypes}: one of float32, bfloat16 and float16 for all of them is supported")
    elif len(given) > 1:
        why.append("an affine under autocast, where the reference leaves it in float32")
    elif any(t.dtype not in _DTYPES for t in (x, weight)):
        why.append(f"dtypes x {x.dtype}, weight {weight.dtype}: float32, bfloat16 and float16 are supported")
    for name, t in affines.items():
        if t is not None and t.shape != (x.shape[1],):
            why.append(f"{name} has shape {tuple(t.shape)}: expected ({x.shape[1]},)")
    return why


def _to_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int = 1,
    pre_scale: torch.Tensor | None = None,
    pre_shift: torch.Tensor | None = None,
    post_scale: torch.Tensor | None = None,
    post_shift: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    cast = _autocast_dtype(x)
    if cast is not None:
        x, weight = x.to(cast), weight.to(cast)
    affines = (pre_scale, pre_shift, post_scale, post_shift)
    return (
        x.contiguous(memory_format=_prepare.dense_format(x)),
        weight.contiguous(),
        stride,
        *(None if t is None else t.contiguous() for t in affines),
    )


def _fake(x: torch.Tensor, weight: torch.Tensor, stride: int, *affines: torch.Tensor | None) -> torch.Tensor:
    if stride == 1:
        return torch.empty_like(x)
    samples, channels, height, width = x.shape
    shape = (samples, channels, (height + stride - 1) // stride, (width + stride - 1) // stride)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_prepare.dense_format(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.stride, *affines = inputs
    ctx.save_for_backward(x, weight, *affines)


def _affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    channel = (1, -1, 1, 1)
    return torch.addcmul(shift.float().view(channel), x.float(), scale.float().view(channel))


def _affine_gradients(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, scale and shift through ``swish(x * scale + shift)``, in float32."""
    grad_u = torch.ops.aten.silu_backward(grad.float(), _affine(x, scale, shift))
    axes = (0, 2, 3)
    return grad_u * scale.float().view(1, -1, 1, 1), (grad_u * x.float()).sum(axes), grad_u.sum(axes)


def _gradients(
    ctx: Any, call: Callable[..., tuple[torch.Tensor, torch.Tensor]], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    x, weight, pre_scale, pre_shift, post_scale, post_shift = ctx.saved_tensors
    grads: list[torch.Tensor | None] = [None] * 4
    convolved = x
    if pre_scale is not None:
        convolved = F.silu(_affine(x, pre_scale, pre_shift)).to(x.dtype)
    if post_scale is not None:
        y = F.conv2d(convolved, weight, None, ctx.stride, SIZE // 2, 1, weight.shape[0])
        grad, *grads[2:] = _affine_gradients(grad, y, post_scale, post_shift)
    memory_format = _prepare.dense_format(x)
    grad_x, grad_weight = call(
        grad.to(x.dtype).contiguous(memory_format=memory_format),
        convolved.contiguous(memory_format=memory_format),
        weight,
        ctx.stride,
    )
    if pre_scale is not None:
        grad_x, *grads[:2] = _affine_gradients(grad_x, x, pre_scale, pre_shift)
    return (
        grad_x.to(x.dtype),
        grad_weight,
        None,
        *(None if g is None else g.to(x.dtype) for g in grads),
    )


def _prefers_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int = 1,
    pre_scale: torch.Tensor | None = None,
    pre_shift: torch.Tensor | None = None,
    post_scale: torch.Tensor | None = None,
    post_shift: torch.Tensor | None = None,
) -> list[str]:
    affines = (pre_scale, pre_shift, post_scale, post_shift)
    if all(t is None for t in affines):
        if _wants_gradient(x, weight):
            return []
        return ["the convolution alone, without a gradient: PyTorch's own is about as fast or faster"]
    if _wants_gradient(x, weight, *affines):
        return ["a gradient of the affine is wanted: the reference keeps what the kernel would compute again"]
    return []


fused.register(
    depthwise_bn_swish,
    schema=(
        "(Tensor x, Tensor weight, int stride, Tensor? pre_scale, Tensor? pre_shift, Tensor? post_scale, "
        "Tensor? post_shift) -> Tensor"
    ),
    fake=_fake,
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
    auto_reasons={"cpu": _prefers_reference},
    backward=fused.Backward(
        schema="(Tensor grad, Tensor x, Tensor weight, int stride) -> (Tensor, Tensor)",
        fake=lambda grad, x, weight, stride: (torch.empty_like(x), torch.empty_like(weight)),
        save=_save,
        gradients=_gradients,
    ),
)
