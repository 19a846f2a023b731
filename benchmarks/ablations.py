"""What the parts of an LSGM's training are worth: one ablation per command, at a scale for one processor core.

    python -m benchmarks.ablations mixing                                mixed score on, off, and its initial value
    python -m benchmarks.ablations weightings --seeds 5 --minutes 2      shorter stages 2, more of them
    python -m benchmarks.ablations sdes --device cuda --out runs/sdes

For every seed a VAE is trained (stage 1), then stage 2 from that VAE with every variant, for as many steps. All models
are evaluated on the same held-out images with the same draws, and their samples start from the same noise. The table
has the mean over seeds, its standard error, and the difference to the baseline (the first variant) seed by seed with
its 95% interval (Student's t).

Runs lie in the output folder under a hash of their configuration: started again, the command goes on where it was
stopped, and no configuration is trained twice, not for another ablation either.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtrit

import lsgm_fast
from benchmarks import measure
from benchmarks.train import seconds
from lsgm_fast.config import SDEConfig
from lsgm_fast.data import batches, open_data
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.evaluation import (
    METHODS,
    Classifier,
    Estimate,
    binary_draws,
    evaluate_nelbo,
    evaluate_quality,
    fit_classifier,
    load_images,
)
from lsgm_fast.models import NVAE
from lsgm_fast.training import ObjectiveConfig, Trainer, TrainingConfig, get_recipe
from lsgm_fast.training.latents import largest_squared_distance
from lsgm_fast.training.recipes import Recipe
from lsgm_fast.weighting import IW_MODES

# The draws of the evaluation are the same for all models, whatever seed they were trained with.
EVALUATION_SEED = 0
SAVE_EVERY = 250
_TIMED_STEPS = 20

FIGURES = {"nelbo": "nats", "kl": "nats", "frechet": "1"}
"""What is measured of a model, and its unit."""
COMPARED = {"nelbo": "NELBO", "frechet": "classifier Frechet distance"}


# -- what is compared -----------------------------------------------------------------------------------------------


def _mixing(base: TrainingConfig, largest: Callable[[], float]) -> dict[str, TrainingConfig]:
    score = base.model.score
    assert score is not None
    scores = {f"logit {x:g}": score.replace(mixing_logit_init=x) for x in (-3.0, -6.0, 0.0)}
    scores["no mixing"] = score.replace(mixed_prediction=False)
    return {name: base.replace(model=base.model.replace(score=changed)) for name, changed in scores.items()}


def _stages(base: TrainingConfig, largest: Callable[[], float]) -> dict[str, TrainingConfig]:
    return {
        "end to end": base,
        "two stages": base.replace(objective=base.objective.replace(train_vae=False)),
    }


def _sdes(base: TrainingConfig, largest: Callable[[], float]) -> dict[str, TrainingConfig]:
    def sde(config: SDEConfig) -> TrainingConfig:
        return base.replace(
            model=base.model.replace(sde=config), objective=base.objective.replace(subvp_like_vp=True)
        )

    # Variance at t = 0 as the published configurations of the geometric SDE have it.
    start = SDEConfig(sigma2_0=3e-5, sigma2_min=3e-5, time_eps=0.0)
    return {
        "vpsde": base,
        "sub_vpsde": sde(SDEConfig("sub_vpsde")),
        "geometric_sde": sde(start.replace(name="geometric_sde", sigma2_max=0.999)),
        "vesde": sde(start.replace(name="vesde", sigma2_max=largest())),
    }


def _weightings(base: TrainingConfig, largest: Callable[[], float]) -> dict[str, TrainingConfig]:
    modes = ("ll_iw", *(mode for mode in IW_MODES if mode != "ll_iw"))
    return {mode: base.replace(objective=ObjectiveConfig(p_mode=mode)) for mode in modes}


def _algorithms(base: TrainingConfig, largest: Callable[[], float]) -> dict[str, TrainingConfig]:
    objectives = {
        "3: reweighted": ObjectiveConfig(p_mode="drop_all_iw"),
        "2: own times": ObjectiveConfig(p_mode="drop_all_iw", q_mode="ll_iw"),
        "2: own times and noise": ObjectiveConfig(p_mode="drop_all_iw", q_mode="ll_iw", disjoint=True),
        "1: one loss": ObjectiveConfig(p_mode="ll_iw"),
    }
    return {name: base.replace(objective=objective) for name, objective in objectives.items()}


ABLATIONS = {
    "mixing": _mixing,
    "stages": _stages,
    "sdes": _sdes,
    "weightings": _weightings,
    "algorithms": _algorithms,
}
"""From stage 2's configuration (and a function that measures the largest squared distance between latents) to the
variants by name, the baseline first."""


# -- training and evaluation ----------------------------------------------------------------------------------------


def key(values: Mapping[str, Any]) -> str:
    """A hash of JSON-serialisable options and the library's version."""
    described = json.dumps({"version": lsgm_fast.__version__, **values}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def shortened(config: TrainingConfig, steps: int) -> TrainingConfig:
    """``config`` with that many steps, at most a tenth of them warm-up."""
    warmup = None if config.warmup_steps is None else min(config.warmup_steps, steps // 10)
    return config.replace(steps=steps, warmup_steps=warmup)


class Runs:
    """Trains and evaluates, whatever is not in the folder yet.

    Args:
        folder: of all runs. device: for training and evaluation.
        samples: images drawn from each model. draws, method: of :func:`~lsgm_fast.evaluation.evaluate_nelbo`.
    """

    def __init__(self, folder: Path, device: str, *, samples: int, draws: int, method: str) -> None:
        # A run's configuration holds the VAE's path, which must not depend on where the command is started.
        self.folder = folder.resolve()
        self.device, self.samples, self.draws, self.method = device, samples, draws, method

    def timed(self, config: TrainingConfig, minutes: float) -> tuple[TrainingConfig, float]:
        """``config`` with the steps that take that long, and the seconds of one; measured once and kept."""
        path = (
            self.folder / f"steps-{key(config.to_dict() | {'minutes': minutes, 'device': self.device})}.json"
        )
        if not path.exists():
            measure.write_json(path, {"step_seconds": self._step_seconds(config)})
        step: float = json.loads(path.read_text())["step_seconds"]
        return shortened(config, max(1, round(60.0 * minutes / step))), step

    def _step_seconds(self, config: TrainingConfig) -> float:
        with tempfile.TemporaryDirectory() as name:
            trainer = Trainer(
                config.replace(eval_every=0), Path(name) / "run", device=self.device, progress=False
            )
            trainer._train_mode()
            stream = batches(trainer.source, config.data, batch_size=config.batch_size, seed=config.seed)
            times = [seconds(trainer, stream) for _ in range(_TIMED_STEPS)]
        # The first ones choose kernels and fill caches.
        return sorted(times[_TIMED_STEPS // 2 :])[_TIMED_STEPS // 4]

    def train(self, config: TrainingConfig) -> Path:
        """The model's file, after training to the end.

        Raises:
            NonFiniteError: the run broke down. KeyboardInterrupt: it was stopped; a checkpoint is written.
        """
        config = config.replace(sample_every=0, eval_every=0, save_every=SAVE_EVERY, keep=1)
        # The VAE by the name of its folder, and not by where that lies.
        vae = None if config.vae is None else Path(config.vae).parent.name
        folder = self.folder / f"{config.stage}-{key(config.to_dict() | {'vae': vae})}"
        result = Trainer(config, folder, device=self.device, progress=False).run()
        if result.interrupted:
            raise KeyboardInterrupt
        return result.model

    def figures(self, model: Path, data: Evaluation) -> dict[str, float]:
        """:data:`FIGURES` of a stage-2 model; of a VAE alone the NELBO with N(0, I) and the KL."""
        options = {"samples": self.samples, "draws": self.draws, "method": self.method, "device": self.device}
        path = model.parent / f"figures-{key(options)}.json"
        if not path.exists():
            measure.write_json(path, self._evaluate(model, data))
        found: dict[str, float] = json.loads(path.read_text())
        return found

    def _evaluate(self, path: Path, data: Evaluation) -> dict[str, float]:
        model = lsgm_fast.load(path, device=self.device)
        passed = batches(data.held_out, data.config, batch_size=64, seed=EVALUATION_SEED, train=False)
        report = evaluate_nelbo(model, passed, method=self.method, draws=self.draws, seed=EVALUATION_SEED)
        found = {"nelbo": report.nelbo.mean, "kl": report.kl.mean}
        if model.prior is None:
            return found
        images = model.sample(self.samples, seed=EVALUATION_SEED)
        if data.config.binarise != "none":
            images = binary_draws(images, EVALUATION_SEED)
        quality = evaluate_quality(images, data.reference, data.classifier, bootstrap=0)
        return found | {"frechet": quality.frechet.value}

    def largest(self, model: Path, data: Evaluation) -> float:
        """The largest squared distance between latents of training images; measured once and kept."""
        path = model.parent / "largest.json"
        if not path.exists():
            vae = lsgm_fast.load(model, device=self.device).vae
            assert isinstance(vae, NVAE)
            train = open_data(data.config, "train")
            passed = batches(train, data.config, batch_size=256, seed=EVALUATION_SEED, train=False)
            value = largest_squared_distance(vae, (b.images for b in passed), EVALUATION_SEED)
            measure.write_json(path, {"largest_squared_distance": value})
        found: float = json.loads(path.read_text())["largest_squared_distance"]
        return found


class Evaluation:
    """The held-out images of a run's data, and a classifier of them that is trained when it is first needed."""

    def __init__(self, config: TrainingConfig, folder: Path, device: str) -> None:
        binary = config.data.binarise != "none"
        self.config = config.data.replace(binarise="static" if binary else "none")
        self.held_out = open_data(self.config, "held_out")
        self._folder, self._device = folder, device

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        return load_images(self.held_out, self.config)

    @functools.cached_property
    def classifier(self) -> Classifier:
        train = open_data(self.config, "train")
        folder = self._folder / "classifiers"
        return fit_classifier(train, self.held_out, self.config, folder=folder, device=self._device)


@dataclass(frozen=True)
class Measured:
    """What an ablation found: figures by variant (baseline first) and seed; ``failures`` likewise.

    ``vae``: of the VAEs alone, by seed. ``configs``: of the last seed.
    """

    ablation: str
    seeds: tuple[int, ...]
    figures: dict[str, dict[int, dict[str, float]]]
    failures: dict[str, dict[int, str]]
    vae: dict[int, dict[str, float]]
    configs: dict[str, TrainingConfig]

    def values(self, variant: str, figure: str) -> dict[int, float]:
        """By seed, of the runs that did not fail."""
        return {seed: found[figure] for seed, found in self.figures[variant].items()}


def ablate(
    ablation: str, recipe: Recipe, runs: Runs, seeds: Sequence[int], say: Callable[[str], object]
) -> Measured:
    """Train and evaluate every variant with every seed. A variant that breaks down is noted, and the others go on."""
    data = Evaluation(recipe.vae, runs.folder, runs.device)
    figures: dict[str, dict[int, dict[str, float]]] = {}
    failures: dict[str, dict[int, str]] = {}
    vae: dict[int, dict[str, float]] = {}
    configs: dict[str, TrainingConfig] = {}
    for seed in seeds:
        stage1 = runs.train(recipe.vae.replace(seed=seed))
        vae[seed] = runs.figures(stage1, data)
        say(f"seed {seed}, VAE with N(0, I): NELBO {vae[seed]['nelbo']:.2f}")
        base = recipe.lsgm.replace(seed=seed, vae=str(stage1))
        configs = ABLATIONS[ablation](base, functools.partial(runs.largest, stage1, data))
        for name, config in configs.items():
            of, failed = figures.setdefault(name, {}), failures.setdefault(name, {})
            try:
                of[seed] = runs.figures(runs.train(config), data)
            except NonFiniteError as error:
                failed[seed] = str(error).splitlines()[0]
                say(f"seed {seed}, {name}: {failed[seed]}")
            else:
                say(f"seed {seed}, {name}: NELBO {of[seed]['nelbo']:.2f}, Frechet {of[seed]['frechet']:.3f}")
    return Measured(ablation, tuple(seeds), figures, failures, vae, configs)


# -- statistics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of a difference, and its 95% interval (Student's t, seeds - 1); None for a single seed."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
        """``values - baseline``, seed by seed; None where they have no seed in common."""
        common = [seed for seed in values if seed in baseline]
        if not common:
            return None
        estimate = Estimate.of(
            torch.tensor([values[seed] - baseline[seed] for seed in common], dtype=torch.float64)
        )
        if estimate.standard_error is None:
            return cls(estimate.mean, None, None)
        half = float(stdtrit(len(common) - 1, 0.975)) * estimate.standard_error
        return cls(estimate.mean, estimate.mean - half, estimate.mean + half)

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0.0 or self.high < 0.0)


def estimate(values: Mapping[int, float]) -> Estimate | None:
    """Mean and standard error over seeds; None without any."""
    return Estimate.of(torch.tensor(list(values.values()), dtype=torch.float64)) if values else None


def table(found: Measured) -> str:
    """Mean +- standard error over seeds, and differences to the baseline with their intervals, as Markdown."""
    heads = [text for name in COMPARED.values() for text in (name, "minus baseline")]
    lines = [f"| {' | '.join(['variant', 'seeds', *heads])} |", "|---" * (len(heads) + 2) + "|"]
    baseline = next(iter(found.figures))
    differences = []
    for variant, by_seed in found.figures.items():
        cells = [variant, str(len(by_seed))]
        for figure in COMPARED:
            digits = 2 if figure == "nelbo" else 3
            values = found.values(variant, figure)
            cells.append(_cell(estimate(values), digits))
            difference = None
            if variant != baseline:
                difference = Difference.of(values, found.values(baseline, figure))
            if difference is not None:
                differences.append(difference)
            cells.append(_difference_cell(difference, digits))
        lines.append(f"| {' | '.join(cells)} |")
    alone = estimate({seed: values["nelbo"] for seed, values in found.vae.items()})
    intervals = [d for d in differences if d.low is not None]
    lines += [
        "",
        f"The VAE alone, with N(0, I): NELBO {_cell(alone, 2)}.",
        f"{sum(d.shown for d in intervals)} of {len(intervals)} intervals leave 0 out; were there no differences at "
        f"all, about {0.05 * len(intervals):.1f} would, by chance.",
    ]
    for variant, failed in found.failures.items():
        lines += [f"Failed: {variant}, seed {seed}: {reason}" for seed, reason in failed.items()]
    return "\n".join(lines)


def _cell(value: Estimate | None, digits: int) -> str:
    if value is None:
        return ""
    error = value.standard_error
    return f"{value.mean:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def _difference_cell(value: Difference | None, digits: int) -> str:
    if value is None:
        return ""
    interval = "" if value.low is None else f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value.mean:+.{digits}f}{interval}"


def cases(found: Measured) -> list[dict[str, Any]]:
    """The record's case for every variant: every seed's figures, and their differences to the baseline's."""
    baseline = next(iter(found.figures))
    entries = []
    for variant, config in found.configs.items():
        figures: dict[str, Any] = {}
        for name, unit in FIGURES.items():
            values, reference = found.values(variant, name), found.values(baseline, name)
            figures[name] = _figure(values, unit)
            common = {seed: value - reference[seed] for seed, value in values.items() if seed in reference}
            if variant != baseline:
                figures[f"{name}_difference"] = _figure(common, unit)
        assert config.model.score is not None
        entries.append(
            {
                "parameters": {
                    "variant": variant,
                    "seeds": list(found.figures[variant]),
                    "steps": config.steps,
                    "objective": config.objective.to_dict(),
                    "sde": config.model.sde.to_dict(),
                    "score": config.model.score.to_dict(),
                },
                "backends": {},
                "failures": [f"seed {s}: {reason}" for s, reason in found.failures[variant].items()],
                "figures": figures,
            }
        )
    return entries


def _figure(values: Mapping[int, float], unit: str) -> dict[str, Any]:
    return measure.measured(values.values(), unit) if values else measure.not_measured("every run failed")


def plot(found: Measured, path: Path) -> None:
    """Every seed's figures and their mean with its standard error, a panel for each of :data:`COMPARED`."""
    from matplotlib import pyplot, ticker

    variants = list(found.figures)
    figure, panels = pyplot.subplots(1, len(COMPARED), figsize=(9, 1.2 + 0.45 * len(variants)), sharey=True)
    for axes, (name, label) in zip(panels, COMPARED.items(), strict=True):
        for row, variant in enumerate(variants):
            values = found.values(variant, name)
            for seed, value in values.items():
                axes.plot(value, row, "o", ms=4, alpha=0.6, color=f"C{found.seeds.index(seed) % 10}")
            mean = estimate(values)
            if mean is not None:
                axes.errorbar(
                    mean.mean, row + 0.2, xerr=mean.standard_error, fmt="d", ms=5, color="black", capsize=3
                )
        shown = [value for variant in variants for value in found.values(variant, name).values()]
        if min(shown, default=0.0) > 0.0 and max(shown) > 3.0 * min(shown):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set(xlabel="NELBO (nats per image)" if name == "nelbo" else label)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file.
    with pyplot.rc_context({"svg.hashsalt": "lsgm-fast"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write record and plot as ``<machine>/ablation-<name>.json`` and ``.svg``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations", description=__doc__.split("\n")[0]
    )
    parser.add_argument("ablation", choices=ABLATIONS)
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ... (default: 3)")
    for prefix, what in (("--", "stage 2"), ("--vae-", "stage 1")):
        length = parser.add_mutually_exclusive_group()
        length.add_argument(f"{prefix}steps", type=int, help=f"of {what} (default: the recipe's)")
        length.add_argument(
            f"{prefix}minutes",
            type=float,
            help=f"of {what} (the baseline's), in steps from a step time measured once",
        )
    parser.add_argument("--recipe", default="digits14")
    parser.add_argument("--samples", type=int, default=1000, help="images drawn from each model")
    parser.add_argument("--draws", type=int, default=10, help="of the NELBO, per held-out image")
    parser.add_argument("--method", choices=METHODS, default="diffusion", help="of the NELBO")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="runs, record and plot")
    parser.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    parser.add_argument("--commit", help="in place of what git says")
    options = parser.parse_args(arguments)
    for name, least in (("seeds", 1), ("samples", 10), ("draws", 1), ("steps", 1), ("vae_steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in ("minutes", "vae_minutes"):
        minutes = getattr(options, name)
        if minutes is not None and not (math.isfinite(minutes) and minutes > 0.0):
            parser.error(f"--{name.replace('_', '-')} must be positive, got {minutes}")
    try:
        recipe = get_recipe(options.recipe)
    except ValueError as error:
        parser.error(str(error))
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:  # now, and not after hours of training
        parser.error('the plot needs matplotlib: pip install "lsgm-fast[plot]"')

    # What is timed decides how long the runs are, and is no result: the machine need not be idle.
    watch = measure.Watch(force=True, sample_seconds=0.1)
    runs = Runs(
        options.out, options.device, samples=options.samples, draws=options.draws, method=options.method
    )
    stages, step_seconds = {"vae": recipe.vae, "lsgm": recipe.lsgm}, {}
    for stage, steps, minutes in (
        ("vae", options.vae_steps, options.vae_minutes),
        ("lsgm", options.steps, options.minutes),
    ):
        if steps is not None:
            stages[stage] = shortened(stages[stage], steps)
        elif minutes is not None:
            stages[stage], step_seconds[stage] = runs.timed(stages[stage], minutes)
    recipe = Recipe(**stages)
    try:
        found = ablate(
            options.ablation, recipe, runs, range(options.seeds), lambda text: print(text, file=sys.stderr)
        )
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    name = f"ablation-{options.ablation}"
    print(text := table(found))
    folder = options.out / measure.machine_name(options.device)
    plot(found, folder / f"{name}.svg")
    measure.write_record(
        options.out,
        options.device,
        name=name,
        command=measure.command_line("benchmarks.ablations", arguments),
        dry_run=options.dry_run,
        machine=watch.entries(0.1),
        environment=measure.environment(options.commit),
        settings={
            "recipe": options.recipe,
            "vae_steps": recipe.vae.steps,
            "steps": recipe.lsgm.steps,
            "step_seconds": step_seconds,
            "samples": options.samples,
            "draws": options.draws,
            "method": options.method,
            "evaluation_seed": EVALUATION_SEED,
            "torch_threads": torch.get_num_threads(),
            "vae_nelbo": {str(seed): values["nelbo"] for seed, values in found.vae.items()},
            "table": text.splitlines(),
        },
        cases=cases(found),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
