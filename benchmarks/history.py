"""How the figures of a record changed: every version of its file that git keeps, and the one on disk.

There is one file per record, the newest; the older ones are what ``git log`` of that file brings back. A version is
known by the date at which it was measured, so that a commit that only moved or reformatted the file adds none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.compare import quantity
from benchmarks.measure import RESULTS, ROOT, Figure
from benchmarks.records import Record, is_baseline, is_cost
from benchmarks.worktree import git
from lsgm_fast.errors import unknown_name

MOST_LINES = 12  # of a plot that can still be read


@dataclass(frozen=True)
class Line:
    """One figure of one case through the versions; None where a version lacks it."""

    case: str
    figure: str
    unit: str
    points: tuple[Figure | None, ...]


def find(name: str, machine: str | None, results: Path | None = None) -> Path:
    """The file of a record; ``results``: where the machines' folders are.

    Raises:
        ValueError: there is none of that name, or several machines have one and ``machine`` names none of them.
    """
    results = RESULTS if results is None else results
    files = sorted(results.glob(f"*/{name}.json"))
    if not files:
        raise unknown_name("record", name, sorted({path.stem for path in results.glob("*/*.json")}))
    machines = [path.parent.name for path in files]
    if machine is None and len(files) == 1:
        return files[0]
    if machine is None:
        raise ValueError(
            f"several machines have a record {name!r}: choose with --machine, {' or '.join(machines)}"
        )
    if machine not in machines:
        raise unknown_name("machine", machine, machines)
    return files[machines.index(machine)]


def versions(path: Path, root: Path | None = None) -> tuple[list[Record], list[str]]:
    """All versions of a record's file, oldest first, and what git keeps of it that is no record of this schema.

    Raises:
        ValueError: ``root`` is in no git repository.
    """
    root = ROOT if root is None else root
    place = path.relative_to(root).as_posix()
    found: dict[str, Record] = {}
    strange = []
    log = git(root, "log", "--format=%h", "--", place).splitlines()
    texts = [(f"{place} at {commit}", _shown(root, commit, place)) for commit in log]
    texts.insert(0, (place, path.read_text(encoding="utf-8")))
    for source, text in texts:
        if text is None:  # the commit removed it
            continue
        try:
            record = records.parse(text, source)
        except ValueError as error:
            strange.append(str(error))
            continue
        found.setdefault(record.date, record)
    return [found[date] for date in sorted(found)], strange


def _shown(root: Path, commit: str, place: str) -> str | None:
    try:
        return git(root, "show", f"{commit}:{place}")
    except ValueError:
        return None


def lines(found: Sequence[Record], wanted: str | None = None) -> list[Line]:
    """The figures whose "case figure" holds every word of ``wanted``, in the order of the newest version.

    Where no word is of a figure's own name (``rk_stage``, but not ``cpu.time``), the costs of lsgm_fast itself.

    Raises:
        ValueError: none does.
    """
    made = []
    words = (wanted or "").lower().split()
    for key in dict.fromkeys(key for record in reversed(found) for key in record.cases):
        cases = [record.cases.get(key) for record in found]
        known = next(case for case in reversed(cases) if case is not None)
        for place, figure in known.figures.items():
            if figure["kind"] != "measured":
                continue
            text = f"{known.label} {place}".lower()
            if not all(word in text for word in words):
                continue
            named = any(word in place.lower() for word in words)
            if not named and (is_baseline(place) or not is_cost(place, figure)):
                continue
            points = [None if case is None else case.figures.get(place) for case in cases]
            measured = tuple(p if p is not None and p["kind"] == "measured" else None for p in points)
            made.append(Line(known.label, place, figure["unit"], measured))
    if not made:
        if wanted is None:
            raise ValueError(
                "this record has no figure of time or memory: name what to show, for instance `error`"
            )
        raise ValueError(
            f"no figure holds {wanted!r} in `case figure`: for instance "
            + "; ".join(
                f"`{case.label} {next(iter(case.figures))}`" for case in [*found[-1].cases.values()][:2]
            )
        )
    return made


def table(found: Sequence[Record], shown: Sequence[Line]) -> Any:
    """A :class:`rich.table.Table`: one row per figure, one column per version."""
    from rich.table import Table

    made = Table()
    made.add_column("case", overflow="fold")
    made.add_column("figure", no_wrap=True)
    for record in found:
        mark = "" if record.is_result else "\nno result"
        made.add_column(f"{record.date[:10]}\n{record.commit}{mark}", justify="right", no_wrap=True)
    last = None
    for line in shown:
        cells = ["-" if p is None else quantity(p["median"], line.unit) for p in line.points]
        made.add_row("" if line.case == last else line.case, line.figure, *cells)
        last = line.case
    return made


def as_json(found: Sequence[Record], shown: Sequence[Line]) -> dict[str, Any]:
    """The same as one object."""
    return {
        "versions": [
            {"date": r.date, "commit": r.commit, "is_result": r.is_result, "source": r.source} for r in found
        ],
        "figures": [
            {"case": line.case, "figure": line.figure, "unit": line.unit, "points": list(line.points)}
            for line in shown
        ],
    }


def plot(found: Sequence[Record], shown: Sequence[Line], path: Path) -> None:
    """Medians with their 20 and 80 % quantiles over the versions, as a picture in the format of the path's suffix.

    Raises:
        ValueError: matplotlib is missing, there are too many figures to read, or of several units.
    """
    if len(shown) > MOST_LINES or len({line.unit for line in shown}) > 1:
        units = sorted({line.unit for line in shown})
        raise ValueError(
            f"a plot takes at most {MOST_LINES} figures of one unit, and these are {len(shown)} in {', '.join(units)}: "
            "name a part of the case and the figure, for instance `rk_stage` or `cpu.time`"
        )
    try:
        from matplotlib.figure import Figure as Picture
    except ModuleNotFoundError:
        raise ValueError('the plot needs matplotlib: pip install "lsgm-fast[plot]"') from None

    picture = Picture(figsize=(8, 5), layout="constrained")
    axes = picture.add_subplot()
    labels = [f"{record.date[:10]}\n{record.commit}" for record in found]
    for line in shown:
        at = [i for i, point in enumerate(line.points) if point is not None]
        kept = [point for point in line.points if point is not None]
        medians = [point["median"] for point in kept]
        below = [m - (m if p["q20"] is None else p["q20"]) for m, p in zip(medians, kept, strict=True)]
        above = [(m if p["q80"] is None else p["q80"]) - m for m, p in zip(medians, kept, strict=True)]
        name = f"{line.case}: {line.figure}"
        axes.errorbar(at, medians, yerr=[below, above], marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(found)), labels)
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel(shown[0].unit)
    axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)
