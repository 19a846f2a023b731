"""Compiles every GPU kernel ahead of time, with no GPU at hand, and reads what the compilers made of it.

``kernels/*.py`` (Triton, its list ``AOT``) and ``csrc/*/cuda.cu`` (nvcc) are compiled to machine code for
:data:`TARGETS`. For each kernel: registers per thread, bytes spilled to local memory, shared memory (from ptxas'
own report), and the widths of the loads from and stores to global memory (from the disassembly).

    python -m lsgm_fast.aot                          print the table
    python -m lsgm_fast.aot --write docs/kernels.md  write it
    python -m lsgm_fast.aot --check docs/kernels.md  exit with 1 where it is not what the sources give

Works on a source tree and needs Triton for the Triton kernels (the wheel brings ptxas and nvdisasm) and nvcc for the
CUDA sources. Results are kept in the cache folder under a hash of sources and compiler versions.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lsgm_fast import env, files

TARGETS = (80, 90)
"""Compute capabilities (x 10) that are compiled for."""

LANGUAGES = ("triton", "cuda")

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE.parent

NVCC_FLAGS = ("-O3", "-std=c++17")
"""As in the build; the kernels' sources include nothing of PyTorch."""


@dataclass(frozen=True)
class Resources:
    """What one kernel uses on one target.

    ``registers`` per thread; ``spilled`` bytes per thread of spill stores and loads, and of any other stack frame;
    ``shared`` bytes per block; ``loads`` and ``stores``: width in bits -> number of instructions on global memory.
    """

    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


@dataclass(frozen=True)
class Kernel:
    """One compiled specialisation.

    ``widest``: bits that its widest load and its widest store must reach (None: nothing was promised). Triton kernels
    give it in ``AotSpec``. A CUDA kernel whose last template argument is a number N > 1 handles N elements at a time:
    it promises 128. A kernel named ``generate_*`` makes its results out of nothing but a few numbers: what it promises
    are its stores.
    """

    op: str
    name: str
    case: str
    widest: int | None
    resources: dict[int, Resources]

    def problems(self) -> list[str]:
        """Why this machine code is not good enough, one sentence for each fault; empty where it is."""
        found = []
        for target, used in sorted(self.resources.items()):
            where = f"{self.op} {self.name} ({self.case}) on sm_{target}"
            if used.spilled:
                found.append(f"{where} spills {used.spilled} bytes per thread")
            accesses = {"load": used.loads, "store": used.stores}
            if self.name.startswith("generate_"):
                del accesses["load"]
            for kind, widths in accesses.items():
                widest = max(widths, default=0)
                if self.widest is not None and widest < self.widest:
                    found.append(f"{where}: the widest {kind} is {widest} bits, expected {self.widest}")
        return found


@dataclass(frozen=True)
class Report:
    """All kernels of one language. ``compiler``: its versions. ``missing``: why nothing could be compiled."""

    language: str
    compiler: str
    kernels: tuple[Kernel, ...]
    missing: str | None = None


class Part(NamedTuple):
    """What is compiled, and cached, at a time: an operation's kernels for one target.

    ``few``: of every Triton kernel only the first case of its list ``AOT``.
    """

    op: str
    target: int
    few: bool = False


def report(language: str, *, brief: bool = False) -> Report:
    """Compile every kernel of ``language`` ("triton" or "cuda") for every target, or take it from the cache.

    ``brief`` takes half the time: everything is compiled for the last target alone; for the others, one case of every
    Triton kernel, which shows that nothing in it is for the last target only.

    Raises:
        RuntimeError: a kernel does not compile, or a Triton kernel is in no ``AOT`` list.
    """
    missing, compiler, ops, sources, build = {
        "triton": (_triton_missing, _triton_version, _triton_ops, _triton_sources, _build_triton),
        "cuda": (_cuda_missing, _cuda_version, _cuda_ops, _cuda_sources, _build_cuda),
    }[language]
    reason = missing()
    if reason is not None:
        return Report(language, "", (), reason)
    *others, last = TARGETS
    if brief and language == "cuda":
        others = []  # nvcc compiles a whole source
    version = compiler()
    # The last target first: it has all kernels, in their order.
    parts = [Part(op, last) for op in ops()] + [Part(op, target, brief) for target in others for op in ops()]
    found = _cached(language, parts, version, sources, build)
    return Report(language, version, tuple(_merged(kernel for part in parts for kernel in found[part])))


def _merged(kernels: Iterable[Kernel]) -> list[Kernel]:
    """One entry for each kernel, with what it uses on all targets; by operation, in the order of its kernels."""
    merged: dict[tuple[str, str, str], Kernel] = {}
    for kernel in kernels:
        key = kernel.op, kernel.name, kernel.case
        resources = merged[key].resources if key in merged else {}
        if set(resources) & set(kernel.resources):
            raise RuntimeError(f"two kernels of {kernel.op} are called {kernel.name} ({kernel.case})")
        both = {**resources, **kernel.resources}
        merged[key] = replace(kernel, resources=dict(sorted(both.items())))
    return list(merged.values())


def _cached(
    language: str,
    parts: Sequence[Part],
    version: str,
    sources: Callable[[str], Sequence[Path]],
    build: Callable[[Sequence[Part]], list[list[Kernel]]],
) -> dict[Part, list[Kernel]]:
    places = {}
    found = {}
    for part in parts:
        digest = hashlib.sha256(repr((version, NVCC_FLAGS)).encode())
        for path in [Path(__file__), *sources(part.op)]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        name = f"{language}-{part.op}-sm_{part.target}{'-few' if part.few else ''}"
        places[part] = env.cache_dir() / "aot" / f"{name}-{digest.hexdigest()[:20]}.json"
        # A file that cannot be read, or written below, is as good as none: the cache saves time and decides nothing.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found[part] = [_from_json(entry) for entry in json.loads(places[part].read_text())]

    def work(part: Part) -> tuple[bool, int]:
        return part.few, -sources(part.op)[-1].stat().st_size

    def make(share: Sequence[Part]) -> None:
        for part, kernels in zip(share, build(share), strict=True):
            found[part] = kernels
            with (
                contextlib.suppress(OSError),
                files.atomic_path(places[part], make_folders=True) as temporary,
            ):
                temporary.write_text(json.dumps([asdict(kernel) for kernel in kernels]))

    # Dealt out like cards, the longest first: a process for each would import PyTorch and Triton every time.
    missing = sorted((part for part in parts if part not in found), key=work)
    processes = os.cpu_count() or 1
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(make, filter(None, (missing[i::processes] for i in range(processes)))))
    return found


def _from_json(entry: dict[str, Any]) -> Kernel:
    def numbers(values: dict[str, int]) -> dict[int, int]:
        return {int(key): value for key, value in values.items()}

    resources = {
        int(target): Resources(
            used["registers"],
            used["spilled"],
            used["shared"],
            numbers(used["loads"]),
            numbers(used["stores"]),
        )
        for target, used in entry["resources"].items()
    }
    return Kernel(entry["op"], entry["name"], entry["case"], entry["widest"], resources)


# --- Reading the compilers' output -----------------------------------------------------------------------------------

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_ptxas(log: str) -> dict[str, tuple[int, int, int]]:
    """(registers, spilled bytes, static shared bytes) of every kernel in the output of ``ptxas -v``.

    Spilled: spill stores plus spill loads, or the stack frame where it is larger (local arrays).
    """
    found = {}
    entries = list(_ENTRY.finditer(log))
    for entry, following in zip(entries, [*(e.start() for e in entries[1:]), len(log)], strict=True):
        text = log[entry.end() : following]
        spills, registers, shared = _SPILLS.search(text), _REGISTERS.search(text), _SHARED.search(text)
        if spills is None or registers is None:
            raise RuntimeError(f"this output of ptxas -v is not understood:\n{log}")
        frame, stored, loaded = map(int, spills.groups())
        found[entry["name"]] = (
            int(registers[1]),
            max(frame, stored + loaded),
            int(shared[1]) if shared else 0,
        )
    return found


_ACCESS = re.compile(r"/\*(?P<address>[0-9a-f]+)\*/.*?\b(?P<op>LDGSTS|LDG|STG)(?P<modifiers>(?:\.\w+)*)")
_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "16": 16, "U8": 8, "S8": 8, "8": 8}

Accesses = tuple[dict[int, int], dict[int, int]]
"""(loads, stores) of a kernel: width in bits -> number of instructions on global memory."""


def parse_sass(sass: str, starts: Sequence[int]) -> list[Accesses]:
    """The accesses of every kernel in the output of ``nvdisasm -b``, given the addresses at which they start."""
    loads: list[Counter[int]] = [Counter() for _ in starts]
    stores: list[Counter[int]] = [Counter() for _ in starts]
    for access in _ACCESS.finditer(sass):
        kernel = bisect.bisect_right(starts, int(access["address"], 16)) - 1
        widths = (_WIDTHS.get(modifier) for modifier in access["modifiers"].split("."))
        counts = stores if access["op"] == "STG" else loads
        counts[kernel][next(filter(None, widths), 32)] += 1
    return [(dict(sorted(r.items())), dict(sorted(w.items()))) for r, w in zip(loads, stores, strict=True)]


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """The instructions of every kernel in a cubin, which is an ELF file of 64 bits: its sections ``.text.<kernel>``."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise RuntimeError(f"a cubin is an ELF file of 64 bits, this one begins with {cubin[:6]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of every section: where its name is, where its content is, and how long that is.
    sections = [struct.unpack_from("<I20x2Q", cubin, table + size * i) for i in range(count)]
    found = {}
    for name_offset, start, length in sections:
        first = sections[names][1] + name_offset
        name = cubin[first : cubin.index(b"\0", first)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = cubin[start : start + length]
    return found


def _disassemble(cubins: Sequence[bytes], target: int) -> list[dict[str, Accesses]]:
    """What each cubin's kernels access. All in one go: nvdisasm takes 0.2 s to start, and next to nothing beyond."""
    tool = _nvdisasm()
    assert tool is not None
    codes = [machine_code(cubin) for cubin in cubins]
    pieces = [code for kernels in codes for code in kernels.values()]
    starts = [0, *itertools.accumulate(map(len, pieces))][:-1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.bin"
        path.write_bytes(b"".join(pieces))
        accesses = iter(parse_sass(_output([tool, "-b", f"SM{target}", path]), starts))
    return [{name: next(accesses) for name in kernels} for kernels in codes]


def _output(command: Sequence[str | Path], **environment: str | None) -> str:
    """Standard output and errors of a command; a value of None takes a variable out of its environment."""
    variables = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    done = subprocess.run(
        [str(part) for part in command],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(map(str, command))}\nfailed with status {done.returncode}:\n{done.stdout}"
        )
    return done.stdout


def _release(tool: str | Path) -> str:
    found = re.search(r"release [\d.]+, V([\d.]+)", _output([tool, "--version"]))
    return found[1] if found else "of unknown version"


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


@functools.cache
def _nvdisasm() -> str | None:
    triton = _package("triton")
    bundled = triton / "backends" / "nvidia" / "bin" / "nvdisasm" if triton else None
    return str(bundled) if bundled is not None and bundled.exists() else shutil.which("nvdisasm")


# --- Triton ----------------------------------------------------------------------------------------------------------


def _kernels_folder() -> Path:
    inside = _PACKAGE / "kernels"
    return inside if inside.exists() else _ROOT / "kernels"


def _triton_ops() -> list[str]:
    return sorted(p.stem for p in _kernels_folder().glob("*.py") if not p.stem.startswith("_"))


def _triton_sources(op: str) -> list[Path]:
    return [*sorted(_kernels_folder().glob("_*.py")), _kernels_folder() / f"{op}.py"]


def _triton_missing() -> str | None:
    if _package("triton") is None:
        return "Triton is not installed: pip install triton"
    if _nvdisasm() is None:
        return "nvdisasm is neither in the Triton package nor on the PATH: install the CUDA toolkit"
    return None


@functools.cache
def _triton_version() -> str:
    # In a process of its own, as the compilation itself: this one may have set TRITON_INTERPRET.
    return _child("--triton-version")


def _build_triton(parts: Sequence[Part]) -> list[list[Kernel]]:
    found = json.loads(_child("--compile-triton", json.dumps(parts)))
    return [[_from_json(entry) for entry in kernels] for kernels in found]


def _child(*arguments: str) -> str:
    """The last line that this module prints when run in a process that compiles Triton kernels."""
    with tempfile.TemporaryDirectory() as folder:
        output = _output(
            [sys.executable, "-m", "lsgm_fast.aot", *arguments],
            # Functions that Triton interprets cannot be compiled; a kernel from Triton's own cache brings no log.
            TRITON_INTERPRET=None,
            TRITON_CACHE_DIR=folder,
            PYTHONPATH=os.pathsep.join([str(_ROOT), *sys.path]),
        )
    return output.strip().splitlines()[-1]


def _compile_triton(parts: Sequence[Part]) -> list[list[Kernel]]:
    """Runs in the child process."""
    specs = {part: _specs(part.op, few=part.few) for part in parts}
    found: dict[Part, list[Kernel]] = {}
    for target in sorted({part.target for part in parts}):
        mine = [part for part in parts if part.target == target]
        used = iter(_compile_specs([spec for part in mine for spec in specs[part]], target))
        for part in mine:
            found[part] = [
                Kernel(part.op, spec.kernel.__name__, spec.label, spec.widest, {target: next(used)})
                for spec in specs[part]
            ]
    return [found[part] for part in parts]


def _specs(op: str, *, few: bool) -> list[Any]:
    from triton.runtime.jit import JITFunction

    module = importlib.import_module(f"lsgm_fast.kernels.{op}")
    launched = {n for n, v in vars(module).items() if isinstance(v, JITFunction) and n.endswith("_kernel")}
    specs = list(getattr(module, "AOT", []))
    listed = {spec.kernel.__name__ for spec in specs}
    if launched != listed:
        raise RuntimeError(
            f"kernels/{op}.py defines the kernels {sorted(launched)}, its list AOT has {sorted(listed)}"
        )
    if few:
        return list({spec.kernel.__name__: spec for spec in reversed(specs)}.values())
    return specs


def _compile_specs(specs: Sequence[Any], target: int) -> list[Resources]:
    compiled = [_compile_spec(spec, target) for spec in specs]
    found = _disassemble([cubin for _, _, _, cubin in compiled], target)
    resources = []
    for (registers, spilled, shared, _), kernels in zip(compiled, found, strict=True):
        ((loads, stores),) = kernels.values()
        resources.append(Resources(registers, spilled, shared, loads, stores))
    return resources


def _compile_spec(spec: Any, target: int) -> tuple[int, int, int, bytes]:
    """(registers, spilled bytes, shared bytes, cubin)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    constants = {(i,): spec.options[name] for i, name in enumerate(names) if name in spec.options}
    options = {name: value for name, value in spec.options.items() if name not in names}
    types = [spec.signature.get(name, "constexpr") for name in names]
    source = ASTSource(
        fn=spec.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in zip(names, types, strict=True)},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind.endswith(":16")},
    )
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ((registers, spilled, _),) = parse_ptxas(log.getvalue()).values()
    # Triton asks for its shared memory at launch.
    return registers, spilled, compiled.metadata.shared, compiled.asm["cubin"]


# --- CUDA ------------------------------------------------------------------------------------------------------------


def _cuda_ops() -> list[str]:
    return sorted(p.parent.name for p in (_ROOT / "csrc").glob("*/cuda.cu"))


def _cuda_sources(op: str) -> list[Path]:
    folders = (_ROOT / "csrc" / folder for folder in ("common", op))
    return sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".cu", ".cuh", ".h"))


def _cuda_missing() -> str | None:
    if not _cuda_ops():
        return "there is no csrc/<operation>/cuda.cu beside this package: run it from a source tree"
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH: install the CUDA toolkit"
    if shutil.which("c++filt") is None:
        return "c++filt is not on the PATH: install binutils"
    if _nvdisasm() is None:
        return "nvdisasm is neither in the Triton package nor on the PATH: install the CUDA toolkit or Triton"
    return None


@functools.cache
def _cuda_version() -> str:
    return f"nvcc {_release('nvcc')}"


def _build_cuda(parts: Sequence[Part]) -> list[list[Kernel]]:
    return [_compile_cuda(part.op, part.target) for part in parts]


def _compile_cuda(op: str, target: int) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        source = _ROOT / "csrc" / op / "cuda.cu"
        flags = ["-cubin", f"-arch=sm_{target}", "-Xptxas", "-v", *NVCC_FLAGS, f"-I{_ROOT / 'csrc'}"]
        log = parse_ptxas(_output(["nvcc", *flags, source, "-o", cubin]))
        (accesses,) = _disassemble([cubin.read_bytes()], target)
    kernels = []
    for demangled, mangled in zip(_output(["c++filt", *log]).splitlines(), log, strict=True):
        name, case = _split_name(demangled)
        vector = re.search(r"(?:^|, )(\d+)$", case)
        widest = 128 if vector and int(vector[1]) > 1 else None
        registers, spilled, shared = log[mangled]
        used = Resources(registers, spilled, shared, *accesses[mangled])
        kernels.append(Kernel(op, name, case, widest, {target: used}))
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.case))


def _split_name(demangled: str) -> tuple[str, str]:
    """``"void a::kernel<float, 4>(float*)"`` -> ``("kernel", "float, 4")``."""
    head = re.sub(r"\(anonymous namespace\)::", "", demangled).split("(")[0].removeprefix("void ")
    name, _, parameters = head.partition("<")
    short = re.sub(r"\b(?:\w+::)+", "", parameters.removesuffix(">"))
    return name.rsplit("::", 1)[-1], short


# --- The document ----------------------------------------------------------------------------------------------------

_TITLE = {"triton": "Triton", "cuda": "CUDA C++"}

_INTRODUCTION = """# What the compilers make of the GPU kernels

Generated by `python -m lsgm_fast.aot --write docs/kernels.md`, with no GPU; do not edit. `tests/test_aot.py` compiles
everything again, requires that nothing spills and that accesses are as wide as promised, and compares with these
numbers where the compilers are the same; of sm_80 only a sample, unless it is run with `-m slow`.

Each kernel is compiled to machine code for sm_80 (A100) and sm_90 (H100); `a / b` gives both where they differ.

- **registers** per thread and **spilled** bytes per thread: from the report of `ptxas -v`.
- **shared**: bytes per block, without what the system reserves.
- **loads**, **stores**: instructions on global memory in the disassembly (`nvdisasm`), number × width in bits, widest
  first. 128 bits is the widest on these targets; narrow ones fetch parameters or store sums.
"""


def render(reports: Iterable[Report], previous: str = "") -> str:
    """The text of ``docs/kernels.md``. A language that cannot be compiled here keeps its part of ``previous``."""
    old = _parts(previous)
    texts = []
    for found in reports:
        if found.missing is None:
            texts.append(_section(found))
        elif found.language in old:
            texts.append(old[found.language])
    return "\n".join([_INTRODUCTION, *texts])


def _section(found: Report) -> str:
    lines = [f"## {_TITLE[found.language]}", "", f"Compiled by {found.compiler}.", ""]
    heads = ("operation", "kernel", "case", "registers", "spilled", "shared", "loads", "stores")
    lines.append(f"| {' | '.join(heads)} |")
    lines.append(f"|{'|'.join('--:' if h in ('registers', 'spilled', 'shared') else '---' for h in heads)}|")
    for kernel in sorted(found.kernels, key=lambda k: (k.op, k.name)):
        used = list(kernel.resources.values())
        cells = [
            kernel.op,
            f"`{kernel.name}`",
            kernel.case,
            *(_both(str(getattr(u, name)) for u in used) for name in ("registers", "spilled", "shared")),
            *(_both(_widths(getattr(u, name)) for u in used) for name in ("loads", "stores")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _of_last_target(line: str) -> str:
    """A row of the table with what is said of the last target alone."""
    cells = line.split(" | ")
    return " | ".join([*cells[:3], *(cell.rsplit(" / ", 1)[-1] for cell in cells[3:])])


def _both(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values)) or "-"


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{n}×{width}" for width, n in sorted(counts.items(), reverse=True)) or "none"


def _parts(document: str) -> dict[str, str]:
    """The document's sections by language."""
    found = {}
    for language, title in _TITLE.items():
        match = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
        if match is not None:
            found[language] = match[0].rstrip("\n") + "\n"
    return found


def differences(document: str, reports: Iterable[Report]) -> list[str]:
    """Where ``document`` is not what the sources give, one sentence each; empty where it is up to date.

    Numbers are compared where the document was made by the same compilers; else only the list of kernels is. Of a brief
    report those of the last target are.
    """
    parts = _parts(document)
    found = []
    for current in reports:
        if current.missing is not None:
            continue
        expected = _section(current).splitlines()
        written = parts.get(current.language, "").splitlines()
        if not written:
            found.append(f"there is no section {_TITLE[current.language]!r}")
            continue
        if expected[2] != written[2]:
            expected, written = (
                [" | ".join(line.split(" | ")[:3]) for line in lines[4:]] for lines in (expected, written)
            )
        elif any(set(kernel.resources) != set(TARGETS) for kernel in current.kernels):
            expected, written = ([_of_last_target(line) for line in lines] for lines in (expected, written))
        found += [f"missing: {line}" for line in expected if line not in written]
        found += [f"no longer so: {line}" for line in written if line not in expected]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lsgm_fast.aot", description=__doc__.split("\n", 1)[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="FILE", help="write the table")
    action.add_argument(
        "--check", type=Path, metavar="FILE", help="exit with 1 where the table is out of date"
    )
    # What the child process is asked for.
    action.add_argument("--compile-triton", metavar="PARTS", help=argparse.SUPPRESS)
    action.add_argument("--triton-version", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.compile_triton:
        found = _compile_triton([Part(*part) for part in json.loads(chosen.compile_triton)])
        print(json.dumps([[asdict(kernel) for kernel in kernels] for kernels in found]))
        return 0
    if chosen.triton_version:
        import triton

        print(f"triton {triton.__version__}, ptxas {_release(triton.knobs.nvidia.ptxas.path)}")
        return 0
    return _run(chosen.write, chosen.check)


def _run(write: Path | None, check: Path | None) -> int:
    reports = [report(language) for language in LANGUAGES]
    for found in reports:
        if found.missing is not None:
            print(f"{_TITLE[found.language]} left out: {found.missing}", file=sys.stderr)
    if check is not None:
        stale = differences(check.read_text() if check.exists() else "", reports)
        for line in stale:
            print(line, file=sys.stderr)
        if stale:
            print(f"{check} is out of date: python -m lsgm_fast.aot --write {check}", file=sys.stderr)
        return 1 if stale else 0
    problems = [problem for found in reports for kernel in found.kernels for problem in kernel.problems()]
    for problem in problems:
        print(problem, file=sys.stderr)
    if write is None:
        print(render(reports))
        return 1 if problems else 0
    with files.atomic_path(write, make_folders=True) as temporary:
        temporary.write_text(render(reports, write.read_text() if write.exists() else ""))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
