"""Sample inputs of ``philox_normal``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import LATENT_SHAPES, Call, Draw, OpSamples, Shape


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    indices = torch.arange(shape[0])
    return (1234, indices, "noise", shape[1:], dtype, draw.device), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    device, f32 = draw("").device, torch.float32
    for elements in (0, 1, 2, 3, 4, 5, 31, 1027):
        yield f"{elements} elements", ((7, [0, 1], "noise", (elements,), f32, device), {})
    yield "largest seed", ((2**64 - 1, [2**32 - 1, 0], "noise", (17,), f32, device), {})
    yield "substream", ((7, [5, 3, 5], 2**32 - 1, (3, 5), f32, device), {"substream": 2**32 - 1})
    yield "no samples", ((7, [], "noise", (3, 5), f32, device), {})
    yield "indices on the device", ((7, torch.tensor([9, 2], device=device), "z", (4, 4), f32, device), {})


SAMPLES = {"philox_normal": OpSamples(build, LATENT_SHAPES, layouts=(), extra=extra)}
