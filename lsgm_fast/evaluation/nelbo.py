"""The negative evidence lower bound of a data set, with standard errors, and the difference of two priors.

Per image ``NELBO = -log p(x | z) + log q(z | x) - log p(z)``, averaged over draws of z (LSGM, equation 5). The last
part, of the lowest-resolution scale, is either the importance-sampled bound of Theorem 1 (``"diffusion"``) or the
log-density of the probability-flow ODE (``"ode"``; equation 8), which is how the paper reports its figures.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor
from tqdm import tqdm

from lsgm_fast import distributed, random
from lsgm_fast.errors import NonFiniteError, unknown_name
from lsgm_fast.models.lsgm import LSGM
from lsgm_fast.models.nvae import NVAE
from lsgm_fast.sampling import bits_per_dim, log_prior, supports_float64

METHODS = ("diffusion", "ode")
"""Names of the estimates of the score-based prior's part that ``evaluate_nelbo`` accepts."""

TRACES: dict[str, dict[str, Any]] = {
    "fresh": {"solver": "rk23", "fresh_probes": True, "trace_in_control": False},
    "fixed": {"solver": "rk45"},
    "published": {"solver": "rk45", "probe": "gaussian", "fresh_probes": True},
}
"""How the ODE's log-determinant is estimated, as options of :func:`~lsgm_fast.sampling.log_prior`.

``fresh``: new Rademacher probes at every evaluation, kept out of the step control. RK23, because its weights are nearly
even, so that their errors average out better than with those of RK45. ``fixed``: the same Rademacher probes for a whole
solve. ``published``: new normal probes at every evaluation, in the step control.
"""

_LOOSEST = 1e-3

# Odd, so that distinct draws have distinct seeds.
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error, ``s / sqrt(n)``, s with n - 1; None for a single image."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Of independent values (n,), n at least 1."""
        n = values.shape[0]
        return cls(float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else None)


@dataclass(frozen=True)
class NelboReport:
    """What :func:`evaluate_nelbo` found. Parts in nats per image.

    Attributes:
        prior: ``"score"`` or ``"normal"``. method: of the score-based prior's part, None for the normal one.
        images, draws, seed: how many images, draws per image, and the seed of the draws.
        nelbo, bits_per_dim: the bound in nats and, divided by ``dims`` ln 2, in bits. dims: natural image area times
            channels (784 for 28x28 digits); for categorical images the area alone, so that these are bits per symbol.
        reconstruction: -log p(x | z). log_q: log q(z | x). cross_entropy_prior, cross_entropy_lower: -log p(z) of the
            lowest-resolution scale with its prior, and of the other scales with N(0, I).
        kl: ``nelbo - reconstruction``. kl_scales: its parts by scale, from the lowest resolution up. kl_groups: by
            group in decoder order, None for ``"ode"``, whose density does not split.
        trace, probes: of the ODE's log-determinant, as given; None unless ``"ode"``.
        t_start: the time at which the score-based prior was evaluated (``time_eps`` or ``ode_eps``), else None.
        tol: of the ODE solver, else None. nfe: evaluations of the score network for each draw of an image, averaged.
        draw_std: standard deviation of the bound between draws of one image (root mean square over images), None for
            one draw. ``draw_std / sqrt(draws)`` is what the draws add to an image's value; it is a part of the
            standard errors already.
        importance_weighted: the tighter bound ``-log mean_k exp(-NELBO_k)`` of the draws k (Burda et al. 2016), nats;
            None for one draw and for ``"diffusion"``, whose single draws are no densities. With ``"ode"`` the probes'
            noise, ``probe_std``, tightens it too far by about ``probe_std^2 / 2`` (they are unbiased for log p alone).
        probe_std: standard deviation of -log p(z) of one latent between probes, None unless it was asked for.
        seconds: wall clock. values: the bound of every image, (images,) float64 on the CPU, for :func:`compare`.
    """

    prior: str
    method: str | None
    images: int
    draws: int
    seed: int
    dims: int
    nelbo: Estimate
    bits_per_dim: Estimate
    reconstruction: Estimate
    log_q: Estimate
    cross_entropy_prior: Estimate
    cross_entropy_lower: Estimate
    kl: Estimate
    kl_scales: tuple[Estimate, ...]
    kl_groups: tuple[Estimate, ...] | None
    trace: str | None
    probes: int | None
    t_start: float | None
    tol: float | None
    nfe: float
    draw_std: float | None
    importance_weighted: Estimate | None
    probe_std: float | None
    seconds: float
    values: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but ``values``, as JSON-serialisable objects."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "values"]
        return {name: _plain(getattr(self, name)) for name in fields}


@dataclass(frozen=True)
class PairedDifference:
    """Mean over images of a difference, its standard error, and the 95% interval (Student's t, images - 1)."""

    mean: float
    standard_error: float
    low: float
    high: float
    images: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields as JSON-serialisable objects."""
        return dataclasses.asdict(self)


def compare(a: NelboReport, b: NelboReport) -> PairedDifference:
    """``a - b``, image by image: negative where ``a`` is better (in nats).

    The spread between images cancels, so the interval is far narrower than those of the two means. With the same seed
    both used the same draws of the posterior, if the encoders are the same.

    Raises:
        ValueError: the reports are of different numbers of images, or of a single one.
    """
    if a.images != b.images:
        raise ValueError(
            f"a paired comparison needs the same images in the same order, got {a.images} and {b.images} images"
        )
    if a.images < 2:
        raise ValueError("a paired comparison needs at least 2 images, got 1")
    difference = Estimate.of(a.values - b.values)
    assert difference.standard_error is not None
    half = float(stdtrit(a.images - 1, 0.975)) * difference.standard_error
    mean = difference.mean
    return PairedDifference(mean, difference.standard_error, mean - half, mean + half, a.images)


def evaluate_nelbo(
    model: LSGM,
    batches: Iterable[Any],
    *,
    prior: str | None = None,
    method: str = "diffusion",
    draws: int = 1,
    seed: int = 0,
    limit: int | None = None,
    time_eps: float | None = None,
    tol: float | None = None,
    trace: str = "fresh",
    probes: int = 1,
    measure_probes: bool = False,
    shared: bool = False,
    progress: bool = False,
) -> NelboReport:
    """The negative evidence lower bound of a data set.

    The draws of an image depend on the seed and its position alone, neither on the batch size nor on the prior. (With
    the ODE, one step size serves a batch: an image depends on the others within the tolerance, and where every
    evaluation draws new probes, by as much as they differ, ``probe_std``.) Runs without gradients and with running
    BatchNorm statistics; the modules' training modes are put back afterwards.

    Args:
        model: with an NVAE.
        batches: tensors of images (B, C, H, W) in [0, 1], or objects that have them as ``.images``.
        prior: ``"score"`` or ``"normal"`` (N(0, I)) for the lowest-resolution scale; None: the score-based prior, or
            the normal one for a VAE alone.
        method: for the score-based prior, ``"diffusion"``: the importance-sampled bound at one time per draw, unbiased
            but for its start at ``time_eps``; ``"ode"``: -log p(z0) by the probability-flow ODE from the recipe's
            ``ode_eps``, with one probe of the trace per draw (:func:`~lsgm_fast.sampling.log_prior`).
        draws: independent draws per image of posterior noise, diffusion noise and time (or probe). The times of an
            image are stratified over its draws: the k-th uniform is ``(k + u_k) / draws``, which leaves the mean over
            draws unbiased.
        seed: 0 to 2^64 - 1. limit: stop after this many images; None: all.
        time_eps: where the integral over time starts; None: the SDE's. For ``"diffusion"``.
        tol: rtol and atol of the solver; None: the recipe's, but at most 1e-3, because a tolerance that suits samples
            may leave a bias of several tenths of a nat. For ``"ode"``.
        trace: one of :data:`TRACES`. probes: of the trace, averaged. measure_probes: solve the first draw a second time
            with other probes, for ``probe_std``. For ``"ode"``.
        shared: every process of the group calls this with the same arguments, and they take turns with whole batches:
            process r computes the batches r, r + world size, ... Every image's numbers are those of one process, with
            the ODE too, and every process returns the report of all images. More processes than batches leave some
            without work: choose smaller batches. A failure in one process is raised in all of them. False: this
            process evaluates all images by itself, whatever the others do.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: no images, images that do not fit the model, an unknown prior or method, draws or limit below 1, a
            score-based prior that the model lacks. TypeError: the VAE is no NVAE.
        NonFiniteError: the bound of an image is not finite (the first is named).
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    for name, value in (("draws", draws), ("limit", limit), ("probes", probes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not isinstance(model.vae, NVAE):
        raise TypeError(f"evaluate_nelbo() needs an NVAE, got {type(model.vae).__name__}")
    if prior is None:
        prior = "normal" if model.prior is None else "score"
    if tol is None:
        tol = min(model.sampling.tol, _LOOSEST)
    if trace not in TRACES:
        raise unknown_name("trace", trace, TRACES)
    bound = _Bound(model, model.vae, prior, method, draws, seed, time_eps, tol, trace, probes, measure_probes)
    training = [module for module in model.modules() if module.training]
    stream = _placed(_limited(batches, limit))
    parts: list[_Part] = []
    start = time.perf_counter()
    model.eval()
    try:
        with torch.no_grad(), tqdm(desc="NELBO", total=limit, disable=not progress, leave=False) as bar:
            while found := _round(bound, stream, shared):
                parts += found
                bar.update(sum(part.values.shape[0] for part in found))
    finally:
        for module in training:
            module.training = True
    if not parts:
        raise ValueError("there are no images to evaluate: the batches are empty")
    seconds = time.perf_counter() - start
    return bound.report(parts, distributed.broadcast_object(seconds) if shared else seconds)


@dataclass(frozen=True)
class _Part:
    """What one batch gives.

    ``values``: (n, draws, parts) float64 on the CPU. ``probe_squares``: (n,) squared differences between two
    independent estimates of the same log-densities, None where they are not measured. ``evaluations``: of the network,
    times images.
    """

    values: Tensor
    probe_squares: Tensor | None
    evaluations: int


def _round(bound: _Bound, stream: Iterator[tuple[int, Tensor]], shared: bool) -> list[_Part]:
    """The next batches, one for each process that shares the work, in order; none at the end.

    In step with the others, so that all of them know of a failure before they begin with the next batch.
    """
    if not shared:
        return [bound.draw_all(images, first) for first, images in itertools.islice(stream, 1)]
    part, failure = None, None
    try:
        mine = list(itertools.islice(stream, distributed.world_size()))[distributed.rank() :][:1]
        if mine:
            ((first, images),) = mine
            part = bound.draw_all(images, first)
    except Exception as error:
        failure = error
    return [each for each in distributed.gather_objects(part, failure) if each is not None]


class _Bound:
    """The bound of one model under one prior: a row of numbers for every draw of an image, and the report of them."""

    PARTS = ("nelbo", "reconstruction", "log_q", "cross_entropy_prior", "cross_entropy_lower")

    def __init__(
        self,
        model: LSGM,
        vae: NVAE,
        prior: str,
        method: str,
        draws: int,
        seed: int,
        time_eps: float | None,
        tol: float,
        trace: str,
        probes: int,
        measure_probes: bool,
    ) -> None:
        self.model = model
        self.vae = vae
        self.prior = prior
        self.method = method if prior == "score" else None
        self.draws = draws
        self.seed = seed
        self.time_eps = model.sde.time_eps if time_eps is None else time_eps
        self.tol = tol
        self.trace = trace
        self.probes = probes
        self.measure_probes = measure_probes and self.method == "ode"
        # Of the batch under way.
        self.probe_squares: Tensor | None = None
        self.evaluations = 0

    def draw_all(self, images: Tensor, first: int) -> _Part:
        """Of the images first, first + 1, ...; their values are PARTS, scales, groups."""
        self.probe_squares, self.evaluations = None, 0
        images = images.to(self.model.device)
        rows = [self._draw(images, range(first, first + images.shape[0]), k) for k in range(self.draws)]
        values = torch.stack(rows, dim=1)
        wrong = ~torch.isfinite(values).all(dim=2).all(dim=1)
        if bool(wrong.any()):
            raise NonFiniteError(f"the bound of image {first + int(wrong.nonzero()[0])} is NaN or infinite")
        return _Part(values, self.probe_squares, self.evaluations)

    def _draw(self, images: Tensor, indices: range, k: int) -> Tensor:
        model, n = self.model, len(indices)
        dtype = torch.promote_types(model.dtype, torch.float32)

        def normal(name: str, shape: Sequence[int], substream: int) -> Tensor:
            return random.normal(
                self.seed, indices, name, shape, dtype=dtype, device=model.device, substream=substream
            ).to(model.dtype)

        shapes = self.vae.group_shapes
        noise = [normal("posterior", shape, k * len(shapes) + i) for i, shape in enumerate(shapes)]
        if self.method == "diffusion":
            u = random.uniform(self.seed, indices, "time", dtype=torch.float64, substream=k)
            parts = model.nelbo(
                images,
                noise=noise,
                diffusion_noise=normal("diffusion", model.latent_shape, k),
                rho=((k + u) / self.draws).to(model.device, dtype),
                # The published uniform times leave a factor out, which is no bound.
                iw_mode="ll_iw",
                prior="score",
                time_eps=self.time_eps,
                control_variate=True,
            )
            self.evaluations += n
        elif self.method == "ode":
            parts = model.nelbo(images, noise=noise, prior=lambda z0: self._ode(z0, indices.start, k))
        else:
            parts = model.nelbo(images, noise=noise, prior=self.prior)
        columns = [getattr(parts, "total" if name == "nelbo" else name)[:, None] for name in self.PARTS]
        columns.append(parts.kl_scales)
        if parts.kl_groups is not None:
            columns.append(parts.kl_groups)
        return torch.cat([column.detach().cpu().double() for column in columns], dim=1)

    def _ode(self, z0: Tensor, first: int, k: int) -> Tensor:
        log_p, nfe = self._log_prior(z0, first, k)
        self.evaluations += nfe * z0.shape[0]
        if self.measure_probes and k == 0:
            again, _ = self._log_prior(z0, first, self.draws)
            self.probe_squares = (log_p - again).detach().cpu().double().square()
        return -log_p

    def _log_prior(self, z0: Tensor, first: int, k: int) -> tuple[Tensor, int]:
        """(log p (n,), evaluations of the network), with the k-th set of probes."""
        model = self.model
        log_p, solution = log_prior(
            model._term(model.sde.with_parity("exact")),
            z0,
            t_start=model.sampling.ode_eps,
            rtol=self.tol,
            atol=self.tol,
            probes=self.probes,
            **TRACES[self.trace],
            seed=(self.seed + k * _SEED_STEP) % 2**64,
            first_index=first,
            state_dtype=torch.float64 if supports_float64(z0.device) else torch.float32,
        )
        return log_p, solution.nfe

    def report(self, found: Sequence[_Part], seconds: float) -> NelboReport:
        """Of all batches, in the order of the images."""
        vae = self.vae.config
        values = torch.cat([part.values for part in found])
        squares = [part.probe_squares for part in found if part.probe_squares is not None]
        n = values.shape[0]
        mean = values.mean(dim=1)
        estimates = [Estimate.of(column) for column in mean.unbind(dim=1)]
        scales_end = len(self.PARTS) + vae.latent_scales
        return NelboReport(
            prior=self.prior,
            method=self.method,
            images=n,
            draws=self.draws,
            seed=self.seed,
            dims=vae.dims,
            bits_per_dim=Estimate.of(bits_per_dim(-mean[:, 0], vae.dims)),
            kl=Estimate.of(mean[:, 0] - mean[:, 1]),
            kl_scales=tuple(estimates[len(self.PARTS) : scales_end]),
            kl_groups=tuple(estimates[scales_end:]) or None,
            t_start={"diffusion": self.time_eps, "ode": self.model.sampling.ode_eps, None: None}[self.method],
            tol=self.tol if self.method == "ode" else None,
            nfe=sum(part.evaluations for part in found) / (n * self.draws),
            importance_weighted=self._importance_weighted(values[:, :, 0]),
            # The difference of two estimates has twice the variance of one.
            probe_std=float((torch.cat(squares).mean() / 2.0).sqrt()) if squares else None,
            trace=self.trace if self.method == "ode" else None,
            probes=self.probes if self.method == "ode" else None,
            draw_std=float(values[:, :, 0].var(dim=1).mean().sqrt()) if self.draws > 1 else None,
            seconds=seconds,
            values=mean[:, 0].clone(),
            **dict(zip(self.PARTS, estimates, strict=False)),
        )

    def _importance_weighted(self, nelbo: Tensor) -> Estimate | None:
        """Of (images, draws)."""
        if self.draws == 1 or self.method == "diffusion":
            return None
        return Estimate.of(math.log(self.draws) - torch.logsumexp(-nelbo, dim=1))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dataclasses.asdict(value) if isinstance(value, Estimate) else value


def _limited(batches: Iterable[Any], limit: int | None) -> Iterator[Tensor]:
    """The images of the batches, up to ``limit``; never asks for a batch that it does not need."""
    left = limit
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch.images
        if left is not None:
            images = images[:left]
            left -= images.shape[0]
        if images.shape[0]:
            yield images
        if left == 0:
            return


def _placed(batches: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Every batch with the position of its first image."""
    first = 0
    for images in batches:
        yield first, images
        first += images.shape[0]


def out_of_distribution(inside: NelboReport, outside: NelboReport) -> Estimate:
    """How well the bound tells two data sets apart: the probability that an image of ``outside`` has the larger NELBO.

    The area under the receiver operating characteristic with NELBO as the score: 0.5 is chance, 1 is perfect. Below
    0.5 the model finds the foreign images likelier than its own kind, which likelihoods are known to do (Nalisnick et
    al. 2019, "Do deep generative models know what they don't know?").

    Returns:
        The area, and its standard error by DeLong et al. 1988: with the share v_i of outside images above the i-th
        inside one and the share w_j of inside images below the j-th outside one (ties count half), the square root of
        ``var(v) / inside images + var(w) / outside images``. It is 0 where the sets do not overlap, which says no more
        than that these images show no error. None where one set is a single image.
    """
    from scipy.stats import rankdata  # takes long to import

    a, b = inside.values.numpy(), outside.values.numpy()
    pooled = rankdata(np.concatenate((a, b)))  # those of ties are averaged
    above = 1.0 - (pooled[: len(a)] - rankdata(a)) / len(b)
    below = (pooled[len(a) :] - rankdata(b)) / len(a)
    error = None
    if min(len(a), len(b)) > 1:
        error = math.sqrt(above.var(ddof=1) / len(a) + below.var(ddof=1) / len(b))
    return Estimate(float(below.mean()), error)
