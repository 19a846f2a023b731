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
from typing import Any

import pytest

import lsgm_fast
import lsgm_fast.native

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
    ours = ("PYTHONPATH", "PYTHONHOME", "LSGM_FAST_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        # Nothing is compiled but where a test asks for it.
        env={**inherited, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "LSGM_FAST_BUILD": "none", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def probe(python: Path | str, cwd: Path, **environment: str) -> dict[str, str]:
    return json.loads(run(python, "-c", PROBE, cwd=cwd, **environment))


def copy_tree(destination: Path) -> Path:
    """The sources alone, so that a build writes nothing into the repository."""
    generated = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "dist", "*.egg-info", "venv", "_lib", "*.so"
    )
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
    for folder in ("kernels", "tests", "examples"):
        assert sources(ROOT / folder, folder) <= names
    assert {"examples/README.md", "examples/tour.ipynb"} <= names
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


# What is compiled, with and without the tools for it.

HAS_COMPILER = all(map(shutil.which, ("c++", "cmake", "nm")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler, or no cmake")

LOADED = """
import json
from lsgm_fast import native
library = native.cpu()
print(json.dumps({"loaded": library.loaded, "path": library.path, "reason": library.reason,
                  "module": native.module() is not None, "sources": (library.build or {}).get("sources")}))
"""


def build_native(tree: Path, folder: Path, **environment: str) -> dict[str, Any]:
    """What the build record says, after `setup.py build_native` into `folder`."""
    run(sys.executable, "setup.py", "build_native", f"--build-lib={folder}", cwd=tree, **environment)
    return json.loads((folder / "lsgm_fast" / "_lib" / "build.json").read_text())


def test_nothing_compiled_on_request(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    assert not [n for n in archive.namelist() if n.endswith(".so")]
    record = json.loads(archive.read("lsgm_fast/_lib/build.json"))
    assert record["mode"] == "none"
    for library in record["libraries"].values():
        assert not library["built"] and "LSGM_FAST_BUILD=none" in library["reason"]


def test_without_a_compiler_the_rest_works_and_the_reason_is_kept(tree, tmp_path):
    record = build_native(tree, tmp_path, LSGM_FAST_BUILD="auto", CXX="/nowhere/g++")
    assert {p.name for p in (tmp_path / "lsgm_fast" / "_lib").iterdir()} == {"build.json"}
    for library in record["libraries"].values():
        assert "no C++ compiler was found" in library["reason"] and "/nowhere/g++" in library["reason"]
    # As the installed package would say it.
    code = "import pathlib, sys; from lsgm_fast import native; native._PACKAGE = pathlib.Path(sys.argv[1])"
    package = tmp_path / "lsgm_fast"
    said = run(sys.executable, "-c", f"{code}; print(native.cpu().reason)", package, cwd=ROOT)
    assert "not built: no C++ compiler was found" in said and "install g++" in said


@needs_compiler
def test_a_compiler_that_fails_costs_the_libraries_only(tree, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    record = build_native(tree, tmp_path / "out", LSGM_FAST_BUILD="auto", CXX=str(broken))
    assert not record["libraries"]["cpu"]["built"]
    assert "failed when lsgm-fast was installed" in record["libraries"]["cpu"]["reason"]
    assert "broken" in record["libraries"]["cpu"]["log"]


@pytest.mark.parametrize(
    ("build", "compiler", "message"),
    [
        ("cpu", "/nowhere/g++", "no C++ compiler was found"),
        ("cuda", "/nowhere/g++", "no C++ compiler was found"),
        ("fast", "", "expected one of auto, none, cpu, cuda"),
    ],
)
def test_what_is_demanded_and_cannot_be_had_fails(tree, tmp_path, build, compiler, message):
    with pytest.raises(AssertionError) as failure:
        build_native(tree, tmp_path, LSGM_FAST_BUILD=build, CXX=compiler)
    assert message in str(failure.value) and f"LSGM_FAST_BUILD={build}" in str(failure.value).replace("'", "")


def value_in_setup(tree: Path, call: str, *flags: str, **environment: str) -> str:
    """The value of an expression over the functions of setup.py."""
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '--version']; f = runpy.run_path('setup.py'); print(f%s)"
    )
    return run(sys.executable, *flags, "-c", code % call, cwd=tree, **environment).splitlines()[-1]


def test_cuda_architectures(tree):
    for text, expected in (
        ("8.0;9.0+PTX", "80-real;90"),
        ("90a, 10.0+PTX", "90a-real;100"),
        ("8.6", "86-real"),
    ):
        assert value_in_setup(tree, f"['cmake_architectures']({text!r})") == expected
    with pytest.raises(AssertionError, match="LSGM_FAST_CUDA_ARCHS='Hopper': expected architectures as in"):
        value_in_setup(tree, "['cmake_architectures']('Hopper')")


def test_the_headers_of_pytorch_are_found_where_the_import_system_does_not_look(tree):
    import torch

    installed = Path(torch.__file__).parent
    if installed.parent not in [Path(sysconfig.get_path(k)) for k in ("purelib", "platlib")]:
        pytest.skip("PyTorch is not installed in this environment itself")
    # -S hides what is installed, as an isolated build does; setuptools alone is put back. It hides, too, that this is a
    # virtual environment, which is what build front ends with an environment of their own tell by VIRTUAL_ENV.
    import setuptools

    own = Path(setuptools.__file__).parent
    view = make_view(tree, own, own.parent / "_distutils_hack")
    found = value_in_setup(tree, "['torch_package']()[0]", "-S", PYTHONPATH=str(view), VIRTUAL_ENV=sys.prefix)
    assert Path(found).samefile(installed)


def make_view(tree: Path, *packages: Path) -> Path:
    """A folder that holds these packages and no others."""
    view = tree.parent / "view"
    view.mkdir(exist_ok=True)
    for package in packages:
        if not (view / package.name).exists():
            (view / package.name).symlink_to(package)
    return view


def copy_tree_with_one_operator(destination: Path) -> Path:
    """As :func:`copy_tree`, with the compiled sources of ``mixture_logistic`` alone, which has all instruction sets.

    Where a library ends up and who finds it does not depend on how much is in it. That all of it compiles is shown by
    the library that test_native.py tests: the installed one, or one that it compiles.
    """
    copy_tree(destination)
    for folder in (destination / "csrc").iterdir():
        if folder.name not in ("mixture_logistic", "common", "python", "tests"):
            shutil.rmtree(folder)
    for source in (destination / "csrc" / "tests").glob("*.cpp"):
        if source.stem != "main" and not source.stem.startswith("mixture_logistic"):
            source.unlink()
    return destination


@pytest.fixture(scope="module")
def compiled_wheel(tmp_path_factory) -> Path:
    tree = copy_tree_with_one_operator(tmp_path_factory.mktemp("one") / "tree")
    out = tmp_path_factory.mktemp("compiled")
    flags = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    command = (sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", out, tree)
    run(*command, LSGM_FAST_BUILD="cpu")
    (path,) = out.iterdir()
    return path


@needs_compiler
def test_a_compiled_wheel_serves_every_python(compiled_wheel, wheel, tmp_path):
    assert compiled_wheel.name.startswith(f"lsgm_fast-{lsgm_fast.__version__}-py3-none-linux_")
    names = set(zipfile.ZipFile(compiled_wheel).namelist())
    binaries = {n for n in names if n.endswith(".so")}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert "lsgm_fast/_lib/liblsgm_fast_ops_cpu.so" in binaries
    assert binaries <= {"lsgm_fast/_lib/liblsgm_fast_ops_cpu.so", f"lsgm_fast/_C{suffix}"}
    record = json.loads(zipfile.ZipFile(compiled_wheel).read("lsgm_fast/_lib/build.json"))
    assert record["libraries"]["cpu"]["built"] and not record["libraries"]["cuda"]["built"]
    assert record["sources"] and set(record) >= {"date", "cmake", "platform", "python", "mode"}
    assert any(
        "-mavx2" in f for f in record["libraries"]["cpu"]["flags"]["csrc/mixture_logistic/cpu.cpp"]
    ) or ("x86" not in record["platform"])

    python = make_environment(tmp_path / "venv")
    install = ("install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, *install, compiled_wheel)
    found = json.loads(run(python, "-c", LOADED, cwd=tmp_path))
    assert found["loaded"], found["reason"]
    assert Path(found["path"]).is_relative_to((tmp_path / "venv").resolve())
    assert found["module"] == any("_C" in n for n in binaries)
    assert found["sources"]["mixture_logistic"] == lsgm_fast.native.source_hash("mixture_logistic")


OTHERS = [f"python3.{minor}" for minor in (10, 11, 12, 13) if minor != sys.version_info.minor]


@needs_compiler
@pytest.mark.parametrize("other", OTHERS)
def test_a_compiled_wheel_under_another_python(compiled_wheel, tmp_path, other):
    python = shutil.which(other)
    if python is None:
        pytest.skip(f"no {other} beside the running Python")
    if subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode:
        pytest.skip(f"{other} does not start, or has no pip")
    target = tmp_path / "site"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--target", target)
    run(python, "-m", "pip", *install, compiled_wheel)  # refuses a wheel whose tag it does not accept
    code = "import lsgm_fast, lsgm_fast.kernels; from lsgm_fast import native; print(native.folder(), native.module())"
    said = run(python, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    folder, module = said.split()
    assert (Path(folder) / "liblsgm_fast_ops_cpu.so").is_file()
    assert module == "None"
    has_torch = (
        subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0
    )
    if has_torch:
        assert json.loads(run(python, "-c", LOADED, cwd=tmp_path, PYTHONPATH=str(target)))["loaded"]


@needs_compiler
def test_an_editable_install_finds_what_it_compiled(tmp_path):
    tree = copy_tree_with_one_operator(tmp_path / "tree")
    python = make_environment(tmp_path / "venv")
    flags = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--editable", tree]
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, LSGM_FAST_BUILD="cpu")
    found = json.loads(run(python, "-c", LOADED, cwd=tmp_path))
    assert found["loaded"], found["reason"]
    assert Path(found["path"]).samefile(tree / "lsgm_fast" / "_lib" / "liblsgm_fast_ops_cpu.so")
    # A later build without the libraries takes them away.
    run(sys.executable, "setup.py", "build_native", "--inplace", cwd=tree)
    assert [p.name for p in (tree / "lsgm_fast" / "_lib").iterdir()] == ["build.json"]
    assert "LSGM_FAST_BUILD=none" in json.loads(run(python, "-c", LOADED, cwd=tmp_path))["reason"]


def test_source_tree_without_installing(tree, tmp_path):
    python = make_environment(tmp_path / "venv")
    assert probe(python, tree) == probe(python, tmp_path, PYTHONPATH=str(tree))


def test_kernels_refuse_a_second_name():
    with pytest.raises(AssertionError, match="import lsgm_fast.kernels, not kernels"):
        run(sys.executable, "-c", "import kernels", cwd=ROOT)


# What importing the package must not do, with the packages it stands on imported before.
IMPORTS = """
import sys, time

# None makes an import fail and a search for the module find nothing, as where it is not installed.
for name in ("triton", "nvtx", "pybind11", "ninja", "numba", "cupy"):
    sys.modules[name] = None
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
