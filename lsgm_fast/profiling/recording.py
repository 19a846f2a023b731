"""A workload under PyTorch's profiler: a trace for Perfetto and Chrome, and what took longest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lsgm_fast import trace
from lsgm_fast.files import atomic_path


@dataclass(frozen=True)
class Row:
    """Calls of one name: how many, their seconds, and the share of the profiled time."""

    name: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Recording:
    """A profile. Ranges hold each other, so their shares add up to more than 1; those of ``busiest``, PyTorch's own
    operations (on CUDA: kernels) without what they call, do not."""

    trace: Path
    seconds: float
    ranges: list[Row]
    busiest: list[Row]

    def report(self) -> dict[str, Any]:
        """All of it as JSON."""
        rows = {name: [asdict(row) for row in getattr(self, name)] for name in ("ranges", "busiest")}
        return {"trace": str(self.trace), "seconds": self.seconds} | rows


def record(run: Callable[[], object], path: Path, *, device: str, repeat: int = 1) -> Recording:
    """Run it ``repeat`` times under PyTorch's profiler, with ranges, and write the trace (JSON) to ``path``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with trace.written() as spans, torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeat):
            run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
    with atomic_path(path, make_folders=True) as temporary:
        profiler.export_chrome_trace(str(temporary))
        content = json.loads(temporary.read_text())
        _describe(content["traceEvents"], spans)
        temporary.write_text(json.dumps(content))
    return summarise(content["traceEvents"], path)


def _describe(events: list[dict[str, Any]], spans: list[tuple[str, dict[str, Any]]]) -> None:
    """Put the ranges' numbers, which PyTorch's profiler has no place for, into the events that stand for them."""
    names = {name for name, _ in spans}
    found = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in names]
    found.sort(key=lambda event: (event["ts"], -event["dur"]))
    mine = [event for event in found if event["tid"] == found[0]["tid"]]
    if [event["name"] for event in mine] != [name for name, _ in spans]:
        # Some began before the profiler or were lost: better no numbers than those of another range.
        return
    for event, (_, payload) in zip(mine, spans, strict=True):
        event.setdefault("args", {}).update(payload)


def summarise(events: list[dict[str, Any]], path: Path, longest: int = 15) -> Recording:
    """The tables of a trace."""
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    spans = [event for event in timed if event.get("cat") == "user_annotation" and _is_range(event["name"])]
    end = max((event["ts"] + event["dur"] for event in spans), default=0.0)
    seconds = (end - min((event["ts"] for event in spans), default=0.0)) / 1e6
    kernels = [event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        busy = [(event["name"], event["dur"]) for event in kernels]
    else:
        busy = _own_times([event for event in timed if event.get("cat") == "cpu_op"])
    return Recording(
        path,
        seconds,
        _rows([(event["name"], event["dur"]) for event in spans], seconds),
        _rows(busy, seconds)[:longest],
    )


def _is_range(name: str) -> bool:
    from lsgm_fast.dispatch import REGISTRY

    return name in trace.RANGES or name.partition(".")[0] in REGISTRY


def _own_times(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(name, time without that of the events inside) of events that hold each other, per thread."""
    open_: dict[Any, list[int]] = {}
    own = [float(event["dur"]) for event in events]
    order = sorted(range(len(events)), key=lambda i: (events[i]["ts"], -events[i]["dur"]))
    for i in order:
        event = events[i]
        around = open_.setdefault(event["tid"], [])
        while around and events[around[-1]]["ts"] + events[around[-1]]["dur"] <= event["ts"]:
            around.pop()
        if around:
            own[around[-1]] -= event["dur"]
        around.append(i)
    return [(event["name"], time) for event, time in zip(events, own, strict=True)]


def _rows(timed: list[tuple[str, float]], seconds: float) -> list[Row]:
    total: dict[str, list[float]] = {}
    for name, microseconds in timed:
        total.setdefault(name, []).append(microseconds / 1e6)
    rows = [
        Row(name, len(of), sum(of), sum(of) / seconds if seconds > 0.0 else 0.0) for name, of in total.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)
