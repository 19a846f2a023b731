"""Counter-based standard normals: the same numbers on every device and for every way of batching."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.philox_normal import check_seed
from lsgm_fast.reference.philox_normal import philox_normal as reference


@define_op(reference)
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
        ValueError: the seed or an index is out of range.

    Source: Salmon et al. 2011 (Random123); Box & Muller 1958.
    """
    check_seed(seed)
