"""Triton kernels of the Runge-Kutta family: stages, the end of a step with the norm of its error, and step control.

``step_kernel`` is the arithmetic of four operations. It computes ``y + h sum_i a_i k_i``; given the network's output it
first computes the newest stage, ``p z + a q (eps - r z)``, stores it and uses it from registers; given somewhere to put
partial sums it also adds up the squares of the scaled error. All of them are bound by memory: every tensor is read or
written once. Which stages are read is known at compile time, one bit per stage; the coefficients are not.

Sums are in float64 and in a fixed order that depends on the shape alone: one partial sum per program, which
``norm_kernel`` adds. No atomics: the result is the same in every run.

Coefficients, tolerances and the controller's constants reach the kernels in a tensor that stays on the device, since a
float argument of a Triton kernel is rounded to float32. Its first use copies it there, which a CUDA graph cannot
capture: run a step before capturing one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._common import (
    TYPES,
    VECTOR,
    AotSpec,
    alignment,
    compute_type,
    device_guard,
    index_type,
    launch_options,
    mixing,
    pointer,
    sample_stride,
    short_name,
)


# Specialising on the values of sizes would compile anew for almost every shape; ALIGN and GROUP say what is needed.
# Scalars may be columns of a control block, whose alignment says nothing.
@triton.jit(
    do_not_specialize=[
        "p_stride",
        "q_stride",
        "r_stride",
        "h_stride",
        "samples",
        "inner_groups",
        "sample_units",
        "blocks",
    ],
    do_not_specialize_on_alignment=["logit_ptr", "p_ptr", "q_ptr", "r_ptr", "h_ptr"],
)
def step_kernel(
    y_ptr,
    k_ptr,  # (stages, samples, size)
    out_ptr,  # with a drift: holds z
    eps_ptr,  # None: no drift
    logit_ptr,  # None: a = 1
    p_ptr,
    q_ptr,
    r_ptr,
    h_ptr,
    coefficients_ptr,  # STAGES of the solution, STAGES of the error, rtol, atol; COMPUTE
    partial_ptr,  # None: no norm; (programs,), float64
    p_stride,
    q_stride,
    r_stride,
    h_stride,
    samples,
    inner_groups,  # positions per channel / GROUP
    sample_units,  # elements of a sample / ALIGN
    blocks,  # programs per sample
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
    SOLUTION: tl.constexpr,  # bit i: stage i has a coefficient in the solution
    ERROR: tl.constexpr,  # the same for the error
    NEW: tl.constexpr,  # the stage that the drift gives
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,  # neighbours in memory that share a channel
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index inside one sample
):
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid - sample * blocks
    sample = sample.to(tl.int64)
    size = sample_units.to(INDEX) * ALIGN

    # Counting in groups: one division for each, and the compiler sees that a group starts at a multiple of GROUP.
    group = (block.to(INDEX) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP).to(INDEX))[:, None]
    index = group * GROUP + tl.arange(0, GROUP)[None, :]
    mask = index < size
    base = sample * size
    stage_size = samples.to(tl.int64) * size

    h = tl.load(h_ptr + sample * h_stride).to(COMPUTE)
    if partial_ptr is not None:
        rtol = tl.load(coefficients_ptr + 2 * STAGES)
        atol = tl.load(coefficients_ptr + 2 * STAGES + 1)
    if eps_ptr is not None:
        z = tl.load(out_ptr + base + index, mask=mask).to(COMPUTE)
        eps = tl.load(eps_ptr + base + index, mask=mask).to(COMPUTE)
        p = tl.load(p_ptr + sample * p_stride).to(COMPUTE)
        q = tl.load(q_ptr + sample * q_stride).to(COMPUTE)
        r = tl.load(r_ptr + sample * r_stride).to(COMPUTE)
        correction = q * (eps - r * z)
        if logit_ptr is not None:
            logit = tl.load(logit_ptr + group // inner_groups, mask=group * GROUP < size)
            a, _ = mixing(logit.to(COMPUTE))
            correction = a * correction
        new = (p * z + correction).to(k_ptr.dtype.element_ty)

    increment = tl.zeros([BLOCK // GROUP, GROUP], COMPUTE)
    error = tl.zeros([BLOCK // GROUP, GROUP], COMPUTE)
    for slot in tl.static_range(STAGES):
        if ((SOLUTION | ERROR) >> slot) & 1:
            if slot == NEW:
                stage = new.to(COMPUTE)
            else:
                stage = tl.load(k_ptr + (slot * stage_size + base) + index, mask=mask).to(COMPUTE)
            # A zero times a stage that is not finite would spoil the sum.
            if (SOLUTION >> slot) & 1:
                increment += tl.load(coefficients_ptr + slot) * stage
            if (ERROR >> slot) & 1:
                error += tl.load(coefficients_ptr + STAGES + slot) * stage
    # Not before it is needed: it would occupy registers all the time.
    y = tl.load(y_ptr + base + index, mask=mask).to(COMPUTE)
    result = (y + h * increment).to(out_ptr.dtype.element_ty)

    # After all loads: the compiler must assume that a load behind a store depends on it.
    if eps_ptr is not None:
        tl.store(k_ptr + (NEW * stage_size + base) + index, new, mask=mask)
    tl.store(out_ptr + base + index, result, mask=mask)
    if partial_ptr is not None:
        larger = tl.maximum(tl.abs(y), tl.abs(result.to(COMPUTE)), propagate_nan=tl.PropagateNan.ALL)
        ratio = h * error / (atol + rtol * larger)
        squares = tl.where(mask, ratio * ratio, 0.0).to(tl.float64)
        tl.store(partial_ptr + pid, tl.sum(squares))


@triton.jit(do_not_specialize=["partials", "elements"])
def norm_kernel(
    partial_ptr,  # (results, partials), float64
    norm_ptr,
    partials,
    elements,  # that went into one result
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """The root of the mean, of one sample or of the whole batch; one program per result."""
    result = tl.program_id(0)
    row = partial_ptr + result.to(tl.int64) * partials
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(ROUNDS):
        index = i * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(row + index, mask=index < partials, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0) / elements.to(tl.float64))
    tl.store(norm_ptr + result, norm.to(norm_ptr.dtype.element_ty))


@triton.jit
def spacing(x, up):
    """Distance from a float64 number to the next one: above it where ``up``, else below it."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int64, bitcast=True)
    # The bits of magnitudes are in order. Both neighbours of 0 have the magnitude after it.
    away = ((x > 0) == up) | (x == 0)
    neighbour = (bits + tl.where(away, 1, -1)).to(tl.float64, bitcast=True)
    return tl.abs(neighbour - magnitude)


@triton.jit(
    do_not_specialize=["norm_stride", "samples"], do_not_specialize_on_alignment=["control_ptr", "norm_ptr"]
)
def control_kernel(
    control_ptr,  # (samples, 8), float64
    norm_ptr,
    constants_ptr,  # t_end, exponent, safety, min_factor, max_factor; float64
    out_ptr,
    norm_stride,
    samples,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = sample < samples
    old = control_ptr + sample * 8
    new = out_ptr + sample * 8
    t = tl.load(old, mask=mask, other=0.0)
    h = tl.load(old + 1, mask=mask, other=0.0)
    t_next = tl.load(old + 2, mask=mask, other=0.0)
    retried = tl.load(old + 3, mask=mask, other=0.0)
    signal = tl.load(old + 4, mask=mask, other=0.0)
    accepted = tl.load(old + 5, mask=mask, other=0.0)
    rejected = tl.load(old + 6, mask=mask, other=0.0)
    last = tl.load(old + 7, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + sample * norm_stride, mask=mask, other=0.0).to(tl.float64)
    t_end = tl.load(constants_ptr)
    exponent = tl.load(constants_ptr + 1)
    safety = tl.load(constants_ptr + 2)
    min_factor = tl.load(constants_ptr + 3)
    max_factor = tl.load(constants_ptr + 4)

    finite = tl.abs(norm) < float("inf")
    accept = norm < 1
    # norm^exponent; the logarithm of 0 and of infinity leads to the right limit unless it meets a zero exponent.
    power = tl.where(exponent == 0, 1.0, tl.exp(exponent * tl.log(norm)))
    factor = safety * power
    grow = tl.minimum(factor, tl.where(retried > 0, tl.minimum(max_factor, 1.0), max_factor))
    shrink = tl.where(finite, tl.maximum(factor, min_factor), min_factor)
    size = tl.abs(h) * tl.where(accept, grow, shrink)
    start = tl.where(accept, t_next, t)
    smallest = 10 * spacing(start, h > 0)
    stuck = size < smallest
    size = tl.where(accept & stuck, smallest, size)
    end = tl.where(h > 0, start + size, start - size)
    beyond = tl.where(h > 0, end > t_end, end < t_end)
    end = tl.where(beyond, t_end, end)
    reached = tl.where(accept, start, tl.where(stuck, float("inf"), start))

    # A step of size 0 says that the end was reached before.
    active = h != 0
    count = tl.where(accept, 1.0, 0.0)
    tl.store(new, tl.where(active, start, t), mask=mask)
    tl.store(new + 1, tl.where(active, end - start, h), mask=mask)
    tl.store(new + 2, tl.where(active, end, t_next), mask=mask)
    tl.store(new + 3, tl.where(active, 1.0 - count, retried), mask=mask)
    tl.store(new + 4, tl.where(active, tl.where(finite, reached, float("nan")), signal), mask=mask)
    tl.store(new + 5, tl.where(active, accepted + count, accepted), mask=mask)
    tl.store(new + 6, tl.where(active, rejected + (1.0 - count), rejected), mask=mask)
    tl.store(new + 7, tl.where(active, norm, last), mask=mask)


THREADS = 128
"""Threads of the largest program of ``step_kernel``."""

MIN_PROGRAMS = 512
"""Programs below which smaller ones are launched: a few for every multiprocessor of the largest GPUs."""

NORM_BLOCK = 1024
"""Partial sums that ``norm_kernel`` reads at a time."""

CONTROL_BLOCK = 64


def per_thread(dtype: torch.dtype) -> int:
    """Elements per thread and tensor, of which there are up to a dozen in flight: 32 bytes, in half precision 16."""
    return 4 if dtype == torch.float64 else 8


def step_block(samples: int, size: int, dtype: torch.dtype) -> int:
    """Elements per program: many, but with few idle lanes at the end of a sample and enough programs."""
    largest = THREADS * per_thread(dtype)
    for block in (largest, largest // 2):
        blocks = triton.cdiv(size, block)
        if blocks * block * 7 <= size * 8 and samples * blocks >= MIN_PROGRAMS:
            return block
    return largest // 4


def step_plan(
    samples: int, size: int, space: int | None, dtype: torch.dtype
) -> tuple[int, dict[str, int], dict[str, Any]]:
    """(programs per sample, sizes, options): what ``step_kernel`` gets besides tensors, strides and coefficients.

    ``space``: positions of a channel; None where channels do not matter.
    """
    align = alignment(size)
    # One access of the state: tensors of smaller elements then have the same layout, and none is shuffled to another.
    group = min(alignment(size if space is None else space), VECTOR // dtype.itemsize)
    block = step_block(samples, size, dtype)
    blocks = triton.cdiv(size, block)
    sizes = {
        "samples": samples,
        "inner_groups": (size if space is None else space) // group,
        "sample_units": size // align,
        "blocks": blocks,
    }
    options = {
        "ALIGN": align,
        "GROUP": group,
        "BLOCK": block,
        "INDEX": index_type(size),
        **launch_options(block // (32 * per_thread(dtype)), registers=128),
    }
    return blocks, sizes, options


def norm_options(partials: int) -> dict[str, Any]:
    """Options of ``norm_kernel``."""
    if partials <= 128:
        return {"BLOCK": 128, "ROUNDS": 1, **launch_options(1)}
    # Few values, so that few variants are compiled.
    rounds = triton.next_power_of_2(triton.cdiv(partials, NORM_BLOCK))
    return {"BLOCK": NORM_BLOCK, "ROUNDS": rounds, **launch_options(4)}


# Never dropped: a captured CUDA graph goes on reading them.
@functools.cache
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in the device's memory, copied there once."""
    return torch.tensor(values, dtype=dtype, device=device)


class Rows(NamedTuple):
    """One or two rows of coefficients: ``masks`` for the kernel's constants, ``values`` for its memory."""

    masks: dict[str, int]
    values: tuple[float, ...]


def rows(solution: Sequence[float], error: Sequence[float] = ()) -> Rows:
    """The rows in the form that ``step_kernel`` takes; zeros are not among the stages that it reads."""
    stages = max(len(solution), len(error))
    padded = [[*row, *[0.0] * (stages - len(row))] for row in (solution, error)]
    masks = [sum(1 << i for i, c in enumerate(row) if c != 0) for row in padded]
    return Rows({"STAGES": stages, "SOLUTION": masks[0], "ERROR": masks[1]}, (*padded[0], *padded[1]))


class Drift(NamedTuple):
    """What gives the newest stage."""

    eps: Tensor
    mixing_logit: Tensor | None
    p: Tensor
    q: Tensor
    r: Tensor
    stage: int


def _check(y: Tensor, k: Tensor, out: Tensor, stages: int, drift: Drift | None) -> None:
    if not (y.is_contiguous() and k.is_contiguous() and out.is_contiguous()):
        raise ValueError("the state and its stages must be contiguous")
    if k.shape[1:] != y.shape or k.shape[0] < stages or out.shape != y.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected {stages} or more stages {tuple(y.shape)}")
    if not y.dtype == k.dtype == out.dtype:
        raise ValueError(f"states and stages are {y.dtype}, {k.dtype} and {out.dtype}: expected one dtype")
    if drift is None:
        return
    if drift.eps.shape != y.shape or not drift.eps.is_contiguous():
        raise ValueError(
            f"eps of shape {tuple(drift.eps.shape)} must be contiguous and of shape {tuple(y.shape)}"
        )
    if not 0 <= drift.stage < k.shape[0]:
        raise ValueError(f"stage is {drift.stage}, expected 0 to {k.shape[0] - 1}")
    if drift.mixing_logit is not None and (y.dim() < 2 or drift.mixing_logit.numel() != y.shape[1]):
        raise ValueError(
            f"mixing_logit has shape {tuple(drift.mixing_logit.shape)} for a state {tuple(y.shape)}"
        )


def _step(
    y: Tensor,
    k: Tensor,
    out: Tensor,
    coefficients: Rows,
    h: Tensor,
    drift: Drift | None = None,
    tolerances: tuple[float, float] | None = None,
    per_sample: bool = False,
) -> Tensor | None:
    """Launch ``step_kernel``, and ``norm_kernel`` where there are tolerances; returns the norm."""
    _check(y, k, out, coefficients.masks["STAGES"], drift)
    norm = None
    if tolerances is not None:
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        norm = torch.empty(y.shape[:1] if per_sample else (), dtype=dtype, device=y.device)
    if y.numel() == 0:
        return None if norm is None else norm.zero_()

    samples = y.shape[0] if y.dim() else 1
    eps, logit, p, q, r, stage = (None,) * 5 + (-1,) if drift is None else drift
    scalars = (("p", p), ("q", q), ("r", r), ("h", h))
    strides = [0 if s is None else sample_stride(name, s, samples) for name, s in scalars]
    # Numbers are of one sample each, or of all: then the state is one run of memory, whatever its shape.
    if per_sample or logit is not None or any(s is not None and s.numel() > 1 for _, s in scalars):
        runs, size = samples, y.numel() // samples
    else:
        runs, size = 1, y.numel()
    space = None if logit is None else size // y.shape[1]
    blocks, sizes, options = step_plan(runs, size, space, y.dtype)
    compute = compute_type(y) if eps is None else compute_type(y, eps)
    compute_dtype = torch.float64 if compute == tl.float64 else torch.float32
    partial = None
    if norm is not None:
        partial = torch.empty(runs * blocks, dtype=torch.float64, device=y.device)
    with device_guard(y):
        step_kernel[(runs * blocks,)](
            y,
            k,
            out,
            eps,
            None if logit is None else logit.contiguous(),
            p,
            q,
            r,
            h,
            on_device((*coefficients.values, *(tolerances or ())), compute_dtype, y.device),
            partial,
            *strides,
            *sizes.values(),
            COMPUTE=compute,
            **coefficients.masks,
            NEW=stage,
            **options,
        )
        if norm is not None and partial is not None:
            partials = blocks if per_sample else runs * blocks
            norm_kernel[(norm.numel(),)](
                partial, norm, partials, y.numel() // norm.numel(), **norm_options(partials)
            )
    return norm


def stage_forward(y: Tensor, k: Tensor, a: Sequence[float], h: Tensor) -> Tensor:
    """``y + h sum_i a_i k_i``, in y's dtype.

    Args:
        y: (B, ...), contiguous. k: (>= len(a), *y.shape), contiguous, of y's dtype; stages with a zero coefficient are
            not read. h: 0-d, (1,) or (B,), float32 or float64.

    Raises:
        ValueError: shapes, dtypes or memory formats differ.
    """
    out = torch.empty_like(y)
    _step(y, k, out, rows(a), h)
    return out


def finish_forward(
    y: Tensor,
    k: Tensor,
    b: Sequence[float],
    e: Sequence[float],
    h: Tensor,
    rtol: float,
    atol: float,
    per_sample: bool,
) -> tuple[Tensor, Tensor]:
    """``y + h sum b_i k_i`` and the norm of ``h sum e_i k_i`` relative to the tolerances.

    Args:
        y, k, h: as for :func:`stage_forward`. per_sample: one norm per sample instead of one for the batch.

    Returns:
        ``(y_new, norm)``; norm 0-d or (B,) in float32, in float64 for a float64 state.

    Raises:
        ValueError: as for :func:`stage_forward`.
    """
    out = torch.empty_like(y)
    norm = _step(y, k, out, rows(b, e), h, tolerances=(rtol, atol), per_sample=per_sample)
    assert norm is not None
    return out, norm


def drift_stage_forward(
    eps: Tensor,
    z: Tensor,
    mixing_logit: Tensor | None,
    p: Tensor,
    q: Tensor,
    r: Tensor,
    y: Tensor,
    k: Tensor,
    stage: int,
    a: Sequence[float],
    h: Tensor,
) -> None:
    """``k[stage] = p z + alpha q (eps - r z)``, then ``z = y + h sum_i a_i k_i``, in place.

    Args:
        eps, z: (B, C, ...), contiguous. mixing_logit: C values, or None for alpha = 1. p, q, r, h: 0-d, (1,) or (B,),
            float32 or float64. y, k: as for :func:`stage_forward`, of z's dtype; none of z, y and k overlap.

    Raises:
        ValueError: as for :func:`stage_forward`, or stage is out of range.
    """
    _step(y, k, z, rows(a), h, Drift(eps, mixing_logit, p, q, r, stage))


def drift_finish_forward(
    eps: Tensor,
    z: Tensor,
    mixing_logit: Tensor | None,
    p: Tensor,
    q: Tensor,
    r: Tensor,
    y: Tensor,
    k: Tensor,
    stage: int,
    b: Sequence[float],
    e: Sequence[float],
    h: Tensor,
    rtol: float,
    atol: float,
    per_sample: bool,
) -> Tensor:
    """:func:`drift_stage_forward` with the row b, and the norm as from :func:`finish_forward`, which it returns.

    Raises:
        ValueError: as for :func:`drift_stage_forward`.
    """
    drift = Drift(eps, mixing_logit, p, q, r, stage)
    norm = _step(y, k, z, rows(b, e), h, drift, (rtol, atol), per_sample)
    assert norm is not None
    return norm


def control_forward(
    control: Tensor,
    norm: Tensor,
    t_end: float,
    exponent: float,
    safety: float,
    min_factor: float,
    max_factor: float,
) -> Tensor:
    """The control of the next attempt.

    Args:
        control: (8,) or (B, 8) float64, contiguous. norm: one value per row, float32 or float64.

    Raises:
        ValueError: control is not contiguous float64 of 8 fields, or norm is of another batch.
    """
    if control.dtype != torch.float64 or control.shape[-1] != 8 or not control.is_contiguous():
        raise ValueError(f"control must be (..., 8), float64 and contiguous, got {tuple(control.shape)}")
    out = torch.empty_like(control)
    samples = control.numel() // 8
    if norm.numel() != samples:
        raise ValueError(f"norm has shape {tuple(norm.shape)} for control {tuple(control.shape)}")
    if samples == 0:
        return out
    with device_guard(control):
        control_kernel[(triton.cdiv(samples, CONTROL_BLOCK),)](
            control,
            norm,
            on_device((t_end, exponent, safety, min_factor, max_factor), torch.float64, control.device),
            out,
            sample_stride("norm", norm, samples),
            samples,
            BLOCK=CONTROL_BLOCK,
            **launch_options(CONTROL_BLOCK // 32),
        )
    return out


def _specialisations() -> Iterator[AotSpec]:
    """The latents of the CIFAR-10 configurations, and the rows of RK45 that read the most stages."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    samples, channels, space = 64, 180, 256
    size = channels * space
    scalar = "*fp64"  # of any alignment
    strides = {f"{name}_stride": "i32" for name in "pqrh"}
    stage, finish = rows((1.0,) * 5), rows((1.0, 0.0, 1.0, 1.0, 1.0, 1.0), (1.0, 0.0, *(1.0,) * 5))

    def spec(
        label: str,
        coefficients: Rows,
        state: torch.dtype,
        eps: torch.dtype | None = None,
        *,
        mixing: bool = False,
    ) -> AotSpec:
        """With a drift, the last stage is the new one. One step size for all or one per sample: the same code."""
        _, sizes, options = step_plan(samples, size, space if mixing else None, state)
        compute = f64 if state == f64 else f32
        norm = coefficients.masks["ERROR"] != 0
        present = {
            "y_ptr": pointer(state),
            "k_ptr": pointer(state),
            "out_ptr": pointer(state),
            "eps_ptr": eps and pointer(eps),
            "logit_ptr": "*fp32" if mixing else None,
            **{f"{name}_ptr": scalar if eps else None for name in "pqr"},
            "h_ptr": scalar,
            "coefficients_ptr": pointer(compute),
            "partial_ptr": pointer(f64) if norm else None,
        }
        absent = {name: None for name, kind in present.items() if kind is None}
        signature = {name: kind for name, kind in present.items() if kind is not None}
        return AotSpec(
            f"{label}, state {short_name(state)}{f', eps {short_name(eps)}' if eps else ''}",
            step_kernel,
            {**signature, **strides, **dict.fromkeys(sizes, "i32")},
            {
                **absent,
                "COMPUTE": TYPES[compute],
                **coefficients.masks,
                "NEW": coefficients.masks["STAGES"] - 1 if eps else -1,
                **options,
            },
        )

    for state in (f32, f64, bf16):
        yield spec("stage", stage, state)
        yield spec("finish", finish, state)
    for state in (f32, f64):
        for eps in (f32, bf16):
            yield spec("drift stage", stage, state, eps, mixing=True)
            yield spec("drift finish", finish, state, eps, mixing=True)
        yield spec("drift stage unmixed", stage, state, f16)
        yield spec("drift finish unmixed", finish, state, f16)
        for partials in (128, samples * step_plan(samples, size, None, state)[0]):
            yield AotSpec(
                f"{'many' if partials > 128 else 'few'} partials, {short_name(state)}",
                norm_kernel,
                {
                    "partial_ptr": pointer(f64),
                    "norm_ptr": pointer(state),
                    "partials": "i32",
                    "elements": "i32",
                },
                norm_options(partials),
                widest=32,  # a few thousand numbers in all, in rows of any length, and one result
            )
        yield AotSpec(
            f"norm {short_name(state)}",
            control_kernel,
            {
                "control_ptr": scalar,
                "norm_ptr": f"*{short_name(state)}",
                "constants_ptr": pointer(f64),
                "out_ptr": pointer(f64),
                "norm_stride": "i32",
                "samples": "i32",
            },
            {"BLOCK": CONTROL_BLOCK, **launch_options(CONTROL_BLOCK // 32)},
            widest=64,  # 64 bytes for each sample, one field at a time
        )


AOT = list(_specialisations())
