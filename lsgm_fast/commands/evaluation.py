"""How good a model is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from lsgm_fast.commands.common import Device, Json, Quiet, console, process_group

if TYPE_CHECKING:
    from lsgm_fast.config import VAEConfig
    from lsgm_fast.data import DataConfig, ImageSource
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
    probes: Annotated[
        int | None,
        typer.Option(min=1, help="With --method ode: probes of the trace, averaged. Default: 1."),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="With --method ode: fresh (new probes at every evaluation), fixed (the same for a solve) or published "
            "(new normal ones that also steer the step size; slow). Default: fresh."
        ),
    ] = None,
    measure_probes: Annotated[
        bool,
        typer.Option(
            "--measure-probes", help="With --method ode: also the spread between probes; solves once more."
        ),
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(help="A second model, or the same with options: what is compared, image by image."),
    ] = None,
    outside: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Other data, as --data: how well the NELBO tells their images from these."
        ),
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

    `--outside` evaluates images of other data as well (prepared alike): the probability that one of them has the
    larger NELBO than one of the data, 0.5 for chance.

    A model may carry options after an @: `solver`, `tol`, `evaluations`, `ode_eps`, `temperature`, `bn` as for
    `lsgm-fast sample`, and `dtype`. `torchrun` shares the work among many processes, in whole batches: the figures are
    those of one.

    Examples:

    - `lsgm-fast evaluate demo -n 100`
    - `lsgm-fast evaluate vae.safetensors --data images/ --size 32`
    - `lsgm-fast evaluate model.safetensors --prior both --draws 5 --out report.json`
    - `lsgm-fast evaluate model.safetensors --method ode -n 200`
    - `lsgm-fast evaluate model.safetensors --method ode --probes 4 --measure-probes -n 200`
    - `lsgm-fast evaluate demo --outside fashion-mnist/ -n 200`
    - `lsgm-fast evaluate demo --quality --no-likelihood`
    - `lsgm-fast evaluate demo@evaluations=4 --compare demo@solver=rk45 --quality --no-likelihood`
    - `lsgm-fast evaluate model.safetensors --compare model.safetensors@dtype=bfloat16`
    - `torchrun --nproc-per-node 8 -m lsgm_fast evaluate model.safetensors --method ode --batch-size 100`
    """
    settings = _Settings(
        model=model,
        compare=compare,
        data=data,
        outside=outside,
        split=split,
        size=size,
        channels=channels,
        held_out=held_out,
        binarise=binarise,
        number=number,
        prior=prior,
        method=method,
        draws=draws,
        probes=probes,
        trace=trace,
        measure_probes=measure_probes,
        likelihood=likelihood,
        quality=quality,
        samples=samples,
        batch_size=batch_size,
        out=out,
        seed=seed,
        as_json=as_json,
        quiet=quiet,
    )
    with process_group(device) as device:
        _evaluate(settings, device)


@dataclass(frozen=True)
class _Settings:
    """The options of the command."""

    model: str
    compare: str | None
    data: str | None
    outside: str | None
    split: str
    size: int | None
    channels: int | None
    held_out: int | None
    binarise: str | None
    number: int | None
    prior: str | None
    method: str
    draws: int
    probes: int | None
    trace: str | None
    measure_probes: bool
    likelihood: bool
    quality: bool
    samples: int
    batch_size: int
    out: Path | None
    seed: int
    as_json: bool
    quiet: bool

    def check(self) -> None:
        """Raise a ValueError or OSError for what can be told before anything is loaded."""
        from lsgm_fast import images
        from lsgm_fast.errors import unknown_name
        from lsgm_fast.evaluation import METHODS, TRACES
        from lsgm_fast.models.lsgm import PRIORS

        if self.prior not in (None, "both", *PRIORS):
            raise unknown_name("prior", self.prior, (*PRIORS, "both"))
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.trace is not None and self.trace not in TRACES:
            raise unknown_name("trace", self.trace, TRACES)
        if self.prior == "both" and self.compare is not None:
            raise ValueError("--prior both and --compare are two comparisons: give one of them")
        if not self.likelihood and not self.quality:
            raise ValueError("--no-likelihood leaves nothing to evaluate: add --quality")
        if not self.likelihood and self.outside is not None:
            raise ValueError("--outside compares NELBOs: leave --no-likelihood out")
        for option, given in self.of_probes().items():
            if given and not self.likelihood:
                raise ValueError(f"{option} is of the NELBO: leave --no-likelihood out")
            if given and (self.method != "ode" or self.prior == "normal"):
                raise ValueError(
                    f"{option} is of the score-based prior's density: add --method ode"
                    + (" and leave --prior normal out" if self.prior == "normal" else "")
                )
        if self.out is not None:
            images.require_writable(self.out)

    def of_probes(self) -> dict[str, bool]:
        """Which options of the trace's probes were given."""
        return {
            "--probes": self.probes is not None,
            "--trace": self.trace is not None,
            "--measure-probes": self.measure_probes,
        }


def _evaluate(settings: _Settings, device: str) -> None:
    """In every process; process 0 prints and writes."""
    settings.check()
    variants = [_Variant.parse(text) for text in (settings.model, settings.compare) if text is not None]

    import lsgm_fast
    from lsgm_fast import distributed, evaluation
    from lsgm_fast.data import check_data, open_data, spread

    shown = distributed.is_main() and not (settings.quiet or settings.as_json)
    progress = shown and sys.stderr.isatty()
    models = [variant.load(device) for variant in variants]
    if models[0].prior is None:
        for option in (option for option, given in settings.of_probes().items() if given):
            raise ValueError(
                f"{option} is of the score-based prior's density, and {settings.model} has no prior"
            )
    assert models[0].config is not None  # whatever was loaded from a file has one
    config = _data(variants[0].path, models[0].config.vae, settings)
    if (
        settings.binarise is None
        and config.binarise != "none"
        and distributed.is_main()
        and not settings.quiet
    ):
        typer.echo(f"note: the model's pixels are binary: --binarise {config.binarise}", err=True)

    def opened(config: DataConfig) -> ImageSource:
        source = open_data(config, split=settings.split)
        for loaded in models:
            assert loaded.config is not None
            check_data(source, loaded.config.vae)
        return source if settings.number is None else spread(source, settings.number)

    source = opened(config)
    outside_config = config.replace(source=settings.outside) if settings.outside is not None else None
    outside_source = opened(outside_config) if outside_config is not None else None

    reports: dict[str, NelboReport] = {}
    outside: dict[str, NelboReport] = {}
    if settings.likelihood:
        reports = _reports(settings, variants, models, source, config, progress)
        if outside_source is not None and outside_config is not None:
            outside = _reports(settings, variants, models, outside_source, outside_config, progress)
    judged: dict[str, QualityReport] = {}
    if settings.quality:
        judge = evaluation.Judge(config, device, seed=settings.seed, progress=progress)
        judged = {
            variant.text: judge(loaded, settings.samples, **variant.sampling())
            for variant, loaded in zip(variants, models, strict=True)
        }
    if not distributed.is_main():
        return
    difference = None
    if len(reports) == 2:
        first, second = reports.values()
        difference = evaluation.compare(first, second) if first.images > 1 else None
    told_apart = {name: evaluation.out_of_distribution(reports[name], r) for name, r in outside.items()}
    judged_difference = evaluation.compare_quality(*judged.values()) if len(judged) == 2 else {}
    record = {
        "model": settings.model,
        "compare": settings.compare,
        "data": config.to_dict(),
        "split": settings.split,
        "device": device,
        "reports": {name: report.to_dict() for name, report in reports.items()},
        "difference": difference.to_dict() if difference else None,
        "outside": None
        if outside_config is None
        else {
            "data": outside_config.to_dict(),
            "reports": {name: report.to_dict() for name, report in outside.items()},
            "out_of_distribution": {name: asdict(estimate) for name, estimate in told_apart.items()},
        },
        "quality": {name: report.to_dict() for name, report in judged.items()},
        "quality_difference": {name: asdict(interval) for name, interval in judged_difference.items()},
        "version": lsgm_fast.__version__,
    }
    if settings.out is not None:
        from lsgm_fast.files import atomic_path

        with atomic_path(settings.out, make_folders=True) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    if settings.as_json:
        typer.echo(json.dumps(record))
    elif not settings.quiet:
        if reports:
            _print_evaluation(f"{config.source}, {settings.split}", reports, difference)
        for name, estimate in told_apart.items():
            error = "" if estimate.standard_error is None else f" +- {estimate.standard_error:.4f}"
            typer.echo(
                f"{name}: {settings.outside}, {outside[name].images} images, NELBO {outside[name].nelbo.mean:.2f}; "
                f"the larger of a pair with probability {estimate.mean:.4f}{error}"
            )
        if judged:
            _print_quality(judged, judged_difference)
        if settings.out is not None:
            typer.echo(f"report: {settings.out}")


def _reports(
    settings: _Settings,
    variants: Sequence[_Variant],
    models: Sequence[LSGM],
    source: ImageSource,
    data: DataConfig,
    progress: bool,
) -> dict[str, NelboReport]:
    """The NELBO of one data set by every model and prior that was asked for."""
    from lsgm_fast.data import batches
    from lsgm_fast.evaluation import evaluate_nelbo

    reports = {}
    priors = ("score", "normal") if settings.prior == "both" else (settings.prior,)
    for variant, loaded in zip(variants, models, strict=True):
        for name in priors:
            report = evaluate_nelbo(
                loaded,
                batches(source, data, batch_size=settings.batch_size, seed=settings.seed, train=False),
                prior=name,
                method=settings.method,
                draws=settings.draws,
                seed=settings.seed,
                tol=variant.options.get("tol") if settings.method == "ode" else None,
                trace=settings.trace or "fresh",
                probes=settings.probes or 1,
                measure_probes=settings.measure_probes,
                shared=True,
                progress=progress,
            )
            reports[report.prior if settings.compare is None else variant.text] = report
    return reports


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


def _data(model: str, vae: VAEConfig, settings: _Settings) -> DataConfig:
    """The data to evaluate on: those of the run that the model lies in unless others are named, with the options."""
    from lsgm_fast.data import DataConfig
    from lsgm_fast.training.config import from_mapping, read_config

    run = Path(model).parent / "config.yaml"
    config = DataConfig(symbols=vae.symbols, size=vae.image_size - 2 * vae.crop if vae.symbols else None)
    if settings.data is None and model != "demo" and run.is_file():
        config = from_mapping(read_config(run)).data
    elif settings.data is not None:
        config = config.replace(source=settings.data)
    binarise = settings.binarise
    if binarise is None and vae.decoder_distribution == "bernoulli":
        binarise = "static"
    changes = {
        "size": settings.size,
        "channels": settings.channels,
        "held_out": settings.held_out,
        "binarise": binarise,
    }
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
        if report.probe_std is not None:
            cells["spread of the probes"] = f"{report.probe_std:.2f}"
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
        probes = ""
        if report.probes is not None:
            probes = f", {report.probes} {report.trace} probe(s)"
        typer.echo(
            f"{heading}: {report.draws} draw(s) per image{probes}, NFE {report.nfe:.4g}, {report.seconds:.1f} s"
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
