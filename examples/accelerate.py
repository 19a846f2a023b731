"""Live modules of the published code base on this library's networks and solvers.

    python3 examples/accelerate.py --out accelerated.png

Code written for the published LSGM release changes three lines:

    import lsgm_fast
    vae, dae = lsgm_fast.accelerate(vae, dae)
    diffusion = lsgm_fast.accelerate_diffusion(diffusion)

The release itself is not here, so this script makes objects that look like its own from the embedded model: they have
its parameters' names and the attributes that are read, and no computation. Below ``main`` nothing knows that.
docs/accelerate.md has what is computed and what stays as it is.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import lsgm_fast
from lsgm_fast.checkpoints import to_published
from lsgm_fast.images import make_grid, save_png, to_uint8


class StandIn(nn.Module):
    """A module with the tensors of a state dict, under its names; every attribute given is there as well."""

    def __init__(self, state: Mapping[str, torch.Tensor], **attributes: object) -> None:
        super().__init__()
        for key, value in state.items():
            holder: nn.Module = self
            *path, name = key.split(".")
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder._modules[part]  # type: ignore[assignment]
            if name in ("running_mean", "running_var", "num_batches_tracked"):
                holder.register_buffer(name, value)
            else:
                holder.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for name, value in attributes.items():
            setattr(self, name, value)


class StandInDiffusion:
    """The variance-preserving diffusion, ``dz = -beta(t) z / 2 dt + sqrt(beta(t)) dw`` (LSGM, appendix B)."""

    def __init__(self, args: Namespace) -> None:
        self.beta_start, self.beta_end, self.sigma2_0 = args.beta_start, args.beta_end, args.sigma2_0

    def g2(self, t: torch.Tensor) -> torch.Tensor:
        return self.beta_start + (self.beta_end - self.beta_start) * t

    def f(self, t: torch.Tensor) -> torch.Tensor:
        return -0.5 * self.g2(t)

    def var(self, t: torch.Tensor) -> torch.Tensor:
        integral = self.beta_start * t + 0.5 * (self.beta_end - self.beta_start) * t * t
        return 1.0 - (1.0 - self.sigma2_0) * torch.exp(-integral)

    def sample_model_ode(self, *args: object) -> None:
        raise NotImplementedError("the release's own solver is not here: use lsgm_fast.accelerate_diffusion")


def published_objects() -> tuple[nn.Module, nn.Module, StandInDiffusion, Namespace]:
    """VAE, score network, diffusion and options, as code written for the release has them."""
    model = lsgm_fast.load("demo")
    checkpoint = to_published(model)
    args = checkpoint["args"]
    vae = StandIn(
        checkpoint["vae_state_dict"],
        num_latent_scales=args.num_latent_scales,
        num_groups_per_scale=args.num_groups_per_scale,
        num_latent_per_group=args.num_latent_per_group,
        groups_per_scale=[args.num_groups_per_scale] * args.num_latent_scales,
        crop_output=True,
        num_bits=args.num_x_bits,
        decoder_dist=args.decoder_dist,
        dataset=args.dataset,
        input_size=32,
        log_sig_q_scale=args.log_sig_q_scale,
    )
    dae = StandIn(
        checkpoint["dae_state_dict"],
        mixed_prediction=args.mixed_prediction,
        is_active=None,
        num_input_channels=model.latent_shape[0],
        input_size=model.latent_shape[1],
        dataset=args.dataset,
        nf=args.num_channels_dae,
        num_resolutions=args.num_scales_dae,
        attn_resolutions=(16,),
    )
    return vae.eval(), dae.eval(), StandInDiffusion(args), args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-n", "--number", type=int, default=16, help="of images (16)")
    parser.add_argument("--seed", type=int, default=0, help="of PyTorch's generator (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("accelerated.png"), help="PNG file (accelerated.png)"
    )
    options = parser.parse_args()

    old_vae, old_dae, old_diffusion, args = published_objects()
    # A network that can be called is compared with ours; a stand-in cannot, so it is told what weights do not show.
    vae, dae = lsgm_fast.accelerate(old_vae, old_dae, args=args, check=False)

    # What such code goes on to do, once with the published solver and once with one of ours.
    with torch.no_grad():
        for solver, setting in (("scipy", {}), ("exponential", {"evaluations": 10})):
            diffusion = lsgm_fast.accelerate_diffusion(old_diffusion, solver=solver, **setting)
            torch.manual_seed(options.seed)
            shape = [vae.latent_structure()[0], 8, 8]
            z, nfe, seconds = diffusion.sample_model_ode(
                dae, options.number, shape, args.eval_ode_eps, args.eval_ode_solver_tol, False, 1.0
            )
            print(f"{solver:12s} {nfe:3d} evaluations, {seconds:.2f} s")
        decoded = vae.sample(options.number, 1.0, vae.decompose_eps(z))
    save_png(options.out, make_grid(to_uint8(decoded[:, :, 2:-2, 2:-2])))
    print(options.out)


if __name__ == "__main__":
    main()
