"""Profiles: where the time of a model goes, and one operation alone on inputs of a real run."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lsgm_fast.commands.common import Device, Json, Quiet, Seed, console, pick_device

if TYPE_CHECKING:
    from lsgm_fast.profiling.recording import Recording
    from lsgm_fast.profiling.replay import Replay
    from lsgm_fast.profiling.workload import Workload

STDERR = 2  # standard output is for the result
TOOLS = ("auto", "nsys", "ncu", "pytorch", "none")


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]", help="A preset or recipe (random weights), a checkpoint, or `demo`."
        ),
    ] = "demo",
    stage: Annotated[
        str,
        typer.Option(help="sample, score (one evaluation of the network), decode, or train (one step)."),
    ] = "sample",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images.")] = 16,
    solver: Annotated[str, typer.Option(help="Of stage sample, as for `lsgm-fast sample`.")] = "auto",
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="Network evaluations, for a solver with a fixed budget.")
    ] = None,
    tol: Annotated[
        float | None, typer.Option(help="Error tolerance of the solver. Default: the model's.")
    ] = None,
    seed: Seed = 0,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Networks in PyTorch's channels_last memory format.")
    ] = False,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the reports.")] = Path("profile"),
    tool: Annotated[
        str,
        typer.Option(
            help="auto; nsys or ncu: run under Nsight Systems or Compute; pytorch: its own profiler; none: only run, "
            "for a profiler that you attach."
        ),
    ] = "auto",
    kernel: Annotated[
        str | None,
        typer.Option(
            help="Regular expression of a GPU kernel's name, as in `apply_kernel`: for Nsight Compute."
        ),
    ] = None,
    inside: Annotated[
        str | None,
        typer.Option(
            "--range",
            help="With --kernel: only inside ranges of this name, as in `mixed_score.triton` (needs nvtx).",
        ),
    ] = None,
    launch_skip: Annotated[
        int, typer.Option(min=0, help="With --kernel: leave out so many launches first.")
    ] = 0,
    launch_count: Annotated[int, typer.Option(min=1, help="With --kernel: launches to measure.")] = 1,
    warmup: Annotated[int, typer.Option(min=0, help="Runs ahead of the profiled ones.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Runs to profile.")] = 1,
    capture_inputs: Annotated[
        str | None,
        typer.Option(
            metavar="OP[:N]",
            help="No profile: keep the arguments of the N-th call of an operation in a file, for --replay.",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a model: such a file. Every backend is compared with float64 and timed, or one profiled "
            "where --tool or --kernel says so."
        ),
    ] = None,
    print_command: Annotated[
        bool,
        typer.Option("--print-command", help="Only print the command line of Nsight, to run it elsewhere."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Profile a model: with Nsight where it is installed and a GPU is there, else with PyTorch's profiler.

    PyTorch's profiler writes `trace.json` into the folder --out (open it at ui.perfetto.dev) and prints what took
    longest. For Nsight the command line is printed first. Ranges have the names in `docs/profiling.md`.

    Examples:

    - `lsgm-fast profile demo --evaluations 5`
    - `lsgm-fast profile cifar10-fid --stage score --batch 64 --channels-last --device cuda`
    - `lsgm-fast profile cifar10-fid --stage score --kernel apply_kernel --range group_norm_swish.triton`
    - `lsgm-fast profile demo --capture-inputs group_norm_swish:3`
    - `lsgm-fast profile --replay profile/group_norm_swish-3.safetensors`
    """
    from lsgm_fast.profiling.workload import Workload

    workload = Workload(model, stage, batch, solver, evaluations, tol, seed, channels_last)
    workload.check()
    if replay is not None and not replay.is_file():
        raise ValueError(f"--replay {str(replay)!r} does not exist or is not a file")
    if capture_inputs is not None:
        if replay is not None or tool != "auto" or kernel is not None or print_command:
            raise ValueError(
                "--capture-inputs only runs a model: leave out --replay, --tool, --kernel, --print-command"
            )
        _capture(capture_inputs, workload, pick_device(device), out, as_json=as_json, quiet=quiet)
        return
    if inside is not None and kernel is None:
        raise ValueError(f"--range {inside} is for Nsight Compute: name a kernel as well, with --kernel")
    chosen = _choose_tool(tool, kernel, device, replay, print_command)
    run = _Run(workload, replay, device, warmup, repeat)
    if chosen in ("nsys", "ncu"):
        from lsgm_fast.profiling import nsight

        if kernel is None:
            command = nsight.systems(run.arguments(), out)
        else:
            command = nsight.compute(
                run.arguments(), out, kernel, inside=inside, skip=launch_skip, count=launch_count
            )
        if print_command:
            typer.echo(json.dumps({"command": command}) if as_json else shlex.join(command))
        else:
            _nsight(command, pick_device(device), out, as_json=as_json, quiet=quiet)
    elif chosen == "replay":
        assert replay is not None
        _replay(replay, pick_device(device), as_json=as_json, quiet=quiet)
    elif chosen == "none":
        _bare(run, pick_device(device))
    else:
        _pytorch(run, pick_device(device), out, as_json=as_json, quiet=quiet)


@dataclass(frozen=True)
class _Run:
    """What is to be profiled, and how often."""

    workload: Workload
    replay: Path | None
    device: str
    warmup: int
    repeat: int

    def arguments(self) -> list[str]:
        """The options of this command that ask for it."""
        out = [] if self.replay is None else ["--replay", str(self.replay)]
        if self.replay is None:
            from lsgm_fast.profiling.workload import Workload

            standard = Workload()
            for field in fields(self.workload):
                value = getattr(self.workload, field.name)
                if field.name == "model":
                    out.append(value)
                elif value != getattr(standard, field.name):
                    option = "--" + field.name.replace("_", "-")
                    out += [option] if value is True else [option, str(value)]
        return [*out, "--device", self.device, "--warmup", str(self.warmup), "--repeat", str(self.repeat)]

    def prepared(self, device: str) -> AbstractContextManager[Callable[[], object]]:
        """The function that does it once, warmed up."""
        if self.replay is not None:
            from lsgm_fast.profiling.replay import again

            return nullcontext(again(self.replay, device))
        from lsgm_fast.profiling.workload import prepared

        return prepared(self.workload, device)


def _choose_tool(tool: str, kernel: str | None, device: str, replay: Path | None, print_command: bool) -> str:
    from lsgm_fast.errors import unknown_name
    from lsgm_fast.profiling import nsight

    if tool not in TOOLS:
        raise unknown_name("tool", tool, TOOLS)
    if kernel is not None and tool not in ("auto", "ncu"):
        raise ValueError(f"--kernel is for Nsight Compute: leave --tool {tool} out")
    if tool == "ncu" and kernel is None:
        raise ValueError(
            "Nsight Compute runs a kernel many times over: name one that a timeline shows, as in --kernel apply_kernel"
        )
    if kernel is not None:
        tool = "ncu"
    elif tool == "auto" and print_command:
        tool = "nsys"
    elif tool == "auto" and replay is not None:
        return "replay"
    elif tool == "auto":
        return "nsys" if pick_device(device).startswith("cuda") and nsight.find("nsys") else "pytorch"
    if print_command and tool not in nsight.TOOLS:
        raise ValueError(f"--print-command is for nsys and ncu: --tool {tool} starts no other program")
    return tool


def _nsight(command: list[str], device: str, out: Path, *, as_json: bool, quiet: bool) -> None:
    from lsgm_fast.profiling import nsight

    tool = command[0]
    if not device.startswith("cuda"):
        raise ValueError(
            f"{tool} profiles GPUs, the device is {device}: use --tool pytorch, or --print-command to run it elsewhere"
        )
    if nsight.find(tool) is None:
        raise ValueError(
            f"{tool} is not on PATH: install NVIDIA Nsight {'Systems' if tool == 'nsys' else 'Compute'}, or use "
            "--tool pytorch, or --print-command to run it elsewhere"
        )
    if importlib.util.find_spec("nvtx") is None:
        typer.echo(
            "note: without the package nvtx there are no ranges: pip install 'lsgm-fast[profile]'", err=True
        )
    out.mkdir(parents=True, exist_ok=True)
    typer.echo(shlex.join(command), err=True)
    code = subprocess.run(command, stdout=STDERR, check=False).returncode
    if code != 0:
        raise typer.Exit(code)
    if as_json:
        typer.echo(json.dumps({"command": command}))
    elif not quiet:
        for line in nsight.advice(command):
            typer.echo(line)


def _bare(run: _Run, device: str) -> None:
    """Run between cudaProfilerStart and cudaProfilerStop, with ranges."""
    import torch

    from lsgm_fast import trace

    cuda = device.startswith("cuda")
    with run.prepared(device) as once:
        for _ in range(run.warmup):
            once()
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
        with trace.enabled():
            for _ in range(run.repeat):
                once()
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()


def _pytorch(run: _Run, device: str, out: Path, *, as_json: bool, quiet: bool) -> None:
    from lsgm_fast import images
    from lsgm_fast.profiling.recording import record

    path = out / "trace.json"
    images.require_writable(path)
    with run.prepared(device) as once:
        for _ in range(run.warmup):
            once()
        recording = record(once, path, device=device, repeat=run.repeat)
    if as_json:
        typer.echo(json.dumps(recording.report()))
    elif not quiet:
        _print_recording(recording, device)


def _print_recording(recording: Recording, device: str) -> None:
    from rich.table import Table

    from lsgm_fast import trace

    kernels = "kernels" if device.startswith("cuda") else "PyTorch's operations, without what they call"
    parts = (
        ("ranges (each holds those inside it)", recording.ranges),
        (f"longest in total: {kernels}", recording.busiest),
    )
    for title, rows in parts:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("name", overflow="fold")
        table.add_column("category")
        for column in ("calls", "ms", "ms per call", "share"):
            table.add_column(column, justify="right")
        for row in rows:
            kind = trace.RANGES.get(row.name)
            category = kind.category if kind else "operation" if rows is recording.ranges else ""
            milliseconds = 1e3 * row.seconds
            table.add_row(
                row.name,
                category,
                str(row.calls),
                f"{milliseconds:.3f}",
                f"{milliseconds / row.calls:.4f}",
                f"{row.share:.1%}",
            )
        console().print(table)
        console().print()
    typer.echo(
        f"{recording.seconds * 1e3:.1f} ms with the profiler at work: shares say where to look, times are too long"
    )
    typer.echo(f"trace: {recording.trace} (open it at ui.perfetto.dev or chrome://tracing)")


def _capture(spec: str, workload: Workload, device: str, out: Path, *, as_json: bool, quiet: bool) -> None:
    from lsgm_fast import images
    from lsgm_fast.profiling import inputs
    from lsgm_fast.profiling.workload import prepared

    op, number = inputs.parse(spec)
    path = out / f"{op}-{number}.safetensors"
    images.require_writable(path)
    with prepared(workload, device) as once:
        call = inputs.capture(once, op, number)
    inputs.save(call, path)
    if as_json:
        typer.echo(json.dumps({"file": str(path), "op": op, "number": number, "backend": call.backend}))
    elif not quiet:
        typer.echo(f"{op}, call {number}, which ran on {call.backend}: {path}")
        typer.echo(f"next: lsgm-fast profile --replay {shlex.quote(str(path))}")


def _replay(path: Path, device: str, *, as_json: bool, quiet: bool) -> None:
    from lsgm_fast.profiling.replay import replay

    result = replay(path, device)
    if as_json:
        typer.echo(json.dumps(result.report()))
    elif not quiet:
        _print_replay(result)
    if not result.right:
        raise typer.Exit(1)


def _print_replay(result: Replay) -> None:
    from rich.table import Table

    typer.echo(f"{result.op}({result.inputs})")
    table = Table(title=result.recorded, title_justify="left", box=None, pad_edge=False)
    for column in ("backend", "auto", "against float64"):
        table.add_column(column, overflow="fold")
    for column in ("relative L2", "µs per call"):
        table.add_column(column, justify="right")
    for of in result.outcomes:
        verdict = of.refused or of.wrong or "right"
        error = "" if of.error is None else f"{of.error:.2e}"
        time = "" if of.seconds is None else f"{1e6 * of.seconds:.1f}"
        table.add_row(of.backend, "chosen" if of.chosen else of.passed_over or "", verdict, error, time)
    console().print(table)
