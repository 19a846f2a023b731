"""Sample inputs of ``diffuse``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import LATENT_SHAPES, MIXED_DTYPES, Call, Draw, OpSamples, Shape


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z0 = draw.normal(*shape, dtype=dtype, layout=layout)
    noise = draw.normal(*shape, dtype=network_dtype, layout=layout)
    var = draw.uniform(shape[0], low=1e-5, high=1.0, dtype=wide)
    return (z0, noise, torch.sqrt(1 - var), var), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape, f32, f64 = (3, 6, 5, 7), torch.float32, torch.float64
    device = draw("").device

    def call(name: str, shape: Shape = shape, **changed: object) -> tuple[str, Call]:
        args = list(build(draw(name), shape, f32, f32, "contiguous")[0])
        for key, value in changed.items():
            value = value.to(device) if isinstance(value, torch.Tensor) else value
            args[("z0", "noise", "m", "var").index(key)] = value
        return name, (tuple(args), {})

    m, var = torch.tensor(0.8), torch.tensor([0.36])
    yield call("numbers", m=0.8, var=0.36)
    # A number must not be rounded to float32 where the arithmetic is float64.
    yield call("numbers, float64", z0=draw("numbers, float64").normal(*shape, dtype=f64), m=0.8, var=0.36)
    yield call("shared", m=m, var=var)
    yield call("shared and per sample", var=var)
    yield call("no noise", m=torch.ones(3), var=torch.zeros(3))
    values = torch.linspace(0.1, 0.9, 6)
    yield call("strided scalars", m=values[::2], var=values[1::2])
    yield call("expanded scalars", m=m.expand(3), var=var.expand(3))
    yield call("float64 scalars", m=values[:3].double(), var=torch.tensor(1e-5, dtype=f64))
    yield call("off centre", z0=draw("off centre").normal(*shape, mean=1e4), m=m, var=var)
    yield call("large values", z0=draw("large values").normal(*shape, std=1e30), var=var * 1e30)
    for name, odd in (("5-D", (2, 3, 3, 5, 2)), ("3-D", (2, 3, 11)), ("2-D", (4, 37)), ("1-D", (9,))):
        yield call(name, odd)
    yield call("tiny samples", (300, 2, 1, 3))
    for first, second in (
        ("contiguous", "channels_last"),
        ("channels_last", "contiguous"),
        ("random", "expanded"),
    ):
        name = f"z0 {first}, noise {second}"
        source = draw(name)
        yield call(name, z0=source.normal(*shape, layout=first), noise=source.normal(*shape, layout=second))
    name = "non-finite"
    z0, noise = draw(name).normal(*shape), draw(name + " noise").normal(*shape)
    z0[0, 1, 2, 3], z0[1, 2, 0, 0], noise[2, 3, 4, 6], noise[0, 0, 0, 0] = (
        float(v) for v in ("nan", "inf", "nan", "-inf")
    )
    yield call(name, z0=z0, noise=noise)


SAMPLES = {
    "diffuse": OpSamples(build, LATENT_SHAPES, dtypes=MIXED_DTYPES, differentiable=(0, 1), extra=extra)
}
