"""Reading and writing checkpoints: both layouts, every architecture, old files, damaged and malicious ones."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import stat
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lsgm_fast
from lsgm_fast import CheckpointError, checkpoints
from lsgm_fast.config import LSGMConfig, ScoreConfig, SDEConfig, VAEConfig
from lsgm_fast.models import LSGM
from lsgm_fast.presets import PRESETS


@pytest.fixture(autouse=True)
def noticed(monkeypatch):
    """The licence notice has been given, except where a test says otherwise."""
    monkeypatch.setattr(checkpoints, "_noticed", True)


def random_model(config, seed=0):
    """A model in which no two tensors are alike, whatever its initialisation."""
    model = LSGM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
            else:
                value.fill_(7)
    return model


VAE = PRESETS["tiny-binary"].vae.replace(encoder_channels=8, decoder_channels=12, latents_per_group=2)
SCORE = ScoreConfig(latent_channels=4, latent_size=8, channels=8, channel_mult=(1, 1), blocks_per_level=1)
RGB = VAE.replace(image_channels=3, crop=0, decoder_distribution="mixture_logistic")

CONFIGS = {
    "mbconv": LSGMConfig(VAE, SCORE.replace(attention_levels=(), resample="plain")),
    "mbconv without squeeze-excite": LSGMConfig(VAE.replace(squeeze_excite=False), SCORE),
    "bnswish": LSGMConfig(RGB.replace(architecture="res_bnswish"), SCORE),
    "bnswish without squeeze-excite": LSGMConfig(
        RGB.replace(architecture="res_bnswish", squeeze_excite=False, decoder_distribution="normal"), SCORE
    ),
    "bnswish2": LSGMConfig(RGB.replace(architecture="res_bnswish2", decoder_distribution="logistic"), SCORE),
    "flows, input skip, two scales": LSGMConfig(
        RGB.replace(
            channel_mult=(1, 1, 2),
            preprocess_blocks=1,
            postprocess_blocks=1,
            latent_scales=2,
            flows_per_group=2,
            input_skip=True,
            num_bits=5,
            encoder_cells_per_group=2,
            preprocess_cells=2,
            postprocess_cells=3,
        ),
        SCORE,
        SDEConfig(name="geometric_sde", sigma2_0=3e-5, time_eps=0.0),
    ),
    "attention on odd levels": LSGMConfig(
        VAE, SCORE.replace(channel_mult=(1, 2, 3, 1), attention_levels=(0, 3), blocks_per_level=2)
    ),
    "attention in the middle, narrow first level": LSGMConfig(
        VAE, SCORE.replace(channel_mult=(2, 1, 4), attention_levels=(1,))
    ),
    "fourier": LSGMConfig(VAE, SCORE.replace(embedding="fourier", embedding_dim=16, embedding_scale=16.0)),
    "no mixing": LSGMConfig(VAE, SCORE.replace(mixed_prediction=False)),
    "another diffusion": LSGMConfig(
        VAE,
        SCORE,
        SDEConfig(name="vesde", sigma2_0=1e-3, sigma2_min=1e-3, sigma2_max=50.0, time_eps=0.001),
    ),
    "stage 1": LSGMConfig(VAE, None),
}
TINY = CONFIGS["mbconv"]


def equal_states(a, b):
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def same_behaviour(a, b):
    """Both models compute the same, so that derived buffers (masks, frequencies) came back too."""
    c = a.config.vae
    x = torch.rand(1, c.image_channels, c.image_size - 2 * c.crop, c.image_size - 2 * c.crop)
    with torch.no_grad():
        for p, q in zip(a.encode(x), b.encode(x), strict=True):
            assert torch.equal(p.eps, q.eps)
        z = torch.randn(1, *a.latent_shape)
        assert torch.equal(a.decode(z), b.decode(z))
        if a.prior is not None:
            t = torch.tensor(0.4)
            assert torch.equal(a.prior(z, t), b.prior(z, t))


def published(config=TINY, seed=0):
    return checkpoints.to_published(random_model(config, seed))


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_between_the_layouts(config, tmp_path):
    """Published -> ours -> published through files: the same keys in the same order, and identical tensors."""
    model = random_model(config)
    original = checkpoints.to_published(model)
    torch.save(original, tmp_path / "checkpoint_fid.pt")
    lsgm_fast.convert(tmp_path / "checkpoint_fid.pt", tmp_path / "ours.safetensors")
    lsgm_fast.convert(tmp_path / "ours.safetensors", tmp_path / "again.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert list(again) == list(original)
    assert vars(again["args"]) == vars(original["args"])
    equal_states(original["vae_state_dict"], again["vae_state_dict"])
    assert ("dae_state_dict" in original) == (config.score is not None)
    if config.score is not None:
        equal_states(original["dae_state_dict"], again["dae_state_dict"])
    for name in ("checkpoint_fid.pt", "ours.safetensors", "again.pt"):
        loaded = lsgm_fast.load(tmp_path / name)
        assert loaded.config == config
        assert not loaded.training
        equal_states(model.state_dict(), loaded.state_dict())
    same_behaviour(model, loaded)


def test_every_tensor_has_a_place_of_its_own():
    """Distinct values in, distinct published keys out: no two of our tensors may share one."""
    for config in CONFIGS.values():
        model = random_model(config)
        out = checkpoints.to_published(model)
        keys = [k for k in out["vae_state_dict"] if not k.endswith(".weight_normalized")]
        assert len(keys) == len(model.vae.state_dict())
        if config.score is not None:
            assert len(out["dae_state_dict"]) == len(model.prior.state_dict())


def test_published_names():
    """Key names of the release, written out by hand for one tensor of every kind."""
    state = published()["vae_state_dict"]
    model = random_model(TINY)
    vae = model.vae
    cell = vae.decoder[1].branch
    up = vae.decoder[-1] if not hasattr(vae.decoder[-1], "skip") else vae.postprocess[0]
    expected = {
        "prior_ftr0": vae.prior_feature,
        "stem.log_weight_norm": vae.stem.log_weight_norm,
        "pre_process.0.skip.conv_1.weight": vae.preprocess[0].skip.conv[0].weight,
        "pre_process.0.skip.conv_4.bias": vae.preprocess[0].skip.conv[3].bias,
        "pre_process.0._ops.0.bn_act.running_var": vae.preprocess[0].branch[0].norm.running_var,
        "pre_process.1._ops.1.conv_0.log_weight_norm": vae.preprocess[1].branch[1].conv.log_weight_norm,
        "pre_process.0.se.se.0.weight": vae.preprocess[0].se.reduce.weight,
        "pre_process.0.se.se.2.bias": vae.preprocess[0].se.expand.bias,
        "enc_tower.0._ops.0.bn_act.num_batches_tracked": vae.encoder[0].branch[0].norm.num_batches_tracked,
        "enc_tower.1.conv.weight": vae.encoder[1].conv.weight,
        "enc_sampler.1.1.bias": vae.posterior[1].bias,
        "eps_conv.0.weight": vae.latent_conv[0].weight,
        "dec_tower.0.conv.weight": vae.decoder[0].conv.weight,
        "dec_tower.1._ops.0.conv.0.bn.weight": cell.norm.weight,
        "dec_tower.1._ops.0.conv.1.conv.0.weight": cell.expand.weight,
        "dec_tower.1._ops.0.conv.1.conv.0.weight_normalized": cell.expand.weight,
        "dec_tower.1._ops.0.conv.1.conv.1.running_mean": cell.expand_norm.running_mean,
        "dec_tower.1._ops.0.conv.2.conv.0.weight_normalized": cell.depthwise.weight,
        "dec_tower.1._ops.0.conv.2.conv.1.bias": cell.depthwise_norm.bias,
        "dec_tower.1._ops.0.conv.3.weight": cell.project.weight,
        "dec_tower.1._ops.0.conv.3.weight_normalized": cell.project.weight,
        "dec_tower.1._ops.0.conv.4.bn.bias": cell.project_norm.bias,
        # In cells that go up, the upsampler is entry 0.
        "post_process.0._ops.0.conv.1.bn.weight": up.branch.norm.weight,
        "post_process.0._ops.0.conv.5.bn.weight": up.branch.project_norm.weight,
        "post_process.0.skip.1.weight": up.skip.conv.weight,
        "image_conditional.1.bias": vae.output.bias,
    }
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key

    model = random_model(CONFIGS["flows, input skip, two scales"])
    state = checkpoints.to_published(model)["vae_state_dict"]
    flow, skip = model.vae.flows[3], model.vae.input_skip[0]
    expected = {
        "nf_cells.3.cell1.conv.convz.0.weight": flow.forward_cell.spread.weight,
        "nf_cells.3.cell2.conv.convz.2.log_weight_norm": flow.mirrored_cell.depthwise.log_weight_norm,
        "nf_cells.3.cell2.mu.conv_0.bias": flow.mirrored_cell.shift.bias,
        "progressive_input_cells.0.conv.bn_act.weight": skip.norm.weight,
        "progressive_input_cells.0.conv.conv_0.weight": skip.conv.weight,
    }
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    assert not any("mask" in key for key in state)

    model = random_model(CONFIGS["attention on odd levels"].replace(score=SCORE.replace(blocks_per_level=2)))
    state = checkpoints.to_published(model)["dae_state_dict"]
    prior = model.prior
    expected = {
        "mixing_logit": prior.mixing_logit,
        "all_modules.0.weight": prior.time_embedding.linear1.weight,
        "all_modules.2.bias": prior.conv_in.bias,
        "all_modules.3.Conv_0.weight": prior.down[0].blocks[0].conv1.weight,
        "all_modules.3.Dense_0.weight": prior.down[0].blocks[0].time.weight,
        "all_modules.3.GroupNorm_1.bias": prior.down[0].blocks[0].norm2.bias,
        "all_modules.4.NIN_0.W": prior.down[0].attention[0].query.weight.t(),
        "all_modules.4.NIN_3.b": prior.down[0].attention[0].proj.bias,
        "all_modules.4.GroupNorm_0.weight": prior.down[0].attention[0].norm.weight,
        "all_modules.7.Conv_2.weight": prior.down[0].downsample.shortcut.weight,
        "all_modules.10.Conv_1.weight": prior.mid_block1.conv2.weight,
        "all_modules.11.NIN_2.W": prior.mid_attention.value.weight.t(),
        "all_modules.13.Conv_0.weight": prior.up[0].blocks[0].conv1.weight,
        "all_modules.16.Conv_0.weight": prior.up[0].upsample.conv1.weight,
        "all_modules.20.NIN_1.W": prior.up[1].attention.key.weight.t(),
        "all_modules.21.weight": prior.norm_out.weight,
        "all_modules.22.weight": prior.conv_out.weight,
    }
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    assert next(iter(state)) == "mixing_logit"
    assert "temb_fun.w" in published(CONFIGS["fourier"])["dae_state_dict"]


def test_the_frozen_frequencies_stay_frozen(tmp_path):
    model = random_model(CONFIGS["fourier"])
    model.save(tmp_path / "m.safetensors")
    loaded = lsgm_fast.load(tmp_path / "m.safetensors")
    frozen = [n for n, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == ["prior.time_embedding.frequencies"]


def test_a_loaded_model_can_be_trained_and_saved_again(tmp_path):
    random_model(TINY).save(tmp_path / "m.safetensors")
    model = lsgm_fast.load(tmp_path / "m.safetensors").train()
    with torch.no_grad():
        model.vae.stem.weight += 1.0
    model.vae(torch.zeros(2, 1, 32, 32))[0].sum().backward()
    assert model.vae.stem.weight.grad is not None
    model.save(tmp_path / "m.safetensors")  # the file it came from
    equal_states(model.state_dict(), lsgm_fast.load(tmp_path / "m.safetensors").state_dict())


def test_loading_does_not_depend_on_the_order_of_keys():
    checkpoint = published()
    for part in ("vae_state_dict", "dae_state_dict"):
        checkpoint[part] = OrderedDict(reversed(checkpoint[part].items()))
    equal_states(random_model(TINY).state_dict(), checkpoints.from_published(checkpoint).state_dict())


def test_aliases_may_be_missing():
    checkpoint = published()
    state = checkpoint["vae_state_dict"]
    checkpoint["vae_state_dict"] = {k: v for k, v in state.items() if not k.endswith("_normalized")}
    equal_states(random_model(TINY).state_dict(), checkpoints.from_published(checkpoint).state_dict())


def test_what_the_options_say_and_what_the_weights_say():
    """Options that contradict the weights, as saved by other commands, lose; the rest is taken from the options."""
    config = CONFIGS["attention in the middle, narrow first level"]
    checkpoint = published(config)
    args = checkpoint["args"]
    args.dataset = "omniglot"
    args.num_channels_dae = 999
    args.use_se = False
    args.num_nf = 5
    args.num_latent_per_group = 77
    args.embedding_type = "fourier"
    args.arch_instance = "res_mbconv_attn"
    args.time_eps = 0.25
    loaded = checkpoints.from_published(checkpoint).config
    assert loaded == config.replace(sde=config.sde.replace(time_eps=0.25))


# -- EMA -------------------------------------------------------------------------------------------------------------


def training_checkpoint(config=TINY):
    """A training checkpoint: raw weights in the state dict, their average in the optimizer's state.

    Returns it, and the score weights that must come out.
    """
    checkpoint = published(config)
    raw = checkpoint["dae_state_dict"]
    average = {k: v * 0.5 + 1.0 for k, v in raw.items()}
    state = {
        i: {"step": 3, "exp_avg": torch.zeros_like(v), "exp_avg_sq": torch.zeros_like(v), "ema": average[k]}
        for i, (k, v) in enumerate(raw.items())
    }
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "params": list(range(len(raw)))}]
    checkpoint["dae_optimizer"] = {"state": state, "param_groups": groups}
    # The published evaluation ignores an average of the VAE.
    vae = {i: {"ema": v + 9.0} for i, v in enumerate(checkpoint["vae_state_dict"].values())}
    checkpoint["vae_optimizer"] = {"state": vae, "param_groups": [{"params": list(range(len(vae)))}]}
    return checkpoint, average


def test_ema_is_restored_from_the_optimizer(tmp_path):
    checkpoint, average = training_checkpoint()
    torch.save(checkpoint, tmp_path / "any_name.pt")
    model = lsgm_fast.load(tmp_path / "any_name.pt")
    out = checkpoints.to_published(model)
    for key, value in average.items():
        assert torch.equal(out["dae_state_dict"][key], value), key
    equal_states(out["vae_state_dict"], checkpoint["vae_state_dict"])


def test_ema_with_other_parameter_numbers_and_several_groups():
    checkpoint, average = training_checkpoint()
    optimizer = checkpoint["dae_optimizer"]
    n = len(average)
    optimizer["state"] = {i + 100: s for i, s in optimizer["state"].items()}
    optimizer["param_groups"] = [
        {"params": list(range(100, 103))},
        {"params": list(range(103, 100 + n))},
    ]
    out = checkpoints.to_published(checkpoints.from_published(checkpoint))["dae_state_dict"]
    assert all(torch.equal(out[k], v) for k, v in average.items())


def test_ema_leaves_out_frozen_parameters():
    checkpoint, average = training_checkpoint(CONFIGS["fourier"])
    keys = list(checkpoint["dae_state_dict"])
    frozen = keys.index("temb_fun.w")
    del checkpoint["dae_optimizer"]["state"][frozen]
    del checkpoint["dae_optimizer"]["state"][0]["ema"]
    out = checkpoints.to_published(checkpoints.from_published(checkpoint))["dae_state_dict"]
    for i, key in enumerate(keys):
        raw = i in (0, frozen)
        assert torch.equal(out[key], checkpoint["dae_state_dict"][key] if raw else average[key]), key


@pytest.mark.parametrize("optimizer", [None, {}, {"state": {}, "param_groups": []}])
def test_without_optimizer_state_the_weights_are_the_average(optimizer):
    checkpoint = published() | {"dae_optimizer": optimizer}
    equal_states(random_model(TINY).state_dict(), checkpoints.from_published(checkpoint).state_dict())


def test_an_optimizer_of_another_network():
    checkpoint, _ = training_checkpoint()
    n = len(checkpoint["dae_state_dict"])
    wrong = copy.deepcopy(checkpoint)
    wrong["dae_optimizer"]["param_groups"][0]["params"].pop()
    with pytest.raises(
        CheckpointError, match=f"{n} tensors but its optimizer {n - 1}: cannot restore the EMA"
    ):
        checkpoints.from_published(wrong)
    wrong = copy.deepcopy(checkpoint)
    wrong["dae_optimizer"]["state"][2]["ema"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"the EMA of all_modules\.\d.* has shape \(3,\)"):
        checkpoints.from_published(wrong)


# -- old and full files ----------------------------------------------------------------------------------------------


def test_old_files_get_the_published_defaults():
    config = LSGMConfig(
        RGB.replace(channel_mult=(1, 2), preprocess_blocks=1, postprocess_blocks=1),
        SCORE.replace(latent_size=16, mixing_logit_init=-6.0),
    )
    checkpoint = published(config)
    for option in ("num_x_bits", "channel_mult", "mixing_logit_init", "decoder_dist", "log_sig_q_scale"):
        delattr(checkpoint["args"], option)
    loaded = checkpoints.from_published(checkpoint)
    assert loaded.config == config.replace(score=config.score.replace(mixing_logit_init=-3.0))
    assert loaded.config.vae.num_bits == 8
    assert loaded.config.vae.channel_mult == (1, 2)
    # The logit itself comes from the weights.
    assert torch.equal(loaded.prior.mixing_logit, checkpoint["dae_state_dict"]["mixing_logit"])


@pytest.mark.parametrize(
    ("name", "kind"), [("disc_mix_logistic", "mixture_logistic"), ("disc_logistic", "logistic")]
)
def test_other_names_of_decoder_distributions(name, kind):
    checkpoint = published(LSGMConfig(RGB.replace(decoder_distribution=kind), SCORE))
    checkpoint["args"].decoder_dist = name
    assert checkpoints.from_published(checkpoint).config.vae.decoder_distribution == kind


def test_a_full_training_checkpoint_loads(tmp_path):
    """NumPy scalars and torch.Size keys are inert, so files that hold them are accepted."""
    checkpoint, _ = training_checkpoint()
    checkpoint |= {
        "epoch": np.int64(7),
        "global_step": np.int32(100),
        "grad_scalar": {"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 5},
        "best_score_fid": np.float64(2.1),
        "best_score_nll": np.float32(3.4),
        "improved": np.bool_(True),
        "dae_scheduler": {"T_max": 100.0, "last_epoch": 3, "_last_lr": [np.float64(1e-4)]},
        "dae_sn_calculator": {torch.Size([8, 8]): {"sr_u": torch.zeros(2, 8), "sr_v": torch.zeros(2, 8)}},
        "vae_sn_calculator": OrderedDict({torch.Size([4, 72]): {"sr_u": torch.zeros(1)}}),
    }
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint, path)
    lsgm_fast.load(path)

    # NumPy 1 saved its scalars under an older module name.
    old = tmp_path / "numpy1.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy" in data
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            target.writestr(entry, data)
    lsgm_fast.load(old)


def test_the_format_before_zip_files(tmp_path):
    torch.save(published(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    equal_states(random_model(TINY).state_dict(), lsgm_fast.load(tmp_path / "old.pt").state_dict())


def test_a_stage_1_file(tmp_path):
    checkpoint = published(CONFIGS["stage 1"])
    assert "dae_state_dict" not in checkpoint
    checkpoint |= {"sn_calculator": {}, "vae_optimizer": {"state": {}, "param_groups": []}}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    model = lsgm_fast.load(tmp_path / "checkpoint.pt")
    assert model.prior is None
    with pytest.raises(ValueError, match="only a VAE"):
        model.sample(1)
    model.save(tmp_path / "m.safetensors")
    assert lsgm_fast.load(tmp_path / "m.safetensors").prior is None


# -- saving ----------------------------------------------------------------------------------------------------------


def test_half_precision_files_load_as_float32(tmp_path):
    model = random_model(TINY)
    sizes = {}
    for dtype in (None, torch.float16, torch.bfloat16):
        path = tmp_path / "m.safetensors"
        checkpoints.save(model, path, dtype=dtype)
        sizes[dtype] = path.stat().st_size
        loaded = lsgm_fast.load(path).state_dict()
        for key, value in model.state_dict().items():
            assert loaded[key].dtype == value.dtype, key
            rounded = value.to(dtype).float() if dtype and value.is_floating_point() else value
            assert torch.equal(loaded[key], rounded), key
    assert sizes[torch.float16] < 0.65 * sizes[None]
    lsgm_fast.convert(path, tmp_path / "half.pt", dtype=torch.float16)
    lsgm_fast.load(tmp_path / "half.pt")


def test_the_header_holds_the_configuration(tmp_path):
    random_model(TINY).save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "lsgm_fast"
    assert LSGMConfig.from_dict(json.loads(metadata["config"])) == TINY


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, suffix, error):
    model, source = random_model(TINY), tmp_path / "source.safetensors"
    model.save(source)
    target = tmp_path / f"target{suffix}"
    lsgm_fast.convert(source, target)
    before = target.read_bytes()

    def half_written(_, path, **options):
        with open(path, "wb") as file:
            file.write(before[:1000])
        raise error

    monkeypatch.setattr(checkpoints, "save_file", half_written)
    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(type(error)):
        lsgm_fast.convert(source, target)
    assert target.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["source.safetensors", f"target{suffix}"]


def test_a_damaged_source_leaves_the_target(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"junk")
    (tmp_path / "target.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointError):
        lsgm_fast.convert(tmp_path / "bad.pt", tmp_path / "target.safetensors")
    assert (tmp_path / "target.safetensors").read_bytes() == b"precious"


def test_saved_files_have_ordinary_permissions(tmp_path):
    model = random_model(TINY)
    previous = os.umask(0o027)
    try:
        model.save(tmp_path / "m.safetensors")
        lsgm_fast.convert(tmp_path / "m.safetensors", tmp_path / "m.pt")
    finally:
        os.umask(previous)
    for name in ("m.safetensors", "m.pt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name


def test_places_that_cannot_be_written(tmp_path):
    model = random_model(TINY)
    with pytest.raises(FileNotFoundError, match="missing does not exist.*create it first"):
        model.save(tmp_path / "missing" / "m.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder.*give a file name"):
        model.save(tmp_path)
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"\.safetensors .ours. or \.pt .published layout., got 'm.ckpt'"):
        lsgm_fast.convert(tmp_path / "m.safetensors", tmp_path / "m.ckpt")
    assert os.listdir(tmp_path) == ["m.safetensors"]


# -- files that cannot be loaded -------------------------------------------------------------------------------------


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as error:
        lsgm_fast.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_empty_and_folder(tmp_path):
    message = refused(tmp_path / "none.pt", "no checkpoint at .*none.pt: give a .safetensors or .pt file")
    assert "build" not in message
    assert "it is a preset: use lsgm_fast.build" in refused("cifar10-fid", "no checkpoint at cifar10-fid")
    refused(tmp_path, "is a folder: give the checkpoint file in it")
    for name in ("empty.pt", "empty.safetensors"):
        (tmp_path / name).touch()
        refused(tmp_path / name, f"{name} is empty")


FRACTIONS = [0.0001, 0.01, 0.3, 0.9, 0.999]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated(tmp_path, kind, fraction):
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "safetensors":
        random_model(TINY).save(path)
    else:
        torch.save(published(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(len(data) * fraction))])
    refused(path, f"{path.name}.*(truncated|damaged)")


@pytest.mark.parametrize("length", [1, 2, 8, 9, 16, 100])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_within_the_first_bytes(tmp_path, kind, length):
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "safetensors":
        save_file({"a": torch.zeros(50)}, path, metadata={"format": "lsgm_fast"})
    else:
        torch.save({"a": torch.zeros(50)}, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[:length])
    refused(path, f"{path.name}.*(truncated|damaged)")


@pytest.mark.parametrize(
    "content",
    [
        b"# Notes\n\nThis is no checkpoint.\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"{}",
        bytes(1000),
        b"PK\x03\x04junk",
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_of_other_kinds(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "damaged|truncated")


def test_safetensors_of_another_program(tmp_path):
    path = tmp_path / "m.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        refused(path, "safetensors file of another program: its header has no 'lsgm_fast' configuration")
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "lsgm_fast", "version": "99"})
    refused(path, "format version 99, this program reads 1: update lsgm-fast")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "not json", "invalid configuration"),
        (lambda c: "[]", "invalid configuration.*expects a dictionary, got list"),
        (lambda c: json.dumps(c | {"sde": c["sde"] | {"name": "vp"}}), "unknown SDE 'vp'"),
        (lambda c: json.dumps(c | {"colour": 3}), "unknown LSGMConfig option 'colour'"),
        (lambda c: json.dumps(c | {"vae": c["vae"] | {"image_size": "big"}}), "invalid configuration"),
        (lambda c: json.dumps(c | {"vae": c["vae"] | {"encoder_channels": -8}}), "configuration"),
        (lambda c: json.dumps(c | {"vae": c["vae"] | {"encoder_channels": 16}}), "have another shape"),
        (lambda c: json.dumps(c | {"vae": c["vae"] | {"squeeze_excite": False}}), "are unknown"),
    ],
)
def test_headers_that_do_not_fit(tmp_path, change, message):
    model, path = random_model(TINY), tmp_path / "m.safetensors"
    metadata = {"format": "lsgm_fast", "version": "1", "config": change(TINY.to_dict())}
    save_file({k: v.clone() for k, v in model.state_dict().items()}, path, metadata=metadata)
    refused(path, message)


def test_tensors_that_do_not_fit(tmp_path):
    model, path = random_model(TINY), tmp_path / "m.safetensors"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    metadata = {"format": "lsgm_fast", "version": "1", "config": json.dumps(TINY.to_dict())}

    def write(**changes):
        save_file({k: v for k, v in (state | changes).items() if v is not None}, path, metadata=metadata)

    write(**{"vae.stem.weight": None})
    refused(path, r"does not match its own configuration: 1 tensors are missing \(vae.stem.weight\)")
    write(extra=torch.zeros(1))
    refused(path, r"1 are unknown \(extra\)")
    write(**{"vae.stem.bias": torch.zeros(9)})
    refused(path, r"vae.stem.bias: \(9,\) instead of \(8,\)")
    write(**{"vae.stem.bias": torch.zeros(8, dtype=torch.int64)})
    refused(path, r"vae.stem.bias")


def test_published_files_that_do_not_fit(tmp_path):
    path = tmp_path / "checkpoint_fid.pt"

    def load(checkpoint, message):
        torch.save(checkpoint, path)
        return refused(path, message)

    load({"model": 1, "epoch": 2}, r"no published LSGM checkpoint: it has no 'args' \(it has epoch, model\)")
    load({"args": argparse.Namespace()}, "it has no 'vae_state_dict'")
    load([1, 2, 3], "holds a list, not the dictionary")
    load(torch.zeros(3), "holds a Tensor")

    checkpoint = published()
    del checkpoint["vae_state_dict"]["dec_tower.0.conv.weight"]
    assert "vae.decoder.0.conv.weight" in load(checkpoint, "1 tensors are missing")
    checkpoint = published()
    checkpoint["dae_state_dict"]["all_modules.99.weight"] = torch.zeros(1)
    load(checkpoint, r"1 are unknown \(prior.all_modules.99.weight\)")
    checkpoint = published()
    checkpoint["vae_state_dict"]["stem.bias"] = torch.zeros(3)
    load(checkpoint, "have another shape")
    checkpoint = published()
    del checkpoint["args"].num_channels_enc
    load(checkpoint, "'num_channels_enc' is missing")
    checkpoint = published()
    del checkpoint["vae_state_dict"]["prior_ftr0"]
    load(checkpoint, "'prior_ftr0' is missing")
    for option, value, message in (
        ("num_cell_per_cond_enc", 2, "does not match its own configuration"),
        ("num_latent_scales", 2, "unusable configuration.*channel_mult"),
        ("arch_instance", "res_elu", "unknown cell architecture 'res_elu'"),
        ("decoder_dist", "pixelcnn", "unknown decoder_dist 'pixelcnn'"),
        ("sde_type", "power_vpsde", "unknown SDE 'power_vpsde'"),
        ("progressive_input", "input_skip", "progressive score networks"),
        ("num_scales_dae", 3, "missing|match"),
    ):
        checkpoint = published()
        setattr(checkpoint["args"], option, value)
        load(checkpoint, message)


def with_args(**options):
    checkpoint = published()
    for option, value in options.items():
        setattr(checkpoint["args"], option, value)
    return checkpoint


MALFORMED = {
    "options are nothing": lambda: published() | {"args": None},
    "options are a list": lambda: published() | {"args": [1]},
    "no VAE state": lambda: published() | {"vae_state_dict": None},
    "VAE state is a tensor": lambda: published() | {"vae_state_dict": torch.zeros(3)},
    "score state is a string": lambda: published() | {"dae_state_dict": "weights"},
    "a weight is a number": lambda: (
        published() | {"vae_state_dict": published()["vae_state_dict"] | {"stem.bias": 3}}
    ),
    "the weight that gives a size is a number": lambda: (
        published() | {"vae_state_dict": published()["vae_state_dict"] | {"stem.weight": 3}}
    ),
    "the weight that gives a size has no such dimension": lambda: (
        published() | {"vae_state_dict": published()["vae_state_dict"] | {"prior_ftr0": torch.zeros(3)}}
    ),
    "a weight is an integer tensor": lambda: (
        published() | {"vae_state_dict": published()["vae_state_dict"] | {"stem.bias": torch.zeros(8).long()}}
    ),
    "a key is a number": lambda: (
        published() | {"vae_state_dict": published()["vae_state_dict"] | {5: torch.zeros(1)}}
    ),
    "optimizer without groups": lambda: published() | {"dae_optimizer": {"state": {0: {}}}},
    "optimizer is a list": lambda: published() | {"dae_optimizer": [1]},
    "an option is a word": lambda: with_args(num_preprocess_blocks="two"),
    "an option is None": lambda: with_args(num_x_bits=None),
    "no groups": lambda: with_args(num_groups_per_scale=0),
    "no scales": lambda: with_args(num_scales_dae=0),
    "no blocks": lambda: with_args(num_cell_per_scale_dae=0),
    "negative channels": lambda: with_args(num_channels_enc=-4),
    "likelihood of colours for grey images": lambda: with_args(decoder_dist="dml"),
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED)
def test_malformed_contents_are_one_clear_error(make):
    """Whatever lies in the dictionary, the error is a CheckpointError, not one of Python's own from deep inside."""
    with pytest.raises(CheckpointError):
        checkpoints.from_published(make())


# -- malicious files -------------------------------------------------------------------------------------------------


class Touch:
    """Unpickled, it would create a file: the classical attack."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker):
    return {
        "os.system": Touch(os.system, f"touch {marker}"),
        "eval": Touch(eval, f"open({str(marker)!r}, 'w').close()"),
        "exec": Touch(exec, f"open({str(marker)!r}, 'w').close()"),
        "open": Touch(open, str(marker), "w"),
        "torch.load": Touch(torch.load, str(marker)),
    }


NAMES = list(attacks("x"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["whole file", "extra entry", "inside the options", "tensor"])
@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickles_execute_nothing(tmp_path, name, place, zipped):
    marker = tmp_path / "touched"
    attack = attacks(marker)[name]
    checkpoint = {"args": argparse.Namespace(a=1), "vae_state_dict": {"stem.weight": torch.zeros(2)}}
    if place == "whole file":
        checkpoint = attack
    elif place == "extra entry":
        checkpoint["best_score_fid"] = attack
    elif place == "inside the options":
        checkpoint["args"].command = attack
    else:
        checkpoint["vae_state_dict"]["stem.weight"] = attack
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    message = refused(path, "was refused")
    assert "could run code" in message
    # PyTorch's own message advises to switch the protection off.
    assert "weights_only" not in message
    assert not marker.exists()


def test_a_plain_pickle_executes_nothing(tmp_path):
    marker, path = tmp_path / "touched", tmp_path / "checkpoint.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch wonders about newer protocols
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps(attacks(marker)["os.system"], protocol=protocol))
            refused(path, "refused|truncated")
    assert not marker.exists()


def test_the_attack_works_where_it_is_allowed(tmp_path):
    """Otherwise the tests above would prove nothing."""
    marker, path = tmp_path / "touched", tmp_path / "checkpoint.pt"
    torch.save({"x": attacks(marker)["exec"]}, path)
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_the_allow_list_is_not_left_behind(tmp_path):
    torch.save(published(), tmp_path / "checkpoint.pt")
    lsgm_fast.load(tmp_path / "checkpoint.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_script_archive_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "m.pt")
        refused(tmp_path / "m.pt", "m.pt")


# -- licence notice --------------------------------------------------------------------------------------------------


def test_the_licence_notice_is_given_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_noticed", False)
    random_model(TINY).save(tmp_path / "m.safetensors")
    torch.save(published(), tmp_path / "m.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lsgm_fast.load(tmp_path / "m.safetensors")
        assert caught == []  # a file of ours
        with pytest.raises(CheckpointError):
            checkpoints.from_published({"args": argparse.Namespace(), "vae_state_dict": {}})
        assert caught == []  # not a checkpoint at all
        for _ in range(3):
            lsgm_fast.load(tmp_path / "m.pt")
    assert len(caught) == 1
    assert "non-commercial" in str(caught[0].message)


def test_the_demo_loads():
    model = lsgm_fast.load("demo")
    assert model.latent_shape == (8, 8, 8)
    assert isinstance(model.config.vae, VAEConfig)
    assert next(model.parameters()).dtype == torch.float32
