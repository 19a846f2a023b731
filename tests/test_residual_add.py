"""``residual_add`` on every backend that runs here, through everything that PyTorch does with an operation."""

from __future__ import annotations

import functools
import math
import os
import threading

import hypothesis.strategies as st
import kernel_targets
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import lsgm_fast
from lsgm_fast import fused, ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.models.ncsnpp import Attention
from lsgm_fast.testing import LAYOUTS, Draw, Sample, check_backward, check_forward

NAME = "residual_add"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCALE = 1.0 / math.sqrt(2.0)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device, dtype=torch.float32, shape=(3, 5, 6, 7), layout="contiguous"):
    return testing.describe_samples(NAME).at(shape, dtype, layout=layout, device=device).args[:2]


def leaves(args):
    return [a.detach().requires_grad_() for a in args]


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
                with pytest.raises(BackendUnsupported, match="one dtype is supported"):
                    ops.residual_add(*sample.args, backend=backend)
                continue
            check_forward(NAME, backend, sample)
            check_backward(NAME, backend, sample)
            ran += 1
    assert ran > 30


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_that_arrive_in_any_layout(target, layout):
    backend, device = target
    for sample in samples_on(device):
        if sample.id in ("3x5x6x7 float32 contiguous", "3x5x6x7 float32 channels_last", "5-D"):
            check_backward(NAME, backend, sample, grad_layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("target", FUSED)
def test_published_sizes(target):
    backend, device = target
    if target == ("triton", "cpu"):
        pytest.skip("minutes in Triton's interpreter")
    known = {s.id for s in samples_on(device)}
    for sample in testing.describe_samples(NAME).all(device=device, seed=0, large=True):
        if sample.id not in known:
            check_forward(NAME, backend, sample)
            check_backward(NAME, backend, sample)


@st.composite
def calls(draw):
    """A call of residual_add in any shape, dtype and layouts."""
    shape = tuple(
        draw(
            st.one_of(
                st.lists(st.integers(1, 7), min_size=0, max_size=5),
                st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9), st.integers(1, 9)),
            )
        )
    )
    source = Draw("cpu", draw(st.integers(0, 2**16)), "property")
    dtype, layout = draw(st.sampled_from(DTYPES)), st.sampled_from(LAYOUTS)
    x, h = (source.normal(*shape, dtype=dtype, layout=draw(layout)) for _ in range(2))
    return Sample(
        f"{shape} {dtype} {x.stride()} {h.stride()}", (x, h, draw(st.floats(-3.0, 3.0))), {}, (0, 1)
    )


@pytest.mark.parametrize("target", TARGETS)
@settings(
    max_examples=15 if INTERPRETED else 60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
@given(sample=calls(), grad_layout=st.sampled_from(LAYOUTS))
def test_no_reasons_means_right(target, sample, grad_layout):
    backend, device = target
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in sample.args)
    sample = Sample(sample.id, args, {}, sample.differentiable)
    assert testing.unsupported(NAME, backend, sample) == []
    if target == ("triton", "cpu"):
        # Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: an error of its own, of up to one ulp.
        assume(args[0].dtype != torch.bfloat16)
    check_forward(NAME, backend, sample)
    check_backward(NAME, backend, sample, grad_layout=grad_layout)


@pytest.mark.parametrize("target", FUSED)
def test_one_rounding(target):
    """The sum is not rounded to half precision before it is scaled."""
    backend, device = target
    for dtype in (torch.float16, torch.bfloat16):
        if INTERPRETED and dtype == torch.bfloat16:
            continue
        x, h = inputs(device, dtype, (4, 64, 8, 8))
        expected = ((x.float() + h.float()) * SCALE).to(dtype)
        assert torch.equal(ops.residual_add(x, h, SCALE, backend=backend), expected)
    x = torch.full((9,), 60000.0, dtype=torch.float16, device=device)  # their sum is infinite in float16
    assert torch.equal(ops.residual_add(x, x, 0.25, backend=backend), x / 2)


@pytest.mark.parametrize("target", FUSED)
def test_the_result_has_the_dtype_and_the_dense_strides_of_x(target):
    backend, device = target
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            x, h = inputs(device, dtype, layout=layout)
            for other in (h, h.contiguous(), h.contiguous(memory_format=torch.channels_last)):
                out = ops.residual_add(x, other, SCALE, backend=backend)
                assert (out.dtype, out.stride()) == (x.dtype, x.stride())
                assert out.data_ptr() not in (x.data_ptr(), other.data_ptr())


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_gradients_that_are_asked_for(target):
    backend, device = target
    for wanted in ((0,), (1,), (0, 1)):
        check_backward(NAME, backend, Sample("part", (*inputs(device), SCALE), {}, wanted))


@pytest.mark.parametrize("target", TARGETS)
def test_both_gradients_may_be_added_to(target):
    """They come out of one tensor; each parameter must keep a sum of its own."""
    backend, device = target
    x, h = leaves(inputs(device))
    for _ in range(2):
        ops.residual_add(x, h, 0.5, backend=backend).sum().backward()
    ops.residual_add(x, h.detach(), 0.5, backend=backend).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1.5))
    assert torch.equal(h.grad, torch.full_like(h, 1.0))


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout):
    backend, device = target
    x, h = leaves(inputs(device, layout=layout))
    forward = getattr(torch.ops.lsgm_fast, f"residual_add_{backend}").default
    backward = getattr(torch.ops.lsgm_fast, f"residual_add_{backend}_backward").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, (x, h, 0.5), test_utils=(*checks, "test_aot_dispatch_dynamic"))
    torch.library.opcheck(backward, (x.detach(), 0.5), test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_without_graph_breaks(target, compiler):
    backend, device = target

    def step(x, h):
        return ops.residual_add(x * 2, ops.residual_add(x, h, SCALE), 0.5).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with use_backend(backend):
        for layout in ("contiguous", "channels_last"):
            args = inputs(device, layout=layout)
            mine, theirs = leaves(args), leaves(args)
            got, expected = compiled(*mine), step(*theirs)
            torch.testing.assert_close(got, expected)
            got.backward()
            expected.backward()
            for ours, plain in zip(mine, theirs, strict=True):
                torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("target", FUSED)
def test_autocast_changes_nothing(target):
    backend, device = target
    for dtype in (torch.float32, torch.bfloat16):
        x, h = leaves(inputs(device, dtype))
        expected = ops.residual_add(x, h, SCALE, backend=backend)
        with torch.autocast(device, torch.bfloat16):
            got = ops.residual_add(x, h, SCALE, backend=backend)
        assert got.dtype == dtype and torch.equal(got, expected)
        got.sum().backward()
        assert x.grad.dtype == h.grad.dtype == dtype


@pytest.mark.parametrize("device", kernel_targets.DEVICES)
def test_two_dtypes_follow_pytorch(device):
    """As under autocast, where a float32 state meets a half-precision path."""
    x, h = inputs(device)
    with record() as log:
        got = ops.residual_add(x, h.bfloat16(), SCALE)
    assert got.dtype == torch.float32 and log.counts == {(NAME, "reference"): 1}
    assert torch.equal(got, (x + h.bfloat16()) * SCALE)
    assert ops.residual_add(x.half(), h, SCALE).dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", TARGETS)
def test_without_gradients(target, mode):
    backend, device = target
    args = inputs(device)
    expected = ops.residual_add(*args, SCALE, backend=backend)
    with mode():
        got = ops.residual_add(*leaves(args), SCALE, backend=backend)
    assert not got.requires_grad and torch.equal(got, expected)


@pytest.mark.parametrize("target", FUSED)
def test_double_backward_is_a_clear_error(target):
    backend, device = target
    x, h = leaves(inputs(device))
    out = ops.residual_add(x.square(), h, SCALE, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), x)


# -- threads and repeats --------------------------------------------------------------------------------------------


def results(args, backend):
    out = ops.residual_add(*args, SCALE, backend=backend)
    return (
        out,
        *testing.gradients(ops.residual_add, (*args, SCALE), {"backend": backend}, (0, 1), [out.sin()]),
    )


@pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.id != "triton-cpu"]
)  # its interpreter has global state
def test_several_threads(target):
    backend, device = target
    args = inputs(device, shape=(2, 64, 33, 32))
    expected = results(args, backend)
    failures = []

    def work():
        try:
            for _ in range(20):
                assert all(torch.equal(a, b) for a, b in zip(results(args, backend), expected, strict=True))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("target", [t for t in FUSED if t.id == "cpu-cpu"])
def test_the_number_of_threads_does_not_matter(target):
    backend, device = target
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            args = inputs(device, dtype, (4, 181, 16, 17))
            runs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                runs.append(results(args, backend))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    finally:
        torch.set_num_threads(before)


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_ran_is_recorded(target):
    backend, device = target
    args = inputs(device)
    with record() as log, use_backend(backend):
        ops.residual_add(*args, SCALE)
    assert log.counts == {(NAME, backend): 1}
    assert lsgm_fast.explain(NAME, *args, SCALE, backend=backend).chosen == backend


def test_shapes_must_match():
    x, h = inputs("cpu")
    with pytest.raises(ValueError, match="residual_add expects tensors of one shape"):
        ops.residual_add(x, h[:1], SCALE)


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    x, h = inputs(device)
    other = h.to("meta") if device == "cpu" else h.cpu()
    for args, message in (
        ((x.to(torch.complex64), h, SCALE), "complex64"),
        ((x, h.int(), SCALE), "int32"),
        ((x, h.bfloat16(), SCALE), "one dtype is supported"),
        ((x, other, SCALE), "h is on"),
        ((x, h, torch.tensor(SCALE)), "scale is a tensor"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.residual_add(*args, backend=backend)


@pytest.mark.parametrize("target", FUSED)
def test_operators_refuse_what_they_would_misread(target):
    backend, device = target
    forward = getattr(torch.ops.lsgm_fast, f"residual_add_{backend}")
    backward = getattr(torch.ops.lsgm_fast, f"residual_add_{backend}_backward")
    x, h = inputs(device)
    for args, message in (
        ((x, h.contiguous(memory_format=torch.channels_last)), "strides|format"),
        ((x[..., ::2], h[..., ::2]), "strides|format"),
        ((x, h[:, :4].contiguous()), "shape"),
        ((x, h.double()), "dtype"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            forward(*args, SCALE)
    with pytest.raises((RuntimeError, ValueError), match="strides|format"):
        backward(x[..., ::2], SCALE)


@pytest.mark.skipif(fused.unavailable("cpu", "cpu", NAME) is not None, reason="no CPU library")
def test_auto_leaves_what_does_not_pay_to_the_reference():
    small, large = inputs("cpu"), inputs("cpu", shape=(1, 128, 32, 32))
    last = large[1].contiguous(memory_format=torch.channels_last)
    for x, h, chosen in (
        (*small, "reference"),
        (*large, "cpu"),
        (large[0], last, "reference"),
        (*leaves(large), "reference"),
        (*leaves(t.expand(16, -1, -1, -1).contiguous() for t in large), "cpu"),
    ):
        with record() as log:
            ops.residual_add(x, h, SCALE)
        assert log.counts == {(NAME, chosen): 1}


def test_residual_blocks_end_with_it():
    attention = Attention(32)  # its last layer begins close to 0
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), record() as log:
        got, _ = attention(x)
    assert sum(calls for (op, _), calls in log.counts.items() if op == NAME) == 1
    torch.testing.assert_close(got, x * SCALE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert attention(x)[0].dtype == torch.float32
