"""``lsgm-fast bench tables`` and ``history``: the tables of the documentation are those of the records."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bench_records import case, op_case, record, spread, write

from benchmarks import blocks, history, tables
from benchmarks.measure import extrapolated, measured, not_measured
from benchmarks.records import Record
from lsgm_fast import bench, cli

pytestmark = pytest.mark.skipif(not (bench.ROOT / "benchmarks").is_dir(), reason="not a source tree")

OLD, NEW = "2026-01-02T03:04:05+00:00", "2026-02-03T04:05:06+00:00"


def records(*made: dict[str, Any]) -> list[Record]:
    return [Record(one, f"some-cpu/{one['name']}.json") for one in made]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without the headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def forward_case(preset: str, seconds: float, compiled: float | None = None, **more: Any) -> dict[str, Any]:
    """A case as of ``benchmarks.score`` with an eager reference of 1 s."""

    def times(value: float) -> dict[str, Any]:
        return {"seconds": measured([value], "s"), "processor_seconds": measured([value], "s")}

    why = not_measured("not asked for (--no-compile)")
    figures = {
        "reference": times(1.0),
        "auto": times(seconds),
        "compile": why if compiled is None else times(compiled),
        "reference_over_auto": measured([1.0 / seconds], "1"),
        "compile_over_auto": why if compiled is None else measured([compiled / seconds], "1"),
    }
    parameters = {"preset": preset, "batch": 16, "memory_format": "contiguous", "device": "cpu"} | more
    return case(parameters | {"compile": compiled is not None}, figures)


def train_case(backend: str | None, seconds: float) -> dict[str, Any]:
    parameters = {"recipe": "digits", "step": "vae", "batch": 16, "precision": "fp32", "recompute": False}
    parameters |= {"channels_last": None, "device": "cpu", "trained_weights": 7}
    figures = {
        "step": measured([seconds], "s"),
        "images_per_second": measured([16 / seconds], "images/s"),
        "peak_memory": measured([seconds * 2**30], "bytes"),
    }
    return case(parameters | ({} if backend is None else {"backend": backend}), figures)


# -- the tables of the documentation --------------------------------------------------------------------------------


def test_the_tables_of_the_documentation_are_up_to_date() -> None:
    documents = tables.documents()
    page = bench.ROOT / "docs" / "benchmarks.md"
    assert page in documents and bench.ROOT / "README.md" in documents
    assert all(f"<!-- table: {name} -->" in page.read_text() for name in blocks.BLOCKS)
    stale = tables.rewrite(documents, write=False)
    assert stale == {}, "lsgm-fast bench tables"


def test_only_results_count(tmp_path: Path) -> None:
    write(tmp_path / "cpu", record([op_case(1e-3)], name="good"))
    write(tmp_path / "cpu", record([op_case(1e-3)], name="busy", not_idle=["others"]))
    write(tmp_path / "cpu", record([op_case(1e-3)], name="trial", dry_run=True))
    write(tmp_path / "dry-run" / "cpu", record([op_case(1e-3)], name="elsewhere"))
    assert [one.source for one in tables.results(tmp_path)] == ["cpu/good.json"]


# -- blocks ---------------------------------------------------------------------------------------------------------

TEXT = "before\n<!-- table: one -->\nold\n<!-- end -->\nbetween\n<!-- table: two -->\n\n2\n\n<!-- end -->\nafter\n"
KNOWN = {"one": lambda found: "1", "two": lambda found: "2"}


def test_only_what_is_between_the_marks_is_replaced() -> None:
    text, changed = tables.render(TEXT, [], KNOWN, "x.md")
    assert text == TEXT.replace("old", "\n1\n") and changed == ["one"]
    assert tables.render(text, [], KNOWN, "x.md") == (text, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: three -->\n<!-- end -->\n", "x.md: unknown table 'three'.*'one', 'two'"),
        ("<!-- table: one -->\n", "x.md: the table 'one' has no end"),
        (
            "<!-- table: one -->\n<!-- table: two -->\n<!-- end -->\n",
            "x.md: the table 'one' has no end",
        ),
    ],
)
def test_wrong_marks(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.render(text, [], KNOWN, "x.md")


def test_the_command_writes_and_checks(tmp_path: Path, capsys: Any) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text("<!-- table: solver -->\nby hand\n<!-- end -->\n")
    other.write_text("no table")
    assert cli.main(["bench", "tables", "--check", str(page), str(other)]) == 1
    assert f"{page}: solver out of date" in capsys.readouterr().out and "by hand" in page.read_text()
    assert cli.main(["bench", "tables", str(page), str(other)]) == 0
    assert "cifar10-fid" in page.read_text() and other.read_text() == "no table"
    assert cli.main(["bench", "tables", "--check", str(page), str(other)]) == 0


# -- what stands in them --------------------------------------------------------------------------------------------


def test_the_newest_record_wins_case_by_case() -> None:
    old = record(
        [forward_case("digits", 0.5), forward_case("mnist", 0.5)], program="score", name="old", date=OLD
    )
    # With torch.compile it is the same case, and newer.
    new = record([forward_case("digits", 0.25, 0.4)], program="score", name="new", date=NEW, sha="b" * 40)
    for found in (records(old, new), records(new, old)):
        text = blocks.score(found)
        mnist, digits, gpu = sorted(rows(text), key=lambda row: row[1], reverse=True)[1:] + rows(text)[-1:]
        assert mnist == [
            "Some CPU",
            "mnist",
            "16",
            "contiguous",
            "1000",
            blocks.MISSING,
            "500",
            "2",
            blocks.MISSING,
        ]
        assert digits[1:] == ["digits", "16", "contiguous", "1000", "400", "250", "4", "1.6"]
        assert gpu[:2] == ["NVIDIA GPU", blocks.MISSING]
        assert (
            "- `some-cpu/new.json`: Some CPU, 2 cores, 2 threads, PyTorch 2.13.0, 2026-02-03, commit bbbbbbbbb"
            in text
        )
        assert (
            "- `some-cpu/old.json`: Some CPU, 2 cores, 2 threads, PyTorch 2.13.0, 2026-01-02, commit aaaaaaaaa"
            in text
        )


def test_a_record_of_a_gpu_takes_the_place_of_the_missing_row() -> None:
    case_ = forward_case("mnist", 0.5, device="cuda")
    found = records(record([case_], program="score", gpus=["Some GPU"]))
    cpu, gpu = rows(blocks.score(found))
    assert cpu[:2] == ["CPU", blocks.MISSING] and gpu[:2] == ["Some GPU", "mnist"]
    assert "NVIDIA GPU" not in blocks.score(found)


def test_no_record_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "operation_names", dict)
    for block in blocks.BLOCKS.values():
        assert [row[:2] for row in rows(block([]))] == [
            ["CPU", blocks.MISSING],
            ["NVIDIA GPU", blocks.MISSING],
        ]


def test_decoding_has_both_statistics() -> None:
    cases = [forward_case("mnist", 0.5, bn=bn) for bn in ("running", "batch")]
    text = blocks.decoding(records(record(cases, program="decode")))
    assert [row[1:4] for row in rows(text)[:2]] == [["mnist", "running", "16"], ["mnist", "batch", "16"]]


def test_training_pairs_cases_of_one_record() -> None:
    old = record(
        [train_case("reference", 1.0), train_case("auto", 0.5)], program="train", name="old", date=OLD
    )
    new = record([train_case(None, 0.25)], program="train", name="new", date=NEW)
    (row, _) = rows(blocks.training(records(old)))
    assert row[1:] == ["digits", "vae", "fp32", "16", "1000", "500", "0.50", "1020", "512", "0.50", "32"]
    # The newer one has no reference, and that of another run is no other side of a ratio.
    (row, _) = rows(blocks.training(records(old, new)))
    assert row[5:8] == [blocks.MISSING, "250", blocks.MISSING]


def test_operations_are_summarised_over_their_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blocks, "operation_names", lambda: {"mixed_score": True, "rk": True, "gpu_only": False}
    )

    def timed(of_reference: float, of_compile: float, **more: Any) -> dict[str, Any]:
        made = op_case(of_reference * 1e-3, **more)
        made["figures"]["cpu"]["time_over_compile"] = measured(spread(of_compile), "ratio")
        return made

    old = record([timed(0.9, 0.9), timed(0.2, 0.8, dtype="bfloat16")], name="old", date=OLD)
    # The first case again, and figures that are no case of a published shape.
    newer = [timed(0.4, 0.6), timed(3.0, 3.0, case="ladder"), timed(3.0, 3.0, dtype="float64")]
    new = record(newer, name="new", date=NEW)
    found, missing, gpu = rows(blocks.operations(records(old, new)))
    assert found[:4] == ["Some CPU", "`mixed_score`", "cpu", "3"]
    assert found[4:] == [
        "0.80",
        "3.00",
        "0.40",
        "3.00",
    ]  # medians of (0.6, 0.8, 3.0) and (0.4, 0.2, 3.0), worst
    assert missing == ["CPU", "`rk`", "cpu", "0", *[blocks.MISSING] * 4]
    assert gpu[:2] == ["NVIDIA GPU", blocks.MISSING]


def test_solver_and_its_share() -> None:
    def solved(batch: int, share: dict[str, Any]) -> dict[str, Any]:
        ways = {"scipy": 0.02, "rk45": 0.001}
        figures: dict[str, Any] = {n: {"per_evaluation": measured([s], "s")} for n, s in ways.items()}
        figures |= {"scipy_over_rk45": measured([20.0], "1"), "share": share}
        return case({"preset": "mnist", "batch": batch, "shape": [batch, 40, 8, 8], "tol": 1e-5}, figures)

    cases = [solved(16, not_measured("not asked for")), solved(1, extrapolated(0.001, "1", "how"))]
    plain, shared, _ = rows(blocks.solver(records(record(cases, program="solver"))))
    assert plain[1:] == ["mnist", "16", "40x8x8", "20", "1", "20", blocks.MISSING]
    assert shared[2] == "1" and shared[-1] == "0.10%"


def test_the_summary_has_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    score = record([forward_case("mnist", 0.5), forward_case("digits", 2.0, 1.0)], program="score")
    train = record([train_case("reference", 1.0), train_case("auto", 0.8)], program="train")
    found = {tuple(row[1:3]): row[3:] for row in rows(blocks.summary(records(score, train)))}
    assert found["an evaluation of the score network", "eager"] == ["0.5 to 2", "2"]
    assert found["an evaluation of the score network", "torch.compile"] == ["0.5", "1"]
    assert found["a training step", "eager"] == ["1.25", "1"]


def test_numbers_have_no_exponents() -> None:
    values = [0.04567, 0.9476, 1.0, 12.34, 1234.5, 123456.0]
    assert [blocks.significant(v) for v in values] == ["0.0457", "0.948", "1", "12.3", "1230", "123000"]


# -- history --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two committed versions of a record, and a third on disk."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "repository"
    results = root / "benchmarks" / "results"
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    root.mkdir()
    subprocess.run([*git, "init", "-q"], check=True)

    def commit(text: str) -> None:
        (results / "some-cpu").mkdir(parents=True, exist_ok=True)
        (results / "some-cpu" / "ops.json").write_text(text)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", "x"], check=True)

    commit('{"another": "schema"}')
    first = record([op_case(3e-3)], date="2026-01-01T00:00:00+00:00", sha="1" * 40)
    commit(json.dumps(first))
    commit(json.dumps(first, indent=1))  # reformatted: no new version
    cases = [op_case(2e-3), op_case(7e-3, op="rk_stage")]
    commit(json.dumps(record(cases, date="2026-01-02T00:00:00+00:00", sha="2" * 40)))
    write(
        results / "some-cpu", record([op_case(1e-3)], date="2026-01-03T00:00:00+00:00", not_idle=["others"])
    )
    monkeypatch.setattr(history, "ROOT", root)
    monkeypatch.setattr(history, "RESULTS", results)
    return results


def test_history_is_what_git_keeps(kept: Path, capsys: Any) -> None:
    assert cli.main(["bench", "history", "ops", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [v["date"][:10] for v in found["versions"]] == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert [v["commit"] for v in found["versions"]] == ["1" * 9, "2" * 9, "a" * 9]
    assert [v["is_result"] for v in found["versions"]] == [True, True, False]
    assert "no benchmark record" in said.err  # the first commit's file
    medians = {f["case"].split()[0]: [p and p["median"] for p in f["points"]] for f in found["figures"]}
    assert medians == {
        "mixed_score": [pytest.approx(3e-3), pytest.approx(2e-3), pytest.approx(1e-3)],
        "rk_stage": [None, pytest.approx(7e-3), None],
    }
    assert {f["figure"] for f in found["figures"]} == {"cpu.time"}  # neither rates nor baselines


def test_history_of_chosen_figures(kept: Path, capsys: Any) -> None:
    assert cli.main(["bench", "history", "ops", "mixed reference.time", "--last", "2"]) == 0
    text = capsys.readouterr().out
    assert "reference.time" in text and "cpu.time" not in text and "rk_stage" not in text
    assert "2026-01-02" in text and "2026-01-01" not in text and "no result" in text
    for arguments, message in (
        (["nothing"], "unknown record 'nothing': expected one of 'ops'"),
        (["ops", "nosuch"], "no figure holds 'nosuch'"),
        (["ops", "--machine", "x"], "unknown machine 'x'"),
    ):
        assert cli.main(["bench", "history", *arguments]) == 2
        assert message in capsys.readouterr().err
    write(kept / "gpu", record([op_case(1e-3)]))
    assert cli.main(["bench", "history", "ops"]) == 2
    assert "choose with --machine, gpu or some-cpu" in capsys.readouterr().err


def test_history_as_a_plot(kept: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plots" / "ops.svg"
    assert cli.main(["bench", "history", "ops", "mixed_score", "--plot", str(path)]) == 0
    assert path.read_text().count("<svg") == 1
    assert cli.main(["bench", "history", "ops", "cpu", "--plot", str(path)]) == 2
    assert "at most 12 figures of one unit" in capsys.readouterr().err
