from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lsgm_fast import images
from lsgm_fast.files import atomic_path


def gradient(n: int, channels: int = 1, size: int = 4) -> np.ndarray:
    values = np.arange(n * size * size * channels, dtype=np.uint8)
    return values.reshape(n, size, size, channels)


def test_to_uint8_rounds_clips_and_moves_channels_last():
    x = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5 / 255, 1.0, 7.0]).reshape(1, 1, 2, 3)
    result = images.to_uint8(x)
    assert result.shape == (1, 2, 3, 1)
    assert result.dtype == np.uint8
    assert result.ravel().tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_uint8_takes_every_float_dtype(dtype):
    x = torch.rand(2, 3, 4, 5).requires_grad_()
    assert images.to_uint8(x.to(dtype)).shape == (2, 4, 5, 3)


def test_to_uint8_inverts_every_byte():
    levels = np.arange(256, dtype=np.uint8)
    x = torch.from_numpy(levels.astype(np.float32) / 255).reshape(1, 1, 16, 16)
    assert np.array_equal(images.to_uint8(x).ravel(), levels)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(1, 2, 4, 4), r"\(1, 2, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), "int64"),
    ],
)
def test_to_uint8_refuses_other_inputs(value, message):
    with pytest.raises(ValueError, match=message):
        images.to_uint8(value)


def test_to_uint8_says_which_image_is_not_finite():
    x = torch.zeros(4, 1, 2, 2)
    x[2, 0, 1, 1] = float("nan")
    x[3, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="2 of 4 images hold NaN or infinity, the first is number 2"):
        images.to_uint8(x)


@given(
    n=st.integers(1, 30),
    columns=st.none() | st.integers(1, 8),
    padding=st.integers(0, 3),
    scale=st.integers(1, 3),
)
def test_grid_holds_every_image_in_reading_order(n, columns, padding, scale):
    originals = np.full((n, 3, 5, 1), 0, dtype=np.uint8) + np.arange(1, n + 1, dtype=np.uint8).reshape(
        -1, 1, 1, 1
    )
    grid = images.make_grid(originals, columns=columns, padding=padding, scale=scale)
    per_row = min(n, columns if columns is not None else int(np.ceil(np.sqrt(n))))
    rows = -(-n // per_row)
    assert grid.shape == (
        rows * (3 * scale + padding) + padding,
        per_row * (5 * scale + padding) + padding,
        1,
    )
    for i in range(n):
        top = padding + (i // per_row) * (3 * scale + padding)
        left = padding + (i % per_row) * (5 * scale + padding)
        assert (grid[top : top + 3 * scale, left : left + 5 * scale] == i + 1).all()
    assert np.count_nonzero(grid) == n * 15 * scale * scale


def test_grid_enlarges_small_images_only():
    assert images.make_grid(np.zeros((1, 28, 28, 1), np.uint8), padding=0).shape == (56, 56, 1)
    assert images.make_grid(np.zeros((1, 64, 64, 3), np.uint8), padding=0).shape == (64, 64, 3)


def test_grid_needs_an_image():
    with pytest.raises(ValueError, match="at least one image"):
        images.make_grid(np.zeros((0, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        images.make_grid(gradient(2), columns=0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_round_trip(tmp_path, channels, mode):
    image = gradient(1, channels)[0]
    images.save_png(tmp_path / "new" / "x.png", image)
    with Image.open(tmp_path / "new" / "x.png") as read:
        assert read.mode == mode
        assert np.array_equal(np.asarray(read).reshape(image.shape), image)


def test_png_refuses_two_channels(tmp_path):
    with pytest.raises(ValueError, match=r"\(4, 4, 2\)"):
        images.save_png(tmp_path / "x.png", np.zeros((4, 4, 2), np.uint8))


def test_individual_files_are_numbered_across_batches(tmp_path):
    images.save_individual(tmp_path / "out", gradient(2))
    paths = images.save_individual(tmp_path / "out", gradient(1), start=2)
    assert paths == [tmp_path / "out" / "00002.png"]
    assert sorted(os.listdir(tmp_path / "out")) == ["00000.png", "00001.png", "00002.png"]


def test_npz_holds_one_uint8_array(tmp_path):
    images.save_npz(tmp_path / "x.npz", gradient(3))
    with np.load(tmp_path / "x.npz") as stored:
        assert stored.files == ["arr_0"]
        assert np.array_equal(stored["arr_0"], gradient(3))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, error):
    target = tmp_path / "x.png"
    target.write_bytes(b"old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.png"]


def test_atomic_path_keeps_the_extension_and_folder(tmp_path):
    target = tmp_path / "a.tar.npz"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"
        assert not target.exists()
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_require_writable_accepts_folders_to_come_and_creates_nothing(tmp_path):
    images.require_writable(tmp_path / "a" / "b" / "x.png")
    images.require_writable(tmp_path / "a", folder=True)
    images.require_writable(Path("x-that-does-not-exist.png"))
    assert os.listdir(tmp_path) == []


def test_require_writable_refuses(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        images.require_writable(tmp_path / "file" / "x.png")
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        images.require_writable(tmp_path / "file", folder=True)
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        images.require_writable(tmp_path)


def test_require_writable_sees_a_folder_that_takes_no_files(tmp_path, monkeypatch):
    # Permission bits do not bind root, so the refusal of the system is played.
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"cannot write .*x\.png.*Permission denied"):
        images.require_writable(tmp_path / "x.png")
