"""Exceptions raised by lsgm_fast, and the one place that phrases "unknown name" messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, of another model, or not safe to load."""


class BackendUnsupported(ValueError):
    """A backend was asked for by name but cannot run these inputs (the message gives the reasons)."""


class NonFiniteError(ArithmeticError):
    """A network or solver produced NaN or infinity (the message names the step and the time)."""


def unknown_name(kind: str, value: object, valid: Iterable[str]) -> ValueError:
    """Build the error for a name that is not one of ``valid``: lists them all and the closest.

    Example:
        >>> str(unknown_name("solver", "rk54", ["rk45", "scipy"]))
        "unknown solver 'rk54': expected one of 'rk45', 'scipy'; did you mean 'rk45'?"
    """
    names = list(valid)
    message = f"unknown {kind} {value!r}: expected one of {', '.join(map(repr, names))}"
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    if close:
        message += f"; did you mean {close[0]!r}?"
    return ValueError(message)
