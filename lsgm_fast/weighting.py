"""Importance sampling of time and objective weights of score matching (paper, section 3.2 and Appendix B).

The cross entropy between the encoder's and the prior's latent distribution is, per element,

    CE = int_{T0}^{1} g^2/(2 var) E|eps - eps_theta(z_t, t)|^2 dt + 1/2 (1 + ln(2 pi var(T0))).

A *mode* names the weighting that the prior is trained with (``ll``: likelihood, g^2/(2 var); ``drop_all``: 1;
``drop_sigma2t``: g^2/2; ``rescale``: 1/(2 (1 - var))) and how t is drawn (``uniform``, or ``iw``: from the
density that makes the weight times 1/density as constant as possible for a standard-normal latent).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm_fast.errors import unknown_name
from lsgm_fast.sde import SDE, VESDE, VPSDE, GeometricSDE, SubVPSDE, build_sde

IW_MODES = (
    "ll_uniform",
    "ll_iw",
    "drop_all_uniform",
    "drop_all_iw",
    "drop_sigma2t_iw",
    "drop_sigma2t_uniform",
    "rescale_iw",
)

LIKELIHOOD_MODES = ("ll_iw", "ll_uniform")
"""The modes whose weight makes the objective a bound of the likelihood."""

# rescale_iw draws t uniformly, in spite of its published name.
_UNIFORM_MODES = ("ll_uniform", "drop_all_uniform", "drop_sigma2t_uniform", "rescale_iw")


@dataclass(frozen=True)
class IWQuantities:
    """A batch of times with what the objectives need there; all tensors have rho's shape, dtype and device.

    ``t``: times; ``var``, ``m``, ``g2``: the SDE's variance, mean coefficient and squared diffusion
    coefficient at ``t``; ``weight_p``: the factor of |eps - eps_theta|^2 in the prior's objective;
    ``weight_q``: the factor that makes it the likelihood bound (the encoder's objective) at the same times.
    """

    t: Tensor
    var: Tensor
    m: Tensor
    weight_p: Tensor
    weight_q: Tensor
    g2: Tensor


def available_modes(sde: SDE, subvp_like_vp: bool = False) -> tuple[str, ...]:
    """The importance-sampling modes that are defined for ``sde``, in the order of :data:`IW_MODES`."""
    if isinstance(sde, GeometricSDE):
        return tuple(mode for mode in IW_MODES if mode != "drop_all_iw")
    if isinstance(sde, SubVPSDE) and not subvp_like_vp:
        return tuple(mode for mode in IW_MODES if mode in _UNIFORM_MODES)
    return IW_MODES


def iw_quantities(
    sde: SDE, rho: Tensor, mode: str, time_eps: float | None = None, subvp_like_vp: bool = False
) -> IWQuantities:
    r"""Times and weights for uniform draws ``rho``, by the quantile function of the mode's density of t.

    With T0 = ``time_eps``, v0 = var(T0), v1 = var(1), s0 = sigma2_0:

    ====================  =================================  =========================  =================
    mode                  t                                  weight_p                   weight_q
    ====================  =================================  =========================  =================
    ll_uniform            T0 + (1 - T0) rho                  g2/(2 var)                 weight_p
    ll_iw                 var = v0^(1-rho) v1^rho            ln(v1/v0) / (2 (1 - var))  weight_p
    drop_all_uniform      T0 + (1 - T0) rho                  1                          g2/(2 var)
    drop_all_iw           erfinv(e0 + rho D)/sqrt(d) - phi   N / (1 - var)              weight_p g2/(2 var)
    drop_sigma2t_iw       var = v0 + rho (v1 - v0)           (v1 - v0) / (2 (1 - var))  weight_p / var
    drop_sigma2t_uniform  T0 + (1 - T0) rho                  g2/2                       g2/(2 var)
    rescale_iw            T0 + (1 - T0) rho                  1/(2 (1 - var))            g2/(2 var)
    ====================  =================================  =========================  =================

    where d = (beta_1 - beta_0)/2, phi = beta_0/(beta_1 - beta_0), e0 = erf(sqrt(d) (T0 + phi)),
    D = erf(sqrt(d) (1 + phi)) - e0 and N = (1 - s0) exp(beta_0 phi/2) sqrt(pi/(4 d)) D.

    * VPSDE: all of them. Geometric: all but ``drop_all_iw``.
    * Sub-VPSDE: the uniform ones; with ``subvp_like_vp`` also the others, with t drawn as the VPSDE draws it
      and (V = the VPSDE's variance) ll_iw: g2/(2 var) ln(V1/V0) V/(1 - V)/beta; drop_all_iw: N/(1 - V);
      drop_sigma2t_iw: 1/2 (g2/beta) (V1 - V0)/(1 - V).
    * VESDE, with n(t) = 1 - sigma2_min + sigma2_min r^t: ll_iw and drop_all_iw draw var/n log-uniformly, with
      ll weight 1/2 ln(n0 v1/(v0 n1)) n/(1 - sigma2_min), and 2/ln(r) times that as the drop_all weight_p;
      drop_sigma2t_iw draws n log-uniformly, with weight_p = 1/2 ln(n1/n0) n.

    The ``iw`` weights contain 1/density, so that E_rho[weight h(t)] = int_{T0}^{1} (weighting) h dt. The
    uniform ones, as published, do not contain the factor 1 - T0: their expectation is that integral divided
    by 1 - T0. The weight_p of ``rescale_iw`` is negative where the variance of a VESDE exceeds 1, as published.

    Args:
        sde: the diffusion. With ``parity="published"`` everything is computed in float32, and N uses
            exp(phi/2) as the release does (0.23% too large for betas 0.1 and 20); otherwise in float64 where
            the device has it, and rounded once.
        rho: float32 or float64 draws from U(0, 1), any shape.
        mode: one of :data:`IW_MODES`.
        time_eps: smallest time T0 in [0, 1); the SDE's own if None.
        subvp_like_vp: see above; ignored for other SDEs.

    Returns:
        IWQuantities: tensors of rho's shape, dtype and device.

    Raises:
        ValueError: unknown mode; a mode that this SDE lacks; ``time_eps`` outside [0, 1); ``ll_iw`` where
            var(T0) = 0; ``drop_all_iw`` with a constant beta.
        TypeError: rho is not float32 or float64.
    """
    if mode not in IW_MODES:
        raise unknown_name("importance-sampling mode", mode, IW_MODES)
    modes = available_modes(sde, subvp_like_vp)
    if mode not in modes:
        hint = "; pass subvp_like_vp=True to draw t as the VPSDE does" if isinstance(sde, SubVPSDE) else ""
        raise ValueError(
            f"importance-sampling mode {mode!r} is not defined for {sde.name}, which has "
            f"{', '.join(modes)}{hint}"
        )
    start = sde.time_eps if time_eps is None else float(time_eps)
    if not 0.0 <= start < 1.0:
        raise ValueError(f"time_eps must be in [0, 1), got {start}")
    if rho.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rho must be float32 or float64, got {rho.dtype}: convert it with .float()")

    wide = sde.parity == "exact" and rho.device.type != "mps"
    draws = rho.to(torch.float64 if wide else torch.float32)
    if mode in _UNIFORM_MODES:
        result = _uniform(sde, draws, mode, start)
    elif isinstance(sde, VESDE):
        result = _vesde(sde, draws, mode, start)
    elif isinstance(sde, SubVPSDE):
        result = _sub_vpsde_like_vp(sde, draws, mode, start)
    else:
        assert isinstance(sde, (VPSDE, GeometricSDE))
        t, var, weight_p = _variance_preserving(sde, draws, mode, start)
        g2 = sde.g2(t)
        if mode == "ll_iw":
            weight_q = weight_p
        elif mode == "drop_all_iw":
            weight_q = weight_p * g2 / (2.0 * var)
        else:
            weight_q = weight_p / var
        result = (t, var, sde.mean_coef(t), weight_p, weight_q, g2)
    return IWQuantities(*(x.to(rho.dtype) for x in result))


_Quantities = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _uniform(sde: SDE, rho: Tensor, mode: str, start: float) -> _Quantities:
    t = rho * (1.0 - start) + start
    var, g2 = sde.var(t), sde.g2(t)
    weight_q = g2 / (2.0 * var)
    if mode == "ll_uniform":
        weight_p = weight_q
    elif mode == "drop_all_uniform":
        weight_p = torch.ones_like(t)
    elif mode == "drop_sigma2t_uniform":
        weight_p = 0.5 * g2
    else:
        weight_p = 0.5 / sde.one_minus_var(t)
    return t, var, sde.mean_coef(t), weight_p, weight_q, g2


def _end_values(sde: SDE, start: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """var(T0) and var(1) as 0-d CPU tensors of ``like``'s dtype: they combine with tensors on any device."""
    return sde.var(torch.tensor(start, dtype=like.dtype)), sde.var(torch.tensor(1.0, dtype=like.dtype))


def _variance_preserving(
    sde: VPSDE | GeometricSDE, rho: Tensor, mode: str, start: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(t, var, weight_p) of the ``iw`` modes of an SDE with S^2 = 1, hence d var/dt = g^2 (1 - var)."""
    if mode == "drop_all_iw":
        assert isinstance(sde, VPSDE)
        t, normaliser = _erf_proposal(sde, rho, start)
        return t, sde.var(t), normaliser / sde.one_minus_var(t)
    v0, v1 = _end_values(sde, start, rho)
    if mode == "ll_iw":
        if float(v0) <= 0.0:
            raise ValueError(
                f"ll_iw spreads ln(var) evenly, but var is 0 at time_eps={start}: use time_eps > 0 or "
                "sigma2_0 > 0"
            )
        log_v0, log_v1 = torch.log(v0), torch.log(v1)
        var = torch.exp((1.0 - rho) * log_v0 + rho * log_v1)
        scale = 0.5 * (log_v1 - log_v0)
    else:
        var = (1.0 - rho) * v0 + rho * v1
        scale = 0.5 * (v1 - v0)
    return sde.inv_var(var), var, scale / (1.0 - var)


def _erf_proposal(vpsde: VPSDE, rho: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """t with density proportional to 1 - var(t), and N with N/(1 - var(t)) = 1/density."""
    beta_0, beta_1 = vpsde.config.beta_start, vpsde.config.beta_end
    if beta_1 <= beta_0:
        raise ValueError(f"drop_all_iw needs beta_end > beta_start, got {beta_1} and {beta_0}")
    delta = 0.5 * (beta_1 - beta_0)
    phi = beta_0 / (beta_1 - beta_0)
    e0 = torch.erf(torch.tensor(math.sqrt(delta) * (start + phi), dtype=rho.dtype))
    mass = torch.erf(torch.tensor(math.sqrt(delta) * (1.0 + phi), dtype=rho.dtype)) - e0
    # Completing the square gives exp(delta phi^2) = exp(beta_0 phi / 2); the release has exp(phi / 2).
    square = phi / 2.0 if vpsde.parity == "published" else beta_0 * phi / 2.0
    normaliser = (1.0 - vpsde.sigma2_0) * math.exp(square) * math.sqrt(math.pi / (4.0 * delta)) * mass
    t = math.sqrt(1.0 / delta) * torch.erfinv(rho * mass + e0) - phi
    if vpsde.parity == "exact":
        # erf rounds to 1 for a large beta_1, and erfinv(1) is infinite.
        t = t.clamp(start, 1.0)
    return t, normaliser


def _sub_vpsde_like_vp(sde: SubVPSDE, rho: Tensor, mode: str, start: float) -> _Quantities:
    vpsde = build_sde(sde.config.replace(name="vpsde"))
    assert isinstance(vpsde, VPSDE)
    t, var_vp, weight_vp = _variance_preserving(vpsde, rho, mode, start)
    var, g2 = sde.var(t), sde.g2(t)
    if mode == "drop_all_iw":
        weight_p = weight_vp
        weight_q = weight_p * g2 / (2.0 * var)
    else:
        # weight_vp is (g2/2 or g2/(2 var))/density for the VPSDE, where g2 = beta.
        weight_p = weight_vp * g2 / sde.beta(t)
        if mode == "ll_iw":
            weight_p = weight_p * (var_vp / var)
            weight_q = weight_p
        else:
            weight_q = weight_p / var
    return t, var, sde.mean_coef(t), weight_p, weight_q, g2


def _vesde(sde: VESDE, rho: Tensor, mode: str, start: float) -> _Quantities:
    sigma2_min, sigma2_max = sde.config.sigma2_min, sde.config.sigma2_max
    published = sde.parity == "published"
    rest = 1.0 - sigma2_min
    v0, v1 = _end_values(sde, start, rho)
    n0, n1 = rest + v0, rest + v1
    if mode == "drop_sigma2t_iw":
        log_range = torch.log(n1 / n0)
        n = n0 * torch.exp(rho * log_range)
        # n - rest cancels where n is close to 1, so outside the published formulas the increment is computed.
        var = n + sigma2_min - 1.0 if published else v0 + n0 * torch.expm1(rho * log_range)
        weight_p = 0.5 * log_range * n
    else:
        log_start = torch.log(v0 / n0)
        log_range = torch.log(v1 / n1) - log_start
        log_quotient = rho * log_range + log_start
        if published:
            n = rest / (1.0 - torch.exp(log_quotient))
            var = n + sigma2_min - 1.0
        else:
            n = rest / -torch.expm1(log_quotient)
            var = n * torch.exp(log_quotient)
        weight_p = 0.5 * log_range * n / rest
    # The published t comes from a rounded variance, so its other quantities are those at that t.
    t = sde.inv_var(var)
    if published:
        var = sde.var(t)
    if mode == "drop_sigma2t_iw":
        weight_q = weight_p / var
    else:
        weight_q = weight_p
        if mode == "drop_all_iw":
            weight_p = weight_q * (2.0 / math.log(sigma2_max / sigma2_min))
    return t, var, sde.mean_coef(t), weight_p, weight_q, sde.g2(t)
