"""Evaluation of a model: the negative evidence lower bound of a data set, and the quality of generated images."""

from __future__ import annotations

from lsgm_fast.evaluation.classifier import Classifier, ClassifierConfig, fit_classifier, load_images
from lsgm_fast.evaluation.distances import (
    KernelDistance,
    ManifoldValues,
    frechet_distance,
    kernel_distance,
    manifold_values,
    nearest_distances,
)
from lsgm_fast.evaluation.features import (
    FeatureExtractor,
    FeatureStatistics,
    InceptionFeatures,
    binary_draws,
)
from lsgm_fast.evaluation.judge import Judge
from lsgm_fast.evaluation.nelbo import (
    METHODS,
    TRACES,
    Estimate,
    NelboReport,
    PairedDifference,
    compare,
    evaluate_nelbo,
    out_of_distribution,
)
from lsgm_fast.evaluation.quality import (
    METRICS,
    Interval,
    Memorisation,
    QualityReport,
    compare_quality,
    draw_share,
    evaluate_quality,
    memorisation,
)

__all__ = [
    "METHODS",
    "METRICS",
    "TRACES",
    "Classifier",
    "ClassifierConfig",
    "Estimate",
    "FeatureExtractor",
    "FeatureStatistics",
    "InceptionFeatures",
    "Interval",
    "Judge",
    "KernelDistance",
    "ManifoldValues",
    "Memorisation",
    "NelboReport",
    "PairedDifference",
    "QualityReport",
    "binary_draws",
    "compare",
    "compare_quality",
    "draw_share",
    "evaluate_nelbo",
    "evaluate_quality",
    "fit_classifier",
    "frechet_distance",
    "kernel_distance",
    "load_images",
    "manifold_values",
    "memorisation",
    "nearest_distances",
    "out_of_distribution",
]
