"""Wheel, sdist, editable install and bare source tree: each must give the same package, from every folder."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

import lsgm_fast

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")

# Where lsgm_fast and lsgm_fast.kernels come from, and that no other module object for the kernels exists.
PROBE = """
import importlib, json, os, sys
import lsgm_fast, lsgm_fast.kernels
try:
    importlib.import_module("kernels")
    bare = "imported"
except ImportError as error:
    bare = str(error)
print(json.dumps({
    "package": os.path.realpath(lsgm_fast.__file__), "kernels": os.path.realpath(lsgm_fast.kernels.__file__),
    "version": lsgm_fast.__version__, "bare": bare,
}))
"""


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    # What a developer may have set would put the source tree on the path of every interpreter.
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**inherited, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def probe(python: Path | str, cwd: Path, **environment: str) -> dict[str, str]:
    return json.loads(run(python, "-c", PROBE, cwd=cwd, **environment))


def copy_tree(destination: Path) -> Path:
    """The sources alone, so that a build writes nothing into the repository."""
    generated = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "venv")
    large = {str(ROOT / "tests" / "data"), str(ROOT / "benchmarks" / "results")}

    def left_out(folder: str, names: list[str]) -> set[str]:
        return generated(folder, names) | {n for n in names if os.path.join(folder, n) in large}

    shutil.copytree(ROOT, destination, ignore=left_out)
    return destination


def make_environment(folder: Path) -> Path:
    """A fresh environment that also sees the packages of the running one; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    shared = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    # A path added by a .pth file is searched, but its own .pth files (an editable lsgm_fast) are not read.
    (site / "shared.pth").write_text("\n".join(shared) + "\n")
    return python


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    flags = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", out, tree)
    (path,) = out.iterdir()
    return path


def sources(folder: Path, prefix: str) -> set[str]:
    return {f"{prefix}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}


def test_wheel_holds_every_source_and_no_bare_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in names if n.endswith(".py")} == sources(ROOT / "lsgm_fast", "lsgm_fast") | sources(
        ROOT / "kernels", "lsgm_fast/kernels"
    )
    assets = {f"lsgm_fast/assets/{p.name}" for p in (ROOT / "lsgm_fast" / "assets").glob("*") if p.is_file()}
    assert assets | {"lsgm_fast/py.typed", "lsgm_fast/kernels/__init__.py"} <= names
    info = f"lsgm_fast-{lsgm_fast.__version__}.dist-info"
    assert {n.split("/")[0] for n in names} == {"lsgm_fast", info}


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"lsgm_fast-{lsgm_fast.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "lsgm-fast = lsgm_fast.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_sdist_builds_the_same_wheel(tree, wheel, tmp_path):
    build = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
    run(sys.executable, "-c", build.format("sdist"), tmp_path, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path, filter="data")
    assert {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md", "README.md"} <= names
    assert sources(ROOT / "kernels", "kernels") | sources(ROOT / "tests", "tests") <= names
    unpacked = archive.with_name(archive.name.removesuffix(".tar.gz"))
    (tmp_path / "out").mkdir()
    run(sys.executable, "-c", build.format("wheel"), tmp_path / "out", cwd=unpacked)
    (rebuilt,) = (tmp_path / "out").iterdir()
    assert set(zipfile.ZipFile(rebuilt).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_installed_wheel(wheel, tree, tmp_path):
    python = make_environment(tmp_path / "venv")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    )
    outside = probe(python, tmp_path)
    site = (tmp_path / "venv").resolve()
    assert Path(outside["package"]).is_relative_to(site)
    assert outside["kernels"].endswith("site-packages/lsgm_fast/kernels/__init__.py")
    assert "No module named 'kernels'" in outside["bare"]
    # In the repository the sources hide the wheel, as Python's path rules have it; they must be complete, too.
    inside = probe(python, tree)
    assert inside["package"] == str((tree / "lsgm_fast" / "__init__.py").resolve())
    assert inside["kernels"] == str((tree / "kernels" / "__init__.py").resolve())
    assert "import lsgm_fast.kernels, not kernels" in inside["bare"]
    assert (
        run(tmp_path / "venv" / "bin" / "lsgm-fast", "--version", cwd=tmp_path).split()[1]
        == outside["version"]
    )


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install(tmp_path, mode):
    tree = copy_tree(tmp_path / "tree")
    python = make_environment(tmp_path / "venv")
    flags = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    if mode != "lenient":
        flags.append(f"--config-settings=editable_mode={mode}")
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, "--editable", tree)
    for folder in (tmp_path, tree):
        found = probe(python, folder)
        assert os.path.samefile(found["package"], tree / "lsgm_fast" / "__init__.py")
        assert os.path.samefile(found["kernels"], tree / "kernels" / "__init__.py")
        assert found["bare"] != "imported"


def test_source_tree_without_installing(tree, tmp_path):
    python = make_environment(tmp_path / "venv")
    assert probe(python, tree) == probe(python, tmp_path, PYTHONPATH=str(tree))


def test_kernels_refuse_a_second_name():
    with pytest.raises(AssertionError, match="import lsgm_fast.kernels, not kernels"):
        run(sys.executable, "-c", "import kernels", cwd=ROOT)


# What importing the package must not do, with the packages it stands on imported before.
IMPORTS = """
import sys, time

class Blocker:
    blocked = ("triton", "nvtx", "pybind11", "ninja", "numba", "cupy")
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import numpy, safetensors.torch, scipy.integrate, torch, torch.utils.checkpoint, torchdiffeq

forbidden = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "socket.connect", "ctypes.dlopen")
def audit(event, arguments):
    if event in forbidden:
        raise RuntimeError(f"importing lsgm_fast did {event} {arguments!r}")
sys.addaudithook(audit)

def no_cuda(*args, **kwargs):
    raise RuntimeError("importing lsgm_fast touched CUDA")
for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init", "init"):
    setattr(torch.cuda, name, no_cuda)

start = time.perf_counter()
import importlib, pkgutil
import lsgm_fast
for module in pkgutil.walk_packages(lsgm_fast.__path__[:1], "lsgm_fast."):
    if not module.name.startswith("lsgm_fast.kernels."):  # Triton sources: imported when they are about to run
        importlib.import_module(module.name)
for name in getattr(lsgm_fast, "__all__", []):
    getattr(lsgm_fast, name)
print(time.perf_counter() - start, len([m for m in sys.modules if m.startswith("lsgm_fast")]))
"""


def test_import_needs_no_triton_touches_no_cuda_and_compiles_nothing(tmp_path):
    seconds, modules = run(
        sys.executable, "-c", IMPORTS, cwd=ROOT, TORCH_EXTENSIONS_DIR=str(tmp_path)
    ).split()
    assert os.listdir(tmp_path) == []
    assert int(modules) > 10
    assert float(seconds) < 5, f"importing every module of lsgm_fast took {seconds} s beyond PyTorch itself"


def test_importing_the_package_alone_is_quick():
    start = time.perf_counter()
    loaded = run(sys.executable, "-c", "import lsgm_fast, sys; print('torch' in sys.modules)", cwd=ROOT)
    assert loaded.strip() == "False", "`import lsgm_fast` should load PyTorch on first use, not before"
    assert time.perf_counter() - start < 5


def test_every_package_folder_has_an_init():
    for folder in (ROOT / "lsgm_fast", ROOT / "kernels"):
        for source in folder.rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), f"{source} would be missing from a wheel"


def test_the_version_is_one_literal():
    assigned = []
    for node in ast.parse((ROOT / "lsgm_fast" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            assigned.append(ast.literal_eval(node.value))
    assert assigned == [lsgm_fast.__version__]
    assert f'version = "{lsgm_fast.__version__}"' not in (ROOT / "pyproject.toml").read_text()


def test_changelog_names_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{lsgm_fast.__version__}]" in text or "[Unreleased]" in text


def test_kernels_and_references_are_named_after_operations():
    operations = {p.stem for p in (ROOT / "lsgm_fast" / "ops").glob("[a-z]*.py")}
    for folder in ("lsgm_fast/reference", "kernels"):
        stems = {p.stem for p in (ROOT / folder).glob("[a-z]*.py")}
        assert stems <= operations, f"{folder} holds files that are no operation: {stems - operations}"
    assert operations == {p.stem for p in (ROOT / "lsgm_fast" / "reference").glob("[a-z]*.py")}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_makefile_refuses_an_old_python_and_a_folder_that_is_no_environment(tmp_path):
    def make(*arguments: str) -> str:
        done = subprocess.run(
            ["make", "--no-print-directory", "-C", ROOT, "demo", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        return done.stderr

    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    assert "needs Python 3.10" in make(f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert "not a virtual environment" in make(f"PYTHON={sys.executable}", f"VENV={precious}")
    assert (precious / "thesis.txt").read_text() == "years"
