"""``mixed_score`` on every backend that runs here, through everything that PyTorch does with an operation."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import statistics
import threading
import time

import hypothesis.strategies as st
import kernel_targets
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.dispatch import Impl, Op, record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.reference.mixed_score import mixed_score as reference
from lsgm_fast.testing import LAYOUTS, MIXED_DTYPES, Draw, Sample, check_backward, check_forward

NAME = "mixed_score"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device, dtype=torch.float32, shape=(3, 5, 6, 7)):
    return testing.describe_samples(NAME).at(shape, dtype, device=device).args


def leaves(args):
    return [a.detach().requires_grad_() for a in args[:3]]


# -- numbers --------------------------------------------------------------------------------------------------------


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
                with pytest.raises(BackendUnsupported, match="mixed_score"):
                    ops.mixed_score(*sample.args, backend=backend)
                continue
            check_forward(NAME, backend, sample)
            check_backward(NAME, backend, sample)
            ran += 1
    assert ran > 45


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
    """A call of mixed_score in any shape, dtypes, layouts and kind of r."""
    shape = tuple(draw(SHAPES))
    dtype, network_dtype = draw(st.sampled_from(MIXED_DTYPES))
    source = Draw("cpu", draw(st.integers(0, 2**16)), "property")
    layout = st.sampled_from(LAYOUTS)
    scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))
    eps = source.normal(*shape, dtype=network_dtype, layout=draw(layout), std=scale)
    z = source.normal(*shape, dtype=dtype, layout=draw(layout), std=scale)
    narrow = st.sampled_from([torch.float32, torch.float64])
    logit_shape = (1, shape[1], *(1,) * (len(shape) - 2))
    spread = draw(st.sampled_from([1.0, 20.0]))
    logit = source.normal(*logit_shape, dtype=draw(narrow), layout=draw(layout), std=spread)
    kind = draw(st.sampled_from(["number", "0-d", "one", "per sample"]))
    if kind == "number":
        r = draw(st.floats(0.0, 1.0))
    else:
        size = {"0-d": (), "one": (1,), "per sample": shape[:1]}[kind]
        r = source.uniform(*size, low=0.0, high=1.0, dtype=draw(narrow), layout=draw(layout))
    described = f"{shape} {dtype} {network_dtype} {eps.stride()} {z.stride()} logit {logit.dtype} r {kind}"
    return Sample(described, (eps, z, logit, r), {}, (0, 1, 2))


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
def test_the_result_has_the_dtype_and_the_dense_strides_of_z(target):
    backend, device = target
    for dtype, network_dtype in MIXED_DTYPES:
        for layout in ("contiguous", "channels_last"):
            described = testing.describe_samples(NAME)
            sample = described.at((2, 5, 3, 4), dtype, network_dtype, layout, device=device)
            z = sample.args[1]
            out = ops.mixed_score(*sample.args, backend=backend)
            assert out.dtype == z.dtype
            assert out.stride() == z.stride()
            assert out.data_ptr() not in {a.data_ptr() for a in sample.tensors()}


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("target", TARGETS)
def test_only_the_gradients_that_are_asked_for(target, wanted):
    backend, device = target
    sample = Sample("part", inputs(device), {}, wanted)
    check_backward(NAME, backend, sample)


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout):
    backend, device = target
    sample = testing.describe_samples(NAME).at((2, 5, 3, 4), layout=layout, device=device)
    eps, z, logit = leaves(sample.args)
    r = sample.args[3]
    forward = getattr(torch.ops.lsgm_fast, f"mixed_score_{backend}").default
    backward = getattr(torch.ops.lsgm_fast, f"mixed_score_{backend}_backward").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, (eps, z, logit, r), test_utils=(*checks, "test_aot_dispatch_dynamic"))
    with torch.no_grad():
        torch.library.opcheck(forward, (eps.bfloat16(), z.double(), logit, r[:1]), test_utils=checks)
    grad = torch.randn_like(z)
    torch.library.opcheck(
        backward,
        (grad, eps.detach(), z.detach(), logit.detach(), r),
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

    def step(eps, z, logit, r):
        return 2 * ops.mixed_score(eps + 1, z, logit, r)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    grad = Draw(device, 0, "g").normal(3, 5, 6, 7)
    with use_backend(backend):
        expected_leaves, got_leaves = leaves(args), leaves(args)
        expected = step(*expected_leaves, args[3])
        got = compiled(*got_leaves, args[3])
        torch.testing.assert_close(got, expected)
        expected.backward(grad)
        got.backward(grad)
    for ours, theirs in zip(got_leaves, expected_leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("target", FUSED)
def test_compiled_code_follows_the_choice_of_backend(target):
    backend, device = target
    args = inputs(device)
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda *a: ops.mixed_score(*a), fullgraph=True, backend=compiler)
    kernel = f"mixed_score_{backend}"
    for choice, graphs_so_far in ((backend, 1), ("reference", 2), (backend, 2), ("reference", 2)):
        with use_backend(choice):
            got = compiled(*args)
        assert len(graphs) == graphs_so_far
        torch.testing.assert_close(got, reference(*args))
    assert kernel in graphs[0] and kernel not in graphs[1]


@pytest.mark.parametrize("target", TARGETS)
def test_autocast_changes_nothing(target):
    backend, device = target
    for dtype in (torch.float32, torch.bfloat16):
        args = inputs(device, dtype)
        expected = ops.mixed_score(*args, backend=backend)
        with torch.autocast(device, torch.bfloat16):
            got = ops.mixed_score(*args, backend=backend)
            outputs = leaves(args)
            under = ops.mixed_score(*outputs, args[3], backend=backend)
        assert got.dtype == dtype and torch.equal(got, expected)
        under.sum().backward()
        assert [x.grad.dtype for x in outputs] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", TARGETS)
def test_without_gradients(target, mode):
    backend, device = target
    args = inputs(device)
    expected = ops.mixed_score(*args, backend=backend)
    with mode():
        got = ops.mixed_score(*leaves(args), args[3], backend=backend)
        assert not got.requires_grad
    assert torch.equal(got, expected)
    with torch.inference_mode():
        z = args[1].clone()
    assert torch.equal(ops.mixed_score(args[0], z, *args[2:], backend=backend), expected)


@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes_and_strides(target):
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend, device = target
    described = testing.describe_samples(NAME)
    args = described.at((2, 5, 3, 4), torch.bfloat16, layout="channels_last", device=device).args
    expected = ops.mixed_score(*args, backend=backend)
    with FakeTensorMode() as mode:
        got = ops.mixed_score(*(mode.from_tensor(a) for a in args), backend=backend)
    assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("target", TARGETS)
def test_double_backward_is_right_or_a_clear_error(target):
    backend, device = target
    args = tuple(a.double() for a in inputs(device, shape=(2, 3, 2, 2)))
    eps, z, logit = leaves(args)
    out = ops.mixed_score(eps, z, logit, args[3], backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), z, create_graph=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(
            lambda *x: ops.mixed_score(*x, args[3], backend=backend), (eps, z, logit)
        )
        return
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), logit)


@pytest.mark.parametrize("target", FUSED)
def test_gradcheck(target):
    backend, device = target
    args = tuple(a.double() for a in inputs(device, shape=(2, 3, 2, 3)))
    assert torch.autograd.gradcheck(
        lambda *x: ops.mixed_score(*x, args[3], backend=backend), leaves(args), fast_mode=backend == "triton"
    )


# -- threads, processes, repeats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.id != "triton-cpu"]
)  # its interpreter has global state
def test_several_threads(target):
    backend, device = target
    args = inputs(device, shape=(2, 5, 31, 33))
    grad = torch.ones_like(args[1])
    expected = ops.mixed_score(*args, backend=backend)
    expected_grads = testing.gradients(ops.mixed_score, args, {"backend": backend}, (0, 1, 2), [grad])
    failures = []

    def work():
        try:
            for _ in range(20):
                assert torch.equal(ops.mixed_score(*args, backend=backend), expected)
                got = testing.gradients(ops.mixed_score, args, {"backend": backend}, (0, 1, 2), [grad])
                assert all(torch.equal(a, b) for a, b in zip(got, expected_grads, strict=True))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _child(backend, args, queue, gradients):
    torch.set_num_threads(1)  # as in a worker of a DataLoader
    try:
        found = [ops.mixed_score(*args, backend=backend)]
        if gradients:
            grad = torch.ones_like(args[1])
            found += testing.gradients(ops.mixed_score, args, {"backend": backend}, (0, 1, 2), [grad])
        queue.put([t.tolist() for t in found])
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.id.endswith("-cpu")])
def test_child_processes(target, method):
    backend, device = target
    args = inputs(device)
    parent = multiprocessing.get_context(method)
    queue = parent.SimpleQueue()
    # Used before the fork, so that whatever the parent has set up is inherited.
    expected = [ops.mixed_score(*args, backend=backend)]
    # PyTorch refuses to compute gradients in a fork of a process that has computed some, if it was built for CUDA.
    gradients = method == "spawn" or torch.version.cuda is None
    if gradients:
        grad = torch.ones_like(args[1])
        expected += testing.gradients(ops.mixed_score, args, {"backend": backend}, (0, 1, 2), [grad])
    process = parent.Process(target=_child, args=(backend, args, queue, gradients))
    process.start()
    process.join(60)
    hung = process.is_alive()
    if hung:
        process.kill()
    assert not hung and process.exitcode == 0
    assert queue.get() == [t.tolist() for t in expected]


@pytest.mark.parametrize("target", TARGETS)
def test_repeats_are_equal_to_the_last_bit(target):
    backend, device = target
    shape = (3, 20, 16, 16) if target != ("triton", "cpu") else (2, 5, 7, 9)
    for layout in ("contiguous", "channels_last"):
        args = testing.describe_samples(NAME).at(shape, layout=layout, device=device).args
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        runs = [
            (
                ops.mixed_score(*args, backend=backend),
                *testing.gradients(ops.mixed_score, args, {"backend": backend}, (0, 1, 2), [grad]),
            )
            for _ in range(4)
        ]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("target", [t for t in TARGETS if t.id.endswith("-cpu") and "triton" not in t.id])
def test_the_number_of_threads_does_not_matter(target):
    backend, device = target
    args = inputs(device, shape=(4, 60, 16, 16))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = ops.mixed_score(*args, backend=backend)
            grads = testing.gradients(
                ops.mixed_score, args, {"backend": backend}, (0, 1), [torch.ones_like(out)]
            )
            results.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_ran_is_recorded_and_can_be_bound(target):
    backend, device = target
    args = inputs(device)
    with record() as log, use_backend(backend):
        out = ops.mixed_score(*args)
    assert log.counts == {(NAME, backend): 1}
    assert lsgm_fast.explain(NAME, *args, backend=backend).chosen == backend
    step = ops.mixed_score.resolve(*args, backend=backend)
    assert torch.equal(step(*args), out)


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    eps, z, logit, r = inputs(device)
    for args, message in (
        ((eps, z, None, r), "mixing_logit is None"),
        ((eps, z.to(torch.complex64), logit, r), "complex64"),
        ((eps, z, logit, r.clone().requires_grad_()), "r requires a gradient"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.mixed_score(*args, backend=backend)
    with pytest.raises(TypeError, match="int32"):
        ops.mixed_score(eps, z.int(), logit, r)
    (grad,) = torch.autograd.grad(ops.mixed_score(eps, z, logit, (s := r.clone().requires_grad_())).sum(), s)
    assert grad.isfinite().all()


def check(eps, z, mixing_logit, r, *, backend=None):
    pass


def nothing(eps, z, mixing_logit, r):
    return eps


def overhead(op, backend, args, calls=300, rounds=31) -> float:
    """Seconds that one call through the dispatcher takes beyond one of the implementation: the median of rounds."""
    direct = op.impl(backend).fn
    differences = []
    clock = time.perf_counter
    with torch.no_grad():
        for _ in range(rounds):
            start = clock()
            for _ in range(calls):
                direct(*args)
            middle = clock()
            for _ in range(calls):
                op(*args)
            differences.append((clock() - middle - (middle - start)) / calls)
    return statistics.median(differences)


def test_the_dispatcher_costs_microseconds():
    """Generous, for busy machines; `lsgm-fast bench ops` measures it (target: 5 microseconds)."""
    args = inputs("cpu")
    op = Op(check, reference)
    op.register(Impl("cpu", nothing, priority=1))
    assert overhead(op, "cpu", args) < 50e-6
    # The operation's own checks and reasons, around an implementation that does nothing.
    chosen = ops.mixed_score.resolve(*args)
    for backend in ops.mixed_score.backends():
        if ops.mixed_score.impl(backend).fn is chosen and backend != "reference":
            op = Op(ops.mixed_score._check, reference)
            op.register(dataclasses.replace(ops.mixed_score.impl(backend), fn=nothing))
            assert overhead(op, backend, args) < 50e-6
