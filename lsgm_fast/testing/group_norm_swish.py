"""Sample inputs of ``group_norm_swish``, ``group_norm_swish_residual`` and ``group_norm_swish_affine``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import F32, F64, Call, Draw, OpSamples, Shape

# Levels of the published score networks, (C, H, W).
SHAPES: dict[str, Shape] = {
    "cifar10": (512, 16, 16),
    "cifar10 lowest": (512, 8, 8),
    "celebahq256": (256, 32, 32),
    "celebahq256 up": (768, 32, 32),
}
# GroupNorm needs more than one element per group.
AWKWARD: tuple[Shape, ...] = (
    (1, 1, 1, 5),
    (3, 5, 7, 9),
    (2, 34, 1, 1),
    (5, 1, 33, 31),
    (1, 3, 1, 1031),
    (4, 8, 8, 4),
    (1, 70, 3, 3),
    (0, 4, 3, 3),
)


def groups_of(channels: int) -> int:
    """The largest number of groups up to min(C // 4, 32) (NCSN++) that divides the channels."""
    return next(g for g in range(max(min(channels // 4, 32), 1), 0, -1) if channels % g == 0)


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    mean: float = 0.3,
    bias: bool = True,
) -> Call:
    wide = F64 if dtype == F64 else F32
    channels = shape[1]
    x = draw.normal(*shape, dtype=dtype, layout=layout, mean=mean)
    weight = draw.normal(channels, dtype=wide, mean=1.0, std=0.3)
    shift = draw.normal(channels, dtype=wide, std=0.3)
    channel_bias = draw.normal(shape[0], channels, dtype=dtype) if bias else None
    return (x, weight, shift, groups_of(channels), 1e-6, channel_bias), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape = (3, 8, 6, 7)
    for layout in ("contiguous", "channels_last"):
        name = f"no bias {layout}"
        yield name, build(draw(name), shape, F32, F32, layout, bias=False)
        # One sample of few groups, which are cut into pieces.
        name = f"large {layout}"
        yield name, build(draw(name), (1, 4, 190, 191), F32, F32, layout)
    # E[x^2] - E[x]^2 has no digits left here.
    yield "off centre", build(draw("off centre"), shape, F32, F32, "contiguous", 1e4)
    args, _ = build(draw("groups"), shape, F32, F32, "contiguous")
    for groups in (1, 2, 4, 8):
        yield f"{groups} groups", ((*args[:3], groups), {})
    yield "no swish", (args, {"swish": False})


def build_residual(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    mean: float = 0.3,
) -> Call:
    (x, weight, shift, groups, eps, _), _ = build(draw, shape, dtype, network_dtype, layout, mean, False)
    residual = draw.normal(*shape, dtype=dtype, layout=layout)
    return (x, residual, weight, shift, groups, 2**-0.5, eps), {}


def extra_residual(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape = (3, 8, 6, 7)
    yield "off centre", build_residual(draw("off centre"), shape, F32, F32, "contiguous", 1e4)
    args, _ = build_residual(draw("other layout"), shape, F32, F32, "contiguous")
    other = args[1].contiguous(memory_format=torch.channels_last)
    yield "other layout", ((args[0], other, *args[2:]), {})
    yield "no swish", (args, {"swish": False})


def build_affine(
    draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str
) -> Call:
    (x, weight, shift, groups, eps, _), _ = build(draw, shape, dtype, network_dtype, layout, bias=False)
    return (x, weight, shift, groups, eps), {}


SAMPLES = {
    "group_norm_swish": OpSamples(build, SHAPES, awkward=AWKWARD, differentiable=(0, 1, 2, 5), extra=extra),
    "group_norm_swish_residual": OpSamples(
        build_residual, SHAPES, awkward=AWKWARD, differentiable=(0, 1, 2, 3), extra=extra_residual
    ),
    "group_norm_swish_affine": OpSamples(build_affine, SHAPES, awkward=AWKWARD),
}
