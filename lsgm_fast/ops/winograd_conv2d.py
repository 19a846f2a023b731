"""A 3x3 convolution with fewer multiplications: Winograd's minimal filtering, its weight prepared once."""

from __future__ import annotations

from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.winograd_conv2d import PANEL, POINTS, matrices
from lsgm_fast.reference.winograd_conv2d import winograd_conv2d as reference


def winograd_weight(weight: torch.Tensor, tile: int) -> torch.Tensor:
    """``G w G^T`` of every filter and channel, in the order in which :func:`winograd_conv2d` reads it.

    Args:
        weight: (K, C, 3, 3), as ``F.conv2d`` takes it. tile: m, 2 or 4; see :func:`winograd_conv2d`.

    Returns:
        (P, ceil(K / 32), C, 32), P = (m + 2)^2, zeros where there is no filter; computed in float64 and rounded once,
        to float64 where ``weight`` has that, else to float32. No gradient goes through it.

    Raises:
        ValueError: another shape, no filter or channel, or another tile.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or not weight.numel():
        raise ValueError(
            f"winograd_weight expects (K, C, 3, 3), K and C at least 1, got {tuple(weight.shape)}"
        )
    if tile not in POINTS:
        raise ValueError(f"tile is {tile}: expected one of {', '.join(map(str, POINTS))}")
    filters = weight.shape[0]
    g = matrices(tile)[2].to(weight.device)
    with torch.no_grad():
        u = g @ weight.double() @ g.T
        u = torch.nn.functional.pad(u.flatten(2).permute(2, 1, 0), (0, -filters % PANEL))  # (P, C, K)
        u = u.unflatten(2, (-1, PANEL)).transpose(1, 2)
        return u.to(torch.promote_types(weight.dtype, torch.float32), memory_format=torch.contiguous_format)


@define_op(reference)
def winograd_conv2d(
    x: torch.Tensor,
    prepared: torch.Tensor,
    bias: torch.Tensor | None,
    out_channels: int,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` with a 3x3 weight, for inference on CPUs.

    The image is cut into tiles of m x m results, and of each tile's (m + 2) x (m + 2) pixels d

        ``y = A^T (sum over channels of (G w G^T) * (B^T d B)) A + bias``

    so that m = 2 takes 2.25 and m = 4 four times fewer multiplications than the convolution. The prepared weight is
    1.8 and 4 times as large. The kernel's error is about 1.6 (m = 2) and 4.6 (m = 4) times that of ``F.conv2d``:
    3.6e-7 and 1.1e-6 of the result, as root mean squares, for normal numbers and 256 to 1024 channels.

    NaN and infinity reach every result in whose 3x3 window they lie, as NaN or infinity, and may reach the others that
    share a tile with those.

    Args:
        x: (B, C, H, W), any floating dtype, float32 for the kernel; any strides, channels_last is best.
        prepared: (P, ceil(K / 32), C, 32) from :func:`winograd_weight`, float64 where x is that, else float32; P is
            (m + 2)^2. The arithmetic has its dtype.
        bias: (K,) or None. out_channels: K.

    Returns:
        (B, K, H, W) in the channels_last format, dtype of x, under autocast too.

    Raises:
        ValueError: the shapes do not match, or H or W is 0.
        TypeError: prepared has another dtype.

    Source: Lavin & Gray 2016 (arXiv:1509.09308); the points of m = 4 are 0, +-5/8, +-3/2 and infinity.
    """
    if x.dim() != 4 or not all(x.shape[1:]):
        raise ValueError(f"winograd_conv2d expects x (B, C, H, W), only B may be 0, got {tuple(x.shape)}")
    panels = -(-out_channels // PANEL)
    sizes = [(tile + 2) ** 2 for tile in POINTS]
    if (
        prepared.dim() != 4
        or prepared.shape[0] not in sizes
        or prepared.shape[1:] != (panels, x.shape[1], PANEL)
    ):
        raise ValueError(
            f"prepared has shape {tuple(prepared.shape)}: expected ({' or '.join(map(str, sizes))}, {panels}, "
            f"{x.shape[1]}, {PANEL}) for {x.shape[1]} channels in and {out_channels} out, from winograd_weight"
        )
    if out_channels < 1 or (bias is not None and bias.shape != (out_channels,)):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"out_channels is {out_channels} and the shape of bias {shape}: expected K >= 1 and (K,)"
        )
    expected = torch.promote_types(x.dtype, torch.float32)
    if prepared.dtype != expected:
        raise TypeError(f"prepared has dtype {prepared.dtype} and x {x.dtype}: expected {expected}")


def _reasons(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_channels: int
) -> list[str]:
    why = _prepare.other_device(x.device, prepared=prepared, bias=bias)
    for name, t in (("x", x), ("bias", bias)):
        if t is not None and t.dtype != torch.float32:
            why.append(f"{name} has dtype {t.dtype}: float32 is supported")
    return why


def _to_kernel(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_channels: int
) -> tuple[Any, ...]:
    return (
        x.contiguous(memory_format=torch.channels_last),
        prepared.contiguous(),
        None if bias is None else bias.contiguous(),
        out_channels,
    )


def _fake(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_channels: int
) -> torch.Tensor:
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, out_channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


fused.register(
    winograd_conv2d,
    schema="(Tensor x, Tensor prepared, Tensor? bias, int out_channels) -> Tensor",
    fake=_fake,
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30},
)
