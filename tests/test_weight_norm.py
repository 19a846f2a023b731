"""``weight_norm`` on every backend that runs here, through everything that PyTorch does with an operation."""

from __future__ import annotations

import functools
import threading

import kernel_targets
import pytest
import torch

import lsgm_fast
from lsgm_fast import fused, ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.testing import LAYOUTS, Sample, check_backward, check_forward

NAME = "weight_norm"
TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]
CPU = pytest.mark.skipif(fused.unavailable("cpu", "cpu", NAME) is not None, reason="no CPU library")
# Of a VAE: groups, 1 x 1, the image's channels; more than one piece, and filters longer than one.
SHAPES = [
    (6, 5, 3, 3),
    (9, 1, 5, 5),
    (7, 67, 1, 1),
    (64, 3, 3, 3),
    (0, 4, 1, 1),
    (2, 512, 3, 3),
    (3, 0, 3, 3),
]


@functools.cache
def samples_on(device):
    return testing.samples(NAME, device)


def inputs(device, shapes=SHAPES, dtype=torch.float32, layout="contiguous"):
    draw = testing.Draw(device, 3, NAME)
    weights = [draw.normal(*s, dtype=dtype, layout=layout, std=0.2) for s in shapes]
    return weights, [draw.normal(s[0], 1, 1, 1, dtype=dtype, std=0.5) for s in shapes]


def leaves(tensors):
    return [t.detach().requires_grad_() for t in tensors]


def results(args, backend, grads=None):
    """Results and gradients of weights and log norms, one flat list."""
    weights, log_norms = (leaves(tensors) for tensors in args)
    out = ops.weight_norm(weights, log_norms, backend=backend)
    grads = [w.detach().sin() for w in weights] if grads is None else grads
    return [*out, *torch.autograd.grad(out, [*weights, *log_norms], grads)]


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
                with pytest.raises(BackendUnsupported, match="float32 is supported|no weights"):
                    ops.weight_norm(*sample.args, backend=backend)
                continue
            check_forward(NAME, backend, sample)
            if sample.args[0]:
                check_backward(NAME, backend, sample)
            ran += 1
    assert ran >= 15


@pytest.mark.parametrize("target", TARGETS)
def test_a_list_of_many_kinds(target):
    backend, device = target
    sample = Sample("kinds", inputs(device), {}, (0, 1))
    check_forward(NAME, backend, sample)
    check_backward(NAME, backend, sample)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_that_arrive_in_any_layout(target, layout):
    backend, device = target
    for weights in ("contiguous", "channels_last", "transposed"):
        sample = Sample("layout", inputs(device, [(6, 5, 3, 3), (4, 1, 5, 5)], layout=weights), {}, (0, 1))
        check_backward(NAME, backend, sample, grad_layout=layout)


@pytest.mark.parametrize("target", FUSED)
def test_dense_weights_keep_their_strides(target):
    backend, device = target
    for layout in ("contiguous", "channels_last", "transposed"):
        args = inputs(device, [(6, 5, 3, 4), (2, 8, 3, 3)], layout=layout)
        got = results(args, backend)
        for w, out, grad in zip(args[0], got[:2], got[2:4], strict=True):
            assert w.stride() == out.stride() == grad.stride()
        assert not {t.data_ptr() for t in got} & {t.data_ptr() for t in args[0]}
        # Memory of their own: what one is used for must not keep the others.
        assert len({t.untyped_storage().data_ptr() for t in got[:4]}) == 4
    (out,) = ops.weight_norm(
        [torch.randn(3, 8, 3, 6, device=device)[..., ::2]], [args[1][0][:3]], backend=backend
    )
    assert out.is_contiguous()


@pytest.mark.parametrize("target", TARGETS)
def test_a_filter_of_zeros(target):
    """Its norm has the gradient 0 in PyTorch: what is left is s times the gradient."""
    backend, device = target
    weights, log_norms = inputs(device, [(3, 5, 3, 3), (4, 600, 1, 1)])
    for w in weights:
        w[1] = 0.0
    got = results((weights, log_norms), backend, [torch.ones_like(w) for w in weights])
    for i in range(2):
        assert torch.equal(got[i][1], torch.zeros_like(got[i][1]))
        scale = log_norms[i][1].exp() / 1e-5
        torch.testing.assert_close(got[2 + i][1], scale.expand_as(got[i][1]))
        assert got[4 + i][1] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_gradients_that_are_asked_for(target):
    backend, device = target
    for wanted in ((0,), (1,)):
        check_backward(NAME, backend, Sample("part", inputs(device), {}, wanted))
    weights, log_norms = inputs(device, [(3, 2, 3, 3)] * 3)
    weights = leaves(weights)
    out = ops.weight_norm(weights, log_norms, backend=backend)
    grads = torch.autograd.grad(out[1].square().sum(), weights, allow_unused=True)
    assert grads[1].abs().max() > 0
    assert all(g is None or not g.any() for g in (grads[0], grads[2]))


# -- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout):
    backend, device = target
    weights, log_norms = (leaves(t) for t in inputs(device, [(6, 5, 3, 3), (3, 1, 5, 5)], layout=layout))
    forward = getattr(torch.ops.lsgm_fast, f"weight_norm_{backend}").default
    backward = getattr(torch.ops.lsgm_fast, f"weight_norm_{backend}_backward").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        forward, (weights, log_norms, 1e-5), test_utils=(*checks, "test_aot_dispatch_dynamic")
    )
    weights, log_norms = ([t.detach() for t in tensors] for tensors in (weights, log_norms))
    grads = [torch.randn_like(w) for w in weights]
    norms = torch.rand(9, device=device)
    torch.library.opcheck(
        backward, (grads, weights, log_norms, norms, 1e-5), test_utils=("test_schema", "test_faketensor")
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
    args = inputs(device, [(6, 5, 3, 3), (9, 1, 5, 5)])

    def step(weights, log_norms):
        out = ops.weight_norm([w * 2 for w in weights], log_norms)
        return out[0].square().sum() + out[1].sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with use_backend(backend):
        mine, theirs = ([leaves(t) for t in args] for _ in range(2))
        got, expected = compiled(*mine), step(*theirs)
        torch.testing.assert_close(got, expected)
        got.backward()
        expected.backward()
    for ours, plain in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("target", TARGETS)
def test_autocast_changes_nothing(target):
    backend, device = target
    args = inputs(device)
    expected = results(args, backend)
    with torch.autocast(device, torch.bfloat16):
        got = results(args, backend)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", TARGETS)
def test_without_gradients(target, mode):
    backend, device = target
    weights, log_norms = inputs(device)
    expected = ops.weight_norm(weights, log_norms, backend=backend)
    with mode():
        got = ops.weight_norm(leaves(weights), leaves(log_norms), backend=backend)
    assert not any(t.requires_grad for t in got)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("target", FUSED)
def test_double_backward_is_a_clear_error(target):
    backend, device = target
    weights, log_norms = inputs(device, [(6, 5, 3, 3)])
    weights = leaves(weights)
    (out,) = ops.weight_norm(weights, log_norms, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*use_backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), weights)


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_after_a_step_of_the_optimiser(target):
    """Parameters change in place between calls; those of a graph that is still wanted must not."""
    backend, device = target
    weights, log_norms = inputs(device, [(6, 5, 3, 3), (3, 2, 1, 1)])
    weights = leaves(weights)
    out = ops.weight_norm(weights, log_norms, backend=backend)
    with torch.no_grad():
        weights[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out[0].sum(), weights[0])
    exact = ops.weight_norm(weights, log_norms, backend="reference")
    again = ops.weight_norm(weights, log_norms, backend=backend)
    torch.testing.assert_close(again, exact)


# -- threads and repeats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.id != "triton-cpu"]
)  # its interpreter has global state
def test_several_threads(target):
    backend, device = target
    args = inputs(device)
    expected = results(args, backend)
    failures = []

    def work():
        try:
            for _ in range(20):
                assert all(torch.equal(a, b) for a, b in zip(results(args, backend), expected, strict=True))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@CPU
def test_the_number_of_threads_does_not_matter():
    args = inputs("cpu", [*SHAPES, (96, 64, 3, 3), (200, 1, 5, 5)])
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(args, "cpu"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("target", FUSED)
def test_a_weight_does_not_depend_on_the_rest_of_the_list(target):
    backend, device = target
    weights, log_norms = inputs(device)
    together = ops.weight_norm(weights, log_norms, backend=backend)
    for w, g, expected in zip(weights, log_norms, together, strict=True):
        assert torch.equal(ops.weight_norm([w], [g], backend=backend)[0], expected)


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_ran_is_recorded(target):
    backend, device = target
    args = inputs(device)
    with record() as log, use_backend(backend):
        ops.weight_norm(*args)
    assert log.counts == {(NAME, backend): 1}
    assert lsgm_fast.explain(NAME, *args, backend=backend).chosen == backend


@pytest.mark.parametrize("target", FUSED)
def test_what_a_fused_kernel_refuses(target):
    backend, device = target
    (v,), (g,) = inputs(device, [(6, 5, 3, 3)])
    meta = v.to("meta") if device == "cpu" else v.cpu()
    for args, message in (
        (([], []), "no weights"),
        (([v, v.double()], [g, g]), r"weights\[1\] is torch.float64"),
        (([v], [g.half()]), r"log_norms\[0\] torch.float16"),
        (([v, meta], [g, g]), r"weights\[1\] is on"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.weight_norm(*args, backend=backend)
    assert ops.weight_norm([], []) == []


@pytest.mark.parametrize("target", FUSED)
def test_operators_refuse_what_they_would_misread(target):
    backend, device = target
    forward = getattr(torch.ops.lsgm_fast, f"weight_norm_{backend}")
    backward = getattr(torch.ops.lsgm_fast, f"weight_norm_{backend}_backward")
    (v,), (g,) = inputs(device, [(6, 5, 3, 3)])
    norms = torch.ones(6, device=device)
    errors = (RuntimeError, ValueError)
    for args, message in (
        (([v, v], [g]), "as many"),
        (([v.transpose(0, 1)], [g[:5]]), "one after the other"),
        (([v[:, :, ::2]], [g]), "one after the other"),
        (([v], [g[:5]]), r"log_norms\[0\]"),
        (([v.double()], [g]), "float32"),
    ):
        with pytest.raises(errors, match=message):
            forward(*args, 1e-5)
    for grads, saved, message in (
        ([v[:5]], norms, "grads"),
        ([v.contiguous(memory_format=torch.channels_last)], norms, "grads"),
        ([v, v], norms, "gradients of 1|as many"),
        ([v], norms[:5], "norms has shape"),
    ):
        with pytest.raises(errors, match=message):
            backward(grads, [v], [g], saved, 1e-5)


@CPU
def test_auto_leaves_what_is_too_small_to_the_reference():
    for shapes, chosen in (
        ([(6, 5, 3, 3)], "reference"),
        ([(128, 128, 3, 3)], "cpu"),
        ([(6, 5, 3, 3)] * 3, "reference"),
        ([(6, 5, 3, 3)] * 4, "cpu"),
    ):
        with record() as log:
            ops.weight_norm(*inputs("cpu", shapes))
        assert log.counts == {(NAME, chosen): 1}
