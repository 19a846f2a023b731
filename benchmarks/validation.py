"""The parts of ``benchmarks/gpu/validate.sh`` that time nothing: the machine's record, the test suite, exit statuses.

``env`` and ``status`` keep ``<out>/<machine>/validate.json``; ``tests`` writes ``tests.json`` beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import measure

TAIL_LINES = 60
OUT_OF_TIME_EXIT = 124


def _path(out: Path, device: str, name: str) -> Path:
    return out / measure.machine_name(device) / name


def _update(path: Path, **changes: Any) -> dict[str, Any]:
    """Change entries of the summary; a file that is no summary of this schema is replaced."""
    summary: dict[str, Any] = {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("schema") == measure.SCHEMA:
            summary = found
    except (OSError, ValueError):
        pass
    summary = {"schema": measure.SCHEMA, "parts": {}, **summary, **changes}
    measure.write_json(path, summary)
    return summary


def record_environment(out: Path, device: str, *, dry_run: bool, commit: str | None) -> int:
    """Write and print hardware, versions, commit, clocks and load."""
    state = measure.read_state()
    reasons = measure.busy_because(state)
    described = measure.environment(commit)
    _update(
        _path(out, device, "validate.json"),
        date=measure.now(),
        dry_run=dry_run,
        environment=described,
        machine=asdict(state),
        idle=not reasons,
        not_idle_because=reasons,
    )
    print(json.dumps({**described, "idle": not reasons, "not_idle_because": reasons}, indent=1))
    print(json.dumps(asdict(state), indent=1))
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device is usable here", file=sys.stderr)
            return 1
    return 0


def record_status(
    out: Path, device: str, *, part: str, status: int, seconds: float, dry_run: bool, commit: str | None
) -> int:
    """Note how a part ended."""
    path = _path(out, device, "validate.json")
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        parts = {}
    sha = commit or measure._git("rev-parse", "HEAD")
    parts[part] = {
        "exit_status": status,
        "seconds": seconds,
        "date": measure.now(),
        "commit": sha,
        "dry_run": dry_run,
    }
    _update(path, parts=parts)
    return 0


def _without_folders(line: str) -> str:
    """The line without the places where things lie on this machine."""
    for folder, name in ((str(measure.ROOT), "."), (sys.prefix, "<python>"), (str(Path.home()), "~")):
        if folder != "/":
            line = line.replace(folder, name)
    return line


def _junit(path: Path) -> dict[str, Any]:
    """Counts, names of failed tests and reasons of skipped ones, from pytest's XML."""
    counts: Counter[str] = Counter()
    failed, skipped = [], Counter[str]()
    for case in ET.parse(path).iter("testcase"):
        outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
        if outcomes & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in outcomes:
            counts["skipped"] += 1
            reason = case.find("skipped")
            assert reason is not None
            skipped[_without_folders(reason.get("message") or "")] += 1
        else:
            counts["passed"] += 1
    return {"counts": dict(counts), "failed": failed, "skipped_because": dict(skipped)}


def _in_parallel() -> list[str]:
    """Arguments that spread the suite over the cores where pytest-xdist is at hand: one process takes too long."""
    cores = (os.cpu_count() or 1) - 2
    return ["-n", str(cores)] if cores > 1 and importlib.util.find_spec("xdist") else []


def run_tests(
    out: Path, device: str, *, seconds: float, dry_run: bool, commit: str | None, pytest_args: Sequence[str]
) -> int:
    """Run the suite within ``seconds`` and write ``tests.json``; a dry run only collects it."""
    arguments = [
        "-p",
        "no:cacheprovider",
        "-q",
        "-ra",
        *(["--collect-only"] if dry_run else _in_parallel()),
        *pytest_args,
    ]
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}"],
            cwd=measure.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Where this runs in the background of a shell, interrupts are ignored, and would be by pytest.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        ended_by_us = threading.Event()

        def stop() -> None:
            ended_by_us.set()
            # An interrupt, not a termination: pytest then still says what failed until now, and writes its report.
            process.send_signal(signal.SIGINT)
            last = threading.Timer(30.0, process.kill)
            last.daemon = True
            last.start()

        timer = threading.Timer(seconds, stop)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                tail.append(_without_folders(line.rstrip("\n")))
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
        outcome = _junit(report) if report.exists() and not dry_run else None
    if ended_by_us.is_set():
        status = OUT_OF_TIME_EXIT
    measure.write_json(
        _path(out, device, "tests.json"),
        {
            "schema": measure.SCHEMA,
            "name": "tests",
            "date": measure.now(),
            "command": " ".join(["python3", "-m", "pytest", *arguments]),
            "dry_run": dry_run,
            "environment": measure.environment(commit),
            "exit_status": status,
            "out_of_time": ended_by_us.is_set(),
            "seconds": time.perf_counter() - started,
            # Null where pytest was only collected or killed. Out of time, tests that were interrupted count as passed.
            "outcome": outcome,
            "tail": list(tail),
        },
    )
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.validation", description=__doc__.split("\n")[0]
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=measure.RESULTS, help="folder that holds <machine>/")
    common.add_argument("--device", default="cuda", help="cuda (default) or cpu: names the machine's folder")
    common.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    common.add_argument("--commit", help="commit to record in place of what git says")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("env", parents=[common], help="hardware, versions, commit, clocks, load")
    tests = commands.add_parser("tests", parents=[common], help="the test suite")
    tests.add_argument("--budget", type=float, default=420.0, help="seconds")
    tests.add_argument("pytest_args", nargs="*", help="further arguments of pytest, after --")
    status = commands.add_parser("status", parents=[common], help="note how a part ended")
    status.add_argument("--part", required=True)
    status.add_argument("--exit-status", type=int, required=True)
    status.add_argument("--seconds", type=float, required=True)
    o = parser.parse_args(arguments)
    if o.what == "env":
        return record_environment(o.out, o.device, dry_run=o.dry_run, commit=o.commit)
    if o.what == "tests":
        return run_tests(
            o.out,
            o.device,
            seconds=o.budget,
            dry_run=o.dry_run,
            commit=o.commit,
            pytest_args=o.pytest_args,
        )
    return record_status(
        o.out,
        o.device,
        part=o.part,
        status=o.exit_status,
        seconds=o.seconds,
        dry_run=o.dry_run,
        commit=o.commit,
    )


if __name__ == "__main__":
    sys.exit(main())
