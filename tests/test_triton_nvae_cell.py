"""The Triton kernels of ``nvae_cell`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import interpreter
import pytest
import torch
import torch.nn.functional as F

from lsgm_fast import ops, testing
from lsgm_fast.dispatch import explain, record, use_backend
from lsgm_fast.testing.inputs import Draw, Sample
from lsgm_fast.testing.nvae_cell import build

OP = "nvae_cell"
SHAPE = (2, 3, 3, 5)


def call(label: str, shape: tuple[int, ...] = SHAPE, layout: str = "contiguous", **options) -> tuple:
    dtype = options.pop("dtype", torch.float32)
    return build(Draw("cpu", 0, label), shape, dtype, dtype, layout, expansion=2, **options)[0]


def samples() -> Iterator[Sample]:
    """Every kind of cell, in turns contiguous and channels_last; the interpreter is slow."""
    variants: dict[str, dict] = {
        "plain": {},
        "down": {"stride": 2, "out": 5},
        "up": {"up": True, "out": 4},
        "no gate": {"squeeze_excite": False},
        "up, no gate": {"squeeze_excite": False, "up": True},
        "batch": {"batch_stats": True},
        "up, batch": {"batch_stats": True, "up": True, "out": 4},
        "down, batch": {"batch_stats": True, "stride": 2, "out": 5},
    }
    layouts = ("contiguous", "channels_last")
    for branch in ("mconv", "bnswish"):
        for i, (name, options) in enumerate(variants.items()):
            label = f"{branch} {name}"
            yield Sample(label, call(label, layout=layouts[i % 2], branch=branch, **options))
        for layout in ("channels_last", "random"):
            yield Sample(f"{branch} {layout}", call(layout, layout=layout, branch=branch))
        half = {"dtype": torch.float16, "branch": branch, "layout": "channels_last"}
        yield Sample(f"{branch} float16", call("float16", **half))
    yield Sample("one bias", call("one bias", branch="bnswish", first_bias=False, up=True))
    yield Sample("off centre", call("off centre", mean=1e2))
    yield Sample("single pixels", call("single pixels", (3, 4, 1, 1)))


def rows(shape: tuple[int, ...], outputs: int, dtype: torch.dtype = torch.float32, mean: float = 0.2) -> list:
    """x, weight, and the BatchNorms in front and behind."""
    draw = Draw("cpu", 3, f"{shape} {outputs} {dtype}")

    def norm(channels: int, mean: float) -> list[torch.Tensor]:
        variance = draw.uniform(channels, low=0.5, high=1.5, dtype=dtype)
        weight, bias = (
            draw.normal(channels, mean=1.0, std=0.3, dtype=dtype),
            draw.normal(channels, dtype=dtype),
        )
        return [weight, bias, draw.normal(channels, mean=mean, dtype=dtype), variance]

    x = draw.normal(*shape, layout="channels_last", mean=mean, dtype=dtype)
    weight = draw.normal(outputs, shape[1], 1, 1, std=shape[1] ** -0.5, dtype=dtype)
    return [x, weight, norm(shape[1], mean), norm(outputs, 0.0)]


def exact(x, weight, front, behind, swish=False, enlarge=False) -> torch.Tensor:
    def norm(x: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        if not tensors:
            return x
        weight, bias, mean, var = (t.double() for t in tensors)
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    y = norm(F.conv2d(norm(x.double(), front), weight.double()), behind)
    y = F.silu(y) if swish else y
    return F.interpolate(y, scale_factor=2, mode="nearest") if enlarge else y


def assert_product(tensors: list, swish: bool, enlarge: bool, tolerance: float = 2e-6) -> None:
    from lsgm_fast.kernels import nvae_cell as kernels

    with testing.poison_uninitialized():
        got = kernels.product_forward(*tensors, 1e-5, swish, enlarge)
    want = exact(*tensors, swish, enlarge)
    assert got.dtype == tensors[0].dtype and got.shape == want.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < tolerance, f"relative L2 error {error}"


SMALL_TILES = {"TILE": 16, "RESULTS": 16, "SIDE_BY_SIDE": 64, "PROGRAMS": 1}
SHAPES = ((2, 3, 3, 5), (1, 16, 4, 4), (3, 35, 5, 7))


def products(*, exactly: bool, **values: object) -> Callable[[], None]:
    """All that a product takes along, over tiles that rows, channels and results do not fill."""

    def check() -> None:
        from lsgm_fast.kernels import nvae_cell as kernels

        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setattr(kernels, name, value)
            patch.setattr(kernels, "_exact", lambda x: exactly)
            for shape in SHAPES:
                x, weight, front, behind = rows(shape, 37)
                assert_product([x, weight, front, behind], True, False)
                assert_product([x, weight, front, behind], True, True)
                assert_product([x, weight, [], behind], False, False)
                assert_product([x, weight, [], []], False, False)

    return check


def half_precision() -> None:
    """float16; the interpreter cannot multiply bfloat16. The parameters of a norm may have another dtype."""
    x, weight, front, behind = rows((2, 20, 3, 5), 24, torch.float16)
    assert_product([x, weight, front, behind], True, True, 1e-3)
    assert_product([x, weight, [], []], False, False, 1e-3)
    assert_product([x, weight, [t.float() for t in front], behind], True, False, 1e-3)


def far_from_zero() -> None:
    """Centred before it is multiplied: products in half precision would leave nothing of sums that cancel."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        assert_product(rows((2, 20, 3, 5), 24, dtype, mean=300.0), False, False, tolerance)


def the_projection_pools_each_sample() -> None:
    """A sample in several programs, of which the last has fewer pixels, and samples smaller than one."""
    from lsgm_fast.kernels import nvae_cell as kernels
    from lsgm_fast.reference.se_residual import se_residual

    for shape in ((3, 19, 5, 7), (2, 5, 1, 1)):
        for limits in ({}, SMALL_TILES):
            x, weight, _, behind = rows(shape, 21)
            draw = Draw("cpu", 5, "gate")
            skip = draw.normal(shape[0], 21, *shape[2:], layout="channels_last")
            gate = [draw.normal(4, 21), draw.normal(4), draw.normal(21, 4), draw.normal(21)]
            with pytest.MonkeyPatch.context() as patch, testing.poison_uninitialized():
                for name, value in limits.items():
                    patch.setattr(kernels, name, value)
                got = kernels.project_forward(x, weight, behind, 1e-5, skip, gate, 0.7)
            double = [t.double() for t in gate]
            want = se_residual(skip.double(), exact(x, weight, [], behind), *double, 0.7)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
            assert got.is_contiguous(memory_format=torch.channels_last)


def plans_cover_every_element() -> None:
    from lsgm_fast.kernels import nvae_cell as kernels

    for samples, pixels, inputs, outputs in (
        (1, 16 * 4096, 64, 384),
        (16, 4096, 384, 64),
        (1, 1, 1, 1),
        (300, 9, 35, 20),
        (64, 64, 3072, 512),
        (1, 2**31, 96, 576),
    ):
        for itemsize, exactly in ((4, True), (4, False), (2, False)):
            (programs,), sizes, options = kernels.plan(samples, pixels, inputs, outputs, itemsize, exactly)
            pieces, blocks = sizes["pieces"], sizes["output_blocks"]
            assert programs == samples * pieces * blocks
            assert (pieces - 1) * options["PIXELS"] < pixels <= pieces * options["PIXELS"]
            assert (blocks - 1) * options["OUTPUTS"] < outputs <= blocks * options["OUTPUTS"]
            assert sizes["input_units"] * options["INPUT_ALIGN"] == inputs
            assert sizes["output_units"] * options["OUTPUT_ALIGN"] == outputs
            assert min(options["PIXELS"], options["OUTPUTS"]) >= 16 and options["INPUTS"] >= 8
            assert options["PIXELS"] * options["OUTPUTS"] <= (4096 if exactly else 8192)
            assert options["INPUTS"] * itemsize <= 128
            assert options["PRECISION"] == ("ieee" if exactly else "tf32")


def precision_is_that_of_the_librarys_convolutions() -> None:
    from lsgm_fast.kernels import nvae_cell as kernels

    x = torch.empty(1)
    with pytest.MonkeyPatch.context() as patch:
        for allowed in (False, True):
            patch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
            assert kernels._exact(x) is not allowed
            assert kernels._exact(x.half()) is kernels._exact(x.bfloat16()) is False


def same_every_time() -> None:
    args = call("same")
    assert torch.equal(ops.nvae_cell(*args, backend="triton"), ops.nvae_cell(*args, backend="triton"))


def empty() -> None:
    from lsgm_fast.kernels import nvae_cell as kernels

    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        assert kernels.product_forward(*rows(shape, 5), 1e-5, True, False).shape == (shape[0], 5, *shape[2:])


def what_runs_and_where_it_lies() -> None:
    kernels = {"mconv": "depthwise_bn_swish", "bnswish": "bn_swish"}
    for branch, inner in kernels.items():
        for layout in ("contiguous", "channels_last"):
            args = call("record", layout=layout, branch=branch)
            with record() as log, use_backend(f"reference,{OP}=triton"):
                y = ops.nvae_cell(*args)
            assert log.backends()[OP] == log.backends()[inner] == "triton"
            assert y.is_contiguous(memory_format=torch.channels_last)


def compiled_without_graph_breaks() -> None:
    for branch, options in (("mconv", {"up": True}), ("bnswish", {}), ("mconv", {"batch_stats": True})):
        args = call("compiled", (2, 2, 2, 3), branch=branch, **options)

        def step(x, skip, args=args):
            return 2 * ops.nvae_cell(x + 1, skip, *args[2:], backend="triton")

        with torch.no_grad():
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            got, want = compiled(*args[:2]), step(*args[:2])
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def parts_are_right_operators() -> None:
    """Schemas and fakes of the two steps that have no operation."""
    x, weight, front, behind = rows((2, 3, 3, 5), 6)
    for enlarge in (False, True):
        args = (x, weight, front, behind, 1e-5, True, enlarge)
        torch.library.opcheck(torch.ops.lsgm_fast.nvae_cell_product_triton.default, args)
    gate = [torch.ones(2, 6), torch.ones(2), torch.ones(6, 2), torch.ones(6)]
    single = x[:, :, :1, :1].contiguous(memory_format=torch.channels_last)
    for inner in (x, single):
        skip = torch.zeros(2, 6, *inner.shape[2:]).contiguous(memory_format=torch.channels_last)
        args = (inner, weight, behind, 1e-5, skip, gate, 0.1)
        torch.library.opcheck(torch.ops.lsgm_fast.nvae_cell_project_triton.default, args)


def refusals_say_why() -> None:
    from lsgm_fast.errors import BackendUnsupported
    from lsgm_fast.kernels import nvae_cell as kernels
    from lsgm_fast.kernels import se_residual

    args = call("refusals")
    decision = explain(OP, *args)
    assert any("not measured on a GPU" in why for why in dict(decision.candidates)["triton"])
    assert decision.chosen != "triton"
    for wrong, message in (
        ([args[0].double(), *args[1:]], "one of float32, bfloat16, float16 for all of them"),
        (call("double", dtype=torch.float64), "float64: one of float32"),
        (call("bfloat16", dtype=torch.bfloat16), "interpreter"),
        (call("nothing", (0, 3, 4, 4)), "it is empty"),
        (call("one", (1, 3, 1, 1), batch_stats=True), "a variance needs more"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.nvae_cell(*wrong, backend="triton")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendUnsupported, match="autocast"):
        ops.nvae_cell(*args, backend="triton")
    args[0].requires_grad_()
    with pytest.raises(BackendUnsupported, match="no backward pass"):
        ops.nvae_cell(*args, backend="triton")

    x, weight, *norms = rows((2, 3, 3, 5), 6)
    for wrong in ((x.contiguous(), weight), (x, weight[:, :2])):
        with pytest.raises(ValueError, match=r"\(N, I, H, W\) in channels_last"):
            kernels.product_forward(*wrong, *norms, 1e-5, True, False)
    gate = [torch.ones(2, 3), torch.ones(2), torch.ones(3, 2), torch.ones(3)]
    with pytest.raises(ValueError, match=r"sums have shape \(2, 1, 4\), expected \(2, pieces, 3\)"):
        se_residual.pooled_forward(x, x, torch.ones(2, 1, 4), *gate, 0.1)


CHECKS: dict[str, Callable[[], None]] = {
    "products": products(exactly=False),
    "small tiles": products(exactly=False, **SMALL_TILES),
    "exact products": products(exactly=True, **SMALL_TILES),
    "half precision": half_precision,
    "far from zero": far_from_zero,
    "pool": the_projection_pools_each_sample,
    "plans": plans_cover_every_element,
    "precision": precision_is_that_of_the_librarys_convolutions,
    "deterministic": same_every_time,
    "empty": empty,
    "record": what_runs_and_where_it_lies,
    "compiled": compiled_without_graph_breaks,
    "operators": parts_are_right_operators,
    "refusals": refusals_say_why,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, list(samples()))}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
