"""Sample inputs of ``weight_norm``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import F32, Call, Draw, OpSamples, Shape

# Weights (C_out, C_in, K, K) of the published VAEs; a batch is a number of them.
SHAPES: dict[str, Shape] = {
    "cifar10 cell": (128, 128, 3, 3),
    "expansion": (768, 128, 1, 1),
    "depthwise": (768, 1, 5, 5),
}
AWKWARD: tuple[Shape, ...] = ((1, 1, 1, 1), (1, 3, 5, 5), (17, 1, 5, 5), (5, 7, 3, 3), (3, 67, 1, 1))


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    # Four sizes: two weights, which differ. Five: as many of one kind.
    shapes = [shape, (shape[0] + 1, *shape[1:])] if len(shape) == 4 else [shape[1:]] * shape[0]
    weights = [draw.normal(*s, dtype=dtype, layout=layout, std=0.2) for s in shapes]
    log_norms = [draw.normal(s[0], 1, 1, 1, dtype=dtype, std=0.5) for s in shapes]
    return (weights, log_norms), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    yield "no weights", (([], []), {})
    (weights, log_norms), _ = build(draw("many"), (4, 3, 3, 3), F32, F32, "contiguous")
    yield "many", ((weights * 20, log_norms * 20), {})
    tiny = [w * 1e-6 for w in weights]
    yield "tiny weights", ((tiny, log_norms), {})
    yield "eps", ((weights, log_norms), {"eps": 0.5})


SAMPLES = {
    "weight_norm": OpSamples(
        build,
        SHAPES,
        awkward=AWKWARD,
        layouts=("contiguous", "channels_last", "offset", "sliced", "transposed", "random"),
        differentiable=(0, 1),
        extra=extra,
        base=(6, 5, 3, 3),
        selftest=(5, 3, 3, 3),
    )
}
