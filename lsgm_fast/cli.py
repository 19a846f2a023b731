"""The command ``lsgm-fast``: demo, sample, convert, export, tune, evaluate, info, bench, profile.

Conventions: results on standard output, progress, notes and errors on standard error; ``--json`` prints one JSON object
to standard output and nothing else there. Exit codes: 0 done; 1 a computation failed (NaN, out of memory);
2 bad input (one line ``error: ...``); 3 the machine is too busy to be timed; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import typer

from lsgm_fast.commands import bench, evaluation, exporting, profiling, records, sampling, training
from lsgm_fast.commands.common import Json, describe

# torch and everything that needs it are imported inside the commands: `--help` answers at once.

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import lsgm_fast

        typer.echo(f"lsgm-fast {lsgm_fast.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Draw images with LSGM: a score-based generative model in the latent space of a VAE.

    First steps:

    - `lsgm-fast demo` draws 64 handwritten digits with the small model that comes along
    - `lsgm-fast sample checkpoint.pt -n 16` draws from a trained model
    - `lsgm-fast COMMAND --help` explains a command
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(sampling.demo)
app.command()(sampling.sample)
app.command("train-vae")(training.train_vae)
app.command()(training.train)
app.command()(evaluation.evaluate)
app.command()(sampling.convert)
app.command()(exporting.export)
app.command()(sampling.tune)
records.register(bench.bench_app)
app.add_typer(bench.bench_app, name="bench")
app.command()(profiling.profile)


@app.command()
def info(
    cuda: Annotated[
        bool,
        typer.Option("--cuda", help="Ask CUDA itself about the GPUs (starts a context) and not the driver."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, processors, GPUs, and which implementations every operation has.

    Put its output into a bug report.
    """
    from lsgm_fast import info as report

    collected = report.collect(initialise_cuda=cuda)
    if as_json:
        typer.echo(json.dumps(collected))
        return
    from rich.console import Console

    Console().print(report.render(collected))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(args=arguments, prog_name="lsgm-fast", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        described = describe(error)
        if described is None:
            raise
        message, code = described
        typer.echo(
            f"error: {'; '.join(line.strip() for line in message.splitlines() if line.strip())}", err=True
        )
        return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line, without the place in the source that issued it."""
    typer.echo(f"note: {' '.join(str(message).split())}", err=True)


if __name__ == "__main__":
    sys.exit(main())
