"""``solve_ode``: one entry point for every ODE solver."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsgm_fast.errors import unknown_name
from lsgm_fast.sampling import solution as _solution
from lsgm_fast.sampling.runge_kutta import solve_adaptive
from lsgm_fast.sampling.solution import CONTROLS, Callback, Drift, Solution
from lsgm_fast.sampling.tableaus import DOP853, RK23, RK45
from lsgm_fast.sampling.torchdiffeq_solvers import solve_dopri5, solve_scipy

_TABLEAUS = {"rk45": RK45, "rk23": RK23, "dop853": DOP853}
_SOLVERS: dict[str, Callable[..., Solution]] = {
    **{name: functools.partial(solve_adaptive, tableau=tableau) for name, tableau in _TABLEAUS.items()},
    "scipy": solve_scipy,
    "dopri5": solve_dopri5,
}
SOLVERS = ("auto", *_SOLVERS)
"""Names that ``solve_ode`` accepts."""
PER_SAMPLE = tuple(_TABLEAUS)
"""Those that can control the steps of every sample on its own."""


def resolve_solver(solver: str) -> str:
    """The solver that a name stands for: ``"auto"`` is ``"rk45"``.

    Raises:
        ValueError: unknown name; lists the valid ones and the closest.
    """
    if solver == "auto":
        return "rk45"
    if solver not in _SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    return solver


@torch.no_grad()
def solve_ode(
    drift: Drift,
    z1: Tensor,
    *,
    t_start: float = 1.0,
    t_end: float,
    solver: str = "auto",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    state_dtype: torch.dtype = torch.float64,
    callback: Callback | None = None,
    max_steps: int = 100_000,
    control: str = "joint",
) -> Solution:
    """Integrate ``dz/dt = drift(t, z)`` from ``t_start`` to ``t_end``, in either direction of time.

    With ``control="joint"`` one step size and one error norm serve the whole batch, as in the published sampler, so a
    sample depends (within the tolerance) on the others it is drawn with. With ``"per_sample"`` every sample has its
    own, as if it were solved alone, and the network is called with those alone that have not arrived.

    Args:
        drift: ``drift(t, z)`` with ``t`` a Python float; returns z's shape in any floating-point dtype. Of a
            :class:`~lsgm_fast.sampling.ScoreTerm` ``"rk45"``, ``"rk23"`` and ``"dop853"`` call the network alone.
        z1: state at ``t_start``, (B, ...).
        solver: ``"rk45"`` (``"auto"``): SciPy's RK45 on the tensor's device, its state in ``state_dtype``.
            ``"rk23"``: the same with SciPy's RK23, Bogacki and Shampine's 3(2) pair.
            ``"dop853"``: the same with SciPy's DOP853, Dormand and Prince's 8(5, 3) method, for solves to tight
            tolerances with a float64 state. At loose ones (1e-6 and above) RK45 is cheaper, and a first long step
            can miss by far more than the tolerance, as SciPy's does.
            ``"scipy"``: the published path through torchdiffeq's ``scipy_solver``: a float64 NumPy state on
            the host, the drift called in z1's own dtype. ``"dopri5"``: torchdiffeq's own Dormand-Prince.
        rtol, atol: tolerances on the local error (the published sampler uses one value for both).
        state_dtype: dtype of the state that ``drift`` receives (all but ``"scipy"``).
        callback: called with a ``Progress`` after every attempted step; with ``"per_sample"`` its ``t`` and
            ``fraction`` are of the sample that is furthest behind.
        max_steps: largest number of attempted steps (of each sample with ``"per_sample"``).
        control: ``"joint"`` or ``"per_sample"``; the latter needs a ScoreTerm and one of ``"rk45"``, ``"rk23"`` and
            ``"dop853"``, and reads one number per sample and attempt instead of one per attempt.

    Returns:
        Solution whose ``z`` has z1's dtype, shape and device. An empty batch or interval takes no evaluation.
        With ``"per_sample"`` its ``nfe`` is the number of calls of the network, whatever number of samples each was
        for; ``accepted`` and ``rejected`` count the attempts of all samples, and ``steps`` holds those of the first
        sample, then those of the second, and so on: the last of each is accepted and ends at ``t_end``.

    Raises:
        ValueError: unknown solver or control, a solver or drift that ``"per_sample"`` cannot use, invalid tolerance,
            time or dtype, a device without float64, or a drift of the wrong shape.
        NonFiniteError: the drift produced NaN or infinity (names the step, the stage, the time and, with
            ``"per_sample"``, the sample).
        SolverError: the step size fell below the resolution of time, or ``max_steps`` was reached.
    """
    name = resolve_solver(solver)
    method = _SOLVERS[name]
    if control not in CONTROLS:
        raise unknown_name("step control", control, CONTROLS)
    if name in _TABLEAUS:
        method = functools.partial(method, control=control)
    elif control != "joint":
        raise ValueError(
            f"control={control!r} needs one of the solvers {', '.join(_TABLEAUS)}, got {solver!r}: its steps are those "
            "of the whole batch"
        )
    if not isinstance(z1, Tensor) or not z1.is_floating_point():
        kind = z1.dtype if isinstance(z1, Tensor) else type(z1).__name__
        raise ValueError(f"the initial state must be a floating-point tensor, got {kind}")
    for what, value in (("t_start", t_start), ("t_end", t_end)):
        if not math.isfinite(value):
            raise ValueError(f"{what} must be finite, got {value}")
    _solution.check_tolerances(rtol, atol)
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if state_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state_dtype must be torch.float32 or torch.float64, got {state_dtype}")
    if (
        state_dtype == torch.float64
        and method is not solve_scipy
        and not _solution.supports_float64(z1.device)
    ):
        raise ValueError(
            f"device {z1.device} has no float64, which the solver state uses by default: pass "
            "state_dtype=torch.float32 (tolerances below about 1e-5 are then out of reach)"
        )
    if z1.numel() == 0 or t_start == t_end:
        return Solution(z=z1.clone(), nfe=0, accepted=0, rejected=0, seconds=0.0)
    return method(
        drift,
        z1,
        t_start=float(t_start),
        t_end=float(t_end),
        rtol=float(rtol),
        atol=float(atol),
        state_dtype=state_dtype,
        callback=callback,
        max_steps=max_steps,
    )
