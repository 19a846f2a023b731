"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch
from recorded import GOLDEN, Golden


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # Many small operations: more threads than this only wait for each other.
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session", params=GOLDEN)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp("golden"))
