"""The arithmetic of Runge-Kutta methods: stages, the end of a step, and the control of its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks, _prepare
from lsgm_fast.reference import rk as reference

MAX_STAGES = 16
"""Most stages of the fused kernels."""


def _check_stages(name: str, y: torch.Tensor, k: torch.Tensor, *rows: Sequence[float]) -> None:
    stages = max(len(row) for row in rows)
    if k.shape[1:] != y.shape or k.shape[0] < stages or stages == 0:
        raise ValueError(
            f"{name} expects k (>= {max(stages, 1)}, {tuple(y.shape)}), got {tuple(k.shape)} for {stages} coefficients"
        )


@define_op(reference.rk_stage)
def rk_stage(
    y: torch.Tensor,
    k: torch.Tensor,
    a: Sequence[float],
    h: torch.Tensor | float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``y + h sum_i a_i k_i``: the state at which the next stage is evaluated.

    Args:
        y: state (B, ...). k: (S, *y.shape), stages stored contiguously, S >= len(a); those with a zero coefficient are
            not read. a: row of the tableau. h: step size, signed: a number, 0-d or (B,).

    Returns:
        Like y; arithmetic in float32 or wider.

    Raises:
        ValueError: k does not hold len(a) stages of y's shape, or h has another shape.
    """
    _check_stages("rk_stage", y, k, a)
    _checks.per_sample("rk_stage", y, h=h)


@define_op(reference.rk_finish)
def rk_finish(
    y: torch.Tensor,
    k: torch.Tensor,
    b: Sequence[float],
    e: Sequence[float],
    h: torch.Tensor | float,
    rtol: float,
    atol: float,
    per_sample: bool = False,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y_new = y + h sum b_i k_i`` and the norm of the embedded error ``h sum e_i k_i``, in one pass.

    ``norm = sqrt(mean((error / (atol + rtol max(|y|, |y_new|)))^2))``, over everything, or per sample.

    Args:
        y: (B, ...) state. k: (S, *y.shape), S >= max(len(b), len(e)). b: weights of the solution. e: weights of the
            error (solution minus embedded solution). h: step size, signed: a number, 0-d or (B,). rtol, atol:
            tolerances. per_sample: one norm for each sample instead of one for the batch.

    Returns:
        ``(y_new, norm)``: y_new like y; norm 0-d, or (B,) with ``per_sample``, float32 or wider, 0 for an empty state.

    Raises:
        ValueError: k does not hold enough stages of y's shape, or h has another shape.

    Source: Hairer, Norsett & Wanner, Solving ODEs I, section II.4; SciPy's RK45.
    """
    _check_stages("rk_finish", y, k, b, e)
    _checks.per_sample("rk_finish", y, h=h)


def _check_drift(
    name: str,
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    y: torch.Tensor,
    k: torch.Tensor,
    stage: int,
    *rows: Sequence[float],
    **scalars: torch.Tensor | float,
) -> None:
    _checks.same_shape(name, eps=eps, z=z, y=y)
    _checks.mixing_logit(name, z, mixing_logit)
    _checks.per_sample(name, z, **scalars)
    _check_stages(name, y, k, *rows)
    if not 0 <= stage < k.shape[0]:
        raise ValueError(f"{name}: stage must be from 0 to {k.shape[0] - 1}, got {stage}")
    if not z.dtype == y.dtype == k.dtype:
        raise TypeError(f"{name} expects z, y and k of one dtype, got {z.dtype}, {y.dtype} and {k.dtype}")


@define_op(reference.rk_drift_stage)
def rk_drift_stage(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
    y: torch.Tensor,
    k: torch.Tensor,
    stage: int,
    a: Sequence[float],
    h: torch.Tensor | float,
    *,
    backend: str | None = None,
) -> None:
    """A stage's derivative and the state at which the next one is evaluated, in one launch and in place.

    ``k[stage] = p z + alpha q (eps - r z)`` with ``alpha = sigmoid(mixing_logit)`` (:func:`score_drift`), then
    ``z = y + h sum_i a_i k_i`` (:func:`rk_stage`).

    Args:
        eps: (B, C, ...) network output at z, any floating dtype. z: (B, C, ...) state of this stage, overwritten with
            that of the next. mixing_logit: (1, C, 1, 1) or None. p, q, r: 0-d or (B,). y: state at the start of the
            step. k: (S, *y.shape), of which ``k[stage]`` is written. stage: 0 to S - 1. a: at most S coefficients, the
            new stage's among them; those that are 0 are not read. h: step size, signed: a number, 0-d or (B,).
            z, y and k have one dtype and do not overlap.

    Returns:
        None.

    Raises:
        ValueError: shapes do not match, or stage is out of range. TypeError: z, y and k have several dtypes.

    Source: LSGM, equations 2 and 8; Hairer, Norsett & Wanner, Solving ODEs I, section II.1.
    """
    _check_drift("rk_drift_stage", eps, z, mixing_logit, y, k, stage, a, p=p, q=q, r=r, h=h)


@define_op(reference.rk_drift_finish)
def rk_drift_finish(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
    y: torch.Tensor,
    k: torch.Tensor,
    stage: int,
    b: Sequence[float],
    e: Sequence[float],
    h: torch.Tensor | float,
    rtol: float,
    atol: float,
    per_sample: bool = False,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """The last stage's derivative, the solution and the norm of the embedded error, in one pass and in place.

    ``k[stage] = p z + alpha q (eps - r z)``, then ``z = y + h sum b_i k_i`` and the norm as from :func:`rk_finish`.

    Args:
        eps, z, mixing_logit, p, q, r, y, k, stage: as for :func:`rk_drift_stage`; z is overwritten with the solution.
        b, e, h, rtol, atol, per_sample: as for :func:`rk_finish`.

    Returns:
        The norm: 0-d, or (B,) with ``per_sample``, float32 or wider.

    Raises:
        ValueError, TypeError: as :func:`rk_drift_stage`.

    Source: LSGM, equations 2 and 8; Hairer, Norsett & Wanner, Solving ODEs I, section II.4.
    """
    _check_drift("rk_drift_finish", eps, z, mixing_logit, y, k, stage, b, e, p=p, q=q, r=r, h=h)


@define_op(reference.rk_control)
def rk_control(
    control: torch.Tensor,
    norm: torch.Tensor,
    t_end: float,
    exponent: float = -0.2,
    safety: float = 0.9,
    min_factor: float = 0.2,
    max_factor: float = 10.0,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Step control on the device: accept or reject the attempted step, choose the next one, count.

    Accepted where ``norm < 1``. The next size is ``|h| safety norm^exponent``, at most ``max_factor |h|`` (``|h|``
    after a second attempt), after a rejection at least ``min_factor |h|``, and never beyond ``t_end``.

    Args:
        control: (8,) or (B, 8) float64: ``t``, signed ``h`` and ``t_next`` of the attempted step, ``retried``,
            ``signal``, counts ``accepted`` and ``rejected``, last ``norm``. norm: 0-d or (B,), of the attempted step.
        t_end: end of the integration. exponent: -1 / (order of the error estimate + 1). safety, min_factor,
            max_factor: of the controller; the defaults are SciPy's.

    Returns:
        Like control, for the next attempt. ``signal`` is what a host reads: ``t`` (unchanged after a rejection,
        ``t_end`` on arrival), NaN for a norm that is not finite, infinity for a step too small for float64.
        Where ``h = 0`` the end was reached before and nothing changes.

    Raises:
        ValueError: control is not (..., 8) float64, or norm has another shape.

    Source: Hairer, Norsett & Wanner, Solving ODEs I, section II.4; SciPy's RungeKutta.
    """
    fields = len(reference.CONTROL_FIELDS)
    if control.dtype != torch.float64 or control.dim() not in (1, 2) or control.shape[-1] != fields:
        raise ValueError(
            f"rk_control expects control ({fields},) or (B, {fields}) in float64, "
            f"got {tuple(control.shape)} in {control.dtype}"
        )
    if norm.shape != control.shape[:-1]:
        raise ValueError(
            f"rk_control expects norm {tuple(control.shape[:-1])} for control {tuple(control.shape)}, "
            f"got {tuple(norm.shape)}"
        )


# -- fused kernels --------------------------------------------------------------------------------------------------

_PRIORITIES = {"cpu": 30, "cuda": 30, "triton": 20}


def _too_many(k: torch.Tensor) -> list[str]:
    return [f"{k.shape[0]} stages, at most {MAX_STAGES} are supported"] if k.shape[0] > MAX_STAGES else []


def _stage_reasons(
    y: torch.Tensor, k: torch.Tensor, a: Sequence[float], h: torch.Tensor | float, *rest: Any, **more: Any
) -> list[str]:
    why = _prepare.unsupported_dtypes(y=y, k=k)
    if y.dtype != k.dtype:
        why.append(f"y is {y.dtype} and k {k.dtype}: one dtype is supported")
    return why + _too_many(k) + _prepare.other_device(y.device, k=k)


def _rows(*rows: Sequence[float]) -> list[list[float]]:
    """The rows without the zeros at their ends."""
    cut = []
    for row in rows:
        values = [float(c) for c in row]
        while len(values) > 1 and values[-1] == 0.0:
            values.pop()
        cut.append(values)
    return cut


def _stage_to_kernel(
    y: torch.Tensor, k: torch.Tensor, a: Sequence[float], h: torch.Tensor | float
) -> tuple[Any, ...]:
    return (y.contiguous(), k.contiguous(), *_rows(a), _prepare.scalar(h, y.device))


def _finish_to_kernel(
    y: torch.Tensor,
    k: torch.Tensor,
    b: Sequence[float],
    e: Sequence[float],
    h: torch.Tensor | float,
    rtol: float,
    atol: float,
    per_sample: bool = False,
) -> tuple[Any, ...]:
    rows = _rows(b, e)
    return (y.contiguous(), k.contiguous(), *rows, _prepare.scalar(h, y.device), rtol, atol, per_sample)


def _norm_like(y: torch.Tensor, per_sample: bool) -> torch.Tensor:
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return torch.empty(y.shape[:1] if per_sample else (), dtype=dtype, device=y.device)


def _drift_reasons(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
    y: torch.Tensor,
    k: torch.Tensor,
    *rest: Any,
    **more: Any,
) -> list[str]:
    why = _prepare.unsupported_dtypes(eps=eps)
    if z.dtype not in (torch.float32, torch.float64):
        why.append(f"the state is {z.dtype}: float32 and float64 are supported")
    elif eps.dtype == torch.float64 != z.dtype:
        why.append("eps is float64 and the state float32: the arithmetic would be wider than the state")
    if not (z.is_contiguous() and y.is_contiguous() and k.is_contiguous()):
        why.append("z, y and k must be contiguous: they are changed in place")
    why += _too_many(k)
    return why + _prepare.other_device(z.device, eps=eps, mixing_logit=mixing_logit, y=y, k=k)


def _drift_to_kernel(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
    y: torch.Tensor,
    k: torch.Tensor,
    stage: int,
    a: Sequence[float],
    h: torch.Tensor | float,
) -> tuple[Any, ...]:
    p, q, r, h = (_prepare.scalar(s, z.device) for s in (p, q, r, h))
    logit = None if mixing_logit is None else _prepare.logit(mixing_logit)
    return (eps.contiguous(), z, logit, p, q, r, y, k, stage, *_rows(a), h)


def _drift_finish_to_kernel(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
    y: torch.Tensor,
    k: torch.Tensor,
    stage: int,
    b: Sequence[float],
    e: Sequence[float],
    h: torch.Tensor | float,
    rtol: float,
    atol: float,
    per_sample: bool = False,
) -> tuple[Any, ...]:
    *first, b_row, h_tensor = _drift_to_kernel(eps, z, mixing_logit, p, q, r, y, k, stage, b, h)
    return (*first, b_row, *_rows(e), h_tensor, rtol, atol, per_sample)


fused.register(
    rk_stage,
    schema="(Tensor y, Tensor k, float[] a, Tensor h) -> Tensor",
    fake=lambda y, k, a, h: torch.empty_like(y),
    prepare=_stage_to_kernel,
    reasons=_stage_reasons,
    priorities=_PRIORITIES,
)
fused.register(
    rk_finish,
    schema=(
        "(Tensor y, Tensor k, float[] b, float[] e, Tensor h, float rtol, float atol, bool per_sample) "
        "-> (Tensor, Tensor)"
    ),
    fake=lambda y, k, b, e, h, rtol, atol, per_sample: (torch.empty_like(y), _norm_like(y, per_sample)),
    prepare=_finish_to_kernel,
    reasons=_stage_reasons,
    priorities=_PRIORITIES,
)
_DRIFT_SCHEMA = (
    "Tensor eps, Tensor(a!) z, Tensor? mixing_logit, Tensor p, Tensor q, Tensor r, "
    "Tensor y, Tensor(b!) k, int stage"
)
fused.register(
    rk_drift_stage,
    schema=f"({_DRIFT_SCHEMA}, float[] a, Tensor h) -> ()",
    fake=lambda *args: None,
    prepare=_drift_to_kernel,
    reasons=_drift_reasons,
    priorities=_PRIORITIES,
)
fused.register(
    rk_drift_finish,
    schema=f"({_DRIFT_SCHEMA}, float[] b, float[] e, Tensor h, float rtol, float atol, bool per_sample) -> Tensor",
    fake=lambda eps, z, *args: _norm_like(z, args[-1]),
    prepare=_drift_finish_to_kernel,
    reasons=_drift_reasons,
    priorities=_PRIORITIES,
)
fused.register(
    rk_control,
    schema=(
        "(Tensor control, Tensor norm, float t_end, float exponent, float safety, float min_factor, float max_factor) "
        "-> Tensor"
    ),
    fake=lambda control, *args: torch.empty_like(control),
    prepare=lambda control, norm, t_end, exponent=-0.2, safety=0.9, min_factor=0.2, max_factor=10.0: (
        control.contiguous(),
        _prepare.scalar(norm, control.device),
        t_end,
        exponent,
        safety,
        min_factor,
        max_factor,
    ),
    reasons=lambda control, norm, *args, **kwargs: _prepare.other_device(control.device, norm=norm),
    priorities=_PRIORITIES,
)
