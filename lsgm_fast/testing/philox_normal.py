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
    # Around one block of four, one register of blocks and one thread's piece of a sample.
    for elements in (0, 1, 2, 3, 4, 5, 31, 32, 33, 1027, 8191, 8192, 8193):
        yield f"{elements} elements", ((7, [0, 1], "noise", (elements,), f32, device), {})
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield f"odd size {dtype}", ((7, [0, 1, 2], "noise", (3, 17), dtype, device), {})
    yield "one element for each sample", ((7, [4, 3], "noise", (), f32, device), {})
    yield "largest seed", ((2**64 - 1, [2**32 - 1, 0], "noise", (17,), f32, device), {})
    yield "substream", ((7, [5, 3, 5], 2**32 - 1, (3, 5), f32, device), {"substream": 2**32 - 1})
    yield "seed of two words", ((2**63 + 2**32 + 5, [1], 0, (40,), torch.float64, device), {"substream": 1})
    yield "no samples", ((7, [], "noise", (3, 5), f32, device), {})
    spread = torch.arange(12, dtype=torch.int32, device=device)[1::5]
    yield "strided int32 indices", ((7, spread, "noise", (9,), f32, device), {})
    repeated = torch.tensor([2**32 - 2], device=device).expand(3)
    yield "one index for all", ((7, repeated, "noise", (9,), f32, device), {})
    yield "indices on the CPU", ((7, torch.tensor([9, 2]), "z", (4, 4), f32, device), {})
    yield "indices on the device", ((7, torch.tensor([9, 2], device=device), "z", (4, 4), f32, device), {})


SAMPLES = {"philox_normal": OpSamples(build, LATENT_SHAPES, layouts=(), extra=extra)}
