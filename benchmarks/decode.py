"""What decoding latents to images costs, on every backend, and how far it is from reading its bytes once.

    python -m benchmarks.decode                                       four models, both kinds of statistics, on the CPU
    python -m benchmarks.decode --presets cifar10-nll --bn batch --device cuda
    python -m benchmarks.decode --no-compile --memory-format contiguous channels_last

Timed is ``LSGM.decode`` in float32 with random weights and latents (seed 0). Contenders, in turns in the same run, each
round in another order: ``reference`` (plain PyTorch, eager), ``auto`` (what the dispatcher takes; ``backends`` has what
ran) and ``compile`` (``torch.compile`` of the reference's whole ``decode``, static shapes). ``processor_seconds`` are
those of all threads of the process; on a GPU that is what the host spends on it.

Before it is timed, every contender but the reference is compared with it, with TF32 off: ``image_parameters`` (the
decoder's output, of the eager ones) and ``images`` may differ by ``TOLERANCE`` at most, relative to the reference's
largest deviation from its own mean (random weights make images that are nearly grey). A wrong one is not timed: the
case has a failure, and the program ends with 1.

``byte_floor`` holds the bytes of the decoder's weights and of every cell's input and output, each once; ``copy``, the
bandwidth of this machine's own ``tensor.copy_`` between buffers beyond the cache, timed in the same rounds (bytes read
plus bytes written); and ``seconds``, the one over the other. On a GPU no decoder that writes its cells' results to
memory is faster than that.

Every case runs in a process of its own. ``torch.compile`` of a large decoder takes minutes: where the budget ends in
it, the case keeps what was measured without it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.forward import MEMORY_FORMATS, Benchmark, bytes_once, hooked
from benchmarks.train import model_of
from lsgm_fast.dispatch import use_backend
from lsgm_fast.models import LSGM
from lsgm_fast.models.nvae import BN_STATISTICS, NVAE
from lsgm_fast.nn.cells import Cell


@dataclass(frozen=True)
class Case:
    """What is decoded; ``bn``: whose statistics normalise, one of :data:`BN_STATISTICS`."""

    preset: str
    bn: str
    batch: int
    memory_format: str
    compile: bool
    device: str

    def __str__(self) -> str:
        return f"{self.preset} {self.bn} batch {self.batch} {self.memory_format}"


class CompiledVAE(nn.Module):
    """A VAE whose ``decode`` is compiled; everything else of :meth:`LSGM.decode` stays as it is."""

    def __init__(self, vae: NVAE) -> None:
        super().__init__()
        self.vae = vae
        self.latent_shape, self.lower_shapes = vae.latent_shape, vae.lower_shapes
        self.decode = torch.compile(vae.decode, dynamic=False)


class Decoder:
    """The model, the latents, and the ways to decode them. The encoder is there, but no score network."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        model = LSGM.from_config(model_of(case.preset).replace(score=None)).eval()
        memory_format = MEMORY_FORMATS[case.memory_format]
        self.model: LSGM = model.to(device=case.device, memory_format=memory_format)  # type: ignore[call-overload]
        assert isinstance(self.model.vae, NVAE)
        self.vae = self.model.vae
        shapes = (model.latent_shape, *model.lower_shapes)
        self.z, *self.lower = (torch.randn(case.batch, *shape).to(case.device) for shape in shapes)
        self.compiled = LSGM(CompiledVAE(self.vae), None, model.sde) if case.compile else None

    def run(self, contender: str) -> torch.Tensor:
        """Images (N, C, H, W) in [0, 1]."""
        model = self.compiled if contender == "compile" else self.model
        assert model is not None
        with use_backend("auto" if contender == "auto" else "reference"):
            return model.decode(self.z, self.lower, bn=self.case.bn)

    def outputs(self, contender: str) -> dict[str, torch.Tensor]:
        """``images``, and of an eager contender ``image_parameters``, the decoder's output."""
        if contender == "compile":
            return {"images": self.run(contender)}
        found: dict[str, torch.Tensor] = {}

        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            found["image_parameters"] = output

        with hooked([self.vae.output], keep):
            return {"images": self.run(contender)} | found

    def floor_bytes(self) -> int:
        """Bytes of the decoder's weights, and of the input and output of every cell that runs."""
        return bytes_once(*weights_and_cells(self.vae), lambda: self.run("reference"))


def weights_and_cells(vae: NVAE) -> tuple[list[torch.Tensor], list[nn.Module]]:
    """The decoder's weights, and the model's cells."""
    parts = (vae.latent_conv, vae.decoder, vae.postprocess, vae.output)
    weights: list[torch.Tensor] = [vae.prior_feature, *(p for part in parts for p in part.parameters())]
    return weights, [m for m in vae.modules() if isinstance(m, Cell)]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bn", nargs="+", default=list(BN_STATISTICS), choices=BN_STATISTICS)


BENCHMARK = Benchmark(
    "decode",
    Case,
    Decoder,
    kind="bn",
    compared="image_parameters",
    # "digits" has the demo's size.
    default=("digits", "mnist", "cifar10-nll", "celebahq256-quantitative"),
    description=(__doc__ or "").split("\n")[0],
    add_options=_add_options,
    kinds=lambda options: [{"bn": bn} for bn in options.bn],
)

main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
