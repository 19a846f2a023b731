"""Adaptive exponential integration of the mixed score's ODE, one evaluation of the network per attempted step.

The predictor-corrector pair of ``"exponential"`` (:mod:`lsgm_fast.sampling.methods`): from t_n the network's output is
extrapolated (Adams-Bashforth) to a predicted state, where the network is evaluated; the polynomial that also goes
through the new output (Adams-Moulton) gives the corrected state. Both start at the same state and treat the linear part
exactly, so their difference is a combination of outputs alone: an estimate of the error that costs no evaluation.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lsgm_fast import ops, trace
from lsgm_fast.errors import NonFiniteError, unknown_name
from lsgm_fast.sampling.grids import NATURAL_POWER
from lsgm_fast.sampling.methods import exponential_weights
from lsgm_fast.sampling.solution import (
    CONTROLS,
    Callback,
    CountedDrift,
    Progress,
    Solution,
    SolverError,
    StepRecord,
    check_tolerances,
    send,
)
from lsgm_fast.sampling.terms import ScoreTerm

MAX_ORDER = 4
FIRST_FRACTION = 0.2
SAFETY, LEAST_FACTOR, MOST_FACTOR = 0.9, 0.3, 2.0
SMALLEST_FRACTION = 1e-7


class _Rows:
    """What the host knows of the steps: one row for the batch, or one for every sample that is on its way.

    Attributes:
        members: numbers of the samples. t: times. x: positions, u^(1/1.5). h: next steps in x, signed.
        nodes: (R, order) times of the outputs in hand, latest first, of which ``counts`` are in use.
        retried: whether the last attempt failed.
    """

    def __init__(self, samples: int, rows: int, order: int, t: Tensor, x: Tensor, h: Tensor) -> None:
        self.members = torch.arange(samples)
        self.t, self.x, self.h = t.repeat(rows), x.repeat(rows), h.repeat(rows)
        self.nodes = t.repeat(rows, order)
        self.counts = torch.ones(rows, dtype=torch.int64)
        self.retried = torch.zeros(rows, dtype=torch.bool)

    def advance(self, accept: Tensor, t_next: Tensor, x_next: Tensor, h: Tensor) -> None:
        nodes = torch.cat([t_next[:, None], self.nodes[:, :-1]], dim=1)
        self.t, self.x = torch.where(accept, t_next, self.t), torch.where(accept, x_next, self.x)
        self.nodes = torch.where(accept[:, None], nodes, self.nodes)
        self.counts = torch.where(accept, self.counts + 1, self.counts).clamp(max=nodes.shape[1])
        self.h, self.retried = h, ~accept

    def keep(self, rows: Tensor) -> None:
        self.members = self.members[rows]
        for name in ("t", "x", "h", "nodes", "counts", "retried"):
            setattr(self, name, getattr(self, name)[rows])

    def weights(self, term: ScoreTerm, a: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """factor (R, C), predictor's weights (k, R, C) and corrector's (k + 1, R, C); 0 where a row has no output."""
        most, rows = int(self.counts.max()), len(self.t)
        factor = torch.empty(rows, len(a), dtype=torch.float64)
        predictor = torch.zeros(most, rows, len(a), dtype=torch.float64)
        corrector = torch.zeros(most + 1, rows, len(a), dtype=torch.float64)
        for count in self.counts.unique().tolist():
            of = self.counts == count
            steps, nodes = (self.t[of], t_next[of]), self.nodes[of, :count]
            factor[of], predictor[:count, of] = exponential_weights(term.sde, a, a, *steps, nodes)
            nodes = torch.cat([t_next[of, None], nodes], dim=1)
            corrector[: count + 1, of] = exponential_weights(term.sde, a, a, *steps, nodes)[1]
        return factor, predictor, corrector


def _check(rtol: float, atol: float, order: int, control: str, first_step: float, max_steps: int) -> None:
    check_tolerances(rtol, atol)
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must be from 1 to {MAX_ORDER}, got {order}")
    if control not in CONTROLS:
        raise unknown_name("control", control, CONTROLS)
    if not 0 < first_step <= 1:
        raise ValueError(f"first_step must lie in (0, 1], got {first_step}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")


@torch.no_grad()
def solve_exponential(
    term: ScoreTerm,
    z1: Tensor,
    *,
    t_start: float = 1.0,
    t_end: float,
    rtol: float,
    atol: float,
    order: int = 3,
    control: str = "joint",
    first_step: float = FIRST_FRACTION,
    extrapolate: bool = False,
    callback: Callback | None = None,
    max_steps: int = 10_000,
) -> Solution:
    """Integrate the probability-flow ODE to a tolerance with exponential Adams steps.

    A step is accepted where the root mean square of (corrected - predicted) / (atol + rtol max(|z_n|, |z_n+1|)) is
    below 1. The next one is ``0.9 error^(-1/(k+1))`` times as long (between 0.3 and 2, not longer after a rejection),
    k the outputs in a predictor, measured in ``u^(1/1.5)`` of the SDE's natural time u.

    Args:
        term: the score network's ODE. z1: state at ``t_start``, (B, C, ...).
        rtol, atol: tolerances on the difference of predictor and corrector. order: outputs in a predictor, 1 to 4.
        control: ``"joint"``: one step size and error norm for the batch. ``"per_sample"``: for each sample its own;
            those that have arrived leave the batch.
        first_step: fraction of the way, in u^(1/1.5). A good one, such as from an earlier solve, saves evaluations.
        extrapolate: go on from ``t_end`` to 0 with the outputs in hand, without an evaluation; not for published
            results.
        callback: called with a ``Progress`` after every attempted step. max_steps: most attempts.

    Returns:
        Solution in z1's dtype. ``nfe`` counts calls of the network: one per attempted step and one at the start. With
        per-sample control ``steps`` holds the attempts of the first sample, then those of the second, and so on.

    Raises:
        ValueError: an argument out of range. NonFiniteError: NaN or infinity, with step and time. SolverError: a step
        below the resolution of time, or more than ``max_steps``.

    Source: Hochbruck & Ostermann 2010 (exponential Adams methods); ``docs/solvers.md``.
    """
    _check(rtol, atol, order, control, first_step, max_steps)
    started = time.perf_counter()
    if z1.numel() == 0 or t_start == t_end:
        return Solution(z=z1.clone(), nfe=0, accepted=0, rejected=0, seconds=0.0)
    sde, a, joint = term.sde, term.mixing, control == "joint"
    base = z1.to(torch.promote_types(z1.dtype, torch.float32))
    result = torch.empty_like(base)
    start, end = torch.tensor([t_start, t_end], dtype=torch.float64)
    x_start, x_end = (sde.u(t).pow(1.0 / NATURAL_POWER) for t in (start, end))
    way = x_end - x_start
    rows = _Rows(len(base), 1 if joint else len(base), order, start, x_start, first_step * way)
    calls = CountedDrift(term, base.shape)
    history = [_evaluate(calls, term, base, rows.t)]
    records: list[list[StepRecord]] = [[] for _ in range(len(rows.t))]
    attempt = 0
    while len(rows.members):
        attempt += 1
        if attempt > max_steps:
            raise SolverError(
                f"exponential attempted max_steps = {max_steps} steps and reached t = {float(rows.t[0])!r} of "
                f"{t_end!r}: raise the tolerances or max_steps"
            )
        trace.step(attempt, rows.t)
        x_next = rows.x + rows.h
        last = (x_end - x_next) / way <= 0.1 * rows.h / way  # no crumb of a step at the end
        x_next = torch.where(last, x_end, x_next)
        t_next = torch.where(last, end, sde.t_of_u(x_next.pow(NATURAL_POWER)))
        factor, predictor, corrector = rows.weights(term, a, t_next)
        change = corrector.clone()
        change[1:] -= predictor
        c, *w = _sent([factor[None], predictor, corrector, change], base)
        k = len(predictor)
        w_predictor, w_corrector, w_change = w[:k], w[k : 2 * k + 1], w[2 * k + 1 :]
        new = _evaluate(calls, term, ops.multistep_update(base, c, history, w_predictor), t_next)
        outputs = [new, *history]
        corrected = ops.multistep_update(base, c, outputs, w_corrector)
        difference = ops.multistep_update(base, 0.0, outputs, w_change)
        scale = atol + rtol * torch.maximum(base.abs(), corrected.abs())
        squares = (difference / scale).square().flatten(1).mean(dim=1)
        # The one transfer to the host, which decides about the step.
        norms = (squares.mean()[None] if joint else squares).sqrt().double().cpu()
        accept = norms < 1.0
        tried = zip(
            rows.members.tolist(),
            rows.t.tolist(),
            t_next.tolist(),
            norms.tolist(),
            accept.tolist(),
            strict=False,
        )
        for member, t0, t1, norm, ok in tried:
            records[member].append(StepRecord(t=t0, h=t1 - t0, error_norm=norm, accepted=ok))
        factor = SAFETY * norms.clamp(min=1e-10).pow(-1.0 / (rows.counts + 1))
        most = torch.where(accept & rows.retried, 1.0, MOST_FACTOR)
        size = rows.h * torch.minimum(factor, most).clamp(min=LEAST_FACTOR)
        _raise_for(norms, accept, size / way, rows, t_next, attempt, base, joint)
        if bool(accept.all()):
            base, history = corrected, outputs[:order]
        elif bool(accept.any()):
            chosen = accept.to(base.device).reshape(-1, *(1,) * (base.dim() - 1))
            base = torch.where(chosen, corrected, base)
            # A row that was rejected keeps its outputs; where it has fewer than others, their weights are 0.
            kept = [*history, history[-1]]
            history = [torch.where(chosen, o, k) for o, k in zip(outputs, kept, strict=True)][:order]
        rows.advance(accept, t_next, x_next, size)
        arrived = rows.t == end
        if bool(arrived.any()):
            if extrapolate:
                factor, predictor, _ = rows.weights(term, a, torch.zeros_like(rows.t))
                c, *w = _sent([factor[None], predictor], base)
                final = ops.multistep_update(base, c, history[: len(w)], w)
            else:
                final = base
            if joint:
                result, rows.members = final, rows.members[:0]
            else:
                there = arrived.to(base.device)
                result[rows.members[arrived].to(base.device)] = final[there]
                rows.keep(~arrived)
                used = int(rows.counts.max()) if len(rows.counts) else 0
                base, history = base[~there], [h[~there] for h in history[:used]]
        if callback is not None:
            fraction = float(((rows.x - x_start) / way).min()) if len(rows.members) else 1.0
            t = float(sde.t_of_u((x_start + fraction * way).pow(NATURAL_POWER))) if fraction < 1.0 else t_end
            callback(Progress(fraction=fraction, t=t, nfe=calls.nfe))
    steps = [record for of_one in records for record in of_one]
    accepted = sum(record.accepted for record in steps)
    return Solution(
        z=result.to(z1.dtype),
        nfe=calls.nfe,
        accepted=accepted,
        rejected=len(steps) - accepted,
        seconds=time.perf_counter() - started,
        steps=steps,
    )


def _sent(parts: list[Tensor], z: Tensor) -> list[Tensor]:
    """Coefficients (k, R, C) on the device of the state, in one transfer, each (R, C, 1, ...)."""
    ones = (1,) * (z.dim() - 2)
    return [one.reshape(*one.shape, *ones) for part in send(z, *parts) for one in part]


def _evaluate(calls: CountedDrift, term: ScoreTerm, z: Tensor, t: Tensor) -> Tensor:
    """The network at one time or at a time per sample; the batch may have become smaller."""
    calls.shape = z.shape
    return calls.counted(term.predict(z, t.to(z.dtype).to(z.device).expand(z.shape[0])))


def _raise_for(
    norms: Tensor,
    accept: Tensor,
    sizes: Tensor,
    rows: _Rows,
    t_next: Tensor,
    attempt: int,
    base: Tensor,
    joint: bool,
) -> None:
    """Raise for the first row that is not finite, or whose next step, as a fraction of the way, vanishes."""
    for bad, finite in ((~torch.isfinite(norms), False), (~accept & (sizes < SMALLEST_FRACTION), True)):
        if not bool(bad.any()):
            continue
        row = int(bad.nonzero()[0])
        t = float(rows.t[row])
        sample = "" if joint else f" of sample {int(rows.members[row])}"
        if not finite:
            sound = bool(torch.isfinite(base if joint else base[row]).all())
            where = "the network's output" if sound else "the initial state" if attempt == 1 else "the state"
            raise NonFiniteError(
                f"NaN or infinity in {where}{sample} in step {attempt}, "
                f"at t = {float(t_next[row])!r} (step from t = {t!r})"
            )
        raise SolverError(
            f"exponential stalls{sample} at t = {t!r} (step {attempt}, error {float(norms[row]):.3g} times the "
            "tolerance): the network is discontinuous there, or the tolerance asks for more digits than the network "
            "or the state has; raise rtol and atol"
        )
