"""``diffuse`` on every backend that runs here, through everything that PyTorch does with an operation."""

from __future__ import annotations

import functools
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
from lsgm_fast.testing import LAYOUTS, MIXED_DTYPES, Draw, Sample, check_backward, check_forward

NAME = "diffuse"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device, dtype=torch.float32, shape=(3, 5, 6, 7)):
    return testing.describe_samples(NAME).at(shape, dtype, device=device).args


def leaves(args):
    return [a.detach().requires_grad_() for a in args[:2]]


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target):
    backend, device = target
    ran = 0
    with testing.poison_uninitialized():
        for sample in samples_on(device):
            if sample.elements <= kernel_targets.limit(target):
                assert testing.unsupported(NAME, backend, sample) == []
                check_forward(NAME, backend, sample)
                check_backward(NAME, backend, sample)
                ran += 1
    assert ran > 50


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


SHAPES = st.one_of(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9), st.integers(1, 9)).map(list),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 300)).map(list),
)


@st.composite
def calls(draw):
    """A call of diffuse in any shape, dtypes, layouts and kinds of m and var."""
    shape = tuple(draw(SHAPES))
    dtype, noise_dtype = draw(st.sampled_from(MIXED_DTYPES))
    source = Draw("cpu", draw(st.integers(0, 2**16)), "property")
    layout = st.sampled_from(LAYOUTS)
    scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))
    z0 = source.normal(*shape, dtype=dtype, layout=draw(layout), std=scale)
    noise = source.normal(*shape, dtype=noise_dtype, layout=draw(layout))
    narrow = st.sampled_from([torch.float32, torch.float64])
    scalars = []
    for _ in range(2):
        kind = draw(st.sampled_from(["number", "0-d", "one", "per sample"]))
        if kind == "number":
            scalars.append(draw(st.floats(0.0, 1.0)))
        else:
            size = {"0-d": (), "one": (1,), "per sample": shape[:1]}[kind]
            scalars.append(source.uniform(*size, low=0.0, high=1.0, dtype=draw(narrow), layout=draw(layout)))
    described = f"{shape} {dtype} {noise_dtype} {z0.stride()} {noise.stride()}"
    return Sample(described, (z0, noise, *scalars), {}, (0, 1))


@pytest.mark.parametrize("target", TARGETS)
@settings(
    max_examples=15 if INTERPRETED else 100,
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
        assume(torch.bfloat16 not in (args[0].dtype, args[1].dtype))
    check_forward(NAME, backend, sample)
    check_backward(NAME, backend, sample, grad_layout=grad_layout)


@pytest.mark.parametrize("target", TARGETS)
def test_the_result_has_the_dtype_and_the_dense_strides_of_z0(target):
    backend, device = target
    for dtype, noise_dtype in MIXED_DTYPES:
        for layout in ("contiguous", "channels_last"):
            described = testing.describe_samples(NAME)
            args = described.at((2, 5, 3, 4), dtype, noise_dtype, layout, device=device).args
            out = ops.diffuse(*args, backend=backend)
            assert out.dtype == args[0].dtype
            assert out.stride() == args[0].stride()
            assert out.data_ptr() not in {a.data_ptr() for a in args}


@pytest.mark.parametrize("target", TARGETS)
def test_no_noise_and_no_signal_are_exact(target):
    backend, device = target
    z0, noise, _, _ = inputs(device)
    assert torch.equal(ops.diffuse(z0, noise, 1.0, 0.0, backend=backend), z0)
    assert torch.equal(ops.diffuse(z0, noise, 0.0, 1.0, backend=backend), noise)
    assert torch.equal(ops.diffuse(z0, noise, 0.0, 0.25, backend=backend), 0.5 * noise)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("target", TARGETS)
def test_only_the_gradients_that_are_asked_for(target, wanted):
    backend, device = target
    check_backward(NAME, backend, Sample("part", inputs(device), {}, wanted))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", FUSED)
def test_each_gradient_is_one_scaling_and_keeps_no_latent(target):
    backend, device = target
    args = inputs(device)
    for wanted in ((0,), (1,), (0, 1)):
        tensors = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(args)]
        out = ops.diffuse(*tensors, backend=backend)
        assert all(t.numel() == 3 for t in out.grad_fn.saved_tensors)
        with Calls() as log:
            out.backward(torch.ones_like(out))
        assert log.names.count(f"diffuse_{backend}_backward.default") == len(wanted)


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout):
    backend, device = target
    sample = testing.describe_samples(NAME).at((2, 5, 3, 4), layout=layout, device=device)
    z0, noise = leaves(sample.args)
    m, var = sample.args[2:]
    forward = getattr(torch.ops.lsgm_fast, f"diffuse_{backend}").default
    backward = getattr(torch.ops.lsgm_fast, f"diffuse_{backend}_backward").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, (z0, noise, m, var), test_utils=(*checks, "test_aot_dispatch_dynamic"))
    with torch.no_grad():
        torch.library.opcheck(forward, (z0.bfloat16(), noise.double(), m, var[:1]), test_utils=checks)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.library.opcheck(
            backward, (z0.detach(), m, dtype), test_utils=("test_schema", "test_faketensor")
        )


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
    args = inputs(device)

    def step(z0, noise, m, var):
        return 2 * ops.diffuse(z0 + 1, noise, m, var)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    grad = Draw(device, 0, "g").normal(3, 5, 6, 7)
    with use_backend(backend):
        expected_leaves, got_leaves = leaves(args), leaves(args)
        expected = step(*expected_leaves, *args[2:])
        got = compiled(*got_leaves, *args[2:])
        torch.testing.assert_close(got, expected)
        expected.backward(grad)
        got.backward(grad)
    for ours, theirs in zip(got_leaves, expected_leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("target", TARGETS)
def test_autocast_changes_nothing(target):
    backend, device = target
    for dtype in (torch.float32, torch.bfloat16):
        args = inputs(device, dtype)
        expected = ops.diffuse(*args, backend=backend)
        with torch.autocast(device, torch.bfloat16):
            tensors = leaves(args)
            got = ops.diffuse(*tensors, *args[2:], backend=backend)
        assert got.dtype == dtype and torch.equal(got, expected)
        got.sum().backward()
        assert [x.grad.dtype for x in tensors] == [dtype, dtype]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", TARGETS)
def test_without_gradients(target, mode):
    backend, device = target
    args = inputs(device)
    expected = ops.diffuse(*args, backend=backend)
    with mode():
        got = ops.diffuse(*leaves(args), *args[2:], backend=backend)
        assert not got.requires_grad
    assert torch.equal(got, expected)


@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes_and_strides(target):
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend, device = target
    described = testing.describe_samples(NAME)
    args = described.at((2, 5, 3, 4), torch.bfloat16, layout="channels_last", device=device).args
    expected = ops.diffuse(*args, backend=backend)
    with FakeTensorMode() as mode:
        got = ops.diffuse(*(mode.from_tensor(a) for a in args), backend=backend)
    assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("target", FUSED)
def test_double_backward_is_a_clear_error(target):
    backend, device = target
    args = inputs(device)
    z0, noise = leaves(args)
    out = ops.diffuse(z0, noise, *args[2:], backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), z0, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), noise)


@pytest.mark.parametrize("target", FUSED)
def test_gradcheck(target):
    backend, device = target
    args = tuple(a.double() for a in inputs(device, shape=(2, 3, 2, 3)))
    assert torch.autograd.gradcheck(
        lambda *x: ops.diffuse(*x, *args[2:], backend=backend), leaves(args), fast_mode=backend == "triton"
    )


# -- threads and repeats --------------------------------------------------------------------------------------------


def results(args, backend):
    out = ops.diffuse(*args, backend=backend)
    return (
        out,
        *testing.gradients(ops.diffuse, args, {"backend": backend}, (0, 1), [torch.ones_like(out)]),
    )


@pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.id != "triton-cpu"]
)  # its interpreter has global state
def test_several_threads(target):
    backend, device = target
    args = inputs(device, shape=(2, 5, 31, 33))
    expected = results(args, backend)
    failures = []

    def work():
        try:
            for _ in range(20):
                assert all(torch.equal(a, b) for a, b in zip(results(args, backend), expected, strict=True))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("target", [t for t in TARGETS if t.id.endswith("-cpu") and "triton" not in t.id])
def test_the_number_of_threads_does_not_matter(target):
    backend, device = target
    args = inputs(device, shape=(4, 180, 16, 16))
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(args, backend))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_ran_is_recorded(target):
    backend, device = target
    args = inputs(device)
    with record() as log, use_backend(backend):
        ops.diffuse(*args)
    assert log.counts == {(NAME, backend): 1}
    assert lsgm_fast.explain(NAME, *args, backend=backend).chosen == backend


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    z0, noise, m, var = inputs(device)
    scalar = torch.ones((), device=device)
    for args, message in (
        ((z0.to(torch.complex64), noise, m, var), "complex64"),
        ((z0, noise.int(), m, var), "int32"),
        ((z0, noise, m.clone().requires_grad_(), var), "m requires a gradient"),
        ((z0, noise, m, var.clone().requires_grad_()), "var requires a gradient"),
        ((scalar, scalar, 1.0, 1.0), "z0 is 0-d"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.diffuse(*args, backend=backend)
    for bad, message in (((z0, noise[:, :4], m, var), "one shape"), ((z0, noise, m[:2], var), "m must be")):
        with pytest.raises(ValueError, match=message):
            ops.diffuse(*bad, backend=backend)
    m = m.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.diffuse(z0, noise, m, var).sum(), m)
    assert grad.isfinite().all()


@pytest.mark.parametrize("target", FUSED)
def test_operators_refuse_what_they_would_misread(target):
    backend, device = target
    forward = getattr(torch.ops.lsgm_fast, f"diffuse_{backend}")
    backward = getattr(torch.ops.lsgm_fast, f"diffuse_{backend}_backward")
    z0, noise, m, var = inputs(device)
    errors = (RuntimeError, ValueError)
    with pytest.raises(errors, match=r"strides|format"):
        forward(z0, noise.contiguous(memory_format=torch.channels_last), m, var)
    with pytest.raises(errors, match=r"strides|format"):
        forward(z0[..., ::2], noise[..., ::2], m, var)
    with pytest.raises(errors, match=r"shape"):
        forward(z0, noise[:, :4].contiguous(), m, var)
    with pytest.raises(errors, match=r"var has shape \(2,?\)"):
        forward(z0, noise, m, var[:2])
    with pytest.raises(errors, match=r"strides"):
        backward(z0[..., ::2], m, torch.float32)
    with pytest.raises(errors, match=r"factor has shape \(2,?\)"):
        backward(z0, m[:2], torch.float32)


@pytest.mark.skipif(fused.unavailable("cpu", "cpu") is not None, reason="no CPU library")
def test_auto_leaves_small_training_steps_to_the_reference():
    args = inputs("cpu")
    large = inputs("cpu", shape=(1, 192, 32, 32))
    for call, chosen in (
        (args, "cpu"),
        ((*leaves(args), *args[2:]), "reference"),
        ((*leaves(large), *large[2:]), "cpu"),
    ):
        with record() as log:
            ops.diffuse(*call)
        assert log.counts == {(NAME, chosen): 1}
