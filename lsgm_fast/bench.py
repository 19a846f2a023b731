"""Finds the benchmark programs, which lie in ``benchmarks/`` of the source tree and are not installed.

They time the sources beside them and write into ``benchmarks/results``, so an installed copy has no use for them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def program(name: str) -> ModuleType:
    """The module ``benchmarks.<name>`` of the source tree that this package belongs to.

    Raises:
        ValueError: this is an installed copy without its source tree, or another package is called ``benchmarks``.
    """
    if not (ROOT / "benchmarks" / f"{name}.py").is_file():
        raise ValueError(
            "the benchmarks come with the source tree, not with an installed copy: "
            f"get the sources and run there `python -m benchmarks.{name}`"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(f"benchmarks.{name}")
    if Path(str(module.__file__)).resolve().parent != ROOT / "benchmarks":
        raise ValueError(
            f"another package called `benchmarks` is in the way ({module.__file__}): "
            f"run `python -m benchmarks.{name}` in {ROOT}"
        )
    return module
