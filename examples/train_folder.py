"""Both stages of an LSGM on a folder of images, and what it draws then.

    python3 examples/train_folder.py --images photos --out runs/folder

Without ``--images`` it first draws a folder of small pictures to train on: rings, crosses and bars. Everything is made
14x14 and grey, and the model is the smallest recipe there is (``digits14``), so that both stages take less than a
minute on one processor core; docs/training.md says how to train a real one. Started again with the same ``--out`` and
options, a run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import lsgm_fast
from lsgm_fast.images import make_grid, save_individual, save_png, to_uint8
from lsgm_fast.training import Trainer
from lsgm_fast.training.assemble import assemble


def draw_pictures(folder: Path, number: int) -> None:
    """Write ``number`` grey pictures of 14x14: a ring, a cross or a bar somewhere near the middle."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:14, :14]
    pictures = []
    for i in range(number):
        v, u = y - rng.uniform(5.5, 7.5), x - rng.uniform(5.5, 7.5)
        size, turn = rng.uniform(3.0, 5.0), rng.uniform(0.0, np.pi)
        along, across = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
        radius = np.hypot(u, v)
        to_bar = np.where(np.abs(along) < size, np.abs(across), size)
        to_other_bar = np.where(np.abs(across) < size, np.abs(along), size)
        distance = (np.abs(radius - size), np.minimum(to_bar, to_other_bar), to_bar)[i % 3]
        pictures.append(np.clip(1.8 - distance, 0.0, 1.0))
    save_individual(folder, to_uint8(np.stack(pictures)[:, None]))


def train(stage: str, out: Path, overrides: list[str], vae: Path | None = None) -> Path:
    """The model's file."""
    config = assemble(stage, recipe="digits14", overrides=overrides, vae=str(vae) if vae else None)
    result = Trainer(config, out / stage).run()
    if result.interrupted:
        raise SystemExit(f"stopped at step {result.step}: start it again to go on")
    return result.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of images (one is made in --out)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/folder"), help="folder of the runs (runs/folder)"
    )
    parser.add_argument("--steps", type=int, default=400, help="of each stage (400)")
    parser.add_argument("--held-out", type=int, default=60, help="images kept back to evaluate on (60)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    images = options.images
    if images is None:
        images = options.out / "images"
        draw_pictures(images, 600)

    overrides = [
        f"data.source={images}",
        "data.channels=1",
        f"data.held_out={options.held_out}",
        f"steps={options.steps}",
        f"warmup_steps={options.steps // 10}",
        f"eval_every={options.steps}",
        f"sample_every={options.steps}",
        "log_every=25",
    ]
    stage1 = train("vae", options.out, overrides)
    stage2 = train("lsgm", options.out, overrides, stage1)

    drawn = lsgm_fast.load(stage2).sample(36, seed=0)
    save_png(options.out / "samples.png", make_grid(to_uint8(drawn), scale=4))
    print(f"{stage2}: the model; {options.out / 'samples.png'}: what it draws")


if __name__ == "__main__":
    main()
