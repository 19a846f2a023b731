"""The NVAE of LSGM: a hierarchical VAE whose groups all have a standard-normal prior (paper, Appendix G)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lsgm_fast import random, trace
from lsgm_fast.config import VAEConfig
from lsgm_fast.distributions import DecoderDistribution, decoder_distribution, soft_clamp
from lsgm_fast.errors import unknown_name
from lsgm_fast.nn.cells import BNSwishConv, Cell, DecoderCombiner, EncoderCombiner, FlowPair
from lsgm_fast.nn.layers import WeightNormConv2d, normalized_weights
from lsgm_fast.nn.recompute import recomputed

_CELL_KINDS = {
    # architecture: (encoder and preprocessing, decoder, postprocessing)
    "res_bnswish": ("res_bnswish", "res_bnswish", "res_bnswish"),
    "res_bnswish2": ("res_bnswish2", "res_bnswish2", "res_bnswish2"),
    "res_mbconv": ("res_bnswish", "mconv_e6", "mconv_e3"),
}
BN_STATISTICS = ("running", "batch")


@dataclass(frozen=True)
class LatentGroup:
    """The approximate posterior of one group and a draw from it, each (N, L, h, w).

    ``eps``: the latent after the flows; ``log_q``: its elementwise log-density (nats); ``mean``, ``log_sigma``: of
    the Gaussian before the flows (whose log-determinant is 0).
    """

    eps: torch.Tensor
    log_q: torch.Tensor
    mean: torch.Tensor
    log_sigma: torch.Tensor


class NVAE(nn.Module):
    """Encoder, decoder and pixel likelihood.

    Resolution level 0 is the image's, each later one half of it; level k has ``channels * channel_mult[k]`` channels.
    The decoder goes through the latent scales from the lowest resolution up, ``groups_per_scale`` groups each, then
    through the postprocessing blocks back to the image. Groups are numbered in that (decoder) order everywhere. The
    score-based prior covers all groups of the lowest resolution (``latent_shape``); the others keep N(0, I).

    ``recompute`` (False): set it to True to train with less memory and more time. The cells then keep only their
    inputs, and compute the rest again in the backward pass, with the same result.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = c = config
        self.recompute = False
        encoder_kind, decoder_kind, post_kind = _CELL_KINDS[c.architecture]
        enc = [c.encoder_channels * m for m in c.channel_mult]
        dec = [c.decoder_channels * m for m in c.channel_mult]
        first, last = c.preprocess_blocks, len(c.channel_mult) - 1
        groups, se = c.groups_per_scale, c.squeeze_excite

        def cells(kind: str, channels: int, n: int) -> list[nn.Module]:
            return [Cell(kind, channels, channels, squeeze_excite=se) for _ in range(n)]

        def resample(kind: str, channels: list[int], level: int, to: int) -> Cell:
            return Cell(kind, channels[level], channels[to], "down" if to > level else "up", se)

        self.stem = WeightNormConv2d(c.image_channels, enc[0], 3)

        self.preprocess = nn.ModuleList()
        for level in range(first):
            self.preprocess.extend(cells(encoder_kind, enc[level], c.preprocess_cells - 1))
            self.preprocess.append(resample(encoder_kind, enc, level, level + 1))

        self.encoder = nn.ModuleList()
        self.input_skip = nn.ModuleList()
        for level in range(first, last + 1):
            for group in range(groups):
                self.encoder.extend(cells(encoder_kind, enc[level], c.encoder_cells_per_group))
                if level < last or group < groups - 1:
                    self.encoder.append(EncoderCombiner(enc[level], dec[level]))
            if level < last:
                self.encoder.append(resample(encoder_kind, enc, level, level + 1))
                if c.input_skip:
                    self.input_skip.append(BNSwishConv(enc[level], enc[level + 1], stride=2))

        levels = [level for level in range(last, first - 1, -1) for _ in range(groups)]
        latents = c.latents_per_group
        self.posterior = nn.ModuleList(WeightNormConv2d(enc[level], 2 * latents, 3) for level in levels)
        self.flows = nn.ModuleList(FlowPair(latents) for _ in range(len(levels) * c.flows_per_group))
        self.latent_conv = nn.ModuleList(WeightNormConv2d(latents, latents, 3) for _ in levels)

        _, height, width = c.latent_shape
        self.prior_feature = nn.Parameter(torch.rand(dec[last], height, width))
        self.decoder = nn.ModuleList()
        for level in range(last, first - 1, -1):
            for _ in range(groups):
                self.decoder.append(DecoderCombiner(dec[level], latents))
                self.decoder.extend(cells(decoder_kind, dec[level], c.decoder_cells_per_group))
            if level > first:
                self.decoder.append(resample(decoder_kind, dec, level, level - 1))

        self.postprocess = nn.ModuleList()
        for level in range(first, 0, -1):
            self.postprocess.append(resample(post_kind, dec, level, level - 1))
            self.postprocess.extend(cells(post_kind, dec[level - 1], c.postprocess_cells - 1))

        self.distribution: type[DecoderDistribution] = decoder_distribution(c.decoder_distribution)
        self.output = WeightNormConv2d(dec[0], self.distribution.logit_channels(c.image_channels), 3)

        parts = (self.encoder, self.preprocess, self.stem, self.input_skip, self.posterior, self.flows)
        encoder_convs = [m for part in parts for m in part.modules() if isinstance(m, WeightNormConv2d)]
        parts = (self.latent_conv, self.decoder, self.postprocess, self.output)
        decoder_convs = [m for part in parts for m in part.modules() if isinstance(m, WeightNormConv2d)]
        # Plain tuples: registered already as parts of the tree above.
        self._decoder_convs = tuple(decoder_convs)
        self._all_convs = tuple(encoder_convs + decoder_convs)

    # -- shapes -------------------------------------------------------------------------------------------------

    @property
    def num_groups(self) -> int:
        """Latent groups over all scales."""
        return self.config.latent_scales * self.config.groups_per_scale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latent that the prior models: all groups of the lowest resolution."""
        return self.config.latent_shape

    @property
    def group_shapes(self) -> list[tuple[int, int, int]]:
        """(channels, height, width) of every group."""
        c = self.config
        size = c.latent_shape[1]
        return [
            (c.latents_per_group, size << s, size << s)
            for s in range(c.latent_scales)
            for _ in range(c.groups_per_scale)
        ]

    @property
    def lower_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the groups that the prior does not cover (higher resolutions, prior N(0, I))."""
        return self.group_shapes[self.config.groups_per_scale :]

    @property
    def weight_norm_convs(self) -> tuple[WeightNormConv2d, ...]:
        """All weight-normalised convolutions, encoder first.

        ``with normalized_weights(vae.weight_norm_convs) as weights`` around calls of the model normalises once, and
        ``weights`` are what these calls use.
        """
        return self._all_convs

    @property
    def decoder_convs(self) -> tuple[WeightNormConv2d, ...]:
        """Those of :attr:`weight_norm_convs` that decoding uses."""
        return self._decoder_convs

    # -- images -------------------------------------------------------------------------------------------------

    def preprocess_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1], natural or padded size -> network input in [-1, 1]: zero padding, bit-depth reduction.

        Raises:
            ValueError: wrong number of dimensions, channels or size, values outside [0, 1], or images that the
                decoder's distribution cannot produce (not one-hot for the categorical one).
        """
        c = self.config
        natural = c.image_size - 2 * c.crop
        sizes = [(s, s) for s in sorted({natural, c.image_size})]
        if images.dim() != 4 or images.shape[1] != c.image_channels or tuple(images.shape[2:]) not in sizes:
            expected = " or ".join(f"(N, {c.image_channels}, {s}, {s})" for s, _ in sizes)
            raise ValueError(
                f"expected images {expected}, got {tuple(images.shape)}: resize them or load another model"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"expected floating-point images in [0, 1], got {images.dtype}: divide 8-bit images by 255"
            )
        if images.numel():
            low, high = (float(v) for v in images.aminmax())
            # Written so that NaN fails too.
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(f"expected image values in [0, 1], got [{low:g}, {high:g}]")
        self.distribution.check_images(images)
        # Half precision has too few digits to tell 8-bit levels apart once scaled.
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if images.shape[2] < c.image_size:
            images = F.pad(images, (c.crop,) * 4)
        if c.num_bits < 8:
            images = torch.floor(images * 255.0 / 2.0 ** (8 - c.num_bits)) / (2.0**c.num_bits - 1.0)
        return images * 2.0 - 1.0

    def crop_images(self, images: torch.Tensor) -> torch.Tensor:
        """Remove the padding border from (..., H, W)."""
        b = self.config.crop
        return images[..., b:-b, b:-b] if b else images

    # -- encoder and decoder ------------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        noise: Sequence[torch.Tensor] | None = None,
        seed: int = 0,
        batch_stats: bool = False,
    ) -> tuple[torch.Tensor, list[LatentGroup]]:
        """Encode ``x`` and decode the draw.

        Args:
            x: (N, C, H, W) in [-1, 1], as :meth:`preprocess_images` returns it.
            noise: one standard-normal draw (N, L, h, w) per group; None: drawn from ``seed``.
            batch_stats: BatchNorm with the batch's statistics (always so in training mode).

        Returns:
            ``(logits (N, K, H, W), groups)``.
        """
        with normalized_weights(self._all_convs):
            state, groups = self._infer(x, self._group_noise(noise, x, seed), batch_stats)
            return self._logits(state, batch_stats), groups

    def encode(
        self,
        x: torch.Tensor,
        noise: Sequence[torch.Tensor] | None = None,
        seed: int = 0,
        batch_stats: bool = False,
    ) -> list[LatentGroup]:
        """The posterior groups alone; arguments as in :meth:`forward`."""
        with normalized_weights(self._all_convs):
            return self._infer(x, self._group_noise(noise, x, seed), batch_stats, last_cells=False)[1]

    def logits(
        self, z: torch.Tensor, lower_noise: Sequence[torch.Tensor] | None = None, batch_stats: bool = False
    ) -> torch.Tensor:
        """Decoder output (N, K, H, W) for the prior's latent ``z`` and the other groups' latents.

        Args:
            z: (N, *latent_shape), the groups of the lowest resolution concatenated on channels.
            lower_noise: latents of the remaining groups, each (N, *lower_shapes[i]); may be left out if there are none.
        """
        groups = self.split_groups(z) + self._lower(lower_noise, z)
        with normalized_weights(self._decoder_convs):
            return self._logits(self._generate(groups, batch_stats), batch_stats)

    def decode(
        self,
        z: torch.Tensor,
        *,
        lower_noise: Sequence[torch.Tensor] | None = None,
        bn: str = "running",
        crop: bool = True,
    ) -> torch.Tensor:
        """Mean image of p(x | z), in [0, 1].

        Args:
            z, lower_noise: as in :meth:`logits`. bn: ``"running"`` or ``"batch"`` BatchNorm statistics (``"batch"``
                makes every image depend on its batch; running statistics are not changed).
            crop: remove the border that padding added.

        Returns:
            (N, C, H, W) in [0, 1].
        """
        if bn not in BN_STATISTICS:
            raise unknown_name("BatchNorm statistics", bn, BN_STATISTICS)
        logits = self.logits(z, lower_noise, bn == "batch")
        # Half precision ends with the network: 8 bits of grey need more than the arithmetic of a mean would leave.
        mean = self.output_distribution(logits.to(torch.promote_types(logits.dtype, torch.float32))).mean()
        images = (mean.clamp(-1.0, 1.0) + 1.0) / 2.0
        return self.crop_images(images) if crop else images

    def output_distribution(self, logits: torch.Tensor) -> DecoderDistribution:
        """p(x | z) given the decoder's output."""
        return self.distribution(logits, self.config.num_bits)

    def reconstruction_loss(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``-log p(x | z)`` summed over the natural image area: (N,) nats."""
        log_prob = self.output_distribution(logits).log_prob(x)
        return -self.crop_images(log_prob).flatten(1).sum(dim=1)

    # -- latent groups ------------------------------------------------------------------------------------------

    def split_groups(self, z: torch.Tensor) -> list[torch.Tensor]:
        """(N, *latent_shape) -> its groups, in decoder order."""
        if z.dim() != 4 or tuple(z.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"expected latents (N, {', '.join(map(str, self.latent_shape))}), got {tuple(z.shape)}"
            )
        return list(z.chunk(self.config.groups_per_scale, dim=1))

    def merge_groups(self, groups: Sequence[torch.Tensor]) -> torch.Tensor:
        """Inverse of :meth:`split_groups`; further groups are ignored."""
        return torch.cat(list(groups[: self.config.groups_per_scale]), dim=1)

    def _lower(self, lower_noise: Sequence[torch.Tensor] | None, z: torch.Tensor) -> list[torch.Tensor]:
        given, expected = list(lower_noise or ()), [(z.shape[0], *s) for s in self.lower_shapes]
        if [tuple(n.shape) for n in given] != expected:
            raise ValueError(
                f"expected lower_noise of shapes {expected}, got {[tuple(n.shape) for n in given]}"
            )
        return given

    def _group_noise(
        self, noise: Sequence[torch.Tensor] | None, x: torch.Tensor, seed: int
    ) -> Sequence[torch.Tensor]:
        n = x.shape[0]
        if noise is None:
            return [
                random.normal(seed, range(n), "posterior", shape, dtype=x.dtype, device=x.device, substream=i)
                for i, shape in enumerate(self.group_shapes)
            ]
        expected = [(n, *s) for s in self.group_shapes]
        if [tuple(e.shape) for e in noise] != expected:
            raise ValueError(f"expected noise of shapes {expected}, got {[tuple(e.shape) for e in noise]}")
        return noise

    # -- the network --------------------------------------------------------------------------------------------

    @trace.spanned("encode")
    def _infer(
        self, x: torch.Tensor, noise: Sequence[torch.Tensor], batch_stats: bool, last_cells: bool = True
    ) -> tuple[torch.Tensor, list[LatentGroup]]:
        h = self.stem(x)
        for cell in self.preprocess:
            h = recomputed(cell, h, batch_stats, when=self.recompute)
        pyramid, skips = h, iter(self.input_skip)
        features: list[tuple[EncoderCombiner, torch.Tensor]] = []
        for module in self.encoder:
            if isinstance(module, EncoderCombiner):
                features.append((module, h))
                continue
            h = recomputed(module, h, batch_stats, when=self.recompute)
            if module.skip.__class__ is not nn.Identity and self.config.input_skip:
                pyramid = next(skips)(pyramid, batch_stats)
                h = h + pyramid

        groups: list[LatentGroup] = []
        state = self.prior_feature.expand(x.shape[0], -1, -1, -1)
        for module in self.decoder:
            if isinstance(module, DecoderCombiner):
                i = len(groups)
                if i > 0:
                    combiner, feature = features.pop()
                    h = combiner(feature, state)
                group = self._posterior(i, h, noise[i])
                groups.append(group)
                if not last_cells and len(groups) == self.num_groups:
                    return state, groups
                state = module(state, self.latent_conv[i](group.eps))
            else:
                state = recomputed(module, state, batch_stats, when=self.recompute)
        return state, groups

    def _posterior(self, i: int, feature: torch.Tensor, noise: torch.Tensor) -> LatentGroup:
        parameters = self.posterior[i](F.elu(feature))
        # Under autocast the convolution's output is in half precision, too coarse for densities of so many numbers.
        parameters = parameters.to(torch.promote_types(parameters.dtype, noise.dtype))
        mean, log_sigma = parameters.chunk(2, dim=1)
        mean, log_sigma = soft_clamp(mean), soft_clamp(log_sigma, self.config.log_sigma_scale)
        eps = mean + torch.exp(log_sigma) * noise
        log_q = -0.5 * noise.square() - 0.5 * math.log(2.0 * math.pi) - log_sigma
        n = self.config.flows_per_group
        for flow in self.flows[i * n : (i + 1) * n]:
            eps = flow(eps)
        return LatentGroup(eps, log_q, mean, log_sigma)

    def _generate(self, groups: Sequence[torch.Tensor], batch_stats: bool) -> torch.Tensor:
        state = self.prior_feature.expand(groups[0].shape[0], -1, -1, -1)
        i = 0
        for module in self.decoder:
            if isinstance(module, DecoderCombiner):
                state = module(state, self.latent_conv[i](groups[i]))
                i += 1
            else:
                state = recomputed(module, state, batch_stats, when=self.recompute)
        return state

    def _logits(self, state: torch.Tensor, batch_stats: bool) -> torch.Tensor:
        for cell in self.postprocess:
            state = recomputed(cell, state, batch_stats, when=self.recompute)
        return self.output(F.elu(state))
