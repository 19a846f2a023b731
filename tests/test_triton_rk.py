"""The Triton kernels of the Runge-Kutta family in Triton's interpreter, on CPU tensors. See ``interpreter.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor

from lsgm_fast import testing
from lsgm_fast.reference import rk as reference
from lsgm_fast.sampling import tableaus
from lsgm_fast.testing.inputs import Draw, Sample

OPS = ("rk_stage", "rk_finish", "rk_drift_stage", "rk_drift_finish", "rk_control")
SMALL = 20_000  # elements: the interpreter is slow
RTOL, ATOL = 1e-3, 1e-4


def samples(op: str) -> list[Sample]:
    small = [s for s in testing.samples(op) if s.elements <= SMALL]
    if op in ("rk_stage", "rk_finish"):  # whose kernels take one dtype of state and stages
        small = [s for s in small if s.args[0].dtype == s.args[1].dtype]
    return small


def interpreter_truncates(op: str, sample: Sample) -> bool:
    """Its conversion to bfloat16 drops digits where the hardware rounds, which the norm of rk_finish takes up."""
    return op == "rk_finish" and sample.args[0].dtype == torch.bfloat16


class Problem:
    """Inputs of one step of a tableau; everything in float64 and rounded to ``dtype``."""

    def __init__(
        self,
        shape: tuple[int, ...],
        tableau: tableaus.Tableau = tableaus.RK45,
        dtype: torch.dtype = torch.float32,
        eps_dtype: torch.dtype = torch.float32,
        *,
        each: bool = True,  # scalars per sample, else shared
    ) -> None:
        draw = Draw("cpu", 3, f"{shape} {tableau.name} {dtype} {each}")
        self.tableau = tableau
        self.y, self.z = (draw.normal(*shape, dtype=dtype) for _ in range(2))
        self.k = draw.normal(tableau.stages, *shape, dtype=dtype)
        self.eps = draw.normal(*shape, dtype=eps_dtype)
        self.logit = None
        if len(shape) > 1:
            self.logit = draw.normal(1, shape[1], *(1,) * (len(shape) - 2), std=2.0)
        size = shape[:1] if each else ()
        self.p, self.q, self.r = (
            draw.uniform(*size, low=0.2, high=2.0, dtype=torch.float64) for _ in range(3)
        )
        # A column of a block of numbers, as the steps of a control are.
        self.h = draw.uniform(*size, 8, low=-0.2, high=0.2, dtype=torch.float64)[..., 1]


def relative(got: Tensor, want: Tensor) -> float:
    if not got.numel():
        return 0.0
    return ((got.double() - want).norm() / want.norm()).item()


def assert_close(got: Tensor, want: Tensor, label: str, *, dtype: torch.dtype | None = None) -> None:
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3}[dtype or got.dtype]
    assert got.shape == want.shape, label
    assert torch.equal(got.isnan(), want.isnan()), f"{label}: NaN elsewhere"
    error = relative(got.nan_to_num(0.0), want.nan_to_num(0.0))
    assert error < limit, f"{label}: relative L2 error {error}"


def plain(problem: Problem, per_sample: bool) -> None:
    """rk_stage and rk_finish with stages that they must not read."""
    from lsgm_fast.kernels import rk

    y, k, h = problem.y, problem.k, problem.h
    for row in (*problem.tableau.a[1:], problem.tableau.b):
        used = [i for i, c in enumerate(row) if c != 0]
        poisoned = torch.full_like(k, math.nan)
        poisoned[used] = k[used]
        got = rk.stage_forward(y, poisoned, list(row), h)
        assert_close(got, reference.rk_stage(y.double(), k.double(), row, h), f"stage {row}")
    b, e = problem.tableau.b, problem.tableau.e
    got, norm = rk.finish_forward(y, k, list(b), list(e), h, RTOL, ATOL, per_sample)
    want, want_norm = reference.rk_finish(y.double(), k.double(), b, e, h, RTOL, ATOL, per_sample)
    assert_close(got, want, "solution")
    assert norm.dtype == (torch.float64 if y.dtype == torch.float64 else torch.float32)
    if y.dtype.itemsize >= 4:
        assert_close(norm, want_norm, "norm")


def drift(problem: Problem, per_sample: bool, slots: list[int], mixed: bool = True) -> None:
    """A whole step in place, its stages kept in ``slots``."""
    from lsgm_fast.kernels import rk

    tableau, stages = problem.tableau, problem.tableau.stages
    logit = problem.logit if mixed else None
    scalars = (problem.p, problem.q, problem.r)

    def row(values: tuple[float, ...]) -> list[float]:
        found = [0.0] * stages
        for slot, value in zip(slots, values, strict=False):
            found[slot] = value
        return found

    y, h, z = problem.y, problem.h, problem.z.clone()
    k = torch.full_like(problem.k, math.nan)
    exact_k, exact_z = k.double().clone(), z.double().clone()
    for stage in range(stages):
        before, y_before = k.clone(), y.clone()
        eps = problem.eps.roll(stage)
        head = (logit, *scalars, y)
        wide = (None if logit is None else logit.double(), *scalars, y.double())
        end = (slots[stage], row(tableau.a[stage + 1])) if stage + 1 < stages else (slots[stage],)
        if stage + 1 < stages:
            rk.drift_stage_forward(eps, z, *head, k, *end, h)
            reference.rk_drift_stage(eps.double(), exact_z, *wide, exact_k, *end, h)
        else:
            end = (*end, row(tableau.b), row(tableau.e), h, RTOL, ATOL, per_sample)
            norm = rk.drift_finish_forward(eps, z, *head, k, *end)
            want = reference.rk_drift_finish(eps.double(), exact_z, *wide, exact_k, *end)
            # The differences of the stages that make the error up cancel.
            assert relative(norm, want) < (1e-13 if z.dtype == torch.float64 else 1e-4)
        others = [i for i in range(stages) if i != slots[stage]]
        assert torch.equal(k[others].nan_to_num(9.0), before[others].nan_to_num(9.0))
        assert torch.equal(y, y_before)
        assert_close(k[slots[stage]], exact_k[slots[stage]], f"stage {stage}")
        assert_close(z, exact_z, f"state after stage {stage}")


def everything(problem: Problem, per_sample: bool) -> None:
    with testing.poison_uninitialized():
        stages = list(range(problem.tableau.stages))
        plain(problem, per_sample)
        for slots in (stages, stages[::-1]):
            drift(problem, per_sample, slots)
        drift(problem, per_sample, stages, mixed=False)


def tableau(found: tableaus.Tableau) -> Callable[[], None]:
    def check() -> None:
        f32, f64 = torch.float32, torch.float64
        for dtype, eps_dtype in ((f32, f32), (f32, torch.bfloat16), (f64, f32), (f64, f64)):
            everything(Problem((3, 5, 3, 7), found, dtype, eps_dtype), per_sample=dtype == f64)
        everything(Problem((2, 4, 4, 8), found, each=False), per_sample=False)
        everything(Problem((2, 4, 4, 8), found, each=False), per_sample=True)

    return check


def forced(shapes: tuple[tuple[int, ...], ...], **values: object) -> Callable[[], None]:
    """Tries what only large tensors lead to, on small ones."""

    def check() -> None:
        from lsgm_fast.kernels import rk

        original = {name: getattr(rk, name) for name in values}
        vars(rk).update(values)
        try:
            for shape in shapes:
                for each, per_sample in ((True, True), (True, False), (False, False)):
                    everything(Problem(shape, tableaus.HEUN, each=each), per_sample)
        finally:
            vars(rk).update(original)

    return check


def wide_index() -> None:
    import triton.language as tl

    forced(((5, 6, 4, 8), (3, 5, 3, 7), (2, 36, 2, 2), (3, 11)), index_type=lambda elements: tl.int64)()


def norms_read_every_partial_sum() -> None:
    from lsgm_fast.kernels import rk

    for partials in (1, 128, 129, 1024, 1025, 3000, 2**21):
        options = rk.norm_options(partials)
        assert partials <= options["BLOCK"] * options["ROUNDS"] <= max(2 * partials, 1024)


def wide_index_is_chosen() -> None:
    import triton.language as tl

    from lsgm_fast.kernels import rk

    for elements, expected in ((2**30, tl.int32), (2**31, tl.int64), (2**33, tl.int64)):
        blocks, sizes, options = rk.step_plan(1, elements, None, torch.float32)
        assert options["INDEX"] == expected
        assert blocks * options["BLOCK"] >= elements
        assert sizes["sample_units"] * options["ALIGN"] == elements


def many_partials() -> None:
    """Several programs per sample, and several blocks of partial sums in one norm."""

    def rounds(partials: int) -> dict[str, object]:
        return {"BLOCK": 4, "ROUNDS": partials // 4 + 1, "num_warps": 1, "enable_fp_fusion": True}

    shapes = ((2, 3, 4, 8), (3, 5, 3, 3))
    forced(shapes, step_block=lambda samples, size, dtype: 16, norm_options=rounds)()


def half_precision() -> None:
    for each in (True, False):
        plain(Problem((3, 6, 5, 7), dtype=torch.float16, each=each), per_sample=each)


def norm_of_the_rounded_state() -> None:
    """Both half dtypes; the interpreter drops digits of bfloat16, so its own result is taken as the rounded one."""
    from lsgm_fast.kernels import rk

    b, e = tableaus.RK45.b, tableaus.RK45.e
    for dtype in (torch.float16, torch.bfloat16):
        problem = Problem((1, 2, 1, 2), dtype=dtype)  # so few that the roundings do not average out
        y, k, h = problem.y, problem.k, problem.h
        new, norm = rk.finish_forward(y, k, list(b), list(e), h, RTOL, 0.0, False)
        exact = reference.rk_stage(y.double(), k.double(), b, h)
        spacings = (new.double() - exact).abs() / (exact.abs() * torch.finfo(dtype).eps)
        assert spacings.max() < 1.01
        error = reference.linear_combination(k.double(), e, y.double()) * h[:, None, None, None]
        ratio = error / (RTOL * torch.maximum(y.double().abs(), new.double().abs()))
        unrounded = error / (RTOL * torch.maximum(y.double().abs(), exact.abs()))
        want = ratio.square().mean().sqrt()
        assert abs(norm.double() / want - 1) < 1e-6
        assert abs(unrounded.square().mean().sqrt() / want - 1) > 1e-5  # so the line above tells them apart


def not_finite() -> None:
    """A stage without a coefficient spoils nothing; a solution that is NaN does, though the error estimate is not."""
    from lsgm_fast.kernels import rk

    problem = Problem((4, 2, 3, 3))
    y, k, h = problem.y, problem.k, problem.h
    k[1, 0, 0, 0, 0] = math.nan
    k[0, 1, 0, 0, 0] = math.inf
    got = rk.finish_forward(y, k, [0.5, 0.0], [0.0, 0.5], h, RTOL, ATOL, True)
    want = reference.rk_finish(y.double(), k.double(), [0.5, 0.0], [0.0, 0.5], h, RTOL, ATOL, True)
    for g, w in zip(got, want, strict=True):
        assert_close(torch.where(g.isinf(), 0.0, g), torch.where(w.isinf(), 0.0, w), "finite numbers")
    y[2, 0, 0, 0] = math.nan
    _, norm = rk.finish_forward(y, k, [0.5, 0.0], [0.0, 0.5], h, RTOL, ATOL, True)
    assert norm.isnan().tolist() == [True, False, True, False]
    new, norm = rk.finish_forward(
        y[1:2].contiguous(), k[:, 3:].contiguous(), [math.nan], [0.0, 1.0], h[3:], RTOL, ATOL, False
    )
    assert new.isnan().all()
    assert norm.isnan()


def scalars_of_every_form() -> None:
    y, k = Problem((3, 4, 2, 5)).y, Problem((3, 4, 2, 5)).k
    from lsgm_fast.kernels import rk

    for h in (
        torch.tensor(0.3),
        torch.tensor([0.3], dtype=torch.float64),
        torch.tensor(0.3).expand(3),
        torch.rand(6)[::2],
    ):
        want = reference.rk_stage(y.double(), k.double(), (0.5, 0.25), h.double())
        assert_close(rk.stage_forward(y, k, [0.5, 0.25], h), want, f"h of strides {h.stride()}")
    one, h = y[:1].contiguous(), torch.rand(1, 8, dtype=torch.float64)[:, 1]
    got = rk.stage_forward(one, k[:, :1].contiguous(), [0.5], h)
    assert_close(got, reference.rk_stage(one.double(), k[:, :1].double(), (0.5,), h), "one sample")


def empty() -> None:
    from lsgm_fast.kernels import rk

    with testing.poison_uninitialized():
        for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
            p = Problem(shape)
            row = [1.0, 0.5]
            assert rk.stage_forward(p.y, p.k, row, p.h).shape == shape
            assert rk.drift_stage_forward(p.eps, p.z, p.logit, p.p, p.q, p.r, p.y, p.k, 1, row, p.h) is None
            for per_sample in (False, True):
                want = torch.zeros(shape[:1] if per_sample else ())
                tail = (row, row, p.h, RTOL, ATOL, per_sample)
                y_new, norm = rk.finish_forward(p.y, p.k, *tail)
                assert y_new.shape == shape
                assert torch.equal(norm, want)
                norm = rk.drift_finish_forward(p.eps, p.z, p.logit, p.p, p.q, p.r, p.y, p.k, 1, *tail)
                assert torch.equal(norm, want)
        control = torch.empty(0, 8, dtype=torch.float64)
        assert rk.control_forward(control, torch.empty(0), 0.0, -0.2, 0.9, 0.2, 10.0).shape == (0, 8)


def same_every_time() -> None:
    from lsgm_fast.kernels import rk

    p = Problem((9, 7, 15, 15), dtype=torch.float32)
    b, e = list(tableaus.RK45.b), list(tableaus.RK45.e)
    runs = [rk.finish_forward(p.y, p.k, b, e, p.h, RTOL, ATOL, False) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def sums_in_float64() -> None:
    """Squares that float32 holds, and whose sum it does not, within a program and over several."""
    from lsgm_fast.kernels import rk

    for size in (8, 600):
        y, k = torch.zeros(size), torch.full((1, size), 1.5e19)
        _, norm = rk.finish_forward(y, k, [0.0], [1.0], torch.tensor(1.0), 0.0, 1.0, False)
        assert abs(norm / 1.5e19 - 1) < 1e-6


def control_is_exact() -> None:
    """Bit for bit where the factor needs no power: a first step at its limit, and steps near the spacing at t."""
    from lsgm_fast.kernels import rk

    tiny, huge = 5e-324, 1.7976931348623157e308
    times = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        1 / 3,
        -1 / 3,
        tiny,
        -tiny,
        2.0**-1022,
        -(2.0**-1022),
        1e300,
        -huge,
    ]
    rows = [
        [t, h, t + h, retried, t, 3.0, 2.0, 0.7]
        for t in times
        for h in (1e-17, -1e-17, 1e-3, -1e-3, tiny, -tiny, 0.0)
        for retried in (0.0, 1.0)
    ]
    control = torch.tensor(rows, dtype=torch.float64)
    for value in (0.0, 1.0, math.inf, math.nan):
        for dtype in (torch.float32, torch.float64):
            norm = torch.full((len(rows),), value, dtype=dtype)
            for t_end in (1e-3, -2.0, 1e301):
                constants = (t_end, -0.2, 0.9, 0.2, 10.0)
                got = rk.control_forward(control, norm, *constants)
                want = reference.rk_control(control, norm, *constants)
                same = (got == want) | (got.isnan() & want.isnan())
                wrong = (~same).any(1).nonzero().flatten().tolist()
                assert not wrong, f"norm {value}, t_end {t_end}: {rows[wrong[0]]}"


def control_without_an_exponent() -> None:
    from lsgm_fast.kernels import rk

    control = torch.tensor([0.5, 0.1, 0.6, 0.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    for value in (0.0, 0.5, 7.0):
        args = (control, torch.tensor(value), 9.0, 0.0, 0.9, 0.2, 10.0)
        assert torch.equal(rk.control_forward(*args), reference.rk_control(*args))


def refuses_what_it_would_misread() -> None:
    from lsgm_fast.kernels import rk

    p = Problem((4, 6, 3, 5))
    a, stage = [1.0, 0.5], (p.p, p.q, p.r, p.y, p.k)

    def raises(message: str, function: Callable[..., Any], *args: Any) -> None:
        with pytest.raises(ValueError, match=message):
            function(*args)

    raises("contiguous", rk.stage_forward, p.y.mT, p.k.mT, a, p.h)
    raises("8 or more stages", rk.stage_forward, p.y, p.k, [1.0] * 8, p.h)
    raises("stages", rk.stage_forward, p.y, p.k[:, :2].contiguous(), a, p.h)
    raises("one dtype", rk.stage_forward, p.y, p.k.double(), a, p.h)
    raises(r"expected \(\), \(1,\) or \(4,\)", rk.stage_forward, p.y, p.k, a, p.h[:3])
    raises("eps", rk.drift_stage_forward, p.eps[:, :2], p.z, p.logit, *stage, 1, a, p.h)
    raises("stage is 7", rk.drift_stage_forward, p.eps, p.z, p.logit, *stage, 7, a, p.h)
    raises("mixing_logit", rk.drift_stage_forward, p.eps, p.z, p.logit[:, :2], *stage, 1, a, p.h)
    control = torch.zeros(4, 8, dtype=torch.float64)
    raises("float64", rk.control_forward, control.float(), torch.zeros(4), 0.0, -0.2, 0.9, 0.2, 10.0)
    raises("norm", rk.control_forward, control, torch.zeros(3), 0.0, -0.2, 0.9, 0.2, 10.0)


CHECKS: dict[str, Callable[[], None]] = {
    "RK45": tableau(tableaus.RK45),
    "RK23": tableau(tableaus.RK23),
    "Heun": tableau(tableaus.HEUN),
    "64-bit indices": wide_index,
    "64-bit indices from 2^31": wide_index_is_chosen,
    "many partial sums": many_partials,
    "every partial sum": norms_read_every_partial_sum,
    "half precision": half_precision,
    "norm of the rounded state": norm_of_the_rounded_state,
    "not finite": not_finite,
    "scalars": scalars_of_every_form,
    "empty": empty,
    "deterministic": same_every_time,
    "float64 sums": sums_in_float64,
    "exact control": control_is_exact,
    "exponent 0": control_without_an_exponent,
    "refusals": refuses_what_it_would_misread,
}


ALL = dict(CHECKS)
for _op in OPS:
    ALL.update(interpreter.sample_checks(_op, [s for s in samples(_op) if not interpreter_truncates(_op, s)]))


@pytest.mark.parametrize("name", ALL)
def test_interpreted(name):
    interpreter.check(__file__, name)


if __name__ == "__main__":
    interpreter.main(ALL)
