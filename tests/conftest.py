"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch
from recorded import GOLDEN, Golden


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # The models here are tiny: threads would mostly wait for each other, and for other processes on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=GOLDEN)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp("golden"))
