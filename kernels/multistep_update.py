"""Triton kernel of ``multistep_update``: ``c_y y + sum_i c_i history_i``, forward only.

Bound by memory: every operand is read once, the result written once. Tensors are (B, C, *spatial), dense, with the
channels before (contiguous) or after (channels_last) the positions. Elements that follow each other in memory and share
what depends on the sample form a group: a sample, or the whole tensor where no coefficient depends on anything but the
channel of a channels_last tensor. Only a coefficient per channel costs a division, one for several neighbours.

Numbers among the coefficients are arguments of the launch: a device tensor of them would cost a transfer each. Triton
hands a Python float over as float32, so they travel as the 64 bits of a float64, in an integer, and the kernel reads
these bits again. That is exact over the whole range, where a sum of float32 parts loses digits below 1e-30, and works
in the interpreter too, which knows nothing of arguments declared as float64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._channelwise import forward_block
from lsgm_fast.kernels._common import (
    AotSpec,
    alignment,
    common_layout,
    compute_type,
    device_guard,
    index_type,
    launch_options,
    pointer,
    short_name,
    store,
    warps,
)

TERMS = 5
"""The state and up to four history entries."""

# What a coefficient consists of besides its number.
NUMBER, SCALAR, CHANNELS, SAMPLE_CHANNELS = range(4)
_NUMBER, _SCALAR, _SAMPLE_CHANNELS = tl.constexpr(NUMBER), tl.constexpr(SCALAR), tl.constexpr(SAMPLE_CHANNELS)


@triton.jit
def coefficient(bits, factor_ptr, stride, sample, channel, mask, COMPUTE: tl.constexpr, KIND: tl.constexpr):
    value = bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
    if KIND != _NUMBER:
        if KIND == _SCALAR:
            factor = tl.load(factor_ptr + sample.to(tl.int64) * stride)
        elif KIND == _SAMPLE_CHANNELS:
            factor = tl.load(factor_ptr + sample.to(tl.int64) * stride + channel, mask=mask, other=0.0)
        else:
            factor = tl.load(factor_ptr + channel, mask=mask, other=0.0)
        value = value * factor.to(COMPUTE)
    return value


# Specialising on the values of numbers and sizes would compile anew for almost every call; ALIGN and GROUP say what is
# needed. The bits are declared, since the small integers of 0.0 would else be another type.
@triton.jit(
    do_not_specialize=[
        *("bits_0", "bits_1", "bits_2", "bits_3", "bits_4"),
        *("stride_0", "stride_1", "stride_2", "stride_3", "stride_4"),
        *("inner_groups", "group_units", "blocks"),
    ]
)
def forward_kernel(
    y_ptr,
    history_1,
    history_2,
    history_3,
    history_4,
    out_ptr,
    factor_0,
    factor_1,
    factor_2,
    factor_3,
    factor_4,
    bits_0: tl.int64,
    bits_1: tl.int64,
    bits_2: tl.int64,
    bits_3: tl.int64,
    bits_4: tl.int64,
    stride_0,  # between the factors of two samples
    stride_1,
    stride_2,
    stride_3,
    stride_4,
    inner_groups,  # positions (contiguous) or channels (channels_last) / GROUP
    group_units,  # elements that share what depends on the sample / ALIGN
    blocks,  # programs for them
    KINDS: tl.constexpr,  # two bits per coefficient
    COUNT: tl.constexpr,  # of coefficients
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,  # neighbours in memory that share a channel, or whose channels are neighbours
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index among the elements that share
):
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid - sample * blocks
    size = group_units.to(INDEX) * ALIGN

    # Counting in groups: one division for each, and the compiler sees that a group starts at a multiple of GROUP.
    group = (block.to(INDEX) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP).to(INDEX))[:, None]
    within = tl.arange(0, GROUP)[None, :]
    index = group * GROUP + within
    mask = index < size
    at = sample.to(tl.int64) * size + index
    if CHANNELS_LAST:
        channel = group % inner_groups * GROUP + within
        known = mask
    else:
        channel = group // inner_groups
        known = group * GROUP < size

    y = tl.load(y_ptr + at, mask=mask).to(COMPUTE)
    total = coefficient(bits_0, factor_0, stride_0, sample, channel, known, COMPUTE, KINDS % 4) * y
    if COUNT > 1:
        x = tl.load(history_1 + at, mask=mask).to(COMPUTE)
        total += coefficient(bits_1, factor_1, stride_1, sample, channel, known, COMPUTE, KINDS // 4 % 4) * x
    if COUNT > 2:
        x = tl.load(history_2 + at, mask=mask).to(COMPUTE)
        total += coefficient(bits_2, factor_2, stride_2, sample, channel, known, COMPUTE, KINDS // 16 % 4) * x
    if COUNT > 3:
        x = tl.load(history_3 + at, mask=mask).to(COMPUTE)
        total += coefficient(bits_3, factor_3, stride_3, sample, channel, known, COMPUTE, KINDS // 64 % 4) * x
    if COUNT > 4:
        x = tl.load(history_4 + at, mask=mask).to(COMPUTE)
        total += (
            coefficient(bits_4, factor_4, stride_4, sample, channel, known, COMPUTE, KINDS // 256 % 4) * x
        )
    store(out_ptr + at, total, mask)


def float64_bits(value: float) -> int:
    """The float64's bits as a signed integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def plan(
    samples: int, channels: int, space: int, channels_inner: bool, kinds: Sequence[int], by_sample: bool
) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options): what the kernel gets besides tensors, numbers, strides and COMPUTE.

    ``kinds``: of the coefficients. ``by_sample``: one of them depends on the sample.
    """
    by_channel = any(kind in (CHANNELS, SAMPLE_CHANNELS) for kind in kinds)
    size = channels * space
    if not by_sample and (channels_inner or not by_channel):
        samples, size = 1, samples * size
    inner = size if not by_channel else channels if channels_inner else space
    group, align = alignment(inner), alignment(size)
    block = forward_block(size)
    blocks = triton.cdiv(size, block)
    sizes = {"inner_groups": inner // group, "group_units": size // align, "blocks": blocks}
    options = {
        "KINDS": sum(kind << 2 * i for i, kind in enumerate(kinds)),
        "COUNT": len(kinds),
        "CHANNELS_LAST": channels_inner and by_channel,
        "ALIGN": align,
        "GROUP": group,
        "BLOCK": block,
        "INDEX": index_type(size),
        **launch_options(warps(block), registers=128),
    }
    return (samples * blocks,), sizes, options


def _factor(factor: Tensor, y: Tensor) -> tuple[Tensor, int, int]:
    """(factor with neighbouring channels, stride between samples, kind)."""
    shape = factor.shape
    if factor.dim() < 2:
        right = factor.numel() == 1 or shape == y.shape[:1]
    else:
        right = len(shape) == y.dim() and all(
            n in (1, y.shape[d] if d < 2 else 1) for d, n in enumerate(shape)
        )
    if not right:
        raise ValueError(
            f"a factor has shape {tuple(shape)}, expected (), ({y.shape[0]},) or (1, {y.shape[1]}, 1, ...)"
        )
    by_channel = factor.dim() > 1 and shape[1] > 1
    if by_channel and factor.stride(1) != 1:
        factor = factor.contiguous()
    stride = factor.stride(0) if factor.dim() > 0 and shape[0] > 1 else 0
    return factor, stride, (SAMPLE_CHANNELS if stride else CHANNELS) if by_channel else SCALAR


def forward(
    y: Tensor,
    history: Sequence[Tensor],
    scales: Sequence[float],
    factors: Sequence[Tensor],
    which: Sequence[int],
) -> Tensor:
    """``c_0 y + sum_i c_i history[i - 1]`` like y, with ``c_i = scales[i]``, times ``factors[which[i]]`` if that is
    not negative.

    Raises:
        ValueError: sizes, shapes or formats do not match, or the history has several dtypes.
    """
    count = len(history) + 1
    if count > TERMS or len(scales) != count or len(which) != count:
        raise ValueError(
            f"{len(history)} history entries, {len(scales)} scales and {len(which)} of which: expected up to "
            f"{TERMS - 1} entries and one more of the others"
        )
    if len({h.dtype for h in history}) > 1:
        raise ValueError(f"history of dtypes {[h.dtype for h in history]}: expected one")
    inner = common_layout(y, *history)
    out = torch.empty_like(y)
    if not out.numel():
        return out
    pointers, strides, kinds = [y] * TERMS, [0] * TERMS, [NUMBER] * count
    for i, index in enumerate(which):
        if index >= 0:
            pointers[i], strides[i], kinds[i] = _factor(factors[index], y)
    samples, channels = y.shape[:2]
    grid, sizes, options = plan(
        samples, channels, y.numel() // (samples * channels), inner, kinds, any(strides)
    )
    missing = TERMS - count
    with device_guard(y):
        forward_kernel[grid](
            y,
            *history,
            *[y] * missing,
            out,
            *pointers,
            *map(float64_bits, scales),
            *[0] * missing,
            *strides,
            *sizes.values(),
            COMPUTE=compute_type(y, *history),
            **options,
        )
    return out


def _specialisations() -> Iterator[AotSpec]:
    """The latents of the CIFAR-10 configurations, in the dtypes of (history, state) that models and solvers use.

    180 channels: in channels_last, a group of neighbours is 4 elements, 8 bytes in half precision.
    """
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    shape = (64, 180, 256)
    cases = {
        "numbers": [NUMBER] * 3,
        "per channel": [CHANNELS] * 4,
        "every kind": [NUMBER, SCALAR, CHANNELS, SAMPLE_CHANNELS, SCALAR],
    }
    for h, y in ((f32, f32), (f16, f32), (bf16, f32), (bf16, bf16), (f32, f64)):
        for name, kinds in cases.items():
            for inner in (False, True) if name != "numbers" else (False,):
                _, sizes, options = plan(*shape, inner, kinds, SAMPLE_CHANNELS in kinds)
                factors = [y if kind == NUMBER else f32 for kind in kinds] + [y] * (TERMS - len(kinds))
                entries = [h] * (len(kinds) - 1) + [y] * (TERMS - len(kinds))
                layout = "channels_last" if inner else "contiguous"
                yield AotSpec(
                    f"history {short_name(h)}, y {short_name(y)}, {name}, {layout}",
                    forward_kernel,
                    {
                        "y_ptr": pointer(y),
                        **{f"history_{i + 1}": pointer(e) for i, e in enumerate(entries)},
                        "out_ptr": pointer(y),
                        **{f"factor_{i}": pointer(f) for i, f in enumerate(factors)},
                        **{f"bits_{i}": "i64" for i in range(TERMS)},
                        **{f"stride_{i}": "i32" for i in range(TERMS)},
                        **dict.fromkeys(sizes, "i32"),
                    },
                    {"COMPUTE": tl.float64 if f64 in (h, y) else tl.float32, **options},
                    128
                    if name == "numbers"
                    else min(128, alignment(shape[1 if inner else 2]) * y.itemsize * 8),
                )


AOT = list(_specialisations())
