"""Training objectives: the published steps, and the gradients of p and q each from its own loss."""

from __future__ import annotations

import pytest
import torch
from recorded import DATA, GOLDEN, Golden, relative_error
from safetensors.torch import load_file

import lsgm_fast
from lsgm_fast import checkpoints
from lsgm_fast.models import LSGM
from lsgm_fast.training.config import REWEIGHT, ObjectiveConfig
from lsgm_fast.training.objectives import Draws, LSGMObjective, VAEObjective, Weights, draw
from lsgm_fast.training.regularisation import SpectralRegulariser

pytestmark = pytest.mark.filterwarnings("ignore:this file is in the layout:UserWarning")

RECORDED = [
    (name, ".".join(key.split(".")[1:4]))
    for name in GOLDEN
    for key in load_file(DATA / "golden" / name / "train.safetensors")
    if key.endswith(".losses")
]


def _objective(model: LSGM, config: ObjectiveConfig, **options: object) -> LSGMObjective:
    objective = LSGMObjective(model, config, SpectralRegulariser(), SpectralRegulariser(), **options)
    objective.train()
    objective.prior.eval()  # dropout off; the network has nothing else that depends on the mode
    return objective


def _gradients(model: LSGM, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "case"), RECORDED, ids=[f"{n}-{c}" for n, c in RECORDED])
def test_published_training_step(name: str, case: str, tmp_path) -> None:
    golden = Golden(name, tmp_path)
    prefix = f"train.{case}."
    io = load_file(DATA / "golden" / name / "train.safetensors")
    recorded = {key.removeprefix(prefix): value for key, value in io.items() if key.startswith(prefix)}
    form, p_mode, q_mode = case.split(".")
    model = lsgm_fast.load(golden.path)
    model = LSGM(model.vae, model.prior, model.sde.with_parity("published"))
    own_times = q_mode != "reweight_p_samples"
    config = ObjectiveConfig(
        p_mode=p_mode, q_mode=q_mode if own_times else REWEIGHT, disjoint=form == "disjoint"
    )

    draws = [recorded[key] for key in sorted(recorded) if key.startswith("draw")]
    groups = model.vae.num_groups
    rest = draws[groups:]
    if config.disjoint:
        noise_q, rho_q, noise, rho = rest
    else:
        noise, rho, noise_q, rho_q = rest[0], rest[1], None, rest[2] if own_times else None
    total, parts = _objective(model, config)(
        golden.io["x01"], Draws(draws[:groups], noise, rho, noise_q, rho_q), Weights()
    )
    losses = recorded["losses"]
    assert relative_error(parts["nelbo"], losses[0]) < 1e-5
    if len(losses) == 2:
        assert relative_error(parts["p_loss"], losses[1]) < 1e-5

    gradients = _gradients(model, total)
    names = {
        part: {theirs: f"{ours_prefix}{ours}" for ours, (theirs, _) in checkpoints._names(network).items()}
        for part, network, ours_prefix in (
            ("vae_state_dict", model.vae, "vae."),
            ("dae_state_dict", model.prior, "prior."),
        )
    }
    for part, key in (("vae_state_dict", "vae_grad_norms"), ("dae_state_dict", "score_grad_norms")):
        if part == "vae_state_dict" and form == "joint" and len(losses) == 2:
            continue  # the recording holds the p loss's gradient as well, which the published code never applies
        order = [
            names[part][k]
            for k in golden.meta["key_order"][part]
            if k in names[part] and names[part][k] in gradients
        ]
        norms = torch.stack([gradients[k].norm() for k in order])
        assert len(norms) == len(recorded[key])
        # Gradients that are zero but for rounding (a bias in front of BatchNorm) are compared with the others' size.
        scale = recorded[key].clamp(min=1e-4 * float(recorded[key].max()))
        assert float(((norms - recorded[key]).abs() / scale).max()) < 1e-4
    assert relative_error(gradients["prior.mixing_logit"], recorded["grad.mixing_logit"]) < 1e-4
    if form == "disjoint" or len(losses) == 1:
        assert relative_error(gradients["vae.prior_feature"], recorded["grad.prior_ftr0"]) < 1e-4


def test_recordings_of_every_algorithm_are_there() -> None:
    assert len(RECORDED) == 7


# -- against the definition -------------------------------------------------------------------------------------------


def _by_definition(
    model: LSGM, objective: LSGMObjective, images: torch.Tensor, draws: Draws, weights: Weights
) -> dict[str, torch.Tensor]:
    """Gradients of q for the VAE and of p for the score network, from two graphs that know nothing of each other."""
    c, vae, sde = objective.config, model.vae, model.sde
    found = {}
    for which in ("q", "p"):
        x = vae.preprocess_images(images)
        logits, groups = vae(x, draws.posterior)
        z0 = vae.merge_groups([g.eps for g in groups])
        q_is_p = c.q_mode == REWEIGHT
        rho = draws.rho if which == "p" or q_is_p else draws.rho_q
        noise = draws.noise if which == "p" or draws.noise_q is None else draws.noise_q
        mode = c.p_mode if which == "p" or q_is_p else c.q_mode
        iw = lsgm_fast.weighting.iw_quantities(sde, rho, mode)
        shape = (-1, 1, 1, 1)
        z_t = iw.m.view(shape) * z0 + iw.var.sqrt().view(shape) * noise
        a = torch.sigmoid(model.prior.mixing_logit)
        mixed = (1 - a) * sde.mixed_r(iw.t).view(shape) * z_t + a * model.prior(z_t, iw.t)
        squared = (mixed - noise).square()
        if which == "p":
            loss = (iw.weight_p.view(shape) * squared).flatten(1).sum(1).mean()
            names = [n for n, _ in model.named_parameters() if n.startswith("prior.")]
        else:
            const = float(sde.cross_entropy_const(sde.time_eps))
            ce = iw.weight_q.view(shape) * squared + const
            kl = torch.stack([g.log_q.flatten(1).sum(1) for g in groups], 1)
            kl = kl + ce.reshape(len(x), len(groups), -1).sum(2)
            size = kl.detach().abs().mean(0) + 0.01
            gamma = size / size.mean() if weights.balance and weights.kl < 1 else torch.ones(len(groups))
            loss = (vae.reconstruction_loss(logits, x) + weights.kl * (gamma * kl).sum(1)).mean()
            names = [n for n, _ in model.named_parameters() if n.startswith("vae.")]
        parameters = dict(model.named_parameters())
        for name, gradient in zip(
            names, torch.autograd.grad(loss, [parameters[n] for n in names]), strict=True
        ):
            found[name] = gradient
    return found


CASES = {
    "algorithm 1": (ObjectiveConfig("ll_iw"), Weights()),
    "algorithm 3": (ObjectiveConfig("drop_sigma2t_iw"), Weights()),
    "algorithm 3, KL coefficient": (ObjectiveConfig("drop_all_iw"), Weights(kl=0.7)),
    "algorithm 3, balanced": (ObjectiveConfig("drop_all_iw"), Weights(kl=0.7, balance=True)),
    "algorithm 2": (ObjectiveConfig("drop_sigma2t_iw", "ll_iw"), Weights(kl=0.8, balance=True)),
    "algorithm 2, disjoint": (ObjectiveConfig("rescale_iw", "ll_uniform", disjoint=True), Weights()),
}


@pytest.fixture(scope="module")
def tiny() -> LSGM:
    torch.manual_seed(3)
    model = lsgm_fast.build("tiny-rgb").double()
    with torch.no_grad():
        for p in model.prior.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.train()
    model.prior.eval()
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_p_trains_the_prior_and_q_the_encoder(tiny: LSGM, case: str, scale: float) -> None:
    config, weights = CASES[case]
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    draws = draw(5, torch.arange(3), tiny.vae, torch.device("cpu"), config)
    objective = _objective(tiny, config)
    total, _ = objective(images, draws, weights, scale)
    found, expected = _gradients(tiny, total), _by_definition(tiny, objective, images, draws, weights)
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()) + 1e-9 * largest, name


@pytest.mark.parametrize("case", ["algorithm 1", "algorithm 3", "algorithm 3, balanced", "algorithm 2"])
def test_the_control_variate_changes_no_mean_and_quiets_the_encoder(tiny: LSGM, case: str) -> None:
    """Over stratified times and opposite noises, for one posterior draw; the prior's gradient is untouched."""
    config, weights = CASES[case]
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    model = LSGM(tiny.vae, lsgm_fast.build("tiny-rgb").double().prior, tiny.sde)
    with torch.no_grad():
        model.prior.mixing_logit.fill_(-6.0)
    model.vae.train()
    base = draw(5, torch.arange(1), model.vae, torch.device("cpu"), config)
    found: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for i in range(64):
        noise = draw(5, torch.arange(i // 2, i // 2 + 1), model.vae, torch.device("cpu"), config).noise
        rho = torch.full((1,), (i // 2 + 0.5) / 32, dtype=torch.float64)
        draws = Draws(base.posterior, noise * (-1) ** i, rho, None, rho if base.rho_q is not None else None)
        priors = []
        for on in found:
            objective = _objective(model, config.replace(control_variate=on))
            gradients = _gradients(model, objective(images, draws, weights)[0])
            found[on].append(gradients["vae.posterior.0.bias"])
            priors.append(gradients["prior.conv_in.weight"])
        if case != "algorithm 1" or weights.kl == 1.0:
            assert torch.equal(*priors)
    plain, quiet = (torch.stack(found[on]) for on in (False, True))
    error = plain.std(dim=0) / 64**0.5
    assert float(((plain.mean(dim=0) - quiet.mean(dim=0)) / error).abs().max()) < 4.0
    assert float(quiet.std(dim=0).mean()) < 0.2 * float(plain.std(dim=0).mean())


def test_a_control_variate_for_uniform_times_is_refused() -> None:
    for modes in ({"p_mode": "ll_uniform"}, {"p_mode": "rescale_iw"}, {"q_mode": "ll_uniform"}):
        with pytest.raises(ValueError, match="control_variate needs times that are drawn by importance"):
            ObjectiveConfig(control_variate=True, **modes)


def test_algorithm_1_with_annealing_trains_the_prior_with_the_same_loss(tiny: LSGM) -> None:
    """As published, its single loss carries the coefficients into the prior too."""
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    config = ObjectiveConfig("ll_iw")
    draws = draw(5, torch.arange(2), tiny.vae, torch.device("cpu"), config)
    objective = _objective(tiny, config)
    half, _ = objective(images, draws, Weights(kl=0.5))
    of_half = _gradients(tiny, half)["prior.mixing_logit"]
    whole, _ = objective(images, draws, Weights())
    torch.testing.assert_close(of_half, 0.5 * _gradients(tiny, whole)["prior.mixing_logit"])


def test_the_encoder_learns_against_the_averaged_prior(tiny: LSGM) -> None:
    config = ObjectiveConfig("drop_sigma2t_iw", "ll_iw", update_q_ema=True)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    draws = draw(5, torch.arange(2), tiny.vae, torch.device("cpu"), config)
    averaged = lsgm_fast.build("tiny-rgb").double().prior.eval().requires_grad_(False)
    other, _ = _objective(tiny, config, ema=averaged)(images, draws, Weights())
    with_average = _gradients(tiny, other)
    own, _ = _objective(tiny, config.replace(update_q_ema=False))(images, draws, Weights())
    without = _gradients(tiny, own)
    assert torch.equal(with_average["prior.mixing_logit"], without["prior.mixing_logit"])
    assert not torch.allclose(with_average["vae.posterior.0.weight"], without["vae.posterior.0.weight"])


def test_a_frozen_vae_gets_no_gradients_and_keeps_its_statistics(tiny: LSGM) -> None:
    config = ObjectiveConfig("ll_iw", train_vae=False)
    objective = _objective(tiny, config)
    tiny.vae.eval()
    before = {k: v.clone() for k, v in tiny.vae.state_dict().items()}
    draws = draw(5, torch.arange(2), tiny.vae, torch.device("cpu"), config)
    total, parts = objective(torch.rand(2, 3, 32, 32, dtype=torch.float64), draws, Weights())
    gradients = _gradients(tiny, total)
    tiny.vae.train()
    assert gradients and all(name.startswith("prior.") for name in gradients)
    assert all(torch.equal(v, tiny.vae.state_dict()[k]) for k, v in before.items())
    assert float(parts["p_loss"]) > 0.0


def test_stage_1_is_the_bound_with_normal_priors(tiny: LSGM) -> None:
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    draws = draw(5, torch.arange(2), tiny.vae, torch.device("cpu"))
    total, parts = VAEObjective(tiny.vae, SpectralRegulariser())(images, draws, Weights())
    x = tiny.vae.preprocess_images(images)
    logits, groups = tiny.vae(x, draws.posterior)
    normal = torch.distributions.Normal(0.0, 1.0)
    kl = sum((g.log_q - normal.log_prob(g.eps)).sum() for g in groups) / 2
    expected = tiny.vae.reconstruction_loss(logits, x).mean() + kl
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(parts["kl"], kl.detach())


def test_spectral_regularisation(tiny: LSGM) -> None:
    weights = [torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3), torch.randn(5, 2, 1, 1)]
    gammas = [torch.tensor([0.5, -2.0]), torch.tensor([1.0, 0.25]), torch.tensor([3.0])]
    regulariser = SpectralRegulariser()
    for _ in range(50):
        value = regulariser([w.requires_grad_() for w in weights], gammas)
    exact = sum(float(torch.linalg.matrix_norm(w.detach().flatten(1), 2)) for w in weights) + 2.0 + 1.0 + 3.0
    assert float(value.detach()) == pytest.approx(exact, rel=1e-4)
    u, _, v = torch.linalg.svd(weights[2].detach().flatten(1))
    (gradient,) = torch.autograd.grad(value, weights[2])
    torch.testing.assert_close(gradient.flatten(1), torch.outer(u[:, 0], v[0]), atol=1e-3, rtol=0.0)
    again = SpectralRegulariser()
    again.load_state_dict(regulariser.state_dict())
    assert torch.equal(again(weights, gammas), regulariser(weights, gammas))
