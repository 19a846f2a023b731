"""Where NaN or infinity first appears in a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return (
        [t for t in vars(value).values() if isinstance(t, torch.Tensor)] if hasattr(value, "__dict__") else []
    )


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value))


def first_nonfinite_module(root: nn.Module, call: Callable[[], object]) -> str:
    """Run ``call`` and describe the first module below ``root`` whose output is not finite.

    Weights that are not finite are named before outputs, since they are the cause. Empty where all is finite.
    """
    for name, parameter in root.named_parameters():
        if not _finite(parameter.detach()):
            return f"the parameter {name}"
    found: list[str] = []

    def watch(name: str, kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                source = "" if _finite(inputs) else ", whose input is not finite either"
                found.append(f"{name} ({kind}){source}")

        return hook

    handles = [
        module.register_forward_hook(watch(name, type(module).__name__))
        for name, module in root.named_modules()
        if name
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return f"the output of {found[0]}" if found else ""
