"""What a residual cell of the NVAE's decoder and a residual block of the score network cost, on every backend.

    python -m benchmarks.cells                                       three models, four kinds, on the CPU
    python -m benchmarks.cells --presets cifar10-fid --kinds block --memory-format channels_last --device cuda

Kinds: ``cell`` (of the decoder's groups), ``post`` (of the postprocessing), ``block`` (NCSN++ residual block) and
``attend`` (its attention). Of each kind the one with the most arithmetic in its preset is taken, at the size at which
it runs there, with random weights and inputs (seed 0). BatchNorm takes the statistics of the recipe's decoding.

Contenders, the order of their turns, ``processor_seconds`` and the check of every contender are as in
:mod:`benchmarks.decode`; compared is ``result``. ``byte_floor`` holds the bytes of the weights, the input and the
result, each once. Single operations, on each backend that has a kernel, are timed by :mod:`benchmarks.ops`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.forward import MEMORY_FORMATS, Benchmark, hooked, operations
from benchmarks.train import model_of
from lsgm_fast.dispatch import use_backend
from lsgm_fast.models.ncsnpp import Attention, NCSNpp, ResBlock
from lsgm_fast.models.nvae import NVAE
from lsgm_fast.nn.cells import Cell

KINDS = ("cell", "post", "block", "attend")


@dataclass(frozen=True)
class Case:
    """What runs; ``kind``: one of :data:`KINDS`."""

    preset: str
    kind: str
    batch: int
    memory_format: str
    compile: bool
    device: str

    def __str__(self) -> str:
        return f"{self.preset} {self.kind} batch {self.batch} {self.memory_format}"


@dataclass(frozen=True)
class Found:
    """A module without memory for its weights, and the shapes of its tensor arguments."""

    name: str
    module: nn.Module
    shapes: tuple[tuple[int, ...], ...]


def heaviest(preset: str, kind: str, batch: int) -> Found:
    """The module of that kind with the most arithmetic; only shapes pass through the network, nothing is computed."""
    config = model_of(preset)
    assert config.score is not None
    of_score = kind in ("block", "attend")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), use_backend("reference"):
        network: NCSNpp | NVAE
        if of_score:
            network = NCSNpp(config.score)
            wanted: Sequence[nn.Module] = [
                m for m in network.modules() if isinstance(m, ResBlock if kind == "block" else Attention)
            ]
            inputs: dict[str, Any] = {"t": torch.empty(batch)}
            run: Callable[..., object] = network.forward
        else:
            network = NVAE(config.vae)
            within = network.postprocess if kind == "post" else network.decoder
            wanted = [m for m in within.modules() if isinstance(m, Cell)]
            inputs = {"lower_noise": [torch.empty(batch, *s) for s in network.lower_shapes]}
            run = network.decode
        network.eval().requires_grad_(False)
        names = {module: name for name, module in network.named_modules()}
        calls: dict[nn.Module, tuple[tuple[int, ...], ...]] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # The third argument of a block is what the one before it has normalised already.
            calls.setdefault(module, tuple(tuple(a.shape) for a in args[:2] if isinstance(a, torch.Tensor)))

        shape = config.vae.latent_shape
        with hooked(wanted, keep):
            run(torch.empty(batch, *shape), **inputs)

        def of(module: nn.Module) -> int:
            return operations(lambda: module(*(torch.empty(s) for s in calls[module])))

        module = max(calls, key=of)
    with torch.device("meta"):
        fresh = NCSNpp(config.score) if of_score else NVAE(config.vae)
    return Found(names[module], fresh.eval().get_submodule(names[module]), calls[module])


class Subject:
    """The module with weights and inputs, and the ways to run it."""

    def __init__(self, case: Case) -> None:
        found = heaviest(case.preset, case.kind, case.batch)
        torch.manual_seed(0)
        module = found.module.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                fan = parameter[0].numel() if parameter.dim() > 1 else 1
                torch.nn.init.normal_(parameter, std=1.0 / math.sqrt(fan) if parameter.dim() > 1 else 0.1)
                if name.endswith("weight") and parameter.dim() == 1:
                    parameter.add_(1.0)
            for name, buffer in module.named_buffers():
                buffer.fill_(1.0 if "var" in name else 0.0)
        memory_format = MEMORY_FORMATS[case.memory_format]
        self.module: nn.Module = module.to(device=case.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.args: list[Any] = [torch.randn(shape).to(case.device) for shape in found.shapes]
        if memory_format == torch.channels_last:
            self.args[0] = self.args[0].to(memory_format=memory_format)
        if isinstance(self.module, Cell):
            self.args.append(model_of(case.preset).sampling.bn == "batch")
        self.compiled = torch.compile(self.module, dynamic=False) if case.compile else None

    @torch.no_grad()
    def run(self, contender: str) -> torch.Tensor:
        """The module's result."""
        module = self.compiled if contender == "compile" else self.module
        assert module is not None
        with use_backend("auto" if contender == "auto" else "reference"):
            result = module(*self.args)
        return result if isinstance(result, torch.Tensor) else result[0]

    def outputs(self, contender: str) -> dict[str, torch.Tensor]:
        """``result``."""
        return {"result": self.run(contender)}

    def floor_bytes(self) -> int:
        """Bytes of the weights, the input and the result."""
        return (
            sum(p.nbytes for p in self.module.parameters())
            + self.args[0].nbytes
            + self.run("reference").nbytes
        )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)


BENCHMARK = Benchmark(
    "cells",
    Case,
    Subject,
    kind="kind",
    compared="result",
    default=("digits", "mnist", "celebahq256-quantitative"),
    description=(__doc__ or "").split("\n")[0],
    add_options=_add_options,
    kinds=lambda options: [{"kind": kind} for kind in options.kinds],
)

main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
