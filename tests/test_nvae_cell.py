"""``nvae_cell``: against the layers one by one in float64, and what a compiled or training model makes of it."""

from __future__ import annotations

import kernel_targets
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.composed import nvae_cell as composed
from lsgm_fast.composed import up_conv2d
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.nn.cells import Cell
from lsgm_fast.nn.layers import BatchNormSwish, normalized_weights
from lsgm_fast.testing import Draw, check_forward
from lsgm_fast.testing.nvae_cell import build

NAME = "nvae_cell"
TARGETS = kernel_targets.targets(NAME)
KINDS = ("res_bnswish", "res_bnswish2", "mconv_e6", "mconv_e3")


def call(label, shape=(2, 6, 5, 7), **options):
    return build(Draw("cpu", 0, label), shape, torch.float32, torch.float32, "contiguous", **options)[0]


@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target):
    backend, device = target
    ran = 0
    # Triton's interpreter is slow.
    most, fewest = (800, 20) if target == ("triton", "cpu") else (100_000, 40)
    with testing.poison_uninitialized():
        for sample in testing.samples(NAME, device):
            if sample.elements > most:
                continue
            why = testing.unsupported(NAME, backend, sample)
            if why:
                with pytest.raises(BackendUnsupported, match=NAME):
                    ops.nvae_cell(*sample.args, backend=backend)
                continue
            check_forward(NAME, backend, sample)
            ran += 1
    assert ran > fewest


def layers(x, skip, convs, biases, norms, gate, stride, up, batch_stats):
    """The same from PyTorch's functions alone, in float64."""

    def norm(x, i):
        weight, bias, mean, var = norms[4 * i : 4 * i + 4]
        if batch_stats:
            mean = var = None
        return F.batch_norm(x, mean, var, weight, bias, training=batch_stats, eps=1e-5)

    if len(convs) == 3:
        x = F.interpolate(x, scale_factor=2, mode="nearest") if up else x
        x = F.silu(norm(F.conv2d(norm(x, 0), convs[0]), 1))
        x = F.silu(norm(F.conv2d(x, convs[1], stride=stride, padding=2, groups=x.shape[1]), 2))
        y = norm(F.conv2d(x, convs[2]), 3)
    else:
        x = F.silu(norm(x, 0))
        x = F.interpolate(x, scale_factor=2, mode="nearest") if up else x
        x = F.conv2d(x, convs[0], biases[0] if len(biases) == 2 else None, stride, 1)
        y = F.conv2d(F.silu(norm(x, 1)), convs[1], biases[-1], padding=1)
    if gate:
        hidden = F.relu(F.linear(y.mean((2, 3)), gate[0], gate[1]))
        y = y * torch.sigmoid(F.linear(hidden, gate[2], gate[3]))[:, :, None, None]
    return skip + 0.1 * y


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "out": 8}, {"up": True, "out": 3}, {"squeeze_excite": False}]
)
@pytest.mark.parametrize("batch_stats", [False, True])
@pytest.mark.parametrize("branch", ["mconv", "bnswish"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_layer_by_layer(backend, branch, batch_stats, options):
    args = call("layers", branch=branch, batch_stats=batch_stats, **options)
    double = pytree.tree_map_only(torch.Tensor, torch.Tensor.double, args)
    torch.testing.assert_close(
        ops.nvae_cell(*args, backend=backend).double(), layers(*double), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("batch_stats", [False, True])
@pytest.mark.parametrize("pays", [False, True])
def test_a_convolution_behind_up_either_way(monkeypatch, pays, batch_stats):
    monkeypatch.setattr(composed, "pays", lambda x, weight: pays)
    args = call("either way", branch="bnswish", up=True, out=3, batch_stats=batch_stats)
    double = pytree.tree_map_only(torch.Tensor, torch.Tensor.double, args)
    got = ops.nvae_cell(*args, backend="cpu").double()
    torch.testing.assert_close(got, layers(*double), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [3, 5])
def test_phase_kernels(size):
    """A convolution behind nearest x2 is four smaller ones of what was enlarged."""
    draw = Draw("cpu", 0, "phases")
    x, weight = (
        draw.normal(2, 3, 4, 5, dtype=torch.float64),
        draw.normal(6, 3, size, size, dtype=torch.float64),
    )
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=size // 2)
    kernels = up_conv2d.phase_kernels(weight)
    assert kernels.shape == (2, 2, 6, 3, size // 2 + 1, size // 2 + 1)
    for p in range(2):
        for q in range(2):
            got = F.conv2d(x, kernels[p, q], padding=1)
            if size == 3:
                got = got[:, :, p : p + 4, q : q + 5]
            torch.testing.assert_close(got, expected[:, :, p::2, q::2])


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("samples_per_slice", [0, 17, 40])
def test_slices_of_the_expanded_tensor(monkeypatch, up, samples_per_slice):
    """However the 42 channels are cut (16, 16, 10 or 32, 10 or at once), the result is the same."""
    args = call("slices", (2, 7, 5, 6), up=up, out=5)
    expected = ops.nvae_cell(*args, backend="reference")
    monkeypatch.setattr(composed, "_SLICE_BYTES", samples_per_slice * 4 * 2 * 5 * 6)
    shapes, conv = [], composed._conv

    def watched(x, weight, *rest, **more):
        shapes.append(weight.shape)
        return conv(x, weight, *rest, **more)

    monkeypatch.setattr(composed, "_conv", watched)
    torch.testing.assert_close(ops.nvae_cell(*args, backend="cpu"), expected, rtol=1e-5, atol=1e-5)
    expansions = [shape[0] for shape in shapes if shape[1:] == (7, 1, 1)]
    assert expansions == {0: [16, 16, 10], 17: [16, 16, 10], 40: [32, 10]}[samples_per_slice]


def trained(cell):
    """Statistics and scales as training leaves them: not those of a new module."""
    generator = torch.Generator().manual_seed(0)
    for module in cell.modules():
        if isinstance(module, BatchNormSwish):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                module.weight.normal_(1.0, 0.3, generator=generator)
                module.bias.normal_(generator=generator)
    return cell


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_in_eval_mode_is_its_layers(kind, resample):
    torch.manual_seed(0)
    channels = 8 if resample is None else 12
    cell = trained(Cell(kind, 8, channels, resample)).eval()
    x = Draw("cpu", 0, kind).normal(2, 8, 6, 6)
    with torch.no_grad(), use_backend(f"auto,{NAME}=cpu"), record() as log:
        got = cell(x)
    assert log.backends()[NAME] == "cpu"
    cell, x = cell.double(), x.double()
    y = cell.branch(x)  # the layers one by one, with running statistics in eval mode
    assert cell.se is not None
    torch.testing.assert_close(got.double(), cell.se(cell.skip(x), y, 0.1), rtol=1e-5, atol=1e-5)


def test_where_a_gradient_is_wanted_the_layers_run():
    cell = trained(Cell("mconv_e3", 6, 6)).eval()
    x = Draw("cpu", 0, "gradient").normal(2, 6, 5, 5).requires_grad_()
    with record() as log:
        cell(x).square().sum().backward()
    assert log.backends()[NAME] == "reference" and x.grad is not None
    assert all(p.grad is not None for p in cell.parameters())
    twin = x.detach().double().requires_grad_()
    cell.zero_grad()
    cell = cell.double()
    (cell.se(twin, cell.branch(twin), 0.1)).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-4, atol=1e-4)


def test_refusals_say_why():
    args = call("refusals")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendUnsupported, match="autocast"):
        ops.nvae_cell(*args, backend="cpu")
    args[0].requires_grad_()
    with pytest.raises(BackendUnsupported, match="no backward pass"):
        ops.nvae_cell(*args, backend="cpu")


@pytest.mark.parametrize("branch", ["mconv", "bnswish"])
def test_compiled_without_graph_breaks(branch):
    torch._dynamo.reset()
    args = call("compiled", branch=branch, up=True)

    def step(x, skip):
        return 2 * ops.nvae_cell(x + 1, skip, *args[2:])

    with torch.no_grad(), use_backend("cpu"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args[:2]), step(*args[:2]))
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("branch", ["mconv", "bnswish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_a_gpu(dtype, branch):
    torch._dynamo.reset()
    args = build(
        Draw("cuda", 0, "gpu"), (2, 32, 8, 8), dtype, dtype, "channels_last", branch=branch, up=True
    )[0]

    def step(x, skip):
        return 2 * ops.nvae_cell(x + 1, skip, *args[2:], backend="triton")

    with torch.no_grad():
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        got = torch.compile(step, fullgraph=True)(*args[:2])
        torch.testing.assert_close(got, step(*args[:2]), rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: (*a[:2], a[2][:1], *a[3:]), "2 or 3 convolutions, got 1"),
        (lambda a: (*a[:4], a[4][:7], *a[5:]), "4 normalisations, got 7"),
        (lambda a: (*a[:3], a[4][:1], *a[4:]), "got 1 biases"),
        (lambda a: (*a[:5], a[5][:3], *a[6:]), "4 tensors or none, got 3"),
        (lambda a: (*a[:6], 2, True, False), "1 with up, got 2"),
        (lambda a: (*a[:6], 3, False, False), "1 or 2, and 1 with up, got 3"),
        (lambda a: (a[0][:, :4], *a[1:]), "first convolution"),
        (lambda a: (a[0], a[1][:, :, :4], *a[2:]), r"skip has shape \(2, 6, 4, 7\), expected \(2, 6, 5, 7\)"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        ops.nvae_cell(*wrong(call("wrong")))


@pytest.mark.parametrize("batch_stats", [False, True])
@pytest.mark.parametrize("preset", ["tiny-binary", "tiny-rgb", "tiny-digits14"])
def test_decoding_and_encoding(preset, batch_stats):
    """A whole VAE, encoder and decoder, against its layers in float64."""
    vae = trained(lsgm_fast.build(preset).vae).eval()
    draw = Draw("cpu", 0, preset)
    noise = [draw.normal(2, *shape) for shape in vae.group_shapes]
    x = draw.uniform(
        2, vae.config.image_channels, vae.config.image_size, vae.config.image_size, low=-1.0, high=1.0
    )
    with torch.no_grad(), use_backend(f"auto,{NAME}=cpu"), record() as log:
        logits, groups = vae(x, noise, batch_stats=batch_stats)
    assert (
        log.counts[NAME, "cpu"] == sum(isinstance(m, Cell) for m in vae.modules())
        and log.counts[NAME, "reference"] == 0
    )
    vae = vae.double()
    with torch.no_grad(), use_backend("reference"):
        expected, true = vae(x.double(), [n.double() for n in noise], batch_stats=batch_stats)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-5 * scale)
    for a, b in zip(groups, true, strict=True):
        torch.testing.assert_close(a.eps.double(), b.eps, rtol=0, atol=1e-4 * float(b.eps.abs().max()))


def test_normalised_weights_are_used_as_they_are():
    """Inside ``normalized_weights`` nothing is normalised a second time."""
    cell = trained(Cell("res_bnswish", 6, 6)).eval()
    x = Draw("cpu", 0, "weights").normal(1, 6, 4, 4)
    convs = [op.conv for op in cell.branch]
    with torch.no_grad(), normalized_weights(convs), record() as log:
        inside = cell(x)
    assert ("weight_norm", "reference") not in log.counts
    with torch.no_grad():
        torch.testing.assert_close(cell(x), inside)


@pytest.mark.parametrize("branch", ["mconv", "bnswish"])
def test_where_the_tensors_lie_in_memory_changes_no_bit(branch):
    """Two copies of a model draw the same images."""
    args = call("memory", (2, 12, 8, 8), branch=branch)
    shifted = pytree.tree_map_only(torch.Tensor, lambda t: testing.lay_out(t, "offset"), args)
    assert torch.equal(ops.nvae_cell(*args, backend="cpu"), ops.nvae_cell(*shifted, backend="cpu"))


@pytest.mark.parametrize(
    ("branch", "shape", "chosen"),
    [
        ("mconv", (1, 6, 15, 16), "reference"),
        ("mconv", (1, 6, 16, 16), "cpu"),
        ("bnswish", (3, 6, 16, 16), "reference"),
        ("bnswish", (4, 6, 16, 16), "cpu"),
    ],
)
def test_auto_takes_it_where_it_pays(branch, shape, chosen):
    args = call("pays", shape, branch=branch)
    with torch.no_grad():
        assert lsgm_fast.explain(NAME, *args).chosen == chosen
