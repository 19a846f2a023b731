"""Seeing that a module is no longer the one that something was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class Watch:
    """Remembers parameters and buffers, and tells whether they are still the same.

    Seen is everything: another tensor or module in the place of one, an in-place change, also one through ``.data``,
    which autograd does not see (for that, all of them are read once; many gigabytes a second).

    Args:
        modules: returns the modules to watch, each without its submodules; asked every time.
    """

    def __init__(self, modules: Callable[[], Iterable[nn.Module]]) -> None:
        self._modules = modules
        self._seen = self._now()

    def unchanged(self) -> bool:
        """Whether nothing has changed since the object was made."""
        return self._now() == self._seen

    def _now(self) -> tuple[list[tuple[int, ...]], list[int]]:
        modules = list(self._modules())
        tensors = [
            t
            for module in modules
            for part in (module._parameters, module._buffers)
            for t in part.values()
            if t is not None
        ]
        # A tensor's address and version say most of it, and nothing of what happened through .data.
        facts = [(id(module),) for module in modules]
        facts += [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        sums = [_checksum(t) for t in tensors]
        if not sums:
            return facts, []
        return facts, torch.stack([s.to(sums[0].device) for s in sums]).tolist()


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of the bits, in words as wide as fit: 0-d int64, on the tensor's device."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    flat = tensor.contiguous().view(-1)
    word = next(dtype for size, dtype in _WORDS if flat.nbytes % size == 0)
    return flat.view(word).sum(dtype=torch.int64)
