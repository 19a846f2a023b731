"""The benchmarks of whole samples and of cells: records, ratios, what is chosen. No speed is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import lsgm_fast  # noqa: E402
from benchmarks import cells, forward, measure, sample  # noqa: E402
from lsgm_fast.dispatch import current_choice, parse_choice  # noqa: E402
from lsgm_fast.models import LSGM  # noqa: E402
from lsgm_fast.models.ncsnpp import Attention, ResBlock  # noqa: E402
from lsgm_fast.nn.cells import Cell  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    state = measure.MachineState(1.0, 2, (0.0, 0.0, 0.0), 0.0, 0.0)
    monkeypatch.setattr(measure, "read_state", lambda *a, **k: state)
    monkeypatch.setattr(measure, "_state_since", lambda *a, **k: state)


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = sample.main([*arguments, "--batch", "2", "--dry-run", "--out", str(out)])
    (path,) = out.glob("*/sample.json")
    return status, json.loads(path.read_text())


def test_record_of_a_tiny_preset(tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, record = run(tmp_path, "--presets", "tiny-rgb", "--repeats", "3", "3", "--budget", "60")
    assert status == 0 and record["complete"] and record["idle"]
    measure.check_record(record)
    (entry,) = record["cases"]
    assert entry["parameters"]["weights"] == "random" and entry["parameters"]["tol"] == 1e-2
    figures = entry["figures"]
    for way in sample.WAYS:
        f = figures[way]
        for total, solve, decode in zip(
            f["total"]["values"], f["solve"]["values"], f["decode"]["values"], strict=True
        ):
            assert total == pytest.approx(solve + decode) and min(solve, decode) > 0
        assert f["per_sample"]["median"] == pytest.approx(f["total"]["median"] / 2)
    # The same equation from the same noise: the device takes the steps that the host takes.
    assert figures["rk45"]["nfe"]["values"] == figures["published"]["nfe"]["values"]
    assert figures["auto-10"]["nfe"]["values"] == [10.0] * 3
    for way, ratio in figures["published_over"].items():
        pairs = zip(figures["published"]["total"]["values"], figures[way]["total"]["values"], strict=True)
        assert ratio["values"] == pytest.approx([a / b for a, b in pairs])
    assert "published" not in figures["published_over"] and "score_drift" in entry["backends"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-rgb")]
    assert [line[3] for line in lines] == list(sample.WAYS) and all(len(line) == 10 for line in lines)


def test_each_way_runs_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sample.build("tiny-rgb", "cpu")
    seen = []
    predict = LSGM._predict

    def spy(self: LSGM, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(current_choice())
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(LSGM, "_predict", spy)
    for way in sample.WAYS.values():
        seen.clear()
        sampler = sample.Sampler(model, way.case("tiny-rgb", 1), "cpu", measure.Budget(60.0))
        sampler(model.sampling.tol)
        assert seen and all(choice == parse_choice(way.backend) for choice in seen)


def test_a_trained_model_and_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sample.build("demo", "cpu")
    trained = lsgm_fast.load("demo")
    for ours, theirs in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    batches = {name: sample.default_batch(name) for name in ("demo", "mnist", "celebahq256-quantitative")}
    assert batches == {"demo": 16, "mnist": 1, "celebahq256-quantitative": 1}


def test_what_fails_and_what_is_left_out(
    tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, device: str) -> LSGM:
        raise RuntimeError(f"no {name}\nand more")

    monkeypatch.setattr(sample, "build", broken)
    status, record = run(tmp_path, "--presets", "tiny-rgb")
    assert status == 1 and record["cases"][0]["failures"] == ["RuntimeError: no tiny-rgb"]
    assert "failed: RuntimeError" in capsys.readouterr().out
    monkeypatch.undo()
    status, record = run(tmp_path, "--presets", "tiny-rgb", "--budget", "1e-6", "--force")
    assert status == 0 and record["cases"] == [] and record["left_out"] == ["tiny-rgb"]


def test_a_busy_machine_is_not_timed(
    tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "busy_because", lambda *args, **kwargs: ["a test says so"])
    assert sample.main(["--presets", "tiny-rgb", "--out", str(tmp_path)]) == 3
    assert "a test says so" in capsys.readouterr().err and not list(tmp_path.iterdir())


# -- cells ----------------------------------------------------------------------------------------------------------


def case(kind: str, preset: str = "tiny-multiscale", memory_format: str = "contiguous") -> cells.Case:
    return cells.Case(preset, kind, 2, memory_format, False, "cpu")


@pytest.mark.parametrize("kind", cells.KINDS)
def test_the_cell_is_one_of_the_model_at_the_size_at_which_it_runs(kind: str) -> None:
    found = cells.heaviest("tiny-multiscale", kind, 2)
    model = lsgm_fast.build("tiny-multiscale")
    network = model.prior if kind in ("block", "attend") else model.vae
    assert network is not None
    module = network.get_submodule(found.name)
    assert type(module) is {"block": ResBlock, "attend": Attention}.get(kind, Cell)
    assert found.name.startswith("postprocess") == (kind == "post")
    seen: list[tuple[int, ...]] = []
    with forward.hooked([module], lambda m, args, output: seen.append(tuple(args[0].shape))), torch.no_grad():
        z = torch.zeros(2, *model.latent_shape)
        if kind in ("block", "attend"):
            network(z, torch.zeros(2))
        else:
            model.decode(z)
    assert seen == [found.shapes[0]]
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in found.module.named_parameters()}


def test_the_heaviest_has_the_most_channels_and_pixels() -> None:
    # Of the blocks of this network, the first on the way up at full resolution: 32 channels in, 16 out, 16x16.
    found = cells.heaviest("tiny-multiscale", "block", 2)
    assert found.name == "up.1.blocks.0" and found.shapes[0] == (2, 32, 16, 16)


@pytest.mark.parametrize("kind", cells.KINDS)
def test_subjects_run_and_are_compared(kind: str) -> None:
    subject = cells.Subject(case(kind, memory_format="channels_last"))
    expected = subject.outputs("reference")
    assert torch.isfinite(expected["result"]).all() and expected["result"].std() > 0.1
    assert forward.compare("auto", subject.outputs("auto"), expected)["result"]["n"] == 1
    weights = sum(p.numel() for p in subject.module.parameters())
    moved = weights + subject.args[0].numel() + expected["result"].numel()
    assert subject.floor_bytes() == 4 * moved
    assert torch.equal(
        cells.Subject(case(kind, memory_format="channels_last")).run("reference"), expected["result"]
    )
