"""Sample inputs of the Runge-Kutta operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lsgm_fast.sampling import tableaus
from lsgm_fast.testing import score_drift
from lsgm_fast.testing.inputs import LATENT_SHAPES, MIXED_DTYPES, Call, Draw, OpSamples, Sample, Shape

# Rows of the Dormand-Prince tableau; the solver's buffer holds all seven stages.
ROW = tableaus.RK45.a[4]
STAGES = 7
B, E = tableaus.RK45.b, tableaus.RK45.e


def state_and_stages(
    draw: Draw,
    shape: Shape,
    dtype: torch.dtype,
    network_dtype: torch.dtype,
    layout: str,
    stages: int = STAGES,
) -> tuple[Tensor, Tensor]:
    """The state in ``layout``; the stages lie one behind the other."""
    return draw.normal(*shape, dtype=dtype, layout=layout), draw.normal(stages, *shape, dtype=network_dtype)


def _steps(name: str, draw: Callable[[str], Draw], batch: int) -> Iterator[tuple[str, Tensor]]:
    device = draw("").device
    yield "h on the device", torch.tensor(-0.05, device=device)
    yield "h float64", torch.tensor(-0.05, dtype=torch.float64, device=device)
    yield "h (1,)", torch.tensor([0.1], device=device)
    yield "h per sample", draw(f"{name} h").uniform(batch, low=-0.2, high=0.2, dtype=torch.float64)
    # A column of a block of controls.
    yield "h strided", draw(f"{name} h").uniform(batch, 8, low=-0.2, high=0.2, dtype=torch.float64)[:, 1]


def stage(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    return (*state_and_stages(draw, shape, dtype, network_dtype, layout), ROW, -0.05), {}


def stage_extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    f32 = torch.float32
    for n in range(1, STAGES + 1):
        name = f"{n} stages"
        y, k = state_and_stages(draw(name), (3, 6, 5, 7), f32, f32, "contiguous")
        yield name, ((y, k, tuple(0.5 - 0.3 * i for i in range(n)), 0.1), {})
    for shape in ((13,), (3, 11), (2, 3, 5)):
        name = f"{len(shape)}-D"
        yield name, stage(draw(name), shape, f32, f32, "contiguous")
    for name, h in _steps("stage", draw, 3):
        y, k = state_and_stages(draw(name), (3, 6, 5, 7), f32, f32, "contiguous")
        yield name, ((y, k, ROW, h), {})
    y, k = state_and_stages(draw("zeros"), (3, 6, 5, 7), f32, f32, "contiguous")
    k[1] = torch.nan
    yield "a stage that is not read", ((y, k, (0.5, 0.0, 0.25, 0.0), 0.1), {})
    yield "no stage is read", ((y, k, (0.0, 0.0), 0.1), {})


def _row_traffic(y: Tensor, k: Tensor, *rows: Sequence[float]) -> int:
    used = sum(any(i < len(row) and row[i] != 0 for row in rows) for i in range(len(k)))
    return 2 * y.numel() * y.element_size() + used * y.numel() * k.element_size()


def stage_traffic(sample: Sample, results: Sequence[Tensor]) -> int:
    """The state, its successor and the stages that are used."""
    return _row_traffic(*sample.args[:3])


def finish(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    y, k = state_and_stages(draw, shape, dtype, network_dtype, layout)
    return (y, k, B, E, -0.05, 1e-3, 1e-3), {}


def finish_extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    f32 = torch.float32
    for shape in ((3, 6, 5, 7), (1, 2, 1, 1), (0, 2, 3, 3), (5, 3, 37, 41)):
        name = f"per sample {shape[0]}"
        args, _ = finish(draw(name), shape, f32, f32, "contiguous")
        yield name, (args, {"per_sample": True})
    odd: tuple[Shape, ...] = ((13,), (3, 11))
    for other in odd:
        for per_sample in (False, True):
            name = f"{len(other)}-D{' per sample' if per_sample else ''}"
            yield name, (finish(draw(name), other, f32, f32, "contiguous")[0], {"per_sample": per_sample})
    y, k = state_and_stages(draw("low order"), (3, 6, 5, 7), f32, f32, "contiguous", stages=2)
    heun = tableaus.HEUN
    yield "Heun", ((y, k, heun.b, heun.e, torch.tensor(0.1, device=y.device), 1e-5, 1e-2), {})
    y, k = state_and_stages(draw("RK23"), (3, 6, 5, 7), f32, f32, "contiguous", stages=4)
    yield "RK23", ((y, k, tableaus.RK23.b, tableaus.RK23.e, 0.1, 1e-5, 1e-2), {})
    for name, h in _steps("finish", draw, 3):
        y, k = state_and_stages(draw(name), (3, 6, 5, 7), f32, f32, "contiguous")
        yield name, ((y, k, B, E, h, 1e-3, 1e-3), {"per_sample": True})
    # Without a tolerance on the size of the state; and an error beyond all bounds.
    y, k = state_and_stages(draw("relative"), (3, 6, 5, 7), f32, f32, "contiguous")
    yield "relative only", ((y, k, B, E, 0.1, 1e-4, 0.0), {})
    yield "off centre", ((y + 1e4, k, B, E, 0.1, 1e-4, 1e-4), {})
    k = k.clone()
    k[3, 1, 2, 0, 0] = torch.inf
    yield "not finite", ((y, k, B, E, 0.1, 1e-4, 1e-4), {"per_sample": True})
    # The last stage has a weight in the error only, so the solution stays finite.
    y, k = state_and_stages(draw("infinite error"), (3, 6, 5, 7), f32, f32, "contiguous")
    k[6, 1, 2, 0, 0] = torch.inf
    yield "infinite error", ((y, k, B, E, 0.1, 1e-4, 1e-4), {"per_sample": True})


def finish_traffic(sample: Sample, results: Sequence[Tensor]) -> int:
    """The state, its successor and every stage that is used once."""
    return _row_traffic(*sample.args[:4]) + results[1].numel() * results[1].element_size()


# The solver's state, and what its network may give.
DRIFT_DTYPES = tuple(
    (dtype, network)
    for dtype in (torch.float64, torch.float32)
    for network in (torch.float32, torch.bfloat16, torch.float16)
)


def _drift(
    draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str
) -> list[object]:
    # Only the network's output has a layout: the state is the solver's own.
    (_, _, logit, p, q, r), _ = score_drift.build(draw, shape, dtype, network_dtype, "contiguous")
    eps = draw.normal(*shape, dtype=network_dtype, layout=layout)
    z, y = (draw.normal(*shape, dtype=dtype) for _ in range(2))
    return [eps, z, logit, p, q, r, y, draw.normal(STAGES, *shape, dtype=dtype)]


def drift_stage(
    draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str
) -> Call:
    return (*_drift(draw, shape, dtype, network_dtype, layout), 3, ROW[:4], -0.05), {}


def drift_finish(
    draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str
) -> Call:
    return (*_drift(draw, shape, dtype, network_dtype, layout), 6, B, E, -0.05, 1e-3, 1e-3), {}


def _drift_extra(
    draw: Callable[[str], Draw], tail: tuple[object, ...], finishing: bool
) -> Iterator[tuple[str, Call]]:
    shape, f32, f64 = (3, 6, 5, 7), torch.float32, torch.float64
    device = draw("").device

    def args(name: str, shape: Shape = shape, stages: int = STAGES) -> list[object]:
        found = _drift(draw(name), shape, f64, f32, "contiguous")
        found[7] = found[7][:stages].contiguous()  # type: ignore[index]
        return found

    def with_h(h: object) -> tuple[object, ...]:
        where = 3 if finishing else 2
        return (*tail[:where], h, *tail[where + 1 :])

    shared = args("shared")
    shared[3:6] = [torch.tensor(v, dtype=f64, device=device) for v in (-1.5, 3.0, 0.7)]
    yield "shared", ((*shared, *tail), {})
    numbers = args("numbers")
    numbers[3:6] = [-1.5, 3.0, 0.7]
    yield "numbers", ((*numbers, *tail), {})
    no_mixing = args("no mixing")
    no_mixing[2] = None
    yield "no mixing", ((*no_mixing, *tail), {})
    for name, h in _steps("drift", draw, 3):
        yield name, ((*args(name), *with_h(h)), {"per_sample": True} if finishing else {})
    for name, other in (("5-D", (2, 3, 3, 5, 2)), ("2-D", (4, 37)), ("odd", (5, 3, 37, 41))):
        yield name, ((*args(name, other), *tail), {})
    for tableau in (tableaus.RK23, tableaus.HEUN):
        stages = tableau.stages
        end: tuple[object, ...]
        if finishing:
            end = (stages - 1, tableau.b, tableau.e, 0.1, 1e-4, 1e-3)
        else:
            end = (1, tableau.a[min(2, stages - 1)], 0.1)
        yield tableau.name, ((*args(tableau.name, stages=stages), *end), {})
    infinite = args("infinite output")
    infinite[0][1, 2, 0, 0] = torch.inf  # type: ignore[index]
    yield "infinite output", ((*infinite, *tail), {"per_sample": True} if finishing else {})
    # As after an accepted step whose last stage is the first of the next: the new one goes to slot 0.
    rows = 2 if finishing else 1
    turned = [tuple(reversed(row)) for row in tail[1 : 1 + rows]]  # type: ignore[call-overload]
    yield "slots reversed", ((*args("slots reversed"), 0, *turned, *tail[1 + rows :]), {})


def drift_stage_extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    yield from _drift_extra(draw, (3, ROW[:4], -0.05), finishing=False)


def drift_finish_extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    yield from _drift_extra(draw, (6, B, E, -0.05, 1e-3, 1e-3), finishing=True)


def _drift_traffic(sample: Sample, *rows: Sequence[float]) -> int:
    """The network's output, z (read and written), y, the new stage (written) and the others that are used."""
    eps, z, y, k, stage = (sample.args[i] for i in (0, 1, 6, 7, 8))
    others = [[0.0 if i == stage else c for i, c in enumerate(row)] for row in rows]
    extra = eps.numel() * eps.element_size() + 2 * z.numel() * z.element_size()
    return _row_traffic(y, k, *others) + extra


def drift_stage_traffic(sample: Sample, results: Sequence[Tensor]) -> int:
    return _drift_traffic(sample, sample.args[9])


def drift_finish_traffic(sample: Sample, results: Sequence[Tensor]) -> int:
    return _drift_traffic(sample, sample.args[9], sample.args[10])


def control(draw: Draw, shape: Shape, dtype: torch.dtype, network_dtype: torch.dtype, layout: str) -> Call:
    batch = shape[0]
    t = draw.uniform(batch, low=0.2, high=1.0, dtype=torch.float64)
    h = draw.uniform(batch, low=-0.1, high=-0.01, dtype=torch.float64)
    retried, accepted, rejected = (
        draw.uniform(batch, low=0.0, high=2.0, dtype=torch.float64).floor() for _ in range(3)
    )
    last = draw.uniform(batch, low=0.0, high=2.0, dtype=torch.float64)
    block = torch.stack([t, h, t + h, retried, t, accepted, rejected, last], dim=-1)
    norm = draw.uniform(batch, low=0.0, high=2.0, dtype=dtype)
    return (block, norm, 1e-3), {}


def control_extra(draw: Callable[[str], Draw]) -> Iterator[tuple[str, Call]]:
    device = draw("").device

    def call(
        name: str,
        norm: float,
        t: float = 0.5,
        h: float = -0.1,
        end: float = 1e-3,
        retried: float = 0.0,
        **options: float,
    ) -> tuple[str, Call]:
        block = torch.tensor([t, h, t + h, retried, t, 3.0, 2.0, 0.7], dtype=torch.float64, device=device)
        return name, ((block, torch.tensor(norm, dtype=torch.float64, device=device), end), options)

    yield call("accepted", 0.3)
    yield call("accepted after a rejection", 1e-6, retried=1.0)
    yield call("no error", 0.0)
    yield call("rejected", 7.0)
    yield call("rejected by far", 1e9)
    yield call("on the limit", 1.0)
    yield call("NaN", float("nan"))
    yield call("infinite", float("inf"))
    yield call("last step", 0.5, t=0.11, h=-0.109)
    yield call("arrived", 0.5, t=1e-3, h=0.0)
    yield call("clipped", 0.1, t=0.2, h=-0.15)
    yield call("too small", 5.0, t=0.5, h=-1e-15)
    yield call("smallest", 0.99, t=0.5, h=-1e-15)
    yield call("forwards", 0.4, t=0.25, h=0.25, end=1.0)
    yield call("across zero", 0.4, t=0.05, h=-0.05, end=-1.0)
    yield call("from below zero", 0.4, t=-0.5, h=0.1, end=1.0)
    yield call("other factors", 0.01, exponent=-1 / 3, safety=0.8, min_factor=0.1, max_factor=5.0)
    block = control(draw("float32 norm"), (5, 1), torch.float32, torch.float32, "")[0]
    yield "per sample, float32 norm", (block, {})


SAMPLES = {
    "rk_stage": OpSamples(
        stage,
        LATENT_SHAPES,
        dtypes=MIXED_DTYPES,
        differentiable=(0, 1),
        extra=stage_extra,
        traffic=stage_traffic,
    ),
    "rk_finish": OpSamples(
        finish, LATENT_SHAPES, dtypes=MIXED_DTYPES, extra=finish_extra, traffic=finish_traffic
    ),
    "rk_drift_stage": OpSamples(
        drift_stage,
        LATENT_SHAPES,
        dtypes=DRIFT_DTYPES,
        mutates=(1, 7),
        extra=drift_stage_extra,
        traffic=drift_stage_traffic,
    ),
    "rk_drift_finish": OpSamples(
        drift_finish,
        LATENT_SHAPES,
        dtypes=DRIFT_DTYPES,
        mutates=(1, 7),
        extra=drift_finish_extra,
        traffic=drift_finish_traffic,
    ),
    # A block per sample; only the batch of the shapes counts.
    "rk_control": OpSamples(
        control,
        {"blocks": ()},
        awkward=[(batch,) for batch in (0, 1, 2, 16, 512)],
        dtypes=((torch.float64, torch.float64), (torch.float32, torch.float32)),
        layouts=(),
        extra=control_extra,
        base=(5,),
        selftest=(19,),
    ),
}
