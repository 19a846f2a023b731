"""A program that runs `lsgm-fast` in forks of itself, which need not import PyTorch again, and kills them on demand.

One JSON list per line on standard input: runs that are to go on side by side. Each is an object of ``arguments``,
``environ`` and, where it is to die, ``kill``: seconds, or the name of a moment of :data:`MOMENTS` and which time it
happens. For every line it prints a list of what became of them: the exit code, or minus the signal.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from typing import Any

import numpy as np
import torch

import lsgm_fast  # noqa: F401
from lsgm_fast import checkpoints, cli, images  # noqa: F401


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def at_rename(now: Countdown) -> None:
    replace = os.replace

    def dying(*arguments: Any) -> None:
        if now():
            die()
        replace(*arguments)

    os.replace = dying


def after_rename(now: Countdown) -> None:
    replace = os.replace

    def dying(*arguments: Any) -> None:
        replace(*arguments)
        if now():
            die()

    os.replace = dying


def in_file(now: Countdown) -> None:
    savez = np.savez

    def dying(file: Any, array: Any) -> None:
        if now():
            whole = io.BytesIO()
            savez(whole, array)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        savez(file, array)

    np.savez = dying


def after_batch(now: Countdown) -> None:
    to_uint8 = images.to_uint8

    def dying(batch: Any) -> Any:
        if now():
            die()
        return to_uint8(batch)

    images.to_uint8 = dying


MOMENTS = {"rename": at_rename, "renamed": after_rename, "file": in_file, "batch": after_batch}


def start(run: dict[str, Any]) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.environ.update(run.get("environ", {}))
        os.dup2(2, 1)  # standard output is the answer's
        if isinstance(run.get("kill"), list):
            moment, count = run["kill"]
            MOMENTS[moment](Countdown(count))
        code = cli.main(run["arguments"])
    finally:
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        runs = json.loads(line)
        began = time.monotonic()
        processes = [start(run) for run in runs]
        timed = [(run["kill"], p) for run, p in zip(runs, processes, strict=True) if _is_time(run)]
        for seconds, process in sorted(timed):
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            os.kill(process, signal.SIGKILL)  # at worst a zombie: it is not waited for before
        ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps({"ended": ended, "seconds": time.monotonic() - began}), flush=True)


def _is_time(run: dict[str, Any]) -> bool:
    return isinstance(run.get("kill"), (int, float))


if __name__ == "__main__":
    main()
