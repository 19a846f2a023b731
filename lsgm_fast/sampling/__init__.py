"""Sampling: the probability-flow ODE and the ancestral sampler.

``solve_ode`` integrates ``dz/dt = drift(t, z)``; the solvers know nothing of networks or SDEs.
``sample_ancestral`` runs the DDPM discretisation.
"""

from __future__ import annotations

from lsgm_fast.sampling.ancestral import VARIANCES, sample_ancestral
from lsgm_fast.sampling.ode import SOLVERS, resolve_solver, solve_ode
from lsgm_fast.sampling.solution import (
    Callback,
    Drift,
    Progress,
    Solution,
    SolverError,
    StepRecord,
    supports_float64,
)

__all__ = [
    "SOLVERS",
    "VARIANCES",
    "Callback",
    "Drift",
    "Progress",
    "Solution",
    "SolverError",
    "StepRecord",
    "resolve_solver",
    "sample_ancestral",
    "solve_ode",
    "supports_float64",
]
