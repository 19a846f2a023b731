"""What a person sees of a training run: progress bar, log, TensorBoard, grids of images."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from lsgm_fast import distributed, random
from lsgm_fast import images as image_files
from lsgm_fast.data import ImageSource, batches, decode_text, open_data, spread
from lsgm_fast.evaluation import evaluate_nelbo
from lsgm_fast.files import atomic_path
from lsgm_fast.images import UInt8Array
from lsgm_fast.models.lsgm import LSGM
from lsgm_fast.models.nvae import NVAE
from lsgm_fast.training.config import TrainingConfig
from lsgm_fast.training.folder import RunFolder

GRID = 36
SHOWN = ("nelbo", "p_loss", "reconstruction", "kl", "kl_coefficient", "lr_vae", "lr_score")


class Display:
    """Reports one run: its files always, bar and messages where ``enabled``.

    TensorBoard is optional: without the package there are no event files, and the log says so once.
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder, enabled: bool) -> None:
        self.config, self.folder, self.enabled = config, folder, enabled
        self._bar: tqdm[Any] | None = None
        self._writer: Any = None
        self._files = False
        self._since, self._images = time.perf_counter(), 0
        self._failed = False

    def log_to_file(self) -> None:
        """From now on messages go to the run's log as well: this is the process that writes."""
        self._files = True

    def message(self, text: str) -> None:
        if self._files:
            with suppress(OSError):  # the log catches up with its next line
                self.folder.append_log(text)
        if self.enabled:
            tqdm.write(text) if self._bar is None else self._bar.write(text)

    @contextmanager
    def open(self, step: int, total: int) -> Iterator[None]:
        """Bar and event files for the duration of the block."""
        self._writer = self._tensorboard(step)
        self._bar = tqdm(
            initial=step,
            total=total,
            desc=self.config.stage,
            unit="step",
            disable=not self.enabled,
            mininterval=0.5,
        )
        self._since = time.perf_counter()
        try:
            with _quiet_event_thread():
                yield
        finally:
            self._bar.close()
            self._bar = None
            self._to_tensorboard(lambda writer: writer.close())
            self._writer = None

    def _tensorboard(self, step: int) -> Any:
        if not self._files:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.message('no TensorBoard files: pip install "lsgm-fast[train]" brings them')
            return None
        try:
            return SummaryWriter(str(self.folder.tensorboard), purge_step=step + 1)
        except OSError as error:
            self.message(f"no TensorBoard files: {error}; training goes on")
            return None

    def _to_tensorboard(self, write: Callable[[Any], None]) -> None:
        """Call ``write`` with the writer, if there is one. One that failed once never works again."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._writer = None
            self.message(f"no more TensorBoard files: {error}; training goes on")

    # -- during the run -----------------------------------------------------------------------------------------

    def step(self) -> None:
        """A step is done."""
        self._images += self.config.batch_size
        if self._bar is not None:
            self._bar.update()

    def log(self, line: dict[str, Any], mixing: torch.Tensor | None) -> None:
        """The averages since the last line: into the file, the log, TensorBoard and the bar."""
        seconds = time.perf_counter() - self._since
        line = line | {"images_per_second": self._images / seconds, "seconds": seconds}
        if torch.cuda.is_initialized():
            line["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        self._since, self._images = time.perf_counter(), 0
        shown = {name: line[name] for name in SHOWN if name in line}
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        try:
            self.folder.append_metrics(line)
            if self._files:
                self.folder.append_log(
                    f"step {line['step']}: {text}, {line['images_per_second']:.4g} images/s"
                )
            self._failed = False
        except OSError as error:
            if not self._failed:
                self.message(f"cannot write the log: {error}; training goes on")
            self._failed = True
        self._to_tensorboard(lambda writer: _events(writer, line, mixing))
        if self._bar is not None:
            self._bar.set_postfix_str(
                ", ".join(text.split(", ")[:3]) + f", {line['images_per_second']:.4g} images/s"
            )

    def samples(self, model: LSGM, source: ImageSource, step: int) -> None:
        """A grid of images from the model, or their text; in stage 1 also reconstructions beside their originals."""
        assert isinstance(model.vae, NVAE)
        symbols = model.vae.config.symbols
        if not symbols and source.shape[0] not in (1, 3):
            self.message(f"no pictures of samples: {source.shape[0]} channels without symbols")
            return
        grids = {}
        n = GRID
        if model.prior is not None:
            grids["samples"] = model.sample(n, seed=0, evaluations=20)
        else:
            z = random.normal(0, range(n), "prior", model.latent_shape, device=model.device)
            grids["samples"] = model.decode(z)
            config = self.config.data
            batch = next(
                iter(batches(source, config, batch_size=min(n // 2, len(source)), seed=0, train=False))
            )
            x = batch.images.to(model.device)
            vae = model.vae
            groups = model.encode(x)
            lower = [g.eps for g in groups[vae.config.groups_per_scale :]]
            again = model.decode(vae.merge_groups([g.eps for g in groups]), lower_noise=lower)
            original = x if x.shape == again.shape else vae.crop_images(x)
            grids["reconstructions"] = torch.stack((original, again), 1).flatten(0, 1)
        for name, images in grids.items() if distributed.is_main() else ():
            if symbols:
                self._text(name, decode_text(images, symbols), step)
                continue
            grid = image_files.make_grid(image_files.to_uint8(images))
            path = self.folder.samples / f"{name}-{step:08d}.png"
            try:
                image_files.save_png(path, grid)
            except OSError as error:
                self.message(f"cannot write {path}: {error}")
            self._to_tensorboard(partial(_image, name=name, grid=grid, step=step))

    def _text(self, name: str, lines: list[str], step: int) -> None:
        path = self.folder.samples / f"{name}-{step:08d}.txt"
        try:
            self.folder.append_log(f"step {step}: the first of {path.name}: {lines[0]!r}")
            with atomic_path(path, make_folders=True) as temporary:
                temporary.write_text("\n".join(map(repr, lines)) + "\n", encoding="utf-8")
        except OSError as error:
            self.message(f"cannot write {path}: {error}")

    def evaluation(self, model: LSGM, step: int) -> None:
        """The NELBO of held-out images."""
        config = self.config.data
        source = spread(open_data(config, "held_out"), self.config.eval_images)
        stream = batches(
            source, config, batch_size=min(self.config.batch_size, len(source)), seed=0, train=False
        )
        report = evaluate_nelbo(model, stream)
        error = report.nelbo.standard_error or math.nan
        self.message(
            f"step {step}: held-out NELBO {report.nelbo.mean:.2f} +- {error:.2f} nats of {report.images} images "
            f"({report.bits_per_dim.mean:.4f} bits/dim)"
        )
        line = {"step": step, "held_out_nelbo": report.nelbo.mean, "held_out_standard_error": error}
        try:
            self.folder.append_metrics(line)
        except OSError as failure:
            self.message(f"cannot write the log: {failure}")
        self._to_tensorboard(lambda writer: writer.add_scalar("held_out_nelbo", report.nelbo.mean, step))


@contextmanager
def _quiet_event_thread() -> Iterator[None]:
    """TensorBoard's thread raises what went wrong in the next call as well: its own traceback says nothing more."""
    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            previous(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous


def _events(writer: Any, line: dict[str, Any], mixing: torch.Tensor | None) -> None:
    step = line["step"]
    for name, value in line.items():
        if isinstance(value, list):
            for i, item in enumerate(value):
                writer.add_scalar(f"{name}/{i}", item, step)
        elif name != "step":
            writer.add_scalar(name, value, step)
    if mixing is not None:
        writer.add_histogram("mixing_coefficient", mixing.cpu(), step)
    writer.flush()  # else a kill loses up to two minutes of them


def _image(writer: Any, name: str, grid: UInt8Array, step: int) -> None:
    writer.add_image(name, grid, step, dataformats="HWC")
