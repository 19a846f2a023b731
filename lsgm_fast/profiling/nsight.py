"""Command lines of Nsight Systems and Nsight Compute.

Options as documented by NVIDIA (Nsight Systems user guide, "CLI profile command switch options"; Nsight Compute CLI
guide, "Profile", "NVTX filtering" and "Filter options").
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lsgm_fast import trace

TOOLS = ("nsys", "ncu")


def find(tool: str) -> str | None:
    """Path of ``nsys`` or ``ncu``, or None."""
    return shutil.which(tool)


def program(arguments: Sequence[str]) -> list[str]:
    """What runs under the tool: this command, the profiled part between cudaProfilerStart and cudaProfilerStop."""
    return [sys.executable, "-m", "lsgm_fast", "profile", *arguments, "--tool", "none"]


def systems(arguments: Sequence[str], out: Path) -> list[str]:
    """Nsight Systems: the timeline of what is between cudaProfilerStart and cudaProfilerStop."""
    return [
        "nsys",
        "profile",
        "--trace=cuda,nvtx,cudnn,cublas",
        "--sample=none",
        "--cpuctxsw=none",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        # Kernels of a CUDA graph one by one, not the graph as a whole.
        "--cuda-graph-trace=node",
        "--force-overwrite=true",
        f"--output={out / 'timeline'}",
        *program(arguments),
    ]


def compute(
    arguments: Sequence[str],
    out: Path,
    kernel: str,
    *,
    inside: str | None = None,
    skip: int = 0,
    count: int = 1,
) -> list[str]:
    """Nsight Compute: every section of a few launches of the kernels whose name matches, of one range alone if named.

    Raises:
        ValueError: the kernel is no regular expression.
    """
    try:
        re.compile(kernel)
    except re.error as error:
        raise ValueError(f"the kernel {kernel!r} is not a regular expression: {error}") from None
    name = re.sub(r"\W+", "-", kernel).strip("-") or "kernel"
    return [
        "ncu",
        "--profile-from-start=off",
        "--nvtx",
        # The slash: a range that is pushed and popped.
        *([] if inside is None else [f"--nvtx-include={trace.DOMAIN}@{inside}/"]),
        "--set=full",
        f"--kernel-name=regex:{kernel}",
        f"--launch-skip={skip}",
        f"--launch-count={count}",
        "--force-overwrite",
        f"--export={out / name}",
        *program(arguments),
    ]


def advice(command: Sequence[str]) -> list[str]:
    """What to do with the report of a command."""
    tool = Path(command[0]).name
    if tool == "nsys":
        report = (
            next(part for part in command if part.startswith("--output=")).partition("=")[2] + ".nsys-rep"
        )
        return [
            f"timeline: open {report} in nsys-ui; in the NVTX row `lsgm_fast` solve > step > evaluation > operation",
            f"tables: nsys stats --report nvtx_sum,cuda_gpu_kern_sum {report}",
            "look for: gaps between kernels inside `evaluation` (the host is late: try CUDA graphs or torch.compile), "
            "waits at the end of `step` (adaptive solvers read one number), the kernels with the largest total time",
        ]
    report = next(part for part in command if part.startswith("--export=")).partition("=")[2] + ".ncu-rep"
    return [
        f"report: open {report} in ncu-ui, or ncu --import {report} --page details",
        "look at: GPU Speed Of Light (memory or compute bound; our kernels should be near the memory roof), Memory "
        "Workload Analysis (sectors per request: 128-bit accesses use all of them), Occupancy (registers), Warp State "
        "(stalls)",
    ]
