"""Records of made-up timings, for the tests of what is done with records."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402


def spread(seconds: float, noise: float = 0.02, n: int = 5) -> list[float]:
    """``n`` values around ``seconds``, evenly within ``noise`` of it."""
    return [seconds * (1.0 + noise * (2.0 * i / (n - 1) - 1.0)) for i in range(n)]


def case(parameters: dict[str, Any], figures: dict[str, Any], failures: Sequence[str] = ()) -> dict[str, Any]:
    return {"parameters": parameters, "backends": {}, "failures": list(failures), "figures": figures}


def op_case(
    seconds: float, *, noise: float = 0.02, reference: float = 1e-3, op: str = "mixed_score", **more: Any
) -> dict[str, Any]:
    """A case as of ``benchmarks.ops``; ``more`` are further parameters."""
    parameters = {"op": op, "case": "mnist", "shape": [16, 4], "dtype": "float32", "layout": "contiguous"}
    parameters |= {"mode": "forward", "device": "cpu", "buffers": 7} | more
    times = spread(seconds, noise)
    figures = {
        "reference": {"time": measure.measured(spread(reference, noise), "s/call")},
        "cpu": {
            "time": measure.measured(times, "s/call"),
            "bandwidth": measure.measured([1e-3 / s for s in times], "GB/s"),
            "time_over_reference": measure.measured([s / reference for s in times], "ratio"),
        },
        "compile": measure.not_measured("not asked for (--no-compile)"),
    }
    return case(parameters, figures)


def record(
    cases: Sequence[dict[str, Any]],
    *,
    program: str = "ops",
    name: str | None = None,
    date: str = "2026-01-02T03:04:05+00:00",
    sha: str = "a" * 40,
    cpu: str = "Some CPU",
    gpus: Sequence[str] = (),
    threads: int = 2,
    not_idle: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """A valid record."""
    made = {
        "schema": measure.SCHEMA,
        "name": name or program,
        "date": date,
        "command": f"python3 -m benchmarks.{program}",
        "dry_run": dry_run,
        "idle": not not_idle,
        "not_idle_because": list(not_idle),
        "forced": bool(not_idle),
        "machine_before": {},
        "machine_during": {},
        "machine_after": {},
        "environment": {
            "hardware": {
                "cpu": cpu,
                "logical_cores": 2,
                "gpus": [{"name": name} for name in gpus],
                "no_gpu_because": None,
                "memory_mib": 1,
            },
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
            "platform": "Linux",
            "commit": {"sha": sha, "source": "git", "dirty": False, "source_sha256": "0"},
            "variables": {},
        },
        "settings": {"threads": threads},
        "cases": list(cases),
        "left_out": [],
        "complete": True,
    }
    measure.check_record(made)
    return made


def write(folder: Path, made: dict[str, Any], name: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or made['name']}.json"
    path.write_text(json.dumps(made))
    return path
