"""What a solver costs beside the network: a whole solve with a network that costs nothing.

    python -m benchmarks.solver                        every published configuration, batch 16
    python -m benchmarks.solver --network --batch 1    also one evaluation of the real network, for the solver's share

The "network" returns a stored output, so that all of a solve's time is the solver's: states, stages, error norms, step
control, the SDE's coefficients, conversions and dispatch. Contenders are the published path (``scipy``: torchdiffeq's
``scipy_solver``, a float64 state on the host) and ``rk45``, the same method on the device. They take turns in the same
run, with the same threads for PyTorch, NumPy and BLAS. The published formulas are rounded to float32, so at tight
tolerances the two need not take exactly the same steps: they are compared per evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lsgm_fast
from benchmarks import measure
from benchmarks.measure import Budget, OutOfTime
from lsgm_fast.dispatch import record
from lsgm_fast.presets import PRESETS
from lsgm_fast.sampling import ScoreTerm, Solution, solve_ode
from lsgm_fast.sde import build_sde

SOLVERS = ("scipy", "rk45")
PUBLISHED = tuple(name for name in PRESETS if not name.startswith("tiny"))
NETWORK_CALLS = 3


def problem(preset: str, batch: int, device: str) -> tuple[ScoreTerm, torch.Tensor]:
    """The drift of a configuration with a stored network output, and an initial state."""
    config = PRESETS[preset]
    shape = (batch, *config.vae.latent_shape)
    generator = torch.Generator().manual_seed(0)
    eps, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    logit = torch.full((1, shape[1], 1, 1), -1.0, device=device)
    sde = build_sde(config.sde)
    return ScoreTerm(lambda z, t: eps, sde, logit), noise * sde.prior_std


def solve(term: ScoreTerm, z1: torch.Tensor, solver: str, tol: float, t_end: float) -> tuple[float, Solution]:
    """Seconds and solution; ``scipy`` with the published formulas, as the sampler calls it."""
    if solver == "scipy":
        term = dataclasses.replace(term, sde=term.sde.with_parity("published"))
    device = str(z1.device)
    measure.synchronize(device)
    start = time.perf_counter()
    solution = solve_ode(term, z1, t_end=t_end, solver=solver, rtol=tol, atol=tol)
    measure.synchronize(device)
    return time.perf_counter() - start, solution


def network_seconds(preset: str, batch: int, device: str, budget: Budget) -> dict[str, Any]:
    """One evaluation of the configuration's network, random weights, float32."""
    model = lsgm_fast.build(preset).to(device).eval()
    z = torch.randn(batch, *model.latent_shape, device=device)
    t = torch.full((batch,), 0.5, device=device)
    network = model.prior
    assert network is not None

    @torch.no_grad()
    def run() -> float:
        measure.synchronize(device)
        start = time.perf_counter()
        network(z, t)
        measure.synchronize(device)
        return time.perf_counter() - start

    times = measure.repeat(
        run, warmup=1, fewest=NETWORK_CALLS, most=NETWORK_CALLS, seconds=600.0, budget=budget
    )
    return measure.measured(times, "s")


def time_preset(
    preset: str, batch: int, device: str, rounds: int, network: bool, budget: Budget
) -> dict[str, Any]:
    """A record's entry for one configuration."""
    config = PRESETS[preset]
    term, z1 = problem(preset, batch, device)
    tol, t_end = config.sampling.tol, config.sampling.ode_eps
    seconds: dict[str, list[float]] = {solver: [] for solver in SOLVERS}
    solutions: dict[str, Solution] = {}
    backends: dict[str, str] = {}
    for round_ in range(rounds + 1):
        for solver in SOLVERS:
            budget.check()
            with record() as log:
                spent, solutions[solver] = solve(term, z1, solver, tol, t_end)
            if solver == "rk45":
                backends = log.backends()
            if round_:  # the first one warms up
                seconds[solver].append(spent)
    figures: dict[str, Any] = {}
    for solver in SOLVERS:
        nfe = solutions[solver].nfe
        figures[solver] = {
            "solve": measure.measured(seconds[solver], "s"),
            "per_evaluation": measure.measured([s / nfe for s in seconds[solver]], "s"),
            "nfe": measure.measured([nfe], "evaluations"),
        }
    per_evaluation = [figures[solver]["per_evaluation"]["values"] for solver in SOLVERS]
    figures["scipy_over_rk45"] = measure.measured([a / b for a, b in zip(*per_evaluation, strict=True)], "1")
    if network:
        evaluation = network_seconds(preset, batch, device, budget)
        figures["network_evaluation"] = evaluation
        own = figures["rk45"]["per_evaluation"]["median"]
        figures["share"] = measure.extrapolated(
            own / (own + evaluation["median"]),
            "1",
            "rk45.per_evaluation / (rk45.per_evaluation + network_evaluation), medians; decoding left out",
        )
    else:
        figures["network_evaluation"] = measure.not_measured("not asked for: --network")
        figures["share"] = measure.not_measured("not asked for: --network")
    return {
        "parameters": {"preset": preset, "batch": batch, "shape": list(z1.shape), "tol": tol, "t_end": t_end},
        "backends": backends,
        "failures": [],
        "figures": figures,
    }


def describe(entry: dict[str, Any]) -> str:
    """One line."""
    figures = entry["figures"]
    text = ", ".join(
        f"{solver} {figures[solver]['solve']['median'] * 1e3:.1f} ms "
        f"({figures[solver]['nfe']['median']:.0f} evaluations, "
        f"{figures[solver]['per_evaluation']['median'] * 1e3:.3f} ms each)"
        for solver in SOLVERS
    )
    text += f"; scipy / rk45 {figures['scipy_over_rk45']['median']:.2f}"
    if figures["share"]["kind"] != "not_measured":
        network = figures["network_evaluation"]["median"]
        text += f"; network {network * 1e3:.0f} ms, solver's share {figures['share']['value']:.2%}"
    return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.solver", description=__doc__.split("\n")[0])
    found.add_argument("--presets", nargs="+", default=list(PUBLISHED), choices=list(PRESETS))
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--network", action="store_true", help="time one evaluation of the real network too")
    found.add_argument("--device", default="cpu")
    found.add_argument("--budget", type=float, default=420.0, help="seconds")
    found.add_argument("--name", default="solver", help="of the record")
    found.add_argument("--out", type=Path)
    found.add_argument("--force", action="store_true", help="time on a machine that is not idle")
    found.add_argument("--dry-run", action="store_true", help="mark the figures as a trial")
    found.add_argument("--commit", help="in place of what git says")
    return found


def main(
    arguments: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Time, print and write ``<machine>/<name>.json``; 3 where the machine is not idle."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    if options.batch < 1 or options.rounds < 1:
        raise SystemExit(f"--batch and --rounds must be at least 1, got {options.batch} and {options.rounds}")
    try:
        watch = measure.Watch(force=options.force)
    except measure.MachineBusy as busy:
        print(busy, file=sys.stderr)
        return 3
    budget = Budget(options.budget)
    entries, left_out = [], []
    for preset in options.presets:
        try:
            entry = time_preset(
                preset, options.batch, options.device, options.rounds, options.network, budget
            )
        except OutOfTime as error:
            left_out.append(preset)
            report(f"{preset}: left out, {error}")
            continue
        entries.append(entry)
        report(f"{preset}: {describe(entry)}")
    record_ = measure.write_record(
        measure.results_folder(options.out, options.dry_run),
        options.device,
        name=options.name,
        command=measure.command_line("benchmarks.solver", arguments),
        dry_run=options.dry_run,
        machine=watch.entries(2.0),
        environment=measure.environment(options.commit),
        settings={"torch_threads": torch.get_num_threads(), "rounds": options.rounds},
        cases=entries,
        left_out=left_out,
    )
    if not record_["idle"]:
        report("NOT IDLE: " + "; ".join(record_["not_idle_because"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
