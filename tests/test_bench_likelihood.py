"""The benchmark of the log-likelihood: its record, and its published procedure."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lsgm_fast

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import likelihood, measure  # noqa: E402


def test_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    lsgm_fast.build("tiny-binary").save(tmp_path / "tiny.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    monkeypatch.setattr(likelihood, "PUBLISHED_TOL", 0.1)
    monkeypatch.setattr(likelihood, "FIXED", ((0.1, 1), (0.3, 1), (0.3, 2)))
    monkeypatch.setattr(likelihood, "FRESH", ((0.3, 1),))
    monkeypatch.setattr(
        likelihood, "DataConfig", lambda source: lsgm_fast.data.DataConfig(source, held_out=4)
    )
    arguments = ["--model", str(tmp_path / "tiny.safetensors"), "--data", str(tmp_path / "images.npz")]
    arguments += ["--images", "2", "--sets", "2", "3", "--exact", "0.1", "--exact-probes", "4", "--dry-run"]
    assert likelihood.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/likelihood.json")
    record = json.loads(path.read_text())
    measure.check_record(record)
    reference, *cases = record["cases"]
    assert reference["parameters"]["procedure"] == "reference"
    assert [case["parameters"]["procedure"] for case in cases] == ["published", *["fixed"] * 3, "fresh"]
    base = cases[0]["figures"]
    for case in cases:
        p, f = case["parameters"], case["figures"]
        assert len(f["evaluations"]["values"]) == (2 if p["procedure"] == "published" else 3)
        ratio = np.mean(f["evaluations"]["values"]) / np.mean(base["evaluations"]["values"])
        ratio *= (f["spread"]["median"] / base["spread"]["median"]) ** 2
        assert f["relative_cost"]["value"] == pytest.approx(ratio)
    kinds = [case["figures"]["tolerance_bias"]["kind"] for case in cases]
    assert kinds == ["not_measured", "not_measured", "measured", "not_measured", "not_measured"]
    assert capsys.readouterr().out.count("\n| ") == 5


def test_the_published_procedure_is_unbiased() -> None:
    """Its mean over many copies of a latent is what many fixed probes give."""
    torch.manual_seed(0)
    model = lsgm_fast.build("tiny-binary").double().eval()
    z = lsgm_fast.random.normal(1, [0], "z", model.latent_shape, dtype=torch.float64)
    exact, _ = likelihood.log_prior(
        model._term(), z, t_start=model.sampling.ode_eps, rtol=1e-4, atol=1e-4, probes=64
    )
    many, _ = likelihood.published(model, z.expand(32, -1, -1, -1), 0, 1e-2)
    error = float(many.std()) / math.sqrt(32)
    assert abs(float(many.mean() - exact)) < 4 * error + 0.5
