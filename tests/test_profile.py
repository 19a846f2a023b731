"""``lsgm-fast profile``: traces, command lines of Nsight, captured inputs and their replay."""

from __future__ import annotations

import json
import shlex
import stat
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import lsgm_fast
from lsgm_fast import cli, ops, testing, trace
from lsgm_fast.commands import profiling
from lsgm_fast.dispatch import REGISTRY
from lsgm_fast.profiling import inputs, nsight, recording, replay
from lsgm_fast.profiling.workload import Workload, prepared


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trace, "active", False)


@pytest.fixture
def run(capsys):
    def call(*arguments: object):
        code = cli.main(["profile", *map(str, arguments)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


def error(result) -> str:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    return result.err


def annotations(path, names=None):
    events = json.loads(path.read_text())["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation"]
    return [event for event in found if names is None or event["name"] in names]


# -- PyTorch's profiler ---------------------------------------------------------------------------------------------


def test_a_trace_has_the_stages_and_its_events_nest(run, tmp_path):
    result = run("tiny-rgb", "--batch", 2, "--evaluations", 3, "--device", "cpu")
    assert result.code == 0
    events = sorted(annotations(tmp_path / "profile" / "trace.json"), key=lambda e: (e["ts"], -e["dur"]))
    parents, stack = {}, []
    for event in events:
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        parents.setdefault(event["name"], set()).add(stack[-1]["name"] if stack else None)
        stack.append(event)
    assert parents["sample"] == {None}
    assert parents["solve"] == parents["decode"] == {"sample"}
    assert parents["step"] == {"solve"}
    assert parents["evaluation"] == {"step"}
    assert parents["score_network"] == {"evaluation"}
    assert parents["res_block"] == parents["attention"] == {"score_network"}
    assert parents["cell"] == {"decode"}
    of_operations = {name: inside for name, inside in parents.items() if name.partition(".")[0] in REGISTRY}
    assert {"res_block"} in of_operations.values()
    assert any(
        name.startswith("multistep_update.") and "step" in inside for name, inside in of_operations.items()
    )


def test_the_numbers_of_the_ranges_are_in_the_trace_and_the_tables_count_them(run, tmp_path):
    out = tmp_path / "a folder"
    result = run(
        "tiny-rgb", "-b", 1, "--evaluations", 2, "--repeat", 2, "--device", "cpu", "-o", out, "--json"
    )
    report = json.loads(result.out)
    assert report["trace"] == str(out / "trace.json")
    numbers = [event["args"]["number"] for event in annotations(out / "trace.json", ["evaluation"])]
    assert numbers == [1, 2, 1, 2]
    steps = [event["args"] for event in annotations(out / "trace.json", ["step"])]
    assert [step["number"] for step in steps] == [0, 1, 0, 1]
    assert steps[0]["t"] == 1.0
    shapes = [event["args"]["shape"] for event in annotations(out / "trace.json", ["score_network"])]
    assert shapes == 4 * [[1, *lsgm_fast.presets.PRESETS["tiny-rgb"].vae.latent_shape]]
    calls = {row["name"]: row["calls"] for row in report["ranges"]}
    assert (calls["sample"], calls["solve"], calls["evaluation"]) == (2, 2, 4)
    assert report["busiest"]
    assert sum(row["share"] for row in report["busiest"]) <= 1.0


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("score", {"evaluation", "score_network", "res_block"}),
        ("decode", {"decode", "cell"}),
        (
            "train",
            {"train_step", "forward", "encode", "backward", "clip", "optimizer", "ema", "score_network"},
        ),
    ],
)
def test_other_stages(run, tmp_path, stage, expected):
    result = run("tiny-binary", "--stage", stage, "-b", 2, "--device", "cpu", "--quiet")
    assert (result.code, result.out) == (0, "")
    assert expected <= {event["name"] for event in annotations(tmp_path / "profile" / "trace.json")}


def test_the_tables_are_printed(run):
    result = run("tiny-rgb", "--stage", "decode", "-b", 1, "--device", "cpu")
    assert "decode" in result.out
    assert "aten::" in result.out
    assert "trace: profile/trace.json" in result.out


def test_own_times_leave_out_what_is_called():
    def event(name, begin, length, thread=1, cat="cpu_op"):
        return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length, "tid": thread}

    events = [
        event("solve", 0, 100, cat="user_annotation"),
        event("outer", 0, 50),
        event("inner", 10, 20),
        event("innermost", 12, 5),
        event("inner", 30, 10),
        event("outer", 50, 30),
        event("inner", 5, 7, thread=2),
        {"ph": "M", "name": "process_name"},
    ]
    rows = {row.name: row for row in recording.summarise(events, None).busiest}
    assert {name: round(1e6 * row.seconds) for name, row in rows.items()} == {
        "outer": 50 - 30 + 30,
        "inner": 20 - 5 + 10 + 7,
        "innermost": 5,
    }
    assert rows["inner"].calls == 3
    assert rows["outer"].share == pytest.approx(0.5)


def test_on_a_gpu_the_kernels_are_listed():
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "decode", "ts": 0, "dur": 10, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 5, "tid": 1},
        {"ph": "X", "cat": "kernel", "name": "apply_kernel", "ts": 3, "dur": 4, "tid": 7},
    ]
    assert [row.name for row in recording.summarise(events, None).busiest] == ["apply_kernel"]


def test_numbers_are_left_out_where_they_might_be_those_of_another_range():
    events = [{"cat": "user_annotation", "name": "step", "ts": 0, "dur": 1, "tid": 1, "args": {}}]
    recording._describe(events, [("step", {"number": 0}), ("step", {"number": 1})])
    assert events[0]["args"] == {}


def test_ranges_appear_under_a_profiler_of_the_users_own():
    x = torch.randn(1, 8, 4, 4)
    with trace.enabled(), torch.profiler.profile() as profiler:
        ops.residual_add(x, x, 0.5)
    assert any(event.key.startswith("residual_add.") for event in profiler.key_averages())


# -- Nsight ---------------------------------------------------------------------------------------------------------

ARGUMENTS = ("tiny-rgb", "--stage", "score", "-b", 4, "--channels-last", "--device", "cuda")
INNER = "tiny-rgb --stage score --batch 4 --channels-last --device cuda --warmup 1 --repeat 1 --tool none"


def test_the_command_line_of_nsight_systems(run):
    result = run(*ARGUMENTS, "--print-command")
    assert (result.code, result.err) == (0, "")
    assert result.out.strip() == (
        "nsys profile --trace=cuda,nvtx,cudnn,cublas --sample=none --cpuctxsw=none --capture-range=cudaProfilerApi "
        "--capture-range-end=stop --cuda-graph-trace=node --force-overwrite=true --output=profile/timeline "
        f"{sys.executable} -m lsgm_fast profile {INNER}"
    )


def test_the_command_line_of_nsight_compute(run):
    options = ("--kernel", "apply|norm_kernel", "--launch-skip", 2, "--launch-count", 3)
    result = run(
        *ARGUMENTS, *options, "--range", "group_norm_swish.triton", "--print-command", "--json", "-o", "out"
    )
    assert json.loads(result.out)["command"] == [
        *("ncu", "--profile-from-start=off", "--nvtx", "--nvtx-include=lsgm_fast@group_norm_swish.triton/"),
        *("--set=full", "--kernel-name=regex:apply|norm_kernel", "--launch-skip=2", "--launch-count=3"),
        *(
            "--force-overwrite",
            "--export=out/apply-norm_kernel",
            sys.executable,
            "-m",
            "lsgm_fast",
            "profile",
        ),
        *INNER.split(),
    ]


def test_what_runs_under_a_tool_is_what_was_asked_for(run, monkeypatch):
    done = []

    def remembered(workload, device):
        done.append((workload, device))
        return prepared(replace(workload, solver="auto", tol=None, evaluations=2), device)

    monkeypatch.setattr("lsgm_fast.profiling.workload.prepared", remembered)
    options = ("--solver", "rk45", "--tol", 0.01, "--seed", 3, "-b", 2, "--device", "cpu", "--repeat", 2)
    printed = run("tiny-rgb", *options, "--print-command").out
    inner = shlex.split(printed)
    inner = inner[inner.index("profile", 2) + 1 :]
    assert run(*inner).code == 0
    assert done == [(Workload("tiny-rgb", batch=2, solver="rk45", tol=0.01, seed=3), "cpu")]


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """Stand-ins for nsys and ncu, which write down how they were called; and a device that is called cuda."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in nsight.TOOLS:
        script = folder / name
        script.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/{name}.log\nexit $(cat {tmp_path}/code 2>/dev/null || echo 0)\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setattr(profiling, "pick_device", lambda name: "cuda")
    return tmp_path


def test_with_a_gpu_it_runs_itself_under_nsight_systems(run, tools):
    result = run("tiny-rgb", "--stage", "score")
    assert result.code == 0
    assert "nsys profile" in result.err  # the command comes first
    assert (tools / "nsys.log").read_text().startswith("profile --trace=cuda,nvtx")
    assert (tools / "profile").is_dir()
    assert "profile/timeline.nsys-rep" in result.out
    assert "nsys stats --report" in result.out


def test_with_a_kernel_it_runs_itself_under_nsight_compute(run, tools):
    result = run("--kernel", "apply_kernel", "--quiet")
    assert (result.code, result.out) == (0, "")
    assert "--kernel-name=regex:apply_kernel" in (tools / "ncu.log").read_text()
    assert "profile/apply_kernel.ncu-rep" in " ".join(nsight.advice(["ncu", "--export=profile/apply_kernel"]))


def test_the_exit_code_of_the_tool_is_passed_on(run, tools):
    (tools / "code").write_text("9")
    assert run("--stage", "score").code == 9


def test_a_tool_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr(profiling, "pick_device", lambda name: "cuda")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "nsys is not on PATH" in error(run("--tool", "nsys"))


def test_without_a_gpu_nsight_is_refused(run):
    assert "nsys profiles GPUs, the device is cpu" in error(run("--tool", "nsys", "--device", "cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "unknown model 'nonsense'"),
        (("--stage", "scores"), "did you mean 'score'"),
        (("--tool", "nvprof"), "unknown tool 'nvprof'"),
        (("--stage", "score", "--evaluations", 3), "stage 'score' runs no solver"),
        (("--tool", "ncu"), "name one that a timeline shows"),
        (("--tool", "nsys", "--kernel", "x"), "--kernel is for Nsight Compute"),
        (("--kernel", "(", "--print-command"), "not a regular expression"),
        (("--range", "solve"), "name a kernel as well"),
        (("--tool", "pytorch", "--print-command"), "starts no other program"),
        (("--replay", "none.safetensors"), "does not exist"),
        (("--capture-inputs", "residual"), "unknown operation 'residual'"),
        (("--capture-inputs", "residual_add:0"), "expected OP or OP:N"),
        (("--capture-inputs", "residual_add", "--tool", "none"), "only runs a model"),
    ],
)
def test_bad_options(run, arguments, message):
    assert message in error(run(*arguments, *(() if "--device" in arguments else ("--device", "cpu"))))


# -- captured inputs ------------------------------------------------------------------------------------------------


def memory(tensor):
    """Address modulo a cache line, in elements, and all that describes a tensor but its numbers."""
    return (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.data_ptr() % 64 // tensor.element_size(),
        tensor.requires_grad,
    )


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_tensor_comes_back_as_it_was(tmp_path, layout, dtype):
    values = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    tensor = testing.lay_out(values, layout, torch.Generator().manual_seed(0))
    call = inputs.Call("residual_add", 2, "cpu", "cpu", (tensor, [tensor, None]), {"scale": 0.5})
    inputs.save(call, tmp_path / "call.safetensors")
    back = inputs.load(tmp_path / "call.safetensors")
    assert (back.op, back.number, back.backend, back.kwargs) == ("residual_add", 2, "cpu", {"scale": 0.5})
    for got in (back.args[0], back.args[1][0]):
        assert memory(got) == memory(tensor)
        assert torch.equal(got, tensor)
    assert back.args[1][1] is None


def test_other_arguments_come_back_as_they_were(tmp_path):
    args = (True, 3, -0.1, float("inf"), "up", None, (1, 2.5), [], torch.bfloat16, torch.empty(0, 3))
    inputs.save(inputs.Call("residual_add", 1, "cpu", "cpu", args, {}), tmp_path / "call.safetensors")
    back = inputs.load(tmp_path / "call.safetensors").args
    assert back[:-1] == args[:-1]
    assert [type(a) for a in back] == [type(a) for a in args]
    assert back[-1].shape == (0, 3)
    leaf = torch.ones(2, requires_grad=True)
    inputs.save(inputs.Call("residual_add", 1, "cpu", "cpu", (leaf,), {}), tmp_path / "call.safetensors")
    assert inputs.load(tmp_path / "call.safetensors").args[0].requires_grad


def test_an_argument_of_another_kind_is_refused(tmp_path):
    call = inputs.Call("residual_add", 1, "cpu", "cpu", (object(),), {})
    with pytest.raises(TypeError, match=r"args\.0 is a object"):
        inputs.save(call, tmp_path / "call.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_call_that_was_asked_for_is_caught_before_it_writes():
    x, y = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0)

    def work():
        ops.residual_add(x, x, 1.0)
        ops.residual_add(x, y, 0.5)
        x.zero_()

    call = inputs.capture(work, "residual_add", 2)
    assert call.number == 2
    assert torch.equal(call.args[0], torch.ones(1, 4, 2, 2))
    assert torch.equal(call.args[1], y)
    assert call.backend in REGISTRY["residual_add"].backends()
    assert not trace.active
    with pytest.raises(ValueError, match="residual_add was called 2 times, so there is no call 3"):
        inputs.capture(work, "residual_add", 3)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a").write_text("no")
    with pytest.raises(ValueError, match="cannot read"):
        inputs.load(tmp_path / "a")
    save_file({"x": torch.ones(1)}, tmp_path / "b")
    with pytest.raises(ValueError, match="holds no call"):
        inputs.load(tmp_path / "b")
    for change, message in (({"format": 9}, "format 9"), ({"op": "gone"}, "unknown operation 'gone'")):
        header = {"format": 1, "op": "residual_add", "number": 1, "backend": "cpu", "device": "cpu"}
        header |= {"args": [], "kwargs": {}} | change
        save_file({}, tmp_path / "c", metadata={"lsgm_fast.call": json.dumps(header)})
        with pytest.raises(ValueError, match=message):
            inputs.load(tmp_path / "c")


# -- replay ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(replay, "_TIMED", 0.001)


@pytest.mark.parametrize("spec", ["group_norm_swish:3", "multistep_update", "fir_resample", "mixed_score"])
def test_capture_and_replay(run, quick, spec):
    op, _, number = spec.partition(":")
    stage = "score" if op == "mixed_score" else "sample"
    options = () if stage == "score" else ("--evaluations", 2)
    captured = run(
        "tiny-rgb", "--stage", stage, *options, "-b", 1, "--device", "cpu", "--capture-inputs", spec
    )
    file = f"profile/{op}-{number or 1}.safetensors"
    assert captured.code == 0
    assert f"lsgm-fast profile --replay {file}" in captured.out
    result = run("--replay", file, "--device", "cpu", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["right"]
    outcomes = {outcome["backend"]: outcome for outcome in report["outcomes"]}
    assert list(outcomes) == REGISTRY[op].backends()
    assert sum(outcome["chosen"] for outcome in outcomes.values()) == 1
    assert outcomes["reference"]["error"] < 1e-5
    assert outcomes["reference"]["seconds"] > 0.0
    assert "CUDA" in outcomes["triton"]["refused"]
    assert "reference" in run("--replay", file, "--device", "cpu").out


def test_an_operation_that_writes_to_its_arguments_is_replayed(run, quick):
    options = ("--solver", "rk45", "--tol", 0.5, "-b", 1, "--device", "cpu")
    assert run("tiny-rgb", *options, "--capture-inputs", "rk_drift_stage:2").code == 0
    result = run("--replay", "profile/rk_drift_stage-2.safetensors", "--device", "cpu", "--json")
    assert result.code == 0, result.out


def test_a_wrong_backend_ends_with_1(run, quick, monkeypatch):
    x = torch.randn(1, 4, 2, 2)
    inputs.save(
        inputs.Call("residual_add", 1, "cpu", "cpu", (x, x, 0.5), {}), inputs.Path("call.safetensors")
    )
    op = REGISTRY["residual_add"]
    broken = replace(
        op.impl("reference"), fn=lambda x, h, scale: (x + h) * scale + 1e-3, priority=5, backend="cpu"
    )
    monkeypatch.setattr(op, "_impls", {**op._impls, "cpu": broken})
    monkeypatch.setattr(op, "_order", (broken, op.impl("reference")))
    result = run("--replay", "call.safetensors", "--device", "cpu", "--json")
    assert result.code == 1
    wrong = {outcome["backend"]: outcome["wrong"] for outcome in json.loads(result.out)["outcomes"]}
    assert wrong["reference"] is None
    assert "is wrong at" in wrong["cpu"]


def test_a_captured_call_can_be_profiled_itself(run, tmp_path):
    x = torch.randn(1, 4, 2, 2)
    inputs.save(inputs.Call("residual_add", 1, "cpu", "cpu", (x, x, 0.5), {}), tmp_path / "call.safetensors")
    result = run("--replay", "call.safetensors", "--device", "cpu", "--tool", "pytorch", "--quiet")
    assert result.code == 0
    names = {event["name"].partition(".")[0] for event in annotations(tmp_path / "profile" / "trace.json")}
    assert names == {"residual_add"}
    printed = run("--replay", "call.safetensors", "--kernel", "forward_kernel", "--print-command").out
    assert "profile --replay call.safetensors --device auto" in printed


def test_distance_is_that_from_float64():
    sample = testing.samples("residual_add")[0]
    assert testing.distance("residual_add", "reference", sample) < 1e-6
