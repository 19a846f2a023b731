"""Sample inputs: seeded tensors in every memory layout that an operation may meet.

A testing file ``lsgm_fast/testing/<op>.py`` describes its operation once, as an :class:`OpSamples`; the list of
samples, the inputs of the self-test and those of the benchmarks are all made from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lsgm_fast.errors import unknown_name
from lsgm_fast.presets import PRESETS

Shape: TypeAlias = tuple[int, ...]
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""

LAYOUTS = ("contiguous", "channels_last", "offset", "sliced", "transposed", "expanded", "random")
"""Memory layouts of :func:`lay_out`."""

DENSE_LAYOUTS = ("contiguous", "channels_last")


def _latent_shapes() -> dict[str, Shape]:
    """Latent shapes (C, h, w) of the published configurations, each once, under the first preset that has it."""
    found: dict[Shape, str] = {}
    for name, config in PRESETS.items():
        if not name.startswith("tiny"):
            found.setdefault(tuple(config.vae.latent_shape), name)
    return {name: shape for shape, name in found.items()}


LATENT_SHAPES = _latent_shapes()


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of an operation.

    ``args`` and ``kwargs`` are what the public function takes, in its order; ``differentiable`` are the positions in
    ``args`` of the tensors (or lists of tensors) that get gradients, ``mutates`` those of tensors that are written to.
    """

    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[int, ...] = ()
    mutates: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Sample({self.id!r})"

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists too."""
        return list(_tensors((self.args, self.kwargs)))

    @property
    def elements(self) -> int:
        """Number of elements of the largest tensor."""
        return max((t.numel() for t in self.tensors()), default=0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class Draw:
    """Seeded random tensors, drawn on the CPU and moved, so that every device gets the same numbers.

    The numbers depend on ``seed`` and ``label`` only: adding a sample changes no other.
    """

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0, label: str = "") -> None:
        self.device = torch.device(device)
        digest = hashlib.blake2s(f"{seed}/{label}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def normal(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        mean: float = 0.0,
        std: float = 1.0,
    ) -> Tensor:
        """Normals of ``mean`` and ``std``, drawn in float64 and rounded to ``dtype``."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std + mean
        return lay_out(values.to(dtype).to(self.device), layout, self.generator)

    def uniform(
        self,
        *shape: int,
        low: float,
        high: float,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
    ) -> Tensor:
        """Uniform numbers in [low, high)."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return lay_out(values.to(dtype).to(self.device), layout, self.generator)


def lay_out(tensor: Tensor, layout: str, generator: torch.Generator | None = None) -> Tensor:
    """A tensor of the same values in one of :data:`LAYOUTS`.

    ``channels_last`` needs four or five dimensions and leaves others contiguous; ``offset`` starts one element behind
    an aligned address; ``sliced`` is a window of a larger tensor; ``transposed`` swaps the last two dimensions in
    memory; ``expanded`` repeats the first slice of dimension 0 with stride 0 (the only one that changes values);
    ``random`` is :func:`random_strides`. Memory between the elements holds NaN.

    Raises:
        ValueError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    if layout == "channels_last" and tensor.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[tensor.dim()])
    if layout == "offset":
        return _window(tensor.flatten(), before=(1,), after=(0,)).view(tensor.shape)
    if layout == "sliced" and tensor.dim():
        return _window(tensor, before=(1,) * tensor.dim(), after=(2,) * tensor.dim())
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].contiguous().expand(tensor.shape)
    if layout == "random":
        return random_strides(tensor, generator)
    return tensor.contiguous()


def _filled(elements: int | Sequence[int], like: Tensor) -> Tensor:
    """Memory of the worst value: NaN, or the largest integer."""
    size = (elements,) if isinstance(elements, int) else tuple(elements)
    worst = float("nan") if like.dtype.is_floating_point else int(like.dtype == torch.bool)
    if not like.dtype.is_floating_point and like.dtype != torch.bool:
        worst = torch.iinfo(like.dtype).max
    return torch.full(size, worst, dtype=like.dtype, device=like.device)


def _window(tensor: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    sizes = [b + n + a for b, n, a in zip(before, tensor.shape, after, strict=True)]
    window = _filled(sizes, tensor)
    for dim, (start, length) in enumerate(zip(before, tensor.shape, strict=True)):
        window = window.narrow(dim, start, length)
    return window.copy_(tensor)


def random_strides(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A tensor of the same values whose dimensions lie in a random order in memory, with gaps and an offset.

    The gaps hold NaN (integers: the largest one), so a kernel that ignores strides reads garbage.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    strides = [0] * tensor.dim()
    extent = 1
    for dim in torch.randperm(tensor.dim(), generator=generator).tolist():
        strides[dim] = extent * draw(1, 2)
        extent = strides[dim] * max(tensor.shape[dim], 1) + draw(0, 2)
    offset = draw(0, 3)
    storage = _filled(offset + extent, tensor)
    return storage.as_strided(tensor.shape, strides, offset).copy_(tensor.detach())


Build: TypeAlias = "Callable[[Draw, Shape, torch.dtype, torch.dtype, str], Call]"
"""``build(draw, shape, dtype, network_dtype, layout)``: arguments whose main tensors have that shape and layout.

``dtype`` is that of the state; ``network_dtype`` that of what a network (perhaps under autocast) computed.
"""

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SAME_DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (F64, F64))
MIXED_DTYPES = (
    *SAME_DTYPES,
    *((F32, BF16), (F32, F16), (F64, F32), (F64, BF16), (BF16, F32), (F16, BF16), (F32, F64)),
)
# One element, odd sizes, sizes around vector widths (a channel of 8k - 1, 8k, 8k + 1 elements), empty ones.
AWKWARD_SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (1, 1, 1, 5),
    (3, 5, 7, 9),
    (2, 17, 1, 1),
    (5, 1, 33, 31),
    (1, 3, 1, 1031),
    (4, 2, 8, 4),
    (1, 70, 3, 3),
    (0, 4, 3, 3),
    (2, 3, 0, 4),
)


@dataclass(frozen=True)
class OpSamples:
    """What tests, the self-test and benchmarks need to know about the inputs of one operation.

    Attributes:
        build: makes the arguments of a call; see :data:`Build`.
        shapes: sizes that occur in published configurations, by name, without the batch.
        awkward: further whole shapes, with the batch.
        dtypes: pairs ``(dtype, network_dtype)``.
        layouts: layouts of the main tensors.
        differentiable: positions of the arguments that get gradients.
        mutates: positions of the tensors that a call writes to; what is in them afterwards counts as results.
        extra: further calls, ``extra(draw) -> (name, arguments) ...``; ``draw(name)`` gives the numbers.
        base: the shape, with the batch, at which dtypes and layouts vary.
        traffic: bytes that a forward call must read and write; None: every tensor among arguments and results once.
    """

    build: Build
    shapes: Mapping[str, Shape]
    awkward: Sequence[Shape] = AWKWARD_SHAPES
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = SAME_DTYPES
    layouts: Sequence[str] = LAYOUTS
    differentiable: tuple[int, ...] = ()
    mutates: tuple[int, ...] = ()
    extra: Callable[[Callable[[str], Draw]], Iterable[tuple[str, Call]]] | None = None
    base: Shape = (3, 5, 6, 7)
    selftest: Shape = (3, 5, 19, 19)
    traffic: Callable[[Sample, Sequence[Tensor]], int] | None = None

    def at(
        self,
        shape: Shape,
        dtype: torch.dtype = F32,
        network_dtype: torch.dtype | None = None,
        layout: str = "contiguous",
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        name: str | None = None,
    ) -> Sample:
        """The sample of that shape, dtypes and layout."""
        network_dtype = dtype if network_dtype is None else network_dtype
        label = " ".join([name or describe_shape(shape), describe_dtypes(dtype, network_dtype), layout])
        args, kwargs = self.build(Draw(device, seed, label), tuple(shape), dtype, network_dtype, layout)
        return Sample(label, args, kwargs, self.differentiable, self.mutates)

    def all(self, *, device: torch.device | str, seed: int, large: bool) -> Iterator[Sample]:
        """Every sample; ``large`` adds the published sizes at the batches that people sample and train with."""

        def at(shape: Shape, *args: Any, name: str | None = None) -> Sample:
            return self.at(shape, *args, device=device, seed=seed, name=name)

        for name, shape in self.shapes.items():
            yield at((1 if len(shape) > 2 and _product(shape) > 2**18 else 2, *shape), name=f"{name} few")
        if large:
            for batch in (16, 64):
                for name, shape in self.shapes.items():
                    if batch * _product(shape) <= 2**24:
                        yield at((batch, *shape), name=f"{name} x{batch}")
                        yield at((batch, *shape), F32, F32, "channels_last", name=f"{name} x{batch}")
                        yield at((batch, *shape), BF16, BF16, name=f"{name} x{batch}")
        for shape in self.awkward:
            yield at(shape)
        for dtype, network_dtype in self.dtypes:
            for layout in DENSE_LAYOUTS:
                if (dtype, network_dtype, layout) != (F32, F32, "contiguous"):
                    yield at(self.base, dtype, network_dtype, layout)
        yield at(self.base)
        for layout in self.layouts:
            if layout not in DENSE_LAYOUTS:
                yield at(self.base, F32, F32, layout)
        if self.extra is not None:
            for name, (args, kwargs) in self.extra(lambda label: Draw(device, seed, label)):
                # An argument left to its default has no gradient.
                positions = tuple(p for p in self.differentiable if p < len(args))
                yield Sample(name, args, kwargs, positions, self.mutates)


def _product(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def describe_shape(shape: Sequence[int]) -> str:
    """``(2, 3, 4)`` as ``2x3x4``."""
    return "x".join(map(str, shape)) or "0-d"


def describe_dtypes(dtype: torch.dtype, network_dtype: torch.dtype) -> str:
    """``float32``, or ``float32<-bfloat16`` where the network's dtype differs."""
    state, network = (str(d).removeprefix("torch.") for d in (dtype, network_dtype))
    return state if state == network else f"{state}<-{network}"
