"""Butcher tableaus of explicit embedded Runge-Kutta methods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta pair.

    Stage i is evaluated at ``t + c_i h`` and ``y + h sum_j a_ij k_j``; the step ends at ``y + h sum b_i k_i``, whose
    error is estimated by ``h sum e_i k_i`` (solution minus embedded solution). Rows may be shorter than the number of
    stages: what is left out is 0.

    Attributes:
        error_order: order of the embedded solution's error estimate; step sizes follow
            ``error^(-1 / (error_order + 1))``.
        reuses_last: the last stage is evaluated at the solution, and is the first of the next step ("first same as
            last"): then ``a[-1]`` equals ``b``.
    """

    name: str
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...]
    error_order: int
    reuses_last: bool

    @property
    def stages(self) -> int:
        """Number of stages, the reused one included."""
        return len(self.a)


_B45 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_B23 = (2 / 9, 1 / 3, 4 / 9)

# Dormand and Prince, "A family of embedded Runge-Kutta formulae", J. Comput. Appl. Math. 6 (1980): 5(4).
RK45 = Tableau(
    name="RK45",
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _B45,
    ),
    b=_B45,
    e=(-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40),
    error_order=4,
    reuses_last=True,
)

# Bogacki and Shampine, "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2 (1989).
RK23 = Tableau(
    name="RK23",
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), _B23),
    b=_B23,
    e=(5 / 72, -1 / 12, -1 / 9, 1 / 8),
    error_order=2,
    reuses_last=True,
)

# Heun's method with Euler's as the embedded one: 2(1).
HEUN = Tableau(
    name="Heun",
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(1 / 2, 1 / 2),
    e=(-1 / 2, 1 / 2),
    error_order=1,
    reuses_last=False,
)
