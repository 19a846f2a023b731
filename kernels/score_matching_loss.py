"""Triton kernels of ``score_matching_loss``: the sums of ``weight_p (pred - noise)^2`` over each sample and, in the
same pass, ``weight_q (pred - noise)^2 + const`` per element; and the gradients of both.

All are bound by memory: forward reads pred and noise once and writes the cross entropy and a few partial sums, backward
reads pred, noise and perhaps a gradient per element and writes what is wanted of two gradients. A sample is a run in
memory of whatever order, contiguous or channels_last. Each program of the forward kernel adds its tiles up in
registers and writes one partial sum, and a second kernel adds those of a sample in a fixed order; where one program
does a whole sample, its sum is the result. No atomics: the result is the same in every run.
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
    sample_stride,
    short_name,
    store,
    warps,
)


# Specialising on the values of sizes would compile anew for almost every shape; ALIGN says what is needed.
@triton.jit(do_not_specialize=["p_stride", "q_stride", "sample_units", "blocks", "const"])
def forward_kernel(
    pred_ptr,
    noise_ptr,
    weight_p_ptr,
    weight_q_ptr,  # None where there is no cross entropy
    partial_ptr,  # (B, programs per sample), COMPUTE
    cross_entropy_ptr,  # COMPUTE, or None
    const,  # a number; in float64, which arguments cannot be, a pointer to it
    p_stride,
    q_stride,
    sample_units,  # elements of a sample / ALIGN
    blocks,  # programs per sample
    COMPUTE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,  # per program
    INDEX: tl.constexpr,  # integer type of an index inside one sample
):
    pid = tl.program_id(0)
    sample = pid // blocks
    size = sample_units.to(INDEX) * ALIGN
    begin = (pid - sample * blocks).to(INDEX) * (BLOCK * TILES)
    sample = sample.to(tl.int64)
    base = sample * size
    weight_p = tl.load(weight_p_ptr + sample * p_stride).to(COMPUTE)
    if CROSS_ENTROPY:
        weight_q = tl.load(weight_q_ptr + sample * q_stride).to(COMPUTE)
        if COMPUTE.primitive_bitwidth == 64:
            constant = tl.load(const)
        else:
            constant = const

    total = tl.zeros([BLOCK], COMPUTE)
    for i in range(TILES):
        index = begin + (i * BLOCK + tl.arange(0, BLOCK)).to(INDEX)
        mask = index < size
        pred = tl.load(pred_ptr + base + index, mask=mask, other=0.0).to(COMPUTE)
        noise = tl.load(noise_ptr + base + index, mask=mask, other=0.0).to(COMPUTE)
        difference = pred - noise
        square = difference * difference
        # Not left to the zeros of what is masked: an infinite weight times 0 is NaN.
        total += tl.where(mask, weight_p * square, 0.0)
        if CROSS_ENTROPY:
            tl.store(cross_entropy_ptr + base + index, weight_q * square + constant, mask=mask)
    tl.store(partial_ptr + pid, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["partials"])
def sum_kernel(partial_ptr, p_loss_ptr, partials, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of one sample's partial sums; one program per sample."""
    sample = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    values = tl.load(partial_ptr + sample * partials + index, mask=index < partials, other=0.0)
    tl.store(p_loss_ptr + sample, tl.sum(values.to(COMPUTE), axis=0))


@triton.jit(
    do_not_specialize=["p_stride", "q_stride", "grad_p_stride", "grad_ce_stride", "sample_units", "blocks"]
)
def backward_kernel(
    grad_p_ptr,  # None where it is absent, as the following one
    grad_ce_ptr,  # one value per element, or per sample
    pred_ptr,
    noise_ptr,
    weight_p_ptr,
    weight_q_ptr,
    grad_pred_ptr,  # None where it is not wanted, as the following one
    grad_noise_ptr,
    p_stride,
    q_stride,
    grad_p_stride,
    grad_ce_stride,
    sample_units,
    blocks,
    COMPUTE: tl.constexpr,
    CE_PER_ELEMENT: tl.constexpr,
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
    pred = tl.load(pred_ptr + base + index, mask=mask).to(COMPUTE)
    noise = tl.load(noise_ptr + base + index, mask=mask).to(COMPUTE)

    factor = tl.zeros([BLOCK], COMPUTE)
    if grad_p_ptr is not None:
        weight_p = tl.load(weight_p_ptr + sample * p_stride).to(COMPUTE)
        factor += weight_p * tl.load(grad_p_ptr + sample * grad_p_stride).to(COMPUTE)
    if grad_ce_ptr is not None:
        weight_q = tl.load(weight_q_ptr + sample * q_stride).to(COMPUTE)
        if CE_PER_ELEMENT:
            factor += weight_q * tl.load(grad_ce_ptr + base + index, mask=mask).to(COMPUTE)
        else:
            factor += weight_q * tl.load(grad_ce_ptr + sample * grad_ce_stride).to(COMPUTE)
    gradient = 2.0 * (pred - noise) * factor
    if grad_pred_ptr is not None:
        store(grad_pred_ptr + base + index, gradient, mask)
    if grad_noise_ptr is not None:
        store(grad_noise_ptr + base + index, -gradient, mask)


MAX_PARTIALS = 1024
"""Most partial sums per sample: one block adds them."""


def plan(
    samples: int, size: int, tiles: bool = False
) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options) of a kernel for samples of ``size`` elements; a function of the shape alone.

    ``tiles``: of the forward kernel, whose programs do as many tiles as leave at most :data:`MAX_PARTIALS` of them.
    """
    align = alignment(size)
    block = min(max(triton.next_power_of_2(size), 256), 1024)
    blocks = triton.cdiv(size, block)
    options = {"ALIGN": align, "BLOCK": block, "INDEX": index_type(size), **launch_options(warps(block))}
    if tiles:
        options["TILES"] = triton.next_power_of_2(triton.cdiv(blocks, MAX_PARTIALS))
        options["INDEX"] = index_type(size + options["TILES"] * block)  # how far the last program reaches
        blocks = triton.cdiv(blocks, options["TILES"])
    return (samples * blocks,), {"sample_units": size // align, "blocks": blocks}, options


def forward(
    pred: Tensor, noise: Tensor, weight_p: Tensor, weight_q: Tensor | None, const: float
) -> tuple[Tensor, Tensor]:
    """``(p_loss, cross_entropy)`` in float32, or float64 where pred or noise is; the cross entropy in pred's format.

    Args:
        pred, noise: (B, C, ...), one dense memory format. weight_p, weight_q: 0-d, (1,) or (B,), float32 or float64;
        without weight_q the second result is an empty tensor of shape (0,). const: added to the cross entropy.

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    common_layout(pred, noise)
    compute = compute_type(pred, noise)
    dtype = torch.float64 if compute == tl.float64 else torch.float32
    samples = pred.shape[0]
    p_stride = sample_stride("weight_p", weight_p, samples)
    q_stride = 0 if weight_q is None else sample_stride("weight_q", weight_q, samples)
    p_loss = pred.new_empty(samples, dtype=dtype)
    cross_entropy = None if weight_q is None else torch.empty_like(pred, dtype=dtype)
    results = p_loss, pred.new_empty(0, dtype=dtype) if cross_entropy is None else cross_entropy
    if pred.numel() == 0:
        p_loss.zero_()
        return results
    grid, sizes, options = plan(samples, pred.numel() // samples, tiles=True)
    partials = sizes["blocks"]
    partial = p_loss if partials == 1 else pred.new_empty((samples, partials), dtype=dtype)
    if compute == tl.float64 and weight_q is not None:
        const = torch.full((), const, dtype=torch.float64, device=pred.device)
    with device_guard(pred):
        forward_kernel[grid](
            pred,
            noise,
            weight_p,
            weight_q,
            partial,
            cross_entropy,
            const,
            p_stride,
            q_stride,
            *sizes.values(),
            COMPUTE=compute,
            CROSS_ENTROPY=weight_q is not None,
            **options,
        )
        if partials > 1:
            block = triton.next_power_of_2(partials)
            sum_kernel[(samples,)](
                partial, p_loss, partials, COMPUTE=compute, BLOCK=block, **launch_options(warps(block))
            )
    return results


def backward(
    grad_p: Tensor | None,
    grad_ce: Tensor | None,
    pred: Tensor,
    noise: Tensor,
    weight_p: Tensor,
    weight_q: Tensor | None,
    for_pred: bool,
    for_noise: bool,
) -> tuple[Tensor, Tensor]:
    """``2 (pred - noise) (weight_p grad_p + weight_q grad_ce)`` and its negative, in the dtypes of pred and noise.

    Args:
        grad_p: (B,), gradient of the sums, or None. grad_ce: that of the cross entropy, like pred or, where it is the
        same in a whole sample, (B,); or None. for_pred, for_noise: which gradients are wanted; the other is (0,).

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    per_element = grad_ce is not None and grad_ce.dim() > 1
    common_layout(pred, noise, *([grad_ce] if grad_ce is not None and per_element else []))
    if grad_ce is not None and weight_q is None:
        raise ValueError("a gradient of the cross entropy needs weight_q")
    grad_pred = torch.empty_like(pred) if for_pred else pred.new_empty(0)
    grad_noise = torch.empty_like(noise) if for_noise else noise.new_empty(0)
    if pred.numel() == 0:
        return grad_pred, grad_noise
    samples = pred.shape[0]
    strides = (
        sample_stride("weight_p", weight_p, samples),
        0 if weight_q is None else sample_stride("weight_q", weight_q, samples),
        0 if grad_p is None else sample_stride("grad_p", grad_p, samples),
        0 if grad_ce is None or per_element else sample_stride("grad_ce", grad_ce, samples),
    )
    grid, sizes, options = plan(samples, pred.numel() // samples)
    with device_guard(pred):
        backward_kernel[grid](
            grad_p,
            grad_ce,
            pred,
            noise,
            weight_p,
            weight_q,
            grad_pred if for_pred else None,
            grad_noise if for_noise else None,
            *strides,
            *sizes.values(),
            COMPUTE=compute_type(pred, noise),
            CE_PER_ELEMENT=per_element,
            **options,
        )
    return grad_pred, grad_noise


def _specialisations() -> Iterator[AotSpec]:
    """The latents of the CIFAR-10 configurations in the dtypes of (pred, noise) that training and evaluation use."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    shape = (64, 180 * 256)
    for p, n in ((f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f64, f64)):
        wide = f64 if f64 in (p, n) else f32
        case = f"pred {short_name(p)}, noise {short_name(n)}"
        tensors = {"pred_ptr": pointer(p), "noise_ptr": pointer(n), "weight_p_ptr": pointer(wide)}
        _, sizes, options = plan(*shape, tiles=True)
        integers = dict.fromkeys(["p_stride", "q_stride", *sizes], "i32")
        for both in (False, True):
            absent = {} if both else {"weight_q_ptr": None, "cross_entropy_ptr": None}
            present = {"weight_q_ptr": pointer(wide), "cross_entropy_ptr": pointer(wide)} if both else {}
            yield AotSpec(
                f"{case}{', cross entropy' if both else ''}",
                forward_kernel,
                {
                    **tensors,
                    **present,
                    "partial_ptr": pointer(wide),
                    "const": "*fp64:16" if both and wide == f64 else "fp32",
                    **integers,
                },
                {"COMPUTE": TYPES[wide], "CROSS_ENTROPY": both, **absent, **options},
                widest=128 if both else 32,  # the sum alone is one number per program; loads are wide in both
            )
        _, sizes, options = plan(*shape)
        strides = ("p_stride", "q_stride", "grad_p_stride", "grad_ce_stride")
        integers = dict.fromkeys([*strides, *sizes], "i32")
        for kind in ("of the loss", "of the cross entropy, per sample", "of both, per element"):
            optional = {
                "grad_p_ptr": pointer(wide) if "loss" in kind or "both" in kind else None,
                "grad_ce_ptr": None if "loss" in kind else pointer(wide),
                "weight_q_ptr": None if "loss" in kind else pointer(wide),
                "grad_noise_ptr": pointer(n) if "both" in kind else None,
            }
            yield AotSpec(
                f"{case}, {kind}",
                backward_kernel,
                {
                    **tensors,
                    "grad_pred_ptr": pointer(p),
                    **{name: kind for name, kind in optional.items() if kind is not None},
                    **integers,
                },
                {
                    "COMPUTE": TYPES[wide],
                    "CE_PER_ELEMENT": "element" in kind,
                    **{name: None for name, kind in optional.items() if kind is None},
                    **options,
                },
            )
    for dtype in (f32, f64):
        yield AotSpec(
            short_name(dtype),
            sum_kernel,
            {"partial_ptr": pointer(dtype), "p_loss_ptr": pointer(dtype), "partials": "i32"},
            {"COMPUTE": TYPES[dtype], "BLOCK": MAX_PARTIALS, **launch_options(warps(MAX_PARTIALS))},
            widest=32,  # a few thousand numbers in all, in rows of any length
        )


AOT = list(_specialisations())
