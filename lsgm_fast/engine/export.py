"""A model as files of plain PyTorch operators, for programs that do not have this package.

``docs/export.md`` says what is in the files and shows a sampler that needs nothing else. The function is
``lsgm_fast.export``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lsgm_fast
from lsgm_fast.dispatch import use_backend
from lsgm_fast.errors import unknown_name
from lsgm_fast.files import atomic_path
from lsgm_fast.models.lsgm import LSGM
from lsgm_fast.models.nvae import BN_STATISTICS, NVAE
from lsgm_fast.nn.layers import normalize_weights

PARTS = ("score", "decoder")
"""What can be exported: the mixed noise prediction, and images from latents."""

DESCRIPTION = "export.json"
FORMAT = 1

# Sizes 0 and 1 are taken as constants by torch.export; traced with 2, the graph holds for every size from 1 on.
_TRACED_BATCH = 2


def export(
    model: LSGM,
    folder: str | os.PathLike[str],
    *,
    parts: Sequence[str] = PARTS,
    bn: str | None = None,
) -> Path:
    """Write a model as programs of ``torch.export``, for any batch size, that need PyTorch alone.

    - ``score.pt2``: ``(z (B, C, h, w), t (B,)) -> eps (B, C, h, w)``, the mixed noise prediction
      ``(1 - a) r(t) z + a eps_theta(z, t)`` of :meth:`LSGM.predict_noise`; the score is ``-eps / sqrt(var(t))``.
    - ``decoder.pt2``: ``(z (B, C, h, w), *lower) -> images (B, C, H, W)`` in [0, 1], of natural size. ``lower`` are
      standard-normal draws (B, *lower_shapes[i]) of the latents that the prior does not cover, often none.
    - ``export.json``: shapes, dtypes, the diffusion with its constants, ``prior_std`` and the recipe's ``ode_eps``, and
      the versions that wrote it.

    The networks are exported in eval mode with the reference operations, on the device where the model is; the
    decoder's weights are normalised once and for all. Inputs are float32, or float64 for a model in it. The file's
    values are those of the weights now. An earlier export in the folder is replaced, and only by a complete one.

    Args:
        model: with your own modules too, if ``torch.export`` can trace them. folder: made if it is not there.
        parts: ``"score"``, ``"decoder"`` or both. bn: BatchNorm statistics of the decoder, ``"running"`` or
            ``"batch"``; None: the recipe's.

    Returns:
        The path of ``export.json``.

    Raises:
        TypeError: the model is no LSGM.
        ValueError: unknown parts, a score asked of a VAE alone, or a module that cannot be exported (it is named).
        OSError: the folder cannot be written.

    Example:
        >>> lsgm_fast.export(lsgm_fast.load("demo"), "digits")  # doctest: +SKIP
    """
    if not isinstance(model, LSGM):
        raise TypeError(
            f"expected an LSGM, got {type(model).__name__}: load a file with lsgm_fast.load first"
        )
    wanted = (parts,) if isinstance(parts, str) else tuple(parts)
    for part in wanted:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS)
    if not wanted:
        raise ValueError(f"nothing to export: parts is empty, expected some of {', '.join(map(repr, PARTS))}")
    if "score" in wanted and model.prior is None:
        raise ValueError(
            "this model holds only a VAE (a stage-1 checkpoint) and has no score to export: "
            "export its decoder with parts=('decoder',)"
        )
    bn = model.sampling.bn if bn is None else bn
    if bn not in BN_STATISTICS:
        raise unknown_name("BatchNorm statistics", bn, BN_STATISTICS)

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot export to {folder}: it is a file, give a folder")
    programs = {}
    if "score" in wanted:
        programs["score"] = _traced_score(model)
    if "decoder" in wanted:
        programs["decoder"] = _traced_decoder(model, bn)
    description = _description(model, bn, programs)

    with contextlib.ExitStack() as files:
        # The last one opened is renamed first: what describes the others comes into place after them.
        path = folder / DESCRIPTION
        temporary = files.enter_context(atomic_path(path, make_folders=True))
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        for part, traced in programs.items():
            torch.export.save(traced.program, files.enter_context(atomic_path(folder / f"{part}.pt2")))
    return path


@dataclass(frozen=True)
class _Traced:
    """An exported program, and for each input and the output its shape behind the batch."""

    program: torch.export.ExportedProgram
    inputs: dict[str, tuple[int, ...]]
    output: tuple[int, ...]

    def described(self, part: str) -> dict[str, Any]:
        inputs = {name: ["B", *shape] for name, shape in self.inputs.items()}
        return {"file": f"{part}.pt2", "inputs": inputs, "output": ["B", *self.output]}


def _description(model: LSGM, bn: str, programs: dict[str, _Traced]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "parts": {part: traced.described(part) for part, traced in programs.items()},
        "latent_shape": list(model.latent_shape),
        "lower_shapes": [list(shape) for shape in model.lower_shapes],
        "dtype": _name(_input_dtype(model)),
        "weights": _name(model.dtype),
        "device": str(model.device),
        "sde": model.sde.config.to_dict(),
        "prior_std": model.sde.prior_std,
        "sampling": {"ode_eps": model.sampling.ode_eps, "tol": model.sampling.tol, "bn": bn},
        "versions": {"lsgm_fast": lsgm_fast.__version__, "torch": torch.__version__},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _input_dtype(model: LSGM) -> torch.dtype:
    """Half precision is for the networks: a sampler's state, and time, keep at least float32."""
    return torch.promote_types(model.dtype, torch.float32)


# -- the parts --------------------------------------------------------------------------------------------------------


class _Score(nn.Module):
    """:meth:`LSGM.predict_noise`, with the weights of the score network alone."""

    def __init__(self, model: LSGM) -> None:
        super().__init__()
        self.prior = model.prior
        self._predict_noise: Callable[[Tensor, Tensor], Tensor] = model.predict_noise

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self._predict_noise(z, t)


class _Decoder(nn.Module):
    """Images of natural size, in float32 or better, as :meth:`LSGM.decode` makes them."""

    def __init__(self, vae: nn.Module, dtype: torch.dtype, bn: str) -> None:
        super().__init__()
        self.vae: Any = _folded(vae) if type(vae) is NVAE else vae
        self._dtype, self._bn = dtype, bn

    def forward(self, z: Tensor, *lower: Tensor) -> Tensor:
        noise = [e.to(self._dtype) for e in lower]
        images = self.vae.decode(z.to(self._dtype), lower_noise=noise, bn=self._bn, crop=True)
        return images.to(torch.promote_types(images.dtype, torch.float32))


@torch.no_grad()
def _folded(vae: NVAE) -> NVAE:
    """A copy that can only decode, with weights in place of what they are normalised from."""
    vae = copy.deepcopy(vae)
    convs = vae.decoder_convs
    for conv, weight in zip(convs, normalize_weights(convs), strict=True):
        del conv.weight, conv.log_weight_norm, conv.prepared_weight
        conv.register_buffer("prepared_weight", weight)
    for name in ("stem", "preprocess", "encoder", "input_skip", "posterior", "flows"):
        setattr(vae, name, nn.ModuleList())
    return vae


def _traced_score(model: LSGM) -> _Traced:
    dtype, shape = _input_dtype(model), model.latent_shape
    z, t = _example(model, shape), torch.full((_TRACED_BATCH,), 0.5, dtype=dtype, device=model.device)
    batch = torch.export.Dim("batch", min=1)
    program = _trace("score", _Score(model), (z, t), ({0: batch}, {0: batch}))
    return _Traced(program, {"z": shape, "t": ()}, shape)


def _traced_decoder(model: LSGM, bn: str) -> _Traced:
    shapes = [model.latent_shape, *model.lower_shapes]
    z, *lower = (_example(model, shape) for shape in shapes)
    batch = torch.export.Dim("batch", min=1)
    # Without lower latents, torch.export wants no entry for them at all.
    dynamic = ({0: batch}, tuple({0: batch} for _ in lower)) if lower else ({0: batch},)
    program = _trace("decoder", _Decoder(model.vae, model.dtype, bn), (z, *lower), dynamic)
    names = ["z", *(f"lower_{i}" for i in range(len(lower)))]
    output = next(node for node in program.graph.nodes if node.op == "output").args[0][0].meta["val"]
    return _Traced(program, dict(zip(names, shapes, strict=True)), tuple(map(int, output.shape[1:])))


def _example(model: LSGM, shape: Sequence[int]) -> Tensor:
    return torch.zeros(_TRACED_BATCH, *shape, dtype=_input_dtype(model), device=model.device)


def _trace(
    part: str, module: nn.Module, inputs: tuple[Tensor, ...], dynamic: tuple[Any, ...]
) -> torch.export.ExportedProgram:
    with (
        _evaluating(module),
        use_backend("reference"),
        torch.no_grad(),
        torch.autocast(inputs[0].device.type, enabled=False),
    ):
        try:
            return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"torch.export cannot trace the {part}, at {_innermost(module, error)}: {reason.strip()} "
                "(its forward must not look at values of tensors, and must work for every batch size)"
            ) from error


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the duration of the block, each module then as it was."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


def _innermost(module: nn.Module, error: BaseException) -> str:
    """The innermost of the modules in whose methods the error was raised: name and class."""
    names = {id(m): name for name, m in module.named_modules() if name}
    found, seen = "", error.__traceback__
    while seen is not None:
        own = seen.tb_frame.f_locals.get("self")
        if id(own) in names:
            found = f"{names[id(own)]} ({type(own).__name__})"
        seen = seen.tb_next
    if found:
        return found
    name, child = next(module.named_children())
    return f"{name} ({type(child).__name__})"
