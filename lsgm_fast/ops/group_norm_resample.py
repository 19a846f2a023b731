"""GroupNorm, Swish and resampling by two: how a resampling block of the NCSN++ begins."""

from __future__ import annotations

import functools

import torch

from lsgm_fast import fused
from lsgm_fast.composed import group_norm_resample as composed
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops.fir_resample import fir_resample
from lsgm_fast.ops.group_norm_swish import group_norm_swish
from lsgm_fast.reference.group_norm_resample import group_norm_resample as reference


@define_op(reference)
def group_norm_resample(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    direction: str,
    fir: bool = True,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``fir_resample(group_norm_swish(x))``.

    ``y = resample(u * sigmoid(u))``, ``u = (x - mean_g) / sqrt(var_g + eps) * weight + bias``. Without gradients the
    normalised tensor is never in memory: mean and factor are computed first, and resampling applies them to what it
    reads.

    Args:
        x: (N, C, H, W), H and W even for ``"down"``.
        weight, bias, groups, eps: as in :func:`~lsgm_fast.ops.group_norm_swish`.
        direction, fir: as in :func:`~lsgm_fast.ops.fir_resample`.

    Returns:
        (N, C, 2H, 2W) or (N, C, H/2, W/2), of the dtype of x.

    Raises:
        ValueError: as of the two operations.

    Source: Song et al. 2021 (NCSN++), Appendix H.
    """
    group_norm_swish._check(x, weight, bias, groups, eps)
    fir_resample._check(x, direction, fir)


def _parts(
    backend: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    direction: str,
    fir: bool = True,
    eps: float = 1e-6,
) -> list[str]:
    """What keeps one of the parts from running."""
    why = group_norm_swish.impl(backend).reasons(x, weight, bias, groups, eps)
    return list(dict.fromkeys([*why, *fir_resample.impl(backend).reasons(x, direction, fir)]))


for _backend, _priority in (("cpu", 30), ("cuda", 30), ("triton", 20)):
    fused.register_composed(
        group_norm_resample,
        _backend,
        functools.partial(composed.forward, _backend),
        available=lambda: None,
        reasons=functools.partial(_parts, _backend),
        priority=_priority,
        differentiable=True,
    )
