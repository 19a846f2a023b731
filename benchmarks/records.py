"""Reading records back: which machine, which cases, which figures, so that two of them can be laid side by side.

A case is known by its ``parameters`` without those that follow from the others (:data:`DERIVED`); a figure by its
place among the case's figures, ``cpu.time`` for instance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.measure import Figure

# Parameters that a case has because of its others, the machine or the clock: two runs of one case may differ in them.
DERIVED = frozenset(
    {"buffers", "bytes", "calls_per_round", "clock", "device", "tolerance", "trained_weights"}
)
# Figures of what lsgm_fast is compared with, and of the machine itself.
BASELINES = frozenset({"byte_floor", "clone", "compile", "copy", "network_evaluation", "reference", "scipy"})


@dataclass(frozen=True)
class Case:
    """One case of a record. ``label``: its name for people; ``figures``: by their dotted places."""

    key: str
    label: str
    parameters: dict[str, Any]
    figures: dict[str, Figure]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A checked record; ``source``: where it was read from, for people."""

    data: dict[str, Any]
    source: str

    @property
    def name(self) -> str:
        return str(self.data["name"])

    @property
    def date(self) -> str:
        """ISO 8601, in UTC."""
        return str(self.data["date"])

    @property
    def program(self) -> str:
        """``ops`` for ``python3 -m benchmarks.ops ...``."""
        words = str(self.data["command"]).split()
        modules = [word for word in words if word.startswith("benchmarks.")]
        return modules[0].removeprefix("benchmarks.") if modules else ""

    @property
    def devices(self) -> list[str]:
        """``cpu``, ``cuda``: of the cases; ``cpu`` where they say nothing."""
        named = {str(case["parameters"].get("device", "cpu")).split(":")[0] for case in self.data["cases"]}
        return sorted(named or {"cpu"})

    @property
    def machine(self) -> str:
        """The processor and its cores, and the GPUs where the cases ran on one."""
        hardware = self.data["environment"]["hardware"]
        text = f"{hardware['cpu']}, {hardware['logical_cores']} cores"
        if "cuda" in self.devices:
            text = " + ".join(gpu["name"] for gpu in hardware["gpus"]) + f" ({text})"
        return text

    @property
    def threads(self) -> int | None:
        settings = self.data["settings"]
        return settings.get("threads", settings.get("torch_threads"))

    @property
    def commit(self) -> str:
        """The first nine characters of the commit, with ``+`` where the tree had changes; ``unknown``."""
        commit = self.data["environment"]["commit"]
        if not commit["sha"]:
            return "unknown"
        return commit["sha"][:9] + ("+" if commit["dirty"] else "")

    @property
    def is_result(self) -> bool:
        """Taken on an idle machine, and no dry run."""
        return bool(self.data["idle"]) and not self.data["dry_run"]

    @cached_property
    def cases(self) -> dict[str, Case]:
        """All cases by their keys, in the record's order."""
        found: dict[str, Case] = {}
        for entry in self.data["cases"]:
            known = identity(entry["parameters"])
            # Of a run on several devices each case keeps its own.
            if len(self.devices) > 1:
                known["device"] = entry["parameters"].get("device", "cpu")
            key, again = json.dumps(known, sort_keys=True), 1
            while key in found:
                again += 1
                key = json.dumps(known | {"again": again}, sort_keys=True)
            text = label(known) + (f" ({again})" if again > 1 else "")
            figures = dict(flat(entry["figures"]))
            found[key] = Case(key, text, entry["parameters"], figures, tuple(entry["failures"]))
        return found

    def describe(self) -> str:
        """One line: file, date, commit, machine."""
        return f"{self.source}: {self.date[:10]}, commit {self.commit}, {self.machine}, {threads_text(self)}"

    def warnings(self) -> list[str]:
        """What keeps its figures from being results, or from being all."""
        found = []
        if self.data["dry_run"]:
            found.append(f"{self.source} is a dry run: its figures mean nothing")
        if not self.data["idle"]:
            first, *rest = self.data["not_idle_because"]
            more = f", and {len(rest)} more reasons" if rest else ""
            found.append(f"{self.source} was not taken on an idle machine: {first}{more}")
        if self.data["left_out"]:
            count = len(self.data["left_out"])
            found.append(
                f"{self.source}: {count} left out for want of time, first {self.data['left_out'][0]}"
            )
        return found


def threads_text(record: Record) -> str:
    """``2 threads``, or nothing known."""
    if record.threads is None:
        return "threads not recorded"
    return f"{record.threads} thread{'' if record.threads == 1 else 's'}"


def identity(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that say which case it is."""
    return {name: value for name, value in parameters.items() if name not in DERIVED}


def label(parameters: dict[str, Any]) -> str:
    """A case's name for people: names as they are, numbers and switches with what they are of."""
    words = []
    for name, value in parameters.items():
        if isinstance(value, str):
            words.append(value)
        elif isinstance(value, bool) or value is None:
            if value:
                words.append(name)
        elif isinstance(value, (int, float)):
            words.append(f"{name}={value:g}")
        elif isinstance(value, list) and all(isinstance(v, int) for v in value):
            words.append("x".join(map(str, value)))
    return " ".join(words) or "(no parameters)"


def flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Figure]]:
    """Every figure with its dotted place."""
    for name, value in figures.items():
        if "kind" in value:
            yield prefix + name, value
        else:
            yield from flat(value, f"{prefix}{name}.")


def number(figure: Figure | None) -> float | None:
    """The median of a measured figure or the value of another; None where there is none."""
    return None if figure is None else figure.get("median", figure.get("value"))


def is_cost(place: str, figure: Figure) -> bool:
    """Whether it is seconds or memory that lsgm_fast takes, of which less is better."""
    unit = str(figure.get("unit", ""))
    return (unit == "s" or unit.startswith("s/") or unit == "bytes") and not place.startswith("byte_floor")


def is_baseline(place: str) -> bool:
    """Whether it belongs to what lsgm_fast is compared with, or to the machine."""
    return place.split(".")[0] in BASELINES


# -- files ----------------------------------------------------------------------------------------------------------


def parse(text: str, source: str) -> Record:
    """A record from JSON.

    Raises:
        ValueError: it is none; the message names ``source``.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(data, dict) or "cases" not in data:
        raise ValueError(f"{source} holds no benchmark record: expected a JSON object with `cases`")
    try:
        measure.check_record(data)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} is no valid benchmark record: {error}") from None
    return Record(data, source)


def read(place: Path) -> list[Record]:
    """The record of a file, or all records below a folder (other JSON files there are left out), by name.

    Raises:
        ValueError: nothing there, no record, or two of one name.
    """
    if place.is_file():
        return [parse(place.read_text(encoding="utf-8"), str(place))]
    if not place.is_dir():
        raise ValueError(f"{place} does not exist: expected a record's JSON file or a folder of them")
    found: dict[str, Record] = {}
    for path in sorted(place.rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        if not _looks_like_a_record(text):
            continue
        record = parse(text, str(path))
        if record.name in found:
            raise ValueError(
                f"{place} holds two records named {record.name!r} ({found[record.name].source}, {path}): "
                "give the folder of one machine, or one file"
            )
        found[record.name] = record
    if not found:
        raise ValueError(f"{place} holds no benchmark record")
    return list(found.values())


def _looks_like_a_record(text: str) -> bool:
    try:
        data = json.loads(text)
    except ValueError:
        return False
    return isinstance(data, dict) and {"schema", "cases"} <= set(data)


def newest_cases(records: Sequence[Record]) -> dict[str, tuple[Case, Record]]:
    """Every case of the records, taken from the newest record that has it."""
    found: dict[str, tuple[Case, Record]] = {}
    for record in sorted(records, key=lambda record: record.date):
        for key, case in record.cases.items():
            found[key] = (case, record)
    return found
