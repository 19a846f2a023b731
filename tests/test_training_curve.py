"""A short training run gives the reference's loss curve whatever kernels run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import lsgm_fast
from lsgm_fast import ops, random
from lsgm_fast.data import DataConfig
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.models import LSGM
from lsgm_fast.presets import PRESETS
from lsgm_fast.training import KLConfig, Trainer, TrainingConfig
from lsgm_fast.training.config import OptimizerConfig, RegularisationConfig
from lsgm_fast.weighting import iw_quantities

STEPS = 200
BATCH = 8
OPERATIONS = (
    "diffuse",
    "fir_resample",
    "group_norm_resample",
    "group_norm_swish",
    "group_norm_swish_residual",
    "mixed_score",
    "mixture_logistic_log_prob",
    "residual_add",
    "score_matching_loss",
    "weight_norm",
)
# Those of the NVAE's cells. "auto" would leave the first to the reference at a tiny model's sizes.
CELL_OPERATIONS = ("bn_swish", "se_residual", "depthwise_bn_swish")
# Of two reference runs: one unit in the last place of every input pixel moves the NELBO by at most 2.9e-7, the KL by
# 4.7e-7 and the norm of the gradient by 2.2e-6, two threads in place of one by 1.8e-7, 4.8e-7 and 1.2e-6. The bounds
# are some ten times that. A gradient that is wrong by 1e-4 in any one of the three kernels moves each figure by more:
# by 7.6e-6, 3.1e-5 and 4.6e-5 at least.
CURVE_TOLERANCE = {"nelbo": 2e-6, "kl": 5e-6, "grad_norm_vae": 2e-5}


def _images() -> torch.Tensor:
    """Smooth blobs that a small model can learn something about."""
    place = random.uniform(7, range(64), "blobs", (3, 2, 1, 1))
    grid = torch.linspace(0, 1, 32)
    distance = (place[:, :, 0] - grid[:, None]).square() + (place[:, :, 1] - grid[None, :]).square()
    return torch.exp(-8.0 * distance)


def _loss(model: LSGM, x: torch.Tensor, step: int) -> torch.Tensor:
    """The joint objective of end-to-end training: NELBO of the VAE, cross entropy and score matching of the prior."""
    vae, n = model.vae, x.shape[0]
    x = vae.preprocess_images(x)
    logits, groups = vae(x, None, step)
    z0 = vae.merge_groups([group.eps for group in groups])
    log_q = torch.stack([group.log_q.flatten(1).sum(dim=1) for group in groups]).sum(dim=0)
    iw = iw_quantities(model.sde, random.uniform(step, range(n), "time"), "ll_iw")
    noise = random.normal(step, range(n), "diffusion", model.latent_shape)
    prediction = model.predict_noise(ops.diffuse(z0, noise, iw.m, iw.var), iw.t)
    p_loss, cross_entropy = ops.score_matching_loss(prediction, noise, iw.weight_p, iw.weight_q, 0.5)
    assert cross_entropy is not None
    total = vae.reconstruction_loss(logits, x) + log_q + cross_entropy.flatten(1).sum(dim=1) + p_loss
    return total.mean() / x[0].numel()


def _curve(backend: str) -> tuple[np.ndarray, dict[str, str]]:
    torch.manual_seed(0)
    model = lsgm_fast.build("tiny-rgb").train()
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3)
    images, losses = _images(), []
    with use_backend(backend), record() as log:
        for step in range(STEPS):
            first = step * BATCH % len(images)
            loss = _loss(model, images[first : first + BATCH], step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return np.array(losses), log.backends()


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return _curve("reference")[0]


def test_the_model_learns(reference: np.ndarray) -> None:
    assert np.isfinite(reference).all()
    assert reference[-20:].mean() < 0.9 * reference[:20].mean()


def test_fused_kernels_give_the_references_curve(reference: np.ndarray) -> None:
    """Rounding alone moves the curve, by some 1e-6: a tenth of what is allowed."""
    if os.environ.get("LSGM_FAST_BACKEND"):
        pytest.skip("LSGM_FAST_BACKEND chooses the kernels")
    curve, ran = _curve("cpu")
    assert {op: ran[op] for op in OPERATIONS} == dict.fromkeys(OPERATIONS, "cpu")
    np.testing.assert_allclose(curve, reference, rtol=2e-5)


def _stage1(backend: str, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The logged figures of every step of a first stage with all of the trainer, and what ran."""
    images = (255.0 * _images()[:40, :1, 2:-2, 2:-2]).to(torch.uint8).permute(0, 2, 3, 1)
    np.savez(folder / "images.npz", images=images.numpy())
    preset = PRESETS["tiny-binary"]
    # Half of it, in the interest of time: each kind of cell is still there.
    half = preset.vae.replace(
        encoder_channels=8, decoder_channels=8, channel_mult=(1, 2), preprocess_blocks=1, postprocess_blocks=1
    )
    config = TrainingConfig(
        model=preset.replace(vae=half, score=None),
        data=DataConfig(str(folder / "images.npz"), binarise="dynamic", held_out=8),
        batch_size=4,
        steps=STEPS,
        warmup_steps=10,
        vae_optimizer=OptimizerConfig("adamax", lr=5e-3, lr_min=1e-4, eps=1e-3),
        # Annealed, so that the latents are used: a collapsed posterior would hide an error of the encoder.
        kl=KLConfig(start=1e-4, end=0.9, anneal=0.5),
        regularisation=RegularisationConfig(vae=1e-2),
        log_every=1,
        save_every=STEPS,
        sample_every=0,
        eval_every=0,
    )
    with use_backend(backend), record() as log:
        Trainer(config, folder / "run", device="cpu", progress=False).run()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {name: np.array([line[name] for line in lines]) for name in CURVE_TOLERANCE}, log.backends()


def test_the_kernels_of_the_cells_give_the_references_first_stage(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """By name, so that a kernel that cannot run here is an error and not a reference that agrees with itself."""
    expected, ran = _stage1("reference", tmp_path_factory.mktemp("reference"))
    assert {ran[op] for op in CELL_OPERATIONS} == {"reference"}
    forced = ",".join(["auto", *(f"{op}=cpu" for op in CELL_OPERATIONS)])
    curve, ran = _stage1(forced, tmp_path_factory.mktemp("fused"))
    assert {ran[op] for op in CELL_OPERATIONS} == {"cpu"}
    for name, tolerance in CURVE_TOLERANCE.items():
        assert expected[name].shape == (STEPS,) and np.isfinite(expected[name]).all()
        np.testing.assert_allclose(curve[name], expected[name], rtol=tolerance, err_msg=name)
    assert expected["nelbo"][-20:].mean() < 0.7 * expected["nelbo"][:20].mean()
    # Not the same numbers by the same code.
    assert (curve["grad_norm_vae"] != expected["grad_norm_vae"]).any()
