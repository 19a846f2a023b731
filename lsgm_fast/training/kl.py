"""The KL term's coefficient and the balancing of its groups (NVAE, Appendix A)."""

from __future__ import annotations

import math

import torch

from lsgm_fast import distributed
from lsgm_fast.config import VAEConfig
from lsgm_fast.training.config import KLConfig


def kl_coefficient(config: KLConfig, step: int, total_steps: int) -> float:
    """``clip(start + (end - start) (step - hold) / anneal, start, end)``, hold and anneal in steps."""
    anneal = config.anneal * total_steps
    passed = step - config.hold * total_steps
    share = 1.0 if anneal <= 0.0 else passed / anneal
    if passed < 0.0:
        share = 0.0
    return config.start + (config.end - config.start) * min(max(share, 0.0), 1.0)


def regularisation_weight(start: float | None, end: float, coefficient: float) -> float:
    """lambda at a KL coefficient c: ``exp(c ln end + (1 - c) ln start)``; ``end`` where there is no start."""
    if start is None:
        return end
    return math.exp(coefficient * math.log(end) + (1.0 - coefficient) * math.log(start))


def group_scales(config: VAEConfig) -> torch.Tensor:
    """alpha per group, (G,): ``(2^i)^2 / groups`` of scale i, divided by the smallest."""
    alpha = torch.tensor(
        [
            4.0**i / config.groups_per_scale
            for i in range(config.latent_scales)
            for _ in range(config.groups_per_scale)
        ]
    )
    return alpha / alpha.min()


def group_coefficients(kl: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Balancing coefficients (G,) of mean 1 from the batch's KL per image and group (N, G).

    ``gamma_g`` is proportional to ``(E|KL_g| + 0.01) / alpha_g``, E over the images of all processes; no gradient.
    """
    size = kl.detach().abs().mean(dim=0)
    gamma = (distributed.all_reduce_mean(size) + 0.01) / alpha.to(size)
    return gamma / gamma.mean()
