"""A small classifier that the evaluation trains itself: features for sample quality where no network can be fetched."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from lsgm_fast import distributed, env, random
from lsgm_fast.config import _Config, _require
from lsgm_fast.data import DataConfig, ImageSource, batches
from lsgm_fast.data.order import permutation
from lsgm_fast.files import atomic_path
from lsgm_fast.reference.philox_normal import check_seed

logger = logging.getLogger("lsgm_fast")

_GROUPS = 8


@dataclass(frozen=True)
class ClassifierConfig(_Config):
    """Architecture and training of the classifier; a part of the name that it is stored under.

    ``width``: channels of the first layer, a multiple of 8 (later ones have 2 and 4 times as many). ``features``: size
    of the last hidden layer. Training: Adam (Kingma and Ba 2015) from ``learning_rate``, which falls to 0 along half a
    cosine, in ``epochs`` passes with batches of ``batch_size``. Every image is moved by up to ``shift`` of its size
    in each pass (borders repeated), without which the features of images learned by heart stand apart from those of
    others. ``seed``: of the weights, the order and the moves.
    """

    width: int = 16
    features: int = 64
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-3
    shift: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "features", "epochs", "batch_size"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, f"{name} must be at least 1, got {value!r}")
        _require(self.width % _GROUPS == 0, f"width must be a multiple of {_GROUPS}, got {self.width}")
        _require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate!r}")
        _require(0 <= self.shift < 0.5, f"shift must be from 0 to below 0.5, got {self.shift!r}")
        check_seed(self.seed)


class Classifier(nn.Module):
    """Convolutions 3x3 with GroupNorm and SiLU, a hidden layer, and one linear layer to the classes.

    The first convolution keeps the size, every further one halves it, until at most 8 pixels are left (twice at
    least). The features are those of the hidden layer, after its SiLU.

    Args:
        shape: (C, H, W) of the images, C = 1 or 3, H and W at least 8.
        classes: label of every class; at least two.

    Attributes:
        accuracy: share of the held-out images that are classified correctly, None before that is known.
        identity: hash of data, configuration and version of the package; names the features in reports.
        frechet_name, kernel_name: what the distances in these features are called (never FID or KID, which are
            those of the Inception network).
    """

    frechet_name = "classifier Frechet distance"
    kernel_name = "classifier kernel distance"

    def __init__(
        self, config: ClassifierConfig, shape: tuple[int, int, int], classes: tuple[int, ...]
    ) -> None:
        super().__init__()
        channels, height, width = shape
        if channels not in (1, 3) or min(height, width) < 8:
            raise ValueError(
                f"the classifier takes images (1 or 3, H, W) of at least 8 x 8 pixels, got {shape}"
            )
        if len(classes) < 2:
            raise ValueError(f"a classifier needs labels of at least 2 classes, got {list(classes)}")
        self.config, self.shape, self.classes = config, shape, classes
        self.accuracy: float | None = None
        self.identity = ""
        halvings = max(2, math.ceil(math.log2(max(height, width) / 8)))
        layers: list[nn.Module] = []
        for i in range(halvings + 1):
            out = config.width * 2 ** min(i, 2)
            layers += [
                nn.Conv2d(channels, out, 3, stride=2 if i else 1, padding=1),
                nn.GroupNorm(_GROUPS, out),
                nn.SiLU(),
            ]
            channels = out
            if i:
                height, width = -(-height // 2), -(-width // 2)
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels * height * width, config.features)
        self.output = nn.Linear(config.features, len(classes))

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, ``config.features``)."""
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"the classifier takes images {self.shape}, got {tuple(images.shape[1:])}")
        return nn.functional.silu(self.hidden(self.convolutions(2.0 * images - 1.0).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.output(self.features(images))

    @torch.no_grad()
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and class probabilities (B, classes) of images on any device."""
        features = self.features(images.to(self.output.weight))
        return features, self.output(features).softmax(dim=1)


def load_images(source: ImageSource, data: DataConfig) -> Tensor:
    """All images of a source as an evaluation gives them to a model: not mirrored, binarised where ``data`` says so.

    Returns:
        (N, C, H, W) uint8.
    """
    passed = batches(source, data, batch_size=512, seed=0, train=False)
    return torch.cat([(batch.images * 255.0).round().to(torch.uint8) for batch in passed])


def fit_classifier(
    train: ImageSource,
    held_out: ImageSource,
    data: DataConfig | None = None,
    config: ClassifierConfig | None = None,
    *,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Classifier:
    """The classifier of a data set: read from ``folder`` where it has been trained before, else trained and stored.

    4,500 digits of 28x28 pixels take about a minute on one core. The file's name is a hash of pixels, labels,
    configuration and version of the package, so another of any of them trains anew. A damaged file is replaced. The
    same seed, device, number of threads and version of PyTorch give the same weights; PyTorch's global random state
    is neither read nor changed. In a process group, process 0 reads or trains, and the others get its weights.

    Args:
        train: images to learn, with labels. held_out: images with labels, for ``accuracy``.
        data: how the images are prepared (:func:`load_images`); default: as they are.
        folder: default ``classifiers`` in :func:`lsgm_fast.env.cache_dir`.

    Raises:
        ValueError: images without labels, of fewer than two classes, or that the classifier cannot take.
    """
    data, config = data or DataConfig(), config or ClassifierConfig()
    images, labels = load_images(train, data), _labels(train)
    test, truth = load_images(held_out, data), _labels(held_out)
    classes = tuple(int(label) for label in np.unique(labels))
    key = _key(images, labels, config)
    path = (env.cache_dir() / "classifiers" if folder is None else Path(folder)) / (
        f"classifier-{key[:16]}.safetensors"
    )
    with torch.device("meta"):  # so that no initial weights are drawn from the global generator
        model = Classifier(config, train.shape, classes)
    model = model.to_empty(device=device)
    weights: dict[str, Tensor] = {}
    if distributed.is_main():
        weights = _stored(path, key, model) or {}
        if not weights:
            targets = torch.from_numpy(np.searchsorted(classes, labels))
            _train(model, images, targets, progress)
            weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
            _store(path, key, weights)
    model.load_state_dict(distributed.broadcast_object(weights))
    model.eval().requires_grad_(False)
    model.identity = key
    predicted = torch.cat([model.extract(part / 255.0)[1].argmax(dim=1).cpu() for part in test.split(256)])
    model.accuracy = float(np.mean(np.asarray(classes)[predicted.numpy()] == truth))
    return model


def _labels(source: ImageSource) -> np.ndarray:
    if source.labels is None:
        raise ValueError(
            f"{source.name} has no labels, so no classifier can be trained on it: give data with labels (digits, IDX "
            "files, CIFAR-10 or a .npz with labels), or use the features of the Inception network "
            '(InceptionFeatures; pip install "lsgm-fast[fid]")'
        )
    return source.labels


def _key(images: Tensor, labels: np.ndarray, config: ClassifierConfig) -> str:
    from lsgm_fast import __version__

    described = {"version": __version__, "config": config.to_dict(), "shape": list(images.shape)}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(images.numpy().tobytes())
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _train(model: Classifier, images: Tensor, targets: Tensor, progress: bool) -> None:
    config = model.config
    device = model.output.weight.device
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # He et al. 2015
                scale = math.sqrt(2.0 / parameter[0].numel())
                parameter.copy_(
                    scale * random.normal(config.seed, [0], f"classifier.{name}", parameter.shape)[0]
                )
            else:
                parameter.fill_(1.0 if name.startswith("convolutions") and name.endswith("weight") else 0.0)
    count = len(images)
    steps = config.epochs * -(-count // config.batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with torch.enable_grad(), tqdm(desc="classifier", total=steps, disable=not progress, leave=False) as bar:
        for epoch in range(config.epochs):
            order = torch.from_numpy(permutation(count, config.seed, "classifier.order", substream=epoch))
            for rows in order.split(config.batch_size):
                optimizer.zero_grad()
                logits = model(_moved(images[rows] / 255.0, rows, config, epoch).to(device))
                nn.functional.cross_entropy(logits, targets[rows].to(device)).backward()
                optimizer.step()
                schedule.step()
                bar.update()


def _moved(images: Tensor, indices: Tensor, config: ClassifierConfig, epoch: int) -> Tensor:
    count, channels, height, width = images.shape
    most = round(config.shift * min(height, width))
    uniform = random.uniform(config.seed, indices, "classifier.shift", (2,), substream=epoch)
    top, left = (uniform * (2 * most + 1)).long().T
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    which = torch.arange(count)[:, None, None, None]
    padded = nn.functional.pad(images, (most,) * 4, mode="replicate")
    return padded[which, torch.arange(channels)[None, :, None, None], rows, columns]


def _checksum(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    return digest.hexdigest()


def _store(path: Path, key: str, weights: dict[str, Tensor]) -> None:
    try:
        with atomic_path(path, make_folders=True) as temporary:
            save_file(weights, temporary, metadata={"key": key, "checksum": _checksum(weights)})
    except OSError as error:
        logger.warning("the classifier is not kept for the next evaluation: %s", error)


def _stored(path: Path, key: str, model: Classifier) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error)
    else:
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        if metadata.get("key") != key or {n: v.shape for n, v in weights.items()} != shapes:
            reason = "it is of other data or another architecture"
        elif metadata.get("checksum") != _checksum(weights):
            reason = "its weights are not those that were stored"
        else:
            return weights
    logger.warning("%s cannot be used (%s): the classifier is trained again", path, reason)
    return None
