"""A run's configuration from a recipe, a file and the command line, in this order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lsgm_fast.config import LSGMConfig
from lsgm_fast.training.config import TrainingConfig, apply_overrides, from_mapping, merged, read_config
from lsgm_fast.training.recipes import RECIPES, get_recipe


def assemble(
    stage: str,
    *,
    recipe: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    vae: str | None = None,
) -> TrainingConfig:
    """The configuration of a run.

    Args:
        stage: ``"vae"`` or ``"lsgm"``. recipe: a name of :data:`~lsgm_fast.training.RECIPES`. file: YAML.
        overrides: ``key=value``. vae: the stage-1 file of stage 2, whose architecture replaces the recipe's.

    Raises:
        ValueError: nothing given to start from, unknown names (the closest is named), values that do not fit.
    """
    if recipe is None and file is None:
        raise ValueError(f"say what to train: --recipe ({', '.join(RECIPES)}) or --config FILE")
    values: dict[str, Any] = {}
    if recipe is not None:
        both = get_recipe(recipe)
        values = (both.vae if stage == "vae" else both.lsgm).to_dict()
    if file is not None:
        given = read_config(file)
        if given.get("stage", stage) != stage:
            other = "train" if stage == "vae" else "train-vae"
            raise ValueError(f"{file} is for stage {given['stage']!r}: use lsgm-fast {other}")
        values = merged(values, given)
    values = apply_overrides(values, overrides) | {"stage": stage}
    if vae is not None:
        values["vae"] = vae
    if stage == "lsgm" and values.get("vae") is not None:
        from lsgm_fast.checkpoints import load

        values["model"] = _around(load(values["vae"]), values.get("model"))
    return from_mapping(values)


def _around(stage1: Any, model: Any) -> dict[str, Any]:
    """The model's mapping with the VAE of a file, and a score network that fits its latent."""
    vae = stage1.config.vae
    if isinstance(model, (str, type(None))):
        model = {"preset": model} if model is not None else LSGMConfig().to_dict()
    channels, size, _ = vae.latent_shape
    score = merged(model.get("score") or {}, {"latent_channels": channels, "latent_size": size})
    return merged(model, {"vae": vae.to_dict(), "score": score})
