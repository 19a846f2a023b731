"""Proof before use: a fused kernel is compared with the reference before ``auto`` runs it on a device.

Kernels run on hardware that their authors may never have touched. The first time ``auto`` would use a compiled or
Triton kernel on a device, it runs on a small input (forward and backward) against the float64 reference. A mismatch,
or an exception, disables the kernel with one warning; the reference runs instead. Verdicts are kept on disk per
device, driver, versions and source hash. Nothing is tested while a CUDA graph is being captured; under
``torch.compile`` the verdict is a constant of the trace.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import os
import subprocess
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lsgm_fast import env
from lsgm_fast._constant import assume_constant_result
from lsgm_fast.files import atomic_path

logger = logging.getLogger("lsgm_fast")

# (op, backend, device type, device index) -> None (passed) or what is wrong.
_Key = tuple[str, str, str, int | None]
_verdicts: dict[_Key, str | None] = {}
_lock = threading.RLock()
_LOCK_SECONDS = 10.0


def _after_fork() -> None:
    # Another thread of the parent may have held the lock, and that thread does not exist in the child.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@assume_constant_result
def problem(op: str, backend: str, device_type: str, device_index: int | None) -> str | None:
    """Why ``auto`` must not use this kernel on this device; None once it has passed. Runs the test where needed."""
    key = (op, backend, device_type, device_index)
    try:
        return _verdicts[key]
    except KeyError:
        pass
    if device_type == "meta" or not env.selftest_enabled():
        return None
    if device_type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "untested on this device, and a CUDA graph is being captured"
    with _lock:
        if key not in _verdicts:
            device = device_type if device_index is None else f"{device_type}:{device_index}"
            _verdicts[key] = _verdict(op, backend, device)
        return _verdicts[key]


def known(op: str, backend: str, device: torch.device) -> tuple[str, str | None]:
    """(what is known in words, the failure if it failed) without running anything."""
    key = (op, backend, device.type, device.index)
    if key in _verdicts:
        failure = _verdicts[key]
    else:
        # Asking CUDA for its properties could start a context, which an explanation must not do.
        stored = _stored(op, backend, str(device)) if device.type == "cpu" else None
        if stored is None:
            return "self-test: untested", None
        failure = stored[0]
    return ("self-test: passed", None) if failure is None else ("self-test: failed", failure)


def forget() -> None:
    """Drop this process's verdicts (the file keeps its own)."""
    with _lock:
        _verdicts.clear()


def _verdict(op: str, backend: str, device: str) -> str | None:
    stored = _stored(op, backend, device)
    if stored is not None:
        failure = stored[0]
    else:
        failure, lasting = _run(op, backend, device)
        if lasting:
            date = datetime.datetime.now().isoformat(timespec="seconds")
            _store(fingerprint(op, backend, device), {"failure": failure, "date": date})
    if failure is not None:
        warnings.warn(
            f"lsgm_fast: the {backend} kernel of {op} is disabled on {device}, the reference runs instead "
            f"(kept in {_FILE} of the cache folder, see LSGM_FAST_CACHE): {failure}",
            RuntimeWarning,
            stacklevel=6,
        )
    return failure


def _run(op: str, backend: str, device: str) -> tuple[str | None, bool]:
    """Compare with the reference, in a thread of its own: none of the caller's modes is on there.

    Returns:
        (what is wrong or None, whether that is lasting): a mismatch will be one again, while memory may have run out
        or another program disturbed the device, so other failures count for this process alone.
    """
    result: list[tuple[str | None, bool]] = []

    def test() -> None:
        from lsgm_fast import dispatch, testing

        try:
            # A reference may call other operations; their kernels are not what is tested, and nor is their lock free.
            with dispatch.use_backend("reference"):
                samples = [
                    sample
                    for sample in testing.selftest_sample(op, device)
                    if not testing.unsupported(op, backend, sample)
                ]
                for sample in samples:
                    testing.check_forward(op, backend, sample)
                    if testing.has_gradients(op, backend, sample):
                        testing.check_backward(op, backend, sample)
            result.append((None, True) if samples else ("it supports none of the self-test's samples", False))
        except Exception as error:
            # Whatever a kernel does wrong, a compile error or a failed launch included, the reference still works.
            text = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            result.append((text, isinstance(error, AssertionError)))

    thread = threading.Thread(target=test, name=f"lsgm_fast self-test of {op}")
    thread.start()
    thread.join()
    logger.info("self-test of %s on %s, backend %s: %s", op, device, backend, result[0][0] or "passed")
    return result[0]


# -- the file -------------------------------------------------------------------------------------------------------


def fingerprint(op: str, backend: str, device: str) -> str:
    """Everything that a verdict depends on, as one line."""
    from lsgm_fast import info, native

    triton = "-"
    if backend == "triton":
        import triton as module

        triton = module.__version__
    kind = torch.device(device)
    if kind.type == "cuda":
        properties = torch.cuda.get_device_properties(kind)
        hardware = f"{properties.name} sm_{properties.major}{properties.minor} driver {_driver_version()}"
    else:
        hardware = f"{kind.type} {info.cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
    source = native.source_hash(op) or "unknown sources"
    parts = (op, backend, source, hardware, f"torch {torch.__version__}", f"triton {triton}")
    return " | ".join(parts)


@functools.cache
def _driver_version() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split(
            "\n"
        )[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


_FILE = "selftest.json"


def _path() -> Path:
    return env.cache_dir() / _FILE


def _stored(op: str, backend: str, device: str) -> tuple[str | None] | None:
    """The kept verdict in a tuple, or None where there is none that can be read."""
    entry = _read().get(fingerprint(op, backend, device))
    if not isinstance(entry, dict) or not isinstance(entry.get("failure", 0), (str, type(None))):
        return None
    return (entry["failure"],)


def _read() -> dict[str, Any]:
    try:
        stored = json.loads(_path().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    return stored if isinstance(stored, dict) else {}


def _store(print_: str, verdict: dict[str, str | None]) -> None:
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            stored = _read()
            stored[print_] = verdict
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(stored, indent=1))
    except (OSError, RuntimeError, Timeout) as error:
        logger.info("self-test verdicts are not kept: %s", error)
