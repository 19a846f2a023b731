"""Registers an operation's fused kernels: one ``torch.library`` operator per backend, and its :class:`Impl`.

Called once per operation, from ``ops/<op>.py``, which is the one place for schema, tags, fakes, autograd and limits.
The kernels themselves are found by the operation's name: C++ registers ``<op>_cpu`` / ``<op>_cuda`` when its library is
loaded, Triton functions ``forward`` / ``backward`` are taken from ``lsgm_fast.kernels.<op>`` at the first call. In a
family, several operations in one file, they carry the rest of the name: ``stage_forward`` in ``kernels/rk.py`` is that
of ``rk_stage``.

Autocast: no rule is registered, so an operator sees its inputs as they are and its result's dtype follows the
reference's rule, with or without autocast.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from lsgm_fast import native
from lsgm_fast._constant import assume_constant_result
from lsgm_fast.dispatch import Impl, Op

NAMESPACE = "lsgm_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Backward:
    """The backward operator of a fused kernel.

    ``schema`` and ``fake`` as for the forward; ``save(ctx, inputs, output)`` keeps what it needs;
    ``gradients(ctx, call, *grads)`` returns one gradient (or None) per forward input, ``call`` being the operator.
    """

    schema: str
    fake: Callable[..., Any]
    save: Callable[..., None]
    gradients: Callable[..., Sequence[torch.Tensor | None]]


def register(
    op: Op[Any, Any],
    *,
    schema: str,
    fake: Callable[..., Any],
    prepare: Callable[..., tuple[Any, ...]],
    reasons: Callable[..., list[str]],
    priorities: dict[str, int],
    backward: Backward | None = None,
    auto_reasons: dict[str, Callable[..., list[str]]] | None = None,
    finish: Callable[[Any], Any] | None = None,
    tolerance: float = 4.0,
) -> None:
    """Register the fused implementations of ``op``.

    Args:
        schema: arguments and results, ``"(Tensor a, ...) -> Tensor"``. fake: shapes, dtypes and strides of the results.
        prepare: the operation's arguments -> the operator's (memory formats, dtypes of scalars).
        reasons: why no fused kernel can run these arguments, apart from availability, which is added here.
        priorities: backend -> priority under ``auto``. auto_reasons: backend -> why ``auto`` would rather not.
        backward: None for an operation without gradients: where one is wanted, the reference runs.
        finish: the operator's results -> the operation's, where a schema cannot say them (an optional tensor).
        tolerance: see :class:`~lsgm_fast.dispatch.Impl`.
    """
    for backend, priority in priorities.items():
        name = f"{op.name}_{backend}"
        prefix = op.name.removeprefix(op.stem).removeprefix("_")
        prefix += "_" if prefix else ""
        _define(name, schema, fake, op.stem, f"{prefix}forward", backend)
        if backward is not None:
            _define(f"{name}_backward", backward.schema, backward.fake, op.stem, f"{prefix}backward", backend)
            _differentiate(name, backward)
        call = getattr(getattr(torch.ops, NAMESPACE), name).default
        op.register(
            Impl(
                backend,
                _bind(call, prepare, finish),
                reasons=_with_availability(op, backend, reasons, backward is not None),
                auto_reasons=(auto_reasons or {}).get(backend, lambda *args, **kwargs: []),
                priority=priority,
                self_tested=True,
                differentiable=backward is not None,
                tolerance=tolerance,
            )
        )


_composed: dict[tuple[str, str], Callable[[], str | None]] = {}


def register_composed(
    op: Op[Any, Any],
    backend: str,
    fn: Callable[..., Any],
    *,
    available: Callable[[], str | None],
    reasons: Callable[..., list[str]],
    priority: int,
    auto_reasons: Callable[..., list[str]] = lambda *args, **kwargs: [],
    tolerance: float = 4.0,
    differentiable: bool = False,
) -> None:
    """Register an implementation that is made of a library's calls: no operator of its own.

    ``available``: why it cannot run here at all, or None. ``differentiable``: autograd goes through it. The rest as in
    :func:`register`.
    """
    _composed[op.name, backend] = available
    op.register(
        Impl(
            backend,
            fn,
            reasons=_with_availability(op, backend, reasons, differentiable),
            auto_reasons=auto_reasons,
            priority=priority,
            self_tested=True,
            differentiable=differentiable,
            tolerance=tolerance,
        )
    )


def triton_part(stem: str, part: str, *, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of its own for one step of a composed implementation: ``<part>_forward`` of ``kernels/<stem>.py``.

    ``schema`` and ``fake`` as in :func:`register`. It has no autograd, and nothing checks its inputs but the function.
    """
    name = f"{stem}_{part}_triton"
    _define(name, schema, fake, stem, f"{part}_forward", "triton")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _bind(
    call: Callable[..., Any], prepare: Callable[..., tuple[Any, ...]], finish: Callable[[Any], Any] | None
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        results = call(*prepare(*args, **kwargs))
        return results if finish is None else finish(results)

    return run


def _define(name: str, schema: str, fake: Callable[..., Any], stem: str, function: str, backend: str) -> None:
    # Without the tag, Inductor may hand a channels_last kernel contiguous inputs.
    _library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if backend == "triton":

        def launch(*args: Any) -> Any:
            return getattr(importlib.import_module(f"lsgm_fast.kernels.{stem}"), function)(*args)

        # On CPU tensors only Triton's interpreter can run it; availability is checked before.
        for key in ("CUDA", "CPU"):
            _library.impl(name, launch, key)


def _differentiate(name: str, backward: Backward) -> None:
    call = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default

    def gradients(ctx: Any, *grads: torch.Tensor) -> Any:
        return backward.gradients(ctx, call, *grads)

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", gradients, setup_context=backward.save, lib=_library
    )

    def refuse(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            f"double backward through {NAMESPACE}::{name} is not implemented: "
            "compute under lsgm_fast.use_backend('reference')"
        )

    # Without a formula autograd would warn and go on with missing gradients.
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", refuse, lib=_library)


@assume_constant_result
def _transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or a dual level is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _needs_gradient(values: Iterable[Any]) -> bool:
    return any(
        v.requires_grad
        if isinstance(v, torch.Tensor)
        else isinstance(v, (list, tuple)) and _needs_gradient(v)
        for v in values
    )


def _with_availability(
    op: Op[Any, Any], backend: str, reasons: Callable[..., list[str]], differentiable: bool
) -> Callable[..., list[str]]:
    def check(*args: Any, **kwargs: Any) -> list[str]:
        if _transformed():
            return ["inside a torch.func transform or forward-mode differentiation: it has no rule for them"]
        why = unavailable(backend, op.device(args, kwargs).type, op.name)
        if why is not None:
            return [why]
        if not differentiable and torch.is_grad_enabled() and _needs_gradient((*args, *kwargs.values())):
            return [
                "a gradient is wanted, and it has no backward pass: use torch.no_grad() where none is needed"
            ]
        return reasons(*args, **kwargs)

    return check


@assume_constant_result
def unavailable(backend: str, device_type: str, op: str | None = None) -> str | None:
    """Why ``backend`` cannot run anything (given ``op``: this operation) on such a device here, or None."""
    composed = None if op is None else _composed.get((op, backend))
    if composed is not None:
        return _elsewhere(backend, device_type) or composed()
    why = _unavailable(backend, device_type)
    if why is None and op is not None and backend in ("cpu", "cuda"):
        return _not_in_library(op, backend)
    return why


@functools.cache
def _not_in_library(op: str, backend: str) -> str | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}_{backend}", backend.upper()):
        return None
    return f"the {backend} library was compiled without {op}: reinstall lsgm-fast from this source tree"


def _elsewhere(backend: str, device_type: str) -> str | None:
    """Why the backend is not at home on such a device, or None."""
    # On the meta device there are shapes only: the answer is that for the backend's own device.
    if device_type == "meta" or device_type == ("cpu" if backend == "cpu" else "cuda"):
        return None
    if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"runs on {'CPU' if backend == 'cpu' else 'CUDA'} tensors, these are on {device_type}"


@functools.cache
def _unavailable(backend: str, device_type: str) -> str | None:
    elsewhere = _elsewhere(backend, device_type)
    if elsewhere is not None:
        return elsewhere
    if backend == "cpu":
        return native.cpu().reason
    if backend == "cuda":
        return native.cuda().reason
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None
