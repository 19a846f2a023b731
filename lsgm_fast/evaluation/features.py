"""Features of images and their statistics: what distances between two sets of images are measured in."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lsgm_fast import distributed, random
from lsgm_fast.images import to_uint8


class FeatureExtractor(Protocol):
    """A network whose features images are compared in: a :class:`Classifier`, or :class:`InceptionFeatures`.

    ``classes``: labels, None where it has none of the data. ``identity``: what the network is, for reports.
    ``frechet_name``, ``kernel_name``: what the two distances in its features are called.
    """

    identity: str
    frechet_name: str
    kernel_name: str

    @property
    def classes(self) -> tuple[int, ...] | None: ...

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) in [0, 1] -> features (B, F), and probabilities (B, classes) where there are classes."""
        ...


class InceptionFeatures:
    """The features of FID and KID: the last pooling layer (2048) of the Inception network of 2015, by ``pytorch-fid``.

    Of the libraries, pytorch-fid is the one whose network, weights and resizing the published LSGM figures used, and
    it takes float images, which torch-fidelity (and so torchmetrics) refuses: so the published protocol
    (``quantise=False``) is possible. Its distances are not used but those of this package, which pool over processes.
    Grey images are repeated to three channels; images are resized to 299x299 by the network.

    Needs the extra ``fid``, and its weights (95 MB), which are never fetched here.

    Raises:
        ModuleNotFoundError: pytorch-fid is not installed; names the extra.
        FileNotFoundError: the weights are not there; names their address and where they belong.
    """

    frechet_name = "FID"
    kernel_name = "KID"
    classes = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            inception = importlib.import_module("pytorch_fid.inception")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"FID and KID need the package {error.name}, which is not installed: "
                'pip install "lsgm-fast[fid]"',
                name=error.name,
            ) from None
        url = inception.FID_WEIGHTS_URL
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not file.is_file():
            raise FileNotFoundError(
                f"FID and KID need the weights of the Inception network, and there is no {file}: fetch {url} and put "
                "it there (TORCH_HOME moves that folder)"
            )
        self.identity = file.stem
        self.device = torch.device(device)
        block = inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]
        self.network = inception.InceptionV3([block], resize_input=True, normalize_input=True)
        self.network.to(self.device).eval()

    @torch.no_grad()
    def extract(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, 1 or 3, H, W) in [0, 1] -> (B, 2048)."""
        images = images.to(self.device, torch.float32)
        return self.network(images.expand(-1, 3, -1, -1))[0].flatten(1), None


class FeatureStatistics:
    """Count n, mean and sum of squared deviations of features, in float64, for sets of any size.

    Parts are merged by the formula of Chan, Golub and LeVeque (1979): with ``d = mean_b - mean_a``::

        n = n_a + n_b
        mean = mean_a + d n_b / n
        M2 = M2_a + M2_b + d d^T n_a n_b / n

    so the statistics of a set do not depend on how it is cut into batches or shared among processes, but for
    rounding. (Averaging the covariances of the parts instead leaves out what lies between their means.)

    Args:
        dims: size F of the features.
    """

    def __init__(self, dims: int) -> None:
        self.count = 0.0
        self.mean = torch.zeros(dims, dtype=torch.float64)
        self.m2 = torch.zeros(dims, dims, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> FeatureStatistics:
        """Of features (N, F), each counted ``weights`` (N,) times; None: once."""
        statistics = cls(features.shape[1])
        statistics.update(features, weights)
        return statistics

    def update(self, features: Tensor, weights: Tensor | None = None) -> None:
        """Take features (N, F) in, each counted ``weights`` (N,) times; None: once.

        Raises:
            ValueError: another shape, or NaN or infinity among the features.
        """
        dims = self.mean.shape[0]
        if features.ndim != 2 or features.shape[1] != dims:
            raise ValueError(f"expected features of shape (N, {dims}), got {tuple(features.shape)}")
        features = features.detach().cpu().double()
        if not bool(torch.isfinite(features).all()):
            raise ValueError("the features hold NaN or infinity: look at the images they come from")
        weights = features.new_ones(features.shape[0]) if weights is None else weights.double()
        count = float(weights.sum())
        if count:
            mean = weights @ features / count
            deviation = features - mean
            self._merge(count, mean, (weights[:, None] * deviation).T @ deviation)

    def merge(self, other: FeatureStatistics) -> None:
        """Take the features of another part in."""
        self._merge(other.count, other.mean, other.m2)

    def pooled(self) -> FeatureStatistics:
        """Of the features of all processes, the same in every one of them; some may have none."""
        dims = self.mean.shape[0]
        packed = torch.cat([self.mean.new_tensor([self.count]), self.mean, self.m2.flatten()])
        whole = FeatureStatistics(dims)
        for part in distributed._all_gather(packed).unbind():
            whole._merge(float(part[0]), part[1 : dims + 1], part[dims + 1 :].reshape(dims, dims))
        return whole

    @property
    def covariance(self) -> Tensor:
        """(F, F) with divisor n - 1.

        Raises:
            ValueError: fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count:.0f}")
        return self.m2 / (self.count - 1)

    def _merge(self, count: float, mean: Tensor, m2: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.m2 = self.m2 + m2 + torch.outer(difference, difference) * (self.count * count / total)
        self.count = total


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all processes, in the order of the ranks; their numbers may differ, n = 0 included."""
    if distributed.world_size() == 1:
        return rows
    counts = distributed._all_gather(torch.tensor([rows.shape[0]], device=rows.device))[:, 0].tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = distributed._all_gather(padded.flatten()).reshape(len(counts), *padded.shape)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def binary_draws(images: Tensor, seed: int, first_index: int = 0) -> Tensor:
    """Draws of binary pixels, 0 or 1, from their probabilities (N, C, H, W), keyed by the seed and the place in N.

    What a model of binary images returns are probabilities; its data are such draws. Of a share of the images,
    ``first_index`` is the place of its first.
    """
    indices = range(first_index, first_index + images.shape[0])
    threshold = random.uniform(seed, indices, "quality.pixels", images.shape[1:])
    return (threshold.to(images.device) < images).float()


def as_metrics_see(images: Tensor, *, quantise: bool = True) -> Tensor:
    """Images as float32 in [0, 1] on the CPU, rounded to 8 bits as in a PNG (:func:`lsgm_fast.images.to_uint8`).

    Args:
        images: (N, 1 or 3, H, W), uint8, or float in [0, 1].
        quantise: False: float images as they are, which is how the published FIDs were computed. A model that is
            compared with 8-bit data is then judged by more than anyone can see.

    Raises:
        ValueError: another shape or dtype, NaN or infinity; without quantisation, values outside of [0, 1].
    """
    if images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"expected images of shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
        return images.cpu().float() / 255.0
    rounded = to_uint8(images)  # checks them in any case
    if quantise:
        return torch.from_numpy(rounded).permute(0, 3, 1, 2).float() / 255.0
    images = images.detach().cpu().float()
    if images.numel():
        low, high = (float(end) for end in torch.aminmax(images))
        if low < 0.0 or high > 1.0:
            raise ValueError(
                f"expected images in [0, 1], got values from {low:g} to {high:g}: clip them first"
            )
    return images
