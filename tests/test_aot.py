"""Every GPU kernel compiles for every target, spills nothing and has wide accesses; docs/kernels.md is up to date."""

from __future__ import annotations

import dataclasses
import json
import struct
import types
from pathlib import Path

import pytest

from lsgm_fast import aot

ROOT = Path(aot.__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"


# A fault of sm_80 alone is rare: by default a sample is compiled for it. The machine code of sm_90 is all there.
EXTENT = [
    *(pytest.param((language, True), id=f"{language}-brief") for language in aot.LANGUAGES),
    *(pytest.param((language, False), id=language, marks=pytest.mark.slow) for language in aot.LANGUAGES),
]


@pytest.fixture(scope="module", params=EXTENT)
def extent(request) -> tuple[str, bool]:
    return request.param


@pytest.fixture(scope="module")
def report(extent) -> aot.Report:
    language, brief = extent
    found = aot.report(language, brief=brief)
    if found.missing is not None:
        pytest.skip(found.missing)
    return found


def test_every_kernel_compiles_without_spills_and_with_wide_accesses(extent, report):
    language, brief = extent
    assert report.kernels
    last = {aot.TARGETS[-1]}
    compiled: dict[tuple[str, str], set[int]] = {}
    for kernel in report.kernels:
        targets = compiled.setdefault((kernel.op, kernel.name), set())
        targets |= set(kernel.resources)
        assert set(kernel.resources) == set(aot.TARGETS) or (brief and set(kernel.resources) == last)
        for used in kernel.resources.values():
            assert 0 < used.registers <= 255
            assert used.stores, f"{kernel.name} writes nothing"
    assert [problem for kernel in report.kernels for problem in kernel.problems()] == []
    everywhere = last if brief and language == "cuda" else set(aot.TARGETS)
    assert [name for name, targets in compiled.items() if targets != everywhere] == []


def test_every_operation_promises_wide_accesses(report):
    wide = {kernel.op for kernel in report.kernels if kernel.widest == 128}
    assert wide == {kernel.op for kernel in report.kernels}


def test_every_source_is_compiled(report):
    sources = {
        "triton": [p.stem for p in (ROOT / "kernels").glob("[!_]*.py")],
        "cuda": [p.parent.name for p in (ROOT / "csrc").glob("*/cuda.cu")],
    }[report.language]
    assert {kernel.op for kernel in report.kernels} == set(sources)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")
def test_document_is_up_to_date(report):
    stale = aot.differences(DOCUMENT.read_text() if DOCUMENT.exists() else "", [report])
    assert stale == [], "python -m lsgm_fast.aot --write docs/kernels.md"


def test_second_report_comes_from_the_cache(extent, report, monkeypatch):
    def compiles(parts):
        raise AssertionError(f"{parts} were compiled again")

    monkeypatch.setattr(aot, "_build_triton", compiles)
    monkeypatch.setattr(aot, "_build_cuda", compiles)
    language, brief = extent
    assert aot.report(language, brief=brief) == report


# --- The parts that need no compiler ---------------------------------------------------------------------------------

USED = aot.Resources(32, 0, 0, {32: 1, 128: 2}, {128: 1})
KERNEL = aot.Kernel("op", "kernel", "fp32", 128, {80: USED, 90: USED})
REPORT = aot.Report("triton", "triton 1.2.3, ptxas 4.5", (KERNEL,))


def changed(**values) -> aot.Kernel:
    return dataclasses.replace(KERNEL, resources={80: USED, 90: dataclasses.replace(USED, **values)})


def with_kernels(*kernels: aot.Kernel) -> aot.Report:
    return dataclasses.replace(REPORT, kernels=kernels)


def test_problems_are_found():
    assert KERNEL.problems() == []
    assert changed(spilled=8).problems() == ["op kernel (fp32) on sm_90 spills 8 bytes per thread"]
    assert "widest load is 64 bits, expected 128" in changed(loads={64: 4}).problems()[0]
    assert "widest store is 0 bits, expected 128" in changed(stores={}).problems()[0]
    assert dataclasses.replace(changed(stores={16: 1}), widest=None).problems() == []


def test_of_a_generator_only_the_stores_must_be_wide():
    generator = dataclasses.replace(changed(loads={32: 1}), name="generate_kernel")
    assert generator.problems() == []
    narrow = dataclasses.replace(changed(loads={32: 1}, stores={64: 1}), name="generate_kernel")
    assert "widest store is 64 bits, expected 128" in narrow.problems()[0]


def test_document_detects_what_changed():
    document = aot.render([REPORT])
    assert aot.differences(document, [REPORT]) == []
    for kernel in (changed(registers=33), changed(spilled=4), changed(loads={32: 3, 128: 2})):
        found = aot.differences(document, [with_kernels(kernel)])
        assert [line.split(":")[0] for line in found] == ["missing", "no longer so"]
    other = dataclasses.replace(KERNEL, case="bf16")
    assert len(aot.differences(document, [with_kernels(KERNEL, other)])) == 1
    assert len(aot.differences(document, [with_kernels()])) == 1
    assert aot.differences("", [REPORT]) == ["there is no section 'Triton'"]


def test_a_brief_report_is_compared_where_it_says_something():
    def brief(**values) -> aot.Report:
        used = dataclasses.replace(USED, **values)
        return with_kernels(KERNEL, dataclasses.replace(KERNEL, case="bf16", resources={90: used}))

    other = dataclasses.replace(changed(registers=40, loads={128: 3}), case="bf16")
    document = aot.render([with_kernels(KERNEL, other)])
    assert aot.differences(document, [brief(registers=40, loads={128: 3})]) == []
    for found in (brief(registers=32, loads={128: 3}), brief(registers=40)):
        assert [line.split(":")[0] for line in aot.differences(document, [found])] == [
            "missing",
            "no longer so",
        ]
    assert len(aot.differences(document, [dataclasses.replace(brief(), kernels=brief().kernels[1:])])) == 3


def test_parts_become_one_report(monkeypatch):
    built = []

    def build(parts):
        built.extend(parts)
        found = {
            part: [
                dataclasses.replace(KERNEL, op=part.op, case=case, resources={part.target: USED})
                for case in (("fp32",) if part.few else ("fp32", "bf16"))
            ]
            for part in parts
        }
        return [found[part] for part in parts]

    monkeypatch.setattr(aot, "_triton_ops", lambda: ["one", "two"])
    monkeypatch.setattr(aot, "_triton_sources", lambda op: [ROOT / "pyproject.toml"])
    monkeypatch.setattr(aot, "_triton_missing", lambda: None)
    monkeypatch.setattr(aot, "_triton_version", lambda: "1.0")
    monkeypatch.setattr(aot, "_build_triton", build)
    monkeypatch.setenv("LSGM_FAST_CACHE", "/dev/null")  # where nothing can be kept
    for brief, of_bf16 in ((True, {90}), (False, {80, 90})):
        built.clear()
        kernels = aot.report("triton", brief=brief).kernels
        assert sorted(built) == [
            aot.Part(op, t, brief and t == 80) for op in ("one", "two") for t in (80, 90)
        ]
        assert [(k.op, k.case, set(k.resources)) for k in kernels] == [
            (op, case, targets)
            for op in ("one", "two")
            for case, targets in (("fp32", {80, 90}), ("bf16", of_bf16))
        ]
    with pytest.raises(RuntimeError, match=r"two kernels of op are called kernel \(fp32\)"):
        aot._merged([KERNEL, changed(registers=1)])


def test_a_process_compiles_what_it_was_given(monkeypatch):
    def compile_specs(specs, target):
        assert specs, f"nothing to compile for sm_{target}"
        return [dataclasses.replace(USED, registers=spec.registers + target) for spec in specs]

    def specs(op, *, few):
        kernel = types.SimpleNamespace(__name__=f"{op}_kernel")
        found = [types.SimpleNamespace(kernel=kernel, label=str(n), widest=64, registers=n) for n in (1, 2)]
        return found[:1] if few else found

    monkeypatch.setattr(aot, "_specs", specs)
    monkeypatch.setattr(aot, "_compile_specs", compile_specs)
    for parts, expected in (
        ([("a", 80)], [[81, 82]]),
        ([("a", 90), ("b", 80, True), ("b", 90)], [[91, 92], [81], [91, 92]]),
    ):
        parts = [aot.Part(*part) for part in parts]
        found = aot._compile_triton(parts)
        assert [
            [k.resources[p.target].registers for k in ks] for p, ks in zip(parts, found, strict=True)
        ] == expected
        assert all(
            k.op == p.op and k.name == f"{p.op}_kernel"
            for p, ks in zip(parts, found, strict=True)
            for k in ks
        )


def test_other_compilers_may_give_other_numbers():
    document = aot.render([REPORT])
    newer = dataclasses.replace(with_kernels(changed(registers=40)), compiler="triton 9.9")
    assert aot.differences(document, [newer]) == []
    renamed = dataclasses.replace(newer, kernels=(dataclasses.replace(KERNEL, name="other"),))
    assert len(aot.differences(document, [renamed])) == 2


def test_missing_compiler_keeps_its_section_and_checks_nothing():
    cuda = aot.Report("cuda", "nvcc 1", (dataclasses.replace(KERNEL, case="float, 4"),))
    document = aot.render([REPORT, cuda])
    absent = aot.Report("cuda", "", (), "nvcc is not on the PATH")
    assert aot.render([REPORT, absent], document) == document
    assert aot.differences(document, [REPORT, absent]) == []
    assert "CUDA" not in aot.render([REPORT, absent])


def test_table_shows_both_targets_where_they_differ():
    (row,) = [
        line for line in aot.render([with_kernels(changed(registers=40))]).splitlines() if "`kernel`" in line
    ]
    assert row == "| op | `kernel` | fp32 | 32 / 40 | 0 | 0 | 2×128, 1×32 | 1×128 |"


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    40 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1cv' for 'sm_90'
    400 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""


def test_ptxas_log():
    assert aot.parse_ptxas(LOG) == {"_Z1av": (10, 0, 256), "_Z1bv": (255, 52, 0), "_Z1cv": (32, 400, 0)}
    with pytest.raises(RuntimeError, match="not understood"):
        aot.parse_ptxas("ptxas info : Compiling entry function '_Z1av' for 'sm_90'\nsomething new")


SASS = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/                   LDG.E.LTC128B.64 R8, desc[UR4][R2.64] ;
        /*0030*/              @!P0 LDG.E.U16 R8, [R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64] ;
        /*0050*/                   STS.128 [R0], R4 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R5 ;
.L_x_0:
        /*0070*/                   STG.E.U8 [R2.64], R5 ;
        /*0080*/                   STG.E.128 [R2.64], R4 ;
        /*0090*/                   LDL R4, [R1] ;
        /*00a0*/                   LDG.E R4, [R2.64] ;
"""


def test_sass():
    assert aot.parse_sass(SASS, [0x00, 0x70, 0xA0]) == [
        ({16: 1, 64: 1, 128: 2}, {32: 1}),
        ({}, {8: 1, 128: 1}),
        ({32: 1}, {}),
    ]


def elf(sections: dict[str, bytes]) -> bytes:
    """The parts of an ELF file that tell what its sections hold."""
    header, names, entries = 0x40, b"\0", b"\0" * 64
    content = b""
    for name, data in sections.items():
        place = (len(names), 1, 0, 0, header + len(content), len(data), 0, 0, 1, 0)
        entries += struct.pack("<2I4Q2I2Q", *place)
        names += name.encode() + b"\0"
        content += data
    # The section of names is the last one.
    place = (0, 3, 0, 0, header + len(content), len(names), 0, 0, 1, 0)
    entries += struct.pack("<2I4Q2I2Q", *place)
    content += names
    counts = (header, 0, 0, 64, len(sections) + 2, len(sections) + 1)
    start = b"\x7fELF\x02\x01".ljust(16, b"\0")
    fields = struct.pack("<2HI3QI6H", 2, 190, 1, 0, 0, header + len(content), 0, *counts)
    return start + fields + content + entries


def test_machine_code():
    sections = {".text._Z1av": b"a" * 48, ".nv.info": b"info", ".text.b_kernel": b"b" * 16}
    assert aot.machine_code(elf(sections)) == {"_Z1av": b"a" * 48, "b_kernel": b"b" * 16}
    with pytest.raises(RuntimeError, match="an ELF file of 64 bits, this one begins with b'// PTX'"):
        aot.machine_code(b"// PTX is text")


@pytest.mark.parametrize(
    ("demangled", "expected"),
    [
        (
            "void lsgm::a::k_kernel<float, lsgm::BFloat16, 4>(lsgm::P, int)",
            ("k_kernel", "float, BFloat16, 4"),
        ),
        ("lsgm::(anonymous namespace)::finish(float*)", ("finish", "")),
        ("forward_kernel", ("forward_kernel", "")),
    ],
)
def test_kernel_names(demangled, expected):
    assert aot._split_name(demangled) == expected


def test_unreadable_cache_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("LSGM_FAST_CACHE", str(tmp_path))
    source = tmp_path / "source"
    source.write_text("1")
    built = []

    part = aot.Part("op", 90)
    kernel = dataclasses.replace(KERNEL, resources={90: USED})

    def build(parts):
        built.extend(parts)
        return [[kernel] for _ in parts]

    def cached():
        return aot._cached("triton", [part], "1.0", lambda op: [source], build)

    assert cached() == cached() == {part: [kernel]}
    assert built == [part]
    source.write_text("2")
    assert cached() == {part: [kernel]}
    assert built == [part] * 2
    for path in (tmp_path / "aot").iterdir():
        path.write_text("{")
    assert cached() == {part: [kernel]}
    assert built == [part] * 3
    monkeypatch.setenv("LSGM_FAST_CACHE", str(source))
    assert cached() == {part: [kernel]}


def test_command_line(tmp_path, monkeypatch, capsys):
    absent = aot.Report("cuda", "", (), "nvcc is not on the PATH")
    reports = {"triton": REPORT, "cuda": absent}
    monkeypatch.setattr(aot, "report", reports.__getitem__)
    path = tmp_path / "docs" / "kernels.md"
    assert aot.main(["--check", str(path)]) == 1
    assert aot.main(["--write", str(path)]) == 0
    assert path.read_text() == aot.render([REPORT])
    assert aot.main(["--check", str(path)]) == 0
    reports["triton"] = with_kernels(changed(spilled=8))
    assert aot.main(["--check", str(path)]) == 1
    capsys.readouterr()
    assert aot.main([]) == 1
    printed = capsys.readouterr()
    assert "0 / 8" in printed.out
    assert "spills 8 bytes" in printed.err
    assert "CUDA C++ left out: nvcc is not on the PATH" in printed.err


def test_cached_entries_survive_json():
    assert aot._from_json(json.loads(json.dumps(dataclasses.asdict(KERNEL)))) == KERNEL
