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
    shape, f32, f64 = (3, 6, 5, 7), torch.float32, torch.float64

    def args(
        name: str,
        entries: int = 2,
        shape: Shape = shape,
        dtype: torch.dtype = f32,
        network_dtype: torch.dtype = f32,
        layouts: tuple[str, ...] = ("contiguous",),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        source = draw(name)
        y, *history = (
            source.normal(*shape, dtype=network_dtype if i else dtype, layout=layouts[i % len(layouts)])
            for i in range(entries + 1)
        )
        return y, history

    def kinds(name: str, shape: Shape, dtype: torch.dtype = f32) -> list[float | torch.Tensor]:
        """One coefficient of every kind, all of them different."""
        source = draw(name)
        ones = (1,) * (len(shape) - 2)
        return [
            source.normal(1, shape[1], *ones, dtype=dtype),
            -0.7,
            source.normal(shape[0], dtype=dtype),
            source.normal(dtype=dtype),
            source.normal(shape[0], shape[1], *ones, dtype=dtype),
        ]

    per_channel = [draw(f"channel {i}").normal(1, 6, 1, 1) for i in range(5)]
    y, history = args("per channel")
    yield "per channel", ((y, per_channel[0], history, per_channel[1:3]), {})
    yield "mixed coefficients", ((y, 0.9, history, [per_channel[1], torch.tensor(0.2, device=y.device)]), {})
    yield "no history", ((y, per_channel[0], [], []), {})
    yield "no history, a number", ((y, -1.5, [], []), {})
    yield "one entry", ((y, 0.25, history[:1], [1.75]), {})
    y, history = args("three entries", 3)
    yield "three entries", ((y, 1.0, history, [2.0, -1.5, 0.5]), {})
    y, history = args("four terms")
    yield "four terms", ((y, 1.0, [*history, *history], [2.3, -3.7, 1.5, -0.1]), {})
    y, history = args("a coefficient 0", 3)
    yield "a coefficient 0", ((y, 0, history, [0.0, 1.0, per_channel[0] * 0]), {})

    for name, odd in (
        ("4-D", shape),
        ("5-D", (2, 3, 3, 5, 2)),
        ("3-D", (2, 3, 11)),
        ("2-D", (4, 37)),
        ("planes of 2x2", (3, 70, 2, 2)),
        ("300 tiny samples", (300, 3, 2, 4)),
        ("300 channels", (2, 300, 2, 3)),
        ("one sample", (1, 20, 8, 8)),
    ):
        for layout in ("contiguous", "channels_last"):
            if layout == "contiguous" or len(odd) == 4:
                y, history = args(f"{name} {layout}", 4, odd, layouts=(layout,))
                c = kinds(name, odd)
                yield f"every kind, {name} {layout}", ((y, c[0], history, c[1:]), {})
                yield f"per sample, {name} {layout}", ((y, c[2], history[:2], [c[3], c[1]]), {})
                # Samples share their coefficients.
                yield f"all channels, {name} {layout}", ((y, c[0], history[:2], [c[3], c[0]]), {})

    for dtype, network_dtype in (
        (f64, f32),
        (f64, torch.bfloat16),
        (torch.float16, f64),
        (torch.bfloat16, f32),
    ):
        for layout in ("contiguous", "channels_last"):
            name = f"every kind, {dtype} {network_dtype} {layout}".replace("torch.", "")
            y, history = args(name, 4, (3, 8, 4, 8), dtype, network_dtype, (layout,))
            c = kinds(name, (3, 8, 4, 8), f64)
            yield name, ((y, c[0], history, c[1:]), {})
    # Numbers must not be rounded to float32 where the arithmetic is float64, nor lose their range.
    y, history = args("numbers in float64", 3, dtype=f64)
    yield "numbers in float64", ((y, 1 / 3, history, [1e-200, -1e5 / 7, 2.0**-1060]), {})
    for first, second, third in (
        ("contiguous", "channels_last", "channels_last"),
        ("channels_last", "contiguous", "transposed"),
        ("random", "expanded", "sliced"),
    ):
        name = f"layouts {first}, {second}, {third}"
        y, history = args(name, 2, layouts=(first, second, third))
        yield name, ((y, 0.9, history, per_channel[:2]), {})
    y, history = args("strided coefficients")
    strided = draw("strided coefficients").normal(3, 12, 5, 7)
    yield (
        "strided coefficients",
        ((y, strided[:1, ::2, :1, :1], history, [strided[:, 3, 2, 1], strided[:1, :1, :1, :1]]), {}),
    )
    y, history = args("half-precision coefficients")
    yield (
        "half-precision coefficients",
        ((y, per_channel[0].bfloat16(), history, [torch.tensor([0.5]).half().to(y.device), 1.0]), {}),
    )
    y, history = args("non-finite")
    y[0, 1, 2, 3], history[0][1, 2, 0, 0], history[1][2, 3, 4, 6], y[0, 0, 0, 0] = (
        float(v) for v in ("nan", "inf", "nan", "-inf")
    )
    yield "non-finite", ((y, 0.0, history, [1.0, per_channel[0]]), {})
    y, history = args("large values")
    yield "large values", ((y * 1e30, 0.5, [h * 1e30 for h in history], [1.5, -0.5]), {})


# No gradients: the kernels have none, and where one is wanted the reference runs.
SAMPLES = {"multistep_update": OpSamples(build, LATENT_SHAPES, dtypes=MIXED_DTYPES, extra=extra)}
