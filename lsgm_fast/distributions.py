"""Likelihoods of the decoder: p(x | z) from the decoder's logits, per pixel or per symbol."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from lsgm_fast import ops
from lsgm_fast.errors import unknown_name
from lsgm_fast.reference.mixture_logistic import (
    MIN_LOG_SCALE,
    chain_colours,
    discretised_logistic_log_prob,
    unpack,
)

MIXTURES = 10


def soft_clamp(x: torch.Tensor, limit: float = 5.0) -> torch.Tensor:
    """``limit * tanh(x / limit)``: the identity near 0, bounded by ``limit``."""
    return limit * torch.tanh(x / limit)


def normal_cross_entropy(eps: torch.Tensor) -> torch.Tensor:
    """``-log N(eps; 0, 1) = eps^2 / 2 + ln(2 pi) / 2``, elementwise nats."""
    return 0.5 * eps.square() + 0.5 * math.log(2.0 * math.pi)


class DecoderDistribution(ABC):
    """p(x | z) for images x in [-1, 1].

    ``log_prob(x)`` in nats, per pixel and colour (per pixel for the mixture of logistics, whose colours are coupled,
    and for classes); ``mean()`` and ``sample()`` in [-1, 1].
    """

    def __init__(self, logits: torch.Tensor, num_bits: int = 8) -> None:
        self.logits = logits
        self.num_bits = num_bits

    @staticmethod
    @abstractmethod
    def logit_channels(image_channels: int) -> int:
        """Number of decoder output channels."""

    @staticmethod
    def check_images(images: torch.Tensor) -> None:
        """Raise ``ValueError`` for images (N, C, H, W) in [0, 1] that the distribution cannot produce: here none."""
        return

    @abstractmethod
    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-probability of images x (N, C, H, W) in [-1, 1], nats."""

    @abstractmethod
    def mean(self) -> torch.Tensor:
        """Mean image in [-1, 1] (the published code's definition)."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """A draw of the image, in [-1, 1] up to the tails of an unbounded likelihood."""

    def _uniform(self, like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return torch.empty_like(like).uniform_(1e-5, 1.0 - 1e-5, generator=generator)


class Bernoulli(DecoderDistribution):
    """Binary pixels: x = -1 or 1 with P(x = 1) = sigmoid(logit)."""

    @staticmethod
    def logit_channels(image_channels: int) -> int:
        return image_channels

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return -F.binary_cross_entropy_with_logits(self.logits, 0.5 * (x + 1.0), reduction="none")

    def mean(self) -> torch.Tensor:
        return 2.0 * torch.sigmoid(self.logits) - 1.0

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        uniform = self._uniform(self.logits, generator)
        return torch.where(uniform < torch.sigmoid(self.logits), 1.0, -1.0).to(self.logits.dtype)


class Categorical(DecoderDistribution):
    """One of K classes at each position, K = channels of x and of the logits: P(class k) = softmax(logits)_k.

    x is one-hot: 1 in the channel of the class, -1 in the others (0 and 1 before they are scaled to [-1, 1]).
    ``log_prob`` is (N, 1, H, W), ``mean()`` is ``2 softmax(logits) - 1``.
    """

    @staticmethod
    def logit_channels(image_channels: int) -> int:
        if image_channels < 2:
            raise ValueError(
                f"the categorical distribution needs a channel for each of 2 or more classes, got {image_channels}"
            )
        return image_channels

    @staticmethod
    def check_images(images: torch.Tensor) -> None:
        # Values are in [0, 1] already: a maximum and a sum of 1 leave nothing for the other classes.
        wrong = (images.amax(dim=1) != 1.0) | (images.sum(dim=1) != 1.0)
        if bool(wrong.any()):
            n, row, column = wrong.nonzero()[0].tolist()
            values = images[n, :, row, column]
            raise ValueError(
                f"expected one-hot images, 1 for one class and 0 for the others at every position: image {n} has "
                f"{int((values == 1.0).sum())} ones and a sum of {float(values.sum()):g} at row {row}, column {column}"
            )

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape != self.logits.shape:
            raise ValueError(
                f"expected one-hot x of the logits' shape {tuple(self.logits.shape)}, got {tuple(x.shape)}"
            )
        return -F.cross_entropy(self.logits, x.argmax(dim=1), reduction="none")[:, None]

    def mean(self) -> torch.Tensor:
        return 2.0 * torch.softmax(self.logits, dim=1) - 1.0

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        # The first of K exponential clocks with rates p_k is clock k with probability p_k.
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        clocks = torch.empty_like(logits).exponential_(generator=generator)
        index = (logits - torch.log(clocks)).argmax(dim=1, keepdim=True)
        return torch.full_like(self.logits, -1.0).scatter_(1, index, 1.0)


class Normal(DecoderDistribution):
    """Gaussian pixels: logits are (mean, log sigma), each soft-clamped to [-5, 5]."""

    @staticmethod
    def logit_channels(image_channels: int) -> int:
        return 2 * image_channels

    def __init__(self, logits: torch.Tensor, num_bits: int = 8) -> None:
        super().__init__(logits, num_bits)
        loc, log_scale = logits.chunk(2, dim=1)
        self.loc, self.log_scale = soft_clamp(loc), soft_clamp(log_scale)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        standard = (x - self.loc) * torch.exp(-self.log_scale)
        return -0.5 * standard.square() - 0.5 * math.log(2.0 * math.pi) - self.log_scale

    def mean(self) -> torch.Tensor:
        return self.loc

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        noise = torch.empty_like(self.loc).normal_(generator=generator)
        return self.loc + torch.exp(self.log_scale) * noise


class Logistic(DecoderDistribution):
    """Discretised logistic per colour: logits are (mean, log scale >= -7); open-ended first and last bins."""

    @staticmethod
    def logit_channels(image_channels: int) -> int:
        return 2 * image_channels

    def __init__(self, logits: torch.Tensor, num_bits: int = 8) -> None:
        super().__init__(logits, num_bits)
        self.loc, log_scale = logits.chunk(2, dim=1)
        self.log_scale = log_scale.clamp(min=MIN_LOG_SCALE)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return discretised_logistic_log_prob(x, self.loc, self.log_scale, self.num_bits)

    def mean(self) -> torch.Tensor:
        return self.loc

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        uniform = self._uniform(self.loc, generator)
        return self.loc + torch.exp(self.log_scale) * torch.logit(uniform)


class MixtureLogistic(DecoderDistribution):
    """Discretised mixture of ten logistics over RGB pixels (PixelCNN++)."""

    @staticmethod
    def logit_channels(image_channels: int) -> int:
        if image_channels != 3:
            raise ValueError(f"the mixture of logistics models RGB images, got {image_channels} channel(s)")
        return MIXTURES * 10

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return ops.mixture_logistic_log_prob(x, self.logits, self.num_bits)

    def mean(self) -> torch.Tensor:
        return ops.mixture_logistic_mean(self.logits)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        mixture, *parts = unpack(self.logits)
        gumbel = -torch.log(-torch.log(self._uniform(mixture, generator)))
        index = (mixture + gumbel).argmax(dim=1)[:, None, None].expand(-1, 3, 1, -1, -1)
        loc, log_scale, coeff = (part.gather(2, index)[:, :, 0] for part in parts)
        x = loc + torch.exp(log_scale) * torch.logit(self._uniform(loc, generator))
        return chain_colours(x, coeff)


DISTRIBUTIONS: dict[str, type[DecoderDistribution]] = {
    "mixture_logistic": MixtureLogistic,
    "logistic": Logistic,
    "normal": Normal,
    "bernoulli": Bernoulli,
    "categorical": Categorical,
}


def decoder_distribution(name: str) -> type[DecoderDistribution]:
    """The distribution class of that name."""
    if name not in DISTRIBUTIONS:
        raise unknown_name("decoder distribution", name, DISTRIBUTIONS)
    return DISTRIBUTIONS[name]
