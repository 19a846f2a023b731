"""Sampling at the published configurations beside its floor and the paper's times: by part, way, batch and precision.

    python -m benchmarks.paper                                       every configuration, on the CPU
    python -m benchmarks.paper --device cuda --plot paper.svg
    python -m benchmarks.paper --quick                               two configurations, batch 1, float32

Networks have their published sizes and random weights: those decide the number of evaluations (NFE), not what one
costs (:mod:`benchmarks.published`, which this program builds upon; its ``fixed``, ``solved`` and ``published_nfe`` mean
the same here). The ways to a sample are those of :mod:`benchmarks.sample`.

``parts``
    ``score`` (one evaluation of the network), ``decode`` (one batch), both once for all ways of a backend, the backends
    in turns; and ``solver``: a whole solve with a network that returns a stored output, per evaluation. ``launches`` of
    the kernels' backend on CUDA.
``fixed``, ``solved``
    Whole samples, where at least three of them fit into the case's share of the budget; else not measured, and the
    reason says how long they would take. ``fixed`` of ``auto-10`` are its 10 evaluations, whatever the weights are.
``published_nfe``
    **Extrapolated** from ``fixed``, and where that was not measured from ``parts``. Only for the ways that take the
    published method's steps (``dopri5`` nearly does); the page gives the NFE of two configurations. From parts, nothing
    overlaps with the device: on a GPU that is pessimistic.
``budget``
    Of ``auto-10`` alone: its 10 evaluations extrapolated from ``parts``, beside the ``fixed`` that may be missing.
``floor``
    Of ``score``, ``decode`` and of the whole at the published NFE: see :mod:`benchmarks.floors`.

The paper's times are quoted with what is known of them (:data:`REFERENCES`). They were taken on other hardware: beside
a figure of this machine they show an order of magnitude, and no ratio is formed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import floors, measure, paper_report, published
from benchmarks.forward import LARGE_IMAGE
from benchmarks.measure import Budget, Figure, MachineBusy, OutOfTime, extrapolated, not_measured
from benchmarks.paper_report import REFERENCES, way_of
from benchmarks.parts import Parts
from benchmarks.published import (
    NOT_REACHED,
    PRECISIONS,
    PUBLISHED_NFE,
    Case,
    Plan,
    Sampler,
)
from benchmarks.sample import WAYS
from benchmarks.solver import PUBLISHED
from lsgm_fast.errors import unknown_name
from lsgm_fast.models import LSGM
from lsgm_fast.presets import PRESETS

QUICK = ("mnist", "celebahq256-quantitative")
SAME_STEPS = ("published", "torchdiffeq", "rk45")  # ways for which the published NFE means something
# Of a preset's time: for the parts; the rest is for whole samples.
PARTS_SHARE = 0.4
NO_NFE = "the paper's page gives no NFE for this configuration"
GROUPS = ("parts", "fixed", "solved", "published_nfe", "budget", "floor")


class Session(published.Session):
    """Times parts, then whole samples where they fit, and puts floors beside them."""

    rates: floors.Rates | None = None

    def _empty(self, case: Case) -> dict[str, Any]:
        record = super()._empty(case)
        reason = published.unsupported(case, self.device) or NOT_REACHED
        record["parameters"]["way"] = way_of(case)
        record["figures"] |= {"parts": not_measured(reason), "floor": not_measured(reason)}
        if reason == NOT_REACHED and case.evaluations is not None:
            always = f"{case.evaluations} evaluations whatever the weights are: see fixed"
            record["figures"] |= {"solved": not_measured(always), "published_nfe": not_measured(always)}
        if case.evaluations is not None:
            record["figures"]["budget"] = not_measured(reason)
        return record

    def settings(self) -> dict[str, Any]:
        return {
            "rates": None if self.rates is None else self.rates.figures(),
            "references": {name: reference.figure() for name, reference in REFERENCES.items()},
        }

    def table(self) -> str:
        return paper_report.table(self.records)

    def left_out(self) -> list[str]:
        """What the budget did not reach: cases without parts, whose whole samples may be too long for it."""
        return [
            str(case)
            for case, record in zip(self.cases, self.records, strict=True)
            if published.lacks_time(record["figures"]["parts"])
        ]

    def time_preset(self, preset: str, share: float) -> None:
        """Time all cases of one preset in about ``share`` seconds."""
        started, todo = time.perf_counter(), self._todo(preset)
        if not todo or self.plan.budget.remaining() <= 0:
            return
        self._measure_rates()
        model = self._build(preset)
        groups: dict[tuple[int, str], list[tuple[Case, dict[str, Any]]]] = {}
        for case, record in todo:
            groups.setdefault((case.batch, case.precision), []).append((case, record))
        for index, ((batch, precision), members) in enumerate(groups.items()):
            left = max(share - (time.perf_counter() - started), 0.0) / (len(groups) - index)
            try:
                self._time_group(model, preset, batch, precision, members, left)
            except OutOfTime as error:
                print(f"  {preset} batch {batch} {precision}: left out, {error}", flush=True)
            except Exception as error:  # recorded, so that one case does not cost the others
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"  {preset} batch {batch} {precision}: {reason}", flush=True)
                for _, record in members:
                    record["failures"].append(f"parts: {reason}")
                    for group in GROUPS:
                        if record["figures"].get(group, {}).get("reason") == NOT_REACHED:
                            record["figures"][group] = not_measured(reason)
            self.save()
        del model
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _measure_rates(self) -> None:
        if self.rates is None:
            precisions = dict.fromkeys(case.precision for case in self.cases)
            dtypes = {p: PRECISIONS[p] or torch.float32 for p in precisions}
            self.rates = floors.rates(self.device, dtypes, self.plan.budget)

    def _time_group(
        self,
        model: LSGM,
        preset: str,
        batch: int,
        precision: str,
        members: Sequence[tuple[Case, dict[str, Any]]],
        seconds: float,
    ) -> None:
        started, budget = time.perf_counter(), self.plan.budget
        parts = Parts(model, Sampler(model, members[0][0], self.device, budget))
        backends = list(dict.fromkeys(case.backend or "auto" for case, _ in members))
        found = parts.time_networks(backends, PARTS_SHARE * seconds, budget)
        assert self.rates is not None
        dtype = PRECISIONS[precision] or torch.float32
        work = floors.work(PRESETS[preset], batch)
        floor = {
            part: floors.floor(work[part], dtype, self.rates.matmul[precision], self.rates.copy)
            for part in floors.PARTS
        }
        launches = {
            backend: {part: floors.launches(run, self.device) for part, run in parts.runs(backend).items()}
            for backend in backends
        }
        for case, record in members:
            backend = case.backend or "auto"
            record["figures"]["parts"] = {
                **found[backend],
                "solver": parts.time_solver(case, PARTS_SHARE * seconds / len(members), budget),
                "launches": launches[backend],
                "launching": {
                    part: floors.launching(count, self.rates.launch)
                    for part, count in launches[backend].items()
                },
            }
            record["figures"]["floor"] = dict(floor)
        for index, (case, record) in enumerate(members):
            left = max(seconds - (time.perf_counter() - started), 0.0) / (len(members) - index)
            self._time_whole(model, case, record, left)
            record["figures"]["published_nfe"] = at_published_nfe(case, record["figures"])
            if case.evaluations is not None:
                record["figures"]["budget"] = from_parts(case, record["figures"]["parts"], case.evaluations)
            record["figures"]["floor"]["published_nfe"] = floor_at_published_nfe(preset, floor)
            self.save()

    def _time_whole(self, model: LSGM, case: Case, record: dict[str, Any], seconds: float) -> None:
        """``fixed`` and ``solved``, where they fit into the time."""
        part, figures = record["figures"]["parts"], record["figures"]
        nfe = case.evaluations or 32
        one = nfe * (part["score"]["median"] + part["solver"]["median"]) + part["decode"]["median"]
        # The warm-up, the repeats, and one for the split.
        if (needed := one * (1 + self.plan.fewest + 1)) > seconds:
            short = f"parts only: {needed:.0f} s for whole samples do not fit into the {seconds:.0f} s of this case"
            for group in ("fixed", "solved"):
                if figures[group].get("reason") == NOT_REACHED:
                    figures[group] = not_measured(short)
            return
        # A solve of random weights may take many evaluations: it is stopped at the end of the case's own time.
        own = Budget(max(seconds, 1e-3))
        sampler = Sampler(model, case, self.device, own)
        self._measure(record, "fixed", sampler, seconds / 2)
        if figures["solved"].get("reason") == NOT_REACHED and not record["failures"]:
            self._measure(record, "solved", sampler, own.remaining())


def at_published_nfe(case: Case, figures: dict[str, Any]) -> dict[str, Figure] | Figure:
    """Time at the NFE of the paper's page, from ``fixed``, or where there is none from ``parts``."""
    way = way_of(case)
    if case.evaluations is not None:
        return not_measured(f"{case.evaluations} evaluations whatever the weights are: see fixed")
    if way not in SAME_STEPS:
        return not_measured("the published NFE is that of another method")
    if figures["fixed"].get("kind") != "not_measured":
        return published.at_published_nfe(case.preset, case.batch, figures["fixed"])
    if case.preset not in PUBLISHED_NFE:
        return not_measured(NO_NFE)
    nfe = PUBLISHED_NFE[case.preset]
    quoted = measure.quoted(nfe, "evaluations", published.PAGE)
    return {"nfe": quoted, **from_parts(case, figures["parts"], nfe)}


def from_parts(case: Case, parts: dict[str, Figure], nfe: int) -> dict[str, Figure]:
    """Time of a sample with that many evaluations, from its parts."""
    total = nfe * (parts["score"]["median"] + parts["solver"]["median"]) + parts["decode"]["median"]
    how = f"{nfe} x (parts.score + parts.solver) + parts.decode (medians)"
    return {
        "total": extrapolated(total, "s/batch", how),
        "per_sample": extrapolated(total / case.batch, "s/sample", f"({how}) / {case.batch}"),
    }


def floor_at_published_nfe(preset: str, floor: dict[str, Any]) -> Figure:
    """Seconds per batch, of evaluations and decoding alone."""
    if preset not in PUBLISHED_NFE:
        return not_measured(NO_NFE)
    nfe = PUBLISHED_NFE[preset]
    seconds = nfe * floor["score"]["seconds"]["value"] + floor["decode"]["seconds"]["value"]
    return extrapolated(seconds, "s/batch", f"{nfe} x floor.score.seconds + floor.decode.seconds")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python3 -m benchmarks.paper", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument("--presets", nargs="+", metavar="NAME", help=f"default: {' '.join(PUBLISHED)}")
    found.add_argument(
        "--batch",
        type=int,
        nargs="+",
        help=f"default: 16 1; on a CPU 1 alone from {LARGE_IMAGE}x{LARGE_IMAGE} on",
    )
    found.add_argument("--precisions", nargs="+", help="default: fp32 fp16-autocast; CPU: fp32 bf16-autocast")
    found.add_argument(
        "--ways", nargs="+", default=list(WAYS), metavar="WAY", help=f"default: {' '.join(WAYS)}"
    )
    found.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)}, batch 1, fp32")
    found.add_argument("--repeats", type=int, nargs=2, default=[3, 10], metavar=("FEWEST", "MOST"))
    found.add_argument("--no-solved", action="store_true", help="skip solving to the recipe's tolerance")
    found.add_argument("--plot", type=Path, help="draw it into this file (needs lsgm-fast[plot])")
    found.add_argument("--device", default="cpu")
    found.add_argument(
        "--budget", type=float, default=420.0, help="seconds, then stop cleanly (default: 420)"
    )
    found.add_argument("--name", default="paper", help="of the record")
    found.add_argument("--out", type=Path, help="folder that holds <machine>/<name>.json")
    found.add_argument("--force", action="store_true", help="time a busy machine; the record says so")
    found.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    found.add_argument("--commit", help="commit to record in place of what git says")
    return found


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All that the command line asks for."""
    cuda = options.device.startswith("cuda")
    presets = options.presets or list(QUICK if options.quick else PUBLISHED)
    precisions = options.precisions or ["fp32"]
    if options.precisions is None and not options.quick:
        precisions.append("fp16-autocast" if cuda else "bf16-autocast")

    def batches(preset: str) -> list[int]:
        large = not cuda and PRESETS[preset].vae.image_size >= LARGE_IMAGE
        return options.batch or ([1] if options.quick or large else [16, 1])

    return [
        WAYS[way].case(preset, batch, precision)
        for preset in presets
        for batch in batches(preset)
        for precision in precisions
        for way in options.ways
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Time, print, write ``<machine>/<name>.json`` and plot; 1: a case failed, 2: wrong usage, 3: a busy machine."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = parser()
    options = known.parse_args(arguments)
    for kind, values, valid in (
        ("preset", options.presets or (), PRESETS),
        ("precision", options.precisions or (), PRECISIONS),
        ("way", options.ways, WAYS),
    ):
        for value in values:
            if value not in valid:
                known.error(str(unknown_name(kind, value, valid)))
    fewest, most = options.repeats
    if not 1 <= fewest <= most:
        known.error(f"--repeats expects 1 <= FEWEST <= MOST, got {fewest} {most}")
    if options.batch and min(options.batch) < 1:
        known.error(f"--batch must be at least 1, got {min(options.batch)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        known.error("no CUDA device is usable here: try --device cpu")
    if options.plot is not None:
        paper_report.require_matplotlib()
    try:
        record, ok = published.benchmark(
            cases_of(options),
            name=options.name,
            device=options.device,
            plan=Plan(
                Budget(options.budget), warmup=1, fewest=fewest, most=most, solved=not options.no_solved
            ),
            out=measure.results_folder(options.out, options.dry_run),
            command=measure.command_line("benchmarks.paper", arguments),
            force=options.force,
            dry_run=options.dry_run,
            stated_commit=options.commit,
            make=Session,
        )
    except MachineBusy as error:
        print(f"refused: {error}", file=sys.stderr)
        return published.BUSY_EXIT
    if options.plot is not None:
        paper_report.plot(record, options.plot)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
