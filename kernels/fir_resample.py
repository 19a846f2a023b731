"""Triton kernels of ``fir_resample``: up and down by two, with the [1, 3, 3, 1] filter or without, and back.

    down: y[i] = x[2i - 1] + 3 x[2i] + 3 x[2i + 1] + x[2i + 2]
    up:   y[2i] = x[i - 1] + 3 x[i],  y[2i + 1] = 3 x[i] + x[i + 1]

per axis, with zeros beside the image, times a scale. Each is the other's transpose, so backward is the same kernel the
other way. Optionally every x is ``swish(x factor + shift)`` first.

All sizes are those of the smaller image; a step is one of its lines. First the sums along the columns are made, each
input read from the line where it lies, then those along the line:

- contiguous: a tile is steps x neighbours in a line. Lanes exchange the sums; those beside the tile are made again.
- channels_last: a tile is short runs of pixels of a line x channels, a run being handled one pixel after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._common import (
    AotSpec,
    alignment,
    channels_last,
    device_guard,
    index_type,
    launch_options,
    pointer,
    short_name,
    store,
)

# Specialising on the values of these would compile anew for almost every shape.
SIZES = ("images", "height", "units", "blocks", "runs", "scale")


@triton.jit
def load(x_ptr, at, mask, factor, shift, ACTIVATED: tl.constexpr):
    """x, or swish(x factor + shift), in float32; 0 outside of the image."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATED:
        u = x * factor + shift
        # The zeros are behind the activation.
        x = tl.where(mask, u / (1.0 + tl.exp(-u)), 0.0)
    return x


@triton.jit
def enlarged_sums(
    x_ptr, at, row, height, pitch, mask, factor, shift, scale, FIR: tl.constexpr, ACTIVATED: tl.constexpr
):
    """Sums along the columns for the lines 2 row and 2 row + 1 of the result; ``at`` is in line row."""
    here = load(x_ptr, at, mask, factor, shift, ACTIVATED) * scale
    upper = here
    lower = here
    if FIR:
        above = load(x_ptr, at - pitch, mask & (row > 0), factor, shift, ACTIVATED)
        below = load(x_ptr, at + pitch, mask & (row + 1 < height), factor, shift, ACTIVATED)
        upper = above * scale + 3.0 * here
        lower = below * scale + 3.0 * here
    return upper, lower


@triton.jit
def reduced_sums(
    x_ptr, at, row, height, pitch, mask, factor, shift, scale, FIR: tl.constexpr, ACTIVATED: tl.constexpr
):
    """Sums along the columns for line row of the result; ``at`` is in line 2 row."""
    sums = load(x_ptr, at, mask, factor, shift, ACTIVATED) + load(
        x_ptr, at + pitch, mask, factor, shift, ACTIVATED
    )
    if FIR:
        above = load(x_ptr, at - pitch, mask & (row > 0), factor, shift, ACTIVATED)
        below = load(x_ptr, at + 2 * pitch, mask & (row + 1 < height), factor, shift, ACTIVATED)
        sums = above + below + 3.0 * sums
    return sums * scale


@triton.jit
def beside(values, distance: tl.constexpr, edge, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """Each lane's neighbour ``distance`` (1 or -1) further along the line; ``edge`` beside the tile."""
    lane = tl.arange(0, WIDTH)[None, :] + distance
    inside = (lane >= 0) & (lane < WIDTH)
    index = tl.broadcast_to(tl.where(inside, lane, 0), (LINES, WIDTH))
    return tl.where(inside, tl.gather(values, index, 1), edge)


@triton.jit(do_not_specialize=SIZES)
def plane_kernel(
    x_ptr,
    factor_ptr,  # (images,); these with ACTIVATED
    shift_ptr,
    y_ptr,
    images,  # planes
    height,
    units,  # width / ALIGN
    blocks,  # tiles along a line
    scale,
    UP: tl.constexpr,
    FIR: tl.constexpr,
    ACTIVATED: tl.constexpr,
    WHOLE: tl.constexpr,  # a tile is as wide as a line
    ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index
):
    pid = tl.program_id(0)
    group = pid // blocks
    first = tl.cast(pid - group * blocks, INDEX) * WIDTH
    width = units.to(INDEX) * ALIGN
    line = tl.cast(group, INDEX) * LINES + tl.arange(0, LINES)[:, None]
    image = line // height
    row = line - image * height
    exists = image < images
    factor = 0.0
    shift = 0.0
    if ACTIVATED:
        factor = tl.load(factor_ptr + image, mask=exists, other=0.0)
        shift = tl.load(shift_ptr + image, mask=exists, other=0.0)
    column = first + tl.arange(0, WIDTH)[None, :]
    both = 2 * first + tl.arange(0, 2 * WIDTH)[None, :]
    # Columns beside the tile, of the smaller image.
    left = first - 1 + tl.zeros([1, 1], INDEX)
    right = first + WIDTH + tl.zeros([1, 1], INDEX)
    if UP:
        origin = line * width
        upper, lower = enlarged_sums(
            x_ptr, origin + column, row, height, width, exists & (column < width),
            factor, shift, scale, FIR, ACTIVATED,
        )  # fmt: skip
        to = y_ptr + (4 * line * width + both)
        mask = exists & (both < 2 * width)
        if FIR:
            upper_left = 0.0
            lower_left = 0.0
            upper_right = 0.0
            lower_right = 0.0
            if not WHOLE:
                upper_left, lower_left = enlarged_sums(
                    x_ptr, origin + left, row, height, width, exists & (left >= 0),
                    factor, shift, scale, FIR, ACTIVATED,
                )  # fmt: skip
                upper_right, lower_right = enlarged_sums(
                    x_ptr, origin + right, row, height, width, exists & (right < width),
                    factor, shift, scale, FIR, ACTIVATED,
                )  # fmt: skip
            even = beside(upper, -1, upper_left, LINES, WIDTH) + 3.0 * upper
            odd = beside(upper, 1, upper_right, LINES, WIDTH) + 3.0 * upper
            store(to, tl.interleave(even, odd), mask)
            even = beside(lower, -1, lower_left, LINES, WIDTH) + 3.0 * lower
            odd = beside(lower, 1, lower_right, LINES, WIDTH) + 3.0 * lower
            store(to + 2 * width, tl.interleave(even, odd), mask)
        else:
            twice = tl.interleave(upper, upper)
            store(to, twice, mask)
            store(to + 2 * width, twice, mask)
    else:
        origin = 4 * line * width
        sums = reduced_sums(
            x_ptr, origin + both, row, height, 2 * width, exists & (both < 2 * width),
            factor, shift, scale, FIR, ACTIVATED,
        )  # fmt: skip
        even, odd = tl.split(tl.reshape(sums, [LINES, WIDTH, 2]))
        y = even + odd
        if FIR:
            odd_left = 0.0
            even_right = 0.0
            if not WHOLE:
                odd_left = reduced_sums(
                    x_ptr, origin + 2 * left + 1, row, height, 2 * width, exists & (left >= 0),
                    factor, shift, scale, FIR, ACTIVATED,
                )  # fmt: skip
                even_right = reduced_sums(
                    x_ptr, origin + 2 * right, row, height, 2 * width, exists & (right < width),
                    factor, shift, scale, FIR, ACTIVATED,
                )  # fmt: skip
            y = 3.0 * y + beside(odd, -1, odd_left, LINES, WIDTH) + beside(even, 1, even_right, LINES, WIDTH)
        store(y_ptr + (line * width + column), y, exists & (column < width))


@triton.jit(do_not_specialize=[*SIZES, "width"])
def pixel_kernel(
    x_ptr,
    factor_ptr,  # (images, channels); these with ACTIVATED
    shift_ptr,
    y_ptr,
    images,  # samples
    height,
    width,
    units,  # channels / ALIGN
    blocks,  # tiles along the channels
    runs,  # of a line
    scale,
    UP: tl.constexpr,
    FIR: tl.constexpr,
    ACTIVATED: tl.constexpr,
    ALIGN: tl.constexpr,
    RUN: tl.constexpr,  # pixels of the smaller image
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    pid = tl.program_id(0)
    group = pid // blocks
    channels = units.to(INDEX) * ALIGN
    channel = tl.cast(pid - group * blocks, INDEX) * WIDTH + tl.arange(0, WIDTH)[None, :]
    item = tl.cast(group, INDEX) * LINES + tl.arange(0, LINES)[:, None]
    line = item // runs
    first = (item - line * runs) * RUN
    image = line // height
    row = line - image * height
    exists = (image < images) & (channel < channels)
    factor = 0.0
    shift = 0.0
    if ACTIVATED:
        factor = tl.load(factor_ptr + (image * channels + channel), mask=exists, other=0.0)
        shift = tl.load(shift_ptr + (image * channels + channel), mask=exists, other=0.0)
    if UP:
        pitch = width * channels
        origin = (line * width + first) * channels + channel
        to = y_ptr + ((4 * line * width + 2 * first) * channels + channel)
        if FIR:
            upper, lower = enlarged_sums(
                x_ptr, origin - channels, row, height, pitch, exists & (first > 0),
                factor, shift, scale, FIR, ACTIVATED,
            )  # fmt: skip
            for k in tl.static_range(RUN + 1):
                # Column first + k completes the result 2 k - 1 and, with the next one, begins 2 k + 1.
                next_upper, next_lower = enlarged_sums(
                    x_ptr, origin + k * channels, row, height, pitch, exists & (first + k < width),
                    factor, shift, scale, FIR, ACTIVATED,
                )  # fmt: skip
                if k > 0:
                    odd = exists & (first + k <= width)
                    store(to + (2 * k - 1) * channels, next_upper + 3.0 * upper, odd)
                    store(to + (2 * k - 1) * channels + 2 * pitch, next_lower + 3.0 * lower, odd)
                if k < RUN:
                    even = exists & (first + k < width)
                    store(to + 2 * k * channels, upper + 3.0 * next_upper, even)
                    store(to + 2 * k * channels + 2 * pitch, lower + 3.0 * next_lower, even)
                upper = next_upper
                lower = next_lower
        else:
            for k in tl.static_range(RUN):
                mask = exists & (first + k < width)
                x = load(x_ptr, origin + k * channels, mask, factor, shift, ACTIVATED) * scale
                at = to + 2 * k * channels
                store(at, x, mask)
                store(at + channels, x, mask)
                store(at + 2 * pitch, x, mask)
                store(at + 2 * pitch + channels, x, mask)
    else:
        pitch = 2 * width * channels
        origin = (4 * line * width + 2 * first) * channels + channel
        to = y_ptr + ((line * width + first) * channels + channel)
        partial = tl.zeros([LINES, WIDTH], tl.float32)
        if FIR:
            before = reduced_sums(
                x_ptr, origin - channels, row, height, pitch, exists & (first > 0),
                factor, shift, scale, FIR, ACTIVATED,
            )  # fmt: skip
            partial = before + 3.0 * reduced_sums(
                x_ptr, origin, row, height, pitch, exists & (first < width),
                factor, shift, scale, FIR, ACTIVATED,
            )  # fmt: skip
        for k in tl.static_range(RUN):
            at = origin + 2 * k * channels
            mask = exists & (first + k < width)
            odd = reduced_sums(
                x_ptr, at + channels, row, height, pitch, mask, factor, shift, scale, FIR, ACTIVATED
            )
            if FIR:
                even = reduced_sums(
                    x_ptr, at + 2 * channels, row, height, pitch, exists & (first + k + 1 < width),
                    factor, shift, scale, FIR, ACTIVATED,
                )  # fmt: skip
                y = partial + 3.0 * odd + even
                partial = odd + 3.0 * even
            else:
                y = odd + reduced_sums(
                    x_ptr, at, row, height, pitch, mask, factor, shift, scale, FIR, ACTIVATED
                )
            store(to + k * channels, y, mask)


# --- How a call is cut into programs: functions of the shape alone ----------------------------------------------------

TILE = 512
"""Elements of the smaller image in a tile of planes in float32, four per thread; twice as many in half precision."""

COLUMNS = 128
"""Most columns of a tile of planes."""

PIXEL_TILE = 1024
"""Most elements of a tile of pixels in half precision, a run counted as one; half as many in float32."""

CHANNELS = 512
"""Most channels of such a tile."""

RUN = {True: 4, False: 2}
"""Pixels of a run on the way up and down: two (up) and one or two (down) more are read."""

Images = tuple[int, int, int, int]


def tile_width(extent: int, most: int) -> int:
    """A power of two that leaves few lanes idle beside ``extent`` neighbours."""
    widths = [min(triton.next_power_of_2(extent), most)]
    while widths[-1] >= 32:
        widths.append(widths[-1] // 2)
    return min(widths, key=lambda width: (triton.cdiv(extent, width) * width * 8 > extent * 9, -width))


def plan(
    shape: Images, inner: bool, up: bool, itemsize: int
) -> tuple[tuple[int], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options); ``shape``: of the smaller image, with its samples and channels."""
    samples, channels, height, width = shape
    if inner:
        run = RUN[up]
        runs = triton.cdiv(width, run)
        count, extent, most, elements = (
            samples * height * runs,
            channels,
            CHANNELS,
            PIXEL_TILE * 2 // itemsize,
        )
    else:
        run = runs = 1
        count, extent, most, elements = samples * channels * height, width, COLUMNS, TILE * 4 // itemsize
    tile = tile_width(extent, most)
    lines = min(triton.next_power_of_2(count), max(1, elements // tile))
    groups, blocks = triton.cdiv(count, lines), triton.cdiv(extent, tile)
    align = alignment(extent)
    sizes = {"images": samples if inner else samples * channels, "height": height}
    sizes |= {"width": width} if inner else {}
    sizes |= {"units": extent // align, "blocks": blocks} | ({"runs": runs} if inner else {})
    # Of the lines that reach past the last image.
    reach = 4 * groups * lines * (run * channels if inner else width) + 8 * width * (channels if inner else 1)
    options: dict[str, Any] = {"RUN": run} if inner else {"WHOLE": blocks == 1}
    options |= {
        "ALIGN": align,
        "LINES": lines,
        "WIDTH": tile,
        "INDEX": index_type(reach + 8 * tile),
        **launch_options(max(1, lines * tile // (32 * (16 // itemsize)))),
    }
    return (groups * blocks,), sizes, options


# --- The operation ----------------------------------------------------------------------------------------------------


def scale_of(up: bool, fir: bool) -> float:
    """What the sums of the operation are multiplied by, and those of its backward."""
    if fir:
        return 1 / 16 if up else 1 / 64
    return 1.0 if up else 1 / 4


def _resample(
    x: Tensor, factor: Tensor | None, shift: Tensor | None, up: bool, fir: bool, scale: float
) -> Tensor:
    inner = channels_last(x)
    samples, channels, height, width = x.shape
    size = (2 * height, 2 * width) if up else (height // 2, width // 2)
    y = torch.empty(
        (samples, channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if inner else torch.contiguous_format,
    )
    if x.numel() == 0:
        return y
    smaller = (height, width) if up else size
    grid, sizes, options = plan((samples, channels, *smaller), inner, up, x.itemsize)
    kernel = pixel_kernel if inner else plane_kernel
    with device_guard(x):
        kernel[grid](
            x,
            factor,
            shift,
            y,
            *sizes.values(),
            scale,
            UP=up,
            FIR=fir,
            ACTIVATED=factor is not None,
            **options,
        )
    return y


def forward(x: Tensor, factor: Tensor | None, shift: Tensor | None, up: bool, fir: bool) -> Tensor:
    """The resampled image, in the format of x.

    Args:
        x: (N, C, H, W), dense, H and W even to go down. factor, shift: (N, C), float32, contiguous, or None.

    Raises:
        ValueError: x is neither contiguous nor channels_last.
    """
    return _resample(x, factor, shift, up, fir, scale_of(up, fir))


def backward(grad: Tensor, up: bool, fir: bool) -> Tensor:
    """The gradient of x, without factor and shift; ``up``: the way that forward went.

    Raises:
        ValueError: grad is neither contiguous nor channels_last.
    """
    return _resample(grad, None, None, not up, fir, scale_of(up, fir))


def _specialisations() -> Iterator[AotSpec]:
    """The largest images of the published networks, and wider ones; float16 gives what bfloat16 does."""
    affine = {f"{name}_ptr": pointer(torch.float32) for name in ("factor", "shift")}

    def spec(
        case: str, images: Images, dtype: torch.dtype, inner: bool, up: bool, fir: bool, active: bool
    ) -> AotSpec:
        _, sizes, options = plan(images, inner, up, dtype.itemsize)
        parts = ["up" if up else "down", *["plain"] * (not fir), *["activated"] * active, case]
        layout = "channels_last" if inner else "contiguous"
        return AotSpec(
            f"{short_name(dtype)}, {layout}, {' '.join(filter(None, parts))}",
            pixel_kernel if inner else plane_kernel,
            {
                "x_ptr": pointer(dtype),
                **(affine if active else {}),
                "y_ptr": pointer(dtype),
                **dict.fromkeys(sizes, "i32"),
                "scale": "fp32",
            },
            {
                **({} if active else dict.fromkeys(affine)),
                "UP": up,
                "FIR": fir,
                "ACTIVATED": active,
                **options,
            },
        )

    for dtype in (torch.float32, torch.bfloat16):
        for up in (True, False):
            for inner in (False, True):
                for fir, active in ((True, False), (True, True), (False, False)):
                    yield spec("", (16, 256, 32, 32), dtype, inner, up, fir, active)
            yield spec("wide", (1, 64, 256, 256), dtype, False, up, True, True)


AOT = list(_specialisations())
