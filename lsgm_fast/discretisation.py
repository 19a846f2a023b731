"""DDPM discretisation of the diffusions, for ancestral sampling (Ho et al. 2020).

Time is cut into T steps and the variance schedule of any SDE is read as that of a variance-preserving chain:

    alpha_bar_k = 1 - var(k/T)  (k = 1..T),  alpha_bar_0 = 1,   alpha_k = alpha_bar_k / alpha_bar_{k-1},
    beta_k = 1 - alpha_k.

One ancestral step from k to k-1 is

    z <- (z - beta_k eps / sqrt(1 - alpha_bar_k)) / sqrt(alpha_k) + std_k noise,

where eps is the mixed prediction at time k/T, mixed in the VP form r = sqrt(1 - alpha_bar_k) for every SDE,
and the last step (k = 1) adds no noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lsgm_fast.errors import unknown_name
from lsgm_fast.sde import SDE

VARIANCES = ("beta", "beta_post")


class StepCoefficients(NamedTuple):
    """One ancestral step: z <- c_x z + c_eps eps + c_noise noise, with noise ~ N(0, I). Python floats."""

    c_x: float
    c_eps: float
    c_noise: float


@dataclass(frozen=True)
class DDPMSchedule:
    """The discretised diffusion: float64 CPU tensors of shape (T,); entry k-1 belongs to step k = 1..T.

    ``t``: k/T, the time given to the score network; ``alpha_bar``, ``alpha``, ``beta`` as in the module
    docstring; ``std_beta``: sqrt(beta_k); ``std_beta_post``, the posterior's:
    sqrt(beta_k (1 - alpha_bar_{k-1}) / (1 - alpha_bar_k)), whose first entry (0) is replaced by the second.
    """

    t: Tensor
    alpha_bar: Tensor
    alpha: Tensor
    beta: Tensor
    std_beta: Tensor
    std_beta_post: Tensor

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return self.t.numel()

    def mixed_r(self, k: int) -> float:
        """sqrt(1 - alpha_bar_k): the mixing component at step k is this times z."""
        return math.sqrt(1.0 - float(self.alpha_bar[self._index(k)]))

    def step_coefficients(self, k: int, variance: str = "beta") -> StepCoefficients:
        """Coefficients of the ancestral step from k to k-1.

        c_x = 1/sqrt(alpha_k), c_eps = -beta_k / (sqrt(alpha_k) sqrt(1 - alpha_bar_k)), c_noise = std_k, which
        a sampling temperature multiplies. At k = 1 c_noise is 0: the last step gives the prediction of z_0,
        (z - sqrt(1 - alpha_bar_1) eps) / sqrt(alpha_bar_1).

        Args:
            k: step, T down to 1.
            variance: ``"beta"`` or ``"beta_post"``: which standard deviation the noise has.

        Raises:
            ValueError: k outside 1..T, or an unknown variance.
        """
        i = self._index(k)
        if variance not in VARIANCES:
            raise unknown_name("ancestral variance", variance, VARIANCES)
        c_x = 1.0 / math.sqrt(float(self.alpha[i]))
        c_eps = -c_x * float(self.beta[i]) / self.mixed_r(k)
        std = self.std_beta if variance == "beta" else self.std_beta_post
        return StepCoefficients(c_x, c_eps, float(std[i]) if k > 1 else 0.0)

    def _index(self, k: int) -> int:
        if not 1 <= k <= self.steps:
            raise ValueError(f"a step must be in 1..{self.steps}, got {k}")
        return k - 1


def discretise(sde: SDE, steps: int) -> DDPMSchedule:
    """Cut ``sde`` into ``steps`` equal steps of time.

    Everything is computed in float64 on the CPU with the exact formulas, also for ``parity="published"``: the
    release discretises in float64, where the two forms agree to about 1e-12.

    Raises:
        ValueError: steps < 1; an SDE whose variance reaches 1 (a VESDE) or does not increase from step to
            step: such a chain has no alpha_bar.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    alpha_bar = sde.with_parity("exact").one_minus_var(t)
    if float(alpha_bar.min()) <= 0.0:
        largest = 1.0 - float(alpha_bar.min())
        raise ValueError(
            f"the DDPM discretisation needs a variance below 1, but {sde.name} reaches {largest:g}: "
            "sample it with the probability-flow ODE instead"
        )
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    alpha = alpha_bar / previous
    beta = 1.0 - alpha
    if float(beta.min()) <= 0.0:
        raise ValueError(
            f"the variance of {sde.name} with sigma2_0={sde.sigma2_0} does not increase at every one of "
            f"{steps} steps: use fewer steps"
        )
    posterior = beta * (1.0 - previous) / (1.0 - alpha_bar)
    if steps > 1:
        posterior[0] = posterior[1]
    return DDPMSchedule(t, alpha_bar, alpha, beta, torch.sqrt(beta), torch.sqrt(posterior))
