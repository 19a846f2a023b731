"""Recorded data of the published implementation, and checkpoint files rebuilt from it."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"
TRAINED_DIGITS = DATA / "mnist-trained" / "model.safetensors"
GOLDEN = ("cifar10-vpsde", "mnist-binary", "celeba256-multiscale")


def published_checkpoint(name: str) -> dict[str, Any]:
    """The dictionary of a golden model's ``checkpoint_fid.pt``."""
    folder = DATA / "golden" / name
    meta = json.loads((folder / "meta.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    checkpoint: dict[str, Any] = {
        "epoch": 7,
        "global_step": 70,
        "args": argparse.Namespace(**meta["args"]),
        "best_score_fid": 1e10,
        "best_score_nll": 1e10,
    }
    for part, keys in meta["key_order"].items():
        state = OrderedDict()
        for key in keys:
            alias = key.removesuffix("_normalized") if key in meta["aliases"] else key
            state[key] = weights[f"{part}/{alias}"]
        checkpoint[part] = state
    return checkpoint


class Golden:
    """One recorded model: ``path`` of its checkpoint, recorded tensors ``io``, ``meta``."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.meta = json.loads((DATA / "golden" / name / "meta.json").read_text())
        self.io = load_file(DATA / "golden" / name / "io.safetensors")
        self.io["x01"] = self.io["x01"].float() / 255.0
        self.path = folder / f"{name}-checkpoint_fid.pt"
        torch.save(published_checkpoint(name), self.path)

    def recorded(self, key: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tensor, recorded), both on the pixels that were kept."""
        for step in (4, 8):
            if f"{key}_every{step}" in self.io:
                return tensor[:, :, ::step, ::step], self.io[f"{key}_every{step}"]
        return tensor, self.io[key]

    def lower_noise(self, key: str) -> list[torch.Tensor]:
        noises, i = [], 0
        while f"{key}.lower_noise{i}" in self.io:
            noises.append(self.io[f"{key}.lower_noise{i}"])
            i += 1
        return noises


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error, computed in float64 on the CPU."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())
