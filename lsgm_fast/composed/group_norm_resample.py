"""GroupNorm, Swish and resampling without the normalised tensor in memory: resampling normalises what it reads."""

from __future__ import annotations

import torch

import lsgm_fast  # its `ops` import this module


def forward(
    backend: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    direction: str,
    fir: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """On ``backend``; the other arguments and the result as of :func:`lsgm_fast.ops.group_norm_resample`."""
    ops = lsgm_fast.ops
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        # Backward needs the statistics' part as well, which the operation that applies them does not have.
        y = ops.group_norm_swish(x, weight, bias, groups, eps, backend=backend)
        return ops.fir_resample(y, direction, fir, backend=backend)
    factor, shift = ops.group_norm_swish_affine(x, weight, bias, groups, eps, backend=backend)
    return ops.fir_resample(x, direction, fir, factor, shift, backend=backend)
