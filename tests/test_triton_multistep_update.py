"""The Triton kernel of ``multistep_update`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "multistep_update"
SMALL = 4_000  # elements: the interpreter is slow


def samples() -> list[Sample]:
    return [s for s in testing.samples(OP) if s.elements <= SMALL]


Call = tuple[torch.Tensor, list[torch.Tensor], list[float], list[torch.Tensor], list[int]]


def inputs(shape: tuple[int, ...], channels_last: bool = False, dtype: torch.dtype = torch.float32) -> Call:
    """Arguments of the kernel with one coefficient of every kind."""
    draw = Draw("cpu", 7, f"{shape} {channels_last} {dtype}")
    layout = "channels_last" if channels_last else "contiguous"
    y, *history = (draw.normal(*shape, dtype=dtype, layout=layout) for _ in range(5))
    ones = (1,) * (len(shape) - 2)
    factors = [draw.normal(*size) for size in ((), (1, shape[1], *ones), shape[:1], (*shape[:2], *ones))]
    return y, history, [0.5, -2.0, 1.0, 0.25, 3.0], factors, [1, -1, 3, 0, 2]


def exact(call: Call) -> torch.Tensor:
    y, history, scales, factors, which = call
    total = torch.zeros_like(y, dtype=torch.float64)
    for x, scale, index in zip((y, *history), scales, which, strict=True):
        factor = factors[index].double() if index >= 0 else torch.ones((), dtype=torch.float64)
        if factor.dim() == 1:
            factor = factor.reshape(-1, *(1,) * (y.dim() - 1))
        total += scale * factor * x.double()
    return total


def run(call: Call) -> torch.Tensor:
    from lsgm_fast.kernels import multistep_update

    with testing.poison_uninitialized():
        return multistep_update.forward(*call)


def assert_right(call: Call) -> None:
    got, want = run(call).double(), exact(call)
    error = ((got - want).norm() / want.norm()).item()
    assert error < 1e-6, f"relative L2 error {error}"


def forced(**values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import multistep_update

        original = {name: getattr(multistep_update, name) for name in values}
        vars(multistep_update).update(values)
        try:
            for shape in ((5, 6, 4, 8), (3, 5, 3, 7), (4, 36, 2, 2), (2, 4)):
                for channels_last in (False, True):
                    y, history, scales, factors, _ = call = inputs(shape, channels_last)
                    assert_right(call)
                    assert_right((y, history[:2], scales[:3], factors, [-1, 0, -1]))
                    assert_right((y, history[:2], scales[:3], factors, [1, 0, -1]))
        finally:
            vars(multistep_update).update(original)

    return check


def wide_index() -> None:
    import triton.language as tl

    forced(index_type=lambda elements: tl.int64)()


def empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3, 3)):
        assert run(inputs(shape)).shape == shape


def numbers() -> None:
    """Bit for bit in float64, with the extremes of its range."""
    y = Draw("cpu", 0, "numbers").normal(2, 3, 4, 5, dtype=torch.float64)
    for value in (1 / 3, -1e-300, 5e-324, 1.7e308, 0.0, -0.0, 1.0, 16.0, float("inf"), -1e-320):
        got = run((y, [], [value], [], [-1]))
        assert torch.equal(got, value * y), value
        half = run((y.float(), [y.float()], [value, 0.0], [], [-1, -1]))
        assert torch.equal(half.isfinite(), (value * y.float()).isfinite()), value


def strided_factors() -> None:
    y, history, scales, factors, which = inputs((3, 6, 4, 4), True)
    wide = Draw("cpu", 1, "wide").normal(3, 12, 2, 2)
    by_channel, by_both = wide[:1, ::2, :1, :1], wide[:, 1::2, 1:, :1]
    expanded = torch.tensor(0.3).expand(3)
    assert_right((y, history, scales, [factors[0], by_channel, expanded, by_both], which))
    assert_right((y, history, scales, [t.double() for t in factors], which))


def mixed_dtypes() -> None:
    for dtype, network in (
        (torch.float64, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
    ):
        y, history, *rest = inputs((2, 4, 3, 8))
        call = (y.to(dtype), [h.to(network) for h in history], *rest)
        assert run(call).dtype == dtype
        assert_right(call)


def grid_follows_what_the_coefficients_depend_on() -> None:
    from lsgm_fast.kernels.multistep_update import CHANNELS, NUMBER, SCALAR, plan

    tiny = (300, 4, 8)
    assert plan(*tiny, False, [NUMBER] * 3, False)[0] == (10,)
    assert plan(*tiny, True, [CHANNELS] * 3, False)[0] == (10,)
    assert plan(*tiny, False, [CHANNELS] * 3, False)[0] == (300,)
    assert plan(*tiny, True, [SCALAR, CHANNELS], True)[0] == (300,)


def raises(message: str, *call: object) -> None:
    from lsgm_fast.kernels import multistep_update

    with pytest.raises(ValueError, match=message):
        multistep_update.forward(*call)


def refuses_what_it_would_misread() -> None:
    y, history, scales, factors, which = inputs((4, 6, 3, 5))
    turned = [history[0].contiguous(memory_format=torch.channels_last), *history[1:]]
    raises("one memory format", y, turned, scales, factors, which)
    raises("one shape", y, [h[:, :, :2].contiguous() for h in history], scales, factors, which)
    raises("contiguous or the channels_last", y[..., ::2], [], [1.0], [], [-1])
    raises("expected one", y, [history[0], history[1].double()], [1.0] * 3, [], [-1] * 3)
    raises("4 history entries, 4 scales", y, history, scales[:4], factors, which)
    raises("5 history entries", y, [*history, y], [*scales, 1.0], factors, [*which, -1])
    for shape in ((3,), (1, 5, 1, 1), (1, 6, 3, 1), (4, 6), (2, 6, 1, 1)):
        raises("a factor has shape", y, [], [1.0], [torch.ones(shape)], [0])


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "small blocks": forced(forward_block=lambda size: 32),
    "empty": empty,
    "numbers": numbers,
    "strided factors": strided_factors,
    "mixed dtypes": mixed_dtypes,
    "grid": grid_follows_what_the_coefficients_depend_on,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
