"""Every environment variable that lsgm_fast reads, parsed in one place.

=====================  ==============================================================================
``LSGM_FAST_BACKEND``  Which implementation runs, as for :func:`lsgm_fast.use_backend`: one backend,
                       exceptions per operation, or both, separated by commas:
                       ``triton`` or ``group_norm_swish=reference`` or ``triton,group_norm_swish=reference``.
=====================  ==============================================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from lsgm_fast.errors import unknown_name

BACKEND = "LSGM_FAST_BACKEND"

VARIABLES = {
    BACKEND: "backend for all operations, or per operation: `triton` or `triton,group_norm_swish=reference`",
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


def variables_set(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of :data:`VARIABLES` that are set, with their values."""
    source = os.environ if environ is None else environ
    return {name: source[name] for name in VARIABLES if name in source}


def _grammar() -> str:
    return "`backend`, `operation=backend`, or both separated by commas"
