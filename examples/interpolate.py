"""Ways through latent space: between two noises, and between two images.

    python3 examples/interpolate.py --out interpolation.png

Every row is a way in equal steps. The first rows go from one noise of the prior to another: each point on the way is
solved to a latent and decoded. The others go from one encoded digit to another through the noises that the
probability-flow ODE carries them to: it is run forward in time for the ends and backward for every point. Noises are
met on the sphere: a straight line would cross the inside of the shell on which normal noise of so many dimensions lies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import lsgm_fast
from lsgm_fast import random
from lsgm_fast.data import DataConfig, open_data, spread
from lsgm_fast.evaluation import load_images
from lsgm_fast.images import make_grid, save_png, to_uint8
from lsgm_fast.models import LSGM
from lsgm_fast.sampling import solve_ode


def slerp(a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
    """``(sin((1 - s) w) a + sin(s w) b) / sin w`` for s from 0 to 1, w the angle between a and b (Shoemake 1985).

    Args:
        a, b: of one shape, neither parallel nor opposite.

    Returns:
        (steps, *a.shape), from a to b.
    """
    angle = torch.arccos((a.flatten() @ b.flatten()) / (a.norm() * b.norm()))
    s = torch.linspace(0.0, 1.0, steps, dtype=a.dtype).reshape(-1, *(1,) * a.dim())
    return (torch.sin((1.0 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


@torch.no_grad()
def noise_of(model: LSGM, z: torch.Tensor, tol: float = 1e-3) -> torch.Tensor:
    """The noises (standard normal, as ``sample(noise=...)`` takes them) from which the ODE ends at the latents z."""
    end = solve_ode(
        lambda t, z: model.drift(z, torch.tensor(t, dtype=torch.float64)),
        z,
        t_start=model.sampling.ode_eps,
        t_end=1.0,
        rtol=tol,
        atol=tol,
    )
    return end.z / model.sde.prior_std


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="'demo' or a checkpoint (demo)")
    parser.add_argument(
        "--data", default="digits", help="'digits' or a path: images of the model's size (digits)"
    )
    parser.add_argument("--rows", type=int, default=3, help="of either kind (3)")
    parser.add_argument("--steps", type=int, default=9, help="images of a row (9)")
    parser.add_argument("--seed", type=int, default=0, help="of the noises (0)")
    parser.add_argument("--out", type=Path, default=Path("interpolation.png"), help="PNG (interpolation.png)")
    options = parser.parse_args()

    model = lsgm_fast.load(options.model)
    between_noises = random.normal(options.seed, range(2 * options.rows), "prior", model.latent_shape)

    binary = model.vae.config.decoder_distribution == "bernoulli"
    data = DataConfig(options.data, binarise="static" if binary else "none")
    ends = spread(open_data(data, "held_out"), 2 * options.rows)
    with torch.no_grad():
        groups = model.encode(load_images(ends, data) / 255.0, seed=options.seed)
    z = model.vae.merge_groups([group.eps for group in groups])
    between_images = noise_of(model, z)

    pairs = torch.cat((between_noises, between_images)).unflatten(0, (-1, 2))
    ways = torch.cat([slerp(a, b, options.steps) for a, b in pairs])
    images = model.sample(len(ways), noise=ways, seed=options.seed)
    save_png(options.out, make_grid(to_uint8(images), columns=options.steps))
    print(
        f"{options.out}: {options.rows} rows between noises, {options.rows} between images of {options.data}"
    )


if __name__ == "__main__":
    main()
