"""The Triton kernels of the mixture of logistics in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.reference.mixture_logistic import mixture_logistic_log_prob, mixture_logistic_mean
from lsgm_fast.testing.inputs import Draw, Sample
from lsgm_fast.testing.mixture_logistic import build_log_prob

NAME, MEAN = "mixture_logistic_log_prob", "mixture_logistic_mean"
SMALL = 7_000  # elements: the interpreter is slow


def samples(name: str) -> list[Sample]:
    """In float32 and float16 (the interpreter cuts bfloat16 off where a GPU rounds to nearest), dense: of others the
    kernels get copies."""
    kinds = (torch.float32, torch.float16)
    found = [s for s in testing.samples(name) if s.elements <= SMALL]
    found = [s for s in found if all(t.dtype in kinds for t in s.tensors())]
    return [s for s in found if not s.id.endswith(("offset", "sliced", "transposed", "expanded", "random"))]


def inputs(
    shape: tuple[int, ...], channels_last: bool = False, dtype: torch.dtype = torch.float32, mixtures: int = 2
) -> tuple[torch.Tensor, torch.Tensor, int]:
    layout = "channels_last" if channels_last else "contiguous"
    draw = Draw("cpu", 7, f"{shape} {layout}")
    x, logits, bits = build_log_prob(draw, shape, torch.float32, dtype, layout, 8, mixtures)[0]
    return x, logits, bits


def run(x: torch.Tensor, logits: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Log-probability, its gradient for an incoming x[:, 0], and the mean."""
    from lsgm_fast.kernels import mixture_logistic as kernels

    with testing.poison_uninitialized():
        log_prob, parts = kernels.log_prob_forward(x, logits, bits)
        grad = kernels.log_prob_backward(x[:, 0].contiguous(), x, logits, parts, bits)
        return [log_prob, grad, kernels.mean_forward(logits, False)]


def assert_right(x: torch.Tensor, logits: torch.Tensor, bits: int) -> None:
    wide = logits.double().requires_grad_()
    log_prob = mixture_logistic_log_prob(x.double(), wide, bits)
    (grad,) = torch.autograd.grad(log_prob, wide, x[:, 0].double())
    for got, want in zip(run(x, logits, bits), (log_prob, grad, mixture_logistic_mean(wide)), strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < 1e-5, f"relative L2 error {error}"


def forced(**values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import mixture_logistic as kernels

        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setattr(kernels, name, value)
            for shape in ((2, 3, 4, 4), (1, 3, 3, 21)):
                for channels_last in (False, True):
                    assert_right(*inputs(shape, channels_last))

    return check


def wide_index() -> None:
    import triton.language as tl

    forced(index_type=lambda elements: tl.int64)()


def numbers_of_mixtures() -> None:
    """In channels_last 16 at a time, so that 17 take two turns."""
    for mixtures in (1, 5, 17):
        for channels_last in (False, True):
            assert_right(*inputs((1, 3, 2, 5), channels_last, mixtures=mixtures))


def formats_of_x() -> None:
    for channels_last in (False, True):
        x, logits, bits = inputs((2, 3, 3, 5), channels_last)
        other = x.contiguous(memory_format=torch.contiguous_format if channels_last else torch.channels_last)
        for ours, theirs in zip(run(other, logits, bits), run(x, logits, bits), strict=True):
            assert torch.equal(ours, theirs)


def plans() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import mixture_logistic as kernels

    for samples, mixtures, side in ((1, 10, 1), (64, 10, 32), (1, 10, 256), (16, 10, 256), (2, 30, 5000)):
        for inner in (False, True):
            channels = 10 * mixtures
            (programs,), sizes, options = kernels.plan((samples, channels, side, side), inner)
            reach = sizes["blocks"] * options["PIXELS"]
            assert programs == samples * sizes["blocks"]
            assert reach - options["PIXELS"] < side * side <= reach
            assert sizes["spatial_units"] * options["ALIGN"] == side * side
            assert options["INDEX"] == tl.int64 or channels * reach < 2**31


def empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        log_prob, grad, mean = run(*inputs(shape))
        assert log_prob.shape == (shape[0], *shape[2:]) and mean.shape == shape
        assert grad.shape == (shape[0], 20, *shape[2:])


def log_scales_at_the_clamp() -> None:
    x, logits, bits = inputs((1, 3, 1, 2), mixtures=1)
    for channel in (2, 5, 8):
        logits[0, channel, 0] = torch.tensor([-7.0, -7.001])
    grad = run(x, logits, bits)[1][0, 2::3, 0]
    assert (grad[:, 0] != 0).all() and (grad[:, 1] == 0).all()


def results_have_the_inputs_formats() -> None:
    from lsgm_fast.kernels import mixture_logistic as kernels

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels_last in (False, True):
            x, logits, bits = inputs((2, 3, 3, 4), channels_last, dtype)
            log_prob, grad, mean = run(x, logits, bits)
            assert (log_prob.dtype, grad.dtype, mean.dtype) == (torch.float32, dtype, dtype)
            assert grad.stride() == logits.stride() and log_prob.is_contiguous() and mean.is_contiguous()
            assert kernels.mean_forward(logits, True).dtype == torch.float32


def same_every_time() -> None:
    args = inputs((2, 3, 3, 5), True)
    for first, second in zip(run(*args), run(*args), strict=True):
        assert torch.equal(first, second)


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import mixture_logistic as kernels

    x, logits, bits = inputs((2, 3, 4, 6))
    out, parts = kernels.log_prob_forward(x, logits, bits)
    for args, message in (
        ((x[..., ::2], logits[..., ::2].contiguous()), "contiguous or the channels_last"),
        ((x[..., ::2].contiguous(), logits[..., ::2]), "contiguous or the channels_last"),
        ((x[:, :, :2], logits), "expected"),
        ((x, logits[:, :9]), "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.log_prob_forward(*args, bits)
    with pytest.raises(ValueError, match="grad has shape"):
        kernels.log_prob_backward(out[:, :2], x, logits, parts, bits)
    with pytest.raises(ValueError, match="parts has shape"):
        kernels.log_prob_backward(out, x, logits, parts[:1], bits)
    with pytest.raises(ValueError, match="contiguous or the channels_last"):
        kernels.mean_forward(logits[..., ::2], False)


CHECKS: dict[str, Callable[[], None]] = {
    "64-bit indices": wide_index,
    "four pixels to a thread": forced(MANY=1),
    "numbers of mixtures": numbers_of_mixtures,
    "formats of x": formats_of_x,
    "plans": plans,
    "empty": empty,
    "log scales at the clamp": log_scales_at_the_clamp,
    "formats": results_have_the_inputs_formats,
    "deterministic": same_every_time,
    "refusals": refuses_what_it_would_misread,
}


ALL = {
    **CHECKS,
    **interpreter.sample_checks(NAME, samples(NAME)),
    **interpreter.sample_checks(MEAN, samples(MEAN)),
}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
