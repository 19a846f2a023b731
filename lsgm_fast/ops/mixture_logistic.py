"""Discretised mixture of logistics: log-probability and mean of the NVAE decoder's RGB likelihood."""

from __future__ import annotations

import torch

from lsgm_fast.dispatch import define_op
from lsgm_fast.reference.mixture_logistic import mixture_logistic_log_prob as reference_log_prob
from lsgm_fast.reference.mixture_logistic import mixture_logistic_mean as reference_mean


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dim() != 4 or logits.shape[1] % 10 != 0 or logits.shape[1] == 0:
        raise ValueError(f"expected logits (N, 10 K, H, W) for K mixtures, got {tuple(logits.shape)}")


@define_op(reference_log_prob)
def mixture_logistic_log_prob(
    x: torch.Tensor, logits: torch.Tensor, num_bits: int = 8, *, backend: str | None = None
) -> torch.Tensor:
    """Log-probability of RGB pixels under a discretised mixture of K logistics, in nats per pixel.

    ``log p(x) = logsumexp_k( log pi_k + sum_c log[ F((x_c + d - m_ck)/s_ck) - F((x_c - d - m_ck)/s_ck) ] )`` with F
    the logistic function, d = 1/(2^bits - 1), open-ended first and last bins, means of green and blue shifted
    linearly by red and green (coefficients tanh), log s >= -7.

    Args:
        x: (N, 3, H, W) in [-1, 1]. logits: (N, 10 K, H, W): K mixture logits, then per colour K means, K log scales,
            K coefficients. num_bits: 5 to 8.

    Returns:
        (N, H, W), the three colours of a pixel together.

    Raises:
        ValueError: shapes do not match.

    Source: Salimans et al. 2017 (PixelCNN++), section 2.1; NVAE and LSGM decoders.
    """
    _check_logits(logits)
    if x.dim() != 4 or x.shape[1] != 3 or (x.shape[0], *x.shape[2:]) != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"expected x (N, 3, H, W) to match logits {tuple(logits.shape)}, got {tuple(x.shape)}"
        )


@define_op(reference_mean)
def mixture_logistic_mean(logits: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """The published "mean" of the mixture: probability-weighted means and coefficients, colours clamped in turn.

    ``r = clamp(E m_r)``, ``g = clamp(E m_g + E c_0 r)``, ``b = clamp(E m_b + E c_1 r + E c_2 g)``, clamps to [-1, 1].

    Args:
        logits: (N, 10 K, H, W) as in :func:`mixture_logistic_log_prob`.

    Returns:
        (N, 3, H, W) in [-1, 1].

    Raises:
        ValueError: the number of channels is not a multiple of 10.
    """
    _check_logits(logits)
