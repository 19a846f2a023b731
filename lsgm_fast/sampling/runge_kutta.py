"""Explicit Runge-Kutta methods on the device of the state.

With :data:`~lsgm_fast.sampling.tableaus.RK45` the adaptive driver decides like ``scipy.integrate.solve_ivp``: the same
tableau, initial step, step-size controller, joint error norm and clipped last step, hence the same evaluations and the
same accepted and rejected steps. Time, step size and the decision about a step stay on the device; the host reads one
number per attempted step, and none for a fixed grid.

With ``control="per_sample"`` every sample of a batch has its own time, step size, error norm and decision, and leaves
the batch when it arrives; the host then reads one number per sample and attempted step, in one transfer.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from lsgm_fast import ops, trace
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
    """The times of a step's stages, (S,) or (S, B): on the device, and where a drift wants numbers, on the host."""

    def __init__(self, tensor: Tensor, numbers: Sequence[float] | None = None) -> None:
        self.tensor = tensor
        self._numbers = numbers
        self._coefficients: tuple[Tensor, Tensor, Tensor] | None = None

    def at(self, stage: int) -> float | Tensor:
        return self.tensor[stage] if self._numbers is None else self._numbers[stage]

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
        turned = [last, *straight[1:-1], 0] if tableau.reuses_last else straight
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

    def derivative(self, t: float | Tensor, z: Tensor) -> Tensor:
        """The drift at z; of the drifts only a ``ScoreTerm`` is ever given a tensor of times."""
        return self.calls.evaluate(cast("float", t), z)

    def evaluate(self, stage: int, t: float | Tensor) -> None:
        """The derivative at ``z``, stored as ``stage``."""
        self.k[self.slot(stage)].copy_(self.derivative(t, self.z))

    def begin(self, h: Tensor) -> None:
        """The state of the second stage, from the first; where there is no second, the solution."""
        row = self.row(1) if self.tableau.stages > 1 else self._end("b")
        self.z = ops.rk_stage(self.y, self.k, row, h)

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

    def finish(self, times: _Times, h: Tensor, rtol: float, atol: float, per_sample: bool = False) -> Tensor:
        """The last stage's derivative, the solution in ``z``, and the norm of its error, or that of each sample."""
        stage = self.tableau.stages - 1
        b, e = self._end("b"), self._end("e")
        if self.term is None:
            self.evaluate(stage, times.at(stage))
            self.z, norm = ops.rk_finish(self.y, self.k, b, e, h, rtol, atol, per_sample)
        else:
            eps, parts = self._parts(stage, times)
            slot = self.slot(stage)
            norm = ops.rk_drift_finish(
                eps, self.z, *parts, self.y, self.k, slot, b, e, h, rtol, atol, per_sample
            )
        if not self.tableau.e_low:
            return norm
        _, low = ops.rk_finish(self.y, self.k, b, self._end("e_low"), h, rtol, atol, per_sample)
        # 0 / 0 where the derivatives vanish: no error.
        both = norm * (norm / torch.hypot(norm, 0.1 * low))
        return torch.where((norm == 0) & (low == 0), norm, both)

    def _parts(
        self, stage: int, times: _Times
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor, Tensor, Tensor]]:
        assert self.term is not None
        t = times.tensor[stage]
        eps = self.calls.counted(self.term.predict(self.z, t.expand(self.y.shape[0])))
        p, q, r = times.coefficients(self.term)
        return eps, (self.term.mixing_logit, p[stage], q[stage], r[stage])

    def restart(self, t: float | Tensor) -> None:
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

    def accept_where(self, accepted: Tensor) -> None:
        """Of the samples that ``accepted`` (B,) marks, go on from the solution; of the others from where they were."""
        mask = accepted.reshape(-1, *(1,) * (self.y.dim() - 1))
        self.y = torch.where(mask, self.z, self.y)
        if self.tableau.reuses_last:
            # The samples differ, so that the stages cannot exchange their places.
            self.k[0] = torch.where(mask, self.k[self.tableau.stages - 1], self.k[0])

    def keep(self, samples: Tensor) -> None:
        """Go on with these samples of the batch alone, (B',) int64. Of the stages only the first one is needed."""
        first = self.k[0].index_select(0, samples)
        self.y = self.y.index_select(0, samples)
        self.k = torch.empty((self.tableau.stages, *self.y.shape), dtype=first.dtype, device=first.device)
        self.k[0] = first
        self.calls.shape = self.y.shape

    def states(self, h: float, part: slice) -> list[Tensor]:
        """The states of some samples at the stages of the last attempt, to find out what went wrong."""
        y, k = self.y[part], self.k[:, part]
        return [y] + [ops.rk_stage(y, k, self.row(i), h) for i in range(1, self.tableau.stages)]


def _rows(tableau: Tableau) -> dict[str, Sequence[Sequence[float]]]:
    return {"a": tableau.a, "b": [tableau.b], "e": [tableau.e], "e_low": [tableau.e_low]}


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


def _initial_steps(stages: _Stages, t: float, t_end: float, rtol: float, atol: float) -> Tensor:
    """``_initial_step`` of every sample by itself, (B,) float64, on the device; takes one evaluation."""
    y, f0 = stages.y, stages.k[0]
    device = _control_device(y)
    interval = abs(t_end - t)
    direction = math.copysign(1.0, t_end - t)
    scale = atol + y.abs() * rtol

    def rms(x: Tensor) -> Tensor:
        per_sample = x.flatten(1)
        norm = torch.linalg.vector_norm(per_sample, dim=1) / per_sample.shape[1] ** 0.5
        return norm.to(device, torch.float64)

    d0, d1 = rms(y / scale), rms(f0 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=interval)
    probe = t + h0 * direction
    f1 = stages.derivative(probe, ops.rk_stage(y, f0[None], (1.0,), h0 * direction)).to(y.dtype)
    d2 = rms((f1 - f0) / scale) / h0
    # The one transfer before the first step: what is not finite must be named.
    for sample, values in enumerate(torch.stack([d0, d1, d2, probe], dim=1).tolist()):
        if not (math.isfinite(values[0]) and math.isfinite(values[1])):
            bad_state = not bool(torch.isfinite(y[sample]).all())
            where = "the initial state" if bad_state else "the drift's first evaluation"
            raise NonFiniteError(
                f"{where} of sample {sample} (step 0, stage 1) holds NaN or infinity, or overflows, at t = {t!r}"
            )
        if not math.isfinite(values[2]):
            raise NonFiniteError(
                f"the drift's second evaluation of sample {sample} (step 0, stage 2, which chooses the first step "
                f"size) holds NaN or infinity, or overflows, at t = {values[3]!r}"
            )
    still = (d1 <= 1e-15) & (d2 <= 1e-15)
    power = (0.01 / torch.maximum(d1, d2)) ** (1 / (stages.tableau.error_order + 1))
    h1 = torch.where(still, (h0 * 1e-3).clamp(min=1e-6), power)
    return torch.minimum(100 * h0, h1).clamp(max=interval)


def _first_control(t: float, size: float, t_end: float) -> list[float]:
    direction = math.copysign(1.0, t_end - t)
    size = max(size, 10 * abs(math.nextafter(t, direction * math.inf) - t))
    t_next = t + direction * size
    if direction * (t_next - t_end) > 0:
        t_next = t_end
    return [t, t_next - t, t_next, 0.0, t, 0.0, 0.0, 0.0]


def _record(before: Sequence[float], after: Sequence[float]) -> StepRecord:
    """The attempt between two blocks of control."""
    return StepRecord(
        t=before[_T],
        h=before[_H],
        error_norm=after[_NORM],
        accepted=after[_ACCEPTED] > before[_ACCEPTED],
    )


def _raise_if_stage_not_finite(
    stages: _Stages, t: float, t_next: float, step: int, part: slice = slice(None), whose: str = ""
) -> None:
    """Raise for the first stage of a step that is not finite; return where all are (the norm overflowed).

    ``part`` of the batch is looked at; ``whose`` names it in the message.
    """
    h = t_next - t
    times = _stage_times(stages.tableau, t, t_next)
    for stage, state in enumerate(stages.states(h, part)):
        if bool(torch.isfinite(stages.k[stages.slot(stage)][part]).all()):
            continue
        origin = "drift" if bool(torch.isfinite(state).all()) else "solver's state overflowed, so the drift"
        raise NonFiniteError(
            f"NaN or infinity in step {step}{whose}, stage {stage + 1} of {stages.tableau.stages}, at "
            f"t = {times[stage]!r}: the {origin} returned a value that is not finite (step from t = {t!r}, h = {h!r})"
        )


def _raise_if_too_small(
    name: str,
    t: float,
    t_end: float,
    h: float,
    attempt: str,
    rtol: float,
    atol: float,
    state_dtype: torch.dtype,
) -> None:
    """Raise where the next attempt, of size h, would be smaller than ten spacings of numbers at t."""
    if abs(h) < 10 * abs(math.nextafter(t, t_end) - t):
        raise SolverError(
            f"{name} needs a step smaller than the spacing of numbers at t = {t!r} ({attempt}, "
            f"h = {h:.3g}): the drift is discontinuous or too stiff there, or rtol = {rtol} and "
            f"atol = {atol} ask for more digits than {state_dtype} has; raise the tolerances or stop earlier"
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
    control: str = "joint",
) -> Solution:
    """Integrate with an embedded pair and SciPy's step control; see ``solve_ode``.

    Raises ValueError for a tableau without an error estimate, and where ``control="per_sample"`` meets a drift that
    is no ``ScoreTerm``.
    """
    if not tableau.e:
        raise ValueError(
            f"{tableau.name} has no error estimate to choose steps by: use a tableau with one (RK45, RK23, DOP853 or "
            "HEUN), or solve_fixed with given times"
        )
    if rtol < SMALLEST_RTOL:
        warnings.warn(f"rtol = {rtol} is too small for float64: using {SMALLEST_RTOL}", stacklevel=4)
        rtol = SMALLEST_RTOL
    if control == "joint":
        solve = _solve_joint
    elif isinstance(drift, ScoreTerm):
        solve = _solve_per_sample
    else:
        raise ValueError(
            f'control="per_sample" evaluates the samples at times of their own, which a drift(t, z) of one number t '
            f"cannot: got {type(drift).__name__}, expected a ScoreTerm (its network takes one time per sample); pass "
            'one, or use control="joint"'
        )
    return solve(drift, z1, tableau, t_start, t_end, rtol, atol, state_dtype, callback, max_steps)


def _solve_joint(
    drift: Drift,
    z1: Tensor,
    tableau: Tableau,
    t_start: float,
    t_end: float,
    rtol: float,
    atol: float,
    state_dtype: torch.dtype,
    callback: Callback | None,
    max_steps: int,
) -> Solution:
    """One time, step size, error norm and decision for the whole batch.

    Takes 2 evaluations and ``tableau.stages - 1`` for each attempted step (and, where the last stage is not reused,
    one for each step that follows an accepted one).

    Departs from SciPy in one point: a stage that holds NaN or infinity is an error here, whereas SciPy rejects
    the step and tries smaller ones until it gives up.
    """
    name = tableau.name.lower()
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
        trace.step(attempt, t)
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
            _raise_if_too_small(name, t, t_end, after[_H], f"step {attempt}", rtol, atol, state_dtype)
            signal = t  # the norm overflowed, the stages did not: a rejected step
        accepted = signal != t
        if accepted:
            stages.accept()
            t = signal
        if callback is not None:
            callback(Progress(fraction=(t - t_start) / (t_end - t_start), t=t, nfe=stages.nfe))

    rows = torch.stack(controls).tolist()
    steps = [_record(before, after) for before, after in pairwise(rows)]
    return Solution(
        z=stages.y.to(z1.dtype),
        nfe=stages.nfe,
        accepted=int(rows[-1][_ACCEPTED]),
        rejected=int(rows[-1][_REJECTED]),
        seconds=time.perf_counter() - started,
        steps=steps,
    )


def _solve_per_sample(
    drift: Drift,
    z1: Tensor,
    tableau: Tableau,
    t_start: float,
    t_end: float,
    rtol: float,
    atol: float,
    state_dtype: torch.dtype,
    callback: Callback | None,
    max_steps: int,
) -> Solution:
    """Every sample with its own time, step size, error norm and decision; those that arrive leave the batch.

    All that are under way attempt their next step together, so the network is called as often as the sample with the
    most attempts needs. Where the last stage is not reused, the first one is evaluated anew, for all, after an attempt
    that was accepted for any.
    """
    name = tableau.name.lower()
    started = time.perf_counter()
    stages = _Stages(drift, tableau, z1.to(state_dtype).contiguous())
    stages.evaluate(0, t_start)
    sizes = _initial_steps(stages, t_start, t_end, rtol, atol)
    control = _first_controls(t_start, sizes, t_end)
    nodes = torch.tensor(tableau.c, dtype=torch.float64, device=control.device)[:, None]
    exponent = -1 / (tableau.error_order + 1)

    result = torch.empty_like(stages.y)
    samples = list(range(len(z1)))  # where those under way lie in z1
    places = torch.arange(len(z1), device=z1.device)
    reached = [t_start] * len(z1)
    attempts: list[tuple[list[int], Tensor, Tensor]] = []
    any_accepted = False
    while samples:
        if len(attempts) == max_steps:
            behind = _furthest(reached, t_end)
            raise SolverError(
                f"{name} attempted max_steps = {max_steps} steps of each sample, and sample {samples[behind]} reached "
                f"t = {reached[behind]!r} of {t_end!r} ({len(samples)} of {len(z1)} did not arrive): raise the "
                "tolerances or max_steps"
            )
        trace.step(len(attempts), reached[0])
        times = _Times(torch.lerp(control[:, _T], control[:, _T_NEXT], nodes))
        h = control[:, _H]
        if any_accepted and not tableau.reuses_last:
            stages.restart(control[:, _T])
        stages.begin(h)
        for stage in range(1, tableau.stages - 1):
            stages.middle(stage, times, h)
        norm = stages.finish(times, h, rtol, atol, per_sample=True).to(control.device)
        before, control = control, ops.rk_control(control, norm, t_end, exponent)
        attempts.append((samples, before, control))
        # The one transfer that the host waits for: a number per sample.
        signals = control[:, _SIGNAL].tolist()
        for i, signal in enumerate(signals):
            if math.isfinite(signal):
                continue
            t, sample = reached[i], samples[i]
            if math.isnan(signal):
                t_next = float(before[i, _T_NEXT])
                part = slice(i, i + 1)
                _raise_if_stage_not_finite(stages, t, t_next, len(attempts), part, f" of sample {sample}")
            attempt = f"sample {sample}, step {len(attempts)}"
            _raise_if_too_small(name, t, t_end, float(control[i, _H]), attempt, rtol, atol, state_dtype)
            signals[i] = t  # the norm overflowed, the stages did not: a rejected step
        stages.accept_where((control[:, _ACCEPTED] > before[:, _ACCEPTED]).to(z1.device))
        any_accepted = signals != reached
        reached = signals
        under_way = [i for i, t in enumerate(reached) if t != t_end]
        if len(under_way) < len(samples):
            result.index_copy_(0, places, stages.y)
            kept = torch.tensor(under_way, dtype=torch.int64, device=z1.device)
            stages.keep(kept)
            places = places.index_select(0, kept)
            control = control.index_select(0, kept.to(control.device))
            samples = [samples[i] for i in under_way]
            reached = [reached[i] for i in under_way]
        if callback is not None:
            t = reached[_furthest(reached, t_end)] if reached else t_end
            callback(Progress(fraction=(t - t_start) / (t_end - t_start), t=t, nfe=stages.nfe))

    steps = _per_sample_steps(len(z1), attempts)
    accepted = sum(step.accepted for step in steps)
    return Solution(
        z=result.to(z1.dtype),
        nfe=stages.nfe,
        accepted=accepted,
        rejected=len(steps) - accepted,
        seconds=time.perf_counter() - started,
        steps=steps,
    )


def _first_controls(t: float, sizes: Tensor, t_end: float) -> Tensor:
    """``_first_control`` of every sample, (B, 8), from the sizes of their first steps, on their device."""
    direction = math.copysign(1.0, t_end - t)
    t_next = t + direction * sizes.clamp(min=10 * abs(math.nextafter(t, direction * math.inf) - t))
    t_next = torch.where(direction * (t_next - t_end) > 0, t_end, t_next)
    control = torch.zeros((len(sizes), len(CONTROL_FIELDS)), dtype=torch.float64, device=sizes.device)
    control[:, _T] = control[:, _SIGNAL] = t
    control[:, _H] = t_next - t
    control[:, _T_NEXT] = t_next
    return control


def _furthest(reached: Sequence[float], t_end: float) -> int:
    """The one of the times that is furthest from the end."""
    return max(range(len(reached)), key=lambda i: abs(reached[i] - t_end))


def _per_sample_steps(batch: int, attempts: Sequence[tuple[list[int], Tensor, Tensor]]) -> list[StepRecord]:
    """The records of each sample's attempts, one sample after another; one transfer."""
    steps: list[list[StepRecord]] = [[] for _ in range(batch)]
    blocks = [torch.cat(controls).tolist() for controls in list(zip(*attempts, strict=True))[1:]]
    samples = [sample for attempt in attempts for sample in attempt[0]]
    for sample, before, after in zip(samples, *blocks, strict=True):
        steps[sample].append(_record(before, after))
    return [step for records in steps for step in records]


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
        tableau: the method; its embedded solution, if it has one, is not used. A step takes ``len(tableau.b)``
            evaluations: Euler 1, Heun 2, RK23 3, RK4 4, RK45 6, DOP853 12.
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
        trace.step(i, t)
        step = _Times(all_times[i], _stage_times(tableau, t, t_next))
        stages.restart(t)
        stages.begin(sizes[i])
        for stage in range(1, last):
            stages.middle(stage, step, sizes[i])
        if last > 0:
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
