"""What the likelihood of a large image and the weight normalisation of a whole VAE cost: time, and memory at its peak.

    python -m benchmarks.whole

Single shapes of these operations are timed by :mod:`benchmarks.ops`; here are the two sizes at which they were written
to matter. ``mixture_logistic``: ``mixture_logistic_log_prob`` of one 256x256 image under 10 mixtures, forward and
backward. ``weight_norm``: all convolutions of the VAE of ``cifar10-fid`` at once, ``forward`` (as a stage-2 step with a
VAE that stays as it is does) and ``forward+backward``.

``reference`` (plain PyTorch) and ``auto`` take turns in one process; ``reference_over_auto`` has the ratio of each
round. ``peak_memory`` is that of one call of each in a process of its own, its first: the largest resident size minus
that with the inputs in memory, gradients included. Results are compared first: an ``auto`` that differs from plain
PyTorch in float32 by more than ``TOLERANCE`` of the largest value is a failure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Budget, MachineBusy, OutOfTime, measured, not_measured
from benchmarks.published import settings
from lsgm_fast import ops
from lsgm_fast.dispatch import use_backend
from lsgm_fast.models import NVAE
from lsgm_fast.presets import get_preset

BACKENDS = ("reference", "auto")
TOLERANCE = 1e-4
IMAGE, MIXTURES, BITS = 256, 10, 5
VAE = "cifar10-fid"
CASES = ("mixture_logistic forward+backward", "weight_norm forward", "weight_norm forward+backward")

Run = Callable[[], list[torch.Tensor]]


def mixture_logistic(image: int) -> Run:
    """Log-probability of an image and the gradient with respect to the decoder's output."""
    generator = torch.Generator().manual_seed(0)
    levels = 2**BITS - 1
    x = torch.randint(0, levels + 1, (1, 3, image, image), generator=generator) / levels * 2.0 - 1.0
    logits = torch.randn(1, 10 * MIXTURES, image, image, generator=generator).requires_grad_()

    def run() -> list[torch.Tensor]:
        loss = ops.mixture_logistic_log_prob(x, logits, BITS).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [logits])]

    return run


def weight_norm(backward: bool, number: int | None) -> Run:
    """All weights of a VAE, or the first ones, and the gradients of their sum."""
    torch.manual_seed(0)
    convs = NVAE(get_preset(VAE).vae).weight_norm_convs[:number]
    weights = [c.direction().detach().requires_grad_(backward) for c in convs]
    log_norms = [c.log_weight_norm.detach().requires_grad_(backward) for c in convs]
    grads = [torch.ones_like(w) for w in weights]

    def run() -> list[torch.Tensor]:
        normalized = ops.weight_norm(weights, log_norms)
        if not backward:
            return list(normalized)
        return list(torch.autograd.grad(normalized, [*weights, *log_norms], grads))

    return run


def build(case: str, small: bool = False) -> Run:
    """What a case runs; ``small``: the same on next to nothing."""
    if case.startswith("weight_norm"):
        return weight_norm(case.endswith("backward"), 2 if small else None)
    return mixture_logistic(8 if small else IMAGE)


def peak_memory(folder: Path) -> None:
    """One call of a backend, for :func:`measure.in_own_process`."""

    def run(task: dict[str, Any], budget: Budget) -> dict[str, Any]:
        small, call = build(task["case"], small=True), build(task["case"])
        with use_backend(task["backend"]):
            # Kernels are tested and threads made. Not with the call itself: memory that it frees stays the process's.
            small()
            measure.forget_largest()
            before = measure.resident_bytes()
            kept = call()
            largest = measure.largest_resident_bytes()
        del kept
        return {"bytes": largest - before}

    measure.run_task(folder, run)


def time_case(case: str, budget: Budget, *, fewest: int, most: int, allowed: float) -> dict[str, Any]:
    """A record's entry.

    Raises:
        OutOfTime: the budget ended before one round was finished.
    """
    run = build(case)
    figures: dict[str, Any] = {}
    failures = []
    results = {}
    for backend in BACKENDS:
        with use_backend(backend):
            results[backend] = run()
    for got, expected in zip(results["auto"], results["reference"], strict=True):
        difference = float((got - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:
            failures.append(f"auto differs from the reference by {difference:.2g} of the largest value")
            break
    del results

    def seconds(backend: str) -> float:
        with use_backend(backend):
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

    rounds = measure.repeat(
        lambda: {backend: seconds(backend) for backend in BACKENDS},
        warmup=2,
        fewest=fewest,
        most=most,
        seconds=allowed,
        budget=budget,
    )
    for backend in BACKENDS:
        found = measure.in_own_process("benchmarks.whole", {"case": case, "backend": backend}, budget)
        memory = not_measured(found["failure"]) if "failure" in found else measured([found["bytes"]], "bytes")
        figures[backend] = {"seconds": measured([r[backend] for r in rounds], "s"), "peak_memory": memory}
    figures["reference_over_auto"] = measured([r["reference"] / r["auto"] for r in rounds], "1")
    return {
        "parameters": {"case": case, "tolerance": TOLERANCE, "device": "cpu"},
        "backends": {},
        "failures": failures,
        "figures": figures,
    }


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as text."""
    lines = [f"{'case':<38}{'reference':>11}{'auto':>9}{'ref/auto':>10}{'MiB ref.':>10}{'MiB auto':>10}"]
    for entry in entries:
        f = entry["figures"]
        memory = [f[b]["peak_memory"].get("median", float("nan")) / 2**20 for b in BACKENDS]
        times = [f[b]["seconds"]["median"] * 1e3 for b in BACKENDS]
        lines.append(
            f"{entry['parameters']['case']:<38}{times[0]:>11.2f}{times[1]:>9.2f}"
            f"{f['reference_over_auto']['median']:>10.2f}{memory[0]:>10.1f}{memory[1]:>10.1f}"
        )
    return "\n".join([*lines, "medians; ms per call; memory beside the inputs"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python3 -m benchmarks.whole", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    measure.add_options(found, "whole")
    found.set_defaults(device="cpu", batch=None)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Time, print and write the record; 1: a wrong result, 2: wrong usage, 3: a busy machine."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    known = parser()
    options = known.parse_args(arguments)
    if options.one_case is not None:
        peak_memory(options.one_case)
        return 0
    measure.check_options(known, options)
    if options.device != "cpu":
        known.error("resident memory is the processor's: this program is for --device cpu")
    fewest, most = options.repeats
    try:
        watch = measure.Watch(force=options.force)
    except MachineBusy as busy:
        print(busy, file=sys.stderr)
        return 3
    budget = Budget(options.budget)
    entries, left_out = [], []
    for index, case in enumerate(options.cases):
        allowed = max(budget.remaining(), 0.0) / (len(options.cases) - index) / 2
        try:
            entries.append(time_case(case, budget, fewest=fewest, most=most, allowed=allowed))
        except OutOfTime as error:
            left_out.append(case)
            print(f"{case}: left out, {error}")
    status, said = measure.write_cases(
        "benchmarks.whole", arguments, options, watch, settings(), entries, left_out
    )
    print(table(entries))
    if said:
        print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
