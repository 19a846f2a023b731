"""The Triton kernels of ``depthwise_bn_swish`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch
import torch.nn.functional as F

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "depthwise_bn_swish"
SMALL, FEW_CHANNELS = 300, 5  # the interpreter is slow


def samples() -> list[Sample]:
    return [
        s
        for s in testing.samples(OP)
        if s.elements <= SMALL
        and s.args[0].shape[1] <= FEW_CHANNELS
        and s.args[0].dtype != torch.float64
        and s.args[1].shape[2] == 5
    ]


def inputs(
    shape: tuple[int, ...], channels_last: bool, stride: int, dtype: torch.dtype = torch.float32
) -> list:
    """grad, x, weight and four affines."""
    draw = Draw("cpu", 7, f"{shape} {channels_last} {dtype}")
    layout = "channels_last" if channels_last else "contiguous"
    out = (*shape[:2], *((size + stride - 1) // stride for size in shape[2:]))
    grad, x = (draw.normal(*s, dtype=dtype, layout=layout) for s in (out, shape))
    affines = [draw.normal(shape[1], dtype=dtype, mean=m, std=0.3) for m in (1.0, 0.0, 1.0, 0.0)]
    return [grad, x, draw.normal(shape[1], 1, 5, 5, dtype=dtype, std=0.2), *affines]


def exact(tensors: list, stride: int) -> list[torch.Tensor]:
    """y with all affines, and the gradients of the convolution alone, in float64."""
    grad, x, weight, *affines = (t.double() for t in tensors)
    a, b, c, d = (t.view(1, -1, 1, 1) for t in affines)
    channels = weight.shape[0]
    y = F.silu(F.conv2d(F.silu(x * a + b), weight, None, stride, 2, 1, channels) * c + d)
    x.requires_grad_(), weight.requires_grad_()
    convolved = F.conv2d(x, weight, None, stride, 2, 1, channels)
    return [y, *torch.autograd.grad(convolved, (x, weight), grad)]


def run(tensors: list, stride: int) -> list[torch.Tensor]:
    from lsgm_fast.kernels import depthwise_bn_swish as kernels

    grad, x, weight, *affines = tensors
    with testing.poison_uninitialized():
        return [kernels.forward(x, weight, stride, *affines), *kernels.backward(grad, x, weight, stride)]


def assert_right(shape: tuple[int, ...], channels_last: bool, stride: int) -> None:
    tensors = inputs(shape, channels_last, stride)
    names = ("y", "grad_x", "grad_weight")
    for name, got, want in zip(names, run(tensors, stride), exact(tensors, stride), strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 2e-6, f"{name} of {shape}, stride {stride}: relative L2 error {error}"


def forced(*shapes: tuple[int, ...], **values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import depthwise_bn_swish as kernels

        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setattr(kernels, name, value)
            for shape in shapes:
                for channels_last in (False, True):
                    for stride in (1, 2):
                        assert_right(shape, channels_last, stride)

    return check


def wide_index() -> None:
    import triton.language as tl

    forced((2, 3, 4, 5), index_type=lambda elements: tl.int64)()


def plans_cover_every_element() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import depthwise_bn_swish as kernels

    shapes = (
        (32, 128, 16, 16),
        (16, 384, 64, 64),
        (3, 5, 7, 9),
        (1, 3, 4, 1031),
        (150, 18, 2, 3),
        (2**12, 256, 2**7, 2**7),
        (1, 1, 2**17, 2**16),
        (64, 2**20, 1, 1),
    )
    for shape in shapes:
        samples, channels, height, width = shape
        for inner in (False, True):
            for stride in (1, 2):
                rows, columns = kernels.out_size(height, stride), kernels.out_size(width, stride)
                for reduce in (False, True):
                    (programs,), sizes, options = kernels.plan(shape, stride, inner, 2, reduce)
                    lines, tile = options["LINES"], options["WIDTH"]
                    assert lines * tile <= kernels.TILE and options["num_warps"] <= 8
                    band = sizes["band_rows"]
                    assert (sizes["bands"] - 1) * band < rows <= sizes["bands"] * band
                    blocks = programs
                    if reduce:
                        chunks = programs // sizes["channel_blocks"]
                        assert chunks <= kernels.CHUNKS
                        assert chunks * sizes["channel_blocks"] == programs
                        assert (chunks - 1) * sizes["per_program"] < sizes["tiles"]
                        assert sizes["tiles"] <= chunks * sizes["per_program"]
                        blocks = sizes["tiles"] * (sizes["channel_blocks"] if inner else 1)
                        side_by_side = sizes["channel_blocks"] if inner else sizes["inner_blocks"]
                    else:
                        side_by_side = sizes["inner_blocks"]
                    groups, left = divmod(blocks, side_by_side * sizes["bands"])
                    count = samples * columns if inner else samples if reduce else samples * channels
                    assert left == 0 and (groups - 1) * lines < count <= groups * lines
                    extent = channels if inner else columns
                    assert (side_by_side - 1) * tile < extent <= side_by_side * tile
                    assert sizes["channel_units"] * options["CHANNEL_ALIGN"] == channels
                    assert sizes["width_units"] * options["WIDTH_ALIGN"] == width
                    assert sizes["out_units"] * options["OUT_ALIGN"] == columns
                    assert options["INDEX"] == tl.int64 or samples * channels * height * width < 2**31


def empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        for stride in (1, 2):
            grad, x, weight = inputs(shape, False, stride)[:3]
            y, grad_x, grad_weight = run(inputs(shape, False, stride), stride)
            assert y.shape == grad.shape and grad_x.shape == x.shape
            assert torch.equal(grad_weight, torch.zeros_like(weight))


def results_have_the_inputs_formats() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels_last in (False, True):
            tensors = inputs((1, 2, 3, 4), channels_last, 2, dtype)
            y, grad_x, grad_weight = run(tensors, 2)
            assert {t.dtype for t in (y, grad_x, grad_weight)} == {dtype}
            assert y.stride() == tensors[0].stride() and grad_x.stride() == tensors[1].stride()


def same_every_time() -> None:
    tensors = inputs((3, 2, 5, 6), True, 1)
    for first, second in zip(run(tensors, 1), run(tensors, 1), strict=True):
        assert torch.equal(first, second)


def the_ends_of_float32() -> None:
    """Swish of numbers whose exponential is 0 or infinite."""
    from lsgm_fast.kernels import depthwise_bn_swish as kernels

    x = torch.tensor([0.0, -20.0, 20.0, -88.0, 88.0, -1000.0, 1000.0, 3e38, -3e38]).reshape(1, 1, 1, 9)
    weight = torch.zeros(1, 1, 5, 5)
    weight[..., 2, 2] = 1
    one, zero = torch.ones(1), torch.zeros(1)
    for affines in ((one, zero, None, None), (None, None, one, zero)):
        y = kernels.forward(x, weight, 1, *affines)
        torch.testing.assert_close(y, F.silu(x), rtol=1e-5, atol=1e-30)


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import depthwise_bn_swish as kernels

    grad, x, weight, *affines = inputs((2, 4, 3, 6), False, 1)
    with pytest.raises(ValueError, match="contiguous or the channels_last"):
        kernels.forward(x[..., ::2], weight, 1, *affines)
    other = grad.contiguous(memory_format=torch.channels_last)
    for wrong, stride in ((other, 1), (grad[:, :, :2].contiguous(), 1), (grad, 2)):
        with pytest.raises(ValueError, match="memory format of x"):
            kernels.backward(wrong, x, weight, stride)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "several tiles and bands": forced(
        (2, 2, 7, 9), TILE=32, COLUMNS=4, BAND=3, REDUCING_BAND=3, SIDE_BY_SIDE=4
    ),
    "several tiles per chunk": forced((3, 1, 3, 4), TILE=4, REDUCING_BAND=2, REDUCING_PROGRAMS=3, CHUNKS=2),
    "plans": plans_cover_every_element,
    "empty": empty,
    "formats": results_have_the_inputs_formats,
    "deterministic": same_every_time,
    "ends of float32": the_ends_of_float32,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
