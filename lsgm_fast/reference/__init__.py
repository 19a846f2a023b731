"""Plain PyTorch specification of every operation: same signatures as :mod:`lsgm_fast.ops`, float64-capable.

The functions of a module whose names begin with its stem are attributes of this package.
"""

from __future__ import annotations

import inspect

from lsgm_fast import _discovery

__all__: list[str] = []


def _export() -> None:
    for stem, module in _discovery.modules(__name__, __path__):
        for name, value in vars(module).items():
            if name.startswith(stem) and inspect.isfunction(value) and value.__module__ == module.__name__:
                # The name of a module of one operation is that operation's: the function takes its place.
                globals()[name] = value
                __all__.append(name)


_export()
