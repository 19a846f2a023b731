"""``group_norm_resample``: against its parts in float64, with and without gradients, on every backend."""

from __future__ import annotations

import interpreter
import kernel_targets
import pytest
import torch
import torch.nn.functional as F

from lsgm_fast import ops, testing
from lsgm_fast.dispatch import record
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.testing import Draw, check_forward
from lsgm_fast.testing.group_norm_resample import build

NAME = "group_norm_resample"
TARGETS = kernel_targets.targets(NAME)


def call(label, direction, fir=True, shape=(2, 8, 6, 4)):
    return build(Draw("cpu", 0, label), shape, torch.float32, torch.float32, "contiguous", direction, fir)[0]


def independent(x, weight, bias, groups, direction, fir, eps=1e-6):
    """The same from the formulas, in float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    n, c, h, w = x.shape
    v = x.reshape(n, groups, -1)
    v = (v - v.mean(2, keepdim=True)) / (v.var(2, keepdim=True, unbiased=False) + eps).sqrt()
    u = v.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    y = u / (1 + torch.exp(-u))
    if not fir:
        if direction == "up":
            return y.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return y.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    for dim in (2, 3):
        y = F.pad(y.transpose(dim, 3), (1, 1))
        if direction == "down":
            y = F.pad(y, (0, 1))
            y = (y[..., 0:-4:2] + 3 * y[..., 1:-3:2] + 3 * y[..., 2:-2:2] + y[..., 3:-1:2]) / 8
        else:
            low, high = (y[..., :-2] + 3 * y[..., 1:-1]) / 4, (3 * y[..., 1:-1] + y[..., 2:]) / 4
            y = torch.stack((low, high), dim=-1).flatten(-2)
        y = y.transpose(dim, 3)
    return y


@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target):
    backend, device = target
    ran = 0
    with testing.poison_uninitialized():
        for sample in testing.samples(NAME, device):
            why = testing.unsupported(NAME, backend, sample)
            if why:
                with pytest.raises(BackendUnsupported, match=NAME):
                    ops.group_norm_resample(*sample.args, backend=backend)
            elif sample.elements <= kernel_targets.limit(target):
                check_forward(NAME, backend, sample)
                ran += 1
    assert ran > 10


@pytest.mark.parametrize("fir", [True, False])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_formula(backend, direction, fir):
    args = call("formula", direction, fir)
    got = ops.group_norm_resample(*args, backend=backend)
    torch.testing.assert_close(got.double(), independent(*args), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_gradients(direction):
    """They come from the two operations; without them the normalised tensor is never made."""
    args = call("gradients", direction)
    leaves = [t.requires_grad_() for t in args[:3]]
    with record() as log:
        out = ops.group_norm_resample(*args, backend="cpu")
    assert log.counts["group_norm_swish", "cpu"] == 1 and log.counts["group_norm_swish_affine", "cpu"] == 0
    seed = Draw("cpu", 0, "seed").normal(*out.shape)
    out.backward(seed)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    independent(*doubles, *args[3:]).backward(seed.double())
    for leaf, double in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), record() as log:
        ops.group_norm_resample(*args, backend="cpu")
    assert log.counts["group_norm_swish", "cpu"] == 0 and log.counts["group_norm_swish_affine", "cpu"] == 1


def test_refusals_say_why():
    args = call("refusals", "up")
    with pytest.raises(BackendUnsupported, match="float64"):
        ops.group_norm_resample(args[0].double(), *args[1:], backend="cpu")
    with pytest.raises(ValueError, match="groups dividing C"):
        ops.group_norm_resample(*args[:3], 3, "up")
    with pytest.raises(ValueError, match="resampling direction"):
        ops.group_norm_resample(*args[:4], "sideways")
    with pytest.raises(ValueError, match="even H and W"):
        ops.group_norm_resample(args[0][:, :, :5], *args[1:4], "down")


def test_compiled_without_graph_breaks():
    torch._dynamo.reset()
    args = call("compiled", "down")

    def step(x):
        return 2 * ops.group_norm_resample(x + 1, *args[1:], backend="cpu")

    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(args[0]), step(args[0]))
    torch._dynamo.reset()


def _samples():
    return [s for s in testing.samples(NAME) if s.elements <= 500 and s.args[0].dtype != torch.float64]


@pytest.mark.parametrize("sample", [s.id for s in _samples()])
def test_in_the_interpreter(sample):
    interpreter.check(__file__, f"{NAME}: {sample}")


if __name__ == "__main__":
    interpreter.main(interpreter.sample_checks(NAME, _samples()))
