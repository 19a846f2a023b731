"""Timing on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lsgm_fast.commands import bench_programs
from lsgm_fast.commands.common import Device, Json, Quiet, pick_device

bench_app = typer.Typer(rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]})


@bench_app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Time lsgm-fast on this machine (from a source tree).

    Refuses on a busy machine, because such timings mislead: wait, or add `--force`.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench_app.command("ops")
def bench_ops(
    operations: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]...", help="Operations. Default: all that have a fused kernel."),
    ] = None,
    device: Device = "auto",
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; may be repeated. Default: 1 and 16.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32, bfloat16, ..., or `float32<-bfloat16` (state <- network output); may be repeated."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One shape, dtype and layout per operation.")
    ] = False,
    crossover: Annotated[
        bool,
        typer.Option("--crossover", help="Sizes from tiny to large: from which does a kernel pay?"),
    ] = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Leave out `torch.compile` of the reference (much quicker).")
    ] = False,
    budget: Annotated[float, typer.Option(help="Seconds after which it stops cleanly.")] = 420.0,
    name: Annotated[str, typer.Option(help="Name of the record.")] = "ops",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the record. Default: benchmarks/results."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Time a busy machine; the record says so.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time operations: every backend, plain PyTorch and `torch.compile` of it, in one run.

    Every kernel is first compared with float64; a wrong one is not timed, and the command ends with 1. Prints a table
    (time, GB/s, share of this machine's copy bandwidth) and writes a JSON record to `<out>/<machine>/<name>.json`.
    `python -m benchmarks.ops --help` lists further options.

    Examples:

    - `lsgm-fast bench ops --quick`
    - `lsgm-fast bench ops mixed_score --batch 64 --dtype float32`
    - `lsgm-fast bench ops mixed_score --crossover --no-compile`
    """
    from lsgm_fast import bench

    program = bench.program("ops")
    arguments = [
        *(operations or []),
        "--device",
        pick_device(device),
        "--budget",
        str(budget),
        "--name",
        name,
    ]
    for option, values in (("--batch", batch), ("--dtypes", dtype)):
        if values:
            arguments += [option, *map(str, values)]
    for option, wanted in (
        ("--quick", quick),
        ("--crossover", crossover),
        ("--no-compile", no_compile),
        ("--force", force),
    ):
        if wanted:
            arguments.append(option)
    if out is not None:
        arguments += ["--out", str(out)]
    options = program.parser().parse_args(arguments)
    program.check_options(options)
    try:
        record, ok = program.run(options, program.command(arguments), quiet=quiet or as_json)
    except program.MachineBusy as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(program.BUSY_EXIT) from None
    if as_json:
        typer.echo(json.dumps(record))
    elif not quiet:
        program.show(record)
    if not ok:
        raise typer.Exit(1)


bench_programs.register(bench_app)
