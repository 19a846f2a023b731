"""Triton kernels of ``depthwise_bn_swish``: a 5x5 depthwise convolution, an affine and Swish on either side.

A program has a tile, lines x neighbours in memory: planes x columns (contiguous), or columns of images x channels
(channels_last), and goes down a band of rows. With stride 1 it reads a row of the input once for each of the five taps
along the row, all but the first out of the cache, and adds it to the five rows of the output that it belongs to, whose
sums it carries along. With stride 2 it reads the 25 inputs of each output: of four times as many inputs.

Backward is that of the convolution alone. ``grad_x`` is the same convolution with the kernel turned around (stride 1),
or a sum over the neighbours of the right parity (stride 2). For ``grad_weight`` programs add up chunks of a channel,
which a small kernel combines in a fixed order. No atomics: the result is the same in every run.
"""

# ruff: noqa: RUF005 - Triton knows no starred expressions
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

# Arguments of every kernel that works on tiles. Specialising on their values would compile anew for almost every shape.
SIZES = (
    "samples",
    "channel_units",  # channels / CHANNEL_ALIGN
    "height",
    "width_units",  # width / WIDTH_ALIGN
    "out_height",
    "out_units",  # width of the output / OUT_ALIGN
    "inner_blocks",  # tiles along the columns, or along the channels
    "bands",
    "band_rows",  # of the output
)


@triton.jit
def neighbours(block, WIDTH: tl.constexpr, INDEX: tl.constexpr):
    return tl.cast(block, INDEX) * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def lines_of(group, LINES: tl.constexpr, INDEX: tl.constexpr):
    return tl.cast(group, INDEX) * LINES + tl.arange(0, LINES)[:, None]


@triton.jit
def row_of(k, INDEX: tl.constexpr):
    # Not a scalar: the interpreter cannot combine the comparison of one with a mask.
    return tl.cast(k, INDEX) + tl.zeros([1, 1], INDEX)


@triton.jit
def tile_of(
    group,
    block,
    samples,
    channels,
    columns,
    CHANNELS_LAST: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    """(image, column, channel, mask) of a tile's elements. An image has its own rows: it is a plane, or a sample."""
    line = lines_of(group, LINES, INDEX)
    inner = neighbours(block, WIDTH, INDEX)
    if CHANNELS_LAST:
        image = line // columns
        column = line - image * columns
        channel = inner
        mask = (image < samples) & (channel < channels)
    else:
        image = line
        column = inner
        channel = line % channels
        mask = (image < samples * channels) & (column < columns)
    return image, column, channel, mask


@triton.jit
def origin_of(image, column, channel, height, width, channels, CHANNELS_LAST: tl.constexpr):
    """Where row 0 of a tile's columns is."""
    if CHANNELS_LAST:
        at = (image * height * width + column) * channels + channel
    else:
        at = image * height * width + column
    return at


@triton.jit
def pitch_of(channels, CHANNELS_LAST: tl.constexpr):
    """Elements from one column to the next."""
    if CHANNELS_LAST:
        pitch = channels
    else:
        pitch = 1
    return pitch


@triton.jit
def weights_of(weight_ptr, channel, channels, TURNED: tl.constexpr):
    """The 25 weights, or those of the kernel turned around."""
    weights = ()
    for tap in tl.static_range(25):
        place = tap
        if TURNED:
            place = 24 - tap
        weight = tl.load(weight_ptr + channel * 25 + place, mask=channel < channels, other=0.0)
        weights = weights + (weight.to(tl.float32),)
    return weights


@triton.jit
def activate(x, scale, shift):
    u = x * scale + shift
    return u / (1.0 + tl.exp(-u))


@triton.jit
def load_tap(
    x_ptr, origin, row, shift, column, mask, scale, bias, height, width, pitch, ACTIVATED: tl.constexpr
):
    """pre(x) ``shift`` columns beside a tile's, in one row; 0 outside of the image."""
    beside = column + shift
    inside = mask & (beside >= 0) & (beside < width) & (row >= 0) & (row < height)
    x = tl.load(x_ptr + (origin + (row * width + shift) * pitch), mask=inside, other=0.0).to(tl.float32)
    if ACTIVATED:
        # The padding is behind the activation.
        x = tl.where(inside, activate(x, scale, bias), 0.0)
    return x


@triton.jit(do_not_specialize=SIZES)
def convolve_kernel(
    x_ptr,
    weight_ptr,
    pre_scale_ptr,  # these with PRE
    pre_shift_ptr,
    post_scale_ptr,  # these with POST
    post_shift_ptr,
    y_ptr,
    samples,
    channel_units,
    height,
    width_units,
    out_height,
    out_units,
    inner_blocks,
    bands,
    band_rows,
    STRIDE: tl.constexpr,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    TURNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index
):
    pid = tl.program_id(0)
    rest = pid // inner_blocks
    group = rest // bands
    channels = channel_units.to(INDEX) * CHANNEL_ALIGN
    width = width_units.to(INDEX) * WIDTH_ALIGN
    out_width = out_units.to(INDEX) * OUT_ALIGN
    height = height.to(INDEX)
    image, column, channel, mask = tile_of(
        group, pid - rest * inner_blocks, samples, channels, out_width, CHANNELS_LAST, LINES, WIDTH, INDEX
    )
    pitch = pitch_of(channels, CHANNELS_LAST)
    to = origin_of(image, column, channel, out_height.to(INDEX), out_width, channels, CHANNELS_LAST)
    origin = origin_of(image, column * STRIDE, channel, height, width, channels, CHANNELS_LAST)
    w = weights_of(weight_ptr, channel, channels, TURNED)
    scale = 1.0
    shift = 0.0
    if PRE:
        scale = tl.load(pre_scale_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        shift = tl.load(pre_shift_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if POST:
        post_scale = tl.load(post_scale_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        post_shift = tl.load(post_shift_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    first = tl.cast((rest - group * bands) * band_rows, INDEX)
    last = tl.minimum(first + band_rows, out_height)
    if STRIDE == 1:
        zero = tl.zeros([LINES, WIDTH], tl.float32)
        # The sums of rows row - 2 ... row + 1 of the output, so far.
        sums = (zero, zero, zero, zero)
        for k in range(first - 2, last + 2):
            row = row_of(k, INDEX)
            sums = sums + (zero,)
            for b in tl.static_range(5):
                x = load_tap(x_ptr, origin, row, b - 2, column, mask, scale, shift, height, width, pitch, PRE)
                added = ()
                for a in tl.static_range(5):
                    added = added + (sums[a] + w[(4 - a) * 5 + b] * x,)
                sums = added
            y = sums[0]
            if POST:
                y = activate(y, post_scale, post_shift)
            store(y_ptr + (to + (row - 2) * out_width * pitch), y, mask & (row - 2 >= first))
            sums = (sums[1], sums[2], sums[3], sums[4])
    else:
        for k in range(first, last):
            row = row_of(k, INDEX)
            y = tl.zeros([LINES, WIDTH], tl.float32)
            for a in tl.static_range(5):
                for b in tl.static_range(5):
                    x = load_tap(
                        x_ptr,
                        origin,
                        row * STRIDE + (a - 2),
                        b - 2,
                        column * STRIDE,
                        mask,
                        scale,
                        shift,
                        height,
                        width,
                        pitch,
                        PRE,
                    )
                    y += w[a * 5 + b] * x
            if POST:
                y = activate(y, post_scale, post_shift)
            store(y_ptr + (to + row * out_width * pitch), y, mask)


@triton.jit(do_not_specialize=SIZES)
def spread_kernel(
    grad_ptr,
    weight_ptr,
    grad_x_ptr,
    samples,
    channel_units,
    height,
    width_units,
    out_height,
    out_units,
    inner_blocks,
    bands,
    band_rows,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    """grad_x with stride 2, in squares of 2 x 2 that the same nine gradients reach."""
    pid = tl.program_id(0)
    rest = pid // inner_blocks
    group = rest // bands
    block = pid - rest * inner_blocks
    channels = channel_units.to(INDEX) * CHANNEL_ALIGN
    width = width_units.to(INDEX) * WIDTH_ALIGN
    out_width = out_units.to(INDEX) * OUT_ALIGN
    height = height.to(INDEX)
    out_height = out_height.to(INDEX)
    image, column, channel, mask = tile_of(
        group, block, samples, channels, out_width, CHANNELS_LAST, LINES, WIDTH, INDEX
    )
    pitch = pitch_of(channels, CHANNELS_LAST)
    origin = origin_of(image, column, channel, out_height, out_width, channels, CHANNELS_LAST)
    w = weights_of(weight_ptr, channel, channels, False)
    if CHANNELS_LAST:
        to = origin_of(image, column * 2, channel, height, width, channels, CHANNELS_LAST)
        inside = mask
        right = mask & (column * 2 + 1 < width)
    else:
        # Even and odd columns are interleaved before they are stored.
        both = neighbours(block, 2 * WIDTH, INDEX)
        to = origin_of(image, both, channel, height, width, channels, CHANNELS_LAST)
        inside = (image < samples * channels) & (both < width)
    first = tl.cast((rest - group * bands) * band_rows, INDEX)
    for k in range(first, tl.minimum(first + band_rows, out_height)):
        row = row_of(k, INDEX)
        zero = tl.zeros([LINES, WIDTH], tl.float32)
        sums = (zero, zero, zero, zero)  # of even rows the even and the odd columns, then of odd rows
        for i in tl.static_range(3):
            for j in tl.static_range(3):
                grad = load_tap(
                    grad_ptr,
                    origin,
                    row + (i - 1),
                    j - 1,
                    column,
                    mask,
                    1.0,
                    0.0,
                    out_height,
                    out_width,
                    pitch,
                    False,
                )
                added = ()
                for odd in tl.static_range(4):
                    total = sums[odd]
                    # 2 y + a - 2 is the row of grad_x, and so for the columns.
                    if (i > 0 or odd < 2) and (j > 0 or odd % 2 == 0):
                        total += w[(4 - 2 * i + odd // 2) * 5 + 4 - 2 * j + odd % 2] * grad
                    added = added + (total,)
                sums = added
        for odd in tl.static_range(2):
            exists = 2 * row + odd < height
            at = to + (2 * row + odd) * width * pitch
            if CHANNELS_LAST:
                store(grad_x_ptr + at, sums[2 * odd], inside & exists)
                store(grad_x_ptr + (at + pitch), sums[2 * odd + 1], right & exists)
            else:
                store(grad_x_ptr + at, tl.interleave(sums[2 * odd], sums[2 * odd + 1]), inside & exists)


@triton.jit(do_not_specialize=[*SIZES, "channel_blocks", "tiles", "per_program"])
def weight_gradient_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,  # (chunks, C, 25), float64
    samples,
    channel_units,
    height,
    width_units,
    out_height,
    out_units,
    inner_blocks,  # tiles along the columns, or 1
    bands,
    band_rows,
    channel_blocks,  # channels, or tiles along them
    tiles,  # of one block of channels
    per_program,  # tiles
    STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
):
    pid = tl.program_id(0)
    chunk = pid // channel_blocks
    channel_block = pid - chunk * channel_blocks
    channels = channel_units.to(INDEX) * CHANNEL_ALIGN
    width = width_units.to(INDEX) * WIDTH_ALIGN
    out_width = out_units.to(INDEX) * OUT_ALIGN
    height = height.to(INDEX)
    out_height = out_height.to(INDEX)
    pitch = pitch_of(channels, CHANNELS_LAST)
    zero = tl.zeros([LINES, WIDTH], tl.float32)
    sums = ()
    for _ in tl.static_range(25):
        sums = sums + (zero,)
    for tile in range(chunk * per_program, tl.minimum((chunk + 1) * per_program, tiles)):
        rest = tile // inner_blocks
        group = rest // bands
        line = lines_of(group, LINES, INDEX)
        if CHANNELS_LAST:
            channel = neighbours(channel_block, WIDTH, INDEX)
            image = line // out_width
            column = line - image * out_width
            mask = (image < samples) & (channel < channels)
        else:  # lines are samples of one channel
            channel = channel_block + tl.zeros([1, 1], INDEX)
            image = line * channels + channel
            column = neighbours(tile - rest * inner_blocks, WIDTH, INDEX)
            mask = (line < samples) & (column < out_width)
        origin = origin_of(image, column * STRIDE, channel, height, width, channels, CHANNELS_LAST)
        of_grad = origin_of(image, column, channel, out_height, out_width, channels, CHANNELS_LAST)
        first = tl.cast((rest - group * bands) * band_rows, INDEX)
        last = tl.minimum(first + band_rows, out_height)
        if STRIDE == 1:
            # Rows row - 2 ... row + 1 of the band's gradient, 0 outside of it.
            grads = (zero, zero, zero, zero)
            for k in range(first - 2, last + 2):
                row = row_of(k, INDEX)
                at = grad_ptr + (of_grad + (row + 2) * out_width * pitch)
                grads = grads + (tl.load(at, mask=mask & (row + 2 < last), other=0.0).to(tl.float32),)
                xs = ()
                for b in tl.static_range(5):
                    x = load_tap(
                        x_ptr, origin, row, b - 2, column, mask, 1.0, 0.0, height, width, pitch, False
                    )
                    xs = xs + (x,)
                added = ()
                for a in tl.static_range(5):
                    for b in tl.static_range(5):
                        added = added + (sums[a * 5 + b] + grads[4 - a] * xs[b],)
                sums = added
                grads = (grads[1], grads[2], grads[3], grads[4])
        else:
            for k in range(first, last):
                row = row_of(k, INDEX)
                at = grad_ptr + (of_grad + row * out_width * pitch)
                grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                added = ()
                for a in tl.static_range(5):
                    for b in tl.static_range(5):
                        x = load_tap(
                            x_ptr,
                            origin,
                            row * STRIDE + (a - 2),
                            b - 2,
                            column * STRIDE,
                            mask,
                            1.0,
                            0.0,
                            height,
                            width,
                            pitch,
                            False,
                        )
                        added = added + (sums[a * 5 + b] + grad * x,)
                sums = added
    row_of_partials = partial_ptr + chunk.to(tl.int64) * channels * 25
    if CHANNELS_LAST:
        to = neighbours(channel_block, WIDTH, INDEX)
    else:
        to = channel_block + tl.zeros([1, 1], INDEX)
    for tap in tl.static_range(25):
        total = sums[tap]
        if not CHANNELS_LAST:
            total = tl.sum(total, axis=1, keep_dims=True)
        total = tl.sum(total, axis=0, keep_dims=True)
        tl.store(row_of_partials + (to * 25 + tap), total.to(tl.float64), mask=to < channels)


@triton.jit(do_not_specialize=["chunks", "count"])
def combine_kernel(partial_ptr, grad_weight_ptr, chunks, count, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of BLOCK columns of (chunks, count) numbers."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    chunk = tl.arange(0, CHUNKS)[:, None]
    mask = (chunk < chunks) & (column < count)
    parts = tl.load(partial_ptr + (chunk.to(tl.int64) * count + column), mask=mask, other=0.0)
    store(grad_weight_ptr + column, tl.sum(parts, axis=0, keep_dims=True), column < count)


# --- How a call is cut into programs: functions of the shape alone ----------------------------------------------------

TILE = 512
"""Elements of a tile: four per thread. More weights and sums per thread would not fit into its registers."""

SIDE_BY_SIDE = 128
"""Bytes of a line of a tile in channels_last: the longer the line, the fewer columns of a tile share their taps."""

COLUMNS = 128
"""Most columns of a tile of planes."""

PROGRAMS = 4096
"""Programs up to which planes are cut into bands."""

BAND = 8
"""Fewest rows of a band: it reads four more than it writes."""

REDUCING_PROGRAMS = 1024
REDUCING_BAND = 16
"""The same for grad_weight, where every program ends with 25 sums over its tile, and bands are always cut."""

CHUNKS = 1024
"""Most chunks of a channel: one program combines them."""

Images = tuple[int, int, int, int]


def out_size(size: int, stride: int) -> int:
    return (size + stride - 1) // stride


def elements_per_thread(stride: int, inner: bool) -> int:
    """Where channels are neighbours, each element has weights of its own, and with stride 2 all inputs at once."""
    return 2 if inner and stride == 2 else 4


def tile_width(extent: int, most: int) -> int:
    """A power of two that leaves few lanes idle beside ``extent`` neighbours."""
    widths = [min(triton.next_power_of_2(extent), most)]
    while widths[-1] >= 32:
        widths.append(widths[-1] // 2)
    return min(widths, key=lambda width: (triton.cdiv(extent, width) * width * 8 > extent * 9, -width))


def plan(
    shape: Images, stride: int, inner: bool, itemsize: int, reduce: bool = False, per_thread: int = 4
) -> tuple[tuple[int], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of a kernel; ``reduce``: of the one that makes grad_weight."""
    samples, channels, height, width = shape
    out_height, out_width = out_size(height, stride), out_size(width, stride)
    extent, most = (channels, SIDE_BY_SIDE // itemsize) if inner else (out_width, COLUMNS)
    tile = tile_width(extent, most)
    count = samples * out_width if inner else samples if reduce else samples * channels
    lines = min(triton.next_power_of_2(count), max(1, TILE // tile))
    groups, inner_blocks = triton.cdiv(count, lines), triton.cdiv(extent, tile)
    if reduce:
        most_bands = triton.cdiv(out_height, REDUCING_BAND)
    else:
        most_bands = min(triton.cdiv(out_height, BAND), triton.cdiv(PROGRAMS, groups * inner_blocks))
    band_rows = triton.cdiv(out_height, most_bands)
    bands = triton.cdiv(out_height, band_rows)
    alignments = {
        "CHANNEL_ALIGN": alignment(channels) if inner else 1,
        "WIDTH_ALIGN": 1 if inner else alignment(width),
        "OUT_ALIGN": 1 if inner else alignment(out_width),
    }
    sizes = {
        "samples": samples,
        "channel_units": channels // alignments["CHANNEL_ALIGN"],
        "height": height,
        "width_units": width // alignments["WIDTH_ALIGN"],
        "out_height": out_height,
        "out_units": out_width // alignments["OUT_ALIGN"],
        "inner_blocks": inner_blocks,
        "bands": bands,
        "band_rows": band_rows,
    }
    programs = groups * inner_blocks * bands
    if reduce:
        channel_blocks = inner_blocks if inner else channels
        tiles = groups * bands * (1 if inner else inner_blocks)
        per_program = max(triton.cdiv(tiles * channel_blocks, REDUCING_PROGRAMS), triton.cdiv(tiles, CHUNKS))
        sizes["inner_blocks"] = 1 if inner else inner_blocks
        sizes |= {"channel_blocks": channel_blocks, "tiles": tiles, "per_program": per_program}
        programs = triton.cdiv(tiles, per_program) * channel_blocks
    # Of the lines that reach past the last image, and the rows beside one.
    images = triton.cdiv(groups * lines, out_width) if inner else groups * lines * (channels if reduce else 1)
    reach = (images + 1) * (height + 4) * (max(width, inner_blocks * tile) if not inner else width * channels)
    options = {
        "CHANNELS_LAST": inner,
        **alignments,
        "LINES": lines,
        "WIDTH": tile,
        "INDEX": index_type(reach),
        **launch_options(max(1, lines * tile // (32 * per_thread))),
    }
    return (programs,), sizes, options


def combine_plan(chunks: int, count: int) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, options) of the kernel that combines chunks."""
    rows = triton.next_power_of_2(chunks)
    block = min(triton.next_power_of_2(count), max(1, CHUNKS // rows))
    options = {"CHUNKS": rows, "BLOCK": block, **launch_options(max(1, rows * block // 256))}
    return (triton.cdiv(count, block),), options


# --- The operation ----------------------------------------------------------------------------------------------------


def _is_inner(x: Tensor) -> bool:
    """Whether channels are neighbours in memory; single pixels are rows of channels in either format."""
    return channels_last(x) or x.shape[2] * x.shape[3] == 1


def _convolve(
    x: Tensor,
    weight: Tensor,
    stride: int,
    affines: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    y: Tensor,
    turned: bool,
) -> None:
    inner = _is_inner(x)
    grid, sizes, options = plan(
        tuple(x.shape), stride, inner, x.itemsize, per_thread=elements_per_thread(stride, inner)
    )
    with device_guard(x):
        convolve_kernel[grid](
            x,
            weight,
            *affines,
            y,
            *sizes.values(),
            STRIDE=stride,
            PRE=affines[0] is not None,
            POST=affines[2] is not None,
            TURNED=turned,
            **options,
        )


def forward(
    x: Tensor,
    weight: Tensor,
    stride: int,
    pre_scale: Tensor | None,
    pre_shift: Tensor | None,
    post_scale: Tensor | None,
    post_shift: Tensor | None,
) -> Tensor:
    """``post(conv(pre(x)))``, in the format of x.

    Args:
        x: (N, C, H, W), dense. weight: (C, 1, 5, 5). The others: (C,) or None, in pairs. All contiguous, of one dtype.

    Raises:
        ValueError: x is neither contiguous nor channels_last.
    """
    memory_format = torch.channels_last if channels_last(x) else torch.contiguous_format
    y = torch.empty(
        (*x.shape[:2], *(out_size(size, stride) for size in x.shape[2:])),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format,
    )
    if x.numel() > 0:
        _convolve(x, weight, stride, (pre_scale, pre_shift, post_scale, post_shift), y, False)
    return y


def backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """``(grad_x, grad_weight)`` of the convolution alone.

    Args:
        grad: of the result's shape, in the memory format of x.

    Raises:
        ValueError: the shape or the memory format of grad is another, or x is not dense.
    """
    out = [out_size(size, stride) for size in x.shape[2:]]
    inner = _is_inner(x)
    lies = grad.movedim(1, -1).is_contiguous() if inner else grad.is_contiguous()
    if grad.shape != (*x.shape[:2], *out) or not lies:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} and strides {tuple(grad.stride())}: expected "
            f"{(*x.shape[:2], *out)} in the memory format of x, whose strides are {tuple(x.stride())}"
        )
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_()
    shape = tuple(x.shape)
    with device_guard(x):
        if stride == 1:
            _convolve(grad, weight, 1, (None,) * 4, grad_x, True)
        else:
            grid, sizes, options = plan(shape, 2, inner, x.itemsize)
            spread_kernel[grid](grad, weight, grad_x, *sizes.values(), **options)
        grid, sizes, options = plan(
            shape, stride, inner, x.itemsize, True, elements_per_thread(stride, inner)
        )
        chunks, count = grid[0] // sizes["channel_blocks"], weight.numel()
        partial = torch.empty((chunks, count), dtype=torch.float64, device=x.device)
        weight_gradient_kernel[grid](grad, x, partial, *sizes.values(), STRIDE=stride, **options)
        grid, options = combine_plan(chunks, count)
        combine_kernel[grid](partial, grad_weight, chunks, count, **options)
    return grad_x, grad_weight


def _specialisations() -> Iterator[AotSpec]:
    """Cells of the CIFAR-10 and CelebA-HQ decoders; float16 gives what bfloat16 does."""

    def pointers(dtype: torch.dtype, *names: str) -> dict[str, str]:
        return {f"{name}_ptr": pointer(dtype) for name in names}

    affines = ("pre_scale", "pre_shift", "post_scale", "post_shift")
    images: Images = (16, 384, 64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        for inner in (False, True):
            for stride in (1, 2):
                per_thread = elements_per_thread(stride, inner)
                case = f"{short_name(dtype)}, {'channels_last' if inner else 'contiguous'}, stride {stride}"
                _, sizes, options = plan(images, stride, inner, dtype.itemsize, per_thread=per_thread)
                integers = dict.fromkeys(sizes, "i32")
                for active in (False, True) if stride == 1 else (True,):
                    given = affines if active else ()
                    yield AotSpec(
                        f"{case}, {'affines' if active else 'turned'}",
                        convolve_kernel,
                        {**pointers(dtype, "x", "weight", *given, "y"), **integers},
                        {
                            **({} if active else {f"{name}_ptr": None for name in affines}),
                            "STRIDE": stride,
                            "PRE": active,
                            "POST": active,
                            "TURNED": not active,
                            **options,
                        },
                        # Along a row, stride 2 takes every other element.
                        widest=8 * dtype.itemsize * (1 if stride == 2 and not inner else per_thread),
                    )
                if stride == 2:
                    _, sizes, options = plan(images, stride, inner, dtype.itemsize)
                    yield AotSpec(
                        case,
                        spread_kernel,
                        {**pointers(dtype, "grad", "weight", "grad_x"), **integers},
                        options,
                        widest=32 * dtype.itemsize if inner else 8 * dtype.itemsize,
                    )
                _, sizes, options = plan(images, stride, inner, dtype.itemsize, True, per_thread)
                yield AotSpec(
                    case,
                    weight_gradient_kernel,
                    {
                        **pointers(dtype, "grad", "x"),
                        "partial_ptr": "*fp64:16",
                        **dict.fromkeys(sizes, "i32"),
                    },
                    {"STRIDE": stride, **options},
                    widest=min(
                        64, 8 * dtype.itemsize * per_thread
                    ),  # the stores: 25 numbers per program and channel
                )
    for chunks, channels in ((16, 384), (CHUNKS, 3)):
        _, options = combine_plan(chunks, 25 * channels)
        yield AotSpec(
            f"{chunks} chunks",
            combine_kernel,
            {
                "partial_ptr": "*fp64:16",
                **pointers(torch.float32, "grad_weight"),
                "chunks": "i32",
                "count": "i32",
            },
            options,
            widest=32,  # 25 results per channel
        )


AOT = list(_specialisations())
