"""The Triton kernels of ``bn_swish`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.bn_swish import build
from lsgm_fast.testing.inputs import Draw, Sample

OP = "bn_swish"
SMALL, FEW_CHANNELS = 1500, 20  # the interpreter is slow


def samples() -> list[Sample]:
    return [
        s
        for s in testing.samples(OP)
        if s.elements <= SMALL and s.args[0].shape[1] <= FEW_CHANNELS and s.args[0].dtype != torch.float64
    ]


def inputs(
    shape: tuple[int, ...],
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    batch_stats: bool = True,
    mean: float = 0.3,
) -> list:
    draw = Draw("cpu", 7, f"{shape} {channels_last} {dtype}")
    layout = "channels_last" if channels_last else "contiguous"
    args, _ = build(draw, shape, dtype, dtype, layout, batch_stats, mean)
    return [draw.normal(*shape, dtype=dtype, layout=layout), *args]


def exact(tensors: list, swish: bool = True) -> list[torch.Tensor]:
    """(y, mean, var) and the three gradients in float64."""
    from lsgm_fast.reference.bn_swish import bn_swish

    grad, *args, batch_stats = (t.double() if isinstance(t, torch.Tensor) else t for t in tensors)
    for t in args[:3]:
        t.requires_grad_()
    y, mean, var = bn_swish(*args, batch_stats, 1e-5, swish)
    return [y.detach(), mean, var, *torch.autograd.grad(y, args[:3], grad)]


def run(tensors: list, swish: bool = True) -> list[torch.Tensor]:
    from lsgm_fast.kernels import bn_swish

    grad, x, weight, bias, *_, batch_stats = tensors
    with testing.poison_uninitialized():
        y, mean, var, rstd = bn_swish.forward(*tensors[1:], 1e-5, swish)
        grads = bn_swish.backward(grad, x, weight, bias, mean, rstd, batch_stats, swish)
        return [y, mean, var, *grads]


NAMES = ("y", "mean", "var", "grad_x", "grad_weight", "grad_bias")


def assert_right(tensors: list, swish: bool = True) -> None:
    for name, got, want in zip(NAMES, run(tensors, swish), exact(tensors, swish), strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 2e-6, f"{name}: relative L2 error {error}"


SHAPES = ((5, 3, 4, 8), (3, 5, 3, 7), (2, 2, 9, 13), (21, 2, 2, 2))


def forced(batch_stats: tuple[bool, ...] = (True,), **values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import bn_swish

        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setattr(bn_swish, name, value)
            for shape in SHAPES:
                for channels_last in (False, True):
                    for kind in batch_stats:
                        assert_right(inputs(shape, channels_last, batch_stats=kind))

    return check


BY_PARTS = {"SMALL_CHANNEL": 0, "SMALL_COLUMN": 0}


def wide_index() -> None:
    import triton.language as tl

    wide = {"index_type": lambda elements: tl.int64}
    forced(**wide, TILE=32)()
    forced((False, True), **wide, **BY_PARTS, TILE=64)()


def blocks_of_channels() -> None:
    """More channels than a tile is wide, in tiles that the channels do not fill."""
    from lsgm_fast.kernels import bn_swish

    for limits in ({}, BY_PARTS):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(bn_swish, name, value)
            patch.setattr(bn_swish, "tile_width", lambda extent, most: 8)
            assert_right(inputs((3, 19, 3, 2), True))


def plans_cover_every_element() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import bn_swish as kernels

    for shape in (
        (32, 128, 256),
        (16, 384, 4096),
        (3, 5, 63),
        (1, 3, 1031),
        (150, 18, 6),
        (2**12, 256, 2**14),
        (1, 1, 2**33),
        (2**17, 256, 64),
        (64, 2**26, 1),
    ):
        samples, channels, space = shape
        for inner in (False, True):
            for part in ("reduce", "apply", "channel"):
                (programs,), sizes, options = kernels.plan(*shape, inner, part, 2)
                lines, width = options["LINES"], options["WIDTH"]
                chunks = programs // sizes["channel_blocks"]
                assert chunks * sizes["channel_blocks"] == programs
                assert (chunks - 1) * sizes["per_program"] < sizes["tiles"] <= chunks * sizes["per_program"]
                assert part != "reduce" or chunks <= kernels.CHUNKS
                assert part != "channel" or chunks == 1
                assert lines * width <= 2 * kernels.TILE and lines * width // 512 <= 32
                groups = sizes["tiles"] // sizes["inner_blocks"]
                assert (groups - 1) * lines < sizes["lines"] <= groups * lines
                blocks = sizes["channel_blocks"] if inner else sizes["inner_blocks"]
                extent = channels if inner else space
                assert (blocks - 1) * width < extent <= blocks * width
                assert sizes["inner_units"] * options["ALIGN"] == extent
                assert options["INDEX"] == tl.int64 or samples * channels * space < 2**31


def far_from_zero() -> None:
    """E[x^2] - E[x]^2 would have no digit left, and the first tile is a bad guess of the mean."""
    from lsgm_fast.kernels import bn_swish

    for limits in ({"TILE": 64}, {**BY_PARTS, "TILE": 128, "PROGRAMS": 4}):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(bn_swish, name, value)
            for channels_last in (False, True):
                args = inputs((3, 2, 20, 41), channels_last)
                x = 1e4 + 0.02 * (args[1] - 0.3)
                for border in (False, True):
                    if border:
                        x[:, :, :1] = 0
                    _, mean, var, _ = bn_swish.forward(x, *args[2:], 1e-5, True)
                    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
                    assert ((mean - exact_mean).abs() / exact_mean).max() < 1e-6
                    assert ((var - exact_var).abs() / exact_var).max() < 1e-5


def the_parts_of_two_processes() -> None:
    """What the processes exchange: moments of their batches, then sums of two gradients per channel."""
    from lsgm_fast.kernels import bn_swish as kernels

    for channels_last in (False, True):
        tensors = inputs((5, 3, 4, 7), channels_last)
        grad, x, weight, bias = tensors[:4]
        halves = [
            [t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
             for t in (grad[part], x[part])]
            for part in (slice(0, 2), slice(2, 5))
        ]  # fmt: skip
        counts = torch.tensor([[2 * 28.0], [3 * 28.0]])
        means, squares = [], []
        for (_, part), n in zip(halves, counts, strict=True):
            mean, var, _ = kernels.statistics(part, 1e-5)
            means.append(mean)
            squares.append(var * (n - 1))
        m, total = torch.stack(means), counts.sum()
        mean = (counts * m).sum(0) / total
        rstd = torch.rsqrt((torch.stack(squares) + counts * (m - mean) ** 2).sum(0) / total + 1e-5)
        y = torch.cat([kernels.apply(part, weight, bias, mean, rstd, True) for _, part in halves])
        sums = [kernels.backward_reduce(*half, weight, bias, mean, rstd, True) for half in halves]
        grad_weight, grad_bias = sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]
        grad_x = torch.cat(
            [
                kernels.backward_apply(
                    *half, weight, bias, mean, rstd, grad_weight, grad_bias, int(total), True
                )
                for half in halves
            ]
        )
        want = exact(tensors)
        for got, expected in zip((y, grad_x, grad_weight, grad_bias), (want[0], *want[3:]), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        tensors = inputs(shape, batch_stats=False)
        y, mean, var, grad_x, grad_weight, grad_bias = run(tensors)
        assert y.shape == grad_x.shape == shape
        assert torch.equal(mean, tensors[4]) and torch.equal(var, tensors[5])
        assert torch.equal(grad_weight, torch.zeros(3)) and torch.equal(grad_bias, torch.zeros(3))


def one_element_has_variance_0() -> None:
    from lsgm_fast.kernels import bn_swish

    x = torch.tensor([3.0, -1e4]).reshape(1, 2, 1, 1)
    mean, var, rstd = bn_swish.statistics(x, 0.25)
    assert torch.equal(mean, x.flatten())
    assert torch.equal(var, torch.zeros(2)) and torch.equal(rstd, torch.full((2,), 2.0))


def results_have_the_inputs_formats() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels_last in (False, True):
            tensors = inputs((2, 5, 3, 4), channels_last, dtype)
            tensors[2:6] = [t.float() for t in tensors[2:6]]
            y, mean, var, grad_x, grad_weight, grad_bias = run(tensors)
            assert y.dtype == grad_x.dtype == dtype
            assert y.stride() == grad_x.stride() == tensors[1].stride()
            assert {t.dtype for t in (mean, var, grad_weight, grad_bias)} == {torch.float32}


def same_every_time() -> None:
    tensors = inputs((5, 3, 9, 13), True)
    for first, second in zip(run(tensors), run(tensors), strict=True):
        assert torch.equal(first, second)


def the_ends_of_float32() -> None:
    """Swish of numbers whose exponential is 0 or infinite, and its derivative."""
    from lsgm_fast.kernels import bn_swish

    x = torch.tensor([0.0, -20.0, 20.0, -88.0, 88.0, -1000.0, 1000.0, 3e38, -3e38, float("inf")])
    x = x.reshape(1, 1, 2, 5)
    one, zero = torch.ones(1), torch.zeros(1)
    y, _, _, rstd = bn_swish.forward(x, one, zero, zero, one, False, 0.0, True)
    torch.testing.assert_close(y, torch.nn.functional.silu(x), rtol=1e-5, atol=1e-30)
    finite = x[..., :1, :]
    grad_x, *_ = bn_swish.backward(torch.ones_like(finite), finite, one, zero, zero, rstd, False, True)
    s = finite.double().sigmoid()
    torch.testing.assert_close(grad_x.double(), s * (1 + finite * (1 - s)), rtol=1e-5, atol=1e-6)


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import bn_swish

    grad, x, *rest = inputs((4, 6, 3, 5))
    with pytest.raises(ValueError, match="contiguous or the channels_last"):
        bn_swish.forward(x[..., ::2], *rest, 1e-5, True)
    other = grad.contiguous(memory_format=torch.channels_last)
    for wrong, message in ((other, "one memory format"), (grad[:, :, :2].contiguous(), "one shape")):
        with pytest.raises(ValueError, match=message):
            bn_swish.backward(wrong, x, *rest[:2], *rest[2:4], True, True)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "several chunks per channel": forced((False, True), **BY_PARTS, TILE=64),
    "several tiles per chunk": forced((False, True), **BY_PARTS, TILE=32, PROGRAMS=4),
    "few chunks": forced(**BY_PARTS, TILE=32, CHUNKS=2),
    "several tiles per channel": forced(TILE=16),
    "blocks of channels": blocks_of_channels,
    "plans": plans_cover_every_element,
    "far from zero": far_from_zero,
    "two processes": the_parts_of_two_processes,
    "empty": empty,
    "one element": one_element_has_variance_0,
    "formats": results_have_the_inputs_formats,
    "deterministic": same_every_time,
    "ends of float32": the_ends_of_float32,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
