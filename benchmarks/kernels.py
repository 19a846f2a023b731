"""Validate every fused kernel on a device: against float64 over all sample inputs, and under compute-sanitizer.

Writes ``<out>/<machine>/kernels.json``: per operation and backend the hash of the sources that were validated, how many
samples ran, which failed and why. ``lsgm-fast info`` reads these records and says what has changed since.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import measure
from lsgm_fast import dispatch, native, ops, testing

SANITIZED_BACKENDS = ("cuda", "triton")
MAX_FAILURES = 5


def fused_backends(op_name: str) -> list[str]:
    """Backends of an operation besides the reference."""
    return [backend for backend in dispatch.REGISTRY[op_name].backends() if backend != "reference"]


def validate(op_name: str, backend: str, device: str, budget: measure.Budget) -> dict[str, Any]:
    """Run one kernel over all samples that it supports; the record of what happened."""
    entry: dict[str, Any] = {
        "op": op_name,
        "backend": backend,
        "source_hash": native.source_hash(op_name),
        "passed": 0,
        "unsupported": 0,
        "failures": [],
        "unavailable": None,
        "left_out": 0,
    }
    found = testing.samples(op_name, device)
    for index, sample in enumerate(found):
        if budget.remaining() <= 0:
            entry["left_out"] = len(found) - index
            break
        if testing.unsupported(op_name, backend, sample):
            entry["unsupported"] += 1
            continue
        try:
            testing.check_forward(op_name, backend, sample)
            if testing.has_gradients(op_name, backend, sample):
                testing.check_backward(op_name, backend, sample)
            entry["passed"] += 1
        except Exception as error:
            # A kernel may fail in any way; the record has to say so for this one and go on with the next.
            if len(entry["failures"]) < MAX_FAILURES:
                entry["failures"].append(f"{sample.id}: {type(error).__name__}: {error}")
            else:
                entry["failures"][-1] = "and further samples"
    if entry["passed"] == 0 and not entry["failures"]:
        reasons = {reason for sample in found[:1] for reason in testing.unsupported(op_name, backend, sample)}
        entry["unavailable"] = "; ".join(sorted(reasons)) or "no sample was run"
    return entry


def sanitize(op_name: str, backend: str, seconds: float) -> dict[str, Any]:
    """Run the self-test's inputs under compute-sanitizer's memcheck; CUDA only."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    command = [
        program,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "benchmarks.kernels",
    ]
    command += ["--one", op_name, backend]
    try:
        done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"ran": False, "why": f"not finished within {seconds:.0f} s"}
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return {"ran": True, "clean": done.returncode == 0, "tail": lines[-8:]}


def run_one(op_name: str, backend: str) -> None:
    """What runs under the sanitizer: forward and backward of one kernel on the self-test's inputs."""
    for sample in testing.selftest_sample(op_name, "cuda"):
        testing.check_forward(op_name, backend, sample)
        if testing.has_gradients(op_name, backend, sample):
            testing.check_backward(op_name, backend, sample)


def run(out: Path, device: str, *, seconds: float, dry_run: bool, commit: str | None) -> int:
    """Validate everything within ``seconds``, write the record; 0 where nothing failed."""
    budget = measure.Budget(seconds)
    entries = []
    for op_name in ops.__all__:
        for backend in fused_backends(op_name):
            entry = validate(op_name, backend, device, budget)
            entries.append(entry)
            print(summary(entry), flush=True)
    sanitized = [e for e in entries if e["passed"] and e["backend"] in SANITIZED_BACKENDS]
    if sanitized and device.startswith("cuda"):
        # Mostly Python's start and checked host calls, so as many at a time as there are cores to spare.
        limit = max(60.0, budget.remaining())
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
            states = pool.map(lambda e: sanitize(e["op"], e["backend"], limit), sanitized)
            for entry, entry["sanitizer"] in zip(sanitized, states, strict=True):
                print(summary(entry), flush=True)
    record = {
        "schema": measure.SCHEMA,
        "name": "kernels",
        "date": measure.now(),
        "dry_run": dry_run,
        "device": device,
        "environment": measure.environment(commit),
        "kernels": entries,
    }
    measure.write_json(out / measure.machine_name(device) / "kernels.json", record)
    failed = [e for e in entries if e["failures"] or not e.get("sanitizer", {}).get("clean", True)]
    return 1 if failed else 0


def summary(entry: dict[str, Any]) -> str:
    """One line for a person."""
    name = f"{entry['op']:<24} {entry['backend']:<8}"
    if entry["unavailable"]:
        return f"{name} not run: {entry['unavailable']}"
    text = f"{name} {entry['passed']} samples passed, {entry['unsupported']} not supported"
    if entry["left_out"]:
        text += f", {entry['left_out']} left out (out of time)"
    if entry["failures"]:
        text += f"; {len(entry['failures'])} FAILED: {entry['failures'][0]}"
    if "sanitizer" in entry:
        state = entry["sanitizer"]
        text += "; sanitizer " + (
            ("clean" if state["clean"] else "found errors") if state["ran"] else state["why"]
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder that holds <machine>/")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds")
    parser.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    parser.add_argument("--commit", help="commit to record in place of what git says")
    parser.add_argument(
        "--one", nargs=2, metavar=("OP", "BACKEND"), help="run one kernel only, write nothing"
    )
    o = parser.parse_args(arguments)
    if o.one:
        run_one(*o.one)
        return 0
    return run(
        measure.results_folder(o.out, o.dry_run),
        o.device,
        seconds=o.budget,
        dry_run=o.dry_run,
        commit=o.commit,
    )


if __name__ == "__main__":
    sys.exit(main())
