"""Named ranges for profilers: NVTX ranges for Nsight Systems and Compute, annotations in traces of PyTorch's profiler.

Off by default: a place that has a range asks one module-level flag, and nothing else happens. On with
``LSGM_FAST_TRACE=1``, :func:`enable` or :func:`enabled`, and in ``lsgm-fast profile``. NVTX ranges need the package
``nvtx`` (``pip install 'lsgm-fast[profile]'``); without it, those of PyTorch's profiler remain.

:data:`RANGES` lists every range but those of operations, which are called ``<operation>.<backend>``;
``docs/profiling.md`` says how to read them. What ``torch.compile`` turns into a graph has no ranges inside, and a CUDA
graph's replay none but those around it. A range is opened and closed on the host and never waits for the device.

>>> from lsgm_fast import trace
>>> with trace.enabled(), trace.span("decode"):
...     pass
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch

from lsgm_fast import env

P = ParamSpec("P")
R = TypeVar("R")

Payload: TypeAlias = tuple[float, ...]
"""Numbers that a range carries, in the order of :attr:`Range.payload`."""

DOMAIN = "lsgm_fast"
"""NVTX domain of all ranges."""

CATEGORIES = {
    "stage": 0xFF4E79A7,
    "solver": 0xFFB07AA1,
    "network": 0xFF59A14F,
    "block": 0xFFF28E2B,
    "operation": 0xFFE15759,
}
"""NVTX categories and their colours (ARGB)."""


@dataclass(frozen=True)
class Range:
    """One kind of range: its category, what lies inside, and the names of the numbers that it carries."""

    category: str
    inside: str
    payload: tuple[str, ...] = ()


RANGES = {
    "sample": Range("stage", "`LSGM.sample`: all batches"),
    "solve": Range("stage", "one batch of latents, from noise to the end of the solver"),
    "decode": Range("stage", "one batch of images from latents"),
    "encode": Range("stage", "one batch of posteriors from images"),
    "train_step": Range("stage", "one step of the trainer"),
    "forward": Range("stage", "draws and the objective's forward pass, of one part of the batch"),
    "backward": Range("stage", "the backward pass, of one part of the batch"),
    "clip": Range("stage", "norm of one optimizer's gradients, and clipping"),
    "optimizer": Range("stage", "the optimizers' steps"),
    "ema": Range("stage", "the average of the score network's weights"),
    "step": Range("solver", "one attempted step of a solver, from t on", ("number", "t")),
    "evaluation": Range("network", "one evaluation of the score network by a solver", ("number", "t")),
    "score_network": Range("network", "the score network's forward pass", ("shape",)),
    "res_block": Range("block", "a residual block of the score network", ("shape",)),
    "attention": Range("block", "an attention block of the score network", ("shape",)),
    "cell": Range("block", "a residual cell of the VAE", ("shape",)),
}
"""Every range that is not an operation's."""

OPERATION = Range("operation", "one call of an operation, by the backend that runs it", ("shape",))
"""Ranges of operations, called ``<operation>.<backend>``; ``shape`` is that of the first tensor."""

active = False
"""Whether ranges are made. Read it; :func:`enable` and :func:`disable` set it."""

_domain: Any = None
_profiler_enabled: Callable[[], bool] = torch.autograd._profiler_enabled


class _Local(threading.local):
    def __init__(self) -> None:
        self.open: list[Span] = []
        self.evaluations = 0
        self.written: list[tuple[str, dict[str, Any]]] | None = None


_local = _Local()

Listener: TypeAlias = Callable[[str, str, tuple[Any, ...], dict[str, Any]], object]
_listeners: list[Listener] = []


class _Nothing:
    """What :func:`span` returns while nothing is traced."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None


_NOTHING = _Nothing()


class Span:
    """One range, open inside ``with``."""

    __slots__ = ("_annotation", "_pushed", "kind", "name", "payload")

    def __init__(self, name: str, kind: Range, payload: Payload) -> None:
        self.name, self.kind, self.payload = name, kind, payload
        self._pushed: Any = None
        self._annotation: Any = None

    def __enter__(self) -> None:
        _local.open.append(self)
        if _local.written is not None:
            _local.written.append((self.name, self.described()))
        domain = _domain
        if domain is not None:
            attributes = domain.get_event_attributes(
                message=self.name,
                color=CATEGORIES[self.kind.category],
                category=self.kind.category,
                # A single number is what every version of the tools can show.
                payload=self.payload[0] if len(self.payload) == 1 else self.payload or None,
            )
            domain.push_range(attributes)
            self._pushed = domain
        # Without a profiler an annotation would cost more than the rest of this together.
        if _profiler_enabled():
            self._annotation = torch.profiler.record_function(self.name)
            self._annotation.__enter__()

    def __exit__(self, *exc: object) -> None:
        # Ranges still open inside this one, such as a solver's last step, end with it.
        spans = _local.open
        while spans:
            last = spans.pop()
            last._end()
            if last is self:
                return

    def _end(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
        if self._pushed is not None:
            self._pushed.pop_range()

    def described(self) -> dict[str, Any]:
        """The payload by name."""
        if self.kind.payload == ("shape",):
            return {"shape": list(self.payload)}
        return dict(zip(self.kind.payload, self.payload, strict=False))


# -- on and off -----------------------------------------------------------------------------------------------------


def enable() -> None:
    """Make ranges from now on, in every thread."""
    global active, _domain
    if _domain is None and importlib.util.find_spec("nvtx") is not None:
        import nvtx

        domain = nvtx.get_domain(DOMAIN)
        # Without a tool it is a stand-in that does nothing.
        _domain = domain if isinstance(domain, nvtx.Domain) else None
    active = True


def disable() -> None:
    """Make none any more; those that are open are closed where they end."""
    global active
    active = False


@contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for the block."""
    before = active
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


# -- ranges ---------------------------------------------------------------------------------------------------------


def _watched() -> bool:
    """Whether anybody would see a range of this thread."""
    return _domain is not None or _profiler_enabled() or _local.written is not None


def span(name: str, *payload: float) -> Span | _Nothing:
    """A range of :data:`RANGES`, to be used in ``with``."""
    if torch.compiler.is_compiling() or not active or not _watched():
        return _NOTHING
    return Span(name, RANGES[name], payload)


def spanned(
    name: str, payload: Callable[..., Payload] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that puts a range around a function; ``payload`` makes its numbers from the function's arguments."""
    kind = RANGES[name]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            # In this order: TorchDynamo would guard on the flag, and compile again for a profile.
            if torch.compiler.is_compiling() or not active or not _watched():
                return function(*args, **kwargs)
            if name == "solve":
                _local.evaluations = 0
            with Span(name, kind, () if payload is None else payload(*args, **kwargs)):
                return function(*args, **kwargs)

        return inside

    return decorate


def step(number: int, t: float | torch.Tensor) -> None:
    """Begin a solver's step; it ends where the next one begins, or with the range around it.

    The number of the step that is under way does nothing, and so does a call outside of any range. ``t`` may be a
    tensor, of which the first element is taken where it lies on the CPU.
    """
    if torch.compiler.is_compiling() or not active:
        return
    spans = _local.open
    if not spans:
        return
    if spans[-1].name == "step":
        if spans[-1].payload[0] == number:
            return
        spans.pop()._end()
    Span("step", RANGES["step"], (number, *_host_number(t))).__enter__()


def evaluation(*args: Any, **_options: Any) -> Payload:
    """Payload of an evaluation ``f(..., t)``: its number within the solve, and t where it lies on the CPU."""
    _local.evaluations += 1
    return (_local.evaluations, *_host_number(args[-1]))


def shape(*args: Any, **kwargs: Any) -> Payload:
    """Payload of anything that takes a tensor: the shape of the first one."""
    for value in args:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return tuple(value[0].shape)
    return ()


def _host_number(t: float | torch.Tensor) -> Payload:
    if not isinstance(t, torch.Tensor):
        return (float(t),)
    # Reading it from a device would wait for the device.
    return (float(t.reshape(-1)[0]),) if t.device.type == "cpu" and t.numel() else ()


def call(op: str, backend: str, function: Callable[..., R], args: Any, kwargs: Any) -> R:
    """Run an operation's implementation inside its range; for the dispatcher, while ranges are made."""
    for listener in _listeners:
        listener(op, backend, args, kwargs)
    if not _watched():
        return function(*args, **kwargs)
    with Span(f"{op}.{backend}", OPERATION, shape(*args, *kwargs.values())):
        return function(*args, **kwargs)


# -- for whoever looks on -------------------------------------------------------------------------------------------


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Make ranges, and call ``listener(op, backend, args, kwargs)`` before every operation that runs in the block."""
    with enabled():
        _listeners.append(listener)
        try:
            yield
        finally:
            _listeners.remove(listener)


@contextmanager
def written() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Make ranges, and list (name, payload by name) of every one that this thread opens in the block, in order."""
    before = _local.written
    found: list[tuple[str, dict[str, Any]]] = []
    _local.written = found
    try:
        with enabled():
            yield found
    finally:
        _local.written = before


if env.trace_enabled():
    enable()
