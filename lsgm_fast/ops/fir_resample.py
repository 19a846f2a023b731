"""Up- and downsampling by two with the [1, 3, 3, 1] filter of NCSN++, or plain nearest / mean."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.errors import unknown_name
from lsgm_fast.reference.fir_resample import fir_resample as reference


@define_op(reference)
def fir_resample(
    x: torch.Tensor, direction: str, fir: bool = True, *, backend: str | None = None
) -> torch.Tensor:
    """Resample by two in height and width.

    With ``fir``: ``down`` convolves with ``outer(k, k) / 64``, k = [1, 3, 3, 1], zero padding 1, stride 2; ``up``
    inserts zeros and convolves with ``4 * outer(k, k) / 64``. Per axis: down
    ``y[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8``; up ``y[2i] = (x[i-1] + 3 x[i]) / 4``,
    ``y[2i+1] = (3 x[i] + x[i+1]) / 4``. Without: nearest neighbour / 2x2 mean.

    Args:
        x: (N, C, H, W), H and W even for ``"down"``. direction: ``"up"`` or ``"down"``.

    Returns:
        (N, C, 2H, 2W) or (N, C, H/2, W/2).

    Raises:
        ValueError: unknown direction, or odd size on the way down.

    Source: Song et al. 2021, Appendix H.1 (anti-aliased resampling, Zhang 2019).
    """
    if direction not in ("up", "down"):
        raise unknown_name("resampling direction", direction, ("up", "down"))
    if x.dim() != 4 or (direction == "down" and (x.shape[2] % 2 or x.shape[3] % 2)):
        raise ValueError(f"fir_resample expects (N, C, H, W), even H and W to go down, got {tuple(x.shape)}")
