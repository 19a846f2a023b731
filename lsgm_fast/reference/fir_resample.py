"""Reference resampling by two: separable [1, 3, 3, 1] filter, or plain nearest / mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def fir_resample(
    x: torch.Tensor,
    direction: str,
    fir: bool = True,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    if factor is not None and shift is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        u = torch.addcmul(shift.to(dtype)[:, :, None, None], x.to(dtype), factor.to(dtype)[:, :, None, None])
        x = F.silu(u).to(x.dtype)
    if not fir:
        if direction == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2)
    c = x.shape[1]
    taps = torch.ones(4, dtype=x.dtype, device=x.device)
    taps[1:3] = 3.0
    taps = taps / (4.0 if direction == "up" else 8.0)
    kernel = (taps[:, None] * taps[None, :]).expand(c, 1, 4, 4)
    # Autocast would make the filter a convolution in half precision.
    with torch.autocast(x.device.type, enabled=False):
        if direction == "up":
            # The transposed convolution is zero insertion followed by the filter with padding (2, 1).
            return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=c)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=c)
