"""The trainer: runs that go on as if nothing had happened, trouble that is named, what a run leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lsgm_fast
from lsgm_fast.data import DataConfig
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.presets import PRESETS
from lsgm_fast.training import (
    KLConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RegularisationConfig,
    Trainer,
    TrainingConfig,
)
from lsgm_fast.training.assemble import assemble
from lsgm_fast.training.display import Display
from lsgm_fast.training.folder import RunFolder
from lsgm_fast.training.inactive import hide_channels, inactive_channels
from lsgm_fast.training.kl import group_coefficients, group_scales, kl_coefficient, regularisation_weight
from lsgm_fast.training.optim import EMA, learning_rate
from lsgm_fast.training.recipes import RECIPES

TINY = PRESETS["tiny-binary"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty grey blobs of 28x28, in a file."""
    generator = np.random.default_rng(0)
    centre = generator.uniform(6, 22, (40, 2, 1, 1))
    y, x = np.mgrid[:28, :28]
    distance = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, images=(255 * np.exp(-distance / 20)).astype(np.uint8))
    return path


@pytest.fixture
def config(digits: Path) -> TrainingConfig:
    return TrainingConfig(
        model=TINY,
        data=DataConfig(str(digits), binarise="dynamic", held_out=8),
        batch_size=4,
        steps=8,
        warmup_steps=2,
        vae_optimizer=OptimizerConfig("adamax", lr=5e-3, lr_min=1e-4, eps=1e-3),
        score_optimizer=OptimizerConfig("adam", lr=1e-3, lr_min=1e-3),
        kl=KLConfig(start=1e-4, end=0.9, anneal=0.5),
        regularisation=RegularisationConfig(vae=1e-2),
        log_every=3,
        save_every=2,
        sample_every=0,
        eval_every=0,
    )


def _run(config: TrainingConfig, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(config, folder, device="cpu", progress=False, **options)
    trainer.run()
    return trainer


def _figures(folder: Path) -> list[dict[str, Any]]:
    """The logged lines without what depends on the clock."""
    lines = RunFolder(folder).read_metrics()
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in lines]


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


OBJECTIVES = {
    "stage 1": None,
    "algorithm 1": ObjectiveConfig(),
    "algorithm 2 against the average": ObjectiveConfig(
        "drop_sigma2t_iw", "ll_iw", disjoint=True, update_q_ema=True
    ),
    "algorithm 3, channels hidden": ObjectiveConfig(
        "drop_all_iw", drop_inactive=True, inactive_threshold=1e6
    ),
    "frozen": ObjectiveConfig(train_vae=False),
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_a_run_that_dies_goes_on_as_if_it_had_not(
    case: str, config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = OBJECTIVES[case]
    if objective is not None:
        config = config.replace(stage="lsgm", objective=objective, ema=0.5)
    whole = _run(config, tmp_path / "whole")

    done = 0
    original = Display.step

    def die(self: Display) -> None:
        nonlocal done
        done += 1
        original(self)
        if done in (3, 7):  # once between checkpoints, once more after going on
            raise MemoryError("killed")

    monkeypatch.setattr(Display, "step", die)
    for _ in range(2):
        with pytest.raises(MemoryError):
            _run(config, tmp_path / "parts")
    again = _run(config, tmp_path / "parts")
    assert done > 8  # steps were done twice
    assert _figures(tmp_path / "parts") == _figures(tmp_path / "whole")
    assert _equal(again.model.state_dict(), whole.model.state_dict())
    parts, wholes = (
        lsgm_fast.load(tmp_path / name / "model.safetensors").state_dict() for name in ("parts", "whole")
    )
    assert _equal(parts, wholes)


def test_the_vae_stays_as_it_is_when_frozen_unless_asked(config: TrainingConfig, tmp_path: Path) -> None:
    _run(config, tmp_path / "vae")
    start = lsgm_fast.load(tmp_path / "vae" / "model.safetensors").vae.state_dict()
    frozen = config.replace(
        stage="lsgm",
        vae=str(tmp_path / "vae" / "model.safetensors"),
        objective=ObjectiveConfig(train_vae=False),
    )
    assert _equal(_run(frozen, tmp_path / "frozen").model.vae.state_dict(), start)
    published = frozen.replace(objective=ObjectiveConfig(train_vae=False, frozen_bn="batch"))
    moved = _run(published, tmp_path / "published").model.vae.state_dict()
    changed = {key.rsplit(".", 1)[1] for key in start if not torch.equal(start[key], moved[key])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_training_learns(config: TrainingConfig, tmp_path: Path) -> None:
    trainer = _run(config.replace(steps=60, kl=KLConfig(), log_every=10), tmp_path / "run")
    figures = _figures(tmp_path / "run")
    assert figures[-1]["nelbo"] < 0.5 * figures[0]["nelbo"]
    assert trainer.step == 60


def test_a_step_in_parts_is_the_whole_step(config: TrainingConfig, tmp_path: Path) -> None:
    """With the VAE frozen nothing depends on how a batch is divided (BatchNorm would)."""
    score = TINY.score.replace(dropout=0.0)
    config = config.replace(
        stage="lsgm",
        model=TINY.replace(score=score),
        objective=ObjectiveConfig(train_vae=False),
        steps=4,
        log_every=1,
    )
    _run(config, tmp_path / "whole")
    _run(config.replace(accumulate=2), tmp_path / "parts")
    for a, b in zip(_figures(tmp_path / "whole"), _figures(tmp_path / "parts"), strict=True):
        assert a["p_loss"] == pytest.approx(b["p_loss"], rel=1e-4)
        assert a["grad_norm_score"] == pytest.approx(b["grad_norm_score"], rel=1e-3)


@pytest.mark.parametrize("stage", ["vae", "lsgm"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"recompute": True}, 1e-6),
        ({"channels_last": True}, 1e-4),
        ({"precision": "bf16"}, 0.02),
    ],
    ids=["recompute", "channels_last", "bf16"],
)
def test_ways_to_compute_agree(
    stage: str, options: dict[str, Any], tolerance: float, config: TrainingConfig, tmp_path: Path
) -> None:
    objective = ObjectiveConfig("drop_sigma2t_iw")
    config = config.replace(stage=stage, steps=3, log_every=1, objective=objective)
    _run(config, tmp_path / "plain")
    _run(config.replace(**options), tmp_path / "other")
    for a, b in zip(_figures(tmp_path / "plain"), _figures(tmp_path / "other"), strict=True):
        assert a["nelbo"] == pytest.approx(b["nelbo"], rel=tolerance)


def test_half_precision_skips_steps_that_overflow_and_learns(config: TrainingConfig, tmp_path: Path) -> None:
    config = config.replace(steps=30, log_every=1, kl=KLConfig(), save_every=10)
    _run(config.replace(steps=1), tmp_path / "plain")
    trainer = _run(config.replace(precision="fp16"), tmp_path / "half")
    (plain,), half = _figures(tmp_path / "plain"), _figures(tmp_path / "half")
    assert half[0]["nelbo"] == pytest.approx(plain["nelbo"], rel=2e-3)
    assert half[-1]["nelbo"] < 0.7 * half[0]["nelbo"]
    # Losses of thousands of nats times 2^10 overflow at first: the scale came down, and the run went on.
    assert trainer._scaler.get_scale() < 2.0**10
    assert all(math.isfinite(line["nelbo"]) for line in half)


def test_clipping_bounds_what_the_optimizer_sees(config: TrainingConfig, tmp_path: Path) -> None:
    plain = config.replace(steps=1, log_every=1, warmup_steps=0)
    # A step that is proportional to the gradient, and large enough for float32 to resolve it.
    sgd_like = plain.vae_optimizer.replace(lr=10.0, eps=1e4, weight_decay=0.0)
    start = Trainer(plain.replace(vae_optimizer=sgd_like), tmp_path / "start", progress=False).model
    before = {k: v.clone() for k, v in start.named_parameters()}
    lengths = []
    for clip in (None, 1.0):
        trainer = _run(plain.replace(vae_optimizer=sgd_like, clip_norm=clip), tmp_path / f"clip-{clip}")
        moved = [(p - before[k]).flatten() for k, p in trainer.model.named_parameters()]
        lengths.append(float(torch.cat(moved).detach().norm()))
        norm = _figures(tmp_path / f"clip-{clip}")[0]["grad_norm_vae"]
    assert norm > 10.0  # the norm that is logged is the one before clipping
    assert lengths[1] == pytest.approx(lengths[0] / norm, rel=0.1)


# -- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["vae", "lsgm"])
@pytest.mark.parametrize("what", ["weight", "activation"])
def test_nan_is_traced_to_its_module(
    stage: str, what: str, config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(stage=stage)
    trainer = Trainer(config, tmp_path / "run", progress=False)
    original = Display.step

    def poison(self: Display) -> None:
        original(self)
        if trainer.step == 5:
            branch = trainer.model.vae.decoder[1].branch
            with torch.no_grad():
                if what == "weight":
                    branch.project.weight[0, 0] = math.nan
                else:
                    branch.project_norm.weight.fill_(1e38)
                    branch.project_norm.bias.fill_(3e38)

    monkeypatch.setattr(Display, "step", poison)
    with pytest.raises(NonFiniteError, match=r"step 6: the loss is NaN.*vae\.decoder\.1.*step 4 is kept"):
        trainer.run()
    assert RunFolder(tmp_path / "run").steps() == [2, 4]
    monkeypatch.setattr(Display, "step", original)
    assert _run(config, tmp_path / "run").step == 8


def test_a_gradient_that_is_nan_never_reaches_the_weights(config: TrainingConfig, tmp_path: Path) -> None:
    trainer = Trainer(config, tmp_path / "run", progress=False)
    trainer.model.vae.stem.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient is NaN .* there is no checkpoint yet"):
        trainer.run()
    assert bool(torch.isfinite(trainer.model.vae.stem.weight).all())


def test_a_full_disk_does_not_end_a_run(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.save
    calls = 0

    def full(state: Any, file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3):  # PyTorch's writer turns the system's error into one of its own
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        original(state, file)

    monkeypatch.setattr(torch, "save", full)
    trainer = _run(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert trainer.step == 8 and folder.steps() == [2, 8]
    assert {p.suffix for p in folder.checkpoints.iterdir()} == {".pt"}
    log = folder.log.read_text()
    assert "step 4 is not saved" in log and "step 6 is not saved" in log and "MB free" in log


def test_a_damaged_checkpoint_is_passed_over(config: TrainingConfig, tmp_path: Path, caplog) -> None:
    _run(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.steps() == [6, 8]
    folder.checkpoint(8).write_bytes(folder.checkpoint(8).read_bytes()[:1000])
    state = folder.load()
    assert state is not None and state["step"] == 6
    assert "step-00000008.pt cannot be read" in caplog.text
    folder.checkpoint(6).write_bytes(b"")
    with pytest.raises(lsgm_fast.errors.CheckpointError, match="no checkpoint in"):
        folder.load()


def test_a_finished_run_stays_as_it_is(config: TrainingConfig, tmp_path: Path) -> None:
    _run(config, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert _run(config, tmp_path / "run").step == 8
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_another_configuration_is_refused_and_named(config: TrainingConfig, tmp_path: Path) -> None:
    _run(config.replace(steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match=r"vae_optimizer\.lr: 0\.005 -> 0\.1"):
        Trainer(config.replace(steps=2, vae_optimizer=config.vae_optimizer.replace(lr=0.1)), tmp_path / "run")
    _run(config.replace(steps=2, log_every=1, keep=5), tmp_path / "run")  # changes no number
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="holds no training run"):
        Trainer(config, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1000}, r"fewer than batch_size=1000"),
        ({"model": PRESETS["tiny-rgb"]}, r"28"),
        ({"eval_every": 4, "data": {"held_out": 0}}, r"held_out=0 keeps no images back"),
    ],
)
def test_data_that_do_not_fit(
    change: dict[str, Any], message: str, config: TrainingConfig, tmp_path: Path
) -> None:
    if "data" in change:
        change = change | {"data": config.data.replace(**change["data"])}
    with pytest.raises(ValueError, match=message):
        Trainer(config.replace(**change), tmp_path / "run")


def test_a_batch_for_more_processes_than_images(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lsgm_fast.distributed, "world_size", lambda: 8)
    with pytest.raises(ValueError, match="a batch of 4 in 1 .* cannot be divided among 8 processes"):
        Trainer(config, tmp_path / "run")


# -- configuration ----------------------------------------------------------------------------------------------------


def test_options_come_from_recipe_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 20\nvae_optimizer:\n  lr: 1e-3\nmodel:\n  vae:\n    encoder_channels: 8\n")
    config = assemble("vae", recipe="digits", file=file, overrides=["batch_size=10", "kl.anneal=0.25"])
    assert (config.batch_size, config.vae_optimizer.lr, config.kl.anneal) == (10, 1e-3, 0.25)
    assert config.model.vae.encoder_channels == 8 and config.model.vae.decoder_channels == 24
    assert config.vae_optimizer.name == "adamax"
    preset = assemble("vae", overrides=["model=mnist"], file=file)
    assert (
        preset.model.vae == PRESETS["mnist"].vae.replace(encoder_channels=8)
        or preset.model == PRESETS["mnist"]
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vae_optimizer.learning_rate=1", "unknown OptimizerConfig option 'learning_rate'"),
        ("bath_size=4", "did you mean 'batch_size'"),
        ("batch_size=four", "expects int, got 'four'"),
        ("batch_size", "key=value"),
        ("objective.p_mode=ll_i", "did you mean 'll_iw'"),
        ("objective.disjoint=true", "set q_mode"),
        ("kl.start=2", "start <= end"),
        ("precision=fp8", "expected one of"),
        ("batch_size=7 accumulate=2", "cannot be split"),
    ],
)
def test_wrong_options_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble("lsgm", recipe="digits", overrides=override.split())


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    from lsgm_fast.training.config import from_mapping, read_config, write_config

    for recipe in RECIPES.values():
        for config in (recipe.vae, recipe.lsgm):
            write_config(config, tmp_path / "config.yaml")
            assert from_mapping(read_config(tmp_path / "config.yaml")) == config


def test_every_published_preset_has_a_recipe() -> None:
    assert {name for name in PRESETS if not name.startswith("tiny")} <= set(RECIPES)
    for name, recipe in RECIPES.items():
        if name in PRESETS:
            assert recipe.lsgm.model == PRESETS[name]
    algorithms = {name: recipe.lsgm.objective.algorithm for name, recipe in RECIPES.items()}
    assert algorithms["cifar10-nll"] == 1 and algorithms["cifar10-fid"] == 3
    assert algorithms["celebahq256-quantitative"] == 2


# -- parts ------------------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    config = OptimizerConfig("adam", lr=1.0, lr_min=0.1)
    rates = [learning_rate(config, step, 4, 25) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55) and rates[24] == pytest.approx(0.1)
    kl = KLConfig(start=0.1, end=0.7, hold=0.1, anneal=0.5)
    values = [kl_coefficient(kl, step, 100) for step in (0, 10, 35, 60, 99)]
    assert values == pytest.approx([0.1, 0.1, 0.4, 0.7, 0.7])
    assert kl_coefficient(KLConfig(), 0, 10) == 1.0
    assert regularisation_weight(1.0, 1e-2, 0.5) == pytest.approx(0.1)


def test_balancing() -> None:
    alpha = group_scales(PRESETS["tiny-multiscale"].vae)
    assert alpha.tolist() == [1.0, 1.0, 4.0, 4.0]
    kl = torch.tensor([[1.0, -3.0, 0.0, 7.99], [1.0, -1.0, 0.0, 7.99]])
    expected = torch.tensor([1.01, 2.01, 0.01 / 4, 8.0 / 4])
    torch.testing.assert_close(group_coefficients(kl, alpha), expected / expected.mean())


def test_average() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    first = module.weight.detach().clone()
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update()
    with ema.applied():
        torch.testing.assert_close(module.weight.detach(), first + 0.1)
    torch.testing.assert_close(module.weight.detach(), first + 1.0)


def test_inactive_channels_are_hidden_for_good(config: TrainingConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lsgm_fast.build("tiny-binary")
    with torch.no_grad():  # the posterior of channel 1 is N(0, 1), that of the others far from it
        model.vae.posterior[0].log_weight_norm.fill_(-20.0)
        model.vae.posterior[0].bias.copy_(torch.tensor([3.0, 0.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0]))
        model.vae.posterior[1].log_weight_norm.fill_(-20.0)
        model.vae.posterior[1].bias.fill_(-2.0)
    found = inactive_channels(model.vae, [torch.rand(6, 1, 28, 28).round() for _ in range(8)], 0.5, 0)
    assert found == [1]

    objective = ObjectiveConfig(drop_inactive=True, inactive_threshold=1e6)
    trainer = _run(config.replace(stage="lsgm", objective=objective, ema=0.0), tmp_path / "run")
    prior = lsgm_fast.load(tmp_path / "run" / "model.safetensors").prior
    assert float(trainer.model.prior.conv_in.weight.detach().abs().max()) == 0.0
    assert float(prior.conv_in.weight.detach().abs().max()) == 0.0
    assert -15.1 < float(prior.mixing_logit.detach().mean()) < -14.9
    logit = prior.mixing_logit.detach().clone()
    hide_channels(prior, [0], start=False)
    assert torch.equal(prior.mixing_logit, logit)


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_what_a_person_finds(config: TrainingConfig, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config.replace(stage="lsgm", sample_every=4, eval_every=8)
    _run(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert sorted(p.name for p in folder.samples.iterdir()) == [
        "samples-00000004.png",
        "samples-00000008.png",
    ]
    run = json.loads((folder.path / "run.json").read_text())
    assert run["torch"] == torch.__version__ and run["processes"] == 1
    assert "held-out NELBO" in folder.log.read_text() and "images/s" in folder.log.read_text()
    figures = folder.read_metrics()
    assert [line["step"] for line in figures] == [3, 6, 8, 8]
    assert len(figures[0]["kl_groups"]) == 2 and figures[-1]["held_out_nelbo"] > 0.0
    events = tensorboard.EventAccumulator(str(folder.tensorboard)).Reload()
    assert {"nelbo", "p_loss", "kl_groups/1", "held_out_nelbo"} <= set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["mixing_coefficient"] and events.Tags()["images"] == ["samples"]
    assert [e.value for e in events.Scalars("nelbo")] == pytest.approx([f["nelbo"] for f in figures[:3]])


def test_the_published_layout_of_a_trained_model_draws_the_same(
    config: TrainingConfig, tmp_path: Path
) -> None:
    objective = ObjectiveConfig(drop_inactive=True, inactive_threshold=1e6)
    _run(config.replace(stage="lsgm", objective=objective), tmp_path / "run")
    ours = tmp_path / "run" / "model.safetensors"
    lsgm_fast.convert(ours, tmp_path / "published.pt")
    lsgm_fast.checkpoints._noticed = False
    with pytest.warns(UserWarning, match="published LSGM release"):
        published = lsgm_fast.load(tmp_path / "published.pt")
    images = [model.sample(2, evaluations=3) for model in (lsgm_fast.load(ours), published)]
    assert torch.equal(*images)


def test_workers_change_nothing(config: TrainingConfig, tmp_path: Path) -> None:
    _run(config, tmp_path / "none")
    _run(config.replace(data=config.data.replace(workers=1)), tmp_path / "one")
    assert _figures(tmp_path / "none") == _figures(tmp_path / "one")
