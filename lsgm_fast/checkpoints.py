"""Loading and saving: the published checkpoints as they are, and our own safetensors files.

Checkpoints are data. Published files are unpickled with ``weights_only=True`` and an allow-list of inert types, so a
file that tries to run code is refused; our own format is safetensors with the configuration as JSON in its header.
Every file is written aside and renamed.

The published key names appear here and nowhere else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lsgm_fast.config import LSGMConfig, SamplingConfig, ScoreConfig, SDEConfig, VAEConfig
from lsgm_fast.errors import CheckpointError
from lsgm_fast.files import atomic_path
from lsgm_fast.models.lsgm import LSGM
from lsgm_fast.models.ncsnpp import Attention, NCSNpp, ResBlock
from lsgm_fast.models.nvae import NVAE
from lsgm_fast.nn.cells import BNSwish2Branch, Cell, MBConvBranch
from lsgm_fast.presets import get_preset

FORMAT = "lsgm_fast"
FORMAT_VERSION = "1"
ASSETS = Path(__file__).parent / "assets"
DEMO = ASSETS / "demo.safetensors"

LICENCE_NOTICE = (
    "this file is in the layout of the published LSGM release; weights released by its authors are licensed for "
    "non-commercial use only (NVIDIA Source Code License for LSGM)"
)

_DECODERS = {
    "dml": "mixture_logistic",
    "disc_mix_logistic": "mixture_logistic",
    "dl": "logistic",
    "disc_logistic": "logistic",
    "normal": "normal",
    "bin": "bernoulli",
}
_PUBLISHED_DECODERS = {"mixture_logistic": "dml", "logistic": "dl", "normal": "normal", "bernoulli": "bin"}
# Data sets whose 28x28 images the published code pads to 32x32.
_CROPPED_DATASETS = ("mnist", "omniglot")

_noticed = False


# -- public functions -----------------------------------------------------------------------------------------------


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> LSGM:
    """Load a model, in eval mode.

    Args:
        source: ``"demo"`` (the embedded MNIST model), a safetensors file of ours, or a published checkpoint:
            ``checkpoint.pt`` (the EMA of the score network is restored from the optimizer's state),
            ``checkpoint_fid.pt`` / ``checkpoint_nll.pt`` (hold the EMA already), or a stage-1 VAE file
            (``model.prior`` is None). Recognised by content, not by name.
        device: where to put it.

    Returns:
        An :class:`~lsgm_fast.models.LSGM`.

    Raises:
        CheckpointError: the file is missing, truncated, of another model, or not safe to load.
    """
    if str(source) == "demo":
        source = DEMO
    model = _load_any(_existing(source))
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot move the model to device {str(device)!r}: {error}") from error


def build(preset: str, device: str | torch.device = "cpu") -> LSGM:
    """A model of a named configuration (:data:`lsgm_fast.presets.PRESETS`) with random weights, in eval mode.

    Raises:
        ValueError: unknown preset; the message lists the valid ones and the closest.
    """
    config = get_preset(preset)
    try:
        with torch.device(device):
            return LSGM.from_config(config).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot build the model on device {str(device)!r}: {error}") from error


def save(model: LSGM, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write ``model`` as safetensors with its configuration in the header.

    Args:
        path: target, conventionally ``*.safetensors``; replaced only once the new file is complete.
        dtype: store floating-point weights in this dtype (loading always gives float32); None: as they are.

    Raises:
        ValueError: the model was built from modules of your own, which have no configuration.
    """
    if model.config is None:
        raise ValueError(
            "only models with a configuration can be saved: save the state_dict() of your own modules"
        )
    tensors = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[key] = value.clone().contiguous()
    metadata = {"format": FORMAT, "version": FORMAT_VERSION, "config": json.dumps(model.config.to_dict())}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def fingerprint(model: LSGM) -> str:
    """sha256 over the weights (names, dtypes, shapes, values) and the configuration: alike where these are.

    Whatever file the model came from: one that was converted and stores the same values has the same fingerprint.
    """
    config = None if model.config is None else model.config.to_dict()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Convert between the published layout and ours, by the target's extension.

    ``*.safetensors``: ours. ``*.pt``: the published layout (``checkpoint_fid.pt`` kind; a stage-1 file if the model has
    no prior). The published code base derives the score network's channel multipliers and attention from the data
    set's name, so it rebuilds published structures only; we read them off the weights.

    Raises:
        CheckpointError: the source cannot be loaded. ValueError: unknown extension of the target.
    """
    target = Path(target)
    if target.suffix not in (".safetensors", ".pt"):
        raise ValueError(
            f"the target must end in .safetensors (ours) or .pt (published layout), got {target.name!r}"
        )
    model = load(source)
    if target.suffix == ".safetensors":
        save(model, target, dtype)
    else:
        checkpoint = to_published(model, dtype)
        with atomic_path(target) as temporary:
            torch.save(checkpoint, temporary)


# -- reading --------------------------------------------------------------------------------------------------------


def _existing(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the checkpoint file in it")
    if not path.exists():
        from lsgm_fast.presets import PRESETS

        hint = "; it is a preset: use lsgm_fast.build() for random weights" if str(source) in PRESETS else ""
        raise CheckpointError(f"no checkpoint at {path}: give a .safetensors or .pt file, or 'demo'{hint}")
    return path


def _load_any(path: Path) -> LSGM:
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        raise CheckpointError(f"{path} is empty")
    # safetensors: eight bytes of header length, then a JSON object.
    if len(head) >= 9 and head[8:9] == b"{" and not head.startswith(b"PK"):
        return _load_ours(path)
    return from_published(_unpickle(path), str(path))


def _load_ours(path: Path) -> LSGM:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is a safetensors file of another program: its header has no {FORMAT!r} configuration"
                )
            if metadata.get("version") != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has format version {metadata.get('version')}, this program reads {FORMAT_VERSION}: "
                    "update lsgm-fast"
                )
            try:
                config = LSGMConfig.from_dict(json.loads(metadata["config"]))
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{path} has an invalid configuration in its header: {error}"
                ) from error
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read, it may be truncated: {error}") from error
    model = _empty_model(config, str(path))
    _fill(model, state, str(path))
    return model


def _unpickle(path: Path) -> Mapping[str, Any]:
    # A file object: given a path, torch.load goes by the name and hands *.safetensors to another reader.
    with torch.serialization.safe_globals(_SAFE_GLOBALS), open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # PyTorch surrounds the cause with advice to switch the protection off.
            found = re.search(
                r"WeightsUnpickler error: ([^\n]*?)( was not an allowed global|\n|$)", str(error)
            )
            reason = (found[1].strip() if found else "") or "not a pickle that PyTorch wrote"
            raise CheckpointError(
                f"{path} was refused: it is damaged, no checkpoint, or holds objects that could run code ({reason})"
            ) from error
        except Exception as error:  # damaged bytes reach every corner of the unpickler
            reason = str(error).split("\n")[0].split(" In PyTorch 2.6")[0]
            raise CheckpointError(
                f"{path} cannot be read, it may be truncated: {type(error).__name__}: {reason}"
            ) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(checkpoint).__name__}, not the dictionary of an LSGM checkpoint"
        )
    return checkpoint


def _safe_globals() -> list[Any]:
    # Namespace carries the options; the numpy entries are the scalars in which scores and epochs may be saved.
    allowed: list[Any] = [argparse.Namespace, torch.Size, np.dtype]
    allowed += [type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")]
    scalar = np.float64(0.0).__reduce__()[0]
    allowed += [(scalar, "numpy._core.multiarray.scalar"), (scalar, "numpy.core.multiarray.scalar")]
    return allowed


_SAFE_GLOBALS = _safe_globals()


def _empty_model(config: LSGMConfig, origin: str) -> LSGM:
    """The model without initialisation: parameters on the meta device, to be assigned."""
    try:
        with torch.device("meta"):
            return LSGM.from_config(config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{origin} has an unusable configuration: {error}") from error


def _fill(model: LSGM, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Assign ``state`` to a model made by :func:`_empty_model`, checking every key, shape and kind of number."""
    mismatch = _mismatch(model.state_dict(), state)
    if mismatch:
        raise CheckpointError(f"{origin} does not match its own configuration: {mismatch}")
    converted = {
        key: value.to(torch.float32) if value.is_floating_point() else value for key, value in state.items()
    }
    model.load_state_dict(converted, assign=True)
    _derive_buffers(model)
    # assign=True keeps what was loaded, so what was frozen (the Fourier frequencies) must stay so.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("time_embedding.frequencies"))


def _mismatch(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    """What is wrong with ``state`` for a model that has the tensors ``expected``; empty if nothing is."""
    parts = []
    for key in sorted(expected.keys() & state.keys()):
        value = state[key]
        if not isinstance(value, torch.Tensor):
            return f"{key} is a {type(value).__name__}, not a tensor"
        if value.is_floating_point() != expected[key].is_floating_point() or value.is_complex():
            return f"{key} has dtype {value.dtype} instead of {expected[key].dtype}"
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    wrong = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unknown ({_some(unexpected)})")
    if wrong:
        shapes = ", ".join(
            f"{k}: {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}" for k in sorted(wrong)[:3]
        )
        parts.append(f"{len(wrong)} have another shape ({shapes})")
    return "; ".join(parts)


def _derive_buffers(model: nn.Module) -> None:
    """Give the buffers that no file holds their values: on the meta device they have none."""
    for module, name in derived_buffers(model):
        if getattr(module, name).is_meta:
            setattr(module, name, module.derived_buffer(name))  # type: ignore[operator]


def derived_buffers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name) of every buffer that follows from the configuration and is not saved."""
    return [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


# -- the published layout -------------------------------------------------------------------------------------------


def from_published(checkpoint: Mapping[str, Any], origin: str = "the checkpoint") -> LSGM:
    """Build a model from the dictionary of a published checkpoint (see :func:`load`).

    Raises:
        CheckpointError: parts are missing or do not fit together.
    """
    for key in ("args", "vae_state_dict"):
        if key not in checkpoint:
            raise CheckpointError(
                f"{origin} is no published LSGM checkpoint: it has no {key!r} (it has {_some(map(str, checkpoint))})"
            )
    args = checkpoint["args"]
    try:
        args = dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args)
        vae_state = {str(key): value for key, value in checkpoint["vae_state_dict"].items()}
        score_state = checkpoint.get("dae_state_dict")
        if score_state is not None:
            score_state = {str(key): value for key, value in score_state.items()}
            score_state = _with_ema(score_state, checkpoint.get("dae_optimizer"))
        config = _config_from_published(args, vae_state, score_state)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{origin} is incomplete or of another model: {error} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{origin} has an unusable configuration: {error}") from error
    except (TypeError, AttributeError, IndexError, ZeroDivisionError, NameError) as error:
        raise CheckpointError(f"{origin} is damaged or of another program: {error}") from error
    _notice()
    model = _empty_model(config, origin)
    state: dict[str, torch.Tensor] = {}
    for network, published, prefix in ((model.vae, vae_state, "vae."), (model.prior, score_state, "prior.")):
        if network is None or published is None:
            continue
        remaining = {k: v for k, v in published.items() if not k.endswith(".weight_normalized")}
        for ours, (theirs, transpose) in _names(network, remaining).items():
            if theirs in remaining:
                tensor = remaining.pop(theirs)
                state[prefix + ours] = tensor.t().contiguous() if transpose else tensor
        # What is left over has no place in our model; under its own name the mismatch is reported.
        state.update({prefix + key: value for key, value in remaining.items()})
    _fill(model, state, origin)
    return model


def to_published(model: LSGM, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The dictionary of a published checkpoint: ``checkpoint_fid.pt`` layout, or stage 1 for a VAE alone."""
    if model.config is None or not isinstance(model.vae, NVAE):
        raise ValueError("only models with a configuration can be written in the published layout")
    if model.config.vae.crop not in (0, 2):
        raise ValueError(
            f"crop={model.config.vae.crop} cannot be written in the published layout: it crops its 28x28 data sets "
            "by 2 and others not at all; save as .safetensors"
        )

    if model.config.vae.decoder_distribution not in _PUBLISHED_DECODERS:
        raise ValueError(
            f"decoder_distribution={model.config.vae.decoder_distribution!r} cannot be written in the published "
            f"layout: it has {', '.join(_PUBLISHED_DECODERS)} alone; save as .safetensors"
        )

    def state(network: nn.Module) -> OrderedDict[str, torch.Tensor]:
        ours = network.state_dict()
        out: OrderedDict[str, torch.Tensor] = OrderedDict()
        for key, (theirs, transpose) in _names(network).items():
            tensor = ours[key].detach().cpu()
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            out[theirs] = tensor.t().contiguous() if transpose else tensor
        for key in _aliases(network):
            # The published code registers the weight of an unnormalised convolution under a second name.
            out[f"{key}_normalized"] = out[key]
        return out

    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "args": argparse.Namespace(**_published_args(model.config)),
    }
    if model.prior is not None:
        checkpoint |= {"best_score_fid": 1e10, "best_score_nll": 1e10, "dae_state_dict": state(model.prior)}
    return checkpoint | {"vae_state_dict": state(model.vae)}


def _notice() -> None:
    global _noticed
    if not _noticed:
        _noticed = True
        warnings.warn(LICENCE_NOTICE, UserWarning, stacklevel=5)


def _with_ema(state: dict[str, torch.Tensor], optimizer: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    """Replace raw score weights by their exponential moving average from the optimizer's state, if it is there.

    The optimizer numbers parameters in the order of ``parameters()``, which is that of the state dict (the score
    network has no buffers); frozen parameters have no state.
    """
    if not optimizer or not optimizer.get("state"):
        return state
    order = [index for group in optimizer["param_groups"] for index in group["params"]]
    if len(order) != len(state):
        raise CheckpointError(
            f"the score network has {len(state)} tensors but its optimizer {len(order)}: cannot restore the EMA weights"
        )
    out = dict(state)
    for index, (key, raw) in zip(order, state.items(), strict=True):
        ema = optimizer["state"].get(index, {}).get("ema")
        if ema is None:
            continue
        if ema.shape != raw.shape:
            raise CheckpointError(
                f"the EMA of {key} has shape {tuple(ema.shape)}, the weight {tuple(raw.shape)}"
            )
        out[key] = ema.to(raw.dtype)
    return out


def _config_from_published(
    args: Mapping[str, Any], vae: Mapping[str, torch.Tensor], score: Mapping[str, torch.Tensor] | None
) -> LSGMConfig:
    """The configuration, from the weights where they tell it and from the options elsewhere."""
    vae_config = _vae_config(args, vae)
    if score is None:
        return LSGMConfig(vae_config, None)
    score_config = _score_config(args, score, vae_config.latent_shape[1])
    sde_config = SDEConfig(
        name=args["sde_type"],
        beta_start=args.get("beta_start", 0.1),
        beta_end=args.get("beta_end", 20.0),
        sigma2_0=args.get("sigma2_0", 0.0),
        sigma2_min=args.get("sigma2_min", 1e-4),
        sigma2_max=args.get("sigma2_max", 0.99),
        time_eps=args.get("time_eps", 0.01),
        parity=args.get("sde_parity", "exact"),
    )
    sampling = SamplingConfig(
        ode_eps=args.get("eval_ode_eps", 1e-5),
        tol=args.get("eval_ode_solver_tol", 1e-5),
        bn="batch" if args.get("vae_train_mode", False) else "running",
    )
    return LSGMConfig(vae_config, score_config, sde_config, sampling)


def _vae_config(args: Mapping[str, Any], vae: Mapping[str, torch.Tensor]) -> VAEConfig:
    channel_mult = tuple(args.get("channel_mult") or (1, 2))
    pre_blocks = args["num_preprocess_blocks"]
    scales = args["num_latent_scales"]
    latents = vae["enc_sampler.0.1.weight"].shape[0] // 2
    size = vae["prior_ftr0"].shape[1] * 2 ** (pre_blocks + scales - 1)
    architecture = re.sub(r"_attn(_half)?$", "", str(args["arch_instance"]))
    decoder = str(args.get("decoder_dist", "dml"))
    if decoder not in _DECODERS:
        raise ValueError(f"unknown decoder_dist {decoder!r}: expected one of {', '.join(_DECODERS)}")
    groups = args["num_groups_per_scale"]
    flow_pairs = len({k.split(".")[1] for k in vae if k.startswith("nf_cells.")})
    return VAEConfig(
        image_channels=vae["stem.weight"].shape[1],
        image_size=size,
        crop=2 if args.get("dataset") in _CROPPED_DATASETS else 0,
        encoder_channels=args["num_channels_enc"],
        decoder_channels=args["num_channels_dec"],
        channel_mult=channel_mult,
        preprocess_blocks=pre_blocks,
        preprocess_cells=args["num_preprocess_cells"],
        postprocess_blocks=args["num_postprocess_blocks"],
        postprocess_cells=args["num_postprocess_cells"],
        encoder_cells_per_group=args["num_cell_per_cond_enc"],
        decoder_cells_per_group=args["num_cell_per_cond_dec"],
        latent_scales=scales,
        groups_per_scale=groups,
        latents_per_group=latents,
        flows_per_group=flow_pairs // (groups * scales),
        architecture=architecture,
        squeeze_excite=any(".se.se." in k for k in vae),
        input_skip=any(k.startswith("progressive_input_cells.") for k in vae),
        decoder_distribution=_DECODERS[decoder],
        num_bits=args.get("num_x_bits", 8),
        log_sigma_scale=args.get("log_sig_q_scale", 5.0),
    )


def _score_config(
    args: Mapping[str, Any], score: Mapping[str, torch.Tensor], latent_size: int
) -> ScoreConfig:
    if any(args.get(option, "none") != "none" for option in ("progressive", "progressive_input")):
        raise ValueError("progressive score networks (--progressive, --progressive_input) are not supported")
    levels, blocks = args["num_scales_dae"], args["num_cell_per_scale_dae"]
    channels = score["all_modules.2.weight"].shape[0]
    fourier = "temb_fun.w" in score
    mult, attention = _score_levels(score, levels, blocks)
    return ScoreConfig(
        latent_channels=score["all_modules.2.weight"].shape[1],
        latent_size=latent_size,
        channels=channels,
        channel_mult=tuple(m // channels for m in mult),
        blocks_per_level=blocks,
        attention_levels=attention,
        dropout=args.get("dropout", 0.2),
        resample="fir" if args.get("fir", False) else "plain",
        embedding="fourier" if fourier else "positional",
        embedding_dim=score["all_modules.0.weight"].shape[1],
        embedding_scale=float(args.get("embedding_scale", 1000.0)),
        mixed_prediction="mixing_logit" in score and bool(args.get("mixed_prediction", True)),
        mixing_logit_init=float(args.get("mixing_logit_init", -3.0)),
    )


def _score_levels(
    score: Mapping[str, torch.Tensor], levels: int, blocks: int
) -> tuple[list[int], tuple[int, ...]]:
    """Channels and attention of every level, read off the module list on its way down."""
    index, widths, attention = 3, [], []
    for level in range(levels):
        for _ in range(blocks):
            widths_here = score[f"all_modules.{index}.Conv_0.weight"].shape[0]
            index += 1
            has_attention = f"all_modules.{index}.NIN_0.W" in score
            index += has_attention
        widths.append(widths_here)
        if has_attention:
            attention.append(level)
        index += level < levels - 1
    return widths, tuple(attention)


def vae_structure(vae: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The options of a VAE's architecture, read off the keys and shapes of its published state dict.

    What is left for others to say: ``dataset``, ``decoder_dist``, ``num_x_bits`` and ``log_sig_q_scale``.

    Raises:
        KeyError, ValueError: these are not the tensors of a published VAE.
    """
    towers = {name: _tower(vae, name) for name in ("pre_process", "enc_tower", "dec_tower", "post_process")}
    down = {
        name: [i for i, keys in cells.items() if "skip.conv_1.weight" in keys]
        for name, cells in towers.items()
    }
    up = {name: [i for i, keys in cells.items() if "skip.1.weight" in keys] for name, cells in towers.items()}
    combiners = {
        name: sum("conv.weight" in keys for keys in cells.values()) for name, cells in towers.items()
    }

    scales = len(down["enc_tower"]) + 1
    groups = len({key.split(".")[1] for key in vae if key.startswith("enc_sampler.")})
    encoder = [vae["stem.weight"].shape[0]]
    for name in ("pre_process", "enc_tower"):
        for i in down[name]:
            encoder.append(sum(vae[f"{name}.{i}.skip.conv_{j}.weight"].shape[0] for j in (1, 2, 3, 4)))
    decoder = [vae["prior_ftr0"].shape[0]]
    for name in ("dec_tower", "post_process"):
        decoder += [vae[f"{name}.{i}.skip.1.weight"].shape[0] for i in up[name]]
    decoder.reverse()
    # Only products of channels and multipliers show in the weights, and only they matter.
    channels = math.gcd(*encoder)
    mult = [width // channels for width in encoder]
    if len(decoder) != len(encoder) or [decoder[0] * m for m in mult] != [mult[0] * w for w in decoder]:
        raise ValueError(f"encoder and decoder have widths {encoder} and {decoder} from the image on")

    inside = {key.split(".", 2)[2] for key in vae if key.startswith("dec_tower.")}
    if any(re.match(r"_ops\.0\.conv\.\d+\.", key) for key in inside):
        architecture = "res_mbconv"
    else:
        architecture = "res_bnswish" if any(key.startswith("_ops.1.") for key in inside) else "res_bnswish2"
    return {
        "num_channels_enc": channels,
        "num_channels_dec": _quotient(decoder[0], mult[0], "channels of the decoder"),
        "channel_mult": mult,
        "num_preprocess_blocks": len(down["pre_process"]),
        "num_preprocess_cells": _quotient(
            len(towers["pre_process"]), len(down["pre_process"]), "preprocessing cells"
        ),
        "num_postprocess_blocks": len(up["post_process"]),
        "num_postprocess_cells": _quotient(
            len(towers["post_process"]), len(up["post_process"]), "postprocessing cells"
        ),
        "num_cell_per_cond_enc": _quotient(
            len(towers["enc_tower"]) - len(down["enc_tower"]) - combiners["enc_tower"],
            groups,
            "encoder cells",
        ),
        "num_cell_per_cond_dec": _quotient(
            len(towers["dec_tower"]) - len(up["dec_tower"]) - combiners["dec_tower"], groups, "decoder cells"
        ),
        "num_latent_scales": scales,
        "num_groups_per_scale": _quotient(groups, scales, "latent groups"),
        "arch_instance": architecture,
    }


def score_structure(score: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The options of a score network's architecture, read off its published state dict.

    What is left for others to say: ``fir``, ``embedding_scale`` and ``dropout``.

    Raises:
        KeyError, ValueError: these are not the tensors of a published score network.
    """
    blocks = sum(key.endswith(".Conv_0.weight") for key in score)
    # A residual block projects its input if it changes the width, or, at the same width, the resolution.
    shortcuts = [value.shape for key, value in score.items() if key.endswith(".Conv_2.weight")]
    levels = sum(shape[0] == shape[1] for shape in shortcuts) // 2 + 1
    # With b per level: b on the way down, b + 1 on the way up, levels - 1 that resample each way, and 2 in the middle.
    per_level = _quotient(blocks, levels, "residual blocks")
    return {
        "num_scales_dae": levels,
        "num_cell_per_scale_dae": _quotient(per_level - 3, 2, "residual blocks of a level"),
    }


def _tower(state: Mapping[str, torch.Tensor], name: str) -> dict[int, set[str]]:
    """Number of each cell of a tower -> the keys in it."""
    cells: dict[int, set[str]] = {}
    for key in state:
        if key.startswith(f"{name}."):
            _, index, rest = key.split(".", 2)
            cells.setdefault(int(index), set()).add(rest)
    return dict(sorted(cells.items()))


def _quotient(total: int, parts: int, what: str) -> int:
    if parts <= 0 or total <= 0 or total % parts:
        raise ValueError(f"{total} {what} cannot be shared out evenly among {parts}")
    return total // parts


def network_of(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any], latent_size: int | None = None
) -> tuple[NVAE | NCSNpp, dict[str, tuple[str, bool]]]:
    """A network without values for a published state dict, and where its tensors are.

    Args:
        state: of a VAE, or of a score network if ``latent_size`` (height of its input) is given.
        options: published options; what the weights tell (:func:`vae_structure`, :func:`score_structure`) wins.

    Returns:
        ``(network, names)``: parameters on the meta device, to be assigned; our key -> (published key, whether the
        published tensor is transposed).

    Raises:
        KeyError, ValueError: the tensors are not those of a published network, or the options are not valid.
    """
    with torch.device("meta"):
        network: NVAE | NCSNpp
        if latent_size is None:
            network = NVAE(_vae_config({**options, **vae_structure(state)}, state))
        else:
            network = NCSNpp(_score_config({**options, **score_structure(state)}, state, latent_size))
    _derive_buffers(network)
    names = _names(network, state)
    ours = network.state_dict()
    expected = {theirs: ours[key].t() if turned else ours[key] for key, (theirs, turned) in names.items()}
    mismatch = _mismatch(expected, {k: v for k, v in state.items() if not k.endswith(".weight_normalized")})
    if mismatch:
        raise ValueError(f"its tensors do not fit the structure that they show: {mismatch}")
    return network, names


def _published_dataset(config: LSGMConfig) -> str:
    """The data set name under which the published code would rebuild this model."""
    if config.vae.crop:
        return "omniglot" if config.score is not None and len(config.score.channel_mult) == 3 else "mnist"
    return "celeba_256" if config.vae.image_size == 256 else "cifar10"


def _published_args(config: LSGMConfig) -> dict[str, Any]:
    """Every option that the published code reads back from a checkpoint."""
    v, s, d = config.vae, config.score, config.sde
    args: dict[str, Any] = {
        "dataset": _published_dataset(config),
        "num_channels_enc": v.encoder_channels,
        "num_channels_dec": v.decoder_channels,
        "channel_mult": list(v.channel_mult),
        "num_preprocess_blocks": v.preprocess_blocks,
        "num_preprocess_cells": v.preprocess_cells,
        "num_postprocess_blocks": v.postprocess_blocks,
        "num_postprocess_cells": v.postprocess_cells,
        "num_cell_per_cond_enc": v.encoder_cells_per_group,
        "num_cell_per_cond_dec": v.decoder_cells_per_group,
        "num_latent_scales": v.latent_scales,
        "num_groups_per_scale": v.groups_per_scale,
        "num_latent_per_group": v.latents_per_group,
        "num_nf": v.flows_per_group,
        "arch_instance": v.architecture,
        "use_se": v.squeeze_excite,
        "progressive_input_vae": "input_skip" if v.input_skip else "none",
        "decoder_dist": _PUBLISHED_DECODERS[v.decoder_distribution],
        "num_x_bits": v.num_bits,
        "log_sig_q_scale": v.log_sigma_scale,
        "distributed": False,
        "batch_size": 1,
        "seed": 1,
    }
    if s is None:
        return args
    return args | {
        "dae_arch": "ncsnpp",
        "num_channels_dae": s.channels,
        "num_scales_dae": len(s.channel_mult),
        "num_cell_per_scale_dae": s.blocks_per_level,
        "embedding_dim": s.embedding_dim,
        "embedding_type": s.embedding,
        "embedding_scale": s.embedding_scale,
        "dropout": s.dropout,
        "fir": s.resample == "fir",
        "progressive": "none",
        "progressive_input": "none",
        "progressive_combine": "sum",
        "custom_conv_dae": False,
        "mixed_prediction": s.mixed_prediction,
        "mixing_logit_init": s.mixing_logit_init,
        "drop_inactive_var": False,
        "sde_type": d.name,
        "beta_start": d.beta_start,
        "beta_end": d.beta_end,
        "sigma2_0": d.sigma2_0,
        "sigma2_min": d.sigma2_min,
        "sigma2_max": d.sigma2_max,
        "time_eps": d.time_eps,
        "diffusion_steps": 1000,
        "denoising_stddevs": "beta",
        "vpsde_power": 2,
        "iw_sample_p": "ll_iw",
        "iw_sample_q": "reweight_p_samples",
        "iw_subvp_like_vp_sde": False,
        "train_vae": True,
        "eval_ode_eps": config.sampling.ode_eps,
        "eval_ode_solver_tol": config.sampling.tol,
        # Read back by us alone: command-line options of the published evaluation, which saves neither.
        "vae_train_mode": config.sampling.bn == "batch",
        "sde_parity": d.parity,
        "train_ode_eps": 1e-2,
        "train_ode_solver_tol": 1e-4,
        "autocast_train": False,
        "autocast_eval": False,
    }


def _names(
    network: nn.Module, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, tuple[str, bool]]:
    """Our key -> (published key, whether the published tensor is transposed)."""
    if isinstance(network, NVAE):
        return {key: (name, False) for key, name in _vae_names(network, state).items()}
    assert isinstance(network, NCSNpp)
    return _score_names(network)


_VAE_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^prior_feature$", "prior_ftr0"),
        (r"^preprocess\.", "pre_process."),
        (r"^encoder\.", "enc_tower."),
        (r"^decoder\.", "dec_tower."),
        (r"^postprocess\.", "post_process."),
        (r"^posterior\.(\d+)\.", r"enc_sampler.\1.1."),
        (r"^latent_conv\.", "eps_conv."),
        (r"^output\.", "image_conditional.1."),
        (r"^input_skip\.(\d+)\.norm\.", r"progressive_input_cells.\1.conv.bn_act."),
        (r"^input_skip\.(\d+)\.conv\.", r"progressive_input_cells.\1.conv.conv_0."),
        (r"^flows\.(\d+)\.forward_cell\.", r"nf_cells.\1.cell1."),
        (r"^flows\.(\d+)\.mirrored_cell\.", r"nf_cells.\1.cell2."),
        (r"^(nf_cells\.\d+\.cell[12])\.spread\.", r"\1.conv.convz.0."),
        (r"^(nf_cells\.\d+\.cell[12])\.depthwise\.", r"\1.conv.convz.2."),
        (r"^(nf_cells\.\d+\.cell[12])\.shift\.", r"\1.mu.conv_0."),
        (r"\.branch\.(\d+)\.norm\.", r"._ops.\1.bn_act."),
        (r"\.branch\.(\d+)\.conv\.", r"._ops.\1.conv_0."),
        (r"\.se\.reduce\.", ".se.se.0."),
        (r"\.se\.expand\.", ".se.se.2."),
        (r"\.skip\.conv\.(\d+)\.", lambda m: f".skip.conv_{int(m[1]) + 1}."),
        (r"\.skip\.conv\.", ".skip.1."),
    )
)


def _vae_names(vae: NVAE, state: Mapping[str, torch.Tensor] | None) -> dict[str, str]:
    special: dict[str, str] = {}
    for name, module in vae.named_modules():
        if isinstance(module, Cell) and isinstance(module.branch, MBConvBranch):
            # The nearest-neighbour upsampler is the first entry of the published sequence and shifts the others.
            start = int(module.branch.up)
            ops = f"{name}._ops.0.conv"
            for part, published in (
                ("norm", f"{start}.bn"),
                ("expand", f"{start + 1}.conv.0"),
                ("expand_norm", f"{start + 1}.conv.1"),
                ("depthwise", f"{start + 2}.conv.0"),
                ("depthwise_norm", f"{start + 2}.conv.1"),
                ("project", f"{start + 3}"),
                ("project_norm", f"{start + 4}.bn"),
            ):
                special[f"{name}.branch.{part}."] = f"{ops}.{published}."
        elif isinstance(module, Cell) and isinstance(module.branch, BNSwish2Branch):
            special |= _bnswish2_names(name, state)
    names = {}
    for key in vae.state_dict():
        new = key
        for prefix, published in special.items():
            if key.startswith(prefix):
                new = published + key.removeprefix(prefix)
                break
        # The tower's name is still ours where a special rule applied, so the general rules run in any case.
        renamed = new
        for pattern, replacement in _VAE_RENAMES:
            renamed = pattern.sub(replacement, renamed)
        names[key] = renamed
    return names


def _bnswish2_names(cell: str, state: Mapping[str, torch.Tensor] | None) -> dict[str, str]:
    """Names inside a ``res_bnswish2`` cell.

    No published configuration uses this cell, so its key names are not known for certain. In a file they are
    recognised by kind and order: two BatchNorms, and two convolutions of which only the second is weight-normalised.
    """
    norms, convs = ["bn_act_0", "bn_act_1"], ["conv_0", "conv_1"]
    prefix = cell
    for pattern, replacement in _VAE_RENAMES:
        prefix = pattern.sub(replacement, prefix)
    prefix += "._ops.0."
    if state is not None:
        inside = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
        found_norms = [k.removesuffix(".running_mean") for k in inside if k.endswith(".running_mean")]
        found_convs = [
            k.removesuffix(".weight")
            for k in inside
            if k.endswith(".weight") and state[prefix + k].dim() == 4
        ]
        if len(found_norms) == len(found_convs) == 2:
            norms = found_norms
            convs = sorted(found_convs, key=lambda k: f"{k}.log_weight_norm" in inside)
    parts = {"norm1": norms[0], "conv1": convs[0], "norm2": norms[1], "conv2": convs[1]}
    return {f"{cell}.branch.{ours}.": f"{cell}._ops.0.{theirs}." for ours, theirs in parts.items()}


def _aliases(network: nn.Module) -> list[str]:
    """Published keys of weights that the published code saves a second time as ``<key>_normalized``."""
    if not isinstance(network, NVAE):
        return []
    ours = []
    for name, module in network.named_modules():
        if isinstance(module, MBConvBranch):
            ours += [f"{name}.{part}.weight" for part in ("expand", "depthwise", "project")]
        elif isinstance(module, BNSwish2Branch):
            ours.append(f"{name}.conv1.weight")
    names = _vae_names(network, None)
    return [names[key] for key in ours]


_RES_BLOCK = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "shortcut": "Conv_2",
}
_ATTENTION = {"query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "proj": "NIN_3"}


def _score_names(network: NCSNpp) -> dict[str, tuple[str, bool]]:
    """The published network is one flat list in the order of the forward pass; this walks ours in that order."""
    blocks = network.config.blocks_per_level
    order: list[str] = ["time_embedding.linear1", "time_embedding.linear2", "conv_in"]
    for i, down in enumerate(network.down):
        for j in range(blocks):
            order.append(f"down.{i}.blocks.{j}")
            if down.attention:
                order.append(f"down.{i}.attention.{j}")
        if down.downsample is not None:
            order.append(f"down.{i}.downsample")
    order += ["mid_block1", "mid_attention", "mid_block2"]
    for i, up in enumerate(network.up):
        order += [f"up.{i}.blocks.{j}" for j in range(blocks + 1)]
        if up.attention is not None:
            order.append(f"up.{i}.attention")
        if up.upsample is not None:
            order.append(f"up.{i}.upsample")
    order += ["norm_out", "conv_out"]

    names: dict[str, tuple[str, bool]] = {}
    if network.mixing_logit is not None:
        names["mixing_logit"] = ("mixing_logit", False)
    for index, name in enumerate(order):
        module, target = network.get_submodule(name), f"all_modules.{index}"
        if isinstance(module, ResBlock):
            for key in module.state_dict():
                part, leaf = key.split(".")
                names[f"{name}.{key}"] = (f"{target}.{_RES_BLOCK[part]}.{leaf}", False)
        elif isinstance(module, Attention):
            for key in module.state_dict():
                part, leaf = key.split(".")
                if part == "norm":
                    names[f"{name}.{key}"] = (f"{target}.GroupNorm_0.{leaf}", False)
                else:
                    names[f"{name}.{key}"] = (
                        f"{target}.{_ATTENTION[part]}.{'W' if leaf == 'weight' else 'b'}",
                        leaf == "weight",
                    )
        else:
            for key in module.state_dict():
                names[f"{name}.{key}"] = (f"{target}.{key}", False)
    if network.time_embedding.fourier:
        names["time_embedding.frequencies"] = ("temb_fun.w", False)
    return names
