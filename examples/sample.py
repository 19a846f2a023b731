"""A grid of images drawn by a model.

    python3 examples/sample.py --out samples.png

draws 36 digits by the embedded model; ``--model`` takes any checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lsgm_fast
from lsgm_fast.images import make_grid, save_png, to_uint8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="'demo' or a checkpoint (demo)")
    parser.add_argument("-n", "--number", type=int, default=36, help="of images (36)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images (0)")
    parser.add_argument(
        "--evaluations", type=int, help="of the score network (as many as its tolerance needs)"
    )
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG file (samples.png)")
    options = parser.parse_args()

    model = lsgm_fast.load(options.model)
    costs = []
    images = model.sample(
        options.number,
        seed=options.seed,
        evaluations=options.evaluations,
        on_batch=lambda _, info: costs.append(info),
    )
    save_png(options.out, make_grid(to_uint8(images)))
    nfe, seconds = costs[0].nfe, sum(info.seconds for info in costs)
    print(
        f"{options.out}: {options.number} images, {nfe} evaluations of the score network, {seconds:.1f} s of solving"
    )


if __name__ == "__main__":
    main()
