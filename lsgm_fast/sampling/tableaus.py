"""Butcher tableaus of explicit Runge-Kutta methods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method, with or without an embedded one.

    Stage i is evaluated at ``t + c_i h`` and ``y + h sum_j a_ij k_j``; the step ends at ``y + h sum b_i k_i``, whose
    error is estimated by ``h sum e_i k_i`` (solution minus embedded solution). Rows may be shorter than the number of
    stages: what is left out is 0.

    Attributes:
        e: weights of the error estimate; empty for a method without one, which serves fixed grids only.
        e_low: weights of a second, lower estimate, or empty. With both, the norm that decides about a step is
            ``n^2 / sqrt(n^2 + (n_low / 10)^2)`` of their norms n and n_low (Hairer, Norsett & Wanner, section II.10).
        error_order: order of the embedded solution's error estimate; step sizes follow
            ``error^(-1 / (error_order + 1))``. 0 without an estimate.
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
    e_low: tuple[float, ...] = ()

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

# Dormand and Prince's 8(5, 3) with the coefficients of Hairer, Norsett & Wanner, Solving ODEs I, section II.10 and
# their program DOP853, rounded to float64 as in SciPy (scipy.integrate.DOP853, BSD licence).
_B8 = (
    0.054293734116568765,
    0.0,
    0.0,
    0.0,
    0.0,
    4.450312892752409,
    1.8915178993145003,
    -5.801203960010585,
    0.3111643669578199,
    -0.1521609496625161,
    0.20136540080403034,
    0.04471061572777259,
)
DOP853 = Tableau(
    name="DOP853",
    c=(
        0.0,
        0.05260015195876773,
        0.0789002279381516,
        0.1183503419072274,
        0.2816496580927726,
        0.3333333333333333,
        0.25,
        0.3076923076923077,
        0.6512820512820513,
        0.6,
        0.8571428571428571,
        1.0,
        1.0,
    ),
    a=(
        (),
        (0.05260015195876773,),
        (0.0197250569845379, 0.0591751709536137),
        (0.02958758547680685, 0.0, 0.08876275643042054),
        (0.2413651341592667, 0.0, -0.8845494793282861, 0.924834003261792),
        (0.037037037037037035, 0.0, 0.0, 0.17082860872947386, 0.12546768756682242),
        (0.037109375, 0.0, 0.0, 0.17025221101954405, 0.06021653898045596, -0.017578125),
        (
            0.03709200011850479,
            0.0,
            0.0,
            0.17038392571223998,
            0.10726203044637328,
            -0.015319437748624402,
            0.008273789163814023,
        ),
        (
            0.6241109587160757,
            0.0,
            0.0,
            -3.3608926294469414,
            -0.868219346841726,
            27.59209969944671,
            20.154067550477894,
            -43.48988418106996,
        ),
        (
            0.47766253643826434,
            0.0,
            0.0,
            -2.4881146199716677,
            -0.590290826836843,
            21.230051448181193,
            15.279233632882423,
            -33.28821096898486,
            -0.020331201708508627,
        ),
        (
            -0.9371424300859873,
            0.0,
            0.0,
            5.186372428844064,
            1.0914373489967295,
            -8.149787010746927,
            -18.52006565999696,
            22.739487099350505,
            2.4936055526796523,
            -3.0467644718982196,
        ),
        (
            2.273310147516538,
            0.0,
            0.0,
            -10.53449546673725,
            -2.0008720582248625,
            -17.9589318631188,
            27.94888452941996,
            -2.8589982771350235,
            -8.87285693353063,
            12.360567175794303,
            0.6433927460157636,
        ),
        _B8,
    ),
    b=_B8,
    e=(
        0.01312004499419488,
        0.0,
        0.0,
        0.0,
        0.0,
        -1.2251564463762044,
        -0.4957589496572502,
        1.6643771824549864,
        -0.35032884874997366,
        0.3341791187130175,
        0.08192320648511571,
        -0.022355307863886294,
    ),
    error_order=7,
    reuses_last=True,
    # The solution less the embedded one of order 3, which has three stages.
    e_low=(
        _B8[0] - 0.2440944881889764,
        *_B8[1:8],
        _B8[8] - 0.7338466882816118,
        *_B8[9:11],
        _B8[11] - 0.022058823529411766,
    ),
)

# Euler's method: order 1.
EULER = Tableau(name="Euler", c=(0.0,), a=((),), b=(1.0,), e=(), error_order=0, reuses_last=False)

# Kutta's classical method of order 4 (Z. Math. Phys. 46, 1901).
RK4 = Tableau(
    name="RK4",
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    e=(),
    error_order=0,
    reuses_last=False,
)
