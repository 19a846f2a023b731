"""``docs/training.md`` says what the code does: every option, every recipe, every command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lsgm_fast.cli import app
from lsgm_fast.training import RECIPES, TrainingConfig
from lsgm_fast.training.assemble import assemble
from lsgm_fast.training.config import FREE_TO_CHANGE, apply_overrides, from_mapping
from lsgm_fast.weighting import IW_MODES

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text(encoding="utf-8")


def rows(*columns: str) -> list[list[str]]:
    """The cells of the table below the heading that begins with these columns."""
    heading = "| " + " | ".join(columns) + " |"
    (start,) = [i for i, line in enumerate(PAGE.splitlines()) if line.startswith(heading)]
    found = []
    for line in PAGE.splitlines()[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return found


def blocks(kind: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == kind]


def commands() -> list[list[str]]:
    """The arguments of every ``lsgm-fast`` on the page, also where torchrun starts it."""
    found = []
    for line in "".join(blocks()).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["torchrun"]:
            found.append(words[words.index("lsgm_fast") + 1 :])
        elif words[:1] == ["lsgm-fast"]:
            found.append(words[1:])
    return found


def options(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_option_is_there_with_its_default() -> None:
    table = {name.strip("`"): default.strip("`") for name, default, _ in rows("option", "default")}
    known = TrainingConfig().to_dict()
    del known["model"]
    assert len(rows("option", "default")) == len(table) and set(table) == set(options(known))
    for name, default in table.items():
        value: Any = known
        for key in name.split("."):
            value = value[key]
        # Read as on the command line.
        read: Any = apply_overrides({}, [f"{name}={default}"])
        assert from_mapping(read) == TrainingConfig(), name
        for key in name.split("."):
            read = read[key]
        assert read == value, name


def test_options_and_modes_named_in_the_text_exist() -> None:
    known = set(options(TrainingConfig().to_dict())) | {"model.preset", "model.vae", "model.score"}
    known |= {"model.sde", "model.sampling", "model.vae.encoder_channels", "model.safetensors"}
    groups = "data|objective|kl|regularisation|vae_optimizer|score_optimizer|model"
    named = set(re.findall(rf"`((?:{groups})\.[a-z_]+(?:\.[a-z_]+)?)[`=]", PAGE))
    assert len(named) > 30 and named <= known
    for mode in IW_MODES:
        assert mode in PAGE or f"`{mode.rsplit('_', 1)[0]}_*`" in PAGE, mode
    resume = PAGE.split("## Kill and resume")[1].split("\n## ")[0]
    assert all(f"`{name}`" in resume for name in FREE_TO_CHANGE)


def test_stage_1_of_every_recipe() -> None:
    table = {row[0].strip("`"): row[1:] for row in rows("recipe", "`batch_size`", "length", "`kl.anneal`")}
    assert list(table) == list(RECIPES)
    for name, (batch, length, anneal, end, regularisation, *_) in table.items():
        config = RECIPES[name].vae
        assert int(batch) == config.batch_size
        assert length == _length(config)
        assert (float(anneal), float(end)) == (config.kl.anneal, config.kl.end)
        assert float(regularisation) == config.regularisation.vae
        # What the text above the table says of all published ones.
        if name not in ("digits", "digits14", "text"):
            optimizer = config.vae_optimizer
            assert (optimizer.name, optimizer.lr, optimizer.lr_min) == ("adamax", 1e-2, 1e-4)
            assert (optimizer.weight_decay, optimizer.eps) == (3e-4, 1e-3)
            assert (config.warmup_epochs, config.precision, config.kl.start) == (5.0, "fp16", 1e-4)


def test_stage_2_of_every_recipe() -> None:
    table = {row[0].strip("`"): row[1:] for row in rows("recipe", "`batch_size`", "length", "score `lr`")}
    assert list(table) == list(RECIPES)
    for name, (batch, length, lr, algorithm, mode, start, lambdas, published, *_) in table.items():
        config = RECIPES[name].lsgm
        assert int(batch) == config.batch_size
        assert length == _length(config)
        assert float(lr) == config.score_optimizer.lr
        frozen = "" if config.objective.train_vae else ", VAE frozen"
        assert algorithm == f"{config.objective.algorithm}{frozen}"
        assert mode == f"`{config.objective.p_mode}`"
        assert float(start) == config.kl.start
        r = config.regularisation
        assert [float(text) for text in lambdas.split(",")] == [r.vae, r.score]
        for flag, on in (
            ("--update_q_ema", config.objective.update_q_ema),
            ("--disjoint_training", config.objective.disjoint),
        ):
            assert (flag in published) == on, (name, flag)
        assert config.vae_optimizer.name == "adamw" and config.score_optimizer.name == "adamw"
        if name not in ("digits", "digits14", "text"):
            warmup = 5.0 if name.startswith("cifar10") else 20.0
            assert (config.warmup_epochs, config.precision, config.ema) == (warmup, "fp16", 0.9999)
            assert config.score_optimizer.lr_min == config.score_optimizer.lr
            assert (config.score_optimizer.eps, config.vae_optimizer.eps) == (1e-4, 1e-3)
            lr_vae = 8e-5 if "rate 8e-5" in published else 1e-4
            assert (config.vae_optimizer.lr, config.vae_optimizer.lr_min) == (lr_vae, 1e-5)


def _length(config: TrainingConfig) -> str:
    return f"{config.steps} steps" if config.steps is not None else f"{config.epochs:g} epochs"


def test_there_are_commands() -> None:
    assert len(commands()) == PAGE.count("\nlsgm-fast ") + PAGE.count("\ntorchrun ") > 10


@pytest.mark.parametrize("arguments", commands(), ids=lambda arguments: " ".join(arguments))
def test_every_command_line_is_valid(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks("yaml"):
        name = text.splitlines()[0].removeprefix("# ")
        Path(name).write_text(text)
    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    given = command.make_context(arguments[0], arguments[1:]).params
    if not arguments[0].startswith("train"):
        return
    stage = "vae" if arguments[0] == "train-vae" else "lsgm"
    # The VAE's file is a run's result, and is not there.
    config = assemble(stage, recipe=given["recipe"], file=given["config"], overrides=given["overrides"] or ())
    assert config.stage == stage
    if stage == "lsgm":
        assert given["vae"] is not None
    if given["config"] is not None:
        assert config.data.source == "photos/" and config.model.score is None
        assert config.data.size == config.model.vae.image_size == 64
