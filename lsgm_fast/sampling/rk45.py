"""SciPy's RK45 (Dormand-Prince 5(4) with its step control), on the device of the state.

Decides like ``scipy.integrate.solve_ivp(method="RK45")``: the same tableau, initial step, step-size controller,
joint error norm and clipped last step, hence the same evaluations and the same accepted and rejected steps.
One number per attempted step, the error norm, travels to the host.
"""

from __future__ import annotations

import math
import sys
import time
import warnings

import torch
from torch import Tensor

from lsgm_fast import ops
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.sampling.solution import (
    Callback,
    CountedDrift,
    Drift,
    Progress,
    Solution,
    SolverError,
    StepRecord,
)

# Dormand and Prince, "A family of embedded Runge-Kutta formulae", J. Comput. Appl. Math. 6 (1980).
C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
A: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
E = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
ERROR_ORDER = 4
STAGES = 7  # six, and the derivative at the end of the step, which is the next step's first

SAFETY = 0.9
MIN_FACTOR = 0.2
MAX_FACTOR = 10.0
ERROR_EXPONENT = -1 / (ERROR_ORDER + 1)
SMALLEST_RTOL = 100 * sys.float_info.epsilon


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x) / x.numel() ** 0.5


def _initial_step(
    drift: CountedDrift, t: float, y: Tensor, f0: Tensor, t_end: float, rtol: float, atol: float
) -> float:
    """Size of the first step (Hairer, Norsett and Wanner, section II.4); takes one evaluation."""
    interval = abs(t_end - t)
    direction = math.copysign(1.0, t_end - t)
    scale = atol + y.abs() * rtol
    d0, d1 = torch.stack([_rms(y / scale), _rms(f0 / scale)]).tolist()
    if not (math.isfinite(d0) and math.isfinite(d1)):
        where = "the initial state" if not bool(torch.isfinite(y).all()) else "the drift's first evaluation"
        raise NonFiniteError(f"{where} (step 0, stage 1) holds NaN or infinity, or overflows, at t = {t!r}")
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, interval)
    probe = t + h0 * direction
    f1 = drift.evaluate(probe, ops.rk_stage(y, f0[None], (1.0,), h0 * direction)).to(y.dtype)
    d2 = float(_rms((f1 - f0) / scale)) / h0
    if not math.isfinite(d2):
        raise NonFiniteError(
            f"the drift's second evaluation (step 0, stage 2, which chooses the first step size) holds NaN or "
            f"infinity, or overflows, at t = {probe!r}"
        )
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = (0.01 / max(d1, d2)) ** (1 / (ERROR_ORDER + 1))
    return min(100 * h0, h1, interval)


def _raise_if_stage_not_finite(
    k: Tensor, y: Tensor, y_new: Tensor, t: float, t_new: float, step: int
) -> None:
    """Raise for the first stage of a step that is not finite; return where all are (the norm overflowed)."""
    h = t_new - t
    for stage in range(STAGES):
        stage_t = t_new if stage == STAGES - 1 else t + C[stage] * h
        if not bool(torch.isfinite(k[stage]).all()):
            if stage == 0:
                state = y
            elif stage == STAGES - 1:
                state = y_new
            else:
                state = ops.rk_stage(y, k[:stage], A[stage], h)
            origin = (
                "drift" if bool(torch.isfinite(state).all()) else "solver's state overflowed, so the drift"
            )
            raise NonFiniteError(
                f"NaN or infinity in step {step}, stage {stage + 1} of {STAGES}, at t = {stage_t!r}: the {origin} "
                f"returned a value that is not finite (step from t = {t!r}, h = {h!r})"
            )


def solve_rk45(
    drift: Drift,
    z1: Tensor,
    *,
    t_start: float,
    t_end: float,
    rtol: float,
    atol: float,
    state_dtype: torch.dtype,
    callback: Callback | None,
    max_steps: int,
) -> Solution:
    """Integrate with SciPy's RK45; see ``solve_ode``. Takes 2 + 6 x attempted steps evaluations.

    Departs from SciPy in one point: a stage that holds NaN or infinity is an error here, whereas SciPy rejects
    the step and tries smaller ones until it gives up.
    """
    if rtol < SMALLEST_RTOL:
        warnings.warn(f"rtol = {rtol} is too small for float64: using {SMALLEST_RTOL}", stacklevel=4)
        rtol = SMALLEST_RTOL
    started = time.perf_counter()
    counted = CountedDrift(drift, z1.shape)
    direction = math.copysign(1.0, t_end - t_start)
    t = t_start
    y = z1.to(state_dtype).contiguous()
    k = torch.empty((STAGES, *y.shape), dtype=state_dtype, device=y.device)
    k[0].copy_(counted.evaluate(t, y))
    h_abs = _initial_step(counted, t, y, k[0], t_end, rtol, atol)

    steps: list[StepRecord] = []
    accepted = 0
    while t != t_end:
        min_step = 10 * abs(math.nextafter(t, direction * math.inf) - t)
        h_abs = max(h_abs, min_step)
        rejected_here = False
        while True:
            if h_abs < min_step:
                raise SolverError(
                    f"rk45 needs a step smaller than the spacing of numbers at t = {t!r} (step {len(steps) + 1}, "
                    f"h = {h_abs:.3g}): the drift is discontinuous or too stiff there, or rtol = {rtol} and "
                    f"atol = {atol} ask for more digits than {state_dtype} has; raise the tolerances or stop earlier"
                )
            if len(steps) == max_steps:
                raise SolverError(
                    f"rk45 attempted max_steps = {max_steps} steps and reached t = {t!r} of {t_end!r}: raise the "
                    "tolerances or max_steps"
                )
            t_new = t + h_abs * direction
            if direction * (t_new - t_end) > 0:
                t_new = t_end
            h = t_new - t
            h_abs = abs(h)

            for stage in range(1, STAGES - 1):
                k[stage].copy_(counted.evaluate(t + C[stage] * h, ops.rk_stage(y, k, A[stage], h)))
            # The last stage is evaluated at the solution itself and serves as the first of the next step.
            k[STAGES - 1].copy_(counted.evaluate(t_new, ops.rk_stage(y, k, B, h)))
            y_new, norm = ops.rk_finish(y, k, B, E, h, rtol, atol)
            error_norm = float(norm)
            if not math.isfinite(error_norm):
                _raise_if_stage_not_finite(k, y, y_new, t, t_new, len(steps) + 1)

            accept = error_norm < 1
            steps.append(StepRecord(t=t, h=h, error_norm=error_norm, accepted=accept))
            if accept:
                factor = (
                    MAX_FACTOR if error_norm == 0 else min(MAX_FACTOR, SAFETY * error_norm**ERROR_EXPONENT)
                )
                if rejected_here:
                    factor = min(1.0, factor)
                t, y = t_new, y_new
                k[0].copy_(k[STAGES - 1])
                accepted += 1
            elif math.isnan(error_norm):
                factor = MIN_FACTOR
            else:
                factor = max(MIN_FACTOR, SAFETY * error_norm**ERROR_EXPONENT)
            h_abs *= factor
            if callback is not None:
                callback(Progress(fraction=(t - t_start) / (t_end - t_start), t=t, nfe=counted.nfe))
            if accept:
                break
            rejected_here = True

    return Solution(
        z=y.to(z1.dtype),
        nfe=counted.nfe,
        accepted=accepted,
        rejected=len(steps) - accepted,
        seconds=time.perf_counter() - started,
        steps=steps,
    )
