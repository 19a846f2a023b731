"""Finds the modules of a package, so that a new operation is one new file per layer and no edit elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType


def modules(package: str, path: Iterable[str]) -> Iterator[tuple[str, ModuleType]]:
    """(stem, module) of every module of ``package`` that does not start with an underscore, in order of name."""
    for stem in sorted(entry.name for entry in pkgutil.iter_modules(path)):
        if not stem.startswith("_"):
            yield stem, importlib.import_module(f"{package}.{stem}")
