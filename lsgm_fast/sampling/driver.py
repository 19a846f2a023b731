"""Every solver behind one function: :func:`integrate` runs the one that is named, to a tolerance or with a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lsgm_fast import trace
from lsgm_fast.errors import unknown_name
from lsgm_fast.sampling.ancestral import sample_ancestral
from lsgm_fast.sampling.exponential import solve_exponential
from lsgm_fast.sampling.grids import GRIDS, time_grid
from lsgm_fast.sampling.methods import METHODS, extrapolated, plan
from lsgm_fast.sampling.ode import PER_SAMPLE, SOLVERS, solve_ode
from lsgm_fast.sampling.programs import run_program
from lsgm_fast.sampling.runge_kutta import solve_fixed
from lsgm_fast.sampling.solution import CONTROLS, Callback, Solution, checked_times
from lsgm_fast.sampling.stochastic import (
    solve_adaptive_sde,
    solve_euler_maruyama,
    solve_predictor_corrector,
)
from lsgm_fast.sampling.tableaus import EULER, HEUN, RK4
from lsgm_fast.sampling.terms import ScoreTerm

Draw: TypeAlias = Callable[[int, Tensor | None], Tensor]
"""``draw(i, positions)``: the i-th standard-normal draw of the samples at these positions (None: of all)."""

_TABLEAUS = {"euler": EULER, "heun": HEUN, "rk4": RK4}
_EXTRAPOLATING = tuple(name for name in METHODS if name.startswith("exponential"))
DEFAULT_EVALUATIONS = {"ancestral": 1000, "euler_maruyama": 1000, "predictor_corrector": 1000}
FEW_EVALUATIONS = 10

ADAPTIVE = (*(s for s in SOLVERS if s != "auto"), "exponential", "adaptive_sde")
"""Solvers that meet a tolerance."""
BUDGETED = (*METHODS, *_TABLEAUS, "ancestral", "euler_maruyama", "predictor_corrector")
"""Solvers that take a number of evaluations."""


@dataclass(frozen=True)
class Request:
    """What is asked of a solver; :meth:`check` says what does not fit together.

    Attributes:
        solver: a name of :data:`ADAPTIVE` or :data:`BUDGETED`. tol: rtol and atol. evaluations: of the network.
        grid: a name of :data:`~lsgm_fast.sampling.GRIDS`, or the times themselves from 1 to ``ode_eps``.
        control: ``"joint"`` or ``"per_sample"`` steps. extrapolate: from ``ode_eps`` to 0 without an evaluation.
    """

    solver: str
    tol: float | None = None
    evaluations: int | None = None
    ode_eps: float | None = None
    grid: str | Sequence[float] | None = None
    control: str = "joint"
    extrapolate: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether the steps are chosen to meet a tolerance."""
        if self.solver == "exponential":
            return self.tol is not None
        return self.solver in ADAPTIVE

    def check(self) -> None:
        """Raise ``ValueError`` for the first thing that does not fit."""
        solver, evaluations = self.solver, self.evaluations
        if solver not in (*ADAPTIVE, *BUDGETED):
            raise unknown_name("solver", solver, ("auto", *dict.fromkeys((*ADAPTIVE, *BUDGETED))))
        if self.tol is not None and evaluations is not None:
            raise ValueError(
                f"tol={self.tol} and evaluations={evaluations} exclude each other: give a tolerance or a budget"
            )
        if evaluations is not None:
            if solver not in BUDGETED:
                raise ValueError(
                    f"evaluations={evaluations} needs a solver with a fixed budget, such as 'exponential' or "
                    f"'ancestral': {solver!r} chooses its evaluations to meet tol"
                )
            if not isinstance(evaluations, int) or evaluations < 1:
                raise ValueError(f"evaluations must be a whole number of at least 1, got {evaluations!r}")
            if evaluations % evaluations_per_step(solver):
                raise ValueError(
                    f"evaluations must be a multiple of {evaluations_per_step(solver)} for solver={solver!r}, "
                    f"which takes that many per step, got {evaluations}"
                )
        if self.tol is not None:
            if solver not in ADAPTIVE:
                raise ValueError(f"tol is for adaptive solvers: solver={solver!r} takes evaluations")
            if not (math.isfinite(self.tol) and self.tol > 0.0):
                raise ValueError(f"tol must be positive, got {self.tol}")
        if self.ode_eps is not None:
            if solver == "ancestral":
                raise ValueError("ode_eps is for the other solvers: solver='ancestral' ends at t = 0")
            if not 0.0 < self.ode_eps < 1.0:
                raise ValueError(f"ode_eps must be in (0, 1), got {self.ode_eps}")
        if self.grid is not None:
            if self.adaptive or solver == "ancestral":
                raise ValueError(
                    f"grid is for solvers over given times: solver={solver!r} has its own here; name another, or give "
                    "evaluations in place of a tolerance"
                )
            if isinstance(self.grid, str) and self.grid not in GRIDS:
                raise unknown_name("grid", self.grid, GRIDS)
        if self.control not in CONTROLS:
            raise unknown_name("control", self.control, CONTROLS)
        if self.control != "joint" and not (self.adaptive and solver in (*PER_SAMPLE, "exponential")):
            raise ValueError(
                f"control={self.control!r} is for {', '.join(map(repr, PER_SAMPLE))} and 'exponential' with a "
                f"tolerance, not for solver={solver!r}"
            )
        if self.extrapolate and solver not in _EXTRAPOLATING:
            raise ValueError(
                f"extrapolate is for {', '.join(map(repr, _EXTRAPOLATING))}, not for solver={solver!r}"
            )


def evaluations_per_step(solver: str) -> int:
    """Evaluations of the network that a step of a solver with a fixed budget takes."""
    if solver in METHODS:
        return METHODS[solver].evaluations
    if solver in _TABLEAUS:
        return len(_TABLEAUS[solver].b)
    return 2 if solver == "predictor_corrector" else 1


@trace.spanned("solve")
def integrate(
    term: ScoreTerm,
    z1: Tensor,
    request: Request,
    *,
    ode_eps: float,
    tol: float,
    draw: Draw,
    temperature: float = 1.0,
    state_dtype: torch.dtype = torch.float64,
    callback: Callback | None = None,
) -> Solution:
    """Carry ``z1`` (B, C, ...) from t = 1 to the data by the solver that the request names.

    Args:
        term: the score network and its SDE. ode_eps, tol: where the request has None (``"adaptive_sde"`` then has
            tolerances of its own). draw: noise of the stochastic
            solvers. temperature: factor on it. state_dtype: of the adaptive ODE solvers' state.

    Raises:
        ValueError: the request does not fit together, or its grid does not lead from 1 to ``ode_eps``.
    """
    request.check()
    solver = request.solver
    ode_eps = ode_eps if request.ode_eps is None else request.ode_eps
    tol = tol if request.tol is None else request.tol
    if request.adaptive:
        if solver == "adaptive_sde":
            # An ODE recipe's tolerance would be far too fine for the SDE, whose paper names its own.
            stated: dict[str, Any] = {} if request.tol is None else {"rtol": tol, "atol": tol}
            return solve_adaptive_sde(
                term,
                z1,
                t_end=ode_eps,
                noise_fn=draw,
                temperature=temperature,
                callback=callback,
                **stated,
            )
        if solver == "exponential":
            solution = solve_exponential(
                term,
                z1.to(state_dtype),
                t_end=ode_eps,
                rtol=tol,
                atol=tol,
                control=request.control,
                extrapolate=request.extrapolate,
                callback=callback,
            )
            return replace(solution, z=solution.z.to(z1.dtype))
        return solve_ode(
            term,
            z1,
            t_end=ode_eps,
            solver=solver,
            rtol=tol,
            atol=tol,
            control=request.control,
            state_dtype=state_dtype,
            callback=callback,
        )
    evaluations = request.evaluations
    if evaluations is None:
        per_step = evaluations_per_step(solver)
        evaluations = -(-DEFAULT_EVALUATIONS.get(solver, FEW_EVALUATIONS) // per_step) * per_step
    if solver == "ancestral":
        return sample_ancestral(
            term.predict,
            z1,
            sde=term.sde,
            mixing_logit=term.mixing_logit,
            steps=evaluations,
            noise_fn=lambda i: draw(i, None),
            temperature=temperature,
            callback=callback,
        )
    times = _times(term, request, evaluations // evaluations_per_step(solver), ode_eps)
    if solver in METHODS:
        program = plan(solver, term, times)
        if request.extrapolate:
            program = extrapolated(program, term)
        return run_program(program, term, z1, callback=callback)
    if solver in _TABLEAUS:
        return solve_fixed(
            term, z1, times, tableau=_TABLEAUS[solver], state_dtype=state_dtype, callback=callback
        )
    run = solve_euler_maruyama if solver == "euler_maruyama" else solve_predictor_corrector
    return run(term, z1, times, noise_fn=lambda i: draw(i, None), temperature=temperature, callback=callback)


def _times(term: ScoreTerm, request: Request, steps: int, ode_eps: float) -> list[float]:
    grid = request.grid
    if grid is None:
        grid = METHODS[request.solver].grid if request.solver in METHODS else "natural"
        if request.solver in DEFAULT_EVALUATIONS:
            grid = "uniform"
    if isinstance(grid, str):
        return time_grid(grid, term.sde, steps, 1.0, ode_eps)
    times = checked_times(grid)
    if (times[0], times[-1]) != (1.0, ode_eps):
        raise ValueError(
            f"the grid goes from t = {times[0]} to {times[-1]}: expected 1.0 to ode_eps={ode_eps}"
        )
    if request.evaluations is not None and len(times) - 1 != steps:
        raise ValueError(
            f"the grid has {len(times) - 1} steps, and evaluations={request.evaluations} makes {steps}: "
            "leave evaluations out"
        )
    return times
