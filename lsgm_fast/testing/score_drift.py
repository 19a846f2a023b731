"""Sample inputs of ``score_drift``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lsgm_fast.testing import mixed_score
from lsgm_fast.testing.inputs import (
    LATENT_SHAPES,
    MIXED_DTYPES,
    Call,
    Draw,
    OpSamples,
    Shape,
    describe_dtypes,
)

_NAMES = ("eps", "z", "mixing_logit", "p", "q", "r")


def build(
    draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str, mean: float = 0.0
) -> Call:
    (eps, z, logit, r), _ = mixed_score.build(draw, shape, dtype, network_dtype, layout, mean)
    p = draw.uniform(shape[0], low=-5.0, high=5.0, dtype=r.dtype)
    q = draw.uniform(shape[0], low=0.1, high=30.0, dtype=r.dtype)
    return (eps, z, logit, p, q, r), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape, f32, f64 = (3, 6, 5, 7), torch.float32, torch.float64
    device = draw("").device

    def call(name: str, *, shape: Shape = shape, mean: float = 0.0, **changed: Any) -> tuple[str, Call]:
        args = dict(zip(_NAMES, build(draw(name), shape, f32, f32, "contiguous", mean)[0], strict=True))
        return name, (tuple({**args, **changed}.values()), {})

    numbers: dict[str, Any] = {"p": -1.5, "q": 3.0, "r": 0.7}
    shared: dict[str, Any] = {key: torch.tensor(value, device=device) for key, value in numbers.items()}
    yield call("numbers", **numbers)
    yield call("shared", **shared)
    yield call("shared and per sample", p=0.0, q=shared["q"][None])
    on_cpu: dict[str, Any] = {key: torch.tensor(value, dtype=f64) for key, value in numbers.items()}
    yield call("float64 0-d on the CPU", **on_cpu)
    # Columns of a block of controls, as a solver keeps them.
    block = draw("strided").uniform(3, 8, low=0.1, high=2.0, dtype=f64)
    for name, values in (("strided", block.float()), ("strided float64", block)):
        columns: dict[str, Any] = {key: values[:, column] for column, key in enumerate("pqr")}
        yield call(name, **columns)
    yield call("expanded", **{**shared, "p": shared["p"].expand(3)})
    zero = torch.zeros(3, device=device)
    yield call("zero", p=zero, q=zero, r=zero)
    # A number must not be rounded to float32 where the arithmetic is float64.
    name = "numbers, float64"
    source = draw(name)
    yield call(name, eps=source.normal(*shape, dtype=f64), z=source.normal(*shape, dtype=f64), **numbers)
    yield call("no mixing", mixing_logit=None)
    for dtype, network_dtype, layout in (
        (f32, f32, "channels_last"),
        (torch.bfloat16, f32, "contiguous"),
        (f64, f32, "channels_last"),
    ):
        name = f"no mixing, {describe_dtypes(dtype, network_dtype)} {layout}"
        args, _ = build(draw(name), shape, dtype, network_dtype, layout)
        yield name, ((*args[:2], None, *args[3:]), {})
    yield call("no mixing, 5-D", shape=(2, 3, 3, 5, 2), mixing_logit=None)
    yield call("no mixing, 2-D", shape=(4, 37), mixing_logit=None)
    # Small times: q z and q eps cancel to what the network corrects.
    yield call("stiff", q=torch.full((3,), 1e4, device=device))
    name = "stiff, small difference"
    args, _ = build(draw(name), shape, f32, f32, "contiguous")
    eps = args[5].reshape(-1, 1, 1, 1) * args[1] * (1 + 1e-3 * args[0])
    yield name, ((eps, *args[1:4], torch.full((3,), 1e4, device=device), args[5]), {})
    logit = (1, 6, 1, 1)
    yield call("logit float64", mixing_logit=draw("logit float64").normal(*logit, dtype=f64))
    yield call("logit bfloat16", mixing_logit=draw("logit bfloat16").normal(*logit, dtype=torch.bfloat16))
    yield call("logit strided", mixing_logit=draw("logit strided").normal(1, 12, 1, 1)[:, ::2])
    signs = torch.tensor([40.0, -40.0] * 3, device=device).reshape(logit)
    yield call("logit +-40", mixing_logit=signs)
    yield call("logit +-1000", mixing_logit=signs * 25)
    yield call("off centre", mean=1e4)
    yield call("large values", mean=1e30)
    for name, odd in (("5-D", (2, 3, 3, 5, 2)), ("3-D", (2, 3, 11)), ("2-D", (4, 37))):
        yield call(name, shape=odd)
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


# `differentiable` is left out: the fused kernels are for solvers and have no backward pass, and
# tests/test_reference_ops.py checks the gradients of the reference.
SAMPLES = {"score_drift": OpSamples(build, LATENT_SHAPES, dtypes=MIXED_DTYPES, extra=extra)}
