"""Layers of the NVAE: weight-normalised convolutions, BatchNorm-Swish, squeeze-excite, resampling skips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from lsgm_fast import distributed, ops
from lsgm_fast.nn.recompute import recomputing
from lsgm_fast.ops._prepare import dense_format

BN_MOMENTUM = 0.05
BN_EPS = 1e-5


class WeightNormConv2d(nn.Conv2d):
    """Convolution with weight ``exp(g_k) * V_k / (||V_k|| + 1e-5)`` per output filter (NVAE, section 3.3).

    Inside :func:`normalized_weights` the weight computed there for the whole model is used; elsewhere it is
    computed here.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        bias: bool = True,
        groups: int = 1,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias, groups=groups
        )
        norm = torch.linalg.vector_norm(self.weight.detach(), dim=(1, 2, 3), keepdim=True)
        self.log_weight_norm = nn.Parameter(torch.log(norm + 1e-2))
        self.prepared_weight: torch.Tensor | None = None

    def direction(self) -> torch.Tensor:
        """The weight before normalisation."""
        return self.weight

    def normalized_weight(self) -> torch.Tensor:
        """The weight that the convolution has."""
        if self.prepared_weight is not None:
            return self.prepared_weight
        return ops.weight_norm([self.direction()], [self.log_weight_norm])[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.normalized_weight(), self.bias)


def normalize_weights(convs: Sequence[WeightNormConv2d]) -> list[torch.Tensor]:
    """The weights that the convolutions have, from one operation."""
    return ops.weight_norm([c.direction() for c in convs], [c.log_weight_norm for c in convs])


@contextmanager
def prepared_weights(convs: Sequence[WeightNormConv2d], weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """The convolutions use these weights for the duration of the block, those that have prepared ones keep them."""
    given = [(conv, w) for conv, w in zip(convs, weights, strict=True) if conv.prepared_weight is None]
    try:
        for conv, weight in given:
            conv.prepared_weight = weight
        yield
    finally:
        for conv, _ in given:
            conv.prepared_weight = None


@contextmanager
def normalized_weights(convs: Sequence[WeightNormConv2d]) -> Iterator[list[torch.Tensor]]:
    """Normalise the weights of all ``convs`` in one operation for the duration of the block, and yield them in order.

    Blocks nest: an inner one takes the weights that an outer one prepared (with their graph) and leaves them in place;
    the block that prepared a weight drops it.

    The weights are handed over through the modules themselves, so a model must not be trained in one thread while
    another one runs it.
    """
    missing = [conv for conv in convs if conv.prepared_weight is None]
    with prepared_weights(missing, normalize_weights(missing) if missing else []):
        yield [conv.prepared_weight for conv in convs]


class BatchNormSwish(nn.Module):
    """BatchNorm over (N, H, W), then Swish unless ``swish`` is False.

    In training mode the batch's statistics normalise and the running ones are updated (momentum 0.05, unbiased
    variance). In eval mode the running statistics normalise, or with ``batch_stats`` the batch's, updating nothing.
    In a process group, the batch is that of all processes (:func:`lsgm_fast.distributed.batch_statistics`), and all of
    them have to make the call.

    ``repeats``: how often every element will be repeated behind this layer; the running statistics become those of what
    is repeated, n times ``repeats`` elements (as if it had been repeated in front).
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, channels: int, swish: bool = True) -> None:
        super().__init__()
        self.swish = swish
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, batch_stats: bool = False, repeats: int = 1) -> torch.Tensor:
        batch_stats = batch_stats or self.training
        count: torch.Tensor | float
        if batch_stats and distributed.world_size() > 1:
            y, mean, var, count = self._over_all_processes(x)
        else:
            y, mean, var = ops.bn_swish(x, *self.tensors(), batch_stats, BN_EPS, self.swish)
            count = float(x.numel() // x.shape[1])
        if self.training and not recomputing():
            with torch.no_grad():
                if repeats > 1:
                    var = var * (repeats * (count - 1.0) / (repeats * count - 1.0))
                self.running_mean.lerp_(mean, BN_MOMENTUM)
                self.running_var.lerp_(var, BN_MOMENTUM)
                self.num_batches_tracked += 1
        return y

    def _over_all_processes(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What :func:`ops.bn_swish` returns with ``batch_stats``, for the batches of all processes together, and how
        many elements a channel has there."""
        weight, bias, mean, var, count = distributed.batch_statistics(x, self.weight, self.bias, BN_EPS)
        y = ops.bn_swish(x, weight, bias, mean, var, False, BN_EPS, self.swish)[0]
        unbiased = var * (count / (count - 1.0).clamp(min=1.0))
        return y, mean.to(self.running_mean.dtype), unbiased.to(self.running_var.dtype), count

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weight, bias, running mean and running variance."""
        return self.weight, self.bias, self.running_mean, self.running_var

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, swish={self.swish}"


class SqueezeExcite(nn.Module):
    """Channel gate from the pooled features (hidden width C/16, at least 4) and the 0.1-scaled residual add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights and biases, as :func:`ops.se_residual` takes them."""
        return self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias

    def forward(self, skip: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
        return ops.se_residual(skip, x, *self.tensors(), scale)


class InOutLinear(nn.Module):
    """``x W + b`` with W (in, out): the published layout, so that the tensor itself can be used."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The leaf itself as the operand: autocast keeps its half-precision copy, which it does not do for a view.
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class FactorizedReduce(nn.Module):
    """Skip path of a downsampling cell: Swish, then four 1x1 stride-2 convolutions on the four pixel phases."""

    PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        widths = (quarter, quarter, quarter, out_channels - 3 * quarter)
        self.conv = nn.ModuleList(WeightNormConv2d(in_channels, w, 1) for w in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        x = F.silu(x)
        last = dense_format(x) is torch.channels_last
        # All four phases in one copy, each as dense as a convolution likes it, and one copy back for the gradient.
        x = x.reshape(n, channels, height // 2, 2, width // 2, 2)
        if last:
            phases = [p.permute(0, 3, 1, 2) for p in x.permute(3, 5, 0, 2, 4, 1).flatten(0, 1).unbind()]
        else:
            phases = list(x.permute(3, 5, 0, 1, 2, 4).flatten(0, 1).unbind())
        return torch.cat(
            [
                F.conv2d(phases[2 * i + j], conv.normalized_weight(), conv.bias)
                for conv, (i, j) in zip(self.conv, self.PHASES, strict=True)
            ],
            dim=1,
        )


class BilinearUp(nn.Module):
    """Skip path of an upsampling cell: bilinear x2 (corners aligned), then a 1x1 convolution without bias.

    The two commute, up to rounding: the convolution comes first, where it has a quarter of the pixels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.conv(x), scale_factor=2, mode="bilinear", align_corners=True)
