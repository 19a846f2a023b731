"""Triton kernels of ``residual_add``: ``(x + h) * scale``, and its gradient for both, ``grad * scale``.

Both are bound by memory and walk through it as it lies, whatever the memory format: no element needs to know its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._common import (
    TYPES,
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


# Specialising on the values of sizes would compile anew for almost every shape; ALIGN says what is needed.
@triton.jit(do_not_specialize=["scale", "units"])
def combine_kernel(
    x_ptr,
    h_ptr,  # None for the gradient
    out_ptr,
    scale,  # a number; in float64, which arguments cannot be, a pointer to it
    units,  # elements / ALIGN
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    size = units.to(INDEX) * ALIGN
    index = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK).to(INDEX)
    mask = index < size
    value = tl.load(x_ptr + index, mask=mask).to(COMPUTE)
    if h_ptr is not None:
        value += tl.load(h_ptr + index, mask=mask).to(COMPUTE)
    if COMPUTE.primitive_bitwidth == 64:
        factor = tl.load(scale)
    else:
        factor = scale
    store(out_ptr + index, value * factor, mask)


def plan(elements: int) -> tuple[tuple[int], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of the kernel; a function of the number of elements alone."""
    align = alignment(elements)
    block = min(max(triton.next_power_of_2(elements), 256), 1024)
    options = {"ALIGN": align, "BLOCK": block, "INDEX": index_type(elements), **launch_options(warps(block))}
    return (triton.cdiv(elements, block),), {"units": elements // align}, options


def run(x: Tensor, h: Tensor | None, scale: float) -> Tensor:
    """``(x + h) * scale``, without h where it is None."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    compute = compute_type(x)
    factor: Tensor | float = scale
    if compute == tl.float64:
        factor = torch.full((), scale, dtype=torch.float64, device=x.device)
    grid, sizes, options = plan(x.numel())
    with device_guard(x):
        combine_kernel[grid](x, h, out, factor, *sizes.values(), COMPUTE=compute, **options)
    return out


def forward(x: Tensor, h: Tensor, scale: float) -> Tensor:
    """``(x + h) * scale`` in x's dtype and memory format.

    Args:
        x, h: of one shape and dtype, in one dense memory format.

    Raises:
        ValueError: they are not.
    """
    common_layout(x, h)
    if x.dtype != h.dtype:
        raise ValueError(f"x is {x.dtype} and h {h.dtype}: expected one dtype")
    return run(x, h, scale)


def backward(grad: Tensor, scale: float) -> Tensor:
    """``grad * scale``, the gradient of both.

    Raises:
        ValueError: grad is not dense.
    """
    common_layout(grad)
    return run(grad, None, scale)


def _specialisations() -> Iterator[AotSpec]:
    _, sizes, options = plan(64 * 512 * 16 * 16)
    for dtype in TYPES:
        wide = dtype == torch.float64
        tensors = {"x_ptr": pointer(dtype), "out_ptr": pointer(dtype)}
        common = {"scale": "*fp64:16" if wide else "fp32", **dict.fromkeys(sizes, "i32")}
        constants = {"COMPUTE": tl.float64 if wide else tl.float32, **options}
        yield AotSpec(
            short_name(dtype), combine_kernel, {**tensors, "h_ptr": pointer(dtype), **common}, constants
        )
        yield AotSpec(
            f"{short_name(dtype)}, gradient",
            combine_kernel,
            {**tensors, **common},
            {"h_ptr": None, **constants},
        )


AOT = list(_specialisations())
