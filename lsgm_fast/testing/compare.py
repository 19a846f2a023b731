"""Is a kernel right? Comparison with the float64 reference, with tolerances that plain PyTorch has to earn.

For every result three evaluations are compared: ``exact``, the reference in float64 on the same (rounded) inputs;
``plain``, the reference in the inputs' own dtypes; and the kernel's. Per element

    |kernel - exact| <= k max|plain - exact| + floor,

and over the whole result relative L2 norm and cosine likewise. The floor is what no arithmetic can avoid: rounding the
result, and a few roundings of the inputs, carried to the result by differences of the float64 reference. It keeps a
result of few elements, in which plain PyTorch may happen to be exact, from asking for the impossible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lsgm_fast.dispatch import REGISTRY, Impl, Op
from lsgm_fast.errors import BackendUnsupported, unknown_name
from lsgm_fast.testing.inputs import Draw, Sample, lay_out

Results = list[Tensor | None]

# Roundings that a kernel may make on the way, each as large as one of an input's.
_ROUNDINGS = 4.0
# Absolute, in units of the larger of 1 and the largest result: where the float64 reference itself cancels, such as in
# 1 - sigmoid(40), a kernel may well be closer to the truth.
_EXACT_ERROR = 16 * torch.finfo(torch.float64).eps
# The norms are statistics: of fewer elements plain PyTorch's may be small by luck.
_FEWEST_FOR_NORMS = 16
# Beyond this size the largest of so many errors of plain PyTorch is a measure good enough.
_SENSITIVITY_LIMIT = 2**13


def find_op(op: str | Op[Any, Any]) -> Op[Any, Any]:
    """The operation of that name; an unknown one raises ``ValueError`` with the list."""
    if not isinstance(op, str):
        return op
    import lsgm_fast.ops  # registers the operations  # noqa: F401

    if op not in REGISTRY:
        raise unknown_name("operation", op, REGISTRY)
    return REGISTRY[op]


def unsupported(op: str | Op[Any, Any], backend: str, sample: Sample) -> list[str]:
    """Why the backend cannot run the sample; empty where it can."""
    return find_op(op).impl(backend).reasons(*sample.args, **sample.kwargs)


def has_gradients(op: str | Op[Any, Any], backend: str, sample: Sample) -> bool:
    """Whether the sample has arguments that get gradients and the backend's implementation gives them."""
    return bool(sample.differentiable) and find_op(op).impl(backend).differentiable


def check_forward(op: str | Op[Any, Any], backend: str, sample: Sample, k: float | None = None) -> None:
    """Compare a backend's results on one sample with the float64 reference.

    The implementation is called directly: it is neither proved nor recorded. Also checked: shapes,
    dtypes, devices, and that no byte of the inputs' memory, gaps included, has changed.

    Args:
        op: the operation or its name. backend: which implementation. sample: from :func:`lsgm_fast.testing.samples`.
        k: allowed multiple of plain PyTorch's error; None: the implementation's ``tolerance``.

    Raises:
        AssertionError: names the operation, backend, sample, worst index with both values, and the error norms.
        BackendUnsupported: the implementation gives reasons why it cannot run the sample.
    """
    op = find_op(op)
    impl = _runnable(op, backend, sample)
    compare_forward(
        impl.fn,
        op.impl("reference").fn,
        sample,
        k=impl.tolerance if k is None else k,
        label=f"{op.name} on {backend}",
    )


def check_backward(
    op: str | Op[Any, Any],
    backend: str,
    sample: Sample,
    k: float | None = None,
    *,
    grad_layout: str = "contiguous",
) -> None:
    """Compare a backend's gradients on one sample with those of the float64 reference.

    Args:
        op, backend, sample, k: as for :func:`check_forward`; the sample has ``differentiable`` arguments.
        grad_layout: memory layout of the incoming gradient, one of :data:`lsgm_fast.testing.LAYOUTS`.

    Raises:
        AssertionError, BackendUnsupported: as for :func:`check_forward`.
        ValueError: the sample has nothing to differentiate.
    """
    op = find_op(op)
    impl = _runnable(op, backend, sample)
    if not impl.differentiable:
        raise BackendUnsupported(f"{op.name} on {backend} has no gradients: the reference has")
    compare_backward(
        impl.fn,
        op.impl("reference").fn,
        sample,
        k=impl.tolerance if k is None else k,
        label=f"{op.name} on {backend}",
        grad_layout=grad_layout,
    )


def _runnable(op: Op[Any, Any], backend: str, sample: Sample) -> Impl:
    # Asking also loads the compiled library that the implementation lives in.
    why = unsupported(op, backend, sample)
    if why:
        raise BackendUnsupported(f"{op.name} on {backend} cannot run sample {sample.id!r}: {'; '.join(why)}")
    return op.impl(backend)


def compare_forward(
    fn: Callable[..., Any], reference: Callable[..., Any], sample: Sample, *, k: float, label: str
) -> None:
    """:func:`check_forward` for any function that takes the reference's arguments."""
    label = f"{label}, sample {sample.id!r}, forward"
    call = (sample.args, sample.kwargs)
    mutates = sample.mutates
    _compare(lambda c: _run(fn, c, mutates), lambda c: _run(reference, c, mutates), call, k, label, "result")


def distance(op: str | Op[Any, Any], backend: str, sample: Sample) -> float:
    """Largest relative L2 distance of a backend's floating-point results on a sample from the float64 reference's."""
    op = find_op(op)
    impl = _runnable(op, backend, sample)
    call = (sample.args, sample.kwargs)
    got = _run(impl.fn, call, sample.mutates)
    exact = _run(op.impl("reference").fn, pytree.tree_map(_wide, call), sample.mutates)
    pairs = zip(got, exact, strict=True)
    return max(
        (
            norms(g, e).relative_l2
            for g, e in pairs
            if g is not None and e is not None and g.is_floating_point()
        ),
        default=0.0,
    )


def _run(function: Callable[..., Any], call: Any, mutates: Sequence[int]) -> Results:
    """The results of a call, and what it leaves in the arguments that it writes to; the caller's stay as they are."""
    args, kwargs = call
    args = [_own(a) if position in mutates else a for position, a in enumerate(args)]
    with torch.no_grad():
        results = _flat(function(*args, **kwargs))
    return results + [args[position] for position in mutates]


def compare_backward(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    sample: Sample,
    *,
    k: float,
    label: str,
    grad_layout: str = "contiguous",
) -> None:
    """:func:`check_backward` for any function that takes the reference's arguments."""
    if not sample.differentiable:
        raise ValueError(f"sample {sample.id!r} has no differentiable arguments")
    label = f"{label}, sample {sample.id!r}, backward"
    draw = Draw("cpu", 1, sample.id)
    with torch.no_grad():
        outputs = _flat(reference(*sample.args, **sample.kwargs))
    grads = [
        None
        if o is None
        else lay_out(draw.normal(*o.shape, dtype=o.dtype).to(o.device), grad_layout, draw.generator)
        for o in outputs
    ]

    def evaluate(function: Callable[..., Any], call: Any) -> Results:
        args, kwargs, given = call
        return gradients(function, args, kwargs, sample.differentiable, given)

    call = (sample.args, sample.kwargs, grads)
    _compare(lambda c: evaluate(fn, c), lambda c: evaluate(reference, c), call, k, label, "gradient")


def gradients(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    differentiable: Sequence[int],
    grads: Sequence[Tensor | None],
) -> Results:
    """Gradients of the arguments at the positions ``differentiable`` (None arguments left out), as one flat list."""
    args = list(args)
    leaves: list[Tensor] = []
    for position in differentiable:
        # detach() keeps strides and memory, so the kernel sees the sample's own layout.
        flat, spec = pytree.tree_flatten(args[position])
        flat = [v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in flat]
        leaves += [v for v in flat if isinstance(v, Tensor)]
        args[position] = pytree.tree_unflatten(flat, spec)
    with torch.enable_grad():
        outputs = _flat(function(*args, **kwargs))
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.grad_fn
    ]
    if not pairs:
        return [None] * len(leaves)
    found = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [g.to(o.dtype) for o, g in pairs], allow_unused=True
    )
    return list(found)


def _own(tensor: Tensor) -> Tensor:
    """A copy with the same strides, and of the memory between the elements too."""
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _flat(value: Any) -> Results:
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in _flat(part)]
    return [value]


# -- the three evaluations ------------------------------------------------------------------------------------------


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.detach().double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def _compute_epsilon(leaves: Sequence[Any]) -> float:
    """Spacing of the arithmetic: that of float64 where a main tensor (one of the first two) is, else of float32."""
    dtypes = [v.dtype if isinstance(v, Tensor) else v for v in leaves if isinstance(v, (Tensor, torch.dtype))]
    return torch.finfo(torch.float64 if torch.float64 in dtypes[:2] else torch.float32).eps


def _sensitivity(evaluate: Callable[[Any], Results], call: Any, exact: Results, epsilon: float) -> Results:
    """How far one rounding of each input, in random directions, moves each result: a bound of its conditioning."""
    leaves, spec = pytree.tree_flatten(call)
    generator = torch.Generator().manual_seed(0)
    total: Results = [None if e is None else torch.zeros_like(e) for e in exact]
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point:
            signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.device) * 2 - 1
            moved: Tensor | float = leaf * (1 + epsilon * signs)
        elif isinstance(leaf, float):
            moved = leaf * (1 + epsilon)
        else:
            continue
        results = evaluate(pytree.tree_unflatten([*leaves[:index], moved, *leaves[index + 1 :]], spec))
        for sum_, e, r in zip(total, exact, results, strict=True):
            if sum_ is not None and e is not None and r is not None:
                sum_ += (r - e).abs().nan_to_num(0.0, 0.0, 0.0)
    return total


def _compare(
    run: Callable[[Any], Results],
    run_reference: Callable[[Any], Results],
    call: Any,
    k: float,
    label: str,
    noun: str,
) -> None:
    leaves, _ = pytree.tree_flatten(call)
    before = _memory(leaves)
    got = run(call)
    for index, (storage, bytes_) in enumerate(before):
        if not torch.equal(_bytes(storage), bytes_):
            raise AssertionError(f"{label}: the memory of tensor argument {index} was written to")
    plain = run_reference(call)
    wide_call = pytree.tree_map(_wide, call)
    exact = run_reference(wide_call)
    if len(got) != len(plain):
        raise AssertionError(f"{label}: {len(got)} {noun}s, expected {len(plain)}")
    epsilon = _compute_epsilon(leaves)
    sensitivity: Results = [None] * len(exact)
    if max((v.numel() for v in leaves if isinstance(v, Tensor)), default=0) <= _SENSITIVITY_LIMIT:
        sensitivity = _sensitivity(run_reference, wide_call, exact, epsilon)
    for index, (g, p, e, s) in enumerate(zip(got, plain, exact, sensitivity, strict=True)):
        _compare_one(g, p, e, s, k, epsilon, f"{label}: {noun} {index}")


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(leaves: Sequence[Any]) -> list[tuple[torch.UntypedStorage, Tensor]]:
    """The inputs' memory and a copy of it, so that NaN and the gaps between elements are compared as well."""
    storages = [v.untyped_storage() for v in leaves if isinstance(v, Tensor) and v.device.type != "meta"]
    return [(storage, _bytes(storage).clone()) for storage in storages]


# -- one result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norms:
    """Distance of a result from the exact one."""

    largest: float
    relative_l2: float
    cosine: float

    def __str__(self) -> str:
        return (
            f"largest error {self.largest:.3g}, relative L2 {self.relative_l2:.3g}, cosine {self.cosine:.9g}"
        )


def norms(value: Tensor, exact: Tensor) -> Norms:
    """Largest error, relative L2 norm of the error and cosine, in float64 (0, 0 and 1 where both are zero or empty)."""
    v, e = value.double().flatten(), exact.double().flatten()
    # The squares of very small and very large values leave the range of float64.
    scale = max(v.abs().max().item(), e.abs().max().item()) if e.numel() else 0.0
    if scale > 0.0 and math.isfinite(scale):
        v, e = v / scale, e / scale
    else:
        scale = 1.0
    difference = v - e
    length = e.norm().item()
    error = difference.norm().item()
    product = v.norm().item() * length
    return Norms(
        difference.abs().max().item() * scale if e.numel() else 0.0,
        error / length if length else (0.0 if error == 0.0 else math.inf),
        (v @ e).item() / product if product else (1.0 if error == 0.0 else 0.0),
    )


def _compare_one(
    got: Tensor | None,
    plain: Tensor | None,
    exact: Tensor | None,
    sensitivity: Tensor | None,
    k: float,
    epsilon: float,
    label: str,
) -> None:
    if plain is None or exact is None:
        if got is not None and bool(torch.any(got != 0)):
            raise AssertionError(f"{label}: expected none, got a tensor {_describe(got)}")
        return
    if got is None:
        if plain.numel() and bool(torch.any(plain != 0)):
            raise AssertionError(f"{label}: got none, expected a tensor {_describe(plain)}")
        return
    if not isinstance(got, Tensor) or (got.shape, got.dtype, got.device) != (
        plain.shape,
        plain.dtype,
        plain.device,
    ):
        raise AssertionError(f"{label}: got {_describe(got)}, expected {_describe(plain)}")
    if not got.numel():
        return
    if not got.dtype.is_floating_point:
        if not torch.equal(got, plain):
            where = _position(int((got != plain).flatten().nonzero()[0]), got.shape)
            raise AssertionError(f"{label}: got {got[where]}, expected {plain[where]} at {where}")
        return

    value, like, true = got.detach().double(), plain.detach().double(), exact.detach().double()
    # A value that overflows the dtype is as right as plain PyTorch's infinity; NaN must be where the reference has it.
    usable = torch.isfinite(true) & torch.isfinite(like)
    wrong = ~usable & ~((value == like) | (value.isnan() & like.isnan()))
    if bool(wrong.any()):
        raise AssertionError(_report(label, wrong, value, true, like, "non-finite values differ"))
    value, like, true = (torch.where(usable, v, 0.0) for v in (value, like, true))

    finfo = torch.finfo(got.dtype)
    smallest = finfo.smallest_normal if got.dtype.itemsize > 2 else finfo.smallest_normal * finfo.eps
    floor = true.abs() * (finfo.eps + _ROUNDINGS * epsilon) + smallest
    floor += _EXACT_ERROR * true.abs().max().clamp(min=1.0)
    if sensitivity is not None:
        floor += _ROUNDINGS * torch.where(usable, sensitivity, 0.0).max()
    plain_errors = (like - true).abs()
    allowed = k * plain_errors.max() + floor
    errors = (value - true).abs()
    wrong = ~(errors <= allowed)  # a NaN is wrong too
    ours, theirs = norms(value, true), norms(like, true)
    summary = f"{ours} (plain PyTorch: {theirs}; k = {k:g})"
    if bool(wrong.any()):
        excess = torch.where(wrong, (errors / allowed).nan_to_num(math.inf, math.inf), 0.0)
        raise AssertionError(_report(label, wrong, value, true, like, summary, excess, allowed))
    length, excused = true.norm().item(), floor.norm().item()
    if length <= excused or true.numel() < _FEWEST_FOR_NORMS:
        return  # zero, as far as anybody can tell; or so few that checking each says it all
    # Of many errors plain PyTorch's norm is a fair measure, and the floor no longer excuses a small systematic one. In
    # float64 plain PyTorch is the reference itself: another order of the same roundings is no error.
    relative_floor = excused / length / math.sqrt(true.numel())
    relative_floor += _ROUNDINGS * torch.finfo(torch.float64).eps
    if ours.relative_l2 > k * theirs.relative_l2 + relative_floor:
        raise AssertionError(f"{label}: relative L2 too large, {summary}, floor {relative_floor:.3g}")
    if 1 - ours.cosine > k**2 * abs(1 - theirs.cosine) + relative_floor**2 + 1e-12:
        raise AssertionError(f"{label}: wrong direction, {summary}")


def _report(
    label: str,
    wrong: Tensor,
    value: Tensor,
    true: Tensor,
    like: Tensor,
    summary: str,
    excess: Tensor | None = None,
    allowed: Tensor | None = None,
) -> str:
    flat = int((excess if excess is not None else wrong.to(torch.uint8)).flatten().argmax())
    first = int(wrong.flatten().to(torch.uint8).argmax())
    worst = _position(flat, wrong.shape)
    text = (
        f"{label} is wrong at {worst}: got {value[worst].item():.9g}, expected {true[worst].item():.9g} "
        f"(plain PyTorch: {like[worst].item():.9g})"
    )
    if allowed is not None:
        text += f", allowed error {allowed[worst].item():.3g}"
    return (
        f"{text}; {int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at "
        f"{_position(first, wrong.shape)}; {summary}"
    )


def _position(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    position = []
    for size in reversed(shape):
        position.append(flat % size)
        flat //= size
    return tuple(reversed(position))


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"


# -- unwritten memory -----------------------------------------------------------------------------------------------


@contextmanager
def poison_uninitialized() -> Iterator[None]:
    """Inside the block ``torch.empty`` and its like return NaN (integers: the largest), so unwritten results show.

    Uses PyTorch's deterministic mode with ``fill_uninitialized_memory``, which also reaches memory that compiled
    libraries ask PyTorch for. The switches are of the whole process; the previous ones are restored.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    module: Any = torch.utils.deterministic  # its settings are properties that type checkers do not see
    fill = module.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    module.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        module.fill_uninitialized_memory = fill
