"""What decoding latents to images costs, on every backend, and how far it is from reading its bytes once.

    python -m benchmarks.decode                                       four models, both kinds of statistics, on the CPU
    python -m benchmarks.decode --presets cifar10-nll --bn batch --device cuda
    python -m benchmarks.decode --no-compile --memory-format contiguous channels_last

Timed is ``LSGM.decode`` in float32 with random weights and latents (seed 0). Contenders, in turns in the same run, each
round in another order: ``reference`` (plain PyTorch, eager), ``auto`` (what the dispatcher takes; ``backends`` has what
ran) and ``compile`` (``torch.compile`` of the reference's whole ``decode``, static shapes). ``processor_seconds`` are
those of all threads of the process; on a GPU that is what the host spends on it.

Before it is timed, every contender but the reference is compared with it, with TF32 off: ``image_parameters`` (the
decoder's output, of the eager ones) and ``images`` may differ by ``TOLERANCE`` at most, relative to the reference's
largest deviation from its own mean (random weights make images that are nearly grey). A wrong one is not timed: the
case has a failure, and the program ends with 1.

``byte_floor`` holds the bytes of the decoder's weights and of every cell's input and output, each once; ``copy``, the
bandwidth of this machine's own ``tensor.copy_`` between buffers beyond the cache, timed in the same rounds (bytes read
plus bytes written); and ``seconds``, the one over the other. On a GPU no decoder that writes its cells' results to
memory is faster than that.

Every case runs in a process of its own. ``torch.compile`` of a large decoder takes minutes: where the budget ends in
it, the case keeps what was measured without it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.measure import Budget, Figure, MachineBusy, OutOfTime, extrapolated, measured, not_measured
from benchmarks.ops import copy_round
from benchmarks.published import settings
from benchmarks.train import MODELS, model_of
from lsgm_fast.dispatch import record, use_backend
from lsgm_fast.errors import unknown_name
from lsgm_fast.models import LSGM
from lsgm_fast.models.nvae import BN_STATISTICS, NVAE
from lsgm_fast.nn.cells import Cell

# Smallest first: the compiler's minutes for the last one then cost the others nothing. "digits" has the demo's size.
DEFAULT = ("digits", "mnist", "cifar10-nll", "celebahq256-quantitative")
LARGE_IMAGE = 256  # from here on, batches of 1 unless asked otherwise
CONTENDERS = ("reference", "auto", "compile")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Float32 rounding alone makes some 2e-6 for the published presets.
TOLERANCE = 1e-4
COPY_SECONDS = 2e-3


@dataclass(frozen=True)
class Case:
    """What is decoded; ``bn``: whose statistics normalise, one of :data:`BN_STATISTICS`."""

    preset: str
    bn: str
    batch: int
    memory_format: str
    compile: bool
    device: str

    def __str__(self) -> str:
        return f"{self.preset} {self.bn} batch {self.batch} {self.memory_format}"


# -- one case, in its own process -----------------------------------------------------------------------------------


class CompiledVAE(nn.Module):
    """A VAE whose ``decode`` is compiled; everything else of :meth:`LSGM.decode` stays as it is."""

    def __init__(self, vae: NVAE) -> None:
        super().__init__()
        self.vae = vae
        self.latent_shape, self.lower_shapes = vae.latent_shape, vae.lower_shapes
        self.decode = torch.compile(vae.decode, dynamic=False)


class Decoder:
    """The model, the latents, and the ways to decode them. The encoder is there, but no score network."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        model = LSGM.from_config(model_of(case.preset).replace(score=None)).eval()
        memory_format = MEMORY_FORMATS[case.memory_format]
        self.model: LSGM = model.to(device=case.device, memory_format=memory_format)  # type: ignore[call-overload]
        assert isinstance(self.model.vae, NVAE)
        self.vae = self.model.vae
        shapes = (model.latent_shape, *model.lower_shapes)
        self.z, *self.lower = (torch.randn(case.batch, *shape).to(case.device) for shape in shapes)
        self.compiled = LSGM(CompiledVAE(self.vae), None, model.sde) if case.compile else None

    def decode(self, contender: str) -> torch.Tensor:
        """Images (N, C, H, W) in [0, 1]."""
        model = self.compiled if contender == "compile" else self.model
        assert model is not None
        with use_backend("auto" if contender == "auto" else "reference"):
            return model.decode(self.z, self.lower, bn=self.case.bn)

    def outputs(self, contender: str) -> dict[str, torch.Tensor]:
        """``images``, and of an eager contender ``image_parameters``, the decoder's output."""
        if contender == "compile":
            return {"images": self.decode(contender)}
        found: dict[str, torch.Tensor] = {}

        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            found["image_parameters"] = output

        with hooked([self.vae.output], keep):
            return {"images": self.decode(contender)} | found

    def floor_bytes(self) -> int:
        """Bytes of the decoder's weights, and of the input and output of every cell that runs."""
        vae = self.vae
        parts = (vae.latent_conv, vae.decoder, vae.postprocess, vae.output)
        weights = [vae.prior_feature, *(p for part in parts for p in part.parameters())]
        total = sum(p.nbytes for p in weights)

        def count(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            nonlocal total
            total += args[0].nbytes + output.nbytes

        with hooked([m for m in vae.modules() if isinstance(m, Cell)], count):
            self.decode("reference")
        return total

    def seconds(self, contender: str) -> tuple[float, float]:
        """Seconds and processor seconds of one batch."""
        measure.synchronize(self.case.device)
        spent, start = time.process_time(), time.perf_counter()
        self.decode(contender)
        measure.synchronize(self.case.device)
        return time.perf_counter() - start, time.process_time() - spent


@contextlib.contextmanager
def hooked(
    modules: Sequence[nn.Module], hook: Callable[[nn.Module, Any, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``hook`` after the forward pass of each of the modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions in float32: with TF32's eleven bits, the order of additions alone would move an image."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest deviation of ``expected`` from its own mean."""
    return float((got - expected).abs().max() / (expected - expected.mean()).abs().max())


def compare(
    contender: str, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> dict[str, Figure]:
    """The differences of a contender's outputs.

    Raises:
        AssertionError: one of them is above :data:`TOLERANCE`.
    """
    found = {name: difference(value, expected[name]) for name, value in got.items()}
    for name, value in found.items():
        if not value <= TOLERANCE:
            raise AssertionError(
                f"{name.replace('_', ' ')} differ from the reference's by {value:.2g}, relative to its largest "
                f"deviation from its mean; {TOLERANCE:g} is allowed"
            )
    return {name: measured([value], "1") for name, value in found.items()}


def run_case(
    case: Case,
    *,
    fewest: int,
    most: int,
    allowed: float,
    budget: Budget,
    early: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """``figures``, ``backends`` and ``failures`` of one case; ``early`` gets them before anything is compiled.

    Raises:
        OutOfTime: the budget ended before one round of ``reference`` and ``auto`` was finished.
    """
    start = time.perf_counter()
    decoder = Decoder(case)
    with without_tf32():
        expected = decoder.outputs("reference")
    floor = decoder.floor_bytes()
    copy, copied = copy_round(case.device, COPY_SECONDS)
    ready, turns = ["reference"], itertools.count()
    missing = {"compile": "not compiled yet" if case.compile else "not asked for (--no-compile)"}
    failures: list[str] = []
    backends: dict[str, str] = {}
    differences: dict[str, Any] = {}

    def add(contender: str) -> None:
        """Compare it, and let it take part in the rounds that follow, unless it is wrong."""
        budget.check()
        try:
            with without_tf32(), record() as log:
                differences[contender] = compare(contender, decoder.outputs(contender), expected)
        except Exception as error:  # a contender that fails must not cost the others their figures
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            failures.append(f"{contender}: {reason}")
            missing[contender] = f"not timed: {reason}"
        else:
            missing.pop(contender, None)
            ready.append(contender)
        if contender == "auto":
            backends.update(log.backends())

    def one_round() -> dict[str, tuple[float, float]]:
        # Another order in every round: nobody always follows the same neighbour.
        first = next(turns)
        order = [ready[(first + i) % len(ready)] for i in range(len(ready))]
        return {name: decoder.seconds(name) for name in order} | {"copy": (copy(), 0.0)}

    def time_them(most: int) -> dict[str, Any]:
        left = allowed - (time.perf_counter() - start)
        rounds = measure.repeat(one_round, warmup=1, fewest=fewest, most=most, seconds=left, budget=budget)
        figures = summary(rounds, missing, floor, copied)
        figures["difference"] = differences | {name: not_measured(why) for name, why in missing.items()}
        return {"figures": figures, "backends": backends, "failures": failures}

    add("auto")
    if not case.compile:
        return time_them(most)
    missing["compile"] = f"{measure.OUT_OF_TIME} ended before it was compiled and timed"
    result = time_them(fewest)
    early(result)
    try:
        add("compile")
        return time_them(most)
    except OutOfTime:
        return result


def summary(
    rounds: Sequence[dict[str, tuple[float, float]]], missing: dict[str, str], floor: int, copied: int
) -> dict[str, Any]:
    """The figures of all rounds; ``missing``: contenders without, and why."""
    figures: dict[str, Any] = {name: not_measured(why) for name, why in missing.items()}
    for name in CONTENDERS:
        if name not in missing:
            figures[name] = {
                "seconds": measured([r[name][0] for r in rounds], "s"),
                "processor_seconds": measured([r[name][1] for r in rounds], "s"),
            }
    for other in ("reference", "compile"):
        gone = [missing[name] for name in (other, "auto") if name in missing]
        figures[f"{other}_over_auto"] = (
            not_measured(gone[0]) if gone else measured([r[other][0] / r["auto"][0] for r in rounds], "1")
        )
    bandwidth = measured([copied / r["copy"][0] / 1e9 for r in rounds], "GB/s")
    figures["byte_floor"] = {
        "bytes": measured([floor], "bytes"),
        "copy": bandwidth,
        "seconds": extrapolated(floor / (bandwidth["median"] * 1e9), "s", "bytes / copy, its median"),
    }
    return figures


def in_this_process(folder: Path) -> None:
    """Run the case of a folder, for :func:`measure.in_own_process`."""

    def run(task: dict[str, Any], budget: Budget) -> dict[str, Any]:
        torch.backends.cudnn.benchmark = True
        limits = {name: task[name] for name in ("fewest", "most", "allowed")}
        return run_case(
            Case(**task["case"]),
            budget=budget,
            early=lambda result: measure.write_json(folder / "result.json", result),
            **limits,
        )

    measure.run_task(folder, run)


# -- all cases ------------------------------------------------------------------------------------------------------


def time_case(case: Case, budget: Budget, *, fewest: int, most: int, allowed: float) -> dict[str, Any]:
    """A record's entry for one case.

    Raises:
        OutOfTime: the budget ended before one round of ``reference`` and ``auto`` was finished.
    """
    task = {"case": dataclasses.asdict(case), "fewest": fewest, "most": most, "allowed": allowed}
    result = measure.in_own_process("benchmarks.decode", task, budget)
    if "failure" in result:
        why = not_measured(f"the case failed: {result['failure']}")
        names = (*CONTENDERS, "reference_over_auto", "compile_over_auto", "difference", "byte_floor")
        result |= {"failures": [result["failure"]], "figures": dict.fromkeys(names, why)}
    elif "stopped" in result and result["figures"]["compile"].get("kind") == "not_measured":
        why = not_measured(result["stopped"])
        result["figures"] |= {"compile": why, "compile_over_auto": why}
        result["figures"]["difference"]["compile"] = why
        if not result["stopped"].startswith(measure.OUT_OF_TIME):
            result["failures"].append(f"compile: {result['stopped']}")
    return {
        "parameters": dataclasses.asdict(case) | {"tolerance": TOLERANCE},
        "backends": result.get("backends", {}),
        "failures": result["failures"],
        "figures": result["figures"],
    }


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as text, one line per case; ``-`` where nothing was measured."""

    def cell(figures: dict[str, Any], path: str, width: int, scale: float = 1.0, form: str = ".1f") -> str:
        value: Any = figures
        for key in path.split("."):
            value = value.get(key, {})
        number = value.get("median", value.get("value"))
        return ("-" if number is None else f"{number * scale:{form}}").rjust(width)

    head = f"{'preset':<31}{'bn':<8}{'batch':>6} {'format':<14}"
    lines = [
        head
        + "".join(name.rjust(11) for name in CONTENDERS)
        + f"{'cpu':>10}{'ref/auto':>10}{'comp/auto':>10}"
        f"{'floor':>9}{'diff.':>9}"
    ]
    for entry in entries:
        p, figures = entry["parameters"], entry["figures"]
        lines.append(
            f"{p['preset']:<31}{p['bn']:<8}{p['batch']:>6} {p['memory_format']:<14}"
            + "".join(cell(figures, f"{name}.seconds", 11, 1e3) for name in CONTENDERS)
            + cell(figures, "auto.processor_seconds", 10, 1e3)
            + cell(figures, "reference_over_auto", 10, form=".2f")
            + cell(figures, "compile_over_auto", 10, form=".2f")
            + cell(figures, "byte_floor.seconds", 9, 1e3, ".2f")
            + cell(figures, "difference.auto.image_parameters", 9, form=".1g")
        )
    lines.append(
        "medians; ms per batch; cpu: processor time of auto; floor: bytes once at the copy's bandwidth"
    )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python3 -m benchmarks.decode", description=__doc__.split("\n")[0])
    found.add_argument(
        "--presets", nargs="+", default=list(DEFAULT), metavar="NAME", help="presets or recipes"
    )
    found.add_argument("--bn", nargs="+", default=list(BN_STATISTICS), choices=BN_STATISTICS)
    found.add_argument("--batch", type=int, help=f"default: 16, and 1 from {LARGE_IMAGE}x{LARGE_IMAGE} on")
    found.add_argument(
        "--memory-format",
        nargs="+",
        default=["contiguous"],
        choices=MEMORY_FORMATS,
        help="of the weights, which the activations follow",
    )
    found.add_argument("--no-compile", action="store_true", help="leave torch.compile of the reference out")
    measure.add_options(found, "decode")
    return found


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All that the command line asks for."""

    def batch(preset: str) -> int:
        if options.batch is not None:
            return int(options.batch)
        return 1 if model_of(preset).vae.image_size >= LARGE_IMAGE else 16

    return [
        Case(preset, bn, batch(preset), memory_format, not options.no_compile, options.device)
        for preset in options.presets
        for bn in options.bn
        for memory_format in options.memory_format
    ]


def main(
    arguments: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Time, print and write ``<machine>/<name>.json``; 1: a contender failed, 2: wrong usage, 3: a busy machine."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    known = parser()
    options = known.parse_args(arguments)
    if options.one_case is not None:
        in_this_process(options.one_case)
        return 0
    for preset in options.presets:
        if preset not in MODELS:
            known.error(str(unknown_name("preset", preset, MODELS)))
    measure.check_options(known, options)
    fewest, most = options.repeats
    try:
        watch = measure.Watch(force=options.force)
    except MachineBusy as busy:
        print(busy, file=sys.stderr)
        return 3
    cases, budget = cases_of(options), Budget(options.budget)
    entries, left_out = [], []
    for index, case in enumerate(cases):
        allowed = max(budget.remaining(), 0.0) / (len(cases) - index)
        try:
            entry = time_case(case, budget, fewest=fewest, most=most, allowed=allowed)
        except OutOfTime as error:
            left_out.append(str(case))
            report(f"{case}: left out, {error}")
            continue
        entries.append(entry)
        if entry["figures"]["compile"].get("reason", "").startswith(measure.OUT_OF_TIME):
            left_out.append(f"{case}: compile")
        for failure in entry["failures"]:
            report(f"{case}: failed: {failure}")
    status, said = measure.write_cases(
        "benchmarks.decode",
        arguments,
        options,
        watch,
        settings() | {"cudnn_benchmark": True},
        entries,
        left_out,
    )
    report(table(entries))
    if said:
        report(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
