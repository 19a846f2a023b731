"""IDX files, the format of MNIST and its relatives (LeCun, Cortes and Burges, yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from lsgm_fast.data.sources import Labels
from lsgm_fast.images import UInt8Array

_UNSIGNED_BYTE = 0x08
_SPLIT_FILES = {"train": "train", "held_out": "t10k"}


def read_idx(path: Path, dimensions: int) -> UInt8Array:
    """An IDX file of unsigned bytes, compressed with gzip or not.

    The header is two zero bytes, the type (8: unsigned byte), the number of dimensions, and each dimension as a
    big-endian uint32; the values follow in C order.

    Raises:
        ValueError: not such a file, another number of dimensions, or more or fewer values than the header says.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = _decompressed(path, data)
    if len(data) < 4 or data[0] or data[1] or data[2] != _UNSIGNED_BYTE:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it begins with {data[:4].hex(' ') or 'nothing'}, "
            f"expected 00 00 08 {dimensions:02x}"
        )
    if data[3] != dimensions:
        raise ValueError(f"{path} has {data[3]} dimensions, expected {dimensions}")
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, header, 4))
    expected = header + math.prod(shape)
    if len(data) != expected:
        size = f"{expected} bytes (header and {'x'.join(map(str, shape))} values)"
        if len(data) < header:
            size = f"a header of {header} bytes"
        problem = "is cut off" if len(data) < expected else "is too long"
        raise ValueError(f"{path} {problem}: expected {size}, got {len(data)}: download it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _decompressed(path: Path, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError:
        # What there is of it, so that the message can compare the lengths.
        return zlib.decompressobj(wbits=31).decompress(data)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}): download it again") from error


def has_idx_files(folder: Path) -> bool:
    """Whether the folder holds MNIST-named training images."""
    return _file(folder, "train", "images-idx3") is not None


def read_idx_folder(folder: Path, split: str) -> tuple[UInt8Array, Labels | None, bool]:
    """The MNIST-named files of a folder: images (N, H, W), their labels if there are any, whether it has the split.

    Without ``t10k`` images, the training images are returned for every split.
    """
    own = _file(folder, _SPLIT_FILES["held_out"], "images-idx3") is not None
    part = _SPLIT_FILES[split if own else "train"]
    images_file, labels_file = _file(folder, part, "images-idx3"), _file(folder, part, "labels-idx1")
    assert images_file is not None  # has_idx_files
    images = read_idx(images_file, 3)
    if labels_file is None:
        return images, None, own
    labels = read_idx(labels_file, 1).astype(np.int64)
    if len(labels) != len(images):
        raise ValueError(f"{labels_file} has {len(labels)} labels for {len(images)} images")
    return images, labels, own


def _file(folder: Path, part: str, kind: str) -> Path | None:
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{part}-{kind.replace('-', separator)}-ubyte{suffix}"
            if path.is_file():
                return path
    return None
