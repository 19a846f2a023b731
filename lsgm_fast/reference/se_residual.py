"""Reference squeeze-excite with residual add."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def se_residual(
    skip: torch.Tensor,
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    scale: float = 0.1,
) -> torch.Tensor:
    # The gate is a product of two tiny matrices: its precision costs nothing, so it never drops below float32.
    pooled = x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        hidden = F.relu(F.linear(pooled, reduce_weight.to(pooled.dtype), reduce_bias.to(pooled.dtype)))
        gate = torch.sigmoid(F.linear(hidden, expand_weight.to(pooled.dtype), expand_bias.to(pooled.dtype)))
    return torch.addcmul(skip, x, gate.to(x.dtype)[:, :, None, None], value=scale)
