"""Images through the VAE and back.

    python3 examples/reconstruct.py --out reconstructions.png

Pairs of columns: an image, and the mean image that the decoder makes of a draw from its posterior.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import lsgm_fast
from lsgm_fast.data import DataConfig, open_data, spread
from lsgm_fast.evaluation import load_images
from lsgm_fast.images import make_grid, save_png, to_uint8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="'demo' or a checkpoint, of stage 1 too (demo)")
    parser.add_argument(
        "--data", default="digits", help="'digits' or a path: images of the model's size (digits)"
    )
    parser.add_argument("-n", "--number", type=int, default=32, help="of images (32)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("reconstructions.png"), help="PNG (reconstructions.png)"
    )
    options = parser.parse_args()

    model = lsgm_fast.load(options.model)
    binary = model.vae.config.decoder_distribution == "bernoulli"
    data = DataConfig(options.data, binarise="static" if binary else "none")
    images = load_images(spread(open_data(data, "held_out"), options.number), data) / 255.0

    with torch.no_grad():
        latents = [group.eps for group in model.encode(images, seed=options.seed)]
    # The prior covers the groups of the lowest resolution; what lies below them, if anything, is given as it is.
    covered = model.vae.merge_groups(latents)
    below = latents[len(latents) - len(model.lower_shapes) :]
    decoded = model.decode(covered, lower_noise=below)

    pairs = torch.stack((images, decoded), dim=1).flatten(0, 1)
    save_png(options.out, make_grid(to_uint8(pairs), columns=8))
    distance = (decoded - images).abs().mean()
    print(
        f"{options.out}: {len(images)} images, {distance:.4f} from their reconstructions per pixel on average"
    )


if __name__ == "__main__":
    main()
