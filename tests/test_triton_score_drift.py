"""The Triton kernel of ``score_drift`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "score_drift"
SMALL = 20_000  # elements: the interpreter is slow
ONE_SAMPLE = (1, 6, 4, 8)


def samples() -> list[Sample]:
    return [s for s in testing.samples(OP) if s.elements <= SMALL]


def inputs(
    shape: tuple[int, ...], channels_last: bool = False, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    draw = Draw("cpu", 7, f"{shape} {channels_last} {dtype}")
    layout = "channels_last" if channels_last else "contiguous"
    eps, z = (draw.normal(*shape, dtype=dtype, layout=layout) for _ in range(2))
    logit = draw.normal(1, shape[1], *(1,) * (len(shape) - 2), std=2.0)
    return [eps, z, logit, *(draw.uniform(shape[0], low=0.1, high=3.0) for _ in range(3))]


def run(tensors: list[torch.Tensor | None]) -> torch.Tensor:
    from lsgm_fast.kernels import score_drift

    with testing.poison_uninitialized():
        return score_drift.forward(*tensors)


def assert_right(tensors: list[torch.Tensor]) -> None:
    from lsgm_fast.reference.score_drift import score_drift

    for mixed in (True, False):
        args = [*tensors[:2], tensors[2] if mixed else None, *tensors[3:]]
        want = score_drift(*(a if a is None else a.double() for a in args))
        got = run(args)
        assert got.stride() == tensors[1].stride()
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 1e-6, f"mixed {mixed}: relative L2 error {error}"


def everything() -> None:
    for shape in ((5, 6, 4, 8), (3, 5, 3, 7), (4, 36, 2, 2), ONE_SAMPLE, (2, 3, 40, 33)):
        for channels_last in (False, True):
            assert_right(inputs(shape, channels_last))


def wide_index() -> None:
    """What only samples beyond 2^31 elements lead to, on small ones."""
    import triton.language as tl

    from lsgm_fast.kernels import _channelwise

    assert _channelwise.index_type(2**31) == tl.int64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_channelwise, "index_type", lambda elements: tl.int64)
        assert _channelwise.forward_plan(2, 3, 4, False)[2]["INDEX"] == tl.int64
        everything()


def small_blocks() -> None:
    from lsgm_fast.kernels import _channelwise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_channelwise, "forward_block", lambda size: 32)
        everything()


def empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        assert run(inputs(shape)).shape == shape


def results_have_the_format_and_dtype_of_z() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            eps, z, *rest = inputs((2, 5, 3, 4), channels_last)
            out = run([eps.to(dtype), z, *rest])
            assert out.dtype == z.dtype
            assert out.stride() == z.stride()


def scalars_of_any_stride() -> None:
    tensors = inputs((3, 4, 2, 5))
    block = torch.rand(3, 8, dtype=torch.float64) + 0.1
    assert_right([*tensors[:3], block[:, 1], torch.tensor(0.3).expand(3), torch.tensor([0.7])])


def same_every_time() -> None:
    tensors = inputs((9, 7, 5, 5), True, torch.bfloat16)
    assert torch.equal(run(tensors), run(tensors))


def cancellation() -> None:
    """The difference is formed first: its error is not that of q eps and q r z, each rounded."""
    eps, z, logit, p, q, r = inputs((3, 6, 4, 4))
    eps = r.reshape(3, 1, 1, 1) * z * (1 + 1e-4 * eps)
    p, q = torch.zeros(3), torch.full((3,), 1e4)
    assert_within_the_inputs_roundings(eps, z, logit, p, q, r)


def assert_within_the_inputs_roundings(eps, z, logit, p, q, r) -> None:
    weight = torch.sigmoid(logit.double()) * q.double().reshape(-1, 1, 1, 1)
    product = r.double().reshape(-1, 1, 1, 1) * z.double()
    error = (run([eps, z, logit, p, q, r]).double() - weight * (eps.double() - product)).abs()
    # One rounding of the product r z, and a few of the small result.
    assert (error <= weight * (product.abs() + 8 * (eps - product).abs()) * 2**-24).all()


def extreme_logits() -> None:
    """a keeps its digits far from 0."""
    tensors = inputs((3, 6, 4, 4))
    tensors[2] = torch.tensor([15.0, -15.0, 40.0, -40.0, 3.0, 0.0]).reshape(1, 6, 1, 1)
    tensors[3] = torch.zeros(3)
    from lsgm_fast.reference.score_drift import score_drift

    want = score_drift(*(t.double() for t in tensors))
    error = (run(tensors).double() - want).abs().amax((0, 2, 3)) / want.abs().amax((0, 2, 3))
    assert error.max() < 3e-6, f"relative error per channel {error.tolist()}"


def infinite_q_stays_in_its_sample() -> None:
    tensors = inputs((3, 5, 3, 3))
    tensors[4][1] = float("inf")
    out = run(tensors)
    assert out[[0, 2]].isfinite().all()
    assert not out[1].isfinite().any()


def raises(message: str, *tensors: torch.Tensor) -> None:
    from lsgm_fast.kernels import score_drift

    with pytest.raises(ValueError, match=message):
        score_drift.forward(*tensors)


def refuses_what_it_would_misread() -> None:
    eps, z, logit, p, q, r = inputs((4, 6, 3, 5))
    raises("one memory format", eps.contiguous(memory_format=torch.channels_last), z, logit, p, q, r)
    raises("one shape", eps[:, :, :2].contiguous(), z, logit, p, q, r)
    raises("contiguous or the channels_last", eps[..., ::2], z[..., ::2], logit, p, q, r)
    raises("6 values", eps, z, logit[:, :3], p, q, r)
    raises(r"q has shape \(3,\), expected \(\), \(1,\) or \(4,\)", eps, z, logit, p, q[:3], r)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "many programs per sample": small_blocks,
    "empty": empty,
    "formats": results_have_the_format_and_dtype_of_z,
    "strided scalars": scalars_of_any_stride,
    "deterministic": same_every_time,
    "cancellation": cancellation,
    "extreme logits": extreme_logits,
    "infinite q": infinite_q_stays_in_its_sample,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
