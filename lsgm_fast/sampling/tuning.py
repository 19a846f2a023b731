"""Grids made for one model: the times at which a few evaluations of its network serve best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lsgm_fast.sampling.grids import NATURAL_POWER, natural_grid
from lsgm_fast.sampling.methods import plan
from lsgm_fast.sampling.ode import solve_ode
from lsgm_fast.sampling.programs import run_program
from lsgm_fast.sampling.terms import ScoreTerm

EXACT_TOL = 1e-6


@dataclass(frozen=True)
class TunedGrid:
    """``times``, and the relative latent error with the natural grid and with them, on noise that found neither."""

    times: list[float]
    error_before: float
    error_after: float


def optimise_grid(
    term: ScoreTerm,
    noise: Tensor,
    steps: int,
    t_end: float,
    *,
    method: str = "exponential",
    trials: int = 200,
    callback: Callable[[int, float], object] | None = None,
) -> TunedGrid:
    """Search the times of ``steps`` steps from 1 to ``t_end`` that end nearest to the exact latents.

    Nelder and Mead's method on the logarithms of the steps in u^(1/1.5), from the natural grid. Half of the noise is
    searched on, the other half judges: where the grid that was found is no better there, the natural one is returned.

    Args:
        noise: states at t = 1, (B, C, ...), at least 2 of them. trials: most grids tried, each ``steps`` evaluations.
        callback: called with (trials so far, best error).

    Raises:
        ValueError: fewer than 2 states, or steps below 2 (one step has no time to choose).
    """
    from scipy.optimize import minimize  # takes long to import

    if len(noise) < 2:
        raise ValueError(
            f"at least 2 noise samples are needed, to search on and to judge with, got {len(noise)}"
        )
    if steps < 2:
        raise ValueError(f"steps must be at least 2 for there to be a time to choose, got {steps}")
    sde = term.sde
    exact = solve_ode(term, noise, t_end=t_end, rtol=EXACT_TOL, atol=EXACT_TOL).z.double()
    half = len(noise) // 2

    def error(times: list[float], part: slice) -> float:
        got = run_program(plan(method, term, times), term, noise[part]).z.double()
        return float((got - exact[part]).norm() / exact[part].norm())

    def position(t: list[float]) -> Tensor:
        return sde.u(torch.tensor(t, dtype=torch.float64)).pow(1.0 / NATURAL_POWER)

    start = natural_grid(sde, steps, 1.0, t_end)
    ends = position([1.0, t_end])

    def times_of(logs: np.ndarray) -> list[float]:
        # The last step's logarithm is 0: steps count by their ratios alone.
        sizes = torch.softmax(torch.tensor([*logs, 0.0], dtype=torch.float64), 0)
        x = torch.lerp(ends[0], ends[1], sizes.cumsum(0)[:-1])
        return [1.0, *sde.t_of_u(x.pow(NATURAL_POWER)).tolist(), t_end]

    tried: list[float] = []

    def objective(logs: np.ndarray) -> float:
        tried.append(error(times_of(logs), slice(0, half)))
        if callback is not None:
            callback(len(tried), min(tried))
        return tried[-1]

    widths = position(start).diff().abs().log()
    found = minimize(
        objective,
        (widths[:-1] - widths[-1]).numpy(),
        method="Nelder-Mead",
        options={"maxfev": trials, "adaptive": True},
    )
    best = times_of(found.x)
    before, after = (error(times, slice(half, None)) for times in (start, best))
    return TunedGrid(best, before, after) if after < before else TunedGrid(start, before, before)
