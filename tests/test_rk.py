"""The Runge-Kutta operations on the compiled CPU backend, and the step control against SciPy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import torch

import lsgm_fast
from lsgm_fast import fused, ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.ops import rk
from lsgm_fast.reference import rk as reference
from lsgm_fast.sampling import tableaus
from lsgm_fast.testing import Draw

OPS = ("rk_stage", "rk_finish", "rk_drift_stage", "rk_drift_finish", "rk_control")
DRIFT = ("rk_drift_stage", "rk_drift_finish")
TABLEAUS = (tableaus.RK45, tableaus.RK23, tableaus.HEUN)
SHAPE = (3, 5, 6, 7)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# The fused kernels are tested where they were compiled; the step control and the checks everywhere.
MISSING = fused.unavailable("cpu", "cpu")
needs_cpu = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]


def sample(op, shape=SHAPE, dtype=F64, network_dtype=None):
    network_dtype = network_dtype or (F32 if op in DRIFT else dtype)
    return testing.describe_samples(op).at(shape, dtype, network_dtype)


def own(args):
    """The arguments with copies of the tensors, for operations that write to them."""
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)


def run(op, args, backend, **kwargs):
    """Everything that a call gives: what it returns and what is in its tensors afterwards."""
    args = own(args)
    returned = getattr(ops, op)(*args, backend=backend, **kwargs)
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [t for t in (*returned, *args) if isinstance(t, torch.Tensor)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- numbers --------------------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_every_sample(op):
    ran = 0
    with testing.poison_uninitialized():
        for call in testing.samples(op):
            why = testing.unsupported(op, "cpu", call)
            if why:
                # One dtype for the state and the stages: the solvers keep them so.
                assert len(why) == 1 and "one dtype is supported" in why[0], (call.id, why)
                with pytest.raises(BackendUnsupported, match="one dtype is supported"):
                    getattr(ops, op)(*call.args, **call.kwargs, backend="cpu")
                continue
            testing.check_forward(op, "cpu", call)
            ran += 1
    assert ran >= (27 if op == "rk_control" else 45)


def step_in_numpy(tableau, drift, z, h, rtol, atol, per_sample):
    """One step of the method in float64, from the definition."""
    stages = []
    for row in tableau.a:
        stages.append(drift(z + h * sum((a * k for a, k in zip(row, stages)), np.zeros_like(z))))  # noqa: B905
    solution = z + h * sum(b * k for b, k in zip(tableau.b, stages))  # noqa: B905
    error = h * sum(e * k for e, k in zip(tableau.e, stages))  # noqa: B905
    ratio = (error / (atol + rtol * np.maximum(abs(z), abs(solution)))) ** 2
    axes = tuple(range(1, z.ndim)) if per_sample else None
    return solution, np.stack(stages), np.sqrt(ratio.mean(axis=axes))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda t: t.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_from_stages_equals_the_definition(backend, tableau, per_sample):
    draw = Draw(label=tableau.name)
    y = draw.normal(*SHAPE, dtype=F64)
    h = 0.3
    z, stages, norm = step_in_numpy(tableau, np.sin, y.numpy(), h, 1e-3, 1e-4, per_sample)
    k = torch.full((tableau.stages, *SHAPE), torch.nan, dtype=F64)
    for i, row in enumerate(tableau.a):
        state = y if i == 0 else ops.rk_stage(y, k, row, h, backend=backend)
        k[i] = torch.sin(state)
    np.testing.assert_allclose(k.numpy(), stages, rtol=0, atol=1e-14)
    got, got_norm = ops.rk_finish(y, k, tableau.b, tableau.e, h, 1e-3, 1e-4, per_sample, backend=backend)
    np.testing.assert_allclose(got.numpy(), z, rtol=0, atol=1e-14)
    np.testing.assert_allclose(got_norm.numpy(), norm, rtol=1e-9)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda t: t.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_in_place_equals_the_definition(backend, tableau, per_sample):
    """A whole step of the ODE with eps = cos(z), by the two operations that also evaluate the drift."""
    draw = Draw(label=tableau.name)
    y, logit = draw.normal(*SHAPE, dtype=F64), draw.normal(1, 5, 1, 1)
    p, q, r, h = (draw.uniform(SHAPE[0], low=0.1, high=0.9, dtype=F64) for _ in range(4))
    wide = [t.numpy().reshape(-1, 1, 1, 1) for t in (p, q, r, h)]
    alpha = 1 / (1 + np.exp(-logit.double().numpy()))

    def drift(z):
        return wide[0] * z + alpha * wide[1] * (np.cos(z) - wide[2] * z)

    expected = step_in_numpy(tableau, drift, y.numpy(), wide[3], 1e-3, 1e-4, per_sample)
    z, k = y.clone(), torch.full((tableau.stages, *SHAPE), torch.nan, dtype=F64)
    last = tableau.stages - 1
    for i in range(last):
        call = (torch.cos(z), z, logit, p, q, r, y, k, i, tableau.a[i + 1], h)
        assert ops.rk_drift_stage(*call, backend=backend) is None
    end = (torch.cos(z), z, logit, p, q, r, y, k, last, tableau.b, tableau.e, h, 1e-3, 1e-4, per_sample)
    norm = ops.rk_drift_finish(*end, backend=backend)
    for got, true in zip((z, k), expected, strict=False):
        np.testing.assert_allclose(got.numpy(), true, rtol=0, atol=1e-14)
    np.testing.assert_allclose(
        norm.numpy(), expected[2], rtol=1e-9
    )  # the error cancels to 1e-8 of the stages


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["y", "stage"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_norm_tells_of_a_state_that_is_not_finite(backend, bad, where):
    for at in (0, 100, 209, 210):
        y, k, *rest = sample("rk_finish", (1, 1, 1, 211)).args
        target = y if where == "y" else k[3]
        target[0, 0, 0, at] = bad
        y_new, norm = ops.rk_finish(y, k, *rest, backend=backend)
        assert y_new.isfinite().sum() == 210
        # An infinite state has an infinite tolerance.
        assert norm.isnan() if where == "stage" or math.isnan(bad) else norm.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 3, 0, 4)])
def test_an_empty_state_has_no_error(backend, shape):
    for per_sample in (False, True):
        args = sample("rk_finish", shape).args
        y_new, norm = ops.rk_finish(*args, per_sample, backend=backend)
        assert y_new.shape == shape
        assert norm.tolist() == ([0.0] * shape[0] if per_sample else 0.0)
        norm = ops.rk_drift_finish(*sample("rk_drift_finish", shape).args, per_sample, backend=backend)
        assert norm.tolist() == ([0.0] * shape[0] if per_sample else 0.0)
    ops.rk_drift_stage(*sample("rk_drift_stage", shape).args, backend=backend)
    assert ops.rk_stage(*sample("rk_stage", shape).args, backend=backend).shape == shape


@needs_cpu
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_results_have_the_state_s_dtype_and_the_norm_that_of_the_arithmetic(dtype):
    y_new, norm = ops.rk_finish(*sample("rk_finish", dtype=dtype).args, backend="cpu")
    assert y_new.dtype == dtype and y_new.is_contiguous()
    assert norm.dtype == (F64 if dtype == F64 else F32) and norm.shape == ()
    assert ops.rk_stage(*sample("rk_stage", dtype=dtype).args, backend="cpu").dtype == dtype


# -- step control ---------------------------------------------------------------------------------------------------


def scipy_control(state, norm, t_end, exponent, safety, min_factor, max_factor):
    """SciPy's ``RungeKutta._step_impl`` after the norm is known, and the choice of the next attempt before it."""
    t, h, t_next, retried, accepted, rejected = state
    direction = math.copysign(1.0, h)
    h_abs = abs(h)
    if norm < 1:
        factor = max_factor if norm == 0 else min(max_factor, safety * norm**exponent)
        h_abs *= min(1.0, factor) if retried else factor
        t, retried, accepted = t_next, False, accepted + 1
        h_abs = max(h_abs, 10 * abs(np.nextafter(t, direction * np.inf) - t))
    else:
        h_abs *= max(min_factor, safety * norm**exponent)
        retried, rejected = True, rejected + 1
    t_next = t + h_abs * direction
    if direction * (t_next - t_end) > 0:
        t_next = t_end
    return t, t_next - t, t_next, retried, accepted, rejected


@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda t: t.name)
@pytest.mark.parametrize(("t_start", "t_end"), [(1.0, 1e-5), (1e-3, 1.0), (-0.4, 0.6), (0.5, -0.5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_control_decides_as_scipy_does(backend, t_start, t_end, tableau):
    exponent = -1 / (tableau.error_order + 1)
    rng = np.random.default_rng(int(1000 * abs(t_start)) + tableau.stages)
    h = 0.01 * math.copysign(1.0, t_end - t_start)
    state = (t_start, h, t_start + h, False, 0, 0)
    control = torch.tensor([t_start, h, t_start + h, 0, t_start, 0, 0, 0], dtype=F64)
    retries = 0
    for _ in range(500):
        # As of a problem whose best step is about 0.02, with much noise.
        norms = [0.0, 1.0, (abs(state[1]) / 0.02) ** (-1 / exponent) * rng.lognormal(0, 1)]
        norm = float(rng.choice(norms, p=[0.02, 0.02, 0.96]))
        retries += state[3]
        state = scipy_control(state, norm, t_end, exponent, 0.9, 0.2, 10.0)
        control = ops.rk_control(control, torch.tensor(norm, dtype=F64), t_end, exponent, backend=backend)
        # The power may differ by its last bit between libraries, and sizes multiply.
        np.testing.assert_allclose(control[:3].tolist(), state[:3], rtol=1e-12, atol=1e-14)
        assert control[3:7].tolist() == [state[3], control[0], state[4], state[5]] and control[7] == norm
        if state[1] == 0:
            break
    assert control[0] == control[2] == t_end and control[1] == 0  # arrived exactly
    assert retries > 3 and state[4] > 3
    # A block that has arrived stays, whatever norm comes.
    after = ops.rk_control(control, torch.tensor(5.0, dtype=F64), t_end, exponent, backend=backend)
    assert torch.equal(after, control)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_integration_takes_scipy_s_steps(backend):
    """Van der Pol's oscillator, whose jumps reject steps: the same times as scipy's RK45."""

    def f(t, y):
        return np.stack([y[..., 1], 5 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], axis=-1)

    y0 = np.array([2.0, 0.0])
    solver = scipy.integrate.RK45(f, 0.0, y0, 12.0, rtol=1e-4, atol=1e-6, first_step=0.3)
    times = [0.0]
    while solver.status == "running":
        solver.step()
        times.append(solver.t)

    tableau = tableaus.RK45
    control = torch.tensor([0.0, 0.3, 0.3, 0, 0, 0, 0, 0], dtype=F64)
    y = torch.from_numpy(y0)[None].clone()
    found = [0.0]
    while control[1] != 0:
        k = torch.empty((tableau.stages, *y.shape), dtype=F64)
        for i, row in enumerate(tableau.a):
            state = y if i == 0 else ops.rk_stage(y, k, row, control[1], backend=backend)
            k[i] = torch.from_numpy(f(float(control[0] + tableau.c[i] * control[1]), state.numpy()))
        y_new, norm = ops.rk_finish(y, k, tableau.b, tableau.e, control[1], 1e-4, 1e-6, backend=backend)
        after = ops.rk_control(control, norm, 12.0, backend=backend)
        if after[5] > control[5]:
            y = y_new
            found.append(float(after[0]))
        control = after
    assert control[6] > 10 and len(times) > 50
    np.testing.assert_allclose(found, times, rtol=1e-8)
    np.testing.assert_allclose(y[0].numpy(), solver.y, rtol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_signal_tells_what_a_host_must_know(backend):
    def signal(norm, h=-0.1, t=0.5):
        block = torch.tensor([t, h, t + h, 0, t, 0, 0, 0], dtype=F64)
        return ops.rk_control(block, torch.tensor(norm, dtype=F64), 1e-3, backend=backend)[4].item()

    assert signal(0.3) == 0.4 and signal(3.0) == 0.5
    assert math.isnan(signal(math.nan)) and math.isnan(signal(math.inf))
    assert signal(1e9, h=-1e-15) == math.inf


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    kernel = getattr(torch.ops.lsgm_fast, f"{op}_cpu").default
    prepare = {
        "rk_stage": rk._stage_to_kernel,
        "rk_finish": rk._finish_to_kernel,
        "rk_drift_stage": rk._drift_to_kernel,
        "rk_drift_finish": rk._drift_finish_to_kernel,
        "rk_control": lambda control, norm, t_end: (control, norm, t_end, -0.2, 0.9, 0.2, 10.0),
    }[op]
    for dtype in (F64, F32):
        args = prepare(*own(sample(op, (2, 5, 3, 4), dtype).args))
        torch.library.opcheck(kernel, args)
        if op.endswith("finish"):
            torch.library.opcheck(kernel, (*args[:-1], True), test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def all_five(eps, z, logit, p, q, r, y, k, control):
    """A step of Heun's method after one with the stages at hand, all in one graph."""
    h = control[1]
    start = ops.rk_stage(y + 1, k, (0.5, 0.25), h)
    y_new, norm = ops.rk_finish(start, k, (0.5, 0.5), (-0.5, 0.5), h, 1e-3, 1e-3)
    control = ops.rk_control(control, norm, 1e-3)
    ops.rk_drift_stage(eps, z, logit, p, q, r, y_new, k, 0, (1.0,), control[1])
    middle = 2 * z
    norm = ops.rk_drift_finish(
        eps, z, logit, p, q, r, y_new, k, 1, (0.5, 0.5), (-0.5, 0.5), control[1], 1e-3, 1e-3, True
    )
    return middle, norm, control, k + 1


@needs_cpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_without_graph_breaks(compiler):
    eps, z, logit, p, q, r, y, k, *_ = sample("rk_drift_finish").args
    control = torch.tensor([0.5, -0.1, 0.4, 0, 0.5, 0, 0, 0], dtype=F64)
    args = (eps, z, logit, p, q, r, y, k[:2].contiguous(), control)
    graphs = []

    def compile_graph(graph, inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    compiled = torch.compile(all_five, fullgraph=True, backend=compile_graph)
    with use_backend("cpu"), torch.no_grad():
        ours, theirs = own(args), own(args)
        expected = all_five(*theirs)
        got = compiled(*ours)
    assert len(graphs) == 1 and all(f"lsgm_fast.{op}_cpu" in graphs[0] for op in OPS)
    for a, b in zip((*got, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours[1], args[1]) and not torch.equal(ours[7], args[7])


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_modes_change_nothing(op):
    args = sample(op, dtype=F32).args
    expected = run(op, args, "cpu")
    with torch.autocast("cpu", BF16):
        assert_same(run(op, args, "cpu"), expected)
    with torch.inference_mode():
        assert_same(run(op, args, "cpu"), expected)
    for _ in range(3):
        assert_same(run(op, args, "cpu"), expected)


@needs_cpu
@pytest.mark.parametrize("op", OPS[:4])
def test_the_number_of_threads_does_not_matter(op):
    before = torch.get_num_threads()
    for shape in ((4, 60, 16, 16), (700, 300), (2, 40, 33, 33)):
        results = []
        for kwargs in ({}, {"per_sample": True}) if op.endswith("finish") else ({},):
            args = sample(op, shape, F32).args
            try:
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(run(op, args, "cpu", **kwargs))
            finally:
                torch.set_num_threads(before)
            for other in results[1:]:
                assert_same(other, results[0])
            results.clear()


@needs_cpu
def test_any_layout_of_what_is_only_read():
    y, k, *rest = sample("rk_finish", dtype=F32).args
    expected = ops.rk_finish(y, k, *rest, backend="cpu")
    for layout in testing.LAYOUTS:
        if layout == "expanded":
            continue
        got = ops.rk_finish(testing.lay_out(y, layout), testing.lay_out(k, layout), *rest, backend="cpu")
        assert_same(got, expected)
    args = list(sample("rk_drift_stage").args)
    expected = run("rk_drift_stage", args, "cpu")[1:]
    for layout in ("channels_last", "sliced", "transposed"):
        args[0] = testing.lay_out(args[0], layout)
        assert_same(run("rk_drift_stage", args, "cpu")[1:], expected)


# -- the dispatcher -------------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_what_ran_is_recorded_and_can_be_bound(op):
    args = sample(op).args
    expected = run(op, args, "cpu")
    with record() as log, use_backend("cpu"):
        run(op, args, None)
    assert log.counts == {(op, "cpu"): 1}
    assert lsgm_fast.explain(op, *args, backend="cpu").chosen == "cpu"
    bound = getattr(ops, op).resolve(*args, backend="cpu")
    mine = own(args)
    returned = bound(*mine)
    returned = returned if isinstance(returned, tuple) else (returned,)
    assert_same([t for t in (*returned, *mine) if isinstance(t, torch.Tensor)], expected)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_the_reference_runs_where_a_gradient_is_wanted(op):
    args = list(own(sample(op).args))
    args[0].requires_grad_()
    decision = lsgm_fast.explain(op, *args)
    assert decision.chosen == "reference"
    assert "a gradient is wanted" in str(decision)
    with pytest.raises(BackendUnsupported, match="a gradient is wanted"):
        getattr(ops, op)(*args, backend="cpu")
    with torch.no_grad():
        getattr(ops, op)(*args, backend="cpu")
    if op not in DRIFT:
        out = getattr(ops, op)(*args)
        out = out[0] if isinstance(out, tuple) else out
        (grad,) = torch.autograd.grad(out.sum(), args[0])
        assert grad.isfinite().all()


def refused(op, change, message):
    args = list(own(sample(op, dtype=F32).args))
    change(args)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    with pytest.raises(BackendUnsupported, match=message):
        getattr(ops, op)(*args, backend="cpu")
    assert_same([a for a in args if isinstance(a, torch.Tensor)], before)


@needs_cpu
@pytest.mark.parametrize("op", ["rk_stage", "rk_finish"])
def test_what_the_kernels_of_stages_refuse(op):
    def more_stages(args):
        args[1] = torch.zeros((17, *SHAPE))

    def to(position, dtype):
        def change(args):
            args[position] = args[position].to(dtype)

        return change

    refused(op, more_stages, "17 stages, at most 16 are supported")
    refused(op, to(1, F64), "y is torch.float32 and k torch.float64: one dtype")
    refused(op, to(0, torch.complex64), "complex64")
    args = list(sample(op).args)
    args[1] = torch.zeros((16, *SHAPE), dtype=F64)
    args[2] = (0.5,) * 16
    testing.check_forward(op, "cpu", testing.Sample("sixteen", tuple(args)))


@needs_cpu
@pytest.mark.parametrize("op", DRIFT)
def test_what_the_kernels_with_a_drift_refuse(op):
    def state_to(dtype):
        def change(args):
            for position in (1, 6, 7):
                args[position] = args[position].to(dtype)

        return change

    def lay_out(position):
        def change(args):
            args[position] = testing.lay_out(args[position], "transposed")

        return change

    def more_stages(args):
        args[7] = torch.zeros((17, *SHAPE))

    def wide_network(args):
        args[0] = args[0].double()

    refused(op, state_to(BF16), "the state is torch.bfloat16: float32 and float64 are supported")
    refused(op, state_to(F16), "the state is torch.float16")
    for position in (1, 6, 7):
        refused(op, lay_out(position), "z, y and k must be contiguous")
    refused(op, more_stages, "17 stages, at most 16 are supported")
    refused(op, wide_network, "eps is float64 and the state float32")
    # What is refused still runs: on the reference.
    args = list(own(sample(op, dtype=F32).args))
    args[1] = testing.lay_out(args[1], "transposed")
    with torch.no_grad():
        assert lsgm_fast.explain(op, *args).chosen == "reference"


# -- errors ---------------------------------------------------------------------------------------------------------


def test_errors_name_the_value():
    y, k, a, h = sample("rk_stage").args
    for call, message in (
        (lambda: ops.rk_stage(y, k[:2], a, h), r"k \(>= 4, \(3, 5, 6, 7\)\), got \(2, 3, 5, 6, 7\) for 4"),
        (lambda: ops.rk_stage(y, k[:, :2], a, h), r"got \(7, 2, 5, 6, 7\)"),
        (lambda: ops.rk_stage(y, k, (), h), "for 0 coefficients"),
        (lambda: ops.rk_stage(y, k, a, torch.zeros(2)), r"h must be 0-d or \(3,\), got \(2,\)"),
        (lambda: ops.rk_finish(y, k, (1.0,), (1.0,) * 8, h, 1.0, 1.0), "for 8 coefficients"),
        (lambda: ops.rk_finish(y, k, a, a, torch.zeros(3, 1), 1.0, 1.0), r"got \(3, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("op", DRIFT)
def test_errors_of_the_drift_name_the_value(op):
    good = sample(op).args
    assert len(good) == (11 if op == "rk_drift_stage" else 14)
    for position, value, error, message in (
        (0, good[0][:2], ValueError, r"'eps': \(2, 5, 6, 7\)"),
        (1, good[1][:, :4], ValueError, r"'z': \(3, 4, 6, 7\)"),
        (2, torch.zeros(1, 4, 1, 1), ValueError, r"mixing_logit must be .* got \(1, 4, 1, 1\)"),
        (3, torch.zeros(2), ValueError, r"p must be 0-d or \(3,\), got \(2,\)"),
        (6, good[6].float(), TypeError, "of one dtype, got torch.float64, torch.float32 and torch.float64"),
        (7, good[7][:1], ValueError, r"got \(1, 3, 5, 6, 7\)"),
        (8, 7, ValueError, "stage must be from 0 to 6, got 7"),
        (8, -1, ValueError, "stage must be from 0 to 6, got -1"),
        (9, (), ValueError, "for 0 coefficients")
        if op == "rk_drift_stage"
        else (9, (0.1,) * 8, ValueError, "for 8"),
    ):
        args = list(own(good))
        args[position] = value
        with pytest.raises(error, match=message):
            getattr(ops, op)(*args)


def test_errors_of_the_control_name_the_value():
    block, norm = torch.zeros(3, 8, dtype=F64), torch.zeros(3)
    for args, message in (
        ((block.float(), norm, 1.0), r"\(3, 8\) in torch.float32"),
        ((block[:, :7], norm, 1.0), r"\(3, 7\) in torch.float64"),
        ((block[None], norm, 1.0), r"\(1, 3, 8\)"),
        ((block, norm[:2], 1.0), r"norm \(3,\) for control \(3, 8\), got \(2,\)"),
        ((block[0], norm, 1.0), r"norm \(\) for control \(8,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.rk_control(*args)


@needs_cpu
def test_the_library_checks_what_it_is_given():
    """Called around the public functions, the operators must not write where they should not."""
    control = torch.zeros(3, 8, dtype=F64)
    kernels = torch.ops.lsgm_fast
    with pytest.raises(RuntimeError, match="norm has shape"):
        kernels.rk_control_cpu(control, torch.zeros(2, dtype=F64), 1.0, -0.2, 0.9, 0.2, 10.0)
    eps, z, logit, p, q, r, y, k, _, row, h = rk._drift_to_kernel(*sample("rk_drift_stage").args)
    with pytest.raises(RuntimeError, match="stage is 7: expected 0 to 6"):
        kernels.rk_drift_stage_cpu(eps, z, logit, p, q, r, y, k, 7, row, h)
    with pytest.raises(RuntimeError, match="coefficients: expected 1 to 7"):
        kernels.rk_stage_cpu(y, k, [0.1] * 8, h)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        kernels.rk_stage_cpu(y.transpose(2, 3), k.transpose(3, 4), [0.1], h)
    assert reference.CONTROL_FIELDS[-1] == "norm"
