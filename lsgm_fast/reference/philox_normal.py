"""Reference implementation of ``philox_normal``: counter-based standard normals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsgm_fast._constant import assume_constant_result

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@assume_constant_result
def _hashed(name: str) -> int:
    return int.from_bytes(hashlib.blake2s(name.encode("utf-8")).digest()[:4], "little")


def stream_word(stream: str | int) -> int:
    """The 32-bit counter word of a named stream: the first four bytes (little endian) of BLAKE2s(name).

    An integer is taken as the word itself.
    """
    return _hashed(stream) if isinstance(stream, str) else check_word(stream, "stream")


def check_word(value: int, name: str) -> int:
    """``value`` as a 32-bit unsigned integer, or a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MASK:
        raise ValueError(f"{name} must be an integer from 0 to 2**32 - 1, got {value!r}")
    return value


def check_seed(seed: int) -> int:
    """``seed``, or a ValueError if it is not an integer from 0 to 2**64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
    return seed


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or a ValueError if it is not a floating-point type."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    return dtype


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple of integers, or a ValueError if one of them is negative."""
    shape = tuple(int(size) for size in shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must not have negative sizes, got {shape}")
    return shape


def check_elements(elements: int) -> int:
    """Blocks of four that ``elements`` values take, or a ValueError if their numbers do not fit into 32 bits."""
    blocks = -(-elements // 4)
    if blocks > _MASK + 1:
        raise ValueError(f"at most 2**34 values per sample and stream, got {elements}")
    return blocks


def check_indices(sample_indices: Tensor | Sequence[int]) -> Tensor:
    """``sample_indices`` as a one-dimensional int64 tensor.

    Their range is checked where they are on the CPU: elsewhere that would wait for the device, and a graph that is
    being traced (by way of a subclass of tensors, if not by Dynamo) has no values to look at.

    Raises:
        ValueError: not integers, not one-dimensional, or outside of 0 to 2**32 - 1.
    """
    if isinstance(sample_indices, Tensor) and (
        sample_indices.is_floating_point() or sample_indices.is_complex()
    ):
        raise ValueError(f"sample_indices must be integers, got dtype {sample_indices.dtype}")
    indices = torch.as_tensor(sample_indices, dtype=torch.int64)
    if indices.ndim != 1:
        raise ValueError(f"sample_indices must be one-dimensional, got shape {tuple(indices.shape)}")
    visible = type(indices) is Tensor and indices.device.type == "cpu" and not torch.compiler.is_compiling()
    if visible and indices.numel():
        low, high = (int(end) for end in torch.aminmax(indices))
        if low < 0 or high > _MASK:
            raise ValueError(f"sample_indices must be from 0 to 2**32 - 1, got {low} to {high}")
    return indices


def _multiply_high_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``multiplier * word``, for an odd multiplier.

    The product may need 64 bits. An int64 that wraps would have them, but compilers take it for granted that none
    does: so the word is moved to -2^31 ... 2^31 - 1, and ``2^31 multiplier = (multiplier >> 1) 2^32 + 2^31`` put back.
    """
    product = (word - (1 << 31)).mul_(multiplier).add_(1 << 31)
    return (product >> 32).add_(multiplier >> 1), product.bitwise_and_(_MASK)


def philox4x32(
    counter: Sequence[Tensor | int], key: Sequence[Tensor | int], *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words for every counter (Salmon et al., SC 2011; Random123).

    Args:
        counter: four int64 tensors (broadcast against each other) or integers, each holding a uint32.
        key: two of the same.
        device: device of words given as integers.

    Returns:
        Four int64 tensors holding uint32 values.
    """
    if len(counter) != 4 or len(key) != 2:
        raise ValueError(f"expected 4 counter words and 2 key words, got {len(counter)} and {len(key)}")
    # The masks change nothing, but for TorchInductor: it would make the first products with an arange a part of its
    # index arithmetic, which (in PyTorch 2.13) gets some of them wrong.
    words = [
        torch.as_tensor(word, dtype=torch.int64, device=getattr(word, "device", device)) & _MASK
        for word in counter
    ]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1.bitwise_xor_(c1) ^ k0, low1, high0.bitwise_xor_(c3) ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_words(
    seed: int,
    sample_indices: Tensor | Sequence[int],
    stream: str | int,
    elements: int,
    *,
    device: torch.device | str = "cpu",
    substream: int = 0,
) -> Tensor:
    """Random words for ``elements`` values of every sample: (n, ceil(elements / 4), 4) int64 holding uint32.

    The key is the seed (low word first) and the counter is (block, stream, sample index, substream), where
    block b serves elements 4b to 4b + 3 of a sample in C order. A word thus depends on nothing but the
    seed, the sample, the name of the draw and the position.

    Raises:
        ValueError: a seed, index, stream or substream outside its range, or too many elements.
    """
    check_seed(seed)
    check_word(substream, "substream")
    device = torch.device(device)
    indices = check_indices(sample_indices)
    blocks = check_elements(elements)
    block = torch.arange(blocks, dtype=torch.int64, device=device)
    words = philox4x32(
        (block[None, :], stream_word(stream), indices.to(device)[:, None], substream),
        (seed & _MASK, seed >> 32),
        device=device,
    )
    return torch.stack(words, dim=-1)


def philox_normal(
    seed: int,
    sample_indices: Tensor | Sequence[int],
    stream: str | int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    substream: int = 0,
) -> Tensor:
    """Standard normals that depend only on (seed, sample index, stream, substream, position).

    Philox4x32-10 words x0..x3 serve four consecutive elements of a sample in C order; each pair of words
    gives a pair of normals by Box-Muller: ``u1 = float32(x0) 2^-32 + 2^-33``, ``u2 = float32(x1) 2^-32``,
    ``radius = sqrt(-2 ln u1)``, ``n0 = radius cos(2 pi u2)``, ``n1 = radius sin(2 pi u2)``. The conversion
    to float32 rounds to nearest. The largest possible magnitude is sqrt(66 ln 2) = 6.76.

    Args:
        seed: 0 to 2**64 - 1.
        sample_indices: n integers from 0 to 2**32 - 1 (1-D int64 tensor or sequence): the position of each
            sample in the whole request, however it is split into batches.
        stream: name of the draw (hashed with BLAKE2s), or its 32-bit word.
        shape: shape of one sample.
        dtype: float64 evaluates logarithm, cosine and sine in float64 on the same float32 uniforms; half
            dtypes are rounded from float32.
        device: where to compute. The random words are bit-equal on every device; the last bits of the
            normals follow the device's logarithm, cosine and sine.
        substream: further 32-bit counter word, such as a step number.

    Returns:
        (n, *shape).

    Raises:
        ValueError: an argument outside its range.
    """
    check_dtype(dtype)
    shape = check_shape(shape)
    elements = math.prod(shape)
    words = philox_words(seed, sample_indices, stream, elements, device=device, substream=substream)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    uniforms = words.to(torch.float32)
    # Products with powers of two are exact; the float32 rounding of the sum is part of the definition.
    u1 = (uniforms[..., 0::2] * 2.0**-32 + 2.0**-33).to(work)
    u2 = (uniforms[..., 1::2] * 2.0**-32).to(work)
    radius = torch.sqrt(-2.0 * torch.log(u1))
    angle = (2.0 * math.pi) * u2
    normals = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    n = words.shape[0]
    return normals.reshape(n, words.shape[1] * 4)[:, :elements].reshape(n, *shape).to(dtype).contiguous()
