"""Where the kernels of an operation can run: what the tests of kernels are parametrised over."""

from __future__ import annotations

import pytest
import torch

from lsgm_fast import fused, testing

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def targets(name: str, *, reference: bool = True) -> list:
    """(backend, device) of everything that could run; what cannot is skipped with its reason."""
    found = []
    for device in DEVICES:
        for backend in testing.find_op(name).backends():
            if backend == "reference" and not reference:
                continue
            marks = [pytest.mark.gpu] if device == "cuda" else []
            why = None if backend == "reference" else fused.unavailable(backend, device, name)
            if why is not None:
                if backend != "cpu" or device != "cpu":
                    continue  # not at home there
                marks.append(pytest.mark.skip(reason=why))
            found.append(pytest.param((backend, device), marks=marks, id=f"{backend}-{device}"))
    return found


def limit(target: tuple[str, str]) -> int:
    """Elements up to which a sample takes no time: Triton's interpreter is slow."""
    return 3_000 if target == ("triton", "cpu") else 2**22
