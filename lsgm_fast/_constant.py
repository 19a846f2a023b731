"""A mark for ``torch.compile``, without what PyTorch's own decorator imports."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def assume_constant_result(fn: F) -> F:
    """As :func:`torch.compiler.assume_constant_result`: what is compiled takes the result of ``fn`` for a constant.

    PyTorch's decorator imports the whole compiler, which takes longer than everything of this package together, and is
    needed by those who compile alone. What it leaves on the function is this mark (``tests/test_imports.py`` compares
    them).
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
