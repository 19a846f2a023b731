"""Importance sampling: recorded tables, consistency of weight and density, and equality of the integrals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lsgm_fast.config import SDE_NAMES, SDEConfig
from lsgm_fast.sde import SDE, build_sde
from lsgm_fast.weighting import IW_MODES, available_modes, iw_quantities

GOLDEN = Path(__file__).parent / "data" / "golden"
SDES = {
    "vpsde": SDEConfig("vpsde"),
    "vpsde-sigma2_0": SDEConfig("vpsde", sigma2_0=1e-3, time_eps=0.0),
    "geometric_sde": SDEConfig("geometric_sde", sigma2_0=3e-5, time_eps=0.0),
    "sub_vpsde": SDEConfig("sub_vpsde"),
    "vesde": SDEConfig("vesde", sigma2_0=1e-4, sigma2_min=1e-4, sigma2_max=100.0),
}
DEFINED = [
    (name, mode)
    for name, config in SDES.items()
    for mode in available_modes(build_sde(config), subvp_like_vp=True)
]
UNIFORM = {"ll_uniform", "drop_all_uniform", "drop_sigma2t_uniform", "rescale_iw"}


@pytest.fixture(scope="module")
def tables() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "sde_tables.safetensors")


@pytest.mark.parametrize("mode", IW_MODES)
@pytest.mark.parametrize("name", SDE_NAMES)
def test_recorded_tables(tables: dict, name: str, mode: str) -> None:
    options = json.loads((GOLDEN / "sde_tables.json").read_text())
    values = dict(options[name])
    sde = build_sde(SDEConfig(name=values.pop("sde_type"), parity="published", **values))
    prefix = f"{name}.iw.{mode}."
    recorded = {key.removeprefix(prefix): value for key, value in tables.items() if key.startswith(prefix)}
    if options.get(f"{name}.{mode}") == "not defined":
        assert not recorded
        with pytest.raises(ValueError, match=f"{mode}.*not defined for {name}, which has ll_uniform"):
            iw_quantities(sde, tables["rho"], mode, subvp_like_vp=True)
        return
    got = iw_quantities(sde, tables["rho"], mode, subvp_like_vp=True)
    fields = {
        "t": got.t,
        "var_t": got.var,
        "m_t": got.m,
        "weight_p": got.weight_p,
        "weight_q": got.weight_q,
        "g2_t": got.g2,
    }
    assert set(recorded) == set(fields)
    for key, value in fields.items():
        expected = recorded[key].expand_as(value)  # the constant weight was recorded with one element
        assert value.dtype == torch.float32
        assert float((value - expected).norm() / expected.norm()) <= 1e-6, key


def _weighting(sde: SDE, mode: str, t: torch.Tensor) -> torch.Tensor:
    """What the mode weights |eps - eps_theta|^2 by, at time t."""
    if mode.startswith("ll"):
        return sde.g2(t) / (2 * sde.var(t))
    if mode.startswith("drop_all"):
        return torch.ones_like(t)
    if mode.startswith("drop_sigma2t"):
        return sde.g2(t) / 2
    return 0.5 / (1 - sde.var(t))


@pytest.mark.parametrize(("name", "mode"), DEFINED)
def test_weight_times_density_is_the_weighting(name: str, mode: str) -> None:
    sde = build_sde(SDES[name])
    rho = torch.linspace(0.001, 0.999, 101, dtype=torch.float64).requires_grad_()
    got = iw_quantities(sde, rho, mode, subvp_like_vp=True)
    (dt,) = torch.autograd.grad(got.t.sum(), rho)
    assert bool((dt > 0).all())
    t = got.t.detach()
    # The uniform weights lack the factor dt/drho = 1 - time_eps, as published.
    density = torch.ones_like(dt) if mode in UNIFORM else 1 / dt
    weight_p, weight_q = got.weight_p.detach(), got.weight_q.detach()
    tight = {"rtol": 1e-8, "atol": 0.0}
    torch.testing.assert_close(weight_p * density, _weighting(sde, mode, t), **tight)
    torch.testing.assert_close(weight_q * density, _weighting(sde, "ll", t), **tight)
    torch.testing.assert_close(got.var.detach(), sde.var(t), **tight)
    torch.testing.assert_close(got.m.detach(), sde.mean_coef(t), **tight)
    torch.testing.assert_close(got.g2.detach(), sde.g2(t), **tight)


@pytest.mark.parametrize(("name", "mode"), DEFINED)
def test_times_go_from_time_eps_to_one(name: str, mode: str) -> None:
    sde = build_sde(SDES[name])
    for start in (0.02, None):
        got = iw_quantities(
            sde, torch.tensor([0.0, 1.0], dtype=torch.float64), mode, time_eps=start, subvp_like_vp=True
        )
        expected = [sde.time_eps if start is None else start, 1.0]
        torch.testing.assert_close(got.t, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)


def _graded_nodes() -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1], on panels that shrink towards both ends."""
    half = np.concatenate([[0.0], 0.5 * 4.0 ** -np.arange(14, -1, -1)])
    edges = np.concatenate([half, 1 - half[-2::-1]])
    x, w = np.polynomial.legendre.leggauss(20)
    width = np.diff(edges)[:, None]
    nodes = edges[:-1, None] + width * (x + 1) / 2
    return torch.from_numpy(nodes.ravel()), torch.from_numpy((width * w / 2).ravel())


@pytest.mark.parametrize("name", SDES)
def test_all_modes_estimate_the_same_likelihood_integral(name: str) -> None:
    sde = build_sde(SDES[name])
    nodes, node_weights = _graded_nodes()
    start = sde.time_eps

    def h(t: torch.Tensor) -> torch.Tensor:  # stands in for E|eps - eps_theta|^2
        return torch.exp(-2 * t) * (1 + 0.3 * torch.sin(9 * t)) * sde.mean_coef(t).square()

    t = start + (1 - start) * nodes
    direct = float(((1 - start) * node_weights * sde.g2(t) / (2 * sde.var(t)) * h(t)).sum())
    for mode in available_modes(sde, subvp_like_vp=True):
        got = iw_quantities(sde, nodes, mode, subvp_like_vp=True)
        estimate = float((node_weights * got.weight_q * h(got.t)).sum())
        if mode in UNIFORM:
            estimate *= 1 - start
        assert estimate == pytest.approx(direct, rel=1e-7), mode


def test_likelihood_sampling_has_no_variance_for_a_standard_normal_latent() -> None:
    # There the optimal network's error is 1 - var, so ll_iw's integrand is the constant ln(v1/v0)/2.
    sde = build_sde(SDES["vpsde"])
    got = iw_quantities(sde, torch.linspace(0, 1, 11, dtype=torch.float64), "ll_iw")
    integrand = got.weight_q * sde.one_minus_var(got.t)
    torch.testing.assert_close(integrand, torch.full_like(integrand, float(integrand[0])), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["vpsde", "sub_vpsde"])
def test_drop_all_constant_is_corrected_unless_published(name: str) -> None:
    exact = build_sde(SDES[name])
    rho = torch.linspace(0.05, 0.95, 7)
    ratio = (
        iw_quantities(exact.with_parity("published"), rho, "drop_all_iw", subvp_like_vp=True).weight_p
        / iw_quantities(exact, rho, "drop_all_iw", subvp_like_vp=True).weight_p
    )
    torch.testing.assert_close(ratio, torch.full((7,), 1.00226), rtol=2e-5, atol=0)


def test_shape_and_dtype_follow_rho() -> None:
    sde = build_sde(SDES["vpsde"])
    for parity in ("exact", "published"):
        for dtype in (torch.float32, torch.float64):
            for mode in IW_MODES:
                got = iw_quantities(sde.with_parity(parity), torch.rand(3, 2, dtype=dtype), mode)
                for value in (got.t, got.var, got.m, got.weight_p, got.weight_q, got.g2):
                    assert value.shape == (3, 2)
                    assert value.dtype == dtype
    wide = iw_quantities(sde, torch.tensor([0.999], dtype=torch.float64), "drop_all_iw")
    narrow = iw_quantities(sde, torch.tensor([0.999]), "drop_all_iw")
    torch.testing.assert_close(narrow.t.double(), wide.t, rtol=1e-5, atol=0)


def test_large_betas_keep_times_finite() -> None:
    sde = build_sde(SDEConfig("vpsde", beta_end=200.0))
    got = iw_quantities(sde, torch.tensor([0.5, 1.0]), "drop_all_iw")
    assert bool(torch.isfinite(got.t).all())
    assert float(got.t.max()) <= 1.0


def test_errors_say_what_to_do() -> None:
    rho = torch.rand(4)
    vpsde, sub = build_sde(SDES["vpsde"]), build_sde(SDES["sub_vpsde"])
    with pytest.raises(ValueError, match="did you mean 'll_uniform'"):
        iw_quantities(vpsde, rho, "ll_unifrom")
    with pytest.raises(
        ValueError, match=r"drop_all_iw.*geometric_sde, which has ll_uniform, ll_iw, .*rescale_iw$"
    ):
        iw_quantities(build_sde(SDES["geometric_sde"]), rho, "drop_all_iw")
    for mode in sorted(set(IW_MODES) - UNIFORM):
        with pytest.raises(ValueError, match=f"{mode}.*sub_vpsde.*subvp_like_vp=True"):
            iw_quantities(sub, rho, mode)
    with pytest.raises(ValueError, match=r"time_eps must be in \[0, 1\), got 1\.0"):
        iw_quantities(vpsde, rho, "ll_uniform", time_eps=1.0)
    with pytest.raises(ValueError, match=r"var is 0 at time_eps=0\.0.*sigma2_0 > 0"):
        iw_quantities(vpsde, rho, "ll_iw", time_eps=0.0)
    with pytest.raises(ValueError, match="beta_end > beta_start"):
        iw_quantities(build_sde(SDEConfig("vpsde", beta_start=5.0, beta_end=5.0)), rho, "drop_all_iw")
    with pytest.raises(TypeError, match="float16"):
        iw_quantities(vpsde, rho.half(), "ll_uniform")
