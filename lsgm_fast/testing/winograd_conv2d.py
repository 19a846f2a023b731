"""Sample inputs of ``winograd_conv2d``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.ops.winograd_conv2d import winograd_weight
from lsgm_fast.testing.inputs import (
    DENSE_LAYOUTS,
    F32,
    LAYOUTS,
    SAME_DTYPES,
    Call,
    Draw,
    OpSamples,
    Shape,
    describe_shape,
)

# What the score networks convolve.
SHAPES: dict[str, Shape] = {
    "mnist": (256, 8, 8),
    "cifar10": (512, 8, 8),
    "celebahq256": (512, 16, 16),
    "celebahq256 highest": (256, 32, 32),
}
AWKWARD: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (3, 5, 7, 9),
    (2, 17, 1, 1),
    (5, 1, 33, 31),
    (1, 33, 1, 131),
    (1, 70, 6, 2),
    (40, 16, 3, 5),
    (0, 4, 3, 3),
)


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    *,
    out: int | None = None,
    tile: int | None = None,
    bias: bool = True,
    mean: float = 0.0,
) -> Call:
    """``out``: channels of the result (None: the input's). ``tile``: None: 2 in the contiguous format, else 4."""
    channels = shape[1]
    out = channels if out is None else out
    tile = (2 if layout == "contiguous" else 4) if tile is None else tile
    x = draw.normal(*shape, dtype=dtype, layout=layout, mean=mean)
    weight = draw.normal(out, channels, 3, 3, dtype=dtype, std=(9 * channels) ** -0.5)
    return (x, winograd_weight(weight, tile), draw.normal(out, dtype=dtype) if bias else None, out), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    for tile in (2, 4):
        for shape, out in (
            ((3, 5, 7, 9), 37),
            ((1, 1, 1, 1), 1),
            ((2, 31, 4, 4), 32),
            ((1, 48, 13, 3), 66),
            ((9, 7, 17, 12), 5),
            ((1, 160, 32, 32), 3),
        ):
            for layout in DENSE_LAYOUTS:
                name = f"F({tile}) {describe_shape(shape)} to {out} {layout}"
                yield name, build(draw(name), shape, F32, F32, layout, out=out, tile=tile)
        for layout in LAYOUTS:
            name = f"F({tile}) no bias {layout}"
            yield name, build(draw(name), (2, 6, 5, 4), F32, F32, layout, tile=tile, bias=False)
        name = f"F({tile}) off centre"
        yield name, build(draw(name), (2, 6, 5, 4), F32, F32, "channels_last", tile=tile, mean=1e2)


SAMPLES = {
    "winograd_conv2d": OpSamples(
        build,
        SHAPES,
        awkward=AWKWARD,
        dtypes=SAME_DTYPES,
        extra=extra,
        selftest=(2, 17, 9, 7),
    )
}
