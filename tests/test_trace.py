"""Ranges for profilers: what opens and closes when, and that nothing happens while they are off."""

from __future__ import annotations

import contextlib
import importlib.machinery
import re
import subprocess
import sys
import threading
import types
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import lsgm_fast
from lsgm_fast import env, ops, trace

PACKAGE = Path(lsgm_fast.__file__).parent
DOCS = PACKAGE.parent / "docs" / "profiling.md"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lsgm_fast.build("tiny-rgb")


@pytest.fixture(autouse=True)
def _off(monkeypatch):
    monkeypatch.setattr(trace, "active", False)
    monkeypatch.setattr(trace, "_domain", None)
    yield
    assert trace._local.open == []


class FakeNvtx(types.ModuleType):
    """Stands in for the package, with a tool attached: writes down what is pushed and popped."""

    class Domain:
        def __init__(self, log):
            self.log = log

        def get_event_attributes(self, message=None, color=None, category=None, payload=None):
            return (message, color, category, payload)

        def push_range(self, attributes):
            self.log.append(("push", *attributes))

        def pop_range(self):
            self.log.append(("pop",))

    def __init__(self):
        super().__init__("nvtx")
        self.__spec__ = importlib.machinery.ModuleSpec("nvtx", None)
        self.log = []
        self.domains = []

    def get_domain(self, name):
        self.domains.append(name)
        return self.Domain(self.log)


@pytest.fixture
def nvtx(monkeypatch):
    fake = FakeNvtx()
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    return fake


def network_inputs(model, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *model.latent_shape, generator=generator), torch.full((batch,), 0.5)


# -- off ------------------------------------------------------------------------------------------------------------


def test_off_asks_the_flag_and_does_nothing_else(model, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("called although ranges are off")

    for name in ("Span", "call", "_watched", "shape", "evaluation", "_host_number"):
        monkeypatch.setattr(trace, name, fail)
    model.sample(1, evaluations=2)
    model.sample(1, solver="rk45", tol=0.5)
    assert trace.span("solve") is trace.span("decode") is trace._NOTHING


def test_on_without_anybody_who_looks_makes_no_range(model, monkeypatch):
    monkeypatch.setattr(trace, "Span", None)
    with trace.enabled():
        model.sample(1, evaluations=2)


def test_ranges_change_no_number(model):
    plain = model.sample(2, seed=3, evaluations=3)
    with trace.written() as found:
        traced = model.sample(2, seed=3, evaluations=3)
    assert found
    assert torch.equal(plain, traced)


def test_the_environment_variable_switches_them_on():
    assert not env.trace_enabled({})
    assert env.trace_enabled({"LSGM_FAST_TRACE": "1"})
    with pytest.raises(ValueError, match="LSGM_FAST_TRACE='yes': expected 0 or 1"):
        env.trace_enabled({"LSGM_FAST_TRACE": "yes"})
    code = "from lsgm_fast import trace; print(trace.active)"
    environment = {"PYTHONPATH": str(PACKAGE.parent), "LSGM_FAST_TRACE": "1", "PATH": "/usr/bin"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "True"


def test_enabled_leaves_them_as_they_were():
    with trace.enabled():
        with trace.enabled():
            pass
        assert trace.active
    assert not trace.active


# -- which ranges ---------------------------------------------------------------------------------------------------

SOLVERS = {
    "exponential, budget": {"evaluations": 3},
    "exponential, tolerance": {"solver": "exponential", "tol": 0.1},
    "exponential per sample": {"solver": "exponential", "tol": 0.1, "control": "per_sample"},
    "two stages": {"solver": "dpmpp_2s", "evaluations": 4},
    "rk45": {"solver": "rk45", "tol": 0.1},
    "rk45 per sample": {"solver": "rk45", "tol": 0.1, "control": "per_sample"},
    "heun": {"solver": "heun", "evaluations": 4},
    "ancestral": {"solver": "ancestral", "evaluations": 3},
    "euler_maruyama": {"solver": "euler_maruyama", "evaluations": 3},
    "predictor_corrector": {"solver": "predictor_corrector", "evaluations": 4},
    "adaptive_sde": {"solver": "adaptive_sde", "tol": 0.5},
}


@pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS)
def test_every_step_and_evaluation_has_a_range(model, options):
    with trace.written() as found:
        _, info = model.sample_latents(1, **options)
    steps = [payload for name, payload in found if name == "step"]
    assert len(steps) == info.steps + info.rejected
    assert steps[0]["t"] == 1.0
    assert all(0.0 < later["t"] <= earlier["t"] for earlier, later in pairwise(steps))
    evaluations = [payload for name, payload in found if name == "evaluation"]
    assert [payload["number"] for payload in evaluations] == list(range(1, info.nfe + 1))
    assert all(0.0 <= payload["t"] <= 1.0 for payload in evaluations)
    assert [name for name, _ in found].count("solve") == 1


def test_stages_blocks_and_operations(model):
    with trace.written() as found, lsgm_fast.record() as log:
        model.sample(2, batch_size=1, evaluations=2)
        model.encode(torch.zeros(1, 3, 32, 32))
    names = Counter(name for name, _ in found)
    assert names["sample"] == 1
    assert names["solve"] == names["decode"] == 2
    assert names["evaluation"] == names["score_network"] == 4
    blocks = [m for m in model.prior.modules() if type(m).__name__ == "ResBlock"]
    assert names["res_block"] == 4 * len(blocks)
    assert names["attention"] > 0
    assert names["encode"] == 1
    assert names["cell"] > 0
    operations = {f"{op}.{backend}": count for (op, backend), count in log.counts.items()}
    assert operations == {name: count for name, count in names.items() if "." in name}
    shapes = {tuple(payload["shape"]) for name, payload in found if name == "score_network"}
    assert shapes == {(1, *model.latent_shape)}


def test_a_network_of_the_users_own_has_evaluations(model):
    class Network(torch.nn.Module):
        def forward(self, z, t):
            return 0.1 * z

    own = lsgm_fast.LSGM(model.vae, Network(), model.sde)
    with trace.written() as found:
        own.sample_latents(1, evaluations=2)
    assert Counter(name for name, _ in found)["evaluation"] == 2


def test_no_step_without_a_range_that_would_end_it():
    with trace.written() as found:
        trace.step(1, 0.5)
    assert found == []


def test_the_number_of_a_step_under_way_begins_none():
    with trace.written() as found, trace.span("solve"):
        for number in (0, 0, 1):
            trace.step(number, torch.tensor([0.25], dtype=torch.float64))
    assert found == [("solve", {}), ("step", {"number": 0, "t": 0.25}), ("step", {"number": 1, "t": 0.25})]


def test_a_time_on_another_device_is_not_read():
    with trace.written() as found, trace.span("solve"):
        trace.step(3, torch.empty((), device="meta"))
    assert found[1] == ("step", {"number": 3})


# -- NVTX -----------------------------------------------------------------------------------------------------------


def test_nvtx_ranges_nest_and_carry_category_colour_and_payload(model, nvtx):
    with trace.enabled():
        model.sample(1, evaluations=2)
    assert nvtx.domains == ["lsgm_fast"]
    parents, stack = {}, []
    for kind, *attributes in nvtx.log:
        if kind == "pop":
            stack.pop()
            continue
        message, color, category, payload = attributes
        parents.setdefault(message, set()).add(stack[-1] if stack else None)
        stack.append(message)
        expected = trace.RANGES.get(message, trace.OPERATION)
        assert (category, color) == (expected.category, trace.CATEGORIES[expected.category])
        assert (payload is None) == (expected.payload == ())
    assert stack == []
    assert parents["sample"] == {None}
    assert parents["solve"] == parents["decode"] == {"sample"}
    assert parents["step"] == {"solve"}
    assert parents["evaluation"] == {"step"}
    assert parents["score_network"] == {"evaluation"}
    assert parents["res_block"] == {"score_network"}
    assert ("push", "evaluation", trace.CATEGORIES["network"], "network", (1, 1.0)) in nvtx.log


def test_an_exception_closes_what_is_open(nvtx):
    @trace.spanned("solve")
    def solve():
        trace.step(0, 1.0)
        with trace.span("evaluation", 1):
            raise RuntimeError("no")

    with trace.enabled(), trace.span("sample"):
        with contextlib.suppress(RuntimeError):
            solve()
        assert [span.name for span in trace._local.open] == ["sample"]
    kinds = Counter(kind for kind, *_ in nvtx.log)
    assert kinds["push"] == kinds["pop"] == 4


def test_one_number_is_no_array(nvtx):
    with trace.enabled(), trace.span("evaluation", 7):
        pass
    assert nvtx.log[0][-1] == 7


def test_a_range_that_is_open_when_they_are_switched_off_is_closed(nvtx):
    trace.enable()
    with trace.span("solve"):
        trace.disable()
    assert [kind for kind, *_ in nvtx.log] == ["push", "pop"]


def test_without_a_tool_nothing_is_pushed(nvtx):
    nvtx.get_domain = lambda name: object()  # the package's stand-in is no Domain
    with trace.enabled():
        assert trace.span("solve") is trace._NOTHING


def test_without_the_package(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with trace.written() as found:
        model.sample_latents(1, evaluations=2)
    assert found


def test_every_thread_has_ranges_of_its_own(nvtx):
    open_inside = []
    with trace.enabled(), trace.span("sample"):
        thread = threading.Thread(target=lambda: open_inside.append(list(trace._local.open)))
        thread.start()
        thread.join()
    assert open_inside == [[]]


# -- compiled -------------------------------------------------------------------------------------------------------


def test_a_compiled_network_has_no_ranges_inside_and_is_not_compiled_again(model):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.prior, fullgraph=True, backend=backend)
    z, t = network_inputs(model)
    with torch.no_grad():
        plain = compiled(z, t)
        with trace.written() as found:
            traced = compiled(z, t)
        assert torch.equal(plain, model.prior(z, t))
    assert torch.equal(plain, traced)
    assert found == []
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_compiling_while_they_are_on(model):
    torch._dynamo.reset()
    z, t = network_inputs(model)
    with trace.written() as found, torch.no_grad():
        compiled = torch.compile(model.prior, fullgraph=True, backend="eager")
        out = compiled(z, t)
    assert found == []
    with torch.no_grad():
        assert torch.equal(out, model.prior(z, t))
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_capture_of_a_cuda_graph_is_not_disturbed():
    x = torch.randn(2, 8, 4, 4, device="cuda")
    with trace.enabled(), torch.profiler.profile():
        ops.residual_add(x, x, 0.5)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), trace.span("evaluation", 1):
            out = ops.residual_add(x, x, 0.5)
        graph.replay()
    torch.testing.assert_close(out, ops.residual_add(x, x, 0.5))


# -- names ----------------------------------------------------------------------------------------------------------


def test_the_sources_use_every_range_and_no_other():
    used = set()
    for path in PACKAGE.rglob("*.py"):
        used |= set(re.findall(r"trace\.span(?:ned)?\(\s*\"(\w+)\"", path.read_text()))
    # trace.step() makes the ranges called step.
    assert used | {"step"} == set(trace.RANGES)
    assert {kind.category for kind in (*trace.RANGES.values(), trace.OPERATION)} == set(trace.CATEGORIES)


@pytest.mark.skipif(not DOCS.is_file(), reason="not a source tree")
def test_the_documentation_has_the_ranges_of_the_code():
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| `") else []
        if len(cells) == 5:
            rows[cells[0].strip("`")] = tuple(cells[1:])
    expected = {
        name: (
            kind.category,
            f"#{trace.CATEGORIES[kind.category] & 0xFFFFFF:06X}",
            ", ".join(kind.payload),
            kind.inside,
        )
        for name, kind in (*trace.RANGES.items(), ("<operation>.<backend>", trace.OPERATION))
    }
    assert rows == expected
