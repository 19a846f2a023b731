"""The Triton kernel of ``philox_normal`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

import math
from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Sample

OP = "philox_normal"
SMALL = 9_000  # elements: the interpreter is slow
ONES = 0xFFFFFFFF


def samples() -> list[Sample]:
    return [s for s in testing.samples(OP) if len(s.args[1]) * math.prod(s.args[3]) <= SMALL]


def known_answers() -> None:
    """Random123's vectors and the reference's words, through the kernel's own generator."""
    import triton
    import triton.language as tl

    from lsgm_fast.kernels.philox_normal import philox
    from lsgm_fast.reference.philox_normal import philox4x32

    @triton.jit
    def words_kernel(state_ptr, out_ptr, PHILOX: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        c0 = tl.load(state_ptr + i).to(tl.uint32)
        c1 = tl.load(state_ptr + BLOCK + i).to(tl.uint32)
        c2 = tl.load(state_ptr + 2 * BLOCK + i).to(tl.uint32)
        c3 = tl.load(state_ptr + 3 * BLOCK + i).to(tl.uint32)
        k0 = tl.load(state_ptr + 4 * BLOCK + i).to(tl.uint32)
        k1 = tl.load(state_ptr + 5 * BLOCK + i).to(tl.uint32)
        x0, x1, x2, x3 = PHILOX(c0, c1, c2, c3, k0, k1)
        tl.store(out_ptr + i, x0.to(tl.int64))
        tl.store(out_ptr + BLOCK + i, x1.to(tl.int64))
        tl.store(out_ptr + 2 * BLOCK + i, x2.to(tl.int64))
        tl.store(out_ptr + 3 * BLOCK + i, x3.to(tl.int64))

    state = torch.randint(0, 2**32, (6, 64), generator=torch.Generator().manual_seed(0))
    state[:, 0], state[:, 1] = 0, ONES
    state[:, 2] = torch.tensor([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0])
    out = torch.empty(4, 64, dtype=torch.int64)
    words_kernel[(1,)](state, out, PHILOX=philox, BLOCK=64)
    expected = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    assert out[:, :3].T.tolist() == expected
    assert torch.equal(out, torch.stack(philox4x32(state[:4].unbind(), state[4:].unbind())))


def draw(seed: int, indices: list[int], stream: int, substream: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The kernel's normals in float64, which tell their uniforms to the last bit."""
    from lsgm_fast.kernels import philox_normal

    with testing.poison_uninitialized():
        words = (seed & ONES, seed >> 32, stream, substream)
        return philox_normal.forward(torch.tensor(indices), *words, shape, torch.float64)


def assert_right(seed: int, indices: list[int], stream: int, substream: int, shape: tuple[int, ...]) -> None:
    from lsgm_fast.reference.philox_normal import philox_normal

    got = draw(seed, indices, stream, substream, shape)
    expected = philox_normal(seed, indices, stream, shape, torch.float64, substream=substream)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def extreme_words() -> None:
    for seed in (0, 2**31, 2**32, 2**63, 2**64 - 1):
        for stream, substream in ((0, 2**31), (2**32 - 1, 2**32 - 1), (2**31, 1)):
            assert_right(seed, [0, 2**31, 2**32 - 1], stream, substream, (21,))


def wide_index() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import philox_normal

    original = philox_normal.index_type
    philox_normal.index_type = lambda elements: tl.int64
    try:
        for shape in ((5,), (64,), (1500,)):
            assert_right(3, [0, 9], 1, 2, shape)
    finally:
        philox_normal.index_type = original


def plans_beyond_two_to_the_31() -> None:
    import triton.language as tl

    from lsgm_fast.kernels.philox_normal import plan

    grid, sizes, options = plan(3, 2**34)
    assert options["INDEX"] == tl.int64
    assert sizes["sample_units"] * options["ALIGN"] == 2**34
    assert sizes["blocks"] * options["COUNTERS"] == 2**32 and grid == (3 * sizes["blocks"],)
    assert all(value < 2**31 for value in (*grid, *sizes.values()))
    for size in (1, 4, 5, 127, 128, 129, 1024, 1025, 5000):
        _, sizes, options = plan(1, size)
        covered = sizes["blocks"] * options["COUNTERS"] * 4
        assert size <= covered < size + 4 * options["COUNTERS"]


def split_requests() -> None:
    whole = draw(1, [0, 1, 2, 3], 5, 0, (3, 13))
    assert torch.equal(torch.cat([draw(1, [0], 5, 0, (3, 13)), draw(1, [1, 2, 3], 5, 0, (3, 13))]), whole)
    assert torch.equal(draw(1, [3, 1], 5, 0, (3, 13)), whole[[3, 1]])
    long = draw(1, [2], 5, 0, (1300,))
    for elements in (1, 3, 39, 1024, 1299):
        assert torch.equal(draw(1, [2], 5, 0, (elements,)), long[:, :elements])


def accuracy() -> None:
    from lsgm_fast.kernels import philox_normal

    got = philox_normal.forward(torch.arange(4), 1, 2, 3, 4, (2000,), torch.float32).double()
    exact = draw(1 + 2 * 2**32, [0, 1, 2, 3], 3, 4, (2000,))
    relative = (got - exact).abs() / exact.abs()
    assert relative[exact.abs() > 1e-5].max() < 6 * 2.0**-23
    assert (got - exact).abs().max() < 2e-6


def empty() -> None:
    from lsgm_fast.kernels import philox_normal

    for indices, shape in (([], (3,)), ([1, 2], (0, 4))):
        out = philox_normal.forward(
            torch.tensor(indices, dtype=torch.int64), 1, 2, 3, 4, shape, torch.bfloat16
        )
        assert out.shape == (len(indices), *shape) and out.dtype == torch.bfloat16


CHECKS: dict[str, Callable[[], None]] = {
    "known answers": known_answers,
    "extreme words": extreme_words,
    "64-bit indices": wide_index,
    "plans": plans_beyond_two_to_the_31,
    "split requests": split_requests,
    "accuracy": accuracy,
    "empty": empty,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
