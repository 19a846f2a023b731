"""What stands in the generated tables: one function per table, from records to Markdown.

A case comes from the newest record that has it, as a whole: the two sides of a ratio are always of one run. Every table
ends with where its figures are from. What no record has is "not yet measured", and so is everything on a GPU until a
record of one exists.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.records import Case, Record, identity, number, threads_text

MISSING = "not yet measured"


# -- Markdown -------------------------------------------------------------------------------------------------------


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """Lines of a table; the first ``words`` columns are text, the others numbers."""
    rule = ["---" if i < words else "---:" for i in range(len(headings))]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def origins(used: Sequence[Record]) -> list[str]:
    """Machine, threads, versions, date, commit and file of every record used."""
    lines = []
    for record in sorted({record.source: record for record in used}.values(), key=lambda r: r.source):
        torch = record.data["environment"]["versions"]["torch"]
        lines.append(
            f"- `{record.source}`: {record.machine}, {threads_text(record)}, PyTorch {torch}, {record.date[:10]}, "
            f"commit {record.commit}"
        )
    return lines


def finished(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: int,
    note: str,
    used: Sequence[Record],
) -> str:
    """The table of all rows, with a row for the devices of which no record is, the note and the origins."""
    cells = [list(row) for row in rows]
    rest = [MISSING, *[""] * (len(headings) - 2)]
    if not any("cpu" in record.devices for record in used):
        cells.insert(0, ["CPU", *rest])
    if not any("cuda" in record.devices for record in used):
        cells.append(["NVIDIA GPU", *rest])
    parts = [*grid(headings, cells, words), "", note]
    if used:
        parts += ["", *origins(used)]
    return "\n".join(parts)


def scaled(case: Case, place: str, scale: float = 1.0, digits: int = 3) -> str:
    """A figure's number with that many significant digits, or that there is none."""
    value = number(case.figures.get(place))
    return MISSING if value is None else significant(value * scale, digits)


def significant(value: float, digits: int = 3) -> str:
    """``0.955``, ``12.3``, ``1230``: without an exponent."""
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and abs(value) >= 1 else text


def device(record: Record) -> str:
    """What a row ran on, short."""
    names = [gpu["name"] for gpu in record.data["environment"]["hardware"]["gpus"]]
    return (
        " + ".join(names) if "cuda" in record.devices else str(record.data["environment"]["hardware"]["cpu"])
    )


# -- cases ----------------------------------------------------------------------------------------------------------


def newest(
    found: Sequence[Record], program: str, same: Callable[[dict[str, Any]], Any] = lambda p: None
) -> list[tuple[Case, Record]]:
    """The cases of a program's records by machine, each from the newest record that has it.

    ``same``: two cases of one machine are one row where it gives the same for their parameters; without it, where all
    parameters but the derived ones agree.
    """
    rows: dict[Any, tuple[Case, Record]] = {}
    for record in sorted((r for r in found if r.program == program), key=lambda r: r.date):
        for key, case in record.cases.items():
            row = (record.machine, same(case.parameters) or key)
            rows.pop(row, None)
            rows[row] = (case, record)
    return sorted(rows.values(), key=lambda row: (row[1].devices, row[1].machine))


def _but_compile(parameters: dict[str, Any]) -> Any:
    """Whether torch.compile took part does not make another case."""
    return tuple(sorted((k, str(v)) for k, v in identity(parameters).items() if k != "compile"))


def _forward(found: Sequence[Record], program: str, kind: str | None, note: str) -> str:
    """Whole passes of a network: eager reference, ``torch.compile`` of it, and what the dispatcher takes."""

    rows: list[list[str]] = []
    used: list[Record] = []
    for case, record in newest(found, program, _but_compile):
        p = case.parameters
        text = [
            device(record),
            p["preset"],
            *([p[kind]] if kind else []),
            str(p["batch"]),
            p["memory_format"],
        ]
        times = [scaled(case, f"{name}.seconds", 1e3) for name in ("reference", "compile", "auto")]
        ratios = [scaled(case, f"{name}_over_auto") for name in ("reference", "compile")]
        rows.append([*text, *times, *ratios])
        used.append(record)
    headings = [
        "device",
        "preset",
        *([kind] if kind else []),
        "batch",
        "layout",
        "eager",
        "torch.compile",
        "lsgm_fast",
    ]
    headings += ["eager / lsgm_fast", "compile / lsgm_fast"]
    return finished(headings, rows, 3 if kind else 2, note, used)


def score(found: Sequence[Record]) -> str:
    """Whole evaluations of the score network."""
    note = "Milliseconds per evaluation of the batch, medians; ratios are medians over the rounds. Random weights."
    return _forward(found, "score", None, note)


def decoding(found: Sequence[Record]) -> str:
    """Latents to images."""
    note = "Milliseconds per batch, medians; ratios are medians over the rounds. `bn`: running or batch statistics."
    return _forward(found, "decode", "bn", f"{note} Random weights.")


def _training_pairs(found: Sequence[Record]) -> list[tuple[Record, dict[str, Case]]]:
    """Training steps: the record and its cases by backend; a row has the cases of one record, those of one run."""

    def same(parameters: dict[str, Any]) -> Any:
        return tuple(sorted((k, str(v)) for k, v in identity(parameters).items() if k != "backend"))

    groups: dict[Any, tuple[Record, dict[str, Case]]] = {}
    for record in sorted((r for r in found if r.program == "train"), key=lambda r: r.date):
        of_record: dict[Any, dict[str, Case]] = {}
        for case in record.cases.values():
            of_record.setdefault(same(case.parameters), {})[case.parameters.get("backend") or "auto"] = case
        groups |= {(record.machine, row): (record, cases) for row, cases in of_record.items()}
    return sorted(groups.values(), key=lambda group: (group[0].devices, group[0].machine))


def _figures(cases: dict[str, Case], place: str) -> tuple[float | None, float | None]:
    plain, ours = (cases.get(backend) for backend in ("reference", "auto"))
    return (
        None if plain is None else number(plain.figures.get(place)),
        None if ours is None else number(ours.figures.get(place)),
    )


def training(found: Sequence[Record]) -> str:
    """Training steps, on plain PyTorch and with what the dispatcher takes."""
    rows: list[list[str]] = []
    used: list[Record] = []
    for record, cases in _training_pairs(found):
        p = next(iter(cases.values())).parameters
        setting = [p["precision"], *(name for name in ("recompute", "channels_last") if p[name])]
        cells = [device(record), p["recipe"], p["step"], " ".join(setting), str(p["batch"])]
        for place, scale in (("step", 1e3), ("peak_memory", 1 / 2**20)):
            plain, ours = _figures(cases, place)
            cells += [MISSING if value is None else significant(value * scale) for value in (plain, ours)]
            cells.append(MISSING if plain is None or ours is None else f"{ours / plain:.2f}")
        images = _figures(cases, "images_per_second")[1]
        rows.append([*cells, MISSING if images is None else significant(images)])
        used.append(record)
    headings = ["device", "recipe", "step", "setting", "batch", "eager, ms", "lsgm_fast, ms", "ratio"]
    headings += ["eager, MiB", "lsgm_fast, MiB", "ratio", "images/s"]
    note = (
        "Medians; ratio: lsgm_fast / eager, below 1 is less; MiB: peak memory with weights, gradients and optimizer; "
        "images/s: lsgm_fast. Random images."
    )
    return finished(headings, rows, 4, note, used)


def operation_names() -> dict[str, bool]:
    """The operations with a fused kernel, and whether one of these runs on a CPU."""
    from benchmarks.ops import default_ops
    from lsgm_fast.dispatch import REGISTRY

    return {name: "cpu" in REGISTRY[name].backends() for name in default_ops()}


def _operation_groups(found: Sequence[Record]) -> dict[tuple[str, str, str], list[tuple[Case, Record]]]:
    """The cases of every device, operation and kernel."""
    groups: dict[tuple[str, str, str], list[tuple[Case, Record]]] = {}
    for case, record in newest(found, "ops"):
        p = case.parameters
        if p["case"] in ("dispatch overhead", "ladder"):
            continue
        backends = {place.split(".")[0] for place in case.figures if place.endswith(".time_over_reference")}
        for backend in sorted(backends - {"compile"}):
            groups.setdefault((device(record), p["op"], backend), []).append((case, record))
    return groups


def _ratios(members: Sequence[tuple[Case, Record]], place: str) -> list[float]:
    values = (number(case.figures.get(place)) for case, _ in members)
    return [value for value in values if value is not None]


def operations(found: Sequence[Record]) -> str:
    """Single operations: time over ``torch.compile`` and over the eager reference, over all cases."""
    groups = _operation_groups(found)
    rows: dict[tuple[str, str, str], list[str]] = {}
    for (name, op, backend), members in groups.items():
        cells = []
        for other in ("compile", "reference"):
            known = _ratios(members, f"{backend}.time_over_{other}")
            cells += [f"{statistics.median(known):.2f}", f"{max(known):.2f}"] if known else [MISSING, MISSING]
        rows[name, op, backend] = [name, f"`{op}`", backend, str(len(members)), *cells]
    timed = {op for _, op, backend in groups if backend == "cpu"}
    rows |= {
        ("CPU", op, "cpu"): ["CPU", f"`{op}`", "cpu", "0", *[MISSING] * 4]
        for op, has_kernel in operation_names().items()
        if has_kernel and op not in timed
    }
    headings = ["device", "operation", "kernel", "cases", "of torch.compile", "worst", "of eager", "worst"]
    note = (
        "Time of the kernel over that of `torch.compile` of the reference, and over the eager reference: the median "
        "and the worst (largest) over the cases, each a median over rounds. Below 1 the kernel is faster. A case is a "
        "shape, dtype, layout, and with or without gradients."
    )
    used = [record for members in groups.values() for _, record in members]
    in_order = [rows[key] for key in sorted(rows, key=lambda key: (key[1], *key))]
    return finished(headings, in_order, 3, note, used)


def solver(found: Sequence[Record]) -> str:
    """What an ODE solve costs beside the network."""
    rows: list[list[str]] = []
    used: list[Record] = []
    for case, record in newest(found, "solver"):
        p = case.parameters
        text = [device(record), p["preset"], str(p["batch"]), "x".join(map(str, p["shape"][1:]))]
        times = [scaled(case, f"{name}.per_evaluation", 1e3) for name in ("scipy", "rk45")]
        share = number(case.figures.get("share"))
        cells = [*times, scaled(case, "scipy_over_rk45"), MISSING if share is None else f"{share:.2%}"]
        rows.append([*text, *cells])
        used.append(record)
    headings = ["device", "preset", "batch", "latents", "SciPy", "rk45", "SciPy / rk45", "share of a sample"]
    note = (
        "Milliseconds per evaluation for everything of an adaptive solve that is not the network, medians: on the "
        "published path through SciPy and with `rk45`. Share: of `rk45` in an evaluation with the network."
    )
    return finished(headings, rows, 2, note, used)


# -- in short -------------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> str:
    low, high = significant(min(values)), significant(max(values))
    return low if low == high else f"{low} to {high}"


def summary(found: Sequence[Record]) -> str:
    """A line per subject for the front page: how many times as long the baseline takes."""
    # By (device, subject, baseline): ratios, of which one is of one model or operation, and their records.
    lines: dict[tuple[str, str, str], list[tuple[float, Record]]] = {}

    def add(record: Record, subject: str, against: str, ratio: float | None) -> None:
        if ratio is not None:
            lines.setdefault((device(record), subject, against), []).append((ratio, record))

    for case, record in newest(found, "solver"):
        add(record, "solver beside the network", "SciPy", number(case.figures.get("scipy_over_rk45")))
    for program, subject in (("score", "an evaluation of the score network"), ("decode", "decoding")):
        for case, record in newest(found, program, _but_compile):
            for place, against in (("reference_over_auto", "eager"), ("compile_over_auto", "torch.compile")):
                add(record, subject, against, number(case.figures.get(place)))
    for record, cases in _training_pairs(found):
        plain, ours = _figures(cases, "step")
        add(record, "a training step", "eager", None if plain is None or ours is None else plain / ours)
    for (_, _, backend), members in _operation_groups(found).items():
        for other, against in (("reference", "eager"), ("compile", "torch.compile")):
            if known := _ratios(members, f"{backend}.time_over_{other}"):
                add(members[-1][1], "an operation", against, 1.0 / statistics.median(known))
    rows = [
        [name, subject, against, _spread([ratio for ratio, _ in members]), str(len(members))]
        for (name, subject, against), members in sorted(lines.items())
    ]
    note = (
        "How many times as long the baseline takes: the range of the medians over presets, settings or operations; "
        "below 1 lsgm_fast is slower."
    )
    used = [record for members in lines.values() for _, record in members]
    return finished(["device", "what", "against", "times as long", "number"], rows, 3, note, used)


BLOCKS: dict[str, Callable[[Sequence[Record]], str]] = {
    "summary": summary,
    "score": score,
    "decoding": decoding,
    "training": training,
    "operations": operations,
    "solver": solver,
}
