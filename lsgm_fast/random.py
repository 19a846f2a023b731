"""Counter-based random draws: the same numbers on every device and for every split of a request.

Every draw is a function of (seed, sample index, name, substream, position in the sample) through Philox4x32-10,
as in Random123 and JAX, and of nothing else: not of the batch a sample is drawn in, the process, the device or
the draws made before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsgm_fast import ops
from lsgm_fast.reference.philox_normal import philox_words

__all__ = ["normal", "uniform"]


def normal(
    seed: int,
    sample_indices: Tensor | Sequence[int] | range,
    name: str | int,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    substream: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """Normals of standard deviation ``temperature`` for the given samples.

    Args:
        seed: integer from 0 to 2**64 - 1.
        sample_indices: position of each sample in the whole request, 0 to 2**32 - 1.
        name: name of the draw, such as ``"ode.noise"``; different names give independent draws.
        shape: shape of one sample.
        substream: further index of the draw, such as a step or a group number.

    Returns:
        (len(sample_indices), *shape).

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> whole = normal(0, range(4), "z", (2,))
        >>> torch.equal(whole[2:], normal(0, [2, 3], "z", (2,)))
        True
    """
    indices = _indices(sample_indices)
    out = ops.philox_normal(seed, indices, name, tuple(shape), dtype, device, substream)
    return out if temperature == 1.0 else out * temperature


def uniform(
    seed: int,
    sample_indices: Tensor | Sequence[int] | range,
    name: str | int,
    shape: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    substream: int = 0,
) -> Tensor:
    """Uniforms in the open interval (0, 1) for the given samples: ``(w + 1/2) 2^-23``, w the word's top 23 bits.

    These values are exact in float32 and float64, so neither dtype rounds one to 0 or 1, where importance
    sampling of the time is singular; half dtypes are refused for that reason. Same generator and arguments as
    ``normal``; a name used for both gives dependent draws.

    Returns:
        (len(sample_indices), *shape).

    Raises:
        ValueError: an argument outside its range, or a dtype other than float32 and float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    shape = tuple(int(size) for size in shape)
    elements = math.prod(shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must not have negative sizes, got {shape}")
    indices = _indices(sample_indices)
    words = philox_words(seed, indices, name, elements, device=device, substream=substream)
    values = ((words >> 9).to(dtype) + 0.5) * 2.0**-23
    n = indices.shape[0]
    return values.reshape(n, words.shape[1] * 4)[:, :elements].reshape(n, *shape)


def _indices(sample_indices: Tensor | Sequence[int] | range) -> Tensor:
    if isinstance(sample_indices, Tensor):
        return sample_indices
    return torch.tensor(list(sample_indices), dtype=torch.int64)
