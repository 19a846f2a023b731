"""CIFAR-10 (Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html): its archives or their unpacked folders."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lsgm_fast.data.sources import Labels
from lsgm_fast.images import UInt8Array

_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_BATCHES = {"train": _TRAIN, "held_out": ("test_batch",)}
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_PIXELS = 3 * 32 * 32


def cifar_folder(folder: Path) -> Path | None:
    """Where the batches are: the folder itself or the one that the archive unpacks to; None: nowhere here."""
    for candidate in (folder, *(folder / name for name in _FOLDERS)):
        if any((candidate / f"{_TRAIN[0]}{suffix}").is_file() for suffix in ("", ".bin")):
            return candidate
    return None


def read_cifar(path: Path, split: str) -> tuple[UInt8Array, Labels]:
    """Images (N, 3, 32, 32) and labels of one split, from the archive (never unpacked to disk) or a folder.

    The python version holds pickles, which could run any code. They are read by an unpickler that knows nothing but
    arrays of bytes, and refuses everything else.

    Raises:
        ValueError: a batch that is missing, damaged or refused.
    """
    names = _BATCHES[split]
    files = _from_folder(path, names) if path.is_dir() else _from_archive(path, names)
    missing = [name for name in names if name not in files]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)} (or {missing[0]}.bin): expected the CIFAR-10 archive, python or "
            "binary version, or its unpacked folder"
        )
    parts = [files[name]() for name in names]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


_Part = Callable[[], tuple[UInt8Array, Labels]]


def _from_folder(folder: Path, names: tuple[str, ...]) -> dict[str, _Part]:
    files = [folder / f"{name}{suffix}" for name in names for suffix in ("", ".bin")]
    return {file.stem: _part(str(file), file.read_bytes()) for file in files if file.is_file()}


def _from_archive(path: Path, names: tuple[str, ...]) -> dict[str, _Part]:
    parts = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = Path(member.name)
                content = archive.extractfile(member) if file.stem in names else None
                if content is not None and file.suffix in ("", ".bin"):
                    parts[file.stem] = _part(f"{path}: {member.name}", content.read())
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is a damaged archive ({error}): download it again") from error
    return parts


def _part(name: str, data: bytes) -> _Part:
    return lambda: _binary(name, data) if name.endswith(".bin") else _pickled(name, data)


def _binary(name: str, data: bytes) -> tuple[UInt8Array, Labels]:
    record = 1 + _PIXELS
    if not data or len(data) % record:
        raise ValueError(
            f"{name} is cut off: expected a multiple of {record} bytes, got {len(data)}: download it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _pickled(name: str, data: bytes) -> tuple[UInt8Array, Labels]:
    try:
        batch = _ByteArrays(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{name} cannot be read, or is not safe to ({error}): download it again") from error
    fields = {key.encode() if isinstance(key, str) else key: value for key, value in _items(batch)}
    images, labels = fields.get(b"data"), fields.get(b"labels")
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.shape[1:] != (_PIXELS,)
        or not isinstance(labels, list)
        or len(labels) != len(images)
        or not all(isinstance(label, int) for label in labels)
    ):
        raise ValueError(
            f"{name} is not a batch of CIFAR-10: expected a dictionary with 'data', an (N, {_PIXELS}) array of "
            "uint8, and 'labels', a list of N integers"
        )
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _items(batch: Any) -> list[tuple[Any, Any]]:
    return list(batch.items()) if isinstance(batch, dict) else []


class _ByteArrays(pickle.Unpickler):
    """Reads plain values and arrays of bytes.

    Nothing that a pickle names is looked up: the few names that such arrays need stand for functions made here, which
    can build nothing else. (A pickle can also set attributes of what it has made: these are made anew for each name.)
    """

    def find_class(self, module: str, name: str) -> Any:
        place = module.replace("numpy._core", "numpy.core")
        if (place, name) == ("numpy", "ndarray"):
            return "ndarray"  # only ever an argument; text cannot be called
        if (place, name) == ("numpy", "dtype"):
            return lambda code, *_: _byte_type(code)
        if (place, name) == ("numpy.core.multiarray", "_reconstruct"):
            return lambda *_: np.empty(0, np.uint8)
        if (place, name) == ("numpy.core.numeric", "_frombuffer"):
            return lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order)
        if (place, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, *_: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which arrays of bytes do not need")


def _byte_type(code: Any) -> Any:
    if code not in ("u1", b"u1", "|u1", b"|u1"):
        raise pickle.UnpicklingError(f"it holds an array of type {code!r}, expected u1 (bytes)")
    return np.dtype(np.uint8, copy=True)
