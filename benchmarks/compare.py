"""Two records side by side: the ratio of every figure, and whether it is more than noise.

The noise floor of a ratio B / A comes from the values of both records. With [q20, q80] the middle of a figure's values
(smallest and largest where there are two) and m their median, a larger B counts only where the middles do not overlap,
q20(B) > q80(A), which is the same as

    m(B) / m(A) > floor = (q80(A) / m(A)) (m(B) / q20(B)),

and a smaller one where q80(B) < q20(A). Unlike a standard error, the floor does not shrink with the number of values,
because the values of one run share its disturbances. What differs between two runs of the same code is in it only
where the values come from several runs: :mod:`benchmarks.base` takes them so.

A regression is a cost (seconds or memory) of lsgm_fast itself that has grown beyond both a limit and the floor; the
eager reference, ``torch.compile`` and the copy are shown, because they tell of a machine that changed, and not judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.measure import Figure
from benchmarks.records import Case, Record, is_baseline, is_cost, threads_text

MOST_LISTED = 8
HIGHER, LOWER, NOISE, UNJUDGED = "higher", "lower", "within noise", "not judged"


@dataclass(frozen=True)
class Change:
    """One figure of one case in A and in B.

    Attributes:
        a, b: medians. ratio: b / a; None where a is not positive. floor: what the ratio must be beyond, above 1 where
        the ratio is, else below; None where one of the two has a single value. verdict: ``higher``, ``lower``,
        ``within noise`` or ``not judged``. cost: seconds or memory. baseline: not of lsgm_fast itself.
    """

    record: str
    case: str
    figure: str
    unit: str
    a: float
    b: float
    ratio: float | None
    floor: float | None
    verdict: str
    cost: bool
    baseline: bool

    def above(self, limit: float) -> bool:
        """Whether it is a regression."""
        worse = self.cost and not self.baseline and self.verdict == HIGHER
        return worse and self.ratio is not None and self.ratio > limit


@dataclass
class Comparison:
    """Everything that two sets of records say about each other."""

    a: list[str]
    b: list[str]
    notes: list[str]
    changes: list[Change] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    new_failures: list[str] = field(default_factory=list)

    def regressions(self, limit: float) -> list[Change]:
        """The costs that have grown beyond ``limit`` and their noise floors."""
        return [change for change in self.changes if change.above(limit)]

    def as_json(self, limit: float | None) -> dict[str, Any]:
        """One object; ``passed`` is None without a limit."""
        above = [] if limit is None else self.regressions(limit)
        passed = None if limit is None else not above and not self.new_failures
        return asdict(self) | {
            "limit": limit,
            "above": [asdict(change) for change in above],
            "passed": passed,
        }


# -- two figures ----------------------------------------------------------------------------------------------------


def middle(figure: Figure) -> tuple[float, float] | None:
    """Where the middle of its values lies: the quantiles, the extremes of two values, None for one."""
    if figure["q20"] is not None:
        return figure["q20"], figure["q80"]
    return (min(figure["values"]), max(figure["values"])) if figure["n"] > 1 else None


def judge(a: Figure, b: Figure) -> tuple[float | None, float | None, str]:
    """(ratio, floor, verdict) of two measured figures."""
    if not (a["median"] > 0.0 and b["median"] > 0.0):
        return None, None, UNJUDGED
    ratio = b["median"] / a["median"]
    in_a, in_b = middle(a), middle(b)
    if in_a is None or in_b is None:
        return ratio, None, UNJUDGED
    if ratio >= 1.0:
        # A lower end at or below 0, as a difference of two times may have, is noise without a bound.
        floor = in_a[1] / a["median"] * b["median"] / in_b[0] if in_b[0] > 0.0 else math.inf
        verdict = HIGHER if ratio > floor else NOISE
    else:
        floor = in_a[0] / a["median"] * b["median"] / in_b[1]
        verdict = LOWER if ratio < floor else NOISE
    return ratio, floor if 0.0 < floor < math.inf else None, verdict


def changes(record: str, a: Case, b: Case) -> list[Change]:
    """Every figure that is measured in both."""
    found = []
    for place, first in a.figures.items():
        second = b.figures.get(place)
        if second is None or not first["kind"] == second["kind"] == "measured":
            continue
        ratio, floor, verdict = judge(first, second)
        cost, baseline = is_cost(place, first), is_baseline(place)
        values = (first["median"], second["median"], ratio, floor, verdict, cost, baseline)
        found.append(Change(record, a.label, place, first["unit"], *values))
    return found


# -- two sets of records --------------------------------------------------------------------------------------------


def pairs(
    a: Sequence[Record], b: Sequence[Record]
) -> tuple[list[tuple[Record, Record]], list[str], list[str]]:
    """Records of one name, and the names in one of the sets only; two single files need not share a name."""
    if len(a) == len(b) == 1:
        return [(a[0], b[0])], [], []
    ours, theirs = ({record.name: record for record in records} for records in (a, b))
    both = [(record, theirs[name]) for name, record in ours.items() if name in theirs]
    lone = [f"every case of {record.source}" for name, record in ours.items() if name not in theirs]
    other = [f"every case of {record.source}" for name, record in theirs.items() if name not in ours]
    return both, lone, other


def _unlike(a: Record, b: Record) -> list[str]:
    """Settings, other than the machine, that change figures on their own."""
    found = []
    if a.threads != b.threads:
        found.append(f"{threads_text(a)} in {a.source}, {threads_text(b)} in {b.source}")
    for name in ("python", "torch", "cuda", "cudnn", "triton"):
        ours, theirs = (record.data["environment"]["versions"].get(name) for record in (a, b))
        if ours != theirs:
            found.append(f"{name} {ours} in {a.source}, {theirs} in {b.source}")
    ours, theirs = (record.data["environment"]["variables"] for record in (a, b))
    if ours != theirs:
        found.append(f"environment variables: {ours} in {a.source}, {theirs} in {b.source}")
    for name in sorted(set(a.data["settings"]) & set(b.data["settings"])):
        ours, theirs = a.data["settings"][name], b.data["settings"][name]
        if ours != theirs and isinstance(ours, (bool, int, float)) and "threads" not in name:
            found.append(f"{name} {ours} in {a.source}, {theirs} in {b.source}")
    return found


def compare(a: Sequence[Record], b: Sequence[Record], *, across_machines: bool = False) -> Comparison:
    """Lay B beside A.

    Raises:
        ValueError: they come from different machines or devices and ``across_machines`` is false, or have no figure in
            common.
    """
    both, lone, other = pairs(a, b)
    notes: list[str] = []
    for first, second in both:
        where = [(record.machine, record.devices) for record in (first, second)]
        if where[0] != where[1]:
            said = " and ".join(
                f"{record.source} on {record.machine} ({', '.join(record.devices)})"
                for record in (first, second)
            )
            if not across_machines:
                raise ValueError(
                    f"these were taken on different machines: {said}. Such a ratio says nothing about the code; "
                    "add --across-machines to see it all the same"
                )
            notes.append(f"different machines: {said}")
        notes += first.warnings() + second.warnings() + _unlike(first, second)
    found = Comparison(
        [record.describe() for record in a], [record.describe() for record in b], list(dict.fromkeys(notes))
    )
    found.only_in_a, found.only_in_b = lone, other
    for first, second in both:
        ours, theirs = first.cases, second.cases
        found.only_in_a += [case.label for key, case in ours.items() if key not in theirs]
        found.only_in_b += [case.label for key, case in theirs.items() if key not in ours]
        for key, case in theirs.items():
            # The rest of a failure's text holds numbers, which differ from run to run.
            known = {text.split(":")[0] for text in ours[key].failures} if key in ours else set()
            found.new_failures += [
                f"{case.label}: {text}" for text in case.failures if text.split(":")[0] not in known
            ]
            if key in ours:
                found.changes += changes(second.name, ours[key], case)
    if not found.changes:
        raise ValueError(
            "these records have no measured figure of any case in common: "
            f"{', '.join(record.source for record in a)}; {', '.join(record.source for record in b)}"
            + "".join(f"; {note}" for note in found.notes)
        )
    return found


# -- for people -----------------------------------------------------------------------------------------------------

_SCALES = {"s": (1e3, "ms"), "bytes": (1 / 2**20, "MiB")}


def quantity(value: float, unit: str) -> str:
    """A number with a unit that suits it: milliseconds, microseconds a call, MiB."""
    first, _, rest = unit.partition("/")
    scale, name = _SCALES.get(first, (1.0, "" if unit in ("1", "ratio") else first))
    if first == "s" and abs(value) < 1e-3:
        scale, name = 1e6, "us"
    text = f"{value * scale:.4g}"
    return f"{text} {name}{'/' + rest if rest else ''}".rstrip() if name else text


def table(found: Comparison, *, everything: bool = False) -> Any:
    """The changes as a :class:`rich.table.Table`: the costs, or every figure."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(show_edge=False)
    made.add_column("case and figure", overflow="fold")
    for heading in ("A", "B", "B / A", "noise floor"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("verdict", no_wrap=True)
    last = None
    for change in found.changes:
        if not (everything or change.cost):
            continue
        if change.case != last:
            made.add_row(f"[bold]{escape(change.case)}[/]")
        last = change.case
        verdict = change.verdict
        if change.cost and not change.baseline and verdict in (HIGHER, LOWER):
            verdict = f"[{'red' if verdict == HIGHER else 'green'}]{verdict}[/]"
        made.add_row(
            f"  {change.figure}{' (baseline)' if change.baseline else ''}",
            quantity(change.a, change.unit),
            quantity(change.b, change.unit),
            *("-" if x is None else f"{x:.3f}" for x in (change.ratio, change.floor)),
            verdict,
        )
    return made


def summary(found: Comparison, limit: float | None) -> list[str]:
    """Lines below the table: what was compared, what was not, and the gate's verdict."""
    costs = [change for change in found.changes if change.cost and not change.baseline]
    lines = [f"A: {text}" for text in found.a] + [f"B: {text}" for text in found.b]
    counts = {
        verdict: sum(c.verdict == verdict for c in costs) for verdict in (HIGHER, LOWER, NOISE, UNJUDGED)
    }
    lines.append(
        f"{len(costs)} costs of lsgm_fast: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    )
    if counts[UNJUDGED]:
        lines.append(
            "not judged: a single value has no noise floor, and a median that is not positive no ratio"
        )
    for side, labels in (("A", found.only_in_a), ("B", found.only_in_b)):
        lines += [f"only in {side}: {text}" for text in labels[:MOST_LISTED]]
        if len(labels) > MOST_LISTED:
            lines.append(f"only in {side}: {len(labels) - MOST_LISTED} more, which --json lists")
    lines += [f"NOTE: {text}" for text in found.notes]
    lines += [f"FAILED in B: {text}" for text in found.new_failures]
    if limit is not None:
        above = found.regressions(limit)
        lines += [
            f"REGRESSION: {c.case}: {c.figure} takes {c.ratio:.3f} x (limit {limit:g}, noise floor {c.floor:.3f})"
            for c in above
        ]
        if not above and not found.new_failures:
            lines.append(f"passed: no cost is beyond both {limit:g} x and its noise floor")
    return lines
