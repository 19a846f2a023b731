"""The compiled libraries: loading them, what they say about themselves, and the CPU operators against float64."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lsgm_fast import env, native
from lsgm_fast.reference.mixed_score import mixed_score as reference

ROOT = Path(__file__).resolve().parent.parent
TOOLS = all(map(shutil.which, ("c++", "cmake")))
in_source_tree = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not a source tree")
needs_compiler = pytest.mark.skipif(
    not (TOOLS and (ROOT / "CMakeLists.txt").exists()),
    reason="no C++ compiler, no cmake, or not a source tree",
)


def run(*command: object, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LSGM_FAST_")}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def is_current(record: dict | None) -> bool:
    sources = (record or {}).get("sources", {})
    return bool(sources) and all(native.source_hash(op) == value for op, value in sources.items())


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A folder with the CPU library of the present sources: the installed one, or one compiled now."""
    if native.cpu().loaded and is_current(native.cpu().build):
        return Path(native.cpu().path).parent
    if not TOOLS:
        pytest.skip("no library is built, and there is no C++ compiler or no cmake")
    folder = tmp_path_factory.mktemp("native")
    run(sys.executable, "setup.py", "build_native", f"--build-lib={folder}", LSGM_FAST_BUILD="cpu")
    return folder / "lsgm_fast" / "_lib"


@pytest.fixture(scope="session")
def ops(built):
    """The operators, registered in this process."""
    import lsgm_fast.ops  # noqa: F401  (their schemas)

    if not native.cpu().loaded:
        torch.ops.load_library(str(built / "liblsgm_fast_ops_cpu.so"))
    return torch.ops.lsgm_fast


@pytest.fixture
def fresh(monkeypatch):
    """native as in a process that has not asked for a library yet."""
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.delenv(env.LIBRARY_PATH, raising=False)
    return monkeypatch


# ---- the operators ----

DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 4, 4), (2, 13, 1, 9), (2, 180, 16, 16), (5, 6), (2, 4, 3, 2, 5)]
UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.float64: 2**-53, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def channels_last(x: torch.Tensor) -> torch.Tensor:
    order = [0, *range(2, x.dim()), 1]
    return x.permute(order).contiguous().permute(0, x.dim() - 1, *range(1, x.dim() - 1))


def inputs(shape, eps_dtype, z_dtype, layout, *, shared_r=False, wide_scalars=False):
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    scalar = torch.float64 if wide_scalars else torch.float32
    place = channels_last if layout == "channels_last" else torch.Tensor.contiguous
    eps, z, grad = (place(draw(*shape).to(dtype)) for dtype in (eps_dtype, z_dtype, z_dtype))
    logit = draw(1, shape[1], *[1] * (len(shape) - 2)).to(scalar)
    r = draw(*([] if shared_r else [shape[0]])).to(scalar)
    return grad, eps, z, logit, r


def expected(grad, eps, z, logit, r):
    eps, z, logit = (x.double().requires_grad_() for x in (eps, z, logit))
    r = r.double()
    out = reference(eps, z, logit, r)
    return out.detach(), *torch.autograd.grad(out, (eps, z, logit), grad.double())


def assert_close(got, want, scale, arithmetic):
    """Within a few roundings of the arithmetic on terms of size `scale`, and one of the result's own type."""
    bound = (
        8 * UNIT_ROUNDOFF[arithmetic] * scale
        + 1.01 * UNIT_ROUNDOFF[got.dtype] * want.abs()
        + 2**-24 * (got.dtype == torch.float16)
    )
    error = (got.double() - want).abs()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"{got.flatten()[worst]} instead of {want.flatten()[worst]}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("eps_dtype", DTYPES)
def test_mixed_score_against_float64(ops, eps_dtype, z_dtype, layout):
    eps_dtype, z_dtype = DTYPES[eps_dtype], DTYPES[z_dtype]
    arithmetic = torch.float64 if torch.float64 in (eps_dtype, z_dtype) else torch.float32
    for i, shape in enumerate(SHAPES):
        options = {"shared_r": i % 2 == 0, "wide_scalars": i % 3 == 0}
        grad, eps, z, logit, r = inputs(shape, eps_dtype, z_dtype, layout, **options)
        want, want_eps, want_z, want_logit = expected(grad, eps, z, logit, r)
        terms = expected(grad.abs(), eps.abs(), z.abs(), logit, r.abs())
        if arithmetic is torch.float64:
            # The reference's own 1 - a has lost digits where a is close to 1; the kernels' has not.
            terms = [x / torch.sigmoid(-logit.double()).min() for x in terms]
        out = ops.mixed_score_cpu(eps, z, logit, r)
        assert out.dtype == z.dtype and out.shape == z.shape and out.stride() == z.stride()
        assert_close(out, want, terms[0], arithmetic)
        grad_eps, grad_z, grad_logit = ops.mixed_score_cpu_backward(grad, eps, z, logit, r)
        assert (grad_eps.dtype, grad_eps.stride()) == (eps.dtype, eps.stride())
        assert (grad_z.dtype, grad_z.stride()) == (z.dtype, z.stride())
        assert (grad_logit.dtype, grad_logit.shape) == (logit.dtype, logit.shape)
        assert_close(grad_eps, want_eps, terms[1], arithmetic)
        assert_close(grad_z, want_z, terms[2], arithmetic)
        # sum of |g| (|eps| + |r z|): what a sum in the arithmetic's type can lose digits of
        factor = torch.sigmoid(logit.double()) * torch.sigmoid(-logit.double())
        r_all = r.double().reshape(-1, *[1] * (z.dim() - 1))
        sizes = grad.double().abs() * (eps.double().abs() + (r_all * z.double()).abs())
        scale = (
            factor
            / (factor.min() if arithmetic is torch.float64 else 1)
            * sizes.sum(dim=[d for d in range(z.dim()) if d != 1]).reshape(logit.shape)
        )
        assert_close(grad_logit, want_logit, scale, arithmetic)


def test_inputs_that_lie_at_odd_addresses_or_are_strided(ops):
    _, eps, z, logit, r = inputs((2, 12, 5, 8), torch.float32, torch.float32, "contiguous")
    want = ops.mixed_score_cpu(eps, z, logit, r)
    moved = [torch.empty(x.numel() + 3)[3:].view(x.shape).copy_(x) for x in (eps, z)]
    assert torch.equal(ops.mixed_score_cpu(*moved, logit, r), want)
    wide = torch.empty(1, 24, 1, 1)
    wide[:, ::2] = logit
    assert torch.equal(ops.mixed_score_cpu(eps, z, wide[:, ::2], r), want)
    every_second = torch.stack([r, r + 1], dim=1)[:, 0]
    assert torch.equal(ops.mixed_score_cpu(eps, z, logit, every_second), want)
    turned = [x.transpose(2, 3) for x in (eps, z)]  # dense, though neither contiguous nor channels_last
    assert torch.equal(ops.mixed_score_cpu(*turned, logit, r).transpose(2, 3), want)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty_tensors(ops, shape):
    grad, eps, z, logit, r = inputs(shape, torch.float16, torch.float32, "contiguous")
    assert ops.mixed_score_cpu(eps, z, logit, r).shape == shape
    grad_eps, grad_z, grad_logit = ops.mixed_score_cpu_backward(grad, eps, z, logit, r)
    assert grad_eps.shape == grad_z.shape == shape
    assert torch.equal(grad_logit, torch.zeros(1, shape[1], 1, 1))


def test_every_element_is_written(ops, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all(), (
            "uninitialised memory is not poisoned: this test would prove nothing"
        )
        for shape in SHAPES:
            for layout in ("contiguous", "channels_last"):
                case = inputs(shape, torch.bfloat16, torch.float32, layout)
                results = (ops.mixed_score_cpu(*case[1:]), *ops.mixed_score_cpu_backward(*case))
                assert not any(x.isnan().any() for x in results), (shape, layout)
    finally:
        torch.use_deterministic_algorithms(before)


def test_the_number_of_threads_changes_no_bit(ops):
    for layout in ("contiguous", "channels_last"):
        case = inputs((4, 50, 40, 40), torch.float32, torch.float32, layout)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append((ops.mixed_score_cpu(*case[1:]), *ops.mixed_score_cpu_backward(*case)))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_inputs_are_refused_with_the_reason(ops):
    grad, eps, z, logit, r = inputs((2, 3, 4, 5), torch.float32, torch.float32, "contiguous")
    forward, backward = ops.mixed_score_cpu, ops.mixed_score_cpu_backward
    cases = [
        ((eps[:, :2], z, logit, r), r"eps has shape \(2, 2, 4, 5\) and z \(2, 3, 4, 5\)"),
        ((eps, z, logit[:, :2], r), r"mixing_logit has shape \(1, 2, 1, 1\): expected \(1, 3, 1, 1\)"),
        ((eps, z, logit, torch.ones(5)), r"r has shape \(5\): expected \(\) or \(2,\)"),
        ((eps, z, logit.half(), r), "mixing_logit has dtype Half: expected float32 or float64"),
        ((eps.int(), z, logit, r), "eps has dtype Int: expected float32, float64, float16 or bfloat16"),
        ((channels_last(eps), z, logit, r), r"eps has strides \(60, 1, 15, 3\) and z \(60, 20, 5, 1\)"),
        ((eps[..., ::2], z[..., ::2], logit, r), "expected both contiguous or both channels_last"),
        ((eps[0, 0, 0], z[0, 0, 0], logit, r), r"z has shape \(5\): expected \(B, C, ...\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    with pytest.raises(RuntimeError, match="grad has shape .* and dtype Double: expected those of z"):
        backward(grad.double(), eps, z, logit, r)
    with pytest.raises(RuntimeError, match="grad has strides"):
        backward(channels_last(grad), eps, z, logit, r)


# ---- the loader ----


def test_the_library_is_loaded_once_by_many_threads(fresh):
    loads = []

    def load(name):
        loads.append(name)
        return native.Library(name, None, False, "a reason", None)

    fresh.setattr(native, "_load", load)
    start, found = threading.Barrier(12), []

    def ask():
        start.wait()
        found.append(native.cpu())

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["cpu"] and all(library is found[0] for library in found)


PROCESSES = """
import multiprocessing, os, sys, threading
import torch
import lsgm_fast.ops
from lsgm_fast import native

def work(queue):
    torch.set_num_threads(1)
    z = torch.ones(2, 3, 4, 4)
    loaded = native.cpu().loaded
    out = torch.ops.lsgm_fast.mixed_score_cpu(z, z, torch.zeros(1, 3, 1, 1), torch.ones(())) if loaded else z
    queue.put((loaded, out.sum().item()))

if __name__ == "__main__":
    for method, load_first in (("fork", False), ("fork", True), ("spawn", True)):
        if load_first:
            assert native.cpu().loaded, native.cpu().reason
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=work, args=(queue,))
        if load_first:
            child.start()
        else:
            with native._lock:  # another thread of the parent is loading
                child.start()
        assert queue.get(timeout=120) == (True, 96.0), method
        child.join(60)
        assert child.exitcode == 0
    print("done")
"""


def test_fork_and_spawn(built, tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    environment = {env.LIBRARY_PATH: str(built), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert run(sys.executable, script, **environment).strip() == "done"


def test_importing_loads_nothing():
    code = "import sys, lsgm_fast.native; print('torch' in sys.modules, lsgm_fast.native._libraries)"
    assert run(sys.executable, "-c", code).strip() == "False {}"


def test_a_folder_of_ones_own(fresh, built):
    fresh.setenv(env.LIBRARY_PATH, str(built))
    assert native.folder() == built
    assert native.build_record()["libraries"]["cpu"]["built"]


def test_a_wrong_folder(fresh, tmp_path):
    fresh.setenv(env.LIBRARY_PATH, str(tmp_path / "nowhere"))
    library = native.cpu()
    assert not library.loaded and library.path is None and library.build is None
    assert "LSGM_FAST_LIBRARY_PATH is set" in library.reason and "nowhere" in library.reason
    assert native.cpu() is library


def test_a_damaged_library(fresh, tmp_path):
    (tmp_path / "liblsgm_fast_ops_cpu.so").write_bytes(b"\x7fELF of nothing")
    fresh.setenv(env.LIBRARY_PATH, str(tmp_path))
    library = native.cpu()
    assert not library.loaded and "could not be loaded" in library.reason and "reinstall" in library.reason


def test_the_reason_of_the_build_is_passed_on(fresh, tmp_path):
    record = {"libraries": {"cpu": {"built": False, "reason": "the moon was in the way: wait"}}}
    (tmp_path / "_lib").mkdir()
    (tmp_path / "_lib" / "build.json").write_text(json.dumps(record))
    fresh.setattr(native, "_PACKAGE", tmp_path)
    assert native.cpu().reason == "not built: the moon was in the way: wait"
    assert native.cpu().build == record


def test_a_damaged_build_record(fresh, tmp_path):
    (tmp_path / "_lib").mkdir()
    (tmp_path / "_lib" / "build.json").write_text('{"libraries": ')
    fresh.setattr(native, "_PACKAGE", tmp_path)
    library = native.cpu()
    assert library.build is None and "reinstall" in library.reason


def test_pytorch_that_does_not_fit(fresh, tmp_path):
    for name in ("cpu", "cuda"):
        (tmp_path / f"liblsgm_fast_ops_{name}.so").touch()
    fresh.setenv(env.LIBRARY_PATH, str(tmp_path))
    fresh.setattr(torch.version, "cuda", None)
    assert native.cuda().reason == f"needs a CUDA build of PyTorch, this is {torch.__version__}"
    fresh.setattr(torch, "__version__", "2.10.1+cu128")
    native._libraries.clear()
    assert native.cpu().reason == "needs PyTorch 2.11 or newer, this is 2.10.1+cu128"


@in_source_tree
def test_source_hash_follows_the_sources(tmp_path):
    for folder in ("csrc/mixed_score", "csrc/common", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    original = native.hash_sources(tmp_path, "mixed_score")
    assert original == native.source_hash("mixed_score") and re.fullmatch("[0-9a-f]{64}", original)
    kernels = tmp_path / "kernels"
    shared = [kernels / "_common.py", *kernels.glob("_*.py")]
    for path in (*tmp_path.glob("csrc/*/*"), kernels / "mixed_score.py", *shared):
        content = path.read_bytes() if path.exists() else b""
        path.write_bytes(content + b" ")
        assert native.hash_sources(tmp_path, "mixed_score") != original, path
        path.write_bytes(content)
    (tmp_path / "kernels" / "diffuse.py").write_text("another operation")
    assert native.hash_sources(tmp_path, "mixed_score") == original
    assert native.source_hash("no_such_operation") is None


def test_the_record_answers_where_there_are_no_sources(fresh, tmp_path):
    package = tmp_path / "site-packages" / "lsgm_fast"
    (package / "_lib").mkdir(parents=True)
    (package / "_lib" / "build.json").write_text(json.dumps({"sources": {"mixed_score": "abc"}}))
    fresh.setattr(native, "_PACKAGE", package)
    assert native.source_hash("mixed_score") == "abc" and native.source_hash("other") is None


def test_a_composed_operation_follows_what_it_uses(fresh, tmp_path):
    package = tmp_path / "lsgm_fast"
    files = {
        "composed/whole.py": "from lsgm_fast.composed.helper import f\nops.part_one(x)\n",
        "composed/whole_triton.py": "ops.part_two(x, backend='triton')\n",
        "composed/helper.py": "",
        "kernels/whole.py": "from lsgm_fast.kernels import part_three\n",
        "kernels/part_one.py": "",
        "kernels/part_two.py": "",
        "kernels/part_three.py": "",
        "kernels/other.py": "",
    }
    (tmp_path / "csrc").mkdir()
    for name, text in files.items():
        path = (tmp_path if name.startswith("kernels") else package) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    fresh.setattr(native, "_PACKAGE", package)
    original = native.source_hash("whole")
    assert original is not None and original == native.source_hash("whole")
    for name, text in files.items():
        path = (tmp_path if name.startswith("kernels") else package) / name
        path.write_text(text + " ")
        assert (native.source_hash("whole") != original) is (name != "kernels/other.py"), name
        path.write_text(text)


# ---- what the libraries are made of ----


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_library_uses_the_stable_abi_alone(built):
    for library in built.glob("*.so"):
        symbols = run("nm", "-D", "--undefined-only", library).split()
        named = {s.partition("@")[0] for s in symbols if len(s) > 1}
        of_torch = {s for s in named if "torch" in s.lower() or "c10" in s or s.startswith("_ZN2at")}
        unstable = {s for s in of_torch if not re.match("(aoti_)?torch_", s)}
        assert of_torch and not unstable, unstable
        assert not {s for s in named if s.startswith(("Py", "_Py"))}, (
            "a library of operators must not need Python"
        )
        exported = run("nm", "-D", "--defined-only", library)
        assert "lsgm" not in exported, "operators are registered, not exported"


@pytest.mark.slow  # five minutes of a processor; by default the same cases run in `_C.self_check()`
@needs_compiler
def test_cpp_unit_tests_under_the_sanitizers(tmp_path):
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    flags = ("-fsanitize=address,undefined", probe, "-o", tmp_path / "probe")
    done = subprocess.run(list(map(str, ("c++", *flags))), capture_output=True, check=False)
    sanitize = (
        "ON"
        if done.returncode == 0 and subprocess.run([tmp_path / "probe"], check=False).returncode == 0
        else "OFF"
    )
    options = ("-DLSGM_CPU=OFF", "-DLSGM_TESTS=ON", f"-DLSGM_SANITIZE={sanitize}", "-DCMAKE_BUILD_TYPE=None")
    # -Og: the analyses behind the warnings run as they do for -O1. What -O1 adds, it inlines into functions so large
    # that GCC takes three times as long over the sanitizers' code in them.
    run("cmake", "-S", ROOT, "-B", tmp_path / "build", *options, "-DCMAKE_CXX_FLAGS=-Og -Werror")
    run("cmake", "--build", tmp_path / "build", "--parallel", "2")
    said = run("ctest", "--test-dir", tmp_path / "build", "--output-on-failure")
    tests = {p.stem for p in (ROOT / "csrc" / "tests").glob("*.cpp")} - {"main"}
    assert f"100% tests passed, 0 tests failed out of {len(tests)}" in said


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_cuda_library_compiles_beside_any_pytorch(tmp_path):
    from importlib.util import find_spec

    package = Path(find_spec("torch").origin).parent
    # What is asked here is of the host's side and of the linker: no optimisation (which nvcc does of the kernels unless
    # it is told not to), and the kernels as PTX alone, of the oldest target. test_aot.py makes machine code of every
    # kernel as the build does.
    cheap = ("-DCMAKE_BUILD_TYPE=None", "-DLSGM_CUDA_ARCHS=80-virtual", "-DCMAKE_CUDA_FLAGS=-Xcicc -O0")
    options = ("-DLSGM_CPU=OFF", "-DLSGM_CUDA=ON", f"-DLSGM_TORCH={package}", *cheap)
    run("cmake", "-S", ROOT, "-B", tmp_path, *options)
    run("cmake", "--build", tmp_path, "--target", "lsgm_fast_ops_cuda", "--parallel", "2")
    library = tmp_path / "liblsgm_fast_ops_cuda.so"
    test_the_library_uses_the_stable_abi_alone(tmp_path)
    assert "aoti_torch_get_current_cuda_stream" in run("nm", "-D", "--undefined-only", library)
    assert "cudart" not in run("readelf", "-d", library), "the CUDA runtime must be linked in"
    if torch.version.cuda is None:
        code = "from lsgm_fast import native; print(native.cuda().loaded, native.cuda().reason)"
        said = run(sys.executable, "-c", code, LSGM_FAST_LIBRARY_PATH=str(tmp_path), PYTHONPATH=str(ROOT))
        assert said.startswith("False needs a CUDA build of PyTorch")


def test_the_module_reports_and_checks_itself():
    module = native.module()
    if module is None:
        pytest.skip("lsgm_fast._C is not built")
    assert module.build_report()["compiler"]
    assert module.cpu_report()["instruction_set"] in module.build_report()["instruction_sets"]
    assert isinstance(module.cuda_devices(), list)
    assert module.self_check() == []
