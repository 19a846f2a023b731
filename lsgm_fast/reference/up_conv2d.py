"""Reference convolution of a tensor enlarged by two."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lsgm_fast.reference.fir_resample import fir_resample


def up_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.conv2d(fir_resample(x, "up", fir=False), weight, bias, padding=1)
