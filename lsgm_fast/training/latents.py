"""How far apart the latents of the training images lie, which the VESDE is set by."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lsgm_fast import random
from lsgm_fast.models.nvae import NVAE

_ROWS = 1024


@torch.no_grad()
def largest_squared_distance(vae: NVAE, batches: Iterable[torch.Tensor], seed: int) -> float:
    """``max_ij |z_i - z_j|^2`` over all pairs of the prior's latents, one draw of q(z|x) for every image.

    The ``sigma2_max`` of a VESDE: with a final standard deviation of the largest distance between two points of the
    data, chains can pass from any one to any other (Song and Ermon 2020, Technique 1).

    Encodes with running BatchNorm statistics; n images cost n^2 / 2 distances. All latents are held in memory, as
    float64.

    Args:
        batches: images (N, C, H, W) in [0, 1], on any device. seed: of the draws.

    Raises:
        ValueError: fewer than 2 images, or a distance that is not finite.
    """
    mode = vae.training
    vae.eval()
    parameter = next(vae.parameters())
    latents: list[torch.Tensor] = []
    count = 0
    try:
        for images in batches:
            n = images.shape[0]
            noise = [
                random.normal(
                    seed, range(count, count + n), "distance", shape, device=parameter.device, substream=i
                )
                for i, shape in enumerate(vae.group_shapes)
            ]
            groups = vae.encode(vae.preprocess_images(images.to(parameter)), noise)
            latents.append(vae.merge_groups([g.eps for g in groups]).flatten(1).double().cpu())
            count += n
    finally:
        vae.train(mode)
    if count < 2:
        raise ValueError(f"a distance needs at least 2 images, got {count}")
    z = torch.cat(latents)
    largest = max(float(torch.cdist(z[i : i + _ROWS], z[i:]).max()) for i in range(0, count, _ROWS))
    if not largest < float("inf"):
        raise ValueError(
            f"the largest distance between two latents is {largest}: the VAE gives NaN or infinity"
        )
    return largest**2
