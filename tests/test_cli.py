from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lsgm_fast
from lsgm_fast import cli, env, info, sampling
from lsgm_fast.commands.sampling import GRID_LIMIT
from lsgm_fast.errors import NonFiniteError


class FakeModel:
    """Draws grey squares; image i has the level (seed + i) / 255."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.stop_after: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.nfe = [26]
        self.config = None
        self.precision = None

    def compile_for_inference(self, *, precision):
        self.precision = precision

    def sample(self, n, *, seed=0, batch_size=None, on_batch=None, **options):
        self.calls.append({"n": n, "seed": seed, "batch_size": batch_size, **options})
        done = []
        for batch, first in enumerate(range(0, n, batch_size or n)):
            if batch == self.stop_after:
                raise self.error
            size = min(batch_size or n, n - first)
            levels = (seed + first + torch.arange(size).float()) / 255
            done.append(levels.reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28))
            nfe = self.nfe[batch % len(self.nfe)]
            backends = {"rk_stage": "reference"}
            on_batch(done[-1], SimpleNamespace(nfe=nfe, solver="rk45", reason="", backends=backends))
        return torch.cat(done)


@pytest.fixture
def model(monkeypatch, tmp_path):
    fake = FakeModel()
    fake.loaded = []

    def load(path, device="cpu"):
        fake.loaded.append((path, device))
        return fake

    monkeypatch.setattr(lsgm_fast, "load", load, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def run(capsys):
    def call(*arguments: object):
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def one_error(result) -> str:
    """The only line on standard error; standard output must be empty."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    return result.err


# ---------------------------------------------------------------- sampling


def test_demo_draws_64_and_reports(model, run, tmp_path):
    result = run("demo", "--device", "cpu")
    assert result.code == 0
    assert result.err == ""
    assert model.loaded == [("demo", "cpu")]
    assert model.calls[0]["n"] == 64
    assert "NFE 26" in result.out
    assert "s per sample" in result.out
    assert "samples.png" in result.out
    assert os.listdir(tmp_path) == ["samples.png"]
    grid = pixels("samples.png")
    assert grid.shape == (8 * 58 + 2, 8 * 58 + 2)
    assert [grid[30 + 58 * (i // 8), 30 + 58 * (i % 8)] for i in range(64)] == list(range(64))


def test_sample_passes_every_option_on(model, run):
    result = run(
        *(
            "sample",
            "a.pt",
            "-n",
            3,
            "--seed",
            5,
            "--solver",
            "ancestral",
            "--evaluations",
            20,
            "--ode-eps",
            1e-4,
            "--grid",
            "uniform",
        ),
        *(
            "--temperature",
            0.7,
            "--vae-temperature",
            0.6,
            "--bn",
            "batch",
            "--batch-size",
            2,
            "--device",
            "cpu",
        ),
    )
    assert result.code == 0
    assert model.loaded == [("a.pt", "cpu")]
    assert model.calls == [
        {
            "n": 3,
            "seed": 5,
            "batch_size": 2,
            "solver": "ancestral",
            "tol": None,
            "evaluations": 20,
            "ode_eps": 1e-4,
            "grid": "uniform",
            "temperature": 0.7,
            "vae_temperature": 0.6,
            "bn": "batch",
            "progress": False,
        }
    ]


def test_sample_in_a_precision(model, run):
    result = run("sample", "model.pt", "-n", 2, "--precision", "bf16", "--json")
    assert model.precision == json.loads(result.out)["precision"] == "bf16"


def test_number_has_a_short_name_and_an_alias(model, run):
    for option in ("-n", "--num", "--number"):
        assert run("sample", "demo", option, 3, "--device", "cpu").code == 0
    assert [call["n"] for call in model.calls] == [3, 3, 3]


def test_sample_leaves_unset_options_to_the_model(model, run):
    run("sample", "demo", "--device", "cpu")
    assert {k: v for k, v in model.calls[0].items() if v is None}.keys() == {
        *("tol", "evaluations", "ode_eps", "grid", "bn", "batch_size")
    }


@pytest.mark.parametrize(
    ("out", "files"),
    [
        ("grid.png", {"grid.png", "grid.npz", "grid/00000.png", "grid/00001.png", "grid/00002.png"}),
        (
            "new/run1",
            {f"new/run1/{f}" for f in ("samples.png", "samples.npz", "00000.png", "00001.png", "00002.png")},
        ),
        ("all.npz", {"all.npz", "all/00000.png", "all/00001.png", "all/00002.png"}),
    ],
)
def test_output_places(model, run, tmp_path, out, files):
    arguments = (
        "sample",
        "demo",
        "-n",
        3,
        "--batch-size",
        2,
        "--seed",
        9,
        "--out",
        out,
        "--individual",
        "--npz",
    )
    assert run(*arguments, "--quiet", "--device", "cpu").code == 0
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written == files
    npz = next(f for f in files if f.endswith(".npz"))
    with np.load(npz) as stored:
        assert stored["arr_0"].shape == (3, 28, 28, 1)
        assert stored["arr_0"][:, 0, 0, 0].tolist() == [9, 10, 11]
    last = next(f for f in files if f.endswith("00002.png"))
    assert (pixels(last) == 11).all()


def test_an_existing_folder_with_a_dot_is_a_folder(model, run, tmp_path):
    (tmp_path / "run.v2").mkdir()
    run("sample", "demo", "-n", 1, "--out", "run.v2", "--device", "cpu")
    assert os.listdir(tmp_path / "run.v2") == ["samples.png"]


def test_a_long_run_shows_the_first_images_in_the_grid(model, run):
    result = run("sample", "demo", "-n", GRID_LIMIT + 1, "--npz", "--device", "cpu")
    assert f"the first {GRID_LIMIT}" in result.out
    assert pixels("samples.png").shape == (16 * 58 + 2, 16 * 58 + 2)
    with np.load("samples.npz") as stored:
        assert len(stored["arr_0"]) == GRID_LIMIT + 1


def test_json_is_one_object_and_nothing_else(model, run):
    result = run("sample", "demo", "-n", 4, "--npz", "--json", "--device", "cpu")
    assert result.code == 0
    assert result.err == ""
    report = json.loads(result.out)
    assert report["nfe"] == 26
    assert report["number"] == 4
    assert report["image_shape"] == [28, 28, 1]
    assert report["files"] == {"grid": "samples.png", "npz": "samples.npz"}
    assert report["seconds_per_sample"] == pytest.approx(report["seconds"] / 4)
    assert report["interrupted"] is False


def test_evaluations_are_averaged_over_the_images(model, run):
    model.nfe = [20, 50]
    report = json.loads(run("sample", "demo", "-n", 3, "--batch-size", 2, "--json", "--device", "cpu").out)
    assert report["nfe_per_batch"] == [20, 50]
    assert report["nfe"] == 30


def test_quiet_prints_nothing(model, run):
    result = run("demo", "--quiet", "--device", "cpu")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_progress_bar_only_on_a_terminal_and_not_when_silenced(model, run, monkeypatch, flag):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run("demo", "--device", "cpu")
    run("demo", "--device", "cpu", flag)
    assert [call["progress"] for call in model.calls] == [True, False]


# ---------------------------------------------------------------- interruptions and failures


def test_ctrl_c_saves_finished_batches_and_says_so(model, run):
    model.stop_after = 2
    result = run("sample", "demo", "-n", 8, "--batch-size", 3, "--npz", "--individual", "--device", "cpu")
    assert result.code == 130
    assert "6 of 8 images were finished, saved to samples.png, samples.npz, samples" in result.err
    with np.load("samples.npz") as stored:
        assert stored["arr_0"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(os.listdir("samples")) == 6


def test_ctrl_c_in_the_first_batch_writes_nothing(model, run, tmp_path):
    model.stop_after = 0
    result = run("demo", "--device", "cpu")
    assert result.code == 130
    assert "no batch was finished" in result.err
    assert os.listdir(tmp_path) == []


def test_ctrl_c_with_json(model, run):
    model.stop_after = 1
    result = run("sample", "demo", "-n", 4, "--batch-size", 2, "--json", "--device", "cpu")
    assert result.code == 130
    assert json.loads(result.out) == {"interrupted": True, "number": 2, "files": {"grid": "samples.png"}}


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteError("NaN from the network at step 3, t=0.5"),
        sampling.SolverError("NaN from the network: too small"),
    ],
)
def test_a_failing_computation_saves_what_is_finished(model, run, error):
    model.stop_after, model.error = 1, error
    result = run("sample", "demo", "-n", 4, "--batch-size", 2, "--device", "cpu")
    assert result.code == 1
    assert "error: NaN from the network" in result.err
    assert "2 of 4 images were finished" in result.err
    assert os.path.exists("samples.png")


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_without_source_code(model, run, monkeypatch):
    def load(path, device):
        warnings.warn("weights are licensed\nfor non-commercial use", stacklevel=2)
        return model

    monkeypatch.setattr(lsgm_fast, "load", load)
    result = run("demo", "--json", "--device", "cpu")
    assert result.err == "note: weights are licensed for non-commercial use\n"
    assert json.loads(result.out)["number"] == 64


def test_a_defect_keeps_its_traceback(model, monkeypatch):
    model.stop_after, model.error = 0, RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["demo", "--device", "cpu"])


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    lsgm_fast.build("tiny-binary").save(path)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lsgm_fast.cli", *map(str, arguments)]


def test_ctrl_c_on_a_real_run(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = command(
        "sample", tiny_checkpoint, "-n", 100_000, "--batch-size", 2, "--out", out, "--individual", "--npz"
    )
    # In a process group of its own: the interrupt must reach this process alone. What runs in the background of a
    # shell ignores interrupts, and so would its children.
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "00003.png").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, message
    finished = int(message.split("stopped: ")[1].split()[0])
    assert 4 <= finished < 100_000
    with np.load(out / "samples.npz") as stored:
        assert len(stored["arr_0"]) == finished
    names = {f"{i:05d}.png" for i in range(finished)} | {"samples.png", "samples.npz"}
    assert set(os.listdir(out)) - names <= {f"{finished:05d}.png", f"{finished + 1:05d}.png"}
    assert names <= set(os.listdir(out))


def test_a_real_model_end_to_end(tiny_checkpoint, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("-n", 5, "--seed", 3, "--npz", "--json", "--device", "cpu")
    chosen = json.loads(run("sample", tiny_checkpoint, *arguments, "--out", "auto.png").out)
    assert chosen["solver"] == "exponential" and "about as near" in chosen["reason"]
    arguments = (*arguments, "--solver", "rk45")
    whole = json.loads(run("sample", tiny_checkpoint, *arguments, "--out", "a.png").out)
    assert whole["solver"] == "rk45" and whole["reason"] == ""
    assert (
        whole["nfe"] - 2
    ) % 6 == 0  # SciPy's count: two to choose the first step, six for each attempted one
    assert set(whole["backends"]) >= {"rk_drift_stage", "rk_drift_finish", "rk_control"}
    assert run("sample", tiny_checkpoint, *arguments, "--out", "b.png").code == 0
    with np.load("a.npz") as a, np.load("b.npz") as b:
        assert a["arr_0"].shape == (5, 28, 28, 1)
        assert np.array_equal(a["arr_0"], b["arr_0"])
    assert run("convert", tiny_checkpoint, "published.pt", "--quiet").code == 0
    assert run("sample", "published.pt", *arguments, "--out", "c.png").code == 0
    with np.load("a.npz") as a, np.load("c.npz") as c:
        assert np.array_equal(a["arr_0"], c["arr_0"])


def test_a_real_model_rejects_names_with_suggestions(tiny_checkpoint, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (("--solver", "rk54"), "did you mean 'rk4"),
        (("--bn", "runing"), "did you mean 'running'"),
        (("--evaluations", "10", "--solver", "rk45"), "ancestral"),
        (("--tol", "-1"), "-1"),
    ):
        result = run("sample", tiny_checkpoint, "-n", 1, "--device", "cpu", *arguments)
        assert result.code == 2
        assert message in result.err
        assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample",), "MODEL"),
        (("sampel", "x"), "sampel"),
        (("sample", "demo", "-n", "0"), "--number"),
        (("sample", "demo", "--sed", "1"), "--sed"),
        (("sample", "demo", "--tol", "1e-3", "--evaluations", "9"), "not both"),
        (("sample", "demo", "--out", "x.jpg"), "x.jpg"),
        (("sample", "demo", "--shards", "0"), "--shards"),
        (("sample", "demo", "--shards", "5"), "give --out a folder, without a dot, got 'samples.png'"),
        (("sample", "demo", "--shards", "5", "--out", "x", "--npz"), "leave --individual and --npz out"),
        (("demo", "--device", "cdua"), "did you mean 'cuda'"),
        (("demo", "--device", "meta"), "'meta' cannot be used"),
        (("convert", "a.pt", "b.bin"), ".safetensors"),
        (("convert", "missing.pt", "b.safetensors"), "'missing.pt' does not exist"),
    ],
)
def test_bad_input_is_one_line_and_code_2(model, run, tmp_path, arguments, message):
    assert message in one_error(run(*arguments))
    assert model.calls == []
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_on_a_machine_without(model, run, device):
    assert "--device cpu" in one_error(run("demo", "--device", device))


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--out", "file/x.png"),
        ("sample", "demo", "--out", "file/folder"),
        ("sample", "demo", "--out", "file.png", "--individual"),
        ("sample", "demo", "--out", "file"),
    ],
)
def test_an_unwritable_place_is_found_before_the_model_is_loaded(model, run, tmp_path, arguments):
    (tmp_path / "file").write_bytes(b"")
    assert "file is not a folder" in one_error(run(*arguments))
    assert model.loaded == []
    assert os.listdir(tmp_path) == ["file"]


def test_the_models_own_complaint_becomes_one_line(model, run):
    model.stop_after, model.error = 0, ValueError("unknown solver 'rk54'\n  expected one of 'rk45'")
    result = run("sample", "demo", "--solver", "rk54", "--device", "cpu")
    assert result.code == 2
    assert "error: unknown solver 'rk54'; expected one of 'rk45'\n" in result.err


# ---------------------------------------------------------------- convert


@pytest.fixture
def converter(monkeypatch, tmp_path):
    def convert(source, destination, dtype=None):
        Path(destination).write_bytes(
            Path(source).read_bytes().upper() + (b" 16" if dtype == torch.float16 else b"")
        )

    monkeypatch.setattr(lsgm_fast, "convert", convert, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"weights")
    return tmp_path


def test_convert(converter, run):
    result = run("convert", "a.pt", "b.safetensors")
    assert result.code == 0
    assert "a.pt -> b.safetensors" in result.out
    assert (converter / "b.safetensors").read_bytes() == b"WEIGHTS"
    assert (
        json.loads(run("convert", "a.pt", "b.safetensors", "--force", "--half", "--json").out)["bytes"] == 10
    )
    assert (converter / "b.safetensors").read_bytes() == b"WEIGHTS 16"


def test_convert_does_not_replace_without_force(converter, run):
    (converter / "b.pt").write_bytes(b"precious")
    assert "--force" in one_error(run("convert", "a.pt", "b.pt"))
    assert (converter / "b.pt").read_bytes() == b"precious"


def test_a_failed_conversion_leaves_nothing(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 and then nothing")
    assert "a.pt" in one_error(run("convert", "a.pt", "b.safetensors"))
    assert os.listdir(tmp_path) == ["a.pt"]


# ---------------------------------------------------------------- info, help, environment


def test_info_lists_every_operation(run):
    report = json.loads(run("info", "--json").out)
    assert report["torch"]["version"] == torch.__version__
    assert report["lsgm_fast"]["version"] == lsgm_fast.__version__
    entries = report["operations"]["mixed_score"]
    assert [e["backend"] for e in entries] == ["cpu", "cuda", "triton", "reference"]
    assert entries[-1]["why_not"] == {"cpu": None, "cuda": None}
    assert entries[0]["why_not"]["cuda"] is not None
    assert set(report["backends"]) >= {
        e["backend"] for entries in report["operations"].values() for e in entries
    }
    text = run("info").out
    for name in report["operations"]:
        assert name in text
    assert (report["cuda"]["why_none"] is None) == bool(report["cuda"]["devices"])


def test_info_asks_the_driver_without_touching_cuda(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 9.0, 580.1'\necho 'GB10, [N/A], 12.1, 580.1'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    devices = info.collect()["cuda"]["devices"]
    assert devices[0] == {
        "name": "NVIDIA H100 80GB HBM3",
        "memory_mib": 81559,
        "capability": "9.0",
        "driver": "580.1",
    }
    assert devices[1]["memory_mib"] is None


def test_info_survives_a_broken_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    cuda = info.collect()["cuda"]
    assert cuda["devices"] == []
    assert "nvidia-smi failed" in cuda["why_none"]


def test_info_says_why_triton_is_not_usable(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    triton = info.collect()["triton"]
    assert triton["version"] is None
    assert "triton" in triton["why_not"]


def test_version(run):
    assert run("--version").out == f"lsgm-fast {lsgm_fast.__version__}\n"


def test_help_explains_every_command_and_solver(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("demo", "sample", "convert", "info"):
        assert command in run().out
        result = run(command, "--help")
        assert result.code == 0
        if command != "info":
            assert "Examples" in result.out
    text = run("sample", "--help").out
    for solver in ("auto", "rk45", "exponential", "ancestral", "log_snr"):
        assert solver in text


def test_help_and_version_do_not_import_torch():
    code = (
        "import sys; from lsgm_fast import cli; a = cli.main(['sample', '--help']); b = cli.main(['--version']); "
        "sys.exit(a or b or int('torch' in sys.modules or 'scipy' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


OPS = ("group_norm_swish", "mixed_score")
BACKENDS = ("auto", "reference", "triton")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", (None, {})),
        ("  ", (None, {})),
        ("triton", ("triton", {})),
        (" triton , group_norm_swish = reference", ("triton", {"group_norm_swish": "reference"})),
        ("mixed_score=triton,reference", ("reference", {"mixed_score": "triton"})),
    ],
)
def test_backend_variable(spec, expected):
    assert env.backend_from_env(BACKENDS, OPS, {env.BACKEND: spec}) == expected
    assert env.parse_backend_spec(spec, BACKENDS, OPS) == expected


def test_backend_variable_unset():
    assert env.backend_from_env(BACKENDS, OPS, {}) == (None, {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tritn", "unknown backend 'tritn'.*'auto', 'reference', 'triton'; did you mean 'triton'"),
        ("mixed_scor=triton", "unknown operation 'mixed_scor'.*did you mean 'mixed_score'"),
        ("mixed_score=fast", "unknown backend 'fast'"),
        ("triton,reference", "two default backends"),
        ("mixed_score=triton,mixed_score=reference", "'mixed_score' is given twice"),
        ("triton,", "empty item"),
        ("=triton", "unknown operation ''"),
    ],
)
def test_backend_variable_errors_name_the_variable(spec, message):
    with pytest.raises(ValueError, match=f"LSGM_FAST_BACKEND.*{message}"):
        env.backend_from_env(BACKENDS, OPS, {env.BACKEND: spec})


def test_info_reads_validation_records(tmp_path, monkeypatch):
    from lsgm_fast import info, native

    monkeypatch.setattr(info, "__file__", str(tmp_path / "lsgm_fast" / "info.py"))
    folder = tmp_path / "benchmarks" / "results"
    for machine, source, failures in (
        ("a100", native.source_hash("mixed_score"), []),
        ("h100", "old", ["x: wrong"]),
    ):
        (folder / machine).mkdir(parents=True)
        kernel = {
            "op": "mixed_score",
            "backend": "cuda",
            "source_hash": source,
            "passed": 3,
            "failures": failures,
        }
        record = {"date": "2026-01-02T03:04:05", "kernels": [kernel]}
        (folder / machine / "kernels.json").write_text(json.dumps(record))
    (folder / "broken").mkdir()
    (folder / "broken" / "kernels.json").write_text("{")
    found = info.validations("mixed_score", "cuda")
    assert [(v["machine"], v["passed"], v["current"]) for v in found] == [
        ("a100", True, True),
        ("h100", False, False),
    ]
    assert info.validations("mixed_score", "triton") == []
