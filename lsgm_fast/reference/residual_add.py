"""Reference end of a residual block: the scaled sum of its two paths."""

from __future__ import annotations

import torch


def residual_add(x: torch.Tensor, h: torch.Tensor, scale: float) -> torch.Tensor:
    return (x + h) * scale
