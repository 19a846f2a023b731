"""Sample inputs of ``rk_finish``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lsgm_fast.sampling import rk45
from lsgm_fast.testing.inputs import LATENT_SHAPES, MIXED_DTYPES, Call, Draw, OpSamples, Sample, Shape
from lsgm_fast.testing.rk_stage import state_and_stages

B, E = (tuple(float(x) for x in row) for row in (rk45.B, rk45.E))


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    y, k = state_and_stages(draw, shape, dtype, network_dtype, layout)
    return (y, k, B, E, -0.05, 1e-3, 1e-3), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    f32 = torch.float32
    for shape in ((3, 6, 5, 7), (1, 2, 1, 1), (0, 2, 3, 3)):
        name = f"per sample {shape[0]}"
        args, _ = build(draw(name), shape, f32, f32, "contiguous")
        yield name, (args, {"per_sample": True})
    odd: tuple[Shape, ...] = ((13,), (3, 11))
    for other in odd:
        name = f"{len(other)}-D"
        yield name, build(draw(name), other, f32, f32, "contiguous")
    y, k = state_and_stages(draw("low order"), (3, 6, 5, 7), f32, f32, "contiguous", stages=2)
    yield "low order", ((y, k, (0.5, 0.5), (-0.5, 0.5), torch.tensor(0.1, device=y.device), 1e-5, 1e-2), {})


def traffic(sample: Sample, results: Sequence[Tensor]) -> int:
    """The state, its successor and every stage once."""
    y, k, b, e = sample.args[:4]
    used = max(len(b), len(e)) * k[0].numel() * k.element_size() if len(k) else 0
    return 2 * y.numel() * y.element_size() + used + results[1].numel() * results[1].element_size()


SAMPLES = {"rk_finish": OpSamples(build, LATENT_SHAPES, dtypes=MIXED_DTYPES, extra=extra, traffic=traffic)}
