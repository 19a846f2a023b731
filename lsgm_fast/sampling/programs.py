"""Methods with a fixed course as data: which states the network is evaluated at, and how they are combined.

Every method that integrates the mixed score's ODE over given times (multistep, singlestep, predictor-corrector, in
whatever parametrisation) is a list of :class:`Stage`, one for each evaluation: the network's output ``e`` at a state z
gives a prediction ``alpha z + beta e``, and new states are linear combinations of one earlier state and of predictions.
All coefficients depend on the SDE, the mixing and the times alone, so they are computed ahead, in float64; one driver,
:func:`run_program`, runs them all, with one ``multistep_update`` for every new state.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm_fast import ops, trace
from lsgm_fast.sampling import solution as _solution
from lsgm_fast.sampling.solution import Callback, CountedDrift, Progress, Solution
from lsgm_fast.sampling.terms import ScoreTerm


@dataclass(frozen=True)
class Update:
    """A new state, ``factor * state[base] + sum_i weights[i] * prediction[predictions[i]]``.

    ``base`` numbers the states (0 is the initial one, further ones count up in the order in which updates make them),
    ``predictions`` the stages; factor and weights are float64 tensors of shape (C,) or (1,).
    """

    base: int
    factor: Tensor
    predictions: tuple[int, ...]
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class Stage:
    """One evaluation of the network, at ``state`` and time ``t``, and the states that it makes possible.

    The stage's prediction is ``alpha * state + beta * output``, of shape (C,) or (1,) each; None: the output itself.
    ``arrives``: the grid's time that the last of the updates stands for; None where it is a point inside a step.
    """

    state: int
    t: float
    updates: tuple[Update, ...]
    parametrisation: tuple[Tensor, Tensor] | None = None
    arrives: float | None = None


@dataclass(frozen=True)
class Program:
    """A method over given ``times``; the last update of the last stage makes the final state."""

    name: str
    times: tuple[float, ...]
    stages: tuple[Stage, ...]

    @property
    def evaluations(self) -> int:
        """Evaluations of the network."""
        return len(self.stages)


class _Sent:
    """The coefficients of a program on a device, all sent in one transfer ahead of the loop."""

    def __init__(self, program: Program, z: Tensor) -> None:
        self._shape = (1, -1, *(1,) * (z.dim() - 2))
        self._parts = iter(_solution.send(z, *self._coefficients(program)))

    @staticmethod
    def _coefficients(program: Program) -> Iterator[Tensor]:
        # The order in which the driver asks for them.
        for stage in program.stages:
            if stage.parametrisation is not None:
                yield from stage.parametrisation
            for update in stage.updates:
                yield update.factor
                yield from update.weights

    def next(self) -> Tensor:
        return next(self._parts).reshape(self._shape)


def _last_uses(program: Program) -> tuple[dict[int, int], dict[int, int]]:
    """For every state and every prediction, the stage after which nobody needs it."""
    states, predictions = {}, {}
    for i, stage in enumerate(program.stages):
        states[stage.state] = i
        for update in stage.updates:
            states[update.base] = i
            predictions.update(dict.fromkeys(update.predictions, i))
    return states, predictions


@torch.no_grad()
def run_program(
    program: Program, term: ScoreTerm, z1: Tensor, *, callback: Callback | None = None
) -> Solution:
    """Run a program from the state ``z1`` (B, C, ...); nothing is read back until the end.

    Args:
        program: such as from :func:`lsgm_fast.sampling.plan`, made for ``term``'s SDE and mixing.
        callback: called with a ``Progress`` after every step.

    Returns:
        Solution with the state in z1's dtype (the arithmetic is at least float32).

    Raises:
        ValueError: a network output of the wrong shape. NonFiniteError: the state became NaN or infinite.
    """
    started = time.perf_counter()
    if z1.numel() == 0:
        return Solution(z=z1.clone(), nfe=0, accepted=0, rejected=0, seconds=0.0)
    z = z1.to(torch.promote_types(z1.dtype, torch.float32))
    times, stages = program.times, program.stages
    sent = _Sent(program, z)
    stamps = torch.tensor([s.t for s in stages], dtype=torch.float64).to(z.dtype).to(z.device)
    calls = CountedDrift(term, z.shape)
    finite = torch.ones(len(times) - 1, dtype=torch.bool, device=z.device)
    state_ends, prediction_ends = _last_uses(program)
    states: dict[int, Tensor] = {0: z}
    predictions: dict[int, Tensor] = {}
    made = step = 0
    for i, stage in enumerate(stages):
        trace.step(step, times[step])
        at = states[stage.state]
        output = calls.counted(term.predict(at, stamps[i].expand(z.shape[0])))
        if stage.parametrisation is not None:
            alpha, beta = sent.next(), sent.next()
            output = ops.multistep_update(at, alpha, [output], [beta])
        predictions[i] = output
        for update in stage.updates:
            factor = sent.next()
            weights = [sent.next() for _ in update.weights]
            made += 1
            z = ops.multistep_update(
                states[update.base], factor, [predictions[k] for k in update.predictions], weights
            )
            states[made] = z
        states = {k: v for k, v in states.items() if k == made or state_ends.get(k, -1) > i}
        predictions = {k: v for k, v in predictions.items() if prediction_ends.get(k, -1) > i}
        if stage.arrives is not None:
            finite[step] = torch.isfinite(z).all()
            step += 1
            if callback is not None:
                fraction = (stage.arrives - times[0]) / (times[-1] - times[0])
                callback(Progress(fraction=fraction, t=stage.arrives, nfe=calls.nfe))
    _solution.raise_if_not_finite(finite, times)
    return Solution(
        z=z.to(z1.dtype),
        nfe=calls.nfe,
        accepted=len(times) - 1,
        rejected=0,
        seconds=time.perf_counter() - started,
        steps=_solution.fixed_steps(times),
    )
