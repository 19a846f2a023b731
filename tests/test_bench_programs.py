"""The benchmark programs as commands of ``lsgm-fast bench``, and the quick selection of ``make bench``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import measure, quick, score, train  # noqa: E402
from lsgm_fast import bench, cli  # noqa: E402
from lsgm_fast.commands import bench_programs  # noqa: E402


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    state = measure.MachineState(1.0, 2, (0.0, 0.0, 0.0), 0.0, 0.0)
    monkeypatch.setattr(measure, "read_state", lambda *a, **k: state)
    monkeypatch.setattr(measure, "_state_since", lambda *a, **k: state)


# -- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bench_programs.PROGRAMS)
def test_every_program_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"-m benchmarks.{name} [-h]" in shown
    for option in ("--json", "--quiet", "--budget", "--force", "--out"):
        assert option in shown
    assert cli.main(["bench", "--help"]) == 0
    assert name in capsys.readouterr().out


def test_arguments_are_handed_on_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []

    def main(arguments: Sequence[str]) -> int:
        seen.append(list(arguments))
        return 3

    monkeypatch.setattr(score, "main", main)
    given = ["--presets", "digits", "mnist", "--no-compile", "--repeats", "3", "5", "-x", "--name=a b"]
    assert cli.main(["bench", "score", *given, "--quiet"]) == 3
    assert seen == [[*given, "--device", "cpu"]]
    assert cli.main(["bench", "score", "--device", "cpu", "--presets", "digits"]) == 3
    assert seen[1] == ["--presets", "digits", "--device", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--presets", "mnits"], "did you mean 'mnist'"),
        (["score", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["solver", "--batch", "0"], "must be at least 1"),
        (["paper", "--device", "cuda:77"], "cuda:77"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_installed_copy_says_where_the_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert cli.main(["bench", "paper"]) == 2
    assert "come with the source tree" in capsys.readouterr().err


def test_json_and_quiet(tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "solver", "--presets", "tiny-rgb", "--batch", "1", "--rounds", "1", "--dry-run"]
    arguments += ["--out", str(tmp_path), "--device", "cpu"]
    assert cli.main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    (path,) = tmp_path.glob("*/solver.json")
    assert record == json.loads(path.read_text()) and "tiny-rgb: scipy" in shown.err
    assert record["command"].startswith("python3 -m benchmarks.solver --presets tiny-rgb")
    assert cli.main([*arguments, "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
    assert not measure._LISTENING


def test_training_compares_both_stages_and_backends_by_default() -> None:
    options = train.parser().parse_args([])
    assert options.recipe == ["digits", "mnist"] and options.backends == ["reference", "auto"]
    stages = {train.configuration(case_of(step), Path("x.npz")).stage for step in options.steps}
    assert stages == {"vae", "lsgm"} and options.budget <= 420


def case_of(step: str) -> train.Case:
    return train.Case("digits", step, 8, "fp32", False, None, "cpu")


# -- the quick selection --------------------------------------------------------------------------------------------


def record(name: str, *entries: tuple[dict[str, Any], dict[str, Any]], idle: bool = True) -> dict[str, Any]:
    cases = [{"parameters": parameters, "figures": figures} for parameters, figures in entries]
    return {"name": name, "idle": idle, "cases": cases}


RATIO = measure.measured([2.0, 4.0, 3.0], "1")
RECORDS = {
    "ops": record(
        "ops",
        ({"op": "rk_stage", "case": "dispatch overhead"}, {"direct": {"time": RATIO}}),
        (
            {"op": "rk_stage", "case": "x"},
            {
                "cpu": {"time_over_reference": measure.measured([0.5, 0.25, 0.25], "ratio")},
                "compile": {"time_over_reference": RATIO},
                "reference": {"time": RATIO},
            },
        ),
    ),
    "decode": record(
        "decode",
        ({"preset": "mnist", "bn": "batch"}, {"reference_over_auto": RATIO}),
        ({"preset": "digits", "bn": "batch"}, {"reference_over_auto": measure.not_measured("wrong")}),
    ),
    "sample": record("sample", ({"preset": "demo"}, {"published_over": {"auto-10": RATIO}}), idle=False),
}


def test_ratios_are_plain_pytorch_over_the_kernels() -> None:
    found = {what: figure["median"] for r in RECORDS.values() for what, figure in quick.ratios(r)}
    assert found == {"rk_stage on cpu": 4.0, "mnist batch": 3.0, "demo, auto-10": 3.0}
    lines = quick.table(list(RECORDS.values())).splitlines()
    assert lines[2].split() == ["decode", "mnist", "batch", "3.00", "2.40", "to", "3.60"]
    assert lines[-1].startswith("NOT IDLE") and "NOT IDLE" not in quick.table([RECORDS["ops"]])


def test_it_goes_on_after_a_failure(
    tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    stale = tmp_path / "machine" / "score.json"
    measure.write_json(stale, record("score"))
    os.utime(stale, (0, 0))

    def fake(program: quick.Program, device: str, out: Path, *, force: bool, dry_run: bool) -> int:
        ran.append((program.name, device, force, dry_run))
        if program.name in RECORDS:
            measure.write_json(out / "machine" / f"{program.name}.json", RECORDS[program.name])
        return {"cells": 1, "score": 124}.get(program.name, 0)

    monkeypatch.setattr(quick, "run_program", fake)
    assert quick.main(["--out", str(tmp_path), "--force"]) == 1
    assert ran == [(name, "cpu", True, False) for name in quick.PROGRAMS]
    out = capsys.readouterr().out
    assert "rk_stage on cpu" in out and "demo, auto-10" in out
    words = {line.split()[0]: line.split(" s  ")[1] for line in out.split("== programs\n")[1].splitlines()}
    assert words == {
        "ops": "ok", "cells": "failed", "score": "ended with status 124", "decode": "ok", "sample": "ok"
    }  # fmt: skip
    assert quick.main(["--only", "ops", "--out", str(tmp_path)]) == 0


def test_a_busy_machine_and_how_to_insist(
    idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "busy_because", lambda *args, **kwargs: ["a test says so"])
    assert quick.main([]) == 3
    error = capsys.readouterr().err
    assert "a test says so" in error and "make bench FORCE=1" in error
    rule = (ROOT / "Makefile").read_text().split("\nbench:")[1].split("\n\n")[0]
    assert "$(if $(FORCE),--force)" in rule


def test_a_program_runs_in_its_own_process_within_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$@"\n[ "$3" = --wait ] && exec sleep 60\nexit 7\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(quick, "LIMIT_BEYOND_BUDGET", 0.0)
    program = quick.Program("solver", ("--batch", "1"), 30.0)
    assert quick.run_program(program, "cpu", tmp_path, force=True, dry_run=False) == 7
    expected = f"-m benchmarks.solver --batch 1 --budget 30.0 --device cpu --out {tmp_path} --force"
    assert capfd.readouterr().out.strip() == expected
    waiting = quick.Program("solver", ("--wait",), 0.5)
    assert quick.run_program(waiting, "cpu", tmp_path, force=False, dry_run=True) == 124


def test_the_budgets_fit_into_ten_minutes() -> None:
    assert sum(program.budget for program in quick.PROGRAMS.values()) <= 420
    for program in quick.PROGRAMS.values():
        bench.program(program.name)
        options = bench.program(program.name)
        parser = options.parser() if hasattr(options, "parser") else options.BENCHMARK.parser()
        parser.parse_args([*program.arguments, "--budget", "1", "--device", "cpu", "--out", "x", "--force"])


@pytest.mark.parametrize("arguments", [["--only", "kernels"], ["--budget", "0"], ["--device", "cuda"]])
def test_wrong_usage_of_the_selection(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        quick.main(arguments)
    assert stopped.value.code == 2
