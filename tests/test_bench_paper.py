"""The benchmark of the published configurations: its floors, its extrapolations, its record. No speed is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import lsgm_fast  # noqa: E402
from benchmarks import floors, measure, paper, paper_report, published, sample  # noqa: E402
from benchmarks.parts import Parts  # noqa: E402
from lsgm_fast.models.ncsnpp import Attention  # noqa: E402
from lsgm_fast.presets import PRESETS  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    state = measure.MachineState(1.0, 2, (0.0, 0.0, 0.0), 0.0, 0.0)
    monkeypatch.setattr(measure, "read_state", lambda *a, **k: state)
    monkeypatch.setattr(measure, "_state_since", lambda *a, **k: state)
    # Small buffers and products: the machinery is tested here, not the machine.
    monkeypatch.setitem(floors.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setattr("benchmarks.ops.cache_bytes", lambda device: 2**18)


# -- floors ---------------------------------------------------------------------------------------------------------


def counted_by_hand(network: nn.Module, run: Any) -> int:
    """Two operations for every multiplication of convolutions, linear layers and attention, from the layers' shapes."""
    total = 0

    def layer(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        per_output = module.weight[0].numel()  # of a convolution and of a linear layer alike
        total += 2 * output.numel() * per_output

    def attention(module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        nonlocal total
        n, c, h, w = args[0].shape
        total += 2 * 2 * n * (h * w) ** 2 * c  # q k^T, and its product with v

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(layer)
        elif isinstance(module, Attention):
            module.register_forward_hook(attention)
    with torch.no_grad(), lsgm_fast.use_backend("reference"):
        run()
    return total


def test_the_operations_of_an_evaluation_by_hand() -> None:
    batch, preset = 3, "tiny-binary"  # without FIR filters, which are convolutions that are no layers
    model = lsgm_fast.build(preset)
    z, t = torch.zeros(batch, *model.latent_shape), torch.zeros(batch)
    network = model.prior
    assert network is not None
    expected = counted_by_hand(network, lambda: network(z, t))
    assert floors.work(PRESETS[preset], batch)["score"].operations == expected


def test_the_bytes_are_those_of_the_forward_benchmarks() -> None:
    from benchmarks import decode, score

    work = floors.work(PRESETS["tiny-multiscale"], 2)
    evaluation = score.Evaluation(score.Case("tiny-multiscale", 2, "contiguous", False, "cpu"))
    decoder = decode.Decoder(decode.Case("tiny-multiscale", "batch", 2, "contiguous", False, "cpu"))
    assert work["score"].bytes == evaluation.floor_bytes()
    assert work["decode"].bytes == decoder.floor_bytes()
    assert work["decode"].operations > 0


@pytest.mark.parametrize(("dtype", "moved"), [(torch.float32, 4000), (torch.bfloat16, 2000)])
def test_the_floor_is_the_larger_part_at_the_best_rate(dtype: torch.dtype, moved: int) -> None:
    matmul, copy = measure.measured([5.0, 10.0, 20.0], "FLOP/s"), measure.measured([50.0, 100.0], "B/s")
    figures = floors.floor(floors.Work(300, 4000), dtype, matmul, copy)
    assert figures["arithmetic"]["value"] == 300 / 20.0
    assert figures["bytes"]["median"] == moved
    assert figures["seconds"]["value"] == figures["moving"]["value"] == moved / 100.0
    assert figures["seconds"]["kind"] == "extrapolated"
    slower = floors.floor(floors.Work(10**6, 4000), dtype, matmul, copy)
    assert slower["seconds"]["value"] == 10**6 / 20.0


def test_launches_cost_nothing_where_nothing_is_launched() -> None:
    none = floors.launches(lambda: None, "cpu")
    assert none["kind"] == "not_measured"
    assert floors.launching(none, measure.measured([1e-6], "s")) is none
    figure = floors.launching(measure.measured([900], "launches"), measure.measured([2e-6, 4e-6], "s"))
    assert figure["kind"] == "extrapolated" and figure["value"] == pytest.approx(900 * 3e-6)


# -- extrapolation --------------------------------------------------------------------------------------------------


def parts() -> dict[str, Any]:
    return {
        "score": measure.measured([0.5], "s/evaluation"),
        "solver": measure.measured([0.25], "s/evaluation"),
        "decode": measure.measured([2.0], "s/batch"),
    }


@pytest.mark.parametrize("way", sample.WAYS)
def test_the_published_nfe_belongs_to_the_published_steps(way: str) -> None:
    case = sample.WAYS[way].case("celebahq256-quantitative", 16)
    assert paper_report.way_of(case) == way
    figures = {"parts": parts(), "fixed": measure.not_measured("too long")}
    found = paper.at_published_nfe(case, figures)
    if way.startswith("auto"):
        assert found["kind"] == "not_measured"
        return
    assert found["nfe"] == measure.quoted(23, "evaluations", published.PAGE)
    assert found["total"]["kind"] == "extrapolated" and found["total"]["value"] == 23 * 0.75 + 2.0
    assert "parts.score" in found["total"]["how"]
    assert found["per_sample"]["value"] == pytest.approx(19.25 / 16)
    # A whole solve that was timed says more than its parts.
    fixed = {
        "per_evaluation": measure.measured([0.6], "s/evaluation"),
        "decode": measure.measured([1.0], "s"),
    }
    whole = paper.at_published_nfe(case, figures | {"fixed": fixed})
    assert whole["total"]["value"] == pytest.approx(23 * 0.6 + 1.0) and "fixed" in whole["total"]["how"]
    other = sample.WAYS[way].case("mnist", 16)
    assert paper.at_published_nfe(other, figures)["kind"] == "not_measured"


def test_the_floor_at_the_published_nfe() -> None:
    floor = {
        "score": {"seconds": measure.extrapolated(0.1, "s", "x")},
        "decode": {"seconds": measure.extrapolated(3.0, "s", "x")},
    }
    assert paper.floor_at_published_nfe("cifar10-fid", floor)["value"] == pytest.approx(138 * 0.1 + 3.0)
    assert paper.floor_at_published_nfe("omniglot", floor)["kind"] == "not_measured"


# -- the record -----------------------------------------------------------------------------------------------------


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = paper.main([*arguments, "--presets", "tiny-rgb", "--batch", "2", "--dry-run", "--out", str(out)])
    (path,) = out.glob("*/paper.json")
    return status, json.loads(path.read_text())


def test_record_of_a_tiny_preset(tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plots" / "paper.svg"
    ways = ["published", "rk45", "auto", "auto-10"]
    status, record = run(
        tmp_path,
        "--precisions",
        "fp32",
        "--ways",
        *ways,
        "--budget",
        "60",
        "--repeats",
        "1",
        "2",
        "--plot",
        str(plot),
    )
    assert status == 0 and record["idle"] and record["complete"]
    measure.check_record(record)
    assert [case["parameters"]["way"] for case in record["cases"]] == ways
    settings = record["settings"]
    assert set(settings["rates"]["matmul"]) == {"fp32"}
    lsgm = settings["references"]["lsgm"]
    assert (lsgm["kind"], lsgm["value"]) == ("quoted", 2.74) and "Other hardware" in lsgm["source"]
    by_way = {case["parameters"]["way"]: case["figures"] for case in record["cases"]}
    for way, figures in by_way.items():
        assert figures["parts"]["score"]["median"] > 0 and figures["parts"]["solver"]["median"] > 0
        # One evaluation of the network is timed for both ways of a backend.
        same = by_way["published" if way == "published" else "rk45"]["parts"]["score"]
        assert figures["parts"]["score"] == same
        assert figures["fixed"]["nfe"]["median"] == {"published": 32, "rk45": 32, "auto-10": 10}.get(way, 4)
        assert figures["floor"]["score"]["seconds"]["value"] > 0
        assert figures["published_nfe"]["kind"] == "not_measured"
    assert by_way["auto-10"]["solved"]["kind"] == "not_measured"
    assert (by_way["rk45"]["solved"]["nfe"]["median"] - 2) % 6 == 0
    p = by_way["auto-10"]["parts"]
    total = 10 * (p["score"]["median"] + p["solver"]["median"]) + p["decode"]["median"]
    assert by_way["auto-10"]["budget"]["total"]["value"] == pytest.approx(total)
    out = capsys.readouterr().out
    assert all(text in out for text in ("44 min", "3.9 min", "2.74 s", paper_report.CALLED, "no comparison"))
    drawn = plot.read_text()
    assert "<svg" in drawn and drawn.rstrip().endswith("</svg>")
    # The same from the record alone.
    (path,) = tmp_path.glob("*/paper.json")
    again = tmp_path / "again.png"
    assert paper_report.main([str(path), str(again)]) == 0 and again.stat().st_size > 0
    assert paper_report.table(record["cases"]) in capsys.readouterr().out


def test_what_does_not_fit_is_left_at_its_parts(tmp_path: Path, idle: None) -> None:
    options = ("--ways", "rk45", "auto-10", "--budget", "10", "--repeats", "1000000", "1000000")
    status, record = run(tmp_path, "--precisions", "fp32", *options)
    assert status == 0 and record["complete"]
    for case in record["cases"]:
        figures = case["figures"]
        assert figures["parts"]["decode"]["median"] > 0
        assert figures["fixed"]["reason"].startswith("parts only:")
    shown = list(paper_report.points(record["cases"]))
    assert [(way, kind) for _, way, kind, _ in shown] == [("auto-10", "extrapolated")]
    (line,) = [line for line in paper_report.table(record["cases"]).splitlines() if "auto-10" in line]
    assert line.count("*") == 2  # per batch and per image


def test_without_time_nothing_is_a_number(tmp_path: Path, idle: None) -> None:
    status, record = run(tmp_path, "--budget", "1e-6", "--ways", "rk45")
    assert status == 0 and len(record["left_out"]) == 2 and not record["complete"]
    assert {figure["kind"] for case in record["cases"] for figure in case["figures"].values()} == {
        "not_measured"
    }


def test_a_failing_configuration_is_named(
    tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no such shapes\nand more")

    monkeypatch.setattr(floors, "work", broken)
    status, record = run(tmp_path, "--precisions", "fp32", "--ways", "rk45", "--budget", "10")
    assert status == 1
    assert record["cases"][0]["failures"] == ["parts: RuntimeError: no such shapes"]


def test_the_stored_output_takes_the_networks_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lsgm_fast.build("tiny-rgb")
    case = sample.WAYS["rk45"].case("tiny-rgb", 2)
    parts_of = Parts(model, published.Sampler(model, case, "cpu", measure.Budget(60.0)))

    def never(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("the network was called")

    assert model.prior is not None
    monkeypatch.setattr(model.prior, "forward", never)
    for way in sample.WAYS.values():
        figure = parts_of.time_solver(way.case("tiny-rgb", 2), 0.0, measure.Budget(60.0))
        assert figure["median"] > 0.0
    assert "_predict" not in vars(model)


def test_default_cases() -> None:
    def cases(*arguments: str) -> list[published.Case]:
        return paper.cases_of(paper.parser().parse_args(arguments))

    published_names = {name for name in PRESETS if not name.startswith("tiny")}
    assert {c.preset for c in cases()} == published_names
    large = [c for c in cases() if c.preset.startswith("celebahq256")]
    assert {c.batch for c in large} == {1} and {c.batch for c in cases()} == {1, 16}
    assert {c.precision for c in cases()} == {"fp32", "bf16-autocast"}
    gpu = cases("--device", "cuda")
    assert {c.precision for c in gpu} == {"fp32", "fp16-autocast"} and len(gpu) == len(published_names) * 20
    quick = cases("--quick")
    assert {c.batch for c in quick} == {1} and {c.precision for c in quick} == {"fp32"}
    assert len(quick) == len(paper.QUICK) * len(sample.WAYS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "mnits"], "mnist"),
        (["--ways", "rk54"], "rk45"),
        (["--precisions", "fp8"], "fp32"),
        (["--batch", "0"], "got 0"),
        (["--repeats", "3", "2"], "3 2"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        paper.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
