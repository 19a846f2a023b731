"""Whether a solver or a precision changes what a model draws: paired differences of sample quality.

    python -m benchmarks.quality                              the embedded model, held-out digits
    python -m benchmarks.quality --model checkpoint.pt --data mnist/ --samples 10000 --device cuda

Every variant draws the same number of images from the same noise. Each set is judged in the features of a classifier
that is trained on the data's labels (``lsgm_fast.evaluation``: Frechet distance and others, no FID) and compared with
the baseline, ``rk45`` at a tolerance of 1e-5 in float32, by a paired bootstrap. ``differs`` names the figures whose 95%
interval leaves 0 out: of that many intervals, one in twenty would by chance alone.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lsgm_fast
from benchmarks import measure
from lsgm_fast import evaluation
from lsgm_fast.data import DataConfig, check_data, open_data
from lsgm_fast.evaluation import METRICS, QualityReport
from lsgm_fast.models import LSGM
from lsgm_fast.models.lsgm import DEFAULT_BATCH_SIZE
from lsgm_fast.sampling import METHODS

BASELINE: dict[str, Any] = {"solver": "rk45", "tol": 1e-5}
VARIANTS: tuple[dict[str, Any], ...] = (
    *({"solver": solver, "tol": tol} for solver in ("rk45", "auto") for tol in (1e-3, 1e-2)),
    {"solver": "rk23", "tol": 1e-2},
    *({"solver": "exponential", "evaluations": n} for n in (4, 6, 10, 20)),
    *(
        {"solver": solver, "evaluations": 24}
        for solver in (*(m for m in METHODS if m != "exponential"), "heun")
    ),
    {**BASELINE, "dtype": "bfloat16"},  # in float16 it would take hours on a processor
    *({"solver": "exponential", "evaluations": 10, "dtype": dtype} for dtype in ("bfloat16", "float16")),
)


def describe(variant: dict[str, Any]) -> str:
    """``"rk45, tol 1e-05, bfloat16"``."""
    settings = [f"{k} {variant[k]:g}" for k in ("tol", "evaluations") if k in variant]
    return ", ".join([variant["solver"], *settings, *([variant["dtype"]] if "dtype" in variant else [])])


def draw_and_judge(
    judge: evaluation.Judge, model: LSGM, variant: dict[str, Any], samples: int
) -> tuple[QualityReport, int]:
    """The quality, and the evaluations of the network in the first batch."""
    options = {name: value for name, value in variant.items() if name != "dtype"}
    if "dtype" in variant:
        model = copy.deepcopy(model).to(getattr(torch, variant["dtype"]))
    _, info = model.sample_latents(min(samples, DEFAULT_BATCH_SIZE), seed=judge.seed, **options)
    return judge(model, samples, **options), info.nfe


def case(variant: dict[str, Any], report: QualityReport, nfe: int, baseline: QualityReport) -> dict[str, Any]:
    """A record's case: ``evaluations``, every figure, its ``_difference`` to the baseline, and both's ``_interval``."""
    figures = {"evaluations": measure.measured([nfe], "evaluations")}
    values = {name: getattr(report, name) for name in METRICS if getattr(report, name) is not None}
    differences = evaluation.compare_quality(report, baseline)
    for suffix, intervals in (("", values), ("_difference", differences)):
        for name, interval in intervals.items():
            figures[name + suffix] = measure.measured([interval.value], "1")
            figures[f"{name}{suffix}_interval"] = (
                measure.not_measured("it has no interval")
                if interval.low is None or interval.high is None
                else measure.measured([interval.low, interval.high], "1")
            )
    return {
        "parameters": {**variant, "samples": report.samples, "reference": report.reference},
        "backends": {},
        "failures": [],
        "figures": figures,
    }


def differs(case: dict[str, Any]) -> list[str]:
    """The figures whose difference to the baseline has an interval that leaves 0 out."""
    found = []
    for name in METRICS:
        low, high = case["figures"].get(f"{name}_difference_interval", {}).get("values", (0.0, 0.0))
        if low > 0.0 or high < 0.0:
            found.append(name)
    return found


HEAD = (
    "| solver | evaluations | Frechet | minus baseline | confidence | minus baseline | differs |",
    "|---|---|---|---|---|---|---|",
)


def row(case: dict[str, Any]) -> str:
    """One line of the Markdown table that :data:`HEAD` begins."""
    figures = case["figures"]

    def value(name: str) -> str:
        return f"{figures[name]['values'][0]:.4g}" if name in figures else ""

    def difference(name: str) -> str:
        if f"{name}_difference" not in figures:
            return ""
        low, high = figures[f"{name}_difference_interval"]["values"]
        return f"{figures[f'{name}_difference']['values'][0]:+.2g} [{low:.2g}, {high:.2g}]"

    return (
        f"| {describe(case['parameters'])} | {value('evaluations')} | {value('frechet')} | {difference('frechet')} | "
        f"{value('confidence')} | {difference('confidence')} | {', '.join(differs(case))} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write ``<machine>/<name>.json``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="a checkpoint, or `demo`; default: %(default)s")
    parser.add_argument("--data", default="digits", help="as for `lsgm-fast evaluate`; default: %(default)s")
    parser.add_argument("--held-out", type=int, help="images held out where the data have no test split")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="quality", help="of the record")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    parser.add_argument("--commit", help="in place of what git says")
    options = parser.parse_args(arguments)
    if options.samples < 10:
        parser.error(f"--samples must be at least 10, got {options.samples}")
    # Nothing is timed here, so the machine need not be idle.
    watch = measure.Watch(force=True, sample_seconds=0.1)
    model = lsgm_fast.load(options.model, device=options.device).eval()
    data = DataConfig(options.data)
    if options.held_out is not None:
        data = data.replace(held_out=options.held_out)
    assert model.config is not None
    if model.config.vae.decoder_distribution == "bernoulli":
        data = data.replace(binarise="static")
    check_data(open_data(data, "held_out"), model.config.vae)
    judge = evaluation.Judge(data, options.device, seed=options.seed)
    print("\n".join(HEAD), flush=True)
    cases: list[dict[str, Any]] = []
    baseline = None
    for variant in (BASELINE, *VARIANTS):
        report, nfe = draw_and_judge(judge, model, variant, options.samples)
        baseline = report if baseline is None else baseline
        cases.append(case(variant, report, nfe, baseline))
        print(row(cases[-1]), flush=True)
    measure.write_record(
        measure.results_folder(options.out, options.dry_run),
        options.device,
        name=options.name,
        command=measure.command_line("benchmarks.quality", arguments),
        dry_run=options.dry_run,
        machine=watch.entries(0.1),
        environment=measure.environment(options.commit),
        settings={"model": options.model, "data": options.data, "torch_threads": torch.get_num_threads()},
        cases=cases,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
