"""Live modules of the published code base on our networks: stand-ins with its names, attributes and state dicts."""

from __future__ import annotations

import argparse
import copy
import functools
import math
import warnings

import pytest
import torch
import torchdiffeq
from recorded import GOLDEN, Golden, published_checkpoint, relative_error
from torch import nn

import lsgm_fast
from lsgm_fast import checkpoints
from lsgm_fast.config import LSGMConfig, ScoreConfig, SDEConfig, VAEConfig
from lsgm_fast.engine import accelerate as engine
from lsgm_fast.models import LSGM
from lsgm_fast.presets import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore:this file is in the layout:UserWarning")
# Between two computations of one network in float32 that multiply in another order.
ROUNDING = 2e-5
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


# -- stand-ins -------------------------------------------------------------------------------------------------------


class Part(nn.Module):
    """A module of the published code base, as far as its tensors go: called, it fails."""


def hang(root: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Register ``state`` on modules of its own names."""
    for key, value in state.items():
        holder, (*path, name) = root, key.split(".")
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, Part())
            holder = holder._modules[part]
        if name in BUFFERS:
            holder.register_buffer(name, value.clone())
        elif name == "weight_normalized":
            # An unnormalised convolution registers its weight a second time.
            holder.register_parameter(name, holder.weight)
        else:
            holder.register_parameter(name, nn.Parameter(value.clone(), requires_grad=key != "temb_fun.w"))
        if name == "log_weight_norm":
            # What a normalised one keeps of its latest call.
            holder.weight_normalized = None


class Published(nn.Module):
    """What computes here is our model, filled anew from the stand-in's state dict for every call."""

    def __init__(self, checkpoint: dict, part: str, model: LSGM) -> None:
        super().__init__()
        self.__dict__["_model"], self.__dict__["_filled"] = (
            model,
            model.vae if part[0] == "v" else model.prior,
        )
        hang(self, checkpoint[part])
        self.calls = 0

    def model(self) -> LSGM:
        self.calls += 1
        state, network = self.state_dict(), self._filled
        names = checkpoints._names(network, state).items()
        network.load_state_dict({a: state[b].t() if turned else state[b] for a, (b, turned) in names})
        self._model.zero_grad()
        return self._model.eval()


class PublishedVAE(Published):
    def __init__(self, checkpoint: dict, model: LSGM) -> None:
        super().__init__(checkpoint, "vae_state_dict", model)
        args = checkpoint["args"]
        self.num_latent_scales = args.num_latent_scales
        self.num_groups_per_scale = args.num_groups_per_scale
        self.num_latent_per_group = args.num_latent_per_group
        self.groups_per_scale = [args.num_groups_per_scale] * args.num_latent_scales
        self.crop_output = args.dataset in ("mnist", "omniglot")
        self.num_bits = args.num_x_bits
        self.decoder_dist = args.decoder_dist
        self.dataset = args.dataset
        self.input_size = 256 if args.dataset == "celeba_256" else 32
        self.log_sig_q_scale = torch.tensor([float(args.log_sig_q_scale)])


class PublishedScore(Published):
    def __init__(self, checkpoint: dict, model: LSGM) -> None:
        super().__init__(checkpoint, "dae_state_dict", model)
        args, config = checkpoint["args"], self._model.config.score
        self.get_submodule("all_modules.3").add_module("Dropout_0", nn.Dropout(args.dropout))
        self.mixed_prediction = args.mixed_prediction
        self.is_active = None
        self.num_input_channels, self.input_size = config.latent_channels, config.latent_size
        self.dataset, self.nf = args.dataset, args.num_channels_dae
        self.num_resolutions, self.attn_resolutions = args.num_scales_dae, (16,)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.is_active is not None:
            x = x * self.is_active
        return self.model().prior(x, t)


class PublishedDiffusion:
    """The formulas as they stand, in float32, and the published way to solve the ODE."""

    def __init__(self, config: SDEConfig, names: bool = False) -> None:
        self._c = config
        if names:
            self.sde_type, self.sigma2_0 = config.name, config.sigma2_0
            self.beta_start, self.beta_end = config.beta_start, config.beta_end
            self.sigma2_min, self.sigma2_max = config.sigma2_min, config.sigma2_max

    def f(self, t):
        c = self._c
        if c.name == "vesde":
            return torch.zeros_like(t)
        if c.name == "geometric_sde":
            return -0.5 * self.g2(t)
        return -0.5 * (c.beta_start + (c.beta_end - c.beta_start) * t)

    def _e(self, t, factor=1.0):
        c = self._c
        return torch.exp(-factor * c.beta_start * t - 0.5 * factor * (c.beta_end - c.beta_start) * t * t)

    def g2(self, t):
        c, ratio = self._c, self._c.sigma2_max / self._c.sigma2_min
        if c.name == "vesde":
            return c.sigma2_min * math.log(ratio) * ratio**t
        if c.name == "geometric_sde":
            grown = c.sigma2_min * ratio**t
            return grown * math.log(ratio) / (1.0 - c.sigma2_0 + c.sigma2_min - grown)
        beta = c.beta_start + (c.beta_end - c.beta_start) * t
        return beta if c.name == "vpsde" else beta * (1.0 - self._e(t, 2.0))

    def var(self, t):
        c, ratio = self._c, self._c.sigma2_max / self._c.sigma2_min
        if c.name == "vpsde":
            return 1.0 - (1.0 - c.sigma2_0) * self._e(t)
        if c.name == "sub_vpsde":
            return (1.0 - self._e(t)) ** 2 + c.sigma2_0 * self._e(t)
        return c.sigma2_min * ratio**t - c.sigma2_min + c.sigma2_0

    def mixing_component(self, x, var, t, enabled):
        c, scale = self._c, 1.0
        if c.name == "sub_vpsde":
            scale = (1.0 - self._e(t)) ** 2 + self._e(t)
        elif c.name == "vesde":
            scale = c.sigma2_min * (c.sigma2_max / c.sigma2_min) ** t - c.sigma2_min + 1.0
        return torch.sqrt(var) * x / scale if enabled else None

    def cross_entropy_const(self, ode_eps):
        return f"of {ode_eps}"

    @torch.no_grad()
    def sample_model_ode(self, dae, n, shape, ode_eps, tol, enable_autocast, temp, noise=None):
        calls = []

        def drift(t, x):
            calls.append(float(t))
            var = self.var(t)
            eps = dae(x, t.expand(n))
            if dae.mixed_prediction:
                a = torch.sigmoid(dae.mixing_logit)
                eps = (1.0 - a) * self.mixing_component(x, var, t, True) + a * eps
            return self.f(t) * x + 0.5 * self.g2(t) * eps / torch.sqrt(var)

        noise = torch.randn([n, *shape]) if noise is None else noise
        start = noise * temp * (math.sqrt(self._c.sigma2_max) if self._c.name == "vesde" else 1.0)
        times, options = torch.tensor([1.0, ode_eps]), {"solver": "RK45"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following arguments have no effect")
            path = torchdiffeq.odeint(
                drift, start, times, rtol=tol, atol=tol, method="scipy_solver", options=options
            )
        return path[-1], len(calls), 0.0


VAE = PRESETS["tiny-binary"].vae.replace(encoder_channels=8, decoder_channels=12, latents_per_group=2)
SCORE = ScoreConfig(latent_channels=4, latent_size=8, channels=8, channel_mult=(1, 1), blocks_per_level=1)
RGB = VAE.replace(image_channels=3, crop=0, decoder_distribution="mixture_logistic")
SEVERAL = RGB.replace(
    channel_mult=(2, 2, 4), latent_scales=2, flows_per_group=1, input_skip=True, num_bits=5, preprocess_blocks=1,
    postprocess_blocks=1, encoder_cells_per_group=2, preprocess_cells=2, postprocess_cells=3,
)  # fmt: skip
CONFIGS = {
    "mbconv, plain resampling": LSGMConfig(VAE, SCORE.replace(attention_levels=(), resample="plain")),
    "bnswish, FIR": LSGMConfig(RGB.replace(architecture="res_bnswish", log_sigma_scale=3.0), SCORE),
    "bnswish2, no squeeze-excite": LSGMConfig(
        VAE.replace(architecture="res_bnswish2", squeeze_excite=False), SCORE
    ),
    "two scales, flows, input skip": LSGMConfig(SEVERAL, SCORE.replace(channel_mult=(1, 2, 3, 1))),
    "three blocks, attention below": LSGMConfig(
        VAE, SCORE.replace(blocks_per_level=3, channel_mult=(2, 1, 4), attention_levels=(1, 2))
    ),
    "one level": LSGMConfig(VAE, SCORE.replace(channel_mult=(2,), blocks_per_level=2)),
    "fourier": LSGMConfig(VAE, SCORE.replace(embedding="fourier", embedding_dim=16)),
}
TINY = CONFIGS["bnswish, FIR"]


@functools.cache
def random_model(config: LSGMConfig) -> LSGM:
    torch.manual_seed(1)
    model = LSGM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith("prior.") and value.dim() > 1:
                # Published initialisation ends in 1e-10, at which no error would show.
                value.copy_(torch.randn(value.shape) / math.sqrt(value[0].numel()))
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                value.normal_(std=0.3)
    return model


@functools.cache
def random_checkpoint(config: LSGMConfig) -> dict:
    """Copied off the model, which the stand-ins fill."""
    return copy.deepcopy(checkpoints.to_published(random_model(config)))


def live(config: LSGMConfig = TINY) -> tuple[PublishedVAE, PublishedScore]:
    checkpoint, model = random_checkpoint(config), random_model(config)
    return PublishedVAE(checkpoint, model).eval(), PublishedScore(checkpoint, model).eval()


def inputs(dae) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, dae.num_input_channels, dae.input_size, dae.input_size), torch.tensor([0.2, 0.9])


def fingerprint(module: nn.Module):
    """Everything about a module that could be changed."""
    tensors = module.state_dict(keep_vars=True)
    return (
        {k: (id(v), v._version, v.data_ptr(), v.requires_grad, v.grad is None) for k, v in tensors.items()},
        [(name, id(m), m.training, sorted(m.__dict__)) for name, m in module.named_modules()],
        list(module.state_dict()),
    )


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "share"),
    [*((name, True) for name in CONFIGS), ("mbconv, plain resampling", False), ("fourier", False)],
)
def test_same_numbers_as_our_model(name, share):
    config = CONFIGS[name]
    old_vae, old_dae = live(config)
    before = fingerprint(old_vae), fingerprint(old_dae)
    vae, dae = lsgm_fast.accelerate(old_vae, old_dae, share=share)
    expected = old_vae.model()
    assert vae._network.config == expected.vae.config.replace(
        encoder_channels=vae._network.config.encoder_channels,
        decoder_channels=vae._network.config.decoder_channels,
        channel_mult=vae._network.config.channel_mult,
    )
    assert dae._network.config.replace(mixing_logit_init=0.0) == config.score.replace(
        mixing_logit_init=0.0,
        embedding_scale=1000.0
        if config.score.embedding == "positional"
        else dae._network.config.embedding_scale,
    )
    n, c = 2, config.vae
    with torch.no_grad():
        x = expected.vae.preprocess_images(
            torch.rand(n, c.image_channels, c.image_size, c.image_size).round()
        )
        torch.manual_seed(5)
        logits, all_log_q, all_eps = vae(x)
        torch.manual_seed(5)
        noise = [torch.randn(n, *shape) for shape in expected.vae.group_shapes]
        ours, groups = expected.vae(x, noise)
        assert torch.equal(logits, ours)
        assert all(torch.equal(a, g.log_q) for a, g in zip(all_log_q, groups, strict=True))
        assert all(torch.equal(a, g.eps) for a, g in zip(all_eps, groups, strict=True))

        scales = vae.concat_eps_per_scale(all_eps)
        assert [s.shape[1] for s in scales] == vae.latent_structure()
        assert torch.equal(scales[0], expected.vae.merge_groups(all_eps))
        top = vae.decompose_eps(scales[0])
        assert all(torch.equal(a, b) for a, b in zip(top, all_eps, strict=False))

        torch.manual_seed(6)
        images = vae.sample(n, 0.7, top)
        torch.manual_seed(6)
        lower = [0.7 * torch.randn(n, *shape) for shape in expected.lower_shapes]
        assert torch.equal(images, expected.vae.decode(scales[0], lower_noise=lower, crop=False))
        torch.manual_seed(7)
        drawn = vae.sample(n, 0.7)
        torch.manual_seed(7)
        eps = [0.7 * torch.randn(n, *shape) for shape in expected.vae.group_shapes]
        z = expected.vae.merge_groups(eps)
        lower = eps[c.groups_per_scale :]
        assert torch.equal(drawn, expected.vae.decode(z, lower_noise=lower, crop=False))

        decoded, distribution = vae.decoder_output(logits), expected.vae.output_distribution(ours)
        assert torch.equal(decoded.log_p(x), distribution.log_prob(x))
        assert torch.equal(decoded.mean(), distribution.mean())
        assert decoded.sample().shape == x.shape

        z, t = inputs(dae)
        # A transposed weight is multiplied by another kernel.
        assert relative_error(dae(z, t), expected.prior(z, t)) < ROUNDING
        assert relative_error(dae(z, t[1]), expected.prior(z, t[1].expand(n))) < ROUNDING
    assert (fingerprint(old_vae), fingerprint(old_dae)) == before


@pytest.mark.parametrize("name", GOLDEN)
def test_the_recorded_numbers_of_the_published_implementation(name, tmp_path, monkeypatch):
    golden, checkpoint = Golden(name, tmp_path), published_checkpoint(name)
    io, args = golden.io, checkpoint["args"]
    model = checkpoints.from_published(checkpoint)
    old_vae, old_dae = PublishedVAE(checkpoint, model), PublishedScore(checkpoint, model)
    vae, dae = lsgm_fast.accelerate(old_vae.eval(), old_dae.eval())
    assert dae._network.config.resample == ("fir" if args.fir else "plain")  # found out, not told
    with torch.no_grad():
        assert relative_error(dae(io["score.z"], io["score.t"]), io["score.eps_theta"]) < ROUNDING
        x = io["x01"] * 2.0 - 1.0 if "x" not in io else io["x"]
        given = [io[f"vae.group{i}.noise"] for i in range(vae._network.num_groups)]
        monkeypatch.setattr(engine, "normal", lambda shape, *_: given.pop(0))
        if name != "celeba256-multiscale":  # of which only every 4th pixel of the input was kept
            logits, log_q, eps = vae(x)
            assert relative_error(*golden.recorded("vae.logits", logits)) < ROUNDING
            assert relative_error(log_q[-1], io[f"vae.group{len(log_q) - 1}.log_q"]) < ROUNDING
            assert relative_error(vae.concat_eps_per_scale(eps)[0], io["z0"]) < ROUNDING

        for key, training in (("ode.image", False), ("ode.image_bn_batch_stats", True)):
            given = golden.lower_noise(key)
            z = io["ode.tol1e-05.z"]
            images = vae.train(training).sample(z.shape[0], 1.0, vae.decompose_eps(z))
            assert given == []
            assert relative_error(*golden.recorded(key, images)) < ROUNDING

    monkeypatch.undo()
    names = ("sde_type", "beta_start", "beta_end", "sigma2_0", "sigma2_min", "sigma2_max")
    values = {"name" if k == "sde_type" else k: getattr(args, k) for k in names}
    diffusion = lsgm_fast.accelerate_diffusion(PublishedDiffusion(SDEConfig(**values)))
    noise = io["ode.noise"]
    z, nfe, seconds = diffusion.sample_model_ode(
        dae, len(noise), list(noise.shape[1:]), golden.meta["ode.eps"], 1e-2, False, 1.0, noise
    )
    assert nfe == golden.meta["ode.tol0.01.nfe"]
    assert seconds > 0.0
    assert relative_error(z, io["ode.tol0.01.z"]) < ROUNDING


# -- the diffusion ---------------------------------------------------------------------------------------------------

SDES = {
    "vpsde": SDEConfig(),
    "vpsde with variance at 0": SDEConfig(sigma2_0=1e-4, beta_end=15.5),
    "geometric_sde": SDEConfig("geometric_sde", sigma2_0=3e-5),
    "sub_vpsde": SDEConfig("sub_vpsde", beta_start=0.2),
    "vesde": SDEConfig("vesde", sigma2_0=1e-3, sigma2_min=1e-3, sigma2_max=43.1875),
}


@pytest.fixture(scope="module")
def small():
    """A score module quick enough to be solved with, on our network."""
    old_vae, old_dae = live(LSGMConfig(VAE, SCORE.replace(channel_mult=(1,))))
    return lsgm_fast.accelerate(old_vae, old_dae)


@pytest.mark.parametrize("names", [True, False], ids=["attributes", "functions"])
@pytest.mark.parametrize("config", SDES.values(), ids=SDES)
def test_the_constants_are_those_of_the_object(config, names):
    diffusion = lsgm_fast.accelerate_diffusion(PublishedDiffusion(config, names))
    used = diffusion.sde.config
    relevant = ("beta_start", "beta_end") if "vpsde" in config.name else ("sigma2_min", "sigma2_max")
    for field in ("name", "sigma2_0", *relevant):
        assert getattr(used, field) == getattr(config, field), field
    assert used.parity == "published"
    assert diffusion.cross_entropy_const(0.1) == "of 0.1"


@pytest.mark.parametrize("config", SDES.values(), ids=SDES)
def test_the_same_steps_and_latents_as_the_published_path(config, small):
    _, dae = small
    old = PublishedDiffusion(config)
    diffusion = lsgm_fast.accelerate_diffusion(old)
    torch.manual_seed(11)
    expected, nfe, _ = old.sample_model_ode(dae, 3, [4, 8, 8], 1e-3, 1e-3, False, 0.9)
    following = torch.randn(4)
    torch.manual_seed(11)
    z, our_nfe, _ = diffusion.sample_model_ode(dae, 3, [4, 8, 8], 1e-3, 1e-3, False, 0.9)
    assert torch.equal(torch.randn(4), following)  # no more was drawn
    assert our_nfe == nfe
    assert z.dtype == torch.float32
    assert relative_error(z, expected) < ROUNDING

    model = LSGM(small[0]._network, dae._network, config)
    torch.manual_seed(11)
    noise = torch.randn(3, 4, 8, 8)
    own, info = model.sample_latents(3, noise=noise, temperature=0.9, solver="scipy", tol=1e-3, ode_eps=1e-3)
    assert info.nfe == nfe
    assert torch.equal(own, z)


def test_another_solver(small):
    _, dae = small
    old, call = PublishedDiffusion(SDEConfig()), (dae, 2, [4, 8, 8], 1e-4, 1e-4, False, 1.0)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    tight, nfe, _ = lsgm_fast.accelerate_diffusion(old, solver="rk45").sample_model_ode(*call, noise)
    few, of, _ = lsgm_fast.accelerate_diffusion(old, solver="exponential", evaluations=12).sample_model_ode(
        *call, noise
    )
    assert of == 12 < nfe
    assert relative_error(few, tight) < 0.05
    _, automatic, _ = lsgm_fast.accelerate_diffusion(old, solver="auto").sample_model_ode(*call, noise)
    assert automatic < nfe
    seeded = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ancestral = lsgm_fast.accelerate_diffusion(old, solver="ancestral", evaluations=5)
        seeded.append(ancestral.sample_model_ode(*call, noise)[0])
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    with pytest.raises(ValueError, match="unknown solver 'exponentail'"):
        lsgm_fast.accelerate_diffusion(old, solver="exponentail")
    with pytest.raises(ValueError, match=r"expected noise \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"):
        ancestral.sample_model_ode(*call, noise[:1])


def test_without_mixed_prediction_there_is_none(small):
    old_vae, old_dae = live(LSGMConfig(VAE, SCORE.replace(channel_mult=(1,))))
    _, dae = lsgm_fast.accelerate(old_vae, old_dae)
    old = PublishedDiffusion(SDEConfig())
    noise = inputs(dae)[0]
    call = (2, [4, 8, 8], 1e-3, 1e-2, False, 1.0, noise)
    mixed, _, _ = lsgm_fast.accelerate_diffusion(old).sample_model_ode(dae, *call)
    old_dae.mixed_prediction = False  # both are one
    z, nfe, _ = lsgm_fast.accelerate_diffusion(old).sample_model_ode(dae, *call)
    expected, expected_nfe, _ = old.sample_model_ode(dae, *call)
    assert nfe == expected_nfe and relative_error(z, expected) < ROUNDING
    assert relative_error(mixed, z) > 1e-2


def test_a_diffusion_that_is_none(small):
    with pytest.raises(TypeError, match=r"object is no continuous diffusion .* lacks f\(\), g2\(\), var\(\)"):
        lsgm_fast.accelerate_diffusion(object())
    wrong = PublishedDiffusion(SDEConfig(), names=True)
    wrong.beta_end = 21.0
    with pytest.raises(ValueError, match=r"has f\(1.0\) = -10.0, and SDEConfig.* has -10.5: pass args"):
        lsgm_fast.accelerate_diffusion(wrong)
    right = lsgm_fast.accelerate_diffusion(wrong, args=argparse.Namespace(beta_end=20.0))
    assert right.sde.config.beta_end == 20.0
    other = PublishedDiffusion(SDEConfig())
    other.var = lambda t: torch.sin(t)
    with pytest.raises(ValueError, match="has var"):
        lsgm_fast.accelerate_diffusion(other)
    with pytest.raises(TypeError, match="accelerated already"):
        lsgm_fast.accelerate_diffusion(right)
    with pytest.raises(TypeError, match="Linear is no score network .* lacks mixed_prediction, mixing_logit"):
        right.sample_model_ode(nn.Linear(1, 1), 1, [4, 8, 8], 1e-3, 1e-3, False, 1.0)


# -- weights that change ---------------------------------------------------------------------------------------------


def agree(old_vae, old_dae, vae, dae) -> bool:
    """Whether the accelerated modules compute what the given ones compute with their weights of now."""
    z, t = inputs(old_dae)
    groups = vae.decompose_eps(z)
    lower = [torch.zeros(2, *shape) for shape in vae._network.lower_shapes]
    with torch.no_grad():
        images = vae.sample(2, 0.0, groups)
        expected = old_vae.model().vae.decode(z, lower_noise=lower, crop=False)
        return (
            relative_error(dae(z, t), old_dae(z, t)) < ROUNDING
            and relative_error(images, expected) < ROUNDING
        )


def change(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01).step()


def changed_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v * 1.1 if v.is_floating_point() else v for k, v in module.state_dict().items()}


def swap_data(module: nn.Module) -> None:
    """As an exponential moving average is swapped in."""
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.9 + 0.01


def new_parameters(module: nn.Module) -> None:
    for child in module.modules():
        for name, value in list(child._parameters.items()):
            if name != "weight_normalized":
                child.register_parameter(name, nn.Parameter(value.detach() * 0.9))
                if "weight_normalized" in child._parameters:
                    child.register_parameter("weight_normalized", child.weight)


CHANGES = {
    "optimizer": change,
    "load_state_dict": lambda m: m.load_state_dict(changed_state(m)),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(changed_state(m), assign=True),
    "data": swap_data,
    "new parameters": new_parameters,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_weights_is_seen_on_both_sides(change):
    old_vae, old_dae = live(CONFIGS["mbconv, plain resampling"])
    vae, dae = lsgm_fast.accelerate(old_vae, old_dae)
    assert agree(old_vae, old_dae, vae, dae)
    z, t = inputs(dae)
    first = dae(z, t)
    for changed in ((old_vae, old_dae), (vae, dae)):
        for module in changed:
            change(module)
        assert agree(old_vae, old_dae, vae, dae)
    assert relative_error(dae(z, t), first) > 1e-3


def test_a_module_that_is_replaced_is_seen_and_one_that_is_gone_named():
    old_vae, old_dae = live()
    vae, dae = lsgm_fast.accelerate(old_vae, old_dae)
    old_vae.stem = copy.deepcopy(old_vae.stem)
    with torch.no_grad():
        old_vae.stem.weight.mul_(2.0)
    vae(torch.zeros(1, 3, 32, 32))
    assert vae._network.stem.weight is old_vae.stem.weight
    old_vae.stem.weight = nn.Parameter(torch.zeros(9, 3, 3, 3))
    with pytest.raises(ValueError, match=r"stem.weight had shape \(8, 3, 3, 3\) and has \(9, 3, 3, 3\) now"):
        vae(torch.zeros(1, 3, 32, 32))
    del old_dae.all_modules._modules["2"]
    with pytest.raises(ValueError, match=r"all_modules.2.weight is no longer in the module: call accelerate"):
        dae(*inputs(dae))


def test_copies_are_independent():
    old_vae, old_dae = live(CONFIGS["mbconv, plain resampling"])
    before = fingerprint(old_vae), fingerprint(old_dae)
    vae, dae = lsgm_fast.accelerate(old_vae, old_dae, share=False)
    theirs = {v.data_ptr() for m in (old_vae, old_dae) for v in m.state_dict().values()}
    assert not theirs & {v.data_ptr() for m in (vae, dae) for v in m.state_dict().values()}
    z, t = inputs(dae)
    for module in (vae, dae):
        swap_data(module)
        module.train()
    vae(torch.zeros(2, 1, 32, 32))[0].sum().backward()
    assert (fingerprint(old_vae), fingerprint(old_dae)) == before
    kept = dae.eval()(z, t)
    change(old_dae)
    old_dae.is_active = torch.zeros(1, 4, 1, 1)
    assert torch.equal(dae(z, t), kept)
    # A weight with two names is one in the copy, too.
    aliases = [k for k in vae.state_dict() if k.endswith("weight_normalized")]
    state = vae.state_dict()
    assert aliases and all(
        state[k].data_ptr() == state[k.removesuffix("_normalized")].data_ptr() for k in aliases
    )
    assert [n for n, _ in vae.named_parameters()] == [n for n, _ in old_vae.named_parameters()]


def test_parameters_and_state_are_the_given_ones():
    old_vae, old_dae = live(CONFIGS["mbconv, plain resampling"])
    for old, new in zip((old_vae, old_dae), lsgm_fast.accelerate(old_vae, old_dae), strict=True):
        assert [(n, id(p)) for n, p in old.named_parameters()] == [
            (n, id(p)) for n, p in new.named_parameters()
        ]
        assert list(old.state_dict()) == list(new.state_dict())
        assert all(a is b for a, b in zip(old.parameters(), new.parameters(), strict=True))
        for name in type(new).ATTRIBUTES:
            assert getattr(new, name) is getattr(old, name)
        with pytest.raises(AttributeError, match="no attribute 'smaple'"):
            _ = new.smaple
        both = nn.ModuleList([new])
        assert len(list(both.parameters())) == len(list(old.parameters()))


def test_half_precision_and_back():
    old_vae, old_dae = live()
    _, dae = lsgm_fast.accelerate(old_vae, old_dae)
    z, t = inputs(dae)
    old_dae.to(torch.bfloat16)
    assert dae(z.bfloat16(), t).dtype == torch.bfloat16
    # The weights stay rounded; what follows from the configuration does not.
    dae.float()
    assert relative_error(dae(z, t), old_dae(z, t)) < ROUNDING


def test_double_precision_and_back():
    old_vae, old_dae = live(CONFIGS["two scales, flows, input skip"])
    vae, dae = lsgm_fast.accelerate(old_vae, old_dae)
    z, t = inputs(dae)
    x = torch.rand(1, 3, 32, 32)
    single = dae(z, t)
    old_dae.double()
    vae.double()
    assert old_vae.stem.weight.dtype == torch.float64
    assert relative_error(dae(z.double(), t), single) < ROUNDING
    assert vae(x.double())[0].dtype == torch.float64
    dae.float()
    assert relative_error(dae(z, t), single) < 1e-6


def test_inactive_channels_are_masked():
    old_vae, old_dae = live()
    _, dae = lsgm_fast.accelerate(old_vae, old_dae)
    z, t = inputs(dae)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 4, 1, 1)
    for module in (old_dae, dae):  # the attribute is one
        module.is_active = mask
        assert dae.is_active is old_dae.is_active is mask
        assert relative_error(dae(z, t), old_dae(z, t)) < ROUNDING
        assert relative_error(dae(z, t), old_dae.model().prior(z, t)) > 1e-2
        module.is_active = None


def test_deepcopy_of_a_copied_one():
    _, dae = lsgm_fast.accelerate(*live(), share=False)
    again = copy.deepcopy(dae)
    z, t = inputs(dae)
    before = dae(z, t)
    change(dae)
    assert torch.equal(again(z, t), before)
    assert not torch.equal(dae(z, t), before)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False], ids=["shared", "copied"])
def test_training_mode(share):
    old_vae, old_dae = live()
    vae, dae = lsgm_fast.accelerate(old_vae, old_dae, share=share)
    assert not vae.training and not dae.training
    x = torch.rand(2, 3, 32, 32) * 2.0 - 1.0
    reference = old_vae.model().vae.train()
    assert vae.train() is vae and vae.training and not old_vae.training and not old_vae.stem.training
    torch.manual_seed(8)
    logits, log_q, _ = vae(x)
    torch.manual_seed(8)
    expected, groups = reference(x, [torch.randn(2, *shape) for shape in reference.group_shapes])
    assert torch.equal(logits, expected)
    (logits.square().mean() + log_q[0].mean()).backward()
    (expected.square().mean() + groups[0].log_q.mean()).backward()
    names = checkpoints._vae_names(reference, None)
    ours = dict(reference.named_parameters())
    found = dict(vae.named_parameters())
    for name, parameter in ours.items():
        if parameter.grad is not None:
            assert relative_error(found[names[name]].grad, parameter.grad) < 1e-6, name
    state = vae.state_dict()
    for name, value in reference.state_dict().items():
        if name.endswith(("running_mean", "num_batches_tracked")):
            assert torch.equal(state[names[name]], value), name
    # What the published regulariser reads: the weights of this call, with their graph.
    conv = vae.dec_tower._modules["0"].conv
    shown = conv.weight_normalized
    wanted = reference.decoder[0].conv.normalized_weight()
    assert shown.requires_grad and relative_error(shown, wanted) < 1e-6

    z, t = inputs(dae)
    dae.train()
    torch.manual_seed(1)
    a = dae(z, t)
    assert relative_error(a, dae(z, t)) > 1e-3  # dropout
    a.sum().backward()
    weight = dae.state_dict(keep_vars=True)["all_modules.2.weight"]
    assert weight.grad is not None and bool(weight.grad.any())
    dae.eval()
    assert torch.equal(dae(z, t), dae(z, t))


def test_the_mode_is_taken_over_and_then_its_own():
    old_vae, old_dae = live()
    old_vae.train()
    vae, dae = lsgm_fast.accelerate(old_vae, old_dae.train())
    assert vae.training and dae.training and old_dae.training
    old_vae.eval()
    assert vae.training
    assert not vae.eval()._network.training


def test_training_without_a_known_dropout_is_refused():
    old_vae, old_dae = live()
    old_dae.get_submodule("all_modules.3")._modules.pop("Dropout_0")
    _, dae = lsgm_fast.accelerate(old_vae, old_dae)
    dae.eval()
    with pytest.raises(ValueError, match="dropout of this score network cannot be read off"):
        dae.train()
    assert not dae.training
    _, dae = lsgm_fast.accelerate(old_vae, old_dae, args={"dropout": 0.3})
    assert {m.p for m in dae.train()._network.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_autocast(small):
    vae, dae = small
    z, t = inputs(dae)
    seen = []
    hook = dae._network.conv_in.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    diffusion = lsgm_fast.accelerate_diffusion(PublishedDiffusion(SDEConfig()))
    for enabled in (True, False):
        latents, _, _ = diffusion.sample_model_ode(dae, 2, [4, 8, 8], 1e-3, 1e-2, enabled, 1.0, z)
        assert latents.dtype == torch.float32
        images = vae.sample(2, 1.0, vae.decompose_eps(z), enable_autocast=enabled)
        assert images.dtype == torch.float32
        if enabled:
            half = latents, images
            assert set(seen) == {torch.bfloat16}
            seen.clear()
    assert set(seen) == {torch.float32}
    hook.remove()
    assert 0.0 < relative_error(half[0], latents) < 0.05
    assert 0.0 < relative_error(half[1], images) < 0.05
    with torch.autocast("cpu"), torch.no_grad():
        assert relative_error(dae(z, t), dae(z.float(), t)) == 0.0
        assert vae(torch.zeros(1, 1, 32, 32))[0].dtype == torch.bfloat16


# -- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_objects_are_told_what_is_missing():
    old_vae, old_dae = live()
    with pytest.raises(
        TypeError, match=r"Linear is no VAE of the published code base: it lacks num_latent_scales"
    ):
        lsgm_fast.accelerate(nn.Linear(1, 1), old_dae)
    with pytest.raises(TypeError, match=r"NoneType is no VAE"):
        lsgm_fast.accelerate(None, old_dae)
    with pytest.raises(TypeError, match=r"DataParallel is no VAE .*; pass its .module"):
        lsgm_fast.accelerate(nn.DataParallel(old_vae), old_dae)
    del old_dae.is_active
    with pytest.raises(TypeError, match=r"PublishedScore is no score network .*: it lacks is_active$"):
        lsgm_fast.accelerate(old_vae, old_dae)
    old_dae.is_active = None
    vae, _ = lsgm_fast.accelerate(old_vae, old_dae)
    with pytest.raises(TypeError, match="this VAE is accelerated already"):
        lsgm_fast.accelerate(vae, old_dae)
    assert lsgm_fast.accelerate(old_vae, None)[1] is None


def test_contradictions_are_named():
    old_vae, old_dae = live()
    other_vae, other_dae = live(
        LSGMConfig(VAE.replace(latents_per_group=3), SCORE.replace(latent_channels=6))
    )
    with pytest.raises(ValueError, match=r"latent is \(4, 8, 8\) .* takes 6 channels of size 8: they do not"):
        lsgm_fast.accelerate(old_vae, other_dae)
    old_vae.num_latent_per_group = 5
    with pytest.raises(ValueError, match="says num_latent_per_group=5, and its weights show 2"):
        lsgm_fast.accelerate(old_vae, old_dae)
    old_vae.num_latent_per_group = 2
    old_vae.decoder_dist = "cauchy"
    with pytest.raises(ValueError, match="unknown decoder_dist 'cauchy'"):
        lsgm_fast.accelerate(old_vae, old_dae)
    del other_vae._parameters["prior_ftr0"]
    with pytest.raises(
        TypeError, match="no VAE of the published code base: its state_dict lacks 'prior_ftr0'"
    ):
        lsgm_fast.accelerate(other_vae, None)
    old_vae.decoder_dist = "dml"
    old_vae.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"1 are unknown \(extra\)"):
        lsgm_fast.accelerate(old_vae, old_dae)
    del old_vae.extra
    del old_dae._parameters["mixing_logit"]
    with pytest.raises(TypeError, match="mixed_prediction=True but has no parameter mixing_logit"):
        lsgm_fast.accelerate(old_vae, old_dae)


def test_what_the_weights_do_not_tell(monkeypatch):
    old_vae, old_dae = live()
    args = argparse.Namespace(fir=True, embedding_scale=1000.0)
    lsgm_fast.accelerate(old_vae, old_dae, args=args, check=False)
    assert old_dae.calls == 0
    assert agree(old_vae, old_dae, *lsgm_fast.accelerate(old_vae, old_dae, args=args))
    with pytest.raises(ValueError, match="tell fir and embedding_scale: pass args with them"):
        lsgm_fast.accelerate(old_vae, old_dae, check=False)
    with pytest.raises(ValueError, match=r"fir=False, .*: are these the args of this network\?"):
        lsgm_fast.accelerate(old_vae, old_dae, args={"fir": False, "embedding_scale": 1000})
    with pytest.raises(ValueError, match=r"embedding_scale=10\.0.*pass args with fir"):
        lsgm_fast.accelerate(old_vae, old_dae, args={"embedding_scale": 10})

    def broken(x, t):
        raise RuntimeError("no device")

    old_dae.train()
    flags = [m.training for m in old_dae.modules()]
    monkeypatch.setattr(old_dae, "forward", broken)
    with pytest.raises(
        ValueError, match=r"could not be called .*\(no device\): pass args with fir and embedding"
    ):
        lsgm_fast.accelerate(old_vae, old_dae)
    assert [m.training for m in old_dae.modules()] == flags


def test_shapes_of_given_groups():
    vae, _ = lsgm_fast.accelerate(*live())
    with pytest.raises(ValueError, match=r"expected eps_z of shapes \[\(2, 2, 8, 8\)"):
        vae.sample(2, 1.0, [torch.zeros(3, 2, 8, 8)])


def test_structure_of_one_scale_without_a_combiner():
    """One group: the encoder has no combiner, and its tower says less."""
    config = LSGMConfig(
        VAEConfig(**{**VAE.to_dict(), "groups_per_scale": 1, "channel_mult": (1, 2, 2)}), None
    )
    vae, _ = lsgm_fast.accelerate(PublishedVAE(random_checkpoint(config), random_model(config)), None)
    assert vae._network.config == config.vae
