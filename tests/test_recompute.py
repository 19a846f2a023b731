"""Weights that are normalised once, and parts of a model that are computed again in the backward pass."""

from __future__ import annotations

import pytest
import torch

import lsgm_fast
from lsgm_fast import random
from lsgm_fast.dispatch import record
from lsgm_fast.nn.layers import normalized_weights

# -- weights, normalised once ----------------------------------------------------------------------------------------


def _vae(preset="tiny-binary"):
    torch.manual_seed(0)
    return lsgm_fast.build(preset).vae.train()


def _input(vae, n=2):
    size = vae.config.image_size
    return random.uniform(1, range(n), "images", (vae.config.image_channels, size, size)) * 2.0 - 1.0


def _weight_norms(log):
    return sum(calls for (op, _), calls in log.counts.items() if op == "weight_norm")


def _gradients(vae, regularised, inside):
    """Gradients of a loss of the VAE plus one of its weights, these from ``inside`` the block or computed apart."""
    x = _input(vae)
    vae.zero_grad()
    if inside:
        with normalized_weights(vae.weight_norm_convs) as weights:
            loss = vae(x)[0].square().mean() + regularised(weights)
    else:
        with normalized_weights(vae.weight_norm_convs) as weights:
            penalty = regularised(weights)
        loss = vae(x)[0].square().mean() + penalty
    loss.backward()
    return {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}


def test_an_enclosing_block_normalises_for_the_model_too():
    def regularised(weights):
        return sum(w.square().sum() * (i + 1.0) for i, w in enumerate(weights))

    vae = _vae()
    assert len(vae.weight_norm_convs) > 10 and isinstance(vae.weight_norm_convs, tuple)
    with record() as apart:
        expected = _gradients(vae, regularised, inside=False)
    with record() as together:
        gradients = _gradients(vae, regularised, inside=True)
    assert (_weight_norms(apart), _weight_norms(together)) == (2, 1)
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            gradients[name], value, rtol=1e-4, atol=1e-5 * float(1.0 + value.abs().max())
        )
    assert all(conv.prepared_weight is None for conv in vae.weight_norm_convs)


def test_blocks_drop_what_they_prepared():
    convs = _vae().weight_norm_convs[:4]
    with normalized_weights(convs[:2]) as outer:
        with normalized_weights((convs[2], convs[1])) as inner:
            assert inner[0] is convs[2].prepared_weight and inner[1] is convs[1].prepared_weight
            assert inner[1] is outer[1]
        assert [c.prepared_weight is None for c in convs] == [False, False, True, True]
        assert convs[1].prepared_weight is outer[1]
        with pytest.raises(KeyboardInterrupt), normalized_weights(convs):
            raise KeyboardInterrupt
        assert [c.prepared_weight is None for c in convs] == [False, False, True, True]
    assert all(c.prepared_weight is None for c in convs)


def test_the_models_own_block_fails_inside_an_enclosing_one():
    vae = _vae()
    convs = vae.weight_norm_convs
    with normalized_weights(convs) as weights:
        with pytest.raises(RuntimeError):
            vae(_input(vae)[:, :, :5])
        assert all(c.prepared_weight is w for c, w in zip(convs, weights, strict=True))
    assert all(c.prepared_weight is None for c in convs)
