"""Latent channels that carry no information, hidden from the score network (``--drop_inactive_var``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lsgm_fast import random
from lsgm_fast.distributions import normal_cross_entropy
from lsgm_fast.models.ncsnpp import NCSNpp
from lsgm_fast.models.nvae import NVAE

HIDDEN_LOGIT = -15.0


@torch.no_grad()
def inactive_channels(vae: NVAE, batches: Iterable[torch.Tensor], threshold: float, seed: int) -> list[int]:
    """Channels of the prior's latent whose KL from N(0, I), summed over pixels, is at most ``threshold`` nats.

    Averaged over the images (N, C, H, W) in [0, 1] of ``batches``, with running BatchNorm statistics.
    """
    mode = vae.training
    vae.eval()
    total, count = torch.zeros(vae.latent_shape[0], dtype=torch.float64), 0
    for images in batches:
        x, n = vae.preprocess_images(images), images.shape[0]
        noise = [
            random.normal(seed, range(count, count + n), "inactive", shape, device=x.device, substream=i)
            for i, shape in enumerate(vae.group_shapes)
        ]
        groups = vae.encode(x, noise)[: vae.config.groups_per_scale]
        kl = torch.cat([g.log_q + normal_cross_entropy(g.eps) for g in groups], dim=1)
        total += kl.sum(dim=(0, 2, 3)).double().cpu()
        count += n
    vae.train(mode)
    return [i for i, value in enumerate((total / max(count, 1)).tolist()) if value <= threshold]


def hide_channels(prior: NCSNpp, channels: Sequence[int], *, start: bool) -> None:
    """Make the network blind to these channels, now and while it is trained.

    The first convolution's weights for them become 0 and get no gradient, which is the network with its input masked
    but needs no mask where the model is loaded again. With ``start`` their mixing logit becomes -15, so that the
    prediction there is that of a normal prior; it stays trainable.
    """
    if not channels:
        return
    weight = prior.conv_in.weight
    visible = torch.ones(weight.shape[1], device=weight.device)
    visible[list(channels)] = 0.0
    visible = visible[None, :, None, None]
    with torch.no_grad():
        weight.mul_(visible)
        if start and prior.mixing_logit is not None:
            prior.mixing_logit[:, list(channels)] = HIDDEN_LOGIT
    weight.register_hook(lambda grad: grad * visible)
