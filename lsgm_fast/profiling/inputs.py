"""The real arguments of one call of an operation, kept in a file: values, dtypes, strides, alignment, everything.

The file is a safetensors file. Its header says which operation, which call and which arguments; every tensor lies in it
as the stretch of memory that it spans, so that gaps, overlaps and memory formats come back as they were. Nothing in it
is executed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file

from lsgm_fast import trace
from lsgm_fast.dispatch import REGISTRY
from lsgm_fast.errors import unknown_name
from lsgm_fast.files import atomic_path

FORMAT = 1
_KEY = "lsgm_fast.call"
# Kernels take wide accesses where the address allows them, so the distance to such an address is kept too.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Call:
    """One call of an operation. ``number``: which one of the run, from 1; ``backend`` and ``device``: what ran it."""

    op: str
    number: int
    backend: str
    device: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def parse(spec: str) -> tuple[str, int]:
    """``"group_norm_swish:3"`` -> the operation and the number of its call (1 where it is left out).

    Raises:
        ValueError: unknown operation, or a number that is none.
    """
    name, _, number = spec.partition(":")
    if name not in REGISTRY:
        raise unknown_name("operation", name, REGISTRY)
    if number and not (number.isdecimal() and int(number) >= 1):
        raise ValueError(f"expected OP or OP:N with N from 1, as in {name}:3, got {spec!r}")
    return name, int(number or 1)


class Catcher:
    """A listener for :func:`lsgm_fast.trace.listening` that keeps a copy of the arguments of one call."""

    def __init__(self, op: str, number: int) -> None:
        self.op, self.number = op, number
        self.seen = 0
        self.call: Call | None = None

    def __call__(self, op: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op != self.op:
            return
        self.seen += 1
        if self.seen == self.number:
            device = str(REGISTRY[op].device(args, kwargs))
            # Copied now: the operation may write to its arguments, and a solver reuses memory.
            copied = tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}
            self.call = Call(op, self.number, backend, device, *copied)


def capture(run: Any, op: str, number: int) -> Call:
    """Run it, and return the ``number``-th call of the operation.

    Raises:
        ValueError: it makes fewer calls than that.
    """
    catcher = Catcher(op, number)
    with trace.listening(catcher):
        run()
    if catcher.call is None:
        raise ValueError(
            f"{op} was called {catcher.seen} times, so there is no call {number}"
            + ("" if catcher.seen else ": another stage or model may call it")
        )
    return catcher.call


def save(call: Call, path: Path) -> None:
    """Write it.

    Raises:
        TypeError: an argument of a kind that the format does not know.
    """
    tensors: dict[str, torch.Tensor] = {}
    header = {
        "format": FORMAT,
        "op": call.op,
        "number": call.number,
        "backend": call.backend,
        "device": call.device,
        "args": [_packed(value, f"args.{i}", tensors) for i, value in enumerate(call.args)],
        "kwargs": {name: _packed(value, f"kwargs.{name}", tensors) for name, value in call.kwargs.items()},
    }
    with atomic_path(path, make_folders=True) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})


def load(path: Path, device: str | torch.device = "cpu") -> Call:
    """Read it; ``device``: where the tensors go that were on the call's device (others stay on the CPU).

    Raises:
        ValueError: no such file, none of ours, or of an operation or format that this version does not have.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(text) if text is not None else None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if header is None:
        raise ValueError(f"{path} holds no call of an operation: write one with --capture-inputs")
    if header["format"] != FORMAT:
        raise ValueError(
            f"{path} is of format {header['format']}, this version reads {FORMAT}: capture it again"
        )
    if header["op"] not in REGISTRY:
        raise unknown_name("operation", header["op"], REGISTRY)
    target = _Target(header["device"].partition(":")[0], torch.device(device))
    return Call(
        header["op"],
        header["number"],
        header["backend"],
        header["device"],
        tuple(_unpacked(value, tensors, target) for value in header["args"]),
        {name: _unpacked(value, tensors, target) for name, value in header["kwargs"].items()},
    )


# -- tensors --------------------------------------------------------------------------------------------------------


def _span(tensor: torch.Tensor) -> int:
    """How many elements of memory lie between the first and the last one, both included."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _offset(tensor: torch.Tensor) -> int:
    """Elements between an aligned address and the first one."""
    return tensor.data_ptr() % _ALIGNMENT // tensor.element_size()


def _placed(memory: torch.Tensor, shape: Any, stride: Any, offset: int) -> torch.Tensor:
    """A tensor of this shape and stride over a copy of ``memory``, as far behind an aligned address as asked for."""
    spare = _ALIGNMENT // memory.element_size()
    room = torch.empty(memory.numel() + 2 * spare, dtype=memory.dtype, device=memory.device)
    begin = (offset - _offset(room)) % spare
    room[begin : begin + memory.numel()].copy_(memory)
    return room.as_strided(tuple(shape), tuple(stride), begin)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        wanted = value.requires_grad
        value = value.detach()
        memory = value.as_strided((_span(value),), (1,))
        return _placed(memory, value.shape, value.stride(), _offset(value)).requires_grad_(wanted)
    if isinstance(value, (list, tuple)):
        return list(map(_copied, value)) if isinstance(value, list) else tuple(map(_copied, value))
    return value


def _packed(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        memory = value.detach().as_strided((_span(value),), (1,))
        tensors[name] = memory.clone().cpu()
        return {
            "tensor": name,
            "shape": list(value.shape),
            "stride": list(value.stride()),
            "offset": _offset(value),
            "device": value.device.type,
            "requires_grad": value.requires_grad,
        }
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"argument {name} is a {type(value).__name__}, which the file format does not know")


class _Target(NamedTuple):
    """Tensors of the device type ``was`` go to ``device``."""

    was: str
    device: torch.device


def _unpacked(value: dict[str, Any], tensors: dict[str, torch.Tensor], target: _Target) -> Any:
    if "tensor" in value:
        memory = tensors[value["tensor"]]
        if value["device"] == target.was:
            memory = memory.to(target.device)
        placed = _placed(memory, value["shape"], value["stride"], value["offset"])
        return placed.requires_grad_(value["requires_grad"])
    if "list" in value:
        return [_unpacked(item, tensors, target) for item in value["list"]]
    if "tuple" in value:
        return tuple(_unpacked(item, tensors, target) for item in value["tuple"])
    if "dtype" in value:
        dtype = getattr(torch, value["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"the file names the dtype {value['dtype']!r}, which PyTorch does not have")
        return dtype
    return float(value["float"]) if "float" in value else value["value"]
