"""Triton kernel of ``score_drift``: ``p z + a q (eps - r z)`` with ``a = sigmoid(mixing_logit)``, 1 without a logit.

Bound by memory: it reads eps and z once, as they lie (``_channelwise.py``), and writes the result. p, q and r are read
from device memory, one value for all samples or one each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._channelwise import forward_plan, load_channels, locate, logit_values
from lsgm_fast.kernels._common import (
    AotSpec,
    alignment,
    common_layout,
    compute_type,
    device_guard,
    mixing,
    pointer,
    sample_stride,
    short_name,
    store,
)


# Specialising on the values of sizes would compile anew for almost every shape; ALIGN and GROUP say what is needed.
@triton.jit(do_not_specialize=["p_stride", "q_stride", "r_stride", "inner_groups", "sample_units", "blocks"])
def forward_kernel(
    eps_ptr,
    z_ptr,
    logit_ptr,  # None: no mixing
    p_ptr,
    q_ptr,
    r_ptr,
    out_ptr,
    p_stride,
    q_stride,
    r_stride,
    inner_groups,  # positions (contiguous) or channels (channels_last) / GROUP
    sample_units,  # channels x positions / ALIGN
    blocks,  # programs per sample
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,  # neighbours in memory that share a channel, or whose channels are neighbours
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,  # integer type of an index inside one sample
):
    size = sample_units.to(INDEX) * ALIGN
    sample, group, within = locate(blocks, GROUP, BLOCK, INDEX)
    base = sample * size
    index = group * GROUP + within
    mask = index < size
    eps = tl.load(eps_ptr + base + index, mask=mask).to(COMPUTE)
    z = tl.load(z_ptr + base + index, mask=mask).to(COMPUTE)
    p = tl.load(p_ptr + sample * p_stride).to(COMPUTE)
    weight = tl.load(q_ptr + sample * q_stride).to(COMPUTE)
    r = tl.load(r_ptr + sample * r_stride).to(COMPUTE)
    if logit_ptr is not None:
        logit = load_channels(logit_ptr, group, within, inner_groups, size, GROUP, CHANNELS_LAST)
        weight *= mixing(logit.to(COMPUTE))[0]
    # At small times weight is large: the small difference is formed before anything is multiplied by it.
    store(out_ptr + base + index, p * z + weight * (eps - r * z), mask)


def forward(eps: Tensor, z: Tensor, mixing_logit: Tensor | None, p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """``p z + a q (eps - r z)``, in z's dtype and memory format.

    Args:
        eps, z: (B, C, *spatial), one dense memory format. mixing_logit: (1, C, 1, 1) or None. p, q, r: 0-d, (1,) or
            (B,).

    Raises:
        ValueError: shapes or memory formats differ, or are not dense.
    """
    inner = common_layout(z, eps)
    out = torch.empty_like(z)
    if z.numel() == 0:
        return out
    samples, channels = z.shape[:2]
    logit = None
    if mixing_logit is None:
        channels, inner = 1, False  # all channels are alike: one run in either format
    else:
        logit = logit_values(mixing_logit, channels)
    strides = [sample_stride(name, c, samples) for name, c in (("p", p), ("q", q), ("r", r))]
    grid, sizes, options = forward_plan(samples, channels, z.numel() // (samples * channels), inner)
    with device_guard(z):
        forward_kernel[grid](
            eps,
            z,
            logit,
            p,
            q,
            r,
            out,
            *strides,
            *sizes.values(),
            COMPUTE=compute_type(eps, z),
            **options,
        )
    return out


def _specialisations() -> Iterator[AotSpec]:
    """The latents of the CIFAR-10 configurations, in the dtypes of (eps, z) that models and solvers use.

    180 channels: in channels_last, a group of neighbours is 4 elements, 8 bytes in half precision.
    """
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    samples, channels, space = 64, 180, 256
    strides = ("p_stride", "q_stride", "r_stride")
    for e, z in ((f32, f32), (f16, f32), (bf16, f32), (bf16, bf16), (f32, f64)):
        wide = f64 in (e, z)
        for case, shape, inner in (
            ("contiguous", (samples, channels, space), False),
            ("channels_last", (samples, channels, space), True),
            ("no mixing", (samples, 1, channels * space), False),
        ):
            _, sizes, options = forward_plan(*shape, inner)
            signature = {
                "eps_ptr": pointer(e),
                "z_ptr": pointer(z),
                "out_ptr": pointer(z),
                **dict.fromkeys(("p_ptr", "q_ptr", "r_ptr"), pointer(f64 if wide else f32)),
                **dict.fromkeys((*strides, *sizes), "i32"),
            }
            constants = {"COMPUTE": tl.float64 if wide else tl.float32, **options}
            if case == "no mixing":
                constants["logit_ptr"] = None
            else:
                signature["logit_ptr"] = pointer(f32)
            yield AotSpec(
                f"eps {short_name(e)}, z {short_name(z)}, {case}",
                forward_kernel,
                signature,
                constants,
                min(128, alignment(shape[1] if inner else shape[2]) * z.itemsize * 8),
            )


AOT = list(_specialisations())
