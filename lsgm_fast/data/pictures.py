"""Pictures of Pillow as arrays: channels, transparency, centre crop and size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lsgm_fast.images import UInt8Array

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def channels_of(picture: Picture) -> int:
    """1 (grey) or 3 (palettes count as colour), as the file has it; a transparency channel does not count.

    Raises:
        ValueError: pixels of another type, such as 16-bit grey.
    """
    if picture.mode in _GREY_MODES:
        return 1
    if picture.mode in _COLOUR_MODES:
        return 3
    raise ValueError(f"its pixels are of type {picture.mode}, expected grey or RGB of 8 bits")


def pixels(picture: Picture, channels: int, size: int | None) -> UInt8Array:
    """Decode: (channels, H, W) uint8; transparent images on white; ``size``: centre crop to a square, then Lanczos."""
    from PIL import Image

    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None and picture.size != (size, size):
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        # Cropped first: told to resize a box, Pillow's filters would reach beyond it.
        picture = picture.crop((left, top, left + side, top + side))
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def resized(images: UInt8Array, size: int) -> UInt8Array:
    """(N, C, H, W) images cropped and resized as ``pixels`` does it: (N, C, size, size)."""
    from PIL import Image

    channels = images.shape[1]
    out = np.empty((len(images), channels, size, size), np.uint8)
    for image, target in zip(images, out, strict=True):
        picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        target[:] = pixels(picture, channels, size)
    return out
