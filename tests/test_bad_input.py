"""Wrong images, names and numbers, networks that break down, interrupts: one clear error each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lsgm_fast
from lsgm_fast import BackendUnsupported, NonFiniteError, SDEConfig, build_sde, ops
from lsgm_fast.models import LSGM
from lsgm_fast.presets import PRESETS
from lsgm_fast.sampling import ADAPTIVE, BUDGETED, solution

ALL_SOLVERS = ["auto", *ADAPTIVE, *BUDGETED]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lsgm_fast.build("tiny-binary")


class Decoder(nn.Module):
    latent_shape = (2, 3, 3)

    def decode(self, z, **options):
        return torch.sigmoid(z)


class Network(nn.Module):
    """Predicts half the latent, until something happens at time ``when``."""

    def __init__(self, happens=lambda z: z, when=-1.0):
        super().__init__()
        self.happens, self.when = happens, when
        self.calls = 0

    def forward(self, z, t):
        self.calls += 1
        return self.happens(0.5 * z) if float(t[0]) <= self.when else 0.5 * z


def own_model(*arguments, **options):
    return LSGM(Decoder(), Network(*arguments, **options), SDEConfig())


def sample(model, solver="auto", n=2, **options):
    if solver == "ancestral":
        options.setdefault("evaluations", 20)
    else:
        options.setdefault("tol", 1e-3)
    return model.sample(n, solver=solver, **options)


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["encode", "nelbo"])
@pytest.mark.parametrize(
    ("shape", "got"),
    [
        ((2, 1, 27, 28), "(2, 1, 27, 28)"),
        ((2, 1, 30, 30), "(2, 1, 30, 30)"),
        ((2, 1, 28, 32), "(2, 1, 28, 32)"),
        ((2, 3, 28, 28), "(2, 3, 28, 28)"),
        ((2, 28, 28, 1), "(2, 28, 28, 1)"),
        ((1, 28, 28), "(1, 28, 28)"),
        ((28, 28), "(28, 28)"),
    ],
)
def test_images_of_the_wrong_shape(model, method, shape, got):
    with pytest.raises(ValueError, match="expected images") as error:
        getattr(model, method)(torch.zeros(shape))
    message = str(error.value)
    assert "(N, 1, 28, 28) or (N, 1, 32, 32)" in message
    assert f"got {got}" in message
    assert "resize them or load another model" in message


@pytest.mark.parametrize("method", ["encode", "nelbo"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, r"values in \[0, 1\], got \[0, 1.5\]"),
        (-1.0, r"got \[-1, 0\]"),
        (255.0, r"got \[0, 255\]"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_images_out_of_range(model, method, value, message):
    x = torch.zeros(2, 1, 28, 28)
    x[1, 0, 3, 4] = value
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_that_are_no_floating_point_numbers(model, dtype):
    with pytest.raises(
        ValueError, match=f"floating-point images in .0, 1., got {dtype}: divide 8-bit images by 255"
    ):
        model.encode(torch.zeros(2, 1, 28, 28, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_another_precision_are_converted(model, dtype):
    """NumPy's default is float64: it must not end in an error deep inside a convolution. Half precision is widened
    before any arithmetic, which could otherwise move a pixel to another level."""
    x = torch.rand(1, 1, 28, 28).to(dtype)
    with torch.no_grad():
        for got, expected in zip(model.encode(x), model.encode(x.float()), strict=True):
            torch.testing.assert_close(got.eps, expected.eps)


def test_an_empty_batch_of_images(model):
    assert [len(g.eps) for g in model.encode(torch.zeros(0, 1, 28, 28))] == [0, 0]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "closest", "valid"),
    [
        (lambda m: m.sample(1, solver="rk445"), "rk45", ALL_SOLVERS),
        (lambda m: m.sample_latents(1, solver="ancestrl"), "ancestral", ALL_SOLVERS),
        (lambda m: m.sample(1, bn="runing"), "running", ["running", "batch"]),
        (lambda m: m.decode(torch.zeros(1, 8, 8, 8), bn="bach"), "batch", ["running", "batch"]),
        (
            lambda m: m.nelbo(torch.zeros(1, 1, 28, 28), iw_mode="ll_unifrom"),
            "ll_uniform",
            ["ll_iw", "ll_uniform"],
        ),
        (lambda m: lsgm_fast.build("tiny-binry"), "tiny-binary", list(PRESETS)),
        (lambda m: SDEConfig(name="subvpsde"), "sub_vpsde", ["vpsde", "geometric_sde", "sub_vpsde", "vesde"]),
        (lambda m: build_sde(SDEConfig()).with_parity("publishd"), "published", ["exact", "published"]),
        (
            lambda m: lsgm_fast.set_backend("trition"),
            "triton",
            ["auto", "reference", "cpu", "triton", "cuda"],
        ),
        (lambda m: lsgm_fast.use_backend("referense").__enter__(), "reference", ["auto", "cpu", "cuda"]),
        (
            lambda m: ops.diffuse(*[torch.zeros(1, 1)] * 2, 1.0, 1.0, backend="cdua"),
            "cuda",
            ["auto", "triton"],
        ),
        (lambda m: lsgm_fast.explain("mixd_score"), "mixed_score", ["weight_norm", "diffuse"]),
    ],
)
def test_unknown_names_list_the_valid_ones_and_the_closest(model, call, closest, valid):
    with pytest.raises(ValueError, match="unknown .*expected one of") as error:
        call(model)
    message = str(error.value)
    assert f"did you mean {closest!r}?" in message
    for name in valid:
        assert repr(name) in message


def test_a_backend_that_an_operation_does_not_have(model):
    with pytest.raises(BackendUnsupported, match="multistep_update"):
        ops.multistep_update(torch.zeros(1, 1), 1.0, [torch.zeros(1, 1)], [1.0], backend="cuda")


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "number of images must be at least 1, got 0"),
        ({"n": -3}, "number of images must be at least 1, got -3"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"tol": 0.0}, "tol.* 0"),
        ({"tol": -1e-5}, "-1e-05"),
        ({"tol": math.nan}, "nan"),
        ({"tol": math.inf}, "inf"),
        ({"ode_eps": 0.0}, r"ode_eps must be in \(0, 1\), got 0.0"),
        ({"ode_eps": 1.0}, r"ode_eps must be in \(0, 1\), got 1.0"),
        ({"ode_eps": -1e-5}, r"ode_eps must be in \(0, 1\), got -1e-05"),
        ({"ode_eps": math.nan}, r"ode_eps must be in \(0, 1\), got nan"),
        ({"seed": -1}, r"seed must be .* got -1"),
        ({"seed": 2**64}, r"seed must be .* got 18446744073709551616"),
        ({"seed": 0.5}, r"seed must be .* got 0.5"),
        ({"seed": "zero"}, r"seed must be .* got 'zero'"),
        (
            {"evaluations": 10, "solver": "rk23"},
            "evaluations=10 needs a solver with a fixed budget.*ancestral",
        ),
        ({"evaluations": 10, "tol": 1e-3}, "tol=0.001 and evaluations=10 exclude each other"),
        ({"solver": "ancestral", "tol": 1e-3}, "tol is for adaptive solvers"),
        ({"solver": "dpmpp_2m", "tol": 1e-3}, "tol is for adaptive solvers"),
        ({"solver": "heun", "evaluations": 5}, "a multiple of 2 for solver=.heun., .*got 5"),
        ({"solver": "rk45", "grid": "uniform"}, "grid is for solvers over given times"),
        ({"evaluations": 3, "grid": [1.0, 0.5, 0.1]}, "goes from t = 1.0 to 0.1: expected 1.0 to ode_eps"),
        ({"solver": "ddim", "control": "per_sample"}, "control=.per_sample. is for .rk45."),
        ({"solver": "ddim", "extrapolate": True}, "extrapolate is for .exponential."),
        ({"evaluations": 10, "solver": "rk45"}, "'rk45' chooses its evaluations to meet tol"),
        ({"solver": "ancestral", "evaluations": 0}, "at least 1, got 0"),
        ({"solver": "ancestral", "evaluations": -2}, "at least 1, got -2"),
        ({"solver": "ancestral", "evaluations": 2, "temperature": -1.0}, "temperature must be .*got -1.0"),
        ({"solver": "ancestral", "evaluations": 2, "temperature": math.nan}, "temperature must be .*got nan"),
    ],
)
def test_numbers_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**({"n": 1} | options))


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_a_bad_temperature_is_named_by_every_solver(model, temperature):
    """Not only by the ancestral sampler, and before the noise has become NaN."""
    for options in ({"temperature": temperature}, {"vae_temperature": temperature}):
        with pytest.raises(ValueError, match="temperature must be"):
            model.sample(1, **options)


def test_a_negative_number_of_latents(model):
    with pytest.raises(ValueError, match="got -1"):
        model.sample_latents(-1)


def test_rho_out_of_range(model):
    x = torch.zeros(2, 1, 28, 28)
    for rho in (torch.tensor([0.5, 1.5]), torch.tensor([-0.1, 0.5]), torch.tensor([math.nan, 0.5])):
        with pytest.raises(ValueError, match="rho"):
            model.nelbo(x, rho=rho)


def test_nothing_is_computed_before_the_arguments_are_checked():
    model = own_model()
    for options in (
        {"bn": "runing"},
        {"tol": -1.0},
        {"ode_eps": 2.0},
        {"seed": -1},
        {"batch_size": 0},
        {"lower_noise": [torch.zeros(2, 1, 1, 1)]},
    ):
        with pytest.raises(ValueError, match=next(iter(options)).replace("bn", "BatchNorm")):
            model.sample(2, **options)
    assert model.prior.calls == 0


def test_a_device_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="device 'cdua'"):
        lsgm_fast.load("demo", device="cdua")
    with pytest.raises(ValueError, match="device 'cdua'"):
        lsgm_fast.build("tiny-binary", device="cdua")


# -- networks that break down ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5", "ancestral"])
def test_nan_from_the_network_names_step_and_time(solver, bad):
    def spoil(z):
        z = z.clone()
        z[1, 0, 2, 1] = bad
        return z

    model = own_model(spoil, when=0.5)
    with pytest.raises(NonFiniteError) as error:
        sample(model, solver)
    message = str(error.value)
    assert "step" in message
    assert "t = " in message
    t = float(message.split("t = ")[1].split()[0].rstrip(",:;.)"))
    assert 0.0 < t <= 0.5
    if solver == "ancestral":
        assert t == 0.5
        assert "step 11 of 20" in message  # t = 1, 0.95, ..., 0.5


@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5", "ancestral", "exponential"])
def test_nan_from_the_first_evaluation(solver):
    with pytest.raises(NonFiniteError, match="t = 1.0"):
        sample(own_model(lambda z: z * math.nan, when=2.0), solver)


def test_nan_in_injected_noise(model):
    noise = torch.zeros(1, *model.latent_shape)
    noise[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="initial state"):
        model.sample(1, noise=noise)


def test_nan_from_the_decoder():
    model = own_model()
    model.vae.decode = lambda z, **options: z * math.nan
    with pytest.raises(NonFiniteError, match="decoder produced NaN or infinity .from its own activations"):
        sample(model)


@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5", "ancestral"])
def test_a_network_of_the_wrong_shape(solver):
    with pytest.raises(ValueError, match="shape"):
        sample(own_model(lambda z: z[:, :1], when=2.0), solver)


@pytest.mark.parametrize("solver", ["rk45", "dopri5"])
def test_a_device_without_float64(model, monkeypatch, solver):
    monkeypatch.setattr(solution, "supports_float64", lambda device: False)
    with pytest.raises(ValueError, match=r"device cpu has no float64.*state_dtype=torch\.float32"):
        model.sample(1, solver=solver)
    z, _ = model.sample_latents(1, solver=solver, state_dtype=torch.float32)
    assert z.dtype == torch.float32
    assert torch.isfinite(z).all()


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["rk45", "scipy", "dopri5", "ancestral"])
def test_ctrl_c_in_the_network_propagates(solver):
    def interrupt(z):
        raise KeyboardInterrupt

    model = own_model(interrupt, when=0.5)
    with pytest.raises(KeyboardInterrupt):
        sample(model, solver, progress=True)
    # The model is as good as before.
    model.prior.when = -1.0
    assert torch.isfinite(sample(model, solver)).all()


def test_ctrl_c_between_batches_keeps_what_is_finished():
    model, finished = own_model(), []

    def keep(images, info):
        finished.append(images)
        if len(finished) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, n=6, batch_size=2, on_batch=keep)
    assert [len(images) for images in finished] == [2, 2]


def test_ctrl_c_in_the_decoder_drops_the_prepared_weights(monkeypatch):
    torch.manual_seed(0)
    model = lsgm_fast.build("tiny-binary")
    z = torch.zeros(1, *model.latent_shape)
    expected = model.decode(z)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.vae.output, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.decode(z)
    with torch.no_grad():
        model.vae.output.log_weight_norm += 1.0
    # Weights changed after the interrupt are seen, so none prepared before it was kept.
    assert not torch.allclose(model.decode(z), expected)
