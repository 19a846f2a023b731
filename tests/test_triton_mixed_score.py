"""The Triton kernels of ``mixed_score`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "mixed_score"
SMALL = 20_000  # elements: the interpreter is slow


def samples() -> list[Sample]:
    small = [s for s in testing.samples(OP) if max(t.numel() for t in s.tensors()) <= SMALL]
    return [s for s in small if s.args[2] is not None]


def inputs(
    shape: tuple[int, ...], channels_last: bool = False, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    draw = Draw("cpu", 7, f"{shape} {channels_last} {dtype}")
    layout = "channels_last" if channels_last else "contiguous"
    eps, z, grad = (draw.normal(*shape, dtype=dtype, layout=layout) for _ in range(3))
    logit = draw.normal(1, shape[1], *(1,) * (len(shape) - 2), std=2.0)
    return [grad, eps, z, logit, draw.uniform(shape[0], low=0.1, high=1.0)]


def exact(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the three gradients in float64."""
    from lsgm_fast.reference.mixed_score import mixed_score

    grad, *rest = (t.double() for t in tensors)
    for t in rest[:3]:
        t.requires_grad_()
    out = mixed_score(*rest)
    return [out.detach(), *torch.autograd.grad(out, rest[:3], grad)]


def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    from lsgm_fast.kernels import mixed_score

    with testing.poison_uninitialized():
        return [mixed_score.forward(*tensors[1:]), *mixed_score.backward(*tensors)]


def assert_right(tensors: list[torch.Tensor]) -> None:
    for name, got, want in zip(
        ("out", "grad_eps", "grad_z", "grad_logit"), run(tensors), exact(tensors), strict=True
    ):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 1e-6, f"{name}: relative L2 error {error}"


def forced(**values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import _channelwise, mixed_score

        users = [
            (module, name)
            for module in (_channelwise, mixed_score)
            for name in values
            if hasattr(module, name)
        ]
        with pytest.MonkeyPatch.context() as patch:
            for module, name in users:
                patch.setattr(module, name, values[name])
            for shape in ((5, 6, 4, 8), (3, 5, 3, 7), (4, 36, 2, 2)):
                for channels_last in (False, True):
                    assert_right(inputs(shape, channels_last))

    return check


def wide_index() -> None:
    import triton.language as tl

    forced(index_type=lambda elements: tl.int64)()


def empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        out, grad_eps, grad_z, grad_logit = run(inputs(shape))
        assert out.shape == grad_eps.shape == grad_z.shape == shape
        assert grad_logit.shape == (1, 3, 1, 1)
        assert torch.equal(grad_logit, torch.zeros(1, 3, 1, 1))


def results_have_the_inputs_formats() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            grad, eps, z, logit, r = inputs((2, 5, 3, 4), channels_last)
            out, grad_eps, grad_z, grad_logit = run([grad, eps.to(dtype), z, logit.double(), r])
            assert out.dtype == grad_z.dtype == z.dtype
            assert grad_eps.dtype == dtype
            assert grad_logit.dtype == torch.float64
            assert out.stride() == grad_eps.stride() == grad_z.stride() == z.stride()
            assert grad_logit.shape == logit.shape


def r_expanded() -> None:
    *tensors, _ = inputs((3, 4, 2, 5))
    assert_right([*tensors, torch.tensor(0.3).expand(3)])


def same_every_time() -> None:
    tensors = inputs((9, 7, 5, 5), True, torch.bfloat16)
    for first, second in zip(run(tensors), run(tensors), strict=True):
        assert torch.equal(first, second)


def extreme_logits() -> None:
    """Both a and 1 - a keep their digits far from 0, where 1 - a computed from a has none left."""
    tensors = inputs((3, 6, 4, 4))
    tensors[3] = torch.tensor([15.0, -15.0, 9.0, -9.0, 3.0, 0.0]).reshape(1, 6, 1, 1)
    for name, got, want in zip(
        ("grad_eps", "grad_z", "grad_logit"), run(tensors)[1:], exact(tensors)[1:], strict=True
    ):
        error = (got.double() - want).abs().amax((0, 2, 3)) / want.abs().amax((0, 2, 3))
        assert error.max() < 3e-6, f"{name}: relative error per channel {error.tolist()}"


def infinite_r_stays_in_its_sample() -> None:
    *tensors, r = inputs((3, 5, 3, 3))
    r[1] = float("inf")
    out, grad_eps, grad_z, _ = run([*tensors, r])
    for result in (out, grad_eps, grad_z):
        assert result[[0, 2]].isfinite().all()
    assert grad_eps.isfinite().all()


def raises(message: str, *tensors: torch.Tensor) -> None:
    from lsgm_fast.kernels import mixed_score

    with pytest.raises(ValueError, match=message):
        mixed_score.forward(*tensors)


def refuses_what_it_would_misread() -> None:
    _, eps, z, logit, r = inputs((4, 6, 3, 5))
    raises("one memory format", eps.contiguous(memory_format=torch.channels_last), z, logit, r)
    raises("one shape", eps[:, :, :2].contiguous(), z, logit, r)
    raises("contiguous or the channels_last", eps[..., ::2], z[..., ::2], logit, r)
    raises("6 values", eps, z, logit[:, :3], r)
    raises(r"expected \(\), \(1,\) or \(4,\)", eps, z, logit, r[:3])


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "several tiles per program": forced(MAX_PROGRAMS=4),
    "one program per channel block": forced(MAX_PROGRAMS=1),
    "empty": empty,
    "formats": results_have_the_inputs_formats,
    "expanded r": r_expanded,
    "deterministic": same_every_time,
    "extreme logits": extreme_logits,
    "infinite r": infinite_r_stays_in_its_sample,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
