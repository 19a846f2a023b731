"""Reference implementation of ``rk_stage``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lsgm_fast.reference._broadcast import compute_dtype


def linear_combination(k: Tensor, coefficients: Sequence[float], y: Tensor) -> Tensor:
    """``sum_i coefficients[i] k[i]`` in the dtype in which a step of the state ``y`` is evaluated.

    Terms with a zero coefficient are kept, so that a NaN in any stage reaches the result.
    """
    n = len(coefficients)
    if n == 0 or k.shape[0] < n or k.shape[1:] != y.shape:
        raise ValueError(
            f"k must hold at least {max(n, 1)} stages of shape {tuple(y.shape)}, one per coefficient, "
            f"got shape {tuple(k.shape)} for {n} coefficients"
        )
    dtype = compute_dtype(y, k)
    total = k[0].to(dtype) * coefficients[0]
    for stage, coefficient in zip(k[1:n], coefficients[1:], strict=True):
        total = total.add(stage.to(dtype), alpha=coefficient)
    return total


def rk_stage(y: Tensor, k: Tensor, a: Sequence[float], h: Tensor | float) -> Tensor:
    """State at which a Runge-Kutta stage is evaluated, ``y + h sum_i a[i] k[i]``.

    Args:
        y: state of any shape.
        k: (>= n, *y.shape), stage derivatives; the first n are read.
        a: n numbers, one row of the Butcher tableau.
        h: signed step size, a number or a 0-d tensor.

    Returns:
        Tensor of y's shape and dtype, evaluated in at least float32.

    Raises:
        ValueError: ``k`` does not hold ``len(a)`` stages of y's shape.
    """
    increment = linear_combination(k, a, y) * h
    return (y.to(increment.dtype) + increment).to(y.dtype)
