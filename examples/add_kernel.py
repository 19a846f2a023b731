"""An operation with a kernel of its own: written, proved against its reference, and chosen by the dispatcher.

    python3 examples/add_kernel.py

The operation is classifier-free guidance, ``u + w (c - u)`` with a weight per sample (Ho and Salimans 2022): three
passes over memory for PyTorch, one for the kernel. The kernel is C++, compiled here and called by its address. Without
a compiler the reference runs, and the dispatcher says why. ``--broken`` leaves an element out, to see it caught.

This is the short way, for a script. CONTRIBUTING.md describes the way into the library, with operators that
``torch.compile`` and autograd know.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

import lsgm_fast
from lsgm_fast import testing
from lsgm_fast.dispatch import Impl, define_op

SOURCE = """
extern "C" void guide(const float* c, const float* u, const float* w, float* out, long batch, long size) {
  for (long b = 0; b < batch; ++b)
    for (long i = b * size; i < (b + 1) * size - LEFT_OUT; ++i) out[i] = u[i] + w[b] * (c[i] - u[i]);
}
"""


def reference(c: torch.Tensor, u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The specification: plain PyTorch, in float32 or wider."""
    dtype = torch.promote_types(c.dtype, torch.float32)
    w = weight.to(dtype).reshape(-1, *(1,) * (c.dim() - 1))
    return (u.to(dtype) + w * (c.to(dtype) - u.to(dtype))).to(c.dtype)


@define_op(reference)
def guided_noise(
    c: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """``u + w (c - u)``: the noise predicted with the condition, c, carried on from that without, u.

    Args:
        c, u: (B, ...), one shape, dtype and device. weight: (B,).

    Returns:
        (B, ...), dtype of c.

    Raises:
        ValueError: shapes do not match.
    """
    if c.shape != u.shape or weight.shape != c.shape[:1]:
        raise ValueError(
            f"guided_noise expects c and u of one shape and a weight per sample, got {tuple(c.shape)}, "
            f"{tuple(u.shape)} and {tuple(weight.shape)}"
        )


def compiled(folder: str, left_out: int) -> Callable[..., None] | None:
    """The kernel's function, or None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        return None
    source, library = Path(folder) / "guide.cpp", Path(folder) / "guide.so"
    source.write_text(SOURCE)
    flags = ["-O3", "-fPIC", "-shared", f"-DLEFT_OUT={left_out}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).guide
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 2
    function.restype = None
    return function


def register(function: Callable[..., None] | None) -> None:
    """Tell the dispatcher of the kernel, and of the inputs that it cannot take."""

    def kernel(c: torch.Tensor, u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert function is not None
        out = torch.empty_like(c)
        pointers = [t.data_ptr() for t in (c, u, weight, out)]
        function(*pointers, c.shape[0], c[0].numel() if c.numel() else 0)
        return out

    def reasons(c: torch.Tensor, u: torch.Tensor, weight: torch.Tensor) -> list[str]:
        if function is None:
            return ["no C++ compiler was found: install g++, or set CXX"]
        why = []
        for name, tensor in (("c", c), ("u", u), ("weight", weight)):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
                why.append(f"{name} is not a contiguous float32 tensor on the CPU")
            if tensor.requires_grad and torch.is_grad_enabled():
                why.append(f"{name} wants a gradient, and the kernel has none")
        return why

    guided_noise.register(Impl("cpu", kernel, reasons, priority=10, differentiable=False, tolerance=2.0))


def inputs(
    draw: testing.Draw, shape: tuple[int, ...], dtype: torch.dtype, network_dtype: torch.dtype, layout: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call, for the proof."""
    c, u = (draw.normal(*shape, dtype=dtype, layout=layout) for _ in range(2))
    return (c, u, draw.uniform(shape[0], low=0.0, high=8.0)), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--broken", action="store_true", help="leave the last element of every sample out")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        register(compiled(folder, int(options.broken)))

        # Published sizes and awkward ones (odd, empty), every dtype, gaps in memory: what the kernel takes, it must get
        # right. Unwritten memory is NaN.
        samples = list(
            testing.OpSamples(inputs, testing.LATENT_SHAPES).all(device="cpu", seed=0, large=False)
        )
        able = [sample for sample in samples if not testing.unsupported(guided_noise, "cpu", sample)]
        with testing.poison_uninitialized():
            for sample in able:
                testing.check_forward(guided_noise, "cpu", sample)
        print(f"the kernel is right on {len(able)} of {len(samples)} samples, and refuses the others\n")

        (c, u, weight), _ = inputs(
            testing.Draw(), (16, 128, 16, 16), torch.float32, torch.float32, "contiguous"
        )
        for arguments in ((c, u, weight), (c.double(), u.double(), weight)):
            print(lsgm_fast.explain(guided_noise, *arguments), end="\n\n")
        with lsgm_fast.record() as log:
            guided_noise(c, u, weight)
        print("ran:", log.backends())
        for backend in guided_noise.backends():
            if backend in ("reference", log.backends()["guided_noise"]):
                names = {"f": guided_noise, "c": c, "u": u, "w": weight, "b": backend}
                call = Timer("f(c, u, w, backend=b)", globals=names)
                print(f"{backend:10s} {call.blocked_autorange(min_run_time=0.2).median * 1e6:8.0f} us")


if __name__ == "__main__":
    main()
