"""The Triton kernel of ``residual_add`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "residual_add"
SMALL = 20_000  # elements: the interpreter is slow


def samples() -> list[Sample]:
    small = [s for s in testing.samples(OP) if s.elements <= SMALL]
    return [s for s in small if s.args[0].dtype == s.args[1].dtype]


def inputs(
    shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    draw = Draw("cpu", 7, f"{shape} {layout} {dtype}")
    return [draw.normal(*shape, dtype=dtype, layout=layout) for _ in range(2)]


def assert_right(x: torch.Tensor, h: torch.Tensor) -> None:
    from lsgm_fast.kernels import residual_add as kernels

    with testing.poison_uninitialized():
        out, grad = kernels.forward(x, h, 0.3), kernels.backward(x, 0.3)
    assert out.stride() == grad.stride() == x.stride()
    assert out.dtype == grad.dtype == x.dtype
    for got, want in ((out, (x.double() + h.double()) * 0.3), (grad, x.double() * 0.3)):
        torch.testing.assert_close(got, want.to(x.dtype), rtol=1e-6, atol=1e-6)


def wide_index() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import residual_add as kernels

    original = kernels.index_type
    kernels.index_type = lambda elements: tl.int64
    try:
        for shape in ((5, 6, 4, 8), (3, 5, 3, 7), (2, 41, 9, 13)):
            for layout in ("contiguous", "channels_last"):
                assert_right(*inputs(shape, layout))
    finally:
        kernels.index_type = original


def blocks_cover_tensors() -> None:
    for size in (1, 2, 255, 256, 257, 1023, 1024, 1025, 3000):
        assert_right(*inputs((1, size)))


def plans_of_large_tensors() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import residual_add as kernels

    for elements in (2**20, 2**31 - 2**13, 2**31 - 1, 2**31, 2**34 + 1):
        (programs,), sizes, options = kernels.plan(elements)
        reach = programs * options["BLOCK"]
        assert reach >= elements > reach - options["BLOCK"] and programs < 2**31
        assert sizes["units"] * options["ALIGN"] == elements
        assert options["INDEX"] == tl.int64 or reach < 2**31


def formats() -> None:
    for dtype in (torch.float32, torch.float64):
        for layout in ("contiguous", "channels_last"):
            assert_right(*inputs((2, 5, 3, 4), layout, dtype))
    assert_right(*inputs((0, 3, 4, 4)))
    assert_right(*inputs(()))


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import residual_add as kernels

    x, h = inputs((4, 6, 3, 5))
    for message, bad in (
        ("one memory format", h.contiguous(memory_format=torch.channels_last)),
        ("one shape", h[:, :2].contiguous()),
        ("one dtype", h.double()),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.forward(x, bad, 0.5)
    with pytest.raises(ValueError, match="contiguous or the channels_last"):
        kernels.backward(x[..., ::2], 0.5)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "sizes around a block's": blocks_cover_tensors,
    "beyond 2^31 elements": plans_of_large_tensors,
    "formats": formats,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
