"""The drift of the probability-flow ODE with the mixed score, one form for every SDE."""

from __future__ import annotations

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _checks, _prepare
from lsgm_fast.reference.score_drift import score_drift as reference


@define_op(reference)
def score_drift(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``dz/dt = p z + a q (eps - r z)`` with ``a = sigmoid(mixing_logit)`` per channel (1 where None).

    Equals ``f z + g^2 / (2 sqrt(var)) * mixed_score`` with ``p = f + g^2 / (2 S^2)``, ``q = g^2 / (2 sqrt(var))``,
    ``r = sqrt(var) / S^2``, without the cancellation between the two terms.

    Args:
        eps: (B, C, H, W) network output, any floating dtype. z: (B, C, H, W) state.
        mixing_logit: (1, C, 1, 1) or None. p, q, r: 0-d or (B,), from :meth:`lsgm_fast.sde.SDE.drift_coefficients`.

    Returns:
        (B, C, H, W), dtype of z; arithmetic in float32 or wider.

    Raises:
        ValueError: shapes do not match.

    Source: LSGM, equations 2 and 8; Song et al. 2021, equation 13.
    """
    # Called at every evaluation of a sampler: what is nearly always true is asked first.
    if eps.shape != z.shape:
        _checks.same_shape("score_drift", eps=eps, z=z)
    _checks.mixing_logit("score_drift", z, mixing_logit)
    _checks.per_sample("score_drift", z, p=p, q=q, r=r)


def _reasons(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
) -> list[str]:
    why = []
    if z.dim() < 2:
        why.append(f"z has shape {tuple(z.shape)}, expected (B, C, ...)")
    why += _prepare.unsupported_dtypes(eps=eps, z=z)
    return why + _prepare.other_device(z.device, eps=eps, mixing_logit=mixing_logit)


def _to_kernel(
    eps: torch.Tensor,
    z: torch.Tensor,
    mixing_logit: torch.Tensor | None,
    p: torch.Tensor | float,
    q: torch.Tensor | float,
    r: torch.Tensor | float,
) -> tuple[torch.Tensor | None, ...]:
    memory_format = _prepare.dense_format(z)
    return (
        eps.contiguous(memory_format=memory_format),
        z.contiguous(memory_format=memory_format),
        None if mixing_logit is None else _prepare.logit(mixing_logit),
        *(_prepare.scalar(value, z.device) for value in (p, q, r)),
    )


fused.register(
    score_drift,
    schema="(Tensor eps, Tensor z, Tensor? mixing_logit, Tensor p, Tensor q, Tensor r) -> Tensor",
    fake=lambda eps, z, mixing_logit, p, q, r: torch.empty_like(z),
    prepare=_to_kernel,
    reasons=_reasons,
    priorities={"cpu": 30, "cuda": 30, "triton": 20},
)
