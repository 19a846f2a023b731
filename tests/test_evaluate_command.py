"""``lsgm-fast evaluate``: two models compared, and the quality of samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lsgm_fast
from lsgm_fast import cli
from lsgm_fast.commands.evaluation import _Variant


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(model, data): random weights, and labelled images of bars that lie or stand."""
    folder = tmp_path_factory.mktemp("evaluate")
    generator = np.random.default_rng(0)
    images = np.zeros((240, 28, 28), np.uint8)
    labels = np.arange(240) % 2
    for image, label in zip(images, labels, strict=True):
        place = generator.integers(4, 24)
        (image if label else image.T)[place : place + 3] = 255
    np.savez(folder / "bars.npz", images=images, labels=labels)
    lsgm_fast.build("tiny-binary").save(folder / "tiny.safetensors")
    return str(folder / "tiny.safetensors"), str(folder / "bars.npz")


def _evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["evaluate", *arguments, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_options_of_a_model() -> None:
    variant = _Variant.parse("model.pt@solver=rk45,tol=1e-3,evaluations=7,dtype=bfloat16")
    assert variant.path == "model.pt"
    assert variant.options == {"solver": "rk45", "tol": 1e-3, "evaluations": 7, "dtype": "bfloat16"}
    assert variant.sampling() == {"solver": "rk45", "tol": 1e-3, "evaluations": 7}
    assert _Variant.parse("demo").options == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo@solvr=rk45"], "did you mean 'solver'"),
        (["demo@tol=small"], "demo@tol=1e-3,solver=rk45; got 'tol=small'"),
        (["demo@tol"], "got 'tol'"),
        (["demo@dtype=int8", "-n", "2"], "unknown dtype 'int8'"),
        (["demo", "--compare", "demo", "--prior", "both"], "two comparisons"),
        (["demo", "--no-likelihood"], "add --quality"),
    ],
)
def test_what_cannot_be_evaluated(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_model_against_itself_and_in_half_precision(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    common = ["--data", data, "--held-out", "40", "-n", "12"]
    same = _evaluate(capsys, model, "--compare", f"{model}@tol=1e-3", *common)
    assert same["difference"]["mean"] == 0.0 and same["difference"]["high"] == 0.0
    half = _evaluate(capsys, model, "--compare", f"{model}@dtype=bfloat16", *common)
    means = [report["nelbo"]["mean"] for report in half["reports"].values()]
    assert half["difference"]["mean"] == pytest.approx(means[0] - means[1])
    assert 0.0 < abs(half["difference"]["mean"]) < 0.02 * means[0]


def test_quality_of_two_sets_of_samples(
    files: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LSGM_FAST_CACHE", str(tmp_path))
    model, data = files
    first, second = f"{model}@evaluations=3", f"{model}@evaluations=6"
    common = ["--compare", second, "--quality", "--no-likelihood", "--samples", "30", "--data", data]
    record = _evaluate(capsys, first, *common, "--held-out", "40")
    assert record["reports"] == {} and set(record["quality"]) == {first, second}
    report = record["quality"][first]
    assert (report["samples"], report["reference"], report["classes"]) == (30, 40, [0, 1])
    assert report["frechet"]["value"] > 0.0 and report["memorisation_pixels"]["flagged"] is False
    difference = record["quality_difference"]["frechet"]
    assert difference["value"] == pytest.approx(
        report["frechet"]["value"] - record["quality"][second]["frechet"]["value"]
    )
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert len(list((tmp_path / "classifiers").iterdir())) == 1

    arguments = [first, *common, "--held-out", "40", "--device", "cpu", "--out", str(tmp_path / "r.json")]
    assert cli.main(["evaluate", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "classifier Frechet distance" in printed and "memorised, by pixels" in printed
    assert "samples by class" in printed and "FID" not in printed
    written = json.loads((tmp_path / "r.json").read_text())["quality"][first]
    assert written["frechet"] == report["frechet"]
