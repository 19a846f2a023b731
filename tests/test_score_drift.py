"""``score_drift`` on every backend that runs here, through everything that PyTorch does with an operation."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import threading

import hypothesis.strategies as st
import kernel_targets
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.config import SDEConfig
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.reference.score_drift import score_drift as reference
from lsgm_fast.sde import build_sde
from lsgm_fast.testing import LAYOUTS, MIXED_DTYPES, Draw, Sample, check_forward
from lsgm_fast.testing.inputs import BF16, F16, F32, F64

NAME = "score_drift"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]
COMPILED = [t for t in FUSED if not t.id.startswith("triton")]


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device, dtype=F32, shape=(3, 5, 6, 7), network_dtype=None, layout="contiguous"):
    return testing.describe_samples(NAME).at(shape, dtype, network_dtype, layout, device=device).args


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
                ran += 1
    assert ran > 65


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", FUSED)
def test_all_mixtures_of_dtypes(target, layout, mixed):
    backend, device = target
    described = testing.describe_samples(NAME)
    # 8 channels and 8 x 8 positions: wide accesses in every dtype.
    for dtype, network_dtype in itertools.product((F32, F64, F16, BF16), repeat=2):
        for shape in ((2, 8, 8, 8), (3, 5, 3, 7)):
            args = described.at(shape, dtype, network_dtype, layout, device=device).args
            call = args if mixed else (*args[:2], None, *args[3:])
            check_forward(NAME, backend, Sample(f"{dtype} {network_dtype} {shape}", call))
            out = ops.score_drift(*call, backend=backend)
            assert (out.dtype, out.stride()) == (dtype, args[1].stride())
            assert out.data_ptr() not in {a.data_ptr() for a in args}


SDES = {
    "vpsde": {},
    "geometric_sde": {},
    "sub_vpsde": {},
    "vesde": {"sigma2_0": 0.01, "sigma2_min": 0.01, "sigma2_max": 100.0},
}


def assert_few_roundings(backend, eps, z, logit, p, q, r):
    """Against float64, element by element: a few roundings of the terms in the type of the arithmetic."""

    def wide(value):
        value = value.to(z.device).double()
        return value.reshape(-1, *(1,) * (z.dim() - 1)) if value.dim() else value

    out = ops.score_drift(eps, z, logit, p, q, r, backend=backend)
    a = 1.0 if logit is None else torch.sigmoid(logit.double())
    linear, weight, product = wide(p) * z.double(), a * wide(q), wide(r) * z.double()
    scale = linear.abs() + weight * (eps.double().abs() + product.abs())
    error = (out.double() - (linear + weight * (eps.double() - product))).abs()
    assert (error <= 4 * torch.finfo(z.dtype).eps * scale).all()


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("target", FUSED)
def test_the_coefficients_of_every_sde(target, name):
    """From the smallest times, where q is large and eps close to r z, to 1, at batches of 1 to 512."""
    backend, device = target
    sde = build_sde(SDEConfig(name, **SDES[name]))
    batches = (1, 3) if target == ("triton", "cpu") else (1, 2, 3, 64, 512)
    for batch, state in itertools.product(batches, (F32, F64)):
        draw = Draw(device, 0, f"{name} {batch} {state}")
        z = draw.normal(batch, 4, 2, 3, dtype=state)
        logit = draw.normal(1, 4, 1, 1)
        correction = draw.normal(batch, 4, 2, 3)
        for t in (1e-6, 1e-5, 1e-3, 0.1, 0.5, 1.0):
            p, q, r = sde.drift_coefficients(torch.tensor(t, dtype=F64))
            # What the network predicts there: the noise of a nearly normal latent.
            eps = (r * z + 0.1 * correction).float()
            for values in ((p, q, r), tuple(v.to(device).float().expand(batch) for v in (p, q, r))):
                assert_few_roundings(backend, eps, z, logit, *values)
                if state == F32:  # and no worse than plain PyTorch
                    check_forward(NAME, backend, Sample(f"t {t} B {batch}", (eps, z, logit, *values)))
        each = sde.drift_coefficients(draw.uniform(batch, low=1e-5, high=1.0, dtype=state))
        for mixing_logit in (logit, None):
            assert_few_roundings(backend, correction, z, mixing_logit, *each)


@pytest.mark.parametrize("target", FUSED)
def test_the_difference_is_formed_first(target):
    """Where eps is close to r z, the error is that of one product, not of q eps and q r z, each rounded."""
    backend, device = target
    eps, z, logit, p, q, r = inputs(device, shape=(3, 6, 8, 8))
    eps = r.reshape(-1, 1, 1, 1) * z * (1 + 1e-4 * eps)
    q = torch.full_like(q, 1e4)
    out = ops.score_drift(eps, z, logit, torch.zeros_like(p), q, r, backend=backend)
    weight = torch.sigmoid(logit.double()) * 1e4
    product = r.double().reshape(-1, 1, 1, 1) * z.double()
    error = (out.double() - weight * (eps.double() - product)).abs()
    assert (error <= weight * (product.abs() + 8 * (eps - product).abs()) * 2**-24).all()


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


SHAPES = st.one_of(
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9), st.integers(1, 9)).map(list),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 300)).map(list),
)


@st.composite
def calls(draw):
    """A call of score_drift in any shape, dtypes, layouts and kinds of coefficients."""
    shape = tuple(draw(SHAPES))
    dtype, network_dtype = draw(st.sampled_from(MIXED_DTYPES))
    source = Draw("cpu", draw(st.integers(0, 2**16)), "property")
    layout = st.sampled_from(LAYOUTS)
    scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))
    eps = source.normal(*shape, dtype=network_dtype, layout=draw(layout), std=scale)
    z = source.normal(*shape, dtype=dtype, layout=draw(layout), std=scale)
    narrow = st.sampled_from([F32, F64])
    logit = None
    if draw(st.booleans()):
        logit_shape = (1, shape[1], *(1,) * (len(shape) - 2))
        spread = draw(st.sampled_from([1.0, 20.0]))
        logit = source.normal(*logit_shape, dtype=draw(narrow), layout=draw(layout), std=spread)

    def coefficient(low, high):
        kind = draw(st.sampled_from(["number", "0-d", "one", "per sample"]))
        if kind == "number":
            return draw(st.floats(low, high))
        size = {"0-d": (), "one": (1,), "per sample": shape[:1]}[kind]
        return source.uniform(*size, low=low, high=high, dtype=draw(narrow), layout=draw(layout))

    rest = (coefficient(-5.0, 5.0), coefficient(0.0, 1e3), coefficient(0.0, 1.0))
    described = f"{shape} {dtype} {network_dtype} {eps.stride()} {z.stride()} {logit is None} {rest}"
    return Sample(described, (eps, z, logit, *rest))


@pytest.mark.parametrize("target", FUSED)
@settings(
    max_examples=15 if INTERPRETED else 100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
@given(sample=calls())
def test_no_reasons_means_right(target, sample):
    backend, device = target
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in sample.args)
    if target == ("triton", "cpu"):
        # Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: an error of its own, of up to one ulp.
        assume(torch.bfloat16 not in (args[0].dtype, args[1].dtype))
    sample = Sample(sample.id, args)
    assert testing.unsupported(NAME, backend, sample) == []
    check_forward(NAME, backend, sample)


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout):
    backend, device = target
    eps, z, logit, p, q, r = inputs(device, shape=(2, 5, 3, 4), layout=layout)
    operator = getattr(torch.ops.lsgm_fast, f"score_drift_{backend}").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        operator, (eps, z, logit, p, q, r), test_utils=(*checks, "test_aot_dispatch_dynamic")
    )
    torch.library.opcheck(
        operator, (eps, z, None, p, q, r), test_utils=(*checks, "test_aot_dispatch_dynamic")
    )
    mixed = (eps.bfloat16(), z.double(), logit, p[:1], q.double(), r[0])
    torch.library.opcheck(operator, mixed, test_utils=checks)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("target", FUSED)
def test_compiled_without_graph_breaks(target, compiler):
    backend, device = target
    args = inputs(device, layout="channels_last")

    def step(eps, z, logit, p, q, r):
        return z + 2 * ops.score_drift(eps + 1, z, logit, p, q, r)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with use_backend(backend), torch.no_grad():
        for call in (args, (*args[:2], None, *args[3:])):
            torch.testing.assert_close(compiled(*call), step(*call))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("target", FUSED)
def test_compiled_code_follows_the_choice_of_backend(target):
    backend, device = target
    args = inputs(device)
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda *a: ops.score_drift(*a), fullgraph=True, backend=compiler)
    for choice, graphs_so_far in ((backend, 1), ("reference", 2), (backend, 2), ("reference", 2)):
        with use_backend(choice):
            got = compiled(*args)
        assert len(graphs) == graphs_so_far
        torch.testing.assert_close(got, reference(*args))
    assert f"score_drift_{backend}" in graphs[0] and f"score_drift_{backend}" not in graphs[1]


@pytest.mark.parametrize("target", FUSED)
def test_where_a_gradient_is_wanted_the_reference_runs(target):
    backend, device = target
    args = inputs(device)
    for position in (0, 1, 2, 3):
        call = [*args]
        call[position] = args[position].clone().requires_grad_()
        with record() as log:
            out = ops.score_drift(*call)
        assert log.backends() == {NAME: "reference"}
        (grad,) = torch.autograd.grad(out.sum(), call[position])
        assert grad.isfinite().all()
        with pytest.raises(BackendUnsupported, match="a gradient is wanted"):
            ops.score_drift(*call, backend=backend)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = ops.score_drift(*call, backend=backend)
            assert not got.requires_grad
            torch.testing.assert_close(got, out.detach())


@pytest.mark.parametrize("target", TARGETS)
def test_autocast_changes_nothing(target):
    backend, device = target
    for dtype in (F32, BF16):
        args = inputs(device, dtype)
        expected = ops.score_drift(*args, backend=backend)
        with torch.autocast(device, BF16):
            got = ops.score_drift(*args, backend=backend)
        assert got.dtype == dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes_and_strides(target):
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend, device = target
    for layout in ("channels_last", "transposed"):
        args = inputs(device, BF16, (2, 5, 3, 4), F32, layout)
        expected = ops.score_drift(*args, backend=backend)
        with FakeTensorMode() as mode:
            got = ops.score_drift(*(mode.from_tensor(a) for a in args), backend=backend)
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


# -- threads, processes, repeats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", COMPILED)
def test_several_threads(target):
    backend, device = target
    args = inputs(device, shape=(2, 5, 31, 33))
    expected = ops.score_drift(*args, backend=backend)
    failures = []

    def work():
        try:
            for _ in range(20):
                assert torch.equal(ops.score_drift(*args, backend=backend), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _child(backend, args, queue):
    torch.set_num_threads(1)  # as in a worker of a DataLoader
    try:
        queue.put(ops.score_drift(*args, backend=backend).tolist())
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("target", [t for t in FUSED if t.id == "cpu-cpu"])
def test_a_forked_process(target):
    backend, device = target
    args = inputs(device)
    parent = multiprocessing.get_context("fork")
    queue = parent.SimpleQueue()
    # Used before the fork, so that whatever the parent has set up is inherited.
    expected = ops.score_drift(*args, backend=backend)
    process = parent.Process(target=_child, args=(backend, args, queue))
    process.start()
    process.join(60)
    hung = process.is_alive()
    if hung:
        process.kill()
    assert not hung and process.exitcode == 0
    assert queue.get() == expected.tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_repeats_are_equal_to_the_last_bit(target):
    backend, device = target
    shape = (3, 20, 16, 16) if target != ("triton", "cpu") else (2, 5, 7, 9)
    for layout in ("contiguous", "channels_last"):
        args = inputs(device, shape=shape, layout=layout)
        runs = [ops.score_drift(*args, backend=backend) for _ in range(4)]
        assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("target", [t for t in FUSED if t.id == "cpu-cpu"])
def test_the_number_of_threads_does_not_matter(target):
    backend, device = target
    before = torch.get_num_threads()
    for layout in ("contiguous", "channels_last"):
        args = inputs(device, shape=(5, 60, 31, 33), layout=layout)
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.score_drift(*args, backend=backend))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("target", FUSED)
def test_the_order_of_memory_changes_no_bit(target):
    """An element's value depends on its inputs alone, not on where it lies."""
    backend, device = target
    args = inputs(device, shape=(2, 5, 7, 9))
    expected = ops.score_drift(*args, backend=backend)
    moved = [a.contiguous(memory_format=torch.channels_last) for a in args[:2]]
    assert torch.equal(ops.score_drift(*moved, *args[2:], backend=backend), expected)


# -- the dispatcher and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_ran_is_recorded_and_can_be_bound(target):
    backend, device = target
    args = inputs(device)
    with record() as log, use_backend(backend):
        out = ops.score_drift(*args)
    assert log.counts == {(NAME, backend): 1}
    assert lsgm_fast.explain(NAME, *args, backend=backend).chosen == backend
    step = ops.score_drift.resolve(*args, backend=backend)
    assert torch.equal(step(*args), out)


@pytest.mark.parametrize("target", [t for t in FUSED if t.id == "cpu-cpu"])
def test_a_model_runs_it_by_default(target):
    model = lsgm_fast.build("tiny-binary")
    z = torch.zeros(2, *model.latent_shape, dtype=F64)
    with torch.no_grad(), record() as log:
        model.drift(z, torch.tensor(0.5, dtype=F64))
    assert log.counts[(NAME, "cpu")] == 1


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    eps, z, logit, p, q, r = inputs(device)
    for args, message in (
        ((eps, z.to(torch.complex64), logit, p, q, r), "complex64"),
        ((eps.int(), z, logit, p, q, r), "eps torch.int32"),
        ((eps[0, 0, 0], z[0, 0, 0], None, 0.1, 0.2, 0.3), r"z has shape \(7,\), expected \(B, C"),
        ((eps, z, logit.to("meta"), p, q, r), "mixing_logit is on meta"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.score_drift(*args, backend=backend)


@pytest.mark.parametrize("target", [t for t in FUSED if t.id == "cpu-cpu"])
def test_the_operator_refuses_what_it_would_misread(target):
    operator = torch.ops.lsgm_fast.score_drift_cpu
    eps, z, logit, p, q, r = inputs("cpu")
    turned = eps.contiguous(memory_format=torch.channels_last)
    for args, message in (
        ((eps[:, :2], z, logit, p, q, r), r"eps has shape \(3, 2, 6, 7\) and z \(3, 5, 6, 7\)"),
        ((eps, z, logit[:, :2], p, q, r), r"mixing_logit has shape \(1, 2, 1, 1\)"),
        ((eps, z, logit, p[:2], q, r), r"p has shape \(2\): expected \(\) or \(3,\)"),
        ((eps, z, logit, p, q.half(), r), "q has dtype Half"),
        ((eps, z, logit, p, q, r[None]), r"r has shape \(1, 3\)"),
        ((turned, z, logit, p, q, r), "expected both contiguous or both channels_last"),
        ((turned, z, None, p, q, r), "expected both contiguous or both channels_last"),
        ((eps[..., ::2], z[..., ::2], None, p, q, r), "expected both contiguous or both channels_last"),
        ((eps[0, 0, 0], z[0, 0, 0], None, p, q, r), r"expected \(B, C, ...\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*args)
