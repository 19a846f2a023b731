"""The compiled libraries of operators: where they are, why one is absent, and what they were built from.

Importing this module loads nothing. :func:`cpu` and :func:`cuda` load their library on the first call and never raise:
where a library cannot be had, they say why and what to do about it. ``setup.py`` reads this file by its path, in an
environment that may hold nothing but the standard library, so the rest of the package is imported inside functions.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

TORCH_MINIMUM = (2, 11)

_PACKAGE = Path(__file__).resolve().parent
_RECORD = "build.json"


@dataclass(frozen=True)
class Library:
    """One compiled library.

    Attributes:
        name: ``"cpu"`` or ``"cuda"``.
        path: the file; None where there is none.
        loaded: whether its operators are registered with PyTorch in this process.
        reason: a sentence that says why it is absent and what to do; None where ``loaded``.
        build: the build record: compilers, versions, flags, architectures, source hashes, date; None where unknown.
    """

    name: str
    path: str | None
    loaded: bool
    reason: str | None
    build: dict[str, Any] | None


_lock = threading.Lock()
_libraries: dict[str, Library] = {}


def _renew_lock() -> None:
    # Another thread may have held the lock when this process was forked; in the child nobody would release it.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def cpu() -> Library:
    """The library of CPU operators, loaded on the first call. Never raises."""
    return _libraries.get("cpu") or _load_once("cpu")


def cuda() -> Library:
    """The library of CUDA operators, loaded on the first call. Touches no GPU and never raises."""
    return _libraries.get("cuda") or _load_once("cuda")


def folder() -> Path:
    """Where the libraries are looked for: ``LSGM_FAST_LIBRARY_PATH``, else the package's own folder."""
    from lsgm_fast import env

    return env.library_path() or _PACKAGE / "_lib"


def build_record(place: Path | None = None) -> dict[str, Any] | None:
    """What the build in ``place`` (:func:`folder`) wrote about itself; None where nothing was ever built there."""
    try:
        record = json.loads(((place or folder()) / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def module() -> ModuleType | None:
    """``lsgm_fast._C``, which reports on the build, the processor and the GPUs; None where it was not built."""
    try:
        return importlib.import_module("lsgm_fast._C")
    except ImportError:
        return None


# How the source of a composed operation names others: called, or imported.
_USED = re.compile(rb"(?:\bops\.|lsgm_fast\.composed\.|lsgm_fast\.kernels import )([a-z][a-z0-9_]*)")


def source_hash(op: str) -> str | None:
    """sha256 over the sources of the operation's kernels: ``csrc/<stem>``, ``kernels/<stem>.py`` and what they share.

    The stem is the operation's name, or that of its family (``rk`` for ``rk_stage``). From the source tree where there
    is one, else as recorded when the libraries were built. For an operation composed of others, of
    ``lsgm_fast/composed/<op>*.py``, ``kernels/<op>.py`` if there is one, and everything that these use. None where
    none of them knows the operation.
    """
    root = _PACKAGE.parent
    composed = sorted((_PACKAGE / "composed").glob(f"{op}*.py"))
    if composed:
        composed += [
            p for p in (_PACKAGE / "kernels" / f"{op}.py", root / "kernels" / f"{op}.py") if p.is_file()
        ]
        source = b"\0".join(path.read_bytes() for path in composed)
        used = sorted({name.decode() for name in _USED.findall(source)} - {op})
        digest = hashlib.sha256(source)
        for name in used:
            digest.update(f"\0{name} {source_hash(name)}".encode())
        return digest.hexdigest()
    in_tree = (root / "csrc").is_dir()
    recorded = {} if in_tree else (build_record() or {}).get("sources", {})
    stem = op
    while stem:
        found = hash_sources(root, stem) if in_tree else recorded.get(stem)
        if found is not None:
            return found
        stem = stem.rpartition("_")[0]
    return None


def hash_sources(root: Path, stem: str) -> str | None:
    """:func:`source_hash` of the files of that stem in the source tree at ``root``; None where there are none."""
    own = [p for p in (root / "csrc" / stem).glob("*") if p.is_file()]
    own += [p for p in [root / "kernels" / f"{stem}.py"] if p.is_file()]
    if not own:
        return None
    digest = hashlib.sha256()
    shared = [p for p in (root / "csrc" / "common").glob("*") if p.is_file()]
    shared += (root / "kernels").glob("_*.py")
    for path in sorted(own + shared):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def operations(root: Path) -> list[str]:
    """The stems of the operations that have compiled kernels in the source tree at ``root``."""
    return sorted(path.parent.name for path in (root / "csrc").glob("*/register.cpp"))


def _load_once(name: str) -> Library:
    with _lock:
        library = _libraries.get(name)
        if library is None:
            library = _libraries[name] = _load(name)
    return library


def _load(name: str) -> Library:
    record = build_record()
    try:
        path = folder() / f"liblsgm_fast_ops_{name}.so"
        exists = path.is_file()
    except Exception as error:
        return Library(name, None, False, f"not found: {error}", record)
    built = (record or {}).get("libraries", {}).get(name)
    if not exists:
        return Library(name, None, False, _why_absent(name, path.parent, record, built), record)

    import torch

    reason = None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_MINIMUM:
        reason = f"needs PyTorch {TORCH_MINIMUM[0]}.{TORCH_MINIMUM[1]} or newer, this is {torch.__version__}"
    elif name == "cuda" and torch.version.cuda is None:
        # Its symbol for the current stream is missing from other builds of PyTorch, so loading would fail.
        reason = f"needs a CUDA build of PyTorch, this is {torch.__version__}"
    else:
        try:
            torch.ops.load_library(str(path))
        except Exception as error:
            # The loader's own words, such as an undefined symbol, come as the cause.
            why = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            reason = f"{path} could not be loaded ({why}): reinstall lsgm-fast in this environment"
    return Library(name, str(path), reason is None, reason, record)


def _why_absent(
    name: str, looked_in: Path, record: dict[str, Any] | None, built: dict[str, Any] | None
) -> str:
    from lsgm_fast import env

    if env.library_path() is not None:
        return (
            f"not found: {env.LIBRARY_PATH} is set, and {looked_in} holds no liblsgm_fast_ops_{name}.so: "
            "correct the variable or unset it"
        )
    if built is not None and built.get("reason"):
        return f"not built: {built['reason']}"
    if record is None and (_PACKAGE.parent / "CMakeLists.txt").is_file():
        return "not built: this is a source tree; run `pip install --no-build-isolation --editable .` in it"
    return f"not built: {looked_in} holds no liblsgm_fast_ops_{name}.so: reinstall lsgm-fast from its sources"
