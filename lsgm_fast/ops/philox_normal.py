"""Counter-based standard normals: the same numbers on every device and for every way of batching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.philox_normal import (
    check_dtype,
    check_elements,
    check_indices,
    check_seed,
    check_shape,
    check_word,
    stream_word,
)
from lsgm_fast.reference.philox_normal import philox_normal as reference


def _device(
    seed: int,
    sample_indices: torch.Tensor | Sequence[int],
    stream: str | int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    substream: int = 0,
) -> torch.device:
    return torch.device(device)


@define_op(reference, device_of=_device)
def philox_normal(
    seed: int,
    sample_indices: torch.Tensor | Sequence[int],
    stream: str | int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    substream: int = 0,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Standard normals from Philox4x32-10 and Box-Muller, keyed by (seed, sample index, stream, substream, position).

    Key: the seed's low and high 32 bits. Counter: (block, stream, sample index, substream), 32 bits each; block counts
    groups of four consecutive elements of a sample in C order. Words (x0, x1) and (x2, x3) give a pair each:
    ``u1 = x0 2^-32 + 2^-33``, ``u2 = x1 2^-32``, ``(cos, sin)(2 pi u2) * sqrt(-2 ln u1)``.

    Args:
        seed: 0 to 2^64 - 1. sample_indices: (N,) integers, 0 to 2^32 - 1. stream: a name (hashed) or a 32-bit integer.
        shape: of one sample. dtype: of the result. device: where to compute. substream: a further 32-bit counter
            word, such as a step number.

    Returns:
        (N, *shape). Integers are bit-equal on every backend; normals agree to the last bits of log and cos.

    Raises:
        ValueError: an argument is out of range. Indices on an accelerator are not looked at, since that would wait for
            the device, and nor are those of a compiled graph: there the CPU kernel raises RuntimeError.

    Source: Salmon et al. 2011 (Random123); Box & Muller 1958.
    """
    check_seed(seed)
    check_dtype(dtype)


def _reasons(
    seed: int,
    sample_indices: torch.Tensor | Sequence[int],
    stream: str | int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    substream: int = 0,
) -> list[str]:
    if dtype in _prepare.DTYPES:
        return []
    return [f"dtype {dtype}: float32, float64, bfloat16 and float16 are supported"]


def _to_kernel(
    seed: int,
    sample_indices: torch.Tensor | Sequence[int],
    stream: str | int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    substream: int = 0,
) -> tuple[Any, ...]:
    shape = check_shape(shape)
    check_elements(math.prod(shape))
    check_word(substream, "substream")
    # The operator finds its implementation, and the result its device, by that of the indices.
    indices = check_indices(sample_indices).to(device)
    return indices, seed & 0xFFFFFFFF, seed >> 32, stream_word(stream), substream, shape, dtype


fused.register(
    philox_normal,
    schema="(Tensor indices, SymInt key0, SymInt key1, SymInt stream, SymInt substream, SymInt[] shape, "
    "ScalarType dtype) -> Tensor",
    fake=lambda indices, key0, key1, stream, substream, shape, dtype: indices.new_empty(
        (indices.shape[0], *shape), dtype=dtype
    ),
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
)
