"""The four forward diffusions of LSGM in one form (paper, section 2 and Appendix B).

All of them have Gaussian transition kernels with time t in [0, 1]:

    dz = f(t) z dt + g(t) dw                 z_t = m(t) z_0 + sqrt(var(t)) eps,   var(0) = sigma2_0 =: s0

The score network predicts eps (score = -eps / sqrt(var)), mixed per channel with the optimal prediction for
standard-normal data: (1 - a) r(t) z + a eps_theta, where

    S^2 = (1 - s0) m^2 + var,    r = sqrt(var) / S^2.

The probability-flow ODE of that mixed prediction is, for every SDE,

    dz/dt = p z + a q (eps_theta - r z),    p = f + g^2 / (2 S^2),    q = g^2 / (2 sqrt(var)),

and u = asinh(sqrt(var) / (m sqrt(1 - s0))), so that tanh(u) = sqrt(var) / S and
du/dt = g^2 / (2 sqrt(var) S), is its natural time.

``parity="exact"`` evaluates everything without cancellation, so that float32 results are good to a few units
in the last place of float32 down to t = 0. ``parity="published"`` evaluates the published formulas as they
stand, in float32 throughout (the published VPSDE variance is 19% too large at t = 1e-6), for bit-faithful
comparisons.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lsgm_fast.config import SDEConfig
from lsgm_fast.errors import unknown_name


class SDE(ABC):
    """A forward diffusion; build one with :func:`build_sde`.

    Every function of time takes a float32 or float64 tensor of any shape (0-d and ``(B,)`` are the usual
    ones) with entries in [0, 1], or a Python float (treated as a float64 0-d tensor), and returns a tensor of
    the same shape, dtype and device. Times outside [0, 1] are not checked. With ``parity="published"`` the
    value is computed in float32 whatever the dtype of ``t``.

    Raises:
        TypeError: from every function of time, for a tensor that is neither float32 nor float64.
    """

    def __init__(self, config: SDEConfig) -> None:
        self.config = config
        self.name = config.name
        self.parity = config.parity
        self.sigma2_0 = config.sigma2_0
        self.time_eps = config.time_eps
        self._published = config.parity == "published"

    @property
    def prior_std(self) -> float:
        """Standard deviation of the distribution that z_1 is drawn from: 1; sqrt(sigma2_max) for VE."""
        return 1.0

    def with_parity(self, parity: str) -> SDE:
        """The same SDE evaluated with ``"exact"`` or ``"published"`` formulas."""
        return self if parity == self.parity else build_sde(self.config.replace(parity=parity))

    def f(self, t: Tensor | float) -> Tensor:
        """Drift coefficient f(t): -beta/2 for VP and sub-VP, -g^2/2 for geometric, 0 for VE."""
        return self._evaluate(self._f, t)

    def g2(self, t: Tensor | float) -> Tensor:
        """Squared diffusion coefficient g(t)^2."""
        return self._evaluate(self._g2, t)

    def var(self, t: Tensor | float) -> Tensor:
        """Variance of z_t given z_0; ``var(0) = sigma2_0``."""
        return self._evaluate(self._var, t)

    def one_minus_var(self, t: Tensor | float) -> Tensor:
        """1 - var(t), without cancellation where var is close to 1 (negative for a VESDE beyond var = 1)."""
        return self._evaluate(self._one_minus_var, t)

    def mean_coef(self, t: Tensor | float) -> Tensor:
        """m(t) = exp(integral of f from 0 to t): the mean of z_t is m(t) z_0."""
        return self._evaluate(self._mean_coef, t)

    def inv_var(self, v: Tensor | float) -> Tensor:
        """The time t at which ``var(t) = v``; ``v`` in [var(0), var(1)].

        The sub-VPSDE's variance with sigma2_0 > 0 first dips by at most sigma2_0^2 / 4; there the later of
        the two times is returned.
        """
        return self._evaluate(self._inv_var, v)

    def s2(self, t: Tensor | float) -> Tensor:
        """S^2 = (1 - sigma2_0) m^2 + var: the variance of z_t for data of variance 1 - sigma2_0.

        1 for VP and geometric, (1 - E)^2 + E for sub-VP with E = exp(-integral of beta),
        sigma2_min (r^t - 1) + 1 for VE with r = sigma2_max / sigma2_min.
        """
        return self._evaluate(self._s2, t)

    def u(self, t: Tensor | float) -> Tensor:
        """Natural time u = asinh(sqrt(var) / (m sqrt(1 - sigma2_0))), increasing; tanh(u) = sqrt(var)/S."""
        return self._evaluate(self._u, t)

    def t_of_u(self, u: Tensor | float) -> Tensor:
        """Inverse of :meth:`u`, in closed form, for ``u`` in [u(0), u(1)].

        With y = sinh(u)^2 and B(t) the integral of beta: VP e^B = (1 - s0)(1 + y); sub-VP 4 sinh(B/2)^2 =
        (1 - s0) y - s0; geometric var = tanh(u)^2; VE var = (1 - s0) y. Not part of the published code, so
        ``parity="published"`` merely evaluates it in float32.
        """
        return self._evaluate(self._t_of_u, u)

    def mixed_r(self, t: Tensor | float) -> Tensor:
        """r(t) = sqrt(var)/S^2: the published mixing component is r(t) z."""
        return self._evaluate(self._mixed_r, t)

    def drift_coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """(p, q, r) of the probability-flow ODE dz/dt = p z + a q (eps_theta - r z).

        Each has t's shape and dtype. ``p`` is exactly 0 for VP and geometric. ``q`` is infinite at t = 0 for
        the VPSDE with sigma2_0 = 0 (it grows as t^(-1/2)).
        """
        return (
            self._evaluate(self._p, t),
            self._evaluate(self._q, t),
            self._evaluate(self._mixed_r, t),
        )

    def cross_entropy_const(self, eps_time: Tensor | float) -> Tensor:
        """1/2 (1 + ln(2 pi var(eps_time))), nats per element: the constant of the cross entropy bound.

        ``eps_time`` is where the time integral starts; the value is -inf where the variance is 0 there.
        Shape and dtype of ``eps_time``, or a float64 0-d CPU tensor for a Python float (paper, Appendix A).
        """
        return self._evaluate(lambda t: 0.5 * (1.0 + torch.log(2.0 * math.pi * self._var(t))), eps_time)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"

    def _evaluate(self, formula: Callable[[Tensor], Tensor], t: Tensor | float) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.tensor(float(t), dtype=torch.float64)
        elif t.dtype != torch.float32 and t.dtype != torch.float64:
            raise TypeError(
                f"an SDE takes a float32 or float64 tensor, got {t.dtype}: convert it with .float()"
            )
        if self._published:
            return formula(t.float()).to(t.dtype)
        return formula(t)

    @abstractmethod
    def _f(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _g2(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _var(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _mean_coef(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _inv_var(self, v: Tensor) -> Tensor: ...

    @abstractmethod
    def _t_of_u(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def _sinh2_u(self, t: Tensor) -> Tensor:
        """sinh(u)^2 = var / ((1 - s0) m^2), without cancellation."""

    def _one_minus_var(self, t: Tensor) -> Tensor:
        return 1.0 - self._var(t)

    def _s2(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _p(self, t: Tensor) -> Tensor:
        return self._f(t) + self._g2(t) / (2.0 * self._s2(t))

    def _q(self, t: Tensor) -> Tensor:
        return self._g2(t) / (2.0 * torch.sqrt(self._var(t)))

    def _mixed_r(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._var(t)) / self._s2(t)

    def _u(self, t: Tensor) -> Tensor:
        if self._published:
            signal = self._mean_coef(t) * math.sqrt(1.0 - self.sigma2_0)
            return torch.asinh(torch.sqrt(self._var(t)) / signal)
        return torch.asinh(torch.sqrt(self._sinh2_u(t)))


class _LinearBetaSDE(SDE):
    """What VP and sub-VP share: beta(t) = beta_0 + (beta_1 - beta_0) t and its integral."""

    def __init__(self, config: SDEConfig) -> None:
        super().__init__(config)
        self._beta_0 = config.beta_start
        self._slope = config.beta_end - config.beta_start

    def beta(self, t: Tensor | float) -> Tensor:
        """beta(t) = beta_start + (beta_end - beta_start) t."""
        return self._evaluate(self._beta, t)

    def _beta(self, t: Tensor) -> Tensor:
        return self._beta_0 + self._slope * t

    def _beta_integral(self, t: Tensor) -> Tensor:
        if self._published:
            return self._beta_0 * t + 0.5 * self._slope * t * t
        # Factored, so that relative accuracy survives where t*t would underflow.
        return t * (self._beta_0 + 0.5 * self._slope * t)

    def _t_of_beta_integral(self, integral: Tensor) -> Tensor:
        # The root of the quadratic with the subtraction removed; also right for a constant beta.
        root = torch.sqrt(self._beta_0**2 + 2.0 * self._slope * integral)
        return 2.0 * integral / (self._beta_0 + root)

    def _f(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t)

    def _mean_coef(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._beta_integral(t))


class VPSDE(_LinearBetaSDE):
    """Variance-preserving SDE with linear beta (paper, Appendix B; Song et al. 2021).

    With B(t) the integral of beta: f = -beta/2, g^2 = beta, var = 1 - (1 - s0) exp(-B), m = exp(-B/2) and
    S^2 = 1.
    """

    def _g2(self, t: Tensor) -> Tensor:
        return self._beta(t)

    def _var(self, t: Tensor) -> Tensor:
        integral = self._beta_integral(t)
        if self._published:
            return 1.0 - (1.0 - self.sigma2_0) * torch.exp(-integral)
        return -torch.expm1(-integral) + self.sigma2_0 * torch.exp(-integral)

    def _one_minus_var(self, t: Tensor) -> Tensor:
        if self._published:
            return 1.0 - self._var(t)
        return (1.0 - self.sigma2_0) * torch.exp(-self._beta_integral(t))

    def _inv_var(self, v: Tensor) -> Tensor:
        if self._published and self._slope > 0.0:
            c = torch.log((1.0 - v) / (1.0 - self.sigma2_0))
            return (-self._beta_0 + torch.sqrt(self._beta_0**2 - 2.0 * self._slope * c)) / self._slope
        return self._t_of_beta_integral(torch.log1p((v - self.sigma2_0) / (1.0 - v)))

    def _p(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _sinh2_u(self, t: Tensor) -> Tensor:
        return (torch.expm1(self._beta_integral(t)) + self.sigma2_0) / (1.0 - self.sigma2_0)

    def _t_of_u(self, u: Tensor) -> Tensor:
        y = torch.sinh(u).square()
        return self._t_of_beta_integral(torch.log1p((1.0 - self.sigma2_0) * y - self.sigma2_0))


class SubVPSDE(_LinearBetaSDE):
    """Sub-VP SDE with linear beta (Song et al. 2021).

    With B(t) the integral of beta and E = exp(-B): f = -beta/2, g^2 = beta (1 - E^2), var = (1 - E)^2 + s0 E,
    m = sqrt(E), S^2 = (1 - E)^2 + E.
    """

    def _g2(self, t: Tensor) -> Tensor:
        integral = self._beta_integral(t)
        if self._published:
            return self._beta(t) * (1.0 - torch.exp(-2.0 * integral))
        return self._beta(t) * -torch.expm1(-2.0 * integral)

    def _var(self, t: Tensor) -> Tensor:
        integral = self._beta_integral(t)
        e = torch.exp(-integral)
        if self._published:
            return (1.0 - e).square() + self.sigma2_0 * e
        return torch.expm1(-integral).square() + self.sigma2_0 * e

    def _one_minus_var(self, t: Tensor) -> Tensor:
        if self._published:
            return 1.0 - self._var(t)
        e = torch.exp(-self._beta_integral(t))
        return e * ((2.0 - self.sigma2_0) - e)

    def _inv_var(self, v: Tensor) -> Tensor:
        # var = d^2 + s0 (1 - d) with d = 1 - E, on its increasing branch.
        d = 0.5 * (self.sigma2_0 + torch.sqrt(self.sigma2_0**2 + 4.0 * (v - self.sigma2_0)))
        return self._t_of_beta_integral(-torch.log1p(-d))

    def _s2(self, t: Tensor) -> Tensor:
        e = torch.exp(-self._beta_integral(t))
        if self._published:
            return (1.0 - e).square() + e
        return torch.expm1(-self._beta_integral(t)).square() + e

    def _p(self, t: Tensor) -> Tensor:
        if self._published:
            return super()._p(t)
        # f + g^2/(2 S^2) over one denominator: the two terms cancel as E -> 0.
        e = torch.exp(-self._beta_integral(t))
        return 0.5 * self._beta(t) * e * (1.0 - 2.0 * e) / self._s2(t)

    def _q(self, t: Tensor) -> Tensor:
        if self._published or self.sigma2_0 > 0.0:
            return super()._q(t)
        # g^2/(2 sqrt(var)) with the common factor 1 - E removed, which is 0 at t = 0.
        return 0.5 * self._beta(t) * (1.0 + torch.exp(-self._beta_integral(t)))

    def _sinh2_u(self, t: Tensor) -> Tensor:
        # (1 - E)^2 / E = 4 sinh(B/2)^2
        odds = 4.0 * torch.sinh(0.5 * self._beta_integral(t)).square()
        return (odds + self.sigma2_0) / (1.0 - self.sigma2_0)

    def _t_of_u(self, u: Tensor) -> Tensor:
        y = (1.0 - self.sigma2_0) * torch.sinh(u).square() - self.sigma2_0
        return self._t_of_beta_integral(2.0 * torch.asinh(0.5 * torch.sqrt(y.clamp_min(0.0))))


class _GeometricVarianceSDE(SDE):
    """What geometric and VE share: the geometric sequence sigma2_min r^t, r = sigma2_max / sigma2_min."""

    def __init__(self, config: SDEConfig) -> None:
        super().__init__(config)
        self._sigma2_min = config.sigma2_min
        self._sigma2_max = config.sigma2_max
        self._ratio = config.sigma2_max / config.sigma2_min
        self._log_ratio = math.log(self._ratio)

    def _sigma2_geom(self, t: Tensor) -> Tensor:
        # pow, not exp(t ln r): it rounds once, while the product t ln r would lose a digit.
        return self._sigma2_min * torch.pow(self._ratio, t)


class GeometricSDE(_GeometricVarianceSDE):
    """Geometric VPSDE: VP with a geometric variance (paper, Appendix B).

    With sigma2_g = sigma2_min r^t: var = sigma2_g - sigma2_min + s0, g^2 = sigma2_g ln(r) / (1 - var),
    f = -g^2/2, m = sqrt((1 - var) / (1 - s0)), S^2 = 1. Stiff near t = 1: g^2 reaches about 1e4 there.
    """

    def __init__(self, config: SDEConfig) -> None:
        super().__init__(config)
        # 1 - var(1), about 1e-3: summed exactly, or its rounding would cost float64 three digits.
        self._end_gap = math.fsum((1.0, -self.sigma2_0, self._sigma2_min, -self._sigma2_max))
        if self._end_gap <= 0.0:
            raise ValueError(
                "geometric_sde needs a final variance sigma2_max - sigma2_min + sigma2_0 below 1, got "
                f"{self._sigma2_max} - {self._sigma2_min} + {self.sigma2_0}: lower sigma2_max "
                "(published: 0.999)"
            )

    def _f(self, t: Tensor) -> Tensor:
        return -0.5 * self._g2(t)

    def _g2(self, t: Tensor) -> Tensor:
        sigma2 = self._sigma2_geom(t)
        if self._published:
            return sigma2 * self._log_ratio / (1.0 - self.sigma2_0 + self._sigma2_min - sigma2)
        return sigma2 * self._log_ratio / self._one_minus_var(t)

    def _var(self, t: Tensor) -> Tensor:
        if self._published:
            return self._sigma2_geom(t) - self._sigma2_min + self.sigma2_0
        if self.sigma2_0 >= self._sigma2_min:
            return self._sigma2_geom(t) + (self.sigma2_0 - self._sigma2_min)
        return self._sigma2_min * torch.expm1(self._log_ratio * t) + self.sigma2_0

    def _one_minus_var(self, t: Tensor) -> Tensor:
        if self._published:
            return 1.0 - self._var(t)
        # From the end t = 1, where 1 - var is as small as 1e-3: a sum of two positive terms.
        return self._end_gap - self._sigma2_max * torch.expm1(self._log_ratio * (t - 1.0))

    def _mean_coef(self, t: Tensor) -> Tensor:
        if self._published:
            growth = torch.pow(self._ratio, t)
            return torch.sqrt(1.0 + self._sigma2_min * (1.0 - growth) / (1.0 - self.sigma2_0))
        return torch.sqrt(self._one_minus_var(t) / (1.0 - self.sigma2_0))

    def _inv_var(self, v: Tensor) -> Tensor:
        if self._published:
            return torch.log((v + self._sigma2_min - self.sigma2_0) / self._sigma2_min) / self._log_ratio
        return torch.log1p((v - self.sigma2_0) / self._sigma2_min) / self._log_ratio

    def _p(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _sinh2_u(self, t: Tensor) -> Tensor:
        return self._var(t) / self._one_minus_var(t)

    def _t_of_u(self, u: Tensor) -> Tensor:
        return torch.log1p((torch.tanh(u).square() - self.sigma2_0) / self._sigma2_min) / self._log_ratio


class VESDE(_GeometricVarianceSDE):
    """Variance-exploding SDE (Song et al. 2021).

    f = 0, m = 1, g^2 = sigma2_min ln(r) r^t, var = sigma2_min r^t with r = sigma2_max / sigma2_min. Requires
    sigma2_0 = sigma2_min. S^2 = sigma2_min (r^t - 1) + 1; the prior is N(0, sigma2_max), with sigma2_max
    meant to be the largest squared distance between two training latents.
    """

    def __init__(self, config: SDEConfig) -> None:
        super().__init__(config)
        if config.sigma2_0 != config.sigma2_min:
            raise ValueError(
                f"vesde needs sigma2_0 == sigma2_min, got {config.sigma2_0} and {config.sigma2_min}: its "
                "variance at t = 0 is sigma2_min, so set both to the same value"
            )

    @property
    def prior_std(self) -> float:
        return math.sqrt(self._sigma2_max)

    def _f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _g2(self, t: Tensor) -> Tensor:
        if self._published:
            return self._sigma2_min * self._log_ratio * torch.pow(self._ratio, t)
        return self._log_ratio * self._sigma2_geom(t)

    def _var(self, t: Tensor) -> Tensor:
        if self._published:
            return self._sigma2_geom(t) - self._sigma2_min + self.sigma2_0
        return self._sigma2_geom(t)

    def _mean_coef(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _inv_var(self, v: Tensor) -> Tensor:
        if self._published:
            return torch.log((v + self._sigma2_min - self.sigma2_0) / self._sigma2_min) / self._log_ratio
        # Nothing is lost by log here: t is only as well determined as v / sigma2_min is.
        return torch.log(v / self._sigma2_min) / self._log_ratio

    def _s2(self, t: Tensor) -> Tensor:
        if self._published:
            return self._sigma2_geom(t) - self._sigma2_min + 1.0
        return 1.0 + self._sigma2_min * torch.expm1(self._log_ratio * t)

    def _sinh2_u(self, t: Tensor) -> Tensor:
        return self._var(t) / (1.0 - self.sigma2_0)

    def _t_of_u(self, u: Tensor) -> Tensor:
        return self._inv_var((1.0 - self.sigma2_0) * torch.sinh(u).square())


_SDES: dict[str, type[SDE]] = {
    "vpsde": VPSDE,
    "geometric_sde": GeometricSDE,
    "sub_vpsde": SubVPSDE,
    "vesde": VESDE,
}


def build_sde(config: SDEConfig) -> SDE:
    """The SDE that ``config`` names, with its parity.

    Raises:
        ValueError: for options that the chosen SDE does not allow (``vesde``: sigma2_0 must equal sigma2_min;
            ``geometric_sde``: the final variance must be below 1).

    Example:
        >>> sde = build_sde(SDEConfig("vpsde"))
        >>> float(sde.var(0.0)), round(float(sde.u(1.0)), 3)
        (0.0, 5.718)
    """
    if config.name not in _SDES:
        raise unknown_name("SDE", config.name, _SDES)
    return _SDES[config.name](config)
