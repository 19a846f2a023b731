"""A small selection of all benchmarks in a few minutes, each with its own budget: what `make bench` runs.

    python -m benchmarks.quick
    python -m benchmarks.quick --only score decode --force

Runs :data:`PROGRAMS` one after the other, each in a process of its own, goes on after a failure, and ends with a table
of the ratios that they found: how many times longer plain PyTorch (``sample``: the published way) took than the
kernels, in the same run. Beside a ratio stands the range of its middle 60 %: two runs on an idle machine agree within
about that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.published import BUSY_EXIT

OUT = measure.ROOT / "runs" / "bench"
# A program that does not end by itself; its processes may take a grace of their own.
LIMIT_BEYOND_BUDGET = 2 * measure.GRACE_SECONDS


@dataclass(frozen=True)
class Program:
    """``benchmarks.<name>`` with arguments, and seconds."""

    name: str
    arguments: tuple[str, ...]
    budget: float


SMALL = ("--presets", "digits", "mnist")
PROGRAMS = {
    program.name: program
    for program in (
        Program("ops", ("--quick", "--no-compile", "--dtypes", "float32", "--modes", "forward"), 100.0),
        Program("cells", (*SMALL, "--no-compile"), 80.0),
        Program("score", (*SMALL, "--no-compile"), 45.0),
        Program("decode", (*SMALL, "--no-compile"), 60.0),
        Program("sample", ("--presets", "demo", "mnist"), 120.0),
    )
}
WORDS = {0: "ok", 1: "failed", 2: "wrong usage", BUSY_EXIT: "refused: machine busy"}


def ratios(record: dict[str, Any]) -> Iterator[tuple[str, measure.Figure]]:
    """(what, plain PyTorch's time over the kernels') of one record."""
    for entry in record["cases"]:
        p, figures = entry["parameters"], entry["figures"]
        if record["name"] == "ops":
            for backend, figure in figures.items():
                if backend != "compile" and "time_over_reference" in figure:
                    values = [1.0 / v for v in figure["time_over_reference"]["values"]]
                    yield f"{p['op']} on {backend}", measure.measured(values, "1")
        elif record["name"] == "sample":
            for way, figure in figures.get("published_over", {}).items():
                yield f"{p['preset']}, {way}", figure
        elif figures["reference_over_auto"]["kind"] == "measured":
            kind = p.get("kind", p.get("bn", ""))
            yield " ".join(filter(None, (p["preset"], kind))), figures["reference_over_auto"]


def table(records: Sequence[dict[str, Any]]) -> str:
    """The ratios as text."""
    lines = [f"{'program':<9}{'what':<42}{'plain / kernels':>16}{'middle 60 %':>18}"]
    for record in records:
        for what, figure in ratios(record):
            low, high = figure["q20"], figure["q80"]
            middle = "-" if low is None else f"{low:.2f} to {high:.2f}"
            lines.append(f"{record['name']:<9}{what:<42}{figure['median']:>16.2f}{middle:>18}")
    lines.append("medians of the same run; sample: the published way over each of the others")
    if any(not record["idle"] for record in records):
        lines.append("NOT IDLE: others used this machine meanwhile, so these are no results")
    return "\n".join(lines)


def run_program(program: Program, device: str, out: Path, *, force: bool, dry_run: bool) -> int:
    """Run it with its output on this terminal; its exit status, 124 where it did not end."""
    command = [sys.executable, "-m", f"benchmarks.{program.name}", *program.arguments]
    command += ["--budget", str(program.budget), "--device", device, "--out", str(out)]
    command += [flag for flag, wanted in (("--force", force), ("--dry-run", dry_run)) if wanted]
    try:
        limit = program.budget + LIMIT_BEYOND_BUDGET
        return subprocess.run(command, cwd=measure.ROOT, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return 124


def written(program: Program, out: Path, since: float) -> Iterator[dict[str, Any]]:
    """The program's record, if it is of this run."""
    for path in out.glob(f"*/{program.name}.json"):
        if path.stat().st_mtime >= since:
            yield json.loads(path.read_text())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python3 -m benchmarks.quick", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument(
        "--only", nargs="+", default=list(PROGRAMS), choices=PROGRAMS, help="some of the programs"
    )
    found.add_argument("--device", default="cpu")
    found.add_argument(
        "--budget", type=float, help="seconds of each program; default: its own, 7 minutes in all"
    )
    found.add_argument("--out", type=Path, default=OUT, help="folder of the records; default: runs/bench")
    found.add_argument("--force", action="store_true", help="time on a machine that is not idle")
    found.add_argument("--dry-run", action="store_true", help="mark the figures as a trial")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print the ratios; 1: a program failed or was refused, 2: wrong usage, 3: a busy machine at the start."""
    known = parser()
    options = known.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        known.error("no CUDA device is usable here: try --device cpu")
    if options.budget is not None and not options.budget > 0:
        known.error(f"--budget expects a positive number of seconds, got {options.budget:g}")
    try:
        measure.Watch(force=options.force)
    except measure.MachineBusy as busy:
        print(f"{busy}\nWith make: make bench FORCE=1", file=sys.stderr)
        return BUSY_EXIT
    lines: list[str] = []
    records: list[dict[str, Any]] = []
    failed = False
    for name in dict.fromkeys(options.only):
        program = PROGRAMS[name]
        if options.budget is not None:
            program = Program(name, program.arguments, options.budget)
        print(f"== {name}", flush=True)
        start, since = time.perf_counter(), time.time()
        out = options.out.resolve()
        status = run_program(program, options.device, out, force=options.force, dry_run=options.dry_run)
        records += written(program, out, since)
        failed |= status != 0
        word = WORDS.get(status, f"ended with status {status}")
        lines.append(f"{name:<9}{time.perf_counter() - start:>6.0f} s  {word}")
    print("== ratios")
    print(table(records))
    print("== programs")
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
