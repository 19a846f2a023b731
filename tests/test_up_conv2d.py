"""``up_conv2d``: against upsampling and convolution in float64, forward and backward."""

from __future__ import annotations

import kernel_targets
import pytest
import torch
import torch.nn.functional as F

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.nn.cells import Cell
from lsgm_fast.testing import Draw, check_backward, check_forward
from lsgm_fast.testing.up_conv2d import build

NAME = "up_conv2d"
TARGETS = kernel_targets.targets(NAME)
FUSED = kernel_targets.targets(NAME, reference=False)


def call(shape=(2, 6, 5, 7), layout="contiguous", **options):
    return build(Draw("cpu", 0, "call"), shape, torch.float32, torch.float32, layout, **options)[0]


@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target):
    backend, device = target
    ran = 0
    with testing.poison_uninitialized():
        for sample in testing.samples(NAME, device):
            if sample.elements > 100_000:
                continue
            if why := testing.unsupported(NAME, backend, sample):
                with pytest.raises(BackendUnsupported, match=NAME):
                    ops.up_conv2d(*sample.args, backend=backend)
                assert why
                continue
            check_forward(NAME, backend, sample)
            check_backward(NAME, backend, sample)
            ran += 1
    assert ran > 15


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_against_the_convolution_of_what_was_enlarged(layout):
    x, weight, bias = call(layout=layout)
    expected = F.conv2d(
        x.double().repeat_interleave(2, 2).repeat_interleave(2, 3), weight.double(), bias.double(), 1, 1
    )
    for backend in ("reference", "cpu"):
        got = ops.up_conv2d(x, weight, bias, backend=backend)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        last = got.is_contiguous(memory_format=torch.channels_last)
        assert last if layout == "channels_last" else got.is_contiguous()


def test_gradients_agree_with_differences():
    args = tuple(t.double().requires_grad_() for t in call((2, 3, 2, 3)))
    # The formula of the fused path; float64 goes to the reference otherwise.
    assert torch.autograd.gradcheck(lsgm_fast.composed.up_conv2d.forward, args)
    assert torch.autograd.gradgradcheck(lsgm_fast.composed.up_conv2d.forward, args)


@pytest.mark.parametrize("target", FUSED)
def test_compiles_without_a_graph_break(target):
    backend, device = target
    torch._dynamo.reset()
    args = [t.to(device).requires_grad_() for t in call()]

    def step(*args):
        return 2 * ops.up_conv2d(*args)

    with use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got, want = compiled(*args), step(*args)
        torch.testing.assert_close(got, want)
        grad = torch.ones_like(want)
        for g, w in zip(
            torch.autograd.grad(got, args, grad), torch.autograd.grad(want, args, grad), strict=True
        ):
            torch.testing.assert_close(g, w)
    torch._dynamo.reset()


def test_what_the_fused_path_refuses():
    x, weight, bias = call()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendUnsupported, match="autocast"):
        ops.up_conv2d(x, weight, bias, backend="cpu")
    with pytest.raises(BackendUnsupported, match="dtype torch.float64"):
        ops.up_conv2d(x.double(), weight.double(), bias.double(), backend="cpu")
    with pytest.raises(BackendUnsupported, match="empty"):
        ops.up_conv2d(x[:0], weight, bias, backend="cpu")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda x, w, b: (x[0], w, b), r"x \(N, I, H, W\)"),
        (lambda x, w, b: (x, w[:, :4], b), r"weight \(O, I, 3, 3\)"),
        (lambda x, w, b: (x, w[..., :1], b), r"weight \(O, I, 3, 3\)"),
        (lambda x, w, b: (x, w, b[:1]), r"bias has shape \(1,\), expected \(3,\)"),
    ],
)
def test_bad_shapes(args, message):
    with pytest.raises(ValueError, match=message):
        ops.up_conv2d(*args(*call()))


@pytest.mark.parametrize("kind", ["res_bnswish", "res_bnswish2"])
def test_a_cell_trains_with_it(kind):
    torch.manual_seed(0)
    cell = Cell(kind, 16, 8, "up")
    x = Draw("cpu", 0, kind).normal(4, 16, 8, 8)
    found = []
    for backend in ("reference", "cpu"):
        cell.zero_grad()
        twin = x.clone().requires_grad_()
        with use_backend(f"reference,{NAME}={backend}"), record() as log:
            y = cell(twin)
            y.square().sum().backward()
        assert log.backends()[NAME] == backend
        found.append((y, twin.grad, *(p.grad for p in cell.parameters())))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_auto_takes_it_where_it_pays():
    x, weight, bias = call((16, 48, 8, 8), out=48)
    assert lsgm_fast.explain(NAME, x, weight, bias).chosen == "cpu"
    assert lsgm_fast.explain(NAME, x[:1], weight, bias).chosen == "reference"
    narrow = call((16, 4, 8, 8), out=4)
    assert lsgm_fast.explain(NAME, *narrow).chosen == "reference"
