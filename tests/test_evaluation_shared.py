"""Evaluation shared by two processes: every figure is that of one, and a failure ends both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distributed import SECONDS, Pair
from test_evaluation import Mixing, Prior, binary_images, model_of, split

import lsgm_fast
from lsgm_fast import distributed
from lsgm_fast.config import SamplingConfig
from lsgm_fast.evaluation import binary_draws, draw_share, evaluate_nelbo

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the two processes: sums of more threads are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    two = Pair()
    try:
        yield two
        two.close()
    finally:
        two.kill()


def _report(kind: str, size: int, shared: bool = True, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    sampling = SamplingConfig(ode_eps=0.1, tol=1e-2)
    model = model_of(Mixing() if kind == "mixing" else Prior(), sampling=sampling)
    batches = split(binary_images(7), size)
    report = evaluate_nelbo(model, iter(batches), draws=2, seed=3, shared=shared, **options)
    return {**report.to_dict(), "seconds": None, "values": report.values.tolist()}


@pytest.mark.parametrize("size", [2, 3, 7])  # four batches, three, and one
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prior", {}),
        ("mixing", {"method": "ode", "measure_probes": True, "probes": 2}),
        ("mixing", {"method": "ode", "trace": "published", "limit": 5}),
    ],
    ids=["diffusion", "ode", "published"],
)
def test_two_processes_give_the_report_of_one(
    pair: Pair, kind: str, size: int, options: dict[str, Any], one_thread: None
) -> None:
    one = _report(kind, size, **options)
    assert one["images"] == options.get("limit", 7) and len(one["values"]) == one["images"]
    assert _report(kind, size, shared=False, **options) == one
    for result in pair.run(_shared, (kind, size, options), (kind, size, options)):
        assert result == one


def _shared(kind: str, size: int, options: dict[str, Any]) -> dict[str, Any]:
    return _report(kind, size, **options)


def _alone(images: torch.Tensor | None) -> int:
    """As a training evaluates: in one process, while the other does something else."""
    return 0 if images is None else evaluate_nelbo(model_of(None), [images[:2], images[2:]]).images


def test_a_process_can_evaluate_by_itself(pair: Pair) -> None:
    assert pair.run(_alone, (None,), (binary_images(4),)) == [0, 4]


def _failing(where: int, what: str) -> tuple[str, str]:
    """The batch ``where`` fails in the process whose turn it is."""
    batches = split(binary_images(8), 2)

    def stream() -> Iterator[torch.Tensor]:
        for i, images in enumerate(batches):
            if i == where and what == "read" and distributed.rank() == 1:
                raise OSError("a damaged file")
            yield images + 5.0 if i == where and what == "range" else images

    class Breaks(Prior):
        def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            out = super().forward(z, t)
            return out * float("nan") if what == "nan" and distributed.rank() == 1 else out

    try:
        evaluate_nelbo(model_of(Breaks()), stream(), shared=True)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("what", "where", "name", "message"),
    [
        ("range", 3, "ValueError", "expected image values in [0, 1]"),
        ("read", 2, "OSError", "a damaged file"),
        ("nan", 0, "NonFiniteError", "bound of image 2 is NaN"),
    ],
)
def test_a_failure_in_one_process_is_raised_in_both(
    pair: Pair, what: str, where: int, name: str, message: str
) -> None:
    for kind, text in pair.run(_failing, (where, what), (where, what)):
        assert kind == name and message in text


class _Unportable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def _gathered(value: int, fails: bool) -> Any:
    try:
        return distributed.gather_objects(value, _Unportable("one", "other") if fails else None)
    except RuntimeError as error:
        return str(error)


def test_objects_of_all_processes(pair: Pair) -> None:
    assert pair.run(_gathered, (3, False), (4, False)) == [[3, 4], [3, 4]]
    assert pair.run(_gathered, (3, False), (4, True)) == ["_Unportable: one and other"] * 2
    assert distributed.gather_objects(3) == [3]
    with pytest.raises(_Unportable):
        distributed.gather_objects(3, _Unportable("one", "other"))


def _model() -> lsgm_fast.models.LSGM:
    torch.manual_seed(0)
    return lsgm_fast.build("tiny-binary").eval()


def _samples(count: int, binary: bool, options: dict[str, Any]) -> Any:
    try:
        return draw_share(_model(), count, 7, binary, **options).numpy()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("options", [{"solver": "ancestral", "evaluations": 2}, {"tol": 0.1}])
def test_the_shares_of_the_samples_are_those_of_one_process(
    pair: Pair, options: dict[str, Any], one_thread: None
) -> None:
    whole = _model().sample(70, seed=7, **options)
    assert torch.equal(draw_share(_model(), 70, 7, False, **options), whole)
    drawn = binary_draws(whole, 7)
    assert torch.equal(draw_share(_model(), 70, 7, True, **options), drawn)
    for binary, expected in ((False, whole), (True, drawn)):
        shares = pair.run(_samples, (70, binary, options), (70, binary, options))
        assert [len(share) for share in shares] == [64, 6]
        assert torch.equal(torch.cat(shares), expected)


def test_batch_statistics_over_all_processes_neither_hang_nor_change(pair: Pair, one_thread: None) -> None:
    """Three batches for two processes; the statistics of one differ from those of another."""
    options = {"evaluations": 2, "bn": "batch"}
    whole = _model().sample(130, seed=7, **options)
    shares = pair.run(_samples, (130, False, options), (130, False, options))
    assert [len(share) for share in shares] == [64, 66]
    torch.testing.assert_close(torch.cat(shares), whole, rtol=0, atol=1e-5)


def test_fewer_samples_than_a_batch_are_shared_too(pair: Pair, one_thread: None) -> None:
    options = {"solver": "ddim", "evaluations": 3}
    whole = _model().sample(11, seed=7, **options)
    shares = pair.run(_samples, (11, False, options), (11, False, options))
    assert [len(share) for share in shares] == [5, 6]
    torch.testing.assert_close(torch.cat(shares), whole, rtol=0, atol=1e-5)
    said = pair.run(_samples, (1, False, options), (1, False, options))
    assert all("1 samples cannot be shared among 2 processes" in text for text in said)


# -- the command ------------------------------------------------------------------------------------------------------


def _command(*arguments: str, processes: int, cache: Path) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "lsgm_fast", "evaluate", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "LSGM_FAST_CACHE": str(cache),
    }
    return subprocess.run(
        [*command, "--device", "cpu"],
        env={**os.environ, **own},
        text=True,
        capture_output=True,
        timeout=5 * SECONDS,
        check=False,
    )


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    for report in (*record["reports"].values(), *record["outside"]["reports"].values()):
        del report["seconds"]
    for report in record["quality"].values():
        del report["seconds"]
    return record


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, level in (("bars", 255), ("dim", 90)):
        images = np.zeros((60, 28, 28), np.uint8)
        labels = np.arange(60) % 2
        for image, label in zip(images, labels, strict=True):
            place = generator.integers(4, 24)
            (image if label else image.T)[place : place + 3] = level
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
    _model().save(tmp_path / "tiny.safetensors")
    model, data = str(tmp_path / "tiny.safetensors"), str(tmp_path / "bars.npz")
    options = [f"{model}@evaluations=2", "--data", data, "--held-out", "10", "-n", "5", "--batch-size", "2"]
    options += ["--quality", "--samples", "70", "--outside", str(tmp_path / "dim.npz"), "--json"]
    records = []
    for processes in (2, 1):
        done = _command(*options, processes=processes, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("note: the model's pixels are binary") == 1
        (line,) = done.stdout.splitlines()  # one process prints
        records.append(_without_times(json.loads(line)))
    assert records[0] == records[1]
    report = records[0]["quality"][options[0]]
    assert (report["samples"], records[0]["reports"]["score"]["images"]) == (70, 5)

    broken = lsgm_fast.load(model)
    with torch.no_grad():
        next(broken.prior.parameters()).fill_(float("nan"))
    broken.save(tmp_path / "broken.safetensors")
    failed = _command(
        str(tmp_path / "broken.safetensors"), *options[1:9], processes=2, cache=tmp_path / "cache"
    )
    assert failed.returncode != 0 and failed.stdout == ""
    assert len(re.findall("^error: ", failed.stderr, re.M)) == 1
    assert "the bound of image 0 is NaN or infinite" in failed.stderr
    assert not re.search("RuntimeError|Connection closed", failed.stderr)
