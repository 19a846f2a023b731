"""Sample inputs of ``nvae_cell``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lsgm_fast.testing.inputs import DENSE_LAYOUTS, F32, Call, Draw, OpSamples, Shape

# Inputs of decoder cells of the published VAEs (MNIST: 128 channels at 8x8 and 64 at 32x32; CelebA-HQ: 64x64).
SHAPES: dict[str, Shape] = {
    "mnist cell": (128, 8, 8),
    "mnist last cell": (64, 32, 32),
    "celebahq256 cell": (64, 64, 64),
}
AWKWARD: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (1, 1, 1, 5),
    (3, 5, 7, 9),
    (2, 17, 1, 1),
    (1, 3, 1, 131),
    (0, 4, 3, 3),
)


def build(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    *,
    branch: str = "mconv",
    out: int | None = None,
    stride: int = 1,
    up: bool = False,
    batch_stats: bool = False,
    expansion: int = 6,
    first_bias: bool = True,
    squeeze_excite: bool = True,
    mean: float = 0.2,
) -> Call:
    """``out``: channels of the result (None: those of the input)."""
    samples, channels, *size = shape
    out = channels if out is None else out
    size = [s * 2 if up else -(-s // stride) for s in size]
    normal = functools.partial(draw.normal, dtype=dtype)

    def norm(width: int, mean: float = 0.0) -> list[torch.Tensor]:
        variance = draw.uniform(width, low=0.5, high=1.5, dtype=dtype)
        return [normal(width, mean=1.0, std=0.3), normal(width), normal(width, mean=mean), variance]

    def conv(*shape: int) -> torch.Tensor:
        return normal(*shape, std=float(torch.Size(shape[1:]).numel()) ** -0.5)

    x = normal(*shape, layout=layout, mean=mean)
    biases: Sequence[torch.Tensor] = ()
    if branch == "mconv":
        hidden = expansion * channels
        convs = [conv(hidden, channels, 1, 1), conv(hidden, 1, 5, 5), conv(out, hidden, 1, 1)]
        norms = [*norm(channels, mean), *norm(hidden), *norm(hidden), *norm(out)]
    else:
        convs = [conv(out, channels, 3, 3), conv(out, out, 3, 3)]
        biases = [normal(out) for _ in range(1 + first_bias)]
        norms = [*norm(channels, mean), *norm(out)]
    gate: Sequence[torch.Tensor] = ()
    if squeeze_excite:
        inner = max(out // 16, 4)
        gate = [conv(inner, out), normal(inner), conv(out, inner), normal(out)]
    skip = normal(samples, out, *size, layout=layout)
    return (x, skip, convs, biases, norms, gate, stride, up, batch_stats), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    for branch in ("mconv", "bnswish"):
        for shape in ((2, 6, 5, 7), (3, 20, 8, 8)):
            variants: dict[str, dict[str, Any]] = {
                "plain": {},
                "up": {"up": True, "out": 4},
                "down": {"stride": 2, "out": 8},
                "no gate": {"squeeze_excite": False, "up": True},
                "batch": {"batch_stats": True},
                "up, batch": {"batch_stats": True, "up": True, "out": 4},
                "down, batch": {"batch_stats": True, "stride": 2, "out": 8},
            }
            for name, options in variants.items():
                for layout in DENSE_LAYOUTS:
                    label = f"{branch} {name} {'x'.join(map(str, shape))} {layout}"
                    yield label, build(draw(label), shape, F32, F32, layout, branch=branch, **options)
    yield (
        "one bias",
        build(draw("one bias"), (2, 6, 5, 7), F32, F32, "contiguous", branch="bnswish", first_bias=False),
    )
    yield (
        "expansion 3",
        build(draw("expansion 3"), (2, 6, 5, 7), F32, F32, "contiguous", expansion=3, up=True),
    )
    yield "off centre", build(draw("off centre"), (2, 6, 5, 7), F32, F32, "contiguous", mean=1e2)


SAMPLES = {
    "nvae_cell": OpSamples(
        build, SHAPES, awkward=AWKWARD, differentiable=(0, 1), extra=extra, selftest=(2, 20, 5, 6)
    )
}
