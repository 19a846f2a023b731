"""What a sampler integrates: the probability-flow ODE of a score network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm_fast import ops
from lsgm_fast.sde import SDE


@dataclass(frozen=True)
class ScoreTerm:
    """The drift ``dz/dt = p z + alpha q (eps_theta(z, t) - r z)`` of the probability-flow ODE, and its parts.

    A drift like any other for ``solve_ode``; a solver that knows it evaluates the network alone and combines the rest
    with its own arithmetic, in one pass over memory and without the time leaving the device.

    Attributes:
        predict: the network, ``predict(z, t)`` with t of shape (B,); any floating dtype.
        sde: the diffusion, whose coefficients p, q and r are. mixing_logit: (1, C, 1, 1), or None (alpha = 1).
    """

    predict: Callable[[Tensor, Tensor], Tensor]
    sde: SDE
    mixing_logit: Tensor | None = None

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        """The drift at z, in z's dtype (float32 under ``parity="published"``).

        t is a number, 0-d or (B,). A 0-d t may stay on the CPU: the coefficients are then computed there and reach the
        device as scalars.
        """
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64)
        if self.sde.parity == "published":
            # The published solver hands the network and the SDE a float32 state.
            z = z.to(torch.float32)
        eps = self.predict(z, t.to(z.device).expand(z.shape[0]))
        return ops.score_drift(eps, z, self.mixing_logit, *self.sde.drift_coefficients(t))

    @property
    def mixing(self) -> Tensor:
        """a = sigmoid(mixing_logit) per channel, (C,) float64 on the CPU; (1,) of ones without mixing."""
        if self.mixing_logit is None:
            return torch.ones(1, dtype=torch.float64)
        return torch.sigmoid(self.mixing_logit.detach().double()).flatten().cpu()

    @property
    def separable(self) -> bool:
        """Whether a solver may combine the parts itself: not under ``parity="published"``, which rounds the state."""
        return self.sde.parity == "exact"
