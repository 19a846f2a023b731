"""The benchmark programs of the source tree as commands: their options are their own, and only handed on."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Sequence

import typer

from lsgm_fast.commands.common import pick_device

PROGRAMS = {
    "cells": "Time residual cells of the NVAE and residual blocks of the score network, on every backend.",
    "score": "Time one evaluation of the score network, on every backend, beside its floor.",
    "decode": "Time decoding latents to images, on every backend, beside its floor.",
    "solver": "Time whole solves with a network that costs nothing: the solver's own arithmetic.",
    "sample": "Time whole samples from noise to images: the published way, torchdiffeq and ours.",
    "train": "Time training steps of both stages: images per second and memory, plain PyTorch and the kernels.",
    "paper": "Time the published configurations, beside their floors and the paper's 44 min, 3.9 min and 2.74 s.",
}
EXTRAS = (
    "`lsgm-fast bench {name}` takes the options of `python3 -m benchmarks.{name}`, and these:\n"
    "  --device auto  a GPU if there is one (the default)\n"
    "  --json         print the record as one JSON object, nothing else\n"
    "  --quiet, -q    print nothing; errors still show\n"
)


def register(app: typer.Typer) -> None:
    """Add a command for each of :data:`PROGRAMS`."""
    # Nothing is parsed here, help included.
    handed_on = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    for name, text in PROGRAMS.items():
        app.command(
            name,
            help=f"{text}\n\n`lsgm-fast bench {name} --help` lists its options.",
            short_help=text,
            context_settings=handed_on,
        )(_command(name))


def _command(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        run(name, context.args)

    return command


def run(name: str, arguments: Sequence[str]) -> None:
    """Run the program ``benchmarks.<name>``; its exit status becomes the command's."""
    from lsgm_fast import bench

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--device", default="auto")
    own.add_argument("--json", action="store_true")
    own.add_argument("--quiet", "-q", action="store_true")
    options, rest = own.parse_known_args(arguments)
    program, measure = bench.program(name), bench.program("measure")
    if {"-h", "--help"} & set(rest):
        typer.echo(EXTRAS.format(name=name))
    # An unknown device is this command's to explain, in its words.
    rest += ["--device", pick_device(options.device)]
    silent: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if options.json or options.quiet:
        silent = contextlib.redirect_stdout(io.StringIO() if options.quiet else sys.stderr)
    with silent, measure.written_records() as records:
        status = _status(program.main, rest)
    if options.json and records:
        typer.echo(json.dumps(records[-1]))
    if status:
        raise typer.Exit(status)


def _status(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """What the program ends with; argparse ends it by an exception."""
    try:
        return main(arguments)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            typer.echo(f"error: {stopped.code}", err=True)
            return 2
        return stopped.code or 0
