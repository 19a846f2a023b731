"""Sample inputs of ``score_matching_loss``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import LATENT_SHAPES, MIXED_DTYPES, Call, Draw, OpSamples, Shape


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pred = draw.normal(*shape, dtype=network_dtype, layout=layout)
    noise = draw.normal(*shape, dtype=dtype, layout=layout)
    weight_p, weight_q = (draw.uniform(shape[0], low=0.1, high=10.0, dtype=wide) for _ in range(2))
    return (pred, noise, weight_p, weight_q, 0.25), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape, f32 = (3, 6, 5, 7), torch.float32

    def args(name: str) -> tuple[object, ...]:
        return build(draw(name), shape, f32, f32, "contiguous")[0]

    yield "prior only", (args("prior only")[:3], {})
    yield "numbers", ((*args("numbers")[:2], 2.0, 0.5), {"const": -1.25})
    shared = torch.tensor([0.5], device=draw("").device)
    yield "shared", ((*args("shared")[:2], shared, shared[0]), {})
    pred, noise, *weights = args("off centre")
    yield "off centre", ((pred + 1e4, noise + 1e4, *weights), {})  # type: ignore[operator]


SAMPLES = {
    "score_matching_loss": OpSamples(
        build, LATENT_SHAPES, dtypes=MIXED_DTYPES, differentiable=(0, 1), extra=extra
    )
}
