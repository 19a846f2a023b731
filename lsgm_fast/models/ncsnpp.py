"""The NCSN++ score network of LSGM (Song et al. 2021 with BigGAN blocks; paper, Appendix G)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lsgm_fast import ops, trace
from lsgm_fast.config import ScoreConfig
from lsgm_fast.nn.recompute import recomputed

GN_EPS = 1e-6
ZERO_INIT = 1e-10
RSQRT2 = 1.0 / math.sqrt(2.0)


def _variance_scaling_(weight: torch.Tensor, scale: float = 1.0) -> None:
    """Uniform initialisation with variance ``scale / fan_avg``."""
    fan_out, fan_in = weight.shape[0], weight.shape[1]
    receptive = weight[0][0].numel()
    bound = math.sqrt(3.0 * scale / (0.5 * (fan_in + fan_out) * receptive))
    nn.init.uniform_(weight, -bound, bound)


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3, scale: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    _variance_scaling_(conv.weight, scale)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    _variance_scaling_(linear.weight, scale)
    nn.init.zeros_(linear.bias)
    return linear


class GroupNormSwish(nn.Module):
    """GroupNorm with min(C // 4, 32) groups, optional per-sample channel bias in front, optional Swish behind."""

    def __init__(self, channels: int, swish: bool = True) -> None:
        super().__init__()
        self.groups = min(channels // 4, 32)
        self.swish = swish
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, channel_bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.group_norm_swish(x, self.weight, self.bias, self.groups, GN_EPS, channel_bias, self.swish)

    def resampled(self, x: torch.Tensor, direction: str, fir: bool) -> torch.Tensor:
        """The result, enlarged or reduced by two."""
        return ops.group_norm_resample(x, self.weight, self.bias, self.groups, direction, fir, GN_EPS)

    def of_sum(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(x + h) / sqrt(2)``, the end of a residual block, and its normalisation."""
        return ops.group_norm_swish_residual(
            x, h, self.weight, self.bias, self.groups, RSQRT2, GN_EPS, self.swish
        )


class TimeEmbedding(nn.Module):
    """Embedding of t and two linear layers, in float32 whatever the autocast state.

    Positional: ``[sin, cos](scale t f_i)``, ``f_i = 10000^(-i / (d/2 - 1))``. Fourier: ``[sin, cos](2 pi t w_i)`` with
    fixed random w.
    """

    def __init__(self, config: ScoreConfig) -> None:
        super().__init__()
        half = config.embedding_dim // 2
        width = 4 * config.embedding_dim
        self.dim = config.embedding_dim
        self.scale = config.embedding_scale
        self.fourier = config.embedding == "fourier"
        if self.fourier:
            self.frequencies = nn.Parameter(torch.randn(half) * config.embedding_scale, requires_grad=False)
        else:
            self.register_buffer("frequencies", self.derived_buffer("frequencies"), persistent=False)
        self.linear1 = _linear(config.embedding_dim, width)
        self.linear2 = _linear(width, width)

    def derived_buffer(self, name: str) -> torch.Tensor:
        """The positional frequencies, which follow from the width and are not saved."""
        half = self.dim // 2
        return torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(t.device.type, enabled=False):
            factor = 2.0 * math.pi if self.fourier else self.scale
            angle = (t * factor)[:, None] * self.frequencies[None, :]
            h = torch.cat((torch.sin(angle), torch.cos(angle)), dim=1)
            return self.linear2(F.silu(self.linear1(h)))


def _summed(
    x: torch.Tensor, h: torch.Tensor, norm: GroupNormSwish | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(x + h) / sqrt(2)``, and what the normalisation behind it makes of that."""
    if norm is None:
        return ops.residual_add(x, h, RSQRT2), None
    return norm.of_sum(x, h)


class ResBlock(nn.Module):
    """BigGAN residual block: GN-Swish, resample, conv, time bias, GN-Swish, dropout, conv; ``(x + h) / sqrt(2)``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_width: int,
        config: ScoreConfig,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.fir = config.resample == "fir"
        self.norm1 = GroupNormSwish(in_channels)
        self.conv1 = _conv(in_channels, out_channels)
        self.time = _linear(time_width, out_channels)
        self.norm2 = GroupNormSwish(out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _conv(out_channels, out_channels, scale=ZERO_INIT)
        needs_shortcut = in_channels != out_channels or resample is not None
        self.shortcut = _conv(in_channels, out_channels, 1) if needs_shortcut else None

    @property
    def entry(self) -> GroupNormSwish | None:
        """The normalisation that may be computed together with the sum that makes this block's input."""
        return self.norm1 if self.resample is None else None

    @trace.spanned("res_block", trace.shape)
    def forward(
        self,
        x: torch.Tensor,
        temb: torch.Tensor,
        normed: torch.Tensor | None = None,
        then: GroupNormSwish | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the block.

        Args:
            x: (B, C, H, W). temb: (B, time_width), already activated.
            normed: what :attr:`entry` makes of x, if that is known. then: the normalisation of the result, if it is
                wanted.

        Returns:
            The result, and what ``then`` makes of it or None.
        """
        if self.resample is not None:
            h = self.norm1.resampled(x, self.resample, self.fir)
            x = ops.fir_resample(x, self.resample, self.fir)
        else:
            h = self.norm1(x) if normed is None else normed
        h = self.conv1(h)
        with torch.autocast(x.device.type, enabled=False):
            bias = self.time(temb)
        h = self.conv2(self.dropout(self.norm2(h, bias)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return _summed(x, h, then)


class Attention(nn.Module):
    """Single-head self-attention over pixels: ``(x + proj(softmax(q k^T / sqrt(C)) v)) / sqrt(2)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNormSwish(channels, swish=False)
        self.query = _linear(channels, channels, 0.1)
        self.key = _linear(channels, channels, 0.1)
        self.value = _linear(channels, channels, 0.1)
        self.proj = _linear(channels, channels, ZERO_INIT)

    @property
    def entry(self) -> GroupNormSwish:
        """As of :class:`ResBlock`."""
        return self.norm

    def projections(self, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        """Queries, keys and values of the tokens (B, pixels, C)."""
        return self.query(tokens), self.key(tokens), self.value(tokens)

    @trace.spanned("attention", trace.shape)
    def forward(
        self,
        x: torch.Tensor,
        temb: torch.Tensor | None = None,
        normed: torch.Tensor | None = None,
        then: GroupNormSwish | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As of :class:`ResBlock`. temb is not used: both are called alike."""
        normed = self.norm(x) if normed is None else normed
        tokens = normed.flatten(2).transpose(1, 2)
        q, k, v = self.projections(tokens)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        h = self.proj(h).transpose(1, 2).reshape(x.shape)
        return _summed(x, h, then)


class DownLevel(nn.Module):
    """Residual blocks of one resolution on the way down, each followed by attention where the level has it."""

    def __init__(
        self, blocks: list[ResBlock], attention: list[Attention], downsample: ResBlock | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = nn.ModuleList(attention)
        self.downsample = downsample


class UpLevel(nn.Module):
    """Residual blocks of one resolution on the way up, attention behind the last where the level has it."""

    def __init__(
        self, blocks: list[ResBlock], attention: Attention | None, upsample: ResBlock | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention
        self.upsample = upsample


class NCSNpp(nn.Module):
    """Noise-prediction network ``eps_theta(z_t, t)``.

    The mixing with the optimal prediction of a normal prior happens outside (:func:`lsgm_fast.ops.mixed_score`);
    ``mixing_logit`` (1, C, 1, 1) is its per-channel logit, None without mixing.

    ``recompute`` (False): set it to True to train with less memory and more time. Residual blocks and attention then
    keep only their inputs, and compute the rest again in the backward pass, with the same result.
    """

    def __init__(self, config: ScoreConfig) -> None:
        super().__init__()
        self.config = c = config
        self.recompute = False
        width = 4 * c.embedding_dim
        self.mixing_logit: nn.Parameter | None = None
        if c.mixed_prediction:
            self.mixing_logit = nn.Parameter(torch.full((1, c.latent_channels, 1, 1), c.mixing_logit_init))
        self.time_embedding = TimeEmbedding(c)
        self.conv_in = _conv(c.latent_channels, c.channels)

        levels = len(c.channel_mult)
        channels = c.channels
        skips = [channels]
        self.down = nn.ModuleList()
        for level, mult in enumerate(c.channel_mult):
            blocks, attention = [], []
            for _ in range(c.blocks_per_level):
                blocks.append(ResBlock(channels, c.channels * mult, width, c))
                channels = c.channels * mult
                skips.append(channels)
                if level in c.attention_levels:
                    attention.append(Attention(channels))
            downsample = None
            if level < levels - 1:
                downsample = ResBlock(channels, channels, width, c, "down")
                skips.append(channels)
            self.down.append(DownLevel(blocks, attention, downsample))

        self.mid_block1 = ResBlock(channels, channels, width, c)
        self.mid_attention = Attention(channels)
        self.mid_block2 = ResBlock(channels, channels, width, c)

        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            out = c.channels * c.channel_mult[level]
            blocks = []
            for _ in range(c.blocks_per_level + 1):
                blocks.append(ResBlock(channels + skips.pop(), out, width, c))
                channels = out
            attn = Attention(channels) if level in c.attention_levels else None
            upsample = ResBlock(channels, channels, width, c, "up") if level > 0 else None
            self.up.append(UpLevel(blocks, attn, upsample))

        self.norm_out = GroupNormSwish(channels)
        self.conv_out = _conv(channels, c.latent_channels, scale=ZERO_INIT)

    @trace.spanned("score_network", trace.shape)
    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict the noise.

        Args:
            z: (B, C, h, w) noisy latent. t: (B,) or 0-d, time in [0, 1].

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: shapes do not match the configuration.
        """
        c = self.config
        if z.dim() != 4 or tuple(z.shape[1:]) != (c.latent_channels, c.latent_size, c.latent_size):
            raise ValueError(
                f"expected latents (B, {c.latent_channels}, {c.latent_size}, {c.latent_size}), got {tuple(z.shape)}"
            )
        t = torch.atleast_1d(t).to(self.time_embedding.linear1.weight.dtype)
        if t.shape[0] not in (1, z.shape[0]):
            raise ValueError(f"expected t of shape ({z.shape[0]},) or a single value, got {tuple(t.shape)}")
        temb = self.embed(t, z.shape[0])

        h = self.conv_in(z)
        skips, normed = [h], None
        steps = self._steps()
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if step.joins:
                h, normed = torch.cat((h, skips.pop()), dim=1), None
            if self.recompute:
                # Only inputs are kept: one tensor, not two.
                h, normed = recomputed(step.module, h, temb, when=True)
            else:
                then = self.norm_out if following is None else following.entry
                h, normed = step.module(h, temb, normed, then)
            if step.keeps:
                skips.append(h)
        return self.conv_out(self.norm_out(h) if normed is None else normed)

    def embed(self, t: torch.Tensor, n: int) -> torch.Tensor:
        """What the residual blocks take of the times t, (n,) or (1,): the activated embedding, (n, time_width)."""
        return F.silu(self.time_embedding(t.expand(n)))

    def _steps(self) -> list[_Step]:
        """Residual blocks and attention in the order in which they run."""
        steps = []
        for down in self.down:
            for i, block in enumerate(down.blocks):
                steps.append(_Step(block, keeps=not down.attention))
                if down.attention:
                    steps.append(_Step(down.attention[i], keeps=True))
            if down.downsample is not None:
                steps.append(_Step(down.downsample, keeps=True))
        steps += [_Step(self.mid_block1), _Step(self.mid_attention), _Step(self.mid_block2)]
        for up in self.up:
            steps += [_Step(block, joins=True) for block in up.blocks]
            steps += [_Step(module) for module in (up.attention, up.upsample) if module is not None]
        return steps


@dataclass(frozen=True)
class _Step:
    """One module of the network. joins: its input is joined with a skip connection's. keeps: its result becomes one."""

    module: ResBlock | Attention
    joins: bool = False
    keeps: bool = False

    @property
    def entry(self) -> GroupNormSwish | None:
        """The normalisation of the sum in front of it, where nothing comes between."""
        return None if self.joins else self.module.entry
