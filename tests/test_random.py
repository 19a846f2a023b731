"""Counter-based random numbers: known answers, statistics, and independence of batching."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from lsgm_fast import random
from lsgm_fast.reference.philox_normal import philox4x32, philox_normal, philox_words, stream_word

ONES = 0xFFFFFFFF

# Random123's kat_vectors for philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# philox_normal(2021, [0, 1], "z", (3,)) in float64.
FROZEN = [
    -0.5837614691847545,
    -1.1111600644269024,
    -0.4099215248856548,
    -1.5933715777011837,
    1.0099334465611125,
    -2.926741427978458,
]


def _philox_in_python_integers(counter, key):
    """The generator again, in unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected
    tensors = [torch.tensor([word, word]) for word in counter]
    got = philox4x32(tensors, [torch.tensor(word) for word in key])
    assert all(word.tolist() == [value, value] for word, value in zip(got, expected, strict=True))


def test_products_beyond_63_bits_agree_with_unbounded_integers():
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, size=(200, 4))
    keys = generator.integers(0, 2**32, size=(200, 2))
    got = torch.stack(philox4x32(torch.from_numpy(counters).unbind(1), torch.from_numpy(keys).unbind(1)), 1)
    for counter, key, words in zip(counters.tolist(), keys.tolist(), got.tolist(), strict=True):
        assert tuple(words) == _philox_in_python_integers(counter, key)


@pytest.mark.parametrize("seed", [1, 2**32 - 1])
def test_compiled_words_are_the_same(seed):
    """Words have all 32 bits and products up to 64, where a compiler for CPUs finds overflow that is undefined."""
    torch._dynamo.reset()
    indices = torch.tensor([4, 2**32 - 1])
    compiled = torch.compile(lambda i: philox_words(seed, i, "z", 129), fullgraph=True)
    assert torch.equal(compiled(indices), philox_words(seed, indices, "z", 129))


def test_words_need_four_and_two():
    with pytest.raises(ValueError, match="4 counter words and 2 key words, got 3 and 2"):
        philox4x32((0, 0, 0), (0, 0))


def _naive_normal(seed, sample, stream, position, substream=0):
    words = _philox_in_python_integers(
        (position // 4, stream_word(stream), sample, substream), (seed & ONES, seed >> 32)
    )
    pair = position % 4 // 2
    u1 = np.float32(np.float32(np.float32(words[2 * pair]) * np.float32(2.0**-32)) + np.float32(2.0**-33))
    u2 = np.float32(np.float32(words[2 * pair + 1]) * np.float32(2.0**-32))
    radius = math.sqrt(-2.0 * math.log(float(u1)))
    return radius * (math.sin if position % 2 else math.cos)(2.0 * math.pi * float(u2))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (2, 3, 1), (5, 7)])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1])
def test_against_the_definition_one_element_at_a_time(seed, shape):
    samples = [0, 5, 2**32 - 1]
    exact = philox_normal(seed, samples, "z", shape, torch.float64, substream=3)
    single = philox_normal(seed, torch.tensor(samples), "z", shape, substream=3)
    assert exact.shape == single.shape == (3, *shape)
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    elements = math.prod(shape)
    expected = [[_naive_normal(seed, s, "z", i, 3) for i in range(elements)] for s in samples]
    expected = torch.tensor(expected, dtype=torch.float64).view(3, *shape)
    assert (exact - expected).abs().max() < 1e-13
    assert (single.double() - expected).abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_dtypes_are_rounded_from_float32(dtype):
    half = philox_normal(3, [0, 1], "z", (100,), dtype)
    assert half.dtype == dtype
    assert torch.equal(half, philox_normal(3, [0, 1], "z", (100,)).to(dtype))


def test_stream_names_are_hashed_with_blake2s():
    digest = hashlib.blake2s(b"ode.noise").digest()
    assert stream_word("ode.noise") == digest[0] + 256 * digest[1] + 65536 * digest[2] + 16777216 * digest[3]
    by_word = philox_normal(0, [0], stream_word("ode.noise"), (9,))
    assert torch.equal(philox_normal(0, [0], "ode.noise", (9,)), by_word)


def test_the_draws_of_a_seed_stay_what_they_are():
    """Saved seeds must keep their images: these numbers may never change."""
    got = philox_normal(2021, [0, 1], "z", (3,), torch.float64)
    expected = torch.tensor(FROZEN, dtype=torch.float64).view(2, 3)
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("draw", [random.normal, random.uniform])
@pytest.mark.parametrize("shape", [(3, 4, 4), (7,), (1, 3, 5)])
def test_the_same_numbers_however_a_request_is_split(draw, shape):
    whole = draw(11, range(10), "z", shape)
    assert whole.shape == (10, *shape)
    for sizes in ([10], [1] * 10, [3, 3, 4], [9, 1]):
        start, parts = 0, []
        for size in sizes:
            parts.append(draw(11, range(start, start + size), "z", shape))
            start += size
        assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([7, 0, 3])
    assert torch.equal(draw(11, order, "z", shape), whole[order])


def test_thread_counts_do_not_matter():
    before = torch.get_num_threads()
    try:
        draws = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            draws.append(random.normal(4, range(6), "z", (40, 32, 32)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_the_global_generator_is_neither_read_nor_advanced():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random.normal(0, range(2), "z", (8,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(random.normal(0, range(2), "z", (8,)), first)


# --- statistics (fixed seeds: they pass or fail once and for all) ---------------------------------------------


@pytest.fixture(scope="module")
def normals():
    return random.normal(1234, range(64), "z", (4, 64, 64)).double().numpy()


def test_normality(normals):
    flat = normals.reshape(-1)
    n = flat.size
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert abs(flat.mean()) < 4 / math.sqrt(n)
    assert abs(flat.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(flat)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(flat)) < 4 * math.sqrt(24 / n)


def test_tails(normals):
    flat = np.abs(normals.reshape(-1))
    for threshold in (2.0, 3.0, 4.0):
        expected = flat.size * 2 * stats.norm.sf(threshold)
        assert abs((flat > threshold).sum() - expected) < 4 * math.sqrt(expected)
    assert 4.5 < flat.max() < 6.77


def test_every_sample_and_every_position_in_a_block_is_normal(normals):
    for lane in range(4):
        assert stats.kstest(normals.reshape(-1, 4)[:, lane], "norm").pvalue > 1e-3
    pvalues = [stats.kstest(sample.reshape(-1), "norm").pvalue for sample in normals]
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


def _correlation(a, b):
    return abs(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) * math.sqrt(a.size)


def test_neighbours_are_uncorrelated(normals):
    flat = normals.reshape(64, -1)
    for lag in (1, 2, 3, 4, 64):
        assert _correlation(flat[:, lag:], flat[:, :-lag]) < 4.5
        assert _correlation(flat[:, lag:] ** 2, flat[:, :-lag] ** 2) < 4.5
    assert _correlation(flat[1:], flat[:-1]) < 4.5


@pytest.mark.parametrize(
    "other",
    [
        {"name": "z2"},
        {"seed": 1235},
        {"seed": 1234 + 2**32},
        {"seed": 1234 + 2**63},
        {"substream": 1},
        {"sample_indices": range(64, 128)},
    ],
)
def test_other_keys_give_independent_draws(normals, other):
    arguments = {"seed": 1234, "sample_indices": range(64), "name": "z", "shape": (4, 64, 64), **other}
    draw = random.normal(**arguments).double().numpy()
    assert not np.isin(draw[:4].reshape(-1)[:2000], normals.reshape(-1)).mean() > 0.2
    assert _correlation(draw, normals) < 4.5
    assert _correlation(draw**2, normals**2) < 4.5


def test_uniform():
    draw = random.uniform(77, range(50_000), "rho")
    assert draw.shape == (50_000,) and draw.dtype == torch.float32
    assert draw.min() > 0 and draw.max() < 1
    assert stats.kstest(draw.double().numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(random.uniform(77, range(9), "rho", dtype=torch.float64), draw[:9].double())
    assert random.uniform(77, range(2), "rho", (3, 5)).shape == (2, 3, 5)


@pytest.mark.parametrize("word", [0, 511, 512, ONES])
def test_uniform_never_rounds_to_its_ends(monkeypatch, word):
    monkeypatch.setattr(random, "philox_words", lambda *a, **k: torch.full((1, 1, 4), word))
    for dtype in (torch.float32, torch.float64):
        value = random.uniform(0, [0], "rho", dtype=dtype).item()
        assert 0 < value < 1
        assert value == ((word >> 9) + 0.5) / 2**23


def test_the_extreme_words_give_finite_normals(monkeypatch):
    module = __import__("importlib").import_module("lsgm_fast.reference.philox_normal")
    words = torch.tensor([[[0, 0, ONES, ONES], [0, ONES, ONES, 0]]])
    monkeypatch.setattr(module, "philox_words", lambda *a, **k: words)
    for dtype in (torch.float32, torch.float64):
        got = philox_normal(0, [0], "z", (8,), dtype)
        assert torch.isfinite(got).all()
        assert got.abs().max().item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)


def test_temperature():
    cold = random.normal(0, range(3), "z", (4,), temperature=0.5)
    assert torch.equal(cold, random.normal(0, range(3), "z", (4,)) * 0.5)


def test_empty():
    assert random.normal(0, [], "z", (3, 2)).shape == (0, 3, 2)
    assert random.normal(0, range(2), "z", (3, 0)).shape == (2, 3, 0)
    assert random.uniform(0, torch.empty(0, dtype=torch.int64), "z").shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed must be an integer from 0 to 2\*\*64 - 1, got -1"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"seed": 1.5}, r"seed must be an integer.* got 1\.5"),
        ({"seed": True}, "seed must be an integer"),
        ({"sample_indices": [-1]}, "sample_indices must be from 0"),
        ({"sample_indices": [0, 2**32]}, "sample_indices must be from 0"),
        ({"sample_indices": torch.zeros(2)}, "sample_indices must be integers"),
        ({"sample_indices": torch.zeros(2, 2, dtype=torch.int64)}, r"one-dimensional, got shape \(2, 2\)"),
        ({"name": -1}, "stream must be an integer from 0"),
        ({"name": 2**32}, "stream must be an integer from 0"),
        ({"substream": 2**32}, "substream must be an integer from 0"),
        ({"shape": (-1,)}, "negative"),
        ({"dtype": torch.int64}, "dtype must be"),
    ],
)
@pytest.mark.parametrize("draw", [random.normal, random.uniform])
def test_bad_arguments(draw, change, message):
    arguments = {"seed": 0, "sample_indices": range(2), "name": "z", "shape": (3,), **change}
    with pytest.raises(ValueError, match=message):
        draw(**arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_refuses_half(dtype):
    with pytest.raises(ValueError, match=r"float32 or torch\.float64"):
        random.uniform(0, range(2), "rho", dtype=dtype)


def test_words_are_shared_by_four_elements():
    words = philox_words(9, [3], "z", 10)
    assert words.shape == (1, 3, 4) and words.dtype == torch.int64
    assert words.min() >= 0 and words.max() <= ONES
    for block in range(3):
        expected = _philox_in_python_integers((block, stream_word("z"), 3, 0), (9, 0))
        assert tuple(words[0, block].tolist()) == expected
