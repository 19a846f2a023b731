"""The command ``lsgm-fast``: demo, sample, convert, tune, evaluate, info, bench.

Conventions: results on standard output, progress, notes and errors on standard error; ``--json`` prints one JSON object
to standard output and nothing else there. Exit codes: 0 done; 1 a computation failed (NaN, out of memory);
2 bad input (one line ``error: ...``); 3 the machine is too busy to be timed; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    import torch

    from lsgm_fast.evaluation import Estimate, NelboReport, PairedDifference
    from lsgm_fast.images import UInt8Array
    from lsgm_fast.models.lsgm import SamplingInfo

# torch and everything that needs it are imported inside the commands: `--help` answers at once.

GRID_LIMIT = 256
CHECKPOINT_SUFFIXES = (".pt", ".safetensors")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[
    str, typer.Option(help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for other programs, nothing else.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bar and no report; errors still show.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        import lsgm_fast

        typer.echo(f"lsgm-fast {lsgm_fast.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Draw images with LSGM: a score-based generative model in the latent space of a VAE.

    First steps:

    - `lsgm-fast demo` draws 64 handwritten digits with the small model that comes along
    - `lsgm-fast sample checkpoint.pt -n 16` draws from a trained model
    - `lsgm-fast COMMAND --help` explains a command
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
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


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint (.pt or .safetensors), or `demo`.")
    ],
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images.")] = 16,
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
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from a model: a PNG grid, and on request single files or one array.

    Where the files go: `--out grid.png` writes the grid there, `--individual` adds `grid/00000.png`, ...,
    `--npz` adds `grid.npz`. `--out folder` puts everything into the folder.
    Ctrl-C saves the batches that are finished.

    Examples:

    - `lsgm-fast sample demo -n 100 --out digits.png`
    - `lsgm-fast sample checkpoint.pt -n 16 --seed 3 --device cuda`
    - `lsgm-fast sample model.safetensors -n 50000 --batch-size 100 --out images.npz`
    - `lsgm-fast sample checkpoint.pt --solver ancestral --evaluations 200 --out run1 --individual`
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
    outputs = _Outputs.plan(out, individual=individual, npz=npz)
    _sample(_Request(model, number, outputs, seed, device, options), as_json=as_json, quiet=quiet)


@app.command()
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


@app.command()
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
    model = lsgm_fast.load(source, device=_pick_device(device))
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


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint (.pt or .safetensors), or `demo`.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="`digits`, or a folder of images, an .npz, IDX or LMDB file, or CIFAR-10's archive."
        ),
    ] = "digits",
    split: Annotated[str, typer.Option(help="Which images: held_out or train.")] = "held_out",
    size: Annotated[int | None, typer.Option(min=1, help="Crop and resize the images to this size.")] = None,
    channels: Annotated[int | None, typer.Option(help="Convert to 1 (grey) or 3 (RGB) channels.")] = None,
    binarise: Annotated[
        str | None,
        typer.Option(
            help="Draw every pixel as 0 or 1: none or static. Default: static for a model of binary pixels."
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", min=1, help="Only so many images, evenly spread. Default: all."),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="score, normal (N(0, I), for comparison) or both. Default: score, normal for a VAE alone."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Of the score-based prior: diffusion (quick) or ode (its density, as the paper's figures)."
        ),
    ] = "diffusion",
    draws: Annotated[int, typer.Option(min=1, help="Draws per image.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 64,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the JSON object to this file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same draws.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model on images: negative log-likelihood bound (NELBO), reconstruction, KL of every latent group.

    Means over images with standard errors. `--prior both` also evaluates the model with N(0, I) in place of the
    score-based prior, and gives the difference, image by image, with its 95% interval.

    Examples:

    - `lsgm-fast evaluate demo -n 100`
    - `lsgm-fast evaluate vae.safetensors --data images/ --size 32`
    - `lsgm-fast evaluate model.safetensors --prior both --draws 5 --out report.json`
    - `lsgm-fast evaluate model.safetensors --method ode -n 200`
    """
    priors: tuple[str | None, ...] = ("score", "normal") if prior == "both" else (prior,)

    from lsgm_fast import images
    from lsgm_fast.errors import unknown_name
    from lsgm_fast.models.lsgm import PRIORS

    if prior not in (None, "both", *PRIORS):
        raise unknown_name("prior", prior, (*PRIORS, "both"))
    if out is not None:
        images.require_writable(out)

    import lsgm_fast
    from lsgm_fast.data import DataConfig, batches, check_data, open_data, spread
    from lsgm_fast.evaluation import compare, evaluate_nelbo

    device = _pick_device(device)
    loaded = lsgm_fast.load(model, device=device)
    assert loaded.config is not None  # whatever was loaded from a file has one
    if binarise is None:
        binarise = "none"
        if loaded.config.vae.decoder_distribution == "bernoulli":
            binarise = "static"
            if not quiet:
                typer.echo("note: the model's pixels are binary: --binarise static", err=True)
    config = DataConfig(source=data, size=size, channels=channels, binarise=binarise)
    source = open_data(config, split=split)
    check_data(source, loaded.config.vae)
    if number is not None:
        source = spread(source, number)
    reports = [
        evaluate_nelbo(
            loaded,
            batches(source, config, batch_size=batch_size, seed=seed, train=False),
            prior=name,
            method=method,
            draws=draws,
            seed=seed,
            progress=sys.stderr.isatty() and not (quiet or as_json),
        )
        for name in priors
    ]
    difference = compare(*reports) if len(reports) == 2 and reports[0].images > 1 else None
    record = {
        "model": model,
        "data": config.to_dict(),
        "split": split,
        "device": device,
        "reports": {report.prior: report.to_dict() for report in reports},
        "difference": difference.to_dict() if difference else None,
        "version": lsgm_fast.__version__,
    }
    if out is not None:
        from lsgm_fast.files import atomic_path

        with atomic_path(out, make_folders=True) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(record))
    elif not quiet:
        _print_evaluation(f"{data}, {split}", reports, difference)
        if out is not None:
            typer.echo(f"report: {out}")


def _print_evaluation(data: str, reports: Sequence[NelboReport], difference: PairedDifference | None) -> None:
    """One column per prior; every part as mean +- standard error over images."""
    from rich.console import Console
    from rich.table import Table

    def cell(estimate: Estimate, digits: int = 2) -> str:
        error = estimate.standard_error
        return f"{estimate.mean:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")

    def parts(report: NelboReport) -> dict[str, str]:
        cells = {
            "NELBO": cell(report.nelbo),
            "bits per dimension": cell(report.bits_per_dim, 4),
            "reconstruction": cell(report.reconstruction),
            "KL": cell(report.kl),
        }
        if len(report.kl_scales) > 1:
            cells |= {f"KL of scale {i}": cell(e) for i, e in enumerate(report.kl_scales)}
        if report.kl_groups is not None and len(report.kl_groups) > 1:
            cells |= {f"KL of group {i}": cell(e) for i, e in enumerate(report.kl_groups)}
        if report.draw_std is not None:
            cells["spread of one draw"] = f"{report.draw_std:.2f}"
        return cells

    def heading(report: NelboReport) -> str:
        return f"{report.prior} ({report.method})" if report.method else report.prior

    first, columns = reports[0], [parts(report) for report in reports]
    typer.echo(f"{data}: {first.images} images, nats per image +- standard error")
    table = Table()
    table.add_column("prior")
    for report in reports:
        table.add_column(heading(report), justify="right", no_wrap=True)
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    Console().print(table)
    for report in reports:
        typer.echo(
            f"{heading(report)}: {report.draws} draw(s) per image, NFE {report.nfe:.4g}, {report.seconds:.1f} s"
        )
    if difference is not None:
        typer.echo(
            f"{reports[0].prior} - {reports[1].prior}, image by image: {difference.mean:.2f} +- "
            f"{difference.standard_error:.2f} nats, 95% interval [{difference.low:.2f}, {difference.high:.2f}]"
        )


@app.command()
def info(
    cuda: Annotated[
        bool,
        typer.Option("--cuda", help="Ask CUDA itself about the GPUs (starts a context) and not the driver."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, processors, GPUs, and which implementations every operation has.

    Put its output into a bug report.
    """
    from lsgm_fast import info as report

    collected = report.collect(initialise_cuda=cuda)
    if as_json:
        typer.echo(json.dumps(collected))
        return
    from rich.console import Console

    Console().print(report.render(collected))


_Recipe = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="A built-in recipe: `digits`, `mnist`, `cifar10-fid`, ..."),
]
_ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML file with options, as a run's config.yaml.")
]
_RunFolder = Annotated[Path, typer.Option("--out", "-o", help="The run's folder; a run in it goes on.")]
_Data = Annotated[
    str | None,
    typer.Option(help="`digits`, or a folder of images, .npz, IDX files, a CIFAR-10 archive, LMDB."),
]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Options to change, as in `batch_size=64`."),
]


@app.command("train-vae")
def train_vae(
    overrides: _Overrides = None,
    recipe: _Recipe = None,
    config: _ConfigFile = None,
    out: _RunFolder = Path("runs/vae"),
    data: _Data = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a VAE: stage 1.

    Start it again with the same options to go on after a kill or Ctrl-C; `torchrun` runs it in many processes.
    Options come from the recipe, then the file, then the command line. `docs/training.md` lists them.

    Examples:

    - `lsgm-fast train-vae --recipe digits --out runs/digits-vae`
    - `lsgm-fast train-vae --recipe mnist --data mnist/ --out runs/vae batch_size=50 vae_optimizer.lr=5e-3`
    - `torchrun --nproc-per-node 8 -m lsgm_fast train-vae --recipe cifar10-fid --data cifar-10-python.tar.gz`
    """
    _train("vae", None, recipe, config, overrides, data, out, device, as_json=as_json, quiet=quiet)


@app.command()
def train(
    overrides: _Overrides = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="The stage-1 model: a .safetensors or .pt file.")
    ] = None,
    recipe: _Recipe = None,
    config: _ConfigFile = None,
    out: _RunFolder = Path("runs/lsgm"),
    data: _Data = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an LSGM: stage 2, the score-based prior and (unless it is frozen) the VAE with it.

    The VAE's architecture is that of its file. Start it again with the same options to go on after a kill or Ctrl-C.

    Examples:

    - `lsgm-fast train --vae runs/digits-vae/model.safetensors --recipe digits --out runs/digits`
    - `lsgm-fast train --vae vae.pt --recipe mnist --data mnist/ objective.p_mode=drop_sigma2t_iw`
    - `lsgm-fast train --vae vae.pt --config run.yaml objective.train_vae=false`
    """
    _train("lsgm", vae, recipe, config, overrides, data, out, device, as_json=as_json, quiet=quiet)


def _train(
    stage: str,
    vae: str | None,
    recipe: str | None,
    config: Path | None,
    overrides: list[str] | None,
    data: str | None,
    out: Path,
    device: str,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from lsgm_fast import distributed
    from lsgm_fast.training import Trainer
    from lsgm_fast.training.assemble import assemble

    changes = list(overrides or ())
    if data is not None:
        changes.append(f"data.source={data}")
    chosen = None if device == "auto" else _pick_device(device)
    try:
        distributed.init(chosen)
        settled = assemble(stage, recipe=recipe, file=config, overrides=changes, vae=vae)
        trainer = Trainer(settled, out, device=chosen, progress=not (quiet or as_json))
        result = trainer.run()
        if distributed.is_main():
            if as_json:
                report = {"folder": str(result.folder), "model": str(result.model), "step": result.step}
                typer.echo(json.dumps(report | {"interrupted": result.interrupted}))
            elif not quiet:
                state = "stopped" if result.interrupted else "finished"
                typer.echo(f"{state} at step {result.step}: {result.model}")
    except Exception as error:
        if distributed.first_to_fail():
            raise
        described = _describe(error)
        raise typer.Exit(described[1] if described is not None else 1) from None
    finally:
        distributed.shutdown()
    if result.interrupted:
        raise typer.Exit(130)


bench_app = typer.Typer(rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Time lsgm-fast on this machine (from a source tree).

    Refuses on a busy machine, because such timings mislead: wait, or add `--force`.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench_app.command("ops")
def bench_ops(
    operations: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]...", help="Operations. Default: all that have a fused kernel."),
    ] = None,
    device: Device = "auto",
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; may be repeated. Default: 1 and 16.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32, bfloat16, ..., or `float32<-bfloat16` (state <- network output); may be repeated."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One shape, dtype and layout per operation.")
    ] = False,
    crossover: Annotated[
        bool,
        typer.Option("--crossover", help="Sizes from tiny to large: from which does a kernel pay?"),
    ] = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Leave out `torch.compile` of the reference (much quicker).")
    ] = False,
    budget: Annotated[float, typer.Option(help="Seconds after which it stops cleanly.")] = 420.0,
    name: Annotated[str, typer.Option(help="Name of the record.")] = "ops",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the record. Default: benchmarks/results."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Time a busy machine; the record says so.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time operations: every backend, plain PyTorch and `torch.compile` of it, in one run.

    Every kernel is first compared with float64; a wrong one is not timed, and the command ends with 1. Prints a table
    (time, GB/s, share of this machine's copy bandwidth) and writes a JSON record to `<out>/<machine>/<name>.json`.
    `python -m benchmarks.ops --help` lists further options.

    Examples:

    - `lsgm-fast bench ops --quick`
    - `lsgm-fast bench ops mixed_score --batch 64 --dtype float32`
    - `lsgm-fast bench ops mixed_score --crossover --no-compile`
    """
    from lsgm_fast import bench

    program = bench.program("ops")
    arguments = [
        *(operations or []),
        "--device",
        _pick_device(device),
        "--budget",
        str(budget),
        "--name",
        name,
    ]
    for option, values in (("--batch", batch), ("--dtypes", dtype)):
        if values:
            arguments += [option, *map(str, values)]
    for option, wanted in (
        ("--quick", quick),
        ("--crossover", crossover),
        ("--no-compile", no_compile),
        ("--force", force),
    ):
        if wanted:
            arguments.append(option)
    if out is not None:
        arguments += ["--out", str(out)]
    options = program.parser().parse_args(arguments)
    program.check_options(options)
    try:
        record, ok = program.run(options, program.command(arguments), quiet=quiet or as_json)
    except program.MachineBusy as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(program.BUSY_EXIT) from None
    if as_json:
        typer.echo(json.dumps(record))
    elif not quiet:
        program.show(record)
    if not ok:
        raise typer.Exit(1)


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


def _sample(request: _Request, *, as_json: bool, quiet: bool) -> None:
    device = _pick_device(request.device)

    import lsgm_fast

    model = lsgm_fast.load(request.model, device=device)
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


def _pick_device(name: str) -> str:
    """Turn ``--device`` into a device that exists, or say why it does not."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        from lsgm_fast.errors import unknown_name

        raise unknown_name("device", name, ("auto", "cpu", "cuda", "cuda:0")) from None
    if device.type == "cuda":
        if torch.version.cuda is None:
            raise ValueError(f"device {name!r}: this PyTorch is built without CUDA; use --device cpu")
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r}: CUDA finds no usable GPU; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device {name!r}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0"
            )
        return name
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} cannot be used with this PyTorch; use --device cpu") from None
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(args=arguments, prog_name="lsgm-fast", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        described = _describe(error)
        if described is None:
            raise
        message, code = described
        typer.echo(
            f"error: {'; '.join(line.strip() for line in message.splitlines() if line.strip())}", err=True
        )
        return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line, without the place in the source that issued it."""
    typer.echo(f"note: {' '.join(str(message).split())}", err=True)


def _describe(error: Exception) -> tuple[str, int] | None:
    """(message, exit code) of an error that is the user's to solve; None for a defect, which keeps its traceback."""
    if hasattr(error, "format_message"):  # usage errors: click's or typer's own copy of click, by version
        return f"{error.format_message()} (see lsgm-fast --help)", 2
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, (ValueError, OSError)):
        return str(error), 2
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {error}; compute fewer images at a time", 1
    if (
        isinstance(error, ArithmeticError) or type(error).__name__ == "SolverError"
    ):  # by name: importing it needs torch
        return str(error), 1
    return None


if __name__ == "__main__":
    sys.exit(main())
