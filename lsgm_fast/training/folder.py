"""The folder of a training run: configuration, checkpoints, figures over time, images, log.

::

    run/config.yaml            the complete configuration
        run.json               versions, machine, command
        log.txt                what was printed, with the time of day
        metrics.jsonl          one line per logged step
        checkpoints/step-00001000.pt    everything needed to go on, the newest few
        samples/samples-00001000.png
        tensorboard/
        model.safetensors      the model as of the newest checkpoint (averaged weights), for sampling; written first
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lsgm_fast.errors import CheckpointError
from lsgm_fast.files import atomic_path
from lsgm_fast.models.lsgm import LSGM
from lsgm_fast.training.config import TrainingConfig, differences, read_config, write_config

logger = logging.getLogger("lsgm_fast")

FORMAT = "lsgm_fast.training"
VERSION = 1
_NAME = re.compile(r"^step-(\d+)\.pt$")
# What the files of a run are called until they are complete; a process that is killed leaves one. The first form is
# atomic_path's. The second is that of safetensors 0.8, whose own writer renames as well.
_TEMPORARY = re.compile(
    r"^\.((config|run|metrics|model)|(step|samples|reconstructions)-\d+)"
    r"\.[0-9a-f]{8}\.(yaml|json|jsonl|safetensors|pt|png|txt)$"
    r"|^\.tmp[0-9A-Za-z]{6}$"
)


class RunFolder:
    """Reads and writes one run's files; nothing is ever half-written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "log.txt"
        self.config = self.path / "config.yaml"
        self.model = self.path / "model.safetensors"
        self.tensorboard = self.path / "tensorboard"
        self._unwritten: dict[Path, list[str]] = {self.metrics: [], self.log: []}

    def open(self, config: TrainingConfig, environment: dict[str, Any]) -> None:
        """Make the folder, or check that the run in it has the same configuration.

        Raises:
            ValueError: the folder holds a run with another configuration; the message lists what differs.
            NotADirectoryError, FileExistsError: the folder holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file: give a folder for the run")
        if self.config.exists():
            old = TrainingConfig.from_dict(read_config(self.config))
            changed = differences(old, config)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another configuration ({'; '.join(changed)}): "
                    "give another folder, or the same options to go on with it"
                )
        elif self.path.exists() and any(not _TEMPORARY.match(entry.name) for entry in self.path.iterdir()):
            raise FileExistsError(f"{self.path} is not empty and holds no training run: give another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._sweep()
        # First of all: it is what makes this folder a run's, should the process die here.
        write_config(config, self.config)
        self.checkpoints.mkdir(exist_ok=True)
        self.samples.mkdir(exist_ok=True)
        with atomic_path(self.path / "run.json") as temporary:
            temporary.write_text(json.dumps(environment, indent=1) + "\n")

    def _sweep(self) -> None:
        """Remove the temporary files of processes that were killed while writing."""
        for folder in (self.path, self.checkpoints, self.samples):
            if folder.is_dir():
                for entry in folder.iterdir():
                    if _TEMPORARY.match(entry.name):
                        entry.unlink(missing_ok=True)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = (_NAME.match(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"

    def save(self, state: dict[str, Any], keep: int) -> Path:
        """Write a checkpoint, then remove all but the newest ``keep``.

        Raises:
            OSError: it could not be written (disk full, no permission); older ones stay.
        """
        path = self.checkpoint(state["step"])
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                torch.save({"format": FORMAT, "version": VERSION} | state, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # PyTorch's writer hides the system's error
            raise self._cannot_write(path, error) from error
        for old in self.steps()[:-keep]:
            self.checkpoint(old).unlink(missing_ok=True)
        return path

    def save_model(self, model: LSGM) -> None:
        """Write the model for sampling.

        Raises:
            OSError: it could not be written; an older one stays.
        """
        try:
            model.save(self.model)
        except SafetensorError as error:  # its writer's form of the system's error
            raise self._cannot_write(self.model, error) from error

    def _cannot_write(self, path: Path, error: Exception) -> OSError:
        free = shutil.disk_usage(self.path).free
        reason = str(error).strip().splitlines()[0]
        return OSError(errno.ENOSPC, f"cannot be written ({free / 1e6:.0f} MB free): {reason}", str(path))

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read; None where there is none.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.checkpoint(step)
            try:
                with open(path, "rb") as file:
                    state = torch.load(file, map_location="cpu", weights_only=True)
                if state.get("format") == FORMAT and state.get("version") == VERSION:
                    return state
                reason = f"format {state.get('format')!r}, version {state.get('version')!r}"
            except Exception as error:  # damaged bytes reach every corner of the unpickler
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            logger.warning("checkpoint %s cannot be read and is passed over (%s)", path, reason)
        if steps:
            raise CheckpointError(
                f"no checkpoint in {self.checkpoints} can be read: restore one, or start anew in another folder"
            )
        return None

    # -- figures over time --------------------------------------------------------------------------------------

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line of figures.

        Raises:
            OSError: it could not be written, and is kept for the next call.
        """
        self._append(self.metrics, json.dumps(line))

    def append_log(self, text: str) -> None:
        """Add a line to the log, with the time. As :meth:`append_metrics` otherwise."""
        self._append(self.log, time.strftime("%Y-%m-%d %H:%M:%S ") + text)

    def _append(self, path: Path, line: str) -> None:
        lines = self._unwritten[path]
        lines.append(line + "\n")
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.writelines(lines)
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)  # half a line would spoil the next one
            raise
        lines.clear()

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines."""
        if not self.metrics.exists():
            return []
        lines = []
        for text in self.metrics.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the line that a kill cut off
                continue
        return lines

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again."""
        if not self.metrics.exists():
            return
        kept = "".join(json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step)
        if kept != self.metrics.read_text():
            with atomic_path(self.metrics) as temporary:
                temporary.write_text(kept)
