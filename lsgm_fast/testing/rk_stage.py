"""Sample inputs of ``rk_stage``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lsgm_fast.sampling import rk45
from lsgm_fast.testing.inputs import LATENT_SHAPES, MIXED_DTYPES, Call, Draw, OpSamples, Sample, Shape

# One row of the Dormand-Prince tableau; the solver's buffer holds all seven stages.
ROW = tuple(float(a) for a in rk45.A[4])
STAGES = 7


def state_and_stages(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    stages: int = STAGES,
) -> tuple[Tensor, Tensor]:
    """The state in ``layout``; the stages lie one behind the other."""
    return draw.normal(*shape, dtype=dtype, layout=layout), draw.normal(stages, *shape, dtype=network_dtype)


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    return (*state_and_stages(draw, shape, dtype, network_dtype, layout), ROW, -0.05), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    f32 = torch.float32
    for n in range(1, STAGES + 1):
        name = f"{n} stages"
        y, k = state_and_stages(draw(name), (3, 6, 5, 7), f32, f32, "contiguous")
        yield name, ((y, k, tuple(0.5 - 0.3 * i for i in range(n)), 0.1), {})
    for shape in ((13,), (3, 11), (2, 3, 5)):
        name = f"{len(shape)}-D"
        yield name, build(draw(name), shape, f32, f32, "contiguous")
    y, k = state_and_stages(draw("h on the device"), (3, 6, 5, 7), f32, f32, "contiguous")
    yield "h on the device", ((y, k, ROW, torch.tensor(-0.05, device=y.device)), {})


def traffic(sample: Sample, results: Sequence[Tensor]) -> int:
    """The state, its successor and the stages that are used."""
    y, k, a = sample.args[:3]
    used = len(a) * k[0].numel() * k.element_size() if len(k) else 0
    return 2 * y.numel() * y.element_size() + used


SAMPLES = {
    "rk_stage": OpSamples(
        build, LATENT_SHAPES, dtypes=MIXED_DTYPES, differentiable=(0, 1), extra=extra, traffic=traffic
    )
}
