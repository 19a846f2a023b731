"""Training: stage 1 (the VAE) and stage 2 (Algorithms 1, 2 and 3 of the paper)."""

from __future__ import annotations

from lsgm_fast.training.config import (
    KLConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RegularisationConfig,
    TrainingConfig,
)
from lsgm_fast.training.recipes import RECIPES, get_recipe
from lsgm_fast.training.trainer import Result, Trainer

__all__ = [
    "RECIPES",
    "KLConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RegularisationConfig",
    "Result",
    "Trainer",
    "TrainingConfig",
    "get_recipe",
]
