"""The bound of a data set: its parts, both estimates of the prior's part, errors, pairs, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from gaussian import DATA_VARIANCE, LOGIT, SDES, gaussian_term, variance
from scipy import stats
from torch import nn

import lsgm_fast
from lsgm_fast import cli, data, random
from lsgm_fast.config import LSGMConfig, SamplingConfig, ScoreConfig, VAEConfig
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.evaluation import Estimate, NelboReport, compare, evaluate_nelbo, out_of_distribution
from lsgm_fast.models import LSGM, NVAE
from lsgm_fast.sde import build_sde

# Latents of 3 channels, 4x4, as the mixing logit of tests/gaussian.py has.
CONFIG = VAEConfig(
    image_channels=1,
    image_size=8,
    crop=1,
    encoder_channels=8,
    decoder_channels=8,
    groups_per_scale=3,
    latents_per_group=1,
    encoder_cells_per_group=1,
    decoder_cells_per_group=1,
    decoder_distribution="bernoulli",
)
TWO_SCALES = CONFIG.replace(channel_mult=(1, 2, 2), latent_scales=2)
STANDARD = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)


class Prior(nn.Module):
    """Predicts ``r z + m tanh(z + t)``: near t = 1, where all data are normal, that is the mixing, as what a network
    learns. With the mixing logit -60, nothing but the mixing is left."""

    def __init__(self, name="vpsde", logit=LOGIT):
        super().__init__()
        self.sde = build_sde(SDES[name])
        self.register_buffer("mixing_logit", logit)

    def forward(self, z, t):
        t = t.reshape(-1, 1, 1, 1)
        return self.sde.mixed_r(t) * z + self.sde.mean_coef(t) * torch.tanh(z + t)


class Exact(nn.Module):
    """The network that makes the mixed prediction that of N(0, DATA_VARIANCE)."""

    def __init__(self, sde):
        super().__init__()
        self.term = gaussian_term(sde)
        self.register_buffer("mixing_logit", LOGIT)

    def forward(self, z, t):
        return self.term.predict(z, t)


def vae(config=CONFIG):
    torch.manual_seed(0)
    model = NVAE(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # many are 0 or next to it
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def model_of(prior, name="vpsde", config=CONFIG, **options):
    return LSGM(vae(config), prior, build_sde(SDES[name]), **options).eval()


def binary_images(n, size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 1, size, size, generator=generator, dtype=torch.float64) < 0.4).double()


def split(images, size):
    return [images[i : i + size] for i in range(0, len(images), size)]


def posterior_noise(model, n, seed=0, draw=0):
    """What the evaluation draws for image 0 ... n - 1."""
    shapes = model.vae.group_shapes
    return [
        random.normal(seed, range(n), "posterior", s, dtype=torch.float64, substream=draw * len(shapes) + i)
        for i, s in enumerate(shapes)
    ]


def by_hand(model, images, noise):
    """(reconstruction, log q per group (N, G), groups), from the encoder, the decoder and the densities."""
    with torch.no_grad():
        groups = model.encode(images, noise)
        eps = [g.eps for g in groups]
        covered = model.vae.config.groups_per_scale
        logits = model.vae.logits(torch.cat(eps[:covered], dim=1), eps[covered:])
    pixels = torch.distributions.Bernoulli(logits=logits[..., 1:-1, 1:-1]).log_prob(images)
    log_q = torch.stack([g.log_q.flatten(1).sum(dim=1) for g in groups], dim=1)
    return -pixels.flatten(1).sum(dim=1), log_q, eps


# -- the bound of one batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, TWO_SCALES], ids=["one scale", "two scales"])
@pytest.mark.parametrize("prior", [None, "normal"])
def test_a_normal_prior_by_hand(config, prior):
    """A VAE alone has it by default; a model with another one on request."""
    model = model_of(None if prior is None else Prior(), config=config)
    images = binary_images(3)
    noise = posterior_noise(model, 3)
    with torch.no_grad():
        got = model.nelbo(images, noise=noise, prior=prior)
    reconstruction, log_q, eps = by_hand(model, images, noise)
    cross = torch.stack([-STANDARD.log_prob(e).flatten(1).sum(dim=1) for e in eps], dim=1)
    torch.testing.assert_close(got.reconstruction, reconstruction)
    torch.testing.assert_close(got.kl_groups, log_q + cross)
    torch.testing.assert_close(got.kl_scales, (log_q + cross).reshape(3, -1, 3).sum(dim=2))
    torch.testing.assert_close(got.cross_entropy_prior, cross[:, :3].sum(dim=1))
    torch.testing.assert_close(got.cross_entropy_lower, cross[:, 3:].sum(dim=1))
    torch.testing.assert_close(got.total, reconstruction + (log_q + cross).sum(dim=1))


@pytest.mark.parametrize("config", [CONFIG, TWO_SCALES], ids=["one scale", "two scales"])
def test_the_parts_by_group(config):
    """With the score-based prior they add up; which channels are a group's shows a prior that counts channels."""
    model = model_of(Prior(), config=config)
    images = binary_images(2)
    with torch.no_grad():
        score = model.nelbo(images)
        counted = model.nelbo(
            images, prior=lambda z: torch.ones_like(z) * torch.arange(1.0, 4.0)[:, None, None]
        )
        whole = model.nelbo(images, prior=lambda z: torch.arange(2.0, dtype=z.dtype))
    for got in (score, counted):
        expected = got.log_q + got.cross_entropy_prior + got.cross_entropy_lower
        torch.testing.assert_close(got.kl_groups.sum(dim=1), expected)
        torch.testing.assert_close(got.kl_scales.sum(dim=1), expected)
    assert score.kl_groups.shape == (2, 3 * config.latent_scales)
    _, log_q, _ = by_hand(model, images, posterior_noise(model, 2))
    elements = math.prod(model.latent_shape) // 3
    torch.testing.assert_close(
        counted.kl_groups[:, :3] - log_q[:, :3], elements * torch.tensor([[1.0, 2.0, 3.0]] * 2).double()
    )
    assert whole.kl_groups is None
    torch.testing.assert_close(whole.cross_entropy_prior, torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(whole.kl_scales[:, 0], log_q[:, :3].sum(dim=1) + whole.cross_entropy_prior)
    torch.testing.assert_close(whole.total - whole.reconstruction, whole.kl_scales.sum(dim=1))


def test_priors_that_do_not_fit():
    alone = model_of(None)
    images = binary_images(2)
    with pytest.raises(ValueError, match="only a VAE .a stage-1 checkpoint.*prior='normal'"):
        alone.nelbo(images, prior="score")
    with pytest.raises(ValueError, match="unknown prior 'nromal'.*did you mean 'normal'"):
        alone.nelbo(images, prior="nromal")
    with pytest.raises(ValueError, match=r"per image \(2,\) or per element \(2, 3, 4, 4\), got \(2, 3\)"):
        alone.nelbo(images, prior=lambda z: z.flatten(2).sum(dim=2))


def test_a_time_eps_that_does_not_fit():
    model = model_of(Prior())
    for wrong in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"time_eps must be in \[0, 1\)"):
            model.nelbo(binary_images(1), time_eps=wrong)
    with pytest.raises(ValueError, match=r"zero variance at time_eps=0.0"):
        model.nelbo(binary_images(1), time_eps=0.0)
    with pytest.raises(ValueError, match="needs iw_mode='ll_iw', got 'll_uniform'"):
        model.nelbo(binary_images(1), iw_mode="ll_uniform", control_variate=True)


@pytest.mark.parametrize("time_eps", [None, 0.2])
@pytest.mark.parametrize("name", SDES)
def test_the_control_variate_changes_no_mean(name, time_eps):
    """The estimate of the normal prior is quadratic in the noise, so noise +-1 averages it exactly, and Gauss-Legendre
    nodes integrate it over rho: what the control variate takes away and puts back must be equal then, whatever the
    network. Where only the mixing is left, one draw has no variance at all."""
    points, weights = np.polynomial.legendre.leggauss(40)
    rho = torch.tensor((points + 1) / 2).repeat(2)
    weights = torch.tensor(weights / 4).repeat(2)
    sign = torch.ones(80, *(1,) * 3, dtype=torch.float64)
    sign[40:] = -1.0
    for prior in (Prior(name), Prior(name, torch.full_like(LOGIT, -60.0))):
        model = model_of(prior, name)
        images = binary_images(1).expand(80, -1, -1, -1)
        options = {
            "noise": [e.expand(80, -1, -1, -1) for e in posterior_noise(model, 1)],
            "diffusion_noise": sign.expand(80, *model.latent_shape),
            "rho": rho,
            "iw_mode": "ll_iw",
            "time_eps": time_eps,
        }
        with torch.no_grad():
            plain = model.nelbo(images, **options).cross_entropy_prior
            controlled = model.nelbo(images, **options, control_variate=True).cross_entropy_prior
        assert float((controlled * weights).sum()) == pytest.approx(float((plain * weights).sum()), rel=1e-7)
        assert float(plain.std()) > 1.0
    assert float(controlled.std()) < 1e-8


def test_the_bound_starts_at_time_eps():
    """Of N(0, I) as the prior, per element 1/2 [ln 2 pi v1 + 1 + (z0^2 - 1) (v1 - v0)], v0 the variance there."""
    model = model_of(Prior(logit=torch.full_like(LOGIT, -60.0)))
    images = binary_images(2)
    with torch.no_grad():
        z0 = torch.cat([g.eps for g in model.encode(images)], dim=1)
        for time_eps in (0.01, 0.3):
            got = model.nelbo(images, time_eps=time_eps, control_variate=True).cross_entropy_prior
            v0, v1 = float(model.sde.var(time_eps)), float(model.sde.var(1.0))
            expected = 0.5 * (math.log(2 * math.pi * v1) + 1 + (z0.square() - 1) * (v1 - v0))
            torch.testing.assert_close(got, expected.flatten(1).sum(dim=1))


# -- a data set ------------------------------------------------------------------------------------------------------


def test_every_part_of_the_report():
    model = model_of(None, config=TWO_SCALES)
    images = binary_images(7)
    report = evaluate_nelbo(model, split(images, 3), draws=2)
    mean = 0.0
    totals = []
    for draw in range(2):
        reconstruction, log_q, eps = by_hand(model, images, posterior_noise(model, 7, draw=draw))
        cross = torch.stack([-STANDARD.log_prob(e).flatten(1).sum(dim=1) for e in eps], dim=1)
        total = reconstruction + (log_q + cross).sum(dim=1)
        totals.append(total)
        parts = (total[:, None], reconstruction[:, None], log_q.sum(dim=1)[:, None], log_q + cross, cross)
        mean = mean + 0.5 * torch.cat(parts, dim=1)
    nelbo, reconstruction, log_q = mean[:, 0], mean[:, 1], mean[:, 2]
    kl, cross = mean[:, 3:9], mean[:, 9:15]
    torch.testing.assert_close(report.values, nelbo)

    def agrees(estimate, values):
        assert estimate.mean == pytest.approx(float(values.mean()))
        assert estimate.standard_error == pytest.approx(float(stats.sem(values.numpy())))

    agrees(report.nelbo, nelbo)
    agrees(report.reconstruction, reconstruction)
    agrees(report.log_q, log_q)
    agrees(report.kl, kl.sum(dim=1))
    agrees(report.cross_entropy_prior, cross[:, :3].sum(dim=1))
    agrees(report.cross_entropy_lower, cross[:, 3:].sum(dim=1))
    assert len(report.kl_groups) == 6 and len(report.kl_scales) == 2
    for i, estimate in enumerate(report.kl_groups):
        agrees(estimate, kl[:, i])
    for i, estimate in enumerate(report.kl_scales):
        agrees(estimate, kl[:, 3 * i : 3 * i + 3].sum(dim=1))
    agrees(report.bits_per_dim, nelbo / (36 * math.log(2)))  # 6x6: the padded border is no data
    assert report.dims == 36
    spread = torch.stack(totals).var(dim=0).mean().sqrt()
    assert report.draw_std == pytest.approx(float(spread))
    assert (report.images, report.draws, report.prior, report.method, report.nfe) == (7, 2, "normal", None, 0)
    assert report.seconds > 0
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["nelbo"] == {"mean": report.nelbo.mean, "standard_error": report.nelbo.standard_error}
    assert len(plain["kl_groups"]) == 6 and "values" not in plain


def test_the_diffusion_estimate_is_the_models():
    """The mean of what the model itself gives for the same draws; the times are stratified over an image's draws."""
    model = model_of(Prior())
    images = binary_images(5)
    seen = []
    original = model.nelbo

    def recorded(x, **options):
        seen.append(options)
        return original(x, **options)

    model.nelbo = recorded
    report = evaluate_nelbo(model, [images], draws=4)
    with torch.no_grad():
        again = torch.stack([original(images, **options).total for options in seen])
    torch.testing.assert_close(report.values, again.mean(dim=0))
    assert (report.nfe, report.method, report.t_start, report.tol) == (1, "diffusion", 0.01, None)
    rho = torch.stack([options["rho"] for options in seen])
    assert (rho * 4).floor().T.tolist() == [[0.0, 1.0, 2.0, 3.0]] * 5
    offsets = rho * 4 - (rho * 4).floor()
    assert len(offsets.unique()) == 20
    noises = torch.stack([options["diffusion_noise"] for options in seen]).flatten(2)
    assert torch.equal(noises[:, 1], random_diffusion(range(1, 2), model, 4))
    for draw, options in enumerate(seen):
        for got, expected in zip(options["noise"], posterior_noise(model, 5, draw=draw), strict=True):
            assert torch.equal(got, expected)


def random_diffusion(indices, model, draws):
    return torch.cat(
        [
            random.normal(0, indices, "diffusion", model.latent_shape, dtype=torch.float64, substream=k)
            for k in range(draws)
        ]
    ).flatten(1)


@pytest.mark.parametrize("name", SDES)
def test_the_ode_of_a_gaussian_prior(name):
    """-log p(z0) in closed form: the data's density at t_start, but for the model's prior in place of that at t = 1."""
    sampling = SamplingConfig(ode_eps=1e-4, tol=1e-8)
    model = model_of(Exact(build_sde(SDES[name])), name, sampling=sampling)
    images = binary_images(4)
    report = evaluate_nelbo(model, split(images, 3), method="ode")
    reconstruction, log_q, eps = by_hand(model, images, posterior_noise(model, 4))
    z0 = torch.cat(eps, dim=1)

    def log_normal(z, v):
        return (
            torch.distributions.Normal(torch.zeros((), dtype=z.dtype), math.sqrt(v))
            .log_prob(z)
            .flatten(1)
            .sum(1)
        )

    start, end = float(variance(model.sde, 1e-4)), float(variance(model.sde, 1.0))
    z1 = z0 * math.sqrt(end / start)
    log_p = log_normal(z0, start) - log_normal(z1, end) + log_normal(z1, model.sde.prior_std**2)
    torch.testing.assert_close(report.values, reconstruction + log_q.sum(dim=1) - log_p, rtol=1e-6, atol=1e-5)
    assert report.kl_groups is None
    assert report.kl_scales[0].mean == pytest.approx(float((log_q.sum(dim=1) - log_p).mean()), rel=1e-5)
    assert (report.method, report.t_start, report.tol) == ("ode", 1e-4, 1e-8)
    assert report.nfe > 20


def test_both_estimates_of_an_exact_prior_agree():
    """For the data's own score the bound of Theorem 1 is tight, up to where it starts."""
    sde = build_sde(SDES["vpsde"])
    model = model_of(Exact(sde))
    batches = split(binary_images(8), 8)
    ode = evaluate_nelbo(model, batches, method="ode", tol=1e-6)
    bound = evaluate_nelbo(model, batches, draws=200, time_eps=1e-4)
    z0 = torch.cat(by_hand(model, batches[0], posterior_noise(model, 8))[2], dim=1)
    log_p = torch.distributions.Normal(0.0, math.sqrt(DATA_VARIANCE)).log_prob(z0).flatten(1).sum(dim=1)
    # Not the same posterior draws: ode has the first of 200, so only the mean of the prior's part is compared.
    difference = bound.cross_entropy_prior.mean - ode.cross_entropy_prior.mean
    noise = bound.draw_std / math.sqrt(200 * 8) + ode.cross_entropy_prior.standard_error
    assert abs(difference) < 3 * noise
    assert ode.cross_entropy_prior.mean == pytest.approx(-float(log_p.mean()), rel=1e-3)


def test_draws_reduce_the_spread():
    model = model_of(Prior())
    batches = [binary_images(4)]

    def spread(draws):
        values = [evaluate_nelbo(model, batches, draws=draws, seed=seed).values for seed in range(12)]
        return float(torch.stack(values).var(dim=0).mean().sqrt())

    one, many = spread(1), spread(16)
    assert many < 0.4 * one  # 1/4 without stratification; 12 seeds know it to about a fifth
    report = evaluate_nelbo(model, batches, draws=64)
    assert report.draw_std == pytest.approx(one, rel=0.5)
    assert evaluate_nelbo(model, batches).draw_std is None


@pytest.mark.parametrize(("method", "tolerance"), [("diffusion", 1e-9), ("ode", 1e-4)])
def test_the_seed_alone_decides(method, tolerance):
    """Whatever the batches; the ODE's step sizes are a batch's, so its values move within the tolerance."""
    model = model_of(Prior(), sampling=SamplingConfig(ode_eps=1e-3, tol=1e-7))
    images = binary_images(5)
    first = evaluate_nelbo(model, [images], method=method, draws=2, seed=3)
    again = evaluate_nelbo(model, [images], method=method, draws=2, seed=3)
    assert torch.equal(first.values, again.values)
    assert first.nelbo == again.nelbo
    small = evaluate_nelbo(model, split(images, 2), method=method, draws=2, seed=3)
    torch.testing.assert_close(small.values, first.values, rtol=0, atol=tolerance)
    other = evaluate_nelbo(model, [images], method=method, draws=2, seed=4)
    assert float((other.values - first.values).abs().min()) > 1e-2
    twice = evaluate_nelbo(model, [torch.cat((images[:1], images[:1]))], method=method)
    assert abs(float(twice.values.diff())) > 1e-2


def test_probes_differ_between_draws(monkeypatch):
    """The trace's probes of the draws must be independent, or their mean would keep one draw's error."""
    from lsgm_fast.evaluation import nelbo

    seen = []
    original = nelbo.log_prior

    def recorded(term, z0, **options):
        seen.append((options["seed"], options["first_index"]))
        return original(term, z0, **options)

    monkeypatch.setattr(nelbo, "log_prior", recorded)
    model = model_of(Prior(), sampling=SamplingConfig(ode_eps=1e-2, tol=1e-2))
    evaluate_nelbo(model, split(binary_images(3), 2), method="ode", draws=3, seed=2**64 - 1)
    assert [first for _, first in seen] == [0, 0, 0, 2, 2, 2]
    seeds = [seed for seed, _ in seen]
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3 and seeds[0] == 2**64 - 1


def test_modes_and_gradients_are_left_alone():
    model = model_of(Prior())
    model.train()
    model.vae.decoder.eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    values = evaluate_nelbo(model, [binary_images(3)], draws=2).values
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters()) and not values.requires_grad
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(values, evaluate_nelbo(model.eval(), [binary_images(3)], draws=2).values)
    model.train()
    with pytest.raises(ValueError, match="expected images"):
        evaluate_nelbo(model, [torch.zeros(1, 1, 5, 5)])
    assert all(m.training for m in model.modules())


def test_batches_and_limits():
    model = model_of(None)
    images = binary_images(7)
    whole = evaluate_nelbo(model, [SimpleNamespace(images=b) for b in split(images, 3)])
    served = []

    def stream():
        for batch in (images[:3], images[:0], images[3:6], images[6:]):
            served.append(len(batch))
            yield batch

    first = evaluate_nelbo(model, stream(), limit=5)
    assert served == [3, 0, 3]
    torch.testing.assert_close(first.values, whole.values[:5])
    exact = evaluate_nelbo(model, [images], limit=7)
    assert exact.images == 7 and evaluate_nelbo(model, [images], limit=9).images == 7
    one = evaluate_nelbo(model, [images], limit=1)
    assert one.nelbo.standard_error is None
    assert one.to_dict()["nelbo"]["standard_error"] is None


def test_errors_of_the_evaluation():
    model = model_of(Prior())
    images = [binary_images(4)]
    for batches in ([], [images[0][:0]]):
        with pytest.raises(ValueError, match="no images to evaluate"):
            evaluate_nelbo(model, batches)
    with pytest.raises(ValueError, match="unknown method 'difusion'.*did you mean 'diffusion'"):
        evaluate_nelbo(model, images, method="difusion")
    with pytest.raises(ValueError, match="unknown prior 'scores'.*did you mean 'score'"):
        evaluate_nelbo(model, images, prior="scores")
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        evaluate_nelbo(model, images, draws=0)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        evaluate_nelbo(model, images, limit=0)
    for method in ("diffusion", "ode"):
        with pytest.raises(ValueError, match="only a VAE"):
            evaluate_nelbo(model_of(None), images, prior="score", method=method)

    class Own(nn.Module):
        latent_shape = (1, 2, 2)

        def decode(self, z, **options):
            return z

    with pytest.raises(TypeError, match="needs an NVAE, got Own"):
        evaluate_nelbo(LSGM(Own(), None, SDES["vpsde"]), images)

    class Breaks(Prior):
        def forward(self, z, t):
            prediction = super().forward(z, t)
            prediction[-1] = math.nan
            return prediction

    with pytest.raises(NonFiniteError, match="bound of image 1 is NaN"):
        evaluate_nelbo(model_of(Breaks()), split(images[0], 2))


# -- statistics ------------------------------------------------------------------------------------------------------


def test_the_standard_error_of_a_known_sample():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert estimate.mean == 2.5
    assert estimate.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)


def test_the_importance_weighted_bound():
    """By hand, tighter than the bound itself, and not below -log p(x), which quadrature would reach with more draws."""
    model = model_of(None)
    images = binary_images(6)
    report = evaluate_nelbo(model, split(images, 4), draws=5)
    logs = []
    for draw in range(5):
        reconstruction, log_q, eps = by_hand(model, images, posterior_noise(model, 6, draw=draw))
        cross = sum(-STANDARD.log_prob(e).flatten(1).sum(dim=1) for e in eps)
        logs.append(-(reconstruction + log_q.sum(dim=1) + cross))
    expected = -(torch.logsumexp(torch.stack(logs), dim=0) - math.log(5))
    assert report.importance_weighted.mean == pytest.approx(float(expected.mean()))
    assert report.importance_weighted.mean < report.nelbo.mean
    more = evaluate_nelbo(model, [images], draws=100)
    assert more.importance_weighted.mean < report.importance_weighted.mean
    assert evaluate_nelbo(model, [images]).importance_weighted is None


def test_the_importance_weighted_bound_with_the_ode_and_the_spread_of_its_probes():
    sde = build_sde(SDES["vpsde"])
    model = model_of(Exact(sde), sampling=SamplingConfig(ode_eps=1e-3, tol=1e-6))
    images = binary_images(4)
    report = evaluate_nelbo(model, [images], method="ode", draws=3, measure_probes=True)
    assert report.importance_weighted.mean < report.nelbo.mean
    # The exact score's Jacobian is diagonal, where Rademacher probes have no spread.
    assert report.probe_std < 1e-3
    assert evaluate_nelbo(model, [images], method="ode").probe_std is None
    diffusion = evaluate_nelbo(model, [images], draws=3, measure_probes=True)
    assert diffusion.importance_weighted is None and diffusion.probe_std is None
    torch.manual_seed(0)
    mixed = model_of(Mixing(), sampling=SamplingConfig(ode_eps=1e-3, tol=1e-4))
    one = evaluate_nelbo(mixed, [images], method="ode", measure_probes=True)
    many = evaluate_nelbo(mixed, [images], method="ode", measure_probes=True, probes=16)
    assert one.probe_std > 0.01
    assert many.probe_std < 0.6 * one.probe_std


def test_the_probes_options_reach_the_trace(monkeypatch):
    from lsgm_fast.evaluation import nelbo

    seen = []
    chosen = {"solver", "probe", "probes", "fresh_probes", "trace_in_control"}
    original = nelbo.log_prior

    def recorded(term, z0, **options):
        seen.append({name: value for name, value in options.items() if name in chosen})
        return original(term, z0, **options)

    monkeypatch.setattr(nelbo, "log_prior", recorded)
    model = model_of(Prior(), sampling=SamplingConfig(ode_eps=1e-2, tol=1e-2))
    for trace, probes in (("published", 3), ("fixed", 2), ("fresh", 1)):
        options = {} if trace == "fresh" else {"trace": trace, "probes": probes}  # the default
        report = evaluate_nelbo(model, [binary_images(2)], method="ode", **options)
        assert (report.trace, report.probes) == (trace, probes)
    assert seen == [
        {"solver": "rk45", "probe": "gaussian", "probes": 3, "fresh_probes": True},
        {"solver": "rk45", "probes": 2},
        {"solver": "rk23", "probes": 1, "fresh_probes": True, "trace_in_control": False},
    ]
    none = evaluate_nelbo(model, [binary_images(2)])
    assert (none.trace, none.probes) == (None, None)
    with pytest.raises(ValueError, match="unknown trace 'fersh'.*did you mean 'fresh'"):
        evaluate_nelbo(model, [binary_images(2)], method="ode", trace="fersh")


@pytest.mark.parametrize("name", SDES)
def test_the_importance_weighted_bound_is_no_larger_than_the_likelihood(name):
    """Of one image log p(x) = log E exp(-NELBO): by many draws, with the densities of the ODE. The bound of K draws
    comes nearer from below as K grows, and never above by more than noise."""
    sde = build_sde(SDES[name])
    model = model_of(Exact(sde), name, sampling=SamplingConfig(ode_eps=1e-2, tol=1e-3))
    images = binary_images(1).expand(40, -1, -1, -1)
    # Copies of an image are evaluated with draws of their own: 40 independent bounds each.
    few, more = (evaluate_nelbo(model, [images], method="ode", draws=k, seed=k) for k in (2, 8))
    logs = []
    for seed in range(20):
        logs.append(-evaluate_nelbo(model, [images], method="ode", seed=100 + seed).values)
    weights = torch.cat(logs)
    log_p = float(torch.logsumexp(weights, dim=0)) - math.log(len(weights))
    noise = float((weights - log_p).exp().std()) / math.sqrt(len(weights))
    for report in (few, more):
        error = math.hypot(report.importance_weighted.standard_error, noise)
        assert -report.importance_weighted.mean < log_p + 3 * error
        assert report.importance_weighted.mean < report.nelbo.mean
    assert more.importance_weighted.mean < few.importance_weighted.mean


class Mixing(torch.nn.Module):
    """A network whose Jacobian is far from diagonal."""

    def __init__(self):
        super().__init__()
        self.mixing_logit = LOGIT
        self.weight = torch.nn.Parameter(torch.randn(48, 48, dtype=torch.float64) / 7.0)

    def forward(self, z, t):
        return torch.tanh(z.flatten(1) @ self.weight).reshape(z.shape)


def test_telling_foreign_images_apart():
    a, b = report_with([1.0, 2.0, 3.0]), report_with([2.0, 5.0])
    assert out_of_distribution(a, b).mean == pytest.approx((1 + 0.5 + 0 + 3) / 6)
    assert out_of_distribution(a, a).mean == pytest.approx(0.5)
    # By hand (DeLong et al. 1988): of the inside images 1, 3/4 and 1/2 of the outside ones lie above; of the outside
    # ones 1/2 and 1 of the inside ones below.
    expected = math.sqrt(np.var([1.0, 0.75, 0.5], ddof=1) / 3 + np.var([0.5, 1.0], ddof=1) / 2)
    assert out_of_distribution(a, b).standard_error == pytest.approx(expected)
    assert out_of_distribution(a, report_with([7.0, 8.0])) == Estimate(1.0, 0.0)
    assert out_of_distribution(a, report_with([2.5])).standard_error is None


def test_the_error_of_telling_apart_covers_the_truth():
    """For N(0, 1) and N(1, 1) the area is Phi(1 / sqrt 2): 95% of the intervals of 300 pairs of samples hold it."""
    truth, held = stats.norm.cdf(1 / math.sqrt(2)), 0
    template = report_with([0.0, 1.0])
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        inside, outside = (
            dataclasses.replace(template, values=torch.randn(n, generator=generator).double() + mean)
            for n, mean in ((40, 0.0), (60, 1.0))
        )
        found = out_of_distribution(inside, outside)
        held += abs(found.mean - truth) < 1.96 * found.standard_error
    assert 0.90 < held / 300 < 0.98


def report_with(values):
    model = model_of(None)
    report = evaluate_nelbo(model, [binary_images(len(values))])
    fields = {f: getattr(report, f) for f in report.__dataclass_fields__}
    return NelboReport(**{**fields, "values": torch.tensor(values, dtype=torch.float64)})


def test_paired_differences():
    a, b = report_with([10.0, 200.0, 3000.0, 5.0]), report_with([11.0, 202.0, 3000.5, 5.5])
    difference = compare(a, b)
    assert difference.mean == pytest.approx(-1.0)
    differences = [-1.0, -2.0, -0.5, -0.5]
    assert difference.standard_error == pytest.approx(stats.sem(differences))
    interval = stats.t.interval(0.95, 3, -1.0, stats.sem(differences))
    assert (difference.low, difference.high) == pytest.approx(interval)
    same = compare(a, a)
    assert (same.mean, same.standard_error, same.low, same.high, same.images) == (0.0, 0.0, 0.0, 0.0, 4)
    assert json.loads(json.dumps(same.to_dict()))["images"] == 4
    with pytest.raises(ValueError, match="the same images in the same order, got 4 and 3 images"):
        compare(a, report_with([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="at least 2 images"):
        compare(report_with([1.0]), report_with([1.0]))


def test_a_model_against_its_normal_prior():
    """The same seed gives both the same posterior draws: what differs is the prior's part alone."""
    model = model_of(Prior())
    batches = [binary_images(6)]
    score, normal = (evaluate_nelbo(model, batches, prior=p, seed=2) for p in ("score", "normal"))
    assert score.reconstruction == normal.reconstruction and score.log_q == normal.log_q
    prior_parts = score.cross_entropy_prior.mean - normal.cross_entropy_prior.mean
    assert compare(score, normal).mean == pytest.approx(prior_parts, rel=1e-9)
    again = evaluate_nelbo(model, batches, prior="score", seed=2)
    assert compare(score, again).standard_error == 0.0


# -- the command -----------------------------------------------------------------------------------------------------


class Grey:
    """Twelve grey images in memory."""

    name = "twelve greys"
    served: ClassVar[list[int]] = []
    labels = None

    def __init__(self, size):
        self.shape = (1, size, size)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.served.append(index)
        return np.random.default_rng(index).integers(0, 256, self.shape, dtype=np.uint8)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `evaluate` on a saved model and images in memory of the wanted size."""
    score = ScoreConfig(
        latent_channels=3, latent_size=4, channels=8, channel_mult=(1,), blocks_per_level=1, embedding_dim=8
    )
    torch.manual_seed(0)
    LSGM.from_config(LSGMConfig(CONFIG, score)).eval().save(tmp_path / "model.safetensors")
    LSGM.from_config(LSGMConfig(CONFIG, None)).eval().save(tmp_path / "vae.safetensors")
    monkeypatch.chdir(tmp_path)
    real, opened = data.open_data, []

    def open_data(config, split="train"):
        if split not in ("train", "held_out"):
            return real(config, split)
        opened.append((config, split))
        return Grey(9 if config.source == "wide" else config.size or 6)

    monkeypatch.setattr(data, "open_data", open_data)

    def call(*arguments):
        code = cli.main(["evaluate", *map(str, arguments), "--device", "cpu"])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, opened=opened)

    return call


def test_the_command_prints_one_json_object(command):
    result = command(
        "model.safetensors", "--prior", "both", "--draws", 2, "--batch-size", 5, "--json", "--seed", 7
    )
    assert result.code == 0, result.err
    assert result.err == "note: the model's pixels are binary: --binarise static\n"
    assert [(c.source, c.binarise, s) for c, s in result.opened] == [("digits", "static", "held_out")]
    got = json.loads(result.out)
    model = lsgm_fast.load("model.safetensors")
    config = data.DataConfig(binarise="static")
    batches = list(data.batches(Grey(6), config, batch_size=4, seed=0, train=False))
    score, normal = (evaluate_nelbo(model, batches, prior=p, draws=2, seed=7) for p in ("score", "normal"))
    for name, report in (("score", score), ("normal", normal)):
        assert got["reports"][name]["nelbo"]["mean"] == pytest.approx(report.nelbo.mean, rel=1e-4)
        assert got["reports"][name]["images"] == 12
    assert got["difference"]["mean"] == pytest.approx(compare(score, normal).mean, rel=1e-2, abs=1e-2)
    assert (got["model"], got["split"], got["data"]["binarise"]) == (
        "model.safetensors",
        "held_out",
        "static",
    )


def test_the_command_prints_a_table_and_writes_a_report(command, tmp_path):
    result = command(
        "model.safetensors", "--prior", "both", "-n", 4, "--split", "train", "--out", "new/report.json"
    )
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert Grey.served[-4:] == [0, 3, 6, 9]  # evenly spread
    assert result.opened[0][1] == written["split"] == "train"
    report, difference = written["reports"]["score"], written["difference"]
    assert "digits, train: 4 images" in result.out
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1] for line in result.out.splitlines() if "│" in line
    }
    assert [cell.strip() for cell in rows["NELBO"]] == [
        f"{r['nelbo']['mean']:.2f} +- {r['nelbo']['standard_error']:.2f}" for r in written["reports"].values()
    ]
    for name in ("bits per dimension", "reconstruction", "KL", "KL of group 0", "KL of group 2"):
        assert name in rows
    assert report["kl_groups"][1]["mean"] == pytest.approx(
        float(rows["KL of group 1"][0].split()[0]), abs=0.006
    )
    assert f"95% interval [{difference['low']:.2f}, {difference['high']:.2f}]" in result.out
    assert "report: new/report.json" in result.out


def test_the_command_on_a_vae_alone_and_with_the_ode(command):
    alone = command("vae.safetensors", "--binarise", "none", "-n", 1, "--json")
    assert alone.code == 0 and alone.err == ""
    got = json.loads(alone.out)
    assert list(got["reports"]) == ["normal"] and got["difference"] is None
    assert alone.opened[0][0].binarise == "none"
    ode = command("model.safetensors", "--method", "ode", "-n", 2, "-q", "--out", "ode.json")
    assert (ode.code, ode.out, ode.err) == (0, "", "")
    with open("ode.json") as file:
        report = json.load(file)["reports"]["score"]
    assert report["method"] == "ode" and report["kl_groups"] is None and report["images"] == 2


def test_the_command_with_probes_and_other_data(command, tmp_path):
    ode = ("model.safetensors", "--method", "ode", "-n", 3)
    result = command(*ode, "--probes", 2, "--measure-probes", "--outside", "other", "--out", "a.json")
    assert result.code == 0, result.err
    assert [(c.source, c.binarise, s) for c, s in result.opened] == [
        ("digits", "static", "held_out"),
        ("other", "static", "held_out"),
    ]
    record = json.loads((tmp_path / "a.json").read_text())
    report = record["reports"]["score"]
    assert (report["probes"], report["trace"]) == (2, "fresh")
    assert report["probe_std"] > 0.0
    assert re.search(rf"spread of the probes *│ *{report['probe_std']:.2f} ", result.out)
    assert "1 draw(s) per image, 2 fresh probe(s), NFE" in result.out
    other = record["outside"]
    assert other["data"]["source"] == "other" and other["reports"]["score"]["images"] == 3
    # The same images in both.
    assert other["out_of_distribution"]["score"]["mean"] == 0.5
    error = other["out_of_distribution"]["score"]["standard_error"]
    assert f"score: other, 3 images, NELBO {report['nelbo']['mean']:.2f}; " in result.out
    assert f"the larger of a pair with probability 0.5000 +- {error:.4f}" in result.out
    published = json.loads(command(*ode, "--trace", "published", "--json").out)
    assert (published["reports"]["score"]["probes"], published["reports"]["score"]["trace"]) == (
        1,
        "published",
    )
    assert published["outside"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.pt",), "nowhere.pt"),
        (("model.safetensors", "--size", 9), r"\(1, 9, 9\).*the model takes \(1, 6, 6\) or \(1, 8, 8\)"),
        (("model.safetensors", "--split", "heldout"), "unknown split 'heldout'.*did you mean 'held_out'"),
        (("model.safetensors", "--prior", "nromal"), "unknown prior 'nromal'.*'both'; did you mean 'normal'"),
        (("model.safetensors", "--method", "odee"), "unknown method 'odee'.*did you mean 'ode'"),
        (("model.safetensors", "--binarise", "statc"), "'statc'.*did you mean 'static'"),
        (("vae.safetensors", "--prior", "both"), "only a VAE"),
        (("model.safetensors", "--out", "."), "cannot write .: it is a folder"),
        (("model.safetensors", "--probes", 2), "--probes is of .*density: add --method ode"),
        (("model.safetensors", "--trace", "fixed"), "--trace is of .*density: add --method ode"),
        (
            ("model.safetensors", "--method", "ode", "--trace", "fixd"),
            "unknown trace 'fixd'.*did you mean 'fixed'",
        ),
        (
            ("model.safetensors", "--measure-probes", "--method", "ode", "--prior", "normal"),
            "--measure-probes .* leave --prior normal out",
        ),
        (("vae.safetensors", "--method", "ode", "--probes", 2), "--probes .*vae.safetensors has no prior"),
        (
            ("model.safetensors", "--quality", "--no-likelihood", "--probes", 2, "--method", "ode"),
            "--probes is of the NELBO: leave --no-likelihood out",
        ),
        (
            ("model.safetensors", "--quality", "--no-likelihood", "--outside", "other"),
            "--outside compares NELBOs: leave --no-likelihood out",
        ),
        (("model.safetensors", "--outside", "wide"), r"grey.*\(1, 9, 9\).*the model takes"),
    ],
)
def test_the_commands_errors(command, arguments, message):
    result = command(*arguments, "--quiet")
    assert result.code == 2
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message, lines[0])
