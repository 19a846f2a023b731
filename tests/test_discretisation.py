"""The DDPM discretisation: its definitions, exactness for a Gaussian, and what it refuses."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from lsgm_fast.config import SDEConfig
from lsgm_fast.discretisation import VARIANCES, DDPMSchedule, discretise
from lsgm_fast.sde import build_sde

CONFIGS = {
    "vpsde": SDEConfig("vpsde"),
    "geometric_sde": SDEConfig("geometric_sde", sigma2_0=3e-5),
    "sub_vpsde": SDEConfig("sub_vpsde"),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> SDEConfig:
    return request.param


def test_definitions(config: SDEConfig) -> None:
    sde = build_sde(config)
    schedule = discretise(sde, 50)
    assert schedule.steps == 50
    previous = 1.0
    for k in range(1, 51):
        alpha_bar = 1.0 - float(sde.var(k / 50))
        beta = 1.0 - alpha_bar / previous
        i = k - 1
        assert float(schedule.t[i]) == k / 50
        assert float(schedule.alpha_bar[i]) == pytest.approx(alpha_bar, rel=1e-10)
        assert float(schedule.beta[i]) == pytest.approx(beta, rel=1e-9)
        assert float(schedule.alpha[i]) == pytest.approx(1.0 - beta, rel=1e-9)
        assert float(schedule.std_beta[i]) == pytest.approx(math.sqrt(beta), rel=1e-9)
        if k > 1:
            posterior = math.sqrt(beta * (1.0 - previous) / (1.0 - alpha_bar))
            assert float(schedule.std_beta_post[i]) == pytest.approx(posterior, rel=1e-9)
        assert schedule.mixed_r(k) == pytest.approx(math.sqrt(1.0 - alpha_bar), rel=1e-9)
        previous = alpha_bar
    assert float(schedule.std_beta_post[0]) == float(schedule.std_beta_post[1])
    for value in vars(schedule).values():
        assert value.dtype == torch.float64
        assert value.shape == (50,)


def test_known_values_of_the_thousand_step_vpsde() -> None:
    schedule = discretise(build_sde(SDEConfig("vpsde")), 1000)
    with mpmath.workdps(40):
        integral = [
            mpmath.mpf("0.1") * k / 1000 + mpmath.mpf("19.9") / 2 * (mpmath.mpf(k) / 1000) ** 2
            for k in range(1001)
        ]
        for k in (1, 2, 500, 1000):
            beta = -mpmath.expm1(integral[k - 1] - integral[k])
            assert float(schedule.beta[k - 1]) == pytest.approx(float(beta), rel=1e-11)
            assert float(schedule.alpha_bar[k - 1]) == pytest.approx(
                float(mpmath.exp(-integral[k])), rel=1e-13
            )


def test_published_parity_gives_the_same_float64_schedule(config: SDEConfig) -> None:
    exact, published = (
        discretise(build_sde(config.replace(parity=parity)), 1000) for parity in ("exact", "published")
    )
    for a, b in zip(vars(exact).values(), vars(published).values(), strict=True):
        assert torch.equal(a, b)


def test_step_coefficients_are_the_ancestral_step(config: SDEConfig) -> None:
    schedule = discretise(build_sde(config), 20)
    generator = torch.Generator().manual_seed(0)
    z, eps, noise = torch.randn(3, 100, dtype=torch.float64, generator=generator)
    for variance in VARIANCES:
        stds = schedule.std_beta if variance == "beta" else schedule.std_beta_post
        for k in range(1, 21):
            c_x, c_eps, c_noise = schedule.step_coefficients(k, variance)
            beta, alpha_bar = schedule.beta[k - 1], schedule.alpha_bar[k - 1]
            if k > 1:
                expected = (z - beta * eps / (1 - alpha_bar).sqrt()) / (1 - beta).sqrt() + stds[k - 1] * noise
            else:
                expected = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
                assert c_noise == 0.0
            torch.testing.assert_close(
                c_x * z + c_eps * eps + c_noise * noise, expected, rtol=1e-11, atol=1e-11
            )


def test_posterior_steps_carry_the_exact_noise_back_to_the_data() -> None:
    # With eps the true noise of a point mass z0, the posterior chain's marginals are exactly
    # N(sqrt(alpha_bar_k) z0, 1 - alpha_bar_k): propagate mean and variance in closed form.
    schedule: DDPMSchedule = discretise(build_sde(SDEConfig("vpsde")), 30)
    z0 = 1.7
    mean, var = math.sqrt(float(schedule.alpha_bar[-1])) * z0, 1.0 - float(schedule.alpha_bar[-1])
    for k in range(30, 0, -1):
        c_x, c_eps, c_noise = schedule.step_coefficients(k, "beta_post")
        alpha_bar, r = float(schedule.alpha_bar[k - 1]), schedule.mixed_r(k)
        slope = c_x + c_eps / r
        mean = slope * mean - c_eps / r * math.sqrt(alpha_bar) * z0
        var = slope**2 * var + c_noise**2
        before = float(schedule.alpha_bar[k - 2]) if k > 1 else 1.0
        assert mean == pytest.approx(math.sqrt(before) * z0, rel=1e-12)
        assert var == pytest.approx(1.0 - before, rel=1e-10, abs=1e-13)


def test_a_single_step() -> None:
    schedule = discretise(build_sde(SDEConfig("vpsde")), 1)
    assert schedule.steps == 1
    assert all(bool(torch.isfinite(value).all()) for value in vars(schedule).values())
    assert schedule.step_coefficients(1, "beta_post").c_noise == 0.0


def test_errors() -> None:
    sde = build_sde(SDEConfig("vpsde"))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        discretise(sde, 0)
    vesde = build_sde(SDEConfig("vesde", sigma2_0=1e-4, sigma2_min=1e-4, sigma2_max=100.0))
    with pytest.raises(ValueError, match="variance below 1, but vesde reaches 100"):
        discretise(vesde, 10)
    dips = build_sde(SDEConfig("sub_vpsde", sigma2_0=0.5))
    with pytest.raises(ValueError, match="does not increase"):
        discretise(dips, 1000)
    schedule = discretise(sde, 10)
    for k in (0, 11):
        with pytest.raises(ValueError, match=rf"1\.\.10, got {k}"):
            schedule.step_coefficients(k)
    with pytest.raises(ValueError, match="did you mean 'beta_post'"):
        schedule.step_coefficients(3, "beta-post")
