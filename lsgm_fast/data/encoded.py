"""Images that are decoded when they are asked for: folders of image files and LMDBs."""

from __future__ import annotations

import io
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lsgm_fast.data.config import DataConfig
from lsgm_fast.data.pictures import channels_of, pixels
from lsgm_fast.data.sources import Labels, optional_module
from lsgm_fast.images import UInt8Array

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

logger = logging.getLogger("lsgm_fast")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")


class Reader(Protocol):
    """Where encoded images lie."""

    @property
    def keys(self) -> Sequence[Any]: ...

    def picture(self, key: Any) -> Picture:
        """Opened, not necessarily decoded yet."""
        ...

    def describe(self, key: Any) -> str: ...


class EncodedImages:
    """Images that are decoded when they are asked for.

    Every header is read on opening, so that images of different shapes are found then. With ``corrupt="skip"`` every
    image is decoded once, and those that cannot be are left out.

    Raises:
        ValueError: no images, different shapes that the configuration does not make equal, or (``"refuse"``) an
            image that cannot be read; names the file.
    """

    labels: Labels | None = None

    def __init__(self, name: str, reader: Reader, config: DataConfig) -> None:
        self.name, self.reader, self.config = name, reader, config
        self.keys: list[Any] = []
        for key in reader.keys:
            try:
                shape = self._shape(key)
            except UnreadableImage as error:
                if config.corrupt == "refuse":
                    raise
                logger.warning("%s: left out", error)
                continue
            if not self.keys:
                self.shape = shape
            elif shape != self.shape:
                raise ValueError(self._mixed(key, shape))
            self.keys.append(key)
        if not self.keys:
            found = f"none of its {len(reader.keys)} images can be read" if reader.keys else "it has none"
            raise ValueError(f"{name} gives no images: {found}")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> UInt8Array:
        with self._picture(self.keys[index]) as picture:
            return pixels(picture, self.shape[0], self.config.size)

    def _shape(self, key: Any) -> tuple[int, int, int]:
        with self._picture(key) as picture:
            own = channels_of(picture)
            channels = self.config.channels or own
            width, height = (self.config.size,) * 2 if self.config.size else picture.size
            if self.config.corrupt == "skip":
                pixels(picture, channels, self.config.size)
        return channels, height, width

    @contextmanager
    def _picture(self, key: Any) -> Iterator[Picture]:
        try:
            with self.reader.picture(key) as picture:
                yield picture
        except Exception as error:  # decoders raise anything for damaged data
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's, not the image's
            advice = "" if self.config.corrupt == "skip" else ": replace it, or set corrupt='skip'"
            raise UnreadableImage(
                f"{self.reader.describe(key)} cannot be read as an image ({error}){advice}"
            ) from error

    def _mixed(self, key: Any, shape: tuple[int, int, int]) -> str:
        options = []
        if shape[0] != self.shape[0]:
            options.append("channels (1 or 3) to convert them")
        if shape[1:] != self.shape[1:]:
            options.append("size to crop and resize them")
        first, other = self.reader.describe(self.keys[0]), self.reader.describe(key)
        return (
            f"images must have one shape (channels, height, width): {first} has {self.shape} and {other} has {shape}; "
            f"set {' and '.join(options)}"
        )


class UnreadableImage(ValueError):
    """An image that is damaged, or of a kind that is not supported."""


class Folder:
    """The image files below a folder, sorted by path; hidden ones are not looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        visible = (file for file in files if not any(part.startswith(".") for part in file.parts))
        self.keys = sorted(file.as_posix() for file in visible)

    def picture(self, key: str) -> Picture:
        from PIL import Image

        return Image.open(self.path / key)

    def describe(self, key: str) -> str:
        return str(self.path / key)


class Lmdb:
    """The values of an LMDB, sorted by key: as numbers if all keys are decimal, else by their bytes.

    A value is an encoded image; or, if the first that can be understood is none, every value is
    side * side * 1 or 3 raw bytes (rows, columns, channels), as published converters write them.

    Raises:
        ValueError: not an LMDB.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = _environment(path)
        with self.environment.begin() as transaction:
            self.keys = list(transaction.cursor().iternext(values=False))
            if all(key.isdigit() for key in self.keys):
                self.keys.sort(key=int)
            layouts = (_layout(transaction.get(key)) for key in self.keys)
            self.raw_shape = next((layout for layout in layouts if layout is not None), ())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "environment": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, environment=_environment(state["path"]))

    def picture(self, key: bytes) -> Picture:
        from PIL import Image

        with self.environment.begin() as transaction:
            value = transaction.get(key)
        if not self.raw_shape:
            return Image.open(io.BytesIO(value))
        if len(value) != math.prod(self.raw_shape):
            raise ValueError(
                f"{len(value)} bytes, expected {math.prod(self.raw_shape)} as in the first value"
            )
        return Image.fromarray(np.frombuffer(value, np.uint8).reshape(self.raw_shape))

    def describe(self, key: bytes) -> str:
        return f"{self.path}, key {key.decode(errors='replace')}"


# A process may open an LMDB only once, but the two splits of one are two sources.
_environments: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()


def _environment(path: Path) -> Any:
    lmdb = optional_module("lmdb", "lmdb")
    place = path.resolve()
    environment = _environments.get(place)
    if environment is None:
        try:
            environment = lmdb.open(
                str(place), subdir=place.is_dir(), readonly=True, lock=False, readahead=False
            )
        except lmdb.Error as error:
            raise ValueError(f"{path} cannot be opened as an LMDB ({error})") from error
        _environments[place] = environment
    return environment


def _layout(value: bytes) -> tuple[int, ...] | None:
    """The shape of a raw value, () for an encoded one, None if it is neither."""
    from PIL import Image

    try:
        Image.open(io.BytesIO(value)).close()
        return ()
    except Exception:  # decoders raise anything for data that are no image
        pass
    # No number is both a square and three times one, so the length tells the channels.
    for channels in (1, 3):
        side = math.isqrt(len(value) // channels)
        if value and side * side * channels == len(value):
            return (side, side) if channels == 1 else (side, side, channels)
    return None
