"""``depthwise_bn_swish`` on every backend that runs here, through what PyTorch does with an operation."""

from __future__ import annotations

import functools

import kernel_targets
import pytest
import torch

from lsgm_fast import ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.reference.depthwise_bn_swish import depthwise_bn_swish as reference
from lsgm_fast.testing import Draw, Sample, check_backward, check_forward

NAME = "depthwise_bn_swish"
TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]
LAYOUTS = ("contiguous", "channels_last")
WEIGHTED = (0, 1)  # the training path: gradients of x and weight


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device, shape=(3, 5, 6, 7), dtype=torch.float32, layout="contiguous"):
    return testing.describe_samples(NAME).at(shape, dtype, layout=layout, device=device).args


def leaves(args):
    return [a.detach().requires_grad_() for a in args[:2]]


@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target):
    backend, device = target
    ran = 0
    with testing.poison_uninitialized():
        for sample in samples_on(device):
            if sample.elements > kernel_targets.limit(target):
                continue
            why = testing.unsupported(NAME, backend, sample)
            if why:
                with pytest.raises(BackendUnsupported, match=NAME):
                    ops.depthwise_bn_swish(*sample.args, **sample.kwargs, backend=backend)
                continue
            check_forward(NAME, backend, sample)
            check_backward(NAME, backend, sample)
            ran += 1
    assert ran > 25


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", FUSED)
def test_shapes_of_planes(target, layout, stride):
    """Widths and heights around the kernel's vectors and blocks, bands of large planes, runs of many samples."""
    backend, device = target
    shapes = [(2, 18, size, 17 - size) for size in (1, 2, 3, 4, 7, 8, 9, 12)]
    shapes += [(1, 3, 70, 100), (1, 1, 3, 300), (1, 2, 300, 5), (70, 3, 16, 16), (0, 3, 4, 4)]
    for shape in shapes:
        draw = Draw(device, 1, str(shape))
        args = (draw.normal(*shape, layout=layout), draw.normal(shape[1], 1, 5, 5, std=0.2), stride)
        sample = Sample(f"{shape} {layout} stride {stride}", args, {}, WEIGHTED)
        if sample.elements > kernel_targets.limit(target):
            continue
        with testing.poison_uninitialized():
            check_forward(NAME, backend, sample)
            check_backward(NAME, backend, sample)


@pytest.mark.parametrize("target", FUSED)
def test_gradients_that_arrive_in_any_layout(target):
    backend, device = target
    for layout in LAYOUTS:
        sample = Sample(layout, inputs(device, layout=layout)[:3], {}, WEIGHTED)
        for grad_layout in testing.LAYOUTS:
            check_backward(NAME, backend, sample, grad_layout=grad_layout)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("target", FUSED)
def test_the_result_has_the_dtype_and_the_format_of_x(target, stride):
    backend, device = target
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in LAYOUTS:
            x, weight, _, *affines = inputs(device, dtype=dtype, layout=layout)
            out = ops.depthwise_bn_swish(x, weight, stride, *affines, backend=backend)
            like = reference(x.float(), weight.float(), stride)
            wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            assert out.dtype == dtype and out.shape == like.shape
            assert out.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("target", FUSED)
def test_opcheck(target, stride, layout):
    backend, device = target
    x, weight, _, *affines = inputs(device, (2, 5, 6, 5), layout=layout)
    forward = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}").default
    backward = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}_backward").default
    x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(forward, (x, weight, stride, None, None, None, None))
    x, weight = x.detach(), weight.detach()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (x, weight, stride, *affines), test_utils=checks)
    grad = torch.randn_like(forward(x, weight, stride, *affines))
    torch.library.opcheck(backward, (grad, x, weight, stride), test_utils=checks)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("target", FUSED)
def test_compiled_without_graph_breaks(target):
    backend, device = target
    args = inputs(device)

    def step(x, weight):
        return 2 * ops.depthwise_bn_swish(x + 1, weight, 2)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        theirs, ours = leaves(args), leaves(args)
        expected, got = step(*theirs), compiled(*ours)
        torch.testing.assert_close(got, expected)
        expected.sum().backward()
        got.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("target", FUSED)
def test_autocast_converts_as_a_convolution_does(target):
    backend, device = target
    x, weight, stride, *affines = inputs(device)
    with torch.autocast(device, torch.bfloat16):
        for given in (x, x.bfloat16(), x.half()):
            expected = reference(given, weight, stride)
            a, b = leaves((given, weight))
            got = ops.depthwise_bn_swish(a, b, stride, backend=backend)
            assert got.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
            got.sum().backward()
            assert (a.grad.dtype, b.grad.dtype) == (given.dtype, torch.float32)
        with pytest.raises(BackendUnsupported, match="autocast"):
            ops.depthwise_bn_swish(x, weight, stride, *affines, backend=backend)


@pytest.mark.parametrize("target", FUSED)
def test_double_backward_is_a_clear_error(target):
    backend, device = target
    x, weight = leaves(inputs(device))
    out = ops.depthwise_bn_swish(x, weight, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), weight)


@pytest.mark.parametrize("target", [t for t in FUSED if t.id == "cpu-cpu"])
def test_the_number_of_threads_does_not_matter(target):
    backend, device = target
    before = torch.get_num_threads()
    for layout in LAYOUTS:
        args = inputs(device, (9, 40, 33, 31), layout=layout)
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                out = ops.depthwise_bn_swish(*args, backend=backend)
                grad = [torch.ones_like(out)]
                grads = testing.gradients(
                    ops.depthwise_bn_swish, args[:3], {"backend": backend}, WEIGHTED, grad
                )
                results.append((out, *grads))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("target", FUSED)
def test_what_ran_is_recorded(target):
    backend, device = target
    with record() as log, use_backend(backend):
        ops.depthwise_bn_swish(*inputs(device))
    assert log.counts == {(NAME, backend): 1}


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    x, weight, stride, *affines = inputs(device)
    for args, message in (
        ((x.double(), weight.double(), stride), "float64"),
        ((x.bfloat16(), weight, stride), "bfloat16, weight torch.float32"),
        ((x, weight, stride, *(t.double() for t in affines)), "pre_scale torch.float64"),
        ((x, weight[..., 1:4, 1:4], stride), "3x3"),
        ((x, weight, stride, affines[0][:1], affines[1][:1]), r"pre_scale has shape \(1,\)"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.depthwise_bn_swish(*args, backend=backend)


@pytest.mark.parametrize("target", [t for t in FUSED if t.id == "cpu-cpu"])
def test_what_runs_on_its_own(target):
    """The kernel where it is the faster one: in training the convolution alone, else with the affines."""
    x, weight, stride, *affines = inputs("cpu", (4, 32, 32, 32))
    for given, gradient, chosen in (
        ((), True, "cpu"),
        ((), False, "reference"),
        (affines, True, "reference"),
        (affines, False, "cpu"),
    ):
        leaf = x.detach().requires_grad_(gradient)
        with record() as log:
            out = ops.depthwise_bn_swish(leaf, weight, stride, *given)
        assert log.counts == {(NAME, chosen): 1}
        if gradient:
            out.sum().backward()
            assert leaf.grad.isfinite().all()
