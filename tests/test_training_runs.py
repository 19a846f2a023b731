"""Training runs as real processes: killed, interrupted, on a full disk, and many of them in one group."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lsgm_fast import distributed
from lsgm_fast.data import DataConfig
from lsgm_fast.presets import PRESETS
from lsgm_fast.training import Trainer, TrainingConfig
from lsgm_fast.training.config import from_mapping, read_config
from lsgm_fast.training.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300.0  # for one process; it needs some 5 s on an idle machine
TEMPORARIES = (
    "checkpoints/.step-00000009.0123abcd.pt",
    "samples/.samples-00000004.0123abcd.png",
    ".model.0123abcd.safetensors",
    ".tmp0aBcDe",
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
        _kill(process)
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
        time.sleep(0.002)


def _kill(process: subprocess.Popen[str]) -> bool:
    """Kill at once, with the processes that it has started; whether it was still running."""
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
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
    assert not list(folder.rglob(".*"))


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
    folder, others = tmp_path / "run", ("notes.txt", "checkpoints/.step-9.pt", ".model.safetensors", ".tmp")
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


def test_killed_between_the_last_model_and_its_checkpoint(
    options: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_mapping(read_config(options)).replace(steps=4, save_every=2)
    Trainer(config, tmp_path / "whole", device="cpu", progress=False).run()
    trainer = Trainer(config, tmp_path / "run", device="cpu", progress=False)

    def dies_after(write: Any) -> Any:
        def wrapped(*arguments: Any) -> None:
            write(*arguments)
            if trainer.step == 4:
                raise MemoryError("killed")

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("save", "save_model"):
            patch.setattr(RunFolder, name, dies_after(getattr(RunFolder, name)))
        with pytest.raises(MemoryError):
            trainer.run()
    Trainer(config, tmp_path / "run", device="cpu", progress=False).run()
    _assert_same(tmp_path / "run", tmp_path / "whole")


def _train_quietly(config: TrainingConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    Trainer(config, folder, device="cpu", progress=False).run()


@pytest.mark.slow
def test_killed_fifty_times(options: Path, tmp_path: Path) -> None:
    """From before the first step to the middle of a write: saving takes half of the time here."""
    generator = random.Random(2)
    config = from_mapping(read_config(options) | {"stage": "lsgm"}).replace(save_every=1)
    _train_quietly(config, tmp_path / "whole")
    # Forked by a process that has imported everything: a start takes a tenth of a second and not five.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    folder, kills, temporaries = tmp_path / "run-0", 0, 0
    while kills < 50:
        process = context.Process(target=_train_quietly, args=(config, folder))
        process.start()
        known, end = set(RunFolder(folder).steps()), time.monotonic() + SECONDS
        middle, delay = kills % 3 == 1, generator.uniform(0.0, 0.4 if kills % 3 == 0 else 0.1)
        while process.is_alive() and time.monotonic() < end and kills % 3:
            if any(folder.glob("checkpoints/.*")) if middle else set(RunFolder(folder).steps()) - known:
                break
        if not middle:
            time.sleep(delay)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before: once more from the start
            _assert_same(folder, tmp_path / "whole")
            folder = tmp_path / f"run-{kills}"
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        temporaries += any(folder.rglob(".*"))
        for step in RunFolder(folder).steps():  # whatever has its name is whole
            torch.load(RunFolder(folder).checkpoint(step), weights_only=True)
    _train_quietly(config, folder)
    _assert_same(folder, tmp_path / "whole")
    assert temporaries >= 10


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


def test_a_second_signal_ends_a_step_that_hangs(
    options: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(from_mapping(read_config(options)), tmp_path / "run", device="cpu", progress=False)
    before = signal.getsignal(signal.SIGINT)

    def hang(*_: object) -> None:
        for seconds in (0.5, SECONDS):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(seconds)

    monkeypatch.setattr(trainer, "_one_step", hang)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert 0.5 <= time.monotonic() - start < 30.0
    assert signal.getsignal(signal.SIGINT) is before
    assert RunFolder(tmp_path / "run").steps() == []


def test_a_group_decides_together_when_to_stop(
    options: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(from_mapping(read_config(options)), tmp_path / "run", device="cpu", progress=False)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with trainer._signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not trainer._stop  # the other process may have begun its next step
        # What arrives while they agree counts the next time.
        monkeypatch.setattr(distributed, "all_reduce_mean", lambda flags: torch.zeros_like(flags))
        assert trainer._agree(True) and not trainer._stop
        monkeypatch.setattr(distributed, "all_reduce_mean", lambda flags: flags / 2)
        assert trainer._agree(True) and trainer._stop


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_too(options: Path, whole: tuple[Path, Path], tmp_path: Path) -> None:
    """A terminal sends it to every process there; batches are made in others than the one that trains."""
    command = _command(options, tmp_path / "run", "data.workers=2", "accumulate=2")
    process = _start(command)
    _wait(process, lambda: _lines(tmp_path / "run") >= 4)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = _end(process)
    assert code == 130 and "stopped at step" in out and "Traceback" not in err, err
    _finish(command)
    _assert_tidy(tmp_path / "run")


# -- a full disk ------------------------------------------------------------------------------------------------------


@contextmanager
def _disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own at ``folder``."""
    folder.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


def _fill(file: Path) -> None:
    """Grow ``file`` until not a byte is left."""
    with open(file, "wb", buffering=0) as stream:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    stream.write(bytes(size))


def test_a_disk_too_small_for_a_second_checkpoint(
    options: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with _disk(disk, 3):
        command = _command(options, disk / "run")
        code, out, err = _end(_start(command))
        assert code == 2 and "finished" not in out
        (line,) = (line for line in err.splitlines() if line.startswith("error: "))
        assert "MB free" in line and str(disk / "run") in line
        assert "Traceback" not in err and "Error" not in err.replace(line, "")
        assert "step 6 is not saved" in out and "the last is 3" in out
        folder = RunFolder(disk / "run")
        assert folder.steps() == [3] and folder.load()["step"] == 3
        assert load_file(folder.model) and _figures(folder.path) == _figures(whole[0])
        _assert_tidy(folder.path)
        _mount("-o", "remount,size=16m", str(disk))
        _finish(command)
        _assert_same(folder.path, whole[0])


def test_a_disk_that_is_full_for_a_while(options: Path, whole: tuple[Path, Path], tmp_path: Path) -> None:
    """Not one byte is free for some steps: neither figures nor messages may be lost or broken."""
    disk = tmp_path / "disk"
    with _disk(disk, 16):
        process = _start(_command(options, disk / "run"), PYTHONUNBUFFERED="1")
        _wait(process, lambda: _lines(disk / "run") >= 4)
        _fill(disk / "ballast")
        assert process.stdout is not None
        said = ""
        while "is not saved" not in said:
            said = process.stdout.readline()
            assert said, process.communicate()
        for line in (disk / "run" / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        (disk / "ballast").unlink()
        code, out, err = _end(process)
        assert code == 0 and "finished at step 30" in out, err
        assert "Traceback" not in err and "Logging error" not in err
        _assert_same(disk / "run", whole[0])
        log = (disk / "run" / "log.txt").read_text().splitlines()
        shown = [int(line.split(" step ")[1].split(":")[0]) for line in log if ", kl " in line]
        assert shown == list(range(1, 31)) and any("is not saved" in line for line in log)
        # Started again with the disk full it says so, and leaves everything as it is.
        _fill(disk / "ballast")
        code, _, err = _end(_start(_command(options, disk / "run")))
        assert code == 2 and err.count("error: ") == 1 and "No space left" in err
        _assert_same(disk / "run", whole[0])


# -- many processes ---------------------------------------------------------------------------------------------------


def _assert_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The figures that depend on all of a step: sums of float32 in another order."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith(("nelbo", "kl_groups", "grad_norm", "p_loss", "regularisation")):
                scale = float(np.abs(b[name]).max())
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4 * scale), (a["step"], name)


def test_a_group_trains_as_one_process_is_killed_and_interrupted(
    options: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = _group(_command(options, folder))
    process = _start(command)
    _wait(process, lambda: _lines(folder) >= 8)
    assert _kill(process)
    _assert_close(_figures(folder)[:6], _figures(whole[0])[:6])
    before, done = _figures(folder)[:6], RunFolder(folder).steps()[-1]
    process = _start(command)
    _wait(process, lambda: _figures(folder)[-1]["step"] >= done + 4)
    process.send_signal(signal.SIGINT)  # it passes this on
    code, out, err = _end(process)
    step = RunFolder(folder).steps()[-1]
    assert code != 0 and done + 4 <= step < 30
    assert out.count("stopped at step") == 1 and f"stopped at step {step}" in out
    assert [line["step"] for line in _figures(folder)] == list(range(1, step + 1))
    assert _figures(folder)[:6] == before
    assert "deprecated" not in err
    _assert_tidy(folder)


def test_a_batch_that_a_group_cannot_share(options: Path, tmp_path: Path) -> None:
    code, _, err = _end(_start(_group(_command(options, tmp_path / "run", "batch_size=1"))))
    assert code != 0 and err.count("error: a batch of 1 in 1 part(s) cannot be divided among 2") == 1
    assert err.count("exitcode  : 2") == 2 - err.count("exitcode  : -15")  # torchrun's list of who failed
    assert not (tmp_path / "run").exists()


POISON = """
import os, sys
import torch
from lsgm_fast import cli, distributed
from lsgm_fast.training import trainer

batches, draw = trainer.batches, trainer.draw
calls = 0

def poisoned_batches(*arguments, **options):
    for step, batch in enumerate(batches(*arguments, **options)):
        if step == 4 and options["rank"] == 1:
            batch.images[0, 0, 10, 10] = 2.0
        yield batch

def poisoned_draw(*arguments):
    global calls
    draws = draw(*arguments)
    calls += 1
    if calls >= 5 and distributed.rank() == 1:
        draws.posterior[0][0, 0] = torch.nan
    return draws

if os.environ["POISONED"] == "images":
    trainer.batches = poisoned_batches
else:
    trainer.draw = poisoned_draw
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("noise", "error: step 5: the loss is NaN or infinite"),
        pytest.param("images", "error: expected image values in [0, 1]", marks=pytest.mark.slow),
    ],
)
def test_trouble_in_one_process_stops_all(what: str, said: str, options: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(POISON)
    command = _group([sys.executable, str(driver), *_command(options, tmp_path / "run")[3:]])
    code, _, err = _end(_start(command, POISONED=what))
    assert code != 0 and said in err and err.count("error: ") == 1
    assert "[rank" not in err  # the prefix of tracebacks in a group
    assert RunFolder(tmp_path / "run").steps() == [3]
    assert [line["step"] for line in _figures(tmp_path / "run")] == [1, 2, 3, 4]


def test_processes_that_find_different_checkpoints(
    options: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of the same name on two machines."""
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: 6 if value == 0 else value)
    with pytest.raises(ValueError, match="finds step 0 .* process 0 step 6: .* that all processes share"):
        Trainer(from_mapping(read_config(options)), tmp_path / "run", device="cpu", progress=False)


@pytest.mark.slow
def test_a_folder_that_process_0_refuses(options: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    code, _, err = _end(_start(_group(_command(options, tmp_path))))
    assert code != 0 and err.count("error: ") == 1 and "holds no training run" in err and "[rank" not in err


STAGE_2 = {
    "algorithm 1": (),
    "algorithm 3, balanced": ("objective.p_mode=drop_all_iw",),
    "algorithm 3": ("objective.p_mode=drop_sigma2t_iw", "kl.start=1.0", "kl.end=1.0"),
    "algorithm 2, disjoint": (
        "objective.p_mode=drop_sigma2t_iw",
        "objective.q_mode=ll_iw",
        "objective.disjoint=true",
    ),
    "algorithm 2 against the average": (
        "objective.q_mode=ll_uniform",
        "objective.update_q_ema=true",
        "ema=0.5",
    ),
    "frozen, in parts": ("objective.train_vae=false", "accumulate=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STAGE_2)
def test_stage_2_in_a_group(case: str, options: Path, whole: tuple[Path, Path], tmp_path: Path) -> None:
    # Images and the NELBO along the way: process 0 alone makes them, and the others wait.
    overrides = ("steps=6", "model.score.dropout=0", "sample_every=3", "eval_every=6", *STAGE_2[case])
    one, two = (
        _command(options, tmp_path / name, *overrides, vae=whole[0] / "model.safetensors")
        for name in ("one", "two")
    )
    _finish(one)
    _finish(_group(two))
    ours, theirs = _figures(tmp_path / "two"), _figures(tmp_path / "one")
    _assert_close(ours[:6], theirs[:6])
    if "frozen" not in case:
        assert ours[6]["held_out_nelbo"] == pytest.approx(theirs[6]["held_out_nelbo"], rel=1e-3)
    assert len(list((tmp_path / "two" / "samples").iterdir())) == 2
    _assert_tidy(tmp_path / "two")


@pytest.mark.slow
def test_a_group_that_is_killed_gives_the_same(
    options: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """Lines are means over steps before and after the kills here."""
    overrides = ("log_every=5", "save_every=2", "model.score.dropout=0.2")
    vae = whole[0] / "model.safetensors"
    _finish(_group(_command(options, tmp_path / "whole", *overrides, vae=vae)))
    folder, generator = tmp_path / "run", random.Random(3)
    command = _group(_command(options, folder, *overrides, vae=vae))
    for done in (2, 8, 14):
        process = _start(command)
        _wait(process, lambda done=done: max(RunFolder(folder).steps(), default=0) >= done)
        time.sleep(generator.uniform(0.0, 0.3))
        assert _kill(process)
    _finish(command)
    _assert_same(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_ends_a_group_with_one_message(options: Path, tmp_path: Path) -> None:
    with _disk(tmp_path / "disk", 3):
        code, _, err = _end(_start(_group(_command(options, tmp_path / "disk" / "run"))))
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code != 0 and len(said) == 1 and "MB free" in said[0] and "[rank" not in err, err
