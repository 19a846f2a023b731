"""Sample inputs of ``up_conv2d``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import DENSE_LAYOUTS, F32, Call, Draw, OpSamples, Shape

# What decoder cells of the presets enlarge.
SHAPES: dict[str, Shape] = {
    "digits": (48, 8, 8),
    "celebahq256": (128, 32, 32),
    "celebahq256 highest": (64, 64, 64),
}
AWKWARD: tuple[Shape, ...] = ((1, 1, 1, 1), (3, 5, 7, 9), (2, 17, 1, 1), (1, 3, 1, 131), (0, 4, 3, 3))


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    *,
    out: int | None = None,
    bias: bool = True,
    mean: float = 0.0,
) -> Call:
    """``out``: channels of the result (None: half of the input's, rounded up)."""
    channels = shape[1]
    out = -(-channels // 2) if out is None else out
    x = draw.normal(*shape, dtype=dtype, layout=layout, mean=mean)
    weight = draw.normal(out, channels, 3, 3, dtype=dtype, std=(9 * max(channels, 1)) ** -0.5)
    return (x, weight, draw.normal(out, dtype=dtype) if bias else None), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    for layout in DENSE_LAYOUTS:
        name = f"no bias {layout}"
        yield name, build(draw(name), (2, 6, 5, 4), F32, F32, layout, bias=False)
    yield "one channel out", build(draw("one channel out"), (2, 6, 5, 4), F32, F32, "channels_last", out=1)
    yield "one channel in", build(draw("one channel in"), (2, 1, 5, 4), F32, F32, "channels_last", out=9)
    yield "off centre", build(draw("off centre"), (2, 6, 5, 4), F32, F32, "contiguous", mean=1e2)


SAMPLES = {
    "up_conv2d": OpSamples(
        build, SHAPES, awkward=AWKWARD, differentiable=(0, 1, 2), extra=extra, selftest=(2, 20, 5, 6)
    )
}
