"""Plain PyTorch specification of every operation: same signatures as :mod:`lsgm_fast.ops`, float64-capable."""

from __future__ import annotations

from lsgm_fast.reference.bn_swish import bn_swish
from lsgm_fast.reference.depthwise_bn_swish import depthwise_bn_swish
from lsgm_fast.reference.diffuse import diffuse
from lsgm_fast.reference.fir_resample import fir_resample
from lsgm_fast.reference.group_norm_swish import group_norm_swish
from lsgm_fast.reference.mixed_score import mixed_score
from lsgm_fast.reference.mixture_logistic import mixture_logistic_log_prob, mixture_logistic_mean
from lsgm_fast.reference.multistep_update import multistep_update
from lsgm_fast.reference.philox_normal import philox_normal
from lsgm_fast.reference.rk_finish import rk_finish
from lsgm_fast.reference.rk_stage import rk_stage
from lsgm_fast.reference.score_drift import score_drift
from lsgm_fast.reference.score_matching_loss import score_matching_loss
from lsgm_fast.reference.se_residual import se_residual
from lsgm_fast.reference.weight_norm import weight_norm

__all__ = [
    "bn_swish",
    "depthwise_bn_swish",
    "diffuse",
    "fir_resample",
    "group_norm_swish",
    "mixed_score",
    "mixture_logistic_log_prob",
    "mixture_logistic_mean",
    "multistep_update",
    "philox_normal",
    "rk_finish",
    "rk_stage",
    "score_drift",
    "score_matching_loss",
    "se_residual",
    "weight_norm",
]
