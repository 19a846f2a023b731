"""Many processes: thin helpers on torch.distributed, and batch statistics over all processes.

Every function does the right thing in a single process without a process group.
"""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from lsgm_fast import env

T = TypeVar("T")

_BATCH_DIMS = (0, 2, 3)


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """Number of this process, 0 to ``world_size() - 1``; 0 without a process group."""
    return dist.get_rank() if _initialised() else 0


def is_main() -> bool:
    """Whether this is process 0, the one that writes files and messages."""
    return rank() == 0


def init(device: str | torch.device | None = None) -> torch.device:
    """Join the process group that ``torchrun`` describes in the environment (:func:`lsgm_fast.env.torchrun`).

    Without these variables this is a single process, and nothing is started. The group uses NCCL where every process
    of this machine has a CUDA device of its own, gloo otherwise.

    Args:
        device: kind of device, ``"cuda"`` or ``"cpu"``; None: CUDA where every process of this machine has a device.
            With ``"cuda"`` and more processes than devices, they share the devices, over gloo.

    Returns:
        The device of this process.

    Raises:
        ValueError: some of the variables are set and others not, a number among them is none, or ``device`` is CUDA
            and there is none.
    """
    place = find_place(device)
    if place.processes is not None and not _initialised():
        rank, size = place.processes.rank, place.processes.size
        if place.device.type == "cuda" and place.own_device:
            dist.init_process_group("nccl", rank=rank, world_size=size, device_id=place.device)
        else:
            dist.init_process_group("gloo", rank=rank, world_size=size)
    return place.device


class Place(NamedTuple):
    """Where a process computes, whether no other one of this machine does so there, and which one it is, if of many."""

    device: torch.device
    own_device: bool
    processes: env.Processes | None


def find_place(device: str | torch.device | None = None) -> Place:
    """The place of this process among those that ``torchrun`` started; joins no process group.

    A CUDA device that is found becomes the current one of a process of many. Arguments and errors are those of
    :func:`init`.
    """
    kind = None if device is None else torch.device(device).type
    devices = torch.cuda.device_count()
    if kind == "cuda" and devices == 0:
        raise ValueError(f"device {str(device)!r} was asked for, but PyTorch sees no CUDA device: use 'cpu'")
    processes = env.torchrun()
    if processes is None:
        alone = torch.device(device if device is not None else ("cuda" if devices else "cpu"))
        return Place(alone, True, None)
    own_device = devices >= processes.local_size
    if kind is None:
        kind = "cuda" if devices and own_device else "cpu"
    chosen = torch.device(kind, processes.local_rank % devices) if kind == "cuda" else torch.device(kind)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return Place(chosen, own_device, processes)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if _initialised():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if _initialised():
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """The ``value`` of process ``source``, in every process; anything that can be pickled."""
    if not _initialised():
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def gather_objects(value: T, failure: Exception | None = None) -> list[T]:
    """The ``value`` of every process, in the order of the ranks; anything that can be pickled.

    Args:
        failure: what went wrong in this process, in place of its value. Where any has one, every process raises that
            of the lowest rank, so that none waits for another that is gone.
    """
    if not _initialised():
        gathered: list[Any] = [(value, failure)]
    else:
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, (value, None if failure is None else _portable(failure)))
    for _, raised in gathered:
        if raised is not None:
            raise raised
    return [each for each, _ in gathered]


def _portable(failure: Exception) -> Exception:
    """The exception, or one with its message where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:
        return RuntimeError(f"{type(failure).__name__}: {failure}")
    return failure


def first_to_fail() -> bool:
    """Whether no other process of the group has called this. The first one says what is wrong; the others fail alike,
    or because of it. True without a process group."""
    if world_size() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("lsgm_fast.failed", 1) == 1
    except RuntimeError:  # the process that has the store is gone
        return True


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over the processes of a floating-point tensor that has the same shape in all of them.

    A new tensor of the same dtype and device, without a gradient; summed in float32 or wider.

    Raises:
        ValueError: not a floating-point tensor.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"all_reduce_mean expects a floating-point tensor, got {tensor.dtype}: convert it")
    total = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    return (_all_reduce(total) / world_size()).to(tensor.dtype)


class BatchStatistics(NamedTuple):
    """See :func:`batch_statistics`."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    elements: torch.Tensor


def batch_statistics(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> BatchStatistics:
    """What turns a BatchNorm with given statistics into one with those of the batches of all processes.

    With ``s = batch_statistics(x, weight, bias, eps)``, whatever computes
    ``(x - s.mean) / sqrt(s.var + eps) * s.weight + s.bias`` with mean and variance as constants (a fused kernel) has
    the gradients of a normalisation by the global batch. Each process computes count n_k, mean m_k and sum of squared
    deviations M2_k of its own batch. One collective gathers them, and with n = sum n_k::

        mean = sum n_k m_k / n
        var = (sum M2_k + sum n_k (m_k - mean)^2) / n

    (Chan, Golub, LeVeque 1979), which does not cancel as E[x^2] - E[x]^2 does, and holds for unequal batches. The
    missing part of the gradient of x follows from those of weight and bias: with xh = (x - mean) rstd, and their sums
    over the processes, gw and gb, from one collective::

        -weight rstd (gb + xh gw) / n

    So x gets the gradient of the *sum* of the processes' losses. DistributedDataParallel divides by the number of
    processes: with losses that are means over equal batches, its gradients are those of the mean over the global batch.

    Every process has to call this, and its backward, equally often; a batch may be empty (N = 0).

    Args:
        x: (N, C, H, W), any floating dtype, C the same in all processes. Arithmetic is float32 or wider.
        weight, bias: (C,). eps: added to the variance.

    Returns:
        weight and bias, as they came in but for their gradients' way back; mean and biased variance (C,), float32 or
        wider, and n, the elements per channel, as 0-d float64 on the device of x, without gradients. An empty global
        batch has mean and variance 0.

    Raises:
        ValueError: x is not 4-D or not floating-point.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"batch_statistics expects a floating-point x (N, C, H, W), got {x.dtype} {tuple(x.shape)}"
        )
    return BatchStatistics(*_BatchStatistics.apply(x, weight, bias, eps))


class _BatchStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, ...]:
        channels = x.shape[1]
        local = x.shape[0] * x.shape[2] * x.shape[3]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Counts are exact in float64 (not in float32 beyond 2^24), and 2 C + 1 numbers cost nothing in it.
        packed = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
        if local:
            variance, mean = torch.var_mean(wide, dim=_BATCH_DIMS, correction=0)
            packed[:channels] = mean
            packed[channels:-1] = variance.double() * local
            packed[-1] = local
        gathered = _all_gather(packed)
        means, squares, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
        count = counts.sum()
        divisor = count.clamp(min=1.0)
        mean = (counts * means).sum(dim=0) / divisor
        variance = (squares + counts * (means - mean).square()).sum(dim=0) / divisor
        mean, variance = mean.to(wide.dtype), variance.to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), divisor)
        ctx.mark_non_differentiable(mean, variance, count)
        return weight.view_as(weight), bias.view_as(bias), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_weight: torch.Tensor, d_bias: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        # The statistics of this batch went into the losses of all processes.
        total_weight, total_bias = _all_reduce(torch.stack((d_weight, d_bias))) / count
        slope = (weight * rstd.square() * total_weight).to(mean.dtype)
        offset = (weight * rstd * total_bias).to(mean.dtype)
        centred = x - mean[:, None, None]  # first: slope x - slope mean would cancel far from 0
        grad = centred.mul_(-slope[:, None, None]).sub_(offset[:, None, None])
        return grad.to(x.dtype), d_weight, d_bias, None


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _transport(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the group's collectives take it: NCCL's on CUDA devices, gloo's on the CPU."""
    return tensor.cuda() if "nccl" in dist.get_backend() else tensor.cpu()


def _all_gather(flat: torch.Tensor) -> torch.Tensor:
    """(n,) of every process as (world size, n), in the order of the ranks."""
    if not _initialised():
        return flat[None]
    own = _transport(flat)
    gathered = own.new_empty((world_size(), own.shape[0]))
    # Of a list: the collective into one tensor has had another name since PyTorch 2.13.
    dist.all_gather(list(gathered), own)
    return gathered.to(flat.device)


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the processes; ``tensor`` may be overwritten."""
    if not _initialised():
        return tensor
    total = _transport(tensor).contiguous()
    dist.all_reduce(total)
    return total.to(tensor.device)
