"""Methods over given times for the mixed score's ODE, each as a function that makes its program.

Two families. In the natural time u the ODE of y = z / S is ``dy/du = a (e - tanh(u) y)``; with any exponent b per
channel,

    d/du [cosh(u)^b y] = cosh(u)^b f_b,        f_b = a e + (b - a) tanh(u) y,

and f_b, replaced by a polynomial through its values, integrates against the exact power of cosh. ``b = a`` leaves the
network's output alone to be interpolated (``exponential``); ``b = 1`` makes f_b the mixed noise prediction (DDIM,
DEIS). The second family is DPM-Solver++ and UniPC: the exact solution in lambda = ln(m / sqrt(var)), the prediction of
the data ``x = (z - sqrt(var) f_1) / m`` by differences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lsgm_fast.errors import unknown_name
from lsgm_fast.sampling import solution as _solution
from lsgm_fast.sampling.grids import log_snr, time_of_log_snr
from lsgm_fast.sampling.programs import Program, Stage, Update
from lsgm_fast.sampling.terms import ScoreTerm
from lsgm_fast.sde import SDE

_QUADRATURE = tuple(torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(32))
_ONE = torch.ones(1, dtype=torch.float64)


def log_cosh(u: Tensor) -> Tensor:
    """``ln cosh u``, without overflow."""
    return u.abs() + torch.log1p(torch.exp(-2.0 * u.abs())) - math.log(2.0)


# -- exponential integrators in u -----------------------------------------------------------------------------------


def exponential_weights(
    sde: SDE, a: Tensor, b: Tensor, t0: Tensor, t1: Tensor, nodes: Tensor, variable: str = "u"
) -> tuple[Tensor, Tensor]:
    """``z(t1) = factor z(t0) + sum_j weights_j f_b(nodes_j)`` with f_b the polynomial through its values at the nodes.

    Args:
        a, b: (C,) float64. t0, t1: (R,), steps. nodes: (R, k), times. variable: ``"u"`` or ``"t"``, of the polynomial.

    Returns:
        factor (R, C) and weights (k, R, C), float64. Where b is a itself, the values are those of e.
    """
    u0, u1, s0, s1 = sde.u(t0), sde.u(t1), sde.s2(t0).sqrt(), sde.s2(t1).sqrt()
    half = 0.5 * (u1 - u0)
    v = 0.5 * (u1 + u0)[:, None] + half[:, None] * _QUADRATURE[0]  # (R, quadrature)
    decay = torch.exp(b[:, None] * (log_cosh(v) - log_cosh(u1)[:, None])[:, None])  # (R, C, quadrature)
    at, nodes = (v, sde.u(nodes)) if variable == "u" else (sde.t_of_u(v), nodes)
    scale = (s1 * half)[:, None] * (a if b is a else _ONE)
    weights = []
    for j in range(nodes.shape[1]):
        basis = _QUADRATURE[1].expand_as(at)
        for k in range(nodes.shape[1]):
            if k != j:
                basis = basis * (at - nodes[:, k, None]) / (nodes[:, j] - nodes[:, k])[:, None]
        weights.append(scale * torch.einsum("rcq,rq->rc", decay, basis))
    factor = (s1 / s0)[:, None] * torch.exp(b * (log_cosh(u0) - log_cosh(u1))[:, None])
    return factor, torch.stack(weights)


@dataclass(frozen=True)
class _Linear:
    """What is integrated exactly: the exponent b per channel, and the variable in which f_b is a polynomial."""

    sde: SDE
    a: Tensor
    b: Tensor
    variable: str = "u"

    def parametrisation(self, t: float) -> tuple[Tensor, Tensor] | None:
        """``f_b = alpha z + beta e`` at time t; None where e itself is interpolated (a stands in the weights)."""
        if self.b is self.a:
            return None
        return (self.b - self.a) * self.sde.mixed_r(t), self.a

    def update(self, base: int, t0: float, t1: float, known: Sequence[tuple[int, float]]) -> Update:
        """The step from t0 to t1 with the polynomial through the predictions ``known``: (stage, its time)."""
        start, end = (torch.tensor([t], dtype=torch.float64) for t in (t0, t1))
        nodes = torch.tensor([[when for _, when in known]], dtype=torch.float64)
        factor, weights = exponential_weights(self.sde, self.a, self.b, start, end, nodes, self.variable)
        return Update(base, factor[0], tuple(stage for stage, _ in known), tuple(weights[:, 0]))


def _latest(times: Sequence[float], n: int, count: int) -> list[tuple[int, float]]:
    """At most ``count`` predictions up to time n, latest first, where every time of the grid has one."""
    return [(k, times[k]) for k in range(n, max(-1, n - count), -1)]


def _multistep(name: str, linear: _Linear, times: Sequence[float], order: int) -> Program:
    """Adams-Bashforth: one evaluation a step; the first steps use what there is."""
    stages = []
    for n, (t, t_next) in enumerate(pairwise(times)):
        update = linear.update(n, t, t_next, _latest(times, n, order))
        stages.append(Stage(n, t, (update,), linear.parametrisation(t), arrives=t_next))
    return Program(name, tuple(times), tuple(stages))


def _corrected_program(
    name: str,
    times: Sequence[float],
    parametrisation: Callable[[float], tuple[Tensor, Tensor] | None],
    correct: Callable[[int, int], Update],
    predict: Callable[[int, int], Update],
) -> Program:
    """One evaluation a step, whose output first corrects the step that led to it, then predicts the next state.

    ``correct(base, n)`` makes the state at time n from ``base``, the one at n - 1; ``predict(base, n)`` that at n + 1.
    """
    stages: list[Stage] = []
    base = made = 0
    for n, (t, t_next) in enumerate(pairwise(times)):
        at, updates = made, []
        if n > 0:
            updates.append(correct(base, n))
            made += 1
            base = made
        updates.append(predict(base, n))
        made += 1
        stages.append(Stage(at, t, tuple(updates), parametrisation(t), arrives=t_next))
    return Program(name, tuple(times), tuple(stages))


def _corrected(name: str, linear: _Linear, times: Sequence[float], order: int) -> Program:
    """Adams-Bashforth as predictor, Adams-Moulton (through the newest output too) as corrector."""
    return _corrected_program(
        name,
        times,
        linear.parametrisation,
        correct=lambda base, n: linear.update(base, times[n - 1], times[n], _latest(times, n, order + 1)),
        predict=lambda base, n: linear.update(base, times[n], times[n + 1], _latest(times, n, order)),
    )


_NODES = {2: (0.5,), 3: (1 / 3, 2 / 3)}


def _singlestep(name: str, linear: _Linear, times: Sequence[float], order: int) -> Program:
    """Exponential Runge-Kutta: ``order`` evaluations a step, at equally spaced points of u inside it."""
    stages: list[Stage] = []
    base = made = 0
    for t, t_next in pairwise(times):
        ends = linear.sde.u(torch.tensor([t, t_next], dtype=torch.float64))
        inner = [float(linear.sde.t_of_u(torch.lerp(ends[0], ends[1], c))) for c in _NODES[order]]
        first, at = len(stages), base
        points = [t, *inner, t_next]
        for i in range(order):
            # Of earlier points the first and the newest: their straight line suffices (Radau's points at order 3).
            known = [(first, t)] if i == 0 else [(first, t), (first + i, points[i])]
            update = linear.update(base, t, points[i + 1], known)
            arrives = t_next if i == order - 1 else None
            stages.append(Stage(at, points[i], (update,), linear.parametrisation(points[i]), arrives))
            made += 1
            at = made
        base = made
    return Program(name, tuple(times), tuple(stages))


# -- DPM-Solver++ and UniPC -----------------------------------------------------------------------------------------


class _Data:
    """The data prediction ``x = (z - sqrt(var) eps) / m`` of the mixed noise prediction eps, and lambda."""

    def __init__(self, sde: SDE, a: Tensor) -> None:
        self.sde, self.a = sde, a

    def parametrisation(self, t: float) -> tuple[Tensor, Tensor]:
        m, sigma = self.sde.mean_coef(t), self.sde.var(t).sqrt()
        return (1.0 - sigma * (1.0 - self.a) * self.sde.mixed_r(t)) / m, -sigma * self.a / m

    def log_snr(self, t: float) -> float:
        return float(log_snr(self.sde, torch.tensor(t, dtype=torch.float64)))

    def time(self, value: float) -> float:
        return float(time_of_log_snr(self.sde, torch.tensor(value, dtype=torch.float64)))

    def update(self, base: int, t0: float, t1: float, weights: Sequence[tuple[int, float]]) -> Update:
        """``sigma1/sigma0 z + m1 sum_i w_i x_i``."""
        sigma0, sigma1, m = self.sde.var(t0).sqrt(), self.sde.var(t1).sqrt(), self.sde.mean_coef(t1)
        kept = [(stage, w) for stage, w in weights if w != 0.0]
        return Update(
            base,
            (sigma1 / sigma0).reshape(1),
            tuple(stage for stage, _ in kept),
            tuple((m * w).reshape(1) for _, w in kept),
        )


def _phis(h: float) -> tuple[float, float, float]:
    """``1 - e^-h``, and the integrals of the first two powers against the same exponential, over h and h^2."""
    if abs(h) < 1e-2:  # by series: the differences would cancel
        one = -math.expm1(-h)
        series = [sum((-h) ** k / math.factorial(k + shift) for k in range(12)) for shift in (2, 3)]
        return one, h * series[0], h * series[1]
    one = -math.expm1(-h)
    return one, 1.0 - one / h, 0.5 - (1.0 - one / h) / h


def _dpm_multistep(name: str, sde: SDE, a: Tensor, times: Sequence[float], *, order: int) -> Program:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2) and its third-order continuation."""
    data = _Data(sde, a)
    level = [data.log_snr(t) for t in times]
    stages = []
    for n, (t, t_next) in enumerate(pairwise(times)):
        h = level[n + 1] - level[n]
        one, two, three = _phis(h)
        weights = {n: one}
        if n >= 1 and order >= 2:
            r0 = (level[n] - level[n - 1]) / h
            if n >= 2 and order >= 3:
                r1 = (level[n - 1] - level[n - 2]) / h
                # Newton's divided differences of x at the last three points, in units of h.
                d0, d1 = {n: 1 / r0, n - 1: -1 / r0}, {n - 1: 1 / r1, n - 2: -1 / r1}
                keys = (n, n - 1, n - 2)
                second = {k: (d0.get(k, 0.0) - d1.get(k, 0.0)) / (r0 + r1) for k in keys}
                slope = {k: d0.get(k, 0.0) + r0 * second[k] for k in keys}
                for k in keys:
                    weights[k] = weights.get(k, 0.0) + two * slope[k] + 2.0 * three * second[k]
            else:
                # The paper's 2M takes h phi_1 / 2 where the integral of the slope would be.
                weights = {n: one * (1 + 0.5 / r0), n - 1: -one * 0.5 / r0}
        update = data.update(n, t, t_next, list(weights.items()))
        stages.append(Stage(n, t, (update,), data.parametrisation(t), arrives=t_next))
    return Program(name, tuple(times), tuple(stages))


def _dpm_singlestep(name: str, sde: SDE, a: Tensor, times: Sequence[float], *, order: int) -> Program:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1) and DPM-Solver++(3S)."""
    data = _Data(sde, a)
    stages: list[Stage] = []
    base = made = 0
    for t, t_next in pairwise(times):
        start = data.log_snr(t)
        h = data.log_snr(t_next) - start
        points = [t, *(data.time(start + c * h) for c in _NODES[order]), t_next]
        first, at = len(stages), base
        for i, c in enumerate((*_NODES[order], 1.0)):
            one, two, _ = _phis(c * h)
            if i == 0:
                weights = [(first, one)]
            elif order == 2:
                weights = [(first, 0.0), (first + 1, one)]  # 1 - 1/(2r) = 0 for the midpoint r = 1/2
            else:
                slope = two * c / _NODES[3][i - 1]
                weights = [(first, one - slope), (first + i, slope)]
            update = data.update(base, t, points[i + 1], weights)
            arrives = t_next if i == order - 1 else None
            stages.append(Stage(at, points[i], (update,), data.parametrisation(points[i]), arrives))
            made += 1
            at = made
        base = made
    return Program(name, tuple(times), tuple(stages))


def _unipc(name: str, sde: SDE, a: Tensor, times: Sequence[float], *, order: int) -> Program:
    """UniPC of Zhao et al. 2023 (algorithm 1), data prediction, ``B(h) = e^h - 1``; corrector of the same order."""
    data = _Data(sde, a)
    level = [data.log_snr(t) for t in times]

    def step(base: int, n: int, t_next: float, corrector: bool) -> Update:
        """From time n to n + 1; the corrector also uses the prediction at n + 1."""
        h = level[n + 1] - level[n]
        available = min(order, n + 1)
        one = -math.expm1(-h)
        nodes = [(level[n - k] - level[n]) / h for k in range(1, available)] + [1.0]
        count = available if corrector else available - 1
        weights = {n: one}
        if count:
            matrix = np.array([[r**i for r in nodes[:count]] for i in range(count)])
            integrals, phi, factorial = [], one / h - 1.0, 1.0
            for i in range(1, count + 1):
                integrals.append(phi * factorial / -one)
                factorial *= i + 1
                phi = phi / -h - 1.0 / factorial
            rho = np.linalg.solve(matrix, np.array(integrals))
            if count == 1:
                rho = np.array([0.5])  # as published: the exact one would be of the same order
            for k in range(count):
                stage = n + 1 if corrector and k == count - 1 else n - 1 - k
                w = one * float(rho[k]) / (nodes[k] if stage != n + 1 else 1.0)
                weights[stage] = weights.get(stage, 0.0) + w
                weights[n] -= w
        return data.update(base, times[n], t_next, list(weights.items()))

    return _corrected_program(
        name,
        times,
        data.parametrisation,
        correct=lambda base, n: step(base, n - 1, times[n], corrector=True),
        predict=lambda base, n: step(base, n, times[n + 1], corrector=False),
    )


# -- by name --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A method over given times.

    Attributes:
        order: of convergence, where the first steps hardly count. evaluations: of the network, per step.
        grid: the name of the grid on which it does best (``docs/solvers.md``).
        make: the program, from a name, the SDE, the mixing a (C,) and the times.
    """

    order: int
    evaluations: int
    grid: str
    make: Callable[[str, SDE, Tensor, Sequence[float]], Program]


def _exponential(build: Callable[..., Program], order: int) -> Callable[..., Program]:
    def make(name: str, sde: SDE, a: Tensor, times: Sequence[float]) -> Program:
        return build(name, _Linear(sde, a, a), times, order)

    return make


def _of_noise(order: int, variable: str) -> Callable[..., Program]:
    def make(name: str, sde: SDE, a: Tensor, times: Sequence[float]) -> Program:
        # Without mixing the noise prediction is the network's output.
        b = a if bool((a == 1.0).all()) else torch.ones_like(a)
        return _multistep(name, _Linear(sde, a, b, variable), times, order)

    return make


def _of_data(build: Callable[..., Program], order: int) -> Callable[..., Program]:
    return functools.partial(build, order=order)


METHODS: dict[str, Method] = {
    "exponential": Method(3, 1, "natural", _exponential(_corrected, 3)),
    "exponential_ab": Method(3, 1, "natural", _exponential(_multistep, 3)),
    "exponential_2s": Method(2, 2, "natural", _exponential(_singlestep, 2)),
    "exponential_3s": Method(3, 3, "natural", _exponential(_singlestep, 3)),
    "ddim": Method(1, 1, "natural", _of_noise(1, "u")),
    "deis": Method(3, 1, "natural", _of_noise(3, "t")),
    "dpmpp_2m": Method(2, 1, "log_snr", _of_data(_dpm_multistep, 2)),
    "dpmpp_3m": Method(3, 1, "log_snr", _of_data(_dpm_multistep, 3)),
    "dpmpp_2s": Method(2, 2, "log_snr", _of_data(_dpm_singlestep, 2)),
    "dpmpp_3s": Method(3, 3, "log_snr", _of_data(_dpm_singlestep, 3)),
    "unipc": Method(3, 1, "log_snr", _of_data(_unipc, 3)),
}
"""Methods over given times, by name."""


def extrapolated(program: Program, term: ScoreTerm, t: float = 0.0) -> Program:
    """The program and one more step, from the end of its times to t, with the outputs in hand: no evaluation.

    For the methods that interpolate the network's output (``"exponential..."``). Off in all published settings, whose
    latents are those at ``ode_eps``.

    Raises:
        ValueError: a program of another parametrisation.
    """
    last = program.stages[-1]
    if last.parametrisation is not None:
        raise ValueError(f"extrapolation needs an exponential method, got {program.name!r}")
    a = term.mixing
    known = [(k, program.stages[k].t) for k in last.updates[-1].predictions]
    made = sum(len(stage.updates) for stage in program.stages)
    update = _Linear(term.sde, a, a).update(made, program.times[-1], t, known)
    stage = replace(last, updates=(*last.updates, update))
    return replace(program, stages=(*program.stages[:-1], stage))


def plan(method: str, term: ScoreTerm, times: Sequence[float]) -> Program:
    """The program of a method over given times.

    Args:
        method: a key of :data:`METHODS`. term: whose SDE and mixing the coefficients follow. times: falling or rising,
            such as from :func:`~lsgm_fast.sampling.time_grid`.

    Raises:
        ValueError: unknown method, or times that are not finite or equal.

    Source: DDIM: Song, Meng & Ermon 2021. DEIS: Zhang & Chen 2023 (tAB). DPM-Solver++: Lu et al. 2022b. UniPC: Zhao
    et al. 2023 (B2). The exponential methods: ``docs/solvers.md``.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    return METHODS[method].make(method, term.sde, term.mixing, _solution.checked_times(times))
