"""Chooses, for every operation, which implementation runs, and can say why and prove what ran.

Every performance-critical operation is an :class:`Op`: one public signature, one plain-PyTorch reference
(the specification) and any number of fused implementations. Which one runs is decided per call from, in this
order: ``backend=`` on the call, :func:`use_backend`, :func:`set_backend`, the environment variable
``LSGM_FAST_BACKEND``, ``"auto"``.

An implementation declares ``reasons(*args, **kwargs) -> list[str]``, a pure function of metadata (shapes, dtypes,
strides, devices): the reasons why it cannot run these inputs, empty where it can. ``auto`` takes the first
implementation, by priority, that gives no reason; the reference gives none, ever. A backend asked for by name never
falls back silently: it runs or raises :class:`~lsgm_fast.errors.BackendUnsupported`. A scope or the environment
variable binds only those operations that register an implementation of that name; the others follow ``auto``.

The choice is held in a thread-local with a process-wide default. It is plain Python that TorchDynamo can guard on,
so ``torch.compile(fullgraph=True)`` works and recompiles when the choice changes (a ContextVar would break the graph).
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

import torch

from lsgm_fast import env, selftest, trace
from lsgm_fast.errors import BackendUnsupported, unknown_name

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("reference", "cpu", "triton", "cuda")
CHOICES = ("auto", *BACKENDS)

REGISTRY: dict[str, Op[Any, Any]] = {}


def _no_reasons(*args: Any, **kwargs: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Impl:
    """One implementation of an operation.

    ``reasons`` takes the operation's arguments and returns why it cannot run them (empty: it can); ``auto_reasons``
    why ``auto`` would rather not, though it could (smaller than the measured break-even). ``auto`` tries higher
    ``priority`` first, and a ``self_tested`` implementation only once it has proved itself on the device.
    ``differentiable``: whether it has gradients; without, inputs that want one are refused by ``reasons``.
    ``tolerance``: its error against float64 stays below this many times that of plain PyTorch in the same dtype.
    """

    backend: str
    fn: Callable[..., Any]
    reasons: Callable[..., list[str]] = _no_reasons
    auto_reasons: Callable[..., list[str]] = _no_reasons
    priority: int = 0
    self_tested: bool = False
    differentiable: bool = True
    tolerance: float = 1.0


Choice: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]
"""A parsed backend specification: one default and per-operation overrides. A tuple, on whose value the TorchDynamo of
every supported PyTorch can guard (on a class of ours 2.11 cannot)."""

_AUTO: Choice = ("auto", ())
_process_choice = _AUTO


class _State(threading.local):
    # Set per thread: on a class attribute behind a thread-local, PyTorch 2.11's compiler puts no guard.
    def __init__(self) -> None:
        self.choice: Choice | None = None
        self.log: Log | None = None


_state = _State()


@dataclass
class Log:
    """What ran inside :func:`record`: ``counts[(op, backend)]`` Python-level calls."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def backends(self) -> dict[str, str]:
        """Per operation, the backends that ran it (``"cpu"``, or ``"cpu+reference"`` where several did)."""
        found: dict[str, set[str]] = {}
        for op_name, backend in self.counts:
            found.setdefault(op_name, set()).add(backend)
        return {name: "+".join(sorted(backends)) for name, backends in sorted(found.items())}

    def __str__(self) -> str:
        lines = [f"{op:<24} {backend:<10} {n:>8}" for (op, backend), n in sorted(self.counts.items())]
        return "\n".join([f"{'operation':<24} {'backend':<10} {'calls':>8}", *lines])


@dataclass(frozen=True)
class Decision:
    """The outcome of :func:`explain`: what would run, and why the other implementations would not."""

    op: str
    requested: str
    chosen: str | None
    candidates: tuple[tuple[str, tuple[str, ...]], ...]
    inputs: str
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}({self.inputs})", f"  requested: {self.requested}"]
        for backend, reasons in self.candidates:
            mark = "->" if backend == self.chosen else "  "
            text = "; ".join(reasons) if reasons else "can run"
            if backend in self.notes:
                text += f" ({self.notes[backend]})"
            lines.append(f"  {mark} {backend:<10} {text}")
        if self.chosen is None:
            lines.append(f"  {self.requested} cannot run these inputs, and a named backend never falls back")
        return "\n".join(lines)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        layout = "" if value.is_contiguous() else f", strides {tuple(value.stride())}"
        return f"{dtype}{list(value.shape)} on {value.device}{layout}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        return f"[{len(value)} tensors]"
    return repr(value)


def first_device(args: tuple[Any, ...]) -> torch.device:
    """Device of the first tensor among the arguments (tensors in lists included)."""
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device
    return torch.device("cpu")


class Op(Generic[P, R]):
    """A dispatched operation. Call it like the function it was made from; see the module's docstring."""

    def __init__(
        self,
        check: Callable[P, Any],
        reference: Callable[..., R],
        device_of: Callable[..., torch.device] | None = None,
    ) -> None:
        functools.update_wrapper(self, check)
        self.name: str = check.__name__
        self._check = check
        self._device_of = device_of
        self._impls: dict[str, Impl] = {}
        self._order: tuple[Impl, ...] = ()
        expected = [p for p in inspect.signature(check).parameters if p != "backend"]
        if (got := list(inspect.signature(reference).parameters)) != expected:
            raise TypeError(f"{self.name}: the reference takes {got}, the operation {expected}")
        self.register(Impl("reference", reference, priority=-1))

    def register(self, impl: Impl) -> None:
        """Add an implementation. One per backend; a second registration of the same backend is an error."""
        if impl.backend not in BACKENDS:
            raise unknown_name("backend", impl.backend, BACKENDS)
        if impl.backend in self._impls:
            raise ValueError(f"{self.name}: backend {impl.backend!r} is registered already")
        self._impls[impl.backend] = impl
        self._order = tuple(sorted(self._impls.values(), key=lambda i: -i.priority))

    @property
    def stem(self) -> str:
        """Name of the operation's files: its own, or that of its family."""
        return self.__module__.rpartition(".")[2]

    def device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
        """Where a call runs: on the device of the first tensor argument, unless the operation says otherwise."""
        if self._device_of is not None:
            return self._device_of(*args, **kwargs)
        return first_device((*args, *kwargs.values()))

    def impl(self, backend: str) -> Impl:
        """The implementation registered for ``backend``; an unregistered one raises ``BackendUnsupported``."""
        if backend not in self._impls:
            raise BackendUnsupported(
                f"{self.name} has no {backend!r} implementation: it has {', '.join(self.backends())}"
            )
        return self._impls[backend]

    def backends(self) -> list[str]:
        """Registered backends, in the order in which ``auto`` tries them."""
        return [impl.backend for impl in self._order]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        backend = kwargs.pop("backend", None)
        self._check(*args, **kwargs)
        impl = self._select(args, kwargs, backend)  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            return impl.fn(*args, **kwargs)
        return self._run(impl, args, kwargs)

    def _run(self, impl: Impl, args: Any, kwargs: Any) -> R:
        log = _state.log
        if log is not None:
            log.counts[self.name, impl.backend] += 1
        if trace.active:
            return trace.call(self.name, impl.backend, impl.fn, args, kwargs)
        return impl.fn(*args, **kwargs)

    def resolve(self, *args: P.args, **kwargs: P.kwargs) -> Callable[..., R]:
        """The implementation that these inputs would get, to be called directly in a hot loop.

        The caller promises inputs of the same shapes, dtypes, strides and devices; nothing is checked or recorded.
        """
        backend = kwargs.pop("backend", None)
        self._check(*args, **kwargs)
        return self._select(args, kwargs, backend).fn  # type: ignore[arg-type]

    def backend_for(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The backend that such a call would run; a kernel that ``auto`` has not used yet is tested for it."""
        backend = kwargs.pop("backend", None)
        self._check(*args, **kwargs)
        return self._select(args, kwargs, backend).backend  # type: ignore[arg-type]

    def _requested(self, backend: str | None) -> tuple[str, bool]:
        """(backend name or "auto", strict): strict where it must run whether or not the op registers it."""
        if backend is not None:
            if backend not in CHOICES:
                raise unknown_name("backend", backend, CHOICES)
            return backend, True
        default, per_op = _state.choice or _process_choice
        for op_name, named in per_op:
            if op_name == self.name:
                return named, False
        return default, False

    def _select(self, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str | None) -> Impl:
        requested, strict = self._requested(backend)
        if requested != "auto" and (strict or requested in self._impls):
            impl = self.impl(requested)
            if impl.reasons(*args, **kwargs):
                raise BackendUnsupported(str(self._decide(args, kwargs, requested)))
            return impl
        for impl in self._order:
            if impl.reasons(*args, **kwargs) or impl.auto_reasons(*args, **kwargs):
                continue
            if impl.self_tested:
                device = self.device(args, kwargs)
                if selftest.problem(self.name, impl.backend, device.type, device.index) is not None:
                    continue
            return impl
        raise AssertionError(f"{self.name}: the reference must accept every input")

    def _decide(self, args: tuple[Any, ...], kwargs: dict[str, Any], requested: str) -> Decision:
        automatic = requested == "auto" or requested not in self._impls
        candidates, notes, chosen = [], {}, None
        for impl in self._order:
            why = list(impl.reasons(*args, **kwargs))
            if automatic:
                why += impl.auto_reasons(*args, **kwargs)
            if impl.self_tested and not why:
                state, failure = selftest.known(self.name, impl.backend, self.device(args, kwargs))
                notes[impl.backend] = state
                if failure is not None and automatic:
                    why.append(failure)
            candidates.append((impl.backend, tuple(why)))
            if chosen is None and not why and (automatic or impl.backend == requested):
                chosen = impl.backend
        described = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
        return Decision(self.name, requested, chosen, tuple(candidates), ", ".join(described), notes)


class Binding:
    """A place in a hot loop that calls an operation, without gradients.

    Inputs are checked, and an implementation is chosen, at the first call with a first argument of a shape, dtype and
    layout under a choice of backend; later such calls repeat the choice. They are recorded like any call.
    """

    def __init__(self, op: Op[Any, Any]) -> None:
        self._op = op
        self._chosen: dict[Any, Impl] = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        op = self._op
        if torch.compiler.is_compiling():
            return op(x, *args, **kwargs)
        kind = (x.shape, x.dtype, x.stride(), choice())
        impl = self._chosen.get(kind)
        if impl is None:
            op._check(x, *args, **kwargs)
            impl = self._chosen[kind] = op._select((x, *args), kwargs, None)
        return op._run(impl, (x, *args), kwargs)


def define_op(
    reference: Callable[..., R], device_of: Callable[..., torch.device] | None = None
) -> Callable[[Callable[P, Any]], Op[P, R]]:
    """Turn a documented, validating function into a registered :class:`Op` with ``reference`` as its specification.

    ``device_of``: the device that a call runs on, from its arguments; None: that of the first tensor among them.

    The decorated function's signature is the operation's, plus ``backend: str | None = None``; its body only checks
    the inputs and raises ``ValueError`` / ``TypeError`` with the offending value.
    """

    def decorate(check: Callable[P, Any]) -> Op[P, R]:
        op: Op[P, R] = Op(check, reference, device_of)
        if op.name in REGISTRY:
            raise ValueError(f"operation {op.name!r} is defined twice")
        REGISTRY[op.name] = op
        return op

    return decorate


def parse_choice(spec: str) -> Choice:
    """Parse ``"triton"`` or ``"triton,group_norm_swish=reference"``.

    Raises:
        ValueError: unknown names, or an operation named with a backend that it does not have.
    """
    if not isinstance(spec, str):
        raise TypeError(
            f"expected a backend such as 'triton' or 'triton,mixed_score=reference', got {spec!r}"
        )
    return _checked(*env.parse_backend_spec(spec, CHOICES, tuple(REGISTRY)))


def _checked(default: str | None, per_op: dict[str, str]) -> Choice:
    for op, backend in per_op.items():
        if backend != "auto" and backend not in REGISTRY[op].backends():
            raise ValueError(
                f"{op} has no {backend!r} implementation: it has {', '.join(REGISTRY[op].backends())}"
            )
    return default or "auto", tuple(per_op.items())


def set_backend(spec: str | None) -> None:
    """Set the process-wide default backend (``None``: back to the environment variable, else ``auto``)."""
    global _process_choice
    _process_choice = _environment_choice() if spec is None else parse_choice(spec)


def _environment_choice() -> Choice:
    return _checked(*env.backend_from_env(CHOICES, tuple(REGISTRY)))


@contextmanager
def use_backend(spec: str) -> Iterator[None]:
    """Choose the backend for this thread inside a ``with`` block; the innermost block wins.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """
    with use_choice(parse_choice(spec)):
        yield


def choice() -> Choice:
    """What is asked for here, by a scope or for the process: the backend, and exceptions for some operations."""
    return _state.choice or _process_choice


def current_choice() -> Choice | None:
    """This thread's choice, for :func:`use_choice` in another one; None outside of :func:`use_backend`."""
    return _state.choice


@contextmanager
def use_choice(choice: Choice | None) -> Iterator[None]:
    """:func:`use_backend` for a choice that :func:`current_choice` returned."""
    previous = _state.choice
    _state.choice = choice
    try:
        yield
    finally:
        _state.choice = previous


@contextmanager
def record() -> Iterator[Log]:
    """Count which implementation ran for every operation called in this thread inside the block.

    Calls made by Python are counted; a compiled graph or a CUDA-graph replay makes none. Open the block outside of a
    compiled function: ``torch.compile(fullgraph=True)`` cannot trace it.
    """
    log = Log()
    previous = _state.log
    _state.log = log
    try:
        yield log
    finally:
        _state.log = previous
        if previous is not None:
            previous.counts.update(log.counts)


def count(log: Log) -> None:
    """Record what ``log`` holds as if it had run here, for a replay of what it was recorded of."""
    if _state.log is not None:
        _state.log.counts.update(log.counts)


def explain(op: str | Op[Any, Any], *args: Any, backend: str | None = None, **kwargs: Any) -> Decision:
    """Say which implementation of ``op`` would run these inputs, and why the others would not.

    Touches metadata only: nothing is launched, and tensors on the meta device work.
    """
    if isinstance(op, str):
        if op not in REGISTRY:
            raise unknown_name("operation", op, REGISTRY)
        op = REGISTRY[op]
    requested, strict = op._requested(backend)
    if strict and requested != "auto":
        op.impl(requested)
    op._check(*args, **kwargs)
    return op._decide(args, kwargs, requested)
