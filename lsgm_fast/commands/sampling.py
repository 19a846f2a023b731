"""Drawing images, converting checkpoints, tuning a model's grid of times."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lsgm_fast import env
from lsgm_fast.commands.common import Device, Json, Quiet, Seed, pick_device

if TYPE_CHECKING:
    import torch

    from lsgm_fast.images import UInt8Array
    from lsgm_fast.models.lsgm import LSGM, SamplingInfo

GRID_LIMIT = 256
CHECKPOINT_SUFFIXES = (".pt", ".safetensors")


def demo(
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many digits.")] = 64,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file, or a folder.")] = Path("samples.png"),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw handwritten digits with the model that comes with lsgm-fast.

    Writes `samples.png` and prints the number of network evaluations (NFE) and the seconds per sample.

    Examples:

    - `lsgm-fast demo`
    - `lsgm-fast demo -n 16 --seed 7 --out digits.png`
    """
    _sample(_Request("demo", number, _Outputs.plan(out), seed, device), as_json=as_json, quiet=quiet)


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint (.pt or .safetensors), or `demo`.")
    ],
    number: Annotated[int, typer.Option("--number", "--num", "-n", min=1, help="How many images.")] = 16,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="A .png file for the grid, a .npz file for the array only, or a folder."
        ),
    ] = Path("samples.png"),
    individual: Annotated[
        bool, typer.Option("--individual", help="Also write every image as its own PNG, in a folder.")
    ] = False,
    npz: Annotated[
        bool,
        typer.Option("--npz", help="Also write all images as one uint8 array (N, H, W, C), named arr_0."),
    ] = False,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per file: write arrays of so many into the folder --out as they are drawn. Goes on "
            "where a run was stopped; torchrun shares the work among processes.",
        ),
    ] = None,
    seed: Seed = 0,
    solver: Annotated[
        str,
        typer.Option(
            help="How the equation is solved: auto (the best measured), rk45 (as published), exponential, "
            "ancestral, ...; a wrong name lists all."
        ),
    ] = "auto",
    tol: Annotated[
        float | None,
        typer.Option(
            help="Error tolerance; smaller is slower. auto: as accurate as rk45 at it. Default: the model's."
        ),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(
            min=1, help="Network evaluations, for a solver with a fixed budget (exponential, ancestral, ...)."
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Times of such a solver: uniform, quadratic, log_snr or natural. Default: its best."
        ),
    ] = None,
    ode_eps: Annotated[
        float | None,
        typer.Option(help="Time at which the solver stops, just above 0. Default: the model's own."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Scales the starting noise; below 1: more typical, less varied.")
    ] = 1.0,
    vae_temperature: Annotated[float, typer.Option(help="Scales the noise inside the VAE's decoder.")] = 1.0,
    bn: Annotated[
        str | None,
        typer.Option(help="BatchNorm statistics of the decoder: running or batch. Default: the model's own."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images computed together. Default: at most 64.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of convolutions and matrix products: fp32, tf32 (GPUs), bf16 or fp16. Default: the model's own."
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from a model: a PNG grid, and on request single files or one array.

    Where the files go: `--out grid.png` writes the grid there, `--individual` adds `grid/00000.png`, ...,
    `--npz` adds `grid.npz`. `--out folder` puts everything into the folder.
    Ctrl-C saves the batches that are finished.

    `--shards 1000 --out folder` is for many images: `folder/shard-00000.npz`, ..., each an array of 1,000, and
    never more than one of them in memory. Start it again to go on after a kill or Ctrl-C (`docs/sampling.md`).

    Examples:

    - `lsgm-fast sample demo -n 100 --out digits.png`
    - `lsgm-fast sample checkpoint.pt -n 16 --seed 3 --device cuda`
    - `lsgm-fast sample model.safetensors -n 50000 --batch-size 100 --out images.npz`
    - `lsgm-fast sample checkpoint.pt --solver ancestral --evaluations 200 --out run1 --individual`
    - `lsgm-fast sample model.safetensors -n 50000 --shards 1000 --out images`
    - `torchrun --nproc-per-node 8 -m lsgm_fast sample model.safetensors -n 50000 --shards 1000 --out images`
    """
    if tol is not None and evaluations is not None:
        raise ValueError("give --tol or --evaluations, not both: one sets the error, the other the cost")
    options = {
        "solver": solver,
        "tol": tol,
        "evaluations": evaluations,
        "ode_eps": ode_eps,
        "grid": grid,
        "temperature": temperature,
        "vae_temperature": vae_temperature,
        "bn": bn,
        "batch_size": batch_size,
    }
    if shards is not None:
        if individual or npz:
            raise ValueError("--shards writes arrays, and those alone: leave --individual and --npz out")
        from lsgm_fast.commands.shards import sample_shards

        sample_shards(
            model, number, out, shards, seed, device, options, precision, as_json=as_json, quiet=quiet
        )
        return
    processes = env.torchrun()
    if processes is not None and processes.size > 1:
        raise ValueError(
            f"{processes.size} processes would each draw the same images: add --shards, which shares them"
        )
    outputs = _Outputs.plan(out, individual=individual, npz=npz)
    _sample(_Request(model, number, outputs, seed, device, options, precision), as_json=as_json, quiet=quiet)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint to read.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="The file to write: .safetensors or .pt.")
    ],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace DST if it exists.")] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Store the weights in half precision: a file of half the size.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint between the published layout (.pt) and ours (.safetensors), both ways.

    Nothing that the file contains is executed. The result holds the weights for sampling (the averaged ones) and the
    configuration.

    Examples:

    - `lsgm-fast convert checkpoint.pt model.safetensors`
    - `lsgm-fast convert checkpoint.pt small.safetensors --half`
    - `lsgm-fast convert model.safetensors checkpoint.pt`
    """
    if destination.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"DST must end in {' or '.join(CHECKPOINT_SUFFIXES)}, got {str(destination)!r}")
    if not source.is_file():
        raise ValueError(f"SRC {str(source)!r} does not exist or is not a file")
    if destination.exists() and not force:
        raise ValueError(f"{str(destination)!r} exists already: choose another name or add --force")

    from lsgm_fast import images

    images.require_writable(destination)

    import torch

    import lsgm_fast

    destination.parent.mkdir(parents=True, exist_ok=True)
    lsgm_fast.convert(source, destination, dtype=torch.float16 if half else None)
    size = destination.stat().st_size
    if as_json:
        typer.echo(json.dumps({"source": str(source), "destination": str(destination), "bytes": size}))
    elif not quiet:
        typer.echo(f"{source} -> {destination} ({size / 1e6:.1f} MB)")


def tune(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint, or `demo`.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    evaluations: Annotated[int, typer.Option("--evaluations", "-e", min=2, help="Network evaluations.")] = 6,
    number: Annotated[
        int, typer.Option("--number", "-n", min=2, help="Latents: half to search, half to judge.")
    ] = 16,
    trials: Annotated[int, typer.Option(min=1, help="Grids to try.")] = 200,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the best times for a few evaluations of one model, and save the model with them.

    `lsgm-fast sample OUT --evaluations N` then uses them.

    Examples:

    - `lsgm-fast tune demo digits.safetensors --evaluations 5`
    """
    import lsgm_fast

    if destination.suffix != ".safetensors":
        raise ValueError(f"the output must end in .safetensors, got {destination}")
    model = lsgm_fast.load(source, device=pick_device(device))
    tuned = model.optimise_grid(
        evaluations, n=number, seed=seed, trials=trials, progress=not (quiet or as_json)
    )
    destination.parent.mkdir(parents=True, exist_ok=True)
    model.save(destination)
    report = {
        "destination": str(destination),
        "evaluations": evaluations,
        "times": tuned.times,
        "error_before": tuned.error_before,
        "error_after": tuned.error_after,
    }
    if as_json:
        typer.echo(json.dumps(report))
    elif not quiet:
        gain = f"latent error {tuned.error_before:.3g} -> {tuned.error_after:.3g}"
        typer.echo(f"{gain} with {evaluations} evaluations: {destination}")


@dataclass(frozen=True)
class _Outputs:
    """Which files a run writes; every path is None where it was not asked for."""

    grid: Path | None
    npz: Path | None
    individual: Path | None

    @classmethod
    def plan(cls, out: Path, *, individual: bool = False, npz: bool = False) -> _Outputs:
        """Work out the files from ``--out`` and check, before anything is computed, that they can be written."""
        suffix = out.suffix.lower()
        if out.is_dir() or not suffix:
            planned = cls(
                out / "samples.png", out / "samples.npz" if npz else None, out if individual else None
            )
        elif suffix == ".png":
            stem = out.with_suffix("")
            planned = cls(out, out.with_suffix(".npz") if npz else None, stem if individual else None)
        elif suffix == ".npz":
            planned = cls(None, out, out.with_suffix("") if individual else None)
        else:
            raise ValueError(
                f"--out must be a .png file, a .npz file or a folder without a dot, got {str(out)!r}"
            )

        from lsgm_fast import images

        for file in (planned.grid, planned.npz):
            if file is not None:
                images.require_writable(file)
        if planned.individual is not None:
            images.require_writable(planned.individual, folder=True)
        return planned


@dataclass
class _Writer:
    """Takes finished batches, writes single images at once and the grid and array at the end."""

    outputs: _Outputs
    batches: list[tuple[UInt8Array, SamplingInfo]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(len(pixels) for pixels, _ in self.batches)

    def add(self, batch: torch.Tensor, info: SamplingInfo) -> None:
        from lsgm_fast import images

        pixels = images.to_uint8(batch)
        if self.outputs.individual is not None:
            images.save_individual(self.outputs.individual, pixels, start=self.count)
        self.batches.append((pixels, info))

    def mean_nfe(self) -> float:
        """Network evaluations that an image went through, averaged over the images."""
        return sum(info.nfe * len(pixels) for pixels, info in self.batches) / self.count

    def finish(self) -> dict[str, str]:
        """Write what is left; returns kind -> path of everything written."""
        import numpy as np

        from lsgm_fast import images

        if not self.count:
            return {}
        pixels = np.concatenate([batch for batch, _ in self.batches])
        written = {}
        if self.outputs.grid is not None:
            images.save_png(self.outputs.grid, images.make_grid(pixels[:GRID_LIMIT]))
            written["grid"] = str(self.outputs.grid)
        if self.outputs.npz is not None:
            images.save_npz(self.outputs.npz, pixels)
            written["npz"] = str(self.outputs.npz)
        if self.outputs.individual is not None:
            written["individual"] = str(self.outputs.individual)
        return written


@dataclass(frozen=True)
class _Request:
    model: str
    number: int
    outputs: _Outputs
    seed: int
    device: str
    options: dict[str, Any] = field(default_factory=dict)
    precision: str | None = None


def _sample(request: _Request, *, as_json: bool, quiet: bool) -> None:
    device = pick_device(request.device)

    import lsgm_fast

    model = lsgm_fast.load(request.model, device=device)
    if request.precision is not None:
        model.compile_for_inference(precision=request.precision)
    symbols = model.config.vae.symbols if model.config is not None else ""
    if symbols:
        _sample_text(model, symbols, request, as_json=as_json, quiet=quiet)
        return
    writer = _Writer(request.outputs)
    failure: BaseException | None = None
    start = time.perf_counter()
    try:
        model.sample(
            request.number,
            seed=request.seed,
            progress=sys.stderr.isatty() and not (quiet or as_json),
            on_batch=writer.add,
            **request.options,
        )
    except (KeyboardInterrupt, ArithmeticError, RuntimeError) as error:
        failure = error  # whatever is finished is saved first
    seconds = time.perf_counter() - start
    written = writer.finish()

    if failure is not None:
        _note_unfinished(writer.count, request.number, written)
        if isinstance(failure, KeyboardInterrupt):
            if as_json:
                typer.echo(json.dumps({"interrupted": True, "number": writer.count, "files": written}))
            raise typer.Exit(130)
        raise failure

    last_pixels, last_info = writer.batches[-1]
    report = {
        "interrupted": False,
        "number": writer.count,
        "files": written,
        "model": request.model,
        "seed": request.seed,
        "device": device,
        "precision": request.precision,
        "solver": last_info.solver,
        "nfe": writer.mean_nfe(),
        "nfe_per_batch": [info.nfe for _, info in writer.batches],
        "seconds": seconds,
        "seconds_per_sample": seconds / writer.count,
        "image_shape": list(last_pixels.shape[1:]),
        "reason": last_info.reason,
        "backends": last_info.backends,
        "version": lsgm_fast.__version__,
    }
    if as_json:
        typer.echo(json.dumps(report))
    elif not quiet:
        _print_report(report)


def _sample_text(model: LSGM, symbols: str, request: _Request, *, as_json: bool, quiet: bool) -> None:
    """The samples of a model of text, one line each, into a .txt file where images would go."""
    from lsgm_fast.data import decode_text
    from lsgm_fast.files import atomic_path

    target = request.outputs.grid
    if target is None or request.outputs.npz is not None or request.outputs.individual is not None:
        raise ValueError(
            "this model draws text: leave --npz and --individual out, and give --out a .png or a folder"
        )
    progress = sys.stderr.isatty() and not (quiet or as_json)
    drawn = model.sample(request.number, seed=request.seed, progress=progress, **request.options)
    lines = decode_text(drawn, symbols)
    path = target.with_suffix(".txt")
    with atomic_path(path, make_folders=True) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"number": len(lines), "files": {"text": str(path)}, "model": request.model}))
    elif not quiet:
        for line in lines:
            typer.echo(line)
        typer.echo(f"text: {path}", err=True)


def _print_report(report: dict[str, Any]) -> None:
    typer.echo(
        f"{report['number']} images in {report['seconds']:.2f} s on {report['device']}: "
        f"{report['seconds_per_sample']:.4f} s per sample, NFE {report['nfe']:.4g} ({report['solver']})"
    )
    if report["reason"]:
        typer.echo(f"solver: {report['reason']}")
    labels = {"grid": "grid", "npz": "array", "individual": "single images"}
    for kind, path in report["files"].items():
        first = f" (the first {GRID_LIMIT})" if kind == "grid" and report["number"] > GRID_LIMIT else ""
        typer.echo(f"{labels[kind]}: {path}{first}")


def _note_unfinished(count: int, wanted: int, written: dict[str, str]) -> None:
    if written:
        typer.echo(
            f"stopped: {count} of {wanted} images were finished, saved to {', '.join(written.values())}",
            err=True,
        )
    else:
        typer.echo(
            "stopped: no batch was finished, nothing is written (smaller batches: --batch-size)", err=True
        )
