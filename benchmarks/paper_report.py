"""The table and the plot of :mod:`benchmarks.paper`, and the paper's times with what is known of them.

python -m benchmarks.paper_report RECORD.json paper.svg          of a record from another machine
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, quoted
from benchmarks.published import Case
from benchmarks.sample import WAYS

PAPER = "arXiv:2106.05931, CelebA-HQ-256, as it is quoted for this project"


@dataclass(frozen=True)
class Reference:
    """A time of the paper."""

    seconds: float
    text: str
    what: str

    def figure(self) -> Figure:
        """For the record."""
        return quoted(self.seconds, "s", f"{PAPER}: {self.what}. {UNKNOWN}")


UNKNOWN = (
    "Other hardware: which GPU, which batch size and which tolerance is not known here, nor was the figure checked "
    "against the paper's text; another summary of it has 4.15 s for 16 images in place of 2.74 s"
)
REFERENCES = {
    "pixel_space": Reference(2640.0, "44 min", "a score-based model of the pixels"),
    "pixel_space_ode": Reference(234.0, "3.9 min", "the same with an ODE solver"),
    "lsgm": Reference(2.74, "2.74 s", "LSGM; 23 evaluations by the project page"),
}
CALLED = "the project's reference figure (the paper's, other hardware)"
NOTE = (
    f"{CALLED}: "
    + "; ".join(f"{r.text}, {r.what}" for r in REFERENCES.values())
    + f". {UNKNOWN}. They are no comparison with this machine."
)


FLOOR = "floor at the published NFE"


def way_of(case: Case) -> str:
    """The way that a case is of; of no way of :data:`benchmarks.sample.WAYS`: the solver's name."""
    for name, way in WAYS.items():
        if (way.backend, way.solver, way.evaluations) == (case.backend, case.solver, case.evaluations):
            return name
    return case.solver


def _at(figures: dict[str, Any], path: str) -> tuple[float | None, str]:
    """The number of a figure and its kind; None where it was not measured."""
    value: Any = figures
    for key in path.split("."):
        value = value.get(key, {})
    number = value.get("median", value.get("value"))
    return (None if number is None else float(number)), value.get("kind", "not_measured")


def _cell(
    figures: dict[str, Any], path: str, width: int, scale: float = 1.0, form: str = ".2f", star: bool = False
) -> str:
    number, kind = _at(figures, path)
    mark = "*" if star and kind == "extrapolated" else ""
    return ("-" if number is None else f"{number * scale:{form}}{mark}").rjust(width)


def _budget(figures: dict[str, Any]) -> dict[str, Any]:
    """The totals of a way with a budget of evaluations: measured, or from its parts; nothing of another way."""
    if "budget" not in figures:
        return {}
    return figures["fixed"] if "total" in figures["fixed"] else figures["budget"]


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as text, one line per case; ``-`` where nothing was measured."""
    lines = [
        f"{'':<43}{'ms per evaluation':^35}{'ms per decoding':^20}{'10 evaluations':^16}{'tolerance':^16}"
        f"{'at published NFE':^21}",
        f"{'preset':<31}{'way':<12}{'score':>10}{'floor':>9}{'solver':>8}{'launch':>8}{'decode':>11}{'floor':>9}"
        f"{'s':>10}{'s/image':>9}{'NFE':>6}{'s':>9}{'s':>11}{'floor s':>10}",
    ]
    group: tuple[Any, ...] = ()
    for record in records:
        p, f = record["parameters"], record["figures"]
        if (p["batch"], p["precision"]) != group:
            group = (p["batch"], p["precision"])
            lines.append(f"-- batch {p['batch']}, {p['precision']}")
        lines.append(
            f"{p['preset']:<31}{p['way']:<12}"
            + _cell(f, "parts.score", 10, 1e3)
            + _cell(f, "floor.score.seconds", 9, 1e3)
            + _cell(f, "parts.solver", 8, 1e3)
            + _cell(f, "parts.launching.score", 8, 1e3)
            + _cell(f, "parts.decode", 11, 1e3)
            + _cell(f, "floor.decode.seconds", 9, 1e3)
            + _cell(_budget(f), "total", 10, form=".3f", star=True)
            + _cell(_budget(f), "per_sample", 9, form=".3f", star=True)
            + _cell(f, "solved.nfe", 6, form=".0f")
            + _cell(f, "solved.total", 9)
            + _cell(f, "published_nfe.total", 11, form=".3f", star=True)
            + _cell(f, "floor.published_nfe", 10, form=".3f", star=True)
        )
    lines.append(
        "medians; s: per batch; floor: arithmetic at this machine's matrix rate or bytes at its copy bandwidth, the "
        "larger one;\nsolver: a solve without the network; launch: of all kernels of an evaluation; tolerance: the "
        "recipe's, with the NFE of random\nweights, not of trained ones; *: extrapolated, never measured"
    )
    lines.append(NOTE)
    return "\n".join(lines)


def points(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str, float]]:
    """(label of the case, way, ``measured`` or ``extrapolated``, seconds per batch) of what the plot shows."""
    for record in records:
        p, f = record["parameters"], record["figures"]
        label = f"{p['preset']}\nbatch {p['batch']}, {p['precision']}"
        shown = [(p["way"], *_at(_budget(f), "total")), (p["way"], *_at(f, "published_nfe.total"))]
        if p["way"] == "rk45":
            shown.append((FLOOR, *_at(f, "floor.published_nfe")))
        for way, seconds, kind in shown:
            if seconds is not None:
                yield label, way, kind, seconds


def require_matplotlib() -> None:
    """Fail before anything is timed.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'lsgm-fast[plot]'") from None


def plot(record: dict[str, Any], path: Path) -> None:
    """Seconds per batch on a logarithmic axis, filled where measured, with the paper's times as lines."""
    from matplotlib.figure import Figure as Canvas

    found = list(points(record["cases"]))
    labels = list(dict.fromkeys(label for label, *_ in found))
    kinds = list(dict.fromkeys(way for _, way, *_ in found))
    figure = Canvas(figsize=(9, 2.6 + 0.55 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for index, way in enumerate(kinds):
        of = [(seconds, labels.index(label), kind) for label, name, kind, seconds in found if name == way]
        for kind in dict.fromkeys(kind for *_, kind in of):
            axes.plot(
                [seconds for seconds, _, which in of if which == kind],
                [row for _, row, which in of if which == kind],
                ls="",
                marker="|" if way == FLOOR else "o",
                ms=9 if way == FLOOR else 6,
                mew=1.5,
                color=f"C{index}",
                mfc=f"C{index}" if kind == "measured" else "none",
                label=f"{way} ({kind})",
            )
    for reference in REFERENCES.values():
        axes.axvline(reference.seconds, color="0.4", ls="--", lw=1)
        axes.text(
            reference.seconds, 1.01, reference.text, transform=axes.get_xaxis_transform(), ha="center", size=8
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("seconds per batch; filled: measured here, hollow: extrapolated")
    axes.set_title(f"dashed: {CALLED},\nCelebA-HQ-256, batch and GPU not known", fontsize=8, pad=18)
    axes.grid(axis="x", alpha=0.3)
    if kinds:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Sequence[str]) -> int:
    """Print a record's table, and draw its plot."""
    if len(arguments) not in (1, 2):
        raise SystemExit(f"expected RECORD.json [PLOT], got {' '.join(arguments) or 'nothing'}")
    record = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    print(table(record["cases"]))
    if len(arguments) == 2:
        require_matplotlib()
        plot(record, Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
