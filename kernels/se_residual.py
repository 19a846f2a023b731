"""Triton kernels of ``se_residual``: ``skip + scale gate x`` with a gate per sample and channel made from x's means.

Forward reads x once for the means, then x and skip for the result; backward reads grad and x once for the sums of
their product, then grad for the gradient of x. In between stand two products of tiny matrices per sample, in one
program each: :func:`gate_kernel` also sums over the positions, of x itself where a sample is small, else of the
partial sums that :func:`reduce_kernel` leaves, which are a tensor (N, pieces, C) in the channels_last order, or that
what made x left (:func:`pooled_forward`). Sums are in a fixed order, without atomics: the result is the same in every
run. Arithmetic is in float32.

``state`` and ``deltas`` hold, per sample, one value per channel twice and one per hidden unit: the gate, the means and
the hidden units; and the gradients of the gate before its sigmoid, of x by way of the means, and of the hidden units
before their relu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._channelwise import forward_plan, load_channels, locate
from lsgm_fast.kernels._common import (
    AotSpec,
    alignment,
    channels_last,
    common_layout,
    device_guard,
    index_type,
    launch_options,
    mixing,
    pointer,
    short_name,
    store,
    warps,
)


@triton.jit
def channel_sums(
    x_ptr,  # of one sample, as grad_ptr
    grad_ptr,  # None: sums of x, else of the product
    channel,
    channels,
    first,
    space,
    inner,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SPACE: tl.constexpr,
    TILES: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Per channel, the sums over the positions from ``first`` on of TILES tiles (beyond ``space`` there are none)."""
    total = tl.zeros([BLOCK_CHANNELS, BLOCK_SPACE], tl.float32)
    for i in range(TILES):
        position = first + i * BLOCK_SPACE + tl.arange(0, BLOCK_SPACE).to(INDEX)
        mask = (channel < channels)[:, None] & (position < space)[None, :]
        if CHANNELS_LAST:
            index = channel[:, None] + position[None, :] * inner
        else:
            index = channel.to(INDEX)[:, None] * inner + position[None, :]
        term = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        if grad_ptr is not None:
            term *= tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
        total += term
    return tl.sum(total, axis=1)


# Specialising on the values of sizes would compile anew for almost every shape; ALIGN says what is needed.
@triton.jit(do_not_specialize=["outer", "inner_units", "pieces"])
def reduce_kernel(
    x_ptr,
    grad_ptr,  # None: sums of x, else of the product
    partial_ptr,  # (N, pieces, C)
    outer,  # number of channels (contiguous) or positions (channels_last)
    inner_units,  # the other of the two / ALIGN
    pieces,  # programs per sample and block of channels
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SPACE: tl.constexpr,
    TILES: tl.constexpr,  # per program
    INDEX: tl.constexpr,  # integer type of an index inside one sample
):
    program = tl.program_id(0)
    inner = inner_units.to(INDEX) * ALIGN
    outer = outer.to(INDEX)
    if CHANNELS_LAST:
        channels = inner
        space = outer
    else:
        channels = outer
        space = inner
    sample = program // pieces
    first = (program - sample * pieces).to(INDEX) * (TILES * BLOCK_SPACE)
    base = sample.to(tl.int64) * (channels * space)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    total = channel_sums(
        x_ptr + base,
        None if grad_ptr is None else grad_ptr + base,
        channel,
        channels,
        first,
        space,
        inner,
        CHANNELS_LAST,
        BLOCK_CHANNELS,
        BLOCK_SPACE,
        TILES,
        INDEX,
    )
    tl.store(partial_ptr + program.to(tl.int64) * channels + channel, total, mask=channel < channels)


@triton.jit(do_not_specialize=["positions", "hidden_units", "outer", "inner_units"])
def gate_kernel(
    x_ptr,  # or partial sums
    reduce_weight_ptr,
    reduce_bias_ptr,
    expand_weight_ptr,
    expand_bias_ptr,
    state_ptr,
    positions,  # that the sums are of
    hidden_units,
    outer,  # as in reduce_kernel
    inner_units,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SPACE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    TILES: tl.constexpr,  # all of them
):
    sample = tl.program_id(0).to(tl.int64)
    inner = inner_units * ALIGN
    if CHANNELS_LAST:
        channels = inner
        space = outer
    else:
        channels = outer
        space = inner
    state_ptr += sample * (2 * channels + hidden_units)
    unit = tl.arange(0, BLOCK_HIDDEN)
    products = tl.zeros([BLOCK_CHANNELS, BLOCK_HIDDEN], tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        total = channel_sums(
            x_ptr + sample * (channels * space),
            None,
            channel,
            channels,
            0,
            space,
            inner,
            CHANNELS_LAST,
            BLOCK_CHANNELS,
            BLOCK_SPACE,
            TILES,
            tl.int32,
        )
        pooled = total / positions.to(tl.float32)
        tl.store(state_ptr + channels + channel, pooled, mask=channel < channels)
        mask = (channel < channels)[:, None] & (unit < hidden_units)[None, :]
        weight = tl.load(
            reduce_weight_ptr + unit[None, :] * channels + channel[:, None], mask=mask, other=0.0
        )
        products += weight * pooled[:, None]
    unit_bias = tl.load(reduce_bias_ptr + unit, mask=unit < hidden_units, other=0.0)
    hidden = tl.sum(products, axis=0) + unit_bias
    hidden = tl.where(hidden < 0.0, 0.0, hidden)  # NaN stays
    tl.store(state_ptr + 2 * channels + unit, hidden, mask=unit < hidden_units)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = (channel < channels)[:, None] & (unit < hidden_units)[None, :]
        weight = tl.load(
            expand_weight_ptr + channel[:, None] * hidden_units + unit[None, :], mask=mask, other=0.0
        )
        bias = tl.load(expand_bias_ptr + channel, mask=channel < channels, other=0.0)
        gate, _ = mixing(tl.sum(weight * hidden[None, :], axis=1) + bias)
        tl.store(state_ptr + channel, gate, mask=channel < channels)


@triton.jit(do_not_specialize=["scale", "positions", "hidden_units", "outer", "inner_units"])
def gate_backward_kernel(
    x_ptr,  # or partial sums of the product
    grad_ptr,  # None beside partial sums
    reduce_weight_ptr,
    expand_weight_ptr,
    state_ptr,
    deltas_ptr,
    scale,
    positions,
    hidden_units,
    outer,
    inner_units,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SPACE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    TILES: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    inner = inner_units * ALIGN
    if CHANNELS_LAST:
        channels = inner
        space = outer
    else:
        channels = outer
        space = inner
    state_ptr += sample * (2 * channels + hidden_units)
    deltas_ptr += sample * (2 * channels + hidden_units)
    base = sample * (channels * space)
    unit = tl.arange(0, BLOCK_HIDDEN)
    products = tl.zeros([BLOCK_CHANNELS, BLOCK_HIDDEN], tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        total = channel_sums(
            x_ptr + base,
            None if grad_ptr is None else grad_ptr + base,
            channel,
            channels,
            0,
            space,
            inner,
            CHANNELS_LAST,
            BLOCK_CHANNELS,
            BLOCK_SPACE,
            TILES,
            tl.int32,
        )
        gate = tl.load(state_ptr + channel, mask=channel < channels, other=0.0)
        delta = scale * total * (gate * (1.0 - gate))
        tl.store(deltas_ptr + channel, delta, mask=channel < channels)
        mask = (channel < channels)[:, None] & (unit < hidden_units)[None, :]
        weight = tl.load(
            expand_weight_ptr + channel[:, None] * hidden_units + unit[None, :], mask=mask, other=0.0
        )
        products += weight * delta[:, None]
    hidden = tl.load(state_ptr + 2 * channels + unit, mask=unit < hidden_units, other=0.0)
    of_hidden = tl.where(hidden <= 0.0, 0.0, tl.sum(products, axis=0))
    tl.store(deltas_ptr + 2 * channels + unit, of_hidden, mask=unit < hidden_units)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = (channel < channels)[:, None] & (unit < hidden_units)[None, :]
        weight = tl.load(
            reduce_weight_ptr + unit[None, :] * channels + channel[:, None], mask=mask, other=0.0
        )
        pooled = tl.sum(weight * of_hidden[None, :], axis=1) / positions.to(tl.float32)
        tl.store(deltas_ptr + channels + channel, pooled, mask=channel < channels)


@triton.jit(do_not_specialize=["scale", "channels", "hidden_units", "inner_groups", "sample_units", "blocks"])
def apply_kernel(
    in_ptr,  # x, or the gradient of the result
    skip_ptr,  # None: the offsets of `deltas` take its place
    state_ptr,
    deltas_ptr,
    out_ptr,
    scale,
    channels,
    hidden_units,
    inner_groups,  # positions (contiguous) or channels (channels_last) / GROUP
    sample_units,  # channels x positions / ALIGN
    blocks,  # programs per sample
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,  # neighbours in memory that share a channel, or whose channels are neighbours
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    size = sample_units.to(INDEX) * ALIGN
    sample, group, within = locate(blocks, GROUP, BLOCK, INDEX)
    base = sample * size
    index = group * GROUP + within
    mask = index < size
    values = tl.load(in_ptr + base + index, mask=mask).to(tl.float32)
    here = sample * (2 * channels + hidden_units)
    gate = load_channels(state_ptr + here, group, within, inner_groups, size, GROUP, CHANNELS_LAST)
    if skip_ptr is None:
        added = load_channels(
            deltas_ptr + here + channels, group, within, inner_groups, size, GROUP, CHANNELS_LAST
        )
    else:
        added = tl.load(skip_ptr + base + index, mask=mask).to(tl.float32)
    store(out_ptr + base + index, scale * gate * values + added, mask)


@triton.jit(do_not_specialize=["samples", "channels", "hidden_units"])
def parameters_kernel(
    state_ptr,
    deltas_ptr,
    reduce_weight_ptr,  # gradients, as the following three
    reduce_bias_ptr,
    expand_weight_ptr,
    expand_bias_ptr,
    samples,
    channels,
    hidden_units,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    AT_ONCE: tl.constexpr,  # samples whose loads do not wait for each other
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    unit = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    of_reduce = tl.zeros([BLOCK_CHANNELS, BLOCK_HIDDEN], tl.float32)
    of_expand = tl.zeros([BLOCK_CHANNELS, BLOCK_HIDDEN], tl.float32)
    of_reduce_bias = tl.zeros([BLOCK_HIDDEN], tl.float32)
    of_expand_bias = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for start in range(0, samples, AT_ONCE):
        for k in tl.static_range(AT_ONCE):
            sample = start + k
            here = sample.to(tl.int64) * (2 * channels + hidden_units)
            in_channels = channel < tl.where(sample < samples, channels, 0)
            in_units = unit < tl.where(sample < samples, hidden_units, 0)
            of_gate = tl.load(deltas_ptr + here + channel, mask=in_channels, other=0.0)
            pooled = tl.load(state_ptr + here + channels + channel, mask=in_channels, other=0.0)
            of_hidden = tl.load(deltas_ptr + here + 2 * channels + unit, mask=in_units, other=0.0)
            hidden = tl.load(state_ptr + here + 2 * channels + unit, mask=in_units, other=0.0)
            of_reduce += pooled[:, None] * of_hidden[None, :]
            of_expand += of_gate[:, None] * hidden[None, :]
            of_reduce_bias += of_hidden
            of_expand_bias += of_gate
    mask = (channel < channels)[:, None] & (unit < hidden_units)[None, :]
    tl.store(reduce_weight_ptr + unit[None, :] * channels + channel[:, None], of_reduce, mask=mask)
    tl.store(expand_weight_ptr + channel[:, None] * hidden_units + unit[None, :], of_expand, mask=mask)
    # Every program of the row or column has the same sums.
    if tl.program_id(0) == 0:
        tl.store(reduce_bias_ptr + unit, of_reduce_bias, mask=unit < hidden_units)
    if tl.program_id(1) == 0:
        tl.store(expand_bias_ptr + channel, of_expand_bias, mask=channel < channels)


TILE = 2048
"""Elements that a program of the reduction loads at once."""
MAX_PIECES = 64
"""Most partial sums per sample and channel: one program adds them."""
SMALL_SAMPLE = 16384
"""Elements of a sample up to which one program sums it sooner than a further launch takes."""


def reduce_plan(
    samples: int, channels: int, space: int, channels_inner: bool
) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of the reduction; a function of the shape alone."""
    outer, inner = (space, channels) if channels_inner else (channels, space)
    longest = min(triton.next_power_of_2(inner), TILE // 16 if channels_inner else TILE // 2)
    other = min(triton.next_power_of_2(outer), TILE // longest)
    block_channels, block_space = (longest, other) if channels_inner else (other, longest)
    tiles = triton.next_power_of_2(triton.cdiv(space, block_space))
    tiles = min(tiles, max(4, triton.next_power_of_2(triton.cdiv(space, block_space * MAX_PIECES))))
    pieces = triton.cdiv(space, block_space * tiles)
    align = alignment(inner)
    options = {
        "CHANNELS_LAST": channels_inner,
        "ALIGN": align,
        "BLOCK_CHANNELS": block_channels,
        "BLOCK_SPACE": block_space,
        "TILES": tiles,
        # How far the last program reaches.
        "INDEX": index_type((channels + block_channels) * (space + tiles * block_space)),
        **launch_options(warps(block_channels * block_space)),
    }
    sizes = {"outer": outer, "inner_units": inner // align, "pieces": pieces}
    return (samples * pieces, triton.cdiv(channels, block_channels)), sizes, options


def gate_plan(
    channels: int, space: int, hidden: int, channels_inner: bool
) -> tuple[dict[str, int], dict[str, Any]]:
    """(sizes, options) of the two kernels of the gate, one program per sample."""
    outer, inner = (space, channels) if channels_inner else (channels, space)
    block_hidden = triton.next_power_of_2(hidden)
    block_channels = min(triton.next_power_of_2(channels), max(16, 4096 // max(block_hidden, 32)))
    block_space = min(triton.next_power_of_2(space), 4096 // block_channels)
    align = alignment(inner)
    options = {
        "CHANNELS_LAST": channels_inner,
        "ALIGN": align,
        "BLOCK_CHANNELS": block_channels,
        "BLOCK_SPACE": block_space,
        "BLOCK_HIDDEN": block_hidden,
        "TILES": triton.cdiv(space, block_space),
        **launch_options(max(1, min(8, block_channels * max(block_space, block_hidden) // 256))),
    }
    return {"outer": outer, "inner_units": inner // align}, options


def parameters_plan(channels: int, hidden: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(grid, options) of the gradients of the weights."""
    block_hidden = min(triton.next_power_of_2(hidden), 32)
    block_channels = min(triton.next_power_of_2(channels), 1024 // block_hidden, 64)
    options = {
        "BLOCK_CHANNELS": block_channels,
        "BLOCK_HIDDEN": block_hidden,
        "AT_ONCE": 8,
        **launch_options(max(1, block_channels * block_hidden // 256)),
    }
    return (triton.cdiv(channels, block_channels), triton.cdiv(hidden, block_hidden)), options


def _check_parameters(x: Tensor, reduce_weight: Tensor, expand_weight: Tensor, *others: Tensor) -> int:
    channels, hidden = x.shape[1], reduce_weight.shape[0]
    dense = all(
        t.dtype == torch.float32 and t.is_contiguous() for t in (reduce_weight, expand_weight, *others)
    )
    if reduce_weight.shape != (hidden, channels) or expand_weight.shape != (channels, hidden) or not dense:
        raise ValueError(
            f"weights of shapes {tuple(reduce_weight.shape)} and {tuple(expand_weight.shape)}: "
            f"expected (R, {channels}) and ({channels}, R), contiguous, in float32"
        )
    return hidden


def _sums(x: Tensor, grad: Tensor | None, inner: bool) -> tuple[Tensor, Tensor | None, int, bool]:
    """What the kernels of the gate sum over: (tensor, factor, positions, channels innermost)."""
    samples, channels = x.shape[:2]
    space = x.numel() // (samples * channels)
    if channels * space <= SMALL_SAMPLE:
        return x, grad, space, inner
    grid, sizes, options = reduce_plan(samples, channels, space, inner)
    partial = x.new_empty((samples, sizes["pieces"], channels), dtype=torch.float32)
    reduce_kernel[grid](x, grad, partial, *sizes.values(), **options)
    return partial, None, sizes["pieces"], True


def forward(
    skip: Tensor,
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``(skip + scale gate x, state)``: the result in x's format, and (N, 2 C + R) values for backward.

    Args:
        skip, x: (N, C, H, W), one dense memory format. reduce_weight: (R, C), reduce_bias: (R,), expand_weight: (C, R),
        expand_bias: (C,), in float32.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    inner = common_layout(x, skip)
    _check_parameters(x, reduce_weight, expand_weight, reduce_bias, expand_bias)
    if x.numel() == 0:
        return torch.empty_like(x), reduce_weight.new_empty(
            x.shape[0], 2 * x.shape[1] + reduce_weight.shape[0]
        )
    with device_guard(x):
        summed, _, extent, summed_inner = _sums(x, None, inner)
        return _gate_and_apply(
            skip,
            x,
            summed,
            extent,
            summed_inner,
            reduce_weight,
            reduce_bias,
            expand_weight,
            expand_bias,
            scale,
        )


def pooled_forward(
    skip: Tensor,
    x: Tensor,
    sums: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    scale: float,
) -> Tensor:
    """:func:`forward` without its state, where the sums over the positions exist already.

    Args:
        sums: (N, pieces, C), float32, contiguous, that add up to those of each sample. The others as for
            :func:`forward`; not empty.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    common_layout(x, skip)
    _check_parameters(x, reduce_weight, expand_weight, reduce_bias, expand_bias, sums)
    samples, pieces, channels = sums.shape
    if (samples, channels) != x.shape[:2]:
        raise ValueError(
            f"sums have shape {tuple(sums.shape)}, expected ({x.shape[0]}, pieces, {x.shape[1]}) for x {tuple(x.shape)}"
        )
    with device_guard(x):
        return _gate_and_apply(
            skip, x, sums, pieces, True, reduce_weight, reduce_bias, expand_weight, expand_bias, scale
        )[0]


def _gate_and_apply(
    skip: Tensor,
    x: Tensor,
    summed: Tensor,
    extent: int,
    summed_inner: bool,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(result, state), given what the gate sums over: ``extent`` positions of ``summed``."""
    samples, channels = x.shape[:2]
    hidden = reduce_weight.shape[0]
    space = x.numel() // (samples * channels)
    out = torch.empty_like(x)
    state = reduce_weight.new_empty(samples, 2 * channels + hidden)
    sizes, options = gate_plan(channels, extent, hidden, summed_inner)
    gate_kernel[(samples,)](
        summed,
        reduce_weight,
        reduce_bias,
        expand_weight,
        expand_bias,
        state,
        space,
        hidden,
        *sizes.values(),
        **options,
    )
    grid, sizes, options = forward_plan(samples, channels, space, channels_last(x))
    apply_kernel[grid](x, skip, state, None, out, scale, channels, hidden, *sizes.values(), **options)
    return out, state


def backward(
    grad: Tensor, x: Tensor, reduce_weight: Tensor, expand_weight: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` for x, reduce_weight, reduce_bias, expand_weight and expand_bias.

    Args:
        grad: (N, C, H, W) in x's memory format. state: the second result of :func:`forward`.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    inner = common_layout(x, grad)
    hidden = _check_parameters(x, reduce_weight, expand_weight, state)
    samples, channels = x.shape[:2]
    grad_x = torch.empty_like(x)
    shapes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    if x.numel() == 0:
        return grad_x, *(reduce_weight.new_zeros(shape) for shape in shapes)
    parameters = tuple(reduce_weight.new_empty(shape) for shape in shapes)
    deltas = torch.empty_like(state)
    space = x.numel() // (samples * channels)
    with device_guard(x):
        summed, factor, extent, summed_inner = _sums(x, grad, inner)
        sizes, options = gate_plan(channels, extent, hidden, summed_inner)
        gate_backward_kernel[(samples,)](
            summed,
            factor,
            reduce_weight,
            expand_weight,
            state,
            deltas,
            scale,
            space,
            hidden,
            *sizes.values(),
            **options,
        )
        grid, sizes, options = forward_plan(samples, channels, space, inner)
        apply_kernel[grid](
            grad, None, state, deltas, grad_x, scale, channels, hidden, *sizes.values(), **options
        )
        grid, options = parameters_plan(channels, hidden)
        parameters_kernel[grid](state, deltas, *parameters, samples, channels, hidden, **options)
    return grad_x, *parameters


def _specialisations() -> Iterator[AotSpec]:
    """Cells of the CIFAR-10 and CelebA-HQ configurations: samples that one program sums, and larger ones."""
    f32 = torch.float32
    weights = {"reduce_weight_ptr": pointer(f32), "expand_weight_ptr": pointer(f32)}
    biases = {"reduce_bias_ptr": pointer(f32), "expand_bias_ptr": pointer(f32)}
    memory = {"state_ptr": pointer(f32), "deltas_ptr": pointer(f32)}
    # What these write is a few numbers per channel; their loads are wide.
    few = 32
    for dtype in (f32, torch.bfloat16, torch.float16):
        for inner in (False, True):
            case = f"{short_name(dtype)}, {'channels_last' if inner else 'contiguous'}"
            samples, channels, space, hidden = 16, 128, 256, 8
            _, sizes, options = reduce_plan(samples, channels, space, inner)
            integers = dict.fromkeys(sizes, "i32")
            for product in (False, True):
                pointers = {"x_ptr": pointer(dtype), **({"grad_ptr": pointer(dtype)} if product else {})}
                absent = {} if product else {"grad_ptr": None}
                yield AotSpec(
                    f"{case}, {'g x' if product else 'x'}",
                    reduce_kernel,
                    {**pointers, "partial_ptr": pointer(f32), **integers},
                    {**absent, **options},
                    few,
                )
            for name, extent, kind, last in (("small", 64, dtype, inner), ("partial sums", 4, f32, True)):
                if name != "small" and (dtype != f32 or inner):
                    continue
                sizes, options = gate_plan(channels, extent, hidden, last)
                integers = dict.fromkeys(("positions", "hidden_units", *sizes), "i32")
                label = case if name == "small" else name
                x = {"x_ptr": pointer(kind)}
                yield AotSpec(
                    label,
                    gate_kernel,
                    {**x, **weights, **biases, "state_ptr": pointer(f32), **integers},
                    options,
                    few,
                )
                grad = {"grad_ptr": pointer(kind)} if name == "small" else {}
                yield AotSpec(
                    label,
                    gate_backward_kernel,
                    {**x, **grad, **weights, **memory, "scale": "fp32", **integers},
                    {**options, **({} if grad else {"grad_ptr": None})},
                    few,
                )
            _, sizes, options = forward_plan(samples, channels, space, inner)
            integers = dict.fromkeys(("channels", "hidden_units", *sizes), "i32")
            ends = {"in_ptr": pointer(dtype), "out_ptr": pointer(dtype), "scale": "fp32", **integers}
            yield AotSpec(
                f"{case}, forward",
                apply_kernel,
                {**ends, "skip_ptr": pointer(dtype), "state_ptr": pointer(f32)},
                {"deltas_ptr": None, **options},
            )
            yield AotSpec(
                f"{case}, backward", apply_kernel, {**ends, **memory}, {"skip_ptr": None, **options}
            )
    for channels, hidden in ((64, 4), (512, 32)):
        _, options = parameters_plan(channels, hidden)
        integers = dict.fromkeys(("samples", "channels", "hidden_units"), "i32")
        yield AotSpec(
            f"{channels} channels",
            parameters_kernel,
            {**memory, **weights, **biases, **integers},
            options,
            few,
        )


AOT = list(_specialisations())
