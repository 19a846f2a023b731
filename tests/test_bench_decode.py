"""The benchmark of decoding: its record, its check of every contender, its floor of bytes. No speed is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import decode, forward, measure  # noqa: E402
from lsgm_fast import dispatch  # noqa: E402
from lsgm_fast.dispatch import REGISTRY  # noqa: E402

CASE = decode.Case("tiny-binary", "running", 2, "contiguous", False, "cpu")
LIMITS: dict[str, Any] = {"fewest": 3, "most": 3, "allowed": 0.0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    state = measure.MachineState(1.0, 2, (0.0, 0.0, 0.0), 0.0, 0.0)
    monkeypatch.setattr(measure, "read_state", lambda *a, **k: state)
    monkeypatch.setattr(measure, "_state_since", lambda *a, **k: state)


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's quarter of a minute is no part of what is tested here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def run(
    case: decode.Case, early: Any = lambda result: None, seconds: float = 60.0, **limits: Any
) -> dict[str, Any]:
    """The case in this process, as an entry of a record."""
    result = forward.run_case(
        case, decode.Decoder, budget=measure.Budget(seconds), early=early, **{**LIMITS, **limits}
    )
    return {"parameters": asdict(case)} | result


def test_record_of_tiny_presets(tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--presets", "tiny-multiscale", "--batch", "2", "--memory-format", "channels_last"]
    arguments += ["--no-compile", "--repeats", "3", "3", "--budget", "120", "--dry-run"]
    assert decode.BENCHMARK.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/decode.json")
    record = json.loads(path.read_text())
    measure.check_record(record)
    assert record["complete"] is True and record["idle"] is True and record["dry_run"] is True
    assert record["command"] == " ".join(["python3 -m benchmarks.decode", *arguments])
    assert record["settings"]["threads"] == 1 and record["settings"]["cudnn_benchmark"] is True
    assert [entry["parameters"]["bn"] for entry in record["cases"]] == ["running", "batch"]
    for entry in record["cases"]:
        parameters, figures = entry["parameters"], entry["figures"]
        assert parameters.pop("tolerance") == forward.TOLERANCE and not entry["failures"]
        wanted = replace(CASE, preset="tiny-multiscale", bn=parameters["bn"], memory_format="channels_last")
        assert decode.Case(**parameters) == wanted
        eager = [figures[name] for name in ("reference", "auto")]
        for figure in (part for name in eager for part in name.values()):
            assert figure["unit"] == "s" and figure["n"] == 3 and min(figure["values"]) > 0.0
        times = [figure["seconds"]["values"] for figure in eager]
        ratios = [a / b for a, b in zip(*times, strict=True)]
        assert figures["reference_over_auto"]["values"] == pytest.approx(ratios)
        for missing in (figures["compile"], figures["compile_over_auto"], figures["difference"]["compile"]):
            assert missing == measure.not_measured("not asked for (--no-compile)")
        differences = figures["difference"]["auto"]
        assert set(differences) == {"images", "image_parameters"}
        assert all(0.0 <= d["median"] <= forward.TOLERANCE for d in differences.values())
        floor = figures["byte_floor"]
        assert floor["seconds"]["value"] == pytest.approx(
            floor["bytes"]["median"] / (1e9 * floor["copy"]["median"])
        )
        assert "nvae_cell" in entry["backends"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-")]
    assert [line[:4] for line in lines] == [
        ["tiny-multiscale", bn, "2", "channels_last"] for bn in ("running", "batch")
    ]
    for line in lines:
        assert len(line) == 12 and [i for i, text in enumerate(line) if text == "-"] == [6, 9]


def test_the_compiled_decode_takes_part(eager_compiler: None) -> None:
    entries: list[dict[str, Any]] = []
    case = replace(CASE, compile=True)
    entry = run(case, early=lambda result: entries.append(json.loads(json.dumps(result))))
    figures = entry["figures"]
    assert figures["compile"]["seconds"]["n"] == 3 and not entry["failures"]
    pairs = zip(*(figures[name]["seconds"]["values"] for name in ("compile", "auto")), strict=True)
    assert figures["compile_over_auto"]["values"] == pytest.approx([a / b for a, b in pairs])
    # Only the eager contenders show what the last layer returns.
    assert set(figures["difference"]["compile"]) == {"images"}
    assert figures["difference"]["compile"]["images"]["values"] == [0.0]
    # What a process leaves that is stopped while it compiles.
    (before,) = entries
    assert before["figures"]["compile"]["reason"].startswith(measure.OUT_OF_TIME)
    assert before["figures"]["reference_over_auto"]["n"] == 3
    assert (
        "-"
        not in decode.BENCHMARK.table([entry]).splitlines()[1].replace("tiny-", "").replace("e-", "").split()
    )


@pytest.mark.slow
def test_torch_compile_of_the_decode() -> None:
    figures = run(replace(CASE, compile=True, bn="batch"))["figures"]
    assert figures["compile"]["seconds"]["median"] > 0.0
    assert 0.0 < figures["difference"]["compile"]["images"]["median"] <= forward.TOLERANCE


def test_a_contender_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part in a thousand of every cell's result is more than rounding."""
    op = REGISTRY["nvae_cell"]
    wrong = dispatch.Impl("cpu", lambda *args: 1.001 * op.impl("reference").fn(*args), priority=99)
    monkeypatch.setattr(op, "_order", (wrong, *op._order))
    entry = run(CASE)
    figures = entry["figures"]
    (failure,) = entry["failures"]
    assert (
        failure.startswith("auto: AssertionError: image") and f"{forward.TOLERANCE:g} is allowed" in failure
    )
    for name in ("auto", "reference_over_auto", "compile_over_auto"):
        assert figures[name]["kind"] == "not_measured"
    assert "differ from the reference's" in figures["auto"]["reason"]
    assert figures["reference"]["seconds"]["n"] == 3
    assert decode.BENCHMARK.table([entry]).splitlines()[1].split()[5:10] == ["-"] * 5


def test_a_contender_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no compiler here\nand more")

        return refuse

    monkeypatch.setattr(torch, "compile", broken)
    entry = run(replace(CASE, compile=True))
    assert entry["failures"] == ["compile: RuntimeError: no compiler here"]
    assert entry["figures"]["compile"]["reason"] == "not timed: RuntimeError: no compiler here"
    assert entry["figures"]["auto"]["seconds"]["n"] == 3


def test_nan_is_a_difference() -> None:
    expected = {"images": torch.tensor([0.0, 1.0])}
    assert forward.compare("auto", {"images": torch.tensor([0.0, 1.0 + 1e-5])}, expected)["images"]["n"] == 1
    for wrong in (1.001, float("nan")):
        with pytest.raises(AssertionError, match="images differ"):
            forward.compare("auto", {"images": torch.tensor([0.0, wrong])}, expected)


def test_the_floor_counts_weights_and_cells_once() -> None:
    """By hand for a decoder with three cells."""
    decoder = decode.Decoder(replace(CASE, preset="tiny-rgb"))
    vae = decoder.vae
    names = ("latent_conv.", "decoder.", "postprocess.", "output.", "prior_feature")
    weights = sum(p.numel() for name, p in vae.named_parameters() if name.startswith(names))
    # Latents of 16x16 with 32 channels; two groups of a combiner and a cell, then up to 32x32 with 16 channels.
    low, high = 2 * 32 * 16 * 16, 2 * 16 * 32 * 32
    kinds = [type(module).__name__ for module in (*vae.decoder, *vae.postprocess)]
    assert kinds == ["DecoderCombiner", "Cell", "DecoderCombiner", "Cell", "Cell"]
    assert decoder.floor_bytes() == 4 * (weights + 2 * (low + low) + (low + high))
    assert not any(module._forward_hooks for module in vae.modules())


def test_the_memory_format_is_honoured() -> None:
    for name in forward.MEMORY_FORMATS:
        decoder = decode.Decoder(replace(CASE, preset="tiny-rgb", memory_format=name))
        found = decoder.outputs("reference")["image_parameters"]
        layouts = {n: found.is_contiguous(memory_format=f) for n, f in forward.MEMORY_FORMATS.items()}
        assert layouts == {n: n == name for n in layouts}


def test_default_batches() -> None:
    cases = decode.BENCHMARK.cases_of(decode.BENCHMARK.parser().parse_args([]))
    assert {(case.preset, case.batch) for case in cases} == {
        ("digits", 16),
        ("mnist", 16),
        ("cifar10-nll", 16),
        ("celebahq256-quantitative", 1),
    }
    assert {case.bn for case in cases} == {"running", "batch"} and all(case.compile for case in cases)
    given = decode.BENCHMARK.cases_of(decode.BENCHMARK.parser().parse_args(["--batch", "3", "--no-compile"]))
    assert {case.batch for case in given} == {3} and not any(case.compile for case in given)


@pytest.mark.parametrize(("status", "timeout"), [(9, False), (0, True)])
def test_a_process_stopped_while_it_compiles(
    status: int, timeout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote before counts."""
    partial = {
        "figures": {
            "compile": measure.not_measured("not yet"),
            "compile_over_auto": measure.not_measured("not yet"),
            "difference": {"compile": measure.not_measured("not yet")},
        },
        "backends": {},
        "failures": [],
    }
    (tmp_path / "partial.json").write_text(json.dumps(partial))
    end = "sleep 60" if timeout else f"echo no memory >&2; exit {status}"
    script = tmp_path / "python"
    # Arguments: -m benchmarks.decode --one-case FOLDER
    script.write_text(f'#!/bin/sh\ncp {tmp_path}/partial.json "$4/result.json"\n{end}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(measure, "GRACE_SECONDS", 0.0)
    budget = measure.Budget(2.0 if timeout else 60.0)
    entry = decode.BENCHMARK.time_case(CASE, budget, fewest=1, most=1, allowed=1.0)
    reason = entry["figures"]["compile"]["reason"]
    if timeout:
        assert reason.startswith(measure.OUT_OF_TIME) and entry["failures"] == []
    else:
        assert reason == "the process ended with status 9: no memory"
        assert entry["failures"] == [f"compile: {reason}"]
    assert entry["figures"]["difference"]["compile"]["reason"] == reason


def test_a_process_that_leaves_nothing_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no memory >&2\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    entry = decode.BENCHMARK.time_case(CASE, measure.Budget(60), fewest=1, most=1, allowed=1.0)
    assert entry["failures"] == ["the process ended with status -9: no memory"]
    assert {figure["kind"] for figure in entry["figures"].values()} == {"not_measured"}
    assert decode.BENCHMARK.table([entry]).splitlines()[1].split()[4:] == ["-"] * 8


def test_without_time_there_are_no_figures(tmp_path: Path, idle: None) -> None:
    arguments = ["--presets", "tiny-binary", "--budget", "1e-6", "--out", str(tmp_path)]
    assert decode.BENCHMARK.main(arguments) == 0
    (path,) = tmp_path.glob("*/decode.json")
    record = json.loads(path.read_text())
    assert record["complete"] is False and record["cases"] == []
    assert record["left_out"] == [f"tiny-binary {bn} batch 16 contiguous" for bn in ("running", "batch")]


def test_a_compiler_that_took_too_long_is_left_out(
    tmp_path: Path, idle: None, eager_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_time(self: Any, case: decode.Case, budget: measure.Budget, **limits: Any) -> dict[str, Any]:
        results: list[dict[str, Any]] = []
        entry = run(case, early=results.append)
        return entry | results[0] | {"parameters": asdict(case)}

    monkeypatch.setattr(forward.Benchmark, "time_case", in_time)
    arguments = ["--presets", "tiny-binary", "--bn", "running", "--batch", "2", "--out", str(tmp_path)]
    assert decode.BENCHMARK.main(arguments) == 0
    (path,) = tmp_path.glob("*/decode.json")
    assert json.loads(path.read_text())["left_out"] == ["tiny-binary running batch 2 contiguous: compile"]


def test_a_budget_that_ends_with_the_compiler_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = measure.Budget(60)

    def slow(function: Any, **options: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            monkeypatch.setattr(budget, "_end", 0.0)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", slow)
    result = forward.run_case(
        replace(CASE, compile=True), decode.Decoder, budget=budget, early=lambda result: None, **LIMITS
    )
    assert result["figures"]["compile"]["reason"].startswith(measure.OUT_OF_TIME)
    assert result["figures"]["reference_over_auto"]["n"] == 3 and result["failures"] == []


def test_a_busy_machine_is_not_timed(
    tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "busy_because", lambda *args, **kwargs: ["a test says so"])
    assert decode.BENCHMARK.main(["--presets", "tiny-rgb", "--out", str(tmp_path)]) == 3
    assert "a test says so" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "mnits"], "mnist"),
        (["--bn", "layer"], "running"),
        (["--memory-format", "nhwc"], "channels_last"),
        (["--batch", "0"], "got 0"),
        (["--repeats", "3", "2"], "3 2"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        decode.BENCHMARK.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
def test_record_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = ["--presets", "tiny-multiscale", "--batch", "2", "--no-compile", "--device", "cuda"]
    assert decode.BENCHMARK.main([*arguments, "--force", "--dry-run", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/decode.json")
    assert all(
        entry["figures"]["auto"]["seconds"]["n"] >= 5 for entry in json.loads(path.read_text())["cases"]
    )
