"""Sample inputs of ``depthwise_bn_swish``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.bn_swish import CELL_SHAPES
from lsgm_fast.testing.inputs import F32, Call, Draw, OpSamples, Shape

AWKWARD: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (1, 1, 1, 5),
    (3, 5, 7, 9),
    (2, 17, 1, 1),
    (5, 1, 33, 31),
    (1, 3, 4, 131),
    (1, 70, 3, 3),
)


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    stride: int = 1,
    size: int = 5,
) -> Call:
    channels = shape[1]
    x = draw.normal(*shape, dtype=dtype, layout=layout)
    weight = draw.normal(channels, 1, size, size, dtype=dtype, std=1.0 / size)
    scales = [draw.normal(channels, dtype=dtype, mean=1.0, std=0.3) for _ in range(2)]
    shifts = [draw.normal(channels, dtype=dtype, std=0.3) for _ in range(2)]
    return (x, weight, stride, scales[0], shifts[0], scales[1], shifts[1]), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    for shape in ((3, 5, 6, 7), (2, 3, 8, 8), (1, 4, 1, 1)):
        for layout in ("contiguous", "channels_last"):
            name = f"stride 2 {'x'.join(map(str, shape))} {layout}"
            yield name, build(draw(name), shape, F32, F32, layout, 2)
    args, _ = build(draw("parts"), (3, 5, 6, 7), F32, F32, "contiguous")
    yield "neither side", (args[:3], {})
    yield "in front only", (args[:5], {})
    yield "behind only", (args[:3], {"post_scale": args[5], "post_shift": args[6]})
    for size in (1, 3, 7):
        name = f"{size}x{size}"
        yield name, build(draw(name), (3, 5, 6, 7), F32, F32, "contiguous", 1, size)


SAMPLES = {
    "depthwise_bn_swish": OpSamples(
        build, CELL_SHAPES, awkward=AWKWARD, differentiable=(0, 1, 3, 4, 5, 6), extra=extra
    )
}
