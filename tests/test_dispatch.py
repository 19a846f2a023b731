"""Which implementation runs: precedence, reasons, records, threads, compilation."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lsgm_fast
from lsgm_fast import dispatch, ops
from lsgm_fast.dispatch import Impl, Op, define_op, explain, record, set_backend, use_backend
from lsgm_fast.errors import BackendUnsupported


def reference(x, offset=0.0):
    return x + offset


def check(x, offset=0.0, *, backend=None):
    """Adds ``offset``; the fake implementations add a further number that tells which one ran."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a tensor, got {type(x).__name__}")


def only_float32(x, offset=0.0):
    return [] if x.dtype == torch.float32 else [f"needs float32, got {x.dtype}"]


def only_small(x, offset=0.0):
    return [] if x.numel() <= 4 else [f"at most 4 elements, got {x.numel()}"]


def fake(number):
    return lambda x, offset=0.0: x + offset + number


MARKS = {"reference": 0.0, "cpu": 1.0, "triton": 10.0}


@pytest.fixture(autouse=True)
def clean_state(monkeypatch):
    """No choice of the environment or of another test, before and after."""
    monkeypatch.delenv("LSGM_FAST_BACKEND", raising=False)
    set_backend(None)
    yield
    monkeypatch.delenv("LSGM_FAST_BACKEND", raising=False)
    set_backend(None)


@pytest.fixture
def op(monkeypatch):
    """An operation with fake implementations: triton (small float32) before cpu (float32) before the reference."""
    made = Op(check, reference)
    made.name = "test_op"
    made.register(Impl("cpu", fake(MARKS["cpu"]), only_float32, priority=1))
    made.register(
        Impl(
            "triton",
            fake(MARKS["triton"]),
            lambda x, offset=0.0: only_float32(x) + only_small(x),
            priority=2,
        )
    )
    monkeypatch.setitem(dispatch.REGISTRY, "test_op", made)
    return made


@pytest.fixture
def plain(monkeypatch):
    """An operation with nothing but its reference."""
    made = Op(check, reference)
    made.name = "plain_op"
    monkeypatch.setitem(dispatch.REGISTRY, "plain_op", made)
    return made


SMALL, LARGE, DOUBLE = torch.zeros(2), torch.zeros(9), torch.zeros(2, dtype=torch.float64)


def ran(op, x=SMALL, **options):
    """Which implementation ran, told by the number it added."""
    value = float(op(x, **options).flatten()[0])
    return next(name for name, mark in MARKS.items() if mark == value)


# -- automatic choice ------------------------------------------------------------------------------------------------


def test_auto_walks_the_priorities_and_ends_at_the_reference(op, plain):
    assert op.backends() == ["triton", "cpu", "reference"]
    assert [ran(op, x) for x in (SMALL, LARGE, DOUBLE)] == ["triton", "cpu", "reference"]
    assert ran(plain) == "reference"


def test_arguments_are_passed_on(op):
    assert op(SMALL, 0.5)[0] == 10.5
    assert op(SMALL, offset=0.5, backend="cpu")[0] == 1.5
    assert op(x=SMALL, offset=0.5)[0] == 10.5


def test_the_check_runs_before_anything_else(op):
    for backend in (None, "cpu", "reference"):
        with pytest.raises(TypeError, match="expected a tensor, got int"):
            op(3, backend=backend)
    with pytest.raises(TypeError, match="expected a tensor"):
        op.resolve(3)


# -- precedence ------------------------------------------------------------------------------------------------------


def test_precedence(op, monkeypatch):
    assert ran(op) == "triton"
    monkeypatch.setenv("LSGM_FAST_BACKEND", "cpu")
    assert ran(op) == "triton"  # read once, not on every call
    set_backend(None)
    assert ran(op) == "cpu"
    set_backend("reference")
    assert ran(op) == "reference"
    with use_backend("cpu"):
        assert ran(op) == "cpu"
        assert ran(op, backend="triton") == "triton"
        with use_backend("reference"):
            assert ran(op) == "reference"
            with use_backend("auto"):
                assert ran(op) == "triton"
            assert ran(op, backend="auto") == "triton"
            assert ran(op) == "reference"
        assert ran(op) == "cpu"
    assert ran(op) == "reference"
    set_backend("auto")
    assert ran(op) == "triton"  # beats the environment
    set_backend(None)
    assert ran(op) == "cpu"


def test_exceptions_per_operation(op, plain, monkeypatch):
    with use_backend("reference,test_op=cpu"):
        assert ran(op) == "cpu"
    with use_backend("test_op=cpu"):
        assert ran(op) == "cpu"
    with use_backend("plain_op=reference"):
        assert ran(op) == "triton"
    monkeypatch.setenv("LSGM_FAST_BACKEND", " cpu , test_op = reference ")
    set_backend(None)
    assert ran(op) == "reference"


def test_a_scope_ends_with_an_error(op):
    with pytest.raises(KeyboardInterrupt), use_backend("cpu"):
        raise KeyboardInterrupt
    assert ran(op) == "triton"


def test_a_refused_choice_changes_nothing(op):
    set_backend("cpu")
    with pytest.raises(ValueError, match="unknown backend"):
        set_backend("gpu")
    with pytest.raises(ValueError, match="unknown backend"), use_backend("gpu"):
        pytest.fail("the block must not be entered")
    assert ran(op) == "cpu"


# -- a backend by name never falls back ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["call", "scope", "process", "environment"])
def test_a_named_backend_runs_or_raises(op, monkeypatch, how):
    def call():
        if how == "call":
            return op(LARGE, 2.0, backend="triton")
        if how == "scope":
            with use_backend("triton"):
                return op(LARGE, 2.0)
        if how == "process":
            set_backend("triton")
        else:
            monkeypatch.setenv("LSGM_FAST_BACKEND", "triton")
            set_backend(None)
        return op(LARGE, 2.0)

    with pytest.raises(BackendUnsupported) as error:
        call()
    message = str(error.value)
    for part in ("test_op", "triton", "float32[9] on cpu", "2.0", "at most 4 elements, got 9"):
        assert part in message, part


def test_a_scope_leaves_operations_without_that_backend_to_auto(op, plain):
    with use_backend("triton"), record() as log:
        assert ran(plain) == "reference"
        assert ran(op) == "triton"
        decision = explain(plain, SMALL)
    assert (decision.requested, decision.chosen) == ("triton", "reference")
    assert log.backends() == {"plain_op": "reference", "test_op": "triton"}
    with use_backend("cuda"):
        assert ran(op) == "triton"


def test_a_call_is_strict_about_backends_that_are_not_registered(op, plain):
    with pytest.raises(BackendUnsupported, match="plain_op has no 'triton' implementation: it has reference"):
        plain(SMALL, backend="triton")
    with pytest.raises(BackendUnsupported, match="'cuda' implementation: it has triton, cpu, reference"):
        op(SMALL, backend="cuda")
    with pytest.raises(BackendUnsupported):
        op.resolve(SMALL, backend="cuda")


def test_unsupported_is_a_value_error():
    assert issubclass(BackendUnsupported, ValueError)


# -- explain ---------------------------------------------------------------------------------------------------------


def test_explain_gives_the_choice_and_the_reasons_of_the_others(op):
    decision = explain("test_op", LARGE, offset=3.0)
    assert (decision.op, decision.requested, decision.chosen) == ("test_op", "auto", "cpu")
    assert decision.candidates == (
        ("triton", ("at most 4 elements, got 9",)),
        ("cpu", ()),
        ("reference", ()),
    )
    text = str(decision)
    assert "offset=3.0" in text
    assert "-> cpu" in text
    assert "at most 4 elements" in text
    assert explain(op, DOUBLE).chosen == "reference"
    assert explain(op, SMALL, backend="cpu").chosen == "cpu"
    nothing = explain(op, LARGE, backend="triton")
    assert nothing.chosen is None
    assert "never falls back" in str(nothing)


def test_explain_launches_nothing(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("explain must not run anything")

    op = Op(check, lambda x, offset=0.0: fail())
    op.register(Impl("triton", fail, only_small, priority=1))

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    meta = torch.empty(3, device="meta")
    strided = torch.empty(2, 6, device="meta")[:, ::2]
    with Count(), record() as log:
        assert explain(op, meta).chosen == "triton"
        assert explain(op, strided).chosen == "reference"
        text = str(explain(op, strided))
    assert Count.calls == 0
    assert not log.counts
    assert "float32[2, 3] on meta, strides (6, 2)" in text


def test_explain_of_every_real_operation_is_by_name():
    x = torch.empty(2, 8, 4, 4, device="meta")
    weight = torch.empty(8, device="meta")
    assert explain("group_norm_swish", x, weight, weight, groups=2).chosen is not None
    assert lsgm_fast.explain is explain
    with pytest.raises(
        ValueError, match="unknown operation 'group_norm_silu'.*did you mean 'group_norm_swish'"
    ):
        explain("group_norm_silu", x)
    with pytest.raises(ValueError, match="unknown backend"):
        explain("group_norm_swish", x, weight, weight, groups=2, backend="gpu")


# -- record ----------------------------------------------------------------------------------------------------------


def test_record_counts(op, plain):
    op(SMALL)
    with record() as log:
        for _ in range(3):
            op(SMALL)
        op(LARGE)
        plain(SMALL)
        with pytest.raises(BackendUnsupported):
            op(LARGE, backend="triton")
    op(SMALL)
    assert log.counts == {("test_op", "triton"): 3, ("test_op", "cpu"): 1, ("plain_op", "reference"): 1}
    assert log.backends() == {"plain_op": "reference", "test_op": "cpu+triton"}
    assert [line.split() for line in str(log).splitlines()[1:]] == [
        ["plain_op", "reference", "1"],
        ["test_op", "cpu", "1"],
        ["test_op", "triton", "3"],
    ]


def test_nested_records(op):
    with record() as outer:
        op(SMALL)
        with record() as inner:
            op(SMALL)
            op(LARGE)
        op(SMALL)
        with pytest.raises(TypeError, match="str"), record():
            op(LARGE, "boom")
    assert inner.counts == {("test_op", "triton"): 1, ("test_op", "cpu"): 1}
    assert outer.counts == {("test_op", "triton"): 3, ("test_op", "cpu"): 2}


def test_record_of_a_model():
    model = lsgm_fast.build("tiny-binary")
    with record() as log, torch.no_grad():
        model.vae.decode(torch.zeros(1, *model.latent_shape))
        model.prior(torch.zeros(1, *model.latent_shape), torch.tensor(0.5))
    counts = {name: n for (name, _), n in log.counts.items()}
    assert counts["weight_norm"] == 1  # one call for all convolutions
    assert {"nvae_cell", "se_residual", "group_norm_swish", "fir_resample"} <= set(counts)


# -- resolve ---------------------------------------------------------------------------------------------------------


def test_resolve_binds_once(op):
    with use_backend("cpu"):
        bound = op.resolve(SMALL)
    with record() as log, use_backend("reference"):
        assert float(bound(SMALL)[0]) == MARKS["cpu"]
    assert not log.counts
    assert float(op.resolve(SMALL, backend="reference")(SMALL)[0]) == MARKS["reference"]
    with pytest.raises(BackendUnsupported), use_backend("triton"):
        op.resolve(LARGE)


# -- threads ---------------------------------------------------------------------------------------------------------


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_threads_see_the_process_default_and_not_another_threads_scope(op):
    set_backend("cpu")
    with use_backend("reference"), record() as log:
        assert in_thread(lambda: ran(op)) == "cpu"
        assert ran(op) == "reference"
    assert log.counts == {("test_op", "reference"): 1}

    def scoped():
        with use_backend("triton"):
            return ran(op)

    assert in_thread(scoped) == "triton"
    assert ran(op) == "cpu"
    in_thread(lambda: set_backend("reference"))
    assert ran(op) == "reference"


# -- torch.compile ---------------------------------------------------------------------------------------------------


def test_compiled_code_follows_the_choice(op):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x) * 1.0, fullgraph=True, backend="aot_eager")

    def ran_compiled(x=SMALL):
        return next(name for name, mark in MARKS.items() if mark == float(compiled(x)[0]))

    for _ in range(2):
        assert ran_compiled() == "triton"
        with use_backend("cpu"):
            assert ran_compiled() == "cpu"
        set_backend("reference")
        assert ran_compiled() == "reference"
        with use_backend("test_op=cpu"):
            assert ran_compiled() == "cpu"
        set_backend("auto")
    assert ran_compiled(LARGE) == "cpu"
    assert ran_compiled(DOUBLE) == "reference"
    torch._dynamo.reset()


def test_compiled_code_with_the_backend_on_the_call_and_inside_a_record(op):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x, backend="cpu") + 0.0, fullgraph=True, backend="aot_eager")
    with use_backend("reference"), record() as log:
        assert float(compiled(SMALL)[0]) == MARKS["cpu"]
    assert not log.counts  # only Python calls are counted
    torch._dynamo.reset()


def test_a_scope_may_stand_inside_compiled_code(op):
    torch._dynamo.reset()

    def function(x):
        with use_backend("cpu"):
            y = op(x)
        return y, op(x)

    compiled = torch.compile(function, backend="aot_eager")
    inside, outside = compiled(SMALL)
    assert (float(inside[0]), float(outside[0])) == (MARKS["cpu"], MARKS["triton"])
    torch._dynamo.reset()


# -- registration ----------------------------------------------------------------------------------------------------


def test_registration_is_checked(op):
    with pytest.raises(ValueError, match="'cpu' is registered already"):
        op.register(Impl("cpu", reference))
    with pytest.raises(ValueError, match="unknown backend 'cdua'.*did you mean 'cuda'"):
        op.register(Impl("cdua", reference))
    assert op.backends() == ["triton", "cpu", "reference"]


def test_the_reference_must_have_the_operations_signature():
    with pytest.raises(
        TypeError, match=r"the reference takes \['x', 'shift'\], the operation \['x', 'offset'\]"
    ):
        Op(check, lambda x, shift=0.0: x)
    with pytest.raises(TypeError, match="the reference takes"):
        Op(check, lambda x: x)


def test_an_operation_is_defined_once():
    def weight_norm(x, offset=0.0, *, backend=None):
        pass

    with pytest.raises(ValueError, match="'weight_norm' is defined twice"):
        define_op(reference)(weight_norm)
    assert dispatch.REGISTRY["weight_norm"] is ops.weight_norm


def test_an_operation_looks_like_its_function(op):
    assert op.__doc__ == check.__doc__
    assert op.__wrapped__ is check


# -- the real operations and the environment -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "tritn",
            "unknown backend 'tritn'.*'auto', 'reference', 'cpu', 'triton', 'cuda'; did you mean 'triton'",
        ),
        ("group_norm_swih=reference", "unknown operation 'group_norm_swih'.*did you mean 'group_norm_swish'"),
        ("triton,mixed_score=refernce", "did you mean 'reference'"),
        ("triton,cpu", "two default backends"),
        ("triton,", "empty item"),
        ("mixed_score=cpu,mixed_score=cuda", "given twice"),
    ],
)
def test_bad_choices(spec, message):
    for choose in (set_backend, lambda s: use_backend(s).__enter__()):
        with pytest.raises(ValueError, match=message):
            choose(spec)


def test_the_environment_is_read_on_import_and_named_in_errors():
    def run(value):
        code = "import lsgm_fast; from lsgm_fast import dispatch; print(dispatch._process_choice)"
        return subprocess.run(
            [sys.executable, "-c", f"{code}; lsgm_fast.ops"],
            env={**os.environ, "LSGM_FAST_BACKEND": value},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("nonsense")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "LSGM_FAST_BACKEND='nonsense'" in last
    assert "expected one of 'auto', 'reference'" in last


def test_reference_is_available_for_every_operation():
    for name, op in dispatch.REGISTRY.items():
        assert "reference" in op.backends(), name


def test_an_operation_named_with_a_backend_it_lacks_is_an_error(monkeypatch):
    with (
        pytest.raises(ValueError, match="nvae_cell has no 'cuda' implementation"),
        use_backend("nvae_cell=cuda"),
    ):
        pass
    with pytest.raises(TypeError, match="got None"), use_backend(None):
        pass
