"""Work on a second CUDA stream beside that of the caller; on other devices, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Started:
    """Work that has begun, and whose results can be taken once."""

    def __init__(self, results: tuple[Tensor, ...], finished: torch.cuda.Event | None = None) -> None:
        self._results = results
        self._finished = finished

    def take(self) -> tuple[Tensor, ...]:
        """The results, for use on the stream that is current now; nothing of them is kept here."""
        results, self._results = self._results, ()
        if self._finished is not None:
            for tensor in filter(_on_cuda, results):
                # Their memory is the second stream's, which would hand it out again as soon as they are dropped,
                # though the caller's stream may still have to read it.
                current = torch.cuda.current_stream(tensor.device)
                current.wait_event(self._finished)
                tensor.record_stream(current)
        return results


class SecondStream:
    """Where :meth:`start` puts work: a CUDA device's second stream, or in order where there is none."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def ahead(self) -> int:
        """How many pieces of work are worth beginning before the result of the first is taken."""
        return 0 if self._stream is None else 1

    def start(self, work: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Started:
        """Begin ``work(*inputs)``; it sees everything that the caller's stream was told so far.

        Whatever else it reads, such as weights, must not be written by the caller before its results are taken.
        """
        if self._stream is None:
            return Started(work(*inputs))
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensor in filter(_on_cuda, inputs):
            # Before the work, so that it also holds where the work fails half-way.
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            results = work(*inputs)
            return Started(results, self._stream.record_event())

    def close(self) -> None:
        """Wait until nothing of the work is running."""
        if self._stream is not None:
            self._stream.synchronize()


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def begun_ahead(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The items in order, each handed out once ``ahead`` more have been made.

    An error in making one is raised after those before it were handed out; an interrupt at once.
    """
    waiting: deque[T] = deque()
    failure: Exception | None = None
    source = iter(items)
    while True:
        try:
            waiting.append(next(source))
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        if len(waiting) > ahead:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
    if failure is not None:
        try:
            raise failure
        finally:
            # Else this frame and the error's traceback would keep each other, and the tensors in it.
            failure = None
