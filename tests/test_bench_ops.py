"""``lsgm-fast bench ops``: times only what is right, on an idle machine, and writes a record that can be checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lsgm_fast import bench, cli, dispatch, ops, testing
from lsgm_fast.dispatch import Impl, Op
from lsgm_fast.reference.mixed_score import mixed_score as reference

pytestmark = pytest.mark.skipif(not (bench.ROOT / "benchmarks").is_dir(), reason="not a source tree")

QUICK = [
    "mixed_score",
    "--quick",
    "--no-compile",
    "--rounds",
    "3",
    "--min-time",
    "1e-4",
    "--force",
    "--dry-run",
]


def check(eps, z, mixing_logit, r, *, backend=None):
    pass


def biased(eps, z, mixing_logit, r):
    return reference(eps, z, mixing_logit, r) * 1.01


@pytest.fixture
def fake(monkeypatch):
    """mixed_score with a right `triton`, a wrong `cpu` and a `cuda` that can run nothing."""
    op = Op(check, reference)
    op.name, op.__module__ = "mixed_score", "lsgm_fast.ops.mixed_score"
    op.register(Impl("triton", lambda *a: reference(*a) + 0, priority=1))
    op.register(Impl("cpu", biased, tolerance=4.0, priority=2))
    op.register(Impl("cuda", biased, reasons=lambda *a: ["no GPU"], priority=3))
    monkeypatch.setitem(dispatch.REGISTRY, "mixed_score", op)
    return op


@pytest.fixture
def program(monkeypatch):
    module = bench.program("ops")
    # Small buffers: the machinery is tested here, not the memory.
    monkeypatch.setattr(module, "cache_bytes", lambda device: 2**18)
    original = module.measure.read_state
    monkeypatch.setattr(module.measure, "read_state", lambda seconds=0.0, **kw: original(0.01, **kw))
    return module


def run(program, tmp_path: Path, *arguments: str):
    status = program.main([*arguments, "--out", str(tmp_path)])
    files = list(tmp_path.glob("*/*.json"))
    return status, json.loads(files[0].read_text()) if files else None


def test_a_wrong_kernel_is_not_timed(fake, program, tmp_path, capsys):
    status, record = run(program, tmp_path, *QUICK)
    assert status == 1
    timed = [c for c in record["cases"] if c["parameters"]["case"] != "dispatch overhead"]
    assert [c["parameters"]["mode"] for c in timed] == ["forward", "forward+backward"]
    for case in timed:
        figures = case["figures"]
        assert figures["cpu"]["kind"] == "not_measured"
        assert "mixed_score on cpu" in figures["cpu"]["reason"] and "cosine" in figures["cpu"]["reason"]
        assert figures["compile"]["kind"] == "not_measured" and "cuda" not in figures
        assert case["failures"] and case["failures"][0].startswith("cpu: AssertionError: mixed_score on cpu")
        assert case["backends"] == {"mixed_score": "triton"}
        for name in ("reference", "triton"):
            assert figures[name]["time"]["n"] == 3 and figures[name]["time"]["median"] > 0
            moved, seconds = case["parameters"]["bytes"], figures[name]["time"]["values"][0]
            assert figures[name]["bandwidth"]["values"][0] == pytest.approx(moved / seconds / 1e9)
        assert figures["triton"]["time_over_reference"]["n"] == 3
        assert figures["copy"]["bandwidth"]["median"] > 0
        assert case["parameters"]["buffers"] > 1
    out = capsys.readouterr().out
    assert "not timed" in out and "FAILED mixed_score" in out and "dispatch costs" in out


def test_a_kernel_that_falls_back_is_not_timed(fake, program, tmp_path):
    """What ran is taken from the record, not from what was asked for."""
    fake._impls["cpu"] = Impl("cpu", lambda *a: fake(*a, backend="triton"), priority=2)
    status, record = run(program, tmp_path, *QUICK, "--modes", "forward")
    case = record["cases"][-1]
    assert status == 1 and "triton" in case["failures"][0] and "cpu" in case["failures"][0]


def test_all_right_with_torch_compile(program, tmp_path, capsys):
    arguments = [a for a in QUICK if a != "--no-compile"]
    status, record = run(program, tmp_path, *arguments, "--modes", "forward", "--hot")
    assert status == 0
    program.measure.check_record(record)
    assert record["forced"] is True and record["dry_run"] is True and record["left_out"] == []
    assert (
        record["settings"]["torch_compile"] is True and "mixed_score" in record["settings"]["kernel_sources"]
    )
    figures = record["cases"][-1]["figures"]
    assert figures["compile"]["time_over_reference"]["median"] > 0
    assert record["cases"][-1]["parameters"]["buffers"] == 1
    overhead = record["cases"][0]["figures"]
    assert abs(overhead["resolve"]["beyond_direct"]["median"]) < 5e-6
    assert "us per call" in capsys.readouterr().out


def test_the_end_of_the_budget_is_recorded(fake, program, tmp_path):
    status, record = run(program, tmp_path, *QUICK, "--budget", "1e-6")
    assert status == 0 and record["complete"] is False
    assert len(record["left_out"]) == 2 and all("mixed_score" in text for text in record["left_out"])


def test_a_busy_machine_is_refused(fake, program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program.measure, "busy_because", lambda state, **kw: ["somebody works here"])
    status, record = run(program, tmp_path, *(a for a in QUICK if a != "--force"))
    assert status == 3 and record is None
    assert "somebody works here" in capsys.readouterr().err
    assert cli.main(["bench", "ops", "--quick", "--no-compile", "--out", str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: this machine is not idle") and "--force" in error
    status, record = run(program, tmp_path, *QUICK)
    assert record["idle"] is False and record["forced"] is True


def test_break_even_sizes(fake, program, tmp_path):
    def case(side, ratio):
        figure = {"time_over_reference": {"median": ratio}}
        parameters = {
            "op": "o",
            "case": "ladder",
            "dtype": "float32",
            "mode": "forward",
            "shape": [1, side, side],
        }
        return {"parameters": parameters, "figures": {"cpu": figure, "compile": figure, "reference": {}}}

    found = program.break_even([case(2, 0.9), case(4, 1.2), case(8, 1.0), case(16, 0.5)])
    assert found == [("o", "cpu", "float32", "forward", 64)]
    assert program.break_even([case(2, 0.9), case(4, 1.2)]) == [("o", "cpu", "float32", "forward", None)]
    _, record = run(program, tmp_path, *QUICK, "--crossover", "--modes", "forward")
    found = program.break_even(record["cases"])
    assert [f[:4] for f in found] == [("mixed_score", "triton", "float32", "forward")]
    assert any("is never slower than the reference" in line for line in program.summary(record))


def test_rotating_copies_exceed_the_cache_and_keep_strides(program):
    case = program.Case("mixed_score", "x", (2, 5, 8, 8), "float32<-bfloat16", "channels_last", "forward")
    plan = program.Plan(program.Budget(60.0))
    copies = program.rotating(testing.describe_samples("mixed_score"), case, plan)
    size = sum(t.numel() * t.element_size() for t in copies[0].tensors())
    assert len(copies) * size >= 2 * 2**18
    for position in range(2):
        assert len({c.args[position].data_ptr() for c in copies}) == len(copies)
        assert len({c.args[position].stride() for c in copies}) == 1
        assert all(torch.equal(c.args[position], copies[0].args[position]) for c in copies)
    assert copies[0].args[0].dtype == torch.bfloat16
    many = program.Case("weight_norm", "x", (4, 3, 3, 3), "float32", "contiguous", "forward")
    first, second, *_ = program.rotating(testing.describe_samples("weight_norm"), many, plan)
    assert first.args[0][0].data_ptr() != second.args[0][0].data_ptr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixed_scor"], "unknown operation 'mixed_scor'"),
        (["--dtype", "float31"], "unknown dtype 'float31'"),
        (["--batch", "0"], "Invalid value for '--batch'"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--budget", "0"], "the time budget must be a positive number"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    assert cli.main(["bench", "ops", "--force", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_installed_copy_says_where_the_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert cli.main(["bench", "ops"]) == 2
    assert "come with the source tree" in capsys.readouterr().err


def test_json_on_standard_output(fake, program, tmp_path, capsys):
    code = cli.main(
        ["bench", "ops", "mixed_score", "--quick", "--no-compile", "--force", "--budget", "1e-6", "--json", "--device",
         "cpu", "--out", str(tmp_path)]
    )  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert json.loads(out)["name"] == "ops"
    assert str(tmp_path) not in json.loads(out)["command"]


def test_help(capsys):
    assert cli.main(["bench", "--help"]) == 0
    assert "busy machine" in capsys.readouterr().out
    assert cli.main(["bench", "ops", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--crossover" in out and "--force" in out
    assert ops.mixed_score.name == "mixed_score"
