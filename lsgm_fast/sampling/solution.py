"""What the sampling loops take and return: drift, progress, step records, solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from lsgm_fast.errors import NonFiniteError

Drift: TypeAlias = Callable[[float, Tensor], Tensor]
"""``drift(t, z) -> dz/dt`` of z's shape, in any floating-point dtype."""


CONTROLS = ("joint", "per_sample")
"""Step control of adaptive solvers: one step size for the batch, or one for each sample."""


class SolverError(RuntimeError):
    """A solver could not reach the end of the interval (step size too small, or too many steps)."""


@dataclass(frozen=True)
class Progress:
    """State of a running solve: ``fraction`` of the time interval covered (0 to 1), ``t`` and evaluations."""

    fraction: float
    t: float
    nfe: int


Callback: TypeAlias = Callable[[Progress], object]
"""Called after every attempted step. What it raises ends the solve and reaches the caller."""


@dataclass(frozen=True)
class StepRecord:
    """One attempted step from ``t`` to ``t + h`` (``h`` is negative where time runs backwards).

    ``error_norm`` is the scaled error estimate that decided about it: below 1 the step is accepted. NaN where
    the solver does not report one.
    """

    t: float
    h: float
    error_norm: float
    accepted: bool


@dataclass(frozen=True)
class Solution:
    """Result of a sampling loop.

    Attributes:
        z: final state, in the dtype of the initial one.
        nfe: number of evaluations of the drift or network (one evaluation serves the whole batch).
        accepted, rejected: attempted steps.
        seconds: wall-clock time of the loop.
        steps: every attempted step in order.
    """

    z: Tensor
    nfe: int
    accepted: int
    rejected: int
    seconds: float
    steps: list[StepRecord] = field(default_factory=list)


class CountedDrift:
    """Calls the drift, counts the calls and checks the shape of what it returns."""

    def __init__(self, drift: Drift, shape: torch.Size) -> None:
        self.drift = drift
        self.shape = shape
        self.nfe = 0

    def evaluate(self, t: float, z: Tensor) -> Tensor:
        return self.counted(self.drift(t, z))

    def counted(self, out: Tensor) -> Tensor:
        """The result of one evaluation, of the drift or of its network."""
        self.nfe += 1
        if out.shape != self.shape:
            raise ValueError(
                f"the drift returned shape {tuple(out.shape)} for a state of shape {tuple(self.shape)}: "
                "they must be equal"
            )
        return out


def checked_times(times: Sequence[float]) -> list[float]:
    """The times of a fixed grid as numbers.

    Raises:
        ValueError: fewer than two, one that is not finite, or a step of size 0.
    """
    times = [float(t) for t in times]
    if len(times) < 2 or not all(map(math.isfinite, times)) or any(a == b for a, b in pairwise(times)):
        raise ValueError(f"times must be at least two finite numbers, each other than the next, got {times}")
    return times


def send(like: Tensor, *parts: Tensor) -> list[Tensor]:
    """The parts in the dtype and on the device of ``like``, by one transfer."""
    if not parts:
        return []
    flat = torch.cat([part.reshape(-1) for part in parts]).to(like.dtype).to(like.device)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise ``ValueError`` for tolerances that are negative, not finite or both 0."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if rtol == 0 and atol == 0:
        raise ValueError("rtol and atol are both 0: give at least one of them a positive value")


def fixed_steps(times: Sequence[float]) -> list[StepRecord]:
    """The records of the steps between given times."""
    return [StepRecord(t=a, h=b - a, error_norm=math.nan, accepted=True) for a, b in pairwise(times)]


def raise_if_not_finite(finite: Tensor, times: Sequence[float]) -> None:
    """Raise for the first step after which the state was not finite; ``finite`` has a flag for each."""
    flags = finite.tolist()
    if not all(flags):
        first = flags.index(False)
        raise NonFiniteError(
            f"NaN or infinity in the state after step {first + 1} of {len(flags)}, at t = {times[first + 1]!r}"
        )


def supports_float64(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be float64 (Apple's Metal backend has none)."""
    return device.type != "mps"
