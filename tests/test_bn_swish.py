"""``bn_swish`` on every backend that runs here: numbers, modes of PyTorch, threads, and what it refuses."""

from __future__ import annotations

import functools

import kernel_targets
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.nn.layers import BatchNormSwish
from lsgm_fast.testing import LAYOUTS, Draw, Sample, check_backward, check_forward
from lsgm_fast.testing.bn_swish import build

NAME = "bn_swish"
TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]
BOTH = pytest.mark.parametrize("batch_stats", [False, True])


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device="cpu", batch_stats=True, shape=(3, 5, 6, 7), dtype=torch.float32, layout="contiguous"):
    return build(Draw(device, 3, f"{shape}"), shape, dtype, dtype, layout, batch_stats)[0]


def gradients(args, backend, grad=None):
    grad = torch.ones_like(args[0]) if grad is None else grad
    return testing.gradients(lambda *a: ops.bn_swish(*a, backend=backend)[0], args, {}, (0, 1, 2), [grad])


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target):
    backend, device = target
    ran = 0
    with testing.poison_uninitialized():
        for sample in samples_on(device):
            if sample.elements > kernel_targets.limit(target):
                continue
            if testing.unsupported(NAME, backend, sample):
                assert sample.args[0].dtype == torch.float64
                continue
            check_forward(NAME, backend, sample)
            check_backward(NAME, backend, sample)
            ran += 1
    assert ran > 25


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", FUSED)
def test_gradients_that_arrive_in_any_layout(target, layout):
    backend, device = target
    for batch_stats in (False, True):
        for of_x in ("contiguous", "channels_last"):
            sample = Sample(of_x, inputs(device, batch_stats, layout=of_x), {}, (0, 1, 2))
            check_backward(NAME, backend, sample, grad_layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", FUSED)
def test_a_small_variance_far_from_zero(target, layout):
    """E[x^2] - E[x]^2 would have no digit left, and the first pixels are a bad guess of the mean."""
    backend, device = target
    args = list(inputs(device, shape=(2, 3, 40, 41), layout=layout))
    x = 1e4 + 0.02 * (args[0] - 0.3)  # keeps its format
    for border in (False, True):
        if border:
            x[:, :, :1] = 0
        _, mean, var = ops.bn_swish(x, *args[1:], backend=backend)
        exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
        assert ((mean - exact_mean).abs() / exact_mean).max() < 1e-6
        assert ((var - exact_var).abs() / exact_var).max() < 1e-5


@pytest.mark.parametrize("target", FUSED)
def test_gradients_agree_with_differences_of_the_float64_reference(target):
    backend, device = target
    args = inputs(device, shape=(2, 3, 4, 5))
    g = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).to(device)
    found = gradients(args, backend, g)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    for position, gradient in enumerate(found):
        direction = (
            torch.randn(wide[position].shape, generator=torch.Generator().manual_seed(1)).double().to(device)
        )
        ends = []
        for step in (1e-4, -1e-4):
            moved = list(wide)
            moved[position] = moved[position] + step * direction
            ends.append((ops.bn_swish(*moved, backend="reference")[0] * g).sum())
        expected = (ends[0] - ends[1]) / 2e-4
        assert abs((gradient * direction).sum() - expected) < 1e-4 * (1 + abs(expected))


@pytest.mark.parametrize("target", FUSED)
def test_not_a_number_and_infinity_stay_in_their_channel(target):
    backend, device = target
    for batch_stats in (False, True):
        args = inputs(device, batch_stats)
        args[0][0, 1, 2, 3], args[0][1, 3, 0, 0], args[0][2, 3, 1, 1] = (
            float("nan"),
            float("inf"),
            -float("inf"),
        )
        results = ops.bn_swish(*args, backend=backend)
        expected = ops.bn_swish(*args, backend="reference")
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


# -- modes ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("target", FUSED)
def test_opcheck(target, batch_stats):
    backend, device = target
    call = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}").default
    for layout in ("contiguous", "channels_last"):
        args = list(inputs(device, batch_stats, (2, 3, 4, 5), layout=layout))
        args[:3] = [a.requires_grad_() for a in args[:3]]
        torch.library.opcheck(call, (*args, 1e-5, True))


@BOTH
@pytest.mark.parametrize("target", [t for t in FUSED if t.id != "triton-cpu"])
def test_compiles_without_a_graph_break(target, batch_stats):
    backend, device = target
    torch._dynamo.reset()
    args = inputs(device, batch_stats)

    def step(*a):
        y, mean, var = ops.bn_swish(*a, backend=backend)
        return 2 * y, mean, var

    compiled = torch.compile(step, fullgraph=True)
    for got, want in zip(compiled(*args), step(*args), strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(
        testing.gradients(lambda *a: compiled(*a)[0], args, {}, (0, 1, 2), [torch.ones_like(args[0])]),
        gradients(args, backend, torch.full_like(args[0], 2)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@BOTH
@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes_dtypes_and_strides(target, batch_stats):
    backend, device = target
    args = inputs(device, batch_stats, dtype=torch.bfloat16, layout="channels_last")
    expected = ops.bn_swish(*args, backend=backend)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        got = ops.bn_swish(*fakes, backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("target", FUSED)
def test_statistics_have_no_gradient_and_a_second_derivative_is_refused(target):
    backend, device = target
    args = list(inputs(device))
    x = args[0].requires_grad_()
    y, mean, var = ops.bn_swish(*args, backend=backend)
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), x)


@BOTH
@pytest.mark.parametrize("target", FUSED)
def test_backward_keeps_no_second_tensor_of_the_size_of_x(target, batch_stats):
    backend, device = target
    args = [a.requires_grad_() if i < 3 else a for i, a in enumerate(inputs(device, batch_stats))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.bn_swish(*args, backend=backend)
    assert [t.data_ptr() for t in kept if t.numel() > 5] == [args[0].data_ptr()]
    assert len(kept) == 5


@pytest.mark.parametrize("target", FUSED)
def test_an_empty_batch(target):
    backend, device = target
    args = inputs(device, False, (0, 5, 6, 7))
    y, mean, var = ops.bn_swish(*args, backend=backend)
    assert y.shape == (0, 5, 6, 7)
    assert torch.equal(mean, args[3])
    assert torch.equal(var, args[4])
    grad_x, grad_weight, grad_bias = gradients(args, backend)
    assert grad_x.shape == (0, 5, 6, 7)
    assert torch.equal(grad_weight, torch.zeros(5, device=device))
    assert torch.equal(grad_bias, torch.zeros(5, device=device))


# -- threads and repeats --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("target", [t for t in FUSED if t.id != "triton-cpu"])
def test_the_number_of_threads_does_not_matter(target, batch_stats):
    backend, device = target
    before = torch.get_num_threads()
    try:
        for shape in ((6, 20, 31, 33), (40, 3, 33, 31)):
            for layout in ("contiguous", "channels_last"):
                args = inputs(device, batch_stats, shape, layout=layout)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(
                        (*ops.bn_swish(*args, backend=backend), *gradients(args, backend, args[0]))
                    )
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


# -- the dispatcher and the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
def test_what_ran_is_recorded(target):
    backend, device = target
    with record() as log, use_backend(backend):
        ops.bn_swish(*inputs(device))
    assert log.counts == {(NAME, backend): 1}


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    x, weight, bias, mean, var, _ = inputs(device)
    for args, message in (
        ((x.double(), weight, bias, mean, var, True), "x has dtype torch.float64"),
        ((x, weight.bfloat16(), bias, mean, var, True), "weight is torch.bfloat16"),
        ((x, weight, bias[:3], mean, var, False), r"bias is torch.float32 of shape \(3,\)"),
        ((x[:1, :, :1, :1], weight, bias, mean, var, True), "more than one element per channel"),
        (
            (x, weight, bias, mean.clone().requires_grad_(), var, False),
            "a running statistic requires a gradient",
        ),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.bn_swish(*args, backend=backend)


def test_auto_takes_the_kernel_where_it_pays():
    if not any(t.id == "cpu-cpu" and not t.marks for t in FUSED):
        pytest.skip("no compiled library")
    if any(t.id == "triton-cpu" for t in FUSED):
        pytest.skip("Triton's interpreter takes what the CPU kernel leaves")
    small, large = inputs(shape=(2, 8, 8, 8)), inputs(shape=(16, 128, 16, 16))
    assert lsgm_fast.explain(NAME, *small).chosen == "reference"
    assert lsgm_fast.explain(NAME, *large).chosen == "cpu"
    assert lsgm_fast.explain(NAME, large[0].bfloat16(), *large[1:]).chosen == "reference"


@pytest.mark.parametrize("target", FUSED)
def test_the_layer_trains_and_keeps_its_running_statistics(target):
    backend, device = target
    x = inputs(device, shape=(4, 6, 5, 7))[0]
    found = []
    for name in ("reference", backend):
        layer = BatchNormSwish(6).to(device)
        with use_backend(name):
            y = layer(x)
            y.square().sum().backward()
            layer.eval()
            found.append(
                (y, layer(x), layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
            )
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
