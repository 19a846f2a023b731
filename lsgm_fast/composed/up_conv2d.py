"""A convolution behind nearest upsampling, on CPUs: four smaller ones at the low resolution.

A 3x3 convolution of an enlarged image sees 2x2 equal pixels. For each of the four positions (p, q) of an output pixel
within them it is a 2x2 convolution of the low resolution: 4/9 of the arithmetic, and the enlarged tensor is never
written. Zero padding stays zero padding, because whole low-resolution pixels lie outside of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# Of the low resolution, from which the detour pays; the products are those of pixels, channels in and channels out.
_FEWEST_PIXELS = 256
_FEWEST_PRODUCTS = 2**21

Convolution = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Arguments and result as of :func:`lsgm_fast.ops.up_conv2d`."""
    return by_phases(x, weight, bias, lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1))


def by_phases(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, convolution: Convolution
) -> torch.Tensor:
    """The same with any ``convolution(x, weight, bias)`` of stride 1 and padding 1, which may also do something to each
    of its results."""
    # All four phases at once. With padding 1, row t of the result is at t - 1 and t of x.
    kernels = phase_kernels(weight).flatten(0, 2)
    return _Interleave.apply(convolution(x, kernels, None if bias is None else bias.repeat(4)))


def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the arithmetic that is saved outweighs making the kernels of the phases."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return pixels >= _FEWEST_PIXELS and pixels * weight.shape[0] * weight.shape[1] >= _FEWEST_PRODUCTS


def phase_kernels(weight: torch.Tensor) -> torch.Tensor:
    """The kernels of a convolution behind nearest x2, on what was enlarged.

    (O, I, K, K), K = 3 or 5, stride 1 and padding K // 2 -> (2, 2, O, I, k, k), k = 2 or 3. Output pixel
    (2i + p, 2j + q) is the (p, q)-th kernel at (i, j): tap m of a row hits low-resolution row
    ``i + (p + m - K // 2) // 2``, and the taps that hit the same row add up. For K = 5 that is a 3x3 kernel with
    padding 1; for K = 3, a 2x2 kernel that starts at (i + p - 1, j + q - 1).
    """
    size = weight.shape[-1]
    rows = weight.new_zeros(2, size // 2 + 1, size)
    for p in range(2):
        first = (p - size // 2) // 2
        for m in range(size):
            rows[p, (p + m - size // 2) // 2 - first, m] = 1.0
    return torch.einsum("pam,qbn,oimn->pqoiab", rows, rows, weight)


class _Interleave(torch.autograd.Function):
    """(N, 4 O, H + 1, W + 1) -> (N, O, 2 H, 2 W): pixel (2i + p, 2j + q) is that of phase (p, q) at (i + p, j + q)."""

    @staticmethod
    def forward(ctx: Any, phases: torch.Tensor) -> torch.Tensor:
        ctx.memory_format = memory_format(phases)
        height, width = phases.shape[2:]
        return interleave([window(y, i, height - 1, width - 1) for i, y in enumerate(phases.chunk(4, dim=1))])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _Separate.apply(grad, ctx.memory_format)


class _Separate(torch.autograd.Function):
    """The transpose of :class:`_Interleave`: 0 where a phase leaves the image."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
        n, channels, height, width = x.shape
        shape = (n, 4 * channels, height // 2 + 1, width // 2 + 1)
        result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format).zero_()
        for i, phase in enumerate(result.chunk(4, dim=1)):
            window(phase, i, height // 2, width // 2).copy_(x[:, :, i // 2 :: 2, i % 2 :: 2])
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Interleave.apply(grad), None


def window(y: torch.Tensor, i: int, height: int, width: int) -> torch.Tensor:
    """The part of phase ``i`` that lies in the image."""
    return y[:, :, i // 2 : i // 2 + height, i % 2 : i % 2 + width]


def interleave(phases: list[torch.Tensor]) -> torch.Tensor:
    """Four (N, C, H, W), of the output pixels (2i, 2j), (2i, 2j + 1), (2i + 1, 2j), (2i + 1, 2j + 1), as one."""
    n, c, height, width = phases[0].shape
    result = torch.empty(
        (n, c, 2 * height, 2 * width),
        dtype=phases[0].dtype,
        device=phases[0].device,
        memory_format=memory_format(phases[0]),
    )
    for i, phase in enumerate(phases):
        result[:, :, i // 2 :: 2, i % 2 :: 2] = phase
    return result


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last where neighbouring channels are neighbours in memory, for parts of tensors too."""
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format
