"""Layers and cells against explicit formulas, PyTorch's own modules, or their Jacobians."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lsgm_fast import ops
from lsgm_fast.config import ScoreConfig
from lsgm_fast.models.ncsnpp import Attention, GroupNormSwish, ResBlock, TimeEmbedding
from lsgm_fast.nn.cells import (
    BNSwishBranch,
    Cell,
    DecoderCombiner,
    EncoderCombiner,
    FlowCell,
    FlowPair,
    MaskedConv2d,
    MBConvBranch,
    autoregressive_mask,
)
from lsgm_fast.nn.layers import (
    BatchNormSwish,
    BilinearUp,
    FactorizedReduce,
    SqueezeExcite,
    WeightNormConv2d,
    normalized_weights,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-10}  # for comparisons in float64


def randomized(module, seed=0):
    """In float64, with parameters and running statistics that no initialisation would give."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.2)
    return module


def rand(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- weight normalisation --------------------------------------------------------------------------------------------


def explicit_weight(conv, v):
    w = torch.empty_like(v)
    for k in range(v.shape[0]):
        norm = math.sqrt(sum(float(e) ** 2 for e in v[k].flatten()))
        w[k] = math.exp(float(conv.log_weight_norm.detach()[k])) * v[k] / (norm + 1e-5)
    return w


@pytest.mark.parametrize(
    ("kernel", "stride", "bias", "groups"), [(3, 1, True, 1), (1, 2, False, 1), (3, 2, True, 4)]
)
def test_weight_norm(kernel, stride, bias, groups):
    conv = randomized(WeightNormConv2d(4, 8, kernel, stride, bias, groups))
    x = rand(2, 4, 6, 6)
    w = explicit_weight(conv, conv.weight.detach())
    expected = F.conv2d(x, w, conv.bias, stride, kernel // 2, 1, groups)
    torch.testing.assert_close(conv(x), expected, **TIGHT)


def test_weight_norm_starts_at_the_unnormalised_convolution():
    """Initialised with log(norm + 1e-2): the effective weight is V up to that offset."""
    conv = WeightNormConv2d(8, 8, 3)
    norm = conv.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(conv.log_weight_norm.detach().flatten(), torch.log(norm + 1e-2))


def test_normalized_weights_equals_normalising_each_convolution():
    convs = [
        randomized(WeightNormConv2d(4, 6, 3)),
        randomized(WeightNormConv2d(6, 4, 1)),
        randomized(MaskedConv2d(4, 24, 3, mirror=False, exclude_self=True)),
    ]
    x = rand(2, 4, 5, 5)

    def run():
        return convs[2](convs[1](convs[0](x)))

    alone = run()
    with normalized_weights(convs):
        assert all(c.prepared_weight is not None for c in convs)
        together = run()
    assert torch.equal(alone, together)
    assert all(c.prepared_weight is None for c in convs)

    alone.square().sum().backward()
    expected = [c.weight.grad.clone() for c in convs]
    for c in convs:
        c.weight.grad = None
    with normalized_weights(convs):
        run().square().sum().backward()
    for conv, gradient in zip(convs, expected, strict=True):
        torch.testing.assert_close(conv.weight.grad, gradient, **TIGHT)


def test_normalized_weights_are_dropped_after_an_error():
    conv = WeightNormConv2d(2, 2, 3)
    with pytest.raises(KeyboardInterrupt), normalized_weights([conv]):
        raise KeyboardInterrupt
    assert conv.prepared_weight is None


def test_gradient_of_weight_norm():
    conv = randomized(WeightNormConv2d(2, 3, 3))
    x = rand(1, 2, 4, 4)

    def function(weight, log_norm):
        return F.conv2d(x, ops.weight_norm([weight], [log_norm])[0])

    assert torch.autograd.gradcheck(function, (conv.weight, conv.log_weight_norm))


# -- BatchNorm -------------------------------------------------------------------------------------------------------


def bn_pair(swish, channels=5):
    ours = randomized(BatchNormSwish(channels, swish))
    theirs = nn.BatchNorm2d(channels, momentum=0.05).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, (F.silu if swish else lambda y: y)


@pytest.mark.parametrize("swish", [True, False])
def test_batch_norm_training_step(swish):
    ours, theirs, activation = bn_pair(swish)
    for step in range(3):
        x = rand(4, 5, 3, 2, seed=step) * 3 + 2
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        y1, y2 = ours(x1), activation(theirs(x2))
        torch.testing.assert_close(y1, y2, **TIGHT)
        direction = rand(*y1.shape, seed=10 + step)
        for module in (ours, theirs):
            module.zero_grad()
        y1.backward(direction)
        y2.backward(direction)
        torch.testing.assert_close(x1.grad, x2.grad, **TIGHT)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **TIGHT)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, **TIGHT)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **TIGHT)
    assert int(ours.num_batches_tracked) == 3


@pytest.mark.parametrize("swish", [True, False])
def test_batch_norm_in_eval_mode(swish):
    ours, theirs, activation = bn_pair(swish)
    x = rand(4, 5, 3, 2) * 3 + 2
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), activation(theirs(x)), **TIGHT)
    # The batch's statistics on request, as the training mode uses them, but nothing is remembered.
    theirs.train()
    torch.testing.assert_close(ours(x, batch_stats=True), activation(theirs(x)), **TIGHT)
    assert not torch.allclose(ours(x), ours(x, batch_stats=True))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name


# -- cells -----------------------------------------------------------------------------------------------------------


def unfused_mbconv(branch, x, batch_stats):
    """The same layers one after the other, with PyTorch's own BatchNorm."""

    def norm(layer, x):
        y = F.batch_norm(
            x,
            None if batch_stats else layer.running_mean,
            None if batch_stats else layer.running_var,
            layer.weight,
            layer.bias,
            batch_stats,
            0.0,
            1e-5,
        )
        return F.silu(y) if layer.swish else y

    if branch.up:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    x = F.conv2d(norm(branch.norm, x), branch.expand.weight)
    x = norm(branch.expand_norm, x)
    x = F.conv2d(x, branch.depthwise.weight, None, branch.stride, 2, 1, x.shape[1])
    x = norm(branch.depthwise_norm, x)
    return norm(branch.project_norm, F.conv2d(x, branch.project.weight))


@pytest.mark.parametrize("expansion", [3, 6])
@pytest.mark.parametrize(("stride", "up"), [(1, False), (2, False), (1, True)])
def test_mbconv_running_and_batch_statistics(stride, up, expansion):
    branch = randomized(MBConvBranch(3, 4, stride, up, expansion)).eval()
    assert [branch.norm.swish, branch.expand_norm.swish] == [False, True]
    assert [branch.depthwise_norm.swish, branch.project_norm.swish] == [True, False]
    x = rand(2, 3, 6, 4)
    for batch_stats in (False, True):
        expected = unfused_mbconv(branch, x, batch_stats)
        torch.testing.assert_close(branch(x, batch_stats), expected, **TIGHT)


def test_mbconv_trains_like_the_unfused_sequence():
    branch = randomized(MBConvBranch(3, 4, 1, False, 3)).train()
    x = rand(2, 3, 6, 4)
    unfused_mbconv(branch, x, True).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in branch.named_parameters()}
    branch.zero_grad()
    before = branch.depthwise_norm.running_mean.clone()
    branch(x).square().sum().backward()
    for name, parameter in branch.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-8, msg=name)
    assert not torch.equal(branch.depthwise_norm.running_mean, before)


def test_mbconv_gradient_with_running_statistics():
    """The fused affine in eval mode passes gradients to everything it is made of."""
    branch = randomized(MBConvBranch(3, 4, 1, False, 3)).eval()
    x = rand(2, 3, 6, 4)
    unfused_mbconv(branch, x, False).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in branch.named_parameters()}
    branch.zero_grad()
    branch(x).square().sum().backward()
    for name, parameter in branch.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-8, msg=name)


def test_bn_swish_branch_up():
    branch = randomized(BNSwishBranch(3, 4, 1, up=True)).eval()
    x = rand(2, 3, 4, 5)
    first, second = branch
    h = F.interpolate(first.norm(x), scale_factor=2, mode="nearest")
    torch.testing.assert_close(branch(x), second.conv(second.norm(first.conv(h))), **TIGHT)


@pytest.mark.parametrize("kind", ["res_bnswish", "res_bnswish2", "mconv_e6", "mconv_e3"])
@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("squeeze_excite", [True, False])
def test_cell_is_skip_plus_a_tenth_of_the_gated_branch(kind, resample, squeeze_excite):
    channels = 8 if resample is None else 12
    cell = randomized(Cell(kind, 8, channels, resample, squeeze_excite)).eval()
    x = rand(2, 8, 6, 4)
    y = cell.branch(x)
    if squeeze_excite:
        pooled = y.mean(dim=(2, 3))
        hidden = F.relu(pooled @ cell.se.reduce.weight.T + cell.se.reduce.bias)
        gate = torch.sigmoid(hidden @ cell.se.expand.weight.T + cell.se.expand.bias)
        y = y * gate[:, :, None, None]
    got = cell(x)
    torch.testing.assert_close(got, cell.skip(x) + 0.1 * y, **TIGHT)
    size = {None: (6, 4), "down": (3, 2), "up": (12, 8)}[resample]
    assert got.shape == (2, channels, *size)
    assert not torch.allclose(got, cell(x, batch_stats=True))


@pytest.mark.parametrize(("channels", "hidden"), [(8, 4), (64, 4), (256, 16)])
def test_squeeze_excite_width(channels, hidden):
    assert SqueezeExcite(channels).reduce.weight.shape == (hidden, channels)


def test_factorized_reduce_takes_the_four_pixel_phases():
    reduce = randomized(FactorizedReduce(3, 10))
    x = rand(2, 3, 6, 4)
    active = x * torch.sigmoid(x)
    parts = []
    for conv, (row, column) in zip(reduce.conv, [(0, 0), (1, 1), (0, 1), (1, 0)], strict=True):
        weight = explicit_weight(conv, conv.weight.detach())[:, :, 0, 0]
        phase = active[:, :, row::2, column::2]
        parts.append(torch.einsum("oc,nchw->nohw", weight, phase) + conv.bias[None, :, None, None])
    torch.testing.assert_close(reduce(x), torch.cat(parts, dim=1), **TIGHT)
    assert [conv.out_channels for conv in reduce.conv] == [2, 2, 2, 4]  # the last one takes the remainder


def test_bilinear_up_aligns_corners():
    up = randomized(BilinearUp(1, 1))
    with torch.no_grad():
        up.conv.weight.fill_(1.0)
        up.conv.log_weight_norm.fill_(math.log(1.0 + 1e-5))  # effective weight 1
    assert up.conv.bias is None
    x = torch.arange(6, dtype=torch.float64).reshape(1, 1, 2, 3)
    rows, columns = torch.linspace(0, 1, 4).double(), torch.linspace(0, 2, 6).double()
    expected = 3 * rows[:, None] + columns[None, :]  # a linear function is interpolated exactly
    torch.testing.assert_close(up(x)[0, 0], expected, rtol=1e-6, atol=1e-6)


def test_combiners():
    encoder, decoder = randomized(EncoderCombiner(3, 5)), randomized(DecoderCombiner(5, 2))
    feature, state, z = rand(2, 3, 4, 4), rand(2, 5, 4, 4, seed=2), rand(2, 2, 4, 4, seed=3)
    weight = explicit_weight(encoder.conv, encoder.conv.weight.detach())[:, :, 0, 0]
    expected = (
        feature + torch.einsum("oc,nchw->nohw", weight, state) + encoder.conv.bias[:, None, None].detach()
    )
    torch.testing.assert_close(encoder(feature, state), expected, **TIGHT)
    weight = explicit_weight(decoder.conv, decoder.conv.weight.detach())[:, :, 0, 0]
    expected = (
        torch.einsum("oc,nchw->nohw", weight, torch.cat((state, z), 1)) + decoder.conv.bias[:, None, None]
    )
    torch.testing.assert_close(decoder(state, z), expected, **TIGHT)


# -- resampling ------------------------------------------------------------------------------------------------------


def upfirdn(x, up, down, pad, gain):
    """Zero insertion, padding, convolution with gain * outer([1, 3, 3, 1]) / 64, decimation: in loops."""
    n, c, h, w = x.shape
    inserted = torch.zeros(n, c, h * up, w * up, dtype=x.dtype)
    inserted[:, :, ::up, ::up] = x
    padded = F.pad(inserted, (*pad, *pad))
    taps = (1.0, 3.0, 3.0, 1.0)
    rows, columns = padded.shape[2] - 3, padded.shape[3] - 3
    out = torch.zeros(n, c, rows, columns, dtype=x.dtype)
    for i, j in itertools.product(range(4), range(4)):
        out += gain * taps[i] * taps[j] / 64.0 * padded[:, :, i : i + rows, j : j + columns]
    return out[:, :, ::down, ::down]


@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 6), (8, 2)])
def test_fir_resample_is_zero_insertion_filter_decimation(h, w):
    x = rand(2, 3, h, w)
    torch.testing.assert_close(ops.fir_resample(x, "up"), upfirdn(x, 2, 1, (2, 1), 4.0), **TIGHT)
    torch.testing.assert_close(ops.fir_resample(x, "down"), upfirdn(x, 1, 2, (1, 1), 1.0), **TIGHT)


def test_fir_resample_closed_form_per_axis():
    x = rand(6, 1)[:, 0]
    padded = F.pad(x, (1, 1))
    down = torch.stack(
        [
            (padded[2 * i] + 3 * padded[2 * i + 1] + 3 * padded[2 * i + 2] + padded[2 * i + 3]) / 8
            for i in range(3)
        ]
    )
    up = torch.stack(
        [
            value
            for i in range(1, 7)
            for value in ((padded[i - 1] + 3 * padded[i]) / 4, (3 * padded[i] + padded[i + 1]) / 4)
        ]
    )
    # Constant along the other axis, of which the middle sees no border.
    vertical = x[None, None, :, None].expand(1, 1, 6, 6)
    horizontal = vertical.transpose(2, 3)
    torch.testing.assert_close(ops.fir_resample(vertical, "down")[0, 0, :, 1], down, **TIGHT)
    torch.testing.assert_close(ops.fir_resample(horizontal, "down")[0, 0, 1], down, **TIGHT)
    torch.testing.assert_close(ops.fir_resample(vertical, "up")[0, 0, :, 5], up, **TIGHT)
    torch.testing.assert_close(ops.fir_resample(horizontal, "up")[0, 0, 5], up, **TIGHT)


def test_plain_resampling():
    x = rand(2, 3, 4, 6)
    torch.testing.assert_close(ops.fir_resample(x, "down", fir=False), F.avg_pool2d(x, 2), **TIGHT)
    assert torch.equal(ops.fir_resample(x, "up", fir=False), F.interpolate(x, scale_factor=2, mode="nearest"))
    # Odd sizes may go up.
    odd = rand(1, 2, 3, 5)
    assert ops.fir_resample(odd, "up").shape == ops.fir_resample(odd, "up", False).shape == (1, 2, 6, 10)


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 2, 4, 3), (2, 4, 4)])
@pytest.mark.parametrize("fir", [True, False])
def test_odd_sizes_cannot_go_down(shape, fir):
    with pytest.raises(ValueError, match="even H and W to go down"):
        ops.fir_resample(torch.zeros(shape), "down", fir)


def test_unknown_resampling_direction():
    with pytest.raises(ValueError, match="'dwon'.*did you mean 'down'"):
        ops.fir_resample(torch.zeros(1, 1, 2, 2), "dwon")


# -- flows -----------------------------------------------------------------------------------------------------------


def jacobian(function, latents, size):
    """d out[c, y, x] / d in[c', y', x'] for one sample, as (C, H, W, C, H, W)."""
    z = rand(1, latents, size, size)
    full = torch.autograd.functional.jacobian(lambda e: function(e)[0], z)
    return full[:, :, :, 0]


@pytest.mark.parametrize("mirror", [False, True])
def test_flow_cell_depends_exactly_on_what_comes_before(mirror):
    """Neither more (it would not be invertible by substitution) nor less than the masks allow."""
    latents, size = 3, 7
    j = jacobian(randomized(FlowCell(latents, mirror)), latents, size)
    before = [(dy, dx) for dy in (-2, -1, 0) for dx in range(-2, 3) if (dy, dx) <= (0, 0)]
    sign = -1 if mirror else 1

    def depends(c, y, x, k, v, u):
        """Through any hidden pixel (5x5 from the output) that sees the input (3x3, own channel excluded)."""
        for dy, dx in before:
            p, q = y + sign * dy, x + sign * dx
            if not (0 <= p < size and 0 <= q < size):
                continue
            offset = (sign * (v - p), sign * (u - q))
            if max(map(abs, offset)) <= 1 and (offset < (0, 0) or (offset == (0, 0) and k < c)):
                return True
        return False

    for out in itertools.product(range(latents), range(size), range(size)):
        for source in itertools.product(range(latents), range(size), range(size)):
            derivative = float(j[(*out, *source)])
            if out == source:
                assert derivative == 1.0
            else:
                assert (derivative != 0.0) == depends(*out, *source), (out, source)


@pytest.mark.parametrize("latents", [1, 4])
def test_flows_preserve_volume(latents):
    size = 5
    flow = randomized(FlowPair(latents))
    total = latents * size * size
    for part in (flow.forward_cell, flow.mirrored_cell, flow):
        matrix = jacobian(part, latents, size).reshape(total, total)
        sign, log_det = torch.linalg.slogdet(matrix)
        assert sign == 1.0
        assert abs(float(log_det)) < 1e-10
    assert not torch.allclose(matrix, torch.eye(total, dtype=torch.float64))
    # Two cells of opposite order: together every pixel depends on both sides.
    j = jacobian(flow, latents, size)
    assert float(j[0, 2, 2, 0, 1, 2]) != 0.0
    assert float(j[0, 2, 2, 0, 3, 2]) != 0.0


def test_flow_cell_formula():
    """z - mu, mu = 1x1 of ELU of depthwise 5x5 of ELU of 3x3, masked before the normalisation, L -> 6L -> 6L -> L."""
    cell = randomized(FlowCell(2, mirror=False))
    z = rand(2, 2, 5, 5)

    def conv(layer, x, groups=1):
        weight = explicit_weight(layer, (layer.weight * layer.mask).detach())
        return F.conv2d(x, weight, layer.bias, padding=layer.kernel_size[0] // 2, groups=groups)

    hidden = conv(cell.depthwise, F.elu(conv(cell.spread, z)), groups=12)
    torch.testing.assert_close(cell(z), z - conv(cell.shift, F.elu(hidden)), **TIGHT)
    assert cell.spread.bias is None
    assert cell.depthwise.bias is None


@pytest.mark.parametrize(("out_channels", "in_channels"), [(2, 2), (12, 2), (2, 12), (1, 1)])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_mask_centre_follows_the_channel_order(out_channels, in_channels, exclude_self):
    mask = autoregressive_mask(out_channels, in_channels, 3, exclude_self, mirror=False)
    coarse = min(out_channels, in_channels)
    for o, i in itertools.product(range(out_channels), range(in_channels)):
        order_out, order_in = o * coarse // out_channels, i * coarse // in_channels
        visible = order_in < order_out if exclude_self else order_in <= order_out
        assert mask[o, i].flatten().tolist() == [1, 1, 1, 1, float(visible), 0, 0, 0, 0]
    mirrored = autoregressive_mask(out_channels, in_channels, 3, exclude_self, mirror=True)
    assert torch.equal(mirrored, mask.flip(2, 3))


# -- score network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 16, 256])
@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_group_norm_swish(channels, swish, with_bias):
    layer = randomized(GroupNormSwish(channels, swish))
    assert layer.groups == min(channels // 4, 32)
    x = rand(2, channels, 3, 2) * 3 + 1
    bias = rand(2, channels, seed=5) if with_bias else None
    v = x + bias[:, :, None, None] if with_bias else x
    grouped = v.reshape(2, layer.groups, -1)
    mean, var = grouped.mean(dim=2, keepdim=True), grouped.var(dim=2, unbiased=False, keepdim=True)
    u = ((grouped - mean) / torch.sqrt(var + 1e-6)).reshape(x.shape)
    u = u * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, bias), u * torch.sigmoid(u) if swish else u, **TIGHT)


def test_attention_is_softmax_of_scaled_products():
    layer = randomized(Attention(8))
    x = rand(2, 8, 3, 4)
    h = F.group_norm(x, 2, layer.norm.weight, layer.norm.bias, 1e-6)
    q, k, v = (
        torch.einsum("oc,nchw->nohw", m.weight, h) + m.bias[:, None, None]
        for m in (layer.query, layer.key, layer.value)
    )
    logits = torch.einsum("nchw,ncij->nhwij", q, k) / math.sqrt(8)
    weights = torch.softmax(logits.reshape(2, 3, 4, 12), dim=-1).reshape(2, 3, 4, 3, 4)
    mixed = torch.einsum("nhwij,ncij->nchw", weights, v)
    out = torch.einsum("oc,nchw->nohw", layer.proj.weight, mixed) + layer.proj.bias[:, None, None]
    torch.testing.assert_close(layer(x)[0], (x + out) / math.sqrt(2), **TIGHT)


@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("kind", ["fir", "plain"])
def test_residual_block(resample, kind):
    config = ScoreConfig(channels=8, resample=kind, dropout=0.5)
    block = randomized(ResBlock(8, 12, 16, config, resample)).eval()
    x, temb = rand(2, 8, 4, 4), rand(2, 16, seed=3)

    def change(v):
        return v if resample is None else ops.fir_resample(v, resample, kind == "fir")

    h = F.conv2d(change(block.norm1(x)), block.conv1.weight, block.conv1.bias, padding=1)
    h = h + (temb @ block.time.weight.T + block.time.bias)[:, :, None, None]
    h = F.conv2d(block.norm2(h), block.conv2.weight, block.conv2.bias, padding=1)
    short = F.conv2d(change(x), block.shortcut.weight, block.shortcut.bias)
    expected = (short + h) / math.sqrt(2)
    out, nothing = block(x, temb)
    torch.testing.assert_close(out, expected, **TIGHT)
    assert nothing is None
    assert not torch.allclose(block.train()(x, temb)[0], expected)  # dropout


def test_residual_block_that_normalises_for_its_neighbours():
    config = ScoreConfig(channels=8, dropout=0.0)
    block = randomized(ResBlock(8, 12, 16, config)).eval()
    then = randomized(GroupNormSwish(12, swish=False))
    x, temb = rand(2, 8, 4, 4), rand(2, 16, seed=3)
    expected, _ = block(x, temb)
    out, normed = block(x, temb, block.entry(x), then)
    torch.testing.assert_close(out, expected, **TIGHT)
    torch.testing.assert_close(normed, then(expected), **TIGHT)
    # It believes what it is told.
    assert not torch.allclose(block(x, temb, torch.zeros_like(x))[0], expected)
    # Nothing comes between the sum and the normalisation, only then can they be one.
    assert ResBlock(8, 8, 16, config, "down").entry is None


def test_residual_block_without_shortcut():
    assert ResBlock(8, 8, 16, ScoreConfig(channels=8)).shortcut is None
    assert ResBlock(8, 8, 16, ScoreConfig(channels=8), "down").shortcut is not None


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_time_embedding(embedding):
    config = ScoreConfig(embedding=embedding, embedding_dim=8, embedding_scale=16.0)
    layer = TimeEmbedding(config).double()
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    if embedding == "positional":
        # Width 8: four frequencies from 1 to 1e-4.
        angle = t[:, None] * 16.0 * 10.0 ** -torch.tensor([0.0, 4 / 3, 8 / 3, 4.0], dtype=torch.float64)
    else:
        assert not layer.frequencies.requires_grad
        angle = 2 * math.pi * t[:, None] * layer.frequencies[None]
    h = torch.cat((torch.sin(angle), torch.cos(angle)), dim=1)
    expected = F.silu(h @ layer.linear1.weight.T + layer.linear1.bias) @ layer.linear2.weight.T
    # The positional frequencies are float32 numbers.
    torch.testing.assert_close(layer(t), expected + layer.linear2.bias, rtol=1e-5, atol=1e-6)


def test_a_deep_copy_is_independent():
    layer = randomized(FlowPair(2))
    twin = copy.deepcopy(layer)
    x = rand(1, 2, 4, 4)
    before = layer(x)
    assert torch.equal(before, twin(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 1.0
    assert torch.equal(layer(x), before)
    assert not torch.allclose(twin(x), before)
