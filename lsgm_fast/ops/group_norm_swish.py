"""GroupNorm followed by Swish: the normalisation of every NCSN++ block, and the residual sum in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.ops._checks import same_shape
from lsgm_fast.reference.group_norm_swish import group_norm_swish as reference
from lsgm_fast.reference.group_norm_swish import group_norm_swish_affine as reference_affine
from lsgm_fast.reference.group_norm_swish import group_norm_swish_residual as reference_residual


def _check(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> None:
    if (
        x.dim() != 4
        or groups < 1
        or x.shape[1] % groups != 0
        or not weight.shape == bias.shape == x.shape[1:2]
    ):
        raise ValueError(
            f"{name} expects x (N, C, H, W), weight and bias (C,), and groups dividing C, "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)} and {groups}"
        )


@define_op(reference)
def group_norm_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-6,
    channel_bias: torch.Tensor | None = None,
    swish: bool = True,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """GroupNorm of ``x + channel_bias`` with affine, then Swish.

    ``v = x + channel_bias``; ``u = (v - mean_g) / sqrt(var_g + eps) * weight + bias``; ``y = u * sigmoid(u)``
    (``y = u`` without ``swish``). Mean and biased variance over the C/groups channels and all pixels of a sample.

    Args:
        x: (N, C, H, W), any floating dtype; statistics and arithmetic are float32 or wider, with or without autocast.
        weight, bias: (C,). groups: divides C. eps: 1e-6 in NCSN++.
        channel_bias: (N, C) projected time embedding, or None.

    Returns:
        (N, C, H, W), of the dtype of x.

    Raises:
        ValueError: shapes do not match or groups does not divide C.

    Source: Song et al. 2021 (NCSN++), Appendix H; LSGM, Appendix G.
    """
    _check("group_norm_swish", x, weight, bias, groups)
    if channel_bias is not None and channel_bias.shape != x.shape[:2]:
        raise ValueError(f"channel_bias must be {tuple(x.shape[:2])} (N, C), got {tuple(channel_bias.shape)}")


@define_op(reference_residual)
def group_norm_swish_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    scale: float,
    eps: float = 1e-6,
    swish: bool = True,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum that ends a residual block and the normalisation that begins the next one.

    ``v = (x + residual) * scale``; ``y = group_norm_swish(v)``.

    Args:
        x, residual: (N, C, H, W), of one dtype. scale: 1 / sqrt(2) in NCSN++.
        weight, bias, groups, eps, swish: as in :func:`group_norm_swish`.

    Returns:
        ``(v, y)``, both of the dtype of x; statistics are those of the stored v.

    Raises:
        ValueError: shapes do not match or groups does not divide C.

    Source: Song et al. 2021 (NCSN++), Appendix H.
    """
    same_shape("group_norm_swish_residual", x=x, residual=residual)
    _check("group_norm_swish_residual", x, weight, bias, groups)


@define_op(reference_affine)
def group_norm_swish_affine(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm as one factor and one shift per sample and channel, for an operation that applies them itself.

    ``factor = weight / sqrt(var_g + eps)``; ``shift = bias - mean_g * factor``: the normalised x is
    ``x * factor + shift``. Where a mean is many standard deviations from zero, that difference loses digits that
    :func:`group_norm_swish` keeps.

    Args:
        x: (N, C, H, W). weight, bias, groups, eps: as in :func:`group_norm_swish`.

    Returns:
        ``(factor, shift)``, each (N, C), float32 or wider.

    Raises:
        ValueError: shapes do not match or groups does not divide C.

    Source: Wu & He 2018 (group normalization), section 3.
    """
    _check("group_norm_swish_affine", x, weight, bias, groups)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _limits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[str]:
    why = []
    if x.dtype not in _DTYPES:
        why.append(f"x has dtype {x.dtype}: float32, bfloat16 and float16 are supported")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.dtype != torch.float32:
            why.append(f"{name} has dtype {t.dtype}: float32 is supported")
        if t.device != x.device:
            why += _prepare.other_device(x.device, **{name: t})
    if x.shape[1:].numel() == 0:
        why.append(f"x has shape {tuple(x.shape)}: its samples are empty")
    return why


def _reasons(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-6,
    channel_bias: torch.Tensor | None = None,
    swish: bool = True,
) -> list[str]:
    why = _limits(x, weight, bias)
    if channel_bias is not None:
        if channel_bias.dtype not in _DTYPES:
            why.append(
                f"channel_bias has dtype {channel_bias.dtype}: float32, bfloat16 and float16 are supported"
            )
        why += _prepare.other_device(x.device, channel_bias=channel_bias)
    return why


# Elements from which the kernel pays on the CPU: forward alone, and with gradients by layout. Factor and shift pay
# always.
_CPU_BREAK_EVEN = 16384
_CPU_TRAINING_BREAK_EVEN = {torch.contiguous_format: 131072, torch.channels_last: 65536}


def _too_small(x: torch.Tensor, *others: torch.Tensor | None) -> list[str]:
    least, kind = _CPU_BREAK_EVEN, "without gradients"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        least, kind = _CPU_TRAINING_BREAK_EVEN[_prepare.dense_format(x)], "with gradients"
    if x.numel() < least:
        return [f"{kind} it pays from {least} elements, here are {x.numel()}"]
    return []


def _slower(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-6,
    channel_bias: torch.Tensor | None = None,
    swish: bool = True,
) -> list[str]:
    return _too_small(x, weight, bias, channel_bias)


def _to_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-6,
    channel_bias: torch.Tensor | None = None,
    swish: bool = True,
) -> tuple[Any, ...]:
    return (
        x.contiguous(memory_format=_prepare.dense_format(x)),
        weight.contiguous(),
        bias.contiguous(),
        None if channel_bias is None else channel_bias.float().contiguous(),
        groups,
        eps,
        swish,
    )


def _statistics_like(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], groups), dtype=torch.float32)


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, channel_bias: object, groups: int, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), _statistics_like(x, groups), _statistics_like(x, groups)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, channel_bias, ctx.groups, _, ctx.swish = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, channel_bias, mean, rstd)


def _gradients(
    ctx: Any, call: Callable[..., tuple[torch.Tensor, ...]], grad: torch.Tensor | None, *_: object
) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, weight, bias, channel_bias, mean, rstd = ctx.saved_tensors
    grad = grad.contiguous(memory_format=_prepare.dense_format(x))
    grad_x, grad_weight, grad_bias, grad_channel = call(
        grad, x, weight, bias, channel_bias, mean, rstd, ctx.groups, ctx.swish
    )
    return grad_x, grad_weight, grad_bias, None if channel_bias is None else grad_channel, None, None, None


fused.register(
    group_norm_swish,
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? channel_bias, int groups, float eps, bool swish) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    prepare=_to_kernel,
    # The others are mean and 1 / sqrt(var + eps) of each sample and group, for backward.
    finish=lambda results: results[0],
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
    auto_reasons={"cpu": _slower},
    backward=fused.Backward(
        # The last result is the gradient of the channel bias; empty, (0,), without one.
        schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? channel_bias, Tensor mean, Tensor rstd, "
        "int groups, bool swish) -> (Tensor, Tensor, Tensor, Tensor)",
        fake=lambda grad, x, weight, bias, channel_bias, mean, rstd, groups, swish: (
            torch.empty_like(x),
            torch.empty_like(weight),
            torch.empty_like(bias),
            weight.new_empty((0,)) if channel_bias is None else torch.empty_like(channel_bias),
        ),
        save=_save,
        gradients=_gradients,
    ),
)


def _residual_reasons(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    scale: float,
    eps: float = 1e-6,
    swish: bool = True,
) -> list[str]:
    why = _limits(x, weight, bias)
    if residual.dtype != x.dtype:
        why.append(f"x has dtype {x.dtype} and residual {residual.dtype}: one dtype is supported")
    return why + _prepare.other_device(x.device, residual=residual)


def _residual_slower(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    scale: float,
    eps: float = 1e-6,
    swish: bool = True,
) -> list[str]:
    why = _too_small(x, residual, weight, bias)
    if x.dtype == torch.float32 and x.shape[0] == 1 and _prepare.dense_format(x) is torch.channels_last:
        why.append("a single float32 sample in channels_last: plain PyTorch was measured 7 to 17 % faster")
    return why


def _residual_to_kernel(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    scale: float,
    eps: float = 1e-6,
    swish: bool = True,
) -> tuple[Any, ...]:
    layout = _prepare.dense_format(x)
    return (
        x.contiguous(memory_format=layout),
        residual.contiguous(memory_format=layout),
        weight.contiguous(),
        bias.contiguous(),
        groups,
        scale,
        eps,
        swish,
    )


def _residual_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, weight, bias, ctx.groups, ctx.scale, _, ctx.swish = inputs
    v, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(v, weight, bias, mean, rstd)


def _residual_gradients(
    ctx: Any,
    call: Callable[..., tuple[torch.Tensor, ...]],
    grad_v: torch.Tensor | None,
    grad_y: torch.Tensor | None,
    *_: object,
) -> tuple[torch.Tensor | None, ...]:
    rest = (None,) * 4
    if grad_y is None:
        grad = None if grad_v is None else grad_v * ctx.scale
        return (grad, grad, None, None, *rest)
    v, weight, bias, mean, rstd = ctx.saved_tensors
    layout = _prepare.dense_format(v)
    grad_y = grad_y.contiguous(memory_format=layout)
    grad_v = None if grad_v is None else grad_v.contiguous(memory_format=layout)
    grad, grad_weight, grad_bias = call(
        grad_v, grad_y, v, weight, bias, mean, rstd, ctx.groups, ctx.scale, ctx.swish
    )
    return (grad, grad, grad_weight, grad_bias, *rest)


fused.register(
    group_norm_swish_residual,
    schema="(Tensor x, Tensor residual, Tensor weight, Tensor bias, int groups, float scale, float eps, bool swish) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, residual, weight, bias, groups, scale, eps, swish: (
        torch.empty_like(x),
        torch.empty_like(x),
        _statistics_like(x, groups),
        _statistics_like(x, groups),
    ),
    prepare=_residual_to_kernel,
    finish=lambda results: results[:2],
    reasons=_residual_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
    auto_reasons={"cpu": _residual_slower},
    backward=fused.Backward(
        # One gradient for both summands.
        schema="(Tensor? grad_v, Tensor grad_y, Tensor v, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
        "int groups, float scale, bool swish) -> (Tensor, Tensor, Tensor)",
        fake=lambda grad_v, grad_y, v, weight, bias, mean, rstd, groups, scale, swish: (
            torch.empty_like(v),
            torch.empty_like(weight),
            torch.empty_like(bias),
        ),
        save=_residual_save,
        gradients=_residual_gradients,
    ),
)


def _affine_reasons(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float = 1e-6
) -> list[str]:
    return _limits(x, weight, bias)


fused.register(
    group_norm_swish_affine,
    schema="(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor)",
    fake=lambda x, weight, bias, groups, eps: (
        weight.new_empty(x.shape[:2]),
        weight.new_empty(x.shape[:2]),
    ),
    prepare=lambda x, weight, bias, groups, eps=1e-6: (
        x.contiguous(memory_format=_prepare.dense_format(x)),
        weight.contiguous(),
        bias.contiguous(),
        groups,
        eps,
    ),
    reasons=_affine_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
)
