"""Log-likelihood of latents under the score-based prior, by the probability-flow ODE.

Along ``dz/dt = h(z, t)`` the log-density changes at the rate -div h, so

    log p(z(t0)) = log N(z(1); 0, prior_std^2 I) + integral from t0 to 1 of div h(z(t), t) dt

(Chen et al. 2018, theorem 1; Song et al. 2021, appendix D.2). For the drift of the mixed score the divergence has two
parts, with the sum over the elements of a sample:

    div h = sum (p - a q r)  +  q sum_i a_i d e_i / d z_i.

The first knows nothing of z, and its integral has a closed form (:func:`linear_log_det`). Only the second, the trace
of the network's Jacobian weighted by the mixing a, is integrated along with z: exactly, or by Hutchinson's estimate
with probes that stay the same for the whole solve (FFJORD, Grathwohl et al. 2019, section 3.1), which keeps the ODE
smooth in t. The published LSGM draws new ones at every evaluation, which ``fresh_probes=True`` does too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lsgm_fast import ops, random
from lsgm_fast.errors import unknown_name
from lsgm_fast.ops import _checks
from lsgm_fast.sampling import solution as _solution
from lsgm_fast.sampling.ode import solve_ode
from lsgm_fast.sampling.solution import Callback, Solution
from lsgm_fast.sampling.terms import ScoreTerm
from lsgm_fast.sde import SDE

PROBES = ("rademacher", "gaussian")
"""Names of the probe distributions that ``log_prior`` accepts."""


def bits_per_dim(log_likelihood: Tensor, dims: int, bins: int = 1) -> Tensor:
    """``-log_likelihood / (dims ln 2) + log2(bins)``: nats per sample as bits per dimension.

    Args:
        log_likelihood: (B,) nats. dims: dimensions of a sample, such as 3 * 32 * 32 for CIFAR-10.
        bins: levels per unit interval of the density's variable. 1 for probabilities of discrete images, such as minus
            the total of :class:`~lsgm_fast.models.lsgm.Nelbo`; 256 for a density of dequantised 8-bit images in [0, 1].

    Returns:
        (B,), dtype of log_likelihood.

    Raises:
        ValueError: dims or bins is not at least 1.
    """
    for name, value in (("dims", dims), ("bins", bins)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return -log_likelihood / (dims * math.log(2.0)) + math.log2(bins)


def linear_log_det(sde: SDE, a: Tensor, t_start: float, t_end: float) -> Tensor:
    """Integral of ``p - a q r`` from ``t_start`` to ``t_end``: ``(1 - a) ln(S_end / S_start) + a ln(m_end / m_start)``.

    With the natural time u, ``p = d ln S / dt`` and ``q r = d ln cosh(u) / dt``, and ``cosh u = S / (m sqrt(1 - s0))``.
    For a = 0 the flow is that of normal data, for a = 1 the integral of f.

    Args:
        a: mixing per channel, any shape, float64.

    Returns:
        Per element of that channel, shape of a, float64.
    """
    t = torch.tensor([t_start, t_end], dtype=torch.float64)
    log_s, log_m = 0.5 * sde.s2(t).log().diff(), sde.mean_coef(t).log().diff()
    return (1.0 - a) * log_s + a * log_m


def log_prior(
    term: ScoreTerm,
    z0: Tensor,
    *,
    t_start: float,
    t_end: float = 1.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    probe: str = "rademacher",
    probes: int = 1,
    fresh_probes: bool = False,
    trace_in_control: bool = True,
    exact_trace: bool = False,
    seed: int = 0,
    first_index: int = 0,
    probe_fn: Callable[[int], Tensor] | None = None,
    solver: str = "rk45",
    state_dtype: torch.dtype = torch.float64,
    callback: Callback | None = None,
    max_steps: int = 100_000,
) -> tuple[Tensor, Solution]:
    """Log-density of latents at ``t_start`` under the model, in nats per sample.

    ``log N(z(t_end); 0, prior_std^2 I) + integral of div h``, with z(t) the probability flow from ``z0``. The network's
    part of the divergence is ``q v^T diag(a) (de/dz) v``, averaged over the probes v: an unbiased estimate of log p
    (not of p), up to the solver's tolerance. Every evaluation is one pass through the network and one vector-Jacobian
    product per probe, which is taken in the network's dtype.

    Step control: state and log-determinant are one state to the solver, and one error norm (root mean square of
    error / (atol + rtol |value|)) serves all entries of the batch. The log-determinant is one entry beside the D
    elements of its sample, so in a batch of B a step may leave an error of up to sqrt(B (D + 1)) tolerances in it
    alone. Weighing it more would buy little: it is a sum of D terms, and D independent errors of one tolerance add up
    to sqrt(D). The value that rtol refers to is the network's part only, since the rest is exact. One step size serves
    the whole batch: a sample depends, within the tolerance, on those it is computed with.

    Can be called under ``torch.no_grad`` and ``torch.inference_mode``; the network's parameters collect no gradients,
    and neither does the result. Parameters that were created under ``inference_mode`` cannot be differentiated through
    (PyTorch says so).

    Args:
        term: the score network's ODE. ``term.predict`` must be differentiable in z and treat each sample on its own
            (no batch statistics).
        z0: (B, C, ...) latents at ``t_start``, any floating dtype.
        t_start: where the density is wanted, such as the recipe's ``ode_eps``. t_end: where z is taken to be normal.
        rtol, atol, solver, callback, max_steps: as for :func:`~lsgm_fast.sampling.solve_ode`.
        probe: ``"rademacher"`` (entries of 1 or -1; exact for a diagonal Jacobian, and of the lowest variance among
            independent entries) or ``"gaussian"`` (the published choice). probes: how many per sample.
        fresh_probes: new probes at every evaluation of the right-hand side in place of the same ones all along: their
            errors average out along t. Evaluations are numbered in a solve, so with these a sample depends on its batch
            by as much as on its probes.
        trace_in_control: False: in the step control the log-determinant of normal data, whose trace is known, stands in
            for the estimated one: it varies on the same scales of time and has no noise. An adaptive solver otherwise
            takes the noise of fresh probes for curvature, makes far smaller steps, and may fail to meet tolerances.
            The published procedure does that (with ``probe="gaussian"``).
        exact_trace: no probes but one vector-Jacobian product for each of the D elements of a sample.
        seed, first_index: of the probes' draws; the i-th sample has index ``first_index + i``.
        probe_fn: ``probe_fn(k)`` gives the k-th probe (B, C, ...) in place of draws; mean 0, variance 1, independent.
            With ``fresh_probes`` the n-th evaluation (from 0) has those from ``n probes`` on.
        state_dtype: dtype of state and log-determinant, float32 or float64.

    Returns:
        ``(log_p (B,) in state_dtype, solution)``; the solution's z is z(t_end) in z0's dtype.

    Raises:
        ValueError: bad shapes, times, dtype, probes or tolerances; ``parity="published"``; a network that is not
            differentiable in z. NonFiniteError, SolverError: as for ``solve_ode``.

    Source: Song et al. 2021, section 4.3 and appendix D.2; Grathwohl et al. 2019 (FFJORD); LSGM, equation 8.
    """
    _check_arguments(term, z0, t_start, t_end, state_dtype)
    # Autograd does not record under inference_mode, even with gradients enabled.
    with torch.inference_mode(False), torch.no_grad():
        z = z0.to(state_dtype)
        batch, elements = z.shape[0], z[:1].numel()
        a = (
            term.mixing.to(z)
            .reshape(1, -1, *(1,) * (z.dim() - 2))
            .expand(1, z.shape[1], *(-1,) * (z.dim() - 2))
        )
        if exact_trace:
            if probe_fn is not None or fresh_probes:
                raise ValueError("exact_trace=True uses no probes: leave probe_fn and fresh_probes out")
            trace = _Trace(a, elements, 1.0, lambda n: _basis(z))
        else:
            drawn = _draw_probes(z, probe, range(probes), seed, first_index, probe_fn)

            def vectors(n: int) -> Iterator[Tensor]:
                """Of the n-th evaluation."""
                if n == 0 or not fresh_probes:
                    return iter(drawn)
                of = range(n * probes, (n + 1) * probes)
                return iter(_draw_probes(z, probe, of, seed, first_index, probe_fn))

            trace = _Trace(a, probes, 1.0 / probes, vectors)

        def drift(t: float, packed: Tensor) -> Tensor:
            state = packed[: z.numel()].view_as(z)
            # Coefficients stay on the host and reach the device as scalars, without a wait.
            p, q, r = term.sde.drift_coefficients(t)
            stamps = torch.tensor(t, dtype=state_dtype).to(z.device).expand(batch)
            eps, divergence = trace(term, state, stamps)
            dz = ops.score_drift(eps, state, term.mixing_logit, p, q, r)
            parts = [dz.flatten(), unit * q.to(state_dtype) * divergence]
            if not trace_in_control:
                parts.append((q * r * of_normal_data).to(state_dtype).to(z.device).expand(batch))
            return torch.cat(parts)

        # Scaling by a power of two is exact, and by one so small the error norm does not see it.
        unit = 1.0 if trace_in_control else 2.0**-60
        # Of normal data e = r z, so the trace of a q de/dz is q r times the sum of a.
        of_normal_data = float(a.expand_as(z[:1]).sum())
        # Flat, so that the part which is z needs no copy to be dense; the traces lie behind.
        start = torch.cat((z.flatten(), z.new_zeros(batch if trace_in_control else 2 * batch)))
        solution = solve_ode(
            drift,
            start,
            t_start=t_start,
            t_end=t_end,
            rtol=rtol,
            atol=atol,
            solver=solver,
            state_dtype=state_dtype,
            callback=callback,
            max_steps=max_steps,
        )
        end, network = solution.z[: z.numel()].view_as(z), solution.z[z.numel() : z.numel() + batch] / unit
        linear = float(linear_log_det(term.sde, a.double().cpu(), t_start, t_end).mean()) * elements
        std = term.sde.prior_std
        log_normal = -0.5 * (end.flatten(1) / std).square().sum(dim=1) - elements * (
            math.log(std) + 0.5 * math.log(2.0 * math.pi)
        )
        return log_normal + network + linear, replace(solution, z=end.to(z0.dtype))


def _check_arguments(
    term: ScoreTerm, z0: Tensor, t_start: float, t_end: float, state_dtype: torch.dtype
) -> None:
    if not z0.is_floating_point():
        raise ValueError(f"z0 must be a floating-point tensor, got {z0.dtype}")
    if z0.dim() < 2 or 0 in z0.shape[1:]:
        raise ValueError(
            f"z0 must be (B, C, ...) with at least one element per sample, got {tuple(z0.shape)}"
        )
    _checks.mixing_logit("log_prior", z0, term.mixing_logit)
    if not 0.0 <= t_start < t_end <= 1.0:
        raise ValueError(
            f"expected times 0 <= t_start < t_end <= 1, got t_start = {t_start} and t_end = {t_end}"
        )
    if state_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state_dtype must be torch.float32 or torch.float64, got {state_dtype}")
    if state_dtype == torch.float64 and not _solution.supports_float64(z0.device):
        raise ValueError(f"device {z0.device} has no float64: pass state_dtype=torch.float32")
    if not term.separable:
        raise ValueError(
            'the log-likelihood needs the formulas of parity="exact", got parity='
            f'"{term.sde.parity}": pass a ScoreTerm with sde.with_parity("exact")'
        )


def _basis(z: Tensor) -> Iterator[Tensor]:
    """One unit vector after another: as probes they give the exact trace."""
    for i in range(z[:1].numel()):
        unit = torch.zeros_like(z)
        unit.flatten(1)[:, i] = 1.0
        yield unit


def _draw_probes(
    z: Tensor,
    probe: str,
    probes: range,
    seed: int,
    first_index: int,
    probe_fn: Callable[[int], Tensor] | None,
) -> list[Tensor]:
    if probe not in PROBES:
        raise unknown_name("probe", probe, PROBES)
    if not probes:
        raise ValueError(f"probes must be at least 1, got {probes.stop}")
    indices = range(first_index, first_index + z.shape[0])
    drawn = []
    for k in probes:
        if probe_fn is not None:
            v = probe_fn(k)
            if v.shape != z.shape:
                raise ValueError(f"probe_fn({k}) returned shape {tuple(v.shape)}, expected {tuple(z.shape)}")
        elif probe == "gaussian":
            v = random.normal(seed, indices, "trace.probe", z.shape[1:], device=z.device, substream=k)
        else:
            u = random.uniform(seed, indices, "trace.probe", z.shape[1:], device=z.device, substream=k)
            v = torch.where(u < 0.5, -1.0, 1.0)
        drawn.append(v.to(device=z.device, dtype=z.dtype))
    return drawn


class _Trace:
    """``scale sum_v v^T diag(a) (de/dz) v`` over the given vectors, per sample, along with the network's output e.

    ``vectors(n)`` are those of the n-th call.

    On which side of the Jacobian J the mixing D = diag(a) stands does not change the trace, but the variance. For
    Rademacher probes that of v^T A v is the sum over i < j of (A_ij + A_ji)^2, and all candidates
    ``D^s (D J) D^-s`` have the same products A_ij A_ji, so the one whose A is symmetric has the lowest. A score is a
    gradient: for a network that learned it, D J (the Hessian of a log-density up to a multiple and a diagonal) is
    symmetric, whereas sqrt(D) J sqrt(D) is not where a differs between channels. So all of D goes to the left.
    """

    def __init__(
        self, a: Tensor, count: int, scale: float, vectors: Callable[[int], Iterator[Tensor]]
    ) -> None:
        self.a = a
        self.count = count
        self.scale = scale
        self.vectors = vectors
        self.calls = 0

    def __call__(self, term: ScoreTerm, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            eps = term.predict(z, t)
        _checks.same_shape("log_prior", eps=eps, z=z)
        total = z.new_zeros(z.shape[0])
        for k, v in enumerate(self.vectors(self.calls)):
            total += (self._pull_back(eps, z, v, last=k + 1 == self.count) * v).flatten(1).sum(dim=1)
        self.calls += 1
        return eps.detach(), self.scale * total

    def _pull_back(self, eps: Tensor, z: Tensor, v: Tensor, last: bool) -> Tensor:
        """``v^T diag(a) de/dz``."""
        gradient = None
        if eps.requires_grad:
            # Only of z, so that the parameters' .grad stays what it is.
            (gradient,) = torch.autograd.grad(
                eps, z, (self.a * v).to(eps.dtype), retain_graph=not last, allow_unused=True
            )
        if gradient is None:
            raise ValueError(
                "the network's output has no gradient with respect to z, whose trace the log-likelihood needs: "
                "predict(z, t) must not detach z nor run under torch.no_grad()"
            )
        return gradient
