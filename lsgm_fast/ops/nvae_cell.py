"""A whole residual cell of the NVAE, for inference."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from lsgm_fast import fused
from lsgm_fast.composed import nvae_cell as composed
from lsgm_fast.composed import nvae_cell_triton as composed_triton
from lsgm_fast.dispatch import define_op
from lsgm_fast.ops import _prepare
from lsgm_fast.reference.nvae_cell import nvae_cell as reference

# Convolutions of a cell -> its normalisations.
_NORMS = {2: 2, 3: 4}


@define_op(reference)
def nvae_cell(
    x: torch.Tensor,
    skip: torch.Tensor,
    convs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    squeeze_excite: Sequence[torch.Tensor],
    stride: int = 1,
    up: bool = False,
    batch_stats: bool = False,
    eps: float = 1e-5,
    scale: float = 0.1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``skip + scale * gate * branch(x)``, for the two branches of the NVAE. No running statistic is updated.

    Three convolutions (``mconv``): [nearest x2] - BN - 1x1 - BN - Swish - 5x5 depthwise - BN - Swish - 1x1 - BN.
    Two (``res_bnswish``): BN - Swish - [nearest x2] - 3x3 - BN - Swish - 3x3. ``gate`` is that of
    :func:`~lsgm_fast.ops.se_residual`, or 1.

    Args:
        x: (N, C, H, W). skip: what is added to, of the result's shape.
        convs: weights. Three: (E, C, 1, 1), (E, 1, 5, 5), (K, E, 1, 1); two: (E, C, 3, 3), (K, E, 3, 3).
        biases: of the last convolutions: none for three; one (of the second) or two for two.
        norms: for each normalisation in order its weight, bias, running mean and running variance.
        squeeze_excite: reduce weight and bias, expand weight and bias; empty: no gate.
        stride: of the depthwise or the first convolution, 1 or 2. up: enlarge by two (stride 1 then).
        batch_stats: normalise with the statistics of the batch instead of the running ones.
        eps: of the normalisations. scale: of the branch (0.1 in NVAE).

    Returns:
        (N, K, H', W'), H' = 2 H with ``up``, else ceil(H / stride); the dtype of x.

    Raises:
        ValueError: shapes or numbers of tensors do not match.

    Source: Vahdat & Kautz 2020 (NVAE), section 3.1 and Figure 3.
    """
    if len(convs) not in _NORMS:
        raise ValueError(f"nvae_cell expects 2 or 3 convolutions, got {len(convs)}")
    if len(norms) != 4 * _NORMS[len(convs)]:
        raise ValueError(
            f"nvae_cell expects 4 tensors for each of {_NORMS[len(convs)]} normalisations, got {len(norms)}"
        )
    if len(biases) not in ((0,) if len(convs) == 3 else (1, 2)):
        raise ValueError(f"nvae_cell with {len(convs)} convolutions got {len(biases)} biases")
    if len(squeeze_excite) not in (0, 4):
        raise ValueError(f"squeeze_excite has 4 tensors or none, got {len(squeeze_excite)}")
    if stride not in (1, 2) or (up and stride != 1):
        raise ValueError(f"stride must be 1 or 2, and 1 with up, got {stride}")
    if x.dim() != 4 or convs[0].shape[1] != x.shape[1]:
        raise ValueError(
            f"nvae_cell got x {tuple(x.shape)} and a first convolution {tuple(convs[0].shape)}: "
            "expected (N, C, H, W) and (E, C, K, K)"
        )
    height, width = (s * 2 if up else -(-s // stride) for s in x.shape[2:])
    if skip.shape != (x.shape[0], convs[-1].shape[0], height, width):
        raise ValueError(
            f"skip has shape {tuple(skip.shape)}, expected {(x.shape[0], convs[-1].shape[0], height, width)}"
        )


def _reasons(
    x: torch.Tensor,
    skip: torch.Tensor,
    convs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    squeeze_excite: Sequence[torch.Tensor],
    stride: int = 1,
    up: bool = False,
    batch_stats: bool = False,
    eps: float = 1e-5,
    scale: float = 0.1,
    *,
    device: str,
    supported: tuple[torch.dtype, ...],
) -> list[str]:
    tensors = (x, skip, *convs, *biases, *norms, *squeeze_excite)
    why = _prepare.other_device(x.device, **{f"tensor {i}": t for i, t in enumerate(tensors)})
    if torch.is_autocast_enabled(device if x.device.type == "meta" else x.device.type):
        why.append("under autocast: its convolutions would keep float32")
    if x.dtype not in supported or any(t.dtype != x.dtype for t in tensors):
        dtypes = ", ".join(sorted({str(t.dtype) for t in tensors}))
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
        if len(supported) > 1:
            expected = f"one of {expected} for all of them"
        why.append(f"dtypes {dtypes}: {expected} is supported")
    if x.numel() == 0:
        why.append(f"x has shape {tuple(x.shape)}: it is empty")
    elif batch_stats and min(x[:, 0].numel(), skip[:, 0].numel()) < 2:
        why.append(f"x has shape {tuple(x.shape)}: a variance needs more than one element per channel")
    if len(convs) == 3 and convs[1].shape[2:] != (5, 5):
        why.append(f"a depthwise kernel of {convs[1].shape[2]}x{convs[1].shape[3]}: 5x5 is supported")
    return why


# Pixels of the input (of all samples) from which the folding pays, by the number of convolutions. Two that do not
# enlarge gain little.
_FEWEST_PIXELS = {3: 256, 2: 1024}


def _slower(
    x: torch.Tensor, skip: torch.Tensor, convs: Sequence[torch.Tensor], *_: object, **__: object
) -> list[str]:
    least = _FEWEST_PIXELS[len(convs)]
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels < least:
        return [f"with {len(convs)} convolutions it pays from {least} pixels, here are {pixels}"]
    return []


fused.register_composed(
    nvae_cell,
    "cpu",
    composed.forward,
    available=composed.unavailable,
    reasons=functools.partial(_reasons, device="cpu", supported=(torch.float32,)),
    auto_reasons=_slower,
    priority=30,
)


def _triton_reasons(x: torch.Tensor, *args: object, **kwargs: object) -> list[str]:
    supported = (torch.float32, torch.bfloat16, torch.float16)
    why = _reasons(x, *args, device="cuda", supported=supported, **kwargs)  # type: ignore[arg-type]
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        why.append("Triton's interpreter multiplies the bits of bfloat16 as integers")
    return why


fused.register_composed(
    nvae_cell,
    "triton",
    composed_triton.forward,
    available=composed_triton.unavailable,
    reasons=_triton_reasons,
    auto_reasons=lambda *args, **kwargs: ["not measured on a GPU yet: name backend='triton' to use it"],
    priority=20,
)
