"""The operations that the models, solvers and training are made of, each dispatched by :mod:`lsgm_fast.dispatch`.

Every :class:`~lsgm_fast.dispatch.Op` defined in a module of this package is an attribute of it, for example
``lsgm_fast.ops.mixed_score``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsgm_fast import _discovery, dispatch

if TYPE_CHECKING:
    # What the loop below does, for type checkers and editors; nothing else reads it.
    from lsgm_fast.ops.bn_swish import bn_swish
    from lsgm_fast.ops.depthwise_bn_swish import depthwise_bn_swish
    from lsgm_fast.ops.diffuse import diffuse
    from lsgm_fast.ops.fir_resample import fir_resample
    from lsgm_fast.ops.group_norm_resample import group_norm_resample
    from lsgm_fast.ops.group_norm_swish import (
        group_norm_swish,
        group_norm_swish_affine,
        group_norm_swish_residual,
    )
    from lsgm_fast.ops.mixed_score import mixed_score
    from lsgm_fast.ops.mixture_logistic import mixture_logistic_log_prob, mixture_logistic_mean
    from lsgm_fast.ops.multistep_update import multistep_update
    from lsgm_fast.ops.nvae_cell import nvae_cell
    from lsgm_fast.ops.philox_normal import philox_normal
    from lsgm_fast.ops.residual_add import residual_add
    from lsgm_fast.ops.rk import rk_control, rk_drift_finish, rk_drift_stage, rk_finish, rk_stage
    from lsgm_fast.ops.score_drift import score_drift
    from lsgm_fast.ops.score_matching_loss import score_matching_loss
    from lsgm_fast.ops.se_residual import se_residual
    from lsgm_fast.ops.up_conv2d import up_conv2d
    from lsgm_fast.ops.weight_norm import weight_norm
    from lsgm_fast.ops.winograd_conv2d import winograd_conv2d

__all__: list[str] = []


def _export() -> None:
    for _, module in _discovery.modules(__name__, __path__):
        for name, value in vars(module).items():
            if isinstance(value, dispatch.Op) and value.__module__ == module.__name__:
                # The name of a module of one operation is that operation's: the function takes its place.
                globals()[name] = value
                __all__.append(name)


_export()
dispatch.set_backend(None)
