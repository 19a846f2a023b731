"""NVAE, NCSN++ and LSGM: protocols, closed forms, sizes, sampling, likelihood, compilation."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import lsgm_fast
from lsgm_fast import build_sde, random
from lsgm_fast.config import LSGMConfig, SamplingConfig, ScoreConfig, SDEConfig
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.models import LSGM, NVAE, VAE, NCSNpp, ScoreNetwork
from lsgm_fast.nn.cells import MBConvBranch
from lsgm_fast.presets import PRESETS
from lsgm_fast.sampling import solve_ode

TINY = ["tiny-rgb", "tiny-binary", "tiny-multiscale"]
PUBLISHED = [name for name in PRESETS if not name.startswith("tiny")]
SDES = {
    "vpsde": SDEConfig(),
    "vpsde, sigma2_0 > 0": SDEConfig(sigma2_0=0.01),
    "geometric_sde": SDEConfig(name="geometric_sde", sigma2_0=3e-5),
    "sub_vpsde": SDEConfig(name="sub_vpsde", sigma2_0=1e-3),
    "vesde": SDEConfig(name="vesde", sigma2_0=1e-4, sigma2_min=1e-4, sigma2_max=100.0),
}


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomize(model, seed=0):
    """Weights and running statistics in place of initial values, of which many are zero, one or next to it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point() or name.endswith("mixing_logit"):
                continue
            # A score network that oscillates in t would only cost the solvers many steps.
            score = name.startswith("prior.") or isinstance(model, NCSNpp)
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif score or value.dim() < 4:
                value.add_(torch.randn(value.shape, generator=generator) * (0.03 if score else 0.1))
    return model


def tiny(name="tiny-binary", seed=0):
    torch.manual_seed(seed)
    return randomize(lsgm_fast.build(name), seed)


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


# -- protocols -------------------------------------------------------------------------------------------------------


class TenLineVAE(nn.Module):
    """Two grey pixels per latent channel."""

    latent_shape = (3, 1, 1)

    def encode(self, x, noise=None):
        return x.mean(dim=(2, 3), keepdim=True)

    def decode(self, z, **options):
        return torch.sigmoid(z).expand(-1, -1, 2, 2)


class TenLineScore(nn.Module):
    """Predicts the noise in data that are a single point, with one parameter."""

    def __init__(self, point=0.5):
        super().__init__()
        self.point = nn.Parameter(torch.tensor(point))

    def forward(self, z, t):
        assert t.shape == (z.shape[0],)
        return z - self.point


class GaussianScore(nn.Module):
    """The exact noise prediction for data N(mean, std^2) per channel, seen through a mixing logit or without."""

    def __init__(self, sde, mean, std, mixing_logit=None):
        super().__init__()
        self.sde, self.mean, self.std = sde, mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)
        self.mixing_logit = mixing_logit

    def marginal(self, t):
        """Mean and standard deviation of z_t."""
        m, var = (v.reshape(-1, 1, 1, 1) for v in (self.sde.mean_coef(t), self.sde.var(t)))
        return m * self.mean, torch.sqrt(m**2 * self.std**2 + var)

    def forward(self, z, t):
        t = t.double()
        mean, std = self.marginal(t)
        eps = torch.sqrt(self.sde.var(t)).reshape(-1, 1, 1, 1) * (z - mean) / std**2
        if self.mixing_logit is not None:
            a = torch.sigmoid(self.mixing_logit).double()
            eps = (eps - (1 - a) * self.sde.mixed_r(t).reshape(-1, 1, 1, 1) * z) / a
        return eps.to(z.dtype)


def test_own_modules_are_enough():
    model = LSGM(TenLineVAE(), TenLineScore(), SDEConfig())
    seen = []
    images = model.sample(
        5, seed=1, tol=1e-3, solver="rk45", batch_size=2, on_batch=lambda *a: seen.append(a)
    )
    assert images.shape == (5, 3, 2, 2)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert [len(x) for x, _ in seen] == [2, 2, 1]
    assert torch.equal(torch.cat([x for x, _ in seen]), images)
    info = seen[0][1]
    assert info.nfe == 2 + 6 * (info.steps + info.rejected)
    assert info.solver == "rk45"
    assert set(info.backends) >= {
        "score_drift",
        "rk_stage",
        "rk_drift_stage",
        "rk_drift_finish",
        "rk_control",
    }
    assert info.seconds > 0
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(model.encode(x), x.mean(dim=(2, 3), keepdim=True))
    assert model.lower_shapes == []
    assert model.config is None
    for solver in ("scipy", "dopri5"):
        assert model.sample(2, solver=solver, tol=1e-3).shape == (2, 3, 2, 2)
    assert model.sample(2, solver="ancestral", evaluations=4).shape == (2, 3, 2, 2)


def test_protocols_are_checked():
    assert isinstance(TenLineVAE(), VAE)
    assert isinstance(TenLineScore(), ScoreNetwork)
    with pytest.raises(TypeError, match=r"Linear is no VAE: it needs latent_shape and decode"):
        LSGM(nn.Linear(2, 2), TenLineScore(), SDEConfig())
    model = LSGM(TenLineVAE(), TenLineScore(), SDEConfig())
    with pytest.raises(TypeError, match="nelbo.. needs an NVAE, got TenLineVAE"):
        model.nelbo(torch.zeros(1, 3, 2, 2))


def test_a_vae_without_an_encoder_cannot_encode(tmp_path):
    class Decoder(nn.Module):
        latent_shape = (2, 1, 1)

        def decode(self, z, **options):
            return z

    model = LSGM(Decoder(), TenLineScore(), SDEConfig())
    with pytest.raises(TypeError, match="Decoder has no encode"):
        model.encode(torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match="only models with a configuration can be saved"):
        model.save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_built_sde_may_be_given():
    sde = build_sde(SDEConfig(name="sub_vpsde"))
    model = LSGM(TenLineVAE(), TenLineScore(), sde, sampling=SamplingConfig(ode_eps=0.1, tol=1e-3))
    assert model.sde is sde
    assert model.sampling.tol == 1e-3


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("config", SDES.values(), ids=SDES)
def test_exact_score_transports_every_sample_along_the_closed_form(config, mixed):
    """For Gaussian data (z - mean_t) / std_t is constant along the probability flow."""
    sde = build_sde(config)
    mean, std = torch.tensor([0.5, -0.8, 0.0]).double(), torch.tensor([0.3, 0.9, 1.5]).double()
    logit = torch.tensor([-3.0, 0.0, 2.0]).reshape(1, 3, 1, 1) if mixed else None
    score = GaussianScore(sde, mean, std, logit)
    model = LSGM(TenLineVAE(), score, sde)
    noise = rand(16, 3, 1, 1)
    end = 1e-3
    z, _ = model.sample_latents(16, noise=noise, tol=1e-7, ode_eps=end)
    start_mean, start_std = score.marginal(torch.tensor(1.0).double())
    end_mean, end_std = score.marginal(torch.tensor(end).double())
    z1 = noise.double() * sde.prior_std
    expected = end_mean + end_std * (z1 - start_mean) / start_std
    # Noise and result are float32; the solver is asked for 1e-7.
    assert relative(z.double(), expected) < 1e-5


@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5", "ancestral"])
def test_exact_score_gives_the_data_distribution(solver):
    sde = build_sde(SDEConfig())
    mean, std = torch.tensor([0.5, -0.4, 0.0]).double(), torch.tensor([0.3, 0.5, 0.1]).double()
    model = LSGM(TenLineVAE(), GaussianScore(sde, mean, std), sde)
    n = 4000
    if solver == "ancestral":
        options = {"evaluations": 500}
    else:
        options = {"tol": 1e-4, "ode_eps": 1e-4}
    z, _ = model.sample_latents(n, seed=7, solver=solver, **options)
    z = z[:, :, 0, 0].double()
    # Five standard errors, and what 500 steps or a prior of variance 1 - 4e-5 leave (about 1e-2 of the spread).
    assert ((z.mean(dim=0) - mean).abs() <= 5 * std / math.sqrt(n) + 0.01).all()
    assert ((z.std(dim=0) / std - 1).abs() <= 5 / math.sqrt(2 * n) + 0.02).all()
    correlation = torch.corrcoef(z.T) - torch.eye(3).double()
    assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("name", ["vpsde", "geometric_sde"])
def test_pure_mixing_leaves_the_latent_alone(name):
    """eps = 0 and a ~ 0: the score of N(0, I), which these SDEs preserve, so nothing moves."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing_logit = nn.Parameter(torch.full((1, 3, 1, 1), -40.0))

        def forward(self, z, t):
            return torch.zeros_like(z)

    model = LSGM(TenLineVAE(), Zero(), SDES[name])
    noise = rand(4, 3, 1, 1)
    z, info = model.sample_latents(4, noise=noise, tol=1e-6)
    torch.testing.assert_close(z, noise, rtol=1e-7, atol=1e-7)
    assert info.rejected == 0
    z, _ = model.sample_latents(4, noise=noise, tol=1e-6, temperature=0.5)
    torch.testing.assert_close(z, 0.5 * noise, rtol=1e-7, atol=1e-7)


def test_predicted_noise_and_drift():
    model = tiny()
    z, t = rand(2, *model.latent_shape), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        model.prior.mixing_logit.copy_(rand(*model.prior.mixing_logit.shape, seed=3))
        eps, a = model.prior(z, t), torch.sigmoid(model.prior.mixing_logit)
        var = model.sde.var(t).reshape(2, 1, 1, 1)
        mixed = (1 - a) * var.sqrt() * z + a * eps
        torch.testing.assert_close(model.predict_noise(z, t), mixed, rtol=1e-5, atol=1e-6)
        # f z + g^2 / (2 sqrt(var)) eps, for one sample, so at one time.
        f, g2 = model.sde.f(t[1]), model.sde.g2(t[1])
        expected = f * z[1:] + g2 / (2 * var[1].sqrt()) * mixed[1:]
        got = model.drift(z[1:].double(), t[1].double())
    assert got.dtype == torch.float64
    assert relative(got.float(), expected) < 1e-5


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {
    # latent shape, VAE parameters, score network parameters, tensors in the published VAE and score state
    "cifar10-balanced": ((180, 16, 16), 100_867_740, 375_561_064, 1938, 743),
    "cifar10-fid": ((180, 16, 16), 100_867_740, 375_561_064, 1938, 743),
    "cifar10-nll": ((180, 16, 16), 130_622_772, 375_561_064, 778, 743),
    "mnist": ((40, 8, 8), 3_005_822, 63_774_544, 456, 441),
    "omniglot": ((60, 16, 16), 5_384_190, 97_804_152, 604, 743),
    "celebahq256-quantitative": ((160, 32, 32), 51_296_572, 408_367_680, 3622, 957),
    "celebahq256-qualitative-stage2": ((200, 64, 64), 17_789_540, 440_116_368, 2990, 1169),
    "celebahq256-qualitative": ((200, 64, 64), 17_789_540, 680_827_984, 2990, 1169),
}


def test_the_table_covers_every_published_preset():
    assert set(SIZES) == set(PUBLISHED)


@pytest.mark.parametrize("name", list(SIZES))
def test_parameter_counts_of_the_published_configurations(name):
    latent, vae_parameters, score_parameters, vae_keys, score_keys = SIZES[name]
    model = lsgm_fast.build(name, device="meta")
    assert model.latent_shape == latent
    assert sum(p.numel() for p in model.vae.parameters()) == vae_parameters
    assert sum(p.numel() for p in model.prior.parameters()) == score_parameters
    assert model.prior.mixing_logit.shape == (1, latent[0], 1, 1)
    # The published state counts the three plain convolutions of an mconv cell twice.
    aliases = 3 * sum(isinstance(m, MBConvBranch) for m in model.vae.modules())
    assert len(model.vae.state_dict()) + aliases == vae_keys
    assert len(model.prior.state_dict()) == score_keys


def test_lower_scales_of_celeba():
    model = lsgm_fast.build("celebahq256-quantitative", device="meta")
    assert model.lower_shapes == [(20, 64, 64)] * 8 + [(20, 128, 128)] * 8
    assert lsgm_fast.build("cifar10-fid", device="meta").lower_shapes == []


def shrunk(config: LSGMConfig) -> LSGMConfig:
    """The same structure with few channels, cells and pixels."""
    v, s = config.vae, config.score
    vae = v.replace(
        image_size=min(v.image_size, 32 if len(v.channel_mult) < 4 else 64),
        encoder_channels=8,
        decoder_channels=8,
        encoder_cells_per_group=1,
        decoder_cells_per_group=1,
        groups_per_scale=2,
        latents_per_group=2,
    )
    channels, size, _ = vae.latent_shape
    score = s.replace(latent_channels=channels, latent_size=max(size, 16), channels=8, blocks_per_level=1)
    if score.latent_size != size:
        vae = vae.replace(image_size=vae.image_size * score.latent_size // size)
    return config.replace(vae=vae, score=score)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_structure_runs_small(name):
    config = shrunk(PRESETS[name])
    torch.manual_seed(0)
    model = randomize(LSGM.from_config(config).eval())
    c = config.vae
    natural = c.image_size - 2 * c.crop
    x = torch.rand(2, c.image_channels, natural, natural)
    with torch.no_grad():
        groups = model.encode(x)
        assert [tuple(g.eps.shape[1:]) for g in groups] == model.vae.group_shapes
        z = model.vae.merge_groups([g.eps for g in groups])
        lower = [g.eps for g in groups[c.groups_per_scale :]]
        for bn in ("running", "batch"):
            images = model.decode(z, lower, bn=bn)
            assert images.shape == x.shape
            assert torch.isfinite(images).all()
        eps = model.prior(z, torch.rand(2))
        assert eps.shape == z.shape
        assert torch.isfinite(eps).all()
        nelbo = model.nelbo(x)
    assert torch.isfinite(nelbo.total).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_vae_trains_and_decodes_on_the_kernels(name):
    """In full size, against plain PyTorch: what it returns, every gradient, and what it decodes."""
    config = PRESETS[name].replace(score=None)
    c = config.vae
    torch.manual_seed(0)
    model = LSGM.from_config(config).to(memory_format=torch.channels_last)
    batch = 1 if c.image_size >= 256 else 4
    x = 2.0 * torch.rand(batch, c.image_channels, c.image_size, c.image_size) - 1.0
    noise = [torch.randn(batch, *shape) for shape in model.vae.group_shapes]
    z, *lower = (torch.randn(batch, *shape) for shape in (model.latent_shape, *model.lower_shapes))
    found = []
    for backend in ("reference", "auto"):
        model.zero_grad()
        with use_backend(backend), record() as log:
            logits, groups = model.vae.train()(x, noise)
            weighted = logits * torch.linspace(-1.0, 1.0, logits.numel()).view_as(logits)
            (weighted.sum() + sum(g.log_q.sum() for g in groups)).backward()
            images = model.eval().decode(z, lower, bn="batch")
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logits.detach(), gradients, images))
    assert {"bn_swish", "se_residual", "nvae_cell"} <= {
        op for op, ran in log.backends().items() if "cpu" in ran
    }
    for got, want in zip(*reversed(found), strict=True):
        assert float((got - want).norm() / (want - want.mean()).norm()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_score_network_trains_on_the_kernels(name, memory_format):
    """In full size, against plain PyTorch: its output in training and evaluation, and every gradient."""
    config = PRESETS[name].score.replace(dropout=0.0)
    torch.manual_seed(0)
    network = randomize(NCSNpp(config)).to(memory_format=memory_format)
    batch = 1 if config.latent_size >= 32 else 2
    z = torch.randn(batch, config.latent_channels, config.latent_size, config.latent_size)
    t = torch.rand(batch)
    found = []
    for backend in ("reference", "auto"):
        network.zero_grad()
        with use_backend(backend), record() as log:
            trained = network.train()(z, t)
            (trained * torch.linspace(-1.0, 1.0, trained.numel()).view_as(trained)).sum().backward()
            with torch.no_grad():
                evaluated = network.eval()(z, t)
        gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        found.append((trained.detach(), gradients, evaluated))
    kernels = {"group_norm_swish", "group_norm_swish_residual"}
    if len(config.channel_mult) > 1:
        kernels.add("group_norm_resample")
    assert kernels <= {op for op, ran in log.backends().items() if "cpu" in ran}
    for got, want in zip(*reversed(found), strict=True):
        assert float((got - want).norm() / (want - want.mean()).norm()) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_mult": (1, 2, 3), "attention_levels": (0, 2), "blocks_per_level": 2},
        {"channel_mult": (2, 1), "attention_levels": (), "resample": "plain"},
        {"channel_mult": (1,), "attention_levels": (0,), "embedding": "fourier", "embedding_dim": 32},
        {"mixed_prediction": False},
    ],
)
def test_unusual_score_networks(changes):
    config = ScoreConfig(latent_channels=5, latent_size=8, channels=8, blocks_per_level=1).replace(**changes)
    network = randomize(NCSNpp(config)).eval()
    z = rand(3, 5, 8, 8)
    with torch.no_grad():
        out = network(z, torch.tensor([0.1, 0.5, 1.0]))
        assert out.shape == z.shape
        # t may be shared; samples do not depend on each other.
        alone = network(z[1:2], torch.tensor(0.5))
    torch.testing.assert_close(alone, out[1:2], rtol=1e-4, atol=1e-5)
    assert (network.mixing_logit is None) == (not config.mixed_prediction)
    assert not torch.allclose(out, network(z, torch.tensor([0.2, 0.6, 0.9])))


def test_score_network_refuses_other_shapes():
    network = lsgm_fast.build("tiny-binary").prior
    with pytest.raises(ValueError, match=r"expected latents \(B, 8, 8, 8\), got \(1, 8, 4, 4\)"):
        network(torch.zeros(1, 8, 4, 4), torch.zeros(1))
    with pytest.raises(ValueError, match=r"expected t of shape \(2,\) or a single value, got \(3,\)"):
        network(torch.zeros(2, 8, 8, 8), torch.zeros(3))


# -- encoding and decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_posterior_is_the_gaussian_of_the_noise(name):
    model = tiny(name)
    c = model.config.vae
    x = torch.rand(2, c.image_channels, c.image_size, c.image_size)
    noise = [rand(2, *s, seed=i) for i, s in enumerate(model.vae.group_shapes)]
    with torch.no_grad():
        groups = model.encode(x, noise)
        logits, same = model.vae(model.vae.preprocess_images(x), noise)
    assert len(groups) == len(same) == model.vae.num_groups
    for group, twin, draw in zip(groups, same, noise, strict=True):
        torch.testing.assert_close(group.eps, twin.eps)
        assert group.mean.abs().max() <= 5
        assert group.log_sigma.abs().max() <= 5
        normal = torch.distributions.Normal(group.mean, group.log_sigma.exp())
        before_flows = group.mean + group.log_sigma.exp() * draw
        torch.testing.assert_close(group.log_q, normal.log_prob(before_flows), rtol=1e-4, atol=1e-4)
        if c.flows_per_group == 0:
            torch.testing.assert_close(group.eps, before_flows)
        else:
            assert not torch.allclose(group.eps, before_flows)
    # Decoding the encoder's own latents gives the logits of the joint pass.
    z = model.vae.merge_groups([g.eps for g in groups])
    lower = [g.eps for g in groups[c.groups_per_scale :]]
    with torch.no_grad():
        torch.testing.assert_close(model.vae.logits(z, lower), logits, rtol=1e-4, atol=1e-5)
    split = model.vae.split_groups(z)
    assert all(torch.equal(a, g.eps) for a, g in zip(split, groups, strict=False))


def test_posterior_draws_come_from_the_seed():
    model = tiny()
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        a, b, other = model.encode(x, seed=1), model.encode(x, seed=1), model.encode(x, seed=2)
        first = model.encode(x[:1], seed=1)
    assert all(torch.equal(p.eps, q.eps) for p, q in zip(a, b, strict=True))
    assert not any(torch.equal(p.eps, q.eps) for p, q in zip(a, other, strict=True))
    # The first group has the same draw whatever the batch; so all else equal has the eps.
    torch.testing.assert_close(first[0].eps, a[0].eps[:1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(a[0].eps, a[1].eps)


def test_padding_and_bit_depth():
    model = tiny()
    x = torch.rand(2, 1, 28, 28)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    got = model.vae.preprocess_images(x)
    assert got.shape == (2, 1, 32, 32)
    assert torch.equal(got, padded * 2 - 1)
    assert torch.equal(model.vae.preprocess_images(padded), got)
    assert torch.equal(model.vae.crop_images(got), x * 2 - 1)

    five = lsgm_fast.build("tiny-multiscale").vae
    x = (torch.arange(256) / 255).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).repeat(1, 1, 4, 4)
    levels = five.preprocess_images(x)
    expected = (torch.arange(256) // 8).float() / 31 * 2 - 1
    torch.testing.assert_close(levels[0, 0, :16, :16].flatten(), expected)


@pytest.mark.parametrize("name", TINY)
def test_decode(name):
    model = tiny(name)
    c = model.config.vae
    z = rand(4, *model.latent_shape)
    lower = [rand(4, *s, seed=i) for i, s in enumerate(model.lower_shapes)]
    images = model.decode(z, lower, bn="running")
    natural = c.image_size - 2 * c.crop
    assert images.shape == (4, c.image_channels, natural, natural)
    assert images.min() >= 0
    assert images.max() <= 1
    # Running statistics: an image does not depend on its batch. Batch statistics: it does.
    torch.testing.assert_close(
        model.decode(z[:2], [e[:2] for e in lower], bn="running"), images[:2], rtol=1e-4, atol=1e-5
    )
    batch = model.decode(z, lower, bn="batch")
    assert not torch.allclose(batch, images, atol=1e-4)
    assert not torch.allclose(model.decode(z[:2], [e[:2] for e in lower], bn="batch"), batch[:2], atol=1e-4)
    recipe = images if model.sampling.bn == "running" else batch
    assert torch.equal(model.decode(z, lower), recipe)
    whole = model.decode(z, lower, bn="running", crop=False)
    assert whole.shape[-1] == c.image_size
    assert torch.equal(model.vae.crop_images(whole), images)


def test_decode_with_batch_statistics_changes_no_buffer():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.decode(rand(3, *model.latent_shape), bn="batch")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_noise_of_the_lower_scales():
    model = tiny("tiny-multiscale")
    assert model.lower_shapes == [(3, 32, 32)] * 2
    z = rand(2, *model.latent_shape)
    a, b, other = (model.decode(z, bn="running", seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.allclose(a, other, atol=1e-4)
    drawn = [random.normal(1, range(2), "lower", s, substream=i) for i, s in enumerate(model.lower_shapes)]
    assert torch.equal(model.decode(z, drawn, bn="running"), a)
    zero = [torch.zeros_like(e) for e in drawn]
    noise = rand(2, *model.latent_shape)
    cold = model.sample(2, noise=noise, vae_temperature=0.0, bn="running")
    latent, _ = model.sample_latents(2, noise=noise)
    torch.testing.assert_close(cold, model.decode(latent, zero, bn="running"))
    injected = model.sample(2, noise=noise, lower_noise=drawn, bn="running")
    torch.testing.assert_close(injected, model.decode(latent, drawn, bn="running"))


def test_shape_errors():
    model = tiny("tiny-multiscale")
    z, (first, second) = rand(2, 6, 16, 16), [rand(2, 3, 32, 32)] * 2
    with pytest.raises(ValueError, match=r"expected latents \(N, 6, 16, 16\), got \(2, 6, 8, 8\)"):
        model.decode(rand(2, 6, 8, 8))
    with pytest.raises(ValueError, match=r"expected latents"):
        model.decode(z[0])
    for wrong in ([first], [first, second[:1]], [first, second[:, :2]], [first, second, first]):
        with pytest.raises(ValueError, match=r"lower_noise of shapes \[\(2, 3, 32, 32\), \(2, 3, 32, 32\)\]"):
            model.decode(z, wrong)
        with pytest.raises(ValueError, match=r"expected lower_noise \[\(2, 3, 32, 32\)"):
            model.sample(2, lower_noise=wrong)
    with pytest.raises(ValueError, match=r"expected noise \(2, 6, 16, 16\), got \(3, 6, 16, 16\)"):
        model.sample(2, noise=rand(3, 6, 16, 16))
    with pytest.raises(ValueError, match=r"expected noise \(2, 6, 16, 16\)"):
        model.sample_latents(2, noise=rand(2, 6, 8, 8))
    with pytest.raises(ValueError, match=r"expected noise of shapes \[\(1, 3, 16, 16\)"):
        model.encode(torch.rand(1, 3, 64, 64), noise=[rand(1, 3, 16, 16)])


def test_decode_splits_when_memory_runs_out(monkeypatch, caplog):
    model = tiny("tiny-multiscale")
    z = rand(8, *model.latent_shape)
    lower = [rand(8, *s, seed=i) for i, s in enumerate(model.lower_shapes)]
    expected = model.decode(z, lower, bn="running")
    decode, sizes = model.vae.decode, []

    def limited(z, **options):
        sizes.append(len(z))
        if len(z) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return decode(z, **options)

    monkeypatch.setattr(model.vae, "decode", limited)
    with caplog.at_level("WARNING", logger="lsgm_fast"):
        images = model.decode(z, lower, bn="running")
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    # Other batch sizes may take other convolution algorithms.
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert "out of memory while decoding 8 images: decoding 4 at a time" in caplog.text
    sizes.clear()
    assert model.sample(5, bn="running").shape[0] == 5
    assert max(sizes) == 5
    # Batch statistics must see the whole batch.
    with pytest.raises(torch.OutOfMemoryError):
        model.decode(z, lower, bn="batch")

    def never(z, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model.vae, "decode", never)
    with pytest.raises(torch.OutOfMemoryError):
        model.decode(z, lower, bn="running")


def test_nan_in_the_decoder_is_named(monkeypatch):
    model = tiny()
    z = rand(2, *model.latent_shape)
    bad = z.clone()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="decoder produced NaN or infinity .from its input"):
        model.decode(bad)
    with torch.no_grad():
        model.vae.output.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="from its own activations"):
        model.decode(z)


# -- sampling --------------------------------------------------------------------------------------------------------


def test_seeds():
    model = tiny()
    a, b = model.sample(3, seed=5), model.sample(3, seed=5)
    assert torch.equal(a, b)
    assert not torch.allclose(a, model.sample(3, seed=6), atol=1e-3)
    assert not torch.allclose(a[0], a[1], atol=1e-3)
    assert torch.equal(model.sample(1, seed=0), model.sample(1))
    assert not torch.equal(model.sample(1, seed=2**64 - 1), model.sample(1, seed=2**32 - 1))


def test_a_seed_is_the_same_noise_injected():
    model = tiny()
    noise = random.normal(3, range(2), "prior", model.latent_shape)
    assert torch.equal(model.sample(2, seed=3), model.sample(2, noise=noise, seed=8))


def test_splitting_a_request_gives_the_same_images():
    """The draws are the same; one step size serves a batch, so the solutions agree to the solver's tolerance: 1e-4 per
    step and some ten steps, and the slope of an image in its latent is of order one."""
    model = tiny()
    options = {"seed": 4, "tol": 1e-4, "ode_eps": 1e-2}
    whole = model.sample(5, **options)
    for batch_size in (1, 3):
        parts = model.sample(5, batch_size=batch_size, **options)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-3)
    torch.testing.assert_close(model.sample(3, **options), whole[:3], rtol=0, atol=1e-3)
    assert (whole[0] - whole[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["tiny-binary", "tiny-multiscale"])
def test_splitting_ancestral_sampling(name):
    """No decision spans the batch: only the rounding of the convolutions differs. Lower scales included."""
    model = tiny(name)
    options = {"seed": 4, "solver": "ancestral", "evaluations": 4, "bn": "running"}
    whole = model.sample(5, **options)
    torch.testing.assert_close(model.sample(5, batch_size=2, **options), whole, rtol=0, atol=1e-4)


def test_the_first_index_continues_a_request():
    model = tiny()
    whole, _ = model.sample_latents(4, seed=1, solver="ancestral", evaluations=3)
    rest, _ = model.sample_latents(2, seed=1, first_index=2, solver="ancestral", evaluations=3)
    torch.testing.assert_close(rest, whole[2:], rtol=1e-4, atol=1e-4)


def test_recipe_and_overrides():
    model = tiny()
    for solver, first, per_step in (("rk45", 2, 6), ("auto", 1, 1)):
        _, recipe = model.sample_latents(2, solver=solver)
        stated = {"tol": model.sampling.tol, "ode_eps": model.sampling.ode_eps}
        _, same = model.sample_latents(2, solver=solver, **stated)
        _, fine = model.sample_latents(2, solver=solver, tol=1e-4)
        assert recipe.nfe == same.nfe == first + per_step * (recipe.steps + recipe.rejected)
        assert fine.nfe > recipe.nfe
        assert (recipe.solver, bool(recipe.reason)) == (
            ("rk45", False) if per_step == 6 else ("exponential", True)
        )
    _, info = model.sample_latents(2, solver="ancestral", evaluations=7)
    assert (info.nfe, info.steps, info.solver) == (7, 7, "ancestral")


def test_solvers_agree():
    model = tiny()
    noise = rand(2, *model.latent_shape)
    options = {"noise": noise, "tol": 1e-4, "ode_eps": 1e-2}
    solutions = {s: model.sample_latents(2, solver=s, **options) for s in ("rk45", "scipy", "dopri5")}
    reference = solutions["rk45"][0]
    assert not torch.allclose(reference, noise, atol=1e-3)
    for z, _ in solutions.values():
        assert z.dtype == torch.float32
        assert relative(z, reference) < 5e-3
    # The published path takes the same steps: SciPy's, once per evaluation.
    coarse = [model.sample_latents(2, solver=s, noise=noise, tol=1e-2)[1].nfe for s in ("rk45", "scipy")]
    assert coarse[0] == coarse[1]


def test_the_published_path_uses_the_published_formulas(monkeypatch):
    model = tiny()
    seen = []

    def spy(term, *args, **kwargs):
        seen.append(term.sde.parity)
        return solve_ode(term, *args, **kwargs)

    monkeypatch.setattr("lsgm_fast.sampling.driver.solve_ode", spy)
    model.sample_latents(1, solver="scipy")
    model.sample_latents(1, solver="rk45")
    assert seen == ["published", "exact"]


def test_sampling_keeps_no_graph_and_no_mode():
    model = tiny().train()
    model.vae.eval()
    images = model.sample(1)
    assert not images.requires_grad
    assert model.prior.training
    assert not model.vae.training


def test_sampling_under_autocast():
    model = tiny()
    exact = model.sample(2, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = model.sample(2, seed=1)
    assert images.dtype == torch.float32
    assert (images - exact).abs().max() < 0.1


def test_sampling_in_double_precision():
    model = tiny()
    exact = model.sample(2, seed=1, tol=1e-3)
    double = copy.deepcopy(model).double()
    images = double.sample(2, seed=1, tol=1e-3)
    assert images.dtype == torch.float32
    assert (images - exact).abs().max() < 1e-3


def test_a_deep_copy_is_independent():
    model = tiny()
    twin = copy.deepcopy(model)
    expected = model.sample(1)
    assert torch.equal(twin.sample(1), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model.sample(1), expected)
    assert not torch.allclose(twin.sample(1), expected, atol=1e-3)


# -- likelihood ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_nelbo_parts(name):
    model = tiny(name)
    c = model.config.vae
    x = torch.rand(2, c.image_channels, c.image_size - 2 * c.crop, c.image_size - 2 * c.crop)
    if c.decoder_distribution == "bernoulli":
        x = (x > 0.5).float()
    noise = [rand(2, *s, seed=i) for i, s in enumerate(model.vae.group_shapes)]
    with torch.no_grad():
        nelbo = model.nelbo(x, noise=noise)
        groups = model.encode(x, noise)
        logits = model.vae.logits(
            model.vae.merge_groups([g.eps for g in groups]), [g.eps for g in groups[c.groups_per_scale :]]
        )
    total = nelbo.reconstruction + nelbo.log_q + nelbo.cross_entropy_prior + nelbo.cross_entropy_lower
    torch.testing.assert_close(nelbo.total, total)
    log_q = sum(g.log_q.double().flatten(1).sum(dim=1) for g in groups)
    torch.testing.assert_close(nelbo.log_q.double(), log_q, rtol=1e-5, atol=1e-2)
    standard = torch.distributions.Normal(0.0, 1.0)
    lower = torch.zeros(2, dtype=torch.float64)
    for group in groups[c.groups_per_scale :]:
        lower -= standard.log_prob(group.eps.double()).flatten(1).sum(dim=1)
    torch.testing.assert_close(nelbo.cross_entropy_lower.double(), lower, rtol=1e-5, atol=1e-3)
    target = model.vae.preprocess_images(x)
    log_prob = model.vae.crop_images(model.vae.output_distribution(logits).log_prob(target))
    assert log_prob.shape[-1] == c.image_size - 2 * c.crop
    torch.testing.assert_close(nelbo.reconstruction, -log_prob.flatten(1).sum(dim=1), rtol=1e-4, atol=1e-2)


def zero_network(name):
    """eps_theta = 0 and a ~ 0: the prior that is left is exactly N(0, I)."""
    model = tiny(name)
    with torch.no_grad():
        model.prior.mixing_logit.fill_(-60.0)
    return model


def cross_entropy_with_the_standard_normal(sde, z0):
    """What the bound of a pure-mixing prior integrates to, per image: with v0, v1 the variances at time_eps and 1,

    per element 1/2 [ln 2 pi + ln v1 + 1 + (z0^2 / (1 - s0) - 1) (v1 - v0)], which is -log N(z0; 0, 1) up to the
    truncation of the variances (r z_t - eps has the mean square v (1-v)/(1-s0) z0^2 + (1-v)^2, and
    dv = g^2 (1-v) dt).
    """
    v0, v1 = float(sde.var(sde.time_eps)), float(sde.var(1.0))
    z2 = z0.double().square() / (1.0 - sde.sigma2_0)
    return 0.5 * (math.log(2 * math.pi) + math.log(v1) + 1 + (z2 - 1) * (v1 - v0)).flatten(1).sum(dim=1)


@pytest.mark.parametrize(
    ("name", "mode"),
    # Not with uniform times for the geometric SDE, whose variance rises in a sliver of t.
    [("tiny-binary", "ll_iw"), ("tiny-binary", "ll_uniform"), ("tiny-multiscale", "ll_iw")],
)
def test_cross_entropy_of_a_standard_normal_prior(name, mode):
    """The integrand is quadratic in the noise, so noise +-1 averages exactly, and Gauss-Legendre nodes integrate
    over rho: the estimate must equal the closed form up to rounding and quadrature."""
    model = zero_network(name)
    c = model.config.vae
    nodes = 12 if mode == "ll_iw" else 64
    points, weights = np.polynomial.legendre.leggauss(nodes)
    rho = torch.tensor((points + 1) / 2).float().repeat(2)
    weights = torch.tensor(weights / 2).repeat(2) / 2
    n = 2 * nodes
    sign = torch.ones(n, 1, 1, 1)
    sign[nodes:] = -1.0
    x = torch.rand(1, c.image_channels, c.image_size - 2 * c.crop, c.image_size - 2 * c.crop)
    noise = [rand(1, *s, seed=i).expand(n, *s) for i, s in enumerate(model.vae.group_shapes)]
    chunks = [slice(i, i + 8) for i in range(0, n, 8)]
    with torch.no_grad():
        groups = model.encode(x, [e[:1] for e in noise])
        prior = torch.cat(
            [
                model.nelbo(
                    x.expand(len(rho[part]), -1, -1, -1),
                    noise=[e[part] for e in noise],
                    diffusion_noise=sign[part].expand(-1, *model.latent_shape),
                    rho=rho[part],
                    iw_mode=mode,
                ).cross_entropy_prior.double()
                for part in chunks
            ]
        )
    z0 = model.vae.merge_groups([g.eps for g in groups])
    elements = z0.numel()
    if mode == "ll_uniform":
        # As published, the uniform mode leaves out the factor 1 - time_eps of the integral over [time_eps, 1].
        const = elements * float(model.sde.cross_entropy_const(model.sde.time_eps))
        prior = (prior - const) * (1 - model.sde.time_eps) + const
    got = float((prior * weights).sum())
    expected = float(cross_entropy_with_the_standard_normal(model.sde, z0))
    assert got == pytest.approx(expected, rel=1e-4)
    # And that is -log N(0, I) up to what the smallest and the largest variance, 0.002 and 0.99996, leave out.
    exact = float((0.5 * (z0.double().square() + math.log(2 * math.pi))).sum())
    assert expected == pytest.approx(exact, rel=0.005)


def test_cross_entropy_with_drawn_times_and_noise():
    """The same with the library's own draws: unbiased, so within five standard errors over 256 images."""
    model = zero_network("tiny-binary")
    n = 256
    x = torch.rand(1, 1, 28, 28).expand(n, 1, 28, 28)
    noise = [rand(1, *s, seed=i).expand(n, *s) for i, s in enumerate(model.vae.group_shapes)]
    with torch.no_grad():
        z0 = model.vae.merge_groups([g.eps for g in model.encode(x[:1], [e[:1] for e in noise])])
        prior = model.nelbo(x, noise=noise, seed=11).cross_entropy_prior.double()
    expected = float(cross_entropy_with_the_standard_normal(model.sde, z0))
    error = float(prior.std()) / math.sqrt(n)
    assert float(prior.mean()) == pytest.approx(expected, abs=5 * error)
    assert error < 0.01 * abs(expected)


def test_nelbo_draws():
    model = tiny()
    x = (torch.rand(2, 1, 28, 28) > 0.5).float()
    with torch.no_grad():
        a, b, other = (model.nelbo(x, seed=s).total for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_trained(name):
    model = tiny(name).train()
    model.requires_grad_(True)
    c = model.config.vae
    x = torch.rand(2, c.image_channels, c.image_size - 2 * c.crop, c.image_size - 2 * c.crop)
    model.nelbo(x).total.mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    counters = [v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert {int(v) for v in counters} == {1}


def test_a_vae_alone():
    config = PRESETS["tiny-binary"].replace(score=None)
    model = LSGM.from_config(config).eval()
    assert model.prior is None
    x = torch.rand(1, 1, 28, 28)
    groups = model.encode(x)
    assert model.decode(model.vae.merge_groups([g.eps for g in groups])).shape == x.shape
    for call in (
        lambda: model.sample(1),
        lambda: model.sample_latents(1),
        lambda: model.nelbo(x, prior="score"),
    ):
        with pytest.raises(ValueError, match="only a VAE .a stage-1 checkpoint.*encode.. and decode.. work"):
            call()


# -- torch.compile ---------------------------------------------------------------------------------------------------


COMPILED = {"fullgraph": True, "backend": "aot_eager"}


@pytest.mark.parametrize(
    ("name", "bn"),
    [
        ("tiny-rgb", "running"),
        ("tiny-binary", "batch"),
        ("tiny-multiscale", "running"),
        ("tiny-multiscale", "batch"),
    ],
)
def test_decode_compiles_without_graph_breaks(name, bn):
    torch._dynamo.reset()
    model = tiny(name)
    z = rand(2, *model.latent_shape)
    lower = [rand(2, *s, seed=i) for i, s in enumerate(model.lower_shapes)]
    decode = torch.compile(lambda z, e: model.vae.decode(z, lower_noise=e, bn=bn), **COMPILED)
    with torch.no_grad():
        expected = model.vae.decode(z, lower_noise=lower, bn=bn)
        torch.testing.assert_close(decode(z, lower), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["tiny-rgb", "tiny-binary"])
def test_score_network_compiles_without_graph_breaks(name):
    """With FIR resampling and attention, and with neither."""
    torch._dynamo.reset()
    model = tiny(name)
    z, t = rand(2, *model.latent_shape), torch.tensor([0.3, 0.7])
    network = torch.compile(model.prior, **COMPILED)
    with torch.no_grad():
        torch.testing.assert_close(network(z, t), model.prior(z, t), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_model_samples():
    torch._dynamo.reset()
    model = tiny()
    noise = rand(2, *model.latent_shape)
    expected = model.sample(2, noise=noise)
    model.prior = torch.compile(model.prior, **COMPILED)
    assert model.mixing_logit is not None
    torch.testing.assert_close(model.sample(2, noise=noise), expected, rtol=0, atol=1e-3)
    torch._dynamo.reset()


def test_building_is_random_and_reproducible():
    torch.manual_seed(1)
    a = lsgm_fast.build("tiny-rgb")
    torch.manual_seed(1)
    b = lsgm_fast.build("tiny-rgb")
    c = lsgm_fast.build("tiny-rgb")
    states = [m.state_dict() for m in (a, b, c)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
    assert not a.training
    assert isinstance(a.vae, NVAE)
    assert isinstance(a.prior, NCSNpp)
