"""A training recipe per published configuration, and those of the models that come with lsgm-fast.

The published commands are in ``docs/training.md`` beside their recipe here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lsgm_fast.config import LSGMConfig, SamplingConfig, ScoreConfig, VAEConfig
from lsgm_fast.data import DataConfig
from lsgm_fast.errors import unknown_name
from lsgm_fast.presets import get_preset
from lsgm_fast.training.config import (
    KLConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RegularisationConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class Recipe:
    """Both stages of one model; the second lacks the path of the first one's result."""

    vae: TrainingConfig
    lsgm: TrainingConfig


# Stage 1 of every published recipe.
_VAE_OPTIMIZER = OptimizerConfig("adamax", lr=1e-2, lr_min=1e-4, weight_decay=3e-4, eps=1e-3)
# Stage 2: the VAE goes on with a cosine, the score network at a constant rate.
_VAE_FINE_TUNING = OptimizerConfig("adamw", lr=1e-4, lr_min=1e-5, weight_decay=3e-4, eps=1e-3)
_CONTINUED_ANNEALING = KLConfig(start=0.7, end=1.0, anneal=0.1)


def _score_optimizer(lr: float, lr_min: float | None = None) -> OptimizerConfig:
    return OptimizerConfig(
        "adamw", lr=lr, lr_min=lr if lr_min is None else lr_min, weight_decay=3e-4, eps=1e-4
    )


def _stage1(
    preset: str,
    data: DataConfig,
    batch_size: int,
    epochs: float,
    anneal: float,
    kl_max: float,
    regularisation: float,
) -> TrainingConfig:
    return TrainingConfig(
        stage="vae",
        model=get_preset(preset),
        data=data,
        batch_size=batch_size,
        epochs=epochs,
        warmup_epochs=5.0,
        precision="fp16",
        vae_optimizer=_VAE_OPTIMIZER,
        kl=KLConfig(start=1e-4, end=kl_max, hold=1e-4, anneal=anneal),
        regularisation=RegularisationConfig(vae=regularisation),
    )


def _stage2(
    stage1: TrainingConfig,
    objective: ObjectiveConfig,
    *,
    batch_size: int,
    epochs: float,
    lr: float,
    warmup: float,
    regularisation: RegularisationConfig,
    anneal: bool = False,
    vae_optimizer: OptimizerConfig = _VAE_FINE_TUNING,
) -> TrainingConfig:
    return TrainingConfig(
        stage="lsgm",
        model=stage1.model,
        data=stage1.data,
        batch_size=batch_size,
        epochs=epochs,
        warmup_epochs=warmup,
        precision="fp16",
        vae_optimizer=vae_optimizer,
        score_optimizer=_score_optimizer(lr),
        kl=_CONTINUED_ANNEALING if anneal else KLConfig(),
        objective=objective,
        regularisation=regularisation,
    )


def _digits() -> Recipe:
    """The embedded model: small enough for two processor cores and an evening."""
    vae = VAEConfig(
        image_channels=1,
        crop=2,
        encoder_channels=24,
        decoder_channels=24,
        channel_mult=(1, 2, 2),
        preprocess_blocks=2,
        preprocess_cells=1,
        postprocess_blocks=2,
        postprocess_cells=1,
        encoder_cells_per_group=1,
        decoder_cells_per_group=1,
        groups_per_scale=2,
        latents_per_group=4,
        architecture="res_bnswish",
        decoder_distribution="bernoulli",
    )
    score = ScoreConfig(
        latent_channels=8,
        latent_size=8,
        channels=64,
        channel_mult=(1, 1),
        blocks_per_level=2,
        attention_levels=(),
        resample="plain",
        mixing_logit_init=-3.0,
    )
    model = LSGMConfig(vae, score, sampling=SamplingConfig(ode_eps=1e-5, tol=1e-2))
    data = DataConfig("digits", binarise="dynamic")
    stage1 = TrainingConfig(
        stage="vae",
        model=model,
        data=data,
        batch_size=50,
        steps=10000,
        warmup_steps=200,
        channels_last=True,
        vae_optimizer=OptimizerConfig("adamax", lr=4e-3, lr_min=1e-4, weight_decay=3e-4, eps=1e-3),
        # Less pressure than the bound's: what N(0, I) would cost, the learned prior need not.
        kl=KLConfig(start=1e-4, end=0.7, hold=1e-4, anneal=0.3),
        regularisation=RegularisationConfig(vae=1e-2),
        eval_every=1000,
    )
    stage2 = TrainingConfig(
        stage="lsgm",
        model=model,
        data=data,
        batch_size=50,
        steps=12000,
        warmup_steps=300,
        channels_last=True,
        clip_norm=100.0,
        ema=0.999,
        vae_optimizer=_VAE_FINE_TUNING.replace(lr=5e-4),
        score_optimizer=_score_optimizer(1e-3, 1e-5),
        kl=_CONTINUED_ANNEALING,
        objective=ObjectiveConfig(p_mode="drop_sigma2t_iw", control_variate=True),
        sample_every=1000,
        eval_every=1000,
        regularisation=RegularisationConfig(vae=1e-2),
    )
    return Recipe(stage1, stage2)


def _digits14() -> Recipe:
    """The digits at half the size: a few minutes a stage on one processor core, for ablations."""
    model = get_preset("tiny-digits14")
    base = _digits()
    changes = {
        "model": model,
        "data": base.vae.data.replace(size=model.vae.image_size - 2 * model.vae.crop),
        "batch_size": 32,
    }
    stage1 = base.vae.replace(**changes, steps=3000, warmup_steps=100, kl=base.vae.kl.replace(end=1.0))
    stage2 = base.lsgm.replace(
        **changes,
        steps=3000,
        warmup_steps=100,
        ema=0.99,
        kl=KLConfig(),
        vae_optimizer=_VAE_FINE_TUNING,
        objective=ObjectiveConfig(p_mode="ll_iw"),
    )
    return Recipe(stage1, stage2)


def _text() -> Recipe:
    """English text, symbol by symbol: some minutes a stage on one processor core."""
    model = get_preset("tiny-text")
    data = DataConfig("pydoc", size=model.vae.image_size, held_out=150, symbols=model.vae.symbols)
    stage1 = TrainingConfig(
        stage="vae",
        model=model,
        data=data,
        batch_size=32,
        steps=1500,
        warmup_steps=50,
        channels_last=True,
        vae_optimizer=OptimizerConfig("adamax", lr=4e-3, lr_min=1e-4, weight_decay=3e-4, eps=1e-3),
        # With a coefficient of 1, a symbol's code costs as much under N(0, I) as it saves: little would be coded.
        kl=KLConfig(start=0.1, end=0.5, anneal=0.5),
        regularisation=RegularisationConfig(vae=1e-2),
        eval_every=500,
        sample_every=500,
        eval_images=150,
    )
    stage2 = TrainingConfig(
        stage="lsgm",
        model=model,
        data=data,
        batch_size=32,
        steps=3000,
        warmup_steps=100,
        channels_last=True,
        clip_norm=100.0,
        ema=0.995,
        vae_optimizer=_VAE_FINE_TUNING.replace(lr=3e-4),
        score_optimizer=_score_optimizer(1e-3, 1e-5),
        objective=ObjectiveConfig(p_mode="ll_iw"),
        regularisation=RegularisationConfig(vae=1e-2),
        eval_every=500,
        sample_every=500,
        eval_images=150,
    )
    return Recipe(stage1, stage2)


_BINARY_DATA = DataConfig("data/mnist", binarise="dynamic")
_CIFAR10_DATA = DataConfig("data/cifar-10-python.tar.gz", flip=True)
_CELEBA_DATA = DataConfig("data/celeba-hq-256", flip=True)


def _binary(
    preset: str, data: DataConfig, kl_max: float, batch_size: int, epochs: float, score_regularisation: float
) -> Recipe:
    stage1 = _stage1(preset, data, batch_size, 200, anneal=1.0, kl_max=kl_max, regularisation=1e-2)
    stage2 = _stage2(
        stage1,
        ObjectiveConfig(p_mode="ll_iw", drop_inactive=True),
        batch_size=32,
        epochs=epochs,
        lr=3e-4,
        warmup=20,
        regularisation=RegularisationConfig(vae=1e-2, score=score_regularisation),
        anneal=True,
    )
    return Recipe(stage1, stage2)


def _cifar10(
    preset: str, p_mode: str, epochs: float, vae_anneal: float, kl_max: float, anneal: bool
) -> Recipe:
    stage1 = _stage1(
        preset, _CIFAR10_DATA, 256, epochs, anneal=vae_anneal, kl_max=kl_max, regularisation=1e-2
    )
    # Only the likelihood recipe's regulariser sees the score network's convolutions.
    regularisation = RegularisationConfig(vae=1e-2, score=1e-2, score_convolutions=preset == "cifar10-nll")
    stage2 = _stage2(
        stage1,
        ObjectiveConfig(p_mode=p_mode),
        batch_size=256,
        epochs=1875,
        lr=1e-4,
        warmup=5,
        regularisation=regularisation,
        anneal=anneal,
    )
    return Recipe(stage1, stage2)


def _celebahq256(
    preset: str,
    objective: ObjectiveConfig,
    *,
    epochs: float = 1000,
    batch_size: int = 64,
    lr: float = 1e-4,
    lr_vae: float = 1e-4,
    anneal: bool = False,
) -> Recipe:
    stage1 = _stage1(preset, _CELEBA_DATA, 64, 200, anneal=1.0, kl_max=0.7, regularisation=3e-2)
    stage2 = _stage2(
        stage1,
        objective,
        batch_size=batch_size,
        epochs=epochs,
        lr=lr,
        warmup=20,
        regularisation=RegularisationConfig(vae=0.1, score=1e-2),
        anneal=anneal,
        vae_optimizer=_VAE_FINE_TUNING.replace(lr=lr_vae),
    )
    return Recipe(stage1, stage2)


_DISJOINT = ObjectiveConfig(p_mode="drop_sigma2t_iw", q_mode="ll_iw", disjoint=True)

RECIPES: dict[str, Recipe] = {
    "digits": _digits(),
    "digits14": _digits14(),
    "text": _text(),
    "mnist": _binary("mnist", _BINARY_DATA, 0.7, 100, 800, 0.0),
    "omniglot": _binary("omniglot", _BINARY_DATA.replace(source="data/omniglot.npz"), 1.0, 64, 1500, 1e-3),
    "cifar10-fid": _cifar10("cifar10-fid", "drop_all_iw", 400, 1.0, 0.7, anneal=True),
    "cifar10-balanced": _cifar10("cifar10-balanced", "drop_all_iw", 600, 0.5, 1.0, anneal=False),
    "cifar10-nll": _cifar10("cifar10-nll", "ll_uniform", 400, 1.0, 0.7, anneal=True),
    "celebahq256-quantitative": _celebahq256(
        "celebahq256-quantitative", _DISJOINT.replace(drop_inactive=True)
    ),
    "celebahq256-qualitative-stage2": _celebahq256(
        "celebahq256-qualitative-stage2", _DISJOINT.replace(update_q_ema=True), lr_vae=8e-5, anneal=True
    ),
    # A new prior for the VAE of the recipe above, which stays as it is.
    "celebahq256-qualitative": _celebahq256(
        "celebahq256-qualitative",
        ObjectiveConfig(p_mode="drop_sigma2t_iw", train_vae=False, frozen_bn="batch"),
        epochs=1500,
        batch_size=96,
        lr=6e-5,
    ),
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; an unknown one raises ``ValueError`` with the list and the closest."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]
