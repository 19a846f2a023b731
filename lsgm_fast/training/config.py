"""Everything that a training run depends on, as one file: what is written into its folder, and what resumes it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lsgm_fast.config import LSGMConfig, _Config, _require
from lsgm_fast.data import DataConfig
from lsgm_fast.errors import unknown_name
from lsgm_fast.presets import get_preset
from lsgm_fast.weighting import IW_MODES, LIKELIHOOD_MODES

STAGES = ("vae", "lsgm")
OPTIMIZERS = ("adamax", "adam", "adamw")
PRECISIONS = ("fp32", "bf16", "fp16")
REWEIGHT = "reweight"
Q_MODES = (REWEIGHT, *LIKELIHOOD_MODES)


@dataclass(frozen=True)
class OptimizerConfig(_Config):
    """An optimizer and its learning rate: linear from 0 to ``lr`` during the warm-up, then a cosine to ``lr_min``.

    ``name``: ``"adamax"`` (stage 1), ``"adam"`` (weight decay as an L2 term) or ``"adamw"`` (decoupled).
    """

    name: str = "adam"
    lr: float = 1e-3
    lr_min: float = 1e-3
    weight_decay: float = 3e-4
    eps: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise unknown_name("optimizer", self.name, OPTIMIZERS)
        _require(self.lr > 0.0, f"lr must be positive, got {self.lr}")
        _require(0.0 <= self.lr_min <= self.lr, f"lr_min must be in [0, lr={self.lr}], got {self.lr_min}")
        _require(self.weight_decay >= 0.0, f"weight_decay must not be negative, got {self.weight_decay}")
        _require(
            len(self.betas) == 2 and all(0.0 <= b < 1.0 for b in self.betas),
            f"betas must be two numbers in [0, 1), got {self.betas}",
        )


@dataclass(frozen=True)
class KLConfig(_Config):
    """The KL term's coefficient: ``start`` for ``hold`` of all steps, then linear to ``end`` over ``anneal`` of them.

    While it is below 1 and ``balance`` is set, the groups' terms are balanced (NVAE, Appendix A).
    """

    start: float = 1.0
    end: float = 1.0
    hold: float = 0.0
    anneal: float = 0.0
    balance: bool = True

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.start <= self.end, f"expected 0 <= start <= end, got {self.start} and {self.end}"
        )
        for name in ("hold", "anneal"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"{name} is a share of the steps in [0, 1], got {value}")


@dataclass(frozen=True)
class ObjectiveConfig(_Config):
    """Stage 2: which of Algorithms 1, 2 and 3 (paper, Appendix G.6), and what takes part.

    ``p_mode`` weights and draws times for the prior (:data:`~lsgm_fast.weighting.IW_MODES`). ``q_mode`` is for the
    encoder: ``"reweight"`` uses the prior's times with likelihood weights (Algorithm 1 where ``p_mode`` is
    ``ll_uniform`` or ``ll_iw``, else Algorithm 3), ``"ll_uniform"`` or ``"ll_iw"`` draw times of their own
    (Algorithm 2). ``disjoint``: the encoder's own noise as well. ``update_q_ema``: the encoder is trained against the
    averaged prior. ``train_vae`` False: the VAE stays as it is; ``frozen_bn`` ``"batch"`` lets its BatchNorm use and
    follow the batches all the same, as the published code does. ``drop_inactive``: latent channels with a KL of at
    most ``inactive_threshold`` nats when training starts are hidden from the network. ``control_variate``: subtract
    from the encoder's loss its estimate for a normal prior at the same time and noise, and add what that is on average,
    in closed form: the same gradient on average, with far less noise where the mixing is small.
    """

    p_mode: str = "ll_iw"
    q_mode: str = REWEIGHT
    disjoint: bool = False
    train_vae: bool = True
    frozen_bn: str = "running"
    update_q_ema: bool = False
    subvp_like_vp: bool = False
    drop_inactive: bool = False
    inactive_threshold: float = 0.1
    control_variate: bool = False

    def __post_init__(self) -> None:
        if self.p_mode not in IW_MODES:
            raise unknown_name("p_mode", self.p_mode, IW_MODES)
        if self.q_mode not in Q_MODES:
            raise unknown_name("q_mode", self.q_mode, Q_MODES)
        if self.frozen_bn not in ("running", "batch"):
            raise unknown_name("frozen_bn", self.frozen_bn, ("running", "batch"))
        own_times = self.q_mode != REWEIGHT
        _require(
            own_times or not self.disjoint,
            "disjoint training draws the encoder's times anew: set q_mode to 'll_iw' or 'll_uniform'",
        )
        _require(
            own_times or not self.update_q_ema,
            "update_q_ema needs an evaluation of its own for the encoder: set q_mode to 'll_iw' or 'll_uniform'",
        )

        likelihood_mode = self.p_mode if self.q_mode == REWEIGHT else self.q_mode
        _require(
            not self.control_variate or (likelihood_mode.endswith("_iw") and likelihood_mode != "rescale_iw"),
            f"control_variate needs times that are drawn by importance, got {likelihood_mode!r}: the closed form is "
            "that of the whole integral, of which the uniform modes leave the factor 1 - time_eps out",
        )

    @property
    def algorithm(self) -> int:
        """1, 2 or 3."""
        if self.q_mode != REWEIGHT:
            return 2
        return 1 if self.p_mode in LIKELIHOOD_MODES else 3


@dataclass(frozen=True)
class RegularisationConfig(_Config):
    """Spectral and BatchNorm regularisation (NVAE, section 3.4): lambda x (sum of sigma_max + sum of max |gamma|).

    ``vae``, ``score``: lambda; ``vae_start``: its value where the KL coefficient is small, from which it is
    interpolated in the logarithm (None: constant). ``score_convolutions``: include the score network's convolutions,
    else its GroupNorms alone (as the published CIFAR-10 recipes do).
    """

    vae: float = 0.0
    vae_start: float | None = None
    score: float = 0.0
    score_convolutions: bool = True

    def __post_init__(self) -> None:
        _require(
            min(self.vae, self.score) >= 0.0, f"lambda must not be negative, got {self.vae}, {self.score}"
        )
        _require(
            self.vae_start is None or (self.vae_start > 0.0 and self.vae > 0.0),
            f"vae_start is interpolated in the logarithm to vae: both must be positive, got {self.vae_start}",
        )


@dataclass(frozen=True)
class TrainingConfig(_Config):
    """One training run.

    ``stage``: ``"vae"`` (stage 1) or ``"lsgm"`` (stage 2). ``vae``: the stage-1 file that stage 2 starts from.
    ``batch_size``: images per step, over all processes and the ``accumulate`` parts that a step may be split into.
    Length: ``steps``, or ``epochs`` where that is None. ``warmup_epochs``, ``warmup_steps``: likewise.
    ``precision``: of the networks; losses, weights and optimizers stay in float32. ``channels_last``: memory format of
    the networks. ``recompute``: activations anew in the backward pass, for memory. ``clip_norm``: largest norm of each
    optimizer's gradients. ``ema``: decay of the score network's average.
    Every ``log_every`` steps a line is logged, every ``save_every`` a checkpoint written (the newest ``keep`` stay),
    every ``sample_every`` a grid of images, every ``eval_every`` the NELBO of up to ``eval_images`` held-out ones
    (0: never).
    """

    stage: str = "vae"
    vae: str | None = None
    model: LSGMConfig = field(default_factory=LSGMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 32
    accumulate: int = 1
    epochs: float = 100.0
    steps: int | None = None
    warmup_epochs: float = 0.0
    warmup_steps: int | None = None
    seed: int = 0
    precision: str = "fp32"
    channels_last: bool = False
    recompute: bool = False
    clip_norm: float | None = None
    ema: float = 0.9999
    vae_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    score_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    regularisation: RegularisationConfig = field(default_factory=RegularisationConfig)
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 2000
    eval_every: int = 2000
    eval_images: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise unknown_name("stage", self.stage, STAGES)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        for name in ("batch_size", "accumulate", "log_every", "save_every", "keep", "eval_images"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sample_every", "eval_every"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(self.epochs > 0.0, f"epochs must be positive, got {self.epochs}")
        _require(0.0 <= self.ema < 1.0, f"ema must be in [0, 1), got {self.ema}")
        _require(
            self.clip_norm is None or self.clip_norm > 0.0,
            f"clip_norm must be positive, got {self.clip_norm}",
        )
        _require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63 - 1, got {self.seed}")
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size={self.batch_size} cannot be split into accumulate={self.accumulate} equal parts",
        )
        if self.stage == "lsgm":
            _require(self.model.score is not None, "stage 'lsgm' needs a score network: model.score is empty")

    def total_steps(self, images: int) -> int:
        """Steps of the whole run on a data set of that size."""
        return (
            self.steps if self.steps is not None else max(1, round(self.epochs * (images // self.batch_size)))
        )

    def warmup(self, images: int) -> int:
        """Steps of the warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.warmup_epochs * (images // self.batch_size))


# What may differ when a run goes on: none of it changes a number of the training itself.
FREE_TO_CHANGE = (
    "log_every",
    "save_every",
    "sample_every",
    "eval_every",
    "eval_images",
    "keep",
    "data.workers",
)


def from_mapping(values: dict[str, Any]) -> TrainingConfig:
    """A configuration from a YAML file's contents; ``model`` may be a preset's name, or have a ``preset`` to change.

    Raises:
        ValueError: unknown names (the closest is named) or values that do not fit.
    """
    values = dict(values)
    model = values.get("model")
    if isinstance(model, str):
        values["model"] = get_preset(model)
    elif isinstance(model, dict) and "preset" in model:
        model = dict(model)
        base = get_preset(model.pop("preset")).to_dict()
        values["model"] = merged(base, model)
    return TrainingConfig.from_dict(values)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a YAML file, a mapping.

    Raises:
        ValueError: no YAML, or no mapping. OSError: the file cannot be read.
    """
    import yaml

    text = Path(path).read_text()
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, got a {type(values).__name__}")
    return values


def write_config(config: TrainingConfig, path: Path) -> None:
    """Write ``config`` as YAML, complete."""
    import yaml

    from lsgm_fast.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``["score_optimizer.lr=1e-4", ...]`` put into a configuration's mapping; values are read as YAML.

    Raises:
        ValueError: no ``key=value``.
    """
    import yaml

    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ValueError(f"an override is key=value, as in score_optimizer.lr=1e-4; got {override!r}")
        change = yaml.safe_load(text)
        for key in reversed(path.split(".")):
            change = {key: change}
        values = merged(values, change)
    return values


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` put in, mapping by mapping. A preset's name under ``model`` can be changed in parts."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        if key == "model" and isinstance(old, str) and isinstance(value, dict):
            old = {"preset": old}
        both = isinstance(value, dict) and isinstance(old, dict)
        out[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return out


def differences(old: TrainingConfig, new: TrainingConfig) -> list[str]:
    """``key: old -> new`` for every option that changes the training's numbers."""
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {flat_old.get(key)} -> {flat_new.get(key)}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key) and key not in FREE_TO_CHANGE
    ]


def _flat(config: _Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, _Config):
            yield from _flat(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value
