"""Distances between two sets of images by their features. All arithmetic is in float64, in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm_fast.evaluation.features import FeatureStatistics

# Entries of a block of a matrix of distances or kernels: 128 MB.
_BLOCK = 1 << 24


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982)::

        |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a^1/2 S_b S_a^1/2)^1/2)

    FID is this of Inception features (Heusel et al. 2017). The last trace is the sum of the singular values of
    ``S_a^1/2 S_b^1/2``, the roots by symmetric eigen-decompositions: unlike a general matrix root, that exists for
    singular covariances (fewer images than features), is never complex and loses no digits. Sets of finite size are
    biased upwards: compare only figures of the same number of images.

    Raises:
        ValueError: features of different sizes, or fewer than 2 images in a set.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"expected features of one size, got {a.mean.shape[0]} and {b.mean.shape[0]}: use one network for both"
        )
    cov_a, cov_b = a.covariance, b.covariance
    overlap = torch.linalg.svdvals(_half_root(cov_a).T @ _half_root(cov_b)).sum()
    value = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * overlap
    return max(float(value), 0.0)  # rounding of equal sets


def _half_root(covariance: Tensor) -> Tensor:
    """A with A A^T = the covariance; the singular values above are those of the symmetric roots."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0.0).sqrt()


@dataclass(frozen=True)
class KernelDistance:
    """``value``: the estimate. ``standard_error``: by the jackknife. ``weighted``: (R,) float64, of each weighting."""

    value: float
    standard_error: float
    weighted: Tensor


def kernel_distance(
    x: Tensor, y: Tensor, *, weights_x: Tensor | None = None, weights_y: Tensor | None = None
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy under ``k(u, v) = (u.v / F + 1)^3`` (Binkowski et al. 2018)::

        sum_(i != j) k(x_i, x_j) / (n (n - 1)) + sum_(i != j) k(y_i, y_j) / (m (m - 1)) - 2 sum_ij k(x_i, y_j) / (n m)

    KID is this of Inception features (usually averaged over subsets of 1000; here of all pairs, which varies less).
    Its mean is 0 for equal distributions, so it can be negative. The standard error is that of the two-sample
    jackknife: each image of either set left out in turn.

    Args:
        x, y: features (n, F) and (m, F), at least 3 each.
        weights_x, weights_y: (R, n) and (R, m): how often every image counts, for ``weighted``. Pairs of an image
            with itself are left out, so that a bootstrap stays unbiased.

    Raises:
        ValueError: fewer than 3 features or of different sizes.
    """
    x, y = _pair(x, y, least=3)
    n, m = x.shape[0], y.shape[0]
    wx, wy = (_with_ones(w, count) for w, count in ((weights_x, n), (weights_y, m)))
    total_x, rows_x = _within(x, wx)
    total_y, rows_y = _within(y, wy)
    total_xy, rows_xy, columns_xy = _across(x, y, wx, wy)
    size_x, size_y = wx.sum(dim=1), wy.sum(dim=1)
    pairs_x, pairs_y = (w.sum(dim=1).square() - w.square().sum(dim=1) for w in (wx, wy))
    values = total_x / pairs_x + total_y / pairs_y - 2.0 * total_xy / (size_x * size_y)
    sum_x, sum_y, sum_xy = total_x[0], total_y[0], total_xy[0]
    term_x, term_y = sum_x / (n * (n - 1)), sum_y / (m * (m - 1))
    without_x = (
        (sum_x - 2.0 * rows_x) / ((n - 1) * (n - 2)) + term_y - 2.0 * (sum_xy - rows_xy) / ((n - 1) * m)
    )
    without_y = (
        term_x + (sum_y - 2.0 * rows_y) / ((m - 1) * (m - 2)) - 2.0 * (sum_xy - columns_xy) / (n * (m - 1))
    )
    variance = sum((k.shape[0] - 1) * k.var(correction=0) for k in (without_x, without_y))
    return KernelDistance(float(values[0]), math.sqrt(float(variance)), values[1:])


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _within(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pairs of different rows by weighting, and each row's sum for weights 1 (the first weighting)."""
    total, rows = torch.zeros(len(weights), dtype=torch.float64), []
    own = (x.square().sum(dim=1) / x.shape[1] + 1.0) ** 3
    for part in _blocks(x.shape[0], x.shape[0]):
        sums = _kernel(x[part], x) @ weights.T - own[part, None] * weights[:, part].T
        total += (weights[:, part].T * sums).sum(dim=0)
        rows.append(sums[:, 0])
    return total, torch.cat(rows)


def _across(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, rows = torch.zeros(len(wx), dtype=torch.float64), []
    columns = torch.zeros(y.shape[0], dtype=torch.float64)
    for part in _blocks(x.shape[0], y.shape[0]):
        kernel = _kernel(x[part], y)
        sums = kernel @ wy.T
        total += (wx[:, part].T * sums).sum(dim=0)
        rows.append(sums[:, 0])
        columns += kernel.sum(dim=0)
    return total, torch.cat(rows), columns


def _with_ones(weights: Tensor | None, count: int) -> Tensor:
    ones = torch.ones(1, count, dtype=torch.float64)
    return ones if weights is None else torch.cat([ones, weights.double()])


@dataclass(frozen=True)
class ManifoldValues:
    """What single images add: the metrics are the means. All float64.

    ``precision``, ``density``: (n,) of the generated images. ``recall``, ``coverage``: (m,) of the reference.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def manifold_values(
    generated: Tensor, reference: Tensor, *, k_precision: int = 3, k_density: int = 5
) -> ManifoldValues:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), image by image.

    The manifold of a set is the union of balls around its points that reach to their k-th nearest neighbours in the
    set. With ``B_k(v)`` such a ball:

    - precision: share of the generated x that lie in the reference's manifold; recall: the reverse;
    - density: mean over the generated of ``#{reference v: x in B_k(v)} / k``, 1 for equal distributions, and more
      robust to outliers of the reference;
    - coverage: share of the reference's balls that hold a generated image.

    Args:
        generated, reference: features (n, F) and (m, F), each more than the larger k.
        k_precision, k_density: neighbours of the balls of the first and the second pair; defaults of the papers.

    Raises:
        ValueError: k below 1, too few features or of different sizes.
    """
    if min(k_precision, k_density) < 1:
        raise ValueError(f"k must be at least 1, got k_precision={k_precision}, k_density={k_density}")
    generated, reference = _pair(generated, reference, least=max(k_precision, k_density) + 1)
    radius = _radii(generated, [k_precision])[:, 0]
    wide = _radii(reference, [k_precision, k_density])
    n, m = generated.shape[0], reference.shape[0]
    precision, density = [], []
    recall, coverage = (torch.zeros(m, dtype=torch.bool) for _ in range(2))
    for part in _blocks(n, m):
        distances = torch.cdist(generated[part], reference)
        inside = distances <= wide[:, 1]
        precision.append((distances <= wide[:, 0]).any(dim=1))
        density.append(inside.sum(dim=1).double() / k_density)
        recall |= (distances <= radius[part, None]).any(dim=0)
        coverage |= inside.any(dim=0)
    return ManifoldValues(
        torch.cat(precision).double(), recall.double(), torch.cat(density), coverage.double()
    )


def nearest_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of every row of x (n, F) to the nearest of y (m, F): (n,) float64."""
    x, y = _pair(x, y, least=0)
    if not y.shape[0]:
        raise ValueError("there is nothing to be near to: the second set is empty")
    parts = [torch.cdist(x[part], y).amin(dim=1) for part in _blocks(x.shape[0], y.shape[0])]
    return torch.cat([x.new_zeros(0), *parts])


def _radii(x: Tensor, neighbours: list[int]) -> Tensor:
    """(n, len(neighbours)): distances to those neighbours, the point itself not counted."""
    parts = []
    for part in _blocks(x.shape[0], x.shape[0]):
        distances = torch.cdist(x[part], x)
        rows = torch.arange(distances.shape[0])
        distances[rows, rows + part.start] = math.inf
        nearest = distances.topk(max(neighbours), dim=1, largest=False).values
        parts.append(nearest[:, [k - 1 for k in neighbours]])
    return torch.cat(parts)


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected features (n, F) and (m, F), got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(x.shape[0], y.shape[0]) < least:
        raise ValueError(f"expected at least {least} images in each set, got {x.shape[0]} and {y.shape[0]}")
    return x.detach().cpu().double(), y.detach().cpu().double()


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
