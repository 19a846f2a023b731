"""Sources: random access to 8-bit images of one shape."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lsgm_fast.config import VAEConfig
from lsgm_fast.data.config import DataConfig
from lsgm_fast.data.pictures import resized
from lsgm_fast.images import UInt8Array

Labels = npt.NDArray[np.int64]


class ImageSource(Protocol):
    """Images by number.

    ``name``: for messages. ``shape``: (C, H, W) of every image. ``labels``: (N,) int64 where the source has them.
    A source of text also has ``symbols``: the character of every channel.
    """

    name: str
    shape: tuple[int, int, int]
    labels: Labels | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> UInt8Array:
        """(C, H, W) uint8."""
        ...


class ArrayImages:
    """Images in memory: (N, C, H, W) uint8."""

    def __init__(self, name: str, images: UInt8Array, labels: Labels | None = None) -> None:
        self.name, self.images, self.labels = name, images, labels
        _, channels, height, width = images.shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> UInt8Array:
        return self.images[index]


def in_memory(config: DataConfig, images: UInt8Array, labels: Labels | None) -> ArrayImages:
    """A source of (N, C, H, W) images, converted to the configuration's channels and size.

    To grey: ``(19595 R + 38470 G + 7471 B + 2^15) / 2^16``, rounded down (ITU-R BT.601 as in Pillow, so that images
    do not depend on how they are stored).
    """
    if config.channels == 3 and images.shape[1] == 1:
        images = np.repeat(images, 3, axis=1)
    elif config.channels == 1 and images.shape[1] == 3:
        red, green, blue = images.astype(np.uint32).transpose(1, 0, 2, 3)
        grey = (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16
        images = grey[:, None].astype(np.uint8)
    if config.size is not None and images.shape[2:] != (config.size, config.size):
        images = resized(images, config.size)
    return ArrayImages(config.source, images, labels)


class Subset:
    """Some of the images of a source."""

    def __init__(self, source: ImageSource, indices: npt.NDArray[np.int64]) -> None:
        self.source, self.indices = source, indices
        self.name, self.shape, self.symbols = source.name, source.shape, symbols_of(source)
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> UInt8Array:
        return self.source[int(self.indices[index])]


def symbols_of(source: ImageSource) -> str:
    """The character of every channel where the images are text, else empty."""
    return getattr(source, "symbols", "")


def spread(source: ImageSource, number: int) -> ImageSource:
    """``number`` images at even distances: the first ones of a source that is sorted by label are all alike."""
    if number >= len(source):
        return source
    return Subset(source, np.arange(number) * len(source) // number)


def check_data(source: ImageSource, vae: VAEConfig) -> None:
    """Raise unless the images fit the model: its channels, its image size with or without the border, its symbols.

    Raises:
        ValueError: another shape or other symbols; names both and says which options change it.
    """
    symbols = symbols_of(source)
    if symbols != vae.symbols:
        raise ValueError(
            f"{source.name} has the symbols {symbols!r}, the model has {vae.symbols!r}: set the data's symbols "
            f"to the model's, or the model's vae.symbols to the data's, and vae.image_channels={source.shape[0]}"
        )
    natural = vae.image_size - 2 * vae.crop
    expected = [(vae.image_channels, size, size) for size in sorted({natural, vae.image_size})]
    if source.shape not in expected:
        raise ValueError(
            f"{source.name} has images of shape {source.shape} (channels, height, width), the model takes "
            f"{' or '.join(map(str, expected))}: set the data's size={natural} and channels={vae.image_channels}, "
            "or change the model's image_size, crop and image_channels"
        )


def optional_module(module: str, extra: str) -> Any:
    """An optional package's module, or an error that names the extra that brings it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f'these data need the package {package}, which is not installed: pip install "lsgm-fast[{extra}]"',
            name=error.name,
        ) from None
