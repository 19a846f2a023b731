"""Sample inputs of ``bn_swish``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import F32, F64, Call, Draw, OpSamples, Sample, Shape

# Cells of the published decoders and encoders, (C, H, W).
CELL_SHAPES: dict[str, Shape] = {
    "cifar10 cell": (128, 16, 16),
    "cifar10 expanded": (768, 16, 16),
    "celebahq256 expanded": (384, 64, 64),
}
# Batch statistics need more than one element per channel.
AWKWARD: tuple[Shape, ...] = (
    (1, 1, 1, 5),
    (3, 5, 7, 9),
    (2, 17, 1, 1),
    (5, 1, 33, 31),
    (1, 3, 1, 1031),
    (4, 2, 8, 4),
    (1, 70, 3, 3),
)


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    batch_stats: bool = False,
    mean: float = 0.3,
) -> Call:
    wide = F64 if dtype == F64 else F32
    x = draw.normal(*shape, dtype=dtype, layout=layout, mean=mean, std=1.5)
    channels = shape[1]
    weight = draw.normal(channels, dtype=wide, mean=1.0, std=0.3)
    bias = draw.normal(channels, dtype=wide, std=0.3)
    running_mean = draw.normal(channels, dtype=wide, mean=mean, std=0.3)
    running_var = draw.uniform(channels, low=0.2, high=3.0, dtype=wide)
    return (x, weight, bias, running_mean, running_var, batch_stats), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    for layout in ("contiguous", "channels_last", "sliced", "random"):
        name = f"batch statistics {layout}"
        yield name, build(draw(name), (3, 5, 6, 7), F32, F32, layout, True)
    for dtype in (F64, torch.bfloat16):
        name = f"batch statistics {dtype}"
        yield name, build(draw(name), (3, 5, 6, 7), dtype, dtype, "contiguous", True)
    # Several chunks per channel, more channels than one tile, many small planes.
    for shape in ((2, 3, 67, 71), (1, 1030, 3, 5), (150, 18, 2, 3)):
        for layout in ("contiguous", "channels_last"):
            name = f"batch statistics {shape} {layout}"
            yield name, build(draw(name), shape, F32, F32, layout, True)
    for layout in ("contiguous", "channels_last"):
        name = f"batch statistics float16 {layout}"
        yield name, build(draw(name), (3, 5, 6, 7), torch.float16, torch.float16, layout, True)
    for batch_stats in (False, True):
        name = f"no swish {batch_stats}"
        args, _ = build(draw(name), (3, 5, 6, 7), F32, F32, "contiguous", batch_stats)
        yield name, (args, {"swish": False, "eps": 1e-3})
        # E[x^2] - E[x]^2 has no digits left here.
        name = f"off centre {batch_stats}"
        yield name, build(draw(name), (3, 5, 6, 7), F32, F32, "contiguous", batch_stats, 1e4)
    name = "empty"
    yield name, build(draw(name), (0, 4, 3, 3), F32, F32, "contiguous")


def traffic(sample: Sample, results: object) -> int:
    """x and y, and x once more for the statistics of the batch."""
    x, *parameters = sample.tensors()
    passes = 3 if sample.args[5] else 2
    return passes * x.numel() * x.element_size() + sum(p.numel() * p.element_size() for p in parameters)


SAMPLES = {
    "bn_swish": OpSamples(
        build, CELL_SHAPES, awkward=AWKWARD, differentiable=(0, 1, 2), extra=extra, traffic=traffic
    )
}
