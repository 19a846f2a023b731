"""Triton kernels of ``weight_norm``: ``s V`` with ``s = exp(g) / (||V|| + eps)`` per filter, for a list of weights in
one launch, and its gradients.

Both kernels are bound by memory. A program does one long filter or a few dozen short ones: it reads a filter once for
the sum and again, out of the cache, for the result. A filter is one run in memory, in whatever order, and its sum is
one program's: no atomics, the result is the same in every run.

What a program does stands in a table that depends on shapes alone and stays on the device; its first use copies it
there, which a CUDA graph cannot capture: run a step before capturing one. Where the tensors of the list lie is told as
distances, in elements, from the list's first tensor, copied at every call without waiting for it. Such a copy would be
replayed from memory that is no longer there, so while a graph is captured every weight gets a launch of its own, which
needs no distances.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._common import AotSpec, device_guard, launch_options

COLUMNS = tl.constexpr(8)
"""Of the table of programs: weight, kind, first filter, filters of the weight, length, index of its first filter."""

SHORT, ALIGNED, UNALIGNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Kinds of programs: several filters; one filter in accesses of 16 bytes; one filter, anywhere."""

LIMIT = 256
"""Elements up to which a filter is short."""


@triton.jit
def read(row, offsets_ptr, ALONE: tl.constexpr, TENSORS: tl.constexpr):
    """A program's row of the table, and the distance of each of its weight's tensors from the first of its list."""
    weight = tl.load(row)
    kind = tl.load(row + 1)
    first = tl.load(row + 2)
    filters = tl.load(row + 3)
    length = tl.load(row + 4).to(tl.int32)
    start = tl.load(row + 5)
    zero = weight * 0
    distances = (zero, zero, zero, zero)
    if not ALONE:
        at = offsets_ptr + weight * TENSORS
        distances = (
            tl.load(at),
            tl.load(at + 1),
            tl.load(at + 2),
            tl.load(at + 3) if TENSORS == 4 else zero,
        )
    return kind, first, filters, length, start, distances


@triton.jit
def multiple(x, ALIGN: tl.constexpr):
    """x, which is a multiple of ALIGN, so that the compiler sees it."""
    return (x // ALIGN) * ALIGN


@triton.jit
def scale_and_projection(scale, along, norm, eps):
    """What V is multiplied with and subtracted: divided by the norm first, the square of a small one would vanish."""
    return tl.where(norm == 0, 0.0, scale * (along / tl.where(norm == 0, 1.0, norm)) / (norm + eps))


@triton.jit
def normalise(v_ptr, out_ptr, log_norm, length, eps, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """One filter; returns its norm."""
    length = multiple(length, ALIGN)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        v = tl.load(v_ptr + index, mask=index < length, other=0.0)
        total += v * v
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    scale = tl.exp(log_norm) / (norm + eps)
    for begin in range(0, length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        mask = index < length
        tl.store(out_ptr + index, scale * tl.load(v_ptr + index, mask=mask), mask=mask)
    return norm


@triton.jit
def differentiate(
    grad_ptr, v_ptr, out_ptr, log_norm, norm, length, eps, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of one filter; returns that of its log norm."""
    length = multiple(length, ALIGN)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        mask = index < length
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0)
        total += grad * tl.load(v_ptr + index, mask=mask, other=0.0)
    along = tl.sum(total, axis=0)
    scale = tl.exp(log_norm) / (norm + eps)
    projection = scale_and_projection(scale, along, norm, eps)
    for begin in range(0, length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        mask = index < length
        grad = tl.load(grad_ptr + index, mask=mask)
        tl.store(out_ptr + index, scale * grad - projection * tl.load(v_ptr + index, mask=mask), mask=mask)
    return scale * along


@triton.jit(do_not_specialize=["eps"])
def forward_kernel(
    v_ptr,  # the first of the weights, as the following two of their lists
    log_norm_ptr,
    out_ptr,
    norm_ptr,  # one per filter of all weights
    programs_ptr,  # (programs, COLUMNS), int64
    offsets_ptr,  # (weights, 3), int64: distances from the three first tensors; None for one weight
    eps,
    ALONE: tl.constexpr,  # one weight: what the first three point to is its own
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # short filters per program
    CHUNK: tl.constexpr,  # elements of each at a time
):
    row = programs_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    kind, first, filters, length, start, distances = read(row, offsets_ptr, ALONE, 3)
    log_norm_ptr += distances[1]
    if kind == SHORT:
        filter = first + tl.arange(0, ROWS)
        present = filter < filters
        base = filter * length
        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for begin in range(0, length, CHUNK):
            within = begin + tl.arange(0, CHUNK)
            mask = present[:, None] & (within < length)[None, :]
            v = tl.load(v_ptr + distances[0] + base[:, None] + within[None, :], mask=mask, other=0.0)
            total += v * v
        norms = tl.sqrt_rn(tl.sum(total, axis=1))
        scales = tl.exp(tl.load(log_norm_ptr + filter, mask=present, other=0.0)) / (norms + eps)
        tl.store(norm_ptr + start + filter, norms, mask=present)
        for begin in range(0, length, CHUNK):
            within = begin + tl.arange(0, CHUNK)
            mask = present[:, None] & (within < length)[None, :]
            index = base[:, None] + within[None, :]
            v = tl.load(v_ptr + distances[0] + index, mask=mask)
            tl.store(out_ptr + distances[2] + index, scales[:, None] * v, mask=mask)
    else:
        log_norm = tl.load(log_norm_ptr + first)
        at = first * length
        if kind == ALIGNED:
            v = v_ptr + multiple(distances[0] + at, 4)
            out = out_ptr + multiple(distances[2] + at, 4)
            norm = normalise(v, out, log_norm, length, eps, 4, BLOCK)
        else:
            v = v_ptr + distances[0] + at
            out = out_ptr + distances[2] + at
            norm = normalise(v, out, log_norm, length, eps, 1, BLOCK)
        tl.store(norm_ptr + start + first, norm)


@triton.jit(do_not_specialize=["eps"])
def backward_kernel(
    grad_ptr,  # of the first weight, as the following three of their lists
    v_ptr,
    log_norm_ptr,
    out_ptr,
    norm_ptr,  # one per filter of all weights
    grad_log_norm_ptr,  # the same
    programs_ptr,  # (programs, COLUMNS), int64
    offsets_ptr,  # (weights, 4), int64: distances from the four first tensors; None for one weight
    eps,
    ALONE: tl.constexpr,  # one weight: what the first four point to is its own
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # short filters per program
    CHUNK: tl.constexpr,  # elements of each at a time
):
    row = programs_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    kind, first, filters, length, start, distances = read(row, offsets_ptr, ALONE, 4)
    log_norm_ptr += distances[2]
    if kind == SHORT:
        filter = first + tl.arange(0, ROWS)
        present = filter < filters
        base = filter * length
        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for begin in range(0, length, CHUNK):
            within = begin + tl.arange(0, CHUNK)
            mask = present[:, None] & (within < length)[None, :]
            index = base[:, None] + within[None, :]
            grad = tl.load(grad_ptr + distances[0] + index, mask=mask, other=0.0)
            total += grad * tl.load(v_ptr + distances[1] + index, mask=mask, other=0.0)
        along = tl.sum(total, axis=1)
        norms = tl.load(norm_ptr + start + filter, mask=present, other=1.0)
        scales = tl.exp(tl.load(log_norm_ptr + filter, mask=present, other=0.0)) / (norms + eps)
        projections = scale_and_projection(scales, along, norms, eps)
        tl.store(grad_log_norm_ptr + start + filter, scales * along, mask=present)
        for begin in range(0, length, CHUNK):
            within = begin + tl.arange(0, CHUNK)
            mask = present[:, None] & (within < length)[None, :]
            index = base[:, None] + within[None, :]
            grad = tl.load(grad_ptr + distances[0] + index, mask=mask)
            v = tl.load(v_ptr + distances[1] + index, mask=mask)
            tl.store(
                out_ptr + distances[3] + index, scales[:, None] * grad - projections[:, None] * v, mask=mask
            )
    else:
        log_norm = tl.load(log_norm_ptr + first)
        norm = tl.load(norm_ptr + start + first)
        at = first * length
        if kind == ALIGNED:
            grad = grad_ptr + multiple(distances[0] + at, 4)
            v = v_ptr + multiple(distances[1] + at, 4)
            out = out_ptr + multiple(distances[3] + at, 4)
            grad_log_norm = differentiate(grad, v, out, log_norm, norm, length, eps, 4, BLOCK)
        else:
            grad = grad_ptr + distances[0] + at
            v = v_ptr + distances[1] + at
            out = out_ptr + distances[3] + at
            grad_log_norm = differentiate(grad, v, out, log_norm, norm, length, eps, 1, BLOCK)
        tl.store(grad_log_norm_ptr + start + first, grad_log_norm)


OPTIONS: dict[str, Any] = {"BLOCK": 1024, "ROWS": 16, "CHUNK": 32, **launch_options(4)}
"""Of both kernels: eight elements per thread of a long filter, four of short ones."""


@functools.lru_cache(maxsize=64)
def programs(
    shapes: tuple[tuple[int, int, bool], ...], device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """The table for weights of (filters, length, whether every filter is aligned), and where each weight's rows end."""
    rows, ends, start, count = [], [], 0, 0
    for weight, (filters, length, aligned) in enumerate(shapes):
        if filters:
            short = length <= LIMIT
            first = torch.arange(0, filters, OPTIONS["ROWS"] if short else 1)
            row = torch.zeros(len(first), COLUMNS.value, dtype=torch.int64)
            row[:, 0] = weight
            row[:, 1] = (SHORT if short else ALIGNED if aligned else UNALIGNED).value
            row[:, 2] = first
            row[:, 3:6] = torch.tensor([filters, length, start])
            rows.append(row)
            count += len(first)
        start += filters
        ends.append(count)
    table = torch.cat(rows) if rows else torch.zeros(0, COLUMNS.value, dtype=torch.int64)
    # Waited for, once: from then on any stream may read it.
    return table.to(device), tuple(ends)


def offsets(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """Distances of all tensors from the first of their list, in elements, as (tensors of a list, lists)."""
    first = [tensors[0].data_ptr() for tensors in lists]
    rows = [
        [(t.data_ptr() - f) // 4 for t, f in zip(row, first, strict=True)] for row in zip(*lists, strict=True)
    ]
    device = lists[0][0].device
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def run(kernel: Any, lists: Sequence[Sequence[Tensor]], shared: Sequence[Tensor], eps: float) -> None:
    """Launch ``kernel`` for all tensors of ``lists``, of which the last but one holds the log norms.

    ``shared``: tensors of one number per filter of all weights.
    """
    large = [*lists[:-2], lists[-1]]
    # A distance is a multiple of 16 bytes only where both ends are.
    aligned = all(tensors[0].data_ptr() % 16 == 0 for tensors in large)
    shapes = []
    for tensors in zip(*large, strict=True):
        filters = tensors[0].shape[0]
        length = tensors[0].numel() // filters if filters else 0
        if length >= 2**31 - OPTIONS["BLOCK"]:
            raise ValueError(f"a filter has {length} elements: fewer than 2^31 are supported")
        vectors = aligned and length % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)
        shapes.append((filters, length, vectors))
    table, ends = programs(tuple(shapes), shared[0].device)
    if not ends[-1]:
        return
    with device_guard(shared[0]):
        if len(shapes) > 1 and not (table.is_cuda and torch.cuda.is_current_stream_capturing()):
            first = (tensors[0] for tensors in lists)
            kernel[(ends[-1],)](*first, *shared, table, offsets(lists), eps, ALONE=False, **OPTIONS)
            return
        begin = 0
        for tensors, end in zip(zip(*lists, strict=True), ends, strict=True):
            if end > begin:
                kernel[(end - begin,)](*tensors, *shared, table[begin:end], None, eps, ALONE=True, **OPTIONS)
            begin = end


def check(weights: Sequence[Tensor], others: Sequence[Sequence[Tensor]], log_norms: Sequence[Tensor]) -> None:
    """Raise ValueError where filters are not runs, or tensors do not belong together."""
    if not weights or any(len(tensors) != len(weights) for tensors in (*others, log_norms)):
        raise ValueError(
            f"got {[len(t) for t in (weights, *others, log_norms)]} tensors: expected as many of each, at least one"
        )
    for i, (v, g) in enumerate(zip(weights, log_norms, strict=True)):
        if v.dtype != torch.float32 or g.dtype != torch.float32:
            raise ValueError(f"weights[{i}] is {v.dtype} and log_norms[{i}] {g.dtype}: expected float32")
        if not _filters_are_runs(v):
            raise ValueError(
                f"weights[{i}] of shape {tuple(v.shape)} has strides {tuple(v.stride())}: "
                "expected each filter dense, one after the other"
            )
        if g.numel() != v.shape[0] or not g.is_contiguous():
            raise ValueError(
                f"log_norms[{i}] of shape {tuple(g.shape)} has strides {tuple(g.stride())}: "
                f"expected ({v.shape[0]}, 1, 1, 1), contiguous"
            )
        for tensors in others:
            t = tensors[i]
            if t.shape != v.shape or t.dtype != v.dtype or t.stride() != v.stride():
                raise ValueError(
                    f"grads[{i}] of shape {tuple(t.shape)} has strides {tuple(t.stride())}, "
                    f"its weight {tuple(v.shape)} and {tuple(v.stride())}: expected the same"
                )


def _filters_are_runs(v: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(v.stride()[1:], v.shape[1:], strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return v.shape[0] <= 1 or v.stride(0) == expected or v.numel() == 0


def forward(
    weights: Sequence[Tensor], log_norms: Sequence[Tensor], eps: float
) -> tuple[list[Tensor], Tensor]:
    """``(normalised weights, norms)``; norms has one number per filter of all weights.

    Args:
        weights: (C_out, ...), float32, each filter dense, one after the other. log_norms: C_out numbers each.

    Raises:
        ValueError: they are not.
    """
    check(weights, (), log_norms)
    results = [torch.empty_like(v) for v in weights]
    norms = weights[0].new_empty(sum(v.shape[0] for v in weights))
    run(forward_kernel, (weights, log_norms, results), (norms,), eps)
    return results, norms


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor],
    norms: Tensor,
    eps: float,
) -> tuple[list[Tensor], Tensor]:
    """``(gradients of the weights, those of the log norms)``, the latter as one tensor like ``norms``.

    Args:
        grads: of the normalised weights, each with the strides of its weight. norms: as :func:`forward` returned them.

    Raises:
        ValueError: shapes or strides differ, or are not those that :func:`forward` takes.
    """
    check(weights, (grads,), log_norms)
    if norms.shape != (sum(v.shape[0] for v in weights),):
        raise ValueError(
            f"norms has shape {tuple(norms.shape)}: expected one number per filter of all weights"
        )
    results = [torch.empty_like(v) for v in weights]
    of_log_norms = torch.empty_like(norms)
    run(backward_kernel, (grads, weights, log_norms, results), (norms, of_log_norms), eps)
    return results, of_log_norms


def _specialisations() -> Iterator[AotSpec]:
    for alone in (False, True):
        common = {
            "programs_ptr": "*i64:16",
            **({} if alone else {"offsets_ptr": "*i64:16"}),
            "eps": "fp32",
        }
        options = {"ALONE": alone, **({"offsets_ptr": None} if alone else {}), **OPTIONS}
        label = "one weight" if alone else "all weights"
        lists = ("v_ptr", "log_norm_ptr", "out_ptr", "norm_ptr")
        yield AotSpec(label, forward_kernel, {**dict.fromkeys(lists, "*fp32:16"), **common}, options)
        more = ("grad_ptr", *lists, "grad_log_norm_ptr")
        yield AotSpec(label, backward_kernel, {**dict.fromkeys(more, "*fp32:16"), **common}, options)


AOT = list(_specialisations())
