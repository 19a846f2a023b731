"""``lsgm-fast bench compare``: what it calls a change, what it refuses, and two commits in turns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench_records import ROOT, case, op_case, record, spread, write

from benchmarks import base, compare, measure, records, worktree
from lsgm_fast import bench, cli

pytestmark = pytest.mark.skipif(not (bench.ROOT / "benchmarks").is_dir(), reason="not a source tree")


def judge(a: list[float], b: list[float]) -> tuple[float | None, float | None, str]:
    return compare.judge(measure.measured(a, "s"), measure.measured(b, "s"))


def run(*arguments: object) -> int:
    return cli.main(["bench", "compare", *map(str, arguments)])


def two(tmp_path: Path, a: dict[str, Any], b: dict[str, Any]) -> tuple[Path, Path]:
    return write(tmp_path / "a", a), write(tmp_path / "b", b)


# -- the noise floor ------------------------------------------------------------------------------------------------


def test_the_floor_is_where_the_middles_part() -> None:
    a = [0.8, 0.9, 1.0, 1.1, 1.2]  # q20 0.88, q80 1.12
    ratio, floor, verdict = judge(a, [2 * v for v in a])
    assert ratio == pytest.approx(2.0) and verdict == "higher"
    assert floor == pytest.approx(1.12 * 1.0 / 0.88)
    # The middle of B begins at 0.88 s for s times A: beyond 1.12 from s = 1.2727 on.
    assert judge(a, [1.27 * v for v in a])[2] == "within noise"
    assert judge(a, [1.28 * v for v in a])[2] == "higher"
    assert judge(a, [v / 1.27 for v in a])[2] == "within noise"
    assert judge(a, [v / 1.28 for v in a])[2] == "lower"
    assert judge(a, a) == (1.0, pytest.approx(1.12 / 0.88), "within noise")


def test_more_values_make_no_smaller_floor() -> None:
    few, many = spread(1.0, 0.1, 5), spread(1.0, 0.1, 101)
    assert judge(few, few)[1] == pytest.approx(judge(many, many)[1], rel=0.01)


def test_single_values_are_not_judged() -> None:
    assert judge([1.0], [9.0]) == (9.0, None, "not judged")
    assert judge([1.0, 1.1], [9.0, 9.1])[2] == "higher"  # of two values, the extremes
    # What dispatch costs is a difference, which noise can make negative.
    assert judge([-1.0, -2.0, -3.0], [1.0, 2.0, 3.0]) == (None, None, "not judged")
    assert judge([1.0, 2.0, 3.0], [-3.0, -1.0, 5.0, 7.0, 9.0])[1:] == (None, "within noise")


# -- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "noise", "status"),
    [(1.2, 0.02, 1), (1.05, 0.02, 0), (1.2, 0.3, 0), (0.8, 0.02, 0)],
    ids=["slower", "below the limit", "within noise", "faster"],
)
def test_gate(tmp_path: Path, capsys: Any, factor: float, noise: float, status: int) -> None:
    a, b = two(tmp_path, record([op_case(1e-3, noise=noise)]), record([op_case(factor * 1e-3, noise=noise)]))
    assert run(a, b, "--fail-above", 1.10) == status
    text = capsys.readouterr().out
    assert (
        "REGRESSION: mixed_score mnist 16x4 float32 contiguous forward: cpu.time takes 1.200 x" in text
    ) is (status == 1)
    assert ("passed" in text) is (status == 0)
    assert run(a, b) == 0  # nothing is judged unless asked


def test_a_slower_reference_is_the_machine_and_no_regression(tmp_path: Path, capsys: Any) -> None:
    a, b = two(tmp_path, record([op_case(1e-3)]), record([op_case(1e-3, reference=2e-3)]))
    assert run(a, b, "--fail-above", 1.10, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = [c for c in found["changes"] if c["figure"] == "reference.time"]
    assert row["verdict"] == "higher" and row["baseline"] and row["ratio"] == pytest.approx(2.0)
    assert found["passed"] is True and found["above"] == []


def test_rates_and_ratios_are_shown_and_not_judged(tmp_path: Path, capsys: Any) -> None:
    a, b = two(tmp_path, record([op_case(1e-3)]), record([op_case(5e-4)]))
    assert run(a, b, "--fail-above", 1.10, "--json") == 0  # the bandwidth has doubled
    figures = {c["figure"]: c for c in json.loads(capsys.readouterr().out)["changes"]}
    assert figures["cpu.bandwidth"]["verdict"] == "higher" and not figures["cpu.bandwidth"]["cost"]
    run(a, b)
    assert "bandwidth" not in capsys.readouterr().out
    run(a, b, "--all")
    assert "cpu.bandwidth" in capsys.readouterr().out


def test_what_became_wrong_fails(tmp_path: Path, capsys: Any) -> None:
    wrong = op_case(1e-3) | {"failures": ["cpu: AssertionError: off by 0.3"]}
    a, b = two(tmp_path, record([op_case(1e-3)]), record([wrong]))
    assert run(a, b, "--fail-above", 1.10) == 1
    assert "FAILED in B" in capsys.readouterr().out
    assert run(b, a, "--fail-above", 1.10) == 0
    # It was wrong before, only by another number.
    again = op_case(1e-3) | {"failures": ["cpu: AssertionError: off by 0.4"]}
    assert run(b, write(tmp_path / "c", record([again])), "--fail-above", 1.10) == 0


# -- matching -------------------------------------------------------------------------------------------------------


def test_cases_are_matched_by_what_they_are(tmp_path: Path, capsys: Any) -> None:
    a = record([op_case(1e-3), op_case(2e-3, mode="forward+backward"), op_case(3e-3, op="rk_stage")])
    b = record([op_case(3e-3, op="rk_stage", buffers=99), op_case(1e-3), op_case(1e-3, dtype="bfloat16")])
    assert run(*two(tmp_path, a, b), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {c["case"]: c["ratio"] for c in found["changes"] if c["figure"] == "cpu.time"}
    assert rows == {
        "mixed_score mnist 16x4 float32 contiguous forward": pytest.approx(1.0),
        "rk_stage mnist 16x4 float32 contiguous forward": pytest.approx(1.0),
    }
    assert found["only_in_a"] == ["mixed_score mnist 16x4 float32 contiguous forward+backward"]
    assert found["only_in_b"] == ["mixed_score mnist 16x4 bfloat16 contiguous forward"]


def test_folders_are_matched_by_the_names_of_their_records(tmp_path: Path, capsys: Any) -> None:
    for side, factor in (("a", 1.0), ("b", 2.0)):
        write(tmp_path / side / "cpu", record([op_case(factor * 1e-3)], name="ops"))
        write(tmp_path / side / "cpu", record([op_case(1e-3)], name=f"other-{side}"))
        (tmp_path / side / "cpu" / "tests.json").write_text("{}")  # no record
    assert run(tmp_path / "a", tmp_path / "b", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {c["record"] for c in found["changes"]} == {"ops"}
    assert [len(found[f"only_in_{side}"]) for side in "ab"] == [1, 1]
    write(tmp_path / "a" / "gpu", record([op_case(1e-3)], name="ops"))
    assert run(tmp_path / "a", tmp_path / "b") == 2
    assert "two records named 'ops'" in capsys.readouterr().err


def test_nothing_in_common(tmp_path: Path, capsys: Any) -> None:
    assert run(*two(tmp_path, record([op_case(1.0)]), record([op_case(1.0, op="rk_stage")]))) == 2
    assert "no measured figure of any case in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "no benchmark record"), ('{"cases": []}', "no valid benchmark record")],
)
def test_files_that_are_no_records(tmp_path: Path, capsys: Any, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert run(path, path) == 2
    assert message in capsys.readouterr().err
    assert run(tmp_path / "gone.json", path) == 2
    assert "does not exist" in capsys.readouterr().err


# -- where it was measured ------------------------------------------------------------------------------------------


def test_other_machines_are_refused(tmp_path: Path, capsys: Any) -> None:
    a, b = two(tmp_path, record([op_case(1e-3)]), record([op_case(1e-3)], cpu="Another CPU"))
    assert run(a, b) == 2
    error = capsys.readouterr().err
    assert "Some CPU, 2 cores" in error and "Another CPU" in error and "--across-machines" in error
    assert run(a, b, "--across-machines") == 0
    assert "NOTE: different machines" in capsys.readouterr().out


def test_other_devices_are_refused(tmp_path: Path, capsys: Any) -> None:
    on_gpu = record([op_case(1e-5, device="cuda")], gpus=["Some GPU"])
    a, b = two(tmp_path, record([op_case(1e-3)], gpus=["Some GPU"]), on_gpu)
    assert run(a, b) == 2
    assert "Some GPU (Some CPU, 2 cores) (cuda)" in capsys.readouterr().err
    assert run(a, b, "--across-machines") == 0
    assert " 0.010 " in capsys.readouterr().out  # the same case, on the other device


def test_what_makes_figures_doubtful_is_said(tmp_path: Path, capsys: Any) -> None:
    busy = record([op_case(1e-3)], not_idle=["before: others", "after: others"], threads=1)
    busy |= {"left_out": ["rk_stage", "diffuse"], "complete": False}
    a, b = two(tmp_path, record([op_case(1e-3)], dry_run=True), busy)
    assert run(a, b) == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "is a dry run",
        "not taken on an idle machine: before: others",
        "2 threads in",
        "1 thread in",
        "2 left out for want of time, first rk_stage",
    ):
        assert said in text


# -- another commit -------------------------------------------------------------------------------------------------

# Stands in for benchmarks.ops: what it "measures" is a constant of the package beside it.
PROGRAM = """
import argparse, json, os, pathlib, sys, time
import lsgm_fast
parser = argparse.ArgumentParser()
for name in ("out", "name", "budget", "commit", "shape"):
    parser.add_argument("--" + name)
options = parser.parse_args()
root = pathlib.Path(lsgm_fast.__file__).parent.parent
with open(os.environ["TURNS"], "a") as file:
    print(root, options.budget, options.commit, options.shape, file=file)
if os.environ.get("SLEEP"):
    time.sleep(60)
if lsgm_fast.SECONDS is None:
    sys.exit("something is broken")
record = json.loads((root / "benchmarks" / "template.json").read_text())
case = record["cases"][0]
for contender in ("cpu", "reference"):
    figure = case["figures"][contender]["time"]
    scale = lsgm_fast.SECONDS if contender == "cpu" else 1.0
    figure["values"] = [v * scale for v in figure["values"]]
    for key in ("median", "q20", "q80"):
        figure[key] *= scale
record["environment"]["commit"]["sha"] = options.commit or "b" * 40
out = pathlib.Path(options.out) / "machine"
out.mkdir(parents=True)
(out / (options.name + ".json")).write_text(json.dumps(record))
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own with a package that takes 1 (committed) or as much as the working tree says."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "repository"
    for folder in ("lsgm_fast", "benchmarks/results", "csrc"):
        (root / folder).mkdir(parents=True)
    (root / "lsgm_fast" / "__init__.py").write_text("SECONDS = 1.0\n")
    (root / "benchmarks" / "__init__.py").write_text("")
    (root / "CMakeLists.txt").write_text("")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    # Only the working tree has the program: the base gets it from there.
    (root / "benchmarks" / "ops.py").write_text(PROGRAM)
    (root / "benchmarks" / "template.json").write_text(json.dumps(record([op_case(1e-3)])))
    monkeypatch.setenv("TURNS", str(tmp_path / "turns"))
    monkeypatch.setenv(
        "PYTHONSAFEPATH", "1"
    )  # the folder that a program runs in is not searched for packages
    return root


def trees(root: Path) -> int:
    return len(worktree.git(root, "worktree", "list").splitlines())


def take(root: Path, turns: int = 2, arguments: tuple[str, ...] = ()) -> compare.Comparison:
    old, new, libraries = base.take_turns(
        "HEAD", "ops", arguments, turns=turns, budget=40.0, root=root, report=lambda text: None
    )
    assert libraries.startswith("no compiled library")
    return compare.compare([old], [new])


def test_a_kernel_slowed_on_purpose_is_caught(repository: Path, tmp_path: Path) -> None:
    assert take(repository).regressions(1.1) == []
    (repository / "lsgm_fast" / "__init__.py").write_text("SECONDS = 1.25\n")
    found = take(repository, arguments=("--shape", "large"))
    (change,) = found.regressions(1.1)
    assert change.figure == "cpu.time" and change.ratio == pytest.approx(1.25)
    assert [c.verdict for c in found.changes if c.figure == "reference.time"] == ["within noise"]
    assert "base HEAD" in found.a[0] and "working tree" in found.b[0]
    # In turns, in alternating order, each with its share of the budget, its own package and its arguments.
    turns = [line.split() for line in (tmp_path / "turns").read_text().splitlines()[4:]]
    ours = [Path(folder) == repository for folder, *_ in turns]
    assert ours == [False, True, True, False]
    sha = worktree.git(repository, "rev-parse", "HEAD")
    assert [rest for _, *rest in turns[:2]] == [["10", sha, "large"], ["10", "None", "large"]]
    assert trees(repository) == 1 and not Path(turns[0][0]).exists()


def test_values_of_all_turns_are_merged(repository: Path) -> None:
    old, new, _ = base.take_turns(
        "HEAD", "ops", (), turns=3, budget=40.0, root=repository, report=lambda t: None
    )
    for merged in (old, new):
        measure.check_record(merged.data)
        (only,) = merged.cases.values()
        assert only.figures["cpu.time"]["n"] == 15 and only.figures["compile"]["kind"] == "not_measured"


def test_merging_keeps_what_single_turns_say() -> None:
    short = record([op_case(1e-3)])
    more = record([op_case(3e-3), op_case(1e-3, op="rk_stage")], not_idle=["before: others"])
    merged = base.merge([records.Record(short, "x"), records.Record(more, "x")])
    measure.check_record(merged.data)
    first, second = merged.cases.values()
    assert first.figures["cpu.time"]["values"] == [*spread(1e-3), *spread(3e-3)]
    assert second.figures["cpu.time"]["values"] == spread(1e-3)
    assert merged.data["not_idle_because"] == ["turn 2: before: others"]


def test_the_worktree_goes_when_a_turn_fails(repository: Path, tmp_path: Path) -> None:
    (repository / "lsgm_fast" / "__init__.py").write_text("SECONDS = None\n")
    with pytest.raises(
        base.BenchmarkFailed, match="working tree: benchmarks.ops ended with status 1.*is broken"
    ):
        take(repository)
    assert trees(repository) == 1
    (repository / "lsgm_fast" / "__init__.py").write_text("SECONDS = 1.0\n")
    with pytest.raises(
        base.BenchmarkFailed, match="status 2 and no record: .*unrecognized arguments: --wrong"
    ):
        take(repository, arguments=("--wrong",))
    assert trees(repository) == 1


def test_a_tree_must_import_its_own_package(repository: Path, tmp_path: Path) -> None:
    base.Tree(repository, "working tree").check_import()
    (tmp_path / "empty").mkdir()
    with pytest.raises(base.BenchmarkFailed, match="base x: Python does not import the package in .*empty"):
        base.Tree(tmp_path / "empty", "base x").check_import()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_worktree_goes_when_it_is_stopped(repository: Path, tmp_path: Path, number: int) -> None:
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom benchmarks import base\n"
        f"base.take_turns('HEAD', 'ops', (), turns=1, budget=90.0, root=Path({str(repository)!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"SLEEP": "1"}, stderr=subprocess.PIPE, text=True
    )
    turns = tmp_path / "turns"
    deadline = time.monotonic() + 60
    while not (turns.exists() and turns.read_text().endswith("\n")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    folder = Path(turns.read_text().split()[0])
    assert folder.is_dir() and trees(repository) == 2
    process.send_signal(number)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert trees(repository) == 1 and not folder.exists() and not folder.parent.exists()


def test_what_is_asked_for_wrongly(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    quiet: dict[str, Any] = {"turns": 1, "budget": 9.0, "root": repository, "report": lambda text: None}
    with pytest.raises(ValueError, match="'nothing' is no commit of the repository"):
        base.take_turns("nothing", "ops", (), **quiet)
    with pytest.raises(ValueError, match="unknown benchmark 'opps'.*did you mean 'ops'"):
        base.take_turns("HEAD", "opps", (), **quiet)
    with pytest.raises(ValueError, match="--out is set by the comparison itself"):
        base.take_turns("HEAD", "ops", ("--out=x",), **quiet)
    monkeypatch.setenv("LSGM_FAST_LIBRARY_PATH", str(repository))
    with pytest.raises(ValueError, match="LSGM_FAST_LIBRARY_PATH is set"):
        base.take_turns("HEAD", "ops", (), **quiet)
    assert trees(repository) == 1
    assert run("ops", "--quick", "--force") == 2
    assert "to time another commit add --base REF" in capsys.readouterr().err


def test_the_command_hands_the_program_its_options(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen: list[Any] = []

    def take_turns(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments, options["turns"], options["budget"]))
        sides = [op_case(1e-3), op_case(1.3e-3)]
        return (
            *(records.Record(record([side]), name) for name, side in zip("ab", sides, strict=True)),
            "the same",
        )

    monkeypatch.setattr(base, "take_turns", take_turns)
    out = tmp_path / "kept"
    options = ["--turns", "2", "--fail-above", "1.1", "--out", str(out)]
    assert run("--base", "main", *options, "ops", "mixed_score", "--no-compile", "--batch", "1", "16") == 1
    assert seen == [(("main", "ops", ["mixed_score", "--no-compile", "--batch", "1", "16"]), 2, 300.0)]
    text = capsys.readouterr().out
    assert "REGRESSION" in text and "NOTE: the same" in text
    assert run(out / "base.json", out / "tree.json") == 0

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise measure.MachineBusy("others use it")

    monkeypatch.setattr(base, "take_turns", refuse)
    assert run("--base", "main", "ops") == 3


# -- compiled libraries ---------------------------------------------------------------------------------------------


def native_tree(root: Path, source: str) -> Path:
    for folder in ("lsgm_fast/_lib", "csrc/one", "csrc/common", "csrc/tests", "kernels"):
        (root / folder).mkdir(parents=True)
    (root / "CMakeLists.txt").write_text("")
    for name in ("one/register.cpp", "one/cpu.cpp", "common/x.h", "tests/one.cpp"):
        (root / "csrc" / name).write_text(f"{name} {source}")
    (root / "kernels" / "one.py").write_text("")
    return root


@pytest.fixture
def built(tmp_path: Path) -> Path:
    from lsgm_fast import native

    root = native_tree(tmp_path / "built", "new")
    library = root / "lsgm_fast" / "_lib" / "liblsgm_fast_ops_cpu.so"
    library.write_text("machine code")
    (root / "lsgm_fast" / "_C.abi.so").write_text("module")
    build = {"mode": "cpu", "sources": {"one": native.hash_sources(root, "one")}}
    (library.parent / "build.json").write_text(json.dumps(build))
    later = time.time() + 10
    os.utime(library, (later, later))
    return root


def test_the_base_gets_a_copy_where_the_sources_are_the_same(built: Path, tmp_path: Path) -> None:
    tree = native_tree(tmp_path / "tree", "new")
    (tree / "csrc" / "tests" / "one.cpp").write_text("another test makes no other library")
    shutil.rmtree(tree / "lsgm_fast" / "_lib")
    assert "the same compiled library" in worktree.provide_libraries(built, tree, lambda text: None)
    assert (tree / "lsgm_fast" / "_lib" / "liblsgm_fast_ops_cpu.so").read_text() == "machine code"
    assert (tree / "lsgm_fast" / "_C.abi.so").exists()


def test_the_base_builds_where_they_differ(built: Path, tmp_path: Path) -> None:
    tree = native_tree(tmp_path / "tree", "old")
    said = "f\"{sys.argv[1:]} {os.environ['LSGM_FAST_BUILD']}\""
    (tree / "setup.py").write_text(f"import os, sys, pathlib\npathlib.Path('built').write_text({said})")
    reports: list[str] = []
    assert "a compiled library of its own" in worktree.provide_libraries(built, tree, reports.append)
    assert (tree / "built").read_text() == "['build_native', '--inplace'] cpu" and len(reports) == 1
    (tree / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(ValueError, match="could not be built: no compiler"):
        worktree.provide_libraries(built, tree, reports.append)


def test_a_library_older_than_its_sources_is_refused(built: Path, tmp_path: Path) -> None:
    tree = native_tree(tmp_path / "tree", "new")
    # A Triton kernel needs no build, and a touched file is no changed one.
    (built / "kernels" / "one.py").write_text("changed")
    assert worktree.stale(built) == []
    later = time.time() + 20
    (built / "kernels" / "one.py").write_text("")
    os.utime(built / "csrc" / "one" / "cpu.cpp", (later, later))
    assert worktree.stale(built) == []
    (built / "csrc" / "one" / "cpu.cpp").write_text("slower")
    os.utime(built / "csrc" / "one" / "cpu.cpp", (later, later))
    with pytest.raises(ValueError, match=r"older than its sources \(one\).*build_native --inplace"):
        worktree.provide_libraries(built, tree, lambda text: None)


def test_the_committed_records_can_be_compared_with_themselves(capsys: Any) -> None:
    folder = bench.ROOT / "benchmarks" / "results"
    for machine in sorted(path for path in folder.iterdir() if path.is_dir()):
        assert run(machine, machine, "--fail-above", "1.0", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["only_in_a"] == found["only_in_b"] == [] and found["changes"]
        assert {c["ratio"] for c in found["changes"]} <= {1.0, None}


def test_labels() -> None:
    parameters = {
        "recipe": "digits",
        "batch": 16,
        "shape": [1, 2],
        "recompute": False,
        "bf16": True,
        "x": None,
    }
    assert records.label(parameters) == "digits batch=16 1x2 bf16"
    twice = records.Record(record([case({"a": 1}, {}), case({"a": 1}, {})]), "x")
    assert [c.label for c in twice.cases.values()] == ["a=1", "a=1 (2)"]
