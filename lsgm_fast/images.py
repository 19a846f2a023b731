"""Image files: PNG grids, single PNGs and ``.npz``. Nothing half-written is ever left behind.

Images come in as (N, C, H, W), float, values in [0, 1], with C = 1 (grey) or 3 (RGB), and are stored as 8-bit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsgm_fast.files import atomic_path

UInt8Array = npt.NDArray[np.uint8]


def to_uint8(images: Any) -> UInt8Array:
    """Convert images in [0, 1] to bytes: ``floor(255 x + 0.5)``, clipped to [0, 255].

    Args:
        images: (N, C, H, W) tensor (any float dtype and device) or array, C = 1 or 3.

    Returns:
        (N, H, W, C) uint8 array.

    Raises:
        ValueError: another shape, an integer dtype, or NaN or infinity among the values.
    """
    if hasattr(images, "detach"):  # a tensor; not imported here, so that reading images needs no torch
        images = images.detach().cpu()
        images = images.float().numpy() if images.is_floating_point() else images.numpy()
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"expected images of shape (N, 1 or 3, H, W), got {tuple(array.shape)}")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"expected floating-point images in [0, 1], got dtype {array.dtype}")
    finite = np.isfinite(array).all(axis=(1, 2, 3))
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise ValueError(
            f"{len(bad)} of {len(array)} images hold NaN or infinity, the first is number {bad[0]}"
        )
    scaled = np.floor(np.clip(array, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))


def make_grid(
    images: UInt8Array,
    *,
    columns: int | None = None,
    padding: int = 2,
    background: int = 0,
    scale: int | None = None,
) -> UInt8Array:
    """Lay images out row by row, in a square as nearly as possible.

    Args:
        images: (N, H, W, C) uint8, N >= 1.
        columns: images per row; default ``ceil(sqrt(N))``.
        padding: pixels between and around the images.
        background: grey level of the padding and of unused cells.
        scale: every pixel becomes ``scale x scale`` pixels; default 2 for images under 64 pixels wide, else 1.

    Returns:
        (rows (H scale + padding) + padding, columns (W scale + padding) + padding, C) uint8.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"expected at least one image of shape (N, H, W, C), got {tuple(images.shape)}")
    n, height, width, channels = images.shape
    if columns is None:
        columns = int(np.ceil(np.sqrt(n)))
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if scale is None:
        scale = 2 if width < 64 else 1
    if scale > 1:
        images = images.repeat(scale, axis=1).repeat(scale, axis=2)
        height, width = height * scale, width * scale
    columns = min(columns, n)
    rows = -(-n // columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, channels)
    canvas = np.full(shape, background, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_png(path: str | Path, image: UInt8Array) -> None:
    """Write one (H, W, 1) or (H, W, 3) uint8 image as PNG."""
    from PIL import Image

    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"expected an image of shape (H, W, 1 or 3), got {tuple(image.shape)}")
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    with atomic_path(path, make_folders=True) as temporary:
        picture.save(temporary, format="PNG")


def save_individual(folder: str | Path, images: UInt8Array, *, start: int = 0) -> list[Path]:
    """Write (N, H, W, C) uint8 images as ``00000.png``, ``00001.png``, ... counted from ``start``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{start + index:05d}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        save_png(path, image)
    return paths


def save_npz(path: str | Path, images: UInt8Array) -> None:
    """Write (N, H, W, C) uint8 images as one array named ``arr_0``, which common FID tools read as it is."""
    with atomic_path(path, make_folders=True) as temporary, open(temporary, "wb") as file:
        np.savez(file, images)


def require_writable(path: str | Path, *, folder: bool = False) -> None:
    """Raise now if ``path`` could not be written later; creates nothing.

    Args:
        path: the file to be written, or the folder to write into (``folder=True``); it may not exist yet.

    Raises:
        OSError: the path is a folder where a file is wanted or the reverse, one of its parents is a file, or the
            nearest existing folder does not accept a new file.
    """
    path = Path(path)
    if not folder and path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    nearest = path if folder else path.parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {nearest} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise type(error)(
            f"cannot write {path}: no file can be created in {nearest} ({error.strerror})"
        ) from None
