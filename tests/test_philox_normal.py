"""``philox_normal`` on every backend that runs here. The generator itself is tested in test_random.py."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import threading

import kernel_targets
import pytest
import torch

import lsgm_fast
from lsgm_fast import fused, ops, random, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.reference.philox_normal import philox_normal as reference
from lsgm_fast.reference.philox_normal import philox_words, stream_word
from lsgm_fast.testing import check_forward

NAME = "philox_normal"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def normals(target, seed=1, indices=(0, 1, 2), stream="z", shape=(3, 7), dtype=torch.float32, **options):
    backend, device = target
    return ops.philox_normal(seed, list(indices), stream, shape, dtype, device, backend=backend, **options)


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target):
    backend, device = target
    ran = 0
    with testing.poison_uninitialized():
        for sample in samples_on(device):
            if target == ("triton", "cpu") and len(sample.args[1]) * math.prod(sample.args[3]) > 20_000:
                continue
            assert testing.unsupported(NAME, backend, sample) == []
            check_forward(NAME, backend, sample)
            ran += 1
    assert ran > 40


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


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("substream", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("target", FUSED)
def test_the_words_are_those_of_the_reference(target, seed, substream):
    """In float64 a normal tells its uniforms to the last bit: one wrong bit of a word moves it by 1e-7 or more."""
    for stream in ("z", 0, 2**31, 2**32 - 1):
        indices = (0, 2**31, 2**32 - 1)
        call = {"seed": seed, "indices": indices, "stream": stream, "shape": (130,), "substream": substream}
        got = normals(target, dtype=torch.float64, **call).cpu()
        exact = normals(("reference", "cpu"), dtype=torch.float64, **call)
        torch.testing.assert_close(got, exact, rtol=1e-14, atol=1e-14)


def _words_rounded_at_a_tie():
    """(sample, element) of words that lie in the middle between two float32 numbers, above and below an even one."""
    words = philox_words(1, range(64), "z", 4096)
    for tie in (0x080, 0x180):
        for position in (0, 1):
            at = ((words[..., position] & 0x1FF) == tie) & (words[..., position] >= 2**31)
            sample, block = (int(i) for i in at.nonzero()[0])
            yield sample, 4 * block


@pytest.mark.parametrize("target", FUSED)
def test_words_at_a_tie_become_the_reference_s_uniforms(target):
    for sample, element in _words_rounded_at_a_tie():
        call = {"indices": (sample,), "shape": (element + 2,), "dtype": torch.float64}
        if target == ("triton", "cpu") and element > 2000:
            continue
        got = normals(target, **call).cpu()[0, element:]
        expected = normals(("reference", "cpu"), **call)[0, element:]
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def _ulps(got, exact, radius):
    return ((got.double() - exact).abs() / (radius * 2.0**-24)).max().item()


@pytest.mark.parametrize("target", FUSED)
def test_float32_is_accurate_to_a_few_roundings(target):
    """Of the radius, not of the result: close to the zeros of sine and cosine too the relative error is small."""
    shape = (4, 16, 16) if target == ("triton", "cpu") else (40, 64, 64)
    got = normals(target, shape=shape).cpu().flatten(1)
    exact = normals(("reference", "cpu"), shape=shape, dtype=torch.float64).flatten(1)
    pairs = exact.view(3, -1, 2)
    radius = pairs.norm(dim=-1, keepdim=True).expand(pairs.shape).reshape(exact.shape)
    assert _ulps(got, exact, radius) < 5
    assert (((got - exact) / exact).abs()[exact.abs() > 1e-5]).max() < 6 * 2.0**-23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "target", [t for t in FUSED if t.id != "triton-cpu"]
)  # its interpreter truncates bfloat16
def test_half_dtypes_are_rounded_from_float32(target, dtype):
    for shape in ((5, 16, 16), (3, 5, 7)):
        assert torch.equal(normals(target, shape=shape, dtype=dtype), normals(target, shape=shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_request_may_be_split_and_reordered(target, dtype):
    whole = normals(target, indices=range(7), shape=(3, 21), dtype=dtype)
    parts = [
        normals(target, indices=part, shape=(3, 21), dtype=dtype) for part in ((0,), (1, 2, 3), (4, 5, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(normals(target, indices=(6, 2), shape=(3, 21), dtype=dtype), whole[[6, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", FUSED)
def test_elements_do_not_depend_on_how_many_follow(target, dtype):
    whole = normals(target, shape=(1030,), dtype=dtype)
    for elements in (1, 2, 3, 5, 8, 31, 33, 64, 1000, 1029):
        assert torch.equal(normals(target, shape=(elements,), dtype=dtype), whole[:, :elements]), elements


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_dtypes_and_empty_results(target):
    for dtype in DTYPES:
        for indices, shape in (((), (3, 2)), ((1, 2), (3, 0)), ((1, 2), ()), ((5,), (2, 3, 4))):
            out = normals(target, indices=indices, shape=shape, dtype=dtype)
            assert (out.shape, out.dtype) == ((len(indices), *shape), dtype)
            assert out.is_contiguous() and out.device.type == target[1]


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
def test_opcheck(target):
    backend, device = target
    op = getattr(torch.ops.lsgm_fast, f"philox_normal_{backend}").default
    indices = torch.tensor([3, 2**32 - 1], device=device)
    for dtype in DTYPES:
        for shape in ([3, 5], [8], [0], []):
            torch.library.opcheck(op, (indices, 1, 2, 3, 4, shape, dtype))


@pytest.mark.parametrize("target", [t for t in FUSED if "triton" not in t.id])
def test_the_operator_refuses_what_it_would_misread(target):
    backend, device = target
    op = getattr(torch.ops.lsgm_fast, f"philox_normal_{backend}").default
    indices = torch.tensor([3, 4], device=device)
    with pytest.raises(RuntimeError, match="int64"):
        op(indices.int(), 1, 2, 3, 4, [5], torch.float32)
    with pytest.raises(RuntimeError, match=r"key1 must be from 0 to 2\*\*32 - 1, got -2"):
        op(indices, 1, -2, 3, 4, [5], torch.float32)
    with pytest.raises(RuntimeError, match="at most"):
        op(indices[:0], 1, 2, 3, 4, [2**34 + 1], torch.float32)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="sample_indices must be from 0"):
            op(torch.tensor([0, -1]), 1, 2, 3, 4, [5], torch.float32)


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
    dtype = torch.float32 if backend == "triton" else torch.float64

    def step(indices, x):
        return x + random.normal(2**64 - 1, indices, "ode.noise", (3, 5), dtype=dtype, device=device)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    x = torch.ones(2, 3, 5, dtype=dtype, device=device)
    with use_backend(backend):
        # Of a list, a constant, Inductor inlines the reference's ten rounds again and again: that takes it long.
        lists = [[4, 5]] if (backend, compiler) != ("reference", "inductor") else []
        for indices in (*lists, torch.tensor([6, 2**32 - 1])):
            torch.testing.assert_close(compiled(indices, x), step(indices, x))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("target", FUSED)
def test_other_seeds_and_steps_are_not_compiled_anew(target):
    backend, device = target
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(seed, substream):
        return ops.philox_normal(seed, [1, 2], "z", (5,), torch.float64, device, substream, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for seed in (3, 4, 2**40, 2**62):
        for substream in (2, 3, 4, 2**32 - 1):
            assert torch.equal(compiled(seed, substream), step(seed, substream))
    assert len(graphs) <= 4


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_cannot_use_an_index_out_of_range():
    if fused.unavailable("cpu", "cpu"):
        pytest.skip("there is no CPU library")
    compiled = torch.compile(
        lambda i: ops.philox_normal(0, i, "z", (5,), backend="cpu"), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match=r"sample_indices must be from 0 to 2\*\*32 - 1, got 4294967296"):
        compiled(torch.tensor([1, 2**32]))


@pytest.mark.parametrize("target", TARGETS)
def test_neither_autocast_nor_inference_mode_changes_anything(target):
    expected = normals(target)
    with torch.autocast(target[1], torch.bfloat16):
        assert torch.equal(normals(target), expected)
    with torch.inference_mode():
        assert torch.equal(normals(target), expected)


@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes(target):
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend, device = target
    with FakeTensorMode():
        indices = torch.zeros(2, dtype=torch.int64, device=device)
        out = ops.philox_normal(1, indices, "z", (3, 4), torch.bfloat16, device, backend=backend)
    assert (out.shape, out.dtype, out.stride()) == ((2, 3, 4), torch.bfloat16, (12, 4, 1))
    assert out.device.type == device


# -- threads, processes, repeats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [t for t in TARGETS if t.id in ("cpu-cpu", "reference-cpu")])
def test_the_number_of_threads_does_not_matter(target, dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(normals(target, shape=(40, 33, 31), dtype=dtype))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.id != "triton-cpu"]
)  # its interpreter has global state
def test_several_threads(target):
    expected = normals(target, shape=(31, 33))
    failures = []

    def work():
        try:
            for _ in range(20):
                assert torch.equal(normals(target, shape=(31, 33)), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _child(target, queue):
    torch.set_num_threads(1)
    try:
        queue.put(normals(target).tolist())
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("target", [t for t in TARGETS if t.id == "cpu-cpu"])
def test_a_forked_process(target):
    expected = normals(
        target
    ).tolist()  # used before the fork, so that whatever the parent has set up is inherited
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_child, args=(target, queue))
    process.start()
    process.join(60)
    hung = process.is_alive()
    if hung:
        process.kill()
    assert not hung and process.exitcode == 0
    assert queue.get() == expected


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_ran_is_recorded_and_can_be_bound(target):
    backend, device = target
    args = (5, [1, 2], "z", (3, 4), torch.float32, device)
    with record() as log, use_backend(backend):
        out = ops.philox_normal(*args)
        drawn = random.normal(5, range(1, 3), "z", (3, 4), device=device)
    assert log.counts == {(NAME, backend): 2}
    assert torch.equal(drawn, out)
    assert lsgm_fast.explain(NAME, *args, backend=backend).chosen == backend
    assert torch.equal(ops.philox_normal.resolve(*args, backend=backend)(*args), out)


def test_it_runs_on_the_device_that_is_asked_for_not_on_that_of_the_indices():
    decision = lsgm_fast.explain(NAME, 5, torch.tensor([1, 2]), "z", (3, 4), device="cuda")
    reasons = dict(decision.candidates)
    assert reasons["cpu"] == ("runs on CPU tensors, these are on cuda",)
    assert not any("CUDA tensors" in reason for reason in reasons["cuda"] + reasons["triton"])
    indices = torch.tensor([1, 2], device="meta")
    assert lsgm_fast.explain(NAME, 5, indices, "z", (3, 4), torch.float32, "cpu").op == NAME


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_indices_from_anywhere(backend):
    expected = reference(5, [1, 2], "z", (40,), torch.float64)
    for indices in ([1, 2], torch.tensor([1, 2]), torch.tensor([1, 2], device="cuda")):
        got = ops.philox_normal(5, indices, "z", (40,), torch.float64, "cuda", backend=backend)
        assert got.device.type == "cuda"
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed must be an integer from 0 to 2\*\*64 - 1, got -1"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"sample_indices": [-1]}, r"sample_indices must be from 0 to 2\*\*32 - 1, got -1 to -1"),
        ({"sample_indices": torch.tensor([0, 2**32])}, "got 0 to 4294967296"),
        ({"sample_indices": torch.zeros(2)}, "sample_indices must be integers"),
        ({"sample_indices": torch.zeros(2, 2, dtype=torch.int64)}, r"one-dimensional, got shape \(2, 2\)"),
        ({"stream": 2**32}, "stream must be an integer from 0"),
        ({"substream": -1}, "substream must be an integer from 0"),
        ({"shape": (2, -1)}, r"negative sizes, got \(2, -1\)"),
        ({"shape": (2**20, 2**15)}, r"at most 2\*\*34 values per sample and stream, got 34359738368"),
        ({"dtype": torch.int64}, r"dtype must be a floating-point type, got torch\.int64"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_bad_arguments_give_the_same_errors_everywhere(target, change, message):
    backend, device = target
    call = {"seed": 0, "sample_indices": [1], "stream": "z", "shape": (3,), "dtype": torch.float32, **change}
    with pytest.raises(ValueError, match=message):
        ops.philox_normal(**call, device=device, backend=backend)


@pytest.mark.parametrize("target", FUSED)
def test_other_dtypes_are_the_reference_s(target):
    backend, device = target
    args = (0, [1], "z", (3,), torch.float8_e5m2, device)
    with pytest.raises(BackendUnsupported, match="float8_e5m2: float32, float64, bfloat16 and float16"):
        ops.philox_normal(*args, backend=backend)
    assert ops.philox_normal(*args).dtype == torch.float8_e5m2


def test_a_name_is_its_word_on_every_backend():
    for target in ("reference", "cpu"):
        if target == "cpu" and fused.unavailable("cpu", "cpu"):
            continue
        by_word = normals((target, "cpu"), stream=stream_word("ode.noise"))
        assert torch.equal(normals((target, "cpu"), stream="ode.noise"), by_word)
