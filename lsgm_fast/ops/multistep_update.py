"""Linear combination of a state and its history."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks, _prepare
from lsgm_fast.reference.multistep_update import multistep_update as reference


@define_op(reference)
def multistep_update(
    y: torch.Tensor,
    c_y: float | torch.Tensor,
    history: Sequence[torch.Tensor],
    coefficients: Sequence[float | torch.Tensor],
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``c_y y + sum_i c_i history_i``: the update of multistep, exponential and ancestral methods.

    Args:
        y: (B, C, H, W). history: tensors of y's shape. c_y, coefficients: numbers, or tensors of shape (), (B,) or
            (1, C, 1, 1).

    Returns:
        Like y; arithmetic in float32 or wider.

    Raises:
        ValueError: shapes do not match, or not one coefficient per history entry.
    """
    if len(history) != len(coefficients):
        raise ValueError(
            f"multistep_update got {len(history)} history entries and {len(coefficients)} coefficients"
        )
    for h in history:
        if h.shape != y.shape:
            _checks.same_shape("multistep_update", y=y, history=h)


_ENTRIES = 4
"""History entries that the kernels take: multistep methods beyond the fourth order are not in use."""


def _reasons(
    y: torch.Tensor,
    c_y: float | torch.Tensor,
    history: Sequence[torch.Tensor],
    coefficients: Sequence[float | torch.Tensor],
) -> list[str]:
    # Called at every step of a sampler: names are put together only where something is wrong.
    why = []
    device = y.device
    if y.dim() < 2:
        why.append(f"y has shape {tuple(y.shape)}: (B, C, ...) is supported")
    if len(history) > _ENTRIES:
        why.append(f"{len(history)} history entries: at most {_ENTRIES} are supported")
    if y.dtype not in _prepare.DTYPES:
        why += _prepare.unsupported_dtypes(y=y)
    for i, h in enumerate(history):
        if h.dtype not in _prepare.DTYPES or h.device != device:
            why += _prepare.unsupported_dtypes(**{f"history[{i}]": h})
            why += _prepare.other_device(device, **{f"history[{i}]": h})
        if h.dtype != history[0].dtype:
            why.append(
                f"history[0] is {history[0].dtype} and history[{i}] {h.dtype}: one dtype for all is supported"
            )
    for i, c in enumerate((c_y, *coefficients)):
        if isinstance(c, torch.Tensor) and not (
            c.device == device and c.dtype in _prepare.DTYPES and _is_factor(c.shape, y.shape)
        ):
            why += _factor_reasons(y, "c_y" if i == 0 else f"coefficients[{i - 1}]", c)
    return why


def _is_factor(shape: torch.Size, state: torch.Size) -> bool:
    """Whether a coefficient of that shape is one value, or depends on nothing but the sample and the channel."""
    if len(shape) < 2:
        return shape.numel() == 1 or (len(state) > 1 and shape[0] == state[0])
    return (
        len(shape) == len(state)
        and shape[0] in (1, state[0])
        and shape[1] in (1, state[1])
        and all(n == 1 for n in shape[2:])
    )


def _factor_reasons(y: torch.Tensor, name: str, factor: torch.Tensor) -> list[str]:
    why = _prepare.unsupported_dtypes(**{name: factor}) + _prepare.other_device(y.device, **{name: factor})
    if not _is_factor(factor.shape, y.shape):
        why.append(
            f"{name} has shape {tuple(factor.shape)} for y {tuple(y.shape)}: "
            "one value, one per sample and one per channel are supported"
        )
    return why


def _to_kernel(
    y: torch.Tensor,
    c_y: float | torch.Tensor,
    history: Sequence[torch.Tensor],
    coefficients: Sequence[float | torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor], list[float], list[torch.Tensor], list[int]]:
    """Coefficient i, 0 being c_y, is ``scales[i]``, times ``factors[which[i]]`` where ``which[i]`` is not negative.

    Numbers travel as numbers: on a GPU a tensor of each would cost a launch.
    """
    memory_format = _prepare.dense_format(y)
    scales: list[float] = []
    factors: list[torch.Tensor] = []
    which: list[int] = []
    for c in (c_y, *coefficients):
        if isinstance(c, torch.Tensor):
            if c.dtype not in (torch.float32, torch.float64):
                c = c.float()
            which.append(len(factors))
            scales.append(1.0)
            factors.append(c)
        else:
            which.append(-1)
            scales.append(c)
    return (
        y.contiguous(memory_format=memory_format),
        [h.contiguous(memory_format=memory_format) for h in history],
        scales,
        factors,
        which,
    )


fused.register(
    multistep_update,
    schema="(Tensor y, Tensor[] history, float[] scales, Tensor[] factors, int[] which) -> Tensor",
    fake=lambda y, history, scales, factors, which: torch.empty_like(y),
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
)
