"""The benchmark of training steps: its record, its split, and what it refuses. No figure of speed is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lsgm_fast

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import measure, train  # noqa: E402
from lsgm_fast.data import Batch, batches  # noqa: E402
from lsgm_fast.presets import PRESETS  # noqa: E402
from lsgm_fast.training import RECIPES, Trainer  # noqa: E402
from lsgm_fast.training.optim import EMA  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    state = measure.MachineState(1.0, 2, (0.0, 0.0, 0.0), 0.0, 0.0)
    monkeypatch.setattr(measure, "read_state", lambda *a, **k: state)
    monkeypatch.setattr(measure, "_state_since", lambda *a, **k: state)


def case(step: str = "vae", **changes: Any) -> train.Case:
    values: dict[str, Any] = {
        "recipe": "tiny-binary",
        "step": step,
        "batch": 2,
        "precision": "fp32",
        "recompute": False,
        "channels_last": None,
        "device": "cpu",
    }
    return train.Case(**{**values, **changes})


def test_record_of_a_tiny_preset(tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "tiny-binary", "--steps", "algorithm2", "--batch", "2", "--repeats", "3", "3"]
    arguments += ["--backends", "auto", "--budget", "120", "--recompute", "--channels-last", "--dry-run"]
    assert train.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/train.json")
    record = json.loads(path.read_text())
    measure.check_record(record)
    assert record["complete"] is True and record["idle"] is True and record["dry_run"] is True
    assert record["command"] == " ".join(["python3 -m benchmarks.train", *arguments])
    assert record["settings"]["threads"] == 1
    (entry,) = record["cases"]
    parameters, figures = entry["parameters"], entry["figures"]
    trained = parameters.pop("trained_weights")
    assert train.Case(**parameters) == case("algorithm2", recompute=True, channels_last=True, backend="auto")
    assert not entry["failures"] and set(figures) == set(train.FIGURES)
    assert len(figures["step"]["values"]) == 3 and figures["step"]["unit"] == "s"
    assert figures["images_per_second"]["values"] == pytest.approx([2 / t for t in figures["step"]["values"]])
    split = figures["split"]
    for i, total in enumerate(split["total"]["values"]):
        parts = [split[part]["values"][i] for part in train.PARTS]
        assert min(parts) > 0.0 and sum(parts) == pytest.approx(total)
    assert trained == sum(p.numel() for p in lsgm_fast.build("tiny-binary").parameters())
    # Weights, their gradients and two moments, all in float32, are in memory at once.
    peak = figures["peak_memory"]
    if peak["kind"] == "measured":
        assert 16 * trained < peak["median"] < 2**30
    else:  # a kernel that does not reset the largest size, and libraries that took more than the steps
        assert "loading the libraries" in peak["reason"] and not _resets_the_largest()
    assert "score_matching_loss" in entry["backends"]
    (line,) = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-binary")
    ]
    assert line[1:4] == ["algorithm2", "2", "fp32"] and len(line) == 11
    shown = line[4:] if peak["kind"] == "measured" else line[4:-1]
    assert all(float(text) > 0.0 for text in shown) and (shown == line[4:] or line[-1] == "-")


def test_backends_are_compared(tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    forced = "auto,bn_swish=cpu"
    arguments = [
        "--recipe",
        "tiny-binary",
        "--steps",
        "vae",
        "--batch",
        "2",
        "--repeats",
        "3",
        "3",
        "--dry-run",
    ]
    arguments += ["--backends", "reference", forced]
    assert train.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/train.json")
    record = json.loads(path.read_text())
    measure.check_record(record)
    first, second = record["cases"]
    assert [e["parameters"]["backend"] for e in (first, second)] == ["reference", forced]
    assert set(first["backends"].values()) == {"reference"} and second["backends"]["bn_swish"] == "cpu"
    assert "over_first" not in first["figures"]
    ratios = second["figures"]["over_first"]
    assert set(ratios) == {"step", "peak_memory"}
    for name, ratio in ratios.items():
        figures = [entry["figures"][name] for entry in (second, first)]
        if all(figure["kind"] == "measured" for figure in figures):
            assert ratio["value"] == pytest.approx(figures[0]["median"] / figures[1]["median"])
        else:  # see above: a kernel that does not reset the largest size
            assert name == "peak_memory" and ratio["kind"] == "not_measured" and not _resets_the_largest()
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[2] == "backend" and out[0].endswith("x ms  x peak")
    lines = [line.split() for line in out if line.startswith("tiny-binary")]
    assert [line[2] for line in lines] == ["reference", forced]
    assert lines[0][-2:] == ["-", "-"] and float(lines[1][-2]) == pytest.approx(
        ratios["step"]["value"], abs=0.006
    )


def test_ratios_are_those_of_the_same_case() -> None:
    def entry(step: str, backend: str, seconds: float | None) -> dict[str, Any]:
        figure = measure.not_measured("killed") if seconds is None else measure.measured([seconds], "s")
        figures = {"step": figure, "peak_memory": figure}
        return {"parameters": {"recipe": "digits", "step": step, "backend": backend}, "figures": figures}

    entries = [
        entry("vae", "a", 2.0),
        entry("frozen", "a", None),
        entry("vae", "b", 1.0),
        entry("frozen", "b", 3.0),
    ]
    entries += [entry("vae", "c", None), entry("algorithm1", "b", 1.0)]
    train.compare(entries, "a")
    found = [e["figures"].get("over_first", {}).get("step") for e in entries]
    assert found[:2] == [None, None] and found[2]["value"] == 0.5
    assert [f["reason"] for f in found[3:]] == ["killed", "killed", "there is no step on a"]


def _take_and_give_back(size: int) -> None:
    block = bytearray(size)
    block[:: 2**12] = bytes([1]) * (size // 2**12)


def _resets_the_largest() -> bool:
    """Whether this kernel keeps the largest resident size, and forgets it when it is asked to.

    Some report the present size in its place, so that what was given back is not seen at all: each answer
    must differ from the other by half a block, not by noise.
    """
    size = 2**28
    present = measure.resident_bytes()
    _take_and_give_back(size)
    kept = measure.largest_resident_bytes() - present > size // 2
    measure.forget_largest()
    return kept and measure.largest_resident_bytes() - present < size // 2


def test_the_peak_of_memory_is_that_of_the_steps() -> None:
    """What was taken and given back before does not hide what comes after."""
    if not _resets_the_largest():
        pytest.skip("this kernel does not keep and reset the largest resident size")
    _take_and_give_back(2**28)
    measure.forget_largest()
    before, largest = measure.resident_bytes(), measure.largest_resident_bytes()
    _take_and_give_back(2**26)
    figure = train._peak_memory("cpu", before, largest)
    assert figure["kind"] == "measured"
    assert 0.9 * 2**26 < figure["values"][0] < 1.5 * 2**26


def test_a_peak_that_cannot_be_told_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "largest_resident_bytes", lambda: 1000)
    assert train._peak_memory("cpu", 500, 1000)["kind"] == "not_measured"
    assert train._peak_memory("cpu", 500, 999)["values"] == [500.0]
    missing = Path("/proc/self/nothing/clear_refs")
    monkeypatch.setattr(train, "Path", lambda name: missing)
    measure.forget_largest()  # a kernel that refuses


class Clock:
    """A clock that only the fakes below advance, so that the split's arithmetic is exact."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def advance(self, by: float) -> None:
        self.now += by


@pytest.mark.parametrize(("step", "optimizers"), [("vae", 1), ("algorithm2", 2), ("frozen", 1)])
def test_the_split_recovers_known_parts(
    step: str, optimizers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = case(step)
    train.random_images(chosen, tmp_path / "images.npz")
    config = train.configuration(chosen, tmp_path / "images.npz")
    trainer = Trainer(config, tmp_path / "run", device="cpu", progress=False)
    trainer._train_mode()
    clock = Clock()
    monkeypatch.setattr(train, "time", clock)

    def slow_data() -> Iterator[Batch]:
        for batch in batches(trainer.source, config.data, batch_size=2, seed=0):
            clock.advance(0.5)
            yield batch

    trainer.objective.register_forward_hook(lambda *args: clock.advance(4.0))
    trained = next(p for p in reversed(list(trainer.model.parameters())) if p.requires_grad)
    trained.register_post_accumulate_grad_hook(lambda p: clock.advance(8.0))
    assert len(trainer._optimizers) == optimizers
    for optimizer in trainer._optimizers.values():
        optimizer.register_step_post_hook(lambda *args: clock.advance(2.0))
    if trainer.ema is not None:
        monkeypatch.setattr(EMA, "update", lambda average: clock.advance(1.0))
    stream = slow_data()
    with train.StepClock(trainer) as parts:
        found = [parts(stream) for _ in range(2)]
    expected = {"forward": 4.0, "backward": 8.0, "rest": 0.5}
    expected["optimizer"] = 2.0 * optimizers + (1.0 if trainer.ema is not None else 0.0)
    assert found == [expected | {"total": sum(expected.values())}] * 2
    # Outside of it nothing is marked, and the step is the trainer's own again.
    parts._marks.clear()
    assert train.seconds(trainer, stream) == found[0]["total"] and not parts._marks


def test_each_kind_of_step_is_the_algorithm_of_its_name() -> None:
    for name in (*RECIPES, *PRESETS):
        for step, algorithm in (("algorithm1", 1), ("algorithm2", 2), ("algorithm3", 3)):
            config = train.configuration(case(step, recipe=name), Path("images.npz"))
            assert config.stage == "lsgm" and config.objective.algorithm == algorithm
            assert config.objective.train_vae and config.kl.start == config.kl.end == 1.0
        assert not train.configuration(case("frozen", recipe=name), Path("x.npz")).objective.train_vae
        assert train.configuration(case(recipe=name), Path("x.npz")).stage == "vae"
    digits = {
        choice: train.configuration(case(recipe="digits", channels_last=choice), Path("x.npz")).channels_last
        for choice in (None, True, False)
    }
    assert digits == {None: RECIPES["digits"].vae.channels_last, True: True, False: False}
    changed = train.configuration(case(recipe="digits", precision="bf16", recompute=True), Path("x.npz"))
    assert changed.precision == "bf16" and changed.recompute


def test_a_failing_case_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"case": train.dataclasses.asdict(case(device="nonsense")), "threads": 1, "fewest": 1, "most": 1}
    (tmp_path / "case.json").write_text(json.dumps(task | {"allowed": 1.0, "budget": 60.0}))
    assert train.main(["--one-case", str(tmp_path)]) == 0
    assert "nonsense" in json.loads((tmp_path / "result.json").read_text())["failure"]
    # A process that is killed leaves no result.
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\necho no memory >&2\nkill -9 $$\n")
    dead.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dead))
    entry = train.time_case(case(), measure.Budget(60), fewest=1, most=1, allowed=1.0)
    assert entry["failures"] == ["the process ended with status -9: no memory"]
    assert {figure["kind"] for figure in entry["figures"].values()} == {"not_measured"}
    assert train.table([entry]).splitlines()[1].split()[4:] == ["-"] * 7


def test_without_time_there_are_no_figures(tmp_path: Path, idle: None) -> None:
    arguments = ["--recipe", "tiny-binary", "tiny-rgb", "--budget", "1e-6", "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    (path,) = tmp_path.glob("*/train.json")
    record = json.loads(path.read_text())
    assert record["complete"] is False and record["cases"] == []
    # One kind of step of either stage, plain and with the kernels.
    assert record["left_out"] == [
        f"{name} {step} {backend}"
        for name in arguments[1:3]
        for step in ("vae", "algorithm1")
        for backend in ("reference", "auto")
    ]


def test_a_busy_machine_is_not_timed(
    tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "busy_because", lambda *args, **kwargs: ["a test says so"])
    assert train.main(["--recipe", "tiny-rgb", "--out", str(tmp_path)]) == 3
    assert "a test says so" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "mnits"], "mnist"),
        (["--steps", "algorithm4"], "algorithm"),
        (["--precision", "fp8"], "fp16"),
        (["--batch", "0"], "got 0"),
        (["--repeats", "3", "2"], "3 2"),
        (["--backends", "auto", "refrence"], "reference"),
        (["--backends", "auto", "auto"], "each of --backends once"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
def test_record_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = ["--recipe", "tiny-rgb", "--steps", "algorithm1", "--batch", "2", "--device", "cuda"]
    arguments += ["--backends", "auto"]
    assert train.main([*arguments, "--force", "--dry-run", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/train.json")
    (entry,) = json.loads(path.read_text())["cases"]
    # The allocator's own count: no context or library is in it.
    assert 16 * entry["parameters"]["trained_weights"] < entry["figures"]["peak_memory"]["median"] < 2**29
