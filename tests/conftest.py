"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recorded import GOLDEN, Golden

ROOT = Path(__file__).resolve().parent.parent

# Beside an installed package alone, without the source tree, there is nothing for these to test.
collect_ignore_glob = [
    pattern
    for folder, patterns in {
        "benchmarks": ("test_bench*.py", "test_ablations.py"),
        "docs": ("test_docs_*.py",),
    }.items()
    if not (ROOT / folder).is_dir()
    for pattern in patterns
]

# The files that take longest, longest first. Begun last, they would keep one process busy while the others have run out
# of files. Those that follow, in the order of their names, take seconds.
LONGEST = (
    "test_native",
    "test_aot",
    "test_training_runs",
    "test_benchmarks",
    "test_golden",
    "test_evaluation_shared",
    "test_packaging",
    "test_training",
    "test_training_curve",
    "test_evaluation",
    "test_driver",
    "test_objectives",
    "test_triton_group_norm_swish",
    "test_triton_depthwise_bn_swish",
    "test_exponential",
    "test_models",
    "test_mixed_score",
    "test_bench_ops",
    "test_triton_mixture_logistic",
    "test_triton_bn_swish",
    "test_accelerate",
    "test_triton_rk",
    "test_triton_nvae_cell",
    "test_ablations",
    "test_triton_fir_resample",
)


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would sort the files by how many tests they have, which says nothing of how long they take.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # The models here are tiny: threads would mostly wait for each other, and for other processes on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=GOLDEN)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp("golden"))
