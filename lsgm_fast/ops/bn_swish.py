"""BatchNorm followed by Swish: the normalisation of every NVAE cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.bn_swish import bn_swish as reference


@define_op(reference)
def bn_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    batch_stats: bool,
    eps: float = 1e-5,
    swish: bool = True,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BatchNorm over (N, H, W), then Swish.

    ``u = (x - mean) / sqrt(var + eps) * weight + bias``; ``y = u * sigmoid(u)``, or ``y = u`` without ``swish``.

    Args:
        x: (N, C, H, W), any floating dtype; statistics and arithmetic are float32 or wider.
        weight, bias, running_mean, running_var: (C,).
        batch_stats: normalise with the statistics of ``x`` (biased variance) instead of the running ones.
        eps: added to the variance (1e-5 in NVAE).
        swish: apply the activation.

    Returns:
        ``(y, mean, var)``: y like x; mean and *unbiased* variance of the batch, for the caller to update running
        statistics with (this function changes nothing), or the running statistics themselves.

    Raises:
        ValueError: x is not 4-D or the parameters do not have C entries.

    Source: Vahdat & Kautz 2020 (NVAE), section 3.2; used by LSGM, Appendix G.
    """
    if x.dim() != 4 or weight.shape != (x.shape[1],):
        raise ValueError(
            f"bn_swish expects x (N, C, H, W) and weight (C,), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reasons(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    batch_stats: bool,
    eps: float = 1e-5,
    swish: bool = True,
) -> list[str]:
    why = []
    if x.dtype not in _DTYPES:
        why.append(f"x has dtype {x.dtype}: float32, bfloat16 and float16 are supported")
    if batch_stats and x.shape[0] * x.shape[2] * x.shape[3] < 2:
        why.append(f"x has shape {tuple(x.shape)}: a variance needs more than one element per channel")
    device, shape = x.device, weight.shape
    for name, t in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if t.dtype != torch.float32 or t.shape != shape:
            why.append(f"{name} is {t.dtype} of shape {tuple(t.shape)}: expected float32 and {tuple(shape)}")
        if t.device != device:
            why += _prepare.other_device(device, **{name: t})
    if torch.is_grad_enabled() and (running_mean.requires_grad or running_var.requires_grad):
        why.append("a running statistic requires a gradient: they are averages, not learned")
    return why


# Elements from which the kernel pays on the CPU: forward alone, and with gradients by layout.
_CPU_BREAK_EVEN = 49152
_CPU_TRAINING_BREAK_EVEN = {torch.contiguous_format: 40960, torch.channels_last: 98304}


def _slower(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    batch_stats: bool,
    eps: float = 1e-5,
    swish: bool = True,
) -> list[str]:
    if x.dtype != torch.float32:
        return [f"x has dtype {x.dtype}: on the CPU it pays for float32"]
    least, kind = _CPU_BREAK_EVEN, "without gradients"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        least, kind = _CPU_TRAINING_BREAK_EVEN[_prepare.dense_format(x)], "with gradients"
    if x.numel() < least:
        return [f"{kind} it pays from {least} elements, here are {x.numel()}"]
    return []


def _to_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    batch_stats: bool,
    eps: float = 1e-5,
    swish: bool = True,
) -> tuple[Any, ...]:
    return (
        x.contiguous(memory_format=_prepare.dense_format(x)),
        weight.contiguous(),
        bias.contiguous(),
        running_mean.contiguous(),
        running_var.contiguous(),
        batch_stats,
        eps,
        swish,
    )


Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _fake(x: torch.Tensor, weight: torch.Tensor, *_: object) -> Outputs:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, bias, _, _, ctx.batch_stats, _, ctx.swish = inputs
    _, mean, var, rstd = output
    # As those of the reference, which come out of buffers.
    ctx.mark_non_differentiable(mean, var, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _gradients(
    ctx: Any,
    call: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    grad: torch.Tensor | None,
    *_: object,
) -> tuple[torch.Tensor | None, ...]:
    rest = (None,) * 5
    if grad is None:
        return (None, None, None, *rest)
    x, weight, bias, mean, rstd = ctx.saved_tensors
    grad = grad.contiguous(memory_format=_prepare.dense_format(x))
    return (*call(grad, x, weight, bias, mean, rstd, ctx.batch_stats, ctx.swish), *rest)


fused.register(
    bn_swish,
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, bool batch_stats, "
    "float eps, bool swish) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    prepare=_to_kernel,
    # The fourth is 1 / sqrt(var + eps), for backward.
    finish=lambda results: results[:3],
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
    auto_reasons={"cpu": _slower},
    backward=fused.Backward(
        schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool batch_stats, "
        "bool swish) -> (Tensor, Tensor, Tensor)",
        fake=lambda grad, x, weight, bias, mean, rstd, batch_stats, swish: (
            torch.empty_like(x),
            torch.empty_like(weight),
            torch.empty_like(bias),
        ),
        save=_save,
        gradients=_gradients,
    ),
)
