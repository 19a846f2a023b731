"""Text as one-hot images: chunks of symbols on a grid."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsgm_fast.data.config import DataConfig
from lsgm_fast.data.sources import Labels
from lsgm_fast.images import UInt8Array

OTHER = "\N{REPLACEMENT CHARACTER}"
"""The last of the symbols that are chosen by frequency."""

SIDE = 16
"""Side of the grid where the configuration has none."""


class TextChunks:
    """Chunks of text that do not overlap, as one-hot images.

    ``codes``: (N, H, W) uint8, the classes of every chunk, row by row. Image: (K, H, W) uint8, 255 in the channel of
    the class, else 0.
    """

    labels: Labels | None = None

    def __init__(self, name: str, codes: UInt8Array, symbols: str) -> None:
        self.name, self.codes, self.symbols = name, codes, symbols
        self.shape = (len(symbols), *codes.shape[1:])

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> UInt8Array:
        classes = np.arange(len(self.symbols), dtype=np.uint8)[:, None, None]
        return (self.codes[index] == classes) * np.uint8(255)


def encode_text(text: str, symbols: str) -> UInt8Array:
    """The class of every character: (len(text),) uint8.

    A character that is not one of ``symbols`` counts as its lower-case form, then white space as a blank, and what is
    still not there as the last symbol.
    """
    classes = {symbol: number for number, symbol in enumerate(symbols)}

    def class_of(character: str) -> int:
        for form in (character, character.lower(), " " if character.isspace() else character):
            if form in classes:
                return classes[form]
        return len(symbols) - 1

    table = {character: class_of(character) for character in set(text)}
    return np.fromiter((table[character] for character in text), np.uint8, len(text))


def decode_text(images: Any, symbols: str) -> list[str]:
    """The text of images: at every position the symbol of the channel with the largest value, row by row.

    Args:
        images: tensor or array (N, K, H, W), one-hot or probabilities. symbols: K characters.

    Returns:
        N strings of H * W characters.

    Raises:
        ValueError: another number of channels than of symbols.
    """
    if len(images.shape) != 4 or images.shape[1] != len(symbols):
        raise ValueError(
            f"expected images (N, {len(symbols)}, H, W), one channel for each symbol, got {tuple(images.shape)}"
        )
    classes: npt.NDArray[np.int64] = np.asarray(images.argmax(1).tolist(), np.int64).reshape(len(images), -1)
    return ["".join(symbols[number] for number in row) for row in classes]


def frequent_symbols(text: str, classes: int) -> str:
    """The ``classes - 1`` most frequent characters of a text (equally frequent ones by code point), then ``OTHER``.

    Raises:
        ValueError: the text has fewer different characters.
    """
    counts = Counter(text)
    del counts[OTHER]
    if len(counts) < classes - 1:
        raise ValueError(
            f"the text has {len(counts)} different characters, fewer than classes - 1 = {classes - 1}: set classes to "
            f"{len(counts) + 1} or less, or give the symbols"
        )
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return "".join(ranked[: classes - 1]) + OTHER


def open_text(config: DataConfig, text: str, training_text: str | None = None) -> TextChunks:
    """The chunks of ``text``; what is left over at its end is not used.

    Args:
        training_text: where the symbols are chosen by frequency, the text that they are counted in; None: ``text``.

    Raises:
        ValueError: a text shorter than a chunk, or options that are for images.
    """
    for name, neutral in (("channels", None), ("binarise", "none"), ("flip", False)):
        if getattr(config, name) != neutral:
            raise ValueError(
                f"{config.source} is text, and {name}={getattr(config, name)!r} is for images: leave it out"
            )
    side = config.size or SIDE
    length = side * side
    count = len(text) // length
    if count == 0:
        raise ValueError(
            f"{config.source} has {len(text)} characters, fewer than one chunk of {side} x {side} = {length}: "
            "give more text or set a smaller size"
        )
    counted = text if training_text is None else training_text
    symbols = config.symbols or frequent_symbols(counted, config.classes)
    codes = encode_text(text[: count * length], symbols).reshape(count, side, side)
    return TextChunks(config.source, codes, symbols)


def has_text(folder: Path) -> bool:
    """Whether all visible files below a folder are ``.txt``, and there are some."""
    found = False
    for file in folder.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            if file.suffix != ".txt":
                return False
            found = True
    return found


def read_text(path: Path) -> str:
    """A ``.txt`` file, or those below a folder, sorted by path and joined by a newline.

    Raises:
        ValueError: not UTF-8; names the file.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if not file.name.startswith("."))
    parts = []
    for file in files:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text in UTF-8 ({error}): convert it") from error
    return "\n".join(parts)


def pydoc_text() -> str:
    """The text of ``pydoc_data.topics``, in the order of the topics' names: about 300,000 characters of English.

    It differs between versions of Python. Topics repeat whole paragraphs of each other, which would put the same text
    on both sides of a split: every paragraph is taken where it comes first. White space is one blank.
    """
    from pydoc_data.topics import topics

    paragraphs = (
        " ".join(paragraph.split()) for name in sorted(topics) for paragraph in topics[name].split("\n\n")
    )
    return " ".join(dict.fromkeys(paragraph for paragraph in paragraphs if paragraph))
