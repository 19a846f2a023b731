"""How good a model is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lsgm_fast.commands.common import Device, Json, Quiet, pick_device

if TYPE_CHECKING:
    from lsgm_fast.config import VAEConfig
    from lsgm_fast.data import DataConfig
    from lsgm_fast.evaluation import Estimate, NelboReport, PairedDifference


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint (.pt or .safetensors), or `demo`.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="`digits`, or a folder of images, an .npz, IDX or LMDB file, or CIFAR-10's archive. Default: those of "
            "the run that the model lies in, else `digits`."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which images: held_out or train.")] = "held_out",
    size: Annotated[int | None, typer.Option(min=1, help="Crop and resize the images to this size.")] = None,
    channels: Annotated[int | None, typer.Option(help="Convert to 1 (grey) or 3 (RGB) channels.")] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many images are held out where the data have no test split. Default: 500."
        ),
    ] = None,
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
    from lsgm_fast.data import batches, check_data, open_data, spread
    from lsgm_fast.evaluation import compare, evaluate_nelbo

    device = pick_device(device)
    loaded = lsgm_fast.load(model, device=device)
    assert loaded.config is not None  # whatever was loaded from a file has one
    config = _data(model, loaded.config.vae, data, size, channels, held_out, binarise)
    if binarise is None and config.binarise != "none" and not quiet:
        typer.echo(f"note: the model's pixels are binary: --binarise {config.binarise}", err=True)
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
        _print_evaluation(f"{config.source}, {split}", reports, difference)
        if out is not None:
            typer.echo(f"report: {out}")


def _data(
    model: str,
    vae: VAEConfig,
    source: str | None,
    size: int | None,
    channels: int | None,
    held_out: int | None,
    binarise: str | None,
) -> DataConfig:
    """The data to evaluate on: those of the run that the model lies in unless others are named, with the options."""
    from lsgm_fast.data import DataConfig
    from lsgm_fast.training.config import from_mapping, read_config

    run = Path(model).parent / "config.yaml"
    config = DataConfig(symbols=vae.symbols, size=vae.image_size - 2 * vae.crop if vae.symbols else None)
    if source is None and model != "demo" and run.is_file():
        config = from_mapping(read_config(run)).data
    elif source is not None:
        config = config.replace(source=source)
    if binarise is None and vae.decoder_distribution == "bernoulli":
        binarise = "static"
    changes = {"size": size, "channels": channels, "held_out": held_out, "binarise": binarise}
    return config.replace(**{name: value for name, value in changes.items() if value is not None})


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
