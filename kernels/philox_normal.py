"""Triton kernel of ``philox_normal``: standard normals from Philox4x32-10 and Box-Muller.

Nothing is read but the samples' indices. A program makes the elements of consecutive counter blocks of one sample,
four to a block. Random words and uniforms are those of every other backend, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._common import (
    TYPES,
    AotSpec,
    alignment,
    device_guard,
    index_type,
    launch_options,
    pointer,
    short_name,
    store,
    warps,
)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011): four words for every counter; all uint32."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high2 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low2 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = high2 ^ c1 ^ k0
        c1 = low2
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def sincos_turns(turns):
    """(sine, cosine) of 2 pi ``turns``, from 0 to 1.

    Reduced in turns, where that is exact, to r = -1/2 ... 1/2 quarters: the library's functions would carry code for
    arguments of any size. Minimax polynomials: sin(pi/2 r) / r = pi/2 + r^2 (...) and cos(pi/2 r) = 1 + r^2 (...), of
    relative error 4e-9 and 6e-11 in float32, 4e-18 and 4e-20 in float64.
    """
    whole = (turns * 4.0 + 0.5).to(tl.int32)
    r = turns * 4.0 - whole.to(turns.dtype)
    t = r * r
    if turns.dtype == tl.float64:
        s = 5.6346750397956495e-08
        s = -3.598649340355188e-06 + t * s
        s = 0.0001604411525984191 + t * s
        s = -0.004681754132616259 + t * s
        s = 0.07969262624606273 + t * s
        s = -0.645964097506245 + t * s
        s = r * 1.5707963267948966 + r * (t * s + 6.123233995736766e-17)
        c = -6.321892484968339e-09
        c = 4.710615658000444e-07 + t * c
        c = -2.52020369915452e-05 + t * c
        c = 0.0009192602742250346 + t * c
        c = -0.020863480763315442 + t * c
        c = 0.2536695079010469 + t * c
        c = -1.2337005501361697 + t * c
    else:
        s = -0.004605310037732124
        s = 0.07968158274888992 + t * s
        s = -0.6459636688232422 + t * s
        s = r * 1.5707963705062866 + r * (t * s - 4.371139000186241e-08)
        c = 0.0009040216682478786
        c = -0.02086028829216957 + t * c
        c = 0.25366923213005066 + t * c
        c = -1.2337005138397217 + t * c
    c = 1.0 + t * c
    # An odd number of quarters swaps the two; the signs are those of the quadrant.
    odd = (whole & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where((whole & 2) != 0, -sine, sine)
    cosine = tl.where(((whole + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def box_muller(first, second, COMPUTE: tl.constexpr):
    """A pair of normals from two words; the uniforms are float32 whatever COMPUTE is."""
    u1 = first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    u2 = second.to(tl.float32) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(u1.to(COMPUTE)))
    sine, cosine = sincos_turns(u2.to(COMPUTE))
    return radius * cosine, radius * sine


# Words come as int32 of the same bits: a word from 2^31 on would otherwise be an int64, and one more specialisation.
@triton.jit(
    do_not_specialize=["index_stride", "key0", "key1", "stream", "substream", "sample_units", "blocks"]
)
def generate_kernel(
    indices_ptr,
    out_ptr,
    index_stride,
    key0,
    key1,
    stream,
    substream,
    sample_units,  # elements of a sample / ALIGN
    blocks,  # programs per sample
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    COUNTERS: tl.constexpr,  # per program
    INDEX: tl.constexpr,  # integer type of an index inside one sample
):
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid - sample * blocks
    size = sample_units.to(INDEX) * ALIGN

    counter = (block.to(tl.uint32) * COUNTERS + tl.arange(0, COUNTERS)).to(tl.uint32)
    index = tl.load(indices_ptr + sample.to(tl.int64) * index_stride).to(tl.uint32)
    zero = tl.zeros([COUNTERS], tl.uint32)
    x0, x1, x2, x3 = philox(
        counter,
        zero + stream.to(tl.uint32, bitcast=True),
        zero + index,
        zero + substream.to(tl.uint32, bitcast=True),
        key0.to(tl.uint32, bitcast=True),
        key1.to(tl.uint32, bitcast=True),
    )
    n0, n1 = box_muller(x0, x1, COMPUTE)
    n2, n3 = box_muller(x2, x3, COMPUTE)
    values = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))

    at = block.to(INDEX) * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS).to(INDEX)
    store(out_ptr + sample.to(tl.int64) * size + at, values, at < size)


def plan(samples: int, size: int) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of the kernel for ``samples`` of ``size`` elements."""
    counters = min(256, max(32, triton.next_power_of_2(triton.cdiv(size, 4))))
    blocks = triton.cdiv(size, 4 * counters)
    align = alignment(size)
    sizes = {"sample_units": size // align, "blocks": blocks}
    options = {
        "ALIGN": align,
        "COUNTERS": counters,
        "INDEX": index_type(size),
        **launch_options(warps(4 * counters)),
    }
    return (samples * blocks,), sizes, options


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def forward(
    indices: Tensor,
    key0: int,
    key1: int,
    stream: int,
    substream: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """(N, *shape) normals on the device of ``indices``, which is (N,) int64; the other numbers are 32-bit words."""
    out = indices.new_empty((indices.shape[0], *shape), dtype=dtype)
    if out.numel() == 0:
        return out
    grid, sizes, options = plan(indices.shape[0], math.prod(shape))
    with device_guard(indices):
        generate_kernel[grid](
            indices,
            out,
            indices.stride(0),
            *(_signed(word) for word in (key0, key1, stream, substream)),
            *sizes.values(),
            COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
            **options,
        )
    return out


def _specialisations() -> Iterator[AotSpec]:
    """The largest latent scale of CelebA-HQ, and a sample of odd size."""
    words = ("index_stride", "key0", "key1", "stream", "substream")
    for dtype in TYPES:
        for case, size in (("", 20 * 128 * 128), (", odd size", 1027)):
            _, sizes, options = plan(16, size)
            yield AotSpec(
                short_name(dtype) + case,
                generate_kernel,
                {
                    "indices_ptr": "*i64:16",
                    "out_ptr": pointer(dtype),
                    **dict.fromkeys((*words, *sizes), "i32"),
                },
                {"COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32, **options},
                128 if size % 16 == 0 else min(32, dtype.itemsize * 8),
            )


AOT = list(_specialisations())
