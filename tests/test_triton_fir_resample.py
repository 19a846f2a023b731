"""The Triton kernels of ``fir_resample`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.fir_resample import activated, build
from lsgm_fast.testing.inputs import DENSE_LAYOUTS, Draw, Sample

OP = "fir_resample"
SMALL = 700  # the interpreter is slow
SHAPES = ((1, 3, 4, 22), (2, 11, 6, 2))


def samples() -> list[Sample]:
    return [s for s in testing.samples(OP) if s.elements <= SMALL and s.tensors()[0].dtype != torch.float64]


def assert_right(shape: tuple[int, ...], layout: str, direction: str, fir: bool = True) -> None:
    draw = Draw("cpu", 5, f"{shape} {layout} {direction}")
    plain = Sample(
        "plain", build(draw, shape, torch.float32, torch.float32, layout, direction, fir)[0], {}, (0,)
    )
    with testing.poison_uninitialized():
        testing.check_forward(OP, "triton", plain)
        testing.check_backward(OP, "triton", plain)
        given = activated(draw, shape, torch.float32, layout, direction, fir)[1]
        testing.check_forward(OP, "triton", Sample("activated", (), given))


def forced(**values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import fir_resample

        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setattr(fir_resample, name, value)
            for shape in SHAPES:
                for layout in DENSE_LAYOUTS:
                    for direction in ("up", "down"):
                        assert_right(shape, layout, direction)

    return check


def wide_index() -> None:
    import triton.language as tl

    forced(index_type=lambda elements: tl.int64)()


def plans_cover_every_element() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import fir_resample as kernels

    for shape in (
        (16, 512, 8, 8),
        (64, 256, 32, 32),
        (3, 5, 7, 9),
        (1, 1, 1, 1),
        (1, 3, 1, 1031),
        (150, 18, 6, 1),
        (1, 1, 2**15, 2**15),
        (1, 2**21, 16, 16),
        (2**14, 256, 16, 16),
    ):
        samples, channels, height, width = shape
        for inner in (False, True):
            for up in (False, True):
                for itemsize in (2, 4):
                    (programs,), sizes, options = kernels.plan(shape, inner, up, itemsize)
                    lines, tile, blocks = options["LINES"], options["WIDTH"], sizes["blocks"]
                    extent = channels if inner else width
                    assert (blocks - 1) * tile < extent <= blocks * tile
                    assert sizes["units"] * options["ALIGN"] == extent
                    groups = programs // blocks
                    assert groups * blocks == programs
                    count = sizes["images"] * height * (sizes["runs"] if inner else 1)
                    assert (groups - 1) * lines < count <= groups * lines
                    if inner:
                        assert (sizes["runs"] - 1) * options["RUN"] < width <= sizes["runs"] * options["RUN"]
                    else:
                        assert options["WHOLE"] == (tile >= width)
                    # Of the larger image.
                    assert options["INDEX"] == tl.int64 or 4 * samples * channels * height * width < 2**31
                    assert 1 <= options["num_warps"] <= 8


def empty() -> None:
    from lsgm_fast.kernels import fir_resample

    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = torch.zeros(shape)
        assert fir_resample.forward(x, None, None, True, True).shape == (*shape[:2], 2 * shape[2], 8)
        assert fir_resample.backward(x, True, True).shape == (*shape[:2], shape[2] // 2, 2)


def results_have_the_inputs_formats() -> None:
    from lsgm_fast.kernels import fir_resample

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, 4, 6).to(dtype).contiguous(memory_format=memory_format)
            y = fir_resample.forward(x, None, None, False, True)
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=memory_format)


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import fir_resample

    with pytest.raises(ValueError, match="contiguous or the channels_last"):
        fir_resample.forward(torch.zeros(2, 3, 4, 8)[..., ::2], None, None, True, True)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "several tiles": forced(TILE=16, COLUMNS=8, PIXEL_TILE=16, CHANNELS=8),
    "longer runs": forced(RUN={True: 3, False: 3}),
    "plans": plans_cover_every_element,
    "empty": empty,
    "formats": results_have_the_inputs_formats,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
