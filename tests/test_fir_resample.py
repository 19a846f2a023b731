"""``fir_resample`` on every backend that runs here: numbers, modes of PyTorch, threads, and what it refuses."""

from __future__ import annotations

import functools

import kernel_targets
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.testing import LAYOUTS, Draw, Sample, check_backward, check_forward
from lsgm_fast.testing.fir_resample import activated, build

NAME = "fir_resample"
TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]
DIRECTIONS = pytest.mark.parametrize("direction", ["up", "down"])
SHAPE = (2, 5, 6, 8)


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device="cpu", direction="up", fir=True, shape=SHAPE, dtype=torch.float32, layout="contiguous"):
    return build(Draw(device, 3, f"{shape}"), shape, dtype, dtype, layout, direction, fir)[0]


def with_prologue(device="cpu", direction="up", dtype=torch.float32, layout="contiguous"):
    return activated(Draw(device, 4, f"{direction}"), SHAPE, dtype, layout, direction)[1]


def gradient(args, backend, grad):
    return testing.gradients(lambda *a: ops.fir_resample(*a, backend=backend), args, {}, (0,), [grad])[0]


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
                assert sample.args[0].dtype == torch.float64
                continue
            check_forward(NAME, backend, sample)
            if sample.differentiable:
                check_backward(NAME, backend, sample)
            ran += 1
    assert ran > 60


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", FUSED)
def test_gradients_that_arrive_in_any_layout(target, layout):
    backend, device = target
    for direction in ("up", "down"):
        for of_x in ("contiguous", "channels_last"):
            for fir in (True, False):
                sample = Sample(of_x, inputs(device, direction, fir, layout=of_x), {}, (0,))
                check_backward(NAME, backend, sample, grad_layout=layout)


@DIRECTIONS
@pytest.mark.parametrize("fir", [True, False])
@pytest.mark.parametrize("target", FUSED)
def test_backward_is_the_transpose(target, fir, direction):
    """``<g, f(x)> = <f'(g), x>``, with numbers whose sums are exact in float32."""
    backend, device = target
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-8, 9, shape, generator=generator).float().to(device)

    x = integers(2, 3, 6, 18)
    y = ops.fir_resample(x, direction, fir, backend=backend)
    g = integers(*y.shape)
    back = gradient((x, direction, fir), backend, g)
    assert torch.equal((g.double() * y).sum(), (back.double() * x).sum())


@pytest.mark.parametrize("target", FUSED)
def test_the_zeros_beside_the_image_are_not_activated(target):
    backend, device = target
    x = torch.zeros(1, 2, 4, 4, device=device)
    factor, shift = torch.zeros(2, 1, 2, device=device)
    shift = shift + 3.0
    y = ops.fir_resample(x, "down", True, factor, shift, backend=backend)
    value = 3.0 * torch.tensor(3.0).sigmoid().to(device)
    torch.testing.assert_close(y, (value * (7 / 8) ** 2).expand_as(y))


# -- modes ----------------------------------------------------------------------------------------------------------


@DIRECTIONS
@pytest.mark.parametrize("target", FUSED)
def test_opcheck(target, direction):
    backend, device = target
    call = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}").default
    for layout in ("contiguous", "channels_last"):
        x = inputs(device, layout=layout)[0]
        torch.library.opcheck(call, (x.requires_grad_(), None, None, direction == "up", True))
        given = with_prologue(device, direction, layout=layout)
        factor = given["factor"].contiguous()
        torch.library.opcheck(call, (given["x"], factor, given["shift"], direction == "up", False))


@DIRECTIONS
@pytest.mark.parametrize("target", [t for t in FUSED if t.id != "triton-cpu"])
def test_compiles_without_a_graph_break(target, direction):
    backend, device = target
    torch._dynamo.reset()
    args = inputs(device, direction)

    def step(*a, **k):
        return 2 * ops.fir_resample(*a, **k, backend=backend)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*args), step(*args))
    given = with_prologue(device, direction)
    torch.testing.assert_close(compiled(**given), step(**given))
    grad = torch.randn_like(step(*args))
    for got in testing.gradients(compiled, args, {}, (0,), [grad]):
        torch.testing.assert_close(got, 2 * gradient(args, backend, grad))


@DIRECTIONS
@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes_dtypes_and_strides(target, direction):
    backend, device = target
    for layout in ("contiguous", "channels_last"):
        args = inputs(device, direction, dtype=torch.bfloat16, layout=layout)
        expected = ops.fir_resample(*args, backend=backend)
        with FakeTensorMode() as mode:
            got = ops.fir_resample(mode.from_tensor(args[0]), *args[1:], backend=backend)
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


@DIRECTIONS
@pytest.mark.parametrize("target", TARGETS)
def test_the_result_keeps_its_dtype_under_autocast(target, direction):
    backend, device = target
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(device, direction, dtype=dtype)[0]
        given = with_prologue(device, direction, dtype)
        expected = ops.fir_resample(x, direction, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            got = ops.fir_resample(x, direction, backend=backend)
            assert ops.fir_resample(**given, backend=backend).dtype == dtype
        assert got.dtype == dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("target", FUSED)
def test_a_second_derivative_is_refused(target):
    backend, device = target
    x = inputs(device)[0].requires_grad_()
    y = ops.fir_resample(x, "up", backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("target", FUSED)
def test_backward_keeps_no_tensor(target):
    backend, device = target
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.fir_resample(inputs(device)[0].requires_grad_(), "down", backend=backend)
    assert kept == []


@pytest.mark.parametrize("target", FUSED)
def test_an_empty_batch(target):
    backend, device = target
    for shape, direction, result in (
        ((0, 5, 6, 8), "up", (0, 5, 12, 16)),
        ((0, 5, 6, 8), "down", (0, 5, 3, 4)),
        ((2, 5, 0, 8), "down", (2, 5, 0, 4)),
    ):
        args = inputs(device, direction, shape=shape)
        assert ops.fir_resample(*args, backend=backend).shape == result
        assert gradient(args, backend, torch.zeros(result, device=device)).shape == shape
        factor = torch.zeros(shape[:2], device=device)
        assert ops.fir_resample(*args, factor, factor, backend=backend).shape == result


# -- threads --------------------------------------------------------------------------------------------------------


@DIRECTIONS
@pytest.mark.parametrize("target", [t for t in FUSED if t.id != "triton-cpu"])
def test_the_number_of_threads_does_not_matter(target, direction):
    backend, device = target
    before = torch.get_num_threads()
    try:
        for layout in ("contiguous", "channels_last"):
            x = inputs(device, shape=(3, 24, 62, 66), layout=layout)[0]
            factor, shift = torch.ones(2, 3, 24, device=device)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(
                    (
                        ops.fir_resample(x, direction, backend=backend),
                        ops.fir_resample(x, direction, True, factor, shift, backend=backend),
                    )
                )
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
def test_what_ran_is_recorded(target):
    backend, device = target
    with record() as log, use_backend(backend):
        ops.fir_resample(*inputs(device))
    assert log.counts == {(NAME, backend): 1}


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    given = with_prologue(device)
    for changed, message in (
        ({"x": given["x"].double()}, "x has dtype torch.float64"),
        ({"shift": given["shift"].double()}, "shift has dtype torch.float64"),
        *(
            ({name: given[name].clone().requires_grad_()}, "a gradient through factor and shift is wanted")
            for name in ("x", "factor", "shift")
        ),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.fir_resample(**{**given, **changed}, backend=backend)
    with torch.no_grad():
        ops.fir_resample(**{**given, "x": given["x"].clone().requires_grad_()}, backend=backend)
    call = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}")
    with pytest.raises(RuntimeError, match="has no gradient"):
        call(given["x"].clone().requires_grad_(), given["factor"].contiguous(), given["shift"], True, True)


def test_auto_takes_the_kernel_where_it_pays():
    if not any(t.id == "cpu-cpu" and not t.marks for t in FUSED):
        pytest.skip("no compiled library")
    if any(t.id == "triton-cpu" for t in FUSED):
        pytest.skip("Triton's interpreter takes what the CPU kernel leaves")
    large = (2, 64, 16, 16)
    for chosen, args in (
        ("cpu", inputs()),
        ("cpu", inputs(layout="channels_last")),
        ("reference", inputs(fir=False)),
        ("cpu", inputs(fir=False, shape=large)),
        ("reference", inputs(fir=False, shape=large, layout="channels_last")),
        ("reference", inputs(dtype=torch.float64)),
    ):
        assert lsgm_fast.explain(NAME, *args).chosen == chosen
    assert (
        lsgm_fast.explain(NAME, *inputs(direction="down", fir=False, shape=(1, 64, 16, 16))).chosen == "cpu"
    )
    assert (
        lsgm_fast.explain(NAME, *inputs(direction="down", fir=False, shape=(1, 63, 16, 16))).chosen
        == "reference"
    )


def test_factor_and_shift_are_a_pair_of_that_shape():
    x, factor = torch.zeros(2, 3, 4, 4), torch.ones(2, 3)
    for pair in ({"factor": factor}, {"shift": factor}):
        with pytest.raises(ValueError, match="together"):
            ops.fir_resample(x, "up", **pair)
    for wrong in (factor[:1], factor.half(), factor.reshape(2, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"factor is torch.float(16|32) of shape .* and \(2, 3\)"):
            ops.fir_resample(x, "up", True, wrong, factor)


@DIRECTIONS
def test_the_reference_activates_and_resamples(direction):
    given = {
        k: v.double() if isinstance(v, torch.Tensor) else v
        for k, v in with_prologue("cpu", direction).items()
    }
    u = given["x"] * given["factor"][:, :, None, None] + given["shift"][:, :, None, None]
    expected = ops.fir_resample(u * u.sigmoid(), direction)
    torch.testing.assert_close(ops.fir_resample(**given), expected)
    half = ops.fir_resample(**{**given, "x": given["x"].bfloat16(), "factor": given["factor"].float()})
    assert half.dtype == torch.bfloat16
