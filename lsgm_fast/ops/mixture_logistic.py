"""Discretised mixture of logistics: log-probability and mean of the NVAE decoder's RGB likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lsgm_fast import fused
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.mixture_logistic import mixture_logistic_log_prob as reference_log_prob
from lsgm_fast.reference.mixture_logistic import mixture_logistic_mean as reference_mean


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dim() != 4 or logits.shape[1] % 10 != 0 or logits.shape[1] == 0:
        raise ValueError(f"expected logits (N, 10 K, H, W) for K mixtures, got {tuple(logits.shape)}")


@define_op(reference_log_prob)
def mixture_logistic_log_prob(
    x: torch.Tensor, logits: torch.Tensor, num_bits: int = 8, *, backend: str | None = None
) -> torch.Tensor:
    """Log-probability of RGB pixels under a discretised mixture of K logistics, in nats per pixel.

    ``log p(x) = logsumexp_k( log pi_k + sum_c log[ F((x_c + d - m_ck)/s_ck) - F((x_c - d - m_ck)/s_ck) ] )`` with F
    the logistic function, d = 1/(2^bits - 1), open-ended first and last bins, means of green and blue shifted
    linearly by red and green (coefficients tanh), log s >= -7.

    Args:
        x: (N, 3, H, W) in [-1, 1]. logits: (N, 10 K, H, W): K mixture logits, then per colour K means, K log scales,
            K coefficients. num_bits: 5 to 8.

    Returns:
        (N, H, W), the three colours of a pixel together, of the wider of the two dtypes. The fused kernels take float32
        x and logits in float32, bfloat16 or float16, compute in float32, and have gradients for the logits alone.

    Raises:
        ValueError: shapes do not match.

    Source: Salimans et al. 2017 (PixelCNN++), section 2.1; NVAE and LSGM decoders.
    """
    _check_logits(logits)
    if x.dim() != 4 or x.shape[1] != 3 or (x.shape[0], *x.shape[2:]) != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"expected x (N, 3, H, W) to match logits {tuple(logits.shape)}, got {tuple(x.shape)}"
        )


@define_op(reference_mean)
def mixture_logistic_mean(logits: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """The published "mean" of the mixture: probability-weighted means and coefficients, colours clamped in turn.

    ``r = clamp(E m_r)``, ``g = clamp(E m_g + E c_0 r)``, ``b = clamp(E m_b + E c_1 r + E c_2 g)``, clamps to [-1, 1].

    Args:
        logits: (N, 10 K, H, W) as in :func:`mixture_logistic_log_prob`.

    Returns:
        (N, 3, H, W) in [-1, 1]. The fused kernels take float32, bfloat16 and float16, compute in float32, and have no
        gradients.

    Raises:
        ValueError: the number of channels is not a multiple of 10.
    """
    _check_logits(logits)


def _dtype_reasons(logits: torch.Tensor) -> list[str]:
    if logits.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return []
    return [f"logits have dtype {logits.dtype}: float32, bfloat16 and float16 are supported"]


def _log_prob_reasons(x: torch.Tensor, logits: torch.Tensor, num_bits: int = 8) -> list[str]:
    why = _dtype_reasons(logits)
    if x.dtype != torch.float32:
        why.append(f"x has dtype {x.dtype}: expected float32")
    if num_bits not in (5, 6, 7, 8):
        why.append(f"num_bits is {num_bits}: expected 5 to 8")
    if x.requires_grad and torch.is_grad_enabled():
        why.append("x requires a gradient: the kernels have that of the logits alone")
    return why + _prepare.other_device(logits.device, x=x)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=_prepare.dense_format(x))


Parts = tuple[torch.Tensor, torch.Tensor]
"""The result and, for backward, (2, N, H, W): the logarithm of the joint sum is the first plus the second's."""


def _fake_log_prob(x: torch.Tensor, logits: torch.Tensor, num_bits: int) -> Parts:
    n, _, height, width = logits.shape
    return x.new_empty((n, height, width)), x.new_empty((2, n, height, width))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    x, logits, ctx.num_bits = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, logits, output[1])


def _gradients(
    ctx: Any, call: Callable[..., torch.Tensor], grad: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return None, None, None
    x, logits, parts = ctx.saved_tensors
    return None, call(grad.contiguous(), x, logits, parts, ctx.num_bits), None


fused.register(
    mixture_logistic_log_prob,
    schema="(Tensor x, Tensor logits, int num_bits) -> (Tensor, Tensor)",
    fake=_fake_log_prob,
    prepare=lambda x, logits, num_bits=8: (_dense(x), _dense(logits), num_bits),
    finish=lambda results: results[0],
    reasons=_log_prob_reasons,
    priorities={"cpu": 30, "triton": 20},
    backward=fused.Backward(
        schema="(Tensor grad, Tensor x, Tensor logits, Tensor parts, int num_bits) -> Tensor",
        fake=lambda grad, x, logits, parts, num_bits: torch.empty_like(logits),
        save=_save,
        gradients=_gradients,
    ),
)


def _mean_to_kernel(logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
    # CUDA's autocast has softmax in float32, and what follows then is too.
    return _dense(logits), logits.is_cuda and torch.is_autocast_enabled("cuda")


def _fake_mean(logits: torch.Tensor, widen: bool) -> torch.Tensor:
    n, _, height, width = logits.shape
    return logits.new_empty((n, 3, height, width), dtype=torch.float32 if widen else logits.dtype)


fused.register(
    mixture_logistic_mean,
    schema="(Tensor logits, bool widen) -> Tensor",
    fake=_fake_mean,
    prepare=_mean_to_kernel,
    reasons=_dtype_reasons,
    priorities={"cpu": 30, "triton": 20},
)
