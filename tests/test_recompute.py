"""Weights that are normalised once, and parts of a model that are computed again in the backward pass."""

from __future__ import annotations

import pytest
import torch

import lsgm_fast
from lsgm_fast import ops, random, reference
from lsgm_fast.dispatch import Impl, record, use_backend
from lsgm_fast.models import LSGM
from lsgm_fast.nn.layers import BatchNormSwish, normalized_weights
from lsgm_fast.nn.recompute import recomputed
from lsgm_fast.presets import get_preset

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


# -- recomputation ---------------------------------------------------------------------------------------------------


def _model(preset, recompute):
    config = get_preset(preset)
    torch.manual_seed(0)
    model = LSGM.from_config(config.replace(score=config.score.replace(dropout=0.3))).train()
    # The published initialisation makes the second half of every block all but zero, and its gradients with it.
    with torch.no_grad():
        for i, parameter in enumerate(model.prior.parameters()):
            parameter += 0.05 * random.normal(3, range(1), "weights", parameter.shape, substream=i)[0]
    model.vae.recompute = model.prior.recompute = recompute
    return model


def _loss(model, n=2):
    """Of the VAE and, through a latent, of the score network with dropout."""
    vae, x = model.vae, _input(model.vae, n)
    logits, groups = vae(x, seed=5)
    z = vae.merge_groups([group.eps for group in groups])
    prediction = model.prior(z, random.uniform(4, range(n), "time"))
    log_q = sum(group.log_q.sum() for group in groups)
    return vae.reconstruction_loss(logits, x).sum() + log_q + prediction.float().square().sum()


def _step(preset, recompute, autocast=False):
    """Loss, gradients, buffers and the state of PyTorch's generator after one step."""
    model = _model(preset, recompute)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = _loss(model)
    loss.backward()
    found = {"loss": loss.detach(), "generator": torch.get_rng_state()}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("preset", ["tiny-rgb", "tiny-binary", "tiny-multiscale"])
def test_recomputation_changes_no_bit(preset, autocast):
    expected, actual = _step(preset, False, autocast), _step(preset, True, autocast)
    assert actual.keys() == expected.keys()
    different = [
        name for name, value in expected.items() if value is not None and not torch.equal(actual[name], value)
    ]
    assert not different
    tracked = [name for name in expected if name.endswith("num_batches_tracked")]
    assert tracked and all(int(actual[name]) == 1 for name in tracked)
    assert all(value is None for name, value in actual.items() if expected[name] is None)
    assert float(expected["gradient prior.mid_block1.conv2.weight"].abs().max()) > 0.0


def test_dropout_is_on_in_this_comparison():
    model = _model("tiny-rgb", True)
    z, t = torch.ones(1, *model.latent_shape), torch.tensor(0.5)
    assert not torch.equal(model.prior(z, t), model.prior(z, t))


def _saved_bytes(compute):
    """Bytes that autograd keeps between forward and backward, each storage once."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()  # kept to the end: storages that are freed share addresses with later ones
    del result
    return sum(sizes.values())


@pytest.mark.parametrize("preset", ["tiny-rgb", "tiny-binary", "tiny-multiscale"])
def test_recomputation_keeps_less(preset):
    plain, recompute = _model(preset, False), _model(preset, True)
    x = _input(plain.vae, 8)
    z, t = random.normal(6, range(8), "z", plain.latent_shape), random.uniform(6, range(8), "t")
    for part in ("vae", "prior"):
        args = (x,) if part == "vae" else (z, t)
        most = _saved_bytes(lambda part=part, args=args: getattr(plain, part)(*args))
        least = _saved_bytes(lambda part=part, args=args: getattr(recompute, part)(*args))
        assert 0 < least < most / 2


def test_nothing_is_recomputed_outside_of_training():
    model = _model("tiny-binary", True)
    x = _input(model.vae)
    with torch.no_grad():
        assert _saved_bytes(lambda: model.vae(x)) == 0
    recompute = _saved_bytes(lambda: model.eval().vae(x))
    model.vae.recompute = False
    assert _saved_bytes(lambda: model.vae(x)) == recompute


def test_other_weights_are_in_place_again_after_the_backward_pass():
    """Backward in a block that holds the weights of a later step: used there, they would give other gradients."""
    expected, vae = _vae(), _vae()
    vae.recompute = True
    x = _input(vae)
    for model in (expected, vae):
        logits, _ = model(x)
        with normalized_weights(model.weight_norm_convs) as prepared:
            with torch.no_grad():
                for w in prepared:
                    w *= 2.0
            logits.square().mean().backward()
            assert all(c.prepared_weight is w for c, w in zip(model.weight_norm_convs, prepared, strict=True))
    for p, q in zip(vae.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) if q.grad is not None else p.grad is None


def test_the_backward_pass_recomputes_with_the_same_backend(monkeypatch):
    """Here the choice's block is over by then; on CUDA the backward pass runs in another thread."""
    monkeypatch.setitem(ops.bn_swish._impls, "triton", Impl("triton", reference.bn_swish))
    module, x = BatchNormSwish(3).train(), torch.ones(2, 3, 4, 4, requires_grad=True)
    with use_backend("triton"), record() as forward:
        y = recomputed(module, x, when=True)
    with record() as backward:
        y.sum().backward()
    assert forward.backends() == backward.backends() == {"bn_swish": "triton"}
    with record() as log:
        module(x)
    assert log.backends() == {"bn_swish": "reference"}
