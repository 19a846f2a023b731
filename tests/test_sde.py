"""The four SDEs: recorded tables, high-precision values, and the identities between their functions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mpmath
import pytest
import torch
from safetensors.torch import load_file

from lsgm_fast.config import SDE_NAMES, SDEConfig
from lsgm_fast.sde import SDE, build_sde

GOLDEN = Path(__file__).parent / "data" / "golden"

# The options of the recorded tables, and variants that exercise every sigma2_0 branch.
CONFIGS = {
    "vpsde": SDEConfig("vpsde"),
    "vpsde-sigma2_0": SDEConfig("vpsde", sigma2_0=1e-3),
    "vpsde-constant-beta": SDEConfig("vpsde", beta_start=5.0, beta_end=5.0),
    "geometric_sde": SDEConfig("geometric_sde", sigma2_0=3e-5, time_eps=0.0),
    "geometric_sde-zero": SDEConfig("geometric_sde", sigma2_0=0.0),
    "geometric_sde-larger": SDEConfig("geometric_sde", sigma2_0=5e-4),
    "sub_vpsde": SDEConfig("sub_vpsde"),
    "sub_vpsde-sigma2_0": SDEConfig("sub_vpsde", sigma2_0=1e-3),
    "vesde": SDEConfig("vesde", sigma2_0=1e-4, sigma2_min=1e-4, sigma2_max=100.0),
}
TIMES = [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.21, 0.5, 0.73, 0.9, 0.99, 1.0]

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def _relative_l2(got: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if expected.any() else float(difference)


@pytest.fixture(scope="module")
def tables() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "sde_tables.safetensors")


@pytest.fixture(scope="module")
def options() -> dict[str, dict]:
    return json.loads((GOLDEN / "sde_tables.json").read_text())


def _recorded_sde(options: dict, name: str, parity: str) -> SDE:
    values = dict(options[name])
    return build_sde(SDEConfig(name=values.pop("sde_type"), parity=parity, **values))


@pytest.mark.parametrize("name", SDE_NAMES)
@pytest.mark.parametrize("parity", ["published", "exact"])
def test_recorded_tables(tables: dict, options: dict, name: str, parity: str) -> None:
    sde = _recorded_sde(options, name, parity)
    t = tables["t"]
    # The constant was recorded at time_eps, or at 1e-5 (the end of the ODE) where time_eps is 0.
    start = torch.tensor([sde.time_eps or 1e-5])
    got = {
        "f": sde.f(t),
        "g2": sde.g2(t),
        "var": sde.var(t),
        "e2int_f": sde.mean_coef(t),
        "mixing_component": sde.mixed_r(t).view(-1, 1, 1, 1) * tables["x"],
        "cross_entropy_const": sde.cross_entropy_const(start),
        "inv_var_of_var": sde.inv_var(sde.var(t)),
    }
    recorded = {key.split(".", 1)[1]: value for key, value in tables.items() if key.startswith(name + ".")}
    functions = {key for key in recorded if not key.startswith("iw.")}
    assert functions == set(got) - ({"inv_var_of_var"} if name == "sub_vpsde" else set())
    for key in functions:
        assert got[key].shape == recorded[key].shape
        assert got[key].dtype == torch.float32
        assert _relative_l2(got[key], recorded[key]) <= (1e-6 if parity == "published" else 2e-5), key


@pytest.mark.parametrize("name", SDE_NAMES)
def test_published_formulas_are_float32_whatever_the_dtype(tables: dict, options: dict, name: str) -> None:
    sde = _recorded_sde(options, name, "published")
    t = tables["t"]
    for function in (sde.f, sde.g2, sde.var, sde.mean_coef, sde.mixed_r, sde.s2, sde.u):
        wide = function(t.double())
        assert wide.dtype == torch.float64
        assert torch.equal(wide, function(t).double())
    assert torch.equal(sde.var(t), tables[f"{name}.var"])


def test_published_vpsde_variance_keeps_its_cancellation() -> None:
    exact = build_sde(SDEConfig("vpsde"))
    published = exact.with_parity("published")
    assert published.parity == "published"
    assert published.with_parity("exact").config == exact.config
    assert exact.with_parity("exact") is exact
    t = torch.tensor(1e-6, dtype=torch.float64)
    assert float(published.var(t) / exact.var(t)) == pytest.approx(1.19, abs=0.01)


def _textbook(config: SDEConfig, t: float) -> dict[str, mpmath.mpf]:
    """All functions at 50 digits, from the definitions."""
    one, t, s0 = mpmath.mpf(1), mpmath.mpf(t), mpmath.mpf(config.sigma2_0)
    b0, b1 = mpmath.mpf(config.beta_start), mpmath.mpf(config.beta_end)
    low, high = mpmath.mpf(config.sigma2_min), mpmath.mpf(config.sigma2_max)
    beta, integral = b0 + (b1 - b0) * t, b0 * t + (b1 - b0) * t**2 / 2
    geom, log_ratio = low * (high / low) ** t, mpmath.log(high / low)
    e = mpmath.exp(-integral)
    if config.name == "vpsde":
        f, g2, var, m = -beta / 2, beta, 1 - (1 - s0) * e, mpmath.sqrt(e)
    elif config.name == "sub_vpsde":
        f, g2, var, m = -beta / 2, beta * (1 - e**2), (1 - e) ** 2 + s0 * e, mpmath.sqrt(e)
    elif config.name == "geometric_sde":
        g2 = geom * log_ratio / (1 - s0 + low - geom)
        f, var, m = -g2 / 2, geom - low + s0, mpmath.sqrt(1 + (low - geom) / (1 - s0))
    else:
        f, g2, var, m = 0 * one, geom * log_ratio, geom - low + s0, one
    s2 = (1 - s0) * m**2 + var
    return {
        "f": f,
        "g2": g2,
        "var": var,
        "one_minus_var": 1 - var,
        "mean_coef": m,
        "s2": s2,
        "u": mpmath.asinh(mpmath.sqrt(var) / (m * mpmath.sqrt(1 - s0))),
        "mixed_r": mpmath.sqrt(var) / s2,
        "p": f + g2 / (2 * s2),
        "q": g2 / (2 * mpmath.sqrt(var)),
        "cross_entropy_const": (1 + mpmath.log(2 * mpmath.pi * var)) / 2,
    }


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_exact_functions_to_the_last_digits(config: SDEConfig, dtype: torch.dtype) -> None:
    sde = build_sde(config)
    times = torch.tensor(TIMES, dtype=dtype)
    got = {
        name: getattr(sde, name)(times)
        for name in (
            "f",
            "g2",
            "var",
            "one_minus_var",
            "mean_coef",
            "s2",
            "u",
            "mixed_r",
            "cross_entropy_const",
        )
    }
    got["p"], got["q"], got["r"] = sde.drift_coefficients(times)
    assert torch.equal(got.pop("r"), got["mixed_r"])
    # Rounding t or B(t) alone moves exp(-B), r^t by up to B eps, ln(r) eps: about 10 units.
    bound = 20 * torch.finfo(dtype).eps
    with mpmath.workdps(50):
        for i, t in enumerate(times.tolist()):
            for name, expected in _textbook(config, t).items():
                value = got[name][i]
                assert value.dtype == dtype
                scale = abs(expected)
                if name in ("p", "one_minus_var"):  # have a zero crossing
                    scale += abs(mpmath.mpf(float(sde.f(t)))) if name == "p" else 1e-3
                if name == "cross_entropy_const":
                    scale += 1
                assert abs(float(value) - expected) <= bound * scale, (name, t, float(value), float(expected))


@pytest.mark.parametrize("name", ["vpsde", "geometric_sde"])
@pytest.mark.parametrize("parity", ["exact", "published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p_is_exactly_zero_where_s_is_one(name: str, parity: str, dtype: torch.dtype) -> None:
    sde = build_sde(CONFIGS[name].replace(parity=parity))
    t = torch.linspace(1e-6, 1.0, 501, dtype=dtype)
    p, _, _ = sde.drift_coefficients(t)
    assert not p.any()
    assert torch.equal(sde.s2(t), torch.ones_like(t))


@every_config
@pytest.mark.parametrize("parity", ["exact", "published"])
def test_drift_coefficients_are_the_published_drift(config: SDEConfig, parity: str) -> None:
    sde = build_sde(config.replace(parity=parity))
    t = torch.tensor([0.003, 0.2, 0.6, 0.95], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator)
    a = torch.sigmoid(torch.randn(7, dtype=torch.float64, generator=generator))
    p, q, r = (x[:, None] for x in sde.drift_coefficients(t))
    f, g2, var = (function(t)[:, None] for function in (sde.f, sde.g2, sde.var))
    mixed = (1 - a) * sde.mixed_r(t)[:, None] * z + a * eps
    expected = f * z + 0.5 * g2 * mixed / var.sqrt()
    tolerance = 1e-12 if parity == "exact" else 1e-5
    torch.testing.assert_close(p * z + a * q * (eps - r * z), expected, rtol=tolerance, atol=tolerance)


@every_config
def test_functions_satisfy_their_differential_equations(config: SDEConfig) -> None:
    sde = build_sde(config)
    t = torch.tensor([1e-4, *torch.linspace(0.002, 0.998, 60).tolist()], dtype=torch.float64).requires_grad_()

    def derivative(y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y.sum() + 0.0 * t.sum(), t)[0]

    with torch.no_grad():
        f, g2, var, m, s = sde.f(t), sde.g2(t), sde.var(t), sde.mean_coef(t), sde.s2(t).sqrt()
    torch.testing.assert_close(derivative(sde.mean_coef(t)), f * m, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(derivative(sde.var(t)), 2 * f * var + g2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(derivative(sde.u(t)), g2 / (2 * var.sqrt() * s), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.tanh(sde.u(t)).detach(), var.sqrt() / s, rtol=1e-12, atol=0)


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_inverses_return_the_time(config: SDEConfig, dtype: torch.dtype) -> None:
    sde = build_sde(config)
    # A dip of var just after 0 makes the smallest times ambiguous for sub-VP with sigma2_0 > 0.
    dips = config.name == "sub_vpsde" and config.sigma2_0 > 0
    t = torch.tensor([x for x in TIMES if not (dips and x < 0.01)], dtype=dtype)
    wide = t.double()
    # What half an ulp of var or u amounts to in t.
    eps = torch.finfo(dtype).eps
    exact = {"var": sde.var(wide), "u": sde.u(wide)}
    slopes = {
        "var": (2 * sde.f(wide) * exact["var"] + sde.g2(wide)).abs(),
        "u": sde.g2(wide) / (2 * (exact["var"] * sde.s2(wide)).sqrt()),
    }
    for name, inverse in (("var", sde.inv_var), ("u", sde.t_of_u)):
        back = inverse(getattr(sde, name)(t))
        assert back.dtype == dtype
        error = (back.double() - wide).abs()
        allowed = 20 * eps * (exact[name] / slopes[name] + wide)
        assert bool((error <= allowed).all()), (name, error, allowed)


@pytest.mark.parametrize("name", ["vpsde", "sub_vpsde"])
def test_small_times_survive_the_natural_time_in_float32(name: str) -> None:
    sde = build_sde(CONFIGS[name])
    t = torch.logspace(-12, 0, 50, dtype=torch.float32)
    torch.testing.assert_close(sde.t_of_u(sde.u(t)), t, rtol=1e-5, atol=0)
    assert bool((sde.u(t).diff() > 0).all())


def test_ends() -> None:
    zero, one = torch.zeros(3), torch.ones(3, dtype=torch.float64)
    for config in CONFIGS.values():
        sde = build_sde(config)
        torch.testing.assert_close(sde.var(zero), torch.full((3,), config.sigma2_0), rtol=1e-6, atol=0)
        torch.testing.assert_close(sde.mean_coef(zero), torch.ones(3))
        assert sde.var(one).shape == (3,)
    assert build_sde(CONFIGS["vpsde"]).prior_std == 1.0
    assert build_sde(CONFIGS["vesde"]).prior_std == 10.0
    assert float(build_sde(CONFIGS["vpsde"]).cross_entropy_const(0.0)) == -math.inf
    _, q, _ = build_sde(CONFIGS["sub_vpsde"]).drift_coefficients(zero)
    torch.testing.assert_close(q, torch.full((3,), 0.1))


def test_shapes_dtypes_and_python_floats() -> None:
    sde = build_sde(SDEConfig("vpsde"))
    for shape in ((), (5,), (2, 3), (0,)):
        t = torch.rand(shape)
        assert all(x.shape == shape and x.dtype == torch.float32 for x in sde.drift_coefficients(t))
    value = sde.var(0.5)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert torch.equal(value, sde.var(torch.tensor(0.5, dtype=torch.float64)))
    with pytest.raises(TypeError, match=r"float16.*\.float\(\)"):
        sde.var(torch.ones(2, dtype=torch.float16))
    with pytest.raises(TypeError, match="int64"):
        sde.g2(torch.tensor(1))


def test_configurations_that_an_sde_cannot_have() -> None:
    with pytest.raises(ValueError, match="sigma2_0 == sigma2_min, got 0.0 and 3e-05"):
        build_sde(SDEConfig("vesde"))
    with pytest.raises(ValueError, match="final variance .* below 1"):
        build_sde(SDEConfig("geometric_sde", sigma2_max=100.0))
