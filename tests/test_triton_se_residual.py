"""The Triton kernels of ``se_residual`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "se_residual"
SMALL = 3_000  # elements: the interpreter is slow
NAMES = ("y", "grad_x", "grad_reduce_weight", "grad_reduce_bias", "grad_expand_weight", "grad_expand_bias")


def samples() -> list[Sample]:
    return [s for s in testing.samples(OP) if s.elements <= SMALL and s.args[0].dtype != torch.float64]


def inputs(
    shape: tuple[int, ...], hidden: int, channels_last: bool = False, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    draw = Draw("cpu", 7, f"{shape} {channels_last} {dtype}")
    layout = "channels_last" if channels_last else "contiguous"
    grad, skip, x = (draw.normal(*shape, dtype=dtype, layout=layout, mean=0.1) for _ in range(3))
    channels = shape[1]
    return [
        grad,
        skip,
        x,
        draw.normal(hidden, channels, std=channels**-0.5),
        draw.normal(hidden, mean=0.7),  # units that are all 0 would test nothing
        draw.normal(channels, hidden, std=hidden**-0.5),
        draw.normal(channels),
    ]


def exact(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients in float64."""
    from lsgm_fast.reference.se_residual import se_residual

    grad, *rest = (t.double() for t in tensors)
    for t in rest[1:]:
        t.requires_grad_()
    out = se_residual(*rest, 0.3)
    return [out.detach(), *torch.autograd.grad(out, rest[1:], grad)]


def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    from lsgm_fast.kernels import se_residual as kernels

    grad, skip, x, w1, b1, w2, b2 = tensors
    with testing.poison_uninitialized():
        out, state = kernels.forward(skip, x, w1, b1, w2, b2, 0.3)
        return [out, *kernels.backward(grad, x, w1, w2, state, 0.3)]


def assert_right(tensors: list[torch.Tensor]) -> None:
    for name, got, want in zip(NAMES, run(tensors), exact(tensors), strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 2e-6, f"{name}: relative L2 error {error}"


def forced(**values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import _channelwise
        from lsgm_fast.kernels import se_residual as kernels

        with pytest.MonkeyPatch.context() as patch:
            for module in (_channelwise, kernels):
                for name, value in values.items():
                    if hasattr(module, name):
                        patch.setattr(module, name, value)
            for shape, hidden in (((2, 6, 4, 8), 4), ((1, 5, 7, 13), 3)):
                for channels_last in (False, True):
                    assert_right(inputs(shape, hidden, channels_last))

    return check


def wide_index() -> None:
    import triton.language as tl

    forced(index_type=lambda elements: tl.int64, SMALL_SAMPLE=0)()


def many_channels_and_hidden_units() -> None:
    """More than a block holds of either."""
    assert_right(inputs((1, 300, 2, 3), 70))


def many_samples() -> None:
    assert_right(inputs((19, 4, 2, 3), 2))


def plans_of_large_tensors() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import se_residual as kernels

    for channels, space in ((128, 2**16), (3, 2**29), (2**10, 2**20), (2, 2**30), (512, 64), (1, 1)):
        for inner in (False, True):
            (programs, blocks), sizes, options = kernels.reduce_plan(3, channels, space, inner)
            reach = options["BLOCK_SPACE"] * options["TILES"]
            assert programs == 3 * sizes["pieces"] and sizes["pieces"] <= kernels.MAX_PIECES
            assert sizes["pieces"] * reach >= space > (sizes["pieces"] - 1) * reach
            assert blocks * options["BLOCK_CHANNELS"] >= channels
            assert sizes["inner_units"] * options["ALIGN"] == (channels if inner else space)
            assert options["INDEX"] == tl.int64 or channels * space < 2**31


def empty() -> None:
    tensors = inputs((0, 3, 4, 4), 2)
    out, grad_x, *parameters = run(tensors)
    assert out.shape == grad_x.shape == (0, 3, 4, 4)
    for got, parameter in zip(parameters, tensors[3:], strict=True):
        assert torch.equal(got, torch.zeros_like(parameter))


def results_have_the_inputs_formats() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels_last in (False, True):
            tensors = inputs((2, 5, 3, 4), 4, channels_last, dtype)
            out, grad_x, *parameters = run(tensors)
            assert out.dtype == grad_x.dtype == dtype
            assert out.stride() == grad_x.stride() == tensors[2].stride()
            assert [p.shape for p in parameters] == [t.shape for t in tensors[3:]]
            assert {p.dtype for p in parameters} == {torch.float32}


def same_every_time() -> None:
    tensors = inputs((2, 7, 5, 5), 4, True, torch.bfloat16)
    for first, second in zip(run(tensors), run(tensors), strict=True):
        assert torch.equal(first, second)


def infinity_stays_in_its_sample() -> None:
    for small in (2**14, 0):
        from lsgm_fast.kernels import se_residual as kernels

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "SMALL_SAMPLE", small)
            tensors = inputs((3, 5, 3, 3), 4)
            tensors[2][1, 0, 0, 0] = float("inf")
            out, grad_x, *_ = run(tensors)
            assert out[[0, 2]].isfinite().all() and grad_x[[0, 2]].isfinite().all()
            assert not out[1].isfinite().all()


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import se_residual as kernels

    def raises(message: str, *tensors: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            kernels.forward(*tensors, 0.1)

    _, skip, x, w1, b1, w2, b2 = inputs((2, 6, 3, 5), 4)
    raises("one memory format", skip.contiguous(memory_format=torch.channels_last), x, w1, b1, w2, b2)
    raises("one shape", skip[:1], x, w1, b1, w2, b2)
    raises("contiguous or the channels_last", skip[..., ::2], x[..., ::2], w1, b1, w2, b2)
    raises(r"expected \(R, 6\) and \(6, R\)", skip, x, w1, b1, w2.t().contiguous(), b2)
    raises("in float32", skip, x, w1.bfloat16(), b1, w2, b2)
    raises("contiguous, in float32", skip, x, w1, b1, w2.t().contiguous().t(), b2)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "samples beyond one program": forced(SMALL_SAMPLE=0),
    "several tiles and pieces": forced(SMALL_SAMPLE=0, TILE=64),
    "few pieces of many tiles": forced(SMALL_SAMPLE=0, TILE=64, MAX_PIECES=1),
    "many channels and hidden units": many_channels_and_hidden_units,
    "many samples": many_samples,
    "beyond 2^31 elements": plans_of_large_tensors,
    "empty": empty,
    "formats": results_have_the_inputs_formats,
    "deterministic": same_every_time,
    "infinity": infinity_stays_in_its_sample,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
