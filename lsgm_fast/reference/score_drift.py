"""Reference implementation of ``score_drift``."""

from __future__ import annotations

import torch
from torch import Tensor

from lsgm_fast.reference._broadcast import Scalar, compute_dtype, per_sample


def score_drift(
    eps: Tensor, z: Tensor, mixing_logit: Tensor | None, p: Scalar, q: Scalar, r: Scalar
) -> Tensor:
    """Drift of the probability-flow ODE, ``p z + a q (eps - r z)`` with ``a = sigmoid(mixing_logit)``.

    With ``p = f + g^2 / (2 S^2)``, ``q = g^2 / (2 sqrt(var))`` and ``r = sqrt(var) / S^2`` this equals
    ``f z + g^2 / (2 sqrt(var)) ((1 - a) r z + a eps)`` for every SDE, without the cancellation of the two
    terms in ``z`` (paper, sections 2 and 3.2).

    Args:
        eps: (B, C, H, W), the network's noise prediction.
        z: (B, C, H, W), the state of the ODE.
        mixing_logit: broadcastable to (1, C, 1, 1), or None for an unmixed prediction (``a = 1``).
        p, q, r: number, 0-d or (B,), as returned by ``SDE.drift_coefficients``; in 1 / time, 1 / time and 1.

    Returns:
        ``dz/dt``, of z's shape and dtype: a float64 state with a float32 ``eps`` is evaluated in float64,
        half dtypes in float32.
    """
    dtype = compute_dtype(z, eps)
    state = z.to(dtype)
    p, q, r = (per_sample(value, z, dtype, name) for value, name in ((p, "p"), (q, "q"), (r, "r")))
    correction = q * (eps.to(dtype) - r * state)
    if mixing_logit is not None:
        correction = torch.sigmoid(mixing_logit.to(dtype)) * correction
    return (p * state + correction).to(z.dtype)
