"""What a sample cannot do without: its arithmetic, its bytes, and what launching its kernels costs.

A floor is an estimate, not a bound that holds for every algorithm:

arithmetic
    Floating-point operations of the plain PyTorch implementation (``torch.utils.flop_counter``: convolutions, linear
    layers and attention, two for a multiplication with its addition), over the rate of a large matrix product of that
    precision on this machine in this run, with the same TF32 setting as the convolutions. A convolution that needs
    fewer multiplications, such as Winograd's, can be below it. Of several products and copies the fastest one counts:
    whatever disturbs them makes them slower.
bytes
    Weights, and inputs and results of every cell, once each, in the precision's type, over the bandwidth of a copy
    between buffers beyond the cache. What fits into a cache can be below it.
launches
    Kernels that the present implementation launches (counted by PyTorch's profiler), times what launching an empty one
    costs: only on CUDA, and a figure of its own, because fewer kernels or a captured graph have less of it.

``seconds`` of a floor is the larger one of arithmetic and bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import decode, measure, score
from benchmarks.forward import COPY_SECONDS, bytes_once, operations
from benchmarks.measure import Figure, extrapolated, measured, not_measured
from benchmarks.ops import copy_round
from lsgm_fast.config import LSGMConfig
from lsgm_fast.dispatch import use_backend
from lsgm_fast.models.ncsnpp import NCSNpp
from lsgm_fast.models.nvae import NVAE

PARTS = ("score", "decode")
ROUNDS = 5
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
LAUNCHES = 2000


# -- what has to be done ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Of one evaluation of the score network, or of decoding one batch; bytes in float32."""

    operations: int
    bytes: int


def work(config: LSGMConfig, batch: int) -> dict[str, Work]:
    """The work of :data:`PARTS`; nothing is computed and no memory is taken: only shapes pass through the networks."""
    assert config.score is not None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), use_backend("reference"):
        network = NCSNpp(config.score).eval().requires_grad_(False)
        vae = NVAE(config.vae).eval().requires_grad_(False)
        shapes = (vae.latent_shape, *vae.lower_shapes)
        z, *lower = (torch.empty(batch, *shape) for shape in shapes)
        t = torch.empty(batch)
        return {
            "score": _counted(*score.weights_and_cells(network), lambda: network(z, t)),
            "decode": _counted(
                *decode.weights_and_cells(vae),
                lambda: vae.decode(z, lower_noise=lower, bn=config.sampling.bn),
            ),
        }


def _counted(weights: Any, cells: Any, run: Callable[[], object]) -> Work:
    return Work(operations(run), bytes_once(weights, cells, run))


def launches(run: Callable[[], object], device: str) -> Figure:
    """How many kernels and copies ``run`` puts on the device."""
    if not device.startswith("cuda"):
        return not_measured("only a GPU is launched on")
    from torch.profiler import ProfilerActivity, profile

    run()
    measure.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        measure.synchronize(device)
    events = [e for e in found.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    return measured([len(events)], "launches") if events else not_measured("the profiler saw no kernel")


# -- what this machine can do -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Of this machine in this run: ``matmul`` FLOP/s by precision, ``copy`` B/s, ``launch`` s."""

    matmul: dict[str, Figure]
    copy: Figure
    launch: Figure

    def figures(self) -> dict[str, Any]:
        """For the record."""
        return {"matmul": self.matmul, "copy": self.copy, "launch": self.launch}


def rates(device: str, dtypes: dict[str, torch.dtype], budget: measure.Budget) -> Rates:
    """Measure them; ``dtypes``: that of the products by precision.

    Raises:
        OutOfTime: not even one round was finished.
    """
    copy, copied = copy_round(device, COPY_SECONDS)
    copies = [copied / copy() for _ in range(ROUNDS)]
    return Rates(
        {name: measured(_matmul_rates(device, dtype, budget), "FLOP/s") for name, dtype in dtypes.items()},
        measured(copies, "B/s"),
        _launch_cost(device),
    )


def _matmul_rates(device: str, dtype: torch.dtype, budget: measure.Budget) -> list[float]:
    side = MATRIX_SIDE["cuda" if device.startswith("cuda") else "cpu"]
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:

        def once() -> float:
            measure.synchronize(device)
            start = time.perf_counter()
            torch.mm(a, b)
            measure.synchronize(device)
            return time.perf_counter() - start

        seconds = measure.repeat(once, warmup=2, fewest=1, most=2 * ROUNDS, seconds=5.0, budget=budget)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return [2 * side**3 / s for s in seconds]


def _launch_cost(device: str) -> Figure:
    if not device.startswith("cuda"):
        return not_measured("only a GPU is launched on")
    x = torch.zeros(1, device=device)

    def once() -> float:
        measure.synchronize(device)
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            x.zero_()
        measure.synchronize(device)
        return (time.perf_counter() - start) / LAUNCHES

    once()
    return measured([once() for _ in range(ROUNDS)], "s")


# -- the one over the other -------------------------------------------------------------------------------------------


def floor(part: Work, dtype: torch.dtype, matmul: Figure, copy: Figure) -> dict[str, Any]:
    """Figures ``operations``, ``bytes``, ``arithmetic``, ``moving`` and ``seconds`` of one part."""
    moved = part.bytes * dtype.itemsize // torch.float32.itemsize
    arithmetic, moving = part.operations / max(matmul["values"]), moved / max(copy["values"])
    return {
        "operations": measured([part.operations], "FLOP"),
        "bytes": measured([moved], "bytes"),
        "arithmetic": extrapolated(arithmetic, "s", "operations / settings.rates.matmul, its largest"),
        "moving": extrapolated(moving, "s", "bytes / settings.rates.copy, its largest"),
        "seconds": extrapolated(max(arithmetic, moving), "s", "the larger one of arithmetic and moving"),
    }


def launching(count: Figure, cost: Figure) -> Figure:
    """Seconds of launching ``count`` kernels."""
    for figure in (count, cost):
        if figure["kind"] == "not_measured":
            return figure
    return extrapolated(
        count["median"] * cost["median"], "s", "launches x settings.rates.launch, their medians"
    )
