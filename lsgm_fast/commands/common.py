"""What several commands share: options, the choice of a device, messages for errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Device = Annotated[
    str, typer.Option(help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for other programs, nothing else.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bar and no report; errors still show.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")]


def console() -> Console:
    """Where tables are printed: as wide as the terminal, and wide enough for them in a file or a pipe."""
    from rich.console import Console

    wide = Console()
    return wide if wide.is_terminal else Console(width=120)


def pick_device(name: str) -> str:
    """Turn ``--device`` into a device that exists, or say why it does not."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        from lsgm_fast.errors import unknown_name

        raise unknown_name("device", name, ("auto", "cpu", "cuda", "cuda:0")) from None
    if device.type == "cuda":
        if torch.version.cuda is None:
            raise ValueError(f"device {name!r}: this PyTorch is built without CUDA; use --device cpu")
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r}: CUDA finds no usable GPU; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device {name!r}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0"
            )
        return name
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} cannot be used with this PyTorch; use --device cpu") from None
    return name


def describe(error: Exception) -> tuple[str, int] | None:
    """(message, exit code) of an error that is the user's to solve; None for a defect, which keeps its traceback."""
    if hasattr(error, "format_message"):  # usage errors: click's or typer's own copy of click, by version
        return f"{error.format_message()} (see lsgm-fast --help)", 2
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, (ValueError, OSError)):
        return str(error), 2
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {error}; compute fewer images at a time", 1
    if (
        isinstance(error, ArithmeticError) or type(error).__name__ == "SolverError"
    ):  # by name: importing it needs torch
        return str(error), 1
    return None


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Run a command in the group of processes that torchrun started, where it did; yields this process's device.

    An error ends all of them and is shown by the process that it came from alone.
    """
    from lsgm_fast import distributed

    chosen = None if device == "auto" else pick_device(device)
    try:
        yield str(distributed.init(chosen))
    except Exception as error:
        if distributed.first_to_fail():
            raise
        described = describe(error)
        raise typer.Exit(described[1] if described is not None else 1) from None
    finally:
        distributed.shutdown()
