"""CUDA graphs of functions of tensors: captured by shape, replayed, and given up for a plain call where that fails."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lsgm_fast import dispatch

# Reduced precision leaves more than this alone; a replay that read other memory than it should is far off.
_SAME = 1e-2


class Captured(Protocol):
    """A captured call: replays on new inputs of the same shapes, and returns new memory."""

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor: ...
    def close(self) -> None: ...


class Graphed:
    """A function of tensors, replayed from a CUDA graph.

    One graph for every combination of shapes, dtypes and layouts, the ``most`` last used; they share their memory. A
    graph is captured at the call number ``after`` of its kind. The first replay is compared with a plain call. Where
    capturing fails (an operation that cannot be captured, no memory), or the comparison does, one warning says why and
    calls of that kind are plain from then on.

    Safe on any stream and from any thread: a replay waits for the one before.

    Args:
        function: of tensors on one CUDA device, to one tensor; must not read anything back.
        most: graphs that are kept. after: plain calls of a kind before it is captured.
    """

    def __init__(self, function: Callable[..., Tensor], *, most: int = 4, after: int = 0) -> None:
        self._function = function
        self._most, self._after = most, after
        self._graphs: OrderedDict[Hashable, tuple[Captured, dispatch.Log] | None] = OrderedDict()
        self._calls: dict[Hashable, int] = {}
        self._lock = threading.Lock()
        self._warned = False
        self._pool: _Pool | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return self._function(*inputs)
        kind = dispatch.choice(), tuple((t.shape, t.dtype, t.device, t.stride()) for t in inputs)
        with self._lock:
            if kind in self._graphs:
                self._graphs.move_to_end(kind)
                found = self._graphs[kind]
                if found is None:
                    return self._function(*inputs)
                graph, log = found
                dispatch.count(log)
                return graph(inputs)
            calls = self._calls[kind] = self._calls.get(kind, 0) + 1
            # Also what makes kernels compile, test themselves and choose algorithms, none of which may be captured.
            with dispatch.record() as log:
                expected = self._function(*inputs)
            if calls > self._after:
                self._calls.pop(kind)
                proved = self._proved(inputs, expected)
                self._graphs[kind] = None if proved is None else (proved, log)
                self._evict()
            return expected

    def _proved(self, inputs: tuple[Tensor, ...], expected: Tensor) -> Captured | None:
        """The captured call, if there can be one and it returns what is expected."""
        try:
            graph = self._capture(inputs)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self._warn(f"could not be captured ({type(error).__name__}: {str(error).splitlines()[0]})")
            return None
        difference, size = (graph(inputs) - expected).float().norm(), expected.float().norm()
        if bool(difference <= _SAME * size) or not bool(torch.isfinite(expected).all()):
            return graph
        graph.close()
        self._warn(
            f"gives other numbers than a plain call (relative difference {float(difference / size):.2g}, please "
            "report it)"
        )
        return None

    def _capture(self, inputs: tuple[Tensor, ...]) -> Captured:
        if self._pool is None:
            self._pool = _Pool(torch.cuda.graph_pool_handle(), torch.cuda.Event())
        return _CUDAGraph(self._function, inputs, self._pool)

    def _evict(self) -> None:
        graphs = [kind for kind, found in self._graphs.items() if found is not None]
        for oldest in graphs[: max(len(graphs) - self._most, 0)]:
            found = self._graphs.pop(oldest)
            assert found is not None
            found[0].close()

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a CUDA graph {what}: going on without, which is slower at small batches", stacklevel=4
            )


@dataclass
class _Pool:
    """Memory that graphs share, and the end of the last replay that used it."""

    handle: Any
    done: torch.cuda.Event


class _CUDAGraph:
    """One capture, with its own inputs and output."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: _Pool) -> None:
        self._pool = pool
        self._inputs = [t.clone() for t in inputs]
        with torch.cuda.device(inputs[0].device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            current.wait_event(pool.done)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                # cuBLAS and cuDNN have workspaces for every stream, which they make in the first call on it.
                function(*self._inputs)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating meanwhile.
            with torch.cuda.graph(
                self._graph, pool=pool.handle, stream=stream, capture_error_mode="thread_local"
            ):
                self._output = function(*self._inputs)
            current.wait_stream(stream)

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        stream = torch.cuda.current_stream(inputs[0].device)
        stream.wait_event(self._pool.done)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        # The next replay of any graph of the pool may write over it.
        output = self._output.clone()
        self._pool.done.record(stream)
        return output

    def close(self) -> None:
        """Give the memory back, once nothing uses it any more."""
        self._pool.done.synchronize()
        self._graph.reset()
