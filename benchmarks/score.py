"""What one evaluation of the score network costs, on every backend, and how far it is from reading its bytes once.

    python -m benchmarks.score                                        four models on the CPU
    python -m benchmarks.score --presets cifar10-fid --batch 64 --memory-format channels_last --device cuda
    python -m benchmarks.score --presets digits --no-compile

Timed is the network alone, ``eps_theta(z, t)`` in float32 without gradients, with random weights and latents, and one
random time for the whole batch, as a solver has it (seed 0). Contenders, the order of their turns,
``processor_seconds`` and the check of every contender are as in :mod:`benchmarks.decode`, but ``auto`` is what sampling
runs: the network prepared by :mod:`lsgm_fast.engine.plan`. Compared is ``noise``, the network's output.

``byte_floor`` holds the bytes of the network's weights and of the inputs and outputs of its residual blocks and
attention, each once, the bandwidth of a copy, and the one over the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.forward import MEMORY_FORMATS, Benchmark, bytes_once
from benchmarks.train import model_of
from lsgm_fast.dispatch import use_backend
from lsgm_fast.engine.plan import Plan
from lsgm_fast.models.ncsnpp import ZERO_INIT, Attention, NCSNpp, ResBlock


@dataclass(frozen=True)
class Case:
    """What is evaluated."""

    preset: str
    batch: int
    memory_format: str
    compile: bool
    device: str

    def __str__(self) -> str:
        return f"{self.preset} batch {self.batch} {self.memory_format}"


class Evaluation:
    """The score network, its inputs, and the ways to run it."""

    def __init__(self, case: Case) -> None:
        config = model_of(case.preset).score
        assert config is not None
        torch.manual_seed(0)
        network = NCSNpp(config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                # A fresh network ends its blocks with nearly nothing: an error inside one would not show.
                if parameter.dim() > 1 and float(parameter.abs().max()) < ZERO_INIT**0.25:
                    nn.init.xavier_uniform_(parameter)
        memory_format = MEMORY_FORMATS[case.memory_format]
        self.network: NCSNpp = network.to(device=case.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.z = torch.randn(case.batch, config.latent_channels, config.latent_size, config.latent_size)
        self.z = self.z.to(case.device)
        self.t = torch.rand(1).to(case.device).expand(case.batch)
        self.planned = Plan().score(self.network)
        self.compiled = torch.compile(self.network, dynamic=False) if case.compile else None

    @torch.no_grad()
    def run(self, contender: str) -> torch.Tensor:
        """The predicted noise."""
        run: Callable[..., torch.Tensor] | None = self.network
        if contender != "reference":
            run = self.planned if contender == "auto" else self.compiled
        assert run is not None
        with use_backend("auto" if contender == "auto" else "reference"):
            return run(self.z, self.t)

    def outputs(self, contender: str) -> dict[str, torch.Tensor]:
        """``noise``."""
        return {"noise": self.run(contender)}

    def floor_bytes(self) -> int:
        """Bytes of the weights, and of the input and output of every residual block and attention."""
        return bytes_once(*weights_and_cells(self.network), lambda: self.run("reference"))


def weights_and_cells(network: NCSNpp) -> tuple[list[torch.Tensor], list[nn.Module]]:
    """The network's weights, and its residual blocks and attention."""
    return list(network.parameters()), [m for m in network.modules() if isinstance(m, (Attention, ResBlock))]


BENCHMARK = Benchmark(
    "score",
    Case,
    Evaluation,
    kind=None,
    compared="noise",
    default=("digits", "mnist", "cifar10-fid", "celebahq256-quantitative"),
    description=(__doc__ or "").split("\n")[0],
    add_options=lambda parser: None,
    kinds=lambda options: [{}],
)

main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
