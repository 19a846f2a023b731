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
    shape, f32, f64 = (3, 6, 5, 7), torch.float32, torch.float64
    device = draw("").device

    def call(name: str, shape: Shape = shape, **changed: object) -> tuple[str, Call]:
        args = list(build(draw(name), shape, f32, f32, "contiguous")[0])
        for key, value in changed.items():
            value = value.to(device) if isinstance(value, torch.Tensor) else value
            args[("pred", "noise", "weight_p", "weight_q", "const").index(key)] = value
        return name, (tuple(args), {})

    def prior(name: str, shape: Shape = shape, **changed: object) -> tuple[str, Call]:
        name, (args, kwargs) = call(name, shape, **changed)
        return name, (args[:3], kwargs)

    yield prior("prior only")
    name, (args, _) = call("numbers", weight_p=2.0, weight_q=0.5)
    yield name, (args[:4], {"const": -1.25})
    # Numbers must not be rounded to float32 where the arithmetic is float64.
    wide = draw("numbers, float64").normal(*shape, dtype=f64)
    yield call("numbers, float64", pred=wide, weight_p=0.7, weight_q=0.3, const=0.1)
    shared = torch.tensor([0.5])
    yield call("shared", weight_p=shared, weight_q=shared[0])
    yield call("weight_p shared", weight_p=shared)
    yield call("no weight", weight_p=0.0, weight_q=torch.zeros(3))
    values = torch.linspace(0.1, 9.0, 6)
    yield call("strided weights", weight_p=values[::2], weight_q=values[1::2])
    yield call("expanded weights", weight_p=shared.expand(3), weight_q=shared.expand(3))
    yield call("float64 weights", weight_p=values[:3].double(), weight_q=torch.tensor(0.3, dtype=f64))
    source = draw("off centre")
    yield call("off centre", pred=source.normal(*shape, mean=1e4), noise=source.normal(*shape, mean=1e4))
    yield call("large values", pred=draw("large values").normal(*shape, std=1e16))
    # Squares that overflow unless they meet their weight first, each for itself.
    small = torch.full((3,), 1e-3)
    yield prior("close to overflow", pred=draw("close to overflow").normal(*shape, std=2e18), weight_p=small)
    for name, odd in (("5-D", (2, 3, 3, 5, 2)), ("3-D", (2, 3, 11)), ("2-D", (4, 37))):
        yield call(name, odd)
        yield prior(f"{name}, prior only", odd)
    yield call("tiny samples", (300, 2, 1, 3))
    yield prior("tiny samples, prior only", (300, 2, 1, 3))
    yield prior("empty batch, prior only", (0, 4, 3, 3))
    for first, second in (
        ("contiguous", "channels_last"),
        ("channels_last", "contiguous"),
        ("random", "expanded"),
    ):
        name = f"pred {first}, noise {second}"
        source = draw(name)
        yield call(name, pred=source.normal(*shape, layout=first), noise=source.normal(*shape, layout=second))
    name = "non-finite"
    pred, noise = draw(name).normal(*shape), draw(name + " noise").normal(*shape)
    pred[0, 1, 2, 3], pred[1, 2, 0, 0], noise[2, 3, 4, 6], noise[2, 0, 0, 0] = (
        float(v) for v in ("nan", "inf", "inf", "-inf")
    )
    yield call(name, pred=pred, noise=noise)


SAMPLES = {
    "score_matching_loss": OpSamples(
        build, LATENT_SHAPES, dtypes=MIXED_DTYPES, differentiable=(0, 1), extra=extra
    )
}
