"""Sample inputs of ``fir_resample``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import AWKWARD_SHAPES, DENSE_LAYOUTS, F32, Call, Draw, OpSamples, Shape

SHAPES: dict[str, Shape] = {
    "cifar10": (512, 8, 8),
    "celebahq256": (512, 16, 16),
    "celebahq256 highest": (256, 32, 32),
}


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    direction: str = "up",
) -> Call:
    return (draw.normal(*shape, dtype=dtype, layout=layout), direction), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    for shape in ((3, 5, 6, 8), (1, 1, 2, 2), (2, 3, 2, 66), (2, 70, 4, 4)):
        for layout in DENSE_LAYOUTS:
            name = f"down {'x'.join(map(str, shape))} {layout}"
            yield name, build(draw(name), shape, F32, F32, layout, "down")
    for direction in ("up", "down"):
        args, _ = build(draw(f"plain {direction}"), (3, 5, 6, 8), F32, F32, "contiguous", direction)
        yield f"plain {direction}", (args, {"fir": False})


SAMPLES = {
    "fir_resample": OpSamples(
        build,
        SHAPES,
        awkward=tuple(s for s in AWKWARD_SHAPES if all(s[1:])),
        differentiable=(0,),
        extra=extra,
    )
}
