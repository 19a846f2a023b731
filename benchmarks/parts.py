"""The parts of a sample, timed apart: an evaluation of the network, decoding, and the solver without the network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Budget, Figure, measured
from benchmarks.published import FIXED_TOL, Case, Sampler, autocast
from lsgm_fast.dispatch import use_backend
from lsgm_fast.models import LSGM


@contextlib.contextmanager
def stored_output(model: LSGM, like: torch.Tensor) -> Iterator[None]:
    """Let the network return the same tensor at every evaluation; its inputs are still converted."""
    output = torch.randn_like(like)

    def predict(z: torch.Tensor, t: torch.Tensor, **_run: Any) -> torch.Tensor:
        _ = z.to(model.dtype), t.to(model.dtype).to(z.device)
        return output

    vars(model)["_predict"] = predict
    try:
        yield
    finally:
        del vars(model)["_predict"]


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    measure.synchronize(device)
    start = time.perf_counter()
    run()
    measure.synchronize(device)
    return time.perf_counter() - start


class Parts:
    """The parts of a sample of one batch size and precision."""

    def __init__(self, model: LSGM, sampler: Sampler) -> None:
        self.model, self.sampler, self.device = model, sampler, sampler.device
        self.t = torch.full((sampler.case.batch,), 0.5, device=self.device)

    def runs(self, backend: str) -> dict[str, Callable[[], object]]:
        """What is timed of one backend."""
        sampler, precision = self.sampler, self.sampler.case.precision
        sampler.set_precision()
        with use_backend(backend):
            predict = self.model._sampling_term().predict

        def within(run: Callable[[], object]) -> Callable[[], object]:
            def surrounded() -> object:
                with torch.no_grad(), use_backend(backend), autocast(self.device, precision):
                    return run()

            return surrounded

        return {
            "score": within(lambda: predict(sampler.noise, self.t)),
            "decode": within(lambda: self.model.decode(sampler.noise, lower_noise=sampler.lower)),
        }

    def time_networks(
        self, backends: Sequence[str], seconds: float, budget: Budget
    ) -> dict[str, dict[str, Figure]]:
        """``score`` and ``decode`` of every backend, in turns.

        Raises:
            OutOfTime: not one round was finished.
        """
        runs = {(backend, part): run for backend in backends for part, run in self.runs(backend).items()}

        def one_round() -> dict[tuple[str, str], float]:
            found = {}
            for key, run in runs.items():
                budget.check()
                found[key] = timed(run, self.device)
            return found

        rounds = measure.repeat(one_round, warmup=1, fewest=1, most=10, seconds=seconds, budget=budget)
        return {
            backend: {
                part: measured([r[backend, part] for r in rounds], f"s/{unit}")
                for part, unit in (("score", "evaluation"), ("decode", "batch"))
            }
            for backend in backends
        }

    def time_solver(self, case: Case, seconds: float, budget: Budget) -> Figure:
        """A solve without a network, per evaluation."""
        sampler = Sampler(self.model, case, self.device, budget)
        goal: dict[str, Any] = (
            {"tol": FIXED_TOL} if case.evaluations is None else {"evaluations": case.evaluations}
        )

        def once() -> float:
            nfe = 0

            def solve() -> None:
                nonlocal nfe
                noise, solver = sampler.noise, case.solver
                _, info = self.model.sample_latents(case.batch, noise=noise, solver=solver, **goal)
                nfe = info.nfe

            spent = timed(solve, self.device)
            return spent / nfe

        with stored_output(self.model, sampler.noise), use_backend(case.backend or "auto"):
            times = measure.repeat(once, warmup=1, fewest=1, most=10, seconds=seconds, budget=budget)
        return measured(times, "s/evaluation")
