"""How likely a model finds images, and whether that tells its own kind from others.

    python3 examples/outliers.py --out outliers.png

The negative evidence lower bound (NELBO, nats) of held-out digits, of their negatives, of the same digits upside down,
and of noise with as many bright pixels. For each other kind the area under the ROC curve: the probability that such an
image has the larger bound, 0.5 where the bound tells nothing. A row of the picture is a kind, in the order of the
table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import lsgm_fast
from lsgm_fast import random
from lsgm_fast.data import DataConfig, open_data, spread
from lsgm_fast.evaluation import evaluate_nelbo, load_images, out_of_distribution
from lsgm_fast.images import make_grid, save_png, to_uint8

COLUMNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="'demo' or a checkpoint (demo)")
    parser.add_argument(
        "--data", default="digits", help="'digits' or a path: images of the model's size (digits)"
    )
    parser.add_argument("-n", "--number", type=int, default=40, help="images of each kind (40)")
    parser.add_argument("--draws", type=int, default=2, help="of posterior, noise and time per image (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--out", type=Path, default=Path("outliers.png"), help="PNG (outliers.png)")
    options = parser.parse_args()
    if options.number < 2:
        parser.error(f"--number must be at least 2 for a standard error, got {options.number}")

    model = lsgm_fast.load(options.model)
    binary = model.vae.config.decoder_distribution == "bernoulli"
    data = DataConfig(options.data, binarise="static" if binary else "none")
    images = load_images(spread(open_data(data, "held_out"), options.number), data) / 255.0
    if binary:
        chance = random.uniform(options.seed, range(len(images)), "noise", tuple(images.shape[1:]))
        noise = (chance < images.mean()).to(images.dtype)
    else:
        noise = random.uniform(options.seed, range(len(images)), "noise", tuple(images.shape[1:]))
    kinds = {
        "held out": images,
        "negatives": 1.0 - images,
        "upside down": images.flip(2),
        "noise": noise,
    }

    reports = {
        kind: evaluate_nelbo(model, values.split(20), draws=options.draws, seed=options.seed)
        for kind, values in kinds.items()
    }
    print(f"{'':12s}{'NELBO, nats':>24s}{'area under the curve':>26s}")
    for kind, report in reports.items():
        line = f"{kind:12s}{report.nelbo.mean:14.2f} +- {report.nelbo.standard_error:6.2f}"
        if kind != "held out":
            area = out_of_distribution(reports["held out"], report)
            line += f"{area.mean:16.3f} +- {area.standard_error:5.3f}"
        print(line)
    rows = torch.cat([values[:: max(1, len(images) // COLUMNS)][:COLUMNS] for values in kinds.values()])
    save_png(options.out, make_grid(to_uint8(rows), columns=min(COLUMNS, len(images))))
    print(options.out)


if __name__ == "__main__":
    main()
