"""Exponential Adams-Bashforth: the linear part of the mixed score's ODE exactly, the network's output by extrapolation.

With ``y = z / S`` and the natural time u of the SDE, the probability-flow ODE of the mixed prediction is, per channel,

    dy/du = a (e - tanh(u) y),        d/du [cosh(u)^a y] = a cosh(u)^a e,

so from u_n to u_{n+1}

    y_{n+1} = (cosh u_n / cosh u_{n+1})^a y_n + a integral (cosh v / cosh u_{n+1})^a e(v) dv.

e(v) is replaced by the polynomial through its last values (orders 1 to 4). For a = 1 and order 1 this is DDIM, for
a = 1 and higher orders DEIS in u. Published latents have small a: the linear part then says nearly everything, and a
few evaluations of the network suffice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lsgm_fast import ops
from lsgm_fast.sampling import solution as _solution
from lsgm_fast.sampling.solution import Callback, CountedDrift, Progress, Solution
from lsgm_fast.sampling.terms import ScoreTerm
from lsgm_fast.sde import SDE

MAX_ORDER = 4
_QUADRATURE = np.polynomial.legendre.leggauss(32)


def natural_grid(sde: SDE, steps: int, t_start: float, t_end: float, power: float = 1.5) -> list[float]:
    """Times of ``steps`` steps from ``t_start`` to ``t_end``, equal in ``u^(1/power)`` of the natural time u.

    ``power = 1`` is the uniform grid in u; larger ones have shorter steps towards small u, where the network resolves
    details.

    Raises:
        ValueError: steps is not at least 1, or power not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}")
    first, last = sde.u(torch.tensor([t_start, t_end], dtype=torch.float64)).pow(1.0 / power)
    u = torch.lerp(first, last, torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)).pow(power)
    return [t_start, *sde.t_of_u(u[1:-1]).tolist(), t_end]


def _log_cosh(u: Tensor) -> Tensor:
    return u.abs() + torch.log1p(torch.exp(-2.0 * u.abs())) - math.log(2.0)


def coefficients(
    sde: SDE, a: Tensor, times: Sequence[float], order: int
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """``z_{n+1} = c_n z_n + sum_j w_nj e_{n-j}``: c_n (C,) and w_nj (C,) of every step, in float64.

    Args:
        a: (C,) float64, the mixing per channel. times: of the steps. order: network outputs that a step uses, as far
            as there are so many.
    """
    t = torch.tensor(list(times), dtype=torch.float64)
    u, s = sde.u(t), sde.s2(t).sqrt()
    nodes, weights = (torch.from_numpy(x) for x in _QUADRATURE)
    state, history = [], []
    for n in range(len(t) - 1):
        middle, half = 0.5 * (u[n + 1] + u[n]), 0.5 * (u[n + 1] - u[n])
        v = middle + half * nodes
        decay = torch.exp(a[:, None] * (_log_cosh(v) - _log_cosh(u[n + 1])))  # (C, quadrature)
        known = u[max(0, n + 1 - order) : n + 1].flip(0)  # latest first
        row = []
        for j in range(len(known)):
            others = [k for k in range(len(known)) if k != j]
            basis = torch.ones_like(v)
            for k in others:
                basis = basis * (v - known[k]) / (known[j] - known[k])
            row.append(s[n + 1] * a * half * (decay * basis * weights).sum(dim=1))
        history.append(row)
        state.append(s[n + 1] / s[n] * torch.exp(a * (_log_cosh(u[n]) - _log_cosh(u[n + 1]))))
    return state, history


@torch.no_grad()
def solve_exponential(
    term: ScoreTerm,
    z1: Tensor,
    times: Sequence[float],
    *,
    order: int = 3,
    callback: Callback | None = None,
) -> Solution:
    """Integrate the probability-flow ODE over given times, one evaluation of the network per step.

    Args:
        term: the score network's ODE. z1: state at ``times[0]``, (B, C, ...). times: such as from
            :func:`natural_grid`, falling or rising. order: 1 to 4; the first steps use what there is, so the error
            falls with the third or fourth power of the step only where those steps hardly count (VP from t = 1).
        callback: called with a ``Progress`` after every step.

    Returns:
        Solution with the state in z1's dtype (at least float32); nothing is read back until the end.

    Raises:
        ValueError: an order or times out of range. NonFiniteError: the state became NaN or infinite.

    Source: the mixed score's ODE in LSGM, equation 8; Hochbruck & Ostermann 2010 (exponential Adams methods);
    Zhang & Chen 2023 (DEIS).
    """
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must be from 1 to {MAX_ORDER}, got {order}")
    times = _solution.checked_times(times)
    started = time.perf_counter()
    if z1.numel() == 0:
        return Solution(z=z1.clone(), nfe=0, accepted=0, rejected=0, seconds=0.0)
    z = z1.to(torch.promote_types(z1.dtype, torch.float32))
    channels = (1, -1, *(1,) * (z.dim() - 2))
    logit = term.mixing_logit
    a = (
        torch.ones(1, dtype=torch.float64)
        if logit is None
        else torch.sigmoid(logit.detach().double()).flatten().cpu()
    )
    state, history = coefficients(term.sde, a, times, order)
    # Everything that the device needs is sent ahead of the loop.
    table = [torch.stack([c, *row]).to(z.dtype).to(z.device) for c, row in zip(state, history, strict=True)]
    stamps = torch.tensor(times, dtype=torch.float64).to(z.dtype).to(z.device)
    calls = CountedDrift(term, z.shape)
    finite = torch.ones(len(state), dtype=torch.bool, device=z.device)
    outputs: list[Tensor] = []
    for n in range(len(state)):
        eps = calls.counted(term.predict(z, stamps[n].expand(z.shape[0])))
        outputs = [eps, *outputs[: order - 1]]
        c, *row = (values.reshape(channels) for values in table[n])
        z = ops.multistep_update(z, c, outputs, row)
        finite[n] = torch.isfinite(z).all()
        if callback is not None:
            fraction = (times[n + 1] - times[0]) / (times[-1] - times[0])
            callback(Progress(fraction=fraction, t=times[n + 1], nfe=calls.nfe))
    _solution.raise_if_not_finite(finite, times)
    return Solution(
        z=z.to(z1.dtype),
        nfe=calls.nfe,
        accepted=len(state),
        rejected=0,
        seconds=time.perf_counter() - started,
        steps=_solution.fixed_steps(times),
    )
