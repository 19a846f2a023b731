"""Reference discretised mixture of logistics over RGB pixels (Salimans et al. 2017, PixelCNN++)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

MIN_LOG_SCALE = -7.0


def unpack(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, 10K, H, W) -> mixture logits (N, K, H, W); means, log scales, coefficients (N, 3, K, H, W)."""
    n, channels, h, w = logits.shape
    k = channels // 10
    rest = logits[:, k:].reshape(n, 3, 3 * k, h, w)
    means, log_scales, coeffs = rest.split(k, dim=2)
    return logits[:, :k], means, log_scales.clamp(min=MIN_LOG_SCALE), torch.tanh(coeffs)


def chain_colours(values: torch.Tensor, coeffs: torch.Tensor) -> torch.Tensor:
    """Red, green given red, blue given both, each clamped to [-1, 1]; (N, 3, H, W) -> the same."""
    red = values[:, 0].clamp(-1.0, 1.0)
    green = (values[:, 1] + coeffs[:, 0] * red).clamp(-1.0, 1.0)
    blue = (values[:, 2] + coeffs[:, 1] * red + coeffs[:, 2] * green).clamp(-1.0, 1.0)
    return torch.stack((red, green, blue), dim=1)


def discretised_logistic_log_prob(
    x: torch.Tensor, means: torch.Tensor, log_scales: torch.Tensor, num_bits: int
) -> torch.Tensor:
    """Log-mass of a logistic in the bin of x (values of 2^bits levels in [-1, 1]); open-ended first and last bins."""
    levels = 2.0**num_bits - 1.0
    centred = x - means
    inv_scale = torch.exp(-log_scales)
    upper = inv_scale * (centred + 1.0 / levels)
    lower = inv_scale * (centred - 1.0 / levels)
    middle = inv_scale * centred
    log_cdf_upper = upper - F.softplus(upper)
    log_one_minus_cdf_lower = -F.softplus(lower)
    log_pdf_middle = middle - log_scales - 2.0 * F.softplus(middle)
    delta = torch.sigmoid(upper) - torch.sigmoid(lower)
    # Where the bin's mass underflows, the density at its centre times the bin width takes over; both branches stay
    # finite so that the unused one cannot send NaN into the gradient.
    inner = torch.where(
        delta > 1e-5, torch.log(delta.clamp(min=1e-10)), log_pdf_middle - math.log(levels / 2.0)
    )
    return torch.where(x < -0.999, log_cdf_upper, torch.where(x > 0.999, log_one_minus_cdf_lower, inner))


def mixture_logistic_log_prob(x: torch.Tensor, logits: torch.Tensor, num_bits: int = 8) -> torch.Tensor:
    mixture, means, log_scales, coeffs = unpack(logits)
    x = x[:, :, None]
    means = torch.stack(
        (
            means[:, 0],
            means[:, 1] + coeffs[:, 0] * x[:, 0],
            means[:, 2] + coeffs[:, 1] * x[:, 0] + coeffs[:, 2] * x[:, 1],
        ),
        dim=1,
    )
    log_probs = discretised_logistic_log_prob(x, means, log_scales, num_bits)
    return torch.logsumexp(log_probs.sum(dim=1) + F.log_softmax(mixture, dim=1), dim=1)


def mixture_logistic_mean(logits: torch.Tensor) -> torch.Tensor:
    mixture, means, _, coeffs = unpack(logits)
    probs = torch.softmax(mixture, dim=1)[:, None]
    return chain_colours((means * probs).sum(dim=2), (coeffs * probs).sum(dim=2))
