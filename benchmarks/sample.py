"""What a whole sample costs, from noise to images: the published way and ours, in the same run.

    python -m benchmarks.sample                                   the trained digits and mnist, on the CPU
    python -m benchmarks.sample --presets cifar10-fid --batch 16 --device cuda
    python -m benchmarks.sample --presets demo --ways rk45 auto-10

Ways, which take turns, each round in another order:

===============  ====================================================================================================
``published``    plain PyTorch; the published solver path: SciPy's RK45 on the host, through torchdiffeq
``torchdiffeq``  plain PyTorch; torchdiffeq's own ``dopri5`` on the device
``rk45``         the kernels; the published method's steps on the device
``auto``         the kernels; ``solver="auto"`` at the recipe's tolerance
``auto-10``      the kernels; ``solver="auto"`` with 10 evaluations
===============  ====================================================================================================

All start from the same noise. ``solve``, ``decode`` and their sum ``total`` are seconds per batch, ``per_sample`` the
same per image, ``nfe`` the evaluations. ``published_over`` has the ratio of the published way's total to each other
way's, round by round. ``demo`` is the digits' model that comes along, with trained weights; all others have random
ones, whose number of evaluations to a tolerance is not that of a trained model (``auto-10`` takes its 10 all the same).
Precision is float32. Drawing the noise is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import lsgm_fast
from benchmarks import measure
from benchmarks.measure import Budget, MachineBusy, OutOfTime, measured
from benchmarks.published import BUSY_EXIT, Case, Run, Sampler, enliven, settings
from benchmarks.solver import PUBLISHED
from benchmarks.train import MODELS, model_of
from lsgm_fast.errors import unknown_name
from lsgm_fast.models import LSGM

TRAINED = "demo"
DEFAULT = (TRAINED, "mnist")


@dataclass(frozen=True)
class Way:
    """A backend, a solver, and a budget of evaluations in place of the recipe's tolerance."""

    backend: str
    solver: str
    evaluations: int | None = None

    def case(self, preset: str, batch: int, precision: str = "fp32") -> Case:
        """What :class:`benchmarks.published.Sampler` runs."""
        return Case(preset, batch, self.solver, precision, self.backend, self.evaluations)


WAYS = {
    "published": Way("reference", "scipy"),
    "torchdiffeq": Way("reference", "dopri5"),
    "rk45": Way("auto", "rk45"),
    "auto": Way("auto", "auto"),
    "auto-10": Way("auto", "auto", 10),
}


def build(name: str, device: str) -> LSGM:
    """The trained model, or one with random weights in which every layer has a say."""
    if name == TRAINED:
        return lsgm_fast.load(TRAINED, device=device)
    torch.manual_seed(0)
    model = LSGM.from_config(model_of(name)).to(device).eval()
    enliven(model)
    return model


def default_batch(name: str) -> int:
    """16 of the small models, 1 of the published ones, which take minutes on a CPU as it is."""
    return 1 if name in PUBLISHED else 16


def time_preset(
    name: str,
    batch: int,
    ways: Sequence[str],
    device: str,
    *,
    fewest: int,
    most: int,
    seconds: float,
    budget: Budget,
) -> dict[str, Any]:
    """A record's entry for one model.

    Raises:
        OutOfTime: the budget ended before one round was finished.
    """
    started = time.perf_counter()
    model = build(name, device)
    samplers = {way: Sampler(model, WAYS[way].case(name, batch), device, budget) for way in ways}
    turns = itertools.count()

    def one_round() -> dict[str, Run]:
        # Another order in every round: nobody always follows the same neighbour.
        first = next(turns)
        order = [ways[(first + i) % len(ways)] for i in range(len(ways))]
        return {way: samplers[way](model.sampling.tol) for way in order}

    left = seconds - (time.perf_counter() - started)
    rounds = measure.repeat(one_round, warmup=1, fewest=fewest, most=most, seconds=left, budget=budget)
    figures: dict[str, Any] = {}
    for way in ways:
        runs = [found[way] for found in rounds]
        figures[way] = {
            "total": measured([r.total for r in runs], "s/batch"),
            "per_sample": measured([r.total / batch for r in runs], "s/sample"),
            "solve": measured([r.solve for r in runs], "s/batch"),
            "decode": measured([r.decode for r in runs], "s/batch"),
            "nfe": measured([r.nfe for r in runs], "evaluations"),
        }
    if "published" in ways:
        figures["published_over"] = {
            way: measured([found["published"].total / found[way].total for found in rounds], "1")
            for way in ways
            if way != "published"
        }
    backends = next((rounds[-1][way].backends for way in ways if WAYS[way].backend == "auto"), {})
    return {
        "parameters": {
            "preset": name,
            "batch": batch,
            "precision": "fp32",
            "device": device,
            "weights": "trained" if name == TRAINED else "random",
            "tol": model.sampling.tol,
            "ode_eps": model.sampling.ode_eps,
            "bn": model.sampling.bn,
        },
        "backends": backends,
        "failures": [],
        "figures": figures,
    }


def failed(name: str, batch: int, device: str, reason: str) -> dict[str, Any]:
    """The entry of a model that could not be timed."""
    return {
        "parameters": {"preset": name, "batch": batch, "precision": "fp32", "device": device},
        "backends": {},
        "failures": [reason],
        "figures": {"total": measure.not_measured(reason)},
    }


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as text, one line per model and way."""
    lines = [
        f"{'model':<31}{'weights':<9}{'batch':>6} {'way':<13}{'NFE':>7}{'s/batch':>10}{'s/sample':>10}"
        f"{'solve':>10}{'decode':>10}{'publ./way':>11}"
    ]
    for entry in entries:
        p = entry["parameters"]
        ratios = entry["figures"].get("published_over", {})
        for way in (way for way in WAYS if way in entry["figures"]):
            f = {key: figure["median"] for key, figure in entry["figures"][way].items()}
            ratio = f"{ratios[way]['median']:.2f}" if way in ratios else "-"
            lines.append(
                f"{p['preset']:<31}{p['weights']:<9}{p['batch']:>6} {way:<13}{f['nfe']:>7.0f}{f['total']:>10.4f}"
                f"{f['per_sample']:>10.4f}{f['solve']:>10.4f}{f['decode']:>10.4f}{ratio:>11}"
            )
    lines.append(
        "medians; seconds; random weights take another number of evaluations (NFE) to a tolerance than trained ones"
    )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python3 -m benchmarks.sample", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument(
        "--presets", nargs="+", default=list(DEFAULT), metavar="NAME", help=f"presets, recipes, or {TRAINED}"
    )
    found.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help=" ".join(WAYS)
    )
    found.add_argument(
        "--batch",
        type=int,
        help="default: 16, and 1 of the published presets",
    )
    measure.add_options(found, "sample")
    found.set_defaults(repeats=[3, 10])
    return found


def main(
    arguments: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Time, print and write ``<machine>/<name>.json``; 1: a model failed, 2: wrong usage, 3: a busy machine."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    known = parser()
    options = known.parse_args(arguments)
    for name in options.presets:
        if name not in (TRAINED, *MODELS):
            known.error(str(unknown_name("preset", name, (TRAINED, *MODELS))))
    measure.check_options(known, options)
    fewest, most = options.repeats
    try:
        watch = measure.Watch(force=options.force)
    except MachineBusy as busy:
        print(busy, file=sys.stderr)
        return BUSY_EXIT
    torch.backends.cudnn.benchmark = True
    ways = list(dict.fromkeys(options.ways))
    budget = Budget(options.budget)
    entries, left_out = [], []
    for index, name in enumerate(options.presets):
        allowed = max(budget.remaining(), 0.0) / (len(options.presets) - index)
        batch = default_batch(name) if options.batch is None else options.batch
        try:
            entry = time_preset(
                name, batch, ways, options.device, fewest=fewest, most=most, seconds=allowed, budget=budget
            )
        except OutOfTime as error:
            left_out.append(name)
            report(f"{name}: left out, {error}")
            continue
        except Exception as error:  # a model may fail for any reason, and the others go on
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            report(f"{name}: failed: {reason}")
            entry = failed(name, batch, options.device, reason)
        entries.append(entry)
    status, said = measure.write_cases(
        "benchmarks.sample", arguments, options, watch, settings(), entries, left_out
    )
    report(table(entries))
    if said:
        report(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
