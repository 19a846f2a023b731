"""The Triton kernels of ``diffuse`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "diffuse"
SMALL = 20_000  # elements: the interpreter is slow


def samples() -> list[Sample]:
    return [s for s in testing.samples(OP) if s.elements <= SMALL]


def inputs(
    shape: tuple[int, ...], channels_last: bool = False, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    draw = Draw("cpu", 7, f"{shape} {channels_last} {dtype}")
    layout = "channels_last" if channels_last else "contiguous"
    z0, noise = (draw.normal(*shape, dtype=dtype, layout=layout) for _ in range(2))
    return [z0, noise, *(draw.uniform(shape[0], low=0.1, high=1.0) for _ in range(2))]


def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    from lsgm_fast.kernels import diffuse

    z0, _, m, _ = tensors
    with testing.poison_uninitialized():
        return [diffuse.forward(*tensors), diffuse.backward(z0, m, z0.dtype)]


def assert_right(tensors: list[torch.Tensor]) -> None:
    z0, noise, m, var = (t.double() for t in tensors)
    m, var = (t.reshape(-1, *(1,) * (z0.dim() - 1)) for t in (m, var))
    for got, want in zip(run(tensors), (m * z0 + var.sqrt() * noise, m * z0), strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 1e-6, f"relative L2 error {error}"


def wide_index() -> None:
    """Tries what only large tensors lead to, on small ones."""
    import triton.language as tl

    from lsgm_fast.kernels import diffuse

    original = diffuse.index_type
    diffuse.index_type = lambda elements: tl.int64
    try:
        for shape in ((5, 6, 4, 8), (3, 5, 3, 7), (2, 36, 8, 8)):
            for channels_last in (False, True):
                assert_right(inputs(shape, channels_last))
    finally:
        diffuse.index_type = original


def blocks_cover_samples() -> None:
    for size in (1, 255, 256, 257, 1023, 1024, 1025, 3000):
        assert_right(inputs((2, size)))


def plans_of_large_tensors() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import diffuse

    for size in (2**31 - 2**13, 2**31 - 1, 2**31, 2**34 + 1):
        (programs,), sizes, options = diffuse.plan(3, size)
        reach = sizes["blocks"] * options["BLOCK"]
        assert programs == 3 * sizes["blocks"] and reach >= size
        assert sizes["sample_units"] * options["ALIGN"] == size
        assert options["INDEX"] == tl.int64 or reach < 2**31


def empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        assert all(result.shape == shape for result in run(inputs(shape)))


def results_have_the_inputs_formats() -> None:
    from lsgm_fast.kernels import diffuse

    for dtype in (torch.float32, torch.float16, torch.float64):
        for channels_last in (False, True):
            z0, noise, m, var = inputs((2, 5, 3, 4), channels_last)
            out = diffuse.forward(z0.to(dtype), noise, m, var)
            grad = diffuse.backward(z0, m, dtype)
            assert out.dtype == grad.dtype == dtype
            assert out.stride() == grad.stride() == z0.stride()


def expanded_scalars() -> None:
    z0, noise, _, _ = inputs((3, 4, 2, 5))
    assert_right([z0, noise, torch.tensor(0.3).expand(3), torch.tensor(0.7).expand(3)])


def same_every_time() -> None:
    tensors = inputs((9, 7, 5, 5), True, torch.bfloat16)
    for first, second in zip(run(tensors), run(tensors), strict=True):
        assert torch.equal(first, second)


def infinity_stays_in_its_sample() -> None:
    z0, noise, m, var = inputs((3, 5, 3, 3))
    m[1] = float("inf")
    for result in run([z0, noise, m, var]):
        assert result[[0, 2]].isfinite().all() and not result[1].isfinite().any()


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import diffuse

    def raises(message: str, *tensors: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            diffuse.forward(*tensors)

    z0, noise, m, var = inputs((4, 6, 3, 5))
    raises("one memory format", z0.contiguous(memory_format=torch.channels_last), noise, m, var)
    raises("one shape", z0[:, :, :2].contiguous(), noise, m, var)
    raises("contiguous or the channels_last", z0[..., ::2], noise[..., ::2], m, var)
    raises(r"expected \(\), \(1,\) or \(4,\)", z0, noise, m[:3], var)
    with pytest.raises(ValueError, match="contiguous or the channels_last"):
        diffuse.backward(z0[..., ::2], m, torch.float32)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "sizes around a block's": blocks_cover_samples,
    "beyond 2^31 elements": plans_of_large_tensors,
    "empty": empty,
    "formats": results_have_the_inputs_formats,
    "expanded scalars": expanded_scalars,
    "deterministic": same_every_time,
    "infinite m": infinity_stays_in_its_sample,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
