"""Triton kernels of ``mixed_score``: ``(1 - a) r z + a eps`` with ``a = sigmoid(mixing_logit)``, and its gradients.

Both kernels are bound by memory: forward reads eps and z once and writes the result; backward reads grad, eps and z
once and writes two gradients and a few partial sums. Tensors are (B, C, *spatial), dense, with the channels before
(contiguous) or after (channels_last) the positions; ``SPACE`` below is the number of positions.

The forward kernel walks through memory as it lies (``_channelwise.py``). The backward kernel works on tiles of channels
x positions, because it also sums over positions: each program adds its tiles up in registers and writes one partial sum
per channel, which a second kernel adds in a fixed order. No atomics: the result is the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._channelwise import forward_plan, load_channels, locate, logit_values
from lsgm_fast.kernels._common import (
    TYPES,
    AotSpec,
    alignment,
    common_layout,
    compute_type,
    device_guard,
    index_type,
    launch_options,
    mixing,
    pointer,
    sample_stride,
    short_name,
    store,
    warps,
)


# Specialising on the values of sizes would compile anew for almost every shape; ALIGN and GROUP say what is needed.
@triton.jit(do_not_specialize=["r_stride", "inner_groups", "sample_units", "blocks"])
def forward_kernel(
    eps_ptr,
    z_ptr,
    logit_ptr,
    r_ptr,
    out_ptr,
    r_stride,
    inner_groups,  # positions (contiguous) or channels (channels_last) / GROUP
    sample_units,  # channels x positions / ALIGN
    blocks,  # programs per sample
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,  # neighbours in memory that share a channel, or whose channels are neighbours
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index inside one sample
):
    size = sample_units.to(INDEX) * ALIGN
    sample, group, within = locate(blocks, GROUP, BLOCK, INDEX)
    base = sample * size
    index = group * GROUP + within
    mask = index < size
    eps = tl.load(eps_ptr + base + index, mask=mask).to(COMPUTE)
    z = tl.load(z_ptr + base + index, mask=mask).to(COMPUTE)
    logit = load_channels(logit_ptr, group, within, inner_groups, size, GROUP, CHANNELS_LAST)
    a, one_minus_a = mixing(logit.to(COMPUTE))
    r = tl.load(r_ptr + sample * r_stride).to(COMPUTE)
    store(out_ptr + base + index, one_minus_a * r * z + a * eps, mask)


@triton.jit(do_not_specialize=["r_stride", "outer", "inner_units", "space_blocks", "tiles"])
def backward_kernel(
    grad_ptr,
    eps_ptr,
    z_ptr,
    logit_ptr,
    r_ptr,
    grad_eps_ptr,
    grad_z_ptr,
    partial_ptr,  # (C, programs), COMPUTE
    r_stride,
    outer,  # number of channels (contiguous) or positions (channels_last)
    inner_units,  # the other of the two / ALIGN
    space_blocks,  # tiles per sample, along the positions
    tiles,  # samples x space_blocks
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SPACE: tl.constexpr,
    TILES: tl.constexpr,  # per program
    INDEX: tl.constexpr,
):
    program = tl.program_id(0)
    inner = inner_units.to(INDEX) * ALIGN
    outer = outer.to(INDEX)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if CHANNELS_LAST:
        channels = inner
        space = outer
    else:
        channels = outer
        space = inner
    in_channels = channel < channels
    logit = tl.load(logit_ptr + channel, mask=in_channels, other=0.0).to(COMPUTE)
    a, one_minus_a = mixing(logit)

    total = tl.zeros([BLOCK_CHANNELS, BLOCK_SPACE], COMPUTE)
    for i in range(TILES):
        # The last program may run past the last tile: there nothing is in range.
        tile = tl.minimum(program * TILES + i, tiles - 1)
        end = tl.where(program * TILES + i < tiles, space, 0)
        sample = tile // space_blocks
        position = (tile - sample * space_blocks).to(INDEX) * BLOCK_SPACE + tl.arange(0, BLOCK_SPACE).to(
            INDEX
        )
        mask = in_channels[:, None] & (position < end)[None, :]
        base = sample.to(tl.int64) * (channels * space)
        if CHANNELS_LAST:
            index = base + (channel[:, None] + position[None, :] * inner)
        else:
            index = base + (channel.to(INDEX)[:, None] * inner + position[None, :])
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(COMPUTE)
        eps = tl.load(eps_ptr + index, mask=mask, other=0.0).to(COMPUTE)
        z = tl.load(z_ptr + index, mask=mask, other=0.0).to(COMPUTE)
        r = tl.load(r_ptr + sample.to(tl.int64) * r_stride).to(COMPUTE)
        store(grad_eps_ptr + index, a[:, None] * grad, mask)
        store(grad_z_ptr + index, (one_minus_a * r)[:, None] * grad, mask)
        total += grad * (eps - r * z)  # 0 where masked

    partial = tl.sum(total, axis=1)
    tl.store(partial_ptr + channel.to(tl.int64) * tl.num_programs(0) + program, partial, mask=in_channels)


@triton.jit(do_not_specialize=["partials"])
def logit_kernel(
    partial_ptr, logit_ptr, grad_logit_ptr, partials, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_logit = a (1 - a) times the sum of one channel's partial sums; one program per channel."""
    channel = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    row = partial_ptr + channel.to(tl.int64) * partials
    total = tl.sum(tl.load(row + index, mask=index < partials, other=0.0), axis=0)
    a, one_minus_a = mixing(tl.load(logit_ptr + channel).to(COMPUTE))
    tl.store(grad_logit_ptr + channel, (a * one_minus_a * total).to(grad_logit_ptr.dtype.element_ty))


MAX_PROGRAMS = 1024
"""Most partial sums per channel: programs for every multiprocessor of the largest GPUs, and one block to add them."""


def backward_blocks(channels: int, space: int, channels_inner: bool) -> tuple[int, int]:
    """(channels, positions) of a tile: 1024 elements, long along the inner extent but with few lanes beyond its end."""
    extent, other = (channels, space) if channels_inner else (space, channels)
    longest = min(triton.next_power_of_2(extent), 256)
    blocks = [longest >> k for k in range(4) if longest >> k >= 32] or [longest]
    padded = {block: triton.cdiv(extent, block) * block for block in blocks}
    inner = next(
        (b for b in blocks if padded[b] * 7 <= extent * 8), min(blocks, key=lambda b: (padded[b], -b))
    )
    outer = min(triton.next_power_of_2(other), 1024 // inner)
    return (inner, outer) if channels_inner else (outer, inner)


def backward_plan(
    samples: int, channels: int, space: int, channels_inner: bool
) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of the backward kernel; a function of the shape alone, not of the device."""
    outer, inner = (space, channels) if channels_inner else (channels, space)
    block_channels, block_space = backward_blocks(channels, space, channels_inner)
    channel_blocks = triton.cdiv(channels, block_channels)
    space_blocks = triton.cdiv(space, block_space)
    tiles = samples * space_blocks
    tiles_per_program = triton.next_power_of_2(triton.cdiv(tiles * channel_blocks, MAX_PROGRAMS))
    align = alignment(inner)
    sizes = {"outer": outer, "inner_units": inner // align, "space_blocks": space_blocks, "tiles": tiles}
    options = {
        "CHANNELS_LAST": channels_inner,
        "ALIGN": align,
        "BLOCK_CHANNELS": block_channels,
        "BLOCK_SPACE": block_space,
        "TILES": tiles_per_program,
        "INDEX": index_type(channels * space),
        **launch_options(warps(block_channels * block_space)),
    }
    return (triton.cdiv(tiles, tiles_per_program), channel_blocks), sizes, options


def forward(eps: Tensor, z: Tensor, mixing_logit: Tensor, r: Tensor) -> Tensor:
    """``(1 - a) r z + a eps``, in z's dtype and memory format.

    Args:
        eps, z: (B, C, *spatial), one dense memory format. mixing_logit: (1, C, 1, 1). r: 0-d, (1,) or (B,).

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    inner = common_layout(z, eps)
    out = torch.empty_like(z)
    if z.numel() == 0:
        return out
    samples, channels = z.shape[:2]
    logit, stride = logit_values(mixing_logit, channels), sample_stride("r", r, samples)
    grid, sizes, options = forward_plan(samples, channels, z.numel() // (samples * channels), inner)
    with device_guard(z):
        forward_kernel[grid](
            eps, z, logit, r, out, stride, *sizes.values(), COMPUTE=compute_type(eps, z), **options
        )
    return out


def backward(
    grad: Tensor, eps: Tensor, z: Tensor, mixing_logit: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`: ``a g``, ``(1 - a) r g`` and ``a (1 - a) sum g (eps - r z)`` per channel.

    Args:
        grad: (B, C, *spatial) in z's memory format; the others as for :func:`forward`.

    Returns:
        (grad_eps, grad_z, grad_logit) in the dtypes of eps, z and mixing_logit.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    inner = common_layout(z, eps, grad)
    grad_eps, grad_z = torch.empty_like(eps), torch.empty_like(z)
    if z.numel() == 0:
        return grad_eps, grad_z, torch.zeros_like(mixing_logit)
    samples, channels = z.shape[:2]
    logit, stride = logit_values(mixing_logit, channels), sample_stride("r", r, samples)
    grid, sizes, options = backward_plan(samples, channels, z.numel() // (samples * channels), inner)
    compute = compute_type(grad, eps, z)
    partials = grid[0]
    partial = torch.empty(
        (channels, partials), dtype=torch.float64 if compute == tl.float64 else torch.float32, device=z.device
    )
    grad_logit = torch.empty_like(logit)
    block = triton.next_power_of_2(partials)
    with device_guard(z):
        backward_kernel[grid](
            grad,
            eps,
            z,
            logit,
            r,
            grad_eps,
            grad_z,
            partial,
            stride,
            *sizes.values(),
            COMPUTE=compute,
            **options,
        )
        logit_kernel[(channels,)](
            partial,
            logit,
            grad_logit,
            partials,
            COMPUTE=compute,
            BLOCK=block,
            **launch_options(warps(block)),
        )
    return grad_eps, grad_z, grad_logit


def _specialisations() -> Iterator[AotSpec]:
    """The latents of the CIFAR-10 configurations, in the dtypes of (eps, z) that models and solvers use.

    180 channels: in channels_last, a group of neighbours is 4 elements, 8 bytes in half precision.
    """
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    shape = (64, 180, 256)
    parameters = {"logit_ptr": pointer(f32), "r_ptr": pointer(f32)}
    for e, z in ((f32, f32), (f16, f32), (bf16, f32), (bf16, bf16), (f32, f64)):
        compute = tl.float64 if f64 in (e, z) else tl.float32
        for inner in (False, True):
            case = f"eps {short_name(e)}, z {short_name(z)}, {'channels_last' if inner else 'contiguous'}"
            widest = min(128, alignment(shape[1] if inner else shape[2]) * z.itemsize * 8)
            tensors = {"eps_ptr": pointer(e), "z_ptr": pointer(z), **parameters}
            _, sizes, options = forward_plan(*shape, inner)
            yield AotSpec(
                case,
                forward_kernel,
                {**tensors, "out_ptr": pointer(z), "r_stride": "i32", **dict.fromkeys(sizes, "i32")},
                {"COMPUTE": compute, **options},
                widest,
            )
            _, sizes, options = backward_plan(*shape, inner)
            results = {"grad_eps_ptr": pointer(e), "grad_z_ptr": pointer(z)}
            partial = pointer(f64 if compute == tl.float64 else f32)
            yield AotSpec(
                case,
                backward_kernel,
                {
                    "grad_ptr": pointer(z),
                    **tensors,
                    **results,
                    "partial_ptr": partial,
                    "r_stride": "i32",
                    **dict.fromkeys(sizes, "i32"),
                },
                {"COMPUTE": compute, **options},
                widest,
            )
    for dtype in (f32, f64):
        yield AotSpec(
            short_name(dtype),
            logit_kernel,
            {
                "partial_ptr": pointer(dtype),
                "logit_ptr": pointer(f32),
                "grad_logit_ptr": pointer(f32),
                "partials": "i32",
            },
            {"COMPUTE": TYPES[dtype], "BLOCK": MAX_PROGRAMS, **launch_options(warps(MAX_PROGRAMS))},
            widest=32,  # a few thousand numbers in all, in rows of any length
        )


AOT = list(_specialisations())
