"""Triton kernels of ``bn_swish``: BatchNorm over samples and positions, then Swish, and the gradients.

    u = (x - mean) rstd weight + bias,  y = u sigmoid(u), or y = u without Swish

All are bound by memory. They work on tiles, lines x neighbours in memory: samples x positions of one channel
(contiguous), or positions x channels (channels_last), so that no element needs a division. With statistics of the batch
there are four parts, between which the processes of a group can exchange a few numbers per channel:

    statistics | apply,  backward_reduce | backward_apply

The first of each pair leaves partial results of chunks of a channel, which a small kernel combines in a fixed order. No
atomics: the result is the same in every run. Where a channel is small, one launch does both parts, one program for each
channel, and reads x again from the cache. Running statistics need one launch forward, and one pass backward.

Statistics: one pass over a chunk about a pivot, the mean of its first tile, with the sums of the differences and of
their squares; chunks are combined about their common mean (Chan, Golub, LeVeque 1979), in float64, because float32 has
no room for the distance between two means far from 0.
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
    common_layout,
    device_guard,
    index_type,
    launch_options,
    pointer,
    short_name,
    store,
)

# Arguments of every kernel that works on tiles. Specialising on their values would compile anew for almost every shape.
SIZES = ("lines", "outer", "inner_units", "inner_blocks", "channel_blocks", "tiles", "per_program")


@triton.jit
def place(channel_blocks):
    """(chunk, block of channels) of this program: neighbours in the grid are neighbours in memory."""
    pid = tl.program_id(0)
    chunk = pid // channel_blocks
    return chunk, pid - chunk * channel_blocks


@triton.jit
def channels_of(block, outer, inner, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a tile, (1, WIDTH) or (1, 1), and which of them exist."""
    if CHANNELS_LAST:
        channel = block * WIDTH + tl.arange(0, WIDTH)[None, :]
        exists = channel < inner
    else:
        channel = block + tl.arange(0, 1)[None, :]
        exists = channel < outer
    return channel, exists


@triton.jit
def elements_of(
    tile,
    block,
    lines,
    outer,
    inner,
    inner_blocks,
    CHANNELS_LAST: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    """(index, mask) of a tile's elements, and how many of them each channel has."""
    if CHANNELS_LAST:
        first_line = tl.cast(tile, INDEX) * LINES
        column = block * WIDTH + tl.arange(0, WIDTH)
        count = tl.minimum(lines - first_line, LINES)
    else:
        group = tile // inner_blocks
        first_line = tl.cast(group, INDEX) * LINES
        begin = tl.cast(tile - group * inner_blocks, INDEX) * WIDTH
        column = begin + tl.arange(0, WIDTH)
        count = tl.minimum(lines - first_line, LINES) * tl.minimum(inner - begin, WIDTH)
    line = first_line + tl.arange(0, LINES)
    if CHANNELS_LAST:
        index = line[:, None] * inner + column[None, :]
    else:
        index = (line[:, None] * outer + block) * inner + column[None, :]
    return index, (line < lines)[:, None] & (column < inner)[None, :], count


@triton.jit
def per_channel(value, CHANNELS_LAST: tl.constexpr):
    """The sum of a tile over all that one channel has of it."""
    if not CHANNELS_LAST:
        value = tl.sum(value, axis=1, keep_dims=True)
    return tl.sum(value, axis=0, keep_dims=True)


@triton.jit
def chunk_moments(
    x_ptr,
    first,
    end,
    block,
    lines,
    outer,
    inner,
    inner_blocks,
    CHANNELS_LAST: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    """(elements per channel, mean, sum of squared distances from it) of the tiles [first, end), in float64; and the
    first tile itself."""
    index, mask, count = elements_of(
        first, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
    )
    kept = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    pivot = per_channel(kept, CHANNELS_LAST) / count.to(tl.float32)
    difference = tl.where(mask, kept - pivot, 0.0)
    once = difference
    squared = difference * difference
    for tile in range(first + 1, end):
        index, mask, more = elements_of(
            tile, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
        )
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, x - pivot, 0.0)
        once += difference
        squared += difference * difference
        count += more
    n = count.to(tl.float64)
    total = per_channel(once, CHANNELS_LAST).to(tl.float64)
    m2 = per_channel(squared, CHANNELS_LAST).to(tl.float64) - total * total / n
    return n, pivot.to(tl.float64) + total / n, m2, kept


@triton.jit
def inverse_deviation(variance, eps):
    return 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def finish_moments(mean_ptr, var_ptr, rstd_ptr, channel, exists, n, mean, m2, eps):
    """Stores a channel's statistics and returns (mean, rstd)."""
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # rounding; NaN stays
    mean = mean.to(tl.float32)
    rstd = inverse_deviation((m2 / n).to(tl.float32), eps)
    tl.store(mean_ptr + channel, mean, mask=exists)
    tl.store(var_ptr + channel, (m2 / tl.maximum(n - 1.0, 1.0)).to(tl.float32), mask=exists)
    tl.store(rstd_ptr + channel, rstd, mask=exists)
    return mean, rstd


@triton.jit
def activate(x, mean, scale, bias, SWISH: tl.constexpr):
    # Centred first: x scale + shift would cancel far from 0.
    u = (x - mean) * scale + bias
    if SWISH:
        u = u / (1.0 + tl.exp(-u))
    return u


@triton.jit
def inner_gradient(grad, x, mean, scale, bias, SWISH: tl.constexpr):
    """(the gradient with respect to u, x - mean)."""
    centred = x - mean
    if SWISH:
        u = centred * scale + bias
        s = 1.0 / (1.0 + tl.exp(-u))
        grad = grad * s * (1.0 + u * (1.0 - s))
    return grad, centred


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x_ptr,
    partial_ptr,  # (3, chunks, C), float64: elements, mean, sum of squared distances
    lines,  # samples (contiguous) or positions of all samples (channels_last)
    outer,  # channels, or 1
    inner_units,  # positions, or channels, / ALIGN
    inner_blocks,  # tiles along the positions, or 1
    channel_blocks,  # channels, or tiles along them
    tiles,  # of one block of channels
    per_program,  # tiles
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index
):
    chunk, block = place(channel_blocks)
    outer = outer.to(INDEX)
    inner = inner_units.to(INDEX) * ALIGN
    first = chunk * per_program
    end = tl.minimum(first + per_program, tiles)
    n, mean, m2, _ = chunk_moments(
        x_ptr, first, end, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
    )
    channel, exists = channels_of(block, outer, inner, CHANNELS_LAST, WIDTH)
    channels = inner if CHANNELS_LAST else outer
    chunks = tl.num_programs(0) // channel_blocks
    row = partial_ptr + chunk.to(tl.int64) * channels
    between = chunks.to(tl.int64) * channels
    tl.store(row + channel, tl.zeros_like(mean) + n, mask=exists)
    tl.store(row + between + channel, mean, mask=exists)
    tl.store(row + 2 * between + channel, m2, mask=exists)


@triton.jit(do_not_specialize=["chunks", "channels", "eps"])
def moments_kernel(
    partial_ptr,
    mean_ptr,
    var_ptr,
    rstd_ptr,
    chunks,
    channels,
    eps,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of BLOCK channels from those of their chunks."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = channel < channels
    chunk = tl.arange(0, CHUNKS)[:, None]
    mask = (chunk < chunks) & exists
    at = chunk.to(tl.int64) * channels + channel
    between = chunks.to(tl.int64) * channels
    n = tl.load(partial_ptr + at, mask=mask, other=0.0)
    means = tl.load(partial_ptr + between + at, mask=mask, other=0.0)
    m2 = tl.load(partial_ptr + 2 * between + at, mask=mask, other=0.0)
    count = tl.maximum(tl.sum(n, axis=0, keep_dims=True), 1.0)
    mean = tl.sum(n / count * means, axis=0, keep_dims=True)
    distance = means - mean
    m2 = tl.sum(tl.where(mask, m2 + n * distance * distance, 0.0), axis=0, keep_dims=True)
    finish_moments(mean_ptr, var_ptr, rstd_ptr, channel, exists, count, mean, m2, eps)


@triton.jit(do_not_specialize=[*SIZES, "eps"])
def apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    spread_ptr,  # rstd, or with RUNNING the variance
    y_ptr,
    mean_out_ptr,  # with RUNNING: what backward needs, written by the first chunk's programs
    var_out_ptr,
    rstd_out_ptr,
    lines,
    outer,
    inner_units,
    inner_blocks,
    channel_blocks,
    tiles,
    per_program,  # 1
    eps,
    RUNNING: tl.constexpr,
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    chunk, block = place(channel_blocks)
    outer = outer.to(INDEX)
    inner = inner_units.to(INDEX) * ALIGN
    index, mask, _ = elements_of(
        chunk, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
    )
    x = tl.load(x_ptr + index, mask=mask).to(tl.float32)
    channel, exists = channels_of(block, outer, inner, CHANNELS_LAST, WIDTH)
    mean = tl.load(mean_ptr + channel, mask=exists)
    rstd = tl.load(spread_ptr + channel, mask=exists)
    if RUNNING:
        variance = rstd
        rstd = inverse_deviation(variance, eps)
        if chunk == 0:
            tl.store(mean_out_ptr + channel, mean, mask=exists)
            tl.store(var_out_ptr + channel, variance, mask=exists)
            tl.store(rstd_out_ptr + channel, rstd, mask=exists)
    scale = tl.load(weight_ptr + channel, mask=exists) * rstd
    bias = tl.load(bias_ptr + channel, mask=exists)
    store(y_ptr + index, activate(x, mean, scale, bias, SWISH), mask)


@triton.jit(do_not_specialize=[*SIZES, "eps"])
def channel_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    rstd_ptr,
    lines,
    outer,
    inner_units,
    inner_blocks,
    channel_blocks,
    tiles,
    per_program,  # all
    eps,
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Statistics and apply of whole channels."""
    chunk, block = place(channel_blocks)
    outer = outer.to(INDEX)
    inner = inner_units.to(INDEX) * ALIGN
    channel, exists = channels_of(block, outer, inner, CHANNELS_LAST, WIDTH)
    weight = tl.load(weight_ptr + channel, mask=exists)
    bias = tl.load(bias_ptr + channel, mask=exists)
    n, mean, m2, kept = chunk_moments(
        x_ptr, chunk, tiles, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
    )
    mean, rstd = finish_moments(mean_ptr, var_ptr, rstd_ptr, channel, exists, n, mean, m2, eps)
    scale = weight * rstd
    index, mask, _ = elements_of(
        chunk, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
    )
    store(y_ptr + index, activate(kept, mean, scale, bias, SWISH), mask)
    for tile in range(chunk + 1, tiles):
        index, mask, _ = elements_of(
            tile, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
        )
        x = tl.load(x_ptr + index, mask=mask).to(tl.float32)
        store(y_ptr + index, activate(x, mean, scale, bias, SWISH), mask)


@triton.jit(do_not_specialize=[*SIZES, "share"])
def backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,  # REDUCE: (2, chunks, C), float64: the sums of d and of d (x - mean)
    grad_weight_ptr,  # CORRECT: of the whole batch
    grad_bias_ptr,
    grad_x_ptr,  # APPLY
    share,  # CORRECT: 1 / elements per channel
    lines,
    outer,
    inner_units,
    inner_blocks,
    channel_blocks,
    tiles,
    per_program,
    REDUCE: tl.constexpr,
    APPLY: tl.constexpr,
    CORRECT: tl.constexpr,  # for what x does to the statistics
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    chunk, block = place(channel_blocks)
    outer = outer.to(INDEX)
    inner = inner_units.to(INDEX) * ALIGN
    channel, exists = channels_of(block, outer, inner, CHANNELS_LAST, WIDTH)
    mean = tl.load(mean_ptr + channel, mask=exists)
    rstd = tl.load(rstd_ptr + channel, mask=exists)
    scale = tl.load(weight_ptr + channel, mask=exists) * rstd
    bias = tl.load(bias_ptr + channel, mask=exists)
    if CORRECT:
        offset = -scale * tl.load(grad_bias_ptr + channel, mask=exists) * share
        slope = -scale * rstd * tl.load(grad_weight_ptr + channel, mask=exists) * share
    if REDUCE:
        sums = tl.zeros([LINES, WIDTH], tl.float32)
        centred_sums = tl.zeros([LINES, WIDTH], tl.float32)
    first = chunk * per_program
    for tile in range(first, tl.minimum(first + per_program, tiles)):
        index, mask, _ = elements_of(
            tile, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
        )
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        d, centred = inner_gradient(grad, x, mean, scale, bias, SWISH)
        if REDUCE:
            d = tl.where(mask, d, 0.0)
            sums += d
            centred_sums += d * centred
        if APPLY:
            result = scale * d
            if CORRECT:
                result += slope * centred + offset
            store(grad_x_ptr + index, result, mask)
    if REDUCE:
        channels = inner if CHANNELS_LAST else outer
        chunks = tl.num_programs(0) // channel_blocks
        row = partial_ptr + chunk.to(tl.int64) * channels
        between = chunks.to(tl.int64) * channels
        tl.store(row + channel, per_channel(sums, CHANNELS_LAST).to(tl.float64), mask=exists)
        centred_sum = per_channel(centred_sums, CHANNELS_LAST).to(tl.float64)
        tl.store(row + between + channel, centred_sum, mask=exists)


@triton.jit(do_not_specialize=["chunks", "channels"])
def sums_kernel(
    partial_ptr,
    rstd_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    chunks,
    channels,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of weight and bias of BLOCK channels from the sums of their chunks."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = channel < channels
    chunk = tl.arange(0, CHUNKS)[:, None]
    mask = (chunk < chunks) & exists
    at = chunk.to(tl.int64) * channels + channel
    between = chunks.to(tl.int64) * channels
    total = tl.sum(tl.load(partial_ptr + at, mask=mask, other=0.0), axis=0, keep_dims=True)
    centred = tl.sum(tl.load(partial_ptr + between + at, mask=mask, other=0.0), axis=0, keep_dims=True)
    rstd = tl.load(rstd_ptr + channel, mask=exists, other=0.0).to(tl.float64)
    tl.store(grad_bias_ptr + channel, total.to(tl.float32), mask=exists)
    tl.store(grad_weight_ptr + channel, (centred * rstd).to(tl.float32), mask=exists)


@triton.jit(do_not_specialize=[*SIZES, "share"])
def channel_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    share,
    lines,
    outer,
    inner_units,
    inner_blocks,
    channel_blocks,
    tiles,
    per_program,  # all
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Backward reduce and apply of whole channels, with statistics of the batch."""
    chunk, block = place(channel_blocks)
    outer = outer.to(INDEX)
    inner = inner_units.to(INDEX) * ALIGN
    channel, exists = channels_of(block, outer, inner, CHANNELS_LAST, WIDTH)
    mean = tl.load(mean_ptr + channel, mask=exists)
    rstd = tl.load(rstd_ptr + channel, mask=exists)
    scale = tl.load(weight_ptr + channel, mask=exists) * rstd
    bias = tl.load(bias_ptr + channel, mask=exists)
    sums = tl.zeros([LINES, WIDTH], tl.float32)
    centred_sums = tl.zeros([LINES, WIDTH], tl.float32)
    for tile in range(chunk, tiles):
        index, mask, _ = elements_of(
            tile, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
        )
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        d, centred = inner_gradient(grad, x, mean, scale, bias, SWISH)
        d = tl.where(mask, d, 0.0)
        sums += d
        centred_sums += d * centred
    grad_bias = per_channel(sums, CHANNELS_LAST)
    grad_weight = per_channel(centred_sums, CHANNELS_LAST) * rstd
    tl.store(grad_bias_ptr + channel, grad_bias, mask=exists)
    tl.store(grad_weight_ptr + channel, grad_weight, mask=exists)
    offset = -scale * grad_bias * share
    slope = -scale * rstd * grad_weight * share
    for tile in range(chunk, tiles):
        index, mask, _ = elements_of(
            tile, block, lines, outer, inner, inner_blocks, CHANNELS_LAST, LINES, WIDTH, INDEX
        )
        grad = tl.load(grad_ptr + index, mask=mask).to(tl.float32)
        x = tl.load(x_ptr + index, mask=mask).to(tl.float32)
        d, centred = inner_gradient(grad, x, mean, scale, bias, SWISH)
        store(grad_x_ptr + index, scale * d + (slope * centred + offset), mask)


# --- How a call is cut into programs: functions of the shape alone ----------------------------------------------------

TILE = 2048
"""Elements of a tile: 16 per thread and tensor, which are two accesses of 16 bytes in half precision."""

PROGRAMS = 4096
"""Programs of a reduction, up to which each has one tile: enough for the largest GPUs several times over."""

CHUNKS = 1024
"""Most chunks of a channel: one block combines them."""

SMALL_CHANNEL = 16384
"""Elements of a channel up to which one program does all of it; more of them where there are channels enough."""
LARGE_CHANNEL = 65536
MANY_CHANNELS = 256
SMALL_COLUMN = 4096
"""The same in channels_last, where a program has the few channels of one sector of memory."""


def one_launch(samples: int, channels: int, space: int, inner: bool) -> bool:
    """Whether one program for each channel (or few channels) does both parts."""
    if inner:
        return samples * space <= SMALL_COLUMN
    return samples * space <= (LARGE_CHANNEL if channels >= MANY_CHANNELS else SMALL_CHANNEL)


def tile_width(extent: int, most: int) -> int:
    """Elements of a tile along its inner extent: many, but with few lanes beyond the end."""
    longest = min(triton.next_power_of_2(extent), most)
    widths = [longest >> k for k in range(5) if longest >> k >= 32] or [longest]
    padded = {width: triton.cdiv(extent, width) * width for width in widths}
    fitting = (w for w in widths if padded[w] * 7 <= extent * 8)
    return next(fitting, min(widths, key=lambda w: (padded[w], -w)))


def plan(
    samples: int, channels: int, space: int, inner: bool, part: str, itemsize: int = 4
) -> tuple[tuple[int], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of a kernel for ``part``: "reduce", "apply", or "channel" for both in one launch."""
    extent, lines = (channels, samples * space) if inner else (space, samples)
    tile = TILE
    if part == "channel":
        tile *= 2
        width = min(32 // itemsize, triton.next_power_of_2(extent)) if inner else tile_width(extent, tile)
    else:
        width = tile_width(extent, 256 if inner else tile)
    in_tile = min(triton.next_power_of_2(lines), tile // width)
    inner_blocks = triton.cdiv(extent, width)
    groups = triton.cdiv(lines, in_tile)
    channel_blocks, tiles = (inner_blocks, groups) if inner else (channels, groups * inner_blocks)
    per_program = {
        "reduce": max(triton.cdiv(tiles * channel_blocks, PROGRAMS), triton.cdiv(tiles, CHUNKS)),
        "apply": 1,
        "channel": tiles,
    }[part]
    align = alignment(extent)
    sizes = {
        "lines": lines,
        "outer": 1 if inner else channels,
        "inner_units": extent // align,
        "inner_blocks": 1 if inner else inner_blocks,
        "channel_blocks": channel_blocks,
        "tiles": tiles,
        "per_program": per_program,
    }
    reach = groups * in_tile * (1 if inner else channels) * max(extent, inner_blocks * width)
    options = {
        "CHANNELS_LAST": inner,
        "ALIGN": align,
        "LINES": in_tile,
        "WIDTH": width,
        "INDEX": index_type(reach),
        **launch_options(max(1, in_tile * width // 512), registers=168),
    }
    return (triton.cdiv(tiles, per_program) * channel_blocks,), sizes, options


def combine_plan(chunks: int, channels: int) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, options) of the kernels that combine chunks."""
    rows = triton.next_power_of_2(chunks)
    block = min(triton.next_power_of_2(channels), max(1, CHUNKS // rows))
    options = {"CHUNKS": rows, "BLOCK": block, **launch_options(max(1, rows * block // 256))}
    return (triton.cdiv(channels, block),), options


def shape_of(x: Tensor, *others: Tensor) -> tuple[int, int, int, bool]:
    """(samples, channels, positions, whether channels are neighbours in memory); the others must lie as x does."""
    inner = common_layout(x, *others) if others else channels_last(x)
    samples, channels = x.shape[:2]
    space = x.numel() // (samples * channels)
    return samples, channels, space, inner or space == 1


# --- The four parts ---------------------------------------------------------------------------------------------------


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, unbiased variance, rstd) of every channel of this process's batch, float32; the variance of one element
    is 0."""
    shape = shape_of(x)
    channels = shape[1]
    grid, sizes, options = plan(*shape, "reduce")
    chunks = grid[0] // sizes["channel_blocks"]
    partial = torch.empty((3, chunks, channels), dtype=torch.float64, device=x.device)
    mean, var, rstd = (x.new_empty(channels, dtype=torch.float32) for _ in range(3))
    with device_guard(x):
        statistics_kernel[grid](x, partial, *sizes.values(), **options)
        grid, options = combine_plan(chunks, channels)
        moments_kernel[grid](partial, mean, var, rstd, chunks, channels, eps, **options)
    return mean, var, rstd


def apply(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, swish: bool) -> Tensor:
    """y from the statistics of whatever batch."""
    y = torch.empty_like(x)
    grid, sizes, options = plan(*shape_of(x), "apply")
    with device_guard(x):
        apply_kernel[grid](
            x,
            weight,
            bias,
            mean,
            rstd,
            y,
            None,
            None,
            None,
            *sizes.values(),
            0.0,
            RUNNING=False,
            SWISH=swish,
            **options,
        )
    return y


def backward_reduce(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, swish: bool
) -> tuple[Tensor, Tensor]:
    """(grad_weight, grad_bias) of this process's batch."""
    return _reduce(grad, x, weight, bias, mean, rstd, swish, None)


def backward_apply(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    count: int,
    swish: bool,
) -> Tensor:
    """grad_x from the gradients of weight and bias over the whole batch, ``count`` elements per channel."""
    grad_x = torch.empty_like(x)
    grid, sizes, options = plan(*shape_of(x, grad), "apply")
    with device_guard(x):
        backward_kernel[grid](
            grad,
            x,
            weight,
            bias,
            mean,
            rstd,
            None,
            grad_weight,
            grad_bias,
            grad_x,
            1.0 / count,
            *sizes.values(),
            REDUCE=False,
            APPLY=True,
            CORRECT=True,
            SWISH=swish,
            **options,
        )
    return grad_x


def _reduce(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    swish: bool,
    grad_x: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(grad_weight, grad_bias); with ``grad_x``, that too, of statistics that are not the batch's."""
    shape = shape_of(x, grad)
    channels = shape[1]
    grid, sizes, options = plan(*shape, "reduce")
    chunks = grid[0] // sizes["channel_blocks"]
    partial = torch.empty((2, chunks, channels), dtype=torch.float64, device=x.device)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    with device_guard(x):
        backward_kernel[grid](
            grad,
            x,
            weight,
            bias,
            mean,
            rstd,
            partial,
            None,
            None,
            grad_x,
            0.0,
            *sizes.values(),
            REDUCE=True,
            APPLY=grad_x is not None,
            CORRECT=False,
            SWISH=swish,
            **options,
        )
        grid, options = combine_plan(chunks, channels)
        sums_kernel[grid](partial, rstd, grad_weight, grad_bias, chunks, channels, **options)
    return grad_weight, grad_bias


# --- The operation ----------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batch_stats: bool,
    eps: float,
    swish: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, mean, unbiased variance, rstd)``; with running statistics, those instead of the batch's.

    Args:
        x: (N, C, *spatial), dense. The others per channel: (C,), float32, contiguous.

    Raises:
        ValueError: x is neither contiguous nor channels_last.
    """
    if x.numel() == 0:
        rstd = torch.rsqrt(running_var + eps)
        return torch.empty_like(x), running_mean.clone(), running_var.clone(), rstd
    shape = shape_of(x)
    if batch_stats and not one_launch(*shape):
        mean, var, rstd = statistics(x, eps)
        return apply(x, weight, bias, mean, rstd, swish), mean, var, rstd
    y = torch.empty_like(x)
    mean, var, rstd = (torch.empty_like(weight) for _ in range(3))
    grid, sizes, options = plan(*shape, "channel" if batch_stats else "apply", x.itemsize)
    with device_guard(x):
        if batch_stats:
            channel_forward_kernel[grid](
                x, weight, bias, y, mean, var, rstd, *sizes.values(), eps, SWISH=swish, **options
            )
        else:
            apply_kernel[grid](
                x,
                weight,
                bias,
                running_mean,
                running_var,
                y,
                mean,
                var,
                rstd,
                *sizes.values(),
                eps,
                RUNNING=True,
                SWISH=swish,
                **options,
            )
    return y, mean, var, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    batch_stats: bool,
    swish: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_x, grad_weight, grad_bias)``.

    Args:
        grad: like x, in the same memory format. mean, rstd: what :func:`forward` returned.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    saved = grad, x, weight, bias, mean, rstd
    if not batch_stats:
        grad_x = torch.empty_like(x)
        return grad_x, *_reduce(*saved, swish, grad_x)
    shape = shape_of(x, grad)
    count = shape[0] * shape[2]
    if not one_launch(*shape):
        grad_weight, grad_bias = backward_reduce(*saved, swish)
        return backward_apply(*saved, grad_weight, grad_bias, count, swish), grad_weight, grad_bias
    grad_x, grad_weight, grad_bias = (torch.empty_like(t) for t in (x, weight, bias))
    grid, sizes, options = plan(*shape, "channel", x.itemsize)
    with device_guard(x):
        channel_backward_kernel[grid](
            *saved, grad_x, grad_weight, grad_bias, 1.0 / count, *sizes.values(), SWISH=swish, **options
        )
    return grad_x, grad_weight, grad_bias


def _specialisations() -> Iterator[AotSpec]:
    """Cells of the CIFAR-10 and CelebA-HQ decoders, the first in one launch; float16 gives what bfloat16 does."""
    small, large = (32, 128, 256), (16, 384, 4096)
    f32 = torch.float32

    def pointers(dtype: torch.dtype, *names: str) -> dict[str, str]:
        return {f"{name}_ptr": pointer(dtype) for name in names}

    parameters = pointers(f32, "weight", "bias", "mean", "rstd")
    for dtype in (f32, torch.bfloat16):
        for inner in (False, True):
            case = f"{short_name(dtype)}, {'channels_last' if inner else 'contiguous'}"
            both = pointers(dtype, "grad", "x")
            no_results = dict.fromkeys(("grad_x_ptr", "grad_weight_ptr", "grad_bias_ptr"))

            def integers(sizes: dict[str, int], *numbers: str) -> dict[str, str]:
                return {**dict.fromkeys(sizes, "i32"), **dict.fromkeys(numbers, "fp32")}

            _, sizes, options = plan(*large, inner, "reduce")
            yield AotSpec(
                case,
                statistics_kernel,
                {**pointers(dtype, "x"), "partial_ptr": "*fp64:16", **integers(sizes)},
                options,
                widest=64,  # the stores: three numbers per program and channel
            )
            for apply_too in (False, True):
                results = pointers(dtype, "grad_x") if apply_too else {}
                yield AotSpec(
                    f"{case}, {'running statistics' if apply_too else 'reduce'}",
                    backward_kernel,
                    {**both, **parameters, **results, "partial_ptr": "*fp64:16", **integers(sizes, "share")},
                    {
                        **{name: None for name in no_results if name not in results},
                        "REDUCE": True,
                        "APPLY": apply_too,
                        "CORRECT": False,
                        "SWISH": True,
                        **options,
                    },
                    widest=128 if apply_too else 64,
                )
            _, sizes, options = plan(*large, inner, "apply")
            yield AotSpec(
                f"{case}, apply",
                backward_kernel,
                {
                    **both,
                    **parameters,
                    **pointers(f32, "grad_weight", "grad_bias"),
                    **pointers(dtype, "grad_x"),
                    **integers(sizes, "share"),
                },
                {
                    "partial_ptr": None,
                    "REDUCE": False,
                    "APPLY": True,
                    "CORRECT": True,
                    "SWISH": True,
                    **options,
                },
            )
            for running in (False, True):
                written = ("mean_out", "var_out", "rstd_out")
                yield AotSpec(
                    f"{case}, {'running' if running else 'batch'} statistics",
                    apply_kernel,
                    {
                        **pointers(dtype, "x", "y"),
                        **pointers(f32, "weight", "bias", "mean", "spread"),
                        **(pointers(f32, *written) if running else {}),
                        **integers(sizes, "eps"),
                    },
                    {
                        **({} if running else {f"{name}_ptr": None for name in written}),
                        "RUNNING": running,
                        "SWISH": True,
                        **options,
                    },
                )
            _, sizes, options = plan(*small, inner, "channel", dtype.itemsize)
            yield AotSpec(
                case,
                channel_forward_kernel,
                {
                    **pointers(dtype, "x", "y"),
                    **parameters,
                    **pointers(f32, "var"),
                    **integers(sizes, "eps"),
                },
                {"SWISH": True, **options},
            )
            yield AotSpec(
                case,
                channel_backward_kernel,
                {
                    **both,
                    **parameters,
                    **pointers(dtype, "grad_x"),
                    **pointers(f32, "grad_weight", "grad_bias"),
                    **integers(sizes, "share"),
                },
                {"SWISH": True, **options},
            )
    for chunks, channels in ((16, 384), (CHUNKS, 3)):
        _, options = combine_plan(chunks, channels)
        numbers = {"chunks": "i32", "channels": "i32"}
        case = f"{chunks} chunks"
        yield AotSpec(
            case,
            moments_kernel,
            {"partial_ptr": "*fp64:16", **pointers(f32, "mean", "var", "rstd"), **numbers, "eps": "fp32"},
            options,
            widest=32,  # a few thousand numbers in all, one result per channel
        )
        yield AotSpec(
            case,
            sums_kernel,
            {"partial_ptr": "*fp64:16", **pointers(f32, "rstd", "grad_weight", "grad_bias"), **numbers},
            options,
            widest=32,
        )


AOT = list(_specialisations())
