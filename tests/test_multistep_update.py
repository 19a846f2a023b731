"""The fused kernels of ``multistep_update`` on every backend that runs here."""

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
from lsgm_fast import SDEConfig, build_sde, ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.reference.multistep_update import multistep_update as reference
from lsgm_fast.sampling.ancestral import sample_ancestral
from lsgm_fast.testing import LAYOUTS, Draw, Sample, check_forward

NAME = "multistep_update"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


TARGETS = kernel_targets.targets(NAME, reference=False)


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device, shape=(3, 5, 6, 7), dtype=torch.float32, network_dtype=None, layout="contiguous"):
    """A state, two history entries, and coefficients that are a number, one per sample and one per channel."""
    source = Draw(device, 3, f"{shape} {dtype} {layout}")
    y = source.normal(*shape, dtype=dtype, layout=layout)
    history = [source.normal(*shape, dtype=network_dtype or dtype, layout=layout) for _ in range(2)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    by_channel = source.normal(1, shape[1], *(1,) * (len(shape) - 2), dtype=wide)
    return y, 0.9, history, [source.normal(shape[0], dtype=wide), by_channel]


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
    assert ran > 75


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
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
    st.tuples(st.integers(1, 2), st.integers(200, 530), st.integers(1, 3)).map(list),
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
KINDS = ["number", "0-d", "one", "per sample", "per channel", "both"]


@st.composite
def calls(draw):
    """A call in any shape, dtypes, layouts, number of entries and kinds of coefficients."""
    shape = tuple(draw(SHAPES))
    dtype, network_dtype = draw(DTYPES), draw(DTYPES)
    source = Draw("cpu", draw(st.integers(0, 2**16)), "property")
    layout = st.sampled_from(LAYOUTS)
    y = source.normal(*shape, dtype=dtype, layout=draw(layout))
    history = [
        source.normal(*shape, dtype=network_dtype, layout=draw(layout))
        for _ in range(draw(st.integers(0, 4)))
    ]
    ones = (1,) * (len(shape) - 2)
    sizes = {
        "0-d": (),
        "one": (1,),
        "per sample": shape[:1],
        "per channel": (1, shape[1], *ones),
        "both": (*shape[:2], *ones),
    }
    coefficients = []
    for _ in range(len(history) + 1):
        kind = draw(st.sampled_from(KINDS))
        if kind == "number":
            coefficients.append(draw(st.floats(-2, 2)))
        else:
            factor = st.sampled_from([torch.float32, torch.float64, torch.float16])
            coefficients.append(source.normal(*sizes[kind], dtype=draw(factor), layout=draw(layout)))
    shapes = [tuple(c.shape) if isinstance(c, torch.Tensor) else c for c in coefficients]
    described = f"{shape} {dtype} {network_dtype} {[t.stride() for t in (y, *history)]} {shapes}"
    return Sample(described, (y, coefficients[0], history, coefficients[1:]), {})


@pytest.mark.parametrize("target", TARGETS)
@settings(
    max_examples=15 if INTERPRETED else 120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
@given(sample=calls())
def test_no_reasons_means_right(target, sample):
    backend, device = target
    args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), sample.args)
    sample = Sample(sample.id, args, {})
    assert testing.unsupported(NAME, backend, sample) == []
    if target == ("triton", "cpu"):
        # Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: an error of its own, of up to one ulp.
        assume(args[0].dtype != torch.bfloat16)
    check_forward(NAME, backend, sample)


@pytest.mark.parametrize("target", TARGETS)
def test_numbers_keep_their_float64(target):
    backend, device = target
    y = torch.full((2, 3, 1, 5), 3.0, dtype=torch.float64, device=device)
    got = ops.multistep_update(y, 1 / 3, [y.float(), y.float()], [1e-17, -0.0], backend=backend)
    assert torch.equal(got, 1 / 3 * y + 1e-17 * y)
    tiny = ops.multistep_update(y, 5e-324, [], [], backend=backend)
    assert torch.equal(tiny, torch.full_like(y, 1.5e-323))


@pytest.mark.parametrize("target", TARGETS)
def test_a_coefficient_0_does_not_hide_what_is_not_finite(target):
    backend, device = target
    y = torch.zeros(1, 2, 3, 4, device=device)
    bad = y.clone()
    bad[0, 1, 2, 3] = float("inf")
    got = ops.multistep_update(y, 1.0, [bad], [0.0], backend=backend)
    assert got[0, 1, 2, 3].isnan() and got.isnan().sum() == 1


@pytest.mark.parametrize("target", TARGETS)
def test_one_tensor_in_every_place(target):
    backend, device = target
    y = Draw(device, 0, "y").normal(2, 4, 5, 3)
    got = ops.multistep_update(y, 1.0, [y, y, y, y], [2.0, 3.0, 4.0, -5.0], backend=backend)
    torch.testing.assert_close(got, 5 * y)


@pytest.mark.parametrize("target", TARGETS)
def test_the_result_has_the_dtype_and_the_dense_strides_of_y(target):
    backend, device = target
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for dtype, network_dtype in [(a, b) for a in dtypes for b in dtypes]:
        for layout in ("contiguous", "channels_last"):
            args = inputs(device, (2, 5, 3, 4), dtype, network_dtype, layout)
            out = ops.multistep_update(*args, backend=backend)
            assert (out.dtype, out.stride()) == (dtype, args[0].stride())
            assert out.data_ptr() not in {t.data_ptr() for t in (args[0], *args[2])}


@pytest.mark.parametrize("target", TARGETS)
def test_empty(target):
    backend, device = target
    for shape in ((0, 4, 3, 3), (2, 3, 0, 4), (2, 0, 3, 3), (0, 5)):
        out = ops.multistep_update(*inputs(device, shape), backend=backend)
        assert out.shape == shape


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


def prepared(target, args):
    from lsgm_fast.ops.multistep_update import _to_kernel

    return getattr(torch.ops.lsgm_fast, f"{NAME}_{target[0]}").default, _to_kernel(*args)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout):
    for dtype in (torch.float32, torch.bfloat16):
        call, args = prepared(target, inputs(target[1], (2, 5, 3, 4), dtype, torch.float32, layout))
        # No autograd: the dispatcher never hands over what needs a gradient.
        torch.library.opcheck(call, args, test_utils=("test_schema", "test_faketensor"))


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
    args = inputs(device, layout="channels_last")

    def step(y, history, by_sample, by_channel):
        return 2 * ops.multistep_update(y + 1, 0.9, history, [by_sample, by_channel * 3])

    with torch.no_grad(), use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        got = compiled(args[0], args[2], *args[3])
        torch.testing.assert_close(got, step(args[0], args[2], *args[3]))
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("target", TARGETS)
def test_the_compiled_graph_holds_the_kernel(target):
    backend, device = target
    args = inputs(device)
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda *a: ops.multistep_update(*a), fullgraph=True, backend=compiler)
    for choice in (backend, "reference"):
        with torch.no_grad(), use_backend(choice):
            torch.testing.assert_close(compiled(*args), reference(*args))
    assert f"{NAME}_{backend}" in graphs[0] and f"{NAME}_{backend}" not in graphs[1]


@pytest.mark.parametrize("target", TARGETS)
def test_autocast_and_inference_mode_change_nothing(target):
    backend, device = target
    for dtype in (torch.float32, torch.bfloat16):
        args = inputs(device, dtype=dtype)
        expected = ops.multistep_update(*args, backend=backend)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(ops.multistep_update(*args, backend=backend), expected)
        with torch.inference_mode():
            assert torch.equal(ops.multistep_update(*args, backend=backend), expected)
        assert expected.dtype == dtype


@pytest.mark.parametrize("target", TARGETS)
def test_fake_tensors_tell_shapes_and_strides(target):
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend, device = target
    args = inputs(device, (2, 5, 3, 4), torch.bfloat16, layout="channels_last")
    expected = ops.multistep_update(*args, backend=backend)
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        got = ops.multistep_update(*fake, backend=backend)
    assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


# -- threads and repeats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [t for t in TARGETS if t.id != "triton-cpu"])
def test_several_threads(target):
    backend, device = target
    args = inputs(device, (4, 20, 31, 33))
    expected = ops.multistep_update(*args, backend=backend)
    failures = []

    def work():
        try:
            for _ in range(20):
                assert torch.equal(ops.multistep_update(*args, backend=backend), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("target", [t for t in TARGETS if t.id == "cpu-cpu"])
def test_the_number_of_threads_does_not_matter(target):
    before = torch.get_num_threads()
    try:
        for shape, layout in (
            ((4, 60, 32, 32), "contiguous"),
            ((4, 60, 32, 32), "channels_last"),
            ((3000, 6, 3, 4), "contiguous"),
        ):
            args = inputs("cpu", shape, layout=layout)
            for call in (args, (args[0], 0.5, args[2], [2.0, -1.0])):
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(ops.multistep_update(*call, backend="cpu"))
                assert all(torch.equal(r, results[0]) for r in results)
    finally:
        torch.set_num_threads(before)


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_ran_is_recorded(target):
    backend, device = target
    args = inputs(device)
    with record() as log, use_backend(backend):
        out = ops.multistep_update(*args)
    assert log.counts == {(NAME, backend): 1}
    torch.testing.assert_close(out, reference(*args))


@pytest.mark.parametrize("target", [t for t in TARGETS if t.id == "cpu-cpu"])
def test_the_ancestral_sampler_uses_it(target):
    z1 = Draw("cpu", 0, "z").normal(2, 3, 4, 4)

    def sample():
        noise = Draw("cpu", 1, "noise")
        return sample_ancestral(
            lambda z, t: z * 0.1,
            z1,
            sde=build_sde(SDEConfig()),
            steps=6,
            noise_fn=lambda i: noise.normal(*z1.shape),
        ).z

    with record() as log:
        got = sample()
    assert log.counts[NAME, "cpu"] == 6
    with use_backend("reference"):
        torch.testing.assert_close(got, sample(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_where_a_gradient_is_wanted_the_reference_runs(target):
    backend, device = target
    y, c_y, history, coefficients = inputs(device)
    for position in range(4):
        leaf = [y, torch.tensor(c_y, device=device), history[1], coefficients[1]][position]
        leaf = leaf.clone().requires_grad_()
        args = (
            leaf if position == 0 else y,
            leaf if position == 1 else c_y,
            [history[0], leaf if position == 2 else history[1]],
            [coefficients[0], leaf if position == 3 else coefficients[1]],
        )
        with pytest.raises(BackendUnsupported, match="a gradient is wanted"):
            ops.multistep_update(*args, backend=backend)
        (grad,) = torch.autograd.grad(ops.multistep_update(*args).sum(), leaf)
        assert grad.isfinite().all() and grad.any()
        with torch.no_grad():
            ops.multistep_update(*args, backend=backend)


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    y, c_y, history, coefficients = inputs(device)
    a, b = history
    for args, message in (
        ((y, c_y, [a] * 5, [1.0] * 5), "5 history entries: at most 4"),
        (
            (y, c_y, [a, b.double()], [1.0, 1.0]),
            r"history\[0\] is torch.float32 and history\[1\] torch.float64",
        ),
        ((y.to(torch.complex64), c_y, history, coefficients), "y torch.complex64"),
        ((y, c_y, [a, b.int()], coefficients), r"history\[1\] torch.int32"),
        ((y, torch.tensor(2, device=device), [], []), "c_y torch.int64"),
        ((y[0, 0, 0], c_y, [], []), r"y has shape \(7,\)"),
        (
            (y, c_y, [a], [torch.ones(1, 1, 6, 7, device=device)]),
            r"coefficients\[0\] has shape \(1, 1, 6, 7\)",
        ),
        ((y, torch.ones_like(y), [], []), r"c_y has shape \(3, 5, 6, 7\)"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.multistep_update(*args, backend=backend)
        torch.testing.assert_close(ops.multistep_update(*args), reference(*args))
    with pytest.raises(BackendUnsupported, match=r"history\[0\] is on meta"):
        ops.multistep_update(y, c_y, [a.to("meta")], [1.0], backend=backend)
    with pytest.raises(BackendUnsupported, match="c_y is on meta"):
        ops.multistep_update(y, torch.ones((), device="meta"), [], [], backend=backend)
    # What the reference cannot run either.
    with pytest.raises(ValueError, match="expected a scalar or one value per sample"):
        ops.multistep_update(y, torch.ones(4, device=device), [], [])
    assert lsgm_fast.explain(NAME, y, c_y, history, coefficients, backend=backend).chosen == backend


@pytest.mark.parametrize("target", [t for t in TARGETS if "triton" not in t.id])
def test_the_operator_refuses_what_it_would_misread(target):
    call, (y, history, scales, factors, which) = prepared(target, inputs(target[1]))
    channels_last = history[1].contiguous(memory_format=torch.channels_last)
    for args, message in (
        ((y, [history[0], channels_last], scales, factors, which), r"history\[1\] has strides"),
        ((y[:, :, ::2], [h[:, :, ::2] for h in history], scales, factors, which), "expected contiguous"),
        ((y, [history[0], history[1][:2]], scales, factors, which), r"history\[1\] has shape"),
        ((y, [history[0], history[1].double()], scales, factors, which), r"history\[1\] has dtype"),
        ((y, history, scales[:2], factors, which), "expected one more"),
        ((y, history, scales, factors, which[:2]), "expected one more"),
        ((y, history, scales, factors[:1], which), r"which\[2\] is 1: there are 1 factors"),
        ((y, history, scales, [factors[0][:2], factors[1]], which), r"a factor has shape \(2\)"),
        ((y, history, scales, [factors[0], y[:1]], which), r"a factor has shape \(1, 5, 6, 7\)"),
        ((y, history, scales, [factors[0].half(), factors[1]], which), "a factor has shape .* Half"),
        ((y, [y] * 5, [1.0] * 6, [], [-1] * 6), "expected at most 4"),
        ((y[0, 0, 0], [], [1.0], [], [-1]), "expected .B, C"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args)
