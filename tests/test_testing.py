"""The proof machinery itself: right kernels pass, wrong ones are caught, samples cover what they claim."""

from __future__ import annotations

import importlib
import math
import time

import pytest
import torch

from lsgm_fast import dispatch, ops, testing
from lsgm_fast.dispatch import Impl, Op
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.reference.mixed_score import mixed_score as reference
from lsgm_fast.testing import LAYOUTS, Draw, Sample, check_backward, check_forward, lay_out, random_strides

NAMES = sorted(dispatch.REGISTRY)
SAMPLES = {sample.id: sample for sample in testing.samples("mixed_score")}
SMALL = [s for s in SAMPLES.values() if s.elements < 10_000]


def check(eps, z, mixing_logit, r, *, backend=None):
    pass


def scratch(fn, tolerance=4.0) -> Op:
    """An operation like mixed_score whose `cpu` implementation is ``fn``."""
    op = Op(check, reference)
    op.name = "scratch"
    op.register(Impl("cpu", fn, tolerance=tolerance))
    return op


# -- right kernels --------------------------------------------------------------------------------------------------


def rearranged(eps, z, mixing_logit, r):
    """The same function in another order of operations: r z + a (eps - r z)."""
    if mixing_logit is None:
        return eps.to(z.dtype)
    dtype = torch.promote_types(torch.promote_types(eps.dtype, z.dtype), torch.float32)
    r = torch.as_tensor(r, dtype=dtype, device=z.device)
    r = r.reshape(-1, *(1,) * (z.dim() - 1)) if r.dim() else r
    component, network = r * z.to(dtype), eps.to(dtype)
    a = 1 / (1 + torch.exp(-mixing_logit.to(dtype)))
    return ((1 - a) * component + network * a).to(z.dtype)


@pytest.mark.parametrize("sample", SMALL, ids=lambda s: s.id)
def test_another_order_of_operations_is_right(sample):
    op = scratch(rearranged)
    check_forward(op, "cpu", sample)
    if "1000" not in sample.id:  # 1 / (1 + exp(1000)) has no gradient in this naive form
        check_backward(op, "cpu", sample)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_has_samples_that_its_reference_passes(name):
    found = testing.samples(name)
    assert len(found) >= 15
    assert len({s.id for s in found}) == len(found)
    for sample in found:
        if sample.elements > 20_000:
            continue
        dispatch.REGISTRY[name]._check(*sample.args, **sample.kwargs)
        check_forward(name, "reference", sample)
        if sample.differentiable:
            check_backward(name, "reference", sample)


def test_float32_arithmetic_on_float64_inputs_is_wrong():
    """The tolerance is earned: what a float64 input does not lose in plain PyTorch must not be lost."""

    def narrow(eps, z, mixing_logit, r):
        return reference(eps.float(), z.float(), mixing_logit, r).to(z.dtype)

    sample = next(s for s in SMALL if "float64 contiguous" in s.id)
    with pytest.raises(AssertionError, match="is wrong at"):
        check_forward(scratch(narrow), "cpu", sample)


def test_half_arithmetic_on_half_inputs_is_wrong():
    def narrow(eps, z, mixing_logit, r):
        a = torch.sigmoid(mixing_logit).to(z.dtype)
        return (1 - a) * (r.reshape(-1, 1, 1, 1).to(z.dtype) * z) + a * eps

    sample = next(s for s in SMALL if s.id.endswith("bfloat16 contiguous") and "<-" not in s.id)
    with pytest.raises(AssertionError):
        check_forward(scratch(narrow, tolerance=1.0), "cpu", sample)


# -- wrong kernels --------------------------------------------------------------------------------------------------


def _after(change):
    def kernel(eps, z, mixing_logit, r):
        out = reference(eps, z, mixing_logit, r)
        return change(out)

    return kernel


def wrong_tail(out):
    flat = out.clone().flatten()
    flat[-(flat.numel() % 8 or 1) :] = 0
    return flat.view_as(out)


def wrong_last_element(out):
    flat = out.clone().flatten()
    flat[-1] *= 1.01
    return flat.view_as(out)


def wrong_channel(out):
    return torch.cat([out[:, 1:], out[:, :1]], dim=1)


FORWARD_MUTANTS = {
    "tail left out": _after(wrong_tail),
    "one element": _after(wrong_last_element),
    "neighbouring channel": _after(wrong_channel),
    "1% bias": _after(lambda out: out * 1.01),
    "offset": _after(lambda out: out + 1e-3),
    "sign": _after(lambda out: -out),
    "zeros": _after(torch.zeros_like),
    "NaN": _after(lambda out: out * math.nan),
    "one NaN": _after(lambda out: torch.where(torch.arange(out.numel()).view_as(out) == 3, math.nan, out)),
    "logit without sigmoid": lambda eps, z, mixing_logit, r: (
        (1 - mixing_logit) * r.view(-1, 1, 1, 1) * z + mixing_logit * eps
    ),
    "r of the first sample": lambda eps, z, mixing_logit, r: reference(eps, z, mixing_logit, r[:1]),
    "eps and z swapped": lambda eps, z, mixing_logit, r: reference(z, eps, mixing_logit, r),
    "logit of the first channel": lambda eps, z, mixing_logit, r: reference(
        eps, z, mixing_logit[:, :1].expand_as(mixing_logit), r
    ),
    "strides of a contiguous tensor": lambda eps, z, mixing_logit, r: reference(
        eps.T.contiguous().view(z.shape), z, mixing_logit, r
    ),
}
BASE = next(s for s in SMALL if s.id == "3x5x6x7 float32 contiguous")


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("mutant", FORWARD_MUTANTS)
def test_wrong_results_are_caught(mutant):
    op = scratch(FORWARD_MUTANTS[mutant])
    with pytest.raises(AssertionError, match=r"scratch on cpu, sample '3x5x6x7 float32 contiguous'"):
        check_forward(op, "cpu", BASE)


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("mutant", [m for m in FORWARD_MUTANTS if m != "offset"])
def test_wrong_results_are_caught_in_bfloat16(mutant):
    sample = next(s for s in SMALL if s.id == "3x5x6x7 bfloat16 contiguous")
    if mutant == "one element":
        mutant = "tail left out"  # 1% of one element may be its rounding
    with pytest.raises(AssertionError):
        check_forward(scratch(FORWARD_MUTANTS[mutant]), "cpu", sample)


def test_a_one_percent_bias_is_caught_on_every_sample():
    op = scratch(FORWARD_MUTANTS["1% bias"])
    for sample in SMALL:
        finite = reference(*sample.args)
        if finite.numel() > 8 and sample.id != "r zero":
            with pytest.raises(AssertionError):
                check_forward(op, "cpu", sample)


def test_other_shapes_dtypes_and_missing_results_are_caught():
    for change, message in (
        (
            lambda out: out.double(),
            r"got float64\[3, 5, 6, 7\] on cpu, expected float32\[3, 5, 6, 7\] on cpu",
        ),
        (lambda out: out[:, :1], r"got float32\[3, 1, 6, 7\]"),
        (lambda out: None, "got none, expected a tensor"),
        (lambda out: (out, out), "2 results, expected 1"),
        (lambda out: 3.0, "got 3.0, expected"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_forward(scratch(_after(change)), "cpu", BASE)


def test_unwritten_memory_is_caught():
    def unwritten(eps, z, mixing_logit, r):
        out = torch.empty_like(z)
        out.flatten()[:-3].copy_(reference(eps, z, mixing_logit, r).flatten()[:-3])
        return out

    with testing.poison_uninitialized(), pytest.raises(AssertionError, match="3 of 630 elements are wrong"):
        check_forward(scratch(unwritten), "cpu", BASE)


@pytest.mark.parametrize("place", ["element", "gap"])
def test_writing_to_an_input_is_caught(place):
    sample = SAMPLES["3x5x6x7 float32 sliced"]

    def overwriting(eps, z, mixing_logit, r):
        out = reference(eps, z, mixing_logit, r)
        if place == "element":
            z[0, 0, 0, 0] += 1
        else:
            torch.empty(0).set_(z.untyped_storage())[-1] = 0.0
        return out

    with pytest.raises(AssertionError, match="memory of tensor argument 1 was written to"):
        check_forward(scratch(overwriting), "cpu", sample)


class _Mutant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eps, z, mixing_logit, r, change):
        ctx.save_for_backward(eps, z, mixing_logit, r)
        ctx.change = change
        return reference(eps, z, mixing_logit, r)

    @staticmethod
    def backward(ctx, grad):
        *leaves, r = ctx.saved_tensors
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            grads = torch.autograd.grad(reference(*leaves, r), leaves, grad)
        return (*ctx.change(*grads), None, None)


GRADIENT_MUTANTS = {
    "sign of z": lambda e, z, m: (e, -z, m),
    "swapped": lambda e, z, m: (z, e, m),
    "1% of eps": lambda e, z, m: (e * 1.01, z, m),
    "1% of the logit": lambda e, z, m: (e, z, m * 1.01),
    "logit divided by the batch": lambda e, z, m: (e, z, m / len(z)),
    "logit of the neighbour": lambda e, z, m: (e, z, m.roll(1, 1)),
    "tail of z": lambda e, z, m: (e, wrong_tail(z), m),
    "logit of the last sample left out": lambda e, z, m: (e, z, m * 0.9),
    "no gradient of z": lambda e, z, m: (e, None, m),
    "NaN in one": lambda e, z, m: (torch.where(e == e.max(), math.nan, e), z, m),
}


@pytest.mark.parametrize("mutant", GRADIENT_MUTANTS)
def test_wrong_gradients_are_caught(mutant):
    op = scratch(lambda *args: _Mutant.apply(*args, GRADIENT_MUTANTS[mutant]))
    check_forward(op, "cpu", BASE)
    with pytest.raises(AssertionError, match=r"scratch on cpu, sample .*backward: gradient [012]"):
        check_backward(op, "cpu", BASE)
    check_backward(scratch(lambda *args: _Mutant.apply(*args, lambda *g: g)), "cpu", BASE)


def test_a_gradient_that_ignores_the_incoming_strides_is_caught():
    def ignoring(grad_shape):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, eps, z, mixing_logit, r):
                return eps + z

            @staticmethod
            def backward(ctx, grad):
                flat = torch.as_strided(grad, (grad.numel(),), (1,)).view(grad_shape)
                return flat, flat, None, None

        return Wrong.apply

    op = Op(check, lambda eps, z, mixing_logit, r: eps + z)
    op.register(Impl("cpu", ignoring(BASE.args[0].shape)))
    sample = Sample("plain", BASE.args, {}, (0, 1))
    check_backward(op, "cpu", sample)
    with pytest.raises(AssertionError):
        check_backward(op, "cpu", sample, grad_layout="transposed")


def test_the_message_says_where_and_by_how_much():
    def wrong(eps, z, mixing_logit, r):
        out = reference(eps, z, mixing_logit, r)
        out[1, 2, 3, 4] += 0.5
        out[2, 0, 0, 1] += 5.0
        return out

    with pytest.raises(AssertionError) as caught:
        check_forward(scratch(wrong), "cpu", BASE)
    message = str(caught.value)
    exact = reference(*(a.double() for a in BASE.args))[2, 0, 0, 1].item()
    for part in (
        "scratch on cpu",
        "'3x5x6x7 float32 contiguous'",
        "result 0 is wrong at (2, 0, 0, 1)",
        f"expected {exact:.9g}",
        f"got {exact + 5.0:.4g}"[:8],
        "2 of 630 elements are wrong, the first at (1, 2, 3, 4)",
        "largest error 5",
        "relative L2",
        "cosine",
        "plain PyTorch",
    ):
        assert part in message, (part, message)


def test_k_comes_from_the_implementation_and_can_be_given():
    def slightly_off(eps, z, mixing_logit, r):
        return reference(eps, z, mixing_logit, r) * (1 + 2e-5)

    check_forward(scratch(slightly_off, tolerance=1000.0), "cpu", BASE)
    with pytest.raises(AssertionError, match="k = 4"):
        check_forward(scratch(slightly_off, tolerance=4.0), "cpu", BASE)
    check_forward(scratch(slightly_off, tolerance=4.0), "cpu", BASE, k=1000.0)
    with pytest.raises(AssertionError, match="k = 2"):
        check_forward(scratch(slightly_off, tolerance=1000.0), "cpu", BASE, k=2.0)


def test_wrong_arguments_of_the_helpers():
    with pytest.raises(ValueError, match=r"unknown operation 'mixed_scor'.*did you mean 'mixed_score'"):
        testing.samples("mixed_scor")
    with pytest.raises(BackendUnsupported, match="has no 'triton' implementation"):
        check_forward(scratch(rearranged), "triton", BASE)
    with pytest.raises(ValueError, match="no differentiable arguments"):
        check_backward(scratch(rearranged), "cpu", Sample("x", BASE.args))
    with pytest.raises(ValueError, match="unknown layout 'chanels_last'"):
        lay_out(torch.zeros(2), "chanels_last")
    with pytest.raises(LookupError, match=r"write lsgm_fast/testing/test_testing\.py|has no sample inputs"):
        testing.samples(scratch(rearranged))


def test_unsupported_gives_the_reasons():
    op = Op(check, reference)
    op.register(Impl("cpu", rearranged, reasons=lambda *a: ["not today"]))
    assert testing.unsupported(op, "cpu", BASE) == ["not today"]
    assert testing.unsupported(op, "reference", BASE) == []
    for compare in (check_forward, check_backward):
        with pytest.raises(
            BackendUnsupported, match="cannot run sample '3x5x6x7 float32 contiguous': not today"
        ):
            compare(op, "cpu", BASE)


# -- samples --------------------------------------------------------------------------------------------------------


def test_samples_are_the_same_numbers_every_time():
    first, second, other = (
        {s.id: s for s in testing.samples("mixed_score", seed=seed)} for seed in (3, 3, 4)
    )
    assert first.keys() == second.keys() == other.keys()
    same = 0
    for name, sample in first.items():
        for a, b, c in zip(sample.tensors(), second[name].tensors(), other[name].tensors(), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
            same += torch.equal(a, c)
    assert same < len(first)


def test_mixed_score_samples_cover_what_kernels_get_wrong():
    tensors = [s.args for s in testing.samples("mixed_score")]
    shapes = {tuple(a[1].shape) for a in tensors}
    for latent in ((180, 16, 16), (40, 8, 8), (60, 16, 16), (160, 32, 32), (200, 64, 64)):
        assert any(shape[1:] == latent for shape in shapes), latent
    assert any(0 in shape for shape in shapes) and (1, 1, 1, 1) in shapes
    assert {len(shape) for shape in shapes} >= {2, 3, 4, 5}
    pairs = {(a[0].dtype, a[1].dtype) for a in tensors}
    assert (torch.bfloat16, torch.float32) in pairs and (torch.float16, torch.float64) not in pairs
    assert {d for pair in pairs for d in pair} == {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
    images = [a[1] for a in tensors if a[1].dim() == 4]
    assert any(z.stride(1) == 1 and z.is_contiguous(memory_format=torch.channels_last) for z in images)
    assert any(a[0].stride(0) == 0 for a in tensors if a[0].numel())
    assert any(a[1].storage_offset() % 4 for a in tensors)
    assert any(a[0].stride() != a[1].stride() for a in tensors)
    assert {getattr(a[3], "shape", None) for a in tensors} >= {None, (), (1,), (3,)}
    assert any(a[2] is None for a in tensors)
    assert any(a[2] is not None and a[2].abs().max() >= 40 for a in tensors)
    assert any(a[1].numel() and a[1].double().nanmean() > 5e3 for a in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_selftest_samples_are_small_and_quick(name):
    found = testing.selftest_sample(name, "cpu")
    assert found
    assert all(s.elements < 50_000 for s in found)
    start = time.process_time()
    for sample in found:
        check_forward(name, "reference", sample)
        if sample.differentiable:
            check_backward(name, "reference", sample)
    assert time.process_time() - start < 5.0


def test_every_testing_file_belongs_to_an_operation():
    from pathlib import Path

    folder = Path(testing.__file__).parent
    stems = {op.__module__.rpartition(".")[2] for op in dispatch.REGISTRY.values()}
    helpers = {"__init__", "compare", "inputs"}
    assert {p.stem for p in folder.glob("*.py")} - helpers == stems
    for stem in stems:
        listed = importlib.import_module(f"lsgm_fast.testing.{stem}").SAMPLES
        assert set(listed) == {
            op.name for op in dispatch.REGISTRY.values() if op.__module__.endswith(f".{stem}")
        }


def test_large_samples_add_published_batches():
    few = testing.samples("philox_normal")  # its arguments are small whatever the shape
    many = testing.samples("philox_normal", large=True)
    assert {s.id for s in few} < {s.id for s in many}
    added = {(len(s.args[1]), *s.args[3]) for s in many} - {(len(s.args[1]), *s.args[3]) for s in few}
    assert {(16, 180, 16, 16), (64, 180, 16, 16), (64, 40, 8, 8), (16, 200, 64, 64)} <= added


def test_traffic_counts_every_tensor_once():
    sample = testing.describe_samples("mixed_score").at((2, 5, 4, 4), torch.float32, torch.bfloat16)
    n = 2 * 5 * 4 * 4
    small = 5 * 4 + 2 * 4
    assert testing.traffic("mixed_score", sample) == n * (2 + 4 + 4) + small
    extra = n * 4 + n * (2 + 4) + small + n * (2 + 4) + 5 * 4
    assert testing.traffic("mixed_score", sample, backward=True) == n * 10 + small + extra
    stages = testing.describe_samples("rk_stage").at((2, 5, 4, 4))
    assert testing.traffic("rk_stage", stages) == n * 4 * (2 + len(stages.args[2]))


# -- layouts and poison ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3), (7,), (), (0, 3, 2, 2), (2, 3, 4, 5, 2)])
def test_layouts_keep_values(layout, shape):
    x = Draw("cpu", 0, "x").normal(*shape)
    y = lay_out(x, layout, torch.Generator().manual_seed(1))
    expected = x[:1].expand(shape) if layout == "expanded" and x.dim() and x.shape[0] else x
    assert torch.equal(y, expected)
    if len(shape) >= 4 and all(shape) and layout != "contiguous":
        assert not y.is_contiguous() or layout == "offset"


def test_random_strides_differ_and_leave_nan_between():
    x = torch.arange(24.0).reshape(2, 3, 4)
    generator = torch.Generator().manual_seed(0)
    made = [random_strides(x, generator) for _ in range(20)]
    assert all(torch.equal(m, x) for m in made)
    assert len({m.stride() for m in made}) > 10
    assert len({m.storage_offset() for m in made}) > 2
    assert any(torch.empty(0).set_(m.untyped_storage()).isnan().any() for m in made)
    assert torch.equal(random_strides(x.int(), generator), x.int())
    assert torch.equal(random_strides(x > 3, generator), x > 3)


def test_poison_fills_and_restores():
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )

    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    with testing.poison_uninitialized():
        assert torch.empty(1000).isnan().all()
        assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
        assert (torch.empty(10, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        with testing.poison_uninitialized():
            pass
        assert torch.empty(1000).isnan().all()
    assert state() == before
    with pytest.raises(KeyError), testing.poison_uninitialized():
        raise KeyError
    assert state() == before
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        with testing.poison_uninitialized():
            assert torch.empty(1000).isnan().all()
        assert state() == (True, False, False)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def test_the_public_functions_are_those_of_the_operations():
    assert testing.find_op("mixed_score") is ops.mixed_score
    assert testing.find_op(ops.mixed_score) is ops.mixed_score
