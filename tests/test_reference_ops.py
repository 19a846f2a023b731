"""The reference operations of sampling and training against loops over Python floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lsgm_fast import reference

SHAPES = [(2, 3, 4, 4), (3, 5, 1, 7), (1, 1, 1, 1), (0, 4, 2, 2), (5, 2, 3, 1)]
HALF = [torch.float16, torch.bfloat16]


def _rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _positions(shape):
    return itertools.product(*(range(size) for size in shape))


def _at(coefficient, position):
    """A coefficient's value for one element: shared, per sample or per channel."""
    if not isinstance(coefficient, torch.Tensor):
        return coefficient
    if coefficient.ndim == 4:
        return coefficient[0, position[1], 0, 0].item()
    if coefficient.numel() == 1:
        return coefficient.item()
    return coefficient[position[0]].item()


def _naive(shape, function):
    out = torch.empty(shape, dtype=torch.float64)
    for position in _positions(shape):
        out[position] = function(position)
    return out


def _close(got, expected, tol=1e-12):
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=tol, atol=tol)


def _scalars(kind, batch, count):
    values = _rand(count, max(batch, 1), seed=9).abs() + 0.1
    if kind == "number":
        return [row[0].item() for row in values]
    if kind == "0-d":
        return [row[0] for row in values]
    if kind == "one":
        return [row[:1] for row in values]
    return [row[:batch] for row in values]


def _sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


KINDS = ["number", "0-d", "one", "per-sample"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_score_ops(shape, mixed, kind):
    eps, z = _rand(*shape, seed=1), _rand(*shape, seed=2)
    logit = _rand(1, shape[1], 1, 1, seed=3) * 3 if mixed else None
    p, q, r = _scalars(kind, shape[0], 3)

    def a(position):
        return _sigmoid(_at(logit, position)) if mixed else 1.0

    def mix(position):
        return (1 - a(position)) * _at(r, position) * z[position] + a(position) * eps[position]

    def drift(position):
        inner = eps[position] - _at(r, position) * z[position]
        return _at(p, position) * z[position] + a(position) * _at(q, position) * inner

    _close(reference.mixed_score(eps, z, logit, r), _naive(shape, mix))
    _close(reference.score_drift(eps, z, logit, p, q, r), _naive(shape, drift))


def test_drift_is_f_z_plus_the_mixed_score():
    """The one form of design: p, q, r reproduce f z + g^2 / (2 sqrt(var)) times the mixed prediction."""
    eps, z, logit = _rand(2, 3, 4, 4, seed=1), _rand(2, 3, 4, 4, seed=2), _rand(1, 3, 1, 1, seed=3)
    f, g2, var, s2 = -1.3, 2.2, 0.4, 0.9
    r = var**0.5 / s2
    expected = f * z + g2 / (2 * var**0.5) * reference.mixed_score(eps, z, logit, r)
    got = reference.score_drift(eps, z, logit, f + g2 / (2 * s2), g2 / (2 * var**0.5), r)
    _close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_diffuse(shape, kind):
    z0, noise = _rand(*shape, seed=1), _rand(*shape, seed=2)
    m, var = _scalars(kind, shape[0], 2)
    expected = _naive(shape, lambda i: _at(m, i) * z0[i] + math.sqrt(_at(var, i)) * noise[i])
    _close(reference.diffuse(z0, noise, m, var), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_score_matching_loss(shape, kind):
    pred, noise = _rand(*shape, seed=1), _rand(*shape, seed=2)
    weight_p, weight_q = _scalars(kind, shape[0], 2)
    squared = _naive(shape, lambda i: (pred[i] - noise[i]) ** 2)
    expected_p = torch.zeros(shape[0], dtype=torch.float64)
    for i in _positions(shape):
        expected_p[i[0]] += _at(weight_p, i) * squared[i]
    p_loss, cross_entropy = reference.score_matching_loss(pred, noise, weight_p, weight_q, 0.7)
    _close(p_loss, expected_p)
    _close(cross_entropy, _naive(shape, lambda i: _at(weight_q, i) * squared[i] + 0.7))
    alone, nothing = reference.score_matching_loss(pred, noise, weight_p)
    assert nothing is None and torch.equal(alone, p_loss)


@pytest.mark.parametrize("tensor_h", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (3,), (2, 5)])
def test_runge_kutta(shape, tensor_h):
    y, k = _rand(*shape, seed=1), _rand(4, *shape, seed=2)
    a, b, e, h, rtol, atol = (0.3, -1.2), (0.5, 0.0, 2.0), (0.1, 0.0, -0.7, 0.4), -0.05, 1e-2, 1e-3
    step = torch.tensor(h, dtype=torch.float64) if tensor_h else h
    _close(
        reference.rk_stage(y, k, a, step),
        _naive(shape, lambda i: y[i] + h * sum(c * k[j][i] for j, c in enumerate(a))),
    )
    expected = _naive(shape, lambda i: y[i] + h * sum(c * k[j][i] for j, c in enumerate(b)))

    def ratio(i):
        error = h * sum(c * k[j][i] for j, c in enumerate(e))
        return error / (atol + rtol * max(abs(y[i]), abs(expected[i])))

    ratios = _naive(shape, ratio)
    y_new, norm = reference.rk_finish(y, k, b, e, step, rtol, atol)
    _close(y_new, expected)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(math.sqrt((ratios**2).sum() / max(ratios.numel(), 1)), rel=1e-12)
    y_new, norms = reference.rk_finish(y, k, b, e, step, rtol, atol, per_sample=True)
    _close(y_new, expected)
    each = ratios.reshape(shape[0], -1) if ratios.numel() else ratios.new_zeros(shape[0], 1)
    _close(norms, torch.sqrt((each**2).mean(1)))


@pytest.mark.parametrize("stage", range(7))
def test_a_nan_in_a_stage_reaches_the_error_norm(stage):
    """Except in the second, whose weights are zero: it is not read, and reaches the norm by way of the third."""
    from lsgm_fast.sampling.tableaus import RK45

    k = _rand(7, 2, 3, 1, 1)
    k[stage, 1, 2] = math.nan
    y_new, norm = reference.rk_finish(_rand(2, 3, 1, 1, seed=1), k, RK45.b, RK45.e, 0.1, 1e-3, 1e-3)
    assert math.isnan(norm) == (stage != 1)
    assert bool(torch.isfinite(y_new).all()) == (stage in (1, 6))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_multistep_update(shape, count):
    y = _rand(*shape, seed=1)
    history = list(_rand(count, *shape, seed=2))
    per_channel = _rand(1, shape[1], 1, 1, seed=4)
    coefficients = [0.3, per_channel, torch.tensor(-2.0, dtype=torch.float64)][:count]
    for c_y in (0.9, per_channel + 1.0):
        expected = _naive(
            shape,
            lambda i, c=c_y: (
                _at(c, i) * y[i] + sum(_at(w, i) * h[i] for w, h in zip(coefficients, history, strict=True))
            ),
        )
        _close(reference.multistep_update(y, c_y, history, coefficients), expected)


def _operations(dtype, network_dtype=None):
    """Every operation on one input, as a dictionary of outputs; the state is ``dtype``."""
    network_dtype = network_dtype or dtype
    z, eps = _rand(2, 4, 3, 3, seed=1, dtype=dtype), _rand(2, 4, 3, 3, seed=2, dtype=network_dtype)
    logit = _rand(1, 4, 1, 1, seed=3, dtype=torch.float32)
    p, q, r = (torch.tensor([0.3, 1.7]) * s for s in (1.0, 0.5, 0.9))
    k = torch.stack([eps, -eps, z.to(network_dtype)])
    y_new, norm = reference.rk_finish(z, k, (0.5, 0.1, 0.2), (0.1, -0.1, 0.3), 0.1, 1e-2, 1e-2)
    return {
        "mixed_score": reference.mixed_score(eps, z, logit, r),
        "score_drift": reference.score_drift(eps, z, logit, p, q, r),
        "diffuse": reference.diffuse(z, eps, p, q),
        "rk_stage": reference.rk_stage(z, k, (0.5, 0.1, 0.2), 0.1),
        "rk_finish": y_new,
        "multistep_update": reference.multistep_update(z, 0.9, [eps, z], [0.1, logit]),
        "norm": norm,
    }


@pytest.mark.parametrize("dtype", HALF)
def test_half_inputs_are_evaluated_in_float32_and_rounded_once(dtype):
    for name, got in _operations(dtype).items():
        if name == "norm":
            assert got.dtype == torch.float32
            continue
        assert got.dtype == dtype, name
    # The same rounded inputs in float32: a single rounding of the result apart.
    z, eps = _rand(2, 4, 3, 3, seed=1, dtype=dtype), _rand(2, 4, 3, 3, seed=2, dtype=dtype)
    logit = _rand(1, 4, 1, 1, seed=3, dtype=torch.float32)
    r = torch.tensor([0.3, 1.7])
    wide = reference.mixed_score(eps.float(), z.float(), logit, r)
    assert torch.equal(reference.mixed_score(eps, z, logit, r), wide.to(dtype))


@pytest.mark.parametrize("network_dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_state_with_a_narrow_network_output(dtype, network_dtype):
    for name, got in _operations(dtype, network_dtype).items():
        assert got.dtype == dtype, name
    z, eps = _rand(2, 4, 3, 3, seed=1), _rand(2, 4, 3, 3, seed=2, dtype=network_dtype)
    p, q, r = 0.3, 0.7, 0.9
    exact = p * z + q * (eps.double() - r * z)
    got = reference.score_drift(eps, z, None, p, q, r)
    assert (got - exact).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", HALF)
def test_the_loss_is_not_summed_in_half(dtype):
    pred, noise = _rand(2, 30, 16, 16, seed=1, dtype=dtype), _rand(2, 30, 16, 16, seed=2, dtype=dtype)
    p_loss, cross_entropy = reference.score_matching_loss(pred, noise, 10.0, 1.0)
    assert p_loss.dtype == cross_entropy.dtype == torch.float32
    expected = 10.0 * (pred.double() - noise.double()).square().flatten(1).sum(1)
    torch.testing.assert_close(p_loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_scalars", [True, False])
def test_gradients(batch_scalars):
    shape = (2, 3, 2, 2)

    def leaf(*size, seed, positive=False):
        value = _rand(*size, seed=seed)
        return (value.abs() + 0.5 if positive else value).requires_grad_()

    eps, z, logit = leaf(*shape, seed=1), leaf(*shape, seed=2), leaf(1, 3, 1, 1, seed=3)
    size = (2,) if batch_scalars else ()
    p, q, r = (leaf(*size, seed=s, positive=True) for s in (4, 5, 6))
    k, h = leaf(3, *shape, seed=7), leaf(seed=8, positive=True)
    check = torch.autograd.gradcheck
    assert check(reference.mixed_score, (eps, z, logit, r))
    assert check(reference.score_drift, (eps, z, logit, p, q, r))
    assert check(reference.diffuse, (z, eps, p, q))
    assert check(lambda *x: reference.score_matching_loss(*x, 0.3), (eps, z, p, q))
    assert check(lambda y, k, h: reference.rk_stage(y, k, (0.1, -0.4), h), (z, k, h))
    assert check(
        lambda y, k, h: reference.rk_finish(y, k, (0.1, 0.2), (0.3, 0.1, -0.2), h, 0.1, 0.1), (z, k, h)
    )
    assert check(lambda y, c, a, b: reference.multistep_update(y, c, [a, b], [logit, r]), (z, q, eps, z))


def test_strided_inputs():
    z = _rand(2, 6, 4, 4)[:, ::2].to(memory_format=torch.channels_last)
    eps = _rand(2, 3, 4, 4, seed=1).transpose(2, 3)
    got = reference.score_drift(eps, z, None, 0.1, 0.2, 0.3)
    assert torch.equal(got, reference.score_drift(eps.contiguous(), z.contiguous(), None, 0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda z: reference.mixed_score(z, z, torch.zeros(1, 3, 1, 1), torch.ones(3)),
            r"r has shape \(3,\)",
        ),
        (lambda z: reference.score_drift(z, z, None, 1.0, torch.ones(1, 2), 1.0), r"q has shape \(1, 2\)"),
        (lambda z: reference.diffuse(z, z, torch.ones(5), 1.0), r"m has shape \(5,\).*\(2,\)"),
        (lambda z: reference.rk_stage(z, z[None], (1.0, 2.0), 0.1), "at least 2 stages"),
        (lambda z: reference.rk_stage(z, z[None, :1], (1.0,), 0.1), "at least 1 stages of shape"),
        (lambda z: reference.rk_finish(z, z[None], (1.0,), (1.0, 2.0), 0.1, 1.0, 1.0), "at least 2 stages"),
        (lambda z: reference.multistep_update(z, 1.0, [z], []), "1 history entries"),
        (
            lambda z: reference.multistep_update(z, 1.0, [z[:1]], [1.0]),
            r"history\[0\] has shape \(1, 3, 4, 4\)",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(_rand(2, 3, 4, 4))
