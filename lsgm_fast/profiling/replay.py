"""Every backend on the arguments of one real call: is it right, and how long does it take?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lsgm_fast import dispatch, testing
from lsgm_fast.profiling.inputs import Call, load

# Seconds that one backend is timed for.
_TIMED = 0.2


@dataclass(frozen=True)
class Outcome:
    """What one backend did with the arguments.

    ``chosen``: whether ``auto`` takes it; ``passed_over``: why it would rather not, or None. ``refused``: why it cannot
    run them; ``wrong``: what the comparison with float64 says, None where it is content; ``error``: the largest
    relative L2 distance of a result from float64; ``seconds``: median of one call.
    """

    backend: str
    chosen: bool
    passed_over: str | None = None
    refused: str | None = None
    wrong: str | None = None
    error: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Replay:
    """A call and what every backend made of it."""

    op: str
    inputs: str
    recorded: str
    outcomes: list[Outcome]

    @property
    def right(self) -> bool:
        """Whether no backend is wrong."""
        return all(outcome.wrong is None for outcome in self.outcomes)

    def report(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self) | {"right": self.right}


def replay(path: Path, device: str = "cpu") -> Replay:
    """Run the call in the file on every backend, compare each with the float64 reference, and time it briefly.

    Args:
        path: from ``--capture-inputs``. device: where.

    Raises:
        ValueError: as :func:`lsgm_fast.profiling.inputs.load`.
    """
    call = load(path, device)
    args, kwargs = _arguments(call)
    sample = testing.Sample(path.name, args, kwargs, mutates=testing.describe_samples(call.op).mutates)
    op = testing.find_op(call.op)
    with torch.no_grad():
        decision = dispatch.explain(call.op, *args, **kwargs)
        outcomes = [
            _outcome(op, backend, sample, backend == decision.chosen, "; ".join(reasons) or None)
            for backend, reasons in decision.candidates
        ]
    return Replay(call.op, decision.inputs, f"call {call.number}, ran on {call.backend}", outcomes)


def _arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, by position where they can be, without gradients: what is replayed is the forward pass."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach()
        return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value

    signature = inspect.signature(testing.find_op(call.op).impl("reference").fn)
    bound = signature.bind(*call.args, **call.kwargs)
    return tuple(map(plain, bound.args)), {name: plain(value) for name, value in bound.kwargs.items()}


def again(path: Path, device: str = "cpu") -> Callable[[], object]:
    """A function that runs the call on the backend that ``auto`` chooses, or the one chosen by the user."""
    call = load(path, device)
    args, kwargs = _arguments(call)
    op = testing.find_op(call.op)

    @torch.no_grad()
    def run() -> object:
        return op(*args, **kwargs)

    return run


def _outcome(
    op: dispatch.Op[Any, Any], backend: str, sample: testing.Sample, chosen: bool, passed_over: str | None
) -> Outcome:
    if reasons := testing.unsupported(op, backend, sample):
        return Outcome(backend, chosen, refused="; ".join(reasons))
    wrong = None
    try:
        testing.check_forward(op, backend, sample)
    except AssertionError as failure:
        wrong = str(failure)
    from torch.utils import benchmark  # starts processes on import

    timer = benchmark.Timer(
        "f(*args, **kwargs)",
        globals={"f": op.impl(backend).fn, "args": sample.args, "kwargs": sample.kwargs},
        num_threads=torch.get_num_threads(),
    )
    error = testing.distance(op, backend, sample)
    # Last: it may write to its arguments.
    seconds = float(timer.blocked_autorange(min_run_time=_TIMED).median)
    return Outcome(backend, chosen, passed_over, None, wrong, error, seconds)
