"""Sampling: the probability-flow ODE and the ancestral sampler.

``solve_ode`` integrates ``dz/dt = drift(t, z)`` to a tolerance, ``solve_fixed`` over given times; the solvers know
nothing of networks or SDEs, except that of a ``ScoreTerm`` they combine the parts themselves. ``solve_exponential``
integrates a ``ScoreTerm`` over given times, its linear part exactly. ``sample_ancestral`` runs the DDPM discretisation.
"""

from __future__ import annotations

from lsgm_fast.sampling.ancestral import VARIANCES, sample_ancestral
from lsgm_fast.sampling.exponential import natural_grid, solve_exponential
from lsgm_fast.sampling.ode import SOLVERS, resolve_solver, solve_ode
from lsgm_fast.sampling.runge_kutta import solve_fixed
from lsgm_fast.sampling.solution import (
    Callback,
    Drift,
    Progress,
    Solution,
    SolverError,
    StepRecord,
    supports_float64,
)
from lsgm_fast.sampling.tableaus import HEUN, RK23, RK45, Tableau
from lsgm_fast.sampling.terms import ScoreTerm

__all__ = [
    "HEUN",
    "RK23",
    "RK45",
    "SOLVERS",
    "VARIANCES",
    "Callback",
    "Drift",
    "Progress",
    "ScoreTerm",
    "Solution",
    "SolverError",
    "StepRecord",
    "Tableau",
    "natural_grid",
    "resolve_solver",
    "sample_ancestral",
    "solve_exponential",
    "solve_fixed",
    "solve_ode",
    "supports_float64",
]
