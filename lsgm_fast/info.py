"""What runs here: versions, devices, and which implementation every operation has. ``python -m lsgm_fast.info``."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

    from lsgm_fast.dispatch import Op


def collect(*, initialise_cuda: bool = False) -> dict[str, Any]:
    """Gather the report as JSON-serialisable values.

    Args:
        initialise_cuda: ask CUDA itself about the devices, which creates a context on the current one (hundreds of
            MiB). Otherwise the driver's ``nvidia-smi`` is asked, and no CUDA call is made.

    Returns:
        ``lsgm_fast``, ``python``, ``platform``, ``packages`` (name -> version, or None where not installed),
        ``torch`` (version, CUDA build, threads), ``triton`` (version or why not), ``cpu`` (model, cores),
        ``cuda`` (source, devices, why none), ``environment`` (variables of :mod:`lsgm_fast.env` that are set),
        ``native`` (library -> loaded, reason), ``backends`` (all names) and ``operations``: name -> one entry per
        backend in the order in which ``auto`` tries them, with ``why_not`` (on CPU and on CUDA tensors, None where it
        runs), and ``validated``: on which devices its sources were validated, when, and whether they changed since.
    """
    import torch

    import lsgm_fast
    import lsgm_fast.ops  # registers the operations
    from lsgm_fast import dispatch, env, native

    return {
        "lsgm_fast": {
            "version": lsgm_fast.__version__,
            "path": os.path.dirname(os.path.abspath(lsgm_fast.__file__)),
        },
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in ("numpy", "scipy", "safetensors", "torchdiffeq")},
        "torch": {
            "version": torch.__version__,
            "cuda_build": torch.version.cuda,
            "threads": torch.get_num_threads(),
        },
        "triton": _triton(),
        "cpu": {"model": cpu_model(), "logical_cores": os.cpu_count()},
        "cuda": _cuda_devices(initialise_cuda),
        "environment": env.variables_set(),
        "backends": list(dispatch.BACKENDS),
        "native": {
            library.name: {"loaded": library.loaded, "reason": library.reason}
            for library in (native.cpu(), native.cuda())
        },
        "operations": {name: _operation(op) for name, op in sorted(dispatch.REGISTRY.items())},
    }


def _operation(op: Op[Any, Any]) -> list[dict[str, Any]]:
    from lsgm_fast import fused

    entries = []
    for backend in op.backends():
        why_not = {
            kind: None if backend == "reference" else fused.unavailable(backend, kind, op.name)
            for kind in ("cpu", "cuda")
        }
        validated = [] if backend == "reference" else validations(op.name, backend)
        entries.append({"backend": backend, "why_not": why_not, "validated": validated})
    return entries


def validations(op: str, backend: str) -> list[dict[str, Any]]:
    """Where this kernel was validated, from ``benchmarks/results/*/kernels.json`` of a source tree.

    Each entry: ``machine``, ``date``, ``passed``, and ``current``: whether the sources are still the same.
    """
    from lsgm_fast import native

    found = []
    current = native.source_hash(op)
    results = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
    for path in sorted(results.glob("*/kernels.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            for entry in record["kernels"]:
                if (entry["op"], entry["backend"]) != (op, backend) or not entry["passed"]:
                    continue
                found.append(
                    {
                        "machine": path.parent.name,
                        "date": record["date"],
                        "passed": not entry["failures"] and entry.get("sanitizer", {}).get("clean", True),
                        "current": entry["source_hash"] == current,
                    }
                )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def render(report: dict[str, Any]) -> Group:
    """The report of :func:`collect` as tables for :class:`rich.console.Console`."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    system = Table(show_header=False, box=None, pad_edge=False)
    system.add_column(style="bold")
    system.add_column(overflow="fold")
    torch_, cuda = report["torch"], report["cuda"]
    rows = [
        ("lsgm_fast", f"{report['lsgm_fast']['version']}  ({report['lsgm_fast']['path']})"),
        ("python", f"{report['python']['version']}  ({report['python']['executable']})"),
        ("torch", f"{torch_['version']}, CUDA {torch_['cuda_build'] or 'none'}, {torch_['threads']} threads"),
        ("triton", report["triton"]["version"] or f"not usable: {report['triton']['why_not']}"),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        ("cpu", f"{report['cpu']['model']}, {report['cpu']['logical_cores']} logical cores"),
        *(
            (f"gpu {i}", f"{d['name']}, {d['memory_mib']} MiB, compute capability {d['capability']}")
            for i, d in enumerate(cuda["devices"])
        ),
        *([("gpu", f"none: {cuda['why_none']}")] if not cuda["devices"] else []),
        *((name, value) for name, value in report["environment"].items()),
    ]
    for name, value in rows:
        system.add_row(name, escape(str(value)))

    for name, library in report["native"].items():
        system.add_row(f"{name} library", escape("loaded" if library["loaded"] else library["reason"]))

    operations = Table(
        title="operations with fused kernels, in the order in which `auto` tries them", title_justify="left"
    )
    operations.add_column("operation", no_wrap=True)
    for column in ("backend", "CPU tensors", "CUDA tensors", "validated on"):
        operations.add_column(column, overflow="fold")
    plain = []
    for name, entries in report["operations"].items():
        if len(entries) == 1:
            plain.append(name)
            continue
        for index, entry in enumerate(entries):
            runs = [_runs(entry, kind) for kind in ("cpu", "cuda")]
            operations.add_row(name if index == 0 else "", entry["backend"], *runs, _validated(entry))
    rest = f"reference only: {', '.join(plain)}" if plain else ""
    return Group(system, "", operations, rest)


def _runs(entry: dict[str, Any], kind: str) -> str:
    why = entry["why_not"][kind]
    if why is None:
        return "yes"
    # Why a library is absent stands once, above the table.
    return "-" if why.startswith("runs on") else f"no {entry['backend']} library"


def _validated(entry: dict[str, Any]) -> str:
    if entry["backend"] == "reference":
        return "(the specification)"
    if not entry["validated"]:
        return "no device yet"
    return "; ".join(
        f"{v['machine']} ({v['date'][:10]}{'' if v['passed'] else ', failed'}"
        f"{'' if v['current'] else ', sources changed since'})"
        for v in entry["validated"]
    )


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> dict[str, str | None]:
    try:
        return {"version": importlib.import_module("triton").__version__, "why_not": None}
    except Exception as error:  # a broken install can raise anything, and the report must still be made
        return {"version": None, "why_not": f"{type(error).__name__}: {error}"}


def cpu_model() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.lower().startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda_devices(initialise: bool) -> dict[str, Any]:
    if initialise:
        return _devices_from_cuda()
    return _devices_from_driver()


def _devices_from_cuda() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = "CUDA finds no usable device" if built else "this PyTorch is built without CUDA"
        return {"source": "cuda", "devices": [], "why_none": why}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_mib": properties.total_memory // 2**20,
                "capability": f"{properties.major}.{properties.minor}",
                "driver": None,
            }
        )
    return {"source": "cuda", "devices": devices, "why_none": None}


def _devices_from_driver() -> dict[str, Any]:
    found: dict[str, Any] = {"source": "nvidia-smi", "devices": [], "why_none": None}
    program = shutil.which("nvidia-smi")
    if program is None:
        return {**found, "why_none": "no NVIDIA driver here (no nvidia-smi)"}
    query = ["--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {**found, "why_none": f"nvidia-smi failed: {error}"}
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            name, memory, capability, driver = fields
            # Unified-memory devices report "[N/A]".
            mib = int(memory) if memory.isdigit() else None
            found["devices"].append(
                {"name": name, "memory_mib": mib, "capability": capability, "driver": driver}
            )
    if not found["devices"]:
        found["why_none"] = "nvidia-smi lists no device"
    return found


def main() -> None:
    """Print the report."""
    from rich.console import Console

    Console().print(render(collect()))


if __name__ == "__main__":
    main()
