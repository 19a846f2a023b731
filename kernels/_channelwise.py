"""What the Triton kernels share that combine eps and z element by element, with a mixing logit per channel.

Tensors are (B, C, *spatial), dense, with the channels before (contiguous) or after (channels_last) the positions.
Such a kernel walks through memory as it lies, so that a thread's elements are neighbours in either format, and finds
the channel by a division. Each sample has programs of its own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lsgm_fast.kernels._common import alignment, index_type, launch_options, warps


@triton.jit
def locate(blocks, GROUP: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """The elements of this program, given what :func:`forward_plan` planned.

    Returns:
        (sample, group, within): element ``group * GROUP + within`` of a sample, for a column of groups and a row of
        places in them.
    """
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid - sample * blocks
    # Counting in groups: one division for each, and the compiler sees that a group starts at a multiple of GROUP.
    group = (block.to(INDEX) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP).to(INDEX))[:, None]
    return sample.to(tl.int64), group, tl.arange(0, GROUP)[None, :]


@triton.jit
def load_channels(ptr, group, within, inner_groups, size, GROUP: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The values at ``ptr`` of the channels of :func:`locate`'s elements: one for each, or one per group."""
    if CHANNELS_LAST:
        values = tl.load(ptr + (group % inner_groups * GROUP + within), mask=group * GROUP + within < size)
    else:
        values = tl.load(ptr + group // inner_groups, mask=group * GROUP < size)
    return values


def forward_block(size: int) -> int:
    """Elements per program for samples of ``size`` elements: the largest that leaves at most 1/8 of the lanes idle."""
    for block in (1024, 512):
        if triton.cdiv(size, block) * block * 7 <= size * 8:
            return block
    return 256


def forward_plan(
    samples: int, channels: int, space: int, channels_inner: bool
) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """(grid, sizes, options): what a kernel gets besides tensors, strides and COMPUTE."""
    size = channels * space
    inner = channels if channels_inner else space
    group, align = alignment(inner), alignment(size)
    block = forward_block(size)
    blocks = triton.cdiv(size, block)
    sizes = {"inner_groups": inner // group, "sample_units": size // align, "blocks": blocks}
    options = {
        "CHANNELS_LAST": channels_inner,
        "ALIGN": align,
        "GROUP": group,
        "BLOCK": block,
        "INDEX": index_type(size),
        **launch_options(warps(block)),
    }
    return (samples * blocks,), sizes, options


def logit_values(mixing_logit: Tensor, channels: int) -> Tensor:
    """The mixing logit as one value per channel, without gaps.

    Raises:
        ValueError: another number of values.
    """
    if mixing_logit.numel() != channels:
        raise ValueError(f"mixing_logit has shape {tuple(mixing_logit.shape)}, expected {channels} values")
    return mixing_logit.contiguous()
