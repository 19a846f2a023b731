"""``accelerate_diffusion``: the published diffusion object with the probability-flow ODE solved here."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsgm_fast import random, trace
from lsgm_fast.config import SDEConfig
from lsgm_fast.engine.accelerate import AcceleratedScore, Options, normal
from lsgm_fast.sampling import Request, ScoreTerm, choose, integrate
from lsgm_fast.sde import SDE, build_sde

_FUNCTIONS = ("f", "g2", "var")
_NAMES = {
    # option of the published code: field of SDEConfig
    "sde_type": "name",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "sigma2_0": "sigma2_0",
    "sigma2_min": "sigma2_min",
    "sigma2_max": "sigma2_max",
    "time_eps": "time_eps",
}
# Relative difference of the functions at which a diffusion is another one; float32 rounding stays far below.
_SAME = 1e-4


class AcceleratedDiffusion:
    """A published diffusion object whose :meth:`sample_model_ode` runs our solvers; made by
    :func:`accelerate_diffusion`.

    Every other attribute and method is the given object's own (its methods call whichever score module they are
    given, accelerated or not).
    """

    def __init__(self, diffusion: Any, sde: SDE, request: dict[str, Any]) -> None:
        self.diffusion = diffusion
        self.sde = sde
        self._request = request

    def __getattr__(self, name: str) -> Any:
        # Not where the object is only being built, by copy or pickle.
        if name in ("diffusion", "sde", "_request"):
            raise AttributeError(name)
        return getattr(self.diffusion, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sde!r}, solver={self._request['solver']!r})"

    @torch.no_grad()
    def sample_model_ode(
        self,
        dae: nn.Module,
        num_samples: int,
        shape: Sequence[int],
        ode_eps: float,
        ode_solver_tol: float,
        enable_autocast: bool,
        temp: float,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, int, float]:
        """Latents of the prior: the probability-flow ODE from t = 1 to ``ode_eps``.

        Args:
            dae: the score module, in the mode it is to be called in. num_samples: N. shape: (C, h, w).
            ode_eps: end time. ode_solver_tol: rtol and atol (unused if the solver was given ``evaluations``).
            enable_autocast: call the network under ``torch.autocast``; its half-precision weights are made once for the
                solve. temp: factor on the initial noise.
            noise: standard-normal (N, C, h, w); None: one draw of that shape, float32, from PyTorch's global generator
                of the device of dae's parameters.

        Returns:
            ``(latents (N, C, h, w) float32, evaluations of the network, seconds)``.

        Raises:
            TypeError: dae lacks ``mixed_prediction`` or ``mixing_logit``. ValueError: noise of another shape, options
                of the solver that do not fit together. NonFiniteError: the network produced NaN or infinity.
        """
        lacking = [name for name in ("mixed_prediction", "mixing_logit") if not hasattr(dae, name)]
        if lacking:
            raise TypeError(
                f"{type(dae).__name__} is no score network of the published code base: it lacks {', '.join(lacking)}"
            )
        device = next(dae.parameters()).device
        size = (num_samples, *shape)
        if noise is None:
            noise = normal(size, device)
        elif tuple(noise.shape) != size:
            raise ValueError(f"expected noise {size}, got {tuple(noise.shape)}")
        z1 = noise.to(device) * (self.sde.prior_std * temp)

        asked = dict(self._request)
        if asked["solver"] == "auto":
            tol = None if asked["evaluations"] is not None else ode_solver_tol
            chosen = choose(tol, asked["evaluations"], ode_solver_tol)
            asked |= {"solver": chosen.solver, "evaluations": chosen.evaluations}
            ode_solver_tol = ode_solver_tol if chosen.tol is None else chosen.tol
        request = Request(**asked)
        if request.evaluations is None and (request.adaptive or request.solver == "exponential"):
            request = Request(**asked, tol=ode_solver_tol)

        logit = dae.mixing_logit if dae.mixed_prediction else None
        start = time.perf_counter()
        with torch.autocast(device.type, enabled=False):
            run = dae.for_sampling(enable_autocast) if isinstance(dae, AcceleratedScore) else dae

        @trace.spanned("evaluation", trace.evaluation)
        def predict(z: Tensor, t: Tensor) -> Tensor:
            return run(z.to(torch.float32), t.to(torch.float32))

        # A prepared network has its own precision already.
        with torch.autocast(device.type, enabled=enable_autocast and run is dae):
            solution = integrate(
                ScoreTerm(predict, self.sde, logit),  # type: ignore[arg-type]
                z1,
                request,
                ode_eps=ode_eps,
                tol=ode_solver_tol,
                draw=_draws(size, device),
                temperature=temp,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return solution.z, solution.nfe, time.perf_counter() - start


def accelerate_diffusion(
    diffusion: Any,
    *,
    args: Options | None = None,
    solver: str = "scipy",
    evaluations: int | None = None,
    grid: str | Sequence[float] | None = None,
    control: str = "joint",
    extrapolate: bool = False,
    parity: str | None = None,
) -> AcceleratedDiffusion:
    """Put the sampling of a live diffusion object of the published LSGM code base on our solvers.

    >>> diffusion = lsgm_fast.accelerate_diffusion(diffusion)
    >>> latents, nfe, seconds = diffusion.sample_model_ode(dae, 16, shape, 1e-5, 1e-5, True, 1.0)

    The diffusion's constants are ``args``' or the object's attributes of the options' names (``sde_type``,
    ``sigma2_0``, ``beta_start``, ...), and otherwise worked out from the values of its functions f, g2 and var. In any
    case our functions are compared with these three.

    Args:
        diffusion: the object; the continuous one, which has ``sample_model_ode``.
        args: the options of the run, as a namespace or dictionary.
        solver: ``"scipy"``, the published path with the published float32 formulas: the same steps and latents. Others
            are those of :meth:`lsgm_fast.LSGM.sample_latents`: ``"rk45"`` (the same method on the device),
            ``"exponential"``, ``"auto"``, ...
        evaluations: a budget in place of the tolerance. grid, control, extrapolate: as for ``sample_latents``.
        parity: ``"published"`` or ``"exact"`` formulas of the diffusion; None: published for ``"scipy"``, else exact.

    Raises:
        TypeError: the object has no such functions (they are named).
        ValueError: a diffusion that is none of the four, constants that contradict its functions, options of the solver
            that do not fit together.
    """
    lacking = [
        name for name in (*_FUNCTIONS, "sample_model_ode") if not callable(getattr(diffusion, name, None))
    ]
    if lacking:
        raise TypeError(
            f"{type(diffusion).__name__} is no continuous diffusion of the published code base: it lacks "
            f"{', '.join(f'{name}()' for name in lacking)}"
        )
    if isinstance(diffusion, AcceleratedDiffusion):
        raise TypeError("this diffusion is accelerated already: pass the published object")
    request = {
        "solver": solver,
        "evaluations": evaluations,
        "grid": grid,
        "control": control,
        "extrapolate": extrapolate,
    }
    if solver != "auto":
        Request(**request).check()  # type: ignore[arg-type]
    sde = _same_sde(diffusion, args)
    return AcceleratedDiffusion(
        diffusion, sde.with_parity(parity or ("published" if solver == "scipy" else "exact")), request
    )


def _draws(size: tuple[int, ...], device: torch.device) -> Callable[[int, Tensor | None], Tensor]:
    """Draws for the stochastic solvers, keyed by one number that PyTorch's global generator gives at the first."""
    seed: list[int] = []

    def draw(i: int, positions: Tensor | None) -> Tensor:
        if not seed:
            seed.append(int(torch.randint(2**62, ())))
        of = range(size[0]) if positions is None else positions.tolist()
        return random.normal(seed[0], of, "ancestral", size[1:], device=device, substream=i)

    return draw


def _same_sde(diffusion: Any, args: Options | None) -> SDE:
    """Our SDE for the given object, seen to have its f, g2 and var."""
    options: Mapping[str, Any] = vars(args) if isinstance(args, argparse.Namespace) else dict(args or {})
    known: dict[str, Any] = {}
    for theirs, ours in _NAMES.items():
        value = options.get(theirs, getattr(diffusion, theirs, None))
        if value is not None:
            known[ours] = str(value) if ours == "name" else float(value)
    times = torch.linspace(0.0, 1.0, 9)
    f, g2, var = (_values(diffusion, name, times) for name in _FUNCTIONS)
    try:
        config = SDEConfig(**{**_constants(known.get("name"), f, g2, var), **known})
        sde = build_sde(config.replace(parity="published"))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(
            f"{type(diffusion).__name__} is none of the four published diffusions: {error}"
        ) from error
    for name, theirs_at in zip(_FUNCTIONS, (f, g2, var), strict=True):
        ours_at = getattr(sde, name)(times).double()
        apart = (ours_at - theirs_at).abs() - (_SAME * theirs_at.abs() + 1e-7)
        if not bool((apart <= 0.0).all()):
            i = int(apart.nan_to_num(torch.inf).argmax())
            raise ValueError(
                f"{type(diffusion).__name__} has {name}({float(times[i])}) = {float(theirs_at[i])!r}, and {config} has "
                f"{float(ours_at[i])!r}: pass args with the options of its run (sde_type, sigma2_0, beta_start, ...)"
            )
    return sde


def _values(diffusion: Any, name: str, times: Tensor) -> Tensor:
    function = getattr(diffusion, name)
    try:
        value = function(times)
    except RuntimeError:
        # The published constants may be tensors on the GPU.
        if not torch.cuda.is_available():
            raise
        value = function(times.cuda())
    return torch.as_tensor(value).detach().double().cpu().expand(times.shape)


def _constants(name: str | None, f: Tensor, g2: Tensor, var: Tensor) -> dict[str, Any]:
    """The constants of the diffusion with these values at 0, 1/8, ..., 1.

    ``f = -beta/2`` for VP and sub-VP, linear in t; ``g^2 = -2 f`` for VP and geometric; f = 0 for VE. With
    ``var(t) - var(0) = sigma2_min (r^t - 1)`` for geometric and VE, its values at 1 and 1/2 have the quotient
    ``sqrt(r) + 1``.
    """
    if name is None:
        if not bool(f.any()):
            name = "vesde"
        elif not torch.allclose(g2, -2.0 * f, rtol=1e-3):
            name = "sub_vpsde"
        else:
            linear = torch.allclose(f[4], 0.5 * (f[0] + f[8]), rtol=1e-3)
            name = "vpsde" if linear else "geometric_sde"
    start, middle, end = float(var[0]), float(var[4]), float(var[8])
    if name in ("vpsde", "sub_vpsde"):
        beta_0, beta_1 = -2.0 * float(f[0]), -2.0 * float(f[8])
        return {
            "name": name,
            "beta_start": _simplest(beta_0, 1e-6 * abs(beta_0)),
            "beta_end": _simplest(beta_1, 1e-6 * abs(beta_1)),
            # 1 - (1 - sigma2_0) in float32
            "sigma2_0": _simplest(start, 1.2e-7),
        }
    ratio = ((end - start) / (middle - start) - 1.0) ** 2
    low = start if name == "vesde" else (end - start) / (ratio - 1.0)
    high = end if name == "vesde" else low * ratio
    low, high = (_simplest(value, 1e-5 * abs(value)) for value in (low, high))
    # VE starts at sigma2_min.
    zero = low if name == "vesde" else _simplest(start, 1e-6 * abs(start))
    return {"name": name, "sigma2_min": low, "sigma2_max": high, "sigma2_0": zero}


def _simplest(value: float, tolerance: float) -> float:
    """The number of fewest decimal digits within ``tolerance``: constants are numbers that someone wrote down."""
    for digits in range(1, 9):
        rounded = float(f"{value:.{digits}g}")
        if abs(rounded - value) <= tolerance:
            return rounded
    return value
