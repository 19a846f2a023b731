"""Sample inputs of ``group_norm_resample``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.group_norm_swish import build as build_norm
from lsgm_fast.testing.inputs import DENSE_LAYOUTS, F32, Call, Draw, OpSamples, Shape

SHAPES: dict[str, Shape] = {
    "cifar10": (512, 16, 16),
    "celebahq256": (256, 32, 32),
}


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    direction: str = "up",
    fir: bool = True,
) -> Call:
    (x, weight, shift, groups, eps, _), _ = build_norm(draw, shape, dtype, network_dtype, layout, bias=False)
    return (x, weight, shift, groups, direction, fir, eps), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    for layout in DENSE_LAYOUTS:
        for direction in ("up", "down"):
            for fir in (True, False):
                name = f"{'fir' if fir else 'plain'} {direction} {layout}"
                yield name, build(draw(name), (3, 8, 6, 10), F32, F32, layout, direction, fir)


SAMPLES = {
    "group_norm_resample": OpSamples(
        build,
        SHAPES,
        awkward=((1, 1, 1, 5), (3, 5, 7, 9), (2, 34, 1, 1), (1, 70, 3, 3), (0, 4, 3, 3)),
        differentiable=(0, 1, 2),
        extra=extra,
    )
}
