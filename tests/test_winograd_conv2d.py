"""``winograd_conv2d``: the formula, the CPU kernel, and what PyTorch does with an operation."""

from __future__ import annotations

import math
import threading

import kernel_targets
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import lsgm_fast
from lsgm_fast import ops, testing
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import BackendUnsupported
from lsgm_fast.ops.winograd_conv2d import winograd_weight
from lsgm_fast.reference.winograd_conv2d import matrices
from lsgm_fast.testing import Draw, check_forward
from lsgm_fast.testing.winograd_conv2d import build

NAME = "winograd_conv2d"
TARGETS = kernel_targets.targets(NAME)
FUSED = [t for t in TARGETS if not t.id.startswith("reference")]
TILES = pytest.mark.parametrize("tile", [2, 4])
SHAPE = (2, 19, 7, 10)


def inputs(tile=4, shape=SHAPE, out=37, dtype=torch.float32, layout="channels_last", **given):
    return build(Draw("cpu", 3, f"{shape}"), shape, dtype, dtype, layout, out=out, tile=tile, **given)[0]


def integers(generator, *shape):
    return torch.randint(-8, 9, shape, generator=generator).float()


# -- numbers --------------------------------------------------------------------------------------------------------


@TILES
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 5, 1, 1), (3, 2, 7, 10), (2, 4, 5, 3), (1, 1, 2, 9)])
@pytest.mark.parametrize("out", [1, 32, 33])
def test_the_reference_is_the_convolution(tile, shape, out):
    draw = Draw("cpu", 1, f"{shape} {out}")
    x = draw.normal(*shape, dtype=torch.float64)
    weight = draw.normal(out, shape[1], 3, 3, dtype=torch.float64)
    bias = draw.normal(out, dtype=torch.float64)
    prepared = winograd_weight(weight, tile)
    assert prepared.dtype == torch.float64
    for b in (bias, None):
        got = ops.winograd_conv2d(x, prepared, b, out, backend="reference")
        torch.testing.assert_close(got, F.conv2d(x, weight, b, padding=1), rtol=0, atol=1e-12)
        assert got.is_contiguous(memory_format=torch.channels_last)


@TILES
def test_the_matrices_are_exact_in_float32(tile):
    at, bt, _ = matrices(tile)
    assert torch.equal(at.float().double(), at)
    assert torch.equal(bt.float().double(), bt)


@TILES
def test_one_axis_is_a_correlation(tile):
    """``A^T ((G g) * (B^T d))`` for every unit vector g and d."""
    at, bt, g = matrices(tile)
    for tap in range(3):
        for place in range(tile + 2):
            y = at @ (g[:, tap] * bt[:, place])
            expected = torch.tensor([float(place == i + tap) for i in range(tile)], dtype=torch.float64)
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("tile", "ratio", "rms"), [(2, 3.0, 7e-7), (4, 8.0, 2e-6)])
def test_how_far_it_is_from_the_convolution(target, tile, ratio, rms):
    """Of normal numbers, 256 channels: F(2) loses a factor of about 1.6 in the kernel, F(4) one of about 5."""
    backend, _ = target
    draw = Draw("cpu", 2, "error")
    x, weight = draw.normal(2, 256, 12, 12), draw.normal(64, 256, 3, 3, std=1 / 48)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    got = ops.winograd_conv2d(x, winograd_weight(weight, tile), None, 64, backend=backend)
    error = testing.norms(got, exact).relative_l2
    direct = testing.norms(F.conv2d(x, weight, padding=1), exact).relative_l2
    assert error < rms
    assert error < ratio * direct


@pytest.mark.parametrize("target", TARGETS)
def test_every_sample(target):
    backend, device = target
    ran = 0
    with testing.poison_uninitialized():
        for sample in testing.samples(NAME, device):
            if testing.unsupported(NAME, backend, sample):
                assert sample.args[0].dtype != torch.float32
                continue
            if sample.elements > 2**23:
                continue
            check_forward(NAME, backend, sample)
            ran += 1
    assert ran > 50


@pytest.mark.parametrize("target", TARGETS)
def test_f2_of_whole_numbers_is_exact(target):
    backend, _ = target
    generator = torch.Generator().manual_seed(0)
    x = integers(generator, 2, 21, 9, 14)
    weight, bias = 4 * integers(generator, 40, 21, 3, 3), integers(generator, 40)
    got = ops.winograd_conv2d(x, winograd_weight(weight, 2), bias, 40, backend=backend)
    assert torch.equal(got, F.conv2d(x, weight, bias, padding=1))


@TILES
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_its_window(target, tile, value):
    backend, _ = target
    x, prepared, bias, out = inputs(tile, (1, 5, 12, 12), 3)
    window = torch.zeros(1, 1, 12, 12)
    x[0, 2, 7, 4] = value
    window[0, 0, 7, 4] = 1
    window = F.max_pool2d(window, 3, 1, 1).bool().expand(1, out, 12, 12)
    got = ops.winograd_conv2d(x, prepared, bias, out, backend=backend)
    assert not got[window].isfinite().any()
    far = torch.ones(12, 12, dtype=torch.bool)
    far[7 - tile : 8 + tile, 4 - tile if tile < 4 else 0 : 5 + tile] = False
    assert got[..., far].isfinite().all()


def test_the_prepared_weight():
    weight = torch.randn(33, 5, 3, 3, requires_grad=True)
    for tile in (2, 4):
        prepared = winograd_weight(weight, tile)
        n = tile + 2
        assert prepared.shape == (n * n, 2, 5, 32)
        assert prepared.dtype == torch.float32
        assert prepared.is_contiguous()
        assert not prepared.requires_grad
        g = matrices(tile)[2]
        u = g @ weight.detach().double() @ g.T
        assert torch.equal(prepared[:, 0, :, 7].T.reshape(5, n, n), u[7].float())
        assert torch.equal(prepared[:, 1, :, 0].T.reshape(5, n, n), u[32].float())
        assert not prepared[:, 1, :, 1:].any()
    assert winograd_weight(weight.bfloat16(), 2).dtype == torch.float32


# -- modes ----------------------------------------------------------------------------------------------------------


@TILES
@pytest.mark.parametrize("target", FUSED)
def test_opcheck(target, tile):
    backend, _ = target
    call = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}").default
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(call, inputs(tile), test_utils=checks)
    torch.library.opcheck(call, inputs(tile, bias=False), test_utils=checks)


@pytest.mark.parametrize("target", FUSED)
def test_compiles_without_a_graph_break(target):
    backend, _ = target
    torch._dynamo.reset()
    args = inputs(layout="contiguous")

    def step(*a):
        return 2 * ops.winograd_conv2d(*a, backend=backend)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(*args), step(*args))
    torch._dynamo.reset()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [SHAPE, (1, 5, 1, 1), (2, 1, 4, 4), (0, 3, 5, 5), (1, 4, 1, 6)])
def test_results_are_channels_last(target, shape):
    backend, _ = target
    for layout in ("contiguous", "channels_last"):
        args = inputs(shape=shape, layout=layout)
        got = ops.winograd_conv2d(*args, backend=backend)
        assert got.shape == (shape[0], 37, *shape[2:])
        assert got.is_contiguous(memory_format=torch.channels_last)
        with FakeTensorMode() as mode:
            fake = ops.winograd_conv2d(*(mode.from_tensor(a) for a in args[:3]), args[3], backend=backend)
        assert (fake.shape, fake.dtype) == (got.shape, got.dtype)
        if backend != "reference":
            assert fake.stride() == got.stride()


@pytest.mark.parametrize("target", TARGETS)
def test_autocast_changes_nothing(target):
    backend, _ = target
    args = inputs()
    expected = ops.winograd_conv2d(*args, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.winograd_conv2d(*args, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("target", FUSED)
def test_gradients_are_the_references(target):
    backend, _ = target
    x, *rest = inputs()
    x.requires_grad_()
    with pytest.raises(BackendUnsupported, match="a gradient is wanted"):
        ops.winograd_conv2d(x, *rest, backend=backend)
    with torch.no_grad():
        ops.winograd_conv2d(x, *rest, backend=backend)
    with record() as log:
        ops.winograd_conv2d(x, *rest).sum().backward()
    assert log.counts == {(NAME, "reference"): 1}
    assert x.grad is not None


# -- threads --------------------------------------------------------------------------------------------------------


@TILES
@pytest.mark.parametrize("target", FUSED)
def test_the_number_of_threads_does_not_matter(target, tile):
    backend, _ = target
    before = torch.get_num_threads()
    try:
        # Tiles for one worker and for several, and for several blocks of each.
        for shape in ((1, 40, 9, 9), (2, 33, 31, 30), (3, 48, 64, 60)):
            args = inputs(tile, shape, 70)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.winograd_conv2d(*args, backend=backend))
            assert all(torch.equal(other, results[0]) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("target", FUSED)
def test_several_threads_at_once(target):
    backend, _ = target
    args = inputs(shape=(3, 33, 20, 20))
    expected = ops.winograd_conv2d(*args, backend=backend)
    wrong = []

    def work():
        for _ in range(10):
            if not torch.equal(ops.winograd_conv2d(*args, backend=backend), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- the dispatcher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FUSED)
def test_what_ran_is_recorded(target):
    backend, _ = target
    with record() as log, use_backend(backend):
        ops.winograd_conv2d(*inputs())
    assert log.counts == {(NAME, backend): 1}
    assert lsgm_fast.explain(NAME, *inputs()).chosen == backend


@pytest.mark.parametrize("target", FUSED)
def test_what_the_kernel_refuses(target):
    backend, _ = target
    args = inputs()
    x, prepared, bias, out = args
    for wrong, message in (
        ((x.double(), prepared.double(), None, out), "x has dtype torch.float64: float32 is supported"),
        ((x.bfloat16(), prepared, bias, out), "x has dtype torch.bfloat16: float32 is supported"),
        ((x, prepared, bias.half(), out), "bias has dtype torch.float16: float32 is supported"),
    ):
        with pytest.raises(BackendUnsupported, match=message):
            ops.winograd_conv2d(*wrong, backend=backend)
        assert ops.winograd_conv2d(*wrong).dtype == wrong[0].dtype
    with pytest.raises(BackendUnsupported, match="prepared is on meta"):
        ops.winograd_conv2d(args[0], args[1].to("meta"), None, args[3], backend=backend)
    call = getattr(torch.ops.lsgm_fast, f"{NAME}_{backend}")
    for wrong, message in (
        ((x.double(), prepared, bias, out), "float32 in the channels_last format"),
        ((x.contiguous(), prepared, bias, out), "float32 in the channels_last format"),
        ((x[:, :5], prepared, bias, out), "channels_last format"),
        ((x[0], prepared, bias, out), "only B may be 0"),
        ((x[:, :, :0], prepared, bias, out), "only B may be 0"),
        ((x, prepared[:9], bias, out), "prepared has shape"),
        ((x, prepared, bias, 31), "prepared has shape"),
        ((x, prepared, bias, 65), "prepared has shape"),
        ((x, prepared, None, 0), "prepared has shape"),
        ((x, prepared.double(), bias, out), "prepared has shape"),
        (
            (x, prepared[..., ::2].repeat(1, 1, 1, 2)[..., ::1].transpose(0, 1), bias, out),
            "prepared has shape",
        ),
        ((x, prepared, bias[1:], out), "bias has shape"),
        ((x, prepared, bias.double(), out), "bias has shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*wrong)


def test_bad_arguments():
    x, prepared, bias, out = inputs()
    for args, message in (
        ((x[0], prepared, bias, out), "only B may be 0"),
        ((x[:, :, :0], prepared, bias, out), "only B may be 0"),
        (
            (x, prepared[:9], bias, out),
            r"prepared has shape \(9, 2, 19, 32\): expected \(16 or 36, 2, 19, 32\)",
        ),
        ((x[:, :5], prepared, bias, out), "from winograd_weight"),
        ((x, prepared, bias, 65), r"\(16 or 36, 3, 19, 32\)"),
        ((x, prepared[:, :0], None, 0), "out_channels is 0"),
        ((x, prepared, bias[1:], out), r"the shape of bias \(36,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.winograd_conv2d(*args)
    for args in ((x.double(), prepared, bias, out), (x.half(), prepared.half(), bias, out)):
        with pytest.raises(
            TypeError, match=r"prepared has dtype torch.float(32|16) .*: expected torch.float"
        ):
            ops.winograd_conv2d(*args)
    for weight in (torch.zeros(3, 2, 5, 5), torch.zeros(3, 3, 3), torch.zeros(0, 2, 3, 3)):
        with pytest.raises(ValueError, match="winograd_weight expects"):
            winograd_weight(weight, 2)
    with pytest.raises(ValueError, match="tile is 6: expected one of 2, 4"):
        winograd_weight(torch.zeros(3, 2, 3, 3), 6)
