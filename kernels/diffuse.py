"""Triton kernels of ``diffuse``: ``m z0 + sqrt(var) noise``, and the scaling that is the gradient of either tensor.

Both are bound by memory: forward reads z0 and noise once and writes the result, backward reads one gradient and writes
another. A sample is a run in memory of whatever order, contiguous or channels_last; m and var are its own or shared.
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
    compute_type,
    device_guard,
    index_type,
    launch_options,
    pointer,
    sample_stride,
    short_name,
    store,
    warps,
)


# Specialising on the values of sizes would compile anew for almost every shape; ALIGN says what is needed.
@triton.jit(do_not_specialize=["m_stride", "var_stride", "sample_units", "blocks"])
def forward_kernel(
    z0_ptr,
    noise_ptr,
    m_ptr,
    var_ptr,
    out_ptr,
    m_stride,
    var_stride,
    sample_units,  # elements of a sample / ALIGN
    blocks,  # programs per sample
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index inside one sample
):
    pid = tl.program_id(0)
    sample = pid // blocks
    size = sample_units.to(INDEX) * ALIGN
    index = (pid - sample * blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK).to(INDEX)
    mask = index < size
    sample = sample.to(tl.int64)
    base = sample * size
    m = tl.load(m_ptr + sample * m_stride).to(COMPUTE)
    var = tl.load(var_ptr + sample * var_stride)
    if var_ptr.dtype.element_ty == tl.float64:
        deviation = tl.sqrt(var).to(COMPUTE)
    elif COMPUTE.primitive_bitwidth == 64:
        deviation = tl.sqrt(var.to(tl.float64))
    else:
        deviation = tl.sqrt_rn(var)
    z0 = tl.load(z0_ptr + base + index, mask=mask).to(COMPUTE)
    noise = tl.load(noise_ptr + base + index, mask=mask).to(COMPUTE)
    store(out_ptr + base + index, m * z0 + deviation * noise, mask)


@triton.jit(do_not_specialize=["factor_stride", "sample_units", "blocks"])
def backward_kernel(
    grad_ptr,
    factor_ptr,
    out_ptr,
    factor_stride,
    sample_units,
    blocks,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = pid // blocks
    size = sample_units.to(INDEX) * ALIGN
    index = (pid - sample * blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK).to(INDEX)
    mask = index < size
    sample = sample.to(tl.int64)
    base = sample * size
    factor = tl.load(factor_ptr + sample * factor_stride).to(COMPUTE)
    grad = tl.load(grad_ptr + base + index, mask=mask).to(COMPUTE)
    store(out_ptr + base + index, factor * grad, mask)


def plan(samples: int, size: int) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of either kernel for samples of ``size`` elements."""
    align = alignment(size)
    block = min(max(triton.next_power_of_2(size), 256), 1024)
    blocks = triton.cdiv(size, block)
    options = {"ALIGN": align, "BLOCK": block, "INDEX": index_type(size), **launch_options(warps(block))}
    return (samples * blocks,), {"sample_units": size // align, "blocks": blocks}, options


def forward(z0: Tensor, noise: Tensor, m: Tensor, var: Tensor) -> Tensor:
    """``m z0 + sqrt(var) noise``, in z0's dtype and memory format.

    Args:
        z0, noise: (B, ...), one dense memory format. m, var: 0-d, (1,) or (B,), float32 or float64.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    common_layout(z0, noise)
    out = torch.empty_like(z0)
    if z0.numel() == 0:
        return out
    samples = z0.shape[0]
    strides = sample_stride("m", m, samples), sample_stride("var", var, samples)
    grid, sizes, options = plan(samples, z0.numel() // samples)
    with device_guard(z0):
        forward_kernel[grid](
            z0, noise, m, var, out, *strides, *sizes.values(), COMPUTE=compute_type(z0, noise), **options
        )
    return out


def backward(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor grad`` in ``dtype`` and grad's memory format.

    Args:
        grad: (B, ...), dense. factor: 0-d, (1,) or (B,), float32 or float64.

    Raises:
        ValueError: grad is not dense, or factor of another shape.
    """
    channels_last(grad)  # raises where it is not dense
    out = torch.empty_like(grad, dtype=dtype)
    if grad.numel() == 0:
        return out
    samples = grad.shape[0]
    stride = sample_stride("factor", factor, samples)
    grid, sizes, options = plan(samples, grad.numel() // samples)
    with device_guard(grad):
        backward_kernel[grid](
            grad, factor, out, stride, *sizes.values(), COMPUTE=compute_type(grad, out), **options
        )
    return out


def _specialisations() -> Iterator[AotSpec]:
    """The latents of the CIFAR-10 configurations in the dtypes of (z0, noise) that training and evaluation use."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    _, sizes, options = plan(64, 180 * 256)
    integers = dict.fromkeys(sizes, "i32")
    for z0, noise, scalar in (
        (f32, f32, f32),
        (bf16, bf16, f32),
        (f16, f32, f32),
        (f32, f32, f64),
        (f64, f64, f64),
    ):
        compute = tl.float64 if z0 == f64 else tl.float32
        yield AotSpec(
            f"z0 {short_name(z0)}, noise {short_name(noise)}, m {short_name(scalar)}",
            forward_kernel,
            {
                "z0_ptr": pointer(z0),
                "noise_ptr": pointer(noise),
                "m_ptr": pointer(scalar),
                "var_ptr": pointer(scalar),
                "out_ptr": pointer(z0),
                "m_stride": "i32",
                "var_stride": "i32",
                **integers,
            },
            {"COMPUTE": compute, **options},
        )
    for grad, out in ((f32, f32), (bf16, bf16), (f32, bf16), (f64, f64)):
        yield AotSpec(
            f"grad {short_name(grad)}, result {short_name(out)}",
            backward_kernel,
            {
                "grad_ptr": pointer(grad),
                "factor_ptr": pointer(f64 if grad == f64 else f32),
                "out_ptr": pointer(out),
                "factor_stride": "i32",
                **integers,
            },
            {"COMPUTE": tl.float64 if grad == f64 else tl.float32, **options},
        )


AOT = list(_specialisations())
