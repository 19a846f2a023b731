"""Pixel likelihoods: probabilities sum to one, means, draws, and gradients at the extremes."""

from __future__ import annotations

import math

import pytest
import torch

from lsgm_fast import ops
from lsgm_fast.distributions import (
    DISTRIBUTIONS,
    Bernoulli,
    Logistic,
    MixtureLogistic,
    Normal,
    decoder_distribution,
    soft_clamp,
)

BITS = [5, 6, 7, 8]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(bits):
    """All pixel values of that depth, in [-1, 1]."""
    return torch.arange(2**bits, dtype=torch.float64) * (2.0 / (2**bits - 1)) - 1.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bin_masses(loc, log_scale, bits):
    """Mass of every pixel value under one logistic, open-ended at both ends: by the distribution function."""
    half = 1.0 / (2**bits - 1)
    v = levels(bits)
    cdf_upper = torch.sigmoid((v + half - loc) / math.exp(log_scale))
    cdf_lower = torch.sigmoid((v - half - loc) / math.exp(log_scale))
    cdf_upper[-1], cdf_lower[0] = 1.0, 0.0
    return cdf_upper - cdf_lower


def mixture_logits(seed, k=10):
    """Random (1, 10 K, 1, 1) logits with scales of 0.02 to 0.4."""
    logits = rand(1, 10 * k, 1, 1, seed=seed)
    parts = logits[:, k:].view(1, 3, 3 * k, 1, 1)
    parts[:, :, :k] *= 0.5
    parts[:, :, k : 2 * k] = parts[:, :, k : 2 * k].clamp(-1.5, 1.5) - 2.5
    return logits


# -- mixture of logistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "red"), [(5, 0), (5, 7), (6, -1), (7, 7), (8, 0), (8, 130)])
def test_mixture_sums_over_green_and_blue_to_the_mixture_of_reds(bits, red):
    """For one red value, all green and blue values together: sum_k pi_k P_k(red), which sums to 1 over red."""
    logits = mixture_logits(seed=bits)
    v = levels(bits)
    n = len(v)
    x = torch.stack(
        (v[red].expand(n, n), v[:, None].expand(n, n), v[None, :].expand(n, n)),
    )[None]
    log_prob = ops.mixture_logistic_log_prob(x, logits.expand(1, -1, n, n), bits)
    assert log_prob.shape == (1, n, n)
    weights = torch.softmax(logits[0, :10, 0, 0], dim=0)
    loc, log_scale = logits[0, 10:20, 0, 0], logits[0, 20:30, 0, 0]
    masses = torch.stack([bin_masses(loc[k], float(log_scale[k]), bits) for k in range(10)])
    assert torch.allclose(masses.sum(dim=1), torch.ones(10, dtype=torch.float64))
    # Bins of mass below 1e-5 use the density at their centre, so the sum is one up to a part of that.
    torch.testing.assert_close(log_prob.exp().sum(), (weights @ masses)[red], rtol=2e-5, atol=1e-7)


def test_mixture_sums_to_one_over_all_colours_at_five_bits():
    v = levels(5)
    grid = torch.stack(torch.meshgrid(v, v, v, indexing="ij")).reshape(1, 3, 32, 1024)
    log_prob = MixtureLogistic(mixture_logits(seed=3).expand(1, -1, 32, 1024), 5).log_prob(grid)
    torch.testing.assert_close(log_prob.exp().sum().item(), 1.0, rtol=2e-5, atol=0)


def test_mixture_of_one_pixel_by_hand():
    """Conditional means of green and blue, tanh coefficients, log scale no lower than -7."""
    logits = torch.zeros(1, 20, 1, 1, dtype=torch.float64)
    # Two mixtures: logits | red: means, log scales, coefficients | green | blue.
    logits[0, :, 0, 0] = torch.tensor(
        [
            0.3,
            -0.2,
            0.1,
            -0.4,
            -1.0,
            -2.0,
            0.5,
            -0.6,
            0.2,
            0.3,
            -1.5,
            -9.0,
            0.7,
            0.8,
            -0.3,
            0.0,
            -2.5,
            -1.2,
            0.9,
            -1.1,
        ]
    )
    red, green, blue = levels(8)[[100, 160, 90]].tolist()
    total = 0.0
    for k in range(2):
        entry = logits[0, :, 0, 0].tolist()
        weight = math.exp(entry[k]) / (math.exp(entry[0]) + math.exp(entry[1]))
        c = [math.tanh(entry[start + k]) for start in (6, 12, 18)]
        loc = [entry[2 + k], entry[8 + k] + c[0] * red, entry[14 + k] + c[1] * red + c[2] * green]
        mass = weight
        for value, mean, start in zip((red, green, blue), loc, (4, 10, 16), strict=True):
            scale = math.exp(max(entry[start + k], -7.0))

            def cdf(edge, mean=mean, scale=scale):
                return 1.0 / (1.0 + math.exp(min(700.0, -(edge - mean) / scale)))

            mass *= cdf(value + 1 / 255) - cdf(value - 1 / 255)
        total += mass
    x = torch.tensor([red, green, blue], dtype=torch.float64).reshape(1, 3, 1, 1)
    got = ops.mixture_logistic_log_prob(x, logits, 8)
    torch.testing.assert_close(got.item(), math.log(total), rtol=1e-6, atol=1e-6)


def test_mixture_mean_by_hand():
    """Weighted means and coefficients first, then the colours in turn, each clamped."""
    logits = mixture_logits(seed=5)
    weights = torch.softmax(logits[0, :10, 0, 0], dim=0)
    m = logits[0, 10:, 0, 0].reshape(3, 30)
    loc = m[:, :10] @ weights
    coeff = torch.tanh(m[:, 20:]) @ weights
    red = loc[0].clamp(-1, 1)
    green = (loc[1] + coeff[0] * red).clamp(-1, 1)
    blue = (loc[2] + coeff[1] * red + coeff[2] * green).clamp(-1, 1)
    got = MixtureLogistic(logits).mean()
    torch.testing.assert_close(got[0, :, 0, 0], torch.stack((red, green, blue)), rtol=1e-10, atol=1e-10)
    far = logits.clone()
    far[0, 10:20] = 5.0
    assert MixtureLogistic(far).mean()[0, 0].item() == 1.0


def test_mixture_draws_follow_the_mixture():
    n = 100
    logits = torch.zeros(1, 20, n, n, dtype=torch.float64)
    values = [
        math.log(0.7),
        math.log(0.3),
        0.3,
        -0.4,
        -4.0,
        -3.5,
        0.5,
        -0.6,
        0.1,
        0.2,
        -4.0,
        -4.0,
        0.7,
        0.8,
        -0.2,
        0.0,
    ]
    values += [-4.0, -4.0, 0.4, -0.3]
    logits[0] = torch.tensor(values, dtype=torch.float64)[:, None, None]
    draws = MixtureLogistic(logits).sample(generator())
    assert draws.shape == (1, 3, n, n)
    assert draws.abs().max() <= 1
    means, first = [], None
    for k, weight in ((0, 0.7), (1, 0.3)):
        c = [math.tanh(values[start + k]) for start in (6, 12, 18)]
        red = values[2 + k]
        green = values[8 + k] + c[0] * red
        blue = values[14 + k] + c[1] * red + c[2] * green
        means.append([weight * v for v in (red, green, blue)])
        first = first or (red, green, blue)
    expected = torch.tensor(means, dtype=torch.float64).sum(dim=0)
    # Ten thousand draws of standard deviation below 0.5: five standard errors.
    torch.testing.assert_close(draws[0].flatten(1).mean(dim=1), expected, rtol=0, atol=5 * 0.5 / n)
    from_first = (draws[0, 0] - first[0]).abs() < 0.3
    assert abs(from_first.double().mean().item() - 0.7) < 5 * math.sqrt(0.7 * 0.3) / n
    conditional = draws[0][:, from_first]
    torch.testing.assert_close(conditional.mean(dim=1), torch.tensor(first).double(), rtol=0, atol=0.01)
    # A logistic of scale s has standard deviation pi s / sqrt(3).
    assert conditional[0].std().item() == pytest.approx(math.pi / math.sqrt(3) * math.exp(-4.0), rel=0.05)


def test_same_generator_same_draw():
    for name, kind in DISTRIBUTIONS.items():
        channels = 3 if name == "mixture_logistic" else 2
        logits = rand(1, kind.logit_channels(channels), 4, 4)
        a, b, c = (kind(logits).sample(generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
        assert a.shape == (1, channels, 4, 4), name


# -- logistic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("log_scale", [-0.5, -2.0, -4.0])
@pytest.mark.parametrize("loc", [0.0, 0.3, -0.97, 1.2])
def test_logistic_sums_to_one(bits, log_scale, loc):
    v = levels(bits)
    logits = torch.tensor([loc, log_scale], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, len(v), 1)
    log_prob = Logistic(logits, bits).log_prob(v.reshape(1, 1, -1, 1))[0, 0, :, 0]
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=2e-5)
    torch.testing.assert_close(log_prob.exp(), bin_masses(loc, log_scale, bits), rtol=1e-6, atol=1e-5)


def test_logistic_mean_and_draws():
    logits = torch.tensor([0.2, -3.0], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, 200, 100)
    distribution = Logistic(logits)
    assert torch.equal(distribution.mean(), logits[:, :1])
    v = levels(8)
    assert (v * bin_masses(0.2, -3.0, 8)).sum().item() == pytest.approx(0.2, abs=1e-4)
    draws = distribution.sample(generator())
    std = math.pi / math.sqrt(3) * math.exp(-3.0)
    assert draws.mean().item() == pytest.approx(0.2, abs=5 * std / math.sqrt(20_000))
    assert draws.std().item() == pytest.approx(std, rel=0.05)


def test_logistic_scale_has_a_floor():
    logits = torch.tensor([0.2, -50.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    assert Logistic(logits).log_scale.item() == -7.0


# -- normal and Bernoulli --------------------------------------------------------------------------------------------


def test_normal_density_integrates_to_one():
    loc, log_scale = 0.7, -1.3
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    logits = torch.tensor([loc, log_scale], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, len(x), 1)
    distribution = Normal(logits)
    density = distribution.log_prob(x.reshape(1, 1, -1, 1)).exp()[0, 0, :, 0]
    mean = 5 * math.tanh(loc / 5)
    std = math.exp(5 * math.tanh(log_scale / 5))
    assert torch.trapezoid(density, x).item() == pytest.approx(1.0, abs=1e-9)
    assert torch.trapezoid(density * x, x).item() == pytest.approx(mean, abs=1e-9)
    assert torch.trapezoid(density * (x - mean) ** 2, x).item() == pytest.approx(std**2, rel=1e-9)
    assert distribution.mean()[0, 0, 0].item() == pytest.approx(mean)
    draws = distribution.sample(generator())
    assert draws.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(len(x)))
    assert draws.std().item() == pytest.approx(std, rel=0.04)


@pytest.mark.parametrize("logit", [-3.0, 0.0, 0.4, 80.0])
def test_bernoulli(logit):
    logits = torch.full((1, 1, 2, 1), logit, dtype=torch.float64)
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(1, 1, 2, 1)
    distribution = Bernoulli(logits)
    probability = distribution.log_prob(x).exp()
    p = 1.0 / (1.0 + math.exp(-logit))
    assert probability[0, 0, 1, 0].item() == pytest.approx(p)
    assert probability.sum().item() == pytest.approx(1.0)
    assert (probability * x).sum().item() == pytest.approx(distribution.mean()[0, 0, 0, 0].item())
    draws = Bernoulli(logits.expand(1, 1, 2, 10_000)).sample(generator())
    assert set(draws.unique().tolist()) <= {-1.0, 1.0}
    assert (draws == 1).double().mean().item() == pytest.approx(p, abs=5 * 0.5 / math.sqrt(20_000))


def test_soft_clamp():
    x = torch.tensor([-1e9, -1e-4, 0.0, 2.0, 1e9], dtype=torch.float64)
    expected = torch.tensor([-5.0, -1e-4, 0.0, 5 * math.tanh(0.4), 5.0], dtype=torch.float64)
    torch.testing.assert_close(soft_clamp(x), expected)


# -- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_finite_at_the_extremes(name, size, dtype):
    """Log-probabilities, means and their gradients for logits far outside what training reaches."""
    kind = DISTRIBUTIONS[name]
    channels = {"mixture_logistic": 3, "categorical": 2}.get(name, 1)
    logits = (rand(4, kind.logit_channels(channels), 8, 8) * size).to(dtype).requires_grad_()
    x = torch.tensor([-1.0, 1.0, 0.0, 127 / 255]).to(dtype)[:, None, None, None].expand(4, channels, 8, 8)
    if name == "bernoulli":
        x = torch.where(x > 0, 1.0, -1.0).to(dtype)
    if name == "categorical":  # one-hot
        x = torch.where(torch.tensor([True, False])[:, None, None], 1.0, -1.0).to(dtype).expand(4, 2, 8, 8)
    distribution = kind(logits, 8)
    log_prob, mean = distribution.log_prob(x), distribution.mean()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(mean).all()
    if name != "normal":
        assert (log_prob <= 1e-4).all()
    (gradient,) = torch.autograd.grad(log_prob.sum() + mean.sum(), logits)
    assert torch.isfinite(gradient).all()
    if size == 1.0:
        assert (gradient != 0).any()


def test_gradient_of_the_mixture():
    logits = mixture_logits(seed=2, k=2).expand(1, -1, 2, 2).clone().requires_grad_()
    x = levels(8)[torch.tensor([[0, 255], [130, 90]])].expand(1, 3, 2, 2)

    def function(entry):
        return ops.mixture_logistic_log_prob(x, entry), ops.mixture_logistic_mean(entry)

    assert torch.autograd.gradcheck(function, (logits,))


# -- names and shapes ------------------------------------------------------------------------------------------------


def test_logit_channels():
    assert [DISTRIBUTIONS[n].logit_channels(3) for n in DISTRIBUTIONS] == [100, 6, 6, 3, 3]
    with pytest.raises(ValueError, match="RGB images, got 1"):
        MixtureLogistic.logit_channels(1)


def test_unknown_distribution():
    with pytest.raises(ValueError, match="'bernouli'.*'mixture_logistic'.*did you mean 'bernoulli'"):
        decoder_distribution("bernouli")


@pytest.mark.parametrize(
    ("x", "logits"),
    [((1, 1, 4, 4), (1, 100, 4, 4)), ((1, 3, 4, 4), (1, 95, 4, 4)), ((1, 3, 4, 4), (2, 100, 4, 4))],
)
def test_mixture_shapes(x, logits):
    with pytest.raises(ValueError, match="expected"):
        ops.mixture_logistic_log_prob(torch.zeros(x), torch.zeros(logits))
