"""The Triton kernels of ``group_norm_swish`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OPS = ("group_norm_swish", "group_norm_swish_residual", "group_norm_swish_affine")
SMALL = 700  # the interpreter is slow

# Every one in two launches: with several groups in a tile of channels_last, and with groups of several tiles.
SHAPES = ((2, 12, 3, 5), (1, 8, 3, 8))


def samples(op: str) -> list[Sample]:
    """Float32 ones, each in one launch."""
    return [
        s
        for s in testing.samples(op)
        if s.elements <= SMALL and s.args[0].dtype == torch.float32 and "random" not in s.id
    ]


@contextmanager
def limits(**values: object) -> Iterator[ModuleType]:
    """Plans that else only large tensors have."""
    from lsgm_fast.kernels import group_norm_swish as kernels

    caches = kernels.whole_tile, kernels.plan, kernels.plans
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(kernels, name, value)
        for cache in caches:
            cache.cache_clear()
        yield kernels
    for cache in caches:
        cache.cache_clear()


IN_TWO = {"WHOLE": 0, "ALONE": 0}


class Inputs:
    """Tensors of one call, and what the reference gives for them in float64."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        mean: float = 0.3,
        std: float = 1.0,
    ) -> None:
        draw = Draw("cpu", 7, f"{shape} {groups} {channels_last} {dtype}")
        layout = "channels_last" if channels_last else "contiguous"
        self.groups = groups
        self.x, self.residual, self.grad, self.grad_v = (
            draw.normal(*shape, dtype=dtype, layout=layout, mean=m, std=s)
            for m, s in ((mean, std), (0.0, std), (0.0, 1.0), (0.0, 1.0))
        )
        self.weight = draw.normal(shape[1], mean=1.0, std=0.3)
        self.bias = draw.normal(shape[1], std=0.3)
        self.channel_bias = draw.normal(*shape[:2], std=std)

    def exact(self, kind: str, swish: bool, scale: float) -> list[torch.Tensor]:
        from lsgm_fast.reference.group_norm_swish import group_norm_swish as reference

        # Contiguous: of channels_last tensors far from 0, PyTorch's own has few digits in float64 as well.
        leaves = [self.x.contiguous(), self.weight, self.bias]
        if kind == "bias":
            leaves.append(self.channel_bias)
        x, weight, bias, *others = leaves = [t.double().requires_grad_() for t in leaves]
        if kind == "residual":
            v = (x.detach() + self.residual.double().contiguous()) * scale
            v = v.to(self.x.dtype).double().requires_grad_()
            y = reference(v, weight, bias, self.groups, 1e-6, None, swish)
            of_v, *rest = torch.autograd.grad(y, [v, weight, bias], self.grad.double())
            return [v.detach(), y.detach(), scale * (of_v + self.grad_v.double()), *rest]
        channel_bias = others[0] if others else None
        y = reference(x, weight, bias, self.groups, 1e-6, channel_bias, swish)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad.double())]

    def run(self, kind: str, swish: bool, scale: float) -> list[torch.Tensor]:
        from lsgm_fast.kernels import group_norm_swish as kernels

        parameters = self.weight, self.bias
        with testing.poison_uninitialized():
            if kind == "residual":
                v, y, mean, rstd = kernels.residual_forward(
                    self.x, self.residual, *parameters, self.groups, scale, 1e-6, swish
                )
                grads = kernels.residual_backward(
                    self.grad_v, self.grad, v, *parameters, mean, rstd, self.groups, scale, swish
                )
                return [v, y, *grads]
            added = self.channel_bias if kind == "bias" else None
            y, mean, rstd = kernels.forward(self.x, *parameters, added, self.groups, 1e-6, swish)
            *grads, of_channel = kernels.backward(
                self.grad, self.x, *parameters, added, mean, rstd, self.groups, swish
            )
        if kind == "bias":
            return [y, *grads, of_channel]
        assert of_channel.shape == (0,)
        return [y, *grads]


def assert_right(inputs: Inputs, kind: str, swish: bool = True, scale: float = 0.6) -> None:
    # The interpreter cuts bfloat16 off instead of rounding it.
    rounding = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[inputs.x.dtype]
    found, expected = (call(kind, swish, scale) for call in (inputs.run, inputs.exact))
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got.shape == want.shape
        assert got.dtype == (inputs.x.dtype if got.dim() == 4 else torch.float32)
        assert got.dim() != 4 or got.stride() == inputs.x.stride()
        # A gradient of a channel bias is what is left of sums that cancel: measured against them.
        size = want.norm() + (inputs.grad.double().norm() if want.dim() == 2 else 0)
        error = ((got.double() - want).norm() / size).item()
        assert error < rounding, f"{kind}, result {i}: relative L2 error {error}"


def forced(kinds: tuple[str, ...], shapes: tuple[tuple[int, ...], ...] = SHAPES, **values: object):
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        with limits(**values):
            for shape in shapes:
                for channels_last in (False, True):
                    inputs = Inputs(shape, 4, channels_last)
                    for kind in kinds:
                        assert_right(inputs, kind, swish=kind != "plain")

    return check


def wide_index() -> None:
    import triton.language as tl

    wide = {"index_type": lambda elements: tl.int64}
    forced(("bias",), **wide)()
    forced(("bias",), **wide, **IN_TWO, TILES=(64,))()


def half_precision() -> None:
    """Statistics of v are those of its rounded values."""
    for dtype in (torch.bfloat16, torch.float16):
        for values in ({}, {**IN_TWO, "TILES": (64,)}):
            with limits(**values) as kernels:
                for kind in ("bias", "residual"):
                    assert_right(Inputs((2, 8, 3, 4), 2, kind == "bias", dtype), kind)
                i = Inputs((2, 8, 3, 4), 2, False, dtype)
                v, _, mean, _ = kernels.residual_forward(
                    i.x, i.residual, i.weight, i.bias, 2, 0.6, 1e-6, True
                )
                torch.testing.assert_close(mean, v.float().reshape(2, 2, -1).mean(2), rtol=1e-5, atol=1e-6)


def factors_and_shifts() -> None:
    from lsgm_fast.reference.group_norm_swish import group_norm_swish_affine as reference

    for values in ({}, {**IN_TWO, "TILES": (32,)}):
        with limits(**values) as kernels:
            for channels_last in (False, True):
                i = Inputs((2, 12, 5, 3), 4, channels_last)
                with testing.poison_uninitialized():
                    found = kernels.affine_forward(i.x, i.weight, i.bias, 4, 1e-6)
                for got, want in zip(found, reference(i.x.double(), i.weight, i.bias, 4), strict=True):
                    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)


def far_from_zero() -> None:
    """E[x^2] - E[x]^2 would have no digit left, and the first tile is a bad guess of the mean."""
    for values in ({}, {**IN_TWO, "TILES": (64,), "PIECES": 4}):
        with limits(**values) as kernels:
            for channels_last in (False, True):
                for border in (False, True):
                    i = Inputs((1, 4, 16, 18), 2, channels_last, mean=1e4, std=0.02)
                    if border:
                        i.x[:, :, :2] = 0
                    y, mean, rstd = kernels.forward(i.x, i.weight, i.bias, None, 2, 1e-6, False)
                    exact = i.exact("none", False, 1.0)[0]
                    var, middle = torch.var_mean(i.x.double().reshape(1, 2, -1), 2, correction=0)
                    assert ((mean - middle).abs() / middle).max() < 1e-6
                    assert ((rstd * (var + 1e-6).sqrt() - 1).abs()).max() < 1e-5
                    # The mean, rounded to float32, would be off by up to 2e-2 standard deviations.
                    assert (y - exact).abs().max() < 1e-4


def plans_cover_every_element() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import group_norm_swish as kernels

    for shape in (
        (64, 512, 32, 1024),
        (1, 512, 32, 256),
        (16, 768, 32, 1024),
        (1, 1024, 32, 1024),
        (3, 5, 1, 63),
        (5, 34, 2, 1),
        (1, 3, 1, 1031),
        (2, 2100, 7, 3),
        (2, 1024, 1, 4096),
        (1, 64, 8, 2**26),
        (2**14, 256, 32, 1024),
        (1, 2**22, 2**20, 2**10),
    ):
        samples, channels, groups, space = shape
        per_group = channels // groups
        for inner in (False, True):
            for itemsize in (2, 4):
                for backward in (False, True):
                    first, *second = kernels.plans(*shape, inner, itemsize, backward)
                    for (programs,), sizes, options in (first, *second):
                        cell = sizes["cell_units"] * options["CHANNEL_ALIGN"]
                        width, positions = options["CHANNELS"], options["POSITIONS"]
                        assert programs == samples * sizes["blocks"] * sizes["parts"]
                        assert sizes["channel_units"] * options["CHANNEL_ALIGN"] == channels
                        assert sizes["space_units"] * options["SPACE_ALIGN"] == space
                        assert cell % per_group == 0
                        assert options["GROUPS"] >= cell // per_group
                        cells = -(-channels // cell)
                        assert sizes["blocks"] == cells * sizes["splits"]
                        assert (sizes["splits"] - 1) * width < cell <= sizes["splits"] * width
                        assert sizes["splits"] == 1 or cell == per_group
                        reach = sizes["per_part"] * positions
                        assert (sizes["parts"] - 1) * reach < space <= sizes["parts"] * reach
                        assert width * positions <= (kernels.TILES[0] if second else kernels.WHOLE)
                        assert options["INDEX"] == tl.int64 or channels * space < 2**31
                    if second:
                        assert first[1]["parts"] <= kernels.PIECES
                        for name in ("blocks", "splits"):
                            assert first[1][name] == second[0][1][name]
    # A few groups are spread over many programs, many are left whole.
    for inner in (False, True):
        assert len(kernels.plans(1, 512, 32, 256, inner, 4, False)) == 2
        assert kernels.plans(1, 512, 32, 256, inner, 4, False)[0][0][0] >= 128
        assert len(kernels.plans(16, 512, 32, 256, inner, 4, False)) == 1


def empty() -> None:
    from lsgm_fast.kernels import group_norm_swish as kernels

    i = Inputs((0, 4, 3, 3), 2)
    y, mean, rstd = kernels.forward(i.x, i.weight, i.bias, i.channel_bias, 2, 1e-6, True)
    grads = kernels.backward(i.grad, i.x, i.weight, i.bias, i.channel_bias, mean, rstd, 2, True)
    assert [tuple(t.shape) for t in (y, mean, rstd, grads[3])] == [(0, 4, 3, 3), (0, 2), (0, 2), (0, 4)]
    assert torch.equal(grads[1], torch.zeros(4)) and torch.equal(grads[2], torch.zeros(4))


def nan_stays_in_its_group() -> None:
    for values in ({}, {**IN_TWO, "TILES": (64,)}):
        with limits(**values) as kernels:
            i = Inputs((2, 8, 4, 4), 4, True)
            i.x[1, 3, 2, 2] = float("nan")
            y, mean, rstd = kernels.forward(i.x, i.weight, i.bias, None, 4, 1e-6, True)
            expected = torch.zeros(2, 4, dtype=torch.bool)
            expected[1, 1] = True
            assert torch.equal(mean.isnan(), expected) and torch.equal(rstd.isnan(), expected)
            assert torch.equal(y.isnan()[:, ::2, 0, 0], expected)


def the_ends_of_float32() -> None:
    """Swish of numbers whose exponential is 0 or infinite."""
    from lsgm_fast.kernels import group_norm_swish as kernels

    i = Inputs((1, 2, 3, 3), 1)
    bias = torch.tensor([-1000.0, 1000.0])
    y, mean, rstd = kernels.forward(i.x, i.weight, bias, None, 1, 1e-6, True)
    grad_x, *_ = kernels.backward(i.grad, i.x, i.weight, bias, None, mean, rstd, 1, True)
    assert torch.all(y[:, 0] == 0) and torch.all(y[:, 1] > 990)
    assert torch.isfinite(grad_x).all()


def same_every_time() -> None:
    with limits(**IN_TWO, TILES=(64,)):
        i = Inputs((2, 8, 5, 7), 2, True)
        for first, second in zip(i.run("bias", True, 1.0), i.run("bias", True, 1.0), strict=True):
            assert torch.equal(first, second)


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import group_norm_swish as kernels

    i = Inputs((4, 6, 3, 5), 2)
    with pytest.raises(ValueError, match="contiguous or the channels_last"):
        kernels.forward(i.x[..., ::2], i.weight, i.bias, None, 2, 1e-6, True)
    other = i.grad.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="one memory format"):
        kernels.residual_forward(i.x, other, i.weight, i.bias, 2, 1.0, 1e-6, True)
    statistics = torch.zeros(4, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match="one shape"):
        kernels.backward(i.grad[:, :, :2].contiguous(), i.x, i.weight, i.bias, None, *statistics, 2, True)


CHECKS: dict[str, Callable[[], None]] = {
    "one launch": forced(("bias", "residual", "plain")),
    "two launches": forced(("bias", "residual", "plain"), **IN_TWO, TILES=(64,)),
    "several tiles per program": forced(("bias", "residual"), **IN_TWO, TILES=(32,), PROGRAMS=2, PIECES=2),
    "narrow tiles": forced(("bias",), **IN_TWO, TILES=(16,), WIDTH_BYTES=8, PIECES=2),
    "64-bit indices": wide_index,
    "half precision": half_precision,
    "factors and shifts": factors_and_shifts,
    "far from zero": far_from_zero,
    "plans": plans_cover_every_element,
    "empty": empty,
    "NaN": nan_stays_in_its_group,
    "ends of float32": the_ends_of_float32,
    "deterministic": same_every_time,
    "refusals": refuses_what_it_would_misread,
}


ALL = dict(CHECKS)
for op in OPS:
    ALL |= interpreter.sample_checks(op, samples(op))


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
