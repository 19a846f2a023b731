"""What one training step costs: images per second, where the time goes, and peak memory.

    python -m benchmarks.train                                   digits and mnist, both stages, plain and with kernels
    python -m benchmarks.train --recipe cifar10-fid --steps algorithm3 --batch 32 --precision bf16 --device cuda
    python -m benchmarks.train --recipe mnist --recompute        the same with less memory
    python -m benchmarks.train --recipe digits --steps vae algorithm1 algorithm2 algorithm3 frozen --backends auto

Timed is the trainer's own step: the batch (random pixels, so no data set is needed), all random draws, forward and
backward pass, the checks for NaN, regularisation, clipping, optimizers and the average of the weights; no log, no
checkpoint. Kinds of step: ``vae`` (stage 1), ``algorithm1``, ``algorithm2`` (disjoint) and ``algorithm3`` of stage 2,
and ``frozen`` (stage 2 with a VAE that stays as it is). In stage 2 the KL coefficient is 1, as in most of a run.

Every case runs in a process of its own, which nothing before it has filled. ``peak_memory`` is
that of CUDA's allocator on a GPU. On a CPU it is the largest resident size minus that before the model was built. In
both cases it holds weights, optimizer states and gradients as well, and is that of the steps behind the first one, in
which kernels may test themselves. On a CPU some MiB of such a test stay: to compare backends, run the command twice.

With several ``--backends`` (by default plain PyTorch and the dispatcher's choice) every case runs once with each, and
``over_first`` has the ratios of the medians of ``step`` and ``peak_memory`` to those of the first.

``split`` comes from steps of its own that wait for the device after every part: ``forward`` is the objective's,
``backward`` lasts until the gradients are complete (with the check of the loss), ``optimizer`` is unscaling, norms,
clipping, optimizers and average, and ``rest`` what remains: batch, draws and sums for the log.
``total_over_unsplit`` says what the waiting costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.measure import Budget, MachineBusy, OutOfTime, extrapolated, measured, not_measured
from benchmarks.published import settings
from lsgm_fast.config import LSGMConfig
from lsgm_fast.data import Batch, DataConfig, batches
from lsgm_fast.dispatch import parse_choice, record, use_backend
from lsgm_fast.errors import unknown_name
from lsgm_fast.presets import PRESETS
from lsgm_fast.training import RECIPES, KLConfig, ObjectiveConfig, Trainer, TrainingConfig
from lsgm_fast.training.config import PRECISIONS

# The weights that the published recipes with these algorithms have, or nearly; all of them work with every SDE here.
OBJECTIVES = {
    "algorithm1": ObjectiveConfig(p_mode="ll_iw"),
    "algorithm2": ObjectiveConfig(p_mode="drop_sigma2t_iw", q_mode="ll_iw", disjoint=True),
    "algorithm3": ObjectiveConfig(p_mode="drop_sigma2t_iw"),
    "frozen": ObjectiveConfig(p_mode="drop_sigma2t_iw", train_vae=False),
}
MODELS = (*RECIPES, *(name for name in PRESETS if name not in RECIPES))
STEPS = ("vae", *OBJECTIVES)
DEFAULT_STEPS = ("vae", "algorithm1")  # one of either stage
DEFAULT_BACKENDS = ("reference", "auto")
PARTS = ("forward", "backward", "optimizer", "rest")
COMPARED = ("step", "peak_memory")
FIGURES = ("step", "images_per_second", "split", "peak_memory")

# A run of which only the first steps are taken, at learning rates near 0.
RUN_STEPS = 1_000_000


@dataclass(frozen=True)
class Case:
    """One kind of step of one model.

    ``channels_last``: None: as the recipe has it. ``backend``: as for :func:`lsgm_fast.use_backend`; None: what the
    environment says, ``"auto"`` where it says nothing.
    """

    recipe: str
    step: str
    batch: int
    precision: str
    recompute: bool
    channels_last: bool | None
    device: str
    backend: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.recipe, self.step, self.backend)))


def configuration(case: Case, images: Path) -> TrainingConfig:
    """The recipe's run with the case's options, on random images."""
    stage = "vae" if case.step == "vae" else "lsgm"
    if case.recipe in RECIPES:
        base = RECIPES[case.recipe].vae if stage == "vae" else RECIPES[case.recipe].lsgm
    else:
        base = TrainingConfig(stage=stage, model=PRESETS[case.recipe])
    if stage == "lsgm":
        base = base.replace(kl=KLConfig(), objective=OBJECTIVES[case.step])
    if case.channels_last is not None:
        base = base.replace(channels_last=case.channels_last)
    binary = base.model.vae.decoder_distribution == "bernoulli"
    return base.replace(
        data=DataConfig(str(images), binarise="dynamic" if binary else "none", held_out=0),
        eval_every=0,  # the images are noise, and none is held out
        batch_size=case.batch,
        accumulate=1,
        steps=RUN_STEPS,
        warmup_steps=RUN_STEPS,
        precision=case.precision,
        recompute=case.recompute,
    )


def model_of(name: str) -> LSGMConfig:
    """The model of a recipe or a preset."""
    return RECIPES[name].vae.model if name in RECIPES else PRESETS[name]


def random_images(case: Case, path: Path) -> None:
    """Two batches of uniformly random pixels of the model's size."""
    vae = model_of(case.recipe).vae
    side = vae.image_size - 2 * vae.crop
    shape = (2 * case.batch, side, side, vae.image_channels)
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, shape, np.uint8))


# -- one case, in its own process -----------------------------------------------------------------------------------


class StepClock:
    """Inside ``with``, marks when the parts of a trainer's step end; waits for the device at every mark."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._device = trainer, str(trainer.device)
        self._marks: dict[str, float] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> StepClock:
        trainer = self._trainer
        hooks = (
            trainer.objective.register_forward_pre_hook(lambda *args: self._mark("start")),
            trainer.objective.register_forward_hook(lambda *args: self._mark("forward")),
        )
        self._undo = [hook.remove for hook in hooks]
        # Of several optimizers the first one's gradients are unscaled when the backward pass has ended.
        self._wrap(trainer._scaler, "unscale_", before="backward")
        if trainer.ema is not None:
            self._wrap(trainer.ema, "update", after="optimizer")
        else:
            self._wrap(trainer._scaler, "update", after="optimizer")
        return self

    def __exit__(self, *exc: object) -> None:
        for undo in self._undo:
            undo()

    def _wrap(self, owner: object, name: str, before: str = "", after: str = "") -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if before and before not in self._marks:
                self._mark(before)
            result = call(*args, **kwargs)
            if after:
                self._mark(after)
            return result

        setattr(owner, name, timed)
        self._undo.append(lambda: delattr(owner, name))

    def _mark(self, name: str) -> None:
        measure.synchronize(self._device)
        self._marks[name] = time.perf_counter()

    def __call__(self, stream: Iterator[Batch]) -> dict[str, float]:
        """Seconds of one step and of its parts."""
        self._marks.clear()
        total = seconds(self._trainer, stream)
        at = self._marks
        out = {
            "forward": at["forward"] - at["start"],
            "backward": at["backward"] - at["forward"],
            "optimizer": at["optimizer"] - at["backward"],
        }
        return out | {"rest": total - sum(out.values()), "total": total}


def seconds(trainer: Trainer, stream: Iterator[Batch]) -> float:
    """Seconds of one step."""
    device = str(trainer.device)
    measure.synchronize(device)
    start = time.perf_counter()
    trainer._one_step(stream)
    measure.synchronize(device)
    return time.perf_counter() - start


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        measure.forget_largest()


def _peak_memory(device: str, before: int, largest_before: int) -> measure.Figure:
    if device.startswith("cuda"):
        return measured([torch.cuda.max_memory_allocated(device)], "bytes")
    largest = measure.largest_resident_bytes()
    if largest <= largest_before:
        return not_measured("the steps stayed below what loading the libraries had taken")
    return measured([largest - before], "bytes")


def run_case(
    case: Case, folder: Path, *, fewest: int, most: int, allowed: float, budget: Budget
) -> dict[str, Any]:
    """``figures``, ``backends`` and ``weights`` (how many are trained) of one case, in a process that did nothing else.

    Steps without the split get about 70 % of the ``allowed`` seconds, those with it the rest, and each at least
    ``fewest`` repeats. Memory is that of the former.

    Raises:
        OutOfTime: the budget ended before one step was finished.
    """
    images = folder / "images.npz"
    random_images(case, images)
    config = configuration(case, images)
    measure.forget_largest()
    before, largest = measure.resident_bytes(), measure.largest_resident_bytes()
    trainer = Trainer(config, folder / "run", device=case.device, progress=False)
    trainer._train_mode()
    stream = batches(trainer.source, config.data, batch_size=case.batch, seed=config.seed)
    with record() as log:
        seconds(trainer, stream)  # neither timed nor weighed: the self-test of kernels may be a part of it
    _forget_peak(case.device)
    times = measure.repeat(
        lambda: seconds(trainer, stream),
        warmup=1,
        fewest=fewest,
        most=most,
        seconds=0.7 * allowed,
        budget=budget,
    )
    figures: dict[str, Any] = {
        "step": measured(times, "s"),
        "images_per_second": measured([case.batch / t for t in times], "images/s"),
        "peak_memory": _peak_memory(case.device, before, largest),
    }
    try:
        with StepClock(trainer) as clock:
            split = measure.repeat(
                lambda: clock(stream),
                warmup=0,
                fewest=fewest,
                most=most,
                seconds=0.3 * allowed,
                budget=budget,
            )
    except OutOfTime as error:
        figures["split"] = not_measured(str(error))
    else:
        unsplit = figures["step"]["median"]
        figures["split"] = {part: measured([s[part] for s in split], "s") for part in (*PARTS, "total")}
        figures["split"]["total_over_unsplit"] = measured([s["total"] / unsplit for s in split], "ratio")
    weights = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {"figures": figures, "backends": log.backends(), "weights": weights}


def in_this_process(folder: Path) -> None:
    """Run the case of a folder, for :func:`measure.in_own_process`."""

    def run(task: dict[str, Any], budget: Budget) -> dict[str, Any]:
        limits = {name: task[name] for name in ("fewest", "most", "allowed")}
        case = Case(**task["case"])
        with nullcontext() if case.backend is None else use_backend(case.backend):
            return run_case(case, folder, budget=budget, **limits)

    measure.run_task(folder, run)


# -- all cases ------------------------------------------------------------------------------------------------------


def time_case(case: Case, budget: Budget, *, fewest: int, most: int, allowed: float) -> dict[str, Any]:
    """A record's entry for one case.

    Raises:
        OutOfTime: the budget ended before one step was finished.
    """
    task = {"case": dataclasses.asdict(case), "fewest": fewest, "most": most, "allowed": allowed}
    result = measure.in_own_process("benchmarks.train", task, budget)
    failures = [result["failure"]] if "failure" in result else []
    missing = {name: not_measured(f"the case failed: {failures[0]}") for name in FIGURES} if failures else {}
    return {
        "parameters": dataclasses.asdict(case) | {"trained_weights": result.get("weights")},
        "backends": result.get("backends", {}),
        "failures": failures,
        "figures": missing or result["figures"],
    }


def compare(entries: Sequence[dict[str, Any]], first: str) -> None:
    """Give every entry of another backend ``over_first``: its ratios to the same case on the backend ``first``."""

    def of(entry: dict[str, Any]) -> tuple[str, str]:
        return entry["parameters"]["recipe"], entry["parameters"]["step"]

    base = {of(entry): entry["figures"] for entry in entries if entry["parameters"]["backend"] == first}
    for entry in entries:
        if entry["parameters"]["backend"] == first:
            continue
        entry["figures"]["over_first"] = {
            name: _ratio(entry["figures"][name], base.get(of(entry), {}).get(name), f"{name} on {first}")
            for name in COMPARED
        }


def _ratio(figure: measure.Figure, other: measure.Figure | None, what: str) -> measure.Figure:
    if figure["kind"] != "measured":
        return not_measured(figure["reason"])
    if other is None or other["kind"] != "measured":
        return not_measured(f"there is no {what}" if other is None else other["reason"])
    return extrapolated(figure["median"] / other["median"], "ratio", f"its median over that of {what}")


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as text, one line per case; ``-`` where nothing was measured."""
    several = any("over_first" in entry["figures"] for entry in entries)

    def cell(figure: dict[str, Any], width: int, scale: float = 1.0, digits: int = 1) -> str:
        number = figure.get("median", figure.get("value"))
        return ("-" if number is None else f"{number * scale:.{digits}f}").rjust(width)

    # Without a second backend there is no column: a width and a precision of 0.
    wide = max(len(entry["parameters"]["backend"]) + 2 for entry in entries) if several else 0
    head = f"{'recipe':<31}{'step':<11}{'backend':<{wide}.{wide}}{'batch':>6} {'precision':<10}"
    head += f"{'images/s':>10}{'ms':>10}"
    ratios = f"{'x ms':>8}{'x peak':>8}" if several else ""
    lines = [head + "".join(part.rjust(11) for part in PARTS) + f"{'peak MiB':>10}" + ratios]
    for entry in entries:
        p, figures = entry["parameters"], entry["figures"]
        lines.append(
            f"{p['recipe']:<31}{p['step']:<11}{p['backend'] or '':<{wide}.{wide}}"
            f"{p['batch']:>6} {p['precision']:<10}"
            f"{cell(figures['images_per_second'], 10, digits=2)}{cell(figures['step'], 10, 1e3)}"
            + "".join(cell(figures["split"].get(part, {}), 11, 1e3) for part in PARTS)
            + cell(figures["peak_memory"], 10, 2**-20)
            + "".join(
                cell(figures.get("over_first", {}).get(name, {}), 8, digits=2) for name in COMPARED if several
            )
        )
    lines.append("medians; ms per step and of its parts, which come from steps that wait after each part")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python3 -m benchmarks.train", description=__doc__.split("\n")[0])
    found.add_argument(
        "--recipe", nargs="+", default=["digits", "mnist"], metavar="NAME", help="recipes or presets"
    )
    found.add_argument(
        "--steps",
        nargs="+",
        default=list(DEFAULT_STEPS),
        metavar="KIND",
        help=f"of {' '.join(STEPS)}; default: {' '.join(DEFAULT_STEPS)}",
    )
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--precision", default="fp32", help=" or ".join(PRECISIONS))
    found.add_argument("--recompute", action="store_true", help="activations anew in the backward pass")
    found.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, help="default: as the recipe"
    )
    found.add_argument(
        "--backends",
        nargs="+",
        default=list(DEFAULT_BACKENDS),
        metavar="SPEC",
        help=f"as in LSGM_FAST_BACKEND, to compare with the first; default: {' '.join(DEFAULT_BACKENDS)}",
    )
    measure.add_options(found, "train")
    return found


def main(
    arguments: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Time, print and write ``<machine>/<name>.json``; 1: a case failed, 2: wrong usage, 3: a busy machine."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    known = parser()
    options = known.parse_args(arguments)
    if options.one_case is not None:
        in_this_process(options.one_case)
        return 0
    for kind, values, valid in (
        ("recipe", options.recipe, MODELS),
        ("kind of step", options.steps, STEPS),
        ("precision", [options.precision], PRECISIONS),
    ):
        for value in values:
            if value not in valid:
                known.error(str(unknown_name(kind, value, valid)))
    try:
        for backend in filter(None, options.backends):
            parse_choice(backend)
    except ValueError as error:
        known.error(str(error))
    if len(set(options.backends)) < len(options.backends):
        known.error(f"expected each of --backends once, got {' '.join(options.backends)}")
    measure.check_options(known, options)
    fewest, most = options.repeats
    try:
        watch = measure.Watch(force=options.force)
    except MachineBusy as busy:
        print(busy, file=sys.stderr)
        return 3
    cases = [
        Case(
            recipe,
            step,
            options.batch,
            options.precision,
            options.recompute,
            options.channels_last,
            options.device,
            backend,
        )
        for recipe in options.recipe
        for step in options.steps
        for backend in options.backends
    ]
    budget = Budget(options.budget)
    entries, left_out = [], []
    for index, case in enumerate(cases):
        allowed = max(budget.remaining(), 0.0) / (len(cases) - index)
        try:
            entries.append(time_case(case, budget, fewest=fewest, most=most, allowed=allowed))
        except OutOfTime as error:
            left_out.append(str(case))
            report(f"{case}: left out, {error}")
            continue
        for failure in entries[-1]["failures"]:
            report(f"{case}: failed: {failure}")
    compare(entries, options.backends[0])
    status, said = measure.write_cases(
        "benchmarks.train", arguments, options, watch, settings(), entries, left_out
    )
    report(table(entries))
    if said:
        report(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
