"""What is minimised: the VAE's bound in stage 1, Algorithms 1, 2 and 3 in stage 2 (paper, section 3 and Appendix G.6).

Every objective is one module whose ``forward`` returns one number to differentiate, so that a training step is one
forward and one backward pass and DistributedDataParallel needs nothing special. In stage 2 the encoder's loss q
and the prior's loss p weight the same squared errors differently, and the prior must learn from p alone:

* Algorithm 1: both weights are the likelihood's, the sum of all terms is differentiated as it stands.
* Algorithm 3: the error at one noisy latent ``z_t`` enters q with weight w_q and p with w_p, both per image. Images do
  not mix in the score network, hence ``dq/dz_t = (w_q / w_p) dp/dz_t`` image by image: one backward pass of p, whose
  gradient is rescaled on its way from ``z_t`` to the encoder, gives both exactly.
* Algorithm 2, and Algorithm 3 while the KL term is balanced between groups (then w_q differs by channel): q's gradient
  at ``z_t`` is computed first, without gradients of the network's weights, and handed to the encoder as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lsgm_fast import ops, random
from lsgm_fast.distributions import normal_cross_entropy
from lsgm_fast.models.lsgm import LSGM
from lsgm_fast.models.ncsnpp import GroupNormSwish, NCSNpp
from lsgm_fast.models.nvae import NVAE, LatentGroup
from lsgm_fast.nn.layers import BatchNormSwish, WeightNormConv2d, normalized_weights
from lsgm_fast.sde import SDE
from lsgm_fast.training.config import REWEIGHT, ObjectiveConfig
from lsgm_fast.training.kl import group_coefficients, group_scales
from lsgm_fast.training.regularisation import SpectralRegulariser
from lsgm_fast.weighting import IWQuantities, iw_quantities


@dataclass(frozen=True)
class Draws:
    """All random numbers of one step.

    ``posterior``: per group (N, L, h, w) normals; ``noise``, ``rho``: diffusion noise (N, *latent_shape) and uniforms
    (N,) of the prior's loss; ``noise_q``, ``rho_q``: the encoder's own (Algorithm 2), None where it has none.
    """

    posterior: Sequence[torch.Tensor]
    noise: torch.Tensor | None = None
    rho: torch.Tensor | None = None
    noise_q: torch.Tensor | None = None
    rho_q: torch.Tensor | None = None


def draw(
    seed: int,
    positions: torch.Tensor,
    vae: NVAE,
    device: torch.device,
    objective: ObjectiveConfig | None = None,
) -> Draws:
    """The draws for images at these positions of the training stream: the same for every number of processes."""

    def normal(name: str, shape: tuple[int, ...], i: int = 0) -> torch.Tensor:
        return random.normal(seed, positions, f"train.{name}", shape, device=device, substream=i)

    def uniform(name: str) -> torch.Tensor:
        return random.uniform(seed, positions, f"train.{name}", (), device=device)

    posterior = [normal("posterior", shape, i) for i, shape in enumerate(vae.group_shapes)]
    if objective is None:
        return Draws(posterior)
    noise, rho = normal("noise", vae.latent_shape), uniform("rho")
    own_times = objective.train_vae and objective.q_mode != REWEIGHT
    return Draws(
        posterior,
        noise,
        rho,
        normal("noise_q", vae.latent_shape) if own_times and objective.disjoint else None,
        uniform("rho_q") if own_times else None,
    )


@dataclass(frozen=True)
class Weights:
    """What changes from step to step: the KL coefficient, whether groups are balanced, lambda of the regularisers."""

    kl: float = 1.0
    balance: bool = False
    vae_regularisation: float = 0.0
    score_regularisation: float = 0.0


class VAEObjective(nn.Module):
    """Stage 1: ``mean(-log p(x|z) + c sum_g gamma_g KL_g) + lambda R``, every group's prior N(0, I)."""

    vae: NVAE

    def __init__(self, vae: NVAE, regulariser: SpectralRegulariser) -> None:
        super().__init__()
        self.vae = vae
        self._regulariser = regulariser
        self._alpha = group_scales(vae.config)

    def forward(
        self, images: torch.Tensor, draws: Draws, weights: Weights
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(number to differentiate, parts to show: 0-d nats per image, ``kl_groups`` (G,))."""
        x = self.vae.preprocess_images(images)
        with normalized_weights(self.vae.weight_norm_convs) as convolutions:
            logits, groups = self.vae(x, draws.posterior)
        reconstruction = _reconstruction(self.vae, logits, x)
        kl = torch.stack([_sum(g.log_q + normal_cross_entropy(g.eps)) for g in groups], dim=1)
        gamma = _coefficients(kl, self._alpha, weights)
        total = (reconstruction + (gamma * kl).sum(dim=1)).mean()
        regularisation = torch.zeros_like(total)
        if weights.vae_regularisation > 0.0:
            regularisation = weights.vae_regularisation * vae_regularisation(
                self.vae, convolutions, self._regulariser
            )
        return total + regularisation, _parts(reconstruction, kl, regularisation)


class LSGMObjective(nn.Module):
    """Stage 2.

    Args:
        model: VAE, score network and diffusion. config: the algorithm.
        ema: with ``config.update_q_ema``, the score network that holds the averaged weights.
    """

    vae: NVAE
    prior: NCSNpp

    def __init__(
        self,
        model: LSGM,
        config: ObjectiveConfig,
        vae_regulariser: SpectralRegulariser,
        score_regulariser: SpectralRegulariser,
        *,
        score_convolutions: bool = True,
        ema: NCSNpp | None = None,
    ) -> None:
        super().__init__()
        vae, prior = model.vae, model.prior
        if not isinstance(vae, NVAE) or not isinstance(prior, NCSNpp):
            raise TypeError("training needs an NVAE and an NCSNpp")
        self.vae, self.prior = vae, prior
        self.config: ObjectiveConfig = config
        self._sde: SDE = model.sde
        self._mixing_cross_entropy: Callable[[torch.Tensor, float], torch.Tensor] = model.mixing_cross_entropy
        self._regularisers: tuple[SpectralRegulariser, SpectralRegulariser] = (
            vae_regulariser,
            score_regulariser,
        )
        self._score_convolutions: bool = score_convolutions
        self._alpha: torch.Tensor = group_scales(vae.config)
        # In a tuple, so that the averaged network is no submodule: it has no gradients to reduce.
        self._ema: tuple[NCSNpp | None] = (ema,)
        self._const: float = float(self._sde.cross_entropy_const(self._sde.time_eps))
        if not math.isfinite(self._const):
            raise ValueError(
                f"{self._sde.name} has zero variance at time_eps={self._sde.time_eps}: "
                "the cross entropy needs time_eps > 0 or sigma2_0 > 0"
            )

    def forward(
        self, images: torch.Tensor, draws: Draws, weights: Weights, scale: float = 1.0
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(number to differentiate, parts to show).

        The number's gradients are those of q with respect to the VAE and of p with respect to the score network; its
        value is the sum of both only where they are separate. ``scale``: the loss scaling of half precision, under
        which gradients that are computed here must not underflow either.
        """
        c = self.config
        assert draws.noise is not None and draws.rho is not None
        x = self.vae.preprocess_images(images)
        regularisation = torch.zeros((), device=x.device)
        if weights.score_regularisation > 0.0:
            regularisation = weights.score_regularisation * score_regularisation(
                self.prior, self._regularisers[1], self._score_convolutions
            )
        if not c.train_vae:
            with torch.no_grad():
                groups = self.vae.encode(x, draws.posterior)
            z0 = self.vae.merge_groups([g.eps for g in groups])
            p_loss, _ = self._errors(z0, draws.noise, self._times(draws.rho, c.p_mode), self.prior)
            p_loss = p_loss.mean()
            return p_loss + regularisation, {
                "p_loss": p_loss.detach(),
                "regularisation": regularisation.detach(),
            }

        with normalized_weights(self.vae.weight_norm_convs) as convolutions:
            logits, groups = self.vae(x, draws.posterior)
        if weights.vae_regularisation > 0.0:
            regularisation = regularisation + weights.vae_regularisation * vae_regularisation(
                self.vae, convolutions, self._regularisers[0]
            )
        reconstruction = _reconstruction(self.vae, logits, x)
        z0 = self.vae.merge_groups([g.eps for g in groups])
        if c.algorithm == 1:
            total, p_loss, kl = self._one(z0, groups, draws, weights)
        else:
            total, p_loss, kl = self._two(z0, groups, draws, weights, scale)
        total = total + reconstruction.mean() + regularisation
        return total, _parts(reconstruction, kl, regularisation) | {"p_loss": p_loss.detach()}

    def _one(
        self, z0: torch.Tensor, groups: Sequence[LatentGroup], draws: Draws, weights: Weights
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Algorithm 1: (weighted KL, p loss, KL (N, G))."""
        assert draws.noise is not None and draws.rho is not None
        times = self._times(draws.rho, self.config.p_mode)
        p_loss, cross_entropy = self._errors(z0, draws.noise, times, self.prior)
        kl = self._kl(groups, self._per_group(cross_entropy + self._correction(z0, draws.noise, times)))
        gamma = _coefficients(kl, self._alpha, weights)
        return (gamma * kl).sum(dim=1).mean(), p_loss.mean(), kl

    def _two(
        self, z0: torch.Tensor, groups: Sequence[LatentGroup], draws: Draws, weights: Weights, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Algorithms 2 and 3: (number to differentiate, p loss, KL (N, G))."""
        c = self.config
        assert draws.noise is not None and draws.rho is not None
        p_times = self._times(draws.rho, c.p_mode)
        balanced = weights.balance and weights.kl < 1.0 and len(groups) > 1
        if c.q_mode == REWEIGHT and not balanced:
            ratio = weights.kl * p_times.weight_q / p_times.weight_p
            p_loss, cross_entropy = self._errors(z0, draws.noise, p_times, self.prior, gradient_scale=ratio)
            correction = self._correction(z0, draws.noise, p_times)
            kl = self._kl(groups, self._per_group(cross_entropy.detach() + correction))
            # The prior's part reaches the encoder through p_loss; here it is a constant.
            return (weights.kl * kl.sum(dim=1)).mean() + p_loss.mean(), p_loss.mean(), kl

        if c.q_mode == REWEIGHT:
            noise_q, q_times = draws.noise, p_times
        else:
            assert draws.rho_q is not None
            noise_q = draws.noise if draws.noise_q is None else draws.noise_q
            q_times = self._times(draws.rho_q, c.q_mode)
        z_q = ops.diffuse(z0, noise_q, q_times.m, q_times.var)
        leaf = z_q.detach().requires_grad_()
        network = self._ema[0] if c.update_q_ema else self.prior
        assert network is not None
        p_loss, cross_entropy = self._errors_at(leaf, noise_q, q_times, network)
        detached = self._per_group(cross_entropy.detach() + self._correction(z0, noise_q, q_times))
        kl = self._kl(groups, detached)
        gamma = _coefficients(kl, self._alpha, weights)
        # d(q)/d(z_q), for which the network's own gradients are not needed and not computed.
        weighted = (gamma[: detached.shape[1]] * self._per_group(cross_entropy)).sum(dim=1).mean()
        (gradient,) = torch.autograd.grad(weighted * scale, leaf, retain_graph=c.q_mode == REWEIGHT)
        q_loss = (gamma * kl).sum(dim=1).mean()
        pull = (gradient.float() / scale * z_q).sum()
        if c.q_mode != REWEIGHT:
            p_loss, _ = self._errors(z0.detach(), draws.noise, p_times, self.prior, likelihood=False)
        return q_loss + (pull - pull.detach()) + p_loss.mean(), p_loss.mean(), kl

    # -- parts --------------------------------------------------------------------------------------------------

    def _times(self, rho: torch.Tensor, mode: str) -> IWQuantities:
        return iw_quantities(self._sde, rho, mode, subvp_like_vp=self.config.subvp_like_vp)

    def _correction(self, z0: torch.Tensor, noise: torch.Tensor, times: IWQuantities) -> torch.Tensor | float:
        """The control variate: closed form minus estimate, of the cross entropy with a normal prior, elementwise."""
        if not self.config.control_variate:
            return 0.0
        z_t = ops.diffuse(z0, noise, times.m, times.var)
        r = self._sde.mixed_r(times.t).to(z_t.dtype).view(-1, 1, 1, 1)
        _, estimate = ops.score_matching_loss(r * z_t, noise, times.weight_p, times.weight_q, self._const)
        assert estimate is not None
        return self._mixing_cross_entropy(z0, self._sde.time_eps) - estimate

    def _errors(
        self,
        z0: torch.Tensor,
        noise: torch.Tensor,
        times: IWQuantities,
        network: NCSNpp,
        *,
        gradient_scale: torch.Tensor | None = None,
        likelihood: bool = True,
    ) -> tuple[torch.Tensor, Any]:
        z_t = ops.diffuse(z0, noise, times.m, times.var)
        if gradient_scale is not None:
            z_t = _ScaleGradient.apply(z_t, gradient_scale)
        return self._errors_at(z_t, noise, times, network, likelihood)

    def _errors_at(
        self,
        z_t: torch.Tensor,
        noise: torch.Tensor,
        times: IWQuantities,
        network: NCSNpp,
        likelihood: bool = True,
    ) -> tuple[torch.Tensor, Any]:
        """(p loss per image (N,), cross entropy per element)."""
        prediction = ops.mixed_score(
            network(z_t, times.t), z_t, network.mixing_logit, self._sde.mixed_r(times.t)
        )
        weight_q = times.weight_q if likelihood else None
        return ops.score_matching_loss(prediction, noise, times.weight_p, weight_q, self._const)

    def _per_group(self, cross_entropy: torch.Tensor) -> torch.Tensor:
        """Elementwise (N, C, h, w) -> sums over the groups of the top scale (N, groups)."""
        n = cross_entropy.shape[0]
        return cross_entropy.reshape(n, self.vae.config.groups_per_scale, -1).sum(dim=2)

    def _kl(self, groups: Sequence[LatentGroup], top: torch.Tensor) -> torch.Tensor:
        """(N, G): log q plus cross entropy with the prior, which is N(0, I) below the top scale."""
        log_q = torch.stack([_sum(g.log_q) for g in groups], dim=1)
        lower = [_sum(normal_cross_entropy(g.eps)) for g in groups[top.shape[1] :]]
        return log_q + (torch.cat((top, torch.stack(lower, dim=1)), dim=1) if lower else top)


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by one factor per image."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,), (factor,) = grads, ctx.saved_tensors
        return grad * factor.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)), None


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Over everything but the images."""
    return x.flatten(1).sum(dim=1)


def _reconstruction(vae: NVAE, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # Differences of log-probabilities over thousands of pixels need more than half precision.
    return vae.reconstruction_loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), x)


def _coefficients(kl: torch.Tensor, alpha: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The factor of every group's KL (G,)."""
    if weights.balance and weights.kl < 1.0:
        return weights.kl * group_coefficients(kl, alpha)
    return torch.full_like(kl[0].detach(), weights.kl)


def _parts(
    reconstruction: torch.Tensor, kl: torch.Tensor, regularisation: torch.Tensor
) -> dict[str, torch.Tensor]:
    reconstruction, groups = reconstruction.detach().mean(), kl.detach().mean(dim=0)
    return {
        "nelbo": reconstruction + groups.sum(),
        "reconstruction": reconstruction,
        "kl": groups.sum(),
        "kl_groups": groups,
        "regularisation": regularisation.detach(),
    }


def vae_regularisation(
    vae: NVAE, weight_normed: Sequence[torch.Tensor], regulariser: SpectralRegulariser
) -> torch.Tensor:
    """R of the VAE: effective weights of all convolutions, scales of all BatchNorms."""
    plain = [
        m.weight for m in vae.modules() if isinstance(m, nn.Conv2d) and not isinstance(m, WeightNormConv2d)
    ]
    gammas = [m.weight for m in vae.modules() if isinstance(m, BatchNormSwish)]
    return regulariser([*weight_normed, *plain], gammas)


def score_regularisation(prior: NCSNpp, regulariser: SpectralRegulariser, convolutions: bool) -> torch.Tensor:
    """R of the score network: its convolutions (on request) and the scales of all GroupNorms."""
    weights = [m.weight for m in prior.modules() if isinstance(m, nn.Conv2d)] if convolutions else []
    gammas = [m.weight for m in prior.modules() if isinstance(m, GroupNormSwish)]
    return regulariser(weights, gammas)
