"""Explicit Runge-Kutta methods on the device of the state.

With :data:`~lsgm_fast.sampling.tableaus.RK45` the adaptive driver decides like ``scipy.integrate.solve_ivp``: the same
tableau, initial step, step-size controller, joint error norm and clipped last step, hence the same evaluations and the
same accepted and rejected steps. Time, step size and the decision about a step stay on the device; the host reads one
number per attempted step, and none for a fixed grid.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lsgm_fast import ops
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.reference.rk import CONTROL_FIELDS
from lsgm_fast.sampling import solution as _solution
from lsgm_fast.sampling.solution import (
    Callback,
    CountedDrift,
    Drift,
    Progress,
    Solution,
    SolverError,
    StepRecord,
)
from lsgm_fast.sampling.tableaus import HEUN, Tableau
from lsgm_fast.sampling.terms import ScoreTerm

SMALLEST_RTOL = 100 * sys.float_info.epsilon
_T, _H, _T_NEXT, _, _SIGNAL, _ACCEPTED, _REJECTED, _NORM = range(len(CONTROL_FIELDS))


class _Times:
    """The times of a step's stages: on the device, and where a drift wants numbers, on the host."""

    def __init__(self, tensor: Tensor, numbers: Sequence[float] | None = None) -> None:
        self.tensor = tensor
        self._numbers = numbers
        self._coefficients: tuple[Tensor, Tensor, Tensor] | None = None

    def at(self, stage: int) -> float:
        assert self._numbers is not None
        return self._numbers[stage]

    def coefficients(self, term: ScoreTerm) -> tuple[Tensor, Tensor, Tensor]:
        """(p, q, r) of all stages, evaluated at once."""
        if self._coefficients is None:
            self._coefficients = term.sde.drift_coefficients(self.tensor)
        return self._coefficients


class _Stages:
    """The stages of one step after another: evaluates the drift and combines.

    Where a method's last stage is the first of the next step it is not copied: the two exchange their places in ``k``,
    so the rows of the tableau exist in both orders.
    """

    def __init__(self, drift: Drift, tableau: Tableau, y: Tensor) -> None:
        self.tableau = tableau
        self.y = y
        self.z = y
        self.k = torch.empty((tableau.stages, *y.shape), dtype=y.dtype, device=y.device)
        self.calls = CountedDrift(drift, y.shape)
        self.term = drift if isinstance(drift, ScoreTerm) and drift.separable else None
        self._turned = False
        last = tableau.stages - 1
        straight = list(range(tableau.stages))
        turned = [last, *straight[1:-1], 0]
        self._orders = (straight, turned)
        self._rows = tuple(
            {name: [_placed(row, order) for row in rows] for name, rows in _rows(tableau).items()}
            for order in self._orders
        )

    @property
    def nfe(self) -> int:
        return self.calls.nfe

    def slot(self, stage: int) -> int:
        """Where a stage lies in ``k``."""
        return self._orders[self._turned][stage]

    def row(self, stage: int) -> list[float]:
        """Coefficients of the state at which ``stage`` is evaluated."""
        return self._rows[self._turned]["a"][stage]

    def _end(self, name: str) -> list[float]:
        return self._rows[self._turned][name][0]

    def evaluate(self, stage: int, t: float) -> None:
        """The derivative at ``z``, stored as ``stage``."""
        self.k[self.slot(stage)].copy_(self.calls.evaluate(t, self.z))

    def begin(self, h: Tensor) -> None:
        """The state of the second stage, from the first."""
        self.z = ops.rk_stage(self.y, self.k, self.row(1), h)

    def middle(self, stage: int, times: _Times, h: Tensor) -> None:
        """A stage's derivative and the state of the next one."""
        self._combine(stage, times, self.row(stage + 1), h)

    def solution(self, stage: int, times: _Times, h: Tensor) -> None:
        """A stage's derivative and the solution, in ``z``."""
        self._combine(stage, times, self._end("b"), h)

    def _combine(self, stage: int, times: _Times, row: list[float], h: Tensor) -> None:
        if self.term is None:
            self.evaluate(stage, times.at(stage))
            self.z = ops.rk_stage(self.y, self.k, row, h)
        else:
            eps, parts = self._parts(stage, times)
            ops.rk_drift_stage(eps, self.z, *parts, self.y, self.k, self.slot(stage), row, h)

    def finish(self, times: _Times, h: Tensor, rtol: float, atol: float) -> Tensor:
        """The last stage's derivative, the solution in ``z``, and the norm of its error."""
        stage = self.tableau.stages - 1
        b, e = self._end("b"), self._end("e")
        if self.term is None:
            self.evaluate(stage, times.at(stage))
            self.z, norm = ops.rk_finish(self.y, self.k, b, e, h, rtol, atol)
            return norm
        eps, parts = self._parts(stage, times)
        return ops.rk_drift_finish(eps, self.z, *parts, self.y, self.k, self.slot(stage), b, e, h, rtol, atol)

    def _parts(
        self, stage: int, times: _Times
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor, Tensor, Tensor]]:
        assert self.term is not None
        t = times.tensor[stage]
        eps = self.calls.counted(self.term.predict(self.z, t.expand(self.y.shape[0])))
        p, q, r = times.coefficients(self.term)
        return eps, (self.term.mixing_logit, p[stage], q[stage], r[stage])

    def restart(self, t: float) -> None:
        """The first stage, evaluated anew."""
        self.z = self.y
        self.evaluate(0, t)

    def advance(self) -> None:
        """Go on from the solution."""
        self.y = self.z

    def accept(self) -> None:
        """Go on from the solution; a reused last stage becomes the first."""
        self.advance()
        if self.tableau.reuses_last:
            self._turned = not self._turned

    def states(self, h: float) -> list[Tensor]:
        """The states at which the stages of the last attempt were evaluated, to find out what went wrong."""
        return [self.y] + [
            ops.rk_stage(self.y, self.k, self.row(i), h) for i in range(1, self.tableau.stages)
        ]


def _rows(tableau: Tableau) -> dict[str, Sequence[Sequence[float]]]:
    return {"a": tableau.a, "b": [tableau.b], "e": [tableau.e]}


def _placed(row: Sequence[float], order: Sequence[int]) -> list[float]:
    """A row of the tableau in the order in which the stages lie in memory."""
    out = [0.0] * len(order)
    for stage, coefficient in enumerate(row):
        out[order[stage]] = coefficient
    return out


def _stage_times(tableau: Tableau, t: float, t_next: float) -> list[float]:
    h = t_next - t
    return [t_next if c == 1.0 else t + c * h for c in tableau.c]


def _control_device(y: Tensor) -> torch.device:
    return y.device if _solution.supports_float64(y.device) else torch.device("cpu")


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x) / x.numel() ** 0.5


def _initial_step(stages: _Stages, t: float, t_end: float, rtol: float, atol: float) -> float:
    """Size of the first step (Hairer, Norsett and Wanner, section II.4); takes one evaluation."""
    y, f0 = stages.y, stages.k[0]
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
    f1 = stages.calls.evaluate(probe, ops.rk_stage(y, f0[None], (1.0,), h0 * direction)).to(y.dtype)
    d2 = float(_rms((f1 - f0) / scale)) / h0
    if not math.isfinite(d2):
        raise NonFiniteError(
            f"the drift's second evaluation (step 0, stage 2, which chooses the first step size) holds NaN or "
            f"infinity, or overflows, at t = {probe!r}"
        )
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = (0.01 / max(d1, d2)) ** (1 / (stages.tableau.error_order + 1))
    return min(100 * h0, h1, interval)


def _first_control(t: float, size: float, t_end: float) -> list[float]:
    direction = math.copysign(1.0, t_end - t)
    size = max(size, 10 * abs(math.nextafter(t, direction * math.inf) - t))
    t_next = t + direction * size
    if direction * (t_next - t_end) > 0:
        t_next = t_end
    return [t, t_next - t, t_next, 0.0, t, 0.0, 0.0, 0.0]


def _raise_if_stage_not_finite(stages: _Stages, t: float, t_next: float, step: int) -> None:
    """Raise for the first stage of a step that is not finite; return where all are (the norm overflowed)."""
    h = t_next - t
    times = _stage_times(stages.tableau, t, t_next)
    for stage, state in enumerate(stages.states(h)):
        if bool(torch.isfinite(stages.k[stages.slot(stage)]).all()):
            continue
        origin = "drift" if bool(torch.isfinite(state).all()) else "solver's state overflowed, so the drift"
        raise NonFiniteError(
            f"NaN or infinity in step {step}, stage {stage + 1} of {stages.tableau.stages}, at t = {times[stage]!r}: "
            f"the {origin} returned a value that is not finite (step from t = {t!r}, h = {h!r})"
        )


def solve_adaptive(
    drift: Drift,
    z1: Tensor,
    *,
    tableau: Tableau,
    t_start: float,
    t_end: float,
    rtol: float,
    atol: float,
    state_dtype: torch.dtype,
    callback: Callback | None,
    max_steps: int,
) -> Solution:
    """Integrate with an embedded pair and SciPy's step control; see ``solve_ode``.

    Takes 2 evaluations and ``tableau.stages - 1`` for each attempted step (and, where the last stage is not reused,
    one for each step that follows an accepted one).

    Departs from SciPy in one point: a stage that holds NaN or infinity is an error here, whereas SciPy rejects
    the step and tries smaller ones until it gives up.
    """
    name = tableau.name.lower()
    if rtol < SMALLEST_RTOL:
        warnings.warn(f"rtol = {rtol} is too small for float64: using {SMALLEST_RTOL}", stacklevel=4)
        rtol = SMALLEST_RTOL
    started = time.perf_counter()
    stages = _Stages(drift, tableau, z1.to(state_dtype).contiguous())
    stages.evaluate(0, t_start)
    size = _initial_step(stages, t_start, t_end, rtol, atol)
    row = _first_control(t_start, size, t_end)
    control = torch.tensor(row, dtype=torch.float64, device=_control_device(z1))
    nodes = torch.tensor(tableau.c, dtype=torch.float64, device=control.device)
    exponent = -1 / (tableau.error_order + 1)

    # One block of control per attempt; the records of the steps are made from them when all is done.
    controls = [control]
    t, accepted = t_start, False
    while t != t_end:
        attempt = len(controls)
        if attempt > max_steps:
            raise SolverError(
                f"{name} attempted max_steps = {max_steps} steps and reached t = {t!r} of {t_end!r}: raise the "
                "tolerances or max_steps"
            )
        numbers = _stage_times(tableau, t, row[_T_NEXT]) if stages.term is None else None
        times = _Times(torch.lerp(control[_T], control[_T_NEXT], nodes), numbers)
        h = control[_H]
        if accepted and not tableau.reuses_last:
            stages.restart(t)
        stages.begin(h)
        for stage in range(1, tableau.stages - 1):
            stages.middle(stage, times, h)
        norm = stages.finish(times, h, rtol, atol).to(control.device)
        control = ops.rk_control(control, norm, t_end, exponent)
        controls.append(control)
        # The one number that the host waits for. A drift that takes numbers needs the whole block, in one transfer.
        if stages.term is None:
            row = control.tolist()
        signal = float(control[_SIGNAL]) if stages.term is not None else row[_SIGNAL]
        if not math.isfinite(signal):
            before, after = controls[-2].tolist(), control.tolist()
            if math.isnan(signal):
                _raise_if_stage_not_finite(stages, t, before[_T_NEXT], attempt)
            if abs(after[_H]) < 10 * abs(math.nextafter(t, t_end) - t):
                raise SolverError(
                    f"{name} needs a step smaller than the spacing of numbers at t = {t!r} (step {attempt}, "
                    f"h = {after[_H]:.3g}): the drift is discontinuous or too stiff there, or rtol = {rtol} and "
                    f"atol = {atol} ask for more digits than {state_dtype} has; raise the tolerances or stop earlier"
                )
            signal = t  # the norm overflowed, the stages did not: a rejected step
        accepted = signal != t
        if accepted:
            stages.accept()
            t = signal
        if callback is not None:
            callback(Progress(fraction=(t - t_start) / (t_end - t_start), t=t, nfe=stages.nfe))

    rows = torch.stack(controls).tolist()
    steps = [
        StepRecord(
            t=before[_T],
            h=before[_H],
            error_norm=after[_NORM],
            accepted=after[_ACCEPTED] > before[_ACCEPTED],
        )
        for before, after in pairwise(rows)
    ]
    return Solution(
        z=stages.y.to(z1.dtype),
        nfe=stages.nfe,
        accepted=int(rows[-1][_ACCEPTED]),
        rejected=int(rows[-1][_REJECTED]),
        seconds=time.perf_counter() - started,
        steps=steps,
    )


@torch.no_grad()
def solve_fixed(
    drift: Drift,
    z1: Tensor,
    times: Sequence[float],
    *,
    tableau: Tableau = HEUN,
    state_dtype: torch.dtype = torch.float64,
    callback: Callback | None = None,
) -> Solution:
    """Integrate ``dz/dt = drift(t, z)`` over the steps between given times; nothing is read back until the end.

    Args:
        drift: as for ``solve_ode``; a :class:`ScoreTerm` is combined by the solver itself.
        z1: state at ``times[0]``, (B, ...). times: at least two, all different from their neighbours.
        tableau: the method; its embedded solution is not used. RK45 takes 6 evaluations a step, RK23 3, Heun 2.
        state_dtype: float32 or float64. callback: called with a ``Progress`` after every step.

    Returns:
        Solution with the state in z1's dtype; its step records hold no error norm.

    Raises:
        ValueError: fewer than two times, times that are not finite or a step of size 0.
        NonFiniteError: the state became NaN or infinite (names the first such step).
    """
    times = _solution.checked_times(times)
    started = time.perf_counter()
    if z1.numel() == 0:
        return Solution(z=z1.clone(), nfe=0, accepted=0, rejected=0, seconds=0.0)
    stages = _Stages(drift, tableau, z1.to(state_dtype).contiguous())
    grid = torch.tensor(times, dtype=torch.float64, device=_control_device(z1))
    nodes = torch.tensor(tableau.c, dtype=torch.float64, device=grid.device)
    all_times = torch.lerp(grid[:-1, None], grid[1:, None], nodes)
    sizes = grid.diff()
    last = len(tableau.b) - 1
    finite = torch.ones(len(sizes), dtype=torch.bool, device=z1.device)
    for i, (t, t_next) in enumerate(pairwise(times)):
        step = _Times(all_times[i], _stage_times(tableau, t, t_next))
        stages.restart(t)
        stages.begin(sizes[i])
        for stage in range(1, last):
            stages.middle(stage, step, sizes[i])
        stages.solution(last, step, sizes[i])
        stages.advance()
        finite[i] = torch.isfinite(stages.y).all()
        if callback is not None:
            fraction = (t_next - times[0]) / (times[-1] - times[0]) if times[-1] != times[0] else 1.0
            callback(Progress(fraction=fraction, t=t_next, nfe=stages.nfe))
    _solution.raise_if_not_finite(finite, times)
    return Solution(
        z=stages.y.to(z1.dtype),
        nfe=stages.nfe,
        accepted=len(sizes),
        rejected=0,
        seconds=time.perf_counter() - started,
        steps=_solution.fixed_steps(times),
    )
