"""Drawing many images into a folder of shards: by one process or several, and on from where a run was stopped.

::

    folder/shards.json         what the images depend on, and how many there are; written first
           shard-00000.npz     images 0 to size - 1 of the seed, (size, H, W, C) uint8, named arr_0
           shard-00001.npz     ...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lsgm_fast.commands.common import pick_device

if TYPE_CHECKING:
    from lsgm_fast.images import UInt8Array
    from lsgm_fast.models.lsgm import LSGM, SamplingInfo

MANIFEST = "shards.json"
FORMAT = 1


@dataclass(frozen=True)
class Shards:
    """``number`` images in files of ``size`` (the last one may hold fewer)."""

    folder: Path
    number: int
    size: int

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST

    def __len__(self) -> int:
        return -(-self.number // self.size)

    def path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.npz"

    def images(self, index: int) -> range:
        """The images of a shard, by their index within the seed."""
        return range(index * self.size, min((index + 1) * self.size, self.number))

    def open(self, described: dict[str, Any]) -> None:
        """Make the folder and its manifest, or check that what is there was begun alike.

        Processes may do so at the same time: they write the same.

        Raises:
            ValueError: the folder has shards of something else, or without a manifest; the message says what differs.
        """
        from lsgm_fast.files import atomic_path

        # In this order: whoever writes shards has written the manifest before.
        has_shards = next(self.folder.glob("shard-*.npz"), None) is not None
        if not self.manifest.exists():
            if has_shards:
                raise ValueError(
                    f"{self.folder} holds shards but no {MANIFEST}, so nothing says what they are of: give another "
                    "folder, or remove them"
                )
            with atomic_path(self.manifest, make_folders=True) as temporary:
                temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        try:
            found = json.loads(self.manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.manifest} is damaged ({error}): give another folder") from None
        if changed := _differences(found, described):
            raise ValueError(
                f"{self.folder} holds shards of another run ({'; '.join(changed)}): give another folder, or the same "
                "model and options to go on with it"
            )

    def is_finished(self, index: int) -> bool:
        """Whether a shard is there, all of it; a damaged one is said and counts as missing."""
        from lsgm_fast.data.npz import read_npz

        path = self.path(index)
        if not path.exists():
            return False
        try:
            images, _ = read_npz(path)
        except ValueError as error:
            typer.echo(f"note: drawing it again: {error}", err=True)
            return False
        expected = len(self.images(index))
        if len(images) != expected:
            typer.echo(
                f"note: drawing it again: {path} holds {len(images)} images, expected {expected}", err=True
            )
        return len(images) == expected

    def sweep(self, mine: range, main: bool) -> None:
        """Remove what killed processes left half-written of this process's files; another one may be writing its own.

        Args:
            main: the manifest's are removed too.
        """
        from lsgm_fast.files import leftovers

        own = {self.path(index) for index in mine} | ({self.manifest} if main else set())
        for temporary, path in leftovers(self.folder):
            if path in own:
                temporary.unlink(missing_ok=True)


@dataclass
class _Tally:
    """What one process did."""

    kept: int = 0
    drawn: int = 0
    images: int = 0
    evaluations: int = 0
    last: SamplingInfo | None = None

    def add(self, count: int, info: SamplingInfo) -> None:
        self.images += count
        self.evaluations += info.nfe * count
        self.last = info


def sample_shards(
    source: str,
    number: int,
    folder: Path,
    size: int,
    seed: int,
    device: str,
    options: dict[str, Any],
    precision: str | None = None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw ``number`` images of the model ``source`` into ``folder``, ``size`` of them per file.

    Every process that ``torchrun`` started draws each of its shards alone, with batches that begin where the shard
    does: which images are drawn together, and so every bit of them, depends neither on the number of processes nor on
    where an earlier run was stopped.

    Args:
        options: of ``LSGM.sample``. precision: of ``LSGM.compile_for_inference``.
    """
    if folder.suffix and not folder.is_dir():
        raise ValueError(
            f"--shards writes into a folder: give --out a folder, without a dot, got {str(folder)!r}"
        )
    from lsgm_fast import distributed, images

    images.require_writable(folder, folder=True)
    place = distributed.find_place(None if device == "auto" else pick_device(device))
    rank, world = (0, 1) if place.processes is None else (place.processes.rank, place.processes.size)
    main = rank == 0

    import lsgm_fast

    model = lsgm_fast.load(source, device=place.device)
    if model.config is not None and model.config.vae.symbols:
        raise ValueError("this model draws text: --shards is for images")
    if precision is not None:
        model.compile_for_inference(precision=precision)
    shards = Shards(folder, number, size)
    options = {**options, "batch": _batch_size(options, size)}
    del options["batch_size"]
    # Drops the iterator before its first batch: what it refuses must not be written down.
    model.sample_iter(number, seed=seed, **options).close()
    shards.open(_describe(model, shards, seed, options | {"precision": precision}, place.device.type))
    mine = range(rank, len(shards), world)
    shards.sweep(mine, main)

    tally = _Tally()
    start = time.perf_counter()
    show = main and sys.stderr.isatty() and not (quiet or as_json)
    try:
        _draw_missing(model, shards, mine, seed, options, tally, show=show)
    except (KeyboardInterrupt, ArithmeticError, RuntimeError) as error:
        done = tally.kept + tally.drawn
        if main:
            typer.echo(
                f"stopped: {done} of {len(mine)} shards{_of(world)} are finished in {folder}; the same command goes on",
                err=True,
            )
        if isinstance(error, KeyboardInterrupt):
            if as_json and main:
                typer.echo(json.dumps({"interrupted": True, "drawn": tally.drawn, "kept": tally.kept}))
            raise typer.Exit(130) from None
        raise
    if not main:
        return
    last = tally.last
    report = {
        "interrupted": False,
        "number": number,
        "folder": str(folder),
        "shards": len(shards),
        "processes": world,
        "drawn": tally.drawn,
        "kept": tally.kept,
        "missing": sum(not shards.path(index).exists() for index in range(len(shards))),
        "model": source,
        "seed": seed,
        "device": str(place.device),
        "images_drawn": tally.images,
        "seconds": time.perf_counter() - start,
        "nfe": tally.evaluations / tally.images if tally.images else None,
        "solver": None if last is None else last.solver,
        "reason": None if last is None else last.reason,
        "backends": None if last is None else last.backends,
        "version": lsgm_fast.__version__,
    }
    if as_json:
        typer.echo(json.dumps(report))
    elif not quiet:
        _print(report)


def _draw_missing(
    model: LSGM,
    shards: Shards,
    mine: range,
    seed: int,
    options: dict[str, Any],
    tally: _Tally,
    *,
    show: bool,
) -> None:
    from tqdm import tqdm

    from lsgm_fast import images

    total = sum(len(shards.images(index)) for index in mine)
    with tqdm(total=total, desc="sampling", unit="image", disable=not show, leave=False) as bar:

        def count(drawn: int, info: SamplingInfo) -> None:
            tally.add(drawn, info)
            bar.update(drawn)

        for index in mine:
            if shards.is_finished(index):
                tally.kept += 1
                bar.update(len(shards.images(index)))
                continue
            images.save_npz(shards.path(index), _draw(model, shards.images(index), seed, options, count))
            tally.drawn += 1


def _draw(
    model: LSGM,
    wanted: range,
    seed: int,
    options: dict[str, Any],
    count: Callable[[int, SamplingInfo], None],
) -> UInt8Array:
    """The images of one shard, (n, H, W, C)."""
    import numpy as np

    from lsgm_fast import images

    whole: UInt8Array | None = None
    done = 0
    with closing(model.sample_iter(len(wanted), seed=seed, first=wanted.start, **options)) as batches:
        for batch, info in batches:
            pixels = images.to_uint8(batch)
            if whole is None:
                whole = np.empty((len(wanted), *pixels.shape[1:]), dtype=np.uint8)
            whole[done : done + len(pixels)] = pixels
            done += len(pixels)
            count(len(pixels), info)
    assert whole is not None
    return whole


def _batch_size(options: dict[str, Any], size: int) -> int:
    from lsgm_fast.models.lsgm import DEFAULT_BATCH_SIZE

    return min(options["batch_size"] or DEFAULT_BATCH_SIZE, size)


def _describe(model: LSGM, shards: Shards, seed: int, options: dict[str, Any], device: str) -> dict[str, Any]:
    """All that the images depend on, as it reads in the manifest."""
    import torch

    import lsgm_fast
    from lsgm_fast import checkpoints

    return {
        "format": FORMAT,
        "number": shards.number,
        "shard_size": shards.size,
        "model": checkpoints.fingerprint(model),
        "seed": seed,
        "options": options,
        # Which solver "auto" is, and the last bits of every number.
        "made_with": {"lsgm_fast": lsgm_fast.__version__, "torch": torch.__version__, "device": device},
    }


def _differences(found: Any, wanted: dict[str, Any]) -> list[str]:
    """``name: found -> wanted`` for all that differs."""
    if not isinstance(found, dict):
        return [f"{MANIFEST} holds no object"]
    changed = []
    for name in wanted.keys() | found.keys():
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new)
        elif old != new:
            changed.append(f"{name}: {_short(old)} -> {_short(new)}")
    return sorted(changed)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _of(world: int) -> str:
    return "" if world == 1 else f" of process 0 of {world}"


def _print(report: dict[str, Any]) -> None:
    drawn, seconds = report["images_drawn"], report["seconds"]
    if drawn:
        typer.echo(
            f"{drawn} images in {seconds:.2f} s on {report['device']}{_of(report['processes'])}: "
            f"{seconds / drawn:.4f} s per sample, NFE {report['nfe']:.4g} ({report['solver']})"
        )
    if report["reason"]:
        typer.echo(f"solver: {report['reason']}")
    kept = f", {report['kept']} were there" if report["kept"] else ""
    typer.echo(f"shards{_of(report['processes'])}: {report['drawn']} drawn{kept}")
    if report["missing"]:
        typer.echo(f"{report['missing']} of {report['shards']} are still to come from other processes")
    typer.echo(f"folder: {report['folder']} ({report['number']} images in {report['shards']} shards)")
