"""The benchmark of the score network: record, check, floor. What it shares with the one of decoding is tested there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import forward, measure, score  # noqa: E402
from lsgm_fast import dispatch  # noqa: E402
from lsgm_fast.dispatch import REGISTRY  # noqa: E402

CASE = score.Case("tiny-rgb", 2, "channels_last", False, "cpu")


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--presets", "tiny-rgb", "--batch", "2", "--memory-format", "channels_last"]
    arguments += ["--no-compile", "--repeats", "3", "3", "--budget", "120", "--dry-run", "--force"]
    assert score.BENCHMARK.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/score.json")
    record = json.loads(path.read_text())
    measure.check_record(record)
    (entry,) = record["cases"]
    parameters, figures = entry["parameters"], entry["figures"]
    assert parameters.pop("tolerance") == forward.TOLERANCE and score.Case(**parameters) == CASE
    assert figures["auto"]["seconds"]["n"] == 3 and not entry["failures"]
    assert 0.0 <= figures["difference"]["auto"]["noise"]["median"] <= forward.TOLERANCE
    assert "group_norm_swish" in entry["backends"]
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-")]
    assert line[:3] == ["tiny-rgb", "2", "channels_last"] and len(line) == 11


def test_an_error_inside_a_block_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh weights would hide it: blocks end with almost nothing."""
    op = REGISTRY["group_norm_swish"]
    reference = op.impl("reference").fn
    wrong = dispatch.Impl("cpu", lambda *args: 1.01 * reference(*args), priority=99)
    monkeypatch.setattr(op, "_order", (wrong, *op._order))
    case = score.Case("tiny-rgb", 2, "contiguous", False, "cpu")
    result = forward.run_case(
        case, score.Evaluation, fewest=1, most=1, allowed=0.0, budget=measure.Budget(60), early=lambda r: None
    )
    (failure,) = result["failures"]
    assert failure.startswith("auto: AssertionError: noise differ")


def test_the_floor_counts_weights_and_blocks_once() -> None:
    evaluation = score.Evaluation(CASE)
    network, total = evaluation.network, 0

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += args[0].numel() + output[0].numel()

    for module in network.modules():
        if type(module).__name__ in ("ResBlock", "Attention"):
            module.register_forward_hook(count)
    weights = sum(p.numel() for p in network.parameters())
    assert evaluation.floor_bytes() == 4 * (weights + total) and total > 0
    assert evaluation.run("reference").is_contiguous(memory_format=torch.channels_last)
