"""Reference end of a residual block: the scaled sum of its two paths."""

from __future__ import annotations

import torch


def residual_add(x: torch.Tensor, h: torch.Tensor, scale: float) -> torch.Tensor:
    result = torch.promote_types(x.dtype, h.dtype)
    dtype = torch.promote_types(result, torch.float32)
    return ((x.to(dtype) + h.to(dtype)) * scale).to(result)
