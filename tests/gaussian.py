"""Gaussian data, whose score, flow and density are known in closed form: the problems that solvers are held to."""

from __future__ import annotations

import torch

from lsgm_fast.config import SDEConfig
from lsgm_fast.sampling import ScoreTerm
from lsgm_fast.sde import SDE

SDES = {
    "vpsde": SDEConfig(),
    "vpsde with variance": SDEConfig(sigma2_0=1e-3),
    "geometric_sde": SDEConfig(name="geometric_sde", sigma2_0=3e-5, sigma2_min=3e-5),
    "sub_vpsde": SDEConfig(name="sub_vpsde"),
    "vesde": SDEConfig(name="vesde", sigma2_0=1e-2, sigma2_min=1e-2, sigma2_max=100.0),
}
LOGIT = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64).reshape(1, 3, 1, 1)
DATA_VARIANCE = 0.3
T_END = 0.05


def draw(sde: SDE, batch: int = 2) -> torch.Tensor:
    """States at t = 1, (batch, 3, 2, 5) float64."""
    generator = torch.Generator().manual_seed(3)
    return sde.prior_std * torch.randn(batch, 3, 2, 5, generator=generator, dtype=torch.float64)


def variance(sde: SDE, t: torch.Tensor | float) -> torch.Tensor:
    """Of the data N(0, DATA_VARIANCE) after diffusion to t."""
    return sde.mean_coef(t).square() * DATA_VARIANCE + sde.var(t)


def gaussian_term(sde: SDE) -> ScoreTerm:
    """The network that makes the mixed prediction exact for every channel."""
    a = torch.sigmoid(LOGIT)

    def predict(z, t):
        t = t.to(torch.float64).reshape(-1, 1, 1, 1)
        exact = sde.var(t).sqrt() / variance(sde, t) * z
        return (exact - (1 - a) * sde.mixed_r(t) * z) / a

    return ScoreTerm(predict, sde, LOGIT)


def flow(sde: SDE, z1: torch.Tensor, t: float) -> torch.Tensor:
    """Where the probability flow carries z1 from t = 1: proportional to the standard deviation."""
    return z1 * (variance(sde, t) / variance(sde, 1.0)).sqrt()
