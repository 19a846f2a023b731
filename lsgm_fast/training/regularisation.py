"""Spectral and normalisation regularisation (NVAE, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lsgm_fast import random

FIRST_ITERATIONS = 40
ITERATIONS = 4


class SpectralRegulariser:
    """``sum_i sigma_max(W_i) + sum_j max |gamma_j|``, differentiable; sigma_max by power iteration.

    Weights are matrices (out, rest); those of one shape are iterated together. The singular vectors stay from call to
    call (40 iterations on the first, 4 later) and are part of :meth:`state_dict`.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._vectors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, weights: Sequence[torch.Tensor], gammas: Sequence[torch.Tensor]) -> torch.Tensor:
        """Args:
            weights: convolution weights (out, in, K, K). gammas: scales of normalisation layers (C,).

        Returns:
            0-d, without lambda.
        """
        shapes: dict[tuple[int, int], list[torch.Tensor]] = {}
        for weight in weights:
            matrix = weight.flatten(1).float()
            shapes.setdefault((matrix.shape[0], matrix.shape[1]), []).append(matrix)
        device = (weights or gammas)[0].device
        total = torch.zeros((), device=device)
        for shape, matrices in shapes.items():
            stack = torch.stack(matrices)
            with torch.no_grad():
                u, v = self._iterate(shape, stack.detach())
            total = total + torch.einsum("no,noi,ni->", u, stack, v)
        largest: dict[int, list[torch.Tensor]] = {}
        for gamma in gammas:
            largest.setdefault(gamma.shape[0], []).append(gamma)
        for same in largest.values():
            total = total + torch.stack(same).float().abs().amax(dim=1).sum()
        return total

    def _iterate(self, shape: tuple[int, int], stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, n = f"{shape[0]}x{shape[1]}", stack.shape[0]
        u, v = self._vectors.get(key, (None, None))
        iterations = ITERATIONS
        if u is None or v is None or u.shape[0] != n:
            iterations = FIRST_ITERATIONS
            u, v = (
                F.normalize(
                    random.normal(self.seed, range(n), f"spectral.{key}", (size,), substream=i), dim=1
                )
                for i, size in enumerate(shape)
            )
        u, v = u.to(stack), v.to(stack)
        for _ in range(iterations):
            v = F.normalize(torch.einsum("no,noi->ni", u, stack), dim=1)
            u = F.normalize(torch.einsum("noi,ni->no", stack, v), dim=1)
        self._vectors[key] = (u, v)
        return u, v

    def state_dict(self) -> dict[str, Any]:
        """The singular vectors, by shape of the matrices."""
        return {key: {"u": u, "v": v} for key, (u, v) in self._vectors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._vectors = {key: (pair["u"], pair["v"]) for key, pair in state.items()}
