"""Time another commit and the working tree in one go, taking turns, so that a drift of the machine hits both.

The other commit is checked out into a temporary git worktree. It gets the working tree's ``benchmarks/``, so that both
are timed by the same program, and compiled libraries of its own: copies of the working tree's where ``csrc/`` and
``CMakeLists.txt`` are the same, else built there by the command that built those. The worktree is removed again
whatever happens, Ctrl-C and SIGTERM included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.measure import BUSY_EXIT, GRACE_SECONDS, ROOT, MachineBusy, check_record, measured, write_json
from benchmarks.records import Record
from benchmarks.worktree import checkout, provide_libraries, run_group, share_programs, terminable
from lsgm_fast.errors import unknown_name

# Programs that write one record to --out and know --name, --budget and --commit.
PROGRAMS = ("decode", "ops", "published", "score", "solver", "train")
# An idle check before and after, imports, and the case that is under way when the budget ends.
BESIDES_BUDGET = GRACE_SECONDS + 60.0
# Options of the programs that every turn is given by this module.
TAKEN = ("--budget", "--commit", "--name", "--out")


class BenchmarkFailed(RuntimeError):
    """A turn ended without a record."""


# -- one turn --------------------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """One of the two: where it lies, how its turns are called, and the records of them."""

    folder: Path
    name: str
    commit: str | None = None
    turns: list[Record] = field(default_factory=list)

    def variables(self) -> dict[str, str]:
        """The environment of its processes, in which ``lsgm_fast`` is this tree's."""
        return os.environ | {"PYTHONPATH": str(self.folder)}

    def check_import(self) -> None:
        """Raise :class:`BenchmarkFailed` unless its processes import its own ``lsgm_fast``."""
        command = [sys.executable, "-c", "import lsgm_fast; print(lsgm_fast.__file__)"]
        status, said = run_group(command, self.folder, self.variables(), 120.0)
        lines = said.split("\n")
        if status or not any(line.startswith(f"{self.folder.resolve()}{os.sep}") for line in lines):
            raise BenchmarkFailed(
                f"{self.name}: Python does not import the package in {self.folder}: {said.strip()}"
            )

    def turn(self, program: str, arguments: Sequence[str], budget: float) -> Record:
        """Run the program once and keep its record.

        Raises:
            MachineBusy: it refused to time a busy machine.
            BenchmarkFailed: it wrote no record.
        """
        with tempfile.TemporaryDirectory() as out:
            known = ["--out", out, "--name", program, "--budget", f"{budget:g}"]
            if self.commit is not None:
                known += ["--commit", self.commit]
            command = [sys.executable, "-m", f"benchmarks.{program}", *arguments, *known]
            try:
                status, said = run_group(command, self.folder, self.variables(), budget + BESIDES_BUDGET)
            except subprocess.TimeoutExpired:
                raise BenchmarkFailed(
                    f"{self.name}: benchmarks.{program} did not end within its budget"
                ) from None
            if status == BUSY_EXIT:
                raise MachineBusy(said.strip())
            found = sorted(Path(out).glob("*/*.json"))
            if not found:
                last = said.strip().splitlines()[-1:] or ["no message"]
                raise BenchmarkFailed(
                    f"{self.name}: benchmarks.{program} ended with status {status} and no record: {last[0]}"
                )
            record = records.parse(found[0].read_text(encoding="utf-8"), self.name)
        self.turns.append(record)
        return record


# -- all turns ------------------------------------------------------------------------------------------------------


def merge(turns: Sequence[Record]) -> Record:
    """One record with the values of all turns; what only some of them measured has fewer values."""
    first = turns[0]
    cases = []
    for key in dict.fromkeys(key for turn in turns for key in turn.cases):
        having = [turn.cases[key] for turn in turns if key in turn.cases]
        figures: dict[str, Any] = {}
        for place in dict.fromkeys(place for case in having for place in case.figures):
            seen = [case.figures[place] for case in having if place in case.figures]
            values = [value for figure in seen if figure["kind"] == "measured" for value in figure["values"]]
            unit = next((figure["unit"] for figure in seen if "unit" in figure), "")
            _put(figures, place, measured(values, unit) if values else seen[0])
        failures = list(dict.fromkeys(failure for case in having for failure in case.failures))
        entry = next(
            entry
            for turn in turns
            for entry, case in zip(turn.data["cases"], turn.cases.values(), strict=True)
            if case.key == key
        )
        cases.append(entry | {"figures": figures, "failures": failures})
    reasons = [
        f"turn {i + 1}: {why}" for i, turn in enumerate(turns) for why in turn.data["not_idle_because"]
    ]
    left_out = list(dict.fromkeys(name for turn in turns for name in turn.data["left_out"]))
    merged = first.data | {
        "cases": cases,
        "idle": not reasons,
        "not_idle_because": reasons,
        "left_out": left_out,
        "complete": not left_out,
        "machine_after": turns[-1].data["machine_after"],
    }
    return Record(merged, first.source)


def keep(folder: Path, base: Record, tree: Record) -> None:
    """Write both records, ``base.json`` and ``tree.json``, for another comparison."""
    for name, record in (("base", base), ("tree", tree)):
        check_record(record.data)
        write_json(folder / f"{name}.json", record.data)


def _put(figures: dict[str, Any], place: str, figure: dict[str, Any]) -> None:
    *folders, last = place.split(".")
    for name in folders:
        figures = figures.setdefault(name, {})
    figures[last] = figure


def take_turns(
    ref: str,
    program: str,
    arguments: Sequence[str],
    *,
    turns: int,
    budget: float,
    root: Path = ROOT,
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> tuple[Record, Record, str]:
    """Records of the base and of the working tree, the values of all turns merged, and what libraries they ran.

    ``budget``: seconds of all turns together. The order changes from turn to turn, so that a steady drift cancels.

    Raises:
        ValueError: ``ref``, ``program`` or ``arguments`` are wrong, or the libraries cannot be had.
        MachineBusy: others use the machine.
        BenchmarkFailed: a turn ended without a record.
    """
    taken = [option for option in (word.split("=")[0] for word in arguments) if option in TAKEN]
    if program not in PROGRAMS:
        raise unknown_name("benchmark", program, PROGRAMS)
    if taken:
        raise ValueError(
            f"{taken[0]} is set by the comparison itself: leave it out (the budget is --budget before it)"
        )
    with terminable(), checkout(ref, root) as (folder, sha):
        share_programs(root, folder)
        libraries = provide_libraries(root, folder, report)
        trees = [Tree(folder, f"base {ref}", sha), Tree(root, "working tree")]
        for tree in trees:
            tree.check_import()
        for turn in range(turns):
            for tree in trees if turn % 2 == 0 else trees[::-1]:
                start = time.perf_counter()
                record = tree.turn(program, arguments, budget / (2 * turns))
                seconds = time.perf_counter() - start
                report(
                    f"turn {turn + 1} of {turns}: {tree.name}: {seconds:.0f} s, cases: {len(record.cases)}"
                )
            if any(case.failures for case in trees[1].turns[0].cases.values()):
                report("something in the working tree is wrong: no further turns")
                break
    return merge(trees[0].turns), merge(trees[1].turns), libraries
