"""Reference 3x3 convolution through Winograd's minimal filtering."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Finite points of F(m, 3), the last one is infinity. Those of m = 4 lose least among +-a and +-b whose matrices are
# exact in float32: less than half of what the usual +-1 and +-2 do.
POINTS: dict[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.625, -0.625, 1.5, -1.5)}
PANEL = 32


def _polynomial(roots: list[float]) -> list[float]:
    """Coefficients of the product of ``x - root``, the constant first."""
    coefficients = [1.0]
    for root in roots:
        shifted = [0.0, *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, 0.0], strict=True)]
    return coefficients


def matrices(tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A^T (m, n), B^T (n, n) and G (n, 3) of F(m, 3), n = m + 2, in float64.

    One axis of the convolution is ``A^T ((G g) * (B^T d))``: Toom and Cook's multiplication of polynomials, which
    evaluates at ``POINTS`` and at infinity, transposed.
    """
    points = POINTS[tile]
    n = tile + 2
    at, bt, g = [], [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = math.prod(point - other for other in others)
        at.append([point**k for k in range(tile)])
        bt.append([*_polynomial(others), 0.0])
        g.append([point**k / scale for k in range(3)])
    at.append([0.0] * (tile - 1) + [1.0])
    bt.append(_polynomial(list(points)))
    g.append([0.0, 0.0, 1.0])
    assert len(bt) == n
    as_tensor = [torch.tensor(rows, dtype=torch.float64) for rows in (at, bt, g)]
    return as_tensor[0].T.contiguous(), as_tensor[1], as_tensor[2]


def winograd_conv2d(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_channels: int
) -> torch.Tensor:
    tile = math.isqrt(prepared.shape[0]) - 2
    n = tile + 2
    at, bt, _ = (t.to(prepared) for t in matrices(tile))
    batch, _, height, width = x.shape
    rows, columns = -(-height // tile), -(-width // tile)
    # Autocast would multiply in half precision.
    with torch.autocast(x.device.type, enabled=False):
        padded = F.pad(x.to(prepared.dtype), (1, 1 + columns * tile - width, 1, 1 + rows * tile - height))
        d = padded.unfold(2, n, tile).unfold(3, n, tile)  # (B, C, rows, columns, n, n)
        v = (bt @ d @ bt.T).flatten(-2).permute(4, 0, 2, 3, 1).flatten(1, 3)  # (n n, tiles, C)
        u = prepared.transpose(1, 2).flatten(2)[..., :out_channels]  # (n n, C, K)
        m = (v @ u).permute(2, 1, 0).reshape(out_channels, batch, rows, columns, n, n)
        y = (at @ m @ at.T).permute(1, 0, 2, 4, 3, 5)  # (B, K, rows, m, columns, m)
        y = y.reshape(batch, out_channels, rows * tile, columns * tile)[:, :, :height, :width]
        if bias is not None:
            y = y + bias.to(y.dtype)[:, None, None]
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
