"""The times at which a solver with a fixed number of steps evaluates the network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsgm_fast.errors import unknown_name
from lsgm_fast.sde import SDE

NATURAL_POWER, COARSE_POWER, COARSE_STEPS = 1.5, 2.0, 8


def _between(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """The ``steps - 1`` values between two, equally spaced."""
    return torch.lerp(first, last, torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)[1:-1])


def _ends(function: Callable[[Tensor], Tensor], t_start: float, t_end: float) -> tuple[Tensor, Tensor]:
    first, last = function(torch.tensor([t_start, t_end], dtype=torch.float64))
    return first, last


def _uniform(sde: SDE, steps: int, t_start: float, t_end: float) -> Tensor:
    return _between(*_ends(lambda t: t, t_start, t_end), steps)


def _quadratic(sde: SDE, steps: int, t_start: float, t_end: float) -> Tensor:
    return _between(*_ends(torch.sqrt, t_start, t_end), steps).square()


def log_snr(sde: SDE, t: Tensor) -> Tensor:
    """Half the logarithm of the signal-to-noise ratio, ``lambda = ln(m / sqrt(var))``; falls with t."""
    return -0.5 * math.log(1.0 - sde.sigma2_0) - torch.log(torch.sinh(sde.u(t)))


def time_of_log_snr(sde: SDE, value: Tensor) -> Tensor:
    """Inverse of :func:`log_snr`."""
    return sde.t_of_u(torch.asinh(torch.exp(-value) / math.sqrt(1.0 - sde.sigma2_0)))


def _log_snr_grid(sde: SDE, steps: int, t_start: float, t_end: float) -> Tensor:
    return time_of_log_snr(sde, _between(*_ends(lambda t: log_snr(sde, t), t_start, t_end), steps))


def _natural(sde: SDE, steps: int, t_start: float, t_end: float, power: float | None = None) -> Tensor:
    if power is None:
        power = COARSE_POWER if steps < COARSE_STEPS else NATURAL_POWER
    ends = _ends(lambda t: sde.u(t).pow(1.0 / power), t_start, t_end)
    return sde.t_of_u(_between(*ends, steps).pow(power))


_GRIDS: dict[str, Callable[[SDE, int, float, float], Tensor]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "log_snr": _log_snr_grid,
    "natural": _natural,
}
GRIDS = tuple(_GRIDS)
"""Names that :func:`time_grid` accepts."""


def time_grid(grid: str, sde: SDE, steps: int, t_start: float, t_end: float) -> list[float]:
    """Times of ``steps`` steps from ``t_start`` to ``t_end``, ``steps + 1`` in number.

    Args:
        grid: ``"uniform"``: equal in t. ``"quadratic"``: equal in sqrt(t) (Song, Meng & Ermon 2021).
            ``"log_snr"``: equal in ``ln(m / sqrt(var))`` (Lu et al. 2022). ``"natural"``: equal in a root of
            the SDE's natural time u, see :func:`natural_grid`.

    Raises:
        ValueError: unknown grid, steps below 1, times outside [0, 1] or equal, or ``"log_snr"`` where the noise or
            the signal vanishes at an end.
    """
    if grid not in _GRIDS:
        raise unknown_name("grid", grid, GRIDS)
    _check(steps, t_start, t_end)
    times = [t_start, *_GRIDS[grid](sde, steps, t_start, t_end).tolist(), t_end]
    if not all(map(math.isfinite, times)):
        raise ValueError(
            f"grid {grid!r} does not exist from t = {t_start} to {t_end}: at one of them it is infinite; "
            "choose another end time or grid"
        )
    return times


def natural_grid(
    sde: SDE, steps: int, t_start: float, t_end: float, power: float | None = None
) -> list[float]:
    """Times of ``steps`` steps from ``t_start`` to ``t_end``, equal in ``u^(1/power)`` of the natural time u.

    ``power = 1`` is the uniform grid in u; larger ones have shorter steps towards small u, where the network resolves
    details. None: 2 for fewer than 8 steps, else 1.5 (``docs/solvers.md``).

    Raises:
        ValueError: steps is not at least 1, a time is outside [0, 1], or power is not positive.
    """
    _check(steps, t_start, t_end)
    if power is not None and not power > 0:
        raise ValueError(f"power must be positive, got {power}")
    return [t_start, *_natural(sde, steps, t_start, t_end, power).tolist(), t_end]


def _check(steps: int, t_start: float, t_end: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for name, t in (("t_start", t_start), ("t_end", t_end)):
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {t}")
    if t_start == t_end:
        raise ValueError(f"t_start and t_end are both {t_start}: there is nothing to divide into steps")
