"""The NVAE's residual cell on CPUs: oneDNN's convolutions with everything else folded into them.

Running statistics make a BatchNorm an affine map per channel. One before a 1x1 convolution goes into its weights, and
so does one behind any convolution; Swish is computed by oneDNN where it stores the convolution's results. What is left
of a cell are its convolutions, and the squeeze-excite gate. All of it runs in channels_last, the order in which oneDNN
is fastest.

Two things are done differently from the layers in order, with the same result up to rounding:

- Nearest upsampling commutes with what works on single pixels, so that happens at the low resolution. The convolution
  behind it becomes four smaller ones there (:mod:`lsgm_fast.composed.up_conv2d`).
- Where the expanded tensor of an ``mconv`` cell would not stay in the cache, expansion, depthwise convolution and
  projection go through slices of its channels, and the projections add up.

Folding is done in every call: it touches the weights alone, and a copy that is kept could become a wrong one. The
statistics of a batch leave nothing to fold: then the order in memory and the upsampling are what is gained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import lsgm_fast  # its `ops` import this module
from lsgm_fast.composed.up_conv2d import by_phases, interleave, pays, phase_kernels
from lsgm_fast.reference.nvae_cell import affine

# Slices of the expanded tensor have at most so many bytes: a third of the last-level cache of common processors.
_SLICE_BYTES = 8 * 2**20
# Channels of a slice are a multiple of this, a vector of 16 floats.
_VECTOR = 16


def unavailable() -> str | None:
    """Why it cannot run here, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    return None


def forward(
    x: torch.Tensor,
    skip: torch.Tensor,
    convs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    squeeze_excite: Sequence[torch.Tensor],
    stride: int = 1,
    up: bool = False,
    batch_stats: bool = False,
    eps: float = 1e-5,
    scale: float = 0.1,
) -> torch.Tensor:
    """Arguments and result as of :func:`lsgm_fast.ops.nvae_cell`; the result lies in channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    skip = skip.contiguous(memory_format=torch.channels_last)
    if batch_stats:
        branch = _mconv_of_batch if len(convs) == 3 else _bnswish_of_batch
    else:
        branch = _mconv if len(convs) == 3 else _bnswish
    y = branch(x, convs, biases, norms, stride, up, eps)
    if squeeze_excite:
        reduce, reduce_bias, expand, expand_bias = squeeze_excite
        return lsgm_fast.ops.se_residual(skip, y, reduce, reduce_bias, expand, expand_bias, scale)
    return torch.add(skip, y, alpha=scale)


def _mconv(
    x: torch.Tensor,
    convs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    stride: int,
    up: bool,
    eps: float,
) -> torch.Tensor:
    (s0, t0), (s1, t1), (s2, t2), (s3, t3) = (affine(norms[i : i + 4], eps) for i in range(0, 16, 4))
    matrix = convs[0][:, :, 0, 0]
    # As a sum: a matrix product rounds differently with where its operands lie in memory.
    expand_bias = torch.addcmul(t1, s1, (matrix * t0).sum(dim=1))
    expand = (s1[:, None] * matrix * s0)[:, :, None, None]
    depthwise = s2[:, None, None, None] * convs[1]
    project = s3[:, None, None, None] * convs[2]
    kernels = phase_kernels(depthwise).flatten(0, 1) if up else depthwise[None]

    channels = expand.shape[0]
    samples, _, height, width = x.shape
    channel_bytes = 4 * samples * height * width
    step = min(channels, max(_SLICE_BYTES // channel_bytes // _VECTOR, 1) * _VECTOR)
    outputs: list[torch.Tensor] = []
    for first in range(0, channels, step):
        part = slice(first, min(first + step, channels))
        expanded = _conv(x, expand[part], expand_bias[part], swish=True)
        weight = project[:, part].contiguous()
        for i, kernel in enumerate(kernels):
            inner = _conv(
                expanded,
                kernel[part],
                t2[part],
                stride,
                kernel.shape[-1] // 2,
                part.stop - part.start,
                swish=True,
            )
            if first == 0:
                outputs.append(_conv(inner, weight, t3))
            else:
                _add_conv(outputs[i], inner, weight)
    return interleave(outputs) if up else outputs[0]


def _bnswish(
    x: torch.Tensor,
    convs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    stride: int,
    up: bool,
    eps: float,
) -> torch.Tensor:
    factor, shift = affine(norms[4:], eps)
    first = factor[:, None, None, None] * convs[0]
    if len(biases) == 2:
        shift = torch.addcmul(shift, factor, biases[0])
    weight, bias, mean, var = norms[:4]
    x = lsgm_fast.ops.bn_swish(x, weight, bias, mean, var, False, eps)[0]
    inner = _conv_behind_up(x, first, shift, True) if up else _conv(x, first, shift, stride, 1, swish=True)
    return _conv(inner, convs[1], biases[-1], padding=1)


def _mconv_of_batch(
    x: torch.Tensor,
    convs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    stride: int,
    up: bool,
    eps: float,
) -> torch.Tensor:
    expand, depthwise, project = convs
    channels = expand.shape[0]
    # Enlarging repeats every pixel four times, which changes no mean and no variance.
    x = _conv(_norm_of_batch(x, norms[:4], eps, swish=False), expand)
    x = _norm_of_batch(x, norms[4:8], eps)
    if up:
        kernels = phase_kernels(depthwise).flatten(0, 1)
        # As further samples, all phases are normalised together.
        x = torch.cat([_conv(x, kernel, None, 1, 1, channels) for kernel in kernels])
    else:
        x = _conv(x, depthwise, None, stride, 2, channels)
    y = _conv(_norm_of_batch(x, norms[8:12], eps), project)
    if up:
        y = interleave(list(y.chunk(4)))
    return _norm_of_batch(y, norms[12:], eps, swish=False)


def _bnswish_of_batch(
    x: torch.Tensor,
    convs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    stride: int,
    up: bool,
    eps: float,
) -> torch.Tensor:
    bias = biases[0] if len(biases) == 2 else None
    x = _norm_of_batch(x, norms[:4], eps)
    inner = _conv_behind_up(x, convs[0], bias, False) if up else _conv(x, convs[0], bias, stride, 1)
    return _conv(_norm_of_batch(inner, norms[4:], eps), convs[1], biases[-1], padding=1)


def _norm_of_batch(
    x: torch.Tensor, norm: Sequence[torch.Tensor], eps: float, swish: bool = True
) -> torch.Tensor:
    weight, bias, mean, var = norm
    return lsgm_fast.ops.bn_swish(x, weight, bias, mean, var, True, eps, swish)[0]


def _conv_behind_up(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, swish: bool
) -> torch.Tensor:
    """A 3x3 convolution of x enlarged by two."""
    if not pays(x, weight):
        return _conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1, swish=swish)
    return by_phases(x, weight, bias, lambda x, weight, bias: _conv(x, weight, bias, padding=1, swish=swish))


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    swish: bool = False,
) -> torch.Tensor:
    # What Inductor calls for a convolution and what follows it. The first-use self-test compares it with PyTorch's own.
    return torch.ops.mkldnn._convolution_pointwise(
        x,
        weight,
        bias,
        [padding, padding],
        [stride, stride],
        [1, 1],
        groups,
        "swish" if swish else "none",
        [],
        "",
    )


def _add_conv(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """``y += conv(x)``, 1x1."""
    torch.ops.mkldnn._convolution_pointwise_.binary(
        y, x, weight, None, [0, 0], [1, 1], [1, 1], 1, "add", None, None, [], None
    )
