"""What the Triton kernel files share: memory layouts, block sizes, and the list of kernels to compile ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}

VECTOR = 16
"""Triton's unit of alignment: pointers and extents known to be multiples of it get the widest accesses."""


@dataclass(frozen=True)
class AotSpec:
    """One specialisation of a kernel for :mod:`lsgm_fast.aot` to compile and to report on.

    ``label`` tells it from the kernel's other ones. ``signature`` gives every runtime argument's type in Triton's
    notation (``"*bf16:16"``: a pointer known to be a multiple of 16 bytes, ``"i32"``), ``options`` the constexprs and
    ``num_warps``. ``widest``: bits that the widest load from and the widest store to global memory must reach.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    options: Mapping[str, Any]
    widest: int = 128


def pointer(dtype: torch.dtype) -> str:
    """The type of an aligned pointer in :class:`AotSpec`'s notation."""
    return f"*{_NAMES[dtype]}:16"


def short_name(dtype: torch.dtype) -> str:
    """``"bf16"`` for ``torch.bfloat16``."""
    return _NAMES[dtype]


def compute_type(*tensors: Tensor) -> tl.dtype:
    """Arithmetic is in float64 where one of the tensors is, else in float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def channels_last(x: Tensor) -> bool:
    """Whether a dense (B, C, *spatial) tensor has its channels innermost; False for the contiguous format.

    Raises:
        ValueError: neither; nothing is copied here, so the caller must.
    """
    if x.is_contiguous():
        return False
    if x.dim() > 2 and x.movedim(1, -1).is_contiguous():
        return True
    raise ValueError(
        f"a tensor of shape {tuple(x.shape)} has strides {tuple(x.stride())}: "
        "expected the contiguous or the channels_last format, call .contiguous() first"
    )


def alignment(extent: int) -> int:
    """The largest power of two up to :data:`VECTOR` that divides ``extent``."""
    return min(extent & -extent, VECTOR)


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's device: Triton launches on the current one. Nothing to do in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch_options(num_warps: int, registers: int | None = None) -> dict[str, Any]:
    """Options of every launch. Contraction to fused multiply-add is named because Triton's default is changing.

    ``registers``: most per thread. Left to itself, ptxas of CUDA 12.8 spills a few bytes to get down to 32.
    """
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return options if registers is None else {**options, "maxnreg": registers}


PER_THREAD = 8
"""Elements per thread and tensor: one 16-byte access in half precision, two in float32, four in float64."""


def warps(elements: int) -> int:
    """Warps of a program that handles ``elements`` elements."""
    return max(1, elements // (32 * PER_THREAD))


def index_type(elements: int) -> tl.dtype:
    """Integer type for an index inside one sample of ``elements`` elements."""
    # Room for the block that reaches past the end of the sample.
    return tl.int32 if elements < 2**31 - 2**12 else tl.int64


def common_layout(z: Tensor, *others: Tensor) -> bool:
    """:func:`channels_last` of z; the others must be of the same shape and format.

    Raises:
        ValueError: they are not.
    """
    inner = channels_last(z)
    for other in others:
        if other.shape != z.shape or channels_last(other) != inner:
            raise ValueError(
                f"tensors of shapes {tuple(z.shape)} and {tuple(other.shape)} with strides {tuple(z.stride())} and "
                f"{tuple(other.stride())}: expected one shape in one memory format"
            )
    return inner


def sample_stride(name: str, scalar: Tensor, samples: int) -> int:
    """Distance between the values of two samples: 0 where all of them share one.

    Raises:
        ValueError: neither one value nor one per sample.
    """
    if scalar.numel() == 1:
        return 0
    if scalar.shape != (samples,):
        raise ValueError(f"{name} has shape {tuple(scalar.shape)}, expected (), (1,) or ({samples},)")
    return scalar.stride(0)


@triton.jit
def mixing(logit):
    """(a, 1 - a) of a = sigmoid(logit), both to full relative accuracy: no cancellation far from 0."""
    t = tl.exp(-tl.abs(logit))
    larger = 1.0 / (1.0 + t)
    smaller = t * larger
    return tl.where(logit >= 0, larger, smaller), tl.where(logit >= 0, smaller, larger)


@triton.jit
def store(ptr, value, mask):
    """``tl.store`` with a cast to the pointer's element type."""
    # float64 goes to half precision by way of float32, as in PyTorch.
    if ptr.dtype.element_ty.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)
