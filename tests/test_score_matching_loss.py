"""``score_matching_loss`` on every backend that runs here, through everything that PyTorch does with an operation."""

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

NAME = "score_matching_loss"
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
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9), st.integers(1, 9)).map(list),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 300)).map(list),
)


@st.composite
def calls(draw):
    """A call of score_matching_loss in any shape, dtypes, layouts and kinds of weights."""
    shape = tuple(draw(SHAPES))
    dtype, network_dtype = draw(st.sampled_from(MIXED_DTYPES))
    source = Draw("cpu", draw(st.integers(0, 2**16)), "property")
    layout = st.sampled_from(LAYOUTS)
    scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))
    pred = source.normal(*shape, dtype=network_dtype, layout=draw(layout), std=scale)
    noise = source.normal(*shape, dtype=dtype, layout=draw(layout))
    narrow = st.sampled_from([torch.float32, torch.float64])
    weights = []
    for kinds in (["number", "0-d", "one", "per sample"], ["none", "number", "0-d", "one", "per sample"]):
        kind = draw(st.sampled_from(kinds))
        if kind == "none":
            weights.append(None)
        elif kind == "number":
            weights.append(draw(st.floats(0.0, 10.0)))
        else:
            size = {"0-d": (), "one": (1,), "per sample": shape[:1]}[kind]
            weights.append(source.uniform(*size, low=0.0, high=9.0, dtype=draw(narrow), layout=draw(layout)))
    const = draw(st.floats(-3.0, 3.0))
    described = f"{shape} {network_dtype} {dtype} {pred.stride()} {noise.stride()}"
    return Sample(described, (pred, noise, *weights, const), {}, (0, 1))


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
def test_dtypes_and_strides_of_the_results(target):
    backend, device = target
    for dtype, network_dtype in MIXED_DTYPES:
        wide = torch.float64 if torch.float64 in (dtype, network_dtype) else torch.float32
        for layout in ("contiguous", "channels_last"):
            described = testing.describe_samples(NAME)
            args = described.at((2, 5, 3, 4), dtype, network_dtype, layout, device=device).args
            p_loss, cross_entropy = ops.score_matching_loss(*args, backend=backend)
            assert (p_loss.shape, p_loss.dtype) == ((2,), wide)
            assert cross_entropy.dtype == wide
            assert cross_entropy.stride() == args[0].stride()


@pytest.mark.parametrize("target", TARGETS)
def test_without_weight_q_there_is_no_cross_entropy(target):
    backend, device = target
    pred, noise, weight_p, weight_q, const = inputs(device)
    both = ops.score_matching_loss(pred, noise, weight_p, weight_q, const, backend=backend)
    p_loss, nothing = ops.score_matching_loss(pred, noise, weight_p, const=const, backend=backend)
    assert nothing is None
    assert torch.equal(p_loss, both[0])
    # An empty batch has a cross entropy all the same.
    p_loss, empty = ops.score_matching_loss(pred[:0], noise[:0], 1.0, 1.0, backend=backend)
    assert p_loss.shape == (0,) and empty.shape == (0, 5, 6, 7)
    assert ops.score_matching_loss(pred[:0], noise[:0], 1.0, backend=backend)[1] is None


@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_prediction(target):
    backend, device = target
    pred = inputs(device)[0]
    p_loss, cross_entropy = ops.score_matching_loss(pred, pred.clone(), 3.0, 2.0, 0.75, backend=backend)
    assert torch.equal(p_loss, torch.zeros(3, device=device))
    assert torch.equal(cross_entropy, torch.full_like(pred, 0.75))


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("target", TARGETS)
def test_only_the_gradients_that_are_asked_for(target, wanted):
    backend, device = target
    for args in (inputs(device), inputs(device)[:3]):
        check_backward(NAME, backend, Sample("part", args, {}, wanted))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that run and their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.__name__, args))
        return func(*args, **(kwargs or {}))

    def arguments(self, name):
        (args,) = (args for called, args in self.calls if called == name)
        return args


USES = {
    "the loss": (lambda p, ce: p.sum(), (3,), None),
    "the cross entropy": (lambda p, ce: (ce * ce.detach()).sum(), None, (3, 5, 6, 7)),
    "its sums": (lambda p, ce: (ce.flatten(1).sum(1) * p.detach()).sum(), None, (3,)),
    "its total": (lambda p, ce: ce.sum(), None, (3,)),
    "both": (lambda p, ce: (p * ce.sum((1, 2, 3))).sum(), (3,), (3,)),
    "both, per element": (lambda p, ce: (p[:, None, None, None] * ce.square()).sum(), (3,), (3, 5, 6, 7)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_of_the_results_that_are_used(target, use):
    """A result that is not used, or only summed up, must not cost a tensor of its size in the backward pass."""
    backend, device = target
    function, shape_p, shape_ce = USES[use]
    args = inputs(device)

    def gradients(backend, args):
        pred = args[0].detach().requires_grad_()
        value = function(*ops.score_matching_loss(pred, *args[1:], backend=backend))
        with Calls() as log:
            (grad,) = torch.autograd.grad(value, pred)
        return grad, log

    got, log = gradients(backend, args)
    exact, _ = gradients("reference", [a.double() if isinstance(a, torch.Tensor) else a for a in args])
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    if backend != "reference":
        grad_p, grad_ce, *_, for_pred, for_noise = log.arguments(
            f"score_matching_loss_{backend}_backward.default"
        )
        assert (None if grad_p is None else grad_p.shape) == shape_p
        assert (None if grad_ce is None else grad_ce.shape) == shape_ce
        assert (for_pred, for_noise) == (True, False)


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout):
    backend, device = target
    sample = testing.describe_samples(NAME).at((2, 5, 3, 4), layout=layout, device=device)
    pred, noise = leaves(sample.args)
    p, q = sample.args[2:4]
    forward = getattr(torch.ops.lsgm_fast, f"score_matching_loss_{backend}").default
    backward = getattr(torch.ops.lsgm_fast, f"score_matching_loss_{backend}_backward").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for weight_q in (q, None):
        torch.library.opcheck(
            forward, (pred, noise, p, weight_q, 0.5), test_utils=(*checks, "test_aot_dispatch_dynamic")
        )
        with torch.no_grad():
            torch.library.opcheck(
                forward, (pred.bfloat16(), noise.double(), p[:1], weight_q, 0.5), test_utils=checks
            )
    pred, noise = pred.detach(), noise.detach()
    for grad_p, grad_ce in ((p, None), (None, torch.randn_like(pred)), (p, p), (None, p)):
        for wanted in ((True, False), (False, True), (True, True)):
            torch.library.opcheck(
                backward,
                (grad_p, grad_ce, pred, noise, p, q, *wanted),
                test_utils=("test_schema", "test_faketensor"),
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

    def step(pred, noise, weight_p, weight_q, const):
        p_loss, cross_entropy = ops.score_matching_loss(pred + 1, noise, weight_p, weight_q, const)
        alone, nothing = ops.score_matching_loss(pred, noise, weight_p)
        assert nothing is None
        return p_loss.sum() + alone.sum() + cross_entropy.flatten(1).sum(1).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with use_backend(backend):
        for const in (0.25, 0.5):  # a number that changes
            expected_leaves, got_leaves = leaves(args), leaves(args)
            expected = step(*expected_leaves, *args[2:4], const)
            got = compiled(*got_leaves, *args[2:4], const)
            torch.testing.assert_close(got, expected)
            expected.backward()
            got.backward()
            for ours, theirs in zip(got_leaves, expected_leaves, strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("target", TARGETS)
def test_autocast_changes_nothing(target):
    backend, device = target
    for dtype in (torch.float32, torch.bfloat16):
        args = inputs(device, dtype)
        expected = ops.score_matching_loss(*args, backend=backend)
        with torch.autocast(device, torch.bfloat16):
            tensors = leaves(args)
            got = ops.score_matching_loss(*tensors, *args[2:], backend=backend)
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        (got[0].sum() + got[1].sum()).backward()
        assert [x.grad.dtype for x in tensors] == [dtype, dtype]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", TARGETS)
def test_without_gradients(target, mode):
    backend, device = target
    args = inputs(device)
    expected = ops.score_matching_loss(*args, backend=backend)
    with mode():
        got = ops.score_matching_loss(*leaves(args), *args[2:], backend=backend)
        assert not got[0].requires_grad and not got[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes_and_strides(target):
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend, device = target
    described = testing.describe_samples(NAME)
    args = described.at((2, 5, 3, 4), torch.bfloat16, layout="channels_last", device=device).args
    expected = ops.score_matching_loss(*args, backend=backend)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        got = ops.score_matching_loss(*fakes, backend=backend)
        assert ops.score_matching_loss(*fakes[:3], backend=backend)[1] is None
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.parametrize("target", FUSED)
def test_double_backward_is_a_clear_error(target):
    backend, device = target
    args = inputs(device)
    pred, noise = leaves(args)
    p_loss, _ = ops.score_matching_loss(pred, noise, *args[2:], backend=backend)
    (grad,) = torch.autograd.grad(p_loss.sum(), pred, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), noise)


@pytest.mark.parametrize("target", FUSED)
def test_gradcheck(target):
    backend, device = target
    args = inputs(device, torch.float64, shape=(2, 3, 2, 3))
    assert torch.autograd.gradcheck(
        lambda *x: ops.score_matching_loss(*x, *args[2:], backend=backend),
        leaves(args),
        fast_mode=backend == "triton",
    )


# -- threads and repeats --------------------------------------------------------------------------------------------


def results(args, backend):
    p_loss, cross_entropy = ops.score_matching_loss(*args, backend=backend)
    grads = [torch.ones_like(p_loss), cross_entropy]
    op = ops.score_matching_loss
    return (p_loss, cross_entropy, *testing.gradients(op, args, {"backend": backend}, (0, 1), grads))


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


@pytest.mark.parametrize("target", [t for t in FUSED if t.id.endswith("-cpu") and "triton" not in t.id])
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


@pytest.mark.parametrize("target", FUSED)
def test_a_sum_does_not_depend_on_the_rest_of_the_batch(target):
    backend, device = target
    args = inputs(device, shape=(3, 5, 9, 11))
    p_loss, _ = ops.score_matching_loss(*args, backend=backend)
    alone, _ = ops.score_matching_loss(*(a[1:2] for a in args[:4]), args[4], backend=backend)
    assert torch.equal(p_loss[1:2], alone)


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_ran_is_recorded(target):
    backend, device = target
    args = inputs(device)
    with record() as log, use_backend(backend):
        ops.score_matching_loss(*args)
    assert log.counts == {(NAME, backend): 1}
    assert lsgm_fast.explain(NAME, *args, backend=backend).chosen == backend


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    pred, noise, p, q, const = inputs(device)
    flat = pred.flatten()
    for args, message in (
        ((pred.to(torch.complex64), noise, p, q), "complex64"),
        ((pred, noise.int(), p, q), "int32"),
        ((pred, noise, p.clone().requires_grad_(), q), "weight_p requires a gradient"),
        ((pred, noise, p, q.clone().requires_grad_()), "weight_q requires a gradient"),
        ((pred, noise, p, q, torch.tensor(const)), "const is a tensor"),
        ((flat, flat, 1.0, 1.0), r"pred has shape \(630,\)"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.score_matching_loss(*args, backend=backend)
    for bad, message in (
        ((pred, noise[:, :4], p), "one shape"),
        ((pred, noise, p, q[:2]), "weight_q must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.score_matching_loss(*bad, backend=backend)
    p = p.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.score_matching_loss(pred, noise, p)[0].sum(), p)
    assert grad.isfinite().all()


@pytest.mark.parametrize("target", FUSED)
def test_operators_refuse_what_they_would_misread(target):
    backend, device = target
    forward = getattr(torch.ops.lsgm_fast, f"score_matching_loss_{backend}")
    backward = getattr(torch.ops.lsgm_fast, f"score_matching_loss_{backend}_backward")
    pred, noise, p, q, const = inputs(device)
    errors = (RuntimeError, ValueError)
    for args, message in (
        ((pred, noise.contiguous(memory_format=torch.channels_last), p, q), r"strides|format"),
        ((pred[..., ::2], noise[..., ::2], p, q), r"strides|format"),
        ((pred, noise[:, :4].contiguous(), p, q), r"shape"),
        ((pred, noise, p[:2], q), r"weight_p has shape \(2,?\)"),
        ((pred, noise, p, q[:2]), r"weight_q has shape \(2,?\)"),
    ):
        with pytest.raises(errors, match=message):
            forward(*args, const)
    for grad_p, grad_ce, weight_q, message in (
        (p[:2], None, q, r"grad_p has shape \(2,?\)"),
        (None, p[:2], q, r"grad_ce has shape \(2,?\)"),
        (None, pred[:, :4].contiguous(), q, "shape"),
        (None, pred.contiguous(memory_format=torch.channels_last), q, r"strides|format"),
        (None, pred, None, "needs weight_q"),
    ):
        with pytest.raises(errors, match=message):
            backward(grad_p, grad_ce, pred, noise, p, weight_q, True, True)


@pytest.mark.skipif(fused.unavailable("cpu", "cpu") is not None, reason="no CPU library")
def test_auto_leaves_what_is_too_small_to_the_reference():
    args, large = inputs("cpu"), inputs("cpu", shape=(1, 64, 32, 32))
    for call, chosen in (
        (args, "cpu"),
        (args[:3], "reference"),
        (large[:3], "cpu"),
        ((*leaves(args), *args[2:]), "reference"),
        ((*leaves(large), *large[2:]), "cpu"),
    ):
        with record() as log:
            ops.score_matching_loss(*call)
        assert log.counts == {(NAME, chosen): 1}
