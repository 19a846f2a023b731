"""What pyproject.toml cannot say: the list of packages, in which ``kernels/`` becomes ``lsgm_fast.kernels``, and the
compiled libraries.

The libraries are built by CMake (CMakeLists.txt) into ``lsgm_fast/_lib``, with a record of the build beside them.
``LSGM_FAST_BUILD=auto|none|cpu|cuda`` says which; lsgm_fast/env.py describes it and the other variables read here.
They hold no Python and stand on PyTorch's stable ABI, so a wheel with them is tagged ``py3-none-<platform>``, and one
without them ``py3-none-any``. PyTorch is needed as headers only, and is no build requirement: an isolated build would
download gigabytes for it. The headers are those of the environment that the package is being installed into.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
CUDA_ARCHS = "8.0;8.6;8.9;9.0+PTX"


class BuildError(Exception):
    """A library cannot be built. ``log``: the end of what the tools printed."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


def native_module() -> ModuleType:
    """lsgm_fast/native.py, without importing the package, whose dependencies may be absent here."""
    spec = importlib.util.spec_from_file_location("_lsgm_fast_native", ROOT / "lsgm_fast" / "native.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def mode() -> str:
    value = os.environ.get("LSGM_FAST_BUILD") or "auto"
    if value not in MODES:
        raise SystemExit(
            f"environment variable LSGM_FAST_BUILD={value!r}: expected one of {', '.join(MODES)}"
        )
    return value


def cxx_compiler() -> str | None:
    """The C++ compiler that CMake will use: ``CXX``, else the usual names."""
    if os.environ.get("CXX"):
        return shutil.which(shlex.split(os.environ["CXX"])[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def nvcc() -> str | None:
    """The CUDA compiler. A GPU is neither needed nor looked for."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home]
    candidates = [os.environ.get("CUDACXX"), *places, "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, filter(None, candidates))), None)


def torch_package() -> tuple[Path, str] | None:
    """Folder and version of a PyTorch with the stable ABI's headers, or None.

    An isolated build runs the Python of the environment being installed into, but hides its packages from the import
    system: they are found by their place in the file system. Other front ends build in an environment of their own;
    there, ``VIRTUAL_ENV`` names the user's, where one is active.
    """
    minimum = native_module().TORCH_MINIMUM
    places = [Path(os.environ["LSGM_FAST_TORCH"])] if os.environ.get("LSGM_FAST_TORCH") else []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent)
    prefixes = [sys.prefix, os.environ.get("VIRTUAL_ENV"), sys.base_prefix]
    for prefix in filter(None, prefixes):
        for key in ("purelib", "platlib"):
            roots = {
                "base": prefix,
                "platbase": prefix,
                "installed_base": prefix,
                "installed_platbase": prefix,
            }
            places.append(Path(sysconfig.get_path(key, vars=roots)) / "torch")
    for place in dict.fromkeys(places):
        if not (place / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            continue
        found = re.search(r"__version__ = '([^']+)'", (place / "version.py").read_text(encoding="utf-8"))
        version = found.group(1) if found else "0.0"
        if tuple(int(part) for part in version.split(".")[:2]) >= minimum:
            return place, version
    return None


def cmake_architectures(spec: str) -> str:
    """``"8.0;9.0+PTX"`` as CMake spells it: ``80-real;90`` (a bare number is machine code and PTX)."""
    found = []
    for item in filter(None, re.split(r"[;,\s]+", spec)):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", item, re.IGNORECASE)
        if match is None:
            raise BuildError(f"LSGM_FAST_CUDA_ARCHS={spec!r}: expected architectures as in {CUDA_ARCHS!r}")
        found.append(match.group(1) + match.group(2) + ("" if match.group(3) else "-real"))
    if not found:
        raise BuildError(f"LSGM_FAST_CUDA_ARCHS={spec!r} names no architecture: expected {CUDA_ARCHS!r}")
    return ";".join(found)


def code_names(architectures: str) -> list[str]:
    """CMake's ``80-real;90`` as nvcc calls it: ``sm_80``, ``sm_90``, ``compute_90``."""
    names = [f"sm_{item.removesuffix('-real')}" for item in architectures.split(";")]
    return names + [f"compute_{item}" for item in architectures.split(";") if not item.endswith("-real")]


def first_line(*command: str) -> str:
    """What a tool says about its version."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]  # nvcc begins with its name and copyright
    return (release or lines or ["unknown"])[0]


def python_headers() -> list[str] | None:
    """Folders of Python.h and pybind11, for lsgm_fast._C."""
    if importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    folder = sysconfig.get_path("include")
    return [folder, pybind11.get_include()] if (Path(folder) / "Python.h").is_file() else None


class Builder:
    """Builds into ``output``; one CMake tree for what g++ compiles and one for what nvcc compiles."""

    def __init__(self, output: Path, scratch: Path) -> None:
        self.output, self.scratch = output, scratch
        self.cmake = shutil.which("cmake")
        self.ninja = shutil.which("ninja")

    def tools(self) -> tuple[str, tuple[Path, str]]:
        compiler = cxx_compiler()
        if compiler is None:
            wanted = os.environ.get("CXX") or "c++, g++ or clang++"
            raise BuildError(
                f"no C++ compiler was found when lsgm-fast was installed (looked for {wanted}): "
                "install g++ and reinstall lsgm-fast"
            )
        if self.cmake is None:
            raise BuildError(
                "cmake was not found when lsgm-fast was installed: `pip install cmake ninja` and reinstall lsgm-fast"
            )
        torch = torch_package()
        if torch is None:
            raise BuildError(
                "no PyTorch 2.11 or newer was found in the environment that lsgm-fast was installed into: "
                "install PyTorch first, then reinstall lsgm-fast"
            )
        return compiler, torch

    def run(self, *command: str) -> None:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            end = "\n".join(done.stdout.splitlines()[-40:])
            raise BuildError(f"`{shlex.join(command[:3])} ...` failed when lsgm-fast was installed", end)

    def configure(self, name: str, compiler: str, torch: Path, *options: str) -> Path:
        assert self.cmake is not None
        folder = self.scratch / name
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={self.ninja}"] if self.ninja else []
        settings = {
            "CMAKE_CXX_COMPILER": compiler,
            "CMAKE_BUILD_TYPE": "Release",
            "LSGM_TORCH": torch,
            "LSGM_OUTPUT": self.output,
        }
        defines = [f"-D{key}={value}" for key, value in settings.items()]
        self.run(self.cmake, "-S", str(ROOT), "-B", str(folder), *generator, *defines, *options)
        return folder

    def make(self, folder: Path, target: str) -> None:
        assert self.cmake is not None
        jobs = (
            os.environ.get("MAX_JOBS")
            or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
            or str(os.cpu_count() or 1)
        )
        self.run(self.cmake, "--build", str(folder), "--target", target, "--parallel", jobs)

    def describe(
        self, name: str, compiler: str, torch: tuple[Path, str], folder: Path, start: float
    ) -> dict[str, Any]:
        file = self.output / f"liblsgm_fast_ops_{name}.so"
        flags = {}
        for entry in json.loads((folder / "compile_commands.json").read_text(encoding="utf-8")):
            source = Path(entry["file"]).relative_to(ROOT).as_posix()
            words = shlex.split(entry.get("command", ""))
            kept = [
                w
                for w in words[1:]
                if re.match(r"-[OfmDWX]|--gen|-std|--options|arch", w) and "torch" not in w
            ]
            foreign = "cpu.cpp" if name == "cuda" else "cuda.cu"
            if not source.startswith(("csrc/tests/", "csrc/python/")) and not source.endswith(foreign):
                flags.setdefault(source, []).append(" ".join(kept))
        return {
            "built": True,
            "reason": None,
            "file": file.name,
            "bytes": file.stat().st_size,
            "seconds": round(time.monotonic() - start, 1),
            "cxx": first_line(compiler, "--version"),
            "torch_headers": torch[1],
            "flags": flags,
        }

    def cpu(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Builds the CPU library and, if that can be had, ``_C``; returns their records."""
        start = time.monotonic()
        compiler, torch = self.tools()
        headers, options = python_headers(), []
        if headers is not None:
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            options = [f"-DLSGM_PYTHON_INCLUDE={';'.join(headers)}", f"-DLSGM_PYTHON_SUFFIX={suffix}"]
        folder = self.configure("cpu", compiler, torch[0], *options)
        self.make(folder, "lsgm_fast_ops_cpu")
        library = self.describe("cpu", compiler, torch, folder, start)
        if headers is None:
            return library, {"built": False, "reason": "pybind11 or Python.h was not found"}
        try:
            self.make(folder, "_C")
        except BuildError as error:
            return library, {"built": False, "reason": str(error), "log": error.log}
        return library, {"built": True, "reason": None, "file": f"_C{suffix}"}

    def cuda(self) -> dict[str, Any]:
        start = time.monotonic()
        compiler, torch = self.tools()
        cuda_compiler = nvcc()
        if cuda_compiler is None:
            raise BuildError(
                "nvcc was not found when lsgm-fast was installed: install the CUDA toolkit and reinstall lsgm-fast"
            )
        architectures = cmake_architectures(os.environ.get("LSGM_FAST_CUDA_ARCHS") or CUDA_ARCHS)
        folder = self.configure(
            "cuda",
            compiler,
            torch[0],
            "-DLSGM_CPU=OFF",
            "-DLSGM_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={cuda_compiler}",
            f"-DCMAKE_CUDA_HOST_COMPILER={compiler}",
            f"-DLSGM_CUDA_ARCHS={architectures}",
        )
        self.make(folder, "lsgm_fast_ops_cuda")
        record = self.describe("cuda", compiler, torch, folder, start)
        return {
            **record,
            "nvcc": first_line(cuda_compiler, "--version"),
            "architectures": architectures.split(";"),
        }


def build_libraries(output: Path) -> dict[str, Any]:
    """Build what :func:`mode` asks for into ``output``; returns the build record.

    Raises:
        SystemExit: a library that was demanded could not be built.
    """
    native, wanted = native_module(), mode()
    demanded = {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}.get(wanted, ())
    names = ("cpu", "cuda") if wanted == "auto" else demanded
    skipped = f"LSGM_FAST_BUILD={wanted} was set when lsgm-fast was installed: reinstall it without"
    libraries: dict[str, Any] = {name: {"built": False, "reason": skipped} for name in ("cpu", "cuda")}
    extension: dict[str, Any] = {"built": False, "reason": skipped}
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lsgm-fast-build-") as scratch:
        builder = Builder(output, Path(scratch))
        for name in names:
            try:
                if name == "cpu":
                    libraries["cpu"], extension = builder.cpu()
                else:
                    libraries["cuda"] = builder.cuda()
            except BuildError as error:
                if name in demanded:
                    raise SystemExit(f"{error.log}\nerror: LSGM_FAST_BUILD={wanted}, and {error}") from None
                libraries[name] = {"built": False, "reason": str(error), "log": error.log}
                if error.log:
                    print(
                        f"{error.log}\nwarning: lsgm-fast goes without its {name} library: {error}",
                        file=sys.stderr,
                    )
        cmake_version = first_line(builder.cmake, "--version") if builder.cmake else None
    when = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time()))
    return {
        "mode": wanted,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", when),
        "platform": sysconfig.get_platform(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cmake": cmake_version,
        "libraries": libraries,
        "module": extension,
        "sources": {op: native.hash_sources(ROOT, op) for op in native.operations(ROOT)},
    }


class BuildNative(Command):
    """Compile the libraries. ``python setup.py build_native --inplace`` puts them into the source tree."""

    description = "compile the libraries of operators"
    user_options = [  # noqa: RUF012
        ("inplace", "i", "put the libraries into the source tree"),
        ("build-lib=", None, "folder into which the package is built"),
    ]
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib: str | None = None
        self.written: list[str] = []

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        root = ROOT if self.inplace or self.editable_mode else Path(str(self.build_lib))
        package = root / "lsgm_fast"
        libraries = package / "_lib"
        # What an earlier build left must not survive this one, least of all in a wheel.
        shutil.rmtree(libraries, ignore_errors=True)
        for module in package.glob("_C.*"):
            module.unlink()
        record = build_libraries(libraries)
        if record["module"].get("file"):
            (libraries / record["module"]["file"]).replace(package / record["module"]["file"])
            self.written.append(record["module"]["file"])
        (libraries / "build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self.written += [f"_lib/{path.name}" for path in sorted(libraries.iterdir())]
        if any(entry["built"] for entry in record["libraries"].values()):
            self.distribution.has_ext_modules = lambda: (
                True
            )  # platform-specific, as setuptools understands it
        for name, entry in record["libraries"].items():
            print(
                f"lsgm-fast {name} library:", "built" if entry["built"] else f"not built: {entry['reason']}"
            )

    # The protocol by which an editable install asks build steps what they made.
    def get_source_files(self) -> list[str]:
        # What the list of packages does not bring into a source distribution.
        return ["CMakeLists.txt", "CMakePresets.json"]

    def get_outputs(self) -> list[str]:
        return [str(Path(str(self.build_lib)) / "lsgm_fast" / name) for name in self.written]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        names = zip(self.get_outputs(), self.written, strict=True)
        return {output: str(Path("lsgm_fast") / name) for output, name in names}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


class BdistWheel(bdist_wheel):
    def run(self) -> None:
        # Compiled first: the tag, and where the files belong, depend on whether there is anything to compile with.
        self.run_command("build_native")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        interpreter, abi, tag = super().get_tag()
        # The libraries hold no Python. lsgm_fast._C does, and is only seen by the Python that it was built for.
        return (interpreter, abi, tag) if self.root_is_pure else ("py3", "none", tag)


def build_requirements() -> list[str]:
    """What an isolated build still needs on this machine; nothing where nothing can be compiled anyway."""
    if mode() == "none" or cxx_compiler() is None:
        return []
    tools = {"cmake": "cmake>=3.22", "ninja": "ninja"}
    wanted = [requirement for name, requirement in tools.items() if shutil.which(name) is None]
    return wanted if importlib.util.find_spec("pybind11") else [*wanted, "pybind11>=2.12"]


# An isolated build asks for its requirements before it builds; without isolation, what is there is used.
asked = "egg_info" in sys.argv

setup(
    packages=[
        *find_packages(include=["lsgm_fast", "lsgm_fast.*"]),
        "lsgm_fast.kernels",
        *(f"lsgm_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"lsgm_fast.kernels": "kernels"},
    # Nothing else is taken from MANIFEST.in, which is for source distributions.
    include_package_data=False,
    package_data={"lsgm_fast": ["py.typed", "assets/*"]},
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
    setup_requires=build_requirements() if asked else [],
)
