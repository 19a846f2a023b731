"""Sample inputs of ``mixture_logistic_log_prob`` and ``mixture_logistic_mean``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import BF16, F16, F32, F64, Call, Draw, OpSamples, Shape, lay_out

# Pixels (3, H, W).
SHAPES: dict[str, Shape] = {"cifar10": (3, 32, 32), "celebahq256 crop": (3, 64, 64)}
AWKWARD: tuple[Shape, ...] = ((1, 3, 1, 1), (1, 3, 1, 5), (3, 3, 7, 9), (0, 3, 4, 4))
MIXTURES = 10


def _logits(draw: Draw, shape: Shape, dtype: torch.dtype, layout: str, mixtures: int) -> torch.Tensor:
    return draw.normal(shape[0], 10 * mixtures, *shape[2:], dtype=dtype, layout=layout)


def build_log_prob(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    num_bits: int = 8,
    mixtures: int = MIXTURES,
) -> Call:
    levels = 2**num_bits - 1
    pixels = draw.uniform(*shape, low=0.0, high=levels + 1.0, dtype=torch.float64).floor()
    x = lay_out((pixels / levels * 2 - 1).to(dtype), layout, draw.generator)
    return (x, _logits(draw, shape, network_dtype, layout, mixtures), num_bits), {}


def build_mean(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    return (_logits(draw, shape, dtype, layout, MIXTURES),), {}


def extra_log_prob(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape = (2, 3, 5, 4)
    yield "5 bits", build_log_prob(draw("5 bits"), shape, F32, F32, "contiguous", 5)
    yield "1 mixture", build_log_prob(draw("1 mixture"), shape, F32, F32, "contiguous", 8, 1)
    (x, logits, bits), _ = build_log_prob(draw("edges"), shape, F32, F32, "contiguous")
    edges = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
    yield "first and last bins", ((edges, logits, bits), {})
    yield "narrow scales", ((x, logits * 3 - 4.0, bits), {})


SAMPLES = {
    "mixture_logistic_log_prob": OpSamples(
        build_log_prob,
        SHAPES,
        awkward=AWKWARD,
        dtypes=((F32, F32), (F64, F64), (F32, BF16), (F32, F16)),
        differentiable=(1,),
        extra=extra_log_prob,
        base=(2, 3, 5, 4),
        selftest=(2, 3, 7, 5),
    ),
    "mixture_logistic_mean": OpSamples(
        build_mean,
        SHAPES,
        awkward=AWKWARD,
        differentiable=(0,),
        base=(2, 3, 5, 4),
        selftest=(2, 3, 7, 5),
    ),
}
