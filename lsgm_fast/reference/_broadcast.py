"""Dtype and broadcasting rules shared by the reference operations."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = Tensor | float
"""A coefficient: a Python number, a 0-d or (1,) tensor (shared), or a (B,) tensor (one per sample)."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which an operation on ``tensors`` is evaluated: the widest of them, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def per_sample(value: Scalar, like: Tensor, dtype: torch.dtype, name: str) -> Tensor | float:
    """``value`` in a form that broadcasts over ``like`` of shape (B, ...), in ``dtype``.

    Python numbers stay as they are, so that they cost no transfer to the device.

    Raises:
        ValueError: ``value`` is a tensor that is neither 0-d, (1,), (B,) nor of ``like``'s number of
            dimensions.
    """
    if not isinstance(value, Tensor):
        return float(value)
    value = value.to(dtype)
    if value.ndim == 0 or value.ndim == like.ndim:
        return value
    if value.ndim == 1 and value.shape[0] == 1:
        return value.reshape(())
    if value.ndim == 1 and value.shape[0] == like.shape[0]:
        return value.reshape(-1, *(1,) * (like.ndim - 1))
    raise ValueError(
        f"{name} has shape {tuple(value.shape)}, expected a scalar or one value per sample, "
        f"({like.shape[0] if like.ndim else 1},), for a state of shape {tuple(like.shape)}"
    )
