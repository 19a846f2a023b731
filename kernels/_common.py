"""What the Triton kernel files share: memory layouts, block sizes, and the list of kernels to compile ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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


def launch_options(num_warps: int) -> dict[str, Any]:
    """Options of every launch. Contraction to fused multiply-add is named because Triton's default is changing."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}
