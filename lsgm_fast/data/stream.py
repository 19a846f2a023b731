"""Batches: which images a step has, and what is drawn for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lsgm_fast import random
from lsgm_fast.data.config import DataConfig
from lsgm_fast.data.order import FIXED_SEED, permutation
from lsgm_fast.data.sources import ImageSource
from lsgm_fast.images import UInt8Array
from lsgm_fast.reference.philox_normal import check_seed


@dataclass
class Batch:
    """One process's part of a batch.

    ``images``: (B, C, H, W) float32 in [0, 1], of their natural size. ``indices``: (B,) int64, into the source.
    ``positions``: (B,) int64, position of each sample in the whole stream, ``step * batch_size + i``: an index for
    draws that must not depend on the number of processes.
    """

    images: Tensor
    indices: Tensor
    positions: Tensor


@dataclass(frozen=True)
class _Plan:
    """What one process has to prepare for one step. ``epoch``: None outside of training."""

    indices: npt.NDArray[np.int64]
    first_position: int
    epoch: int | None


_Prepared = tuple[_Plan, UInt8Array]


class _Preparation(Dataset[_Prepared]):
    """Makes the images of plans, here or in a worker process: 8-bit, binarised ones 0 and 255."""

    def __init__(self, source: ImageSource, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __getitem__(self, plan: _Plan) -> _Prepared:
        images = np.empty((len(plan.indices), *self.source.shape), np.uint8)
        for row, index in enumerate(plan.indices):
            images[row] = self.source[int(index)]
        indices = torch.from_numpy(plan.indices)
        if self.config.flip and plan.epoch is not None:
            mirrored = (random.uniform(self.seed, indices, "data.flip", substream=plan.epoch) < 0.5).numpy()
            images[mirrored] = images[mirrored, :, :, ::-1]
        if self.config.binarise != "none":
            if self.config.binarise == "dynamic" and plan.epoch is not None:
                seed, name, substream = self.seed, "data.binarise", plan.epoch
            else:
                seed, name, substream = FIXED_SEED, "data.binarise.static", 0
            threshold = random.uniform(seed, indices, name, self.source.shape, substream=substream).numpy()
            images = (threshold < images / np.float32(255)) * np.uint8(255)
        return plan, images


def _batch(prepared: _Prepared) -> Batch:
    plan, images = prepared
    first = plan.first_position
    return Batch(
        images=torch.from_numpy(images).to(torch.float32) / 255.0,
        indices=torch.from_numpy(plan.indices),
        positions=torch.arange(first, first + len(images)),
    )


def _unchanged(item: Any) -> Any:
    return item


def batches(
    source: ImageSource,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    steps: int | None = None,
    rank: int = 0,
    world: int = 1,
    train: bool = True,
) -> Iterator[Batch]:
    """The stream of batches of a training run, or one pass in the order of the source (``train=False``).

    Training: an epoch is a permutation of the source by ``(seed, epoch)``, cut into ``len(source) // batch_size``
    batches; the remainder is left out. So a step's images are a function of (seed, step), and a run is resumed with
    ``first_step``. Draws (flips, binarisation) are keyed by (seed, index, epoch). Neither depends on ``world``, and
    the draws not on ``batch_size``.

    ``train=False``: nothing is drawn for training (no flips; ``"dynamic"`` binarisation acts as ``"static"``). The
    last batch may be smaller; every process still gets one, which may then be empty.

    Args:
        batch_size: images of one step over all processes.
        seed: of the order and of the draws, 0 to 2**64 - 1.
        first_step: step to begin with.
        steps: how many; None: endless in training, else to the end of the pass.
        rank: which process this is: it gets the images ``[rank b / world, (rank + 1) b / world)`` of each batch.
        world: how many processes there are; in training it divides ``batch_size``.

    Raises:
        ValueError: an argument outside its range, a batch that cannot be shared among the processes, or one larger
            than the source in training.
    """
    _check(len(source), batch_size, seed, first_step, steps, rank, world, train)
    if train:
        plans = _training_plans(len(source), batch_size, seed, first_step, rank, world)
    else:
        plans = _pass_plans(len(source), batch_size, first_step, rank, world)
    plans = itertools.islice(plans, steps)
    return map(_batch, _prepared(_Preparation(source, config, seed), plans, config.workers))


def _check(
    count: int,
    batch_size: int,
    seed: int,
    first_step: int,
    steps: int | None,
    rank: int,
    world: int,
    train: bool,
) -> None:
    check_seed(seed)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if first_step < 0 or (steps is not None and steps < 0):
        raise ValueError(
            f"first_step and steps must not be negative, got first_step={first_step}, steps={steps}"
        )
    if not 0 <= rank < world:
        raise ValueError(f"expected 0 <= rank < world, got rank={rank}, world={world}")
    if not train:
        return
    if batch_size % world:
        raise ValueError(
            f"batch of {batch_size} for {world} processes: batch_size counts the images of all processes, "
            f"so it must be a multiple of {world}"
        )
    if batch_size > count:
        raise ValueError(
            f"batch of {batch_size}, but the data have {count} images: choose a batch of at most {count}"
        )


def _training_plans(
    count: int, batch_size: int, seed: int, first_step: int, rank: int, world: int
) -> Iterator[_Plan]:
    per_epoch = count // batch_size
    share = batch_size // world
    known = None
    for step in itertools.count(first_step):
        epoch, within = divmod(step, per_epoch)
        if epoch != known:
            order, known = permutation(count, seed, "data.order", substream=epoch), epoch
        start = within * batch_size + rank * share
        yield _Plan(order[start : start + share].copy(), step * batch_size + rank * share, epoch)


def _pass_plans(count: int, batch_size: int, first_step: int, rank: int, world: int) -> Iterator[_Plan]:
    for start in range(first_step * batch_size, count, batch_size):
        size = min(batch_size, count - start)
        low, high = start + rank * size // world, start + (rank + 1) * size // world
        yield _Plan(np.arange(low, high), low, None)


def _prepared(preparation: _Preparation, plans: Iterator[_Plan], workers: int) -> Iterator[_Prepared]:
    if workers == 0:
        return map(preparation.__getitem__, plans)
    # Each plan is one item, so it is the workers that make batches. They are spawned: a fork would copy the locks of
    # running threads, and CUDA does not survive it. They send arrays and not tensors, which would need shared memory
    # (little in containers) and can abort a worker that is told to stop while it sends. The generator of its own
    # keeps PyTorch's global one untouched.
    loader = DataLoader(
        preparation,
        batch_size=None,
        sampler=plans,
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context="spawn",
        generator=torch.Generator(),
    )
    return iter(loader)
