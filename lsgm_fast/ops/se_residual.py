"""Squeeze-and-excitation gate and the scaled residual add that ends every NVAE cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.se_residual import se_residual as reference


@define_op(reference)
def se_residual(
    skip: torch.Tensor,
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    scale: float = 0.1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``skip + scale * gate * x``, ``gate = sigmoid(W2 relu(W1 mean_hw(x) + b1) + b2)`` per sample and channel.

    Args:
        skip, x: (N, C, H, W). reduce_weight: (R, C), reduce_bias: (R,). expand_weight: (C, R), expand_bias: (C,).
        scale: residual scaling (0.1 in NVAE).

    Returns:
        (N, C, H, W). The gate is computed in float32 or wider.

    Raises:
        ValueError: shapes do not match.

    Source: Vahdat & Kautz 2020 (NVAE), section 3.2; Hu et al. 2018.
    """
    if skip.shape != x.shape or x.dim() != 4:
        raise ValueError(
            f"se_residual expects skip and x of one shape (N, C, H, W), got {tuple(skip.shape)} and {tuple(x.shape)}"
        )
    hidden, channels = reduce_weight.shape
    if channels != x.shape[1] or expand_weight.shape != (channels, hidden):
        raise ValueError(
            f"se_residual expects reduce_weight (R, {x.shape[1]}) and expand_weight ({x.shape[1]}, R), "
            f"got {tuple(reduce_weight.shape)} and {tuple(expand_weight.shape)}"
        )


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reasons(
    skip: torch.Tensor,
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    scale: float = 0.1,
) -> list[str]:
    why = []
    dtype, device = x.dtype, x.device
    if dtype not in _DTYPES or skip.dtype != dtype:
        why.append(
            f"dtypes skip {skip.dtype}, x {dtype}: both float32, both bfloat16 or both float16 are supported"
        )
    if x.shape[1:].numel() == 0 or reduce_weight.shape[0] == 0:
        why.append(
            f"x has shape {tuple(x.shape)} and reduce_weight {tuple(reduce_weight.shape)}: "
            "channels, positions and hidden units are needed"
        )
    if skip.device != device:
        why += _prepare.other_device(device, skip=skip)
    for name, t, shape in (
        ("reduce_weight", reduce_weight, reduce_weight.shape),
        ("reduce_bias", reduce_bias, reduce_weight.shape[:1]),
        ("expand_weight", expand_weight, expand_weight.shape),
        ("expand_bias", expand_bias, expand_weight.shape[:1]),
    ):
        if (t.dtype != torch.float32 and t.dtype != dtype) or t.shape != shape:
            why.append(
                f"{name} is {t.dtype} of shape {tuple(t.shape)}: expected float32 or x's dtype, and {tuple(shape)}"
            )
        if t.device != device:
            why += _prepare.other_device(device, **{name: t})
    return why


# Elements from which, without gradients and in half precision, the code that torch.compile makes of the reference is
# faster on the CPU (with AVX-512); against the reference as it is, and with gradients, the kernel always pays.
_CPU_COMPILED_HALF = 131072


def _slower(
    skip: torch.Tensor,
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    scale: float = 0.1,
) -> list[str]:
    if x.dtype == torch.float32 or x.numel() < _CPU_COMPILED_HALF or not torch.compiler.is_compiling():
        return []
    tensors = (skip, x, reduce_weight, reduce_bias, expand_weight, expand_bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return []
    return [
        f"compiled, in {x.dtype} and without gradients it pays below {_CPU_COMPILED_HALF} elements, "
        f"here are {x.numel()}"
    ]


def _dense(t: torch.Tensor) -> torch.Tensor:
    return (t if t.dtype == torch.float32 else t.float()).contiguous()


def _to_kernel(
    skip: torch.Tensor,
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    scale: float = 0.1,
) -> tuple[Any, ...]:
    memory_format = _prepare.dense_format(x)
    return (
        skip.contiguous(memory_format=memory_format),
        x.contiguous(memory_format=memory_format),
        _dense(reduce_weight),
        _dense(reduce_bias),
        _dense(expand_weight),
        _dense(expand_bias),
        scale,
    )


def _fake(
    skip: torch.Tensor, x: torch.Tensor, reduce_weight: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, channels = reduce_weight.shape
    return torch.empty_like(x), reduce_weight.new_empty(x.shape[0], 2 * channels + hidden)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, x, reduce_weight, _, expand_weight, _, ctx.scale = inputs
    state = output[1]
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, reduce_weight, expand_weight, state)


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _gradients(
    ctx: Any, call: Callable[..., Gradients], grad: torch.Tensor | None, _: object
) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, reduce_weight, expand_weight, state = ctx.saved_tensors
    dense = grad.contiguous(memory_format=_prepare.dense_format(x))
    return (grad, *call(dense, x, reduce_weight, expand_weight, state, ctx.scale), None)


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    expand_weight: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> Gradients:
    hidden, channels = reduce_weight.shape
    return (
        torch.empty_like(x),
        torch.empty_like(reduce_weight),
        reduce_weight.new_empty(hidden),
        torch.empty_like(expand_weight),
        reduce_weight.new_empty(channels),
    )


fused.register(
    se_residual,
    schema="(Tensor skip, Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, "
    "Tensor expand_bias, float scale) -> (Tensor, Tensor)",
    fake=_fake,
    prepare=_to_kernel,
    # The second holds gate, mean and hidden units of every sample, for backward.
    finish=lambda results: results[0],
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
    auto_reasons={"cpu": _slower},
    backward=fused.Backward(
        schema="(Tensor grad, Tensor x, Tensor reduce_weight, Tensor expand_weight, Tensor state, float scale) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        fake=_fake_backward,
        save=_save,
        gradients=_gradients,
    ),
)
