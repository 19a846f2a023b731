"""pytest-benchmark wrappers of tiny cells, networks and samples: ``python -m pytest benchmarks/test_models.py``.

For figures to publish use ``lsgm-fast bench cells``, ``score``, ``decode`` and ``sample``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.benchmark(max_time=0.1, min_rounds=3)

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import cells, decode, forward, measure, sample, score  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESETS = ("tiny-rgb", "tiny-binary")
CONTENDERS = ("reference", "auto")
MINUTE = 60.0


def check_and_time(benchmark, subject, contender):
    with forward.without_tf32():
        forward.compare(contender, subject.outputs(contender), subject.outputs("reference"))

    def run():
        subject.run(contender)
        measure.synchronize(DEVICE)

    benchmark(run)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("kind", cells.KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_cell(benchmark, preset, kind, contender):
    check_and_time(
        benchmark, cells.Subject(cells.Case(preset, kind, 16, "contiguous", False, DEVICE)), contender
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_score(benchmark, preset, contender):
    case = score.Case(preset, 16, "contiguous", False, DEVICE)
    check_and_time(benchmark, score.Evaluation(case), contender)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_decode(benchmark, preset, contender):
    case = decode.Case(preset, "running", 16, "contiguous", False, DEVICE)
    check_and_time(benchmark, decode.Decoder(case), contender)


@pytest.mark.parametrize("way", sample.WAYS)
def test_sample(benchmark, way):
    model = sample.build("tiny-rgb", DEVICE)
    case = sample.WAYS[way].case("tiny-rgb", 2)
    sampler = sample.Sampler(model, case, DEVICE, measure.Budget(MINUTE))
    benchmark(sampler, model.sampling.tol)
