"""The Triton kernels of ``score_matching_loss`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "score_matching_loss"
SMALL = 20_000  # elements: the interpreter is slow


def samples() -> list[Sample]:
    return [s for s in testing.samples(OP) if s.elements <= SMALL]


def inputs(
    shape: tuple[int, ...], channels_last: bool = False, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    draw = Draw("cpu", 7, f"{shape} {channels_last} {dtype}")
    layout = "channels_last" if channels_last else "contiguous"
    pred, noise = (draw.normal(*shape, dtype=dtype, layout=layout) for _ in range(2))
    return [pred, noise, *(draw.uniform(shape[0], low=0.1, high=1.0) for _ in range(2))]


def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The two results, and the gradients of weight_q times the first and pred times the second."""
    from lsgm_fast.kernels import score_matching_loss as kernels

    grad_p, grad_ce = tensors[3], tensors[0].float()
    with testing.poison_uninitialized():
        return [
            *kernels.forward(*tensors, 0.5),
            *kernels.backward(grad_p, grad_ce, *tensors, True, True),
        ]


def assert_right(tensors: list[torch.Tensor]) -> None:
    pred, noise, p, q = (t.double() for t in tensors)
    p, q = (t.reshape(-1, *(1,) * (pred.dim() - 1)) for t in (p, q))
    square = (pred - noise).square()
    gradient = 2 * (pred - noise) * (p * q + q * pred)
    wanted = ((p * square).flatten(1).sum(1), q * square + 0.5, gradient, -gradient)
    for name, got, want in zip(
        ("p_loss", "cross entropy", "pred", "noise"), run(tensors), wanted, strict=True
    ):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 1e-6, f"{name}: relative L2 error {error}"


def forced(**values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import score_matching_loss as kernels

        original = {name: getattr(kernels, name) for name in values}
        vars(kernels).update(values)
        try:
            for shape in ((5, 6, 4, 8), (3, 5, 3, 7), (2, 36, 8, 8), (2, 41, 9, 13)):
                for channels_last in (False, True):
                    assert_right(inputs(shape, channels_last))
        finally:
            vars(kernels).update(original)

    return check


def wide_index() -> None:
    import triton.language as tl

    forced(index_type=lambda elements: tl.int64)()


def blocks_cover_samples() -> None:
    for size in (1, 255, 256, 257, 1023, 1024, 1025, 3000):
        assert_right(inputs((2, size)))


def plans_of_large_tensors() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import score_matching_loss as kernels

    for size in (2**20, 2**21, 2**31 - 2**20, 2**31 - 2**13, 2**31 - 1, 2**31, 2**34 + 1):
        for tiles in (False, True):
            (programs,), sizes, options = kernels.plan(3, size, tiles)
            reach = sizes["blocks"] * options["BLOCK"] * options.get("TILES", 1)
            assert programs == 3 * sizes["blocks"] and reach >= size
            assert sizes["sample_units"] * options["ALIGN"] == size
            assert options["INDEX"] == tl.int64 or reach < 2**31
            assert not tiles or sizes["blocks"] <= kernels.MAX_PARTIALS


def empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        p_loss, *others = run(inputs(shape))
        assert torch.equal(p_loss, torch.zeros(shape[0]))
        assert all(result.shape == shape for result in others)


def results_have_the_inputs_formats() -> None:
    from lsgm_fast.kernels import score_matching_loss as kernels

    for dtype in (torch.float32, torch.float16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for channels_last in (False, True):
            pred, noise, p, q = inputs((2, 5, 3, 4), channels_last)
            args = pred.to(dtype), noise.half(), p, q
            p_loss, cross_entropy = kernels.forward(*args, 0.5)
            grads = kernels.backward(p, q, *args, True, True)
            assert p_loss.dtype == cross_entropy.dtype == wide
            assert [g.dtype for g in grads] == [dtype, torch.float16]
            assert {t.stride() for t in (cross_entropy, *grads)} == {pred.stride()}


def what_is_not_wanted_is_left_out() -> None:
    from lsgm_fast.kernels import score_matching_loss as kernels

    tensors = inputs((3, 7, 5, 5))
    pred, noise, p, q = tensors
    both = kernels.forward(*tensors, 0.5)
    alone, nothing = kernels.forward(pred, noise, p, None, 0.5)
    assert torch.equal(alone, both[0]) and nothing.shape == (0,)
    grad_ce = torch.randn(pred.shape, generator=torch.Generator().manual_seed(0))
    for grad_p, grad in ((p, None), (None, q), (None, grad_ce), (p, grad_ce)):
        expected = kernels.backward(grad_p, grad, *tensors, True, True)
        for wanted in ((True, False), (False, True), (False, False)):
            for got, want, there in zip(
                kernels.backward(grad_p, grad, *tensors, *wanted), expected, wanted, strict=True
            ):
                assert torch.equal(got, want) if there else got.shape == (0,)
    spread = q[:, None, None, None].expand(pred.shape).contiguous()
    per_sample = kernels.backward(p, q, *tensors, True, True)
    for ours, theirs in zip(per_sample, kernels.backward(p, spread, *tensors, True, True), strict=True):
        assert torch.equal(ours, theirs)


def expanded_scalars() -> None:
    pred, noise, _, _ = inputs((3, 4, 2, 5))
    assert_right([pred, noise, torch.tensor(0.3).expand(3), torch.tensor(0.7).expand(3)])


def same_every_time() -> None:
    tensors = inputs((5, 41, 9, 13), True, torch.bfloat16)
    for first, second in zip(run(tensors), run(tensors), strict=True):
        assert torch.equal(first, second)


def infinite_weights_stay_in_their_samples() -> None:
    """What a block masks is 0, which an infinite weight would turn into NaN."""
    pred, noise, p, q = inputs((3, 5, 3, 3))
    p[1] = float("inf")
    p_loss, cross_entropy, *_ = run([pred, noise, p, q])
    assert p_loss[1] == float("inf") and p_loss[[0, 2]].isfinite().all()
    assert cross_entropy.isfinite().all()


def constants_in_float64() -> None:
    from lsgm_fast.kernels import score_matching_loss as kernels

    pred = torch.zeros(1, 3, dtype=torch.float64)
    _, cross_entropy = kernels.forward(pred, pred, torch.ones(()), torch.ones(()), 0.1)
    assert torch.equal(cross_entropy, torch.full_like(pred, 0.1))


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import score_matching_loss as kernels

    def raises(message: str, *tensors: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            kernels.forward(*tensors, 0.0)

    pred, noise, p, q = inputs((4, 6, 3, 5))
    raises("one memory format", pred.contiguous(memory_format=torch.channels_last), noise, p, q)
    raises("one shape", pred[:, :, :2].contiguous(), noise, p, q)
    raises("contiguous or the channels_last", pred[..., ::2], noise[..., ::2], p, q)
    raises(r"weight_p .*expected \(\), \(1,\) or \(4,\)", pred, noise, p[:3], q)
    raises(r"weight_q .*expected \(\), \(1,\) or \(4,\)", pred, noise, p, q[:3])
    for message, grad_ce, weight_q in (
        ("one memory format", pred.contiguous(memory_format=torch.channels_last), q),
        ("needs weight_q", pred, None),
        ("grad_ce has shape", p[:3], q),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.backward(None, grad_ce, pred, noise, p, weight_q, True, True)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "several tiles per program": forced(MAX_PARTIALS=2),
    "one program per sample": forced(MAX_PARTIALS=1),
    "sizes around a block's": blocks_cover_samples,
    "beyond 2^31 elements": plans_of_large_tensors,
    "empty": empty,
    "formats": results_have_the_inputs_formats,
    "left out": what_is_not_wanted_is_left_out,
    "expanded scalars": expanded_scalars,
    "deterministic": same_every_time,
    "infinite weights": infinite_weights_stay_in_their_samples,
    "constants in float64": constants_in_float64,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
