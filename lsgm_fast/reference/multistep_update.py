"""Reference implementation of ``multistep_update``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lsgm_fast.reference._broadcast import Scalar, compute_dtype, per_sample


def multistep_update(
    y: Tensor, c_y: Scalar, history: Sequence[Tensor], coefficients: Sequence[Scalar]
) -> Tensor:
    """New state of a linear multistep or ancestral step, ``c_y y + sum_i coefficients[i] history[i]``.

    Args:
        y: (B, C, H, W), the state.
        c_y: number, 0-d, (B,) or per channel (1, C, 1, 1).
        history: tensors of y's shape (network outputs of this and earlier steps, noise).
        coefficients: one per history entry, of the same kinds as ``c_y``.

    Returns:
        Tensor of y's shape and dtype, evaluated in at least float32 and in the widest dtype of the state and
        the history.

    Raises:
        ValueError: history and coefficients differ in number, or an entry has another shape than ``y``.
    """
    if len(history) != len(coefficients):
        raise ValueError(f"{len(history)} history entries need as many coefficients, got {len(coefficients)}")
    for index, entry in enumerate(history):
        if entry.shape != y.shape:
            raise ValueError(f"history[{index}] has shape {tuple(entry.shape)}, expected {tuple(y.shape)}")
    dtype = compute_dtype(y, *history)
    total = per_sample(c_y, y, dtype, "c_y") * y.to(dtype)
    for index, (entry, coefficient) in enumerate(zip(history, coefficients, strict=True)):
        total = total + per_sample(coefficient, y, dtype, f"coefficients[{index}]") * entry.to(dtype)
    return total.to(y.dtype)
