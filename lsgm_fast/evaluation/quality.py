"""Quality of generated images against images of the data, without a network from elsewhere, and two sets compared."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lsgm_fast import distributed, random
from lsgm_fast.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    manifold_values,
    nearest_distances,
)
from lsgm_fast.evaluation.features import (
    FeatureExtractor,
    FeatureStatistics,
    as_metrics_see,
    binary_draws,
    gather_rows,
)
from lsgm_fast.models.lsgm import DEFAULT_BATCH_SIZE, LSGM

_LEAST = 10  # images of a set; fewer say nothing, and a bootstrap could draw a single one again and again
_P_VALUE = 1e-3


@dataclass(frozen=True)
class Interval:
    """A figure, its standard error, and its 95% interval; None where no bootstrap was asked for.

    The interval has the quantiles of the bootstrap, moved so that the bootstrap's mean is the figure: resampling adds
    a bias (to Frechet distances above all), which is not taken for uncertainty.
    """

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, replicates: Tensor) -> Interval:
        """From the figures (R,) of R resampled sets; R = 0: the figure alone."""
        if replicates.numel() < 2:
            return cls(value)
        centred = replicates.double() - replicates.double().mean()
        low, high = (float(q) for q in centred.quantile(centred.new_tensor([0.025, 0.975])))
        return cls(value, float(centred.std()), value + low, value + high)


@dataclass(frozen=True)
class Memorisation:
    """Whether generated images are nearer to the training images than images are that were not trained on.

    Euclidean distances to the nearest training image. Images copied from the training set give small ones; so do, in
    pixels, images that are plainer or smoother than the data, and in features images that are very typical. A flag is
    a reason to look at the nearest pairs, not a proof.

    Attributes:
        threshold: the ``quantile`` of the distances of held-out images. share: of the generated images that are as
            near as that or nearer; about ``quantile`` where nothing is copied. share_p: one-sided p-value of that
            (Fisher's exact test). It finds copies among images that are new for the most part.
        u, u_p: Mann-Whitney statistic of the two sets of distances, and one-sided p-value of the generated images
            being nearer as a whole.
        median, held_out_median: of the distances. flagged: a p-value is below 0.001.
    """

    quantile: float
    threshold: float
    share: float
    share_p: float
    u: float
    u_p: float
    median: float
    held_out_median: float
    flagged: bool


def memorisation(generated: Tensor, held_out: Tensor, *, quantile: float = 0.01) -> Memorisation:
    """Of distances to the nearest training image (:func:`nearest_distances`), (n,) and (m,).

    Raises:
        ValueError: an empty set, or a quantile outside of (0, 1).
    """
    from scipy.stats import fisher_exact, mannwhitneyu

    if not 0.0 < quantile < 1.0:
        raise ValueError(f"quantile must be between 0 and 1, got {quantile}")
    if not generated.numel() or not held_out.numel():
        raise ValueError(f"expected distances of both sets, got {generated.numel()} and {held_out.numel()}")
    generated, held_out = generated.double(), held_out.double()
    threshold = float(held_out.quantile(quantile))
    near, near_held_out = (int((d <= threshold).sum()) for d in (generated, held_out))
    table = [[near, len(generated) - near], [near_held_out, len(held_out) - near_held_out]]
    share_p = float(fisher_exact(table, alternative="greater").pvalue)
    test = mannwhitneyu(generated.numpy(), held_out.numpy(), alternative="less")
    return Memorisation(
        quantile=quantile,
        threshold=threshold,
        share=near / len(generated),
        share_p=share_p,
        u=float(test.statistic),
        u_p=float(test.pvalue),
        median=float(generated.median()),
        held_out_median=float(held_out.median()),
        flagged=min(share_p, float(test.pvalue)) < _P_VALUE,
    )


METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage", "class_distance", "confidence")
"""The figures of a :class:`QualityReport` that have intervals, and that :func:`compare_quality` compares."""


@dataclass(frozen=True)
class QualityReport:
    """What :func:`evaluate_quality` found.

    Attributes:
        features: identity of the network. frechet_name, kernel_name: what to call the two distances.
        samples, reference: numbers of images. reference_digest: hash of the reference's images. quantised: whether
            the generated images were rounded to 8 bits. seed, bootstrap: of the intervals, and how many sets were
            drawn for them. k_precision, k_density: neighbours.
        frechet, kernel: distances (:func:`frechet_distance`, :func:`kernel_distance`); the standard error of the
            second is that of the jackknife. precision, recall, density, coverage: :func:`manifold_values`, with
            intervals for fixed manifolds.
        classes: labels. class_shares, reference_class_shares: share of the images that the classifier takes for each
            class. class_distance: total variation of the two, ``sum |p - q| / 2``. confidence: mean of the largest
            class probability; reference_confidence: of the reference. None without classes.
        memorisation_pixels, memorisation_features: None without training images.
        seconds: wall clock. replicates: figures of the bootstrap by metric, (bootstrap,) float64.
    """

    features: str
    frechet_name: str
    kernel_name: str
    samples: int
    reference: int
    reference_digest: str
    quantised: bool
    seed: int
    bootstrap: int
    k_precision: int
    k_density: int
    frechet: Interval
    kernel: Interval
    precision: Interval
    recall: Interval
    density: Interval
    coverage: Interval
    classes: tuple[int, ...] | None
    class_shares: tuple[float, ...] | None
    reference_class_shares: tuple[float, ...] | None
    class_distance: Interval | None
    confidence: Interval | None
    reference_confidence: float | None
    memorisation_pixels: Memorisation | None
    memorisation_features: Memorisation | None
    seconds: float
    replicates: dict[str, Tensor] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but ``replicates``, as JSON-serialisable objects."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "replicates"]
        return {name: _plain(getattr(self, name)) for name in fields}


def evaluate_quality(
    samples: Tensor | Iterable[Any],
    reference: Tensor | Iterable[Any],
    extractor: FeatureExtractor,
    *,
    training: Tensor | Iterable[Any] | None = None,
    quantise: bool = True,
    bootstrap: int = 200,
    seed: int = 0,
    k_precision: int = 3,
    k_density: int = 5,
    quantile: float = 0.01,
    batch_size: int = 256,
) -> QualityReport:
    """Compare generated images with images of the data, in the features of a network.

    A classifier's features hold what its classes depend on, and little of noise or texture that they do not. Such
    faults show in the features of the Inception network, and in :func:`~lsgm_fast.evaluation.evaluate_nelbo`.

    Sets of images are tensors (N, C, H, W), uint8 or float in [0, 1], or batches of them (or objects that have them
    as ``.images``), so that a large set need not be in memory. Generated images should be of the data's kind: of
    binary data, draws of the pixels and not their probabilities.

    In a process group every process gives a share of the samples, at least one image, and the whole of the other
    sets. The shares are pooled, in the order of the ranks, and every process returns the report of the whole.

    Args:
        samples: generated images. reference: images of the data; held-out ones say most.
        extractor: a :class:`Classifier` of the data, or :class:`InceptionFeatures` for FID and KID. (Frechet distances
            of different numbers of images, or in different features, cannot be compared.)
        training: the images that the model was trained on, for the test of memorisation; ``reference`` must then be
            images that it was not trained on.
        quantise: round the generated images to 8 bits as a PNG does; False: as the published FIDs were computed. The
            images of the data are 8-bit in any case.
        bootstrap: how many times both sets are drawn again with replacement for the intervals; 0: none. Every one
            costs an eigen-decomposition of the size of the features: for FID, 0 is the practical choice.
        seed: of the bootstrap; the draws depend on it and the numbers of images alone.
        k_precision, k_density: neighbours, as for :func:`manifold_values`. quantile: as for :func:`memorisation`.
        batch_size: images that the network has at a time, where they come as a tensor.

    Raises:
        ValueError: images that are not finite or not of the network's shape, fewer than 10 in a set (or than the
            neighbours need), a negative bootstrap.
    """
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be 0 or more, got {bootstrap}")
    start = time.perf_counter()
    seen = None if training is None else _Set.of(training, extractor, True, batch_size, keep=True)
    data = _Set.of(reference, extractor, True, batch_size, training=seen)
    made = _Set.of(samples, extractor, quantise, batch_size, training=seen).gathered()
    x, y = made.features, data.features
    for name, count in (("samples", len(x)), ("reference", len(y))):
        if count < _LEAST:
            raise ValueError(f"expected at least {_LEAST} images in each set, got {count} in {name}")
    weights_x = bootstrap_weights(len(x), bootstrap, seed, "quality.samples")
    weights_y = bootstrap_weights(len(y), bootstrap, seed, "quality.reference")

    values = {"frechet": frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))}
    pairs = zip(weights_x, weights_y, strict=True)
    resampled = [frechet_distance(FeatureStatistics.of(x, w), FeatureStatistics.of(y, v)) for w, v in pairs]
    replicates = {"frechet": torch.tensor(resampled, dtype=torch.float64)}
    kernel = kernel_distance(x, y, weights_x=weights_x, weights_y=weights_y)
    values["kernel"], replicates["kernel"] = kernel.value, kernel.weighted
    single = manifold_values(x, y, k_precision=k_precision, k_density=k_density)
    for name, of_image, weights in (
        ("precision", single.precision, weights_x),
        ("recall", single.recall, weights_y),
        ("density", single.density, weights_x),
        ("coverage", single.coverage, weights_y),
    ):
        values[name], replicates[name] = float(of_image.mean()), weights @ of_image / len(of_image)
    shares = shares_of_data = confidence_of_data = None
    if made.probabilities is not None and data.probabilities is not None:
        hits, hits_of_data = (_one_hot(p) for p in (made.probabilities, data.probabilities))
        shares, shares_of_data = hits.mean(dim=0), hits_of_data.mean(dim=0)
        values["class_distance"] = float((shares - shares_of_data).abs().sum()) / 2.0
        difference = weights_x @ hits / len(x) - weights_y @ hits_of_data / len(y)
        replicates["class_distance"] = difference.abs().sum(dim=1) / 2.0
        sure = made.probabilities.amax(dim=1)
        values["confidence"], replicates["confidence"] = float(sure.mean()), weights_x @ sure / len(x)
        confidence_of_data = float(data.probabilities.amax(dim=1).mean())
    intervals = {name: Interval.of(values[name], replicates[name]) for name in values}
    intervals["kernel"] = dataclasses.replace(intervals["kernel"], standard_error=kernel.standard_error)

    in_pixels = in_features = None
    if seen is not None:
        assert made.nearest is not None and data.nearest is not None
        in_pixels = memorisation(made.nearest, data.nearest, quantile=quantile)
        in_features = memorisation(
            nearest_distances(x, seen.features), nearest_distances(y, seen.features), quantile=quantile
        )
    return QualityReport(
        features=extractor.identity,
        frechet_name=extractor.frechet_name,
        kernel_name=extractor.kernel_name,
        samples=len(x),
        reference=len(y),
        reference_digest=data.digest,
        quantised=quantise,
        seed=seed,
        bootstrap=bootstrap,
        k_precision=k_precision,
        k_density=k_density,
        classes=extractor.classes,
        class_shares=None if shares is None else tuple(shares.tolist()),
        reference_class_shares=None if shares_of_data is None else tuple(shares_of_data.tolist()),
        reference_confidence=confidence_of_data,
        memorisation_pixels=in_pixels,
        memorisation_features=in_features,
        seconds=time.perf_counter() - start,
        replicates=replicates,
        **{name: intervals.get(name) for name in METRICS},  # type: ignore[arg-type]
    )


def draw_share(
    model: LSGM, samples: int, seed: int, binary: bool, *, progress: bool = False, **options: Any
) -> Tensor:
    """This process's share of the images that a model is judged by, for :func:`evaluate_quality`.

    Whole batches of at most 64, in the order of the ranks, so every image is the one of a single process
    (``model.sample(samples, seed=seed)``), bit for bit. Only where there would be fewer batches than processes are
    they made smaller: the images of a solver whose step sizes are a batch's are then those of one process to within
    its tolerance. With ``bn="batch"``, whose statistics are taken over all processes, every process draws all images
    (which leaves the statistics as they are, up to rounding) and keeps its share: that is no faster.

    Args:
        samples: images of all processes. seed: of the draws. binary: draw the pixels from their probabilities.
        options: ``solver``, ``tol``, ``evaluations``, ``ode_eps``, ``temperature`` and ``bn``, as for ``model.sample``.

    Returns:
        (n, C, H, W) float32 in [0, 1], n at least 1.

    Raises:
        ValueError: fewer samples than processes. ValueError, NonFiniteError: as ``model.sample``; in every process
            where one of them fails.
    """
    world, rank = distributed.world_size(), distributed.rank()
    if samples < world:
        raise ValueError(
            f"{samples} samples cannot be shared among {world} processes: draw more, or use fewer"
        )
    bn = options.pop("bn", None)
    size = DEFAULT_BATCH_SIZE if samples > (world - 1) * DEFAULT_BATCH_SIZE else samples // world
    starts = range(0, samples, size)
    mine = starts[rank * len(starts) // world : (rank + 1) * len(starts) // world]
    together = (model.sampling.bn if bn is None else bn) == "batch"
    drawn, failure = [], None
    try:
        for first in starts if together else mine:
            n = min(size, samples - first)
            z, _ = model.sample_latents(n, seed=seed, first_index=first, progress=progress, **options)
            images = model.decode(z, lower_noise=model._draw_lower(n, seed, first), bn=bn).float()
            if first in mine:
                drawn.append(binary_draws(images, seed, first) if binary else images)
    except Exception as error:
        failure = error
    distributed.gather_objects(None, failure)
    return torch.cat(drawn)


def compare_quality(a: QualityReport, b: QualityReport) -> dict[str, Interval]:
    """``a - b`` of every figure in :data:`METRICS` that both have, with paired bootstrap intervals.

    For two sets of images from the same noise in the same order: two solvers, precisions or checkpoints. Both
    bootstraps drew the same images, so what the two sets share cancels, and the intervals are far narrower than those
    of the reports. An interval that holds 0 shows no difference.

    Raises:
        ValueError: reports that differ in network, reference, numbers of images, neighbours, seed or bootstrap, or
            that have no bootstrap.
    """
    same = (
        "features",
        "samples",
        "reference",
        "reference_digest",
        "seed",
        "bootstrap",
        "k_precision",
        "k_density",
    )
    for name in same:
        first, second = getattr(a, name), getattr(b, name)
        if first != second:
            raise ValueError(
                f"a paired comparison needs reports that differ in the samples alone, got {name} {first!r} and "
                f"{second!r}: evaluate both with the same"
            )
    if a.bootstrap < 2:
        raise ValueError(f"a comparison needs reports with bootstrap of at least 2, got {a.bootstrap}")
    differences = {}
    for name in METRICS:
        one, other = getattr(a, name), getattr(b, name)
        if one is not None and other is not None:
            resampled = a.replicates[name] - b.replicates[name]
            differences[name] = Interval.of(one.value - other.value, resampled)
    return differences


def bootstrap_weights(count: int, replicates: int, seed: int, name: str) -> Tensor:
    """How often each of ``count`` images is drawn, when as many are drawn with replacement, ``replicates`` times.

    A function of the arguments alone (:mod:`lsgm_fast.random`).

    Returns:
        (replicates, count) float64; every row adds up to ``count``.
    """
    weights = torch.zeros(replicates, count, dtype=torch.float64)
    uniform = random.uniform(seed, range(replicates), name, (count,), dtype=torch.float64)
    drawn = (uniform * count).long()
    return weights.scatter_add_(1, drawn, torch.ones_like(uniform))


@dataclass(frozen=True)
class _Set:
    """A set of images as the metrics need it: (n, ...) float64 on the CPU."""

    features: Tensor
    probabilities: Tensor | None
    pixels: Tensor | None
    nearest: Tensor | None
    digest: str

    @classmethod
    def of(
        cls,
        images: Tensor | Iterable[Any],
        extractor: FeatureExtractor,
        quantise: bool,
        batch_size: int,
        *,
        keep: bool = False,
        training: _Set | None = None,
    ) -> _Set:
        """``keep``: the pixels, to be near to. ``training``: a set that kept them."""
        features, probabilities, pixels, nearest = [], [], [], []
        digest = hashlib.sha256()
        for batch in _batches(images, batch_size):
            batch = as_metrics_see(batch, quantise=quantise)
            digest.update(batch.numpy().tobytes())
            own, classes = extractor.extract(batch)
            features.append(own.cpu().double())
            if classes is not None:
                probabilities.append(classes.cpu().double())
            if keep:
                pixels.append(batch.flatten(1).double())
            if training is not None and training.pixels is not None:
                nearest.append(nearest_distances(batch.flatten(1), training.pixels))
        if not features:
            raise ValueError("there are no images to evaluate: the batches are empty")
        return cls(
            features=torch.cat(features),
            probabilities=torch.cat(probabilities) if probabilities else None,
            pixels=torch.cat(pixels) if pixels else None,
            nearest=torch.cat(nearest) if nearest else None,
            digest=digest.hexdigest(),
        )

    def gathered(self) -> _Set:
        """The set of all processes; pixels and digest stay those of the share."""
        return dataclasses.replace(
            self,
            features=gather_rows(self.features),
            probabilities=None if self.probabilities is None else gather_rows(self.probabilities),
            nearest=None if self.nearest is None else gather_rows(self.nearest),
        )


def _batches(images: Tensor | Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    parts = images.split(batch_size) if isinstance(images, Tensor) else images
    for part in parts:
        part = part if isinstance(part, Tensor) else part.images
        if part.shape[0]:
            yield part


def _one_hot(probabilities: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).double()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value
