"""The modules of an NCSN++ with their weights prepared for inference."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm_fast import ops
from lsgm_fast.dispatch import Binding
from lsgm_fast.models.ncsnpp import (
    GN_EPS,
    RSQRT2,
    Attention,
    DownLevel,
    GroupNormSwish,
    NCSNpp,
    ResBlock,
    TimeEmbedding,
    UpLevel,
)
from lsgm_fast.nn.layers import InOutLinear
from lsgm_fast.ops.winograd_conv2d import winograd_weight


class _PreparedNCSNpp(NCSNpp):
    """The network itself, on prepared modules."""

    projections: _PreparedLinear

    def embed(self, t: Tensor, n: int) -> Tensor:
        """The time biases of all residual blocks, (n, channels of all of them), of t (n,) or (1,)."""
        return self.projections(super().embed(t, t.shape[0])).expand(n, -1)


class _Columns(nn.Module):
    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self._start, self._end = start, end

    def forward(self, projected: Tensor) -> Tensor:
        return projected[:, self._start : self._end]


class _PreparedAttention(Attention):
    """Attention with queries, keys and values from one matrix product."""

    def prepare(self, dtype: torch.dtype) -> None:
        """Take the weights of the network's own layers, which are left out from here on."""
        layers = [self._modules.pop(name) for name in ("query", "key", "value")]
        self._joint = _PreparedLinear(*_joint(layers), dtype)
        self.proj = _PreparedLinear(*_joint([self.proj]), dtype)

    def projections(self, tokens: Tensor) -> Sequence[Tensor]:
        return self._joint(tokens).chunk(3, dim=-1)


class _PreparedLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _joint(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """Weight (outputs of all layers, inputs) and bias of the layers side by side, copied."""
    weights = [m.weight.detach().t() if type(m) is InOutLinear else m.weight.detach() for m in layers]
    return torch.cat(weights), torch.cat([m.bias.detach() for m in layers])


class _BoundNorm(GroupNormSwish):
    """GroupNorm whose implementation is chosen once for every shape."""

    def prepare(self) -> None:
        self._alone, self._of_sum = Binding(ops.group_norm_swish), Binding(ops.group_norm_swish_residual)
        self._resampled = Binding(ops.group_norm_resample)

    def forward(self, x: Tensor, channel_bias: Tensor | None = None) -> Tensor:
        return self._alone(x, self.weight, self.bias, self.groups, GN_EPS, channel_bias, self.swish)

    def resampled(self, x: Tensor, direction: str, fir: bool) -> Tensor:
        return self._resampled(x, self.weight, self.bias, self.groups, direction, fir, GN_EPS)

    def of_sum(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self._of_sum(x, h, self.weight, self.bias, self.groups, RSQRT2, GN_EPS, self.swish)


class PreparedConv2d(nn.Module):
    """A convolution for inference: weights in ``dtype``, and as the fastest algorithm for the shape wants them.

    Args:
        conv: without groups and dilation, and with padding that is a number. dtype: of weights and inputs.
        tile: of Winograd's algorithm, where it may be used.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, tile: int | None = None) -> None:
        super().__init__()
        self._stride, self._padding = list(conv.stride), list(conv.padding)
        self._weight = conv.weight.detach().to(dtype)
        self._bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self._packs = not self._weight.is_cuda and _packs(dtype)
        self._packed: tuple[torch.Size, Tensor] | None = None
        self._winograd: dict[int, Tensor] = {}
        self._tile = tile
        self._convolve = Binding(ops.winograd_conv2d)
        if not self._packs:
            self._weight = self._weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self._packs or x.numel() == 0:
            return F.conv2d(x, self._weight, self._bias, self._stride, self._padding)
        tile = None if self._tile is None else _winograd_tile(x, self._weight.shape[0], self._tile)
        if tile is not None:
            if tile not in self._winograd:
                self._winograd[tile] = winograd_weight(self._weight, tile)
            return self._convolve(x, self._winograd[tile], self._bias, self._weight.shape[0])
        # Which order of the weights is fastest depends on the shape of x; another one would be put in order every time.
        packed = self._packed
        if packed is None or packed[0] != x.shape:
            order = torch.ops.mkldnn._reorder_convolution_weight(
                self._weight, self._padding, self._stride, [1, 1], 1, list(x.shape)
            )
            packed = self._packed = x.shape, order
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed[1], self._bias, self._padding, self._stride, [1, 1], 1, "none", [], ""
        )


# Of the machine's memory, what transformed weights may take.
_WINOGRAD_SHARE = 1.0 / 3.0
# Tiles (of all samples), by their size, and channels from which Winograd's algorithm was measured to pay: with fewer,
# reading its larger weights takes longer than the multiplications that it saves.
_FEWEST_TILES = {4: 8, 2: 4}
_FEWEST_CHANNELS = 32


def _winograd_tile(x: Tensor, filters: int, largest: int) -> int | None:
    """The tile with which Winograd's algorithm pays for this input, or None."""
    samples, channels, height, width = x.shape
    if min(channels, filters) < _FEWEST_CHANNELS:
        return None
    for tile, fewest in _FEWEST_TILES.items():
        if tile <= largest and samples * -(-height // tile) * -(-width // tile) >= fewest:
            return tile
    return None


def _largest_tile(convs: Sequence[nn.Conv2d], dtype: torch.dtype) -> int | None:
    """The largest tile whose transformed weights fit into memory; None: there is no kernel, or nothing fits."""
    x = torch.zeros(1, 1, 1, 1, dtype=dtype, device=convs[0].weight.device)
    prepared = torch.zeros(16, 1, 1, 32, device=x.device)
    if dtype is not torch.float32 or ops.winograd_conv2d.backend_for(x, prepared, None, 1) == "reference":
        return None
    numbers = sum(conv.weight.numel() // 9 for conv in convs)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for tile in (4, 2):
        if 4 * numbers * (tile + 2) ** 2 <= _WINOGRAD_SHARE * memory:
            return tile
    return None


def _time_projections(layers: Sequence[nn.Module]) -> tuple[_PreparedLinear, Iterator[_Columns]]:
    """The time projections of all residual blocks as one matrix product, and what takes each block's part of it."""
    ends = list(itertools.accumulate(layer.bias.shape[0] for layer in layers))
    weight, bias = _joint(layers)
    parts = [_Columns(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return _PreparedLinear(weight, bias, weight.dtype), iter(parts)


_LEAVES = (nn.Conv2d, nn.Linear, InOutLinear, GroupNormSwish)
_KNOWN = (*_LEAVES, NCSNpp, TimeEmbedding, ResBlock, Attention, DownLevel, UpLevel, nn.ModuleList, nn.Dropout)


def supported(network: nn.Module) -> bool:
    """Whether :func:`prepared` knows every part of the network.

    What somebody else made of a layer (another class, a hook that computes its weight) it does not.
    """
    return type(network) is NCSNpp and all(
        type(m) in _KNOWN and not (type(m) in _LEAVES and (m._forward_hooks or m._forward_pre_hooks))
        for m in network.modules()
    )


def prepared(network: NCSNpp, dtype: torch.dtype) -> _PreparedNCSNpp:
    """The network, a :func:`supported` one, with prepared modules where there are weights to prepare."""
    winograd = {m for m in network.modules() if type(m) is nn.Conv2d and m.kernel_size == (3, 3)}
    tile = _largest_tile(list(winograd), dtype)
    projections, parts = _time_projections([m.time for m in network.modules() if type(m) is ResBlock])

    def rebuilt(module: nn.Module) -> nn.Module:
        kind = type(module)
        if kind is nn.Conv2d:
            return PreparedConv2d(module, dtype, tile if module in winograd else None)
        if kind is GroupNormSwish:
            norm = _shell(module)
            norm.__class__ = _BoundNorm
            norm.prepare()
            return norm
        shell = _shell(module)
        for name, child in module._modules.items():
            if child is not None:
                shell._modules[name] = rebuilt(child)
        if kind is ResBlock:
            shell._modules["time"] = next(parts)
        elif kind is Attention:
            shell.__class__ = _PreparedAttention
            shell.prepare(dtype)
        return shell

    root = rebuilt(network)
    root.__class__ = _PreparedNCSNpp
    root.projections = projections
    return root


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes convolutions of this dtype here."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    supported = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and supported[dtype]()


def _shell(module: nn.Module) -> nn.Module:
    """The same module with dictionaries of its own, so that what is put into it stays out of the given one."""
    shell = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[name] = dict(module.__dict__[name])
    return shell
