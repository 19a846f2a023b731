"""pytest-benchmark wrappers of a few shapes: ``python -m pytest benchmarks/test_ops.py``.

A twentieth of a second each. For figures to publish use ``lsgm-fast bench ops``, which interleaves, rotates buffers and
looks at the machine.
"""

from __future__ import annotations

import pytest
import torch

from lsgm_fast import ops, testing
from lsgm_fast.dispatch import REGISTRY

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.benchmark(max_time=0.05, min_rounds=3)

FUSED = [(name, b) for name, op in sorted(REGISTRY.items()) if len(op.backends()) > 1 for b in op.backends()]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = (1, 16)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "backend"), FUSED)
def test_operation(benchmark, name, backend, batch, mode):
    described = testing.describe_samples(name)
    case, shape = next(iter(described.shapes.items()))
    sample = described.at((batch, *shape), device=DEVICE, name=case)
    if why := testing.unsupported(name, backend, sample):
        pytest.skip("; ".join(why))
    if mode != "forward" and not testing.has_gradients(name, backend, sample):
        pytest.skip("has no gradients")
    op = REGISTRY[name]
    testing.check_forward(name, backend, sample)
    if mode == "forward":
        with torch.no_grad():
            benchmark(_waiting(lambda: op(*sample.args, backend=backend, **sample.kwargs)))
    else:
        testing.check_backward(name, backend, sample)
        with torch.no_grad():
            outputs = testing.Sample("", (op(*sample.args, backend=backend, **sample.kwargs),)).tensors()
        grads = [torch.ones_like(o) for o in outputs]
        kwargs = {**sample.kwargs, "backend": backend}
        benchmark(_waiting(lambda: testing.gradients(op, sample.args, kwargs, sample.differentiable, grads)))


def _waiting(function):
    if DEVICE == "cpu":
        return function

    def run():
        function()
        torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("way", ["direct", "dispatched", "resolved"])
def test_dispatch(benchmark, way):
    """The difference between the first two is what the dispatcher costs (target: 5 microseconds)."""
    args = testing.describe_samples("mixed_score").at((1, 4, 2, 2)).args
    with torch.no_grad():
        bound = ops.mixed_score.resolve(*args)
        direct = next(
            ops.mixed_score.impl(b).fn
            for b in ops.mixed_score.backends()
            if ops.mixed_score.impl(b).fn is bound
        )
        benchmark({"direct": direct, "dispatched": ops.mixed_score, "resolved": bound}[way], *args)
