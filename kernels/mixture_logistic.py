"""Triton kernels of ``mixture_logistic_log_prob``, its gradient with respect to the logits, and of
``mixture_logistic_mean``.

A program takes a tile, pixels x mixtures, and goes through the mixtures, 10 channels of the logits at a time, so that
nothing but the result is ever written. Contiguous logits: one mixture at a time, neighbouring threads on neighbouring
pixels; channels_last: 16 of them, neighbouring threads on neighbouring channels. Sums over the mixtures of exponentials
are kept as ``exp(top) sum``; forward leaves the joint one for backward, which so needs one pass and the same terms.

With z = (x - mean) / s and half = 1 / ((2^bits - 1) s), the mass of an inner bin, F(z + half) - F(z - half) for the
logistic function F, is sinh(half) / (cosh(half) + cosh(z)): without cancellation, and its derivatives likewise.
"""

from __future__ import annotations

import math
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

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def one_minus_exp(t):
    """``1 - exp(-t)`` for t >= 0, to full relative accuracy: a series where it is small."""
    series = 1.0 - t * (1 / 7)
    series = 1.0 - t * (1 / 6) * series
    series = 1.0 - t * (1 / 5) * series
    series = 1.0 - t * (1 / 4) * series
    series = 1.0 - t * (1 / 3) * series
    series = 1.0 - t * (1 / 2) * series
    return tl.where(t < 0.25, t * series, 1.0 - tl.exp(-t))


@triton.jit
def bin_of(x, mean, raw_log_scale, half_width, log_density, GRADIENTS: tl.constexpr):
    """``(factor, exponent, by mean, by log scale)``: the mass of x's bin is ``factor exp(exponent)``, the factor from
    1e-5 to 1, and the derivatives are those of its logarithm (0 without GRADIENTS)."""
    log_scale = tl.where(raw_log_scale < -7.0, -7.0, raw_log_scale)  # NaN stays
    inverse = tl.exp(-log_scale)
    z = inverse * (x - mean)
    half = inverse * half_width
    distance = tl.abs(z)
    h = tl.exp(-half)
    e = tl.exp(-distance)
    h2 = h * h + 1.0
    sinh = one_minus_exp(half) * (1.0 + h)  # 2 h sinh(half), and h2 is 2 h cosh(half)
    above = 1.0 + e

    numerator = sinh * e
    denominator = e * h2 + h * (e * e + 1.0)
    mass = numerator > 1e-5 * denominator
    # The first and the last bin: F(half + |z|) where z points away from the bin's edge, else F(half - |z|).
    edge = tl.abs(x) > 0.999
    outward = (z < 0.0) != (x < 0.0)
    larger = tl.maximum(h, e)
    at_edge = tl.where(outward, 1.0 + h * e, h + e)
    denominator = tl.where(edge, at_edge, tl.where(mass, denominator, above * above))
    numerator = tl.where(edge, tl.where(outward, 1.0, larger), tl.where(mass, numerator, 1.0))
    beyond = tl.where(outward, 0.0, tl.where(half < distance, half - distance, 0.0))
    exponent = tl.where(edge, beyond, tl.where(mass, 0.0, -distance - log_scale - log_density))
    factor = numerator / denominator
    by_mean = 0.0
    by_log_scale = 0.0
    if GRADIENTS:
        slope = tl.where(mass, h * above, above) * (1.0 - e)
        slope = tl.where(edge, tl.where(outward, -h * e, h), slope) / denominator
        spread = tl.where(mass, half * (h2 / sinh - factor), 1.0)
        spread = tl.where(edge, half * tl.abs(slope), spread)
        by_mean = inverse * tl.where(z < 0.0, -slope, slope)
        by_log_scale = tl.where(raw_log_scale < -7.0, 0.0, distance * slope - spread)
    return factor, exponent, by_mean, by_log_scale


@triton.jit
def tanh(x):
    """``(tanh x, its derivative)``."""
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    value = (1.0 - e) * r
    return tl.where(x < 0.0, -value, value), 4.0 * e * r * r


@triton.jit
def join(top, sum, exponent, factor):
    """``exp(top) sum + exp(exponent) factor`` in the same form."""
    difference = exponent - top
    shrink = tl.exp(-tl.abs(difference))
    sum = tl.where(difference > 0.0, sum * shrink + factor, sum + factor * shrink)
    return tl.maximum(top, exponent), sum


@triton.jit
def over_mixtures(top, sum):
    """The total of a tile's columns, (PIXELS, 1)."""
    highest = tl.max(top, axis=1, keep_dims=True)
    return highest, tl.sum(sum * tl.exp(top - highest), axis=1, keep_dims=True)


@triton.jit
def place(spatial_units, blocks, ALIGN: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr):
    """(sample, pixels of one image, the program's pixels (PIXELS, 1), which of them exist)."""
    pid = tl.program_id(0)
    sample = pid // blocks
    spatial = spatial_units.to(INDEX) * ALIGN
    pixel = (pid - sample * blocks).to(INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None].to(INDEX)
    return sample.to(tl.int64), spatial, pixel, pixel < spatial


@triton.jit
def read(ptr, pixel, channel, spatial, channels, mask, other, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        index = pixel * channels + channel
    else:
        index = channel * spatial + pixel
    return tl.load(ptr + index, mask=mask, other=other).to(tl.float32)


@triton.jit
def write(ptr, pixel, channel, spatial, channels, value, mask, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        index = pixel * channels + channel
    else:
        index = channel * spatial + pixel
    store(ptr + index, value, mask)


@triton.jit
def mixture_of(
    logits_ptr,
    pixel,
    k,
    spatial,
    mixtures,
    mask,
    red,
    green,
    blue,
    half_width,
    log_density,
    CHANNELS_LAST: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    """The bins of the three colours under the mixtures k, and the coefficients' tanh."""
    n = mixtures * 10
    m0 = read(logits_ptr, pixel, k + mixtures, spatial, n, mask, 0.0, CHANNELS_LAST)
    s0 = read(logits_ptr, pixel, k + mixtures * 2, spatial, n, mask, 0.0, CHANNELS_LAST)
    c0 = read(logits_ptr, pixel, k + mixtures * 3, spatial, n, mask, 0.0, CHANNELS_LAST)
    m1 = read(logits_ptr, pixel, k + mixtures * 4, spatial, n, mask, 0.0, CHANNELS_LAST)
    s1 = read(logits_ptr, pixel, k + mixtures * 5, spatial, n, mask, 0.0, CHANNELS_LAST)
    c1 = read(logits_ptr, pixel, k + mixtures * 6, spatial, n, mask, 0.0, CHANNELS_LAST)
    m2 = read(logits_ptr, pixel, k + mixtures * 7, spatial, n, mask, 0.0, CHANNELS_LAST)
    s2 = read(logits_ptr, pixel, k + mixtures * 8, spatial, n, mask, 0.0, CHANNELS_LAST)
    c2 = read(logits_ptr, pixel, k + mixtures * 9, spatial, n, mask, 0.0, CHANNELS_LAST)
    t0, d0 = tanh(c0)
    t1, d1 = tanh(c1)
    t2, d2 = tanh(c2)
    f0, e0, m0, s0 = bin_of(red, m0, s0, half_width, log_density, GRADIENTS)
    f1, e1, m1, s1 = bin_of(green, m1 + t0 * red, s1, half_width, log_density, GRADIENTS)
    f2, e2, m2, s2 = bin_of(blue, m2 + t1 * red + t2 * green, s2, half_width, log_density, GRADIENTS)
    return f0 * f1 * f2, e0 + e1 + e2, m0, s0, m1, s1, m2, s2, d0, d1, d2


# Specialising on the values of sizes would compile anew for almost every shape; ALIGN says what is needed.
SIZES = ("spatial_units", "blocks", "mixtures")


@triton.jit(do_not_specialize=[*SIZES, "half_width", "log_density"])
def log_prob_kernel(
    x_ptr,
    logits_ptr,
    out_ptr,
    parts_ptr,  # (2, N, spatial): tops, then sums
    pixels,  # of all images
    half_width,
    log_density,
    spatial_units,  # pixels of one image / ALIGN
    blocks,  # programs per image
    mixtures,
    X_CHANNELS_LAST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PIXELS: tl.constexpr,
    MIXTURES: tl.constexpr,  # at a time
    INDEX: tl.constexpr,  # integer type of an index inside one sample
):
    sample, spatial, pixel, exists = place(spatial_units, blocks, ALIGN, PIXELS, INDEX)
    mixtures = mixtures.to(INDEX)
    x_ptr += sample * spatial * 3
    logits_ptr += sample * spatial * mixtures * 10
    red = read(x_ptr, pixel, 0, spatial, 3, exists, 0.0, X_CHANNELS_LAST)
    green = read(x_ptr, pixel, 1, spatial, 3, exists, 0.0, X_CHANNELS_LAST)
    blue = read(x_ptr, pixel, 2, spatial, 3, exists, 0.0, X_CHANNELS_LAST)
    top = tl.full([PIXELS, MIXTURES], LOWEST, tl.float32)
    sum = tl.zeros([PIXELS, MIXTURES], tl.float32)
    prior_top = top
    prior_sum = sum
    for first in range(0, mixtures, MIXTURES):
        k = first + tl.arange(0, MIXTURES)[None, :]
        mask = exists & (k < mixtures)
        a = read(logits_ptr, pixel, k, spatial, mixtures * 10, mask, float("-inf"), CHANNELS_LAST)
        factor, exponent, _, _, _, _, _, _, _, _, _ = mixture_of(
            logits_ptr, pixel, k, spatial, mixtures, mask, red, green, blue, half_width, log_density,
            CHANNELS_LAST, False,
        )  # fmt: skip
        top, sum = join(top, sum, a + exponent, factor)
        prior_top, prior_sum = join(prior_top, prior_sum, a, 1.0)
    top, sum = over_mixtures(top, sum)
    prior_top, prior_sum = over_mixtures(prior_top, prior_sum)
    index = sample * spatial + pixel
    tl.store(out_ptr + index, top - prior_top + tl.log(sum / prior_sum), mask=exists)
    tl.store(parts_ptr + index, top, mask=exists)
    tl.store(parts_ptr + pixels + index, sum, mask=exists)


@triton.jit(do_not_specialize=[*SIZES, "half_width", "log_density"])
def log_prob_backward_kernel(
    grad_ptr,
    x_ptr,
    logits_ptr,
    parts_ptr,
    grad_logits_ptr,
    pixels,
    half_width,
    log_density,
    spatial_units,
    blocks,
    mixtures,
    X_CHANNELS_LAST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PIXELS: tl.constexpr,
    MIXTURES: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, spatial, pixel, exists = place(spatial_units, blocks, ALIGN, PIXELS, INDEX)
    mixtures = mixtures.to(INDEX)
    n = mixtures * 10
    x_ptr += sample * spatial * 3
    logits_ptr += sample * spatial * n
    grad_logits_ptr += sample * spatial * n
    index = sample * spatial + pixel
    grad = tl.load(grad_ptr + index, mask=exists, other=0.0)
    top = tl.load(parts_ptr + index, mask=exists, other=0.0)
    scale = 1.0 / tl.load(parts_ptr + pixels + index, mask=exists, other=1.0)
    prior_top = tl.full([PIXELS, MIXTURES], LOWEST, tl.float32)
    prior_sum = tl.zeros([PIXELS, MIXTURES], tl.float32)
    for first in range(0, mixtures, MIXTURES):
        k = first + tl.arange(0, MIXTURES)[None, :]
        mask = exists & (k < mixtures)
        a = read(logits_ptr, pixel, k, spatial, n, mask, float("-inf"), CHANNELS_LAST)
        prior_top, prior_sum = join(prior_top, prior_sum, a, 1.0)
    prior_top, prior_sum = over_mixtures(prior_top, prior_sum)
    prior_scale = 1.0 / prior_sum
    red = read(x_ptr, pixel, 0, spatial, 3, exists, 0.0, X_CHANNELS_LAST)
    green = read(x_ptr, pixel, 1, spatial, 3, exists, 0.0, X_CHANNELS_LAST)
    blue = read(x_ptr, pixel, 2, spatial, 3, exists, 0.0, X_CHANNELS_LAST)
    for first in range(0, mixtures, MIXTURES):
        k = first + tl.arange(0, MIXTURES)[None, :]
        mask = exists & (k < mixtures)
        a = read(logits_ptr, pixel, k, spatial, n, mask, 0.0, CHANNELS_LAST)
        factor, exponent, m0, s0, m1, s1, m2, s2, d0, d1, d2 = mixture_of(
            logits_ptr, pixel, k, spatial, mixtures, mask, red, green, blue, half_width, log_density,
            CHANNELS_LAST, True,
        )  # fmt: skip
        # Quotients of the very terms: exp of a difference of large logarithms would magnify their roundings.
        posterior = factor * tl.exp(a + exponent - top) * scale
        weight = tl.exp(a - prior_top) * prior_scale
        share = grad * posterior
        m1 = share * m1
        m2 = share * m2
        write(grad_logits_ptr, pixel, k, spatial, n, grad * (posterior - weight), mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures, spatial, n, share * m0, mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures * 2, spatial, n, share * s0, mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures * 3, spatial, n, m1 * red * d0, mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures * 4, spatial, n, m1, mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures * 5, spatial, n, share * s1, mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures * 6, spatial, n, m2 * red * d1, mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures * 7, spatial, n, m2, mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures * 8, spatial, n, share * s2, mask, CHANNELS_LAST)
        write(grad_logits_ptr, pixel, k + mixtures * 9, spatial, n, m2 * green * d2, mask, CHANNELS_LAST)


@triton.jit
def clamp(x):
    return tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))  # NaN stays


@triton.jit(do_not_specialize=SIZES)
def mean_kernel(
    logits_ptr,
    out_ptr,  # (N, 3, spatial)
    spatial_units,
    blocks,
    mixtures,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PIXELS: tl.constexpr,
    MIXTURES: tl.constexpr,
    INDEX: tl.constexpr,
):
    sample, spatial, pixel, exists = place(spatial_units, blocks, ALIGN, PIXELS, INDEX)
    mixtures = mixtures.to(INDEX)
    n = mixtures * 10
    logits_ptr += sample * spatial * n
    top = tl.full([PIXELS, MIXTURES], LOWEST, tl.float32)
    for first in range(0, mixtures, MIXTURES):
        k = first + tl.arange(0, MIXTURES)[None, :]
        a = read(logits_ptr, pixel, k, spatial, n, exists & (k < mixtures), float("-inf"), CHANNELS_LAST)
        top = tl.maximum(top, a)
    top = tl.max(top, axis=1, keep_dims=True)
    total = tl.zeros([PIXELS, MIXTURES], tl.float32)
    m0 = total
    m1 = total
    m2 = total
    c0 = total
    c1 = total
    c2 = total
    for first in range(0, mixtures, MIXTURES):
        k = first + tl.arange(0, MIXTURES)[None, :]
        mask = exists & (k < mixtures)
        weight = tl.exp(read(logits_ptr, pixel, k, spatial, n, mask, float("-inf"), CHANNELS_LAST) - top)
        total += weight
        m0 += weight * read(logits_ptr, pixel, k + mixtures, spatial, n, mask, 0.0, CHANNELS_LAST)
        m1 += weight * read(logits_ptr, pixel, k + mixtures * 4, spatial, n, mask, 0.0, CHANNELS_LAST)
        m2 += weight * read(logits_ptr, pixel, k + mixtures * 7, spatial, n, mask, 0.0, CHANNELS_LAST)
        t0, _ = tanh(read(logits_ptr, pixel, k + mixtures * 3, spatial, n, mask, 0.0, CHANNELS_LAST))
        t1, _ = tanh(read(logits_ptr, pixel, k + mixtures * 6, spatial, n, mask, 0.0, CHANNELS_LAST))
        t2, _ = tanh(read(logits_ptr, pixel, k + mixtures * 9, spatial, n, mask, 0.0, CHANNELS_LAST))
        c0 += weight * t0
        c1 += weight * t1
        c2 += weight * t2
    scale = 1.0 / tl.sum(total, axis=1, keep_dims=True)
    red = clamp(scale * tl.sum(m0, axis=1, keep_dims=True))
    green = clamp(scale * tl.sum(m1 + c0 * red, axis=1, keep_dims=True))
    blue = clamp(scale * tl.sum(m2 + c1 * red + c2 * green, axis=1, keep_dims=True))
    out_ptr += sample * spatial * 3
    store(out_ptr + pixel, red, exists)
    store(out_ptr + spatial + pixel, green, exists)
    store(out_ptr + 2 * spatial + pixel, blue, exists)


MANY = 2**18
"""Pixels from which a thread takes four: below that, one, for more programs."""


def plan(shape: tuple[int, ...], inner: bool) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of a kernel for logits of that shape, channels_last where ``inner``."""
    samples, channels, height, width = shape
    spatial, mixtures = height * width, channels // 10
    align = alignment(spatial)
    num_warps = 4 if inner else 1
    columns = min(triton.next_power_of_2(mixtures), 16) if inner else 1
    per_thread = 4 if samples * spatial >= MANY or inner else 1
    pixels = 32 * num_warps * per_thread // columns
    blocks = triton.cdiv(spatial, pixels)
    options = {
        "CHANNELS_LAST": inner,
        "ALIGN": align,
        "PIXELS": pixels,
        "MIXTURES": columns,
        "INDEX": index_type(channels * (spatial + pixels)),
        **launch_options(num_warps),
    }
    return (
        (samples * blocks,),
        {"spatial_units": spatial // align, "blocks": blocks, "mixtures": mixtures},
        options,
    )


def _bins(num_bits: int) -> tuple[float, float]:
    levels = 2.0**num_bits - 1.0
    return 1.0 / levels, math.log(levels / 2.0)


def _check(x: Tensor, logits: Tensor) -> tuple[bool, bool]:
    """Whether x and the logits are channels_last."""
    if x.shape != (logits.shape[0], 3, *logits.shape[2:]) or logits.shape[1] % 10 or not logits.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and logits {tuple(logits.shape)}: expected (N, 3, H, W) and (N, 10 K, H, W)"
        )
    return channels_last(x), channels_last(logits)


def log_prob_forward(x: Tensor, logits: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """``(log_prob (N, H, W), parts (2, N, H, W))``, float32; the parts are what backward wants.

    Args:
        x: (N, 3, H, W), float32. logits: (N, 10 K, H, W). Both in a dense memory format.

    Raises:
        ValueError: shapes do not match, or a tensor is not dense.
    """
    x_inner, inner = _check(x, logits)
    n, _, height, width = logits.shape
    out, parts = x.new_empty((n, height, width)), x.new_empty((2, n, height, width))
    if out.numel() == 0:
        return out, parts
    grid, sizes, options = plan(tuple(logits.shape), inner)
    with device_guard(logits):
        log_prob_kernel[grid](
            x,
            logits,
            out,
            parts,
            out.numel(),
            *_bins(num_bits),
            *sizes.values(),
            X_CHANNELS_LAST=x_inner,
            **options,
        )
    return out, parts


def log_prob_backward(grad: Tensor, x: Tensor, logits: Tensor, parts: Tensor, num_bits: int) -> Tensor:
    """The gradient with respect to the logits, in their dtype and format.

    Args:
        grad: (N, H, W). parts: from :func:`log_prob_forward`. Both float32 and contiguous.

    Raises:
        ValueError: as :func:`log_prob_forward`.
    """
    x_inner, inner = _check(x, logits)
    per_pixel = (logits.shape[0], *logits.shape[2:])
    for name, tensor, shape in (("grad", grad, per_pixel), ("parts", parts, (2, *per_pixel))):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: expected {shape}, contiguous"
            )
    grad_logits = torch.empty_like(logits)
    if logits.numel() == 0:
        return grad_logits
    grid, sizes, options = plan(tuple(logits.shape), inner)
    with device_guard(logits):
        log_prob_backward_kernel[grid](
            grad, x, logits, parts, grad_logits, grad.numel(), *_bins(num_bits), *sizes.values(),
            X_CHANNELS_LAST=x_inner, **options,
        )  # fmt: skip
    return grad_logits


def mean_forward(logits: Tensor, widen: bool) -> Tensor:
    """The mean image (N, 3, H, W), contiguous, of the logits' dtype or with ``widen`` float32.

    Raises:
        ValueError: the logits are not dense.
    """
    inner = channels_last(logits)
    n, _, height, width = logits.shape
    out = logits.new_empty((n, 3, height, width), dtype=torch.float32 if widen else logits.dtype)
    if out.numel() == 0:
        return out
    grid, sizes, options = plan(tuple(logits.shape), inner)
    with device_guard(logits):
        mean_kernel[grid](logits, out, *sizes.values(), **options)
    return out


def _specialisations() -> Iterator[AotSpec]:
    """Images of 256 x 256 pixels, contiguous with one and four pixels to a thread, and channels_last."""
    f32 = torch.float32
    for case, samples, inner in (
        ("1 image", 1, False),
        ("16 images", 16, False),
        ("channels_last", 16, True),
    ):
        _, sizes, options = plan((samples, 100, 256, 256), inner)
        integers = dict.fromkeys(sizes, "i32")
        per_call = {"pixels": "i32:16", "half_width": "fp32", "log_density": "fp32"}
        for dtype in (f32, torch.bfloat16, torch.float16):
            x, logits = pointer(f32), pointer(dtype)
            label = f"{case}, {short_name(dtype)}"
            # A thread's pixels of one channel side by side; in channels_last the runs of K channels begin anywhere.
            width = dtype.itemsize * 8 * (4 if samples > 1 and not inner else 1)
            tensors = {"x_ptr": x, "logits_ptr": logits}
            yield AotSpec(
                label,
                log_prob_kernel,
                {**tensors, "out_ptr": x, "parts_ptr": x, **per_call, **integers},
                {"X_CHANNELS_LAST": inner, **options},
                widest=128 if width >= 64 else 32,
            )
            yield AotSpec(
                label,
                log_prob_backward_kernel,
                {"grad_ptr": x, **tensors, "parts_ptr": x, "grad_logits_ptr": logits, **per_call, **integers},
                {"X_CHANNELS_LAST": inner, **options},
                widest=width,
            )
            yield AotSpec(
                label,
                mean_kernel,
                {"logits_ptr": logits, "out_ptr": logits, **integers},
                options,
                widest=width,
            )


AOT = list(_specialisations())
