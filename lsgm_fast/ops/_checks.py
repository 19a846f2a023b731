"""Input checks shared by several operations."""

from __future__ import annotations

import torch


def same_shape(name: str, **tensors: torch.Tensor) -> None:
    """All tensors must have one shape."""
    values = iter(tensors.values())
    first = next(values).shape
    if all(t.shape == first for t in values):
        return
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    raise ValueError(f"{name} expects tensors of one shape, got {shapes}")


def per_sample(name: str, x: torch.Tensor, **scalars: torch.Tensor | float) -> None:
    """Every scalar must be a number, 0-d, (1,) or (B,) with B the batch size of ``x``."""
    for key, value in scalars.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, x.shape[0])):
            raise ValueError(f"{name}: {key} must be 0-d or ({x.shape[0]},), got {tuple(value.shape)}")


def mixing_logit(name: str, x: torch.Tensor, logit: torch.Tensor | None) -> None:
    """The mixing logit must be (1, C, 1, ...) for ``x`` (B, C, ...), or None."""
    if logit is None:
        return
    shape, dims = logit.shape, x.dim()
    if dims < 2 or len(shape) != dims or shape[1] != x.shape[1] or shape.numel() != shape[1]:
        raise ValueError(
            f"{name}: mixing_logit must be (1, C, 1, 1) for x {tuple(x.shape)}, got {tuple(logit.shape)}"
        )
