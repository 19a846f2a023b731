"""What the registrations of fused kernels share: limits and the form in which tensors are handed over."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Element types of the fused kernels."""


def unsupported_dtypes(**tensors: torch.Tensor) -> list[str]:
    """A reason where one of the tensors has a dtype outside of :data:`DTYPES`."""
    if all(t.dtype in DTYPES for t in tensors.values()):
        return []
    found = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
    return [f"dtypes {found}: float32, float64, bfloat16 and float16 are supported"]


def other_device(device: torch.device, **tensors: torch.Tensor | float | None) -> list[str]:
    """A reason for each of the tensors that is not on ``device``; numbers and None are anywhere."""
    return [
        f"{name} is on {t.device}, expected {device}"
        for name, t in tensors.items()
        if isinstance(t, torch.Tensor) and t.device != device
    ]


def time_gradient(**scalars: torch.Tensor | float | None) -> list[str]:
    """A reason for each coefficient that wants a gradient: they are functions of time, not learned."""
    if not torch.is_grad_enabled():
        return []
    return [
        f"{name} requires a gradient: it is a function of time, not learned"
        for name, value in scalars.items()
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]


def dense_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last where x is exactly that, else contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def scalar(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A coefficient as a contiguous float32 or float64 tensor on ``device``: a number becomes a 0-d float64 one."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=torch.float64, device=device)
    if value.device != device or value.dtype not in (torch.float32, torch.float64):
        value = value.to(device, value.dtype if value.dtype == torch.float64 else torch.float32)
    return value.contiguous()


def logit(mixing_logit: torch.Tensor) -> torch.Tensor:
    """The mixing logit, contiguous and in float32 or float64."""
    if mixing_logit.dtype not in (torch.float32, torch.float64):
        mixing_logit = mixing_logit.float()
    return mixing_logit.contiguous()
