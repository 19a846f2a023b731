"""Orders of images that depend on nothing but a seed: the epochs' permutations and the choice of held-out images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lsgm_fast.reference.philox_normal import philox_words

# What belongs to the data set, and not to one run of training, is drawn from this seed.
FIXED_SEED = 0


def permutation(count: int, seed: int, name: str, substream: int = 0) -> npt.NDArray[np.int64]:
    """A permutation of 0 ... count - 1: the argsort of one 64-bit Philox word per index.

    A function of the arguments alone (``lsgm_fast.random`` describes seed, name and substream). Equal words, of
    probability ``count^2 2^-65``, keep the order of their indices.

    Returns:
        (count,) int64.

    Raises:
        ValueError: a seed or substream outside its range.
    """
    words = (
        philox_words(seed, torch.arange(count), name, 1, substream=substream)[:, 0].numpy().astype(np.uint64)
    )
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable")


def held_out_indices(
    count: int, held_out: int, labels: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.int64]:
    """Which ``held_out`` of ``count`` images are kept back, the same for everybody; in proportion where labels are.

    The image that comes r-th (from 0) among the n of its label is taken at ``(r + 1/2) / n`` of the way, so every
    label is exhausted at the same rate: 500 of the 5,000 digits are 50 of each.

    Returns:
        (held_out,) int64, ascending.
    """
    order = permutation(count, FIXED_SEED, "data.held_out")
    if labels is not None:
        place = np.empty(count)
        for label in np.unique(labels):
            of_label = order[labels[order] == label]
            place[of_label] = (np.arange(len(of_label)) + 0.5) / len(of_label)
        order = order[np.argsort(place[order], kind="stable")]
    return np.sort(order[:held_out])
