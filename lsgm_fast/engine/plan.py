"""Plans: an LSGM's networks prepared for sampling, with everything that depends on the weights alone computed once.

What a plan does to the score network, beside what the operations do anyway:

- Convolution weights are in the precision of the plan and in the memory layout that the library wants: on CPUs packed
  by oneDNN for the shape of the input, or transformed for Winograd's algorithm
  (:func:`lsgm_fast.ops.winograd_conv2d`); on GPUs channels_last. Activations are in channels_last throughout.
- The time projections of all residual blocks are one matrix product, of a single row where the samples share a time;
  so are queries, keys and values of an attention.
- Which implementation an operation has is decided once for every shape.

Normalisation, softmax, the time embedding, mixing and the solver's state keep float32 or better in every precision.

A plan is never stale: before each use it is compared with the weights as they are (:class:`Watch`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsgm_fast import dispatch
from lsgm_fast.engine.graphs import Graphed
from lsgm_fast.engine.prepared import prepared, supported
from lsgm_fast.errors import unknown_name
from lsgm_fast.models.ncsnpp import NCSNpp
from lsgm_fast.models.nvae import NVAE
from lsgm_fast.nn.layers import normalize_weights, prepared_weights
from lsgm_fast.nn.watch import Watch

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Precisions of a plan, and the dtype of its convolutions and matrix products."""


@dataclass(frozen=True)
class Settings:
    """How a plan computes.

    Attributes:
        precision: a name of :data:`PRECISIONS`; None: that of the weights, with PyTorch's own flags. ``"tf32"`` and
            ``"fp32"`` allow and forbid TF32 on CUDA inside of the plan alone.
        graphs: on CUDA, replay an evaluation from a CUDA graph. torch_compile: compile the network with
            ``torch.compile`` (minutes; worth it where it was measured faster).
    """

    precision: str | None = None
    graphs: bool = True
    torch_compile: bool = False

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)


DEFAULTS = Settings()


class Plan:
    """What an LSGM samples with: its networks, prepared and kept, made anew when their weights change.

    Networks that are not ours run as they are. So do all in training mode, inside of ``torch.autocast``, and where
    ``use_backend("reference")`` asks for the plain implementations. The precision applies to them all the same, half
    precision through autocast.
    """

    def __init__(self, settings: Settings = DEFAULTS) -> None:
        self.settings = settings
        self._score: ScorePlan | None = None
        self._decoder: DecoderPlan | None = None

    def score(self, network: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The score network, for many calls ``(z, t)`` without gradients while its weights do not change."""
        if not (supported(network) and _plannable(network)):
            return _plain(network, self.settings.precision)
        if self._score is None or not self._score.is_of(network):
            self._score = None  # first, so that two never lie in memory
            self._score = ScorePlan(network, self.settings)
        return self._score

    def decoder(self, vae: Any) -> Callable[..., Tensor]:
        """``vae.decode``, for many calls without gradients while its weights do not change."""
        if not (type(vae) is NVAE and _plannable(vae)):
            return _plain(vae.decode, self.settings.precision)
        if self._decoder is None or not self._decoder.is_of(vae):
            self._decoder = None
            self._decoder = DecoderPlan(vae, self.settings)
        return self._decoder


def _plannable(network: nn.Module) -> bool:
    """Whether a call of the network here would be what a plan of it computes."""
    if network.training or {"forward", "decode"} & vars(network).keys():
        return False
    device = next(network.parameters()).device.type
    return device in ("cpu", "cuda") and not (
        dispatch.choice()[0] == "reference"
        or torch.is_autocast_enabled(device)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def _plain(function: Callable[..., Tensor], precision: str | None) -> Callable[..., Tensor]:
    """The function itself, in a precision."""
    if precision is None:
        return function

    def run(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _computing_in(precision, z.device):
            return function(z, *args, **kwargs)

    return run


@contextlib.contextmanager
def _computing_in(precision: str | None, device: torch.device) -> Iterator[None]:
    """Everything inside of the block in that precision: TF32 by flags that are put back, half by autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_flags(precision))
        if precision in ("bf16", "fp16"):
            stack.enter_context(torch.autocast(device.type, PRECISIONS[precision]))
        yield


class ScorePlan:
    """An NCSN++ prepared for inference: called like the network, without gradients.

    Args:
        network: in eval mode. Its normalisation weights and time embedding are shared, the other weights copied.
    """

    def __init__(self, network: NCSNpp, settings: Settings) -> None:
        self._settings = settings
        self._network = network
        self._watch = Watch(network.modules)
        weight = network.conv_in.weight
        self.dtype = weight.dtype if settings.precision is None else PRECISIONS[settings.precision]
        with torch.no_grad():
            run: Callable[[Tensor, Tensor], Tensor] = prepared(network, self.dtype)
        if settings.torch_compile:
            run = torch.compile(run, dynamic=False)
        if settings.graphs and weight.is_cuda:
            run = Graphed(run)
        self._run = run

    def is_of(self, network: NCSNpp) -> bool:
        """Whether the plan was made of this network, with the weights and modules that it has now."""
        return network is self._network and self._watch.unchanged()

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """Predict the noise: z (B, C, h, w), t (B,) or 0-d -> (B, C, h, w) of the plan's dtype."""
        t = torch.atleast_1d(t)
        if t.shape[0] > 1 and t.stride(0) == 0:
            t = t[:1]
        z = z.to(self.dtype, memory_format=torch.channels_last)
        with _flags(self._settings.precision), torch.autocast(z.device.type, enabled=False):
            return self._run(z, t)


class DecoderPlan:
    """An NVAE's decoder prepared for inference: called like :meth:`NVAE.decode`, without gradients.

    Args:
        vae: in eval mode. Half precision is autocast's: of a decoding, the weights are a small part.
    """

    def __init__(self, vae: NVAE, settings: Settings) -> None:
        self._settings = settings
        self._vae = vae
        self._watch = Watch(vae.modules)
        with torch.no_grad():
            self._weights = normalize_weights(vae.decoder_convs)
        self._graphs: dict[tuple[str, bool], Graphed] = {}

    def is_of(self, vae: NVAE) -> bool:
        """Whether the plan was made of this VAE, with the decoder weights that it has now."""
        return vae is self._vae and self._watch.unchanged()

    @torch.no_grad()
    def __call__(
        self, z: Tensor, *, lower_noise: Sequence[Tensor] = (), bn: str = "running", crop: bool = True
    ) -> Tensor:
        """Mean image of p(x | z), as :meth:`NVAE.decode` has it."""
        if not (self._settings.graphs and z.is_cuda):
            return self._decode(bn, crop, z, *lower_noise)
        # Decoding is one call in a batch: a graph pays where there are many batches.
        if (bn, crop) not in self._graphs:
            self._graphs[bn, crop] = Graphed(functools.partial(self._decode, bn, crop), most=1, after=2)
        return self._graphs[bn, crop](z, *lower_noise)

    def _decode(self, bn: str, crop: bool, z: Tensor, *lower: Tensor) -> Tensor:
        with (
            prepared_weights(self._vae.decoder_convs, self._weights),
            _computing_in(self._settings.precision, z.device),
        ):
            return self._vae.decode(z, lower_noise=lower, bn=bn, crop=crop)


@contextlib.contextmanager
def _flags(precision: str | None) -> Iterator[None]:
    """TF32 as the precision asks for, for the duration of the block."""
    if precision not in ("fp32", "tf32"):
        yield
        return
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
