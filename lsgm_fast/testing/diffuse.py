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
    shape, f32 = (3, 6, 5, 7), torch.float32

    def tensors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        (z0, noise, _, _), _ = build(draw(name), shape, f32, f32, "contiguous")
        return z0, noise

    device = draw("").device
    yield "numbers", ((*tensors("numbers"), 0.8, 0.36), {})
    m, var = torch.tensor(0.8, device=device), torch.tensor([0.36], device=device)
    yield "shared", ((*tensors("shared"), m, var), {})
    yield (
        "no noise",
        ((*tensors("no noise"), torch.ones(3, device=device), torch.zeros(3, device=device)), {}),
    )
    yield "off centre", ((tensors("off centre")[0] + 1e4, tensors("off centre")[1], m, var), {})


SAMPLES = {
    "diffuse": OpSamples(build, LATENT_SHAPES, dtypes=MIXED_DTYPES, differentiable=(0, 1), extra=extra)
}
