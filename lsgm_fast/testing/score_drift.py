"""Sample inputs of ``score_drift``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing import mixed_score
from lsgm_fast.testing.inputs import LATENT_SHAPES, MIXED_DTYPES, Call, Draw, OpSamples, Shape


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    (eps, z, logit, r), _ = mixed_score.build(draw, shape, dtype, network_dtype, layout)
    p = draw.uniform(shape[0], low=-5.0, high=5.0, dtype=r.dtype)
    q = draw.uniform(shape[0], low=0.1, high=30.0, dtype=r.dtype)
    return (eps, z, logit, p, q, r), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape, f32 = (3, 6, 5, 7), torch.float32

    def args(name: str) -> list[object]:
        return list(build(draw(name), shape, f32, f32, "contiguous")[0])

    yield "numbers", ((*args("numbers")[:3], -1.5, 3.0, 0.7), {})
    shared = [torch.tensor(v, device=draw("").device) for v in (-1.5, 3.0, 0.7)]
    yield "shared", ((*args("shared")[:3], *shared), {})
    mixed = args("mixed")
    yield "shared and per sample", ((*mixed[:3], 0.0, shared[1][None], mixed[5]), {})
    name = "no mixing"
    unmixed = args(name)
    unmixed[2] = None
    yield name, (tuple(unmixed), {})
    # Small times: q z and q eps cancel to what the network corrects.
    stiff = args("stiff")
    stiff[4] = torch.full((3,), 1e4, device=draw("").device)
    yield "stiff", (tuple(stiff), {})


SAMPLES = {
    "score_drift": OpSamples(build, LATENT_SHAPES, dtypes=MIXED_DTYPES, differentiable=(0, 1, 2), extra=extra)
}
