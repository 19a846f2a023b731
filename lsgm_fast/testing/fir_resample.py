"""Sample inputs of ``fir_resample``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import (
    AWKWARD_SHAPES,
    BF16,
    DENSE_LAYOUTS,
    F16,
    F32,
    LAYOUTS,
    Call,
    Draw,
    OpSamples,
    Shape,
    describe_shape,
)

SHAPES: dict[str, Shape] = {
    "cifar10": (512, 8, 8),
    "celebahq256": (512, 16, 16),
    "celebahq256 highest": (256, 32, 32),
}
"""What the published networks enlarge; they reduce what is twice as large."""


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    direction: str = "up",
    fir: bool = True,
) -> Call:
    return (draw.normal(*shape, dtype=dtype, layout=layout), direction, fir), {}


def activated(
    draw: Draw, shape: Shape, dtype: torch.dtype, layout: str, direction: str, fir: bool = True
) -> Call:
    """With factor and shift. Everything goes by its name: what has no position gets no gradient."""
    (x, _, _), _ = build(draw, shape, dtype, dtype, layout, direction)
    factor = draw.normal(*shape[:2], mean=1.0, std=0.3, layout="offset")
    shift = draw.normal(*shape[:2], std=0.3)
    return (), {"x": x, "direction": direction, "fir": fir, "factor": factor, "shift": shift}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    for shape in ((3, 5, 6, 8), (1, 1, 2, 2), (2, 3, 2, 66), (2, 3, 66, 2), (2, 70, 4, 4), (1, 18, 36, 34)):
        for layout in DENSE_LAYOUTS:
            name = f"down {describe_shape(shape)} {layout}"
            yield name, build(draw(name), shape, F32, F32, layout, "down")
    for dtype in (BF16, F16):
        for layout in DENSE_LAYOUTS:
            name = f"down {dtype} {layout}"
            yield name, build(draw(name), (3, 5, 6, 8), dtype, dtype, layout, "down")
    for layout in LAYOUTS:
        if layout not in DENSE_LAYOUTS:
            yield f"down {layout}", build(draw(f"down {layout}"), (3, 5, 6, 8), F32, F32, layout, "down")
    for shape_name, (channels, height, width) in SHAPES.items():
        shape = (1, channels, 2 * height, 2 * width)
        yield f"down {shape_name}", build(draw(f"down {shape_name}"), shape, F32, F32, "contiguous", "down")
    for direction in ("up", "down"):
        for shape in ((3, 5, 6, 8), (2, 17, 2, 34)):
            for layout in DENSE_LAYOUTS:
                name = f"plain {direction} {describe_shape(shape)} {layout}"
                yield name, build(draw(name), shape, F32, F32, layout, direction, False)
    for direction, shape in (("up", (2, 19, 3, 5)), ("up", (2, 3, 1, 1)), ("down", (2, 19, 6, 4))):
        for dtype in (F32, BF16, F16):
            for layout in DENSE_LAYOUTS:
                for fir in (True, False):
                    name = f"activated {direction} {describe_shape(shape)} {dtype} {layout}{'' if fir else ' plain'}"
                    yield name, activated(draw(name), shape, dtype, layout, direction, fir)
    for layout in DENSE_LAYOUTS:
        for direction, (channels, height, width) in (("up", (64, 16, 16)), ("down", (64, 32, 32))):
            name = f"activated {direction} {channels}x{height}x{width} {layout}"
            yield name, activated(draw(name), (2, channels, height, width), F32, layout, direction)


SAMPLES = {
    "fir_resample": OpSamples(
        build,
        SHAPES,
        awkward=tuple(s for s in AWKWARD_SHAPES if all(s[1:])),
        differentiable=(0,),
        extra=extra,
    )
}
