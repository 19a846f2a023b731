"""Baselines through torchdiffeq: the published sampling path (``scipy_solver``) and its own ``dopri5``."""

from __future__ import annotations

import importlib
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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

_INITIAL_EVALUATIONS = 2
_EVALUATIONS_PER_STEP = 6


def _odeint(solver: str) -> Callable[..., Tensor]:
    try:
        return importlib.import_module("torchdiffeq").odeint
    except ImportError as error:
        raise ImportError(
            f'solver "{solver}" needs the package torchdiffeq (with SciPy): install it with '
            f'"pip install torchdiffeq scipy", or use solver="rk45", which takes the same steps without it'
        ) from error


class _Observed(CountedDrift):
    """Drift as torchdiffeq calls it: counts evaluations, limits attempts and reports non-finite values.

    Finiteness is checked on every evaluation, since neither torchdiffeq nor SciPy says where a NaN began.
    """

    solver: str

    def __init__(
        self,
        drift: Drift,
        shape: torch.Size,
        max_steps: int,
        t_start: float,
        t_end: float,
        callback: Callback | None,
    ) -> None:
        super().__init__(drift, shape)
        self.max_steps = max_steps
        self.t_start, self.t_end = t_start, t_end
        self.callback = callback

    def report(self, t: float) -> None:
        """Tell the callback that the solve has come to ``t``."""
        if self.callback is not None:
            fraction = (t - self.t_start) / (self.t_end - self.t_start)
            self.callback(Progress(fraction=fraction, t=t, nfe=self.nfe))

    def attempt(self) -> tuple[int, int]:
        """Number of the attempted step (0: choice of the first step) and stage of the coming evaluation."""
        if self.nfe < _INITIAL_EVALUATIONS:
            return 0, self.nfe + 1
        step, stage = divmod(self.nfe - _INITIAL_EVALUATIONS, _EVALUATIONS_PER_STEP)
        return step + 1, stage + 2

    def evaluate(self, t: float, z: Tensor) -> Tensor:
        step, stage = self.attempt()
        if step > self.max_steps:
            raise SolverError(
                f"{self.solver} attempted max_steps = {self.max_steps} steps and reached t = {t!r}"
            )
        out = super().evaluate(t, z)
        if not bool(torch.isfinite(out).all()):
            raise NonFiniteError(
                f"NaN or infinity in step {step}, stage {stage}, at t = {t!r} (solver {self.solver})"
            )
        return out.to(z.dtype)


class _ScipyDrift(_Observed):
    """Also rebuilds the attempted steps from the times of the evaluations, which are all that SciPy shows."""

    solver = "scipy"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.attempts: list[tuple[float, float]] = []
        self._stage_two_time = self.t_start

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        time_now = float(t)
        _, stage = self.attempt()
        out = self.evaluate(time_now, z)
        if self.nfe > _INITIAL_EVALUATIONS:
            if stage == 2:
                self._stage_two_time = time_now
            elif stage == 7:
                # Stage 2 lies at t + h / 5 and stage 7 at t + h.
                h = (time_now - self._stage_two_time) * 1.25
                self.attempts.append((time_now - h, h))
                self.report(time_now)
        return out

    def records(self) -> list[StepRecord]:
        """The attempts with their outcome: one is accepted where the next starts at its end, or it is the last."""
        out: list[StepRecord] = []
        for index, (t, h) in enumerate(self.attempts):
            following = self.attempts[index + 1][0] if index + 1 < len(self.attempts) else t + h
            accepted = abs(following - (t + h)) < abs(following - t)
            out.append(StepRecord(t=t, h=h, error_norm=math.nan, accepted=accepted))
        return out


def solve_scipy(
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
    """The published sampler's path: ``torchdiffeq.odeint(method="scipy_solver")`` with SciPy's RK45.

    SciPy keeps a float64 state on the host whatever ``state_dtype`` says; every evaluation copies it to the
    device in z1's dtype (half: float32) and the result back. Times, too, are rounded to that dtype, as they
    were in the release. Step records are rebuilt from those times and hold no error norm.
    """
    odeint = _odeint("scipy")
    started = time.perf_counter()
    z = z1.to(torch.promote_types(z1.dtype, torch.float32))
    # The times stay on the host (torchdiffeq reads them there), but share z's dtype as in the release.
    times = torch.tensor([t_start, t_end], dtype=z.dtype, device=z.device)
    observed = _ScipyDrift(drift, z.shape, max_steps, t_start, t_end, callback)
    with warnings.catch_warnings():
        # torchdiffeq hands SciPy a min_step that RK45 does not know.
        warnings.filterwarnings(
            "ignore", message="The following arguments have no effect", category=UserWarning
        )
        path = odeint(
            observed, z, times, rtol=rtol, atol=atol, method="scipy_solver", options={"solver": "RK45"}
        )
    if path.shape[0] != 2:
        # torchdiffeq does not look at SciPy's status: where SciPy gave up, the end is missing from the path.
        raise SolverError(
            f"SciPy's RK45 gave up after {observed.nfe} evaluations: the drift needs a smaller step than the spacing "
            f"of floating-point times, or rtol = {rtol} and atol = {atol} are too strict"
        )
    steps = observed.records()
    accepted = sum(step.accepted for step in steps)
    return Solution(
        z=path[-1].to(z1.dtype),
        nfe=observed.nfe,
        accepted=accepted,
        rejected=len(steps) - accepted,
        seconds=time.perf_counter() - started,
        steps=steps,
    )


class _Dopri5Drift(_Observed):
    """Clamps times to the interval and receives torchdiffeq's report of accepted and rejected steps."""

    solver = "dopri5"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps: list[StepRecord] = []

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        low, high = min(self.t_start, self.t_end), max(self.t_start, self.t_end)
        return self.evaluate(min(max(float(t), low), high), z)

    def _record(self, t: Any, dt: Any, accepted: bool) -> None:
        h = math.copysign(float(dt), self.t_end - self.t_start)
        start = float(t)
        self.steps.append(StepRecord(t=start, h=h, error_norm=math.nan, accepted=accepted))
        self.report(start + h if accepted else start)

    def callback_accept_step(self, t: Any, z: Tensor, dt: Any) -> None:
        self._record(t, dt, True)

    def callback_reject_step(self, t: Any, z: Tensor, dt: Any) -> None:
        self._record(t, dt, False)


def solve_dopri5(
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
    """torchdiffeq's ``dopri5``, kept inside the interval.

    On its own it integrates past ``t_end`` and interpolates back, where a diffusion's variance can be negative.
    ``step_t`` makes it land on ``t_end``; the one evaluation that chooses the first step, which that option does
    not cover, is clamped to the interval. Its step control differs from SciPy's, so evaluations do too.
    """
    odeint = _odeint("dopri5")
    started = time.perf_counter()
    z = z1.to(state_dtype)
    times = torch.tensor([t_start, t_end], dtype=state_dtype, device=z.device)
    observed = _Dopri5Drift(drift, z.shape, max_steps, t_start, t_end, callback)
    try:
        path = odeint(
            observed,
            z,
            times,
            rtol=rtol,
            atol=atol,
            method="dopri5",
            options={"step_t": times[1:], "dtype": state_dtype},
        )
    except AssertionError as error:
        if not str(error).startswith("underflow in dt"):  # an assertion of the drift's own
            raise
        raise SolverError(f"dopri5 failed after {observed.nfe} evaluations: {error}") from error
    accepted = sum(step.accepted for step in observed.steps)
    return Solution(
        z=path[-1].to(z1.dtype),
        nfe=observed.nfe,
        accepted=accepted,
        rejected=len(observed.steps) - accepted,
        seconds=time.perf_counter() - started,
        steps=observed.steps,
    )
