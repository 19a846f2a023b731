"""What is done with benchmark records once they are written: compare them, follow them, put them into tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lsgm_fast.commands.common import Json, Quiet, console

if TYPE_CHECKING:
    from types import ModuleType


def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="A B | PROGRAM [OPTIONS]",
            help="Two record files, or folders of them; with `--base` a program of `benchmarks/` and its options.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Time this commit and the working tree, taking turns."),
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Of each, with `--base`.")] = 3,
    budget: Annotated[float, typer.Option(min=1.0, help="Seconds of all turns together.")] = 300.0,
    fail_above: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            min=1.0,
            help="Exit with 1 where a cost has grown beyond this ratio and beyond noise.",
        ),
    ] = None,
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Compare records of different machines or devices.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="With `--base`: keep both records here."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every figure, not only seconds and memory.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare benchmark records, or another commit with the working tree.

    Shows B / A of every figure beside a noise floor, which comes from the spread of the values of both. `--fail-above`
    judges seconds and memory of lsgm-fast itself; plain PyTorch and `torch.compile` are shown, because they tell
    whether the machine changed.

    With `--base` the other commit is checked out into a temporary git worktree, and both run the same program in turn.
    A kernel that is wrong is an error too (exit 1). Exit 3: the machine is busy, and `--force` is not among the
    program's options.

    Examples:

    - `lsgm-fast bench compare old/ops.json new/ops.json --fail-above 1.10`
    - `lsgm-fast bench compare --base main ops mixed_score --no-compile --batch 16`
    - `lsgm-fast bench compare --base HEAD~3 --budget 600 --fail-above 1.05 score --presets mnist`
    """
    from lsgm_fast import bench

    program = bench.program("compare")
    if base is None:
        found = _from_files(program, what, across_machines=across_machines)
    else:
        found = _from_base(program, base, what, turns, budget, out, quiet=quiet)
    if as_json:
        typer.echo(json.dumps(found.as_json(fail_above)))
    elif not quiet:
        console().print(program.table(found, everything=everything))
        for line in program.summary(found, fail_above):
            typer.echo(line)
    wrong = bool(found.new_failures) and (base is not None or fail_above is not None)
    if wrong or (fail_above is not None and found.regressions(fail_above)):
        raise typer.Exit(1)


def _from_files(program: ModuleType, what: list[str], *, across_machines: bool) -> Any:
    from lsgm_fast import bench

    if len(what) != 2 or any(word.startswith("-") for word in what):
        raise ValueError(
            f"expected two record files or folders, got {' '.join(what)}; to time another commit add --base REF"
        )
    records = bench.program("records")
    a, b = (records.read(Path(word)) for word in what)
    return program.compare(a, b, across_machines=across_machines)


def _from_base(
    program: ModuleType,
    ref: str,
    what: list[str],
    turns: int,
    budget: float,
    out: Path | None,
    *,
    quiet: bool,
) -> Any:
    from lsgm_fast import bench

    base = bench.program("base")

    def report(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    try:
        old, new, libraries = base.take_turns(
            ref, what[0], what[1:], turns=turns, budget=budget, report=report
        )
    except base.MachineBusy as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(base.BUSY_EXIT) from None
    except base.BenchmarkFailed as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if out is not None:
        base.keep(out, old, new)
    found = program.compare([old], [new])
    found.notes.append(libraries)
    return found


def history(
    record: Annotated[str, typer.Argument(metavar="RECORD", help="Name of a record, `ops` for instance.")],
    figure: Annotated[
        str | None,
        typer.Argument(
            metavar="[FIGURE]", help="A part of a case's name and figure, `rk_stage` for instance."
        ),
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="Folder in benchmarks/results, where several have the record.")
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="How many versions.")] = 6,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw them too (needs the extra `plot`).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how a record's figures changed from version to version.

    The versions are those that git keeps of `benchmarks/results/<machine>/<record>.json`, and the file itself. Two
    versions need not come from the same state of the machine: `lsgm-fast bench compare --base` settles what a commit
    changed.

    Examples:

    - `lsgm-fast bench history score`
    - `lsgm-fast bench history ops "philox_normal" --plot philox.svg`
    """
    from lsgm_fast import bench

    program = bench.program("history")
    found, strange = program.versions(program.find(record, machine))
    for text in strange:
        typer.echo(f"note: {text}", err=True)
    found = found[-last:]
    shown = program.lines(found, figure)
    if plot is not None:
        program.plot(found, shown, plot)
    if as_json:
        typer.echo(json.dumps(program.as_json(found, shown)))
    else:
        console().print(program.table(found, shown))


def tables(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Default: README.md, docs/*.md and benchmarks/*.md."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 where a table is out of date.")
    ] = False,
) -> None:
    """Write the tables of figures in the documentation anew, from the records in benchmarks/results.

    A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is replaced.
    """
    from lsgm_fast import bench

    program = bench.program("tables")
    changed = program.rewrite(files or program.documents(), write=not check)
    for path, names in changed.items():
        typer.echo(f"{path}: {', '.join(names)} {'out of date' if check else 'written'}")
    if check and changed:
        typer.echo("write them anew with: lsgm-fast bench tables", err=True)
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Make these commands of ``lsgm-fast bench``."""
    # What compare does not know belongs to the program that it runs.
    app.command("compare", context_settings={"ignore_unknown_options": True})(compare)
    app.command("history")(history)
    app.command("tables")(tables)
