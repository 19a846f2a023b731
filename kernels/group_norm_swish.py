"""Triton kernels of ``group_norm_swish`` and its family: GroupNorm, then Swish, and the gradients.

    u = (v - mean) rstd weight + bias,  y = u sigmoid(u), or y = u without Swish

with v = x, v = x + channel_bias, or v = (x + residual) scale, which is stored first. With d the gradient of u, h =
(v - mean) rstd and L elements in a group:

    grad_v = rstd (weight d - A / L - h B / L),  A = sum of weight d,  B = sum of weight d h, over the group

All are bound by memory. They work on tiles, channels x positions of one sample (contiguous) or positions x channels
(channels_last), so that no element needs a division; in channels_last a tile has several groups side by side where one
is narrow. There are two plans. Where a group is small and groups are many, one launch reads a tile once, keeps it in
registers and does everything. Else a first launch leaves partial results of pieces of a group, and each program of the
second combines those of its groups itself. What parameters get is summed over samples and pieces in a small last
launch. No atomics: the result is the same in every run.

Statistics: a tile in registers is centred twice, about its mean and about what rounding left of it; longer pieces are
summed about a pivot, the mean of their first tile, and combined in float64 about the first piece's mean (Chan, Golub,
LeVeque 1979). A mean is applied as two float32 numbers: one has no room for means many deviations from 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
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
SIZES = (
    "channel_units",  # channels / CHANNEL_ALIGN
    "space_units",  # positions / SPACE_ALIGN
    "per_group",  # channels of a group
    "cell_units",  # channels of a cell / CHANNEL_ALIGN: of one group, or of a few neighbouring ones
    "splits",  # tiles side by side over the channels of a cell
    "blocks",  # the same over all channels
    "parts",  # programs along the positions
    "per_part",  # tiles of each
)


@triton.jit
def place(splits, blocks, parts, CHANNELS_LAST: tl.constexpr, BACKWARDS: tl.constexpr):
    """(sample, part, cell, split) of this program: neighbours in the grid are neighbours in memory."""
    pid = tl.program_id(0)
    if BACKWARDS:
        # What the first launch has read last is still in the cache.
        pid = tl.num_programs(0) - 1 - pid
    if CHANNELS_LAST:
        row = pid // blocks
        block = pid - row * blocks
        sample = row // parts
        part = row - sample * parts
    else:
        row = pid // parts
        part = pid - row * parts
        sample = row // blocks
        block = row - sample * blocks
    cell = block // splits
    return sample, part, cell, block - cell * splits


@triton.jit
def channels_of(cell, split, channels, per_cell, CHANNELS: tl.constexpr):
    """The channels of a tile, their places in the cell, and which of them exist."""
    lane = split * CHANNELS + tl.arange(0, CHANNELS)
    channel = cell * per_cell + lane
    return channel, lane, (lane < per_cell) & (channel < channels)


@triton.jit
def groups_of(cell, channels, per_group, per_cell, GROUPS: tl.constexpr):
    """The groups of a cell, and which of them exist."""
    first = tl.arange(0, GROUPS) * per_group
    group = cell * (per_cell // per_group) + tl.arange(0, GROUPS)
    return group, (first < per_cell) & (cell * per_cell + first < channels)


@triton.jit
def across(values, CHANNELS_LAST: tl.constexpr):
    """One value per channel, for each element of a tile."""
    return values[None, :] if CHANNELS_LAST else values[:, None]


@triton.jit
def elements_of(
    tile,
    channel,
    exists,
    channels,
    space,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """(index in the sample, mask) of a tile's elements, and the number of its positions."""
    begin = tl.cast(tile, INDEX) * POSITIONS
    position = begin + tl.arange(0, POSITIONS)
    if CHANNELS_LAST:
        index = position[:, None] * channels + channel[None, :]
        mask = (position < space)[:, None] & exists[None, :]
    else:
        index = channel.to(INDEX)[:, None] * space + position[None, :]
        mask = exists[:, None] & (position < space)[None, :]
    return index, mask, tl.minimum(space - begin, POSITIONS)


@triton.jit
def per_channel(tile, CHANNELS_LAST: tl.constexpr):
    """The sum of a tile over its positions."""
    return tl.sum(tile, axis=0 if CHANNELS_LAST else 1)


@triton.jit
def members(lane, per_group, GROUPS: tl.constexpr):
    return (lane // per_group)[:, None] == tl.arange(0, GROUPS)[None, :]


@triton.jit
def gather(values, lane, per_group, GROUPS: tl.constexpr):
    """Sums per group of values per channel."""
    if GROUPS == 1:
        total = tl.zeros([1], values.dtype) + tl.sum(values)
    else:
        total = tl.sum(tl.where(members(lane, per_group, GROUPS), values[:, None], 0.0), axis=0)
    return total


@triton.jit
def gather_tile(tile, lane, per_group, CHANNELS_LAST: tl.constexpr, GROUPS: tl.constexpr):
    """Sums per group of a tile."""
    if GROUPS == 1:
        total = tl.zeros([1], tile.dtype) + tl.sum(tile)
    else:
        total = gather(per_channel(tile, CHANNELS_LAST), lane, per_group, GROUPS)
    return total


@triton.jit
def spread(values, lane, per_group, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """For each channel the value of its group."""
    if GROUPS == 1:
        each = tl.broadcast_to(values, [CHANNELS])
    else:
        each = tl.sum(tl.where(members(lane, per_group, GROUPS), values[None, :], 0.0), axis=1)
    return each


@triton.jit
def load_v(
    x_ptr,
    residual_ptr,
    shift_ptr,
    v_ptr,
    base,
    index,
    mask,
    channel,
    exists,
    scale,
    CHANNELS_LAST: tl.constexpr,
):
    """What is normalised; ``shift_ptr`` has the channel bias of the sample. A sum with a residual is stored."""
    v = tl.load(x_ptr + base + index, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        v = (v + tl.load(residual_ptr + base + index, mask=mask, other=0.0).to(tl.float32)) * scale
        stored = v.to(v_ptr.dtype.element_ty)
        tl.store(v_ptr + base + index, stored, mask=mask)
        v = stored.to(tl.float32)
    if shift_ptr is not None:
        v += across(tl.load(shift_ptr + channel, mask=exists, other=0.0), CHANNELS_LAST)
    return v


@triton.jit
def inverse_deviation(variance, eps):
    variance = tl.where(variance < 0.0, 0.0, variance)  # rounding; NaN stays
    return 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def activate(centred, scale, bias, SWISH: tl.constexpr):
    u = centred * scale + bias
    if SWISH:
        u = u / (1.0 + tl.exp(-u))
    return u


@triton.jit
def inner_gradient(grad, centred, scale, bias, SWISH: tl.constexpr):
    """The gradient with respect to u."""
    if SWISH:
        u = centred * scale + bias
        s = 1.0 / (1.0 + tl.exp(-u))
        grad = grad * s * (1.0 + u * (1.0 - s))
    return grad


@triton.jit
def store_affine(factor_ptr, shift_ptr, row, channel, exists, mean, scale, bias):
    tl.store(factor_ptr + row + channel, scale, mask=exists)
    tl.store(shift_ptr + row + channel, bias - mean * scale, mask=exists)


@triton.jit(do_not_specialize=[*SIZES, "eps", "scale"])
def forward_kernel(
    x_ptr,
    residual_ptr,  # None: v = x
    channel_bias_ptr,  # None: 0
    weight_ptr,
    bias_ptr,
    v_ptr,  # with a residual
    y_ptr,  # None: factor and shift, not y, mean and rstd
    mean_ptr,
    rstd_ptr,
    factor_ptr,
    shift_ptr,
    eps,
    scale,  # of the sum with the residual
    channel_units,
    space_units,
    per_group,
    cell_units,
    splits,  # 1
    blocks,
    parts,  # 1
    per_part,  # 1
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    SPACE_ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index in a sample
):
    """Whole groups in one tile."""
    sample, part, cell, split = place(splits, blocks, parts, CHANNELS_LAST, False)
    channels = channel_units * CHANNEL_ALIGN
    space = space_units.to(INDEX) * SPACE_ALIGN
    per_cell = cell_units * CHANNEL_ALIGN
    row = sample.to(tl.int64) * channels
    base = row * space
    channel, lane, exists = channels_of(cell, split, channels, per_cell, CHANNELS)
    index, mask, _ = elements_of(part, channel, exists, channels, space, CHANNELS_LAST, POSITIONS, INDEX)
    added_ptr = None if channel_bias_ptr is None else channel_bias_ptr + row
    v = load_v(
        x_ptr, residual_ptr, added_ptr, v_ptr, base, index, mask, channel, exists, scale, CHANNELS_LAST
    )
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
    share = 1.0 / (space * per_group).to(tl.float32)
    total = gather_tile(tl.where(mask, v, 0.0), lane, per_group, CHANNELS_LAST, GROUPS)
    pivot = total * share
    centred = v - across(spread(pivot, lane, per_group, GROUPS, CHANNELS), CHANNELS_LAST)
    centred = tl.where(mask, centred, 0.0)
    rest = gather_tile(centred, lane, per_group, CHANNELS_LAST, GROUPS) * share
    squares = gather_tile(centred * centred, lane, per_group, CHANNELS_LAST, GROUPS) * share
    rstd = inverse_deviation(squares - rest * rest, eps)
    factor = weight * spread(rstd, lane, per_group, GROUPS, CHANNELS)
    if y_ptr is None:
        mean = spread(pivot + rest, lane, per_group, GROUPS, CHANNELS)
        store_affine(factor_ptr, shift_ptr, row, channel, exists, mean, factor, bias)
    else:
        group, is_group = groups_of(cell, channels, per_group, per_cell, GROUPS)
        group += sample * (channels // per_group)
        tl.store(mean_ptr + group, pivot + rest, mask=is_group)
        tl.store(rstd_ptr + group, rstd, mask=is_group)
        centred -= across(spread(rest, lane, per_group, GROUPS, CHANNELS), CHANNELS_LAST)
        y = activate(centred, across(factor, CHANNELS_LAST), across(bias, CHANNELS_LAST), SWISH)
        store(y_ptr + base + index, y, mask)


@triton.jit(do_not_specialize=[*SIZES, "scale"])
def statistics_kernel(
    x_ptr,
    residual_ptr,  # None: v = x
    channel_bias_ptr,  # None: 0
    v_ptr,  # with a residual
    partial_ptr,  # (3, N G, pieces), float64: elements, mean, sum of squared distances from it
    scale,
    channel_units,
    space_units,
    per_group,
    cell_units,
    splits,
    blocks,
    parts,
    per_part,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    SPACE_ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, part, cell, split = place(splits, blocks, parts, CHANNELS_LAST, False)
    channels = channel_units * CHANNEL_ALIGN
    space = space_units.to(INDEX) * SPACE_ALIGN
    per_cell = cell_units * CHANNEL_ALIGN
    row = sample.to(tl.int64) * channels
    base = row * space
    channel, lane, exists = channels_of(cell, split, channels, per_cell, CHANNELS)
    added_ptr = None if channel_bias_ptr is None else channel_bias_ptr + row
    first = part * per_part
    index, mask, positions = elements_of(
        first, channel, exists, channels, space, CHANNELS_LAST, POSITIONS, INDEX
    )
    v = load_v(
        x_ptr, residual_ptr, added_ptr, v_ptr, base, index, mask, channel, exists, scale, CHANNELS_LAST
    )
    in_group = tl.minimum(per_group - split * CHANNELS, CHANNELS)
    n = (positions * in_group).to(tl.float32)
    pivot = gather_tile(tl.where(mask, v, 0.0), lane, per_group, CHANNELS_LAST, GROUPS) / n
    about = across(spread(pivot, lane, per_group, GROUPS, CHANNELS), CHANNELS_LAST)
    once = tl.where(mask, v - about, 0.0)
    squared = once * once
    end = tl.minimum(first + per_part, tl.cdiv(space, POSITIONS).to(tl.int32))
    for tile in range(first + 1, end):
        index, mask, more = elements_of(
            tile, channel, exists, channels, space, CHANNELS_LAST, POSITIONS, INDEX
        )
        v = load_v(
            x_ptr, residual_ptr, added_ptr, v_ptr, base, index, mask, channel, exists, scale, CHANNELS_LAST
        )
        difference = tl.where(mask, v - about, 0.0)
        once += difference
        squared += difference * difference
        positions += more
    count = tl.zeros([GROUPS], tl.float64) + (positions * in_group).to(tl.float64)
    total = gather_tile(once, lane, per_group, CHANNELS_LAST, GROUPS).to(tl.float64)
    m2 = gather_tile(squared, lane, per_group, CHANNELS_LAST, GROUPS).to(tl.float64)
    group, is_group = groups_of(cell, channels, per_group, per_cell, GROUPS)
    pieces = parts * splits
    groups = channels // per_group
    at = (sample * groups + group).to(tl.int64) * pieces + (part * splits + split)
    between = (tl.num_programs(0) // (blocks * parts)).to(tl.int64) * groups * pieces
    tl.store(partial_ptr + at, count, mask=is_group)
    tl.store(partial_ptr + between + at, pivot.to(tl.float64) + total / count, mask=is_group)
    tl.store(partial_ptr + 2 * between + at, m2 - total * total / count, mask=is_group)


@triton.jit
def combine_moments(partial_ptr, at, between, is_group, pieces, PIECES: tl.constexpr):
    """(mean, variance) of groups, float64, from their pieces at ``at``."""
    pivot = tl.load(partial_ptr + between + at, mask=is_group, other=0.0)
    n = tl.zeros([at.shape[0], PIECES], tl.float64)
    first = tl.zeros([at.shape[0], PIECES], tl.float64)
    second = tl.zeros([at.shape[0], PIECES], tl.float64)
    for begin in range(0, pieces, PIECES):
        piece = begin + tl.arange(0, PIECES)
        here = partial_ptr + (at[:, None] + piece[None, :])
        mask = is_group[:, None] & (piece < pieces)[None, :]
        count = tl.load(here, mask=mask, other=0.0)
        distance = tl.load(here + between, mask=mask, other=0.0) - pivot[:, None]
        m2 = tl.load(here + 2 * between, mask=mask, other=0.0)
        n += count
        first += count * distance
        second += tl.where(mask, m2 + count * distance * distance, 0.0)
    count = tl.maximum(tl.sum(n, axis=1), 1.0)
    rest = tl.sum(first, axis=1) / count
    return pivot + rest, tl.sum(second, axis=1) / count - rest * rest


@triton.jit(do_not_specialize=[*SIZES, "eps", "pieces"])
def apply_kernel(
    x_ptr,  # x, or v
    channel_bias_ptr,  # None: 0
    weight_ptr,
    bias_ptr,
    partial_ptr,  # of statistics_kernel
    y_ptr,  # None: factor and shift, not y, mean and rstd
    mean_ptr,
    rstd_ptr,
    factor_ptr,
    shift_ptr,
    eps,
    pieces,
    channel_units,
    space_units,
    per_group,
    cell_units,
    splits,
    blocks,
    parts,
    per_part,  # 1
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    SPACE_ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PIECES: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, part, cell, split = place(splits, blocks, parts, CHANNELS_LAST, True)
    channels = channel_units * CHANNEL_ALIGN
    space = space_units.to(INDEX) * SPACE_ALIGN
    per_cell = cell_units * CHANNEL_ALIGN
    row = sample.to(tl.int64) * channels
    base = row * space
    channel, lane, exists = channels_of(cell, split, channels, per_cell, CHANNELS)
    index, mask, _ = elements_of(part, channel, exists, channels, space, CHANNELS_LAST, POSITIONS, INDEX)
    if y_ptr is not None:
        # Before all that is combined, so as not to wait for it.
        added_ptr = None if channel_bias_ptr is None else channel_bias_ptr + row
        v = load_v(x_ptr, None, added_ptr, None, base, index, mask, channel, exists, 1.0, CHANNELS_LAST)
    group, is_group = groups_of(cell, channels, per_group, per_cell, GROUPS)
    groups = channels // per_group
    group += sample * groups
    between = (tl.num_programs(0) // (blocks * parts)).to(tl.int64) * groups * pieces
    mean, variance = combine_moments(
        partial_ptr, group.to(tl.int64) * pieces, between, is_group, pieces, PIECES
    )
    rstd = inverse_deviation(variance.to(tl.float32), eps)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
    factor = weight * spread(rstd, lane, per_group, GROUPS, CHANNELS)
    highs = spread(high, lane, per_group, GROUPS, CHANNELS)
    if y_ptr is None:
        store_affine(factor_ptr, shift_ptr, row, channel, exists, highs, factor, bias)
    else:
        if (part == 0) & (split == 0):
            tl.store(mean_ptr + group, high, mask=is_group)
            tl.store(rstd_ptr + group, rstd, mask=is_group)
        lows = spread(low, lane, per_group, GROUPS, CHANNELS)
        centred = v - across(highs, CHANNELS_LAST) - across(lows, CHANNELS_LAST)
        y = activate(centred, across(factor, CHANNELS_LAST), across(bias, CHANNELS_LAST), SWISH)
        store(y_ptr + base + index, y, mask)


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, sample, cell, channels, per_group, per_cell, lane, exists):
    """For each channel mean and rstd of its group."""
    group = sample * (channels // per_group) + cell * (per_cell // per_group) + lane // per_group
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)
    return mean, tl.load(rstd_ptr + group, mask=exists, other=0.0)


@triton.jit
def store_gradient(grad_x_ptr, grad_v_ptr, base, index, mask, result, scale):
    """Adds the gradient that v has of its own; ``scale`` is that of the sum with the residual."""
    if grad_v_ptr is not None:
        result += tl.load(grad_v_ptr + base + index, mask=mask, other=0.0).to(tl.float32)
    store(grad_x_ptr + base + index, result * scale, mask)


@triton.jit(do_not_specialize=[*SIZES, "scale"])
def backward_kernel(
    grad_ptr,
    x_ptr,  # x, or v
    channel_bias_ptr,  # None: 0
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    grad_v_ptr,  # None: 0
    grad_x_ptr,
    of_weight_ptr,  # (N, C), to be summed over the samples
    of_bias_ptr,
    grad_channel_ptr,  # with a channel bias
    scale,
    channel_units,
    space_units,
    per_group,
    cell_units,
    splits,  # 1
    blocks,
    parts,  # 1
    per_part,  # 1
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    SPACE_ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Whole groups in one tile."""
    sample, part, cell, split = place(splits, blocks, parts, CHANNELS_LAST, False)
    channels = channel_units * CHANNEL_ALIGN
    space = space_units.to(INDEX) * SPACE_ALIGN
    per_cell = cell_units * CHANNEL_ALIGN
    row = sample.to(tl.int64) * channels
    base = row * space
    channel, lane, exists = channels_of(cell, split, channels, per_cell, CHANNELS)
    index, mask, _ = elements_of(part, channel, exists, channels, space, CHANNELS_LAST, POSITIONS, INDEX)
    grad = tl.load(grad_ptr + base + index, mask=mask, other=0.0).to(tl.float32)
    added_ptr = None if channel_bias_ptr is None else channel_bias_ptr + row
    v = load_v(x_ptr, None, added_ptr, None, base, index, mask, channel, exists, 1.0, CHANNELS_LAST)
    mean, rstd = load_statistics(
        mean_ptr, rstd_ptr, sample, cell, channels, per_group, per_cell, lane, exists
    )
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
    factor = weight * rstd
    centred = tl.where(mask, v - across(mean, CHANNELS_LAST), 0.0)
    d = inner_gradient(grad, centred, across(factor, CHANNELS_LAST), across(bias, CHANNELS_LAST), SWISH)
    sums = per_channel(d, CHANNELS_LAST)
    products = per_channel(d * centred, CHANNELS_LAST) * rstd
    tl.store(of_bias_ptr + row + channel, sums, mask=exists)
    tl.store(of_weight_ptr + row + channel, products, mask=exists)
    share = 1.0 / (space * per_group).to(tl.float32)
    a = spread(gather(weight * sums, lane, per_group, GROUPS), lane, per_group, GROUPS, CHANNELS)
    b = spread(gather(weight * products, lane, per_group, GROUPS), lane, per_group, GROUPS, CHANNELS)
    offset = -rstd * a * share
    slope = -rstd * rstd * b * share
    if grad_channel_ptr is not None:
        distances = per_channel(centred, CHANNELS_LAST)
        of_channel = factor * sums + slope * distances + offset * space.to(tl.float32)
        tl.store(grad_channel_ptr + row + channel, of_channel, mask=exists)
    result = across(factor, CHANNELS_LAST) * d
    result += across(slope, CHANNELS_LAST) * centred + across(offset, CHANNELS_LAST)
    store_gradient(grad_x_ptr, grad_v_ptr, base, index, mask, result, scale)


@triton.jit(do_not_specialize=SIZES)
def backward_reduce_kernel(
    grad_ptr,
    x_ptr,
    channel_bias_ptr,  # None: 0
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    of_weight_ptr,  # (N parts, C), to be summed over all of them
    of_bias_ptr,
    distances_ptr,  # the same, with a channel bias: sums of v - mean
    partial_ptr,  # (2, N G, pieces): A and B
    channel_units,
    space_units,
    per_group,
    cell_units,
    splits,
    blocks,
    parts,
    per_part,
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    SPACE_ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, part, cell, split = place(splits, blocks, parts, CHANNELS_LAST, False)
    channels = channel_units * CHANNEL_ALIGN
    space = space_units.to(INDEX) * SPACE_ALIGN
    per_cell = cell_units * CHANNEL_ALIGN
    row = sample.to(tl.int64) * channels
    base = row * space
    channel, lane, exists = channels_of(cell, split, channels, per_cell, CHANNELS)
    added_ptr = None if channel_bias_ptr is None else channel_bias_ptr + row
    mean, rstd = load_statistics(
        mean_ptr, rstd_ptr, sample, cell, channels, per_group, per_cell, lane, exists
    )
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0)
    bias = across(tl.load(bias_ptr + channel, mask=exists, other=0.0), CHANNELS_LAST)
    factor = across(weight * rstd, CHANNELS_LAST)
    means = across(mean, CHANNELS_LAST)
    if CHANNELS_LAST:
        sums = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    else:
        sums = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    products = sums
    distances = sums
    first = part * per_part
    end = tl.minimum(first + per_part, tl.cdiv(space, POSITIONS).to(tl.int32))
    for tile in range(first, end):
        index, mask, _ = elements_of(tile, channel, exists, channels, space, CHANNELS_LAST, POSITIONS, INDEX)
        grad = tl.load(grad_ptr + base + index, mask=mask, other=0.0).to(tl.float32)
        v = load_v(x_ptr, None, added_ptr, None, base, index, mask, channel, exists, 1.0, CHANNELS_LAST)
        centred = tl.where(mask, v - means, 0.0)
        d = inner_gradient(grad, centred, factor, bias, SWISH)
        sums += d
        products += d * centred
        if distances_ptr is not None:
            distances += centred
    of_bias = per_channel(sums, CHANNELS_LAST)
    of_weight = per_channel(products, CHANNELS_LAST) * rstd
    to = (sample * parts + part).to(tl.int64) * channels + channel
    tl.store(of_bias_ptr + to, of_bias, mask=exists)
    tl.store(of_weight_ptr + to, of_weight, mask=exists)
    if distances_ptr is not None:
        tl.store(distances_ptr + to, per_channel(distances, CHANNELS_LAST), mask=exists)
    group, is_group = groups_of(cell, channels, per_group, per_cell, GROUPS)
    pieces = parts * splits
    groups = channels // per_group
    at = (sample * groups + group).to(tl.int64) * pieces + (part * splits + split)
    between = (tl.num_programs(0) // (blocks * parts)).to(tl.int64) * groups * pieces
    tl.store(partial_ptr + at, gather(weight * of_bias, lane, per_group, GROUPS), mask=is_group)
    tl.store(partial_ptr + between + at, gather(weight * of_weight, lane, per_group, GROUPS), mask=is_group)


@triton.jit
def combine_sums(partial_ptr, at, is_group, pieces, PIECES: tl.constexpr):
    total = tl.zeros([at.shape[0], PIECES], tl.float32)
    for begin in range(0, pieces, PIECES):
        piece = begin + tl.arange(0, PIECES)
        mask = is_group[:, None] & (piece < pieces)[None, :]
        total += tl.load(partial_ptr + (at[:, None] + piece[None, :]), mask=mask, other=0.0)
    return tl.sum(total, axis=1)


@triton.jit
def sum_rows(ptr, rows, channel, exists, channels, ROWS: tl.constexpr):
    """Sums of the first ``rows`` rows of a tensor of ``channels`` columns."""
    row = tl.arange(0, ROWS)
    at = ptr + (row.to(tl.int64)[:, None] * channels + channel[None, :])
    return tl.sum(tl.load(at, mask=(row < rows)[:, None] & exists[None, :], other=0.0), axis=0)


@triton.jit(do_not_specialize=[*SIZES, "scale", "pieces", "rows"])
def backward_apply_kernel(
    grad_ptr,
    x_ptr,
    channel_bias_ptr,  # None: 0
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    grad_v_ptr,  # None: 0
    of_bias_ptr,  # with a channel bias: what backward_reduce_kernel left
    distances_ptr,
    partial_ptr,
    grad_x_ptr,
    grad_channel_ptr,  # with a channel bias
    scale,
    pieces,
    rows,  # of a sample in of_bias
    channel_units,
    space_units,
    per_group,
    cell_units,
    splits,
    blocks,
    parts,
    per_part,  # 1
    SWISH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    SPACE_ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, part, cell, split = place(splits, blocks, parts, CHANNELS_LAST, True)
    channels = channel_units * CHANNEL_ALIGN
    space = space_units.to(INDEX) * SPACE_ALIGN
    per_cell = cell_units * CHANNEL_ALIGN
    row = sample.to(tl.int64) * channels
    base = row * space
    channel, lane, exists = channels_of(cell, split, channels, per_cell, CHANNELS)
    index, mask, _ = elements_of(part, channel, exists, channels, space, CHANNELS_LAST, POSITIONS, INDEX)
    grad = tl.load(grad_ptr + base + index, mask=mask, other=0.0).to(tl.float32)
    added_ptr = None if channel_bias_ptr is None else channel_bias_ptr + row
    v = load_v(x_ptr, None, added_ptr, None, base, index, mask, channel, exists, 1.0, CHANNELS_LAST)
    mean, rstd = load_statistics(
        mean_ptr, rstd_ptr, sample, cell, channels, per_group, per_cell, lane, exists
    )
    factor = tl.load(weight_ptr + channel, mask=exists, other=0.0) * rstd
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0)
    group, is_group = groups_of(cell, channels, per_group, per_cell, GROUPS)
    groups = channels // per_group
    at = (sample * groups + group).to(tl.int64) * pieces
    between = (tl.num_programs(0) // (blocks * parts)).to(tl.int64) * groups * pieces
    a = combine_sums(partial_ptr, at, is_group, pieces, PIECES)
    b = combine_sums(partial_ptr + between, at, is_group, pieces, PIECES)
    share = 1.0 / (space * per_group).to(tl.float32)
    offset = -rstd * spread(a, lane, per_group, GROUPS, CHANNELS) * share
    slope = -rstd * rstd * spread(b, lane, per_group, GROUPS, CHANNELS) * share
    if grad_channel_ptr is not None:  # noqa: SIM102 - the compiler leaves out what is in here, else
        if part == 0:
            sums = sum_rows(of_bias_ptr + row * rows, rows, channel, exists, channels, ROWS)
            distances = sum_rows(distances_ptr + row * rows, rows, channel, exists, channels, ROWS)
            of_channel = factor * sums + slope * distances + offset * space.to(tl.float32)
            tl.store(grad_channel_ptr + row + channel, of_channel, mask=exists)
    centred = v - across(mean, CHANNELS_LAST)
    d = inner_gradient(grad, centred, across(factor, CHANNELS_LAST), across(bias, CHANNELS_LAST), SWISH)
    result = across(factor, CHANNELS_LAST) * d
    result += across(slope, CHANNELS_LAST) * centred + across(offset, CHANNELS_LAST)
    store_gradient(grad_x_ptr, grad_v_ptr, base, index, mask, result, scale)


@triton.jit(do_not_specialize=["rows", "channels"])
def parameters_kernel(
    of_weight_ptr,  # (rows, C)
    of_bias_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    rows,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of weight and bias of BLOCK channels."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        at = row.to(tl.int64) * channels + channel
        mask = (row < rows) & (channel < channels)
        of_weight += tl.load(of_weight_ptr + at, mask=mask, other=0.0)
        of_bias += tl.load(of_bias_ptr + at, mask=mask, other=0.0)
    exists = channel < channels
    tl.store(grad_weight_ptr + channel, tl.sum(of_weight, axis=0, keep_dims=True), mask=exists)
    tl.store(grad_bias_ptr + channel, tl.sum(of_bias, axis=0, keep_dims=True), mask=exists)


# --- How a call is cut into programs: functions of the shape alone ----------------------------------------------------

WHOLE = 16384
"""Elements of a tile in registers, up to which one program does whole groups; half as many backward."""

ALONE = 2048
"""The same where there are fewer of them than MANY, too few to be at work on every multiprocessor."""
MANY = 128

TILES = (2048, 1024, 512)
"""Elements of a tile of two launches: the most that give SPREAD tiles, else the least."""
SPREAD = 512

PROGRAMS = 1024
"""Programs of the first of two launches, up to which each has one tile: enough for the largest GPUs."""
PIECES = 32
"""Most parts of a group along its positions: every program of the second launch combines them."""

WIDTH_BYTES = 128
"""channels_last: bytes side by side in a tile of two launches; half of it or a quarter in one of whole groups."""


def cut(channels: int, per_group: int, widths: Sequence[int]) -> tuple[int, int, int]:
    """(channels of a tile, groups of a cell, tiles of a cell): the first of the widths that leaves at most 1/8 of the
    lanes idle, else the one that leaves fewest."""
    best = None
    for width in widths:
        groups = max(1, min(width, channels) // per_group)
        splits = math.ceil(per_group / width)
        lanes = math.ceil(channels / (groups * per_group)) * splits * width
        if best is None or lanes < best[0]:
            best = lanes, (width, groups, splits)
        if lanes * 7 <= channels * 8:
            return width, groups, splits
    assert best is not None
    return best[1]


Plan = tuple[tuple[int], dict[str, int], dict[str, Any]]


@functools.lru_cache(maxsize=1024)
def whole_tile(
    samples: int, channels: int, groups: int, space: int, inner: bool, itemsize: int, backward: bool
) -> tuple[int, int] | None:
    """(channels of a tile, groups of a cell) where one launch does everything, else None."""
    per_group = channels // groups
    narrowest = triton.next_power_of_2(per_group)
    for bytes_ in (WIDTH_BYTES // 2, WIDTH_BYTES // 4) if inner else (0,):
        width = max(narrowest, min(triton.next_power_of_2(channels), bytes_ // itemsize))
        cell = min(width // per_group, groups) if inner else 1
        programs = samples * triton.cdiv(groups, cell)
        most = (WHOLE // 2 if backward else WHOLE) if programs >= MANY else ALONE
        if width * triton.next_power_of_2(space) <= most:
            return width, cell
    return None


@functools.lru_cache(maxsize=1024)
def plan(samples: int, channels: int, groups: int, space: int, inner: bool, itemsize: int, part: str) -> Plan:
    """(grid, sizes, options) of a kernel for ``part``: "forward" or "backward" of whole groups, or of two launches
    "reduce" or "apply"."""
    per_group = channels // groups
    whole = None
    if part in ("forward", "backward"):
        whole = whole_tile(samples, channels, groups, space, inner, itemsize, part == "backward")
    if whole is not None:
        width, cell = whole
        positions, splits = triton.next_power_of_2(space), 1
    else:
        total = samples * channels * space
        tile = next((t for t in TILES if t * SPREAD <= total), TILES[-1])
        if inner:
            most = min(triton.next_power_of_2(channels), WIDTH_BYTES // itemsize)
            width, cell, splits = cut(channels, per_group, [most, 2 * most, max(most // 2, 1)])
            positions = min(triton.next_power_of_2(space), max(1, tile // width))
        else:
            longest = min(triton.next_power_of_2(space), tile)
            positions, _, _ = cut(
                space, 1, [longest >> k for k in range(5) if longest >> k >= 32] or [longest]
            )
            most = min(triton.next_power_of_2(per_group), tile // positions)
            width, cell, splits = cut(per_group, per_group, [most >> k for k in range(4) if most >> k])
    tiles = triton.cdiv(space, positions)
    blocks = triton.cdiv(groups, cell) * splits
    per_part = 1
    if part == "reduce":
        parts = min(tiles, triton.cdiv(PROGRAMS, samples * blocks), max(1, PIECES // splits))
        per_part = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, per_part)
    channel_align = (
        alignment(math.gcd(channels, cell * per_group, width if splits > 1 else 0)) if inner else 1
    )
    space_align = 1 if inner else alignment(space)
    sizes = {
        "channel_units": channels // channel_align,
        "space_units": space // space_align,
        "per_group": per_group,
        "cell_units": cell * per_group // channel_align,
        "splits": splits,
        "blocks": blocks,
        "parts": parts,
        "per_part": per_part,
    }
    elements = width * positions
    options = {
        "CHANNELS_LAST": inner,
        "CHANNEL_ALIGN": channel_align,
        "SPACE_ALIGN": space_align,
        "GROUPS": triton.next_power_of_2(cell),
        "CHANNELS": width,
        "POSITIONS": positions,
        "INDEX": index_type((channels + blocks * width) * tiles * positions),
        # 16 elements per thread where that leaves warps enough to add them up, else 8. Blocks of whole groups must fit
        # twice on a multiprocessor.
        **launch_options(
            max(1, elements // (512 if whole is not None and elements >= 2048 else 256)),
            registers=64 if part == "forward" else 128,
        ),
    }
    return (samples * blocks * parts,), sizes, options


@functools.lru_cache(maxsize=1024)
def plans(
    samples: int, channels: int, groups: int, space: int, inner: bool, itemsize: int, backward: bool
) -> tuple[Plan, ...]:
    """The plans of a call: of one launch, or of two."""
    shape = samples, channels, groups, space, inner, itemsize
    if whole_tile(*shape, backward) is not None:
        return (plan(*shape, "backward" if backward else "forward"),)
    reduce = plan(*shape, "reduce")
    pieces = reduce[1]["parts"] * reduce[1]["splits"]
    grid, sizes, options = plan(*shape, "apply")
    return reduce, (grid, sizes, {**options, "PIECES": min(triton.next_power_of_2(pieces), PIECES)})


def parameters_plan(rows: int, channels: int) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, options) of the sums over samples and parts."""
    block = min(triton.next_power_of_2(channels), 8)
    in_tile = min(triton.next_power_of_2(rows), 512)
    options = {"ROWS": in_tile, "BLOCK": block, **launch_options(max(1, in_tile * block // 512))}
    return (triton.cdiv(channels, block),), options


def shape_of(x: Tensor, groups: int, *others: Tensor) -> tuple[int, int, int, int, bool, int]:
    """What the plans depend on; the other tensors must lie as x does."""
    inner = common_layout(x, *others) if others else channels_last(x)
    samples, channels = x.shape[:2]
    space = x.numel() // (samples * channels)
    return samples, channels, groups, space, inner or space == 1, x.itemsize


# --- The operations ---------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    residual: Tensor | None,
    channel_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: float,
    eps: float,
    swish: bool,
    affine: bool = False,
) -> tuple[Tensor | None, ...]:
    """(v, y, mean, rstd, factor, shift), of which those that nobody wants are None."""
    samples, channels = x.shape[:2]
    v = y = mean = rstd = factor = shift = None
    if affine:
        factor, shift = (weight.new_empty((samples, channels)) for _ in range(2))
    else:
        y = torch.empty_like(x)
        mean, rstd = (weight.new_empty((samples, groups)) for _ in range(2))
        v = None if residual is None else torch.empty_like(x)
    results = v, y, mean, rstd, factor, shift
    if x.numel() == 0:
        return results
    shape = shape_of(x, groups, *(() if residual is None else (residual,)))
    (grid, sizes, options), *second = plans(*shape, False)
    with device_guard(x):
        if not second:
            forward_kernel[grid](
                x,
                residual,
                channel_bias,
                weight,
                bias,
                *results,
                eps,
                scale,
                *sizes.values(),
                SWISH=swish,
                **options,
            )
            return results
        pieces = sizes["parts"] * sizes["splits"]
        partial = x.new_empty((3, samples * groups, pieces), dtype=torch.float64)
        statistics_kernel[grid](x, residual, channel_bias, v, partial, scale, *sizes.values(), **options)
        grid, sizes, options = second[0]
        if affine:
            # One program for each block of channels: positions have no part in it.
            grid, sizes = (grid[0] // sizes["parts"],), {**sizes, "parts": 1}
        apply_kernel[grid](
            x if v is None else v,
            channel_bias,
            weight,
            bias,
            partial,
            *results[1:],
            eps,
            pieces,
            *sizes.values(),
            SWISH=swish,
            **options,
        )
    return results


def _backward(
    grad: Tensor,
    x: Tensor,
    channel_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_v: Tensor | None,
    groups: int,
    scale: float,
    swish: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias and channel bias."""
    samples, channels = x.shape[:2]
    grad_x = torch.empty_like(x)
    grad_channel = None if channel_bias is None else torch.empty_like(channel_bias)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias), grad_channel
    shape = shape_of(x, groups, grad, *(() if grad_v is None else (grad_v,)))
    (grid, sizes, options), *second = plans(*shape, True)
    rows = samples * sizes["parts"]
    of_weight, of_bias = (weight.new_empty((rows, channels)) for _ in range(2))
    saved = grad, x, channel_bias, weight, bias, mean, rstd
    with device_guard(x):
        if not second:
            backward_kernel[grid](
                *saved,
                grad_v,
                grad_x,
                of_weight,
                of_bias,
                grad_channel,
                scale,
                *sizes.values(),
                SWISH=swish,
                **options,
            )
        else:
            pieces = sizes["parts"] * sizes["splits"]
            partial = weight.new_empty((2, samples * groups, pieces))
            distances = None if channel_bias is None else torch.empty_like(of_bias)
            backward_reduce_kernel[grid](
                *saved, of_weight, of_bias, distances, partial, *sizes.values(), SWISH=swish, **options
            )
            in_sample = sizes["parts"]
            grid, sizes, options = second[0]
            backward_apply_kernel[grid](
                *saved,
                grad_v,
                None if channel_bias is None else of_bias,
                distances,
                partial,
                grad_x,
                grad_channel,
                scale,
                pieces,
                in_sample,
                *sizes.values(),
                ROWS=1 if channel_bias is None else triton.next_power_of_2(in_sample),
                SWISH=swish,
                **options,
            )
        if rows == 1:
            return grad_x, of_weight.view(channels), of_bias.view(channels), grad_channel
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        grid, options = parameters_plan(rows, channels)
        parameters_kernel[grid](of_weight, of_bias, grad_weight, grad_bias, rows, channels, **options)
    return grad_x, grad_weight, grad_bias, grad_channel


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    channel_bias: Tensor | None,
    groups: int,
    eps: float,
    swish: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, rstd)`` of ``x + channel_bias``; the statistics are (N, groups), float32.

    Args:
        x: (N, C, *spatial), dense. weight, bias: (C,), float32. channel_bias: (N, C), float32, or None.

    Raises:
        ValueError: x is neither contiguous nor channels_last.
    """
    _, y, mean, rstd, _, _ = _forward(x, None, channel_bias, weight, bias, groups, 1.0, eps, swish)
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    channel_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    swish: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(grad_x, grad_weight, grad_bias, grad_channel)``, the last one (0,) without a channel bias.

    Args:
        grad: like x, in the same memory format. mean, rstd: what :func:`forward` returned.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    grad_x, grad_weight, grad_bias, grad_channel = _backward(
        grad, x, channel_bias, weight, bias, mean, rstd, None, groups, 1.0, swish
    )
    return grad_x, grad_weight, grad_bias, weight.new_empty((0,)) if grad_channel is None else grad_channel


def residual_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: float,
    eps: float,
    swish: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(v, y, mean, rstd)`` of ``v = (x + residual) scale``, as rounded to its dtype.

    Args:
        residual: like x, in the same memory format. The others as in :func:`forward`.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    return _forward(x, residual, None, weight, bias, groups, scale, eps, swish)[:4]


def residual_backward(
    grad_v: Tensor | None,
    grad_y: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    scale: float,
    swish: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(gradient of x and of residual, grad_weight, grad_bias)``; ``grad_v`` None is 0.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    return _backward(grad_y, v, None, weight, bias, mean, rstd, grad_v, groups, scale, swish)[:3]


def affine_forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """``(factor, shift)``, each (N, C), float32: the normalised x is ``x factor + shift``.

    Raises:
        ValueError: x is neither contiguous nor channels_last.
    """
    return _forward(x, None, None, weight, bias, groups, 1.0, eps, False, affine=True)[4:]


def _spec(
    label: str, kernel: Any, options: dict[str, Any], widest: int = 128, **dtypes: torch.dtype
) -> AotSpec:
    """Pointers to the ``dtypes``; the other ones are None."""
    arguments = [name for name in kernel.arg_names if not name.isupper()]
    pointers = {f"{name}_ptr": pointer(dtype) for name, dtype in dtypes.items()}
    numbers = {
        name: "fp32" if name in ("eps", "scale") else "i32" for name in arguments if not name.endswith("_ptr")
    }
    absent = {name: None for name in arguments if name.endswith("_ptr") and name not in pointers}
    return AotSpec(label, kernel, {**pointers, **numbers}, {**absent, **options}, widest)


def _specialisations() -> Iterator[AotSpec]:
    """Blocks of the CIFAR-10 and CelebA-HQ score networks, from groups that one launch does to a single sample in two;
    float16 gives what bfloat16 does."""
    f32, f64 = torch.float32, torch.float64
    # With a channel bias and a residual by turns, so that each is with every plan.
    shapes = {
        "16x16": ((16, 512, 32, 256), True),
        "32x32": ((16, 256, 32, 1024), False),
        "large groups": ((64, 512, 32, 1024), True),
        "one sample": ((1, 768, 32, 1024), False),
        "one sample, residual": ((1, 768, 32, 1024), True),
    }
    parameters = {"weight": f32, "bias": f32}
    statistics = {"mean": f32, "rstd": f32}
    affine = {"factor": f32, "shift": f32, **parameters}
    of_parameters = {"of_weight": f32, "of_bias": f32}
    for dtype in (f32, torch.bfloat16):
        for inner in (False, True):
            for name, (shape, residual) in shapes.items():
                case = f"{short_name(dtype)}, {'channels_last' if inner else 'contiguous'}, {name}"
                summed = {"residual": dtype, "v": dtype} if residual else {"channel_bias": f32}
                y = {"y": dtype, **statistics, **parameters}
                first, *second = plans(*shape, inner, dtype.itemsize, False)
                options = {"SWISH": True, **first[2]}
                if not second:
                    yield _spec(case, forward_kernel, options, x=dtype, **summed, **y)
                    # The stores are a few numbers per program, here and further down.
                    yield _spec(f"{case}, affine", forward_kernel, options, 32, x=dtype, **affine)
                else:
                    widest = 128 if residual else 32
                    yield _spec(case, statistics_kernel, first[2], widest, x=dtype, **summed, partial=f64)
                    options = {"SWISH": True, **second[0][2]}
                    added = {} if residual else summed
                    yield _spec(case, apply_kernel, options, x=dtype, **added, **y, partial=f64)
                    if dtype == f32 and not residual:  # reads none of the elements
                        yield _spec(f"{case}, affine", apply_kernel, options, 32, **affine, partial=f64)
                saved = {"grad": dtype, "x": dtype, **parameters, **statistics}
                of_v = {"grad_v": dtype} if residual else {"channel_bias": f32, "grad_channel": f32}
                first, *second = plans(*shape, inner, dtype.itemsize, True)
                options = {"SWISH": True, **first[2]}
                if not second:
                    yield _spec(
                        case, backward_kernel, options, **saved, grad_x=dtype, **of_parameters, **of_v
                    )
                    continue
                results = {**of_parameters, "partial": f32}
                if not residual:
                    results |= {"channel_bias": f32, "distances": f32}
                    of_v |= {"of_bias": f32, "distances": f32}
                yield _spec(case, backward_reduce_kernel, options, 32, **saved, **results)
                rows = 1 if residual else triton.next_power_of_2(first[1]["parts"])
                options = {"SWISH": True, "ROWS": rows, **second[0][2]}
                yield _spec(case, backward_apply_kernel, options, **saved, grad_x=dtype, partial=f32, **of_v)
    for rows, channels in ((64, 512), (1024, 768)):
        _, options = parameters_plan(rows, channels)
        yield _spec(
            f"{rows} rows", parameters_kernel, options, 32, **of_parameters, grad_weight=f32, grad_bias=f32
        )


AOT = list(_specialisations())
