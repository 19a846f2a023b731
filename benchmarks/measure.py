"""What every benchmark shares: timing, quantiles, the idle check, the record of the machine, and writing JSON.

A *figure* is a dictionary whose ``kind`` says where the number comes from, so that nobody mistakes one for another:

================  ==================================================================================================
``measured``      taken on this machine in this run: ``unit``, ``n``, ``values``, ``median``, ``q20``, ``q80``
``extrapolated``  computed from measured and quoted figures: ``unit``, ``value``, ``how``
``quoted``        somebody else's: ``unit``, ``value``, ``source``
``not_measured``  no number, only ``reason``
================  ==================================================================================================

Numbers of a record's ``cases`` stand inside such figures or under ``parameters``; :func:`check_record` enforces it
and :func:`write_json` writes nothing that fails it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def results_folder(out: Path | None, dry_run: bool) -> Path:
    """Where records go: the folder asked for, else the results; a trial stays out of those (git ignores its folder)."""
    if out is not None:
        return out
    return RESULTS / "dry-run" if dry_run else RESULTS


QUANTILES = (0.2, 0.5, 0.8)
FEWEST_FOR_QUANTILES = 3

# Above this share of the cores (and this many cores) in use by others, a machine counts as busy.
BUSY_SHARE = 0.1
BUSY_CORES = 0.5
BUSY_GPU_PERCENT = 5

# Where code lies that a timing depends on; their hash identifies it where there is no git.
SOURCES = ("lsgm_fast", "kernels", "csrc", "benchmarks")
SOURCE_SUFFIXES = (".py", ".cpp", ".cc", ".cu", ".cuh", ".h", ".hpp")

OUT_OF_TIME = "the time budget"
BUSY_EXIT = 3  # exit status of a program that refuses a busy machine

T = TypeVar("T")
Figure = dict[str, Any]


class MachineBusy(RuntimeError):
    """Others use this machine, so it is not timed unless forced."""


class OutOfTime(Exception):
    """The time budget is used up; what was not measured is marked as left out."""


# -- time -----------------------------------------------------------------------------------------------------------


class Budget:
    """A limit in seconds from now; ``check()`` raises :class:`OutOfTime` behind it."""

    def __init__(self, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"the time budget must be a positive number of seconds, got {seconds}")
        self.seconds = float(seconds)
        self._end = time.perf_counter() + seconds

    def remaining(self) -> float:
        """Seconds left, negative behind the end."""
        return self._end - time.perf_counter()

    def check(self, needed: float = 0.0) -> None:
        """Raise where fewer than ``needed`` seconds are left."""
        if self.remaining() <= needed:
            raise OutOfTime(f"{OUT_OF_TIME} of {self.seconds:g} s is used up")


def synchronize(device: str) -> None:
    """Wait for all work queued on ``device`` (``"cpu"``: nothing to wait for)."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def repeat(
    run: Callable[[], T], *, warmup: int, fewest: int, most: int, seconds: float, budget: Budget
) -> list[T]:
    """Call ``run`` ``warmup`` times for nothing, then ``fewest`` to ``most`` times, and return what those returned.

    Stops after ``fewest`` once ``seconds`` have gone by, and warms up only once where one run takes a tenth of
    them. ``run`` times itself. Where the budget ends early, the finished repeats are returned: at least one.

    Raises:
        OutOfTime: not even one repeat was finished.
    """
    started = time.perf_counter()
    for done in range(warmup):
        if done and time.perf_counter() - started > seconds / 10:
            break
        run()
    out: list[T] = []
    while len(out) < most:
        before = time.perf_counter()
        if len(out) >= fewest and before - started > seconds:
            break
        try:
            budget.check()
            out.append(run())
        except OutOfTime:
            if not out:
                raise
            break
    return out


# -- figures --------------------------------------------------------------------------------------------------------


def measured(values: Iterable[float], unit: str) -> Figure:
    """A figure from repeats: median and 20/80 quantiles (linear interpolation; null below 3 repeats)."""
    values = [float(v) for v in values]
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"a measured figure needs finite values, got {values}")
    low, median, high = (float(q) for q in np.quantile(values, QUANTILES))
    enough = len(values) >= FEWEST_FOR_QUANTILES
    return {
        "kind": "measured",
        "unit": unit,
        "n": len(values),
        "median": median,
        "q20": low if enough else None,
        "q80": high if enough else None,
        "values": values,
    }


def extrapolated(value: float, unit: str, how: str) -> Figure:
    """A figure computed from others; ``how`` names them and the formula."""
    return {"kind": "extrapolated", "unit": unit, "value": float(value), "how": how}


def quoted(value: float, unit: str, source: str) -> Figure:
    """Somebody else's figure with its source."""
    return {"kind": "quoted", "unit": unit, "value": float(value), "source": source}


def not_measured(reason: str) -> Figure:
    """The mark of a figure that is missing, with the reason."""
    return {"kind": "not_measured", "reason": reason}


_FIGURE_KEYS = {
    "measured": {"kind", "unit", "n", "median", "q20", "q80", "values"},
    "extrapolated": {"kind", "unit", "value", "how"},
    "quoted": {"kind", "unit", "value", "source"},
    "not_measured": {"kind", "reason"},
}
_RECORD_KEYS = {
    "schema",
    "name",
    "date",
    "command",
    "idle",
    "not_idle_because",
    "forced",
    "dry_run",
    "environment",
    "machine_before",
    "machine_after",
    "machine_during",
    "settings",
    "cases",
    "left_out",
    "complete",
}


def _check_figures(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a number must stand in a figure that says its kind, got {value!r}")
    if "kind" not in value:
        for key, inner in value.items():
            _check_figures(inner, f"{where}.{key}")
        return
    kind = value["kind"]
    if kind not in _FIGURE_KEYS:
        raise ValueError(
            f"{where}: unknown kind of figure {kind!r}, expected one of {', '.join(_FIGURE_KEYS)}"
        )
    if set(value) != _FIGURE_KEYS[kind]:
        raise ValueError(f"{where}: a {kind} figure has {sorted(_FIGURE_KEYS[kind])}, got {sorted(value)}")
    if kind == "measured" and value["n"] != len(value["values"]):
        raise ValueError(f"{where}: n = {value['n']}, but {len(value['values'])} values")
    for text in {"how", "source", "reason"} & set(value):
        if not value[text]:
            raise ValueError(f"{where}: a {kind} figure needs {text!r}")


def check_record(record: dict[str, Any]) -> None:
    """Check a benchmark record against the schema of ``benchmarks/README.md``.

    Raises:
        ValueError: a missing or unknown key; a number in ``cases[].figures`` that is not inside a figure; an
            unmeasured figure that carries one; ``idle`` that contradicts its reasons.
    """
    if set(record) != _RECORD_KEYS:
        missing, unknown = sorted(_RECORD_KEYS - set(record)), sorted(set(record) - _RECORD_KEYS)
        raise ValueError(f"benchmark record: missing {missing}, unknown {unknown}")
    if record["schema"] != SCHEMA:
        raise ValueError(f"benchmark record of schema {record['schema']!r}, expected {SCHEMA}")
    if record["idle"] is not (not record["not_idle_because"]):
        raise ValueError(
            f"idle is {record['idle']!r}, but not_idle_because is {record['not_idle_because']!r}"
        )
    if record["complete"] is not (not record["left_out"]):
        raise ValueError(f"complete is {record['complete']!r}, but left_out is {record['left_out']!r}")
    for index, case in enumerate(record["cases"]):
        if set(case) != {"parameters", "backends", "failures", "figures"}:
            raise ValueError(f"cases[{index}] has the keys {sorted(case)}")
        _check_figures(case["figures"], f"cases[{index}].figures")


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# -- the machine ----------------------------------------------------------------------------------------------------


def _smi(*arguments: str) -> list[list[str]] | None:
    """Rows of an ``nvidia-smi`` query; None where it is missing or refuses."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode != 0:
        return None
    return [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines() if row.strip()]


def gpu_names() -> list[str]:
    """Names of the GPUs, from the driver; no CUDA call is made."""
    return [row[0] for row in _smi("--query-gpu=name") or []]


def _cpu_model() -> str:
    from lsgm_fast.info import cpu_model

    return cpu_model()


def machine_name(device: str) -> str:
    """Folder name of this machine's results: the GPU's name, or for the CPU its model, in [a-z0-9-]."""
    names: list[str] = []
    if device.startswith("cuda"):
        names = gpu_names()
        if not names:
            import torch

            names = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    text = names[0] if names else _cpu_model()
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown-machine"


_GPU_STATE = (
    "utilization.gpu",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "pstate",
)


@dataclass(frozen=True)
class MachineState:
    """How busy the machine is.

    ``others_cores`` / ``stolen_cores``: CPU cores in use by other processes, and taken away by a hypervisor, averaged
    over ``sampled_seconds``; None where the system does not tell. ``gpus``: the driver's view of every GPU;
    ``gpu_processes``: other processes on a GPU (None: the driver does not tell, or there is no GPU).
    """

    sampled_seconds: float
    logical_cores: int
    load_average: tuple[float, float, float] | None
    others_cores: float | None
    stolen_cores: float | None
    gpus: list[dict[str, str]] = field(default_factory=list)
    gpu_processes: list[dict[str, str]] | None = None


@dataclass(frozen=True)
class _Ticks:
    """CPU seconds of the machine (busy, stolen) and of this process with its finished children, and the clock."""

    busy: float | None
    stolen: float | None
    own: float
    clock: float


def _ticks() -> _Ticks:
    spent = os.times()
    own = spent.user + spent.system + spent.children_user + spent.children_system
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
        per_second = os.sysconf("SC_CLK_TCK")
        # user nice system idle iowait irq softirq steal; all zero where a sandbox keeps no account.
        n = [int(x) / per_second for x in first[1:9]]
        if not any(n):
            raise ValueError("no account of CPU time")
        return _Ticks(n[0] + n[1] + n[2] + n[5] + n[6], n[7], own, time.perf_counter())
    except (OSError, ValueError, IndexError):
        return _Ticks(None, None, own, time.perf_counter())


def _load_average() -> tuple[float, float, float] | None:
    try:
        return os.getloadavg()
    except OSError:
        return None


def _gpu_processes(holds_context: bool) -> list[dict[str, str]] | None:
    rows = _smi("--query-compute-apps=pid,process_name,used_memory")
    if rows is None:
        return None
    # A process's folder is nobody's business in a record that is published.
    found = [{"pid": r[0], "name": os.path.basename(r[1]), "memory_mib": r[2]} for r in rows if len(r) == 3]
    others = [p for p in found if p["pid"] != str(os.getpid())]
    if holds_context and len(others) == len(found) > 0:
        others = others[1:]  # in a container the driver may know this process by another number
    return others


def _state_since(start: _Ticks, holds_context: bool) -> MachineState:
    now = _ticks()
    elapsed = max(now.clock - start.clock, 1e-9)
    others = stolen = None
    if None not in (start.busy, start.stolen, now.busy, now.stolen):
        assert now.busy is not None and now.stolen is not None  # for the type checker
        assert start.busy is not None and start.stolen is not None
        others = max(0.0, (now.busy - start.busy - (now.own - start.own)) / elapsed)
        stolen = max(0.0, (now.stolen - start.stolen) / elapsed)
    rows = _smi("--query-gpu=" + ",".join(_GPU_STATE))
    return MachineState(
        sampled_seconds=round(elapsed, 3),
        logical_cores=os.cpu_count() or 1,
        load_average=_load_average(),
        others_cores=others,
        stolen_cores=stolen,
        gpus=[dict(zip(_GPU_STATE, row, strict=False)) for row in rows or []],
        gpu_processes=_gpu_processes(holds_context),
    )


def read_state(sample_seconds: float = 2.0, *, holds_context: bool = False) -> MachineState:
    """Watch the machine for ``sample_seconds`` (this process sleeps) and say how busy others keep it.

    ``holds_context``: this process has a CUDA context, so one of the GPU's processes is its own.
    """
    start = _ticks()
    time.sleep(sample_seconds)
    return _state_since(start, holds_context)


def busy_because(state: MachineState, *, check_gpu_utilization: bool = True) -> list[str]:
    """Why a machine in that state is not idle; empty where it is.

    The CPU is judged by what others use at that moment; the load average, which still holds this program's own past,
    only where the system keeps no account of CPU time.
    """
    reasons = []
    limit = max(BUSY_CORES, BUSY_SHARE * state.logical_cores)
    if state.others_cores is not None:
        if state.others_cores > limit:
            reasons.append(
                f"other processes use {state.others_cores:.2f} of {state.logical_cores} CPU cores (limit {limit:.2f})"
            )
        if state.stolen_cores is not None and state.stolen_cores > limit:
            reasons.append(
                f"the hypervisor takes {state.stolen_cores:.2f} CPU cores away (limit {limit:.2f})"
            )
    elif state.load_average is None:
        reasons.append(
            "neither CPU accounting nor a load average can be read, so nobody knows whether it is idle"
        )
    elif state.load_average[0] > limit:
        reasons.append(f"the load average is {state.load_average[0]:.2f} (limit {limit:.2f})")
    for process in state.gpu_processes or []:
        reasons.append(f"process {process['name']} ({process['memory_mib']} MiB) is on a GPU")
    if check_gpu_utilization:
        for index, gpu in enumerate(state.gpus):
            used = gpu.get("utilization.gpu", "")
            if used.isdigit() and int(used) > BUSY_GPU_PERCENT:
                reasons.append(f"GPU {index} is {used}% busy")
    return reasons


class Watch:
    """The machine before, during and after a measurement.

    Raises:
        MachineBusy: on creation, where others use the machine and ``force`` is false.
    """

    def __init__(self, *, force: bool, sample_seconds: float = 2.0) -> None:
        self.force = force
        self.before = read_state(sample_seconds)
        self._reasons = [f"before: {reason}" for reason in busy_because(self.before)]
        if self._reasons and not force:
            raise MachineBusy(
                "this machine is not idle, and timings on it would mislead: "
                + "; ".join(self._reasons)
                + ". Wait, or pass --force to time it all the same (the record will say so)."
            )
        self._start = _ticks()

    def entries(self, sample_seconds: float) -> dict[str, Any]:
        """The record's entries about the machine; watches it for ``sample_seconds`` more."""
        holds_context = _holds_cuda_context()
        during = _state_since(self._start, holds_context)
        after = read_state(sample_seconds, holds_context=holds_context)
        # At that moment the GPU's utilisation is still this program's.
        reasons = [
            *self._reasons,
            *(f"during: {r}" for r in busy_because(during, check_gpu_utilization=False)),
            *(f"after: {r}" for r in busy_because(after, check_gpu_utilization=False)),
        ]
        return {
            "idle": not reasons,
            "not_idle_because": reasons,
            "forced": self.force,
            "machine_before": asdict(self.before),
            "machine_during": asdict(during),
            "machine_after": asdict(after),
        }


def _holds_cuda_context() -> bool:
    import torch

    return torch.cuda.is_initialized()


# -- the command line of benchmarks whose cases have processes of their own ------------------------------------------


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Where, how often and how long; ``name``: of the record."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, nargs=2, default=[5, 20], metavar=("FEWEST", "MOST"))
    parser.add_argument("--budget", type=float, default=420.0, help="seconds, then stop cleanly")
    parser.add_argument("--name", default=name, help="of the record")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--force", action="store_true", help="time on a machine that is not idle")
    parser.add_argument("--dry-run", action="store_true", help="mark the figures as a trial")
    parser.add_argument("--commit", help="in place of what git says")
    parser.add_argument("--one-case", type=Path, help=argparse.SUPPRESS)


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with what is wrong with :func:`add_options`' and ``batch`` (None: not given)."""
    import torch

    fewest, most = options.repeats
    if not 1 <= fewest <= most or (options.batch is not None and options.batch < 1):
        parser.error(
            f"expected --batch of at least 1 and --repeats FEWEST MOST with 1 <= FEWEST <= MOST, got {options.batch} "
            f"and {fewest} {most}"
        )
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is usable here: try --device cpu")


def write_cases(
    module: str,
    arguments: Sequence[str],
    options: argparse.Namespace,
    watch: Watch,
    settings: dict[str, Any],
    entries: Sequence[dict[str, Any]],
    left_out: Sequence[str],
) -> tuple[int, str]:
    """Write the record; the command's exit status, and what to say if the machine was not idle."""
    written = write_record(
        results_folder(options.out, options.dry_run),
        options.device,
        name=options.name,
        command=command_line(module, arguments),
        dry_run=options.dry_run,
        machine=watch.entries(2.0),
        environment=environment(options.commit),
        settings=settings,
        cases=entries,
        left_out=left_out,
    )
    said = "" if written["idle"] else "NOT IDLE: " + "; ".join(written["not_idle_because"])
    return (1 if any(entry["failures"] for entry in entries) else 0), said


# -- memory ---------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """What this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def largest_resident_bytes() -> int:
    """The largest resident size since the last :func:`forget_largest`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux


def forget_largest() -> None:
    """Set the largest resident size to the present one, where the kernel allows it (see ``man 5 proc``)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# -- a process of its own --------------------------------------------------------------------------------------------

# Below the minute after which validate.sh kills a part: its record is still written.
GRACE_SECONDS = 45.0


def in_own_process(module: str, task: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """What :func:`run_task` writes in ``python -m <module> --one-case FOLDER``, a process that nothing else has filled.

    It gets this process's number of threads and the budget's rest, and :data:`GRACE_SECONDS` more for what is under way
    when the budget ends. What it wrote last counts, with the reason under ``stopped`` if it came to no good end; where
    it wrote nothing, because it was killed for want of memory for instance, there is a ``failure``, as of an exception.

    Raises:
        OutOfTime: the budget ended before there was a result.
    """
    import torch

    budget.check()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = {"threads": torch.get_num_threads(), "budget": budget.remaining()}
        write_json(folder / "case.json", task | own)
        stopped = ""
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, "--one-case", name],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=budget.remaining() + GRACE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            stopped = f"{OUT_OF_TIME} of {budget.seconds:g} s is used up"
            result = {"out_of_time": stopped}
        else:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            result = {"failure": f"the process ended with status {done.returncode}: {last[0]}"}
            if done.returncode:
                stopped = result["failure"]
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text())
            if stopped:
                result["stopped"] = stopped
    if "out_of_time" in result:
        raise OutOfTime(result["out_of_time"])
    return result


def run_task(folder: Path, run: Callable[[dict[str, Any], Budget], dict[str, Any]]) -> None:
    """The other side of :func:`in_own_process`: hand the task of a folder to ``run``, and write what it returns."""
    import torch

    task = json.loads((folder / "case.json").read_text())
    torch.set_num_threads(task["threads"])
    try:
        result = run(task, Budget(task["budget"]))
    except OutOfTime as error:
        result = {"out_of_time": str(error)}
    except Exception as error:  # a case may fail for any reason, and the others go on
        result = {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}
    write_json(folder / "result.json", result)


# -- the record -----------------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str | None:
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source_hash() -> str:
    """SHA-256 over the names and contents of all source files, in order: identifies the code without git."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES and path.is_file():
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
                digest.update(path.read_bytes())
                digest.update(b"\0")
    return digest.hexdigest()


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (OSError, ValueError):
        return None


def _platform() -> str:
    """System, kernel series, architecture and C library; a kernel's full name can tell whose machine it is."""
    series = ".".join(platform.release().split(".")[:2])
    return " ".join(filter(None, (platform.system(), series, platform.machine(), *platform.libc_ver())))


def environment(stated_commit: str | None = None) -> dict[str, Any]:
    """Hardware, versions and commit, with nothing that names a person, a host or a folder.

    ``stated_commit`` is recorded in place of what git says: for a copy of the files on another machine, which may have
    no history or an older one. Where neither is known, ``sha`` is None; ``source_sha256`` identifies the code in every
    case.
    """
    import torch

    import lsgm_fast
    from lsgm_fast import info

    report = info.collect()
    commit = None if stated_commit else _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results") if commit else None
    return {
        "hardware": {
            "gpus": report["cuda"]["devices"],
            "no_gpu_because": report["cuda"]["why_none"],
            "cpu": _cpu_model(),
            "logical_cores": os.cpu_count(),
            "memory_mib": _memory_mib(),
        },
        "versions": {
            "lsgm_fast": lsgm_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
            "triton": report["triton"]["version"],
            **report["packages"],
        },
        "platform": _platform(),
        "commit": {
            "sha": stated_commit or commit,
            "source": "stated by the caller" if stated_commit else "git" if commit else "unknown",
            "dirty": None if status is None else bool(status),
            "source_sha256": source_hash(),
        },
        "variables": report["environment"],
    }


def write_record(
    folder: Path,
    device: str,
    *,
    name: str,
    command: str,
    dry_run: bool,
    machine: dict[str, Any],
    environment: dict[str, Any],
    settings: dict[str, Any],
    cases: Sequence[dict[str, Any]],
    left_out: Sequence[str] = (),
    date: str | None = None,
) -> dict[str, Any]:
    """Check a record and write ``<folder>/<machine>/<name>.json``; ``machine``: from :meth:`Watch.entries`."""
    record = {
        "schema": SCHEMA,
        "name": name,
        "date": now() if date is None else date,
        "command": command,
        "dry_run": dry_run,
        **machine,
        "environment": environment,
        "settings": settings,
        "cases": list(cases),
        "left_out": list(left_out),
        "complete": not left_out,
    }
    check_record(record)
    write_json(folder / machine_name(device) / f"{name}.json", record)
    for records in _LISTENING:
        records.append(record)
    return record


_LISTENING: list[list[dict[str, Any]]] = []


@contextlib.contextmanager
def written_records() -> Iterator[list[dict[str, Any]]]:
    """The records that :func:`write_record` writes meanwhile; of one that is written again, every state."""
    records: list[dict[str, Any]] = []
    _LISTENING.append(records)
    try:
        yield records
    finally:
        # By identity: two empty lists are equal.
        _LISTENING[:] = [other for other in _LISTENING if other is not records]


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command as anybody would type it in the repository: the output folder's place is left out."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--out":
            skip = True
        elif not argument.startswith("--out="):
            kept.append(argument)
    return " ".join(["python3", "-m", module, *kept])


def now() -> str:
    """Date and time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
