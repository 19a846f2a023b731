"""The mixture of logistics on every backend that runs here: numbers, modes of PyTorch, threads, and what it refuses."""

from __future__ import annotations

import functools

import kernel_targets
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lsgm_fast
from lsgm_fast import fused, ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.testing import LAYOUTS, Draw, Sample, check_backward, check_forward
from lsgm_fast.testing.mixture_logistic import build_log_prob

NAME, MEAN = "mixture_logistic_log_prob", "mixture_logistic_mean"
TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]
F32 = torch.float32


@functools.cache
def samples_on(name, device):
    return testing.samples(name, device)


def inputs(device="cpu", shape=(2, 3, 5, 7), dtype=F32, layout="contiguous", num_bits=8, mixtures=10):
    draw = Draw(device, 3, f"{shape}")
    return build_log_prob(draw, shape, F32, dtype, layout, num_bits, mixtures)[0]


def results(args, backend):
    """The log-probability, the gradient of its sum with weights, and the mean."""
    x, logits, *rest = args
    logits = logits.detach().requires_grad_()
    log_prob = ops.mixture_logistic_log_prob(x, logits, *rest, backend=backend)
    (grad,) = torch.autograd.grad((log_prob * x[:, 0]).sum(), logits)
    with torch.no_grad():
        return log_prob.detach(), grad, ops.mixture_logistic_mean(logits, backend=backend)


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, MEAN])
@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target, name):
    backend, device = target
    ran = 0
    with testing.poison_uninitialized():
        for sample in samples_on(name, device):
            if sample.elements > 10 * kernel_targets.limit(target):
                continue
            if testing.unsupported(name, backend, sample):
                assert sample.args[0].dtype == torch.float64
                continue
            check_forward(name, backend, sample)
            if testing.has_gradients(name, backend, sample):
                check_backward(name, backend, sample)
            ran += 1
    assert ran > 12


EXTREMES = {
    "narrow": (3.0, -4.0, 8, False),
    "wide": (4.0, 2.0, 8, False),
    "first and last bins": (1.0, 0.0, 8, True),
    "narrow first and last bins": (3.0, -4.0, 8, True),
    "narrow, 5 bits": (2.0, -6.0, 5, False),
    "narrow first and last bins, 5 bits": (1.0, -6.0, 5, True),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", FUSED)
def test_as_good_as_plain_pytorch_where_it_is_hard(target, layout, case):
    """Bins without mass, log scales around the clamp, open bins far from the mean."""
    backend, device = target
    scale, shift, num_bits, edges = EXTREMES[case]
    shape = (1, 3, 5, 6) if target == ("triton", "cpu") else (2, 3, 24, 20)
    x, logits, _ = inputs(device, shape, layout=layout, num_bits=num_bits)
    if edges:
        x = torch.where(x > 0, 1.0, -1.0)
    sample = Sample(case, (x, logits * scale + shift, num_bits), {}, (1,))
    check_forward(NAME, backend, sample)
    check_backward(NAME, backend, sample)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", FUSED)
def test_gradients_that_arrive_in_any_layout(target, layout):
    backend, device = target
    for of_logits in ("contiguous", "channels_last"):
        args = inputs(device, (2, 3, 3, 4), layout=of_logits, mixtures=2)
        check_backward(NAME, backend, Sample(of_logits, args, {}, (1,)), grad_layout=layout)


@pytest.mark.parametrize("target", FUSED)
def test_layouts_and_half_precision_give_the_same_numbers(target):
    """What is loaded as bfloat16 or float16 is computed in float32, as are the same numbers in float32."""
    backend, device = target
    for mixtures in (1, 3, 17):
        for dtype in (F32, torch.bfloat16, torch.float16):
            x, logits, bits = inputs(device, (2, 3, 5, 9), dtype, mixtures=mixtures)
            log_prob, grad, mean = results((x, logits.float(), bits), backend)
            for x_layout in (torch.contiguous_format, torch.channels_last):
                for layout in (torch.contiguous_format, torch.channels_last):
                    args = x.contiguous(memory_format=x_layout), logits.contiguous(memory_format=layout), bits
                    got = results(args, backend)
                    assert got[1].stride() == args[1].stride()
                    # Triton adds the mixtures up in another order there, and its interpreter cuts bfloat16 off.
                    loose = (
                        {"rtol": 1e-5, "atol": 1e-6} if backend == "triton" else {"rtol": 0.0, "atol": 0.0}
                    )
                    step = 0.02 if backend == "triton" and dtype != F32 else 0.0
                    torch.testing.assert_close(got[0], log_prob, **loose)
                    if step:
                        loose = {"rtol": step, "atol": 1e-5}
                    torch.testing.assert_close(got[1], grad.to(dtype), **loose)
                    torch.testing.assert_close(got[2], mean.to(dtype), **loose)


@pytest.mark.parametrize("target", FUSED)
def test_gradients_agree_with_differences_of_the_float64_reference(target):
    backend, device = target
    x, logits, bits = inputs(device, (1, 3, 3, 4), mixtures=3)
    _, grad, _ = results((x, logits, bits), backend)
    x, wide = x.double(), logits.double()
    for seed in range(3):
        direction = torch.randn(wide.shape, generator=torch.Generator().manual_seed(seed)).double().to(device)
        ends = [
            (
                ops.mixture_logistic_log_prob(x, wide + step * direction, bits, backend="reference") * x[:, 0]
            ).sum()
            for step in (1e-5, -1e-5)
        ]
        expected = (ends[0] - ends[1]) / 2e-5
        assert abs((grad * direction).sum() - expected) < 1e-4 * (1 + abs(expected))


@pytest.mark.parametrize("target", FUSED)
def test_log_scales_at_the_clamp(target):
    """Below -7 there is no gradient; at -7 there is, as torch.clamp has it."""
    backend, device = target
    x, logits, bits = inputs(device, (1, 3, 1, 2), mixtures=1)
    for channel in (2, 5, 8):
        logits[0, channel, 0] = torch.tensor([-7.0, -7.001])
    grad = results((x, logits, bits), backend)[1][0, 2::3, 0]
    assert (grad[:, 0] != 0).all() and (grad[:, 1] == 0).all()


@pytest.mark.parametrize("target", FUSED)
def test_not_a_number_and_infinity_stay_in_their_pixel(target):
    backend, device = target
    args = inputs(device, (1, 3, 4, 5), mixtures=2)
    expected = results(args, backend)
    x, logits, bits = (a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    x[0, 1, 0, 2] = float("nan")
    for channel, place in ((0, 5), (3, 7), (5, 9), (7, 11)):
        logits.flatten(2)[0, channel, place] = float("nan")
    logits[0, 0, 3, 4] = -float("inf")  # a mixture that does not count
    got = results((x, logits, bits), backend)
    reference = ops.mixture_logistic_log_prob(x, logits, bits, backend="reference")
    torch.testing.assert_close(got[0], reference, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[0].flatten().isnan().nonzero().flatten().cpu(), torch.tensor([2, 5, 7, 9, 11]))
    assert got[1][0, :, 3, 4].isfinite().all() and got[1][0, 2::2, 3, 4].eq(0).all()
    same = torch.ones(20, dtype=torch.bool)
    same[[2, 5, 7, 9, 11, 19]] = False
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.flatten(-2)[..., same], theirs.flatten(-2)[..., same])


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout):
    backend, device = target
    x, logits, bits = inputs(device, (2, 3, 3, 4), layout=layout, mixtures=2)
    log_prob, backward, mean = (
        getattr(torch.ops.lsgm_fast, f"{name}_{backend}{rest}").default
        for name, rest in ((NAME, ""), (NAME, "_backward"), (MEAN, ""))
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        log_prob,
        (x, logits.detach().requires_grad_(), bits),
        test_utils=(*checks, "test_aot_dispatch_dynamic"),
    )
    torch.library.opcheck(log_prob, (x, logits.bfloat16(), bits), test_utils=checks)
    result, parts = log_prob(x, logits, bits)
    torch.library.opcheck(
        backward, (result, x, logits, parts, bits), test_utils=("test_schema", "test_faketensor")
    )
    for widen in (False, True):
        torch.library.opcheck(mean, (logits.half(), widen), test_utils=("test_schema", "test_faketensor"))


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
    args = inputs(device, mixtures=2)

    def step(x, logits, bits):
        loss = ops.mixture_logistic_log_prob(x, logits * 1.5, bits).sum()
        return loss, ops.mixture_logistic_mean(logits.detach())

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with use_backend(backend):
        runs = []
        for function in (step, compiled):
            logits = args[1].detach().requires_grad_()
            loss, mean = function(args[0], logits, args[2])
            loss.backward()
            runs.append((loss, mean, logits.grad))
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("target", FUSED)
def test_autocast(target):
    """As the reference: the CPU's autocast changes nothing, CUDA's makes the mean float32."""
    backend, device = target
    for dtype in (F32, torch.bfloat16):
        args = inputs(device, dtype=dtype, mixtures=2)
        expected = results(args, backend)
        with torch.autocast(device, torch.bfloat16):
            got = results(args, backend)
            like = results(args, "reference")
        assert [t.dtype for t in got] == [t.dtype for t in like]
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        torch.testing.assert_close(got[2].float(), expected[2].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", FUSED)
def test_without_gradients(target, mode):
    backend, device = target
    x, logits, bits = inputs(device, mixtures=2)
    expected = ops.mixture_logistic_log_prob(x, logits, bits, backend=backend)
    with mode():
        got = ops.mixture_logistic_log_prob(x.clone().requires_grad_(), logits, bits, backend=backend)
        assert not got.requires_grad
        ops.mixture_logistic_mean(logits.clone().requires_grad_(), backend=backend)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("target", FUSED)
def test_fake_tensors_tell_shapes_and_strides(target):
    backend, device = target
    args = inputs(device, dtype=torch.bfloat16, layout="channels_last", mixtures=2)
    expected = results(args, backend)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        got = results(fakes, backend)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.parametrize("target", FUSED)
def test_double_backward_is_a_clear_error(target):
    backend, device = target
    x, logits, bits = inputs(device, mixtures=1)
    logits.requires_grad_()
    log_prob = ops.mixture_logistic_log_prob(x, logits, bits, backend=backend)
    (grad,) = torch.autograd.grad(log_prob.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), logits)


@pytest.mark.parametrize("target", FUSED)
def test_empty(target):
    backend, device = target
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        log_prob, grad, mean = results(inputs(device, shape, mixtures=2), backend)
        assert log_prob.shape == (shape[0], *shape[2:])
        assert grad.shape == (shape[0], 20, *shape[2:]) and mean.shape == shape


@pytest.mark.parametrize("target", [t for t in FUSED if t.id == "cpu-cpu"])
def test_the_number_of_threads_does_not_matter(target):
    backend, device = target
    before = torch.get_num_threads()
    for layout in ("contiguous", "channels_last"):
        args = inputs(device, (3, 3, 37, 41), layout=layout)
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
    x, logits, bits = inputs(device, mixtures=1)
    with record() as log, use_backend(backend):
        ops.mixture_logistic_log_prob(x, logits, bits)
        ops.mixture_logistic_mean(logits)
    assert log.counts == {(NAME, backend): 1, (MEAN, backend): 1}
    assert lsgm_fast.explain(NAME, x, logits, bits, backend=backend).chosen == backend


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    x, logits, _ = inputs(device, mixtures=1)
    for args, message in (
        ((x, logits.double()), "logits have dtype torch.float64"),
        ((x.bfloat16(), logits.bfloat16()), "x has dtype torch.bfloat16: expected float32"),
        ((x, logits, 4), "num_bits is 4"),
        ((x, logits, 16), "num_bits is 16"),
        ((x.clone().requires_grad_(), logits), "x requires a gradient"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.mixture_logistic_log_prob(*args, backend=backend)
    for bad, message in ((logits.double(), "torch.float64"), (logits.clone().requires_grad_(), "gradient")):
        with pytest.raises(BackendUnsupported, match=message):
            ops.mixture_logistic_mean(bad, backend=backend)
    # Under auto the reference does what the kernels do not.
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.mixture_logistic_log_prob(x, logits).sum(), x)
    assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("target", FUSED)
def test_operators_refuse_what_they_would_misread(target):
    backend, device = target
    forward = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}")
    backward = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}_backward")
    x, logits, bits = inputs(device, (2, 3, 4, 6), mixtures=1)
    out, parts = forward(x, logits, bits)
    errors = (RuntimeError, ValueError)
    for args, message in (
        ((x[..., ::2], logits[..., ::2].contiguous()), "strides|format"),
        ((x[..., ::2].contiguous(), logits[..., ::2]), "strides|format"),
        ((x[:, :, :2].contiguous(), logits), "x has shape"),
        ((x, logits[:, :9].contiguous()), r"shape \(2, 9|and logits \(2, 9"),
    ):
        with pytest.raises(errors, match=message):
            forward(*args, bits)
    for args, message in (
        ((out[:, :2], x, logits, parts), "grad has shape"),
        ((out.transpose(1, 2).contiguous().transpose(1, 2), x, logits, parts), "grad has shape"),
        ((out, x, logits, parts[:1]), "parts has shape"),
    ):
        with pytest.raises(errors, match=message):
            backward(*args, bits)


@pytest.mark.skipif(fused.unavailable("cpu", "cpu") is not None, reason="no CPU library")
def test_auto_takes_the_kernels():
    x, logits, bits = inputs(shape=(1, 3, 32, 32))
    with record() as log:
        ops.mixture_logistic_log_prob(x, logits.requires_grad_(), bits).sum().backward()
        with torch.no_grad():
            ops.mixture_logistic_mean(logits)
    assert log.counts == {(NAME, "cpu"): 1, (MEAN, "cpu"): 1}
