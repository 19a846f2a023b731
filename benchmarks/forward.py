"""What the benchmarks of one forward pass share: the contenders, their comparison, the floor of bytes, the record.

:mod:`benchmarks.decode` and :mod:`benchmarks.score` say what runs; their docstrings have how it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.measure import Budget, Figure, MachineBusy, OutOfTime, extrapolated, measured, not_measured
from benchmarks.ops import copy_round
from benchmarks.published import settings
from benchmarks.train import MODELS, model_of
from lsgm_fast.dispatch import record
from lsgm_fast.errors import unknown_name

LARGE_IMAGE = 256  # from here on, batches of 1 unless asked otherwise
CONTENDERS = ("reference", "auto", "compile")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Float32 rounding alone makes some 2e-6 for the published presets.
TOLERANCE = 1e-4
COPY_SECONDS = 2e-3


class Case(Protocol):
    """What runs; a dataclass whose text is the case's name."""

    @property
    def preset(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def memory_format(self) -> str: ...
    @property
    def compile(self) -> bool: ...
    @property
    def device(self) -> str: ...


class Subject(Protocol):
    """A model with its inputs, and the ways to run it."""

    def run(self, contender: str) -> torch.Tensor:
        """Run it once."""

    def outputs(self, contender: str) -> dict[str, torch.Tensor]:
        """Everything that is compared, by name."""

    def floor_bytes(self) -> int:
        """Bytes that no implementation can do without: weights, inputs and outputs of its cells, once each."""


# -- one case, in its own process -----------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(
    modules: Sequence[nn.Module], hook: Callable[[nn.Module, Any, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``hook`` after the forward pass of each of the modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bytes_once(weights: Iterable[torch.Tensor], cells: Iterable[nn.Module], run: Callable[[], object]) -> int:
    """Bytes of the weights, and of the first input and result of each of the cells that ``run`` calls, once each."""
    total = sum(w.nbytes for w in weights)

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        nonlocal total
        total += args[0].nbytes + (output if isinstance(output, torch.Tensor) else output[0]).nbytes

    with hooked(list(cells), count):
        run()
    return total


def operations(run: Callable[[], object]) -> int:
    """Floating-point operations of what ``run`` calls, by ``torch.utils.flop_counter``, attention included."""
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions in float32: with TF32's eleven bits, the order of additions alone would move an image."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest deviation of ``expected`` from its own mean."""
    return float((got - expected).abs().max() / (expected - expected.mean()).abs().max())


def compare(
    contender: str, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> dict[str, Figure]:
    """The differences of a contender's outputs.

    Raises:
        AssertionError: one of them is above :data:`TOLERANCE`.
    """
    found = {name: difference(value, expected[name]) for name, value in got.items()}
    for name, value in found.items():
        if not value <= TOLERANCE:
            raise AssertionError(
                f"{name.replace('_', ' ')} differ from the reference's by {value:.2g}, relative to its largest "
                f"deviation from its mean; {TOLERANCE:g} is allowed"
            )
    return {name: measured([value], "1") for name, value in found.items()}


def run_case(
    case: Case,
    make: Callable[[Any], Subject],
    *,
    fewest: int,
    most: int,
    allowed: float,
    budget: Budget,
    early: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """``figures``, ``backends`` and ``failures`` of one case; ``early`` gets them before anything is compiled.

    Raises:
        OutOfTime: the budget ended before one round of ``reference`` and ``auto`` was finished.
    """
    start = time.perf_counter()
    subject = make(case)
    with without_tf32():
        expected = subject.outputs("reference")
    floor = subject.floor_bytes()
    copy, copied = copy_round(case.device, COPY_SECONDS)
    ready, turns = ["reference"], itertools.count()
    missing = {"compile": "not compiled yet" if case.compile else "not asked for (--no-compile)"}
    failures: list[str] = []
    backends: dict[str, str] = {}
    differences: dict[str, Any] = {}

    def add(contender: str) -> None:
        """Compare it, and let it take part in the rounds that follow, unless it is wrong."""
        budget.check()
        try:
            with without_tf32(), record() as log:
                differences[contender] = compare(contender, subject.outputs(contender), expected)
        except Exception as error:  # a contender that fails must not cost the others their figures
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            failures.append(f"{contender}: {reason}")
            missing[contender] = f"not timed: {reason}"
        else:
            missing.pop(contender, None)
            ready.append(contender)
        if contender == "auto":
            backends.update(log.backends())

    def seconds(contender: str) -> tuple[float, float]:
        measure.synchronize(case.device)
        spent, begin = time.process_time(), time.perf_counter()
        subject.run(contender)
        measure.synchronize(case.device)
        return time.perf_counter() - begin, time.process_time() - spent

    def one_round() -> dict[str, tuple[float, float]]:
        # Another order in every round: nobody always follows the same neighbour.
        first = next(turns)
        order = [ready[(first + i) % len(ready)] for i in range(len(ready))]
        return {name: seconds(name) for name in order} | {"copy": (copy(), 0.0)}

    def time_them(most: int) -> dict[str, Any]:
        left = allowed - (time.perf_counter() - start)
        rounds = measure.repeat(one_round, warmup=1, fewest=fewest, most=most, seconds=left, budget=budget)
        figures = summary(rounds, missing, floor, copied)
        figures["difference"] = differences | {name: not_measured(why) for name, why in missing.items()}
        return {"figures": figures, "backends": backends, "failures": failures}

    add("auto")
    if not case.compile:
        return time_them(most)
    missing["compile"] = f"{measure.OUT_OF_TIME} ended before it was compiled and timed"
    result = time_them(fewest)
    early(result)
    try:
        add("compile")
        return time_them(most)
    except OutOfTime:
        return result


def summary(
    rounds: Sequence[dict[str, tuple[float, float]]], missing: dict[str, str], floor: int, copied: int
) -> dict[str, Any]:
    """The figures of all rounds; ``missing``: contenders without, and why."""
    figures: dict[str, Any] = {name: not_measured(why) for name, why in missing.items()}
    for name in CONTENDERS:
        if name not in missing:
            figures[name] = {
                "seconds": measured([r[name][0] for r in rounds], "s"),
                "processor_seconds": measured([r[name][1] for r in rounds], "s"),
            }
    for other in ("reference", "compile"):
        gone = [missing[name] for name in (other, "auto") if name in missing]
        figures[f"{other}_over_auto"] = (
            not_measured(gone[0]) if gone else measured([r[other][0] / r["auto"][0] for r in rounds], "1")
        )
    bandwidth = measured([copied / r["copy"][0] / 1e9 for r in rounds], "GB/s")
    figures["byte_floor"] = {
        "bytes": measured([floor], "bytes"),
        "copy": bandwidth,
        "seconds": extrapolated(floor / (bandwidth["median"] * 1e9), "s", "bytes / copy, its median"),
    }
    return figures


# -- all cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A program: ``benchmarks.<name>``, which writes ``<machine>/<name>.json``.

    Attributes:
        case: the dataclass of its cases. make: what runs a case. kind: the case's field that the table shows beside
        its name, or None. compared: the output whose difference the table shows. default: presets, smallest first: the
        compiler's minutes for the last one then cost the others nothing. description: of the program.
        add_options: further options. kinds: the cases of one preset, batch and memory format, from the options.
    """

    name: str
    case: Callable[..., Case]
    make: Callable[[Any], Subject]
    kind: str | None
    compared: str
    default: Sequence[str]
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    kinds: Callable[[argparse.Namespace], Sequence[dict[str, Any]]]

    @property
    def module(self) -> str:
        """What ``python -m`` runs."""
        return f"benchmarks.{self.name}"

    def in_this_process(self, folder: Path) -> None:
        """Run the case of a folder, for :func:`measure.in_own_process`."""

        def run(task: dict[str, Any], budget: Budget) -> dict[str, Any]:
            torch.backends.cudnn.benchmark = True
            limits = {name: task[name] for name in ("fewest", "most", "allowed")}
            return run_case(
                self.case(**task["case"]),
                self.make,
                budget=budget,
                early=lambda result: measure.write_json(folder / "result.json", result),
                **limits,
            )

        measure.run_task(folder, run)

    def time_case(
        self, case: Case, budget: Budget, *, fewest: int, most: int, allowed: float
    ) -> dict[str, Any]:
        """A record's entry for one case.

        Raises:
            OutOfTime: the budget ended before one round of ``reference`` and ``auto`` was finished.
        """
        parameters = dataclasses.asdict(case)  # type: ignore[call-overload]
        task = {"case": parameters, "fewest": fewest, "most": most, "allowed": allowed}
        result = measure.in_own_process(self.module, task, budget)
        if "failure" in result:
            why = not_measured(f"the case failed: {result['failure']}")
            names = (*CONTENDERS, "reference_over_auto", "compile_over_auto", "difference", "byte_floor")
            result |= {"failures": [result["failure"]], "figures": dict.fromkeys(names, why)}
        elif "stopped" in result and result["figures"]["compile"].get("kind") == "not_measured":
            why = not_measured(result["stopped"])
            result["figures"] |= {"compile": why, "compile_over_auto": why}
            result["figures"]["difference"]["compile"] = why
            if not result["stopped"].startswith(measure.OUT_OF_TIME):
                result["failures"].append(f"compile: {result['stopped']}")
        return {
            "parameters": parameters | {"tolerance": TOLERANCE},
            "backends": result.get("backends", {}),
            "failures": result["failures"],
            "figures": result["figures"],
        }

    def table(self, entries: Sequence[dict[str, Any]]) -> str:
        """The entries as text, one line per case; ``-`` where nothing was measured."""

        def cell(
            figures: dict[str, Any], path: str, width: int, scale: float = 1.0, form: str = ".1f"
        ) -> str:
            value: Any = figures
            for key in path.split("."):
                value = value.get(key, {})
            number = value.get("median", value.get("value"))
            return ("-" if number is None else f"{number * scale:{form}}").rjust(width)

        def kind(text: str) -> str:
            return f"{text:<8}" if self.kind else ""

        lines = [
            f"{'preset':<31}{kind(self.kind or '')}{'batch':>6} {'format':<14}"
            + "".join(name.rjust(11) for name in CONTENDERS)
            + f"{'cpu':>10}{'ref/auto':>10}{'comp/auto':>10}{'floor':>9}{'diff.':>9}"
        ]
        for entry in entries:
            p, figures = entry["parameters"], entry["figures"]
            lines.append(
                f"{p['preset']:<31}{kind(p[self.kind] if self.kind else '')}{p['batch']:>6} {p['memory_format']:<14}"
                + "".join(cell(figures, f"{name}.seconds", 11, 1e3) for name in CONTENDERS)
                + cell(figures, "auto.processor_seconds", 10, 1e3)
                + cell(figures, "reference_over_auto", 10, form=".2f")
                + cell(figures, "compile_over_auto", 10, form=".2f")
                + cell(figures, "byte_floor.seconds", 9, 1e3, ".2f")
                + cell(figures, f"difference.auto.{self.compared}", 9, form=".1g")
            )
        lines.append(
            "medians; ms per batch; cpu: processor time of auto; floor: bytes once at the copy's bandwidth"
        )
        return "\n".join(lines)

    def parser(self) -> argparse.ArgumentParser:
        """The command line."""
        found = argparse.ArgumentParser(prog=f"python3 -m {self.module}", description=self.description)
        found.add_argument(
            "--presets", nargs="+", default=list(self.default), metavar="NAME", help="presets or recipes"
        )
        self.add_options(found)
        found.add_argument(
            "--batch", type=int, help=f"default: 16, and 1 from {LARGE_IMAGE}x{LARGE_IMAGE} on"
        )
        found.add_argument(
            "--memory-format",
            nargs="+",
            default=["contiguous"],
            choices=MEMORY_FORMATS,
            help="of the weights, which the activations follow",
        )
        found.add_argument(
            "--no-compile", action="store_true", help="leave torch.compile of the reference out"
        )
        measure.add_options(found, self.name)
        return found

    def cases_of(self, options: argparse.Namespace) -> list[Case]:
        """All that the command line asks for."""

        def batch(preset: str) -> int:
            if options.batch is not None:
                return int(options.batch)
            return 1 if model_of(preset).vae.image_size >= LARGE_IMAGE else 16

        return [
            self.case(
                preset=preset,
                batch=batch(preset),
                memory_format=memory_format,
                compile=not options.no_compile,
                device=options.device,
                **kind,
            )
            for preset in options.presets
            for kind in self.kinds(options)
            for memory_format in options.memory_format
        ]

    def main(
        self,
        arguments: Sequence[str] | None = None,
        report: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> int:
        """Time, print and write the record; 1: a contender failed, 2: wrong usage, 3: a busy machine."""
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        known = self.parser()
        options = known.parse_args(arguments)
        if options.one_case is not None:
            self.in_this_process(options.one_case)
            return 0
        for preset in options.presets:
            if preset not in MODELS:
                known.error(str(unknown_name("preset", preset, MODELS)))
        measure.check_options(known, options)
        fewest, most = options.repeats
        try:
            watch = measure.Watch(force=options.force)
        except MachineBusy as busy:
            print(busy, file=sys.stderr)
            return 3
        cases, budget = self.cases_of(options), Budget(options.budget)
        entries, left_out = [], []
        for index, case in enumerate(cases):
            allowed = max(budget.remaining(), 0.0) / (len(cases) - index)
            try:
                entry = self.time_case(case, budget, fewest=fewest, most=most, allowed=allowed)
            except OutOfTime as error:
                left_out.append(str(case))
                report(f"{case}: left out, {error}")
                continue
            entries.append(entry)
            if entry["figures"]["compile"].get("reason", "").startswith(measure.OUT_OF_TIME):
                left_out.append(f"{case}: compile")
            for failure in entry["failures"]:
                report(f"{case}: failed: {failure}")
        status, said = measure.write_cases(
            self.module,
            arguments,
            options,
            watch,
            settings() | {"cudnn_benchmark": True},
            entries,
            left_out,
        )
        report(self.table(entries))
        if said:
            report(said)
        return status
