"""Training runs as real processes: killed, interrupted, on a full disk, and many of them in one group."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lsgm_fast.data import DataConfig
from lsgm_fast.presets import PRESETS
from lsgm_fast.training import Trainer, TrainingConfig
from lsgm_fast.training.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120.0  # for one process; it needs some 5 s
TEMPORARIES = (
    "checkpoints/.step-00000009.0123abcd.pt",
    "samples/.samples-00000004.0123abcd.png",
    ".model.0123abcd.safetensors",
    ".metrics.0123abcd.jsonl",
    ".run.0123abcd.json",
    ".config.0123abcd.yaml",
)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file that trains a tiny model on forty grey blobs of 28x28, for either stage."""
    folder = tmp_path_factory.mktemp("options")
    centre = np.random.default_rng(0).uniform(6, 22, (40, 2, 1, 1))
    y, x = np.mgrid[:28, :28]
    distance = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2
    np.savez(folder / "blobs.npz", images=(255 * np.exp(-distance / 20)).astype(np.uint8))
    values = {
        "model": "tiny-binary",
        "data": {"source": str(folder / "blobs.npz"), "binarise": "dynamic", "held_out": 8},
        "batch_size": 4,
        "steps": 30,
        "warmup_steps": 2,
        "vae_optimizer": {"name": "adamax", "lr": 5e-3, "lr_min": 1e-4, "eps": 1e-3},
        "kl": {"start": 1e-4, "end": 0.9, "anneal": 0.8},
        "regularisation": {"vae": 1e-2, "score": 1e-2},
        "log_every": 1,
        "save_every": 3,
        "sample_every": 0,
        "eval_every": 0,
    }
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def _command(options: Path, out: Path, *overrides: str, vae: Path | None = None) -> list[str]:
    stage = ["train-vae"] if vae is None else ["train", "--vae", str(vae)]
    own = ["-m", "lsgm_fast", *stage, "--config", str(options), "--out", str(out), "--device", "cpu"]
    return [sys.executable, *own, *overrides]


def _group(command: list[str], processes: int = 2) -> list[str]:
    """The command in a process group on this machine."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [command[0], *launch, *command[1:]]


def _start(command: list[str], **more: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def _end(process: subprocess.Popen[str], seconds: float = SECONDS) -> tuple[int, str, str]:
    """(exit code, output, errors) of a process, which is killed after ``seconds``."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {seconds} s:\n{out}\n{err}")
    return process.returncode, out, err


def _finish(command: list[str], **more: str) -> str:
    """Run to the end, which must be a good one; its errors and messages."""
    code, out, err = _end(_start(command, **more))
    assert code == 0 and "finished at step" in out, err
    return err


def _wait(process: subprocess.Popen[str], ready: Any, seconds: float = SECONDS) -> None:
    """Until ``ready()`` or the process's end."""
    end = time.monotonic() + seconds
    while process.poll() is None and not ready() and time.monotonic() < end:
        time.sleep(0.005)


def _kill(process: subprocess.Popen[str]) -> bool:
    """Kill at once; whether it was still running."""
    if process.poll() is None:
        process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def _figures(folder: Path) -> list[dict[str, Any]]:
    """The logged lines without what depends on the clock; every one of them must be whole."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in lines]


def _lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _assert_same(folder: Path, whole: Path) -> None:
    """Figures, weights and files of a run are those of an uninterrupted one."""
    assert _figures(folder) == _figures(whole)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    _assert_tidy(folder)


def _assert_tidy(folder: Path, keep: int = 2) -> None:
    run = RunFolder(folder)
    assert 1 <= len(run.steps()) <= keep
    assert {p.name for p in run.checkpoints.iterdir()} == {run.checkpoint(s).name for s in run.steps()}
    assert not [p for p in folder.rglob(".*")]


@pytest.fixture(scope="module")
def whole(options: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both stages, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    _finish(_command(options, folder / "vae"))
    _finish(_command(options, folder / "lsgm", vae=folder / "vae" / "model.safetensors"))
    return folder / "vae", folder / "lsgm"


# -- killed -----------------------------------------------------------------------------------------------------------


def test_killed_twice_in_either_stage(options: Path, whole: tuple[Path, Path], tmp_path: Path) -> None:
    generator = random.Random(1)
    for stage, vae in (("vae", None), ("lsgm", whole[0] / "model.safetensors")):
        folder = tmp_path / stage
        command = _command(options, folder, vae=vae)
        for done in (generator.randrange(1, 3), generator.randrange(8, 26)):
            process = _start(command)
            _wait(process, lambda folder=folder, done=done: _lines(folder) >= done)
            time.sleep(generator.uniform(0.0, 0.1))
            assert _kill(process)
        _finish(command)
        _assert_same(folder, whole[vae is not None])


def test_what_a_killed_writer_leaves_is_swept(options: Path, tmp_path: Path) -> None:
    folder, others = tmp_path / "run", ("notes.txt", "checkpoints/.step-9.pt", ".model.safetensors")
    # Dead before config.yaml had its name: no reason to refuse the folder.
    folder.mkdir()
    (folder / TEMPORARIES[-1]).write_text("mod")
    config = TrainingConfig(
        model=PRESETS["tiny-binary"],
        data=DataConfig(str(options.parent / "blobs.npz"), binarise="dynamic", held_out=8),
        batch_size=4,
        steps=1,
        sample_every=0,
        eval_every=0,
    )
    Trainer(config, folder, device="cpu", progress=False)
    for name in TEMPORARIES + others:
        (folder / name).write_text("half")
    Trainer(config, folder, device="cpu", progress=False)
    assert [name for name in TEMPORARIES + others if (folder / name).exists()] == list(others)


@pytest.mark.slow
def test_killed_fifty_times(options: Path, whole: tuple[Path, Path], tmp_path: Path) -> None:
    """At any moment, from the start of Python to the middle of a write; saving takes half of the time here."""
    generator = random.Random(2)
    folder, often = tmp_path / "run", ("save_every=1",)
    vae = whole[0] / "model.safetensors"
    command = _command(options, folder, *often, vae=vae)
    kills, temporaries = 0, 0
    while kills < 50:
        process = _start(command)
        known = set(RunFolder(folder).steps())
        if kills % 5 == 0:  # while Python starts, torch is imported, the model built
            time.sleep(generator.uniform(0.0, 4.0))
        elif kills % 5 == 1:  # in the middle of a checkpoint
            _wait(process, lambda: any((folder / "checkpoints").glob(".*")))
        else:  # a little after the first or second checkpoint of this start
            _wait(process, lambda known=known: set(RunFolder(folder).steps()) - known)
            time.sleep(generator.uniform(0.0, 0.15))
        if not _kill(process):
            break
        kills += 1
        temporaries += any(folder.rglob(".*"))
        for step in RunFolder(folder).steps():  # whatever has its name is whole
            torch.load(RunFolder(folder).checkpoint(step), weights_only=True)
        if RunFolder(folder).steps()[-1:] == [29]:  # once more from the start
            _finish(command)
            _assert_same(folder, whole[1])
            folder = tmp_path / f"run-{kills}"
            command = _command(options, folder, *often, vae=vae)
    _finish(command)
    assert kills == 50 and temporaries > 5
    _assert_same(folder, whole[1])


# -- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stops_where_it_is_told_to_and_goes_on(
    number: signal.Signals, options: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    command = _command(options, tmp_path / "run")
    process = _start(command)
    _wait(process, lambda: _lines(tmp_path / "run") >= 4)
    process.send_signal(number)
    code, out, err = _end(process)
    folder = RunFolder(tmp_path / "run")
    step = folder.steps()[-1]
    assert code == 130 and f"stopped at step {step}" in out and "Traceback" not in err
    assert 4 <= step < 30 and _figures(folder.path)[-1]["step"] == step
    _finish(command)
    _assert_same(folder.path, whole[0])
