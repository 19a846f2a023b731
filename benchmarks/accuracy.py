"""How far from the exact latents a solver ends, against the evaluations of the network that it took.

    python -m benchmarks.accuracy                                        the trained digit model of the tests
    python -m benchmarks.accuracy --model checkpoint.pt --sets 4 --batch 8
    python -m benchmarks.accuracy --batch 8 --plot docs/solvers.svg      the table and the plot of docs/solvers.md

All solvers start from the same noise and end at the same time; the exact latents come from ``rk45`` at a tolerance of
1e-9 (``--exact``), network and state in float64. Errors are relative L2, of the latents and of the images decoded from
them with running batch statistics, mean over several sets of noise.
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
from lsgm_fast.models import LSGM
from lsgm_fast.sampling import METHODS

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "tests" / "data" / "mnist-trained" / "model.safetensors"
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
EVALUATIONS = (3, 4, 5, 6, 8, 10, 14, 18, 24, 32, 40)
OTHERS = (*(m for m in METHODS if m != "exponential"), "euler", "heun", "rk4")
FEW = (12, 24, 36)
EXACT = 1e-9  # of the reference, in float64 throughout


def _relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def errors(model: LSGM, batch: int, sets: int, exact_tol: float) -> list[dict[str, Any]]:
    """A record's case for every solver and setting: ``evaluations``, ``latent_error`` and ``image_error``."""
    settings: list[tuple[str, dict[str, Any]]] = [
        *(("rk45", {"tol": tol}) for tol in TOLERANCES),
        *(("rk23", {"tol": tol}) for tol in TOLERANCES[:2]),
        *(("auto", {"tol": tol}) for tol in TOLERANCES),
        *(("exponential", {"evaluations": n}) for n in EVALUATIONS),
        *((name, {"evaluations": n}) for name in OTHERS for n in FEW),
    ]
    found: list[list[tuple[int, float, float]]] = [[] for _ in settings]
    precise = copy.deepcopy(model).double()
    for index in range(sets):
        noise = lsgm_fast.random.normal(index, range(batch), "prior", model.latent_shape)
        start = noise.to(model.device).double()
        exact, _ = precise.sample_latents(batch, noise=start, solver="rk45", tol=exact_tol)
        images = model.decode(exact.to(model.dtype), bn="running")
        for row, (solver, options) in zip(found, settings, strict=True):
            z, info = model.sample_latents(batch, noise=noise.to(model.device), solver=solver, **options)
            row.append((info.nfe, _relative(z, exact), _relative(model.decode(z, bn="running"), images)))
    names = ("evaluations", "latent_error", "image_error")
    return [
        {
            "parameters": {"solver": solver, **options, "batch": batch, "sets": sets},
            "backends": {},
            "failures": [],
            "figures": {
                name: measure.measured(values, "evaluations" if name == "evaluations" else "1")
                for name, values in zip(names, zip(*row, strict=True), strict=True)
            },
        }
        for row, (solver, options) in zip(found, settings, strict=True)
    ]


def mean(figure: dict[str, Any]) -> float:
    """The mean of a measured figure's values."""
    return sum(figure["values"]) / len(figure["values"])


def table(cases: Sequence[dict[str, Any]]) -> str:
    """The cases as a Markdown table of means."""
    lines = ["| solver | setting | evaluations | latent error | image error |", "|---|---|---|---|---|"]
    for case in cases:
        p, f = case["parameters"], case["figures"]
        setting = f"tol {p['tol']:g}" if "tol" in p else f"evaluations {p['evaluations']}"
        lines.append(
            f"| {p['solver']} | {setting} | {mean(f['evaluations']):.0f} | {mean(f['latent_error']):.2g} | "
            f"{mean(f['image_error']):.2g} |"
        )
    return "\n".join(lines)


def plot(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Latent error against evaluations, a line for every solver."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    for solver in dict.fromkeys(case["parameters"]["solver"] for case in cases):
        of = [case["figures"] for case in cases if case["parameters"]["solver"] == solver]
        points = sorted((mean(f["evaluations"]), mean(f["latent_error"])) for f in of)
        ours = solver in ("auto", "exponential")
        label = "auto (adaptive exponential)" if solver == "auto" else solver
        axes.loglog(*zip(*points, strict=True), marker="o", ms=3, lw=2.5 if ours else 1.0, label=label)
    axes.set(xlabel="evaluations of the network", ylabel="relative error of the latents", ylim=(5e-4, 2))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file.
    with pyplot.rc_context({"svg.hashsalt": "lsgm-fast"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write ``<machine>/<name>.json``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DIGITS), help="a checkpoint, or `demo`; default: %(default)s")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sets", type=int, default=8, help="sets of noise")
    parser.add_argument(
        "--exact", type=float, default=EXACT, help="tolerance of the reference (default: 1e-9)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="accuracy", help="of the record")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--plot", type=Path, help="draw error against evaluations into this file (needs lsgm-fast[plot])"
    )
    parser.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    parser.add_argument("--commit", help="in place of what git says")
    options = parser.parse_args(arguments)
    if options.batch < 1 or options.sets < 1:
        parser.error(f"--batch and --sets must be at least 1, got {options.batch} and {options.sets}")
    # Nothing is timed here, so the machine need not be idle.
    watch = measure.Watch(force=True, sample_seconds=0.1)
    model = lsgm_fast.load(options.model, device=options.device)
    cases = errors(model, options.batch, options.sets, options.exact)
    print(table(cases))
    if options.plot:
        plot(cases, options.plot)
    measure.write_record(
        measure.results_folder(options.out, options.dry_run),
        options.device,
        name=options.name,
        command=measure.command_line("benchmarks.accuracy", arguments),
        dry_run=options.dry_run,
        machine=watch.entries(0.1),
        environment=measure.environment(options.commit),
        settings={
            "model": options.model if options.model != str(DIGITS) else str(DIGITS.relative_to(ROOT)),
            "exact_tol": options.exact,
            "torch_threads": torch.get_num_threads(),
        },
        cases=cases,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
