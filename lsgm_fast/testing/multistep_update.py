"""Sample inputs of ``multistep_update``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lsgm_fast.testing.inputs import LATENT_SHAPES, MIXED_DTYPES, Call, Draw, OpSamples, Shape


def build(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    y = draw.normal(*shape, dtype=dtype, layout=layout)
    history = [draw.normal(*shape, dtype=network_dtype, layout=layout) for _ in range(2)]
    return (y, 0.9, history, [0.3, -0.1]), {}


def extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    shape, f32 = (3, 6, 5, 7), torch.float32

    def args(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        (y, _, history, _), _ = build(draw(name), shape, f32, f32, "contiguous")
        return y, history

    per_channel = [draw(f"channel {i}").normal(1, 6, 1, 1) for i in range(3)]
    y, history = args("per channel")
    yield "per channel", ((y, per_channel[0], history, per_channel[1:]), {})
    yield "mixed coefficients", ((y, 0.9, history, [per_channel[1], torch.tensor(0.2, device=y.device)]), {})
    yield "no history", ((y, per_channel[0], [], []), {})
    y, history = args("four terms")
    yield "four terms", ((y, 1.0, [*history, *history], [2.3, -3.7, 1.5, -0.1]), {})


SAMPLES = {
    "multistep_update": OpSamples(
        build, LATENT_SHAPES, dtypes=MIXED_DTYPES, differentiable=(0, 2), extra=extra
    )
}
