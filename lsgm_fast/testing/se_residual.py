"""Sample inputs of ``se_residual``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import F32, Call, Draw, OpSamples, Shape

SHAPES: dict[str, Shape] = {
    "cifar10 cell": (128, 16, 16),
    "cifar10 outer cell": (128, 32, 32),
    "cifar10-nll cell": (512, 8, 8),
    "celebahq256 cell": (64, 64, 64),
    "celebahq256 middle cell": (128, 32, 32),
    "celebahq256 deep cell": (256, 16, 16),
    "mnist cell": (256, 8, 8),
    "demo cell": (64, 4, 4),
}
AWKWARD: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (1, 1, 1, 5),
    (3, 5, 7, 9),
    (2, 17, 1, 1),
    (5, 1, 33, 31),
    (1, 3, 1, 1031),
    (2, 70, 3, 3),
    (1, 136, 8, 8),
    (2, 2, 64, 129),
    (0, 4, 3, 3),
)


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    mean: float = 0.2,
) -> Call:
    channels = shape[1]
    hidden = max(channels // 16, 4)
    skip = draw.normal(*shape, dtype=dtype, layout=layout)
    x = draw.normal(*shape, dtype=dtype, layout=layout, mean=mean)
    reduce_weight = draw.normal(hidden, channels, dtype=dtype, std=channels**-0.5)
    reduce_bias = draw.normal(hidden, dtype=dtype)
    expand_weight = draw.normal(channels, hidden, dtype=dtype, std=hidden**-0.5)
    expand_bias = draw.normal(channels, dtype=dtype)
    return (skip, x, reduce_weight, reduce_bias, expand_weight, expand_bias), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    args, _ = build(draw("scale 1"), (3, 5, 6, 7), F32, F32, "contiguous")
    yield "scale 1", (args, {"scale": 1.0})
    yield "off centre", build(draw("off centre"), (3, 5, 6, 7), F32, F32, "contiguous", 1e4)


SAMPLES = {
    "se_residual": OpSamples(build, SHAPES, awkward=AWKWARD, differentiable=(0, 1, 2, 3, 4, 5), extra=extra)
}
