"""Images to train on and to evaluate with: where they come from, and which of them a step has.

``open_data`` opens a source (digits, folders, ``.npz``, IDX, CIFAR-10, LMDB, text), ``batches`` is the stream of a
training run: a function of the seed and the step alone, so it can start anywhere and be shared among processes.
``decode_text`` turns one-hot images back into text.
"""

from __future__ import annotations

from lsgm_fast.data.config import DataConfig
from lsgm_fast.data.opening import open_data
from lsgm_fast.data.sources import ImageSource, check_data, spread
from lsgm_fast.data.stream import Batch, batches
from lsgm_fast.data.text import decode_text

__all__ = [
    "Batch",
    "DataConfig",
    "ImageSource",
    "batches",
    "check_data",
    "decode_text",
    "open_data",
    "spread",
]
