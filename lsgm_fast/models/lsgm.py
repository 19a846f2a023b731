"""LSGM: a VAE with a score-based generative model as the prior of its latents."""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn
from tqdm import tqdm

from lsgm_fast import dispatch, ops, random, trace
from lsgm_fast.config import LSGMConfig, SamplingConfig, SDEConfig
from lsgm_fast.distributions import normal_cross_entropy
from lsgm_fast.engine import plan as plans  # the module: it imports this package, too
from lsgm_fast.errors import NonFiniteError, unknown_name
from lsgm_fast.models.ncsnpp import NCSNpp
from lsgm_fast.models.nvae import BN_STATISTICS, NVAE, LatentGroup
from lsgm_fast.models.overlap import SecondStream, Started, begun_ahead
from lsgm_fast.sampling import Progress, Request, ScoreTerm, TunedGrid, choose, integrate, optimise_grid
from lsgm_fast.sde import SDE, build_sde
from lsgm_fast.weighting import LIKELIHOOD_MODES, iw_quantities

logger = logging.getLogger("lsgm_fast")

DEFAULT_BATCH_SIZE = 64
Decode: TypeAlias = Callable[..., torch.Tensor]
PRIORS = ("score", "normal")
"""Names of the priors that :meth:`LSGM.nelbo` accepts."""


@runtime_checkable
class VAE(Protocol):
    """What :class:`LSGM` needs of a VAE (:class:`~lsgm_fast.models.NVAE` is the first implementation).

    ``latent_shape``: (C, h, w) of the latent that the prior models. ``decode`` returns images (N, C, H, W) in [0, 1]
    and may ignore its keyword arguments; ``encode(x)`` (or ``encode(x, noise=...)``) is only needed by
    :meth:`LSGM.encode`, whose seed is for an NVAE. A hierarchical VAE also has ``lower_shapes``, the shapes of the
    latents that the prior does not cover.
    """

    latent_shape: tuple[int, int, int]

    def decode(self, z: torch.Tensor, **options: Any) -> torch.Tensor: ...


@runtime_checkable
class ScoreNetwork(Protocol):
    """What :class:`LSGM` needs of a score network: ``forward(z, t) -> predicted noise``, t of shape (B,).

    An attribute ``mixing_logit`` (1, C, 1, 1), if there is one, mixes the prediction with that of a normal prior.
    """

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class SamplingInfo:
    """What a latent sampling cost.

    ``nfe``: evaluations of the score network (one serves the whole batch); ``seconds``: wall clock of the solve;
    ``steps`` / ``rejected``: accepted / rejected steps; ``backends``: which backend ran each operation; ``reason``: why
    ``solver="auto"`` chose the solver, empty where it was named.
    """

    nfe: int
    seconds: float
    steps: int
    rejected: int
    solver: str
    backends: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Nelbo:
    """Negative evidence lower bound per image, (N,) nats, and its parts.

    ``total = reconstruction + log_q + cross_entropy_prior + cross_entropy_lower``, the last two of the scale of lowest
    resolution with its prior, and of the other scales with N(0, I). ``kl_scales`` (N, S), from the lowest resolution
    up, and ``kl_groups`` (N, G), in decoder order, are log q plus cross entropy of each scale and group; their sums are
    ``total - reconstruction``. ``kl_groups`` is None for a cross entropy that does not split into groups.
    """

    total: torch.Tensor
    reconstruction: torch.Tensor
    log_q: torch.Tensor
    cross_entropy_prior: torch.Tensor
    cross_entropy_lower: torch.Tensor
    kl_scales: torch.Tensor
    kl_groups: torch.Tensor | None


class LSGM(nn.Module):
    """Latent score-based generative model (Vahdat, Kreis, Kautz 2021).

    Args:
        vae: a :class:`VAE`; :class:`~lsgm_fast.models.NVAE` or your own module.
        prior: a :class:`ScoreNetwork`, or None for a VAE alone.
        sde: the diffusion, or its configuration.
        sampling: recommended end time, tolerance and BatchNorm statistics.
        config: kept as ``.config`` so that :meth:`save` can write it; None for your own modules.
    """

    def __init__(
        self,
        vae: nn.Module,
        prior: nn.Module | None,
        sde: SDE | SDEConfig,
        *,
        sampling: SamplingConfig | None = None,
        config: LSGMConfig | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(vae, VAE):
            raise TypeError(f"{type(vae).__name__} is no VAE: it needs latent_shape and decode(z, **options)")
        self.vae = vae
        self.prior = prior
        self.sde = build_sde(sde) if isinstance(sde, SDEConfig) else sde
        self.sampling = sampling or (config.sampling if config else SamplingConfig())
        self.config = config
        self._plan = plans.Plan()

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes a plan of its own.
        return {**self.__dict__, "_plan": plans.Plan(self._plan.settings)}

    def train(self, mode: bool = True) -> LSGM:
        """Training or evaluation mode, as of every module; what sampling had prepared gives its memory back."""
        if mode:
            self._plan = plans.Plan(self._plan.settings)
        return super().train(mode)

    @classmethod
    def from_config(cls, config: LSGMConfig) -> LSGM:
        """A model with random weights."""
        prior = NCSNpp(config.score) if config.score is not None else None
        return cls(NVAE(config.vae), prior, config.sde, config=config)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter (CPU if there is none)."""
        parameter = next(self.parameters(), None)
        return parameter.device if parameter is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter (float32 if there is none), in which the networks are called."""
        parameter = next(self.parameters(), None)
        return parameter.dtype if parameter is not None else torch.float32

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latent that the prior models."""
        return tuple(self.vae.latent_shape)  # type: ignore[return-value]

    @property
    def lower_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the latents that the prior does not cover, in decoder order."""
        return list(getattr(self.vae, "lower_shapes", []))

    # -- the score ----------------------------------------------------------------------------------------------

    @property
    def mixing_logit(self) -> torch.Tensor | None:
        """The prior's mixing logit (1, C, 1, 1), or None."""
        return getattr(self.prior, "mixing_logit", None)

    def _network(self) -> nn.Module:
        if self.prior is None:
            raise ValueError(
                "this model holds only a VAE (a stage-1 checkpoint): sampling and likelihood need a score-based prior; "
                "encode() and decode() work, and nelbo() with prior='normal'"
            )
        return self.prior

    @trace.spanned("evaluation", trace.evaluation)
    def _predict(
        self, z: torch.Tensor, t: torch.Tensor, *, run: Callable[..., torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The network's output, in its own dtype whatever that of the state; ``run``: what computes it."""
        run = self._network() if run is None else run
        return run(z.to(self.dtype), t.to(self.dtype).to(z.device))

    def predict_noise(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Mixed noise prediction ``(1 - a) r z + a eps_theta(z, t)`` for t of shape (B,) or 0-d."""
        eps = self._predict(z, t)
        return ops.mixed_score(eps, z, self.mixing_logit, self.sde.mixed_r(t))

    def drift(self, z: torch.Tensor, t: torch.Tensor, sde: SDE | None = None) -> torch.Tensor:
        """Drift dz/dt of the probability-flow ODE at z (any floating dtype; the result has it too).

        t is 0-d or (B,). A 0-d t may stay on the CPU: the SDE's coefficients are then computed there and reach the
        device as scalars.
        """
        return self._term(sde)(t, z)

    def _term(self, sde: SDE | None = None) -> ScoreTerm:
        return ScoreTerm(self._predict, sde or self.sde, self.mixing_logit)

    def _sampling_term(self, sde: SDE | None = None) -> ScoreTerm:
        """What a sampler integrates, on the plan's network."""
        predict = functools.partial(self._predict, run=self._plan.score(self._network()))
        return ScoreTerm(predict, sde or self.sde, self.mixing_logit)

    # -- sampling -----------------------------------------------------------------------------------------------

    def compile_for_inference(
        self, *, precision: str | None = None, graphs: bool = True, torch_compile: bool = False
    ) -> LSGM:
        """Say how sampling computes, and prepare the networks for it now.

        Without this call, the first :meth:`sample` prepares them with the values above. What is prepared (weights
        normalised, cast and laid out once, on CUDA graphs of an evaluation) takes about the memory of the weights
        again, is made anew when weights change, and is left aside in training mode, under ``torch.autocast`` and
        ``use_backend("reference")``. Training, likelihoods and ``predict_noise`` do not use it.

        Args:
            precision: of convolutions and matrix products: ``"fp32"``, ``"tf32"`` (CUDA), ``"bf16"``, ``"fp16"``; None:
                that of the weights, with PyTorch's own TF32 flags. Normalisation, softmax, the time embedding, mixing
                and the solver's state keep float32 or better.
            graphs: replay evaluations from CUDA graphs. torch_compile: compile the score network with
                ``torch.compile``, minutes at the first evaluation of every batch size.

        Returns:
            The model itself.

        Raises:
            ValueError: unknown precision.
        """
        self._plan = plans.Plan(plans.Settings(precision, graphs, torch_compile))
        self._plan.decoder(self.vae)
        if self.prior is not None:
            self._plan.score(self.prior)
        return self

    def sample_latents(
        self,
        n: int,
        *,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        first_index: int = 0,
        solver: str = "auto",
        tol: float | None = None,
        evaluations: int | None = None,
        ode_eps: float | None = None,
        grid: str | Sequence[float] | None = None,
        control: str = "joint",
        extrapolate: bool = False,
        temperature: float = 1.0,
        state_dtype: torch.dtype = torch.float64,
        progress: bool = False,
    ) -> tuple[torch.Tensor, SamplingInfo]:
        """Draw latents from the prior.

        Integrates the probability-flow ODE ``dz/dt = f z + g^2 / (2 sqrt(var)) eps_mixed(z, t)`` from t = 1, where z is
        normal, to ``ode_eps`` (paper, section 2; Song et al. 2021).

        Args:
            n: number of latents, one batch.
            noise: standard-normal initial state (n, *latent_shape); None: drawn from ``seed``.
            seed: 0 to 2^64 - 1. first_index: index of the first sample within the request, so that splitting a request
                does not change its draws.
            solver: to a tolerance ``"exponential"`` (adaptive, made for the mixed score), ``"rk45"`` (the published
                method), ``"rk23"``, ``"dop853"``, ``"scipy"`` (the published path, with the published float32
                formulas), ``"dopri5"`` and, of the reverse SDE, ``"adaptive_sde"``; with a budget ``"exponential"``,
                ``"exponential_ab"``, ``"exponential_2s"``, ``"exponential_3s"``, ``"ddim"``, ``"deis"``,
                ``"dpmpp_2m"``, ``"dpmpp_3m"``, ``"dpmpp_2s"``, ``"dpmpp_3s"``, ``"unipc"``, ``"euler"``, ``"heun"``,
                ``"rk4"`` and, of the reverse SDE, ``"ancestral"``, ``"euler_maruyama"`` and ``"predictor_corrector"``.
                ``"auto"``: the best measured, ``info.reason`` says why. See ``docs/solvers.md``.
            tol: rtol and atol; None: the recipe's. For ``"auto"``: the accuracy of ``"rk45"`` at this tolerance.
            evaluations: network evaluations; None: 10 (1000 for the SDE), or a tolerance's with ``"auto"``.
            ode_eps: end time; None: the recipe's. temperature: factor on the initial noise and that of the SDE solvers.
            grid: times of a solver with a budget: ``"uniform"``, ``"quadratic"``, ``"log_snr"``, ``"natural"``, or the
                times themselves; None: this model's own (:meth:`optimise_grid`) or the method's best.
            control: ``"joint"`` step sizes, or ``"per_sample"``.
            extrapolate: go on from ``ode_eps`` to 0 without an evaluation (``"exponential"``).
            state_dtype: dtype of the adaptive solver's state. progress: show a progress bar on stderr.

        Returns:
            ``(z (n, *latent_shape), info)``.

        Raises:
            ValueError: unknown solver, wrong shapes, a device without float64, evaluations for an adaptive solver.
            NonFiniteError: the network produced NaN or infinity (step and t are named).
        """
        request, reason = self._request(solver, tol, evaluations, ode_eps, grid, control, extrapolate)
        if n < 0:
            raise ValueError(f"the number of latents must not be negative, got {n}")
        _check_temperature("temperature", temperature)
        indices = range(first_index, first_index + n)
        device = self.device
        if noise is None:
            # Half precision is for the networks; the state keeps at least float32.
            dtype = torch.promote_types(self.dtype, torch.float32)
            noise = random.normal(seed, indices, "prior", self.latent_shape, dtype=dtype, device=device)
        elif tuple(noise.shape) != (n, *self.latent_shape):
            raise ValueError(f"expected noise {(n, *self.latent_shape)}, got {tuple(noise.shape)}")
        z1 = noise.to(device) * (self.sde.prior_std * temperature)

        def draw(i: int, positions: torch.Tensor | None) -> torch.Tensor:
            of = indices if positions is None else [first_index + p for p in positions.tolist()]
            return random.normal(seed, of, "ancestral", self.latent_shape, device=device, substream=i)

        with _ProgressBar(progress) as bar, dispatch.record() as log, torch.no_grad():
            start = time.perf_counter()
            sde = self.sde.with_parity("published") if request.solver == "scipy" else self.sde
            solution = integrate(
                self._sampling_term(sde),
                z1,
                request,
                ode_eps=self.sampling.ode_eps,
                tol=self.sampling.tol,
                draw=draw,
                temperature=temperature,
                state_dtype=state_dtype,
                callback=bar,
            )
            if device.type == "cuda":
                # Of this stream alone: on another one, the batch before may be decoding.
                torch.cuda.current_stream(device).synchronize()
            seconds = time.perf_counter() - start
        info = SamplingInfo(
            nfe=solution.nfe,
            seconds=seconds,
            steps=solution.accepted,
            rejected=solution.rejected,
            solver=request.solver,
            backends=log.backends(),
            reason=reason,
        )
        return solution.z, info

    def _request(
        self,
        solver: str,
        tol: float | None,
        evaluations: int | None,
        ode_eps: float | None,
        grid: str | Sequence[float] | None,
        control: str,
        extrapolate: bool,
    ) -> tuple[Request, str]:
        """What is asked of the solver, checked, and why ``"auto"`` chose it."""
        self._network()
        reason = ""
        if solver == "auto":
            chosen = choose(tol, evaluations, self.sampling.tol)
            solver, tol, evaluations, reason = chosen.solver, chosen.tol, chosen.evaluations, chosen.reason
        recipe_end = ode_eps is None or ode_eps == self.sampling.ode_eps
        if grid is None and solver == "exponential" and evaluations is not None and recipe_end:
            grid = self.sampling.grid_of(evaluations)
        request = Request(solver, tol, evaluations, ode_eps, grid, control, extrapolate)
        request.check()
        return request, reason

    def optimise_grid(
        self, evaluations: int, *, n: int = 16, seed: int = 0, trials: int = 200, progress: bool = False
    ) -> TunedGrid:
        """Find the times at which this many evaluations of ``"exponential"`` serve this model best, and keep them.

        They go into ``self.sampling`` (and the configuration that :meth:`save` writes), where
        ``sample(evaluations=...)`` finds them. See :func:`~lsgm_fast.sampling.optimise_grid`.

        Args:
            n: latents, half to search on and half to judge with. seed: of their noise. trials: grids tried.

        Raises:
            ValueError: n or evaluations below 2.
        """
        self._network()
        dtype = torch.promote_types(self.dtype, torch.float32)
        noise = random.normal(seed, range(n), "prior", self.latent_shape, dtype=dtype, device=self.device)
        with tqdm(total=trials, desc="grids", disable=not progress, leave=False) as bar:

            def show(done: int, best: float) -> None:
                bar.update(done - bar.n)
                bar.set_postfix(error=f"{best:.3g}")

            tuned = optimise_grid(
                self._sampling_term(),
                noise * self.sde.prior_std,
                evaluations,
                self.sampling.ode_eps,
                trials=trials,
                callback=show,
            )
        self.sampling = self.sampling.with_grid(tuned.times)
        if self.config is not None:
            self.config = self.config.replace(sampling=self.config.sampling.with_grid(tuned.times))
        return tuned

    @trace.spanned("sample")
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        solver: str = "auto",
        tol: float | None = None,
        evaluations: int | None = None,
        ode_eps: float | None = None,
        grid: str | Sequence[float] | None = None,
        control: str = "joint",
        extrapolate: bool = False,
        temperature: float = 1.0,
        vae_temperature: float = 1.0,
        bn: str | None = None,
        batch_size: int | None = None,
        noise: torch.Tensor | None = None,
        lower_noise: Sequence[torch.Tensor] | None = None,
        crop: bool = True,
        state_dtype: torch.dtype = torch.float64,
        progress: bool = False,
        on_batch: Callable[[torch.Tensor, SamplingInfo], object] | None = None,
    ) -> torch.Tensor:
        """Draw images: latents from the prior, decoded to the mean of p(x | z).

        Args:
            n: number of images. seed: same seed, same images, on every device and for every ``batch_size`` (up to the
                solver's tolerance where one step size serves a batch, and unless ``bn="batch"``).
            solver, tol, evaluations, ode_eps, grid, control, extrapolate, temperature, noise, state_dtype, progress: as
                in :meth:`sample_latents`.
            vae_temperature: factor on the noise of the latent scales that the prior does not cover.
            bn: ``"running"`` or ``"batch"`` BatchNorm statistics in the decoder; None: the recipe's.
            batch_size: images per batch; None: at most 64.
            lower_noise: standard-normal draws of the scales that the prior does not cover, each (n, *lower_shapes[i]).
            crop: remove the border that padding added (28x28 digits instead of 32x32).
            on_batch: called with (images, info) of every finished batch.

        Returns:
            (n, C, H, W) float32 in [0, 1].

        Raises:
            ValueError, NonFiniteError: as :meth:`sample_latents` and :meth:`decode`.
        """
        if batch_size is None:
            batch_size = DEFAULT_BATCH_SIZE
        elif batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        stream = self.sample_iter(
            n,
            batch_size,
            seed=seed,
            solver=solver,
            tol=tol,
            evaluations=evaluations,
            ode_eps=ode_eps,
            grid=grid,
            control=control,
            extrapolate=extrapolate,
            temperature=temperature,
            vae_temperature=vae_temperature,
            bn=bn,
            noise=noise,
            lower_noise=lower_noise,
            crop=crop,
            state_dtype=state_dtype,
            progress=progress,
        )
        batches = []
        with closing(stream):
            for images, info in stream:
                if on_batch is not None:
                    on_batch(images, info)
                batches.append(images)
        return torch.cat(batches)

    def sample_iter(
        self,
        total: int,
        batch: int = DEFAULT_BATCH_SIZE,
        *,
        seed: int = 0,
        first: int = 0,
        solver: str = "auto",
        tol: float | None = None,
        evaluations: int | None = None,
        ode_eps: float | None = None,
        grid: str | Sequence[float] | None = None,
        control: str = "joint",
        extrapolate: bool = False,
        temperature: float = 1.0,
        vae_temperature: float = 1.0,
        bn: str | None = None,
        noise: torch.Tensor | None = None,
        lower_noise: Sequence[torch.Tensor] | None = None,
        crop: bool = True,
        state_dtype: torch.dtype = torch.float64,
        progress: bool = False,
    ) -> Generator[tuple[torch.Tensor, SamplingInfo], None, None]:
        """Draw any number of images a batch at a time: an iterator over ``(images, info)``, as :meth:`sample` draws.

        Memory is that of one batch on the CPU and of two on CUDA, whatever ``total`` is: nothing of a batch is kept
        once the next one is asked for. On CUDA a batch is decoded on a second stream while the next one is solved
        (whose ``info.seconds`` then holds some of that); on other devices, one after the other.

        The arguments are checked by the call; batches are computed as they are asked for, with the weights, backends
        and autocast of that moment. Do not change the weights before the iterator is through: on CUDA the next batch
        has begun already. ``close()`` waits for what is running and drops it, and so does Python where a loop is left
        early and nothing else holds the iterator; ``contextlib.closing`` does it at a fixed place. Where a batch
        fails, those before it come first, then the error.

        Args:
            total: number of images. batch: images at a time, the last batch may be smaller.
            seed, first: the images are those of index ``first`` to ``first + total - 1`` of the seed, up to
                2^32 - 1. Draws depend on seed and index alone, so with a fixed budget, and with
                ``control="per_sample"``, an image is that of any other split, up to the rounding of the networks;
                for the same bits, use the same batches. One step size for a batch (adaptive solvers with
                ``control="joint"``) makes an image depend on its batch, within the solver's tolerance,
                ``bn="batch"`` without a bound.
            noise, lower_noise: for all images at once: (total, ...).
            solver, tol, evaluations, ode_eps, grid, control, extrapolate, temperature, vae_temperature, bn, crop,
                state_dtype, progress: as in :meth:`sample`.

        Yields:
            ``(images (n, C, H, W) float32 in [0, 1], info)`` of one batch after the other.

        Raises:
            ValueError: as :meth:`sample`, or an index out of range. NonFiniteError: in the batch that it happens in.
        """
        if total < 1:
            raise ValueError(f"the number of images must be at least 1, got {total}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        # Everything that solver and decoder will need is checked before the long part starts.
        _check_temperature("temperature", temperature)
        _check_temperature("vae_temperature", vae_temperature)
        bn = self._statistics(bn)
        expected = [(total, *s) for s in self.lower_shapes]
        if lower_noise is not None and [tuple(e.shape) for e in lower_noise] != expected:
            raise ValueError(f"expected lower_noise {expected}, got {[tuple(e.shape) for e in lower_noise]}")
        if noise is not None and tuple(noise.shape) != (total, *self.latent_shape):
            raise ValueError(f"expected noise {(total, *self.latent_shape)}, got {tuple(noise.shape)}")
        self._request(solver, tol, evaluations, ode_eps, grid, control, extrapolate)
        # No number is drawn: this checks the seed and the first and last index.
        random.normal(seed, [first, first + total - 1], "prior", (0,))

        def latents(part: slice) -> tuple[torch.Tensor, SamplingInfo]:
            return self.sample_latents(
                part.stop - part.start,
                noise=None if noise is None else noise[part],
                seed=seed,
                first_index=first + part.start,
                solver=solver,
                tol=tol,
                evaluations=evaluations,
                ode_eps=ode_eps,
                grid=grid,
                control=control,
                extrapolate=extrapolate,
                temperature=temperature,
                state_dtype=state_dtype,
                progress=progress,
            )

        def decode(run: Decode, part: slice, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if lower_noise is None:
                lower = self._draw_lower(z.shape[0], seed, first + part.start)
            else:
                lower = [e[part].to(z.device) for e in lower_noise]
            images, finite = self._decode(run, z, [e * vae_temperature for e in lower], bn, crop)
            return images.float(), finite

        parts = (slice(start, min(start + batch, total)) for start in range(0, total, batch))
        return self._stream(parts, latents, decode)

    def _stream(
        self,
        parts: Iterable[slice],
        latents: Callable[[slice], tuple[torch.Tensor, SamplingInfo]],
        decode: Callable[[Decode, slice, torch.Tensor], tuple[torch.Tensor, ...]],
    ) -> Generator[tuple[torch.Tensor, SamplingInfo], None, None]:
        """Solve and decode one part after the other, each decoded while the next is solved where the device can."""
        second = SecondStream(self.device)

        def begin() -> Iterator[tuple[Started, SamplingInfo]]:
            for part in parts:
                # Before the solve: looking at the weights waits for the device.
                run = self._plan.decoder(self.vae)
                z, info = latents(part)
                started = second.start(functools.partial(decode, run, part), z)
                del z
                yield started, info

        def finish(started: Started) -> torch.Tensor:
            images, finite = started.take()
            _require_finite(finite)
            return images

        try:
            for started, info in begun_ahead(begin(), second.ahead):
                yield finish(started), info
        finally:
            second.close()

    def _draw_lower(self, n: int, seed: int, first_index: int) -> list[torch.Tensor]:
        indices = range(first_index, first_index + n)
        return [
            random.normal(seed, indices, "lower", shape, device=self.device, substream=i)
            for i, shape in enumerate(self.lower_shapes)
        ]

    @torch.no_grad()
    def decode(
        self,
        z: torch.Tensor,
        lower_noise: Sequence[torch.Tensor] | None = None,
        bn: str | None = None,
        crop: bool = True,
        *,
        seed: int = 0,
    ) -> torch.Tensor:
        """Mean image of p(x | z).

        Splits the batch when memory runs out (not with ``bn="batch"``, whose statistics are the batch's).

        Args:
            z: (N, *latent_shape). lower_noise: latents of the scales that the prior does not cover, each
                (N, *lower_shapes[i]); None: drawn from ``seed``.
            bn: ``"running"`` or ``"batch"``; None: the recipe's. crop: remove the border that padding added.

        Returns:
            (N, C, H, W) in [0, 1].

        Raises:
            ValueError: wrong shapes. NonFiniteError: the decoder produced NaN.
            torch.OutOfMemoryError: a single image does not fit, or the batch must not be split.
        """
        bn = self._statistics(bn)
        if z.dim() != 4 or tuple(z.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"expected latents (N, {', '.join(map(str, self.latent_shape))}), got {tuple(z.shape)}"
            )
        lower = list(lower_noise) if lower_noise is not None else self._draw_lower(z.shape[0], seed, 0)
        images, finite = self._decode(self._plan.decoder(self.vae), z, lower, bn, crop)
        _require_finite(finite)
        return images

    @trace.spanned("decode")
    @torch.no_grad()
    def _decode(
        self, run: Decode, z: torch.Tensor, lower: list[torch.Tensor], bn: str, crop: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The images, and what :func:`_require_finite` looks at: reading it here would wait for the device."""
        images = self._decode_splitting(run, z.to(self.dtype), [e.to(self.dtype) for e in lower], bn, crop)
        finite_input = torch.isfinite(z).all().to(images.device)
        return images, torch.stack((torch.isfinite(images).all(), finite_input))

    def _statistics(self, bn: str | None) -> str:
        bn = self.sampling.bn if bn is None else bn
        if bn not in BN_STATISTICS:
            raise unknown_name("BatchNorm statistics", bn, BN_STATISTICS)
        return bn

    def _decode_splitting(
        self, run: Decode, z: torch.Tensor, lower: list[torch.Tensor], bn: str, crop: bool
    ) -> torch.Tensor:
        try:
            return run(z, lower_noise=lower, bn=bn, crop=crop)
        except torch.OutOfMemoryError:
            if bn == "batch" or z.shape[0] == 1:
                raise
        # Outside the except block, so that the traceback no longer keeps the failed attempt's tensors alive.
        if z.is_cuda:
            torch.cuda.empty_cache()
        half = (z.shape[0] + 1) // 2
        logger.warning("out of memory while decoding %d images: decoding %d at a time", z.shape[0], half)
        first = self._decode_splitting(run, z[:half], [e[:half] for e in lower], bn, crop)
        second = self._decode_splitting(run, z[half:], [e[half:] for e in lower], bn, crop)
        return torch.cat((first, second))

    # -- inference ----------------------------------------------------------------------------------------------

    def encode(
        self, x: torch.Tensor, noise: Sequence[torch.Tensor] | None = None, *, seed: int = 0
    ) -> list[LatentGroup]:
        """Posterior of every latent group and a draw from it.

        Args:
            x: images (N, C, H, W) in [0, 1], natural or padded size. noise: one standard-normal draw per group;
                None: from ``seed``.

        Returns:
            Groups in decoder order, each with ``eps``, ``log_q``, ``mean``, ``log_sigma``. (What your own VAE's
            ``encode`` returns, if it is not an NVAE.)

        Raises:
            ValueError: images of the wrong size, channel count or range; noise of the wrong shapes.
        """
        if isinstance(self.vae, NVAE):
            return self.vae.encode(self.vae.preprocess_images(x).to(self.dtype), noise, seed)
        encode = getattr(self.vae, "encode", None)
        if encode is None:
            raise TypeError(f"{type(self.vae).__name__} has no encode()")
        return encode(x) if noise is None else encode(x, noise=noise)

    def nelbo(
        self,
        x: torch.Tensor,
        *,
        noise: Sequence[torch.Tensor] | None = None,
        diffusion_noise: torch.Tensor | None = None,
        rho: torch.Tensor | None = None,
        iw_mode: str | None = None,
        seed: int = 0,
        prior: str | Callable[[torch.Tensor], torch.Tensor] | None = None,
        time_eps: float | None = None,
        control_variate: bool = False,
    ) -> Nelbo:
        """One-sample estimate of the negative evidence lower bound (paper, equation 5 and Theorem 1).

        ``-log p(x | z) + log q(z | x) + CE(q || p)``; the cross entropy with the score-based prior is estimated at one
        importance-sampled time per image.

        Args:
            x: images (N, C, H, W) in [0, 1]. noise: per-group posterior draws. diffusion_noise: (N, *latent_shape).
            rho: (N,) uniforms in (0, 1) that choose the times. iw_mode: a likelihood-weighted mode, ``"ll_iw"`` (on the
                sub-VPSDE with the VPSDE's times) or ``"ll_uniform"`` (as published, without the factor 1 - time_eps of
                the integral); None: ``"ll_uniform"`` on the sub-VPSDE, else ``"ll_iw"``. Draws left out come from
                ``seed``.
            prior: of the lowest-resolution scale: ``"score"``; ``"normal"``, N(0, I), which the other scales always
                have; or a function of the latents z0 (N, *latent_shape) that returns -log p(z0) or an estimate of it,
                in nats per element or, (N,), per image. None: the score-based prior, N(0, I) for a VAE alone.
            time_eps: where the integral over time starts; None: the SDE's. The bound is that of latents diffused to
                this time. control_variate: subtract the estimate for a normal prior at the same time and noise, and add
                what it is on average (in closed form): the same mean with far less variance. With ``"ll_iw"`` only.
                diffusion_noise, rho, iw_mode, time_eps and control_variate are for the score-based prior only.

        Raises:
            ValueError: as :meth:`encode`; an unknown prior, or a score-based one that the model lacks; a mode that does
                not weight by likelihood; a time_eps where the SDE has no variance. TypeError: the VAE is no NVAE.
        """
        vae = self.vae
        if not isinstance(vae, NVAE):
            raise TypeError(f"nelbo() needs an NVAE, got {type(vae).__name__}")
        if prior is None:
            prior = "normal" if self.prior is None else "score"
        if prior == "normal":
            cross_entropy = normal_cross_entropy
        elif prior == "score":
            cross_entropy = self._score_cross_entropy(
                diffusion_noise, rho, iw_mode, seed, time_eps, control_variate
            )
        elif callable(prior):
            cross_entropy = prior
        else:
            raise unknown_name("prior", prior, PRIORS)
        x = vae.preprocess_images(x).to(self.dtype)
        logits, groups = vae(x, noise, seed)
        reconstruction = vae.reconstruction_loss(logits, x)
        log_q_groups = torch.stack([g.log_q.flatten(1).sum(dim=1) for g in groups], dim=1)

        n, in_prior = x.shape[0], vae.config.groups_per_scale
        entropy = cross_entropy(vae.merge_groups([g.eps for g in groups]))
        if tuple(entropy.shape) not in ((n,), (n, *self.latent_shape)):
            raise ValueError(
                f"the prior must return -log p per image ({n},) or per element {(n, *self.latent_shape)}, "
                f"got {tuple(entropy.shape)}"
            )
        splits = entropy.dim() > 1
        # (N, groups that the prior covers), or (N, 1) where the density is only known as a whole
        covered = entropy.reshape(n, in_prior if splits else 1, -1).sum(dim=2)
        lower = [normal_cross_entropy(g.eps).flatten(1).sum(dim=1) for g in groups[in_prior:]]
        lower_groups = torch.stack(lower, dim=1) if lower else covered.new_zeros(n, 0)
        prior_part, lower_part = covered.sum(dim=1), lower_groups.sum(dim=1)
        log_q = log_q_groups.sum(dim=1)

        kl_lower = log_q_groups[:, in_prior:] + lower_groups
        kl_groups = torch.cat((log_q_groups[:, :in_prior] + covered, kl_lower), dim=1) if splits else None
        kl_prior = log_q_groups[:, :in_prior].sum(dim=1) + prior_part
        kl_scales = torch.cat((kl_prior[:, None], kl_lower.reshape(n, -1, in_prior).sum(dim=2)), dim=1)
        total = reconstruction + log_q + prior_part + lower_part
        return Nelbo(total, reconstruction, log_q, prior_part, lower_part, kl_scales, kl_groups)

    def _score_cross_entropy(
        self,
        noise: torch.Tensor | None,
        rho: torch.Tensor | None,
        iw_mode: str | None,
        seed: int,
        time_eps: float | None,
        control_variate: bool,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The one-sample estimate of the cross entropy, elementwise, as a function of the latents."""
        self._network()
        if iw_mode is None:
            iw_mode = "ll_uniform" if self.sde.name == "sub_vpsde" else "ll_iw"
        if iw_mode not in LIKELIHOOD_MODES:
            raise unknown_name("likelihood-weighted importance sampling mode", iw_mode, LIKELIHOOD_MODES)
        if control_variate and iw_mode != "ll_iw":
            raise ValueError(f"control_variate=True needs iw_mode='ll_iw', got {iw_mode!r}")
        start = self.sde.time_eps if time_eps is None else float(time_eps)
        if not 0.0 <= start < 1.0:
            raise ValueError(f"time_eps must be in [0, 1), got {start}")
        const = float(self.sde.cross_entropy_const(start))
        if not math.isfinite(const):
            raise ValueError(
                f"{self.sde.name} has zero variance at time_eps={start}: the cross entropy needs time_eps > 0"
            )

        def estimate(z0: torch.Tensor) -> torch.Tensor:
            n = z0.shape[0]
            eps, times = noise, rho
            if eps is None:
                eps = random.normal(
                    seed, range(n), "diffusion", self.latent_shape, dtype=z0.dtype, device=z0.device
                )
            if times is None:
                times = random.uniform(seed, range(n), "time", (), device=z0.device)
                times = times.to(torch.promote_types(z0.dtype, torch.float32))
            elif tuple(times.shape) != (n,):
                raise ValueError(f"expected rho of shape ({n},), got {tuple(times.shape)}")
            elif not bool(((times >= 0.0) & (times <= 1.0)).all()):
                raise ValueError(
                    f"rho must be in [0, 1], got values from {float(times.min())} to {float(times.max())}"
                )
            iw = iw_quantities(self.sde, times, iw_mode, start, subvp_like_vp=iw_mode == "ll_iw")
            z_t = ops.diffuse(z0, eps, iw.m, iw.var)
            prediction = self.predict_noise(z_t, iw.t)
            _, cross_entropy = ops.score_matching_loss(prediction, eps, iw.weight_p, iw.weight_q, const)
            assert cross_entropy is not None
            if not control_variate:
                return cross_entropy
            r = self.sde.mixed_r(iw.t).to(z_t.dtype).reshape(-1, 1, 1, 1)
            _, control = ops.score_matching_loss(r * z_t, eps, iw.weight_p, iw.weight_q, const)
            assert control is not None
            return cross_entropy - control + self.mixing_cross_entropy(z0, start)

        return estimate

    def mixing_cross_entropy(self, z0: torch.Tensor, start: float) -> torch.Tensor:
        """What the cross entropy bound from ``start`` on is, elementwise, where the prediction is r z_t.

        With w = var / S^2, r z_t - eps has the mean square w (1 - w) z0^2 / (1 - s0) + (1 - w)^2 and
        g^2 / (2 var) dt = dw / (2 w (1 - w)), so that the integral of their product is, from w0 to w1,

            1/2 [(z0^2 / (1 - s0) - 1) (w1 - w0) + ln(w1 / w0)].
        """
        t = torch.tensor([start, 1.0], dtype=torch.float64)
        w0, w1 = (self.sde.var(t) / self.sde.s2(t)).tolist()
        const = float(self.sde.cross_entropy_const(start)) + 0.5 * math.log(w1 / w0)
        return const + 0.5 * (w1 - w0) * (z0.square() / (1.0 - self.sde.sigma2_0) - 1.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration to one safetensors file (written aside, then renamed)."""
        from lsgm_fast import checkpoints

        checkpoints.save(self, path)


def _require_finite(finite: torch.Tensor) -> None:
    """Raise unless the images are finite; ``finite`` (2,): whether the images are, and the latents they are of."""
    images, latents = finite.tolist()
    if not images:
        source = "its own activations" if latents else "its input"
        raise NonFiniteError(f"the decoder produced NaN or infinity (from {source})")


def _check_temperature(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


class _ProgressBar:
    """tqdm over the covered time interval, with the number of evaluations; does nothing when not enabled."""

    def __init__(self, enabled: bool) -> None:
        self._bar = None
        if enabled:
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            self._bar = tqdm(total=1.0, desc="sampling", bar_format=layout, leave=False)

    def __enter__(self) -> _ProgressBar:
        return self

    def __call__(self, progress: Progress) -> None:
        if self._bar is not None:
            self._bar.update(progress.fraction - self._bar.n)
            self._bar.set_postfix_str(f"NFE {progress.nfe}, t = {progress.t:.3g}")

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
