"""What is profiled: one stage of a model, as a function without arguments that does it once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lsgm_fast.errors import unknown_name
from lsgm_fast.models.lsgm import LSGM
from lsgm_fast.presets import PRESETS

STAGES = ("sample", "score", "decode", "train")
# Of a training run only the first steps are taken.
_RUN_STEPS = 1_000_000


@dataclass(frozen=True)
class Workload:
    """One stage of a model.

    Attributes:
        model: a preset or recipe (random weights), ``"demo"`` or a checkpoint. stage: ``"sample"`` (images),
            ``"score"`` (one evaluation of the score network), ``"decode"`` (images from latents) or ``"train"`` (one
            step of the trainer on random pixels; weights are random).
        batch: images. solver, evaluations, tol: of ``"sample"``, as in :meth:`LSGM.sample`. seed: of all draws.
        channels_last: memory format of the networks.
    """

    model: str = "demo"
    stage: str = "sample"
    batch: int = 16
    solver: str = "auto"
    evaluations: int | None = None
    tol: float | None = None
    seed: int = 0
    channels_last: bool = False

    def check(self) -> None:
        """Raise ``ValueError`` for the first thing that does not fit, before anything is loaded."""
        if self.stage not in STAGES:
            raise unknown_name("stage", self.stage, STAGES)
        if self.batch < 1:
            raise ValueError(f"the batch must be at least 1, got {self.batch}")
        if self.stage != "sample" and (
            self.solver != "auto" or self.evaluations is not None or self.tol is not None
        ):
            raise ValueError(
                f"solver, evaluations and tol are of stage 'sample': stage {self.stage!r} runs no solver"
            )


@contextmanager
def prepared(workload: Workload, device: str) -> Iterator[Callable[[], object]]:
    """The function that does the workload once; temporary files last as long as the block.

    Raises:
        ValueError, CheckpointError: no such model, or it lacks the part that the stage needs.
    """
    workload.check()
    if workload.stage == "train":
        with TemporaryDirectory(prefix="lsgm-fast-profile-") as folder:
            yield _training(workload, device, Path(folder))
        return
    model = _model(workload.model, device)
    if workload.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    yield {"sample": _sampling, "score": _evaluation, "decode": _decoding}[workload.stage](model, workload)


def _model(name: str, device: str) -> LSGM:
    from lsgm_fast.checkpoints import build, load
    from lsgm_fast.training.recipes import RECIPES

    if name in PRESETS:
        return build(name, device)
    if name in RECIPES:
        with torch.device(device):
            return LSGM.from_config(RECIPES[name].lsgm.model).eval()
    if name != "demo" and not os.path.exists(name) and not Path(name).suffix:
        raise unknown_name("model", name, dict.fromkeys(("demo", *PRESETS, *RECIPES)))
    return load(name, device)


def _sampling(model: LSGM, workload: Workload) -> Callable[[], object]:
    def sample() -> object:
        return model.sample(
            workload.batch,
            batch_size=workload.batch,
            seed=workload.seed,
            solver=workload.solver,
            evaluations=workload.evaluations,
            tol=workload.tol,
        )

    return sample


def _latents(model: LSGM, workload: Workload) -> torch.Tensor:
    generator = torch.Generator().manual_seed(workload.seed)
    z = torch.randn(workload.batch, *model.latent_shape, generator=generator)
    return z.to(device=model.device, dtype=model.dtype)


def _evaluation(model: LSGM, workload: Workload) -> Callable[[], object]:
    z = _latents(model, workload)
    t = torch.full((workload.batch,), 0.5, device=z.device)

    @torch.no_grad()
    def evaluate() -> object:
        return model.predict_noise(z, t)

    return evaluate


def _decoding(model: LSGM, workload: Workload) -> Callable[[], object]:
    z = _latents(model, workload)
    return lambda: model.decode(z, seed=workload.seed)


def _training(workload: Workload, device: str, folder: Path) -> Callable[[], object]:
    from lsgm_fast.data import DataConfig, batches
    from lsgm_fast.training import RECIPES, KLConfig, Trainer, TrainingConfig

    if workload.model in RECIPES:
        config = RECIPES[workload.model].lsgm
    else:
        model = _model(workload.model, "cpu").config
        if model is None:
            raise ValueError(
                f"{workload.model} has no configuration to train with: name a preset or a recipe"
            )
        config = TrainingConfig(stage="vae" if model.score is None else "lsgm", model=model)
    vae = config.model.vae
    side = vae.image_size - 2 * vae.crop
    pixels = np.random.default_rng(workload.seed).integers(
        0, 256, (2 * workload.batch, side, side, vae.image_channels), np.uint8
    )
    np.savez(folder / "images.npz", images=pixels)
    binarise = "dynamic" if vae.decoder_distribution == "bernoulli" else "none"
    config = config.replace(
        vae=None,
        data=DataConfig(str(folder / "images.npz"), binarise=binarise, held_out=0),
        # In most of a run the coefficient is 1.
        kl=KLConfig(),
        # It would look at many batches before the first step.
        objective=config.objective.replace(drop_inactive=False),
        batch_size=workload.batch,
        accumulate=1,
        steps=_RUN_STEPS,
        warmup_steps=_RUN_STEPS,
        eval_every=0,
        seed=workload.seed,
        channels_last=workload.channels_last or config.channels_last,
    )
    trainer = Trainer(config, folder / "run", device=device, progress=False)
    trainer._train_mode()
    stream: Any = batches(
        trainer.source, config.data, batch_size=workload.batch, seed=workload.seed, steps=_RUN_STEPS
    )
    return lambda: trainer._one_step(stream)
