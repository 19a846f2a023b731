"""The operations that the models, solvers and training are made of, each dispatched by :mod:`lsgm_fast.dispatch`."""

from __future__ import annotations

from lsgm_fast import dispatch
from lsgm_fast.ops.bn_swish import bn_swish
from lsgm_fast.ops.depthwise_bn_swish import depthwise_bn_swish
from lsgm_fast.ops.diffuse import diffuse
from lsgm_fast.ops.fir_resample import fir_resample
from lsgm_fast.ops.group_norm_swish import group_norm_swish
from lsgm_fast.ops.mixed_score import mixed_score
from lsgm_fast.ops.mixture_logistic import mixture_logistic_log_prob, mixture_logistic_mean
from lsgm_fast.ops.multistep_update import multistep_update
from lsgm_fast.ops.philox_normal import philox_normal
from lsgm_fast.ops.rk_finish import rk_finish
from lsgm_fast.ops.rk_stage import rk_stage
from lsgm_fast.ops.score_drift import score_drift
from lsgm_fast.ops.score_matching_loss import score_matching_loss
from lsgm_fast.ops.se_residual import se_residual
from lsgm_fast.ops.weight_norm import weight_norm

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

dispatch.set_backend(None)
