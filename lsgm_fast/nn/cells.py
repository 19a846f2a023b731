"""Residual cells of the NVAE, its combiners, and the volume-preserving flow cells of its encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lsgm_fast import distributed, ops, trace
from lsgm_fast.nn.layers import (
    BN_EPS,
    BatchNormSwish,
    BilinearUp,
    FactorizedReduce,
    SqueezeExcite,
    WeightNormConv2d,
)

RESIDUAL_SCALE = 0.1


class Tensors(NamedTuple):
    """What :func:`ops.nvae_cell` takes of a branch."""

    convs: list[torch.Tensor]
    biases: list[torch.Tensor]
    norms: list[torch.Tensor]


class BNSwishConv(nn.Module):
    """BN-Swish, nearest x2 on the way up, 3x3 weight-normalised convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.norm = BatchNormSwish(in_channels)
        self.conv = WeightNormConv2d(in_channels, out_channels, 3, stride=stride)

    def forward(self, x: torch.Tensor, batch_stats: bool = False) -> torch.Tensor:
        x = self.norm(x, batch_stats)
        if self.up:
            return ops.up_conv2d(x, self.conv.normalized_weight(), self.conv.bias)
        return self.conv(x)


class BNSwishBranch(nn.ModuleList):
    """``res_bnswish``: two BN-Swish-convolutions; the first one changes resolution and channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, up: bool) -> None:
        super().__init__(
            [BNSwishConv(in_channels, out_channels, stride, up), BNSwishConv(out_channels, out_channels)]
        )

    def forward(self, x: torch.Tensor, batch_stats: bool = False) -> torch.Tensor:
        for op in self:
            x = op(x, batch_stats)
        return x

    def tensors(self) -> Tensors:
        weights = [op.conv.normalized_weight() for op in self]
        return Tensors(weights, [op.conv.bias for op in self], [t for op in self for t in op.norm.tensors()])


class BNSwish2Branch(nn.Module):
    """``res_bnswish2``: the same with a plain first convolution (no weight normalisation, no bias)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.norm1 = BatchNormSwish(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = BatchNormSwish(out_channels)
        self.conv2 = WeightNormConv2d(out_channels, out_channels, 3)

    def forward(self, x: torch.Tensor, batch_stats: bool = False) -> torch.Tensor:
        x = self.norm1(x, batch_stats)
        x = ops.up_conv2d(x, self.conv1.weight) if self.up else self.conv1(x)
        return self.conv2(self.norm2(x, batch_stats))

    def tensors(self) -> Tensors:
        assert self.conv2.bias is not None
        convs = [self.conv1.weight, self.conv2.normalized_weight()]
        return Tensors(convs, [self.conv2.bias], [*self.norm1.tensors(), *self.norm2.tensors()])


class MBConvBranch(nn.Module):
    """``mconv``: BN, 1x1 expansion, BN-Swish, 5x5 depthwise, BN-Swish, 1x1 projection, BN (NVAE, Figure 3a)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, up: bool, expansion: int) -> None:
        super().__init__()
        hidden = round(in_channels * expansion)
        self.up = up
        self.stride = stride
        self.norm = BatchNormSwish(in_channels, swish=False)
        self.expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.expand_norm = BatchNormSwish(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 5, stride=stride, padding=2, groups=hidden, bias=False)
        self.depthwise_norm = BatchNormSwish(hidden)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.project_norm = BatchNormSwish(out_channels, swish=False)

    def forward(self, x: torch.Tensor, batch_stats: bool = False) -> torch.Tensor:
        # Repeating pixels changes neither what works on each of them nor their mean and variance: it waits until the
        # convolution that sees neighbours.
        repeats = 4 if self.up else 1
        x = self.expand(self.norm(x, batch_stats, repeats))
        x = self.expand_norm(x, batch_stats, repeats)
        if self.up:
            x = ops.fir_resample(x, "up", fir=False)
        # The statistics behind the depthwise convolution need its output, so only the convolution is fused.
        x = ops.depthwise_bn_swish(x, self.depthwise.weight, self.stride)
        return self.project_norm(self.project(self.depthwise_norm(x, batch_stats)), batch_stats)

    def tensors(self) -> Tensors:
        norms = (self.norm, self.expand_norm, self.depthwise_norm, self.project_norm)
        convs = (self.expand, self.depthwise, self.project)
        return Tensors([conv.weight for conv in convs], [], [t for norm in norms for t in norm.tensors()])


class Cell(nn.Module):
    """Residual cell: ``skip(x) + 0.1 * SE(branch(x))``.

    Args:
        kind: ``"res_bnswish"``, ``"res_bnswish2"``, or ``"mconv_e6"`` / ``"mconv_e3"`` (expansion 6 / 3).
        resample: None, ``"down"`` or ``"up"`` (by two).
    """

    def __init__(
        self,
        kind: str,
        in_channels: int,
        out_channels: int,
        resample: str | None = None,
        squeeze_excite: bool = True,
    ) -> None:
        super().__init__()
        stride, up = (2 if resample == "down" else 1), resample == "up"
        self.stride, self.up = stride, up
        self.skip: nn.Module
        if resample == "down":
            self.skip = FactorizedReduce(in_channels, out_channels)
        elif up:
            self.skip = BilinearUp(in_channels, out_channels)
        else:
            self.skip = nn.Identity()
        self.branch: MBConvBranch | BNSwish2Branch | BNSwishBranch
        if kind.startswith("mconv_e"):
            self.branch = MBConvBranch(
                in_channels, out_channels, stride, up, int(kind.removeprefix("mconv_e"))
            )
        else:
            branch = BNSwish2Branch if kind == "res_bnswish2" else BNSwishBranch
            self.branch = branch(in_channels, out_channels, stride, up)
        self.se = SqueezeExcite(out_channels) if squeeze_excite else None

    @trace.spanned("cell", trace.shape)
    def forward(self, x: torch.Tensor, batch_stats: bool = False) -> torch.Tensor:
        skip = self.skip(x)
        if not (self.training or (batch_stats and distributed.world_size() > 1)):
            gate = () if self.se is None else self.se.tensors()
            return ops.nvae_cell(
                x,
                skip,
                *self.branch.tensors(),
                gate,
                self.stride,
                self.up,
                batch_stats,
                BN_EPS,
                RESIDUAL_SCALE,
            )
        y = self.branch(x, batch_stats)
        if self.se is None:
            return torch.add(skip, y, alpha=RESIDUAL_SCALE)
        return self.se(skip, y, RESIDUAL_SCALE)


class EncoderCombiner(nn.Module):
    """Adds the projected decoder state to the encoder feature of a group."""

    def __init__(self, encoder_channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(decoder_channels, encoder_channels, 1)

    def forward(self, feature: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return feature + self.conv(state)


class DecoderCombiner(nn.Module):
    """Merges a group's latent into the decoder state: 1x1 convolution of the concatenation."""

    def __init__(self, channels: int, latents: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(channels + latents, channels, 1)

    def forward(self, state: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat((state, z), dim=1))


def autoregressive_mask(
    out_channels: int, in_channels: int, kernel_size: int, exclude_self: bool, mirror: bool
) -> torch.Tensor:
    """0/1 mask (out, in, K, K) that makes a convolution autoregressive in raster order, then in channel order.

    Pixels above and to the left are visible, of the centre pixel the channels up to one's own (``exclude_self``:
    strictly before). ``mirror`` reverses the pixel order; the channel order stays, as in the published weights.
    """
    mask = torch.zeros(out_channels, in_channels, kernel_size, kernel_size)
    centre = kernel_size // 2
    mask[:, :, :centre] = 1.0
    mask[:, :, centre, :centre] = 1.0
    # Channel order is compared on the coarser of the two widths, so that L -> 6L -> L stays autoregressive.
    groups = min(out_channels, in_channels)
    order_out = torch.arange(out_channels) // (out_channels // groups)
    order_in = torch.arange(in_channels) // (in_channels // groups)
    visible = (
        order_in[None, :] < order_out[:, None] if exclude_self else order_in[None, :] <= order_out[:, None]
    )
    mask[:, :, centre, centre] = visible.to(mask.dtype)
    return mask.flip((2, 3)) if mirror else mask


class MaskedConv2d(WeightNormConv2d):
    """Weight-normalised autoregressive convolution; the mask is applied before the normalisation."""

    mask: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        mirror: bool,
        exclude_self: bool = False,
        bias: bool = False,
        groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, groups=groups)
        self._order = (exclude_self, mirror)
        self.register_buffer("mask", self.derived_buffer("mask"), persistent=False)
        norm = torch.linalg.vector_norm(self.direction().detach(), dim=(1, 2, 3), keepdim=True)
        with torch.no_grad():
            self.log_weight_norm.copy_(torch.log(norm + 1e-2))

    def derived_buffer(self, name: str) -> torch.Tensor:
        """The mask, which follows from the shape and is not saved."""
        shape = (self.out_channels // self.groups, self.in_channels // self.groups, self.kernel_size[0])
        return autoregressive_mask(*shape, *self._order).repeat(self.groups, 1, 1, 1)

    def direction(self) -> torch.Tensor:
        return self.weight * self.mask


class FlowCell(nn.Module):
    """One volume-preserving autoregressive step ``z <- z - mu(z)`` (log-determinant 0)."""

    WIDTH = 6

    def __init__(self, latents: int, mirror: bool) -> None:
        super().__init__()
        hidden = self.WIDTH * latents
        self.spread = MaskedConv2d(latents, hidden, 3, mirror, exclude_self=True)
        self.depthwise = MaskedConv2d(hidden, hidden, 5, mirror, groups=hidden)
        self.shift = MaskedConv2d(hidden, latents, 1, mirror, bias=True)
        with torch.no_grad():
            # Starts close to the identity.
            self.shift.log_weight_norm += torch.log(torch.tensor(0.1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        hidden = self.depthwise(F.elu(self.spread(z)))
        return z - self.shift(F.elu(hidden))


class FlowPair(nn.Module):
    """Two flow steps of opposite order (NVAE, section 3.4: more expressive approximate posteriors)."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.forward_cell = FlowCell(latents, mirror=False)
        self.mirrored_cell = FlowCell(latents, mirror=True)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.mirrored_cell(self.forward_cell(z))
