"""The NVAE's residual cell on GPUs: Triton kernels, and the library's 3x3 convolutions.

Running statistics make a BatchNorm an affine map per channel. Four passes are left of an ``mconv`` cell: the expansion
does the BatchNorms on either side of it, Swish and the upsampling; the depthwise convolution does the BatchNorm and
Swish behind it; the projection does the last BatchNorm, and the sums of which the squeeze-excite gate is made; and the
gated result is added to the residual. The expansion works on single pixels, so it comes before the upsampling, and
stores its results four times.

Of a cell of two 3x3 convolutions, which are the library's, BatchNorm and Swish are one pass each. The first
convolution's bias goes into the mean that is subtracted next; from statistics of the batch it drops out.

All of it runs in channels_last, in which a pixel's channels, the rows of the matrix products, are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import lsgm_fast  # its `ops` import this module
from lsgm_fast import fused
from lsgm_fast.reference.nvae_cell import affine

Tensors = Sequence[torch.Tensor]


def unavailable() -> str | None:
    """Why it cannot run here, or None."""
    return fused.unavailable("triton", "cuda")


def _fake(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    front: Tensors,
    behind: Tensors,
    eps: float,
    swish: bool,
    enlarge: bool,
) -> torch.Tensor:
    samples, _, height, width = x.shape
    times = 2 if enlarge else 1
    return _fake(x, samples, weight.shape[0], times * height, times * width)


_product = fused.triton_part(
    "nvae_cell",
    "product",
    schema="(Tensor x, Tensor weight, Tensor[] front, Tensor[] behind, float eps, bool swish, bool enlarge) -> Tensor",
    fake=_fake_product,
)
_project = fused.triton_part(
    "nvae_cell",
    "project",
    schema="(Tensor x, Tensor weight, Tensor[] behind, float eps, Tensor skip, Tensor[] gate, float scale) -> Tensor",
    fake=lambda x, weight, behind, eps, skip, gate, scale: _fake(x, *skip.shape),
)


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
    norms = [t.contiguous() for t in norms]
    if len(convs) == 2:
        y = _bnswish(x, convs, biases, norms, stride, up, batch_stats, eps)
    else:
        expand, depthwise, project = (t.contiguous() for t in convs)
        if batch_stats:
            y = _mconv_of_batch(x, expand, depthwise, project, norms, stride, up, eps)
        else:
            x = _product(x, expand, norms[:4], norms[4:8], eps, True, up)
            behind = (t.to(x.dtype) for t in affine([t.float() for t in norms[8:12]], eps))
            x = _depthwise(x, depthwise, stride, None, None, *behind)
            if squeeze_excite:
                gate = [t.float().contiguous() for t in squeeze_excite]
                return _project(x, project, norms[12:], eps, skip, gate, scale)
            y = _product(x, project, [], norms[12:], eps, False, False)
    if squeeze_excite:
        reduce, reduce_bias, expand, expand_bias = squeeze_excite
        return lsgm_fast.ops.se_residual(
            skip, y, reduce, reduce_bias, expand, expand_bias, scale, backend="triton"
        )
    return torch.add(skip, y, alpha=scale)


def _mconv_of_batch(
    x: torch.Tensor,
    expand: torch.Tensor,
    depthwise: torch.Tensor,
    project: torch.Tensor,
    norms: Tensors,
    stride: int,
    up: bool,
    eps: float,
) -> torch.Tensor:
    x = _norm(x, norms[:4], True, eps, swish=False)
    # Repeated pixels have the mean and the variance of those that are repeated.
    x = _norm(_product(x, expand, [], [], eps, False, False), norms[4:8], True, eps)
    if up:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    x = _norm(_depthwise(x, depthwise, stride), norms[8:12], True, eps)
    return _norm(_product(x, project, [], [], eps, False, False), norms[12:], True, eps, swish=False)


def _bnswish(
    x: torch.Tensor,
    convs: Tensors,
    biases: Tensors,
    norms: Tensors,
    stride: int,
    up: bool,
    batch_stats: bool,
    eps: float,
) -> torch.Tensor:
    x = _norm(x, norms[:4], batch_stats, eps)
    if up:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    x = F.conv2d(x, convs[0], None, stride, 1)
    weight, bias, mean, var = norms[4:]
    if len(biases) == 2:
        mean = mean.float() - biases[0].float()
    x = _norm(x, (weight, bias, mean, var), batch_stats, eps)
    return F.conv2d(x, convs[1], biases[-1], 1, 1)


def _norm(x: torch.Tensor, norm: Tensors, batch_stats: bool, eps: float, swish: bool = True) -> torch.Tensor:
    weight, bias, mean, var = (t.float() for t in norm)
    return lsgm_fast.ops.bn_swish(x, weight, bias, mean, var, batch_stats, eps, swish, backend="triton")[0]


def _depthwise(
    x: torch.Tensor, weight: torch.Tensor, stride: int, *affines: torch.Tensor | None
) -> torch.Tensor:
    return lsgm_fast.ops.depthwise_bn_swish(x, weight, stride, *affines, backend="triton")
