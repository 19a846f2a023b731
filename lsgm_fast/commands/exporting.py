"""Writing a model as programs that need PyTorch alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lsgm_fast.commands.common import Device, Json, Quiet, pick_device


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint (.pt or .safetensors), or `demo`.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")],
    part: Annotated[
        list[str] | None,
        typer.Option("--part", "-p", help="score or decoder, can be repeated. Default: what the model has."),
    ] = None,
    bn: Annotated[
        str | None,
        typer.Option(help="BatchNorm statistics of the decoder: running or batch. Default: the model's own."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an export in the folder.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model as programs of torch.export, which run without lsgm-fast.

    The folder gets `score.pt2`, `decoder.pt2` and `export.json`, for any batch size, on the device that was chosen.
    `docs/export.md` has a sampler that reads them.

    Examples:

    - `lsgm-fast export demo --out digits`
    - `lsgm-fast export model.safetensors --out exported --bn batch --device cuda`
    - `lsgm-fast export vae.safetensors --out exported --part decoder`
    """
    from lsgm_fast import images

    images.require_writable(out, folder=True)
    if (out / "export.json").exists() and not force:
        raise ValueError(f"{str(out)!r} holds an export already: choose another folder or add --force")
    chosen = pick_device(device)

    import lsgm_fast
    from lsgm_fast.engine.export import PARTS

    loaded = lsgm_fast.load(model, device=chosen)
    parts = part or (PARTS if loaded.prior is not None else ("decoder",))
    written = lsgm_fast.export(loaded, out, parts=parts, bn=bn)
    description = json.loads(written.read_text(encoding="utf-8"))
    files = {name: out / entry["file"] for name, entry in description["parts"].items()}
    if as_json:
        sizes = {name: file.stat().st_size for name, file in files.items()}
        report = {"folder": str(out), "files": {k: str(v) for k, v in files.items()}, "bytes": sizes}
        typer.echo(json.dumps(report | {"export": description}))
    elif not quiet:
        for file in files.values():
            typer.echo(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")
        typer.echo(f"{written}")
