"""Optimizers, the learning rate's course, and the average of the score network's weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lsgm_fast import trace
from lsgm_fast.training.config import OptimizerConfig

_OPTIMIZERS: dict[str, Any] = {
    "adamax": torch.optim.Adamax,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's optimizer of that name, in its multi-tensor form."""
    return _OPTIMIZERS[config.name](
        list(parameters),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def learning_rate(config: OptimizerConfig, step: int, warmup: int, total_steps: int) -> float:
    """``lr (step + 1) / warmup``, then ``lr_min + (lr - lr_min) (1 + cos(pi s)) / 2`` with s from 0 to 1 at the end."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, total_steps - warmup - 1)
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1.0 + math.cos(math.pi * min(share, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class EMA:
    """Exponential moving average of a module's parameters: ``a <- d a + (1 - d) p``, from p at the start; float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names, parameters = zip(*module.named_parameters(), strict=True)
        self._parameters = list(parameters)
        self._averages = [
            p.detach().clone().to(torch.promote_types(p.dtype, torch.float32)) for p in parameters
        ]

    @trace.spanned("ema")
    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        torch._foreach_lerp_(self._averages, [p.detach().to(a) for p, a in self], 1.0 - self.decay)

    def __iter__(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        return zip(self._parameters, self._averages, strict=True)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averages inside the block, and its own parameters again after it."""
        own = [p.data for p in self._parameters]
        try:
            for p, average in self:
                p.data = average.to(p.dtype)
            yield
        finally:
            for p, data in zip(self._parameters, own, strict=True):
                p.data = data

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into another module of the same structure."""
        for p, average in zip(module.parameters(), self._averages, strict=True):
            p.copy_(average)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by the parameters' names."""
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(state[name])
