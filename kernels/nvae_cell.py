"""Triton kernel of ``nvae_cell``: the two matrix products of an ``mconv`` cell, with all that is done to single pixels.

    y = swish( norm( W norm(x) ) )

with a BatchNorm of running statistics, or nothing, on either side, and Swish or nothing behind. Pixels are rows:
tensors are channels_last. The BatchNorm in front is applied to x in registers instead of being folded into W: TF32 and
half precision would round x or W before a large mean cancels. So the arithmetic is that of the layers one by one,
without their passes over memory.

Two things that follow a product are done where its results are still in registers: storing each of them four times,
which is nearest upsampling by two, and sums over the pixels of a sample, from which the squeeze-excite gate is made. A
program then has pixels of one sample, and leaves one sum per channel; the kernels of ``se_residual`` add them up, in a
fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels import se_residual
from lsgm_fast.kernels._common import (
    AotSpec,
    alignment,
    device_guard,
    launch_options,
    pointer,
    short_name,
    store,
)


@triton.jit
def norm_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, channel, channels):
    """(mean, factor, bias) of the channels of a row; beyond the last one they give 0."""
    exists = channel < channels
    mean = tl.load(mean_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + channel, mask=exists, other=1.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    return mean[None, :], (weight / tl.sqrt_rn(var + eps))[None, :], bias[None, :]


# Specialising on the values of sizes would compile anew for almost every shape; the constants say what is needed.
@triton.jit(
    do_not_specialize=["eps", "pixels", "input_units", "output_units", "pieces", "output_blocks", "width"]
)
def product_kernel(
    x_ptr,  # (N, P, I)
    weight_ptr,  # (O, I)
    front_weight_ptr,  # (I,), as the next three; None: no BatchNorm in front
    front_bias_ptr,
    front_mean_ptr,
    front_var_ptr,
    behind_weight_ptr,  # (O,), as the next three; None: none behind
    behind_bias_ptr,
    behind_mean_ptr,
    behind_var_ptr,
    y_ptr,  # (N, P, O), or (N, 4 P, O)
    sums_ptr,  # (N, pieces, O), or None
    eps,
    pixels,  # of a sample
    input_units,  # I / INPUT_ALIGN
    output_units,  # O / OUTPUT_ALIGN
    pieces,  # programs per sample and block of results
    output_blocks,
    width,  # of an image, with ENLARGE
    SWISH: tl.constexpr,
    ENLARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT_ALIGN: tl.constexpr,
    OUTPUT_ALIGN: tl.constexpr,
    PIXELS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid // output_blocks
    sample = tile // pieces
    inputs = input_units * INPUT_ALIGN
    outputs = output_units * OUTPUT_ALIGN
    pixel = (tile - sample * pieces).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = (pixel < pixels)[:, None]
    row = sample.to(tl.int64) * pixels + pixel
    result = (pid - tile * output_blocks) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists = (result < outputs)[None, :]
    total = tl.zeros([PIXELS, OUTPUTS], tl.float32)
    for first in range(0, inputs, INPUTS):
        channel = first + tl.arange(0, INPUTS)
        given = channel < inputs
        x = tl.load(
            x_ptr + (row * inputs)[:, None] + channel[None, :], mask=inside & given[None, :], other=0.0
        )
        if front_weight_ptr is not None:
            mean, factor, bias = norm_of(
                front_weight_ptr, front_bias_ptr, front_mean_ptr, front_var_ptr, eps, channel, inputs
            )
            x = ((x.to(tl.float32) - mean) * factor + bias).to(x_ptr.dtype.element_ty)
        weight = tl.load(
            weight_ptr + (result * inputs)[None, :] + channel[:, None],
            mask=exists & given[:, None],
            other=0.0,
        )
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    if behind_weight_ptr is not None:
        mean, factor, bias = norm_of(
            behind_weight_ptr, behind_bias_ptr, behind_mean_ptr, behind_var_ptr, eps, result, outputs
        )
        total = (total - mean) * factor + bias
    if SWISH:
        total = total / (1.0 + tl.exp(-total))
    if sums_ptr is not None:
        # Rows beyond the last pixel hold the BatchNorm's bias.
        sums = tl.sum(tl.where(inside, total, 0.0), axis=0)
        tl.store(sums_ptr + tile.to(tl.int64) * outputs + result, sums, mask=result < outputs)
    if ENLARGE:
        # Rows of images follow each other across samples, so all of them are enlarged as one image.
        line = row // width
        corner = 4 * line * width + 2 * (row - line * width)
        for k in tl.static_range(4):
            at = corner + (k // 2 * 2 * width + k % 2)
            store(y_ptr + (at * outputs)[:, None] + result[None, :], total, inside & exists)
    else:
        store(y_ptr + (row * outputs)[:, None] + result[None, :], total, inside & exists)


# --- How a call is cut into programs: functions of the sizes alone ----------------------------------------------------

TILE = 64
"""Most pixels of a program, and most results of float32; without tensor cores half of the pixels, as sums and what is
multiplied fill the registers."""

RESULTS = 128
"""Most results of half precision."""

SIDE_BY_SIDE = 64
"""Bytes of a row of x that a program multiplies at once."""

EXACT_INPUTS = 16
"""Elements of it without tensor cores: a thread has all of them in registers."""

PROGRAMS = 256
"""Programs below which a program has fewer pixels: two for every multiprocessor of the largest GPUs."""

SMALLEST = 16
"""Extent of the smallest tile that is multiplied."""


def tile_width(extent: int, most: int) -> int:
    """Results of a program: many, but with few lanes beyond the last."""
    widths = [most >> k for k in range(8) if most >> k >= SMALLEST]
    padded = {width: triton.cdiv(extent, width) * width for width in widths}
    fitting = (w for w in widths if padded[w] * 7 <= extent * 8)
    return next(fitting, min(widths, key=lambda w: (padded[w], -w)))


def plan(
    samples: int, pixels: int, inputs: int, outputs: int, itemsize: int, exact: bool
) -> tuple[tuple[int], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options). ``exact``: products of float32, without tensor cores."""
    columns = tile_width(outputs, TILE if itemsize == 4 else RESULTS)
    output_blocks = triton.cdiv(outputs, columns)
    rows = min(max(triton.next_power_of_2(pixels), SMALLEST), TILE // 2 if exact else TILE)
    while rows > SMALLEST and samples * triton.cdiv(pixels, rows) * output_blocks < PROGRAMS:
        rows //= 2
    pieces = triton.cdiv(pixels, rows)
    aligned = alignment(inputs), alignment(outputs)
    sizes = {
        "pixels": pixels,
        "input_units": inputs // aligned[0],
        "output_units": outputs // aligned[1],
        "pieces": pieces,
        "output_blocks": output_blocks,
    }
    at_once = EXACT_INPUTS if exact else SIDE_BY_SIDE // itemsize
    options = {
        "PRECISION": "ieee" if exact else "tf32",
        "INPUT_ALIGN": aligned[0],
        "OUTPUT_ALIGN": aligned[1],
        "PIXELS": rows,
        "INPUTS": min(max(triton.next_power_of_2(inputs), SMALLEST), at_once),
        "OUTPUTS": columns,
        **launch_options(8 if rows * columns > 4096 else 4),
    }
    return (samples * pieces * output_blocks,), sizes, options


# --- The operation ----------------------------------------------------------------------------------------------------


def _exact(x: Tensor) -> bool:
    """Whether products of float32 are to be exact: as in PyTorch's own convolutions, which may use TF32."""
    return x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"


def _launch(
    x: Tensor,
    weight: Tensor,
    front: Sequence[Tensor],
    behind: Sequence[Tensor],
    eps: float,
    swish: bool,
    enlarge: bool,
    pool: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y, and with ``pool``, not with ``enlarge``: (N, pieces, O) sums that add up to those over y's positions)."""
    samples, inputs, height, width = x.shape
    outputs = weight.shape[0]
    if weight.shape != (outputs, inputs, 1, 1) or not x.movedim(1, -1).is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {tuple(x.stride())}, the weight {tuple(weight.shape)}: "
            "expected (N, I, H, W) in channels_last and (O, I, 1, 1)"
        )
    times = 2 if enlarge else 1
    y = torch.empty(
        (samples, outputs, times * height, times * width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    # A program has pixels of one sample only where it makes sums of them.
    cut = (samples, height * width) if pool else (1, samples * height * width)
    grid, sizes, options = plan(*cut, inputs, outputs, x.itemsize, _exact(x))
    sums = x.new_empty((samples, sizes["pieces"], outputs), dtype=torch.float32) if pool else None
    if x.numel() > 0:
        with device_guard(x):
            product_kernel[grid](
                x,
                weight,
                *(front or (None,) * 4),
                *(behind or (None,) * 4),
                y,
                sums,
                eps,
                *sizes.values(),
                width,
                SWISH=swish,
                ENLARGE=enlarge,
                **options,
            )
    return y, sums


def product_forward(
    x: Tensor,
    weight: Tensor,
    front: Sequence[Tensor],
    behind: Sequence[Tensor],
    eps: float,
    swish: bool,
    enlarge: bool,
) -> Tensor:
    """A 1x1 convolution, with a BatchNorm of running statistics in front and behind, Swish, and nearest upsampling.

    Args:
        x: (N, I, H, W), channels_last. weight: (O, I, 1, 1), contiguous, of x's dtype.
        front, behind: weight, bias, mean and variance, contiguous, of any dtype; or nothing.

    Returns:
        (N, O, H, W), or (N, O, 2 H, 2 W) with ``enlarge``, channels_last.

    Raises:
        ValueError: x is not in channels_last, or of another shape than the weight's.
    """
    return _launch(x, weight, front, behind, eps, swish, enlarge, False)[0]


def project_forward(
    x: Tensor,
    weight: Tensor,
    behind: Sequence[Tensor],
    eps: float,
    skip: Tensor,
    gate: Sequence[Tensor],
    scale: float,
) -> Tensor:
    """``skip + scale gate y``, y being the 1x1 convolution and the BatchNorm behind it.

    Args:
        x, weight, behind: as for :func:`product_forward`, not empty. skip: (N, O, H, W), channels_last.
        gate: weights and biases of the squeeze-excite, in float32, contiguous.

    Raises:
        ValueError: shapes or memory formats do not match.
    """
    y, sums = _launch(x, weight, (), behind, eps, False, False, True)
    assert sums is not None
    return se_residual.pooled_forward(skip, y, sums, *gate, scale)


def _specialisations() -> Iterator[AotSpec]:
    """Cells of the CelebA-HQ decoder: expansion, the same of cells that enlarge, and projection; and one of a batch."""
    f32 = torch.float32
    norms = {
        side: [f"{side}_{name}_ptr" for name in ("weight", "bias", "mean", "var")]
        for side in ("front", "behind")
    }
    samples, pixels, channels, expanded = 16, 4096, 64, 384
    for dtype, exact in ((f32, True), (f32, False), (torch.bfloat16, False)):
        case = f"{short_name(dtype)}{'' if dtype != f32 else ', exact' if exact else ', TF32'}"
        for name, given, pool in (
            ("expand", ("front", "behind"), False),
            ("enlarge", ("front", "behind"), False),
            ("project", ("behind",), True),
            ("alone", (), False),
        ):
            inputs, outputs = (expanded, channels) if name == "project" else (channels, expanded)
            _, sizes, options = plan(
                samples if pool else 1,
                pixels if pool else samples * pixels,
                inputs,
                outputs,
                dtype.itemsize,
                exact,
            )
            used = [pointer_name for side in given for pointer_name in norms[side]]
            unused = [n for side in norms if side not in given for n in norms[side]] + ["sums_ptr"] * (
                not pool
            )
            yield AotSpec(
                f"{case}, {name}",
                product_kernel,
                {
                    **dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr", *used), pointer(dtype)),
                    **({"sums_ptr": pointer(f32)} if pool else {}),
                    "eps": "fp32",
                    **dict.fromkeys((*sizes, "width"), "i32"),
                },
                {
                    **dict.fromkeys(unused),
                    "SWISH": name in ("expand", "enlarge"),
                    "ENLARGE": name == "enlarge",
                    **options,
                },
            )


AOT = list(_specialisations())
