"""A 3x3 convolution behind nearest upsampling: how the NVAE's decoder cells enlarge."""

from __future__ import annotations

import torch

from lsgm_fast import fused
from lsgm_fast.composed import up_conv2d as composed
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.up_conv2d import up_conv2d as reference


@define_op(reference)
def up_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """``conv2d(up(x), weight, bias)``: nearest neighbour x2, then a 3x3 convolution, stride 1 and zero padding 1.

    Args:
        x: (N, I, H, W). weight: (O, I, 3, 3). bias: (O,) or None.

    Returns:
        (N, O, 2H, 2W).

    Raises:
        ValueError: the shapes do not match.

    Source: Vahdat & Kautz 2020 (NVAE), section 3.1 (the cells that go up).
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"up_conv2d expects x (N, I, H, W) and weight (O, I, 3, 3), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")


def _reasons(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> list[str]:
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    why = _prepare.other_device(x.device, **tensors)
    if torch.is_autocast_enabled("cpu"):
        why.append("under autocast: the sums of weights would be rounded")
    why += [
        f"{n} has dtype {t.dtype}: float32 is supported"
        for n, t in tensors.items()
        if t.dtype != torch.float32
    ]
    if x.numel() == 0:
        why.append(f"x has shape {tuple(x.shape)}: it is empty")
    return why


def _slower(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> list[str]:
    if composed.pays(x, weight):
        return []
    return [f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: too small for it to pay"]


fused.register_composed(
    up_conv2d,
    "cpu",
    composed.forward,
    available=lambda: None,
    reasons=_reasons,
    auto_reasons=_slower,
    priority=30,
    differentiable=True,
)
