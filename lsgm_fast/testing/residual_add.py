"""Sample inputs of ``residual_add``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import F16, F32, F64, SAME_DTYPES, Call, Draw, OpSamples, Shape

# Features of the published score networks, at their finest and at a coarser resolution.
SHAPES: dict[str, Shape] = {
    "finest": (512, 16, 16),
    "coarser": (512, 8, 8),
    "celeba256": (256, 32, 32),
    "mnist": (256, 8, 8),
}


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    x = draw.normal(*shape, dtype=dtype, layout=layout)
    return (x, draw.normal(*shape, dtype=network_dtype, layout=layout), 1.0 / math.sqrt(2.0)), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape = (3, 6, 5, 7)
    for first, second in (
        ("contiguous", "channels_last"),
        ("channels_last", "contiguous"),
        ("random", "expanded"),
    ):
        name = f"x {first}, h {second}"
        source = draw(name)
        yield name, ((source.normal(*shape, layout=first), source.normal(*shape, layout=second), 0.5), {})
    for name, odd in (("5-D", (2, 3, 3, 5, 2)), ("2-D", (4, 37)), ("0-d", ())):
        source = draw(name)
        yield name, ((source.normal(*odd), source.normal(*odd), 0.3), {})
    for name, scale in (("scale 0", 0.0), ("scale negative", -3.0), ("scale large", 1e30)):
        yield name, ((draw(name).normal(*shape), draw(name + " h").normal(*shape), scale), {})
    # A number must not be rounded to float32 where the arithmetic is float64.
    name = "scale float64"
    yield name, ((draw(name).normal(*shape, dtype=F64), draw(name + " h").normal(*shape, dtype=F64), 0.1), {})
    name = "cancelling"
    x = draw(name).normal(*shape, mean=1e4)
    yield name, ((x, -x * 0.999, 0.5), {})
    name = "non-finite"
    x, h = draw(name).normal(*shape, dtype=F32), draw(name + " h").normal(*shape, dtype=F32)
    x[0, 1, 2, 3], x[1, 2, 0, 0], h[2, 3, 4, 6], h[0, 0, 0, 0] = (
        float(v) for v in ("nan", "inf", "nan", "-inf")
    )
    yield name, ((x, h, 0.7), {})


SAMPLES = {
    "residual_add": OpSamples(
        build, SHAPES, dtypes=(*SAME_DTYPES, (F32, F16)), differentiable=(0, 1), extra=extra
    )
}
