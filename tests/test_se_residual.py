"""``se_residual`` on every backend that runs here: numbers, modes of PyTorch, threads, and what it refuses."""

from __future__ import annotations

import functools
import importlib

import kernel_targets
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.nn.layers import SqueezeExcite
from lsgm_fast.testing import LAYOUTS, Draw, Sample, check_backward, check_forward
from lsgm_fast.testing.se_residual import build

NAME = "se_residual"
se_residual = importlib.import_module("lsgm_fast.ops.se_residual")  # the function hides the module
TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]
ALL = (0, 1, 2, 3, 4, 5)


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device="cpu", shape=(3, 5, 6, 7), dtype=torch.float32, layout="contiguous"):
    return build(Draw(device, 3, f"{shape}"), shape, dtype, dtype, layout)[0]


def gradients(args, backend, grad=None):
    grad = torch.ones_like(args[0]) if grad is None else grad
    return testing.gradients(lambda *a: ops.se_residual(*a, backend=backend), args, {}, ALL, [grad])


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
    assert ran > 15


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", FUSED)
def test_gradients_that_arrive_in_any_layout(target, layout):
    backend, device = target
    for of_x in ("contiguous", "channels_last"):
        sample = Sample(of_x, inputs(device, layout=of_x), {}, ALL)
        check_backward(NAME, backend, sample, grad_layout=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", FUSED)
def test_half_precision_with_parameters_in_float32(target, dtype):
    backend, device = target
    args = inputs(device, dtype=dtype)
    args = (*args[:2], *(a.float() for a in args[2:]))
    sample = Sample("mixed", args, {}, ALL)
    check_forward(NAME, backend, sample)
    check_backward(NAME, backend, sample)


@pytest.mark.parametrize("target", FUSED)
def test_gradients_agree_with_differences_of_the_float64_reference(target):
    backend, device = target
    args = inputs(device, shape=(2, 3, 4, 5))
    g = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).to(device)
    found = gradients(args, backend, g)
    wide = [a.double() for a in args]
    for position, gradient in enumerate(found):
        direction = torch.randn(wide[position].shape, generator=torch.Generator().manual_seed(1)).double()
        direction = direction.to(device)
        ends = []
        for step in (1e-4, -1e-4):
            moved = list(wide)
            moved[position] = moved[position] + step * direction
            ends.append((ops.se_residual(*moved, backend="reference") * g).sum())
        expected = (ends[0] - ends[1]) / 2e-4
        assert abs((gradient * direction).sum() - expected) < 1e-4 * (1 + abs(expected))


@pytest.mark.parametrize("target", FUSED)
def test_not_a_number_and_infinity_stay_in_their_sample(target):
    backend, device = target
    for layout in ("contiguous", "channels_last"):
        args = inputs(device, layout=layout)
        for value in (float("nan"), float("inf"), -float("inf")):
            args[1][1, 2, 3, 4] = value
            got, want = (ops.se_residual(*args, backend=b) for b in (backend, "reference"))
            torch.testing.assert_close(got, want, equal_nan=True)
            assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("target", FUSED)
def test_gates_far_from_the_middle(target):
    backend, device = target
    args = list(inputs(device, shape=(2, 19, 2, 2)))
    args[5] = torch.linspace(-200, 200, 19, device=device)
    got, want = (ops.se_residual(*args, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


# -- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
def test_opcheck(target):
    backend, device = target
    call = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}").default
    for layout in ("contiguous", "channels_last"):
        args = [a.requires_grad_() for a in inputs(device, (2, 3, 4, 5), layout=layout)]
        torch.library.opcheck(call, (*args, 0.1))


@pytest.mark.parametrize("target", [t for t in FUSED if t.id != "triton-cpu"])
def test_compiles_without_a_graph_break(target):
    backend, device = target
    torch._dynamo.reset()
    args = inputs(device)

    def step(*a):
        return 2 * ops.se_residual(*a, backend=backend)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*args), step(*args))
    for got, want in zip(
        testing.gradients(compiled, args, {}, ALL, [torch.ones_like(args[0])]),
        gradients(args, backend, torch.full_like(args[0], 2)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes_dtypes_and_strides(target):
    backend, device = target
    args = inputs(device, dtype=torch.bfloat16, layout="channels_last")
    expected = ops.se_residual(*args, backend=backend)
    with FakeTensorMode() as mode:
        got = ops.se_residual(*(mode.from_tensor(a) for a in args), backend=backend)
    assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("target", FUSED)
def test_autocast_changes_nothing(target):
    """The gate leaves autocast, and the sum follows the types of its operands."""
    backend, device = target
    args = inputs(device, dtype=torch.bfloat16)
    args = (*args[:2], *(a.float() for a in args[2:]))
    plain = ops.se_residual(*args, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ops.se_residual(*args, backend=backend), plain)
        found = gradients(args, backend)
    for got, want in zip(found, gradients(args, backend), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("target", FUSED)
def test_a_second_derivative_is_refused(target):
    backend, device = target
    args = [a.requires_grad_() for a in inputs(device)]
    y = ops.se_residual(*args, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), args[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), args[1])


@pytest.mark.parametrize("target", FUSED)
def test_backward_keeps_x_and_little_else_and_copies_no_gradient_of_skip(target):
    backend, device = target
    args = [a.requires_grad_() for a in inputs(device, (2, 5, 9, 9))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.se_residual(*args, backend=backend)
    assert [t.data_ptr() for t in kept if t.numel() >= args[1].numel()] == [args[1].data_ptr()]
    assert sum(t.numel() for t in kept) - args[1].numel() < 100
    grad = torch.ones_like(y)
    (of_skip,) = torch.autograd.grad(y, args[:1], grad)
    assert of_skip.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("target", FUSED)
def test_an_empty_batch(target):
    backend, device = target
    args = inputs(device, (0, 5, 6, 7))
    assert ops.se_residual(*args, backend=backend).shape == (0, 5, 6, 7)
    of_skip, of_x, *of_parameters = gradients(args, backend)
    assert of_skip.shape == of_x.shape == (0, 5, 6, 7)
    for got, parameter in zip(of_parameters, args[2:], strict=True):
        assert torch.equal(got, torch.zeros_like(parameter))


# -- threads and repeats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
def test_the_number_of_threads_does_not_matter(target):
    backend, device = target
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter has one")
    before = torch.get_num_threads()
    try:
        for shape in ((6, 20, 31, 33), (1, 130, 24, 24), (9, 64, 16, 16)):
            for layout in ("contiguous", "channels_last"):
                args = inputs(device, shape, layout=layout)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(
                        (ops.se_residual(*args, backend=backend), *gradients(args, backend, args[0]))
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
        ops.se_residual(*inputs(device))
    assert log.counts == {(NAME, backend): 1}


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    skip, x, w1, b1, w2, b2 = inputs(device)
    for args, message in (
        ((skip.double(), x.double(), w1, b1, w2, b2), "x torch.float64: both float32, both bfloat16"),
        ((skip, x.bfloat16(), w1, b1, w2, b2), "skip torch.float32, x torch.bfloat16"),
        ((skip, x, w1.bfloat16(), b1, w2, b2), "reduce_weight is torch.bfloat16"),
        ((skip, x, w1, b1, w2, b2[:3]), r"expand_bias is torch.float32 of shape \(3,\).*\(5,\)"),
        ((skip[..., :0], x[..., :0], w1, b1, w2, b2), "channels, positions and hidden units are needed"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.se_residual(*args, backend=backend)


def test_auto_takes_the_kernel():
    if not any(t.id == "cpu-cpu" and not t.marks for t in FUSED):
        pytest.skip("no compiled library")
    args = inputs(shape=(2, 64, 8, 8))
    assert lsgm_fast.explain(NAME, *args).chosen == "cpu"
    assert lsgm_fast.explain(NAME, *(a.double() for a in args)).chosen == "reference"


def test_auto_leaves_large_half_precision_to_the_compiler(monkeypatch):
    if not any(t.id == "cpu-cpu" and not t.marks for t in FUSED):
        pytest.skip("no compiled library")
    args = inputs(shape=(2, 64, 32, 32), dtype=torch.bfloat16)
    assert lsgm_fast.explain(NAME, *args).chosen == "cpu"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert se_residual._slower(*inputs()) == []
    assert "in torch.bfloat16 and without gradients" in se_residual._slower(*args)[0]
    args[1].requires_grad_()
    assert se_residual._slower(*args) == []
    with torch.no_grad():
        assert se_residual._slower(*args) != []


@pytest.mark.parametrize("target", FUSED)
def test_the_layer_trains(target):
    backend, device = target
    torch.manual_seed(0)
    layer = SqueezeExcite(70).to(device)
    skip, x = (t.requires_grad_() for t in inputs(device, (3, 70, 3, 5), layout="channels_last")[:2])
    found = []
    for name in ("reference", backend):
        layer.zero_grad()
        with use_backend(name):
            y = layer(skip, x, 0.1)
            of_inputs = torch.autograd.grad(y.square().sum(), (skip, x, *layer.parameters()))
        found.append((y, *of_inputs))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
