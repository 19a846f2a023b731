"""Sampling: the probability-flow ODE and the reverse SDE of the mixed score.

``integrate`` runs the solver that a ``Request`` names. Beneath it: ``ScoreTerm``, what is integrated; methods over
given times as data (``plan``, ``run_program``), Runge-Kutta methods (``solve_ode``, ``solve_fixed``), adaptive
exponential steps (``solve_exponential``) and the stochastic samplers; ``time_grid`` for the times. ``log_prior`` is the
likelihood.
"""

from __future__ import annotations

from lsgm_fast.sampling.ancestral import VARIANCES, sample_ancestral
from lsgm_fast.sampling.automatic import choose
from lsgm_fast.sampling.driver import ADAPTIVE, BUDGETED, Request, integrate
from lsgm_fast.sampling.exponential import solve_exponential
from lsgm_fast.sampling.grids import GRIDS, natural_grid, time_grid
from lsgm_fast.sampling.likelihood import PROBES, bits_per_dim, log_prior
from lsgm_fast.sampling.methods import METHODS, Method, plan
from lsgm_fast.sampling.ode import SOLVERS, solve_ode
from lsgm_fast.sampling.programs import Program, run_program
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
from lsgm_fast.sampling.stochastic import (
    solve_adaptive_sde,
    solve_euler_maruyama,
    solve_predictor_corrector,
)
from lsgm_fast.sampling.tableaus import DOP853, EULER, HEUN, RK4, RK23, RK45, Tableau
from lsgm_fast.sampling.terms import ScoreTerm
from lsgm_fast.sampling.tuning import TunedGrid, optimise_grid

__all__ = [
    "ADAPTIVE",
    "BUDGETED",
    "DOP853",
    "EULER",
    "GRIDS",
    "HEUN",
    "METHODS",
    "PROBES",
    "RK4",
    "RK23",
    "RK45",
    "SOLVERS",
    "VARIANCES",
    "Callback",
    "Drift",
    "Method",
    "Program",
    "Progress",
    "Request",
    "ScoreTerm",
    "Solution",
    "SolverError",
    "StepRecord",
    "Tableau",
    "TunedGrid",
    "bits_per_dim",
    "choose",
    "integrate",
    "log_prior",
    "natural_grid",
    "optimise_grid",
    "plan",
    "run_program",
    "sample_ancestral",
    "solve_adaptive_sde",
    "solve_euler_maruyama",
    "solve_exponential",
    "solve_fixed",
    "solve_ode",
    "solve_predictor_corrector",
    "supports_float64",
    "time_grid",
]
