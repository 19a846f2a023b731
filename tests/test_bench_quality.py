"""The benchmark of sample quality: its record and table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import lsgm_fast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, quality


def test_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LSGM_FAST_CACHE", str(tmp_path))
    images = np.zeros((240, 28, 28), np.uint8)
    labels = np.arange(240) % 2
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (image if label else image.T)[4 + i % 20 : 7 + i % 20] = 255
    np.savez(tmp_path / "bars.npz", images=images, labels=labels)
    lsgm_fast.build("tiny-binary").save(tmp_path / "tiny.safetensors")
    monkeypatch.setattr(quality, "BASELINE", {"solver": "rk45", "tol": 1e-2})
    variants = (
        {"solver": "rk45", "tol": 1e-2},
        {"solver": "exponential", "evaluations": 3, "dtype": "bfloat16"},
        # Far from the baseline: one step of the crudest solver.
        {"solver": "euler", "evaluations": 1},
    )
    monkeypatch.setattr(quality, "VARIANTS", variants)
    arguments = ["--model", str(tmp_path / "tiny.safetensors"), "--data", str(tmp_path / "bars.npz")]
    arguments += ["--held-out", "40", "--samples", "24", "--dry-run", "--out", str(tmp_path)]
    assert quality.main(arguments) == 0
    (path,) = tmp_path.glob("*/quality.json")
    record = json.loads(path.read_text())
    measure.check_record(record)
    base, same, half, crude = record["cases"]
    assert same["figures"] == base["figures"] and quality.differs(same) == []
    assert base["figures"]["frechet_difference"]["values"] == [0.0]
    for case, nfe in ((half, 3), (crude, 1)):
        figures = {name: figure["values"] for name, figure in case["figures"].items()}
        assert figures["evaluations"] == [nfe]
        (difference,) = figures["frechet_difference"]
        assert difference == pytest.approx(figures["frechet"][0] - base["figures"]["frechet"]["values"][0])
        low, high = figures["frechet_difference_interval"]
        assert low <= difference <= high and low < high
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and "| exponential, evaluations 3, bfloat16 | 3 |" in lines[4]


def test_what_differs() -> None:
    def interval(low: float, high: float) -> dict:
        return measure.measured([low, high], "1")

    figures = {
        "frechet_difference_interval": interval(0.1, 2.0),
        "kernel_difference_interval": interval(-0.1, 0.1),
        "confidence_difference_interval": interval(-0.2, -0.1),
        "recall_difference_interval": measure.not_measured("none"),
    }
    assert quality.differs({"figures": figures}) == ["frechet", "confidence"]
