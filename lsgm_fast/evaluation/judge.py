"""Draws images from models and judges them against the held-out images of labelled data."""

from __future__ import annotations

from typing import Any

from lsgm_fast.data import DataConfig, open_data
from lsgm_fast.evaluation.classifier import fit_classifier, load_images
from lsgm_fast.evaluation.quality import QualityReport, draw_share, evaluate_quality
from lsgm_fast.models.lsgm import LSGM


class Judge:
    """The quality of what models draw; the data's part of it (classifier, images) is done once, here.

    Args:
        data: with labels. device, progress: of the classifier's training. seed: of the draws and the intervals.

    Raises:
        ValueError: as :func:`~lsgm_fast.data.open_data` and :func:`fit_classifier`.
    """

    def __init__(self, data: DataConfig, device: str, *, seed: int = 0, progress: bool = False) -> None:
        train, held_out = open_data(data, "train"), open_data(data, "held_out")
        self.classifier = fit_classifier(train, held_out, data, device=device, progress=progress)
        self.training, self.reference = load_images(train, data), load_images(held_out, data)
        self.binary = data.binarise != "none"
        self.seed, self.progress = seed, progress

    def __call__(self, model: LSGM, samples: int, **options: Any) -> QualityReport:
        """Of so many images; ``options`` are those of :func:`draw_share`."""
        images = draw_share(model, samples, self.seed, self.binary, progress=self.progress, **options)
        return evaluate_quality(
            images, self.reference, self.classifier, training=self.training, seed=self.seed
        )
