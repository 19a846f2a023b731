"""Every environment variable that lsgm_fast reads, parsed in one place.

====================== ==============================================================================
``LSGM_FAST_BACKEND``   Which implementation runs, as for :func:`lsgm_fast.use_backend`: one backend,
                       exceptions per operation, or both, separated by commas:
                       ``triton`` or ``group_norm_swish=reference`` or ``triton,group_norm_swish=reference``.
``LSGM_FAST_SELFTEST`` ``0``: ``auto`` uses fused kernels without comparing them with the reference first.
``LSGM_FAST_CACHE``    Folder of self-test verdicts, compiled kernels and the classifiers of evaluations; default
                       ``lsgm_fast`` in the cache folder.
``LSGM_FAST_TRACE``     ``1``: named ranges for profilers from the start (:mod:`lsgm_fast.trace`).
====================== ==============================================================================

``torchrun``'s variables (:data:`TORCHRUN`) are read by :func:`torchrun`.

``LSGM_FAST_LIBRARY_PATH`` is the folder that the compiled libraries are loaded from, instead of the package's own.

``setup.py`` reads three more, when lsgm_fast is installed from its sources:

* ``LSGM_FAST_BUILD``: ``auto`` (the default: compile what the compilers at hand allow, and go without where that
  fails), ``none``, ``cpu`` or ``cuda`` (these two fail where they cannot be had; ``cuda`` includes ``cpu``).
* ``LSGM_FAST_CUDA_ARCHS``: GPU architectures, as in ``8.0;9.0+PTX``; by default 8.0, 8.6, 8.9 and 9.0+PTX.
* ``LSGM_FAST_TORCH``: folder of the torch package whose headers are used, where ``setup.py`` finds none or another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lsgm_fast.errors import unknown_name

BACKEND = "LSGM_FAST_BACKEND"
SELFTEST = "LSGM_FAST_SELFTEST"
CACHE = "LSGM_FAST_CACHE"
TRACE = "LSGM_FAST_TRACE"
LIBRARY_PATH = "LSGM_FAST_LIBRARY_PATH"

VARIABLES = {
    BACKEND: "backend for all operations, or per operation: `triton` or `triton,group_norm_swish=reference`",
    SELFTEST: "`0`: let `auto` use fused kernels without comparing them with the reference first",
    CACHE: "folder of self-test verdicts, compiled kernels, classifiers (default: `lsgm_fast` in the user's cache)",
    TRACE: "`1`: named ranges for profilers (Nsight, PyTorch's) from the start",
    LIBRARY_PATH: "folder that the compiled libraries are loaded from, instead of the package's own",
    "LSGM_FAST_BUILD": "at installation: `auto`, `none`, `cpu` or `cuda`, what to compile",
    "LSGM_FAST_CUDA_ARCHS": "at installation: GPU architectures to compile for, as in `8.0;9.0+PTX`",
    "LSGM_FAST_TORCH": "at installation: folder of the torch package whose headers are used",
}


def parse_backend_spec(
    spec: str, valid_backends: Iterable[str], valid_ops: Iterable[str]
) -> tuple[str | None, dict[str, str]]:
    """Split ``"triton,group_norm_swish=reference"`` into ``("triton", {"group_norm_swish": "reference"})``.

    Grammar: items separated by commas, blanks ignored; at most one item is a backend alone (the default), the
    others are ``operation=backend``. An empty text is ``(None, {})``.

    Raises:
        ValueError: unknown backend or operation (lists the valid ones and the closest), an empty item, two
            defaults, or one operation named twice.
    """
    valid_backends, valid_ops = tuple(valid_backends), tuple(valid_ops)
    default: str | None = None
    per_op: dict[str, str] = {}
    if not spec.strip():
        return default, per_op
    for item in (part.strip() for part in spec.split(",")):
        if not item:
            raise ValueError(f"empty item in the backend choice {spec!r}: expected {_grammar()}")
        left, equals, right = (text.strip() for text in item.partition("="))
        backend = right if equals else left
        if backend not in valid_backends:
            raise unknown_name("backend", backend, valid_backends)
        if not equals:
            if default is not None:
                raise ValueError(
                    f"two default backends in {spec!r}: {default!r} and {backend!r}; expected {_grammar()}"
                )
            default = backend
        elif left not in valid_ops:
            raise unknown_name("operation", left, valid_ops)
        elif left in per_op:
            raise ValueError(f"operation {left!r} is given twice in {spec!r}: keep one")
        else:
            per_op[left] = backend
    return default, per_op


def backend_from_env(
    valid_backends: Iterable[str], valid_ops: Iterable[str], environ: Mapping[str, str] | None = None
) -> tuple[str | None, dict[str, str]]:
    """Read ``LSGM_FAST_BACKEND``; ``(None, {})`` where it is unset or empty.

    Raises:
        ValueError: as :func:`parse_backend_spec`, with the variable's name in front.
    """
    spec = (os.environ if environ is None else environ).get(BACKEND, "")
    try:
        return parse_backend_spec(spec, valid_backends, valid_ops)
    except ValueError as error:
        raise ValueError(f"environment variable {BACKEND}={spec!r}: {error}") from None


def selftest_enabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether fused kernels prove themselves before ``auto`` uses them.

    Raises:
        ValueError: ``LSGM_FAST_SELFTEST`` is neither 0 nor 1.
    """
    return _switch(SELFTEST, "1", environ)


def trace_enabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ranges for profilers are made from the start.

    Raises:
        ValueError: ``LSGM_FAST_TRACE`` is neither 0 nor 1.
    """
    return _switch(TRACE, "0", environ)


def _switch(name: str, default: str, environ: Mapping[str, str] | None) -> bool:
    value = (os.environ if environ is None else environ).get(name, default)
    if value not in ("0", "1"):
        raise ValueError(f"environment variable {name}={value!r}: expected 0 or 1")
    return value == "1"


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Folder for what can be recomputed; not created here."""
    source = os.environ if environ is None else environ
    if source.get(CACHE):
        return Path(source[CACHE])
    return Path(source.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsgm_fast"


def library_path(environ: Mapping[str, str] | None = None) -> Path | None:
    """``LSGM_FAST_LIBRARY_PATH``; None where it is unset or empty."""
    value = (os.environ if environ is None else environ).get(LIBRARY_PATH)
    return Path(value) if value else None


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What ``torchrun`` tells every process that it starts."""


@dataclass(frozen=True)
class Processes:
    """Place of this process among those of a run: its number, how many there are, both of all and of this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def torchrun(environ: Mapping[str, str] | None = None) -> Processes | None:
    """The processes that ``torchrun`` describes; None where it started nothing.

    Raises:
        ValueError: some of :data:`TORCHRUN` are set and others not, or a number among them is none.
    """
    source = os.environ if environ is None else environ
    found = [name for name in TORCHRUN if source.get(name)]
    if not found:
        return None
    if missing := [name for name in TORCHRUN if name not in found]:
        raise ValueError(
            f"the environment describes a process group only in part: {', '.join(found)} set, {', '.join(missing)} "
            "not; start with torchrun, which sets all of them, or unset the former for a single process"
        )

    def number(name: str) -> int:
        try:
            return int(source[name])
        except ValueError:
            raise ValueError(
                f"environment variable {name}={source[name]!r}: expected a whole number"
            ) from None

    size = number("WORLD_SIZE")
    # Without a word on how many share this machine, all of them might.
    local_size = number("LOCAL_WORLD_SIZE") if source.get("LOCAL_WORLD_SIZE") else size
    return Processes(number("RANK"), size, number("LOCAL_RANK"), local_size)


def variables_set(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of :data:`VARIABLES` that are set, with their values."""
    source = os.environ if environ is None else environ
    return {name: source[name] for name in VARIABLES if name in source}


def _grammar() -> str:
    return "`backend`, `operation=backend`, or both separated by commas"
