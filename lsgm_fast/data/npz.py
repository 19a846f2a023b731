"""``.npz`` files of images."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lsgm_fast.data.sources import Labels
from lsgm_fast.images import UInt8Array, to_uint8


def read_npz(path: Path) -> tuple[UInt8Array, Labels | None]:
    """Images (N, C, H, W) and labels of a ``.npz``: ``images`` or ``arr_0``, and ``labels`` if it is there.

    The images are (N, H, W) or (N, H, W, C), C = 1 or 3, uint8 or floats in [0, 1] (rounded to 8 bits). Nothing in
    the file is executed: arrays of Python objects are refused.

    Raises:
        ValueError: a damaged file, no such array, or one of another shape, type or range.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            name = next((key for key in ("images", "arr_0") if key in file), None)
            if name is None:
                raise ValueError(f"it holds {sorted(file)}, expected an array 'images' or 'arr_0'")
            images = _images(file[name], name)
            labels = _labels(file["labels"], len(images)) if "labels" in file else None
    except OSError as error:
        if error.filename is not None:  # it cannot be opened; without a name, an offset in it is impossible
            raise
        raise ValueError(f"cannot use {path}: {error}") from error
    # RuntimeError: a damaged header asks for a password, or for a compression that does not exist.
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot use {path}: {error}") from error
    return images, labels


def _images(array: Any, name: str) -> UInt8Array:
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(f"'{name}' has shape {array.shape}, expected (N, H, W) or (N, H, W, 1 or 3)")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"'{name}' has dtype {array.dtype}, expected uint8, or floats in [0, 1]")
    if array.size:
        low, high = float(array.min()), float(array.max())
        # Written so that NaN fails too.
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"'{name}' has values in [{low:g}, {high:g}], expected floats in [0, 1] or uint8"
            )
    return np.ascontiguousarray(to_uint8(array.transpose(0, 3, 1, 2)).transpose(0, 3, 1, 2))


def _labels(array: Any, count: int) -> Labels:
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"'labels' has shape {array.shape} and dtype {array.dtype}, expected ({count},) integers"
        )
    return array.astype(np.int64)
