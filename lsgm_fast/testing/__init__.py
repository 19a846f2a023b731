"""Proof that an implementation of an operation is right: sample inputs, comparisons, poisoned memory.

Used by the tests, by the self-test before a kernel's first use, and by the benchmarks, which time no wrong kernel.

>>> from lsgm_fast import testing
>>> for sample in testing.samples("mixed_score"):
...     testing.check_forward("mixed_score", "reference", sample)

``lsgm_fast/testing/<op>.py`` holds ``SAMPLES``, a dictionary from operation names to
:class:`~lsgm_fast.testing.inputs.OpSamples`; it is found by the name of the file in which the operation is defined.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from lsgm_fast.dispatch import Op
from lsgm_fast.testing.compare import (
    Norms,
    check_backward,
    check_forward,
    compare_backward,
    compare_forward,
    distance,
    find_op,
    gradients,
    has_gradients,
    norms,
    poison_uninitialized,
    unsupported,
)
from lsgm_fast.testing.inputs import (
    AWKWARD_SHAPES,
    DENSE_LAYOUTS,
    LATENT_SHAPES,
    LAYOUTS,
    MIXED_DTYPES,
    SAME_DTYPES,
    Draw,
    OpSamples,
    Sample,
    describe_dtypes,
    describe_shape,
    lay_out,
    random_strides,
)

__all__ = [
    "AWKWARD_SHAPES",
    "DENSE_LAYOUTS",
    "LATENT_SHAPES",
    "LAYOUTS",
    "MIXED_DTYPES",
    "SAME_DTYPES",
    "Draw",
    "Norms",
    "OpSamples",
    "Sample",
    "check_backward",
    "check_forward",
    "compare_backward",
    "compare_forward",
    "describe_dtypes",
    "describe_samples",
    "describe_shape",
    "distance",
    "find_op",
    "gradients",
    "has_gradients",
    "lay_out",
    "norms",
    "poison_uninitialized",
    "random_strides",
    "samples",
    "selftest_sample",
    "traffic",
    "unsupported",
]


def describe_samples(op: str | Op[Any, Any]) -> OpSamples:
    """The description of an operation's inputs from its testing file.

    Raises:
        ValueError: unknown operation.
        LookupError: the operation has no testing file, or the file does not list it.
    """
    op = find_op(op)
    stem = op.__module__.rpartition(".")[2]
    name = f"{__name__}.{stem}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise LookupError(
            f"{op.name} has no sample inputs: write lsgm_fast/testing/{stem}.py with a dictionary SAMPLES"
        ) from None
    if op.name not in getattr(module, "SAMPLES", {}):
        raise LookupError(f"SAMPLES in lsgm_fast/testing/{stem}.py has no entry {op.name!r}")
    return module.SAMPLES[op.name]


def samples(
    op: str | Op[Any, Any], device: torch.device | str = "cpu", seed: int = 0, large: bool = False
) -> list[Sample]:
    """Sample inputs of an operation: sizes of the published configurations and awkward ones, dtypes, layouts.

    Args:
        op: the operation or its name. device: where the tensors live; the numbers are the same everywhere.
        seed: of the numbers; shapes do not depend on it.
        large: also published sizes at batches of 16 and 64 (hundreds of MiB).

    Raises:
        ValueError, LookupError: as :func:`describe_samples`.
    """
    return list(describe_samples(op).all(device=device, seed=seed, large=large))


def selftest_sample(op: str | Op[Any, Any], device: torch.device | str) -> list[Sample]:
    """A few tiny samples that run in milliseconds and reach a kernel's vector body and its tail, in both layouts."""
    found = describe_samples(op)
    kinds = [(torch.float32, "contiguous"), (torch.float32, "channels_last")]
    if (torch.bfloat16, torch.bfloat16) in found.dtypes:
        kinds.append((torch.bfloat16, "contiguous"))
    return [found.at(found.selftest, dtype, None, layout, device=device) for dtype, layout in kinds]


def traffic(op: str | Op[Any, Any], sample: Sample, backward: bool = False) -> int:
    """Bytes that the operation must move for this sample: every tensor argument and result once.

    An operation that cannot do with one pass gives its own formula in its testing file. ``backward`` adds the
    backward pass: it reads the results' gradients and the arguments, and writes the arguments' gradients.
    """
    op = find_op(op)
    described = describe_samples(op)
    with torch.no_grad():
        results = _tensors_of(op.impl("reference").fn(*sample.args, **sample.kwargs))
    inputs = sample.tensors()
    read, written = sum(_bytes(t) for t in inputs), sum(_bytes(t) for t in results)
    total = described.traffic(sample, results) if described.traffic is not None else read + written
    if backward:
        wanted = [
            t for position in sample.differentiable for t in Sample("", (sample.args[position],)).tensors()
        ]
        total += written + read + sum(_bytes(t) for t in wanted)
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors_of(value: Any) -> list[torch.Tensor]:
    return Sample("", (value,)).tensors()
