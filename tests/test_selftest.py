"""A fused kernel proves itself before ``auto`` runs it: a planted wrong one is caught and the result stays right."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from lsgm_fast import dispatch, fused, ops, reference, selftest

OP = ops.mixed_score


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """No verdicts, a cache of its own, and the process's real verdicts again afterwards."""
    monkeypatch.setenv("LSGM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LSGM_FAST_SELFTEST", raising=False)
    monkeypatch.setattr(selftest, "_verdicts", {})


@pytest.fixture
def plant(monkeypatch):
    """Replace the CPU implementation of mixed_score; returns the list of its calls."""

    def put(fn):
        calls: list[int] = []

        def run(*args, **kwargs):
            calls.append(threading.get_ident())
            return fn(*args, **kwargs)

        impl = dataclasses.replace(
            OP.impl("cpu"), fn=run, reasons=dispatch._no_reasons, auto_reasons=dispatch._no_reasons
        )
        rest = [i for i in OP._order if i.backend != "cpu"]
        monkeypatch.setattr(OP, "_impls", {i.backend: i for i in (impl, *rest)})
        monkeypatch.setattr(OP, "_order", (impl, *rest))
        return calls

    return put


def inputs():
    generator = torch.Generator().manual_seed(0)
    eps, z = (torch.randn(2, 6, 5, 3, generator=generator) for _ in range(2))
    return eps, z, torch.linspace(-3, 3, 6).view(1, 6, 1, 1), torch.tensor(0.7)


def biased(eps, z, logit, r):
    return reference.mixed_score(eps, z, logit, r) * 1.01


def wrong_gradient(eps, z, logit, r):
    # Right values; the gradient of the logit is lost.
    return reference.mixed_score(eps, z, logit.detach(), r) + 0.0 * logit.sum()


def crashing(eps, z, logit, r):
    raise RuntimeError("an illegal memory access was encountered")


def wrong_dtype(eps, z, logit, r):
    return reference.mixed_score(eps, z, logit, r).double()


def unwritten_tail(eps, z, logit, r):
    out = reference.mixed_score(eps, z, logit, r).clone()
    out.view(-1)[-1] = float("nan")
    return out


@pytest.mark.parametrize("wrong", [biased, wrong_gradient, crashing, wrong_dtype, unwritten_tail])
def test_a_wrong_kernel_is_disabled_with_one_warning(plant, wrong):
    plant(wrong)
    expected = reference.mixed_score(*inputs())
    assert "untested" in str(dispatch.explain("mixed_score", *inputs()))
    with warnings.catch_warnings(record=True) as caught, dispatch.record() as log:
        warnings.simplefilter("always")
        first, second = OP(*inputs()), OP(*inputs())
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert "cpu kernel of mixed_score is disabled on cpu" in str(caught[0].message)
    assert len(caught) == 1
    assert log.backends() == {"mixed_score": "reference"}
    decision = dispatch.explain("mixed_score", *inputs())
    assert decision.chosen == "reference"
    assert "self-test: failed" in str(decision)


def test_a_right_kernel_is_used_and_tested_once(plant):
    calls = plant(reference.mixed_score)
    with dispatch.record() as log:
        OP(*inputs())
        tested = len(calls)
        OP(*inputs())
    assert log.backends() == {"mixed_score": "cpu"}
    assert len(calls) == tested + 1
    assert len(set(calls[: tested - 1])) == 1
    assert calls[0] != threading.get_ident(), "the test must not see the caller's modes"
    assert "self-test: passed" in str(dispatch.explain("mixed_score", *inputs()))


def test_verdicts_are_kept_on_disk(plant, tmp_path):
    calls = plant(biased)
    with pytest.warns(RuntimeWarning):
        OP(*inputs())
    ran = len(calls)
    stored = json.loads((tmp_path / "cache" / "selftest.json").read_text())
    assert len(stored) == 1
    assert "mixed_score | cpu" in next(iter(stored))
    # Another process: it warns too, but does not run the kernel again.
    selftest.forget()
    with pytest.warns(RuntimeWarning, match="disabled"):
        OP(*inputs())
    assert len(calls) == ran


def test_changed_sources_are_tested_anew(plant, monkeypatch):
    calls = plant(reference.mixed_score)
    OP(*inputs())
    ran = len(calls)
    selftest.forget()
    monkeypatch.setattr("lsgm_fast.native.source_hash", lambda op: "another version")
    OP(*inputs())
    assert len(calls) > ran + 1


@pytest.mark.parametrize("content", ["", "{", "[1, 2]"])
def test_a_damaged_cache_is_replaced(plant, tmp_path, content):
    plant(reference.mixed_score)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "selftest.json").write_text(content)
    OP(*inputs())
    assert len(json.loads((tmp_path / "cache" / "selftest.json").read_text())) == 1


def test_a_cache_that_cannot_be_written_costs_nothing_else(plant, tmp_path, monkeypatch):
    plant(reference.mixed_score)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSGM_FAST_CACHE", str(tmp_path / "file" / "below"))
    with dispatch.record() as log:
        OP(*inputs())
    assert log.backends() == {"mixed_score": "cpu"}


def test_nothing_is_tested_during_graph_capture(plant, monkeypatch):
    calls = plant(reference.mixed_score)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in selftest.problem("mixed_score", "cpu", "cuda", 0)
    assert calls == []
    assert ("mixed_score", "cpu", "cuda", 0) not in selftest._verdicts, "it is tested later"


def test_it_can_be_switched_off(plant, monkeypatch):
    calls = plant(biased)
    monkeypatch.setenv("LSGM_FAST_SELFTEST", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OP(*inputs())
    assert len(calls) == 1
    monkeypatch.setenv("LSGM_FAST_SELFTEST", "maybe")
    with pytest.raises(ValueError, match="LSGM_FAST_SELFTEST='maybe'"):
        OP(*inputs())


def test_a_named_backend_is_not_held_back(plant):
    # Who names a backend gets it: a kernel's author must be able to run what is wrong.
    plant(biased)
    assert not torch.equal(OP(*inputs(), backend="cpu"), reference.mixed_score(*inputs()))


def test_many_threads_test_once(plant):
    calls = plant(reference.mixed_score)
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        OP(*inputs())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tests = len(calls) - 8
    selftest.forget()
    selftest._path().unlink()
    before = len(calls)
    OP(*inputs())
    assert tests == len(calls) - before - 1


def test_callers_modes_do_not_reach_the_test(plant):
    plant(reference.mixed_score)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), dispatch.record() as log:
        OP(*inputs())
    assert log.counts == {("mixed_score", "cpu"): 1}


def test_under_compile_a_wrong_kernel_is_left_out(plant):
    plant(biased)
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: OP(*a), fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="disabled"):
        out = compiled(*inputs())
    assert torch.allclose(out, reference.mixed_score(*inputs()), atol=1e-6)


def test_the_first_use_in_a_process_passes_here(tmp_path):
    """The real kernel, the real file, two processes."""
    if fused.unavailable("cpu", "cpu") is not None:
        pytest.skip("the CPU library is not built")
    code = (
        "import torch, lsgm_fast\nfrom lsgm_fast import ops\n"
        "x = torch.randn(2, 4, 5, 3)\n"
        "with lsgm_fast.record() as log: ops.mixed_score(x, x, torch.zeros(1, 4, 1, 1), torch.tensor(0.5))\n"
        "assert log.backends() == {'mixed_score': 'cpu'}, log"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], check=True)
    assert len(json.loads((tmp_path / "cache" / "selftest.json").read_text())) == 1


def out_of_memory(eps, z, logit, r):
    raise torch.OutOfMemoryError("the device is full")


def test_a_passing_trouble_is_not_kept(plant, tmp_path):
    plant(out_of_memory)
    with pytest.warns(RuntimeWarning, match="the device is full"):
        OP(*inputs())
    assert not (tmp_path / "cache" / "selftest.json").exists()


@pytest.mark.parametrize("entry", [{}, 3, {"failure": 5}])
def test_a_damaged_entry_is_tested_anew(plant, tmp_path, entry):
    calls = plant(reference.mixed_score)
    (tmp_path / "cache").mkdir()
    print_ = selftest.fingerprint("mixed_score", "cpu", "cpu")
    (tmp_path / "cache" / "selftest.json").write_text(json.dumps({print_: entry}))
    OP(*inputs())
    assert len(calls) > 1
    assert json.loads((tmp_path / "cache" / "selftest.json").read_text())[print_]["failure"] is None


def test_explain_knows_a_kept_verdict(plant):
    plant(biased)
    with pytest.warns(RuntimeWarning):
        OP(*inputs())
    selftest.forget()
    decision = dispatch.explain("mixed_score", *inputs())
    assert decision.chosen == "reference"
    assert "self-test: failed" in str(decision)


def test_meta_tensors_run_no_test(plant):
    calls = plant(lambda eps, z, logit, r: torch.empty_like(z))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = OP(*(t.to("meta") for t in inputs()))
    assert out.is_meta
    assert len(calls) == 1


def test_tensors_given_by_name_keep_their_device():
    eps, z, logit, r = (t.to("meta") for t in inputs())
    by_name = dispatch.explain("mixed_score", eps=eps, z=z, mixing_logit=logit, r=r)
    assert dict(by_name.candidates) == dict(dispatch.explain("mixed_score", eps, z, logit, r).candidates)


def test_transforms_and_forward_mode_go_to_the_reference():
    eps, z, logit, r = inputs()
    expected = torch.func.jvp(lambda x: reference.mixed_score(eps, x, logit, r), (z,), (torch.ones_like(z),))
    with dispatch.record() as log:
        found = torch.func.jvp(lambda x: OP(eps, x, logit, r), (z,), (torch.ones_like(z),))
    assert torch.equal(found[1], expected[1])
    assert log.backends() == {"mixed_score": "reference"}
    big = torch.randn(8, 180, 16, 16)
    wide = torch.zeros(1, 180, 1, 1)
    _, pull = torch.func.vjp(lambda x: OP(big, x, wide, r), big)
    assert torch.allclose(pull(big)[0], 0.5 * 0.7 * big, atol=1e-6)
