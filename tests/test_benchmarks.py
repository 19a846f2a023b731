"""The benchmark harness: its arithmetic, its record, and what it refuses. No figure of speed is asserted."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsgm_fast
from lsgm_fast.config import SDEConfig
from lsgm_fast.models import LSGM
from lsgm_fast.sampling import ScoreTerm

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/ is no installed package: it runs from the repository.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import accuracy, measure, published, solver, validation  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu" / "validate.sh"


def state(**changes: Any) -> measure.MachineState:
    values: dict[str, Any] = {
        "sampled_seconds": 1.0,
        "logical_cores": 2,
        "load_average": (0.0, 0.0, 0.0),
        "others_cores": 0.0,
        "stolen_cores": 0.0,
    }
    return measure.MachineState(**{**values, **changes})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Tiny networks: a second thread on a busy core would only be waited for.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "read_state", lambda *a, **k: state())
    monkeypatch.setattr(measure, "_state_since", lambda *a, **k: state())


def run_published(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    benchmark = torch.backends.cudnn.benchmark
    try:
        status = published.main(["--name", "trial", "--out", str(out), "--device", "cpu", *arguments])
    finally:
        torch.backends.cudnn.benchmark = benchmark
    (path,) = out.glob("*/trial.json")
    return status, json.loads(path.read_text())


# -- primitives -----------------------------------------------------------------------------------------------------


def test_quantiles() -> None:
    figure = measure.measured([5.0, 1.0, 3.0, 2.0, 4.0], "s")
    assert (
        figure["median"] == 3.0
        and figure["q20"] == pytest.approx(1.8)
        and figure["q80"] == pytest.approx(4.2)
    )
    assert figure["n"] == 5 and figure["values"] == [5.0, 1.0, 3.0, 2.0, 4.0]
    assert measure.measured([1.0, 2.0], "s")["q20"] is None
    for bad in ([], [float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="finite"):
            measure.measured(bad, "s")


def test_repeat_counts_and_budget() -> None:
    calls: list[int] = []

    def run() -> int:
        calls.append(len(calls))
        return calls[-1]

    budget = measure.Budget(60)
    values = measure.repeat(run, warmup=2, fewest=3, most=5, seconds=30, budget=budget)
    assert values == [2, 3, 4, 5, 6]  # two for warm-up, then as many as allowed
    calls.clear()
    values = measure.repeat(run, warmup=2, fewest=3, most=5, seconds=0.0, budget=budget)
    assert values == [1, 2, 3]  # no time: one warm-up, and still the fewest

    short = measure.Budget(0.05)

    def slow() -> int:
        time.sleep(0.03)
        return 1

    assert 1 <= len(measure.repeat(slow, warmup=0, fewest=50, most=50, seconds=9, budget=short)) < 50
    with pytest.raises(measure.OutOfTime, match="0.05 s"):
        measure.repeat(slow, warmup=0, fewest=1, most=1, seconds=9, budget=short)
    with pytest.raises(ValueError, match="positive"):
        measure.Budget(0)


def test_busy_reasons() -> None:
    assert measure.busy_because(state()) == []
    assert "1.50 of 2 CPU cores" in measure.busy_because(state(others_cores=1.5))[0]
    assert measure.busy_because(state(others_cores=1.5, logical_cores=64)) == []
    assert "hypervisor" in measure.busy_because(state(stolen_cores=0.9))[0]
    # The load average counts only where nothing better is known: it still holds what we did ourselves.
    assert measure.busy_because(state(load_average=(9.0, 9.0, 9.0))) == []
    assert "load average" in measure.busy_because(state(others_cores=None, load_average=(9.0, 9.0, 9.0)))[0]
    assert measure.busy_because(state(others_cores=None, load_average=None)) != []
    process = {"pid": "7", "name": "train", "memory_mib": "900"}
    assert "train (900 MiB)" in measure.busy_because(state(gpu_processes=[process]))[0]
    used = state(gpus=[{"utilization.gpu": "80"}])
    assert "80% busy" in measure.busy_because(used)[0]
    assert measure.busy_because(used, check_gpu_utilization=False) == []


def test_state_sees_another_process() -> None:
    if measure._ticks().busy is None:
        pytest.skip("the system keeps no account of CPU time")
    spin = [sys.executable, "-c", "import time; e = time.time() + 30\nwhile time.time() < e: pass"]
    process = subprocess.Popen(spin)
    try:
        time.sleep(0.3)
        seen = measure.read_state(1.0)
    finally:
        process.kill()
        process.wait()
    # Others may run here too, and a busy machine gives the process less than a core.
    assert seen.others_cores is not None and seen.others_cores > 0.2


def test_own_work_is_not_counted_as_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = measure._Ticks(busy=14.0, stolen=2.0, own=8.0, clock=102.0)
    monkeypatch.setattr(measure, "_ticks", lambda: now)
    monkeypatch.setattr(measure, "_smi", lambda *a: None)
    seen = measure._state_since(
        measure._Ticks(busy=10.0, stolen=1.0, own=5.0, clock=100.0), holds_context=False
    )
    assert seen.others_cores == 0.5 and seen.stolen_cores == 0.5  # in 2 s: 4 busy, 3 of them our own
    unknown = measure._state_since(measure._Ticks(None, None, 5.0, 100.0), holds_context=False)
    assert unknown.others_cores is None and unknown.stolen_cores is None
    before = os.times().user
    while os.times().user < before + 0.05:
        pass
    monkeypatch.undo()
    assert measure._ticks().own >= before + 0.05


def test_gpu_processes_leave_out_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = [str(os.getpid()), "/x/python3", "500"], ["1", "/y/train", "900"]
    monkeypatch.setattr(measure, "_smi", lambda *a: [own, other])
    assert measure._gpu_processes(True) == [{"pid": "1", "name": "train", "memory_mib": "900"}]
    monkeypatch.setattr(measure, "_smi", lambda *a: [other])
    assert measure._gpu_processes(True) == []  # our own under another number
    assert len(measure._gpu_processes(False) or []) == 1
    monkeypatch.setattr(measure, "_smi", lambda *a: None)
    assert measure._gpu_processes(False) is None


def test_machine_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "gpu_names", lambda: ["NVIDIA H100 80GB HBM3"])
    monkeypatch.setattr(measure, "_cpu_model", lambda: "AMD EPYC 7B13 (64-Core)")
    assert measure.machine_name("cuda") == "nvidia-h100-80gb-hbm3"
    assert measure.machine_name("cpu") == "amd-epyc-7b13-64-core"


def test_command_hides_the_output_folder() -> None:
    arguments = ["--presets", "mnist", "--out", "/home/somebody/x", "--batch", "1", "--out=/home/y"]
    assert measure.command_line("m", arguments) == "python3 -m m --presets mnist --batch 1"


# -- the split ------------------------------------------------------------------------------------------------------


SCORE_SECONDS, DECODE_SECONDS, SOLVER_SECONDS = 4.0, 30.0, 0.5


class Clock:
    """A clock that only the fake networks advance, so that the split's arithmetic is exact."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class ClockedScore(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.clock.now += SCORE_SECONDS
        return 0.1 * torch.sin(z)


class ClockedVAE(nn.Module):
    latent_shape = (2, 4, 4)

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def decode(self, z: torch.Tensor, **options: Any) -> torch.Tensor:
        self.clock.now += DECODE_SECONDS
        return z.sigmoid().float()


class ClockedLSGM(LSGM):
    def _sampling_term(self, *args: Any) -> ScoreTerm:
        term = super()._sampling_term(*args)

        def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.vae.clock.now += SOLVER_SECONDS  # stands for everything of a solve that is not the network
            return term.predict(z, t)

        return replace(term, predict=predict)


def clocked_sampler(clock: Clock, solver: str = "rk45", budget: float = 60.0) -> published.Sampler:
    model = ClockedLSGM(ClockedVAE(clock), ClockedScore(clock), SDEConfig()).eval()
    case = published.Case("tiny-rgb", 2, solver, "fp32")
    return published.Sampler(model, case, "cpu", measure.Budget(budget))


@pytest.mark.parametrize("solver", published.SOLVERS)
def test_split_recovers_known_parts(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(published, "time", clock)
    sampler = clocked_sampler(clock, solver)
    figures, backends = published.time_sampling(
        sampler, published.FIXED_TOL, sampler.budget, warmup=1, fewest=3, most=3, seconds=30
    )
    nfe, split = 32, figures["split"]
    assert figures["nfe"]["values"] == [nfe] * 3
    assert split["score"]["values"] == [nfe * SCORE_SECONDS] * 3
    assert split["solver"]["values"] == [nfe * SOLVER_SECONDS] * 3
    assert split["decode"]["values"] == [DECODE_SECONDS] * 3
    assert split["score_per_evaluation"]["median"] == SCORE_SECONDS
    assert split["total_over_unsplit"]["median"] == 1.0
    # The split runs are other runs than the total's, which know nothing of it.
    total = figures["total"]["median"]
    assert total == sum(split[k]["median"] for k in ("score", "solver", "decode")) == split["total"]["median"]
    assert figures["per_sample"]["median"] == total / 2
    assert figures["per_evaluation"]["median"] == SCORE_SECONDS + SOLVER_SECONDS
    assert figures["decode"]["median"] == DECODE_SECONDS
    assert backends["score_drift"] in ("cpu", "reference")  # with and without the compiled library
    assert figures["peak_memory"]["kind"] == "not_measured"
    assert "_predict" not in vars(sampler.model)


@pytest.mark.parametrize("solver", published.SOLVERS)
def test_budget_ends_a_running_solve(solver: str) -> None:
    sampler = clocked_sampler(Clock(), solver, budget=0.2)
    with pytest.raises(measure.OutOfTime, match="0.2 s"):
        sampler(1e-13)  # thousands of steps
    assert sampler.budget.remaining() > -20.0
    assert "_predict" not in vars(sampler.model)


@pytest.mark.parametrize("solver", published.SOLVERS)
def test_the_fixed_tolerance_fixes_the_evaluations(solver: str) -> None:
    import lsgm_fast

    for preset in ("tiny-binary", "tiny-multiscale"):  # two SDEs
        model = lsgm_fast.build(preset)
        z, info = model.sample_latents(1, solver=solver, tol=published.FIXED_TOL)
        assert info.nfe == 32 and info.rejected == 0
        published.enliven(model)
        z_other, info = model.sample_latents(1, solver=solver, tol=published.FIXED_TOL)
        assert info.nfe == 32
        assert not torch.allclose(z, z_other)  # the network has a say now


def test_enliven_touches_only_idle_layers() -> None:
    import lsgm_fast

    model = lsgm_fast.build("tiny-binary")
    before = copy.deepcopy(model.state_dict())
    assert published.enliven(model, seed=3) > 5
    after = model.state_dict()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert changed and all(before[k].std() < published.SMALLEST_STD < 1e-2 < after[k].std() for k in changed)
    assert published.enliven(model) == 0


# -- the record -----------------------------------------------------------------------------------------------------


def test_record_of_a_tiny_preset(tmp_path: Path, idle: None) -> None:
    status, record = run_published(
        tmp_path, "--presets", "tiny-rgb", "--batch", "1", "--repeats", "3", "3", "--commit", "abc"
    )
    assert status == 0
    measure.check_record(record)
    assert record["idle"] is True and record["forced"] is False and record["complete"] is True
    assert record["command"].startswith("python3 -m benchmarks.published --name trial --device cpu")
    environment = record["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["logical_cores"] == os.cpu_count()
    assert len(environment["commit"]["source_sha256"]) == 64
    assert record["settings"]["cudnn_benchmark"] is True
    assert str(tmp_path) not in json.dumps(record) and str(Path.home()) + "/" not in json.dumps(record)
    assert [(c["parameters"]["solver"], c["parameters"]["precision"]) for c in record["cases"]] == [
        ("scipy", "fp32"),
        ("rk45", "fp32"),
        ("scipy", "bf16-autocast"),
        ("rk45", "bf16-autocast"),
    ]
    for case in record["cases"]:
        figures = case["figures"]
        assert figures["fixed"]["nfe"]["values"] == [32.0] * 3
        assert figures["fixed"]["total"]["q20"] <= figures["fixed"]["total"]["q80"]
        assert (figures["solved"]["nfe"]["median"] - 2) % 6 == 0
        assert figures["published_nfe"]["kind"] == "not_measured"
        assert (
            case["backends"]["bn_swish"] == "reference"
            and case["backends"]["group_norm_swish"] == "reference"
        )
        assert not case["failures"]


def test_unmeasured_is_never_a_number(tmp_path: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--presets",
        "tiny-binary",
        "tiny-rgb",
        "--batch",
        "1",
        "--precisions",
        "fp32",
        "fp16-autocast",
    )
    _, record = run_published(tmp_path, *arguments, "--budget", "0.001")
    measure.check_record(record)
    assert record["complete"] is False and len(record["left_out"]) == 8
    numbers = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, (int, float)):
            numbers.append(value)

    for case in record["cases"]:
        walk(case["figures"])
        reasons = {f["reason"] for f in case["figures"].values()}
        if case["parameters"]["precision"] == "fp16-autocast":
            assert all("bf16" in reason for reason in reasons)
    assert numbers == []
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-")]
    assert len(lines) == 8 and all(line.split()[4:] == ["-"] * 7 for line in lines)


def test_a_failing_case_does_not_cost_the_others(
    tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = LSGM.decode

    def out_of_memory_at_two(self: LSGM, z: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if z.shape[0] == 2:
            raise torch.OutOfMemoryError("a device of no memory")
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(LSGM, "decode", out_of_memory_at_two)
    status, record = run_published(
        tmp_path,
        *("--presets", "tiny-binary", "--batch", "2", "1", "--precisions", "fp32"),
        *("--solvers", "rk45", "--repeats", "1", "1"),
    )
    assert status == 1
    bad, good = record["cases"]
    assert "no memory" in bad["failures"][0] and bad["figures"]["fixed"]["kind"] == "not_measured"
    assert "not tried" in bad["figures"]["solved"]["reason"]
    assert good["failures"] == [] and good["figures"]["solved"]["total"]["n"] == 1
    assert good["figures"]["solved"]["total"]["q20"] is None


def test_extrapolation_is_labelled() -> None:
    fixed = {
        "per_evaluation": measure.measured([0.5], "s/evaluation"),
        "decode": measure.measured([1.0], "s/batch"),
    }
    figures = published.at_published_nfe("celebahq256-quantitative", 16, fixed)
    assert figures["nfe"]["kind"] == "quoted" and figures["nfe"]["value"] == 23
    assert figures["total"]["kind"] == "extrapolated" and figures["total"]["value"] == 23 * 0.5 + 1.0
    assert figures["per_sample"]["value"] == pytest.approx(12.5 / 16)
    assert published.at_published_nfe("mnist", 16, fixed)["kind"] == "not_measured"
    missing = published.at_published_nfe("cifar10-fid", 16, measure.not_measured("broken"))
    assert missing["kind"] == "not_measured" and "broken" in missing["reason"]


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (3.0, "must stand in a figure"),
        ({"nfe": 23}, "must stand in a figure"),
        ({"kind": "guessed", "value": 1.0}, "unknown kind"),
        ({"kind": "not_measured", "reason": "no GPU", "value": 0.0}, "not_measured figure has"),
        ({"kind": "not_measured", "reason": ""}, "needs 'reason'"),
        ({**measure.measured([1.0], "s"), "n": 2}, "but 1 values"),
    ],
)
def test_check_record_rejects(figure: Any, message: str) -> None:
    keys = dict.fromkeys(measure._RECORD_KEYS)
    case = {"parameters": {}, "backends": {}, "failures": [], "figures": {"x": figure}}
    good = {
        **keys,
        "schema": measure.SCHEMA,
        "idle": True,
        "not_idle_because": [],
        "left_out": [],
        "complete": True,
        "cases": [],
    }
    measure.check_record(good)
    with pytest.raises(ValueError, match=message):
        measure.check_record({**good, "cases": [case]})


def test_check_record_rejects_contradictions() -> None:
    good = {
        **dict.fromkeys(measure._RECORD_KEYS),
        "schema": measure.SCHEMA,
        "idle": True,
        "not_idle_because": [],
        "left_out": [],
        "complete": True,
        "cases": [],
    }
    for change in ({"idle": False}, {"complete": False}, {"schema": 99}, {"surplus": 1}):
        with pytest.raises(ValueError, match=next(iter(change)).replace("surplus", "unknown")):
            measure.check_record({**good, **change})


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    measure.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        measure.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_commit_that_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_git", lambda *a: "of-git")
    stated = measure.environment("abc")["commit"]
    assert (stated["sha"], stated["source"]) == ("abc", "stated by the caller")
    assert measure.environment()["commit"]["sha"] == "of-git"
    monkeypatch.setattr(measure, "_git", lambda *a: None)
    unknown = measure.environment()["commit"]
    assert unknown["sha"] is None and unknown["dirty"] is None and unknown["source"] == "unknown"


# -- refusals -------------------------------------------------------------------------------------------------------


def test_refuses_a_busy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "read_state", lambda *a, **k: state(others_cores=1.9))
    monkeypatch.setattr(measure, "_state_since", lambda *a, **k: state())
    arguments = ["--presets", "tiny-binary", "--batch", "1", "--solvers", "rk45", "--repeats", "1", "1"]
    status = published.main(["--name", "trial", "--out", str(tmp_path), "--device", "cpu", *arguments])
    assert status == published.BUSY_EXIT
    assert "1.90 of 2 CPU cores" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    status, record = run_published(tmp_path, *arguments, "--force")
    assert status == 0
    assert record["idle"] is False and record["forced"] is True
    assert any(reason.startswith("before: other processes") for reason in record["not_idle_because"])


def test_a_machine_that_became_busy_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "read_state", lambda *a, **k: state())
    monkeypatch.setattr(measure, "_state_since", lambda *a, **k: state(others_cores=1.0))
    _, record = run_published(tmp_path, "--presets", "tiny-binary", "--budget", "0.001")
    assert record["idle"] is False and record["not_idle_because"][0].startswith("during: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "cifar"], "unknown preset 'cifar'"),
        (["--presets", "mnist", "--solvers", "rk54"], "did you mean 'rk45'"),
        (["--presets", "mnist", "--precisions", "fp8"], "unknown precision 'fp8'"),
        (["--presets", "mnist", "--repeats", "5", "2"], "FEWEST <= MOST, got 5 2"),
        (["--presets", "mnist", "--batch", "0"], "at least 1, got 0"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        published.main(["--name", "x", "--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# -- the solver alone ------------------------------------------------------------------------------------------------


def test_the_solvers_own_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--presets",
        "tiny-rgb",
        "--batch",
        "2",
        "--rounds",
        "3",
        "--network",
        "--force",
        "--dry-run",
    ]
    assert solver.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/solver.json")
    (case,) = json.loads(path.read_text())["cases"]
    figures = case["figures"]
    assert case["backends"].keys() >= {"rk_drift_stage", "rk_drift_finish", "rk_control"}
    for name in solver.SOLVERS:
        # The network's output is stored: the solve is nothing but the solver.
        assert len(figures[name]["solve"]["values"]) == 3
        nfe = figures[name]["nfe"]["median"]
        assert nfe > 8 and (nfe - 2) % 6 == 0
        assert figures[name]["per_evaluation"]["median"] == pytest.approx(
            figures[name]["solve"]["median"] / nfe
        )
    own = figures["rk45"]["per_evaluation"]["median"]
    network = figures["network_evaluation"]["median"]
    assert figures["share"]["value"] == pytest.approx(own / (own + network))
    assert "scipy / rk45" in capsys.readouterr().out


def test_the_solvers_cost_is_not_timed_on_a_busy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "busy_because", lambda *args, **kwargs: ["a test says so"])
    assert solver.main(["--presets", "tiny-rgb", "--out", str(tmp_path)]) == 3
    assert "a test says so" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_accuracy_against_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "TOLERANCES", (1e-2, 1e-4))
    monkeypatch.setattr(accuracy, "EVALUATIONS", (2, 16))
    monkeypatch.setattr(accuracy, "FEW", (12,))
    torch.manual_seed(0)
    model = lsgm_fast.build("tiny-rgb")
    for parameter in model.prior.parameters():  # some start at zero, and the network's output with them
        torch.nn.init.normal_(parameter, std=0.1)
    model.save(tmp_path / "model.safetensors")
    arguments = [
        "--model",
        str(tmp_path / "model.safetensors"),
        "--batch",
        "2",
        "--sets",
        "2",
        "--exact",
        "1e-6",
        "--plot",
        str(tmp_path / "plot.svg"),
        "--dry-run",
        "--out",
        str(tmp_path),
    ]
    assert accuracy.main(arguments) == 0
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<svg" in drawn and drawn.count('id="line2d_') > len(accuracy.OTHERS)
    (path,) = tmp_path.glob("*/accuracy.json")
    found = {
        (c["parameters"]["solver"], c["parameters"].get("tol", c["parameters"].get("evaluations"))): c[
            "figures"
        ]
        for c in json.loads(path.read_text())["cases"]
    }
    error = {key: accuracy.mean(figures["latent_error"]) for key, figures in found.items()}
    assert error["rk45", 1e-4] < error["rk45", 1e-2] and error["exponential", 16] < error["exponential", 2]
    assert found["exponential", 16]["evaluations"]["values"] == [16, 16]
    assert set(accuracy.OTHERS) <= {solver for solver, _ in found} and "exponential" not in accuracy.OTHERS
    assert all(len(figures["image_error"]["values"]) == 2 for figures in found.values())


# -- the parts and the script ---------------------------------------------------------------------------------------


def test_tests_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "test_three.py"
    suite.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "@pytest.mark.skip(reason='no such device')\ndef test_skipped(): pass\n"
    )
    out = tmp_path / "out"
    options = ["tests", "--out", str(out), "--device", "cpu", "--commit", "abc"]
    assert validation.main([*options, "--budget", "60", "--", str(suite), "--rootdir", str(tmp_path)]) == 1
    (path,) = out.glob("*/tests.json")
    record = json.loads(path.read_text())
    assert record["outcome"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert record["outcome"]["failed"][0].endswith("::test_bad")
    assert list(record["outcome"]["skipped_because"]) == ["no such device"]
    assert str(ROOT) not in path.read_text()
    assert "1 failed" in capsys.readouterr().out

    suite.write_text("import time\ndef test_slow(): time.sleep(60)\n")
    assert validation.main([*options, "--budget", "3", "--", str(suite)]) == validation.OUT_OF_TIME_EXIT
    record = json.loads(path.read_text())
    assert record["out_of_time"] is True
    # pytest still writes its report (if it had begun), and counts the test that was interrupted as passed.
    assert record["outcome"] is None or set(record["outcome"]["counts"]) <= {"passed"}


def test_script_records_every_part_and_goes_on(tmp_path: Path) -> None:
    # An interpreter that fails in one part only.
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\n[ "$3" = env ] && exit 7\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    environ = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(wrapper), "OMP_NUM_THREADS": "1"}
    # Two parts that are quick: a failing one, and one whose budget leaves no time for a figure.
    done = subprocess.run(
        [str(SCRIPT), "--dry-run", "--budget", "1", "env", "time-small"],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*/validate.json")
    parts = json.loads(path.read_text())["parts"]
    assert parts["env"]["exit_status"] == 7 and parts["time-small"]["exit_status"] == 0
    assert parts["time-small"]["dry_run"] is True
    record = json.loads((path.parent / "time-small.json").read_text())
    measure.check_record(record)
    assert record["dry_run"] is True and record["forced"] is True
    assert record["cases"][0]["parameters"]["preset"] == "tiny-binary"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["time-everything"], "unknown part 'time-everything'"),
        (["--fast"], "unknown option '--fast'"),
        (["--budget", "soon"], "expects seconds, got 'soon'"),
    ],
)
def test_script_wrong_usage(arguments: list[str], message: str, tmp_path: Path) -> None:
    environ = {**os.environ, "OUT": str(tmp_path)}
    done = subprocess.run([str(SCRIPT), *arguments], env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and message in done.stderr


def test_script_times_every_published_preset() -> None:
    from lsgm_fast.presets import PRESETS

    same_networks = {"cifar10-balanced": "cifar10-fid"}
    text = SCRIPT.read_text()
    for name in PRESETS:
        if not name.startswith("tiny-"):
            timed = same_networks.get(name, name)
            assert PRESETS[timed].vae == PRESETS[name].vae and PRESETS[timed].score == PRESETS[name].score
            assert any(
                timed in line.split() for line in text.replace(";;", "").splitlines() if "echo" in line
            )


@pytest.mark.gpu
def test_record_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = [
        "--presets",
        "tiny-rgb",
        "--batch",
        "2",
        "--repeats",
        "3",
        "3",
        "--force",
        "--device",
        "cuda",
    ]
    status, record = run_published(tmp_path, *arguments)
    assert status == 0
    for case in record["cases"]:
        figures = case["figures"]["fixed"]
        assert figures["peak_memory"]["median"] > 0 and figures["nfe"]["values"] == [32.0] * 3
        assert figures["split"]["score"]["median"] > figures["split"]["solver"]["median"] * 0.1
