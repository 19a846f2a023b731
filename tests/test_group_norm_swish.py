"""``group_norm_swish`` and its family on every backend that runs here: numbers, modes of PyTorch, threads, refusals."""

from __future__ import annotations

import functools
import importlib

import kernel_targets
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.models.ncsnpp import GroupNormSwish
from lsgm_fast.testing import LAYOUTS, Draw, Sample, check_backward, check_forward
from lsgm_fast.testing.group_norm_swish import build, build_affine, build_residual

module = importlib.import_module("lsgm_fast.ops.group_norm_swish")  # the function hides the module
PLAIN, RESIDUAL, AFFINE = "group_norm_swish", "group_norm_swish_residual", "group_norm_swish_affine"
BUILD = {PLAIN: build, RESIDUAL: build_residual, AFFINE: build_affine}
DIFFERENTIABLE = {PLAIN: (0, 1, 2, 5), RESIDUAL: (0, 1, 2, 3)}


def targets(names, *, reference=False, interpreted=True):
    found = [
        pytest.param(name, *param.values[0], marks=param.marks, id=f"{name}-{param.id}")
        for name in names
        for param in kernel_targets.targets(name, reference=reference)
    ]
    return [p for p in found if interpreted or p.values[1:] != ("triton", "cpu")]


def on(names, **options):
    return pytest.mark.parametrize(("name", "backend", "device"), targets(names, **options))


EVERY = on(BUILD)
TRAINED = on(DIFFERENTIABLE)


@functools.cache
def samples_on(name, device):
    return testing.samples(name, device)


def inputs(name=PLAIN, device="cpu", shape=(3, 8, 6, 7), dtype=torch.float32, layout="contiguous"):
    return BUILD[name](Draw(device, 3, f"{shape}"), shape, dtype, dtype, layout)[0]


def call(name, args, backend):
    results = getattr(ops, name)(*args, backend=backend)
    return results if isinstance(results, tuple) else (results,)


def gradients(name, args, backend, grads=None):
    if grads is None:
        grads = [torch.ones_like(args[0])] * (2 if name == RESIDUAL else 1)
    return testing.gradients(lambda *a: call(name, a, backend), args, {}, DIFFERENTIABLE[name], grads)


# -- numbers --------------------------------------------------------------------------------------------------------


@on(BUILD, reference=True)
def test_every_sample(name, backend, device):
    ran = 0
    with testing.poison_uninitialized():
        for sample in samples_on(name, device):
            if sample.elements > kernel_targets.limit((backend, device)):
                continue
            if testing.unsupported(name, backend, sample):
                assert sample.args[0].dtype == torch.float64
                continue
            check_forward(name, backend, sample)
            if testing.has_gradients(name, backend, sample):
                check_backward(name, backend, sample)
            ran += 1
    assert ran > 15


@pytest.mark.parametrize("layout", LAYOUTS)
@TRAINED
def test_gradients_that_arrive_in_any_layout(name, backend, device, layout):
    for of_x in ("contiguous", "channels_last"):
        sample = Sample(of_x, inputs(name, device, layout=of_x), {}, DIFFERENTIABLE[name])
        check_backward(name, backend, sample, grad_layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@on([PLAIN, AFFINE])
def test_a_small_variance_far_from_zero(name, backend, device, layout):
    """E[x^2] - E[x]^2 would have no digit left, and the first pixels are a bad guess of the mean."""
    x = 1e4 + 0.02 * inputs(name, device, (2, 6, 40, 41), layout=layout)[0]  # keeps its format
    one, zero = torch.ones(6, device=device), torch.zeros(6, device=device)
    for border in (False, True):
        if border:
            x[:, :, 0, :20] = 0
        grouped = x.double().unflatten(1, (2, 3)).flatten(2)
        var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        exact = ((grouped - mean) / (var + 1e-6).sqrt()).view(x.shape)
        if name == AFFINE:
            factor, _ = call(name, (x, one, zero, 2), backend)
            expected = (var + 1e-6).rsqrt().flatten().repeat_interleave(3).view(2, 6)
            assert ((factor - expected).abs() / expected).max() < 1e-5
        else:
            (y,) = call(name, (x, one, zero, 2, 1e-6, None, False), backend)
            # Half a unit in the last place of the mean, which is handed to backward as a float32 number.
            allowed = 1e-4 + (5e-4 * (var + 1e-6).rsqrt()).max().item()
            assert (y - exact).abs().max() < allowed


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@on([PLAIN])
def test_against_pytorch_in_float64(name, backend, device, layout):
    """The formulas, of functions that the reference does not use for them."""
    x, weight, bias, groups, eps, channel_bias = inputs(name, device, (2, 12, 5, 6), layout=layout)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, channel_bias)]
    v = leaves[0] + leaves[3][:, :, None, None]
    norm = torch.nn.GroupNorm(groups, 12, eps, device=device, dtype=torch.float64)
    u = torch.func.functional_call(norm, {"weight": leaves[1], "bias": leaves[2]}, (v,))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    expected = torch.autograd.grad((u * u.sigmoid() * grad).sum(), leaves)
    torch.testing.assert_close(
        call(name, (x, weight, bias, groups, eps, channel_bias), backend)[0], F.silu(u).float()
    )
    for got, want in zip(
        gradients(name, (x, weight, bias, groups, eps, channel_bias), backend, [grad]), expected, strict=True
    ):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=2e-5)


@TRAINED
def test_not_a_number_and_infinity_stay_in_their_group(name, backend, device):
    args = list(inputs(name, device))
    args[0] = args[0].clone()
    args[0][0, 1, 2, 3], args[0][1, 5, 0, 0] = float("nan"), float("inf")
    for got, want in zip(call(name, args, backend), call(name, args, "reference"), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@on([RESIDUAL])
def test_statistics_are_those_of_the_stored_sum(name, backend, device):
    x, residual, weight, bias, groups, scale, eps = inputs(name, device, dtype=torch.bfloat16)
    v, y = call(name, (x, residual, weight, bias, groups, scale, eps), backend)
    (expected,) = call(PLAIN, (v, weight, bias, groups, eps), "reference")
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-6)


@on([RESIDUAL])
def test_either_gradient_of_the_sum_may_be_missing(name, backend, device):
    args = inputs(name, device)
    grad = torch.ones_like(args[0])
    for grads in ((grad, None), (None, grad)):
        got, want = (gradients(name, args, b, grads) for b in (backend, "reference"))
        for a, b in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(got[2:], want[2:], strict=True):
            assert (a is None) == (b is None)


# -- modes ----------------------------------------------------------------------------------------------------------


@EVERY
def test_opcheck(name, backend, device):
    operator = getattr(torch.ops.lsgm_fast, f"{name}_{backend}").default
    to_kernel = {
        PLAIN: module._to_kernel,
        RESIDUAL: module._residual_to_kernel,
        AFFINE: lambda *a: a,
    }[name]
    for layout in ("contiguous", "channels_last"):
        args = list(inputs(name, device, (2, 8, 4, 5), layout=layout))
        for i in DIFFERENTIABLE.get(name, ()):
            args[i] = args[i].requires_grad_()
        torch.library.opcheck(operator, to_kernel(*args))


@on(BUILD, interpreted=False)
def test_compiles_without_a_graph_break(name, backend, device):
    torch._dynamo.reset()
    args = inputs(name, device, layout="channels_last")

    def step(*a):
        return tuple(2 * r for r in call(name, a, backend))

    compiled = torch.compile(step, fullgraph=True)
    with torch.no_grad():
        for got, want in zip(compiled(*args), step(*args), strict=True):
            torch.testing.assert_close(got, want)
    if name not in DIFFERENTIABLE:
        return
    grads = [torch.ones_like(args[0])] * (2 if name == RESIDUAL else 1)
    got = testing.gradients(compiled, args, {}, DIFFERENTIABLE[name], grads)
    for a, b in zip(got, gradients(name, args, backend, [2 * g for g in grads]), strict=True):
        torch.testing.assert_close(a, b)


@EVERY
def test_fake_tensors_tell_shapes_dtypes_and_strides(name, backend, device):
    args = inputs(name, device, dtype=torch.bfloat16, layout="channels_last")
    expected = call(name, args, backend)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        got = call(name, fakes, backend)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@EVERY
def test_autocast_changes_nothing(name, backend, device):
    args = inputs(name, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = call(name, args, backend)
    for a, b in zip(inside, call(name, args, backend), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32


@TRAINED
def test_a_second_derivative_is_refused(name, backend, device):
    args = list(inputs(name, device))
    x = args[0].requires_grad_()
    y = call(name, args, backend)[-1]
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), x)


@TRAINED
def test_backward_keeps_one_tensor_of_the_size_of_x(name, backend, device):
    args = list(inputs(name, device))
    for i in DIFFERENTIABLE[name]:
        args[i] = args[i].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = call(name, args, backend)
    large = [t.data_ptr() for t in kept if t.dim() == 4]
    assert large == [(results if name == RESIDUAL else args)[0].data_ptr()]


@EVERY
def test_an_empty_batch(name, backend, device):
    args = inputs(name, device, (0, 8, 6, 7))
    for got, want in zip(call(name, args, backend), call(name, args, "reference"), strict=True):
        assert got.shape == want.shape
    if name in DIFFERENTIABLE:
        for position, gradient in zip(DIFFERENTIABLE[name], gradients(name, args, backend), strict=True):
            assert gradient.shape == args[position].shape
            assert torch.equal(gradient, torch.zeros_like(args[position]))


# -- threads and repeats --------------------------------------------------------------------------------------------


@on(BUILD, interpreted=False)
def test_the_number_of_threads_does_not_matter(name, backend, device):
    before = torch.get_num_threads()
    try:
        # Many units; few of them; and pieces of one.
        for shape in ((6, 24, 31, 33), (1, 64, 16, 16), (1, 4, 190, 191)):
            for layout in ("contiguous", "channels_last"):
                args = inputs(name, device, shape, layout=layout)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append([*call(name, args, backend)])
                    if name in DIFFERENTIABLE:
                        results[-1] += gradients(name, args, backend)
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


# -- the dispatcher and the layer -----------------------------------------------------------------------------------


@EVERY
def test_what_ran_is_recorded(name, backend, device):
    with record() as log, use_backend(backend):
        getattr(ops, name)(*inputs(name, device))
    assert log.counts == {(name, backend): 1}


@EVERY
def test_what_a_fused_kernel_refuses(name, backend, device):
    args = inputs(name, device)
    first = 2 if name == RESIDUAL else 1
    refused = [
        (0, args[0].double(), "x has dtype torch.float64"),
        (first, args[first].bfloat16(), "weight has dtype torch.bfloat16"),
        (first + 1, args[first + 1].double(), "bias has dtype torch.float64"),
    ]
    if name == PLAIN:
        refused.append((5, args[5].double(), "channel_bias has dtype torch.float64"))
    if name == RESIDUAL:
        refused.append((1, args[1].bfloat16(), "residual torch.bfloat16: one dtype is supported"))
    for position, value, message in refused:
        changed = [value if i == position else a for i, a in enumerate(args)]
        with pytest.raises(BackendUnsupported, match=message):
            call(name, changed, backend)
    empty = [a[..., :0, :0] if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args]
    with pytest.raises(BackendUnsupported, match="its samples are empty"):
        call(name, empty, backend)


def test_auto_takes_the_kernel_where_it_pays():
    found = [p.id for p in targets([PLAIN]) if not p.marks]
    if f"{PLAIN}-cpu-cpu" not in found:
        pytest.skip("no compiled library")
    if f"{PLAIN}-triton-cpu" in found:
        pytest.skip("Triton's interpreter takes what the CPU kernel leaves")
    for name in DIFFERENTIABLE:
        small, large = inputs(name, shape=(2, 8, 8, 8)), inputs(name, shape=(4, 128, 8, 8))
        assert lsgm_fast.explain(name, *small).chosen == "reference"
        assert lsgm_fast.explain(name, *large).chosen == "cpu"
        trained = [large[0].clone().requires_grad_(), *large[1:]]
        assert lsgm_fast.explain(name, *trained).chosen == "reference"
        with torch.no_grad():
            assert lsgm_fast.explain(name, *trained).chosen == "cpu"
    assert lsgm_fast.explain(AFFINE, *inputs(AFFINE)).chosen == "cpu"


@on([AFFINE])
def test_factor_and_shift_have_no_gradient(name, backend, device):
    args = list(inputs(name, device))
    args[0] = args[0].requires_grad_()
    with pytest.raises(BackendUnsupported, match="a gradient is wanted"):
        call(name, args, backend)
    assert call(name, args, None)[0].requires_grad


@on([PLAIN])
def test_the_layer_trains(name, backend, device):
    x = inputs(PLAIN, device, (4, 16, 5, 7))[0]
    found = []
    for chosen in ("reference", backend):
        layer = GroupNormSwish(16).to(device)
        with use_backend(chosen):
            y = layer(x, x[:, :, 0, 0].bfloat16())
            y.square().sum().backward()
        found.append((y, layer.weight.grad, layer.bias.grad))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
