"""Runs the checks of a Triton kernel in Triton's interpreter, on CPU tensors, in a process of its own.

``TRITON_INTERPRET=1`` decides at import what ``@triton.jit`` makes, and other tests compile the same kernels. So a
test file is also a program: run as one it calls :func:`main` with its checks; its tests ask :func:`check` what that
said.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import lsgm_fast
from lsgm_fast import testing
from lsgm_fast.testing import Sample

Checks = Mapping[str, Callable[[], None]]


def sample_checks(op: str, samples: list[Sample]) -> dict[str, Callable[[], None]]:
    """A check for every sample: forward, and where there are gradients, backward."""
    return {f"{op}: {s.id}": functools.partial(_check_sample, op, s) for s in samples}


def _check_sample(op: str, sample: Sample) -> None:
    with testing.poison_uninitialized():
        assert testing.unsupported(op, "triton", sample) == []
        testing.check_forward(op, "triton", sample)
        if testing.has_gradients(op, "triton", sample):
            testing.check_backward(op, "triton", sample)


def main(checks: Checks) -> None:
    """Run them all and print what failed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    failures = {}
    for name, check in checks.items():
        try:
            check()
        except BaseException:
            failures[name] = traceback.format_exc()
    print(json.dumps({"ran": list(checks), "failures": failures}))


@functools.cache
def _results(file: str) -> dict[str, object]:
    path = os.pathsep.join([str(Path(lsgm_fast.__file__).parent.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, file],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(file: str, name: str) -> None:
    """What one of the file's checks said; the file runs as a program once."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    results = _results(file)
    assert name in results["ran"]
    assert name not in results["failures"], results["failures"].get(name)
