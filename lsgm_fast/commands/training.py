"""Training, both stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lsgm_fast.commands.common import Device, Json, Quiet, process_group

_Recipe = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="A built-in recipe: `digits`, `mnist`, `cifar10-fid`, ..."),
]
_ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML file with options, as a run's config.yaml.")
]
_RunFolder = Annotated[Path, typer.Option("--out", "-o", help="The run's folder; a run in it goes on.")]
_Data = Annotated[
    str | None,
    typer.Option(help="`digits`, or a folder of images, .npz, IDX files, a CIFAR-10 archive, LMDB."),
]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Options to change, as in `batch_size=64`."),
]


def train_vae(
    overrides: _Overrides = None,
    recipe: _Recipe = None,
    config: _ConfigFile = None,
    out: _RunFolder = Path("runs/vae"),
    data: _Data = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a VAE: stage 1.

    Start it again with the same options to go on after a kill or Ctrl-C; `torchrun` runs it in many processes.
    Options come from the recipe, then the file, then the command line. `docs/training.md` lists them.

    Examples:

    - `lsgm-fast train-vae --recipe digits --out runs/digits-vae`
    - `lsgm-fast train-vae --recipe mnist --data mnist/ --out runs/vae batch_size=50 vae_optimizer.lr=5e-3`
    - `torchrun --nproc-per-node 8 -m lsgm_fast train-vae --recipe cifar10-fid --data cifar-10-python.tar.gz`
    """
    _train("vae", None, recipe, config, overrides, data, out, device, as_json=as_json, quiet=quiet)


def train(
    overrides: _Overrides = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="The stage-1 model: a .safetensors or .pt file.")
    ] = None,
    recipe: _Recipe = None,
    config: _ConfigFile = None,
    out: _RunFolder = Path("runs/lsgm"),
    data: _Data = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an LSGM: stage 2, the score-based prior and (unless it is frozen) the VAE with it.

    The VAE's architecture is that of its file. Start it again with the same options to go on after a kill or Ctrl-C.

    Examples:

    - `lsgm-fast train --vae runs/digits-vae/model.safetensors --recipe digits --out runs/digits`
    - `lsgm-fast train --vae vae.pt --recipe mnist --data mnist/ objective.p_mode=drop_sigma2t_iw`
    - `lsgm-fast train --vae vae.pt --config run.yaml objective.train_vae=false`
    """
    _train("lsgm", vae, recipe, config, overrides, data, out, device, as_json=as_json, quiet=quiet)


def _train(
    stage: str,
    vae: str | None,
    recipe: str | None,
    config: Path | None,
    overrides: list[str] | None,
    data: str | None,
    out: Path,
    device: str,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from lsgm_fast import distributed
    from lsgm_fast.training import Trainer
    from lsgm_fast.training.assemble import assemble

    changes = list(overrides or ())
    if data is not None:
        changes.append(f"data.source={data}")
    with process_group(device) as device:
        settled = assemble(stage, recipe=recipe, file=config, overrides=changes, vae=vae)
        trainer = Trainer(settled, out, device=device, progress=not (quiet or as_json))
        result = trainer.run()
        if distributed.is_main():
            if as_json:
                report = {"folder": str(result.folder), "model": str(result.model), "step": result.step}
                typer.echo(json.dumps(report | {"interrupted": result.interrupted}))
            elif not quiet:
                state = "stopped" if result.interrupted else "finished"
                typer.echo(f"{state} at step {result.step}: {result.model}")
    if result.interrupted:
        raise typer.Exit(130)
