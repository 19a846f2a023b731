"""Parts of a model that keep no intermediate results for the backward pass, but compute them again there."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsgm_fast import dispatch


class _State(threading.local):
    def __init__(self) -> None:
        self.active = False


_state = _State()


def recomputing() -> bool:
    """Whether this thread computes something a second time, for the backward pass: side effects are to be left out."""
    return _state.active


def recomputed(module: nn.Module, *args: object, when: bool) -> Any:
    """``module(*args)``; where ``when`` holds, only the arguments are kept for the backward pass, which computes again.

    Takes effect in training mode with gradients enabled (Chen et al. 2016, "Training deep nets with sublinear memory
    cost"). The second computation gives the same numbers as the first: it has the weights that
    :func:`~lsgm_fast.nn.layers.normalized_weights` had prepared, the same dropout masks, autocast and backends, and it
    leaves running statistics alone.
    """
    if not (when and module.training and torch.is_grad_enabled()):
        return module(*args)
    # The backward pass comes after the block that prepared the weights.
    convs = [m for m in module.modules() if hasattr(m, "prepared_weight")]
    weights = [conv.prepared_weight for conv in convs]
    # On CUDA it runs in another thread, to which a choice of this one means nothing.
    choice = dispatch.current_choice()

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _SecondTime(convs, weights, choice)

    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


class _SecondTime:
    """Around a second computation. Can be entered again: two backward passes through one graph compute twice."""

    def __init__(
        self,
        convs: Sequence[nn.Module],
        weights: Sequence[torch.Tensor | None],
        choice: dispatch.Choice | None,
    ) -> None:
        self._convs, self._weights, self._choice = convs, weights, choice
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(_as_the_first(self._convs, self._weights))
        stack.enter_context(dispatch.use_choice(self._choice))
        self._entered.append(stack)

    def __exit__(self, *exc: object) -> None:
        self._entered.pop().close()


@contextmanager
def _as_the_first(convs: Sequence[nn.Module], weights: Sequence[torch.Tensor | None]) -> Iterator[None]:
    before, active_before = [conv.prepared_weight for conv in convs], _state.active
    _state.active = True
    _prepare(convs, weights)
    try:
        yield
    finally:
        _prepare(convs, before)
        _state.active = active_before


def _prepare(convs: Sequence[nn.Module], weights: Sequence[torch.Tensor | None]) -> None:
    for conv, weight in zip(convs, weights, strict=True):
        conv.prepared_weight = weight
