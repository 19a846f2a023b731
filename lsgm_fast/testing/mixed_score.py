"""Sample inputs of ``mixed_score``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import LATENT_SHAPES, MIXED_DTYPES, Call, Draw, OpSamples, Shape


def _logit(draw: Draw, shape: Shape, dtype: torch.dtype = torch.float32, std: float = 2.0) -> torch.Tensor:
    return draw.normal(1, shape[1], *(1,) * (len(shape) - 2), dtype=dtype, mean=-1.0, std=std)


def build(
    draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str, mean: float = 0.0
) -> Call:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eps = draw.normal(*shape, dtype=network_dtype, layout=layout, mean=mean)
    z = draw.normal(*shape, dtype=dtype, layout=layout, mean=mean)
    r = draw.uniform(shape[0], low=0.05, high=1.0, dtype=wide)
    return (eps, z, _logit(draw, shape, wide), r), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape = (3, 6, 5, 7)
    f32, f64 = torch.float32, torch.float64

    def plain(name: str, shape: Shape = shape, mean: float = 0.0) -> list[object]:
        return list(build(draw(name), shape, f32, f32, "contiguous", mean)[0])

    def call(name: str, shape: Shape = shape, mean: float = 0.0, **changed: object) -> tuple[str, Call]:
        args = plain(name, shape, mean)
        for key, value in changed.items():
            args[("eps", "z", "mixing_logit", "r").index(key)] = value
        return name, (tuple(args), {})

    for name, r in (
        ("r 0-d", torch.tensor(0.7)),
        ("r (1,)", torch.tensor([0.7])),
        ("r 0-d float64", torch.tensor(0.7, dtype=f64)),
        ("r (B,) float64", torch.linspace(0.1, 0.9, 3, dtype=f64)),
        ("r strided", torch.linspace(0.1, 0.9, 6)[::2]),
        ("r zero", torch.zeros(3)),
    ):
        yield call(name, r=r.to(draw(name).device))
    yield call("r number", r=0.7)
    # A number must not be rounded to float32 where the arithmetic is float64; only the logit's gradient shows it.
    name = "r number, network float64"
    wide = draw(name).normal(*shape, dtype=f64)
    yield call(name, eps=wide, mixing_logit=_logit(draw(name + " logit"), shape, f64), r=0.7)
    yield call("no mixing", mixing_logit=None)
    yield call("logit float64", mixing_logit=_logit(draw("logit float64"), shape, f64))
    yield call("logit strided", mixing_logit=_logit(draw("logit strided"), (3, 12, 5, 7))[:, ::2])
    signs = torch.tensor([40.0, -40.0] * 3).reshape(1, 6, 1, 1)
    yield call("logit +-40", mixing_logit=signs.to(draw("").device))
    yield call("logit +-1000", mixing_logit=(signs * 25).to(draw("").device))
    yield call("off centre", mean=1e4)
    yield call("large values", mean=1e30)
    for name, odd in (("5-D", (2, 3, 3, 5, 2)), ("3-D", (2, 3, 11)), ("2-D", (4, 37))):
        yield call(name, odd)
    for first, second in (
        ("contiguous", "channels_last"),
        ("channels_last", "contiguous"),
        ("random", "expanded"),
    ):
        name = f"eps {first}, z {second}"
        source = draw(name)
        yield call(name, eps=source.normal(*shape, layout=first), z=source.normal(*shape, layout=second))
    name = "non-finite"
    eps, z = draw(name).normal(*shape), draw(name + " z").normal(*shape)
    eps[0, 1, 2, 3], eps[1, 2, 0, 0], z[2, 3, 4, 6], z[0, 0, 0, 0] = (
        float(v) for v in ("nan", "inf", "nan", "-inf")
    )
    yield call(name, eps=eps, z=z)


SAMPLES = {
    "mixed_score": OpSamples(build, LATENT_SHAPES, dtypes=MIXED_DTYPES, differentiable=(0, 1, 2), extra=extra)
}
