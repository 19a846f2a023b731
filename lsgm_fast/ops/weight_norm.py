"""Weight normalisation of all convolutions of a model at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.weight_norm import weight_norm as reference


@define_op(reference)
def weight_norm(
    weights: Sequence[torch.Tensor],
    log_norms: Sequence[torch.Tensor],
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """``W_k = exp(g_k) * V_k / (||V_k||_2 + eps)`` per output filter k, for every pair of the two lists.

    Args:
        weights: V, each (C_out, C_in, K, K). log_norms: g, each (C_out, 1, 1, 1).
        eps: added to the norm (1e-5 in NVAE).

    Returns:
        The normalised weights, in order, each with the strides of V where V is dense.

    Raises:
        ValueError: the lists differ in length or a pair in its number of filters.

    Source: Vahdat & Kautz 2020 (NVAE), section 3.3; Salimans & Kingma 2016.
    """
    if len(weights) != len(log_norms):
        raise ValueError(f"weight_norm got {len(weights)} weights and {len(log_norms)} log norms")
    for w, g in zip(weights, log_norms, strict=True):
        if w.dim() != 4 or g.shape != (w.shape[0], 1, 1, 1):
            raise ValueError(
                "weight_norm expects (C_out, C_in, K, K) and (C_out, 1, 1, 1), "
                f"got {tuple(w.shape)} and {tuple(g.shape)}"
            )


def _reasons(
    weights: Sequence[torch.Tensor], log_norms: Sequence[torch.Tensor], eps: float = 1e-5
) -> list[str]:
    # Called in every training step with some hundred weights: names are put together only where something is wrong.
    if not weights:
        return ["no weights: there is nothing to compute"]
    device = weights[0].device
    for i, (w, g) in enumerate(zip(weights, log_norms, strict=True)):
        if w.dtype != torch.float32 or g.dtype != torch.float32:
            return [f"weights[{i}] is {w.dtype} and log_norms[{i}] {g.dtype}: float32 is supported"]
        if w.device != device or g.device != device:
            return _prepare.other_device(device, **{f"weights[{i}]": w, f"log_norms[{i}]": g})
    return []


# Weights, and elements of all of them, below both of which the call costs more than it saves on the CPU.
_CPU_FEW = 4
_CPU_BREAK_EVEN = 131072


def _small(
    weights: Sequence[torch.Tensor], log_norms: Sequence[torch.Tensor], eps: float = 1e-5
) -> list[str]:
    if len(weights) >= _CPU_FEW or (total := sum(w.numel() for w in weights)) >= _CPU_BREAK_EVEN:
        return []
    return [
        f"it pays from {_CPU_FEW} weights or {_CPU_BREAK_EVEN} elements, here are {len(weights)} and {total}"
    ]


def _filters_are_runs(w: torch.Tensor) -> bool:
    """Whether each filter is one run in memory, one after the other; the order within it does not matter."""
    if w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last):
        return True
    expected = 1
    for stride, size in sorted(zip(w.stride()[1:], w.shape[1:], strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return w.shape[0] == 1 or w.stride(0) == expected


def _to_kernel(
    weights: Sequence[torch.Tensor], log_norms: Sequence[torch.Tensor], eps: float = 1e-5
) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    return (
        [w if _filters_are_runs(w) else w.contiguous() for w in weights],
        [g.contiguous() for g in log_norms],
        eps,
    )


def _fake(
    weights: list[torch.Tensor], log_norms: list[torch.Tensor], eps: float
) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.empty_like(w) for w in weights], weights[0].new_empty(sum(w.shape[0] for w in weights))


def _fake_backward(
    grads: list[torch.Tensor],
    weights: list[torch.Tensor],
    log_norms: list[torch.Tensor],
    norms: torch.Tensor,
    eps: float,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.empty_like(w) for w in weights], torch.empty_like(norms)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    weights, log_norms, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*weights, *log_norms, output[1])


def _laid_out_like(grad: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``grad`` with the strides of ``w``: itself where it has them."""
    if grad.stride() == w.stride():
        return grad
    return torch.empty_like(w).copy_(grad)


def _gradients(
    ctx: Any,
    call: Callable[..., tuple[list[torch.Tensor], torch.Tensor]],
    grads: list[torch.Tensor],
    _: torch.Tensor | None,
) -> tuple[Any, ...]:
    *tensors, norms = ctx.saved_tensors
    weights, log_norms = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    grads = [_laid_out_like(grad, w) for grad, w in zip(grads, weights, strict=True)]
    of_weights, of_log_norms = call(grads, weights, log_norms, norms, ctx.eps)
    pieces = of_log_norms.split([w.shape[0] for w in weights])
    return of_weights, [piece.view(-1, 1, 1, 1) for piece in pieces], None


# The results are a list, not views of one tensor: memory as large as all weights together would come from the system
# anew at every call, and backward would have to put their gradients together first.
fused.register(
    weight_norm,
    schema="(Tensor[] weights, Tensor[] log_norms, float eps) -> (Tensor[], Tensor)",
    fake=_fake,
    prepare=_to_kernel,
    finish=lambda results: results[0],
    reasons=_reasons,
    priorities={"cpu": 30, "triton": 20},
    auto_reasons={"cpu": _small},
    backward=fused.Backward(
        schema="(Tensor[] grads, Tensor[] weights, Tensor[] log_norms, Tensor norms, float eps) -> (Tensor[], Tensor)",
        fake=_fake_backward,
        save=_save,
        gradients=_gradients,
    ),
)
