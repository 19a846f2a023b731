"""How good a model is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from lsgm_fast.commands.common import Device, Json, Quiet, console, pick_device

if TYPE_CHECKING:
    from lsgm_fast.config import VAEConfig
    from lsgm_fast.data import DataConfig
    from lsgm_fast.evaluation import Estimate, Interval, NelboReport, PairedDifference, QualityReport
    from lsgm_fast.models.lsgm import LSGM


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
    compare: Annotated[
        str | None,
        typer.Option(help="A second model, or the same with options: what is compared, image by image."),
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Also draw images and judge them in a classifier's features.")
    ] = False,
    likelihood: Annotated[bool, typer.Option("--likelihood/--no-likelihood", help="The NELBO.")] = True,
    samples: Annotated[int, typer.Option(min=10, help="Images drawn for --quality.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 64,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the JSON object to this file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same draws.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model: negative log-likelihood bound (NELBO) of images with its parts, quality of its samples.

    Means over images with standard errors. `--prior both` also evaluates the model with N(0, I) in place of the
    score-based prior; `--compare` evaluates a second model with the same draws. Both give the difference, image by
    image, with its 95% interval. `--quality` compares samples with the held-out images in the features of a
    classifier that is trained on the data's labels, once, and kept.

    A model may carry options after an @: `solver`, `tol`, `evaluations`, `ode_eps`, `temperature`, `bn` as for
    `lsgm-fast sample`, and `dtype`.

    Examples:

    - `lsgm-fast evaluate demo -n 100`
    - `lsgm-fast evaluate vae.safetensors --data images/ --size 32`
    - `lsgm-fast evaluate model.safetensors --prior both --draws 5 --out report.json`
    - `lsgm-fast evaluate model.safetensors --method ode -n 200`
    - `lsgm-fast evaluate demo --quality --no-likelihood`
    - `lsgm-fast evaluate demo@evaluations=4 --compare demo@solver=rk45 --quality --no-likelihood`
    - `lsgm-fast evaluate model.safetensors --compare model.safetensors@dtype=bfloat16`
    """
    from lsgm_fast import images
    from lsgm_fast.errors import unknown_name
    from lsgm_fast.models.lsgm import PRIORS

    if prior not in (None, "both", *PRIORS):
        raise unknown_name("prior", prior, (*PRIORS, "both"))
    if prior == "both" and compare is not None:
        raise ValueError("--prior both and --compare are two comparisons: give one of them")
    if not likelihood and not quality:
        raise ValueError("--no-likelihood leaves nothing to evaluate: add --quality")
    if out is not None:
        images.require_writable(out)
    variants = [_Variant.parse(text) for text in (model, compare) if text is not None]

    import lsgm_fast
    from lsgm_fast import evaluation
    from lsgm_fast.data import batches, check_data, open_data, spread

    device = pick_device(device)
    progress = sys.stderr.isatty() and not (quiet or as_json)
    models = [variant.load(device) for variant in variants]
    assert models[0].config is not None  # whatever was loaded from a file has one
    config = _data(variants[0].path, models[0].config.vae, data, size, channels, held_out, binarise)
    if binarise is None and config.binarise != "none" and not quiet:
        typer.echo(f"note: the model's pixels are binary: --binarise {config.binarise}", err=True)
    source = open_data(config, split=split)
    for loaded in models:
        assert loaded.config is not None
        check_data(source, loaded.config.vae)
    if number is not None:
        source = spread(source, number)

    reports: dict[str, NelboReport] = {}
    if likelihood:
        priors: tuple[str | None, ...] = ("score", "normal") if prior == "both" else (prior,)
        for variant, loaded in zip(variants, models, strict=True):
            for name in priors:
                report = evaluation.evaluate_nelbo(
                    loaded,
                    batches(source, config, batch_size=batch_size, seed=seed, train=False),
                    prior=name,
                    method=method,
                    draws=draws,
                    seed=seed,
                    tol=variant.options.get("tol") if method == "ode" else None,
                    progress=progress,
                )
                reports[report.prior if compare is None else variant.text] = report
    judged: dict[str, QualityReport] = {}
    if quality:
        judge = _judge(config, device, progress, seed)
        judged = {
            variant.text: judge(loaded, variant, samples)
            for variant, loaded in zip(variants, models, strict=True)
        }
    difference = None
    if len(reports) == 2:
        first, second = reports.values()
        difference = evaluation.compare(first, second) if first.images > 1 else None
    judged_difference = evaluation.compare_quality(*judged.values()) if len(judged) == 2 else {}
    record = {
        "model": model,
        "compare": compare,
        "data": config.to_dict(),
        "split": split,
        "device": device,
        "reports": {name: report.to_dict() for name, report in reports.items()},
        "difference": difference.to_dict() if difference else None,
        "quality": {name: report.to_dict() for name, report in judged.items()},
        "quality_difference": {name: asdict(interval) for name, interval in judged_difference.items()},
        "version": lsgm_fast.__version__,
    }
    if out is not None:
        from lsgm_fast.files import atomic_path

        with atomic_path(out, make_folders=True) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(record))
    elif not quiet:
        if reports:
            _print_evaluation(f"{config.source}, {split}", reports, difference)
        if judged:
            _print_quality(judged, judged_difference)
        if out is not None:
            typer.echo(f"report: {out}")


@dataclass(frozen=True)
class _Variant:
    """A model and the options after its @."""

    text: str
    path: str
    options: dict[str, Any]

    KINDS: ClassVar[dict[str, Callable[[str], Any]]] = {
        "solver": str,
        "tol": float,
        "evaluations": int,
        "ode_eps": float,
        "temperature": float,
        "bn": str,
        "dtype": str,
    }

    @classmethod
    def parse(cls, text: str) -> _Variant:
        from lsgm_fast.errors import unknown_name

        path, _, tail = text.partition("@")
        options = {}
        for item in filter(None, tail.split(",")):
            name, equals, value = item.partition("=")
            if name not in cls.KINDS:
                raise unknown_name("option", name, cls.KINDS)
            try:
                options[name] = cls.KINDS[name](value)
            except ValueError:
                equals = ""
            if not equals:
                raise ValueError(f"options follow the model as in {path}@tol=1e-3,solver=rk45; got {item!r}")
        return cls(text, path, options)

    def load(self, device: str) -> LSGM:
        import torch

        import lsgm_fast
        from lsgm_fast.errors import unknown_name

        model = lsgm_fast.load(self.path, device=device)
        dtypes = ("float32", "bfloat16", "float16", "float64")
        name = self.options.get("dtype", "float32")
        if name not in dtypes:
            raise unknown_name("dtype", name, dtypes)
        return model.to(getattr(torch, name))

    def sampling(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name != "dtype"}


def _judge(
    data: DataConfig, device: str, progress: bool, seed: int
) -> Callable[[LSGM, _Variant, int], QualityReport]:
    """What draws images from a model and judges them; the data's part of it is done once, here."""
    from lsgm_fast.data import open_data
    from lsgm_fast.evaluation import binary_draws, evaluate_quality, fit_classifier, load_images

    train, held_out = open_data(data, "train"), open_data(data, "held_out")
    classifier = fit_classifier(train, held_out, data, device=device, progress=progress)
    training, reference = load_images(train, data), load_images(held_out, data)

    def judge(model: LSGM, variant: _Variant, samples: int) -> QualityReport:
        images = model.sample(samples, seed=seed, progress=progress, **variant.sampling())
        if data.binarise != "none":
            images = binary_draws(images, seed)
        return evaluate_quality(images, reference, classifier, training=training, seed=seed)

    return judge


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


def _print_evaluation(
    data: str, reports: dict[str, NelboReport], difference: PairedDifference | None
) -> None:
    """One column per report; every part as mean +- standard error over images."""
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
        if report.importance_weighted is not None:
            cells[f"importance-weighted, {report.draws} draws"] = cell(report.importance_weighted)
        if report.draw_std is not None:
            cells["spread of one draw"] = f"{report.draw_std:.2f}"
        return cells

    headings = [f"{name} ({r.method})" if r.method else name for name, r in reports.items()]
    values = list(reports.values())
    columns = [parts(report) for report in values]
    typer.echo(f"{data}: {values[0].images} images, nats per image +- standard error")
    table = Table()
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    console().print(table)
    for heading, report in zip(headings, values, strict=True):
        typer.echo(
            f"{heading}: {report.draws} draw(s) per image, NFE {report.nfe:.4g}, {report.seconds:.1f} s"
        )
    if difference is not None:
        first, second = reports
        typer.echo(
            f"{first} - {second}, image by image: {difference.mean:.2f} +- {difference.standard_error:.2f} nats, "
            f"95% interval [{difference.low:.2f}, {difference.high:.2f}]"
        )


def _print_quality(reports: dict[str, QualityReport], difference: dict[str, Interval]) -> None:
    """One column per set of samples, figures with their 95% intervals; the paired difference in the last."""
    from rich.table import Table

    from lsgm_fast.evaluation import METRICS

    def cell(interval: Interval | None) -> str:
        if interval is None:
            return ""
        bounds = "" if interval.low is None else f" [{interval.low:.4g}, {interval.high:.4g}]"
        return f"{interval.value:.4g}{bounds}"

    values = list(reports.values())
    first = values[0]
    typer.echo(f"{first.samples} samples against {first.reference} held-out images, 95% intervals")
    table = Table()
    for heading in ("", *reports, *(["difference"] if difference else [])):
        table.add_column(heading, justify="right" if heading else "left")
    labels = {"frechet": first.frechet_name, "kernel": first.kernel_name, "class_distance": "class distance"}
    for metric in METRICS:
        if getattr(first, metric) is not None:
            row = [cell(getattr(report, metric)) for report in values]
            table.add_row(
                labels.get(metric, metric), *row, *([cell(difference.get(metric))] if difference else [])
            )
    for place in ("pixels", "features"):
        found = [getattr(report, f"memorisation_{place}") for report in values]
        if found[0] is not None:
            row = [
                f"{'flagged' if m.flagged else 'not flagged'} (p {min(m.share_p, m.u_p):.2g})" for m in found
            ]
            table.add_row(f"memorised, by {place}", *row, *([""] if difference else []))
    console().print(table)
    if first.classes is not None and first.reference_confidence is not None:
        typer.echo(f"confidence on the held-out images: {first.reference_confidence:.4g}")
        for name, report in reports.items():
            assert report.class_shares is not None
            counts = ", ".join(
                f"{label}: {round(share * report.samples)}"
                for label, share in zip(first.classes, report.class_shares, strict=True)
            )
            typer.echo(f"samples by class, {name}: {counts}")
