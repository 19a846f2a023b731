"""The training loop of both stages: steps, checkpoints, what a person sees; any number of processes."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lsgm_fast import distributed, trace
from lsgm_fast.data import Batch, batches, check_data, open_data
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.models.lsgm import LSGM
from lsgm_fast.models.ncsnpp import NCSNpp
from lsgm_fast.models.nvae import NVAE
from lsgm_fast.training.config import TrainingConfig
from lsgm_fast.training.display import Display
from lsgm_fast.training.folder import RunFolder
from lsgm_fast.training.inactive import hide_channels, inactive_channels
from lsgm_fast.training.kl import kl_coefficient, regularisation_weight
from lsgm_fast.training.objectives import LSGMObjective, VAEObjective, Weights, draw
from lsgm_fast.training.optim import EMA, build_optimizer, learning_rate, set_learning_rate
from lsgm_fast.training.regularisation import SpectralRegulariser
from lsgm_fast.training.trouble import first_nonfinite_module

logger = logging.getLogger("lsgm_fast")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Result:
    """How a run ended. ``model``: the file for sampling; ``interrupted``: Ctrl-C or a signal, saved; ``metrics``: the
    last logged line."""

    folder: Path
    model: Path
    step: int
    interrupted: bool
    metrics: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """One training run in one folder: starts it, or goes on with it where its newest checkpoint left off.

    The state after a step is a function of the configuration and the step: the order of the data, every random draw
    and all rates are computed from the seed and the step's number, and the rest (weights, optimizers, averages) is in
    the checkpoint. So a run that is killed and started again gives the numbers of one that was not.

    Args:
        config: the run. folder: created if needed.
        device: None: that of the process (a GPU if there is one).
        progress: show a progress bar and messages.

    Raises:
        ValueError: the data do not fit the model, the folder holds another run, a batch cannot be divided among the
            processes.
    """

    _trains_vae: bool
    _scaler: torch.amp.GradScaler

    def __init__(
        self,
        config: TrainingConfig,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> None:
        self.device = distributed.init(device)
        self.config = config
        world = distributed.world_size()
        self._micro_batch = config.batch_size // config.accumulate
        if self._micro_batch % world or self._micro_batch < world:
            raise ValueError(
                f"a batch of {config.batch_size} in {config.accumulate} part(s) cannot be divided among {world} "
                "processes: make batch_size a multiple of accumulate times the number of processes"
            )
        self.source = open_data(config.data, "train")
        check_data(self.source, config.model.vae)
        if len(self.source) < config.batch_size:
            raise ValueError(
                f"the data set has {len(self.source)} images, fewer than batch_size={config.batch_size}"
            )
        if config.eval_every:
            open_data(config.data, "held_out")  # what is missing is said now, and not at the first evaluation
        self.total_steps = config.total_steps(len(self.source))
        self.warmup = config.warmup(len(self.source))
        self.folder = RunFolder(folder)
        self.model = self._build_model()
        self.step = 0
        self._inactive: list[int] = []
        self._regularisers = {
            "vae": SpectralRegulariser(config.seed),
            "score": SpectralRegulariser(config.seed),
        }
        self._sums: dict[str, torch.Tensor] = {}
        self._stop_asked = False  # here, by a signal
        self._stop = False  # agreed upon by all processes
        self._show = Display(config, self.folder, progress and distributed.is_main())
        self._prepare()

    # -- what is trained ----------------------------------------------------------------------------------------

    def _build_model(self) -> LSGM:
        config = self.config.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = LSGM.from_config(config if self.config.stage == "lsgm" else config.replace(score=None))
        if self.config.stage == "lsgm" and self.config.vae is not None:
            from lsgm_fast.checkpoints import load

            stage1 = load(self.config.vae)
            if not isinstance(stage1.vae, NVAE) or stage1.vae.config != config.vae:
                raise ValueError(f"the VAE in {self.config.vae} is not the one of this configuration")
            model.vae.load_state_dict(stage1.vae.state_dict())
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(device=self.device, memory_format=memory_format)  # type: ignore[call-overload]

    def _prepare(self) -> None:
        """Objective, optimizers and averages around the model, and the state of the newest checkpoint in them."""
        c = self.config
        _in_process_0(lambda: self.folder.open(c, _environment(self.device)))
        if distributed.is_main():
            self._show.log_to_file()
        state = self.folder.load()
        step = state["step"] if state is not None else 0
        if (expected := distributed.broadcast_object(step)) != step:
            raise ValueError(
                f"process {distributed.rank()} finds step {step} in {self.folder.path} and process 0 step {expected}: "
                "the run's folder must be one that all processes share"
            )
        vae, prior = self.model.vae, self.model.prior
        assert isinstance(vae, NVAE)
        vae.recompute = c.recompute
        self._trains_vae = c.stage == "vae" or c.objective.train_vae
        self.ema: EMA | None = None
        self._ema_network: NCSNpp | None = None
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if self._trains_vae:
            self._optimizers["vae"] = build_optimizer(c.vae_optimizer, vae.parameters())
        else:
            vae.requires_grad_(False)
        if isinstance(prior, NCSNpp):
            prior.recompute = c.recompute
            if state is not None:
                self._inactive = state["inactive"]
            elif c.objective.drop_inactive:
                self._inactive = self._find_inactive()
            hide_channels(prior, self._inactive, start=state is None)
            trained = [p for p in prior.parameters() if p.requires_grad]
            self._optimizers["score"] = build_optimizer(c.score_optimizer, trained)
            self.ema = EMA(prior, c.ema)
            if c.objective.update_q_ema:
                self._ema_network = copy.deepcopy(prior).requires_grad_(False)
            self.objective: nn.Module = LSGMObjective(
                self.model,
                c.objective,
                self._regularisers["vae"],
                self._regularisers["score"],
                score_convolutions=c.regularisation.score_convolutions,
                ema=self._ema_network,
            )
        else:
            self.objective = VAEObjective(vae, self._regularisers["vae"])
        self._scaler = torch.amp.GradScaler(
            self.device.type, enabled=c.precision == "fp16", init_scale=2.0**10
        )
        if state is not None:
            self._restore(state)
        _in_process_0(lambda: self.folder.forget_after(self.step))
        self._parallel: nn.Module = self.objective
        if distributed.world_size() > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            # Running statistics are the same everywhere already: they come from the statistics of all processes.
            named = inspect.signature(DistributedDataParallel).parameters
            option = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
            self._parallel = DistributedDataParallel(
                self.objective, device_ids=devices, gradient_as_bucket_view=True, **{option: False}
            )

    def _find_inactive(self) -> list[int]:
        assert isinstance(self.model.vae, NVAE)
        threshold = self.config.objective.inactive_threshold
        found = inactive_channels(self.model.vae, self._evaluation_batches(1000), threshold, self.config.seed)
        self._show.message(
            f"{len(found)} of {self.model.latent_shape[0]} latent channels carry at most {threshold} nats: hidden"
        )
        return found

    # -- state --------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "optimizers": {name: o.state_dict() for name, o in self._optimizers.items()},
            "scaler": self._scaler.state_dict(),
            "regularisers": {name: r.state_dict() for name, r in self._regularisers.items()},
            "inactive": self._inactive,
            "sums": self._sums,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self._scaler.load_state_dict(state["scaler"])
        for name, regulariser in self._regularisers.items():
            regulariser.load_state_dict(state["regularisers"][name])
        self._sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self._show.message(f"going on at step {self.step} of {self.total_steps}")

    def save(self) -> None:
        """Write the model for sampling and a checkpoint; in a group, for process 0 to call.

        Raises:
            OSError: the disk is full or the like; older files stay as they were.
        """
        # In this order: a run that is killed in between does these steps again, and both are written.
        with self._averaged():
            self.folder.save_model(self.model)
        self.folder.save(self._state(), self.config.keep)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model as it is sampled from: averaged score weights, eval mode."""
        modes = {module: module.training for module in self.model.modules()}
        with self.ema.applied() if self.ema is not None else nullcontext():
            self.model.eval()
            try:
                yield
            finally:
                for module, mode in modes.items():
                    module.training = mode

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Train to the end, or until Ctrl-C (or SIGTERM), which saves and returns.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; names the step and the first module. Nothing is
                saved then: the last checkpoint is good.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            self._signals(),
            self._show.open(self.step, self.total_steps),
        ):
            self._train_mode()
            stream = batches(
                self.source,
                self.config.data,
                batch_size=self._micro_batch,
                seed=self.config.seed,
                first_step=self.step * self.config.accumulate,
                steps=(self.total_steps - self.step) * self.config.accumulate,
                rank=distributed.rank(),
                world=distributed.world_size(),
            )
            last: dict[str, Any] = {}
            saved = self.step
            while self.step < self.total_steps and not self._stop:
                last = self._one_step(stream)
                self._show.step()
                if self._due(self.config.log_every):
                    self._log(last)
                if self._due(self.config.save_every):
                    saved = self._try_saving(saved)
                if self.config.sample_every and self._due(self.config.sample_every):
                    self._sample()
                if self.config.eval_every and self._due(self.config.eval_every):
                    self._evaluate()
            if distributed.broadcast_object(saved != self.step or not self.folder.model.exists()):
                _in_process_0(self.save)
            distributed.barrier()
        return Result(self.folder.path, self.folder.model, self.step, self.step < self.total_steps, last)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def _train_mode(self) -> None:
        self.objective.train()
        if not self._trains_vae and self.config.objective.frozen_bn == "running":
            self.model.vae.eval()

    @trace.spanned("train_step")
    def _one_step(self, stream: Iterator[Batch]) -> dict[str, Any]:
        c, step = self.config, self.step
        weights = self._weights(step)
        if self._ema_network is not None and self.ema is not None:
            self.ema.copy_to(self._ema_network)
        optimizers = {"vae": c.vae_optimizer, "score": c.score_optimizer}
        rates = {}
        for name, optimizer in self._optimizers.items():
            rates[f"lr_{name}"] = learning_rate(optimizers[name], step, self.warmup, self.total_steps)
            set_learning_rate(optimizer, rates[f"lr_{name}"])
            optimizer.zero_grad(set_to_none=True)
        parts: dict[str, torch.Tensor] = {}
        for part in range(c.accumulate):
            batch = next(stream)
            last = part == c.accumulate - 1
            waiting = isinstance(self._parallel, DistributedDataParallel) and not last
            with self._parallel.no_sync() if waiting else nullcontext():  # type: ignore[operator]
                loss, here = self._forward(self._parallel, batch, weights, part)
                if not self._agree(bool(torch.isfinite(loss.detach()))):
                    self._give_up(batch, weights, part, "loss")
                with trace.span("backward"):
                    self._scaler.scale(loss / c.accumulate).backward()
            for name, value in here.items():
                parts[name] = parts[name] + value / c.accumulate if name in parts else value / c.accumulate
        norms = {}
        for name, optimizer in self._optimizers.items():
            self._scaler.unscale_(optimizer)
            norms[f"grad_norm_{name}"] = self._clip(optimizer)
        if c.precision != "fp16" and not self._agree(all(bool(torch.isfinite(n)) for n in norms.values())):
            self._give_up(batch, weights, part, "gradient")
        with trace.span("optimizer"):
            for optimizer in self._optimizers.values():
                self._scaler.step(optimizer)
            self._scaler.update()
        if self.ema is not None:
            self.ema.update()
        self.step += 1
        parts = _over_all_processes(parts)
        for name, value in (parts | norms | {"count": torch.ones((), device=self.device)}).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        return (
            {name: value.detach() for name, value in parts.items()} | rates | {"kl_coefficient": weights.kl}
        )

    @trace.spanned("forward")
    def _forward(
        self, objective: nn.Module, batch: Batch, weights: Weights, part: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        c = self.config
        torch.manual_seed(_dropout_seed(c.seed, self.step, part, distributed.rank()))
        assert isinstance(self.model.vae, NVAE)
        draws = draw(
            c.seed,
            batch.positions,
            self.model.vae,
            self.device,
            c.objective if c.stage == "lsgm" else None,
        )
        images = batch.images.to(self.device, non_blocking=True)
        options: dict[str, Any] = {}
        if c.stage == "lsgm" and c.precision == "fp16":
            options["scale"] = self._scaler.get_scale()
        dtype = _DTYPES[c.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=c.precision != "fp32"):
            return objective(images, draws, weights, **options)

    def _weights(self, step: int) -> Weights:
        c = self.config
        kl = kl_coefficient(c.kl, step, self.total_steps)
        r = c.regularisation
        return Weights(
            kl,
            c.kl.balance,
            regularisation_weight(r.vae_start, r.vae, kl) if self._trains_vae else 0.0,
            r.score if c.stage == "lsgm" else 0.0,
        )

    @trace.spanned("clip")
    def _clip(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Norm of the gradients, before they are clipped to ``clip_norm``."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm, foreach=True)
        return norm

    def _agree(self, good: bool) -> bool:
        """Whether all is well in every process; also carries a request to stop to all of them."""
        if distributed.world_size() == 1:
            return good
        flags = torch.tensor([float(not good), float(self._stop_asked)], device=self.device)
        bad, self._stop = (distributed.all_reduce_mean(flags) > 0.0).tolist()
        return not bad

    def _give_up(self, batch: Batch, weights: Weights, part: int, what: str) -> None:
        """Find where it came from by doing the forward pass again: its draws are the same."""
        with torch.no_grad() if self.config.stage == "vae" else nullcontext():
            found = first_nonfinite_module(
                self.objective, lambda: self._forward(self.objective, batch, weights, part)
            )
        saved = self.folder.steps()
        kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "there is no checkpoint yet"
        raise NonFiniteError(
            f"step {self.step + 1}: the {what} is NaN or infinite, first in "
            f"{found or 'the loss itself, all modules being finite'}; {kept}. Try a lower learning rate, "
            "clip_norm, or precision fp32"
        )

    # -- what a person sees -------------------------------------------------------------------------------------

    def _log(self, last: dict[str, Any]) -> None:
        count = self._sums.pop("count")
        values = {name: (value / count).tolist() for name, value in sorted(self._sums.items())}
        line: dict[str, Any] = {"step": self.step} | values
        line |= {name: value for name, value in last.items() if isinstance(value, float)}
        self._sums = {}
        logit = self.model.mixing_logit
        mixing = torch.sigmoid(logit.detach()).flatten() if logit is not None else None
        if distributed.is_main():
            self._show.log(line, mixing)

    def _try_saving(self, saved: int) -> int:
        try:
            if distributed.is_main():
                self.save()
        except OSError as error:
            self._show.message(
                f"step {self.step} is not saved: {error}; training goes on, the last is {saved}"
            )
            return saved
        return self.step

    def _sample(self) -> None:
        # In every process, since BatchNorm with the batch's statistics needs all of them; one writes.
        with self._averaged(), torch.no_grad():
            self._show.samples(self.model, self.source, self.step)

    def _evaluate(self) -> None:
        if distributed.is_main():
            with self._averaged():
                self._show.evaluation(self.model, self.step)
        distributed.barrier()

    def _evaluation_batches(self, limit: int) -> Iterator[torch.Tensor]:
        """Up to ``limit`` batches of training images in file order, on the device."""
        size = self._micro_batch
        for i, batch in enumerate(
            batches(self.source, self.config.data, batch_size=size, seed=0, train=False)
        ):
            if i == limit:
                return
            yield batch.images.to(self.device)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step that is being done; a second one at once."""

        def stop(number: int, frame: object) -> None:
            if self._stop_asked:
                raise KeyboardInterrupt
            self._stop_asked = True
            # Signals reach the processes of a group in different steps: there _agree decides for all of them.
            self._stop = distributed.world_size() == 1
            self._show.message("stopping after this step")

        previous: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, stop)
        except ValueError:  # not the main thread: whoever runs it decides
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _in_process_0(action: Callable[[], object]) -> None:
    """Do it in process 0 while the others wait; an exception there is raised in all of them."""
    failure: Exception | None = None
    if distributed.is_main():
        try:
            action()
        except Exception as error:
            failure = error
    if (failure := distributed.broadcast_object(failure)) is not None:
        raise failure


def _over_all_processes(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means over the processes, in one collective.

    Of every step and not of every line: so the sums that a checkpoint holds are those of all processes.
    """
    if distributed.world_size() == 1:
        return parts
    values = [value.detach().float() for value in parts.values()]
    means = distributed.all_reduce_mean(torch.cat([value.reshape(-1) for value in values]))
    pieces = means.split([value.numel() for value in values])
    return {name: piece.view(value.shape) for name, piece, value in zip(parts, pieces, values, strict=True)}


def _dropout_seed(seed: int, step: int, part: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}.{step}.{part}.{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _environment(device: torch.device) -> dict[str, Any]:
    import lsgm_fast

    return {
        "lsgm_fast": lsgm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["lsgm-fast", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
