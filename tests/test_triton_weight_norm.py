"""The Triton kernels of ``weight_norm`` in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch

from lsgm_fast import testing
from lsgm_fast.testing.inputs import Draw, Sample

OP = "weight_norm"


def samples() -> list[Sample]:
    small = [s for s in testing.samples(OP) if s.elements <= 5_000]
    return [s for s in small if s.args[0] and s.args[0][0].dtype == torch.float32]


def inputs(shapes: list[tuple[int, ...]], layout: str = "contiguous") -> tuple[list[torch.Tensor], ...]:
    """Weights, gradients and log norms."""
    draw = Draw("cpu", 7, f"{shapes} {layout}")
    weights, grads = ([draw.normal(*s, layout=layout) for s in shapes] for _ in range(2))
    return weights, grads, [draw.normal(s[0], 1, 1, 1) for s in shapes]


def assert_right(
    weights: list[torch.Tensor], grads: list[torch.Tensor], log_norms: list[torch.Tensor]
) -> None:
    from lsgm_fast.kernels import weight_norm as kernels

    with testing.poison_uninitialized():
        results, norms = kernels.forward(weights, log_norms, 1e-3)
        of_weights, of_log_norms = kernels.backward(grads, weights, log_norms, norms, 1e-3)
    start = 0
    for v, grad, g, w, of_v in zip(weights, grads, log_norms, results, of_weights, strict=True):
        assert w.stride() == of_v.stride() == v.stride()
        v, grad, g = v.double(), grad.double(), g.double()
        n = v.square().sum((1, 2, 3), keepdim=True).sqrt()
        s = g.exp() / (n + 1e-3)
        along = (grad * v).sum((1, 2, 3), keepdim=True)
        filters = slice(start, start + len(v))
        start += len(v)
        for name, got, want in (
            ("norms", norms[filters], n.flatten()),
            ("results", w, s * v),
            ("gradients", of_v, s * grad - s * along / ((n + 1e-3) * n) * v),
            ("log norms", of_log_norms[filters], (s * along).flatten()),
        ):
            torch.testing.assert_close(
                got.double(), want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert start == len(norms) == len(of_log_norms)


# Short filters around a tile's width, long ones around a block's; lengths that are no multiple of 4; empty ones.
SHAPES = [
    (17, 1, 5, 5),
    (33, 8, 2, 2),
    (5, 31, 1, 1),
    (3, 257, 1, 1),
    (2, 114, 3, 3),
    (0, 3, 1, 1),
    (1, 1, 1, 1),
]
SHAPES += [(2, 0, 3, 3), (3, 260, 1, 1), (2, 1024, 1, 1), (2, 1025, 1, 1), (2, 256, 1, 1), (1, 3000, 1, 1)]


def kinds() -> None:
    assert_right(*inputs(SHAPES))
    assert_right(*inputs(SHAPES[::-1]))


def alone() -> None:
    for shape in SHAPES:
        assert_right(*inputs([shape]))


def formats() -> None:
    for layout in ("channels_last", "transposed"):
        assert_right(*inputs([(5, 6, 3, 4), (3, 40, 3, 3)], layout))


def unaligned() -> None:
    """The first tensor, by whose address all distances are told, or a later one begins anywhere."""
    shapes = [(3, 260, 1, 1), (5, 4, 3, 3), (2, 300, 1, 1)]
    for offsets in ((1, 0, 0), (0, 1, 2), (1, 1, 1), (0, 0, 0)):
        lists = inputs(shapes)
        for tensors in lists[:2]:
            for i, offset in enumerate(offsets):
                memory = torch.empty(tensors[i].numel() + 4)[offset:][: tensors[i].numel()]
                tensors[i] = memory.view(tensors[i].shape).copy_(tensors[i])
        assert_right(*lists)


def one_by_one() -> None:
    """What a CUDA graph captures: a launch for every weight, from the table of all."""
    from lsgm_fast.kernels import weight_norm as kernels

    class Table(torch.Tensor):
        is_cuda = True

    original, capturing = kernels.programs, torch.cuda.is_current_stream_capturing

    def captured(shapes: object, device: object) -> object:
        table, ends = original(shapes, device)
        return table.as_subclass(Table), ends

    def refuse(lists: object) -> None:
        raise AssertionError("a copy to the device")

    distances = kernels.offsets
    kernels.programs, kernels.offsets = captured, refuse
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        assert_right(*inputs(SHAPES))
    finally:
        kernels.programs, kernels.offsets = original, distances
        torch.cuda.is_current_stream_capturing = capturing


def tables() -> None:
    """Every filter belongs to one program of its kind, beyond 2^31 elements too."""
    from lsgm_fast.kernels import weight_norm as kernels

    rows = kernels.OPTIONS["ROWS"]
    shapes = (
        (2 * rows + 1, 25, True),
        (3, 2**31 - 2000, True),
        (3, 4608, False),
        (0, 9, True),
        (70, 256, False),
    )
    table, ends = kernels.programs(shapes, torch.device("cpu"))
    assert ends == (3, 6, 9, 9, 9 + -(-70 // rows)) and table.dtype == torch.int64
    start, begin = 0, 0
    for i, ((filters, length, aligned), end) in enumerate(zip(shapes, ends, strict=True)):
        short = length <= kernels.LIMIT
        kind = kernels.SHORT if short else kernels.ALIGNED if aligned else kernels.UNALIGNED
        step = rows if short else 1
        wanted = [[i, kind.value, k, filters, length, start, 0, 0] for k in range(0, filters, step)]
        assert table[begin:end].tolist() == wanted
        start, begin = start + filters, end


def zero_filters() -> None:
    from lsgm_fast.kernels import weight_norm as kernels

    weights, grads, log_norms = inputs([(3, 5, 3, 3), (3, 300, 1, 1)])
    for v in weights:
        v[1] = 0.0
    results, norms = kernels.forward(weights, log_norms, 1e-3)
    of_weights, of_log_norms = kernels.backward(grads, weights, log_norms, norms, 1e-3)
    assert norms[[1, 4]].tolist() == of_log_norms[[1, 4]].tolist() == [0.0, 0.0]
    for w, of_v, grad, g in zip(results, of_weights, grads, log_norms, strict=True):
        assert not w[1].any()
        torch.testing.assert_close(of_v[1], grad[1] * g[1].exp() / 1e-3)


def same_every_time() -> None:
    from lsgm_fast.kernels import weight_norm as kernels

    weights, grads, log_norms = inputs(SHAPES)
    runs = []
    for _ in range(2):
        results, norms = kernels.forward(weights, log_norms, 1e-3)
        of_weights, of_log_norms = kernels.backward(grads, weights, log_norms, norms, 1e-3)
        runs.append([*results, norms, *of_weights, of_log_norms])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import weight_norm as kernels

    def raises(message: str, function: Callable[..., object], *args: object) -> None:
        with pytest.raises(ValueError, match=message):
            function(*args, 1e-3)

    (v,), (grad,), (g,) = inputs([(4, 6, 3, 5)])
    raises("as many", kernels.forward, [v, v], [g])
    raises("at least one", kernels.forward, [], [])
    raises("one after the other", kernels.forward, [v[..., ::2]], [g])
    raises("one after the other", kernels.forward, [v.transpose(0, 1)], [g])
    raises("float32", kernels.forward, [v.double()], [g])
    raises(r"log_norms\[0\]", kernels.forward, [v], [g[:3]])
    norms = torch.ones(4)
    raises("expected the same", kernels.backward, [grad[:3]], [v], [g], norms)
    last = grad.contiguous(memory_format=torch.channels_last)
    raises("expected the same", kernels.backward, [last], [v], [g], norms)
    raises("norms has shape", kernels.backward, [grad], [v], [g], norms[:3])


CHECKS: dict[str, Callable[[], None]] = {
    "all kinds of filters": kinds,
    "one weight": alone,
    "memory formats": formats,
    "unaligned": unaligned,
    "one launch for each": one_by_one,
    "tables": tables,
    "filters of zeros": zero_filters,
    "deterministic": same_every_time,
    "refusals": refuses_what_it_would_misread,
}


ALL = {**CHECKS, **interpreter.sample_checks(OP, samples())}


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
