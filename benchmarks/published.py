"""Time the sampling of the published configurations, at their exact sizes, with random weights.

What a case is
    One preset, batch size, solver and precision. ``solver="scipy"`` is the published path (SciPy's RK45 on the host
    through torchdiffeq); ``"rk45"`` takes the same steps on the device. ``fp32`` is float32 with PyTorch's default
    TF32 flags (recorded under ``settings``); ``fp16-autocast`` and ``bf16-autocast`` enter autocast at every
    evaluation, as the published sampler does, so weights are cast anew each time. ``cudnn.benchmark`` is on, as in
    the published code. The initial noise is drawn before the clock starts, once per case, never zeros.

What random weights change
    The cost of one evaluation does not depend on the weights' values, the number of evaluations does. As built, the
    score network's output layers are all but zero and the ODE is nearly trivial, so layers initialised to almost zero
    are drawn anew at ordinary scale (:func:`enliven`). Then every case is timed in two ways:

    ``fixed``: tol = 1e6. Every step is accepted and ten times longer than the one before (1e-4, 1e-3, 1e-2, 0.1,
    the rest of the interval), so both solvers take 2 + 6 x 5 = 32 evaluations whatever the weights are, through the
    same code as a real solve. Figures to compare are those per evaluation.

    ``solved``: the recipe's own tolerance. Its NFE is that of random weights, not of a trained model.

    ``published_nfe``: the NFE of the paper's page times the seconds per evaluation of ``fixed`` plus its decoding:
    extrapolated, and marked so.

How the split is made
    ``total``, ``solve`` and ``decode`` come from runs in which nothing is inserted: the device is synchronised before
    the solve, between solve and decode (the library does that itself) and at the end. ``split`` comes from separate
    runs, in which hooks around the evaluations synchronise the device and read the host's clock on entering and
    leaving it: ``score`` is the time inside the network, ``solver`` the rest of the solve (step arithmetic, SDE
    coefficients, mixing, copies between host and device), ``decode`` as before. Synchronising forbids the host to
    run ahead of the device, so ``split.total`` can exceed ``total``; ``split.total_over_unsplit`` says by how much.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lsgm_fast
from benchmarks import measure
from benchmarks.measure import (
    BUSY_EXIT,
    Budget,
    Figure,
    MachineBusy,
    OutOfTime,
    extrapolated,
    measured,
    not_measured,
    quoted,
)
from lsgm_fast import dispatch
from lsgm_fast.errors import unknown_name
from lsgm_fast.models import LSGM
from lsgm_fast.presets import PRESETS

FIXED_TOL = 1e6
SOLVERS = ("scipy", "rk45")
PRECISIONS = {"fp32": None, "fp16-autocast": torch.float16, "bf16-autocast": torch.bfloat16}
# What a plan computes in at these precisions; plain PyTorch enters autocast.
PLANNED = {"fp32": None, "fp16-autocast": "fp16", "bf16-autocast": "bf16"}

# The figures of the paper's project page; of the recipes for which it gives none, nothing is extrapolated.
PAGE = "project page of arXiv:2106.05931 (quantitative CelebA-HQ-256 and CIFAR-10 models)"
PUBLISHED_NFE = {"celebahq256-quantitative": 23, "cifar10-fid": 138}

NOT_REACHED = "not reached within the time budget"

# A weight initialised this close to zero makes its layer do nothing.
SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class Case:
    """What is timed.

    ``solver``: as for :meth:`LSGM.sample`; this program has those of :data:`SOLVERS`. ``precision``: one of
    :data:`PRECISIONS`. ``backend``: as for :func:`lsgm_fast.use_backend`; None: what the environment says.
    ``evaluations``: a budget in place of a tolerance.
    """

    preset: str
    batch: int
    solver: str
    precision: str
    backend: str | None = None
    evaluations: int | None = None

    def __str__(self) -> str:
        budget = None if self.evaluations is None else f"{self.evaluations} evaluations"
        named = (self.preset, f"batch {self.batch}", self.solver, budget, self.precision, self.backend)
        return " ".join(filter(None, named))


@dataclass(frozen=True)
class Plan:
    """How long and how often: ``fewest`` to ``most`` repeats after ``warmup`` runs."""

    budget: Budget
    warmup: int = 2
    fewest: int = 3
    most: int = 10
    solved: bool = True


@dataclass(frozen=True)
class Run:
    """One sampled batch; seconds. ``score`` is 0 where the network was not timed."""

    nfe: int
    solve: float
    decode: float
    score: float
    backends: dict[str, str]

    @property
    def total(self) -> float:
        return self.solve + self.decode


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> int:
    """Draw weights of convolutions and linear layers that are all but zero anew, Xavier-uniform; returns how many."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and float(module.weight.std()) < SMALLEST_STD:
            fresh = torch.empty(module.weight.shape)
            nn.init.xavier_uniform_(fresh, generator=generator)
            module.weight.copy_(fresh)
            changed += 1
    return changed


class ScoreClock:
    """Seconds spent in evaluations of the network, from synchronisation to synchronisation, while entered."""

    def __init__(self, model: LSGM, device: str) -> None:
        self._model = model
        self._device = device
        self.seconds = 0.0
        self.calls = 0

    def __enter__(self) -> ScoreClock:
        inner = self._model._predict

        def predict(*args: Any, **kwargs: Any) -> torch.Tensor:
            measure.synchronize(self._device)
            entered = time.perf_counter()
            output = inner(*args, **kwargs)
            measure.synchronize(self._device)
            self.seconds += time.perf_counter() - entered
            self.calls += 1
            return output

        vars(self._model)["_predict"] = predict
        return self

    def __exit__(self, *exc: object) -> None:
        del vars(self._model)["_predict"]


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[object]:
    """What surrounds evaluations and decoding of plain PyTorch at one of :data:`PRECISIONS`; a plan has its own."""
    dtype = PRECISIONS[precision]
    if dtype is None or dispatch.choice()[0] != "reference":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


@contextlib.contextmanager
def _evaluations(model: LSGM, device: str, precision: str, budget: Budget) -> Iterator[None]:
    """Run every evaluation of the network in its own autocast, and stop the solve where the budget ends."""
    inner, before = model._predict, vars(model).get("_predict")

    def predict(*args: Any, **kwargs: Any) -> torch.Tensor:
        budget.check()
        with autocast(device, precision):
            return inner(*args, **kwargs)

    vars(model)["_predict"] = predict
    try:
        yield
    finally:
        del vars(model)["_predict"]
        if before is not None:
            vars(model)["_predict"] = before


class Sampler:
    """Draws one batch of a case again and again from the same noise."""

    def __init__(self, model: LSGM, case: Case, device: str, budget: Budget, seed: int = 0) -> None:
        self.model, self.case, self.device, self.budget = model, case, device, budget
        generator = torch.Generator().manual_seed(seed)
        self.noise, *self.lower = (
            torch.randn((case.batch, *shape), generator=generator).to(device)
            for shape in (model.latent_shape, *model.lower_shapes)
        )

    def set_precision(self) -> None:
        """Let the model prepare its networks in the case's precision, where the last case had another."""
        wanted = PLANNED[self.case.precision]
        if self.model._plan.settings.precision != wanted:
            self.model.compile_for_inference(precision=wanted)

    def __call__(self, tol: float, clock: ScoreClock | None = None) -> Run:
        """Sample and decode, timed; to the tolerance, unless the case has a budget of evaluations."""
        case = self.case
        goal: dict[str, Any] = {"tol": tol} if case.evaluations is None else {"evaluations": case.evaluations}
        self.set_precision()
        measure.synchronize(self.device)
        before = 0.0 if clock is None else clock.seconds
        with (
            _evaluations(self.model, self.device, case.precision, self.budget),
            contextlib.nullcontext() if case.backend is None else lsgm_fast.use_backend(case.backend),
            lsgm_fast.record() as log,
        ):
            started = time.perf_counter()
            z, info = self.model.sample_latents(case.batch, noise=self.noise, solver=case.solver, **goal)
            measure.synchronize(self.device)
            solved = time.perf_counter()
            with autocast(self.device, case.precision):
                self.model.decode(z, lower_noise=self.lower)
            measure.synchronize(self.device)
            decoded = time.perf_counter()
        return Run(
            nfe=info.nfe,
            solve=solved - started,
            decode=decoded - solved,
            score=0.0 if clock is None else clock.seconds - before,
            backends=log.backends(),
        )


def _peak_memory(device: str) -> Figure:
    if not device.startswith("cuda"):
        return not_measured("only CUDA's allocator keeps a peak")
    return measured([torch.cuda.max_memory_allocated(device)], "bytes")


def time_sampling(
    sampler: Sampler, tol: float, budget: Budget, *, warmup: int, fewest: int, most: int, seconds: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures of sampling at one tolerance, and which backend ran which operation.

    Runs without the split get about 70 % of ``seconds`` and ``fewest`` to ``most`` repeats; those with it the rest
    and at least one. ``peak_memory`` is the allocator's peak over the former, weights included.

    Raises:
        OutOfTime: the budget ended before one run was finished.
    """
    device, batch = sampler.device, sampler.case.batch
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    runs = measure.repeat(
        lambda: sampler(tol), warmup=warmup, fewest=fewest, most=most, seconds=0.7 * seconds, budget=budget
    )
    figures: dict[str, Any] = {
        "nfe": measured([r.nfe for r in runs], "evaluations"),
        "total": measured([r.total for r in runs], "s/batch"),
        "per_sample": measured([r.total / batch for r in runs], "s/sample"),
        "solve": measured([r.solve for r in runs], "s/batch"),
        "decode": measured([r.decode for r in runs], "s/batch"),
        "per_evaluation": measured([r.solve / r.nfe for r in runs], "s/evaluation"),
        "peak_memory": _peak_memory(device),
    }
    try:
        with ScoreClock(sampler.model, device) as clock:
            split = measure.repeat(
                lambda: sampler(tol, clock),
                warmup=0,
                fewest=1,
                most=most,
                seconds=0.3 * seconds,
                budget=budget,
            )
    except OutOfTime as error:
        figures["split"] = not_measured(str(error))
    else:
        unsplit = figures["total"]["median"]
        figures["split"] = {
            "score": measured([r.score for r in split], "s/batch"),
            "solver": measured([r.solve - r.score for r in split], "s/batch"),
            "decode": measured([r.decode for r in split], "s/batch"),
            "total": measured([r.total for r in split], "s/batch"),
            "score_per_evaluation": measured([r.score / r.nfe for r in split], "s/evaluation"),
            "total_over_unsplit": measured([r.total / unsplit for r in split], "ratio"),
        }
    return figures, runs[0].backends


def at_published_nfe(preset: str, batch: int, fixed: dict[str, Any]) -> dict[str, Figure] | Figure:
    """Time at the NFE of the paper's page, from the figures of the fixed run."""
    if preset not in PUBLISHED_NFE:
        return not_measured("the paper's page gives no NFE for this configuration")
    if fixed.get("kind") == "not_measured":
        return not_measured(f"nothing to extrapolate from: {fixed['reason']}")
    nfe = PUBLISHED_NFE[preset]
    total = nfe * fixed["per_evaluation"]["median"] + fixed["decode"]["median"]
    how = f"{nfe} x fixed.per_evaluation + fixed.decode (medians)"
    return {
        "nfe": quoted(nfe, "evaluations", PAGE),
        "total": extrapolated(total, "s/batch", how),
        "per_sample": extrapolated(total / batch, "s/sample", f"({how}) / {batch}"),
    }


def unsupported(case: Case, device: str) -> str | None:
    """Why a case is not timed on a device."""
    if case.precision == "fp16-autocast" and not device.startswith("cuda"):
        return "float16 autocast is the published precision on a GPU; a CPU is timed with bf16-autocast"
    return None


class Session:
    """Times cases and keeps their records; a failure or the end of the budget is recorded, not raised.

    ``save`` is called after every measurement, so that an interrupted run keeps what it has.
    """

    def __init__(self, cases: Sequence[Case], device: str, plan: Plan, save: Callable[[], object]) -> None:
        self.device, self.plan, self.save = device, plan, save
        self.cases = list(cases)
        self.records = [self._empty(case) for case in self.cases]

    def _empty(self, case: Case) -> dict[str, Any]:
        config = PRESETS[case.preset]
        reason = unsupported(case, self.device) or NOT_REACHED
        figures: dict[str, Any] = {
            group: not_measured(reason) for group in ("fixed", "solved", "published_nfe")
        }
        if reason == NOT_REACHED and not self.plan.solved:
            figures["solved"] = not_measured("not asked for (--no-solved)")
        return {
            "parameters": {
                **asdict(case),
                "device": self.device,
                "sde": config.sde.name,
                "fixed_tol": FIXED_TOL,
                "tol": config.sampling.tol,
                "ode_eps": config.sampling.ode_eps,
                "bn": config.sampling.bn,
                "weights": "random",
            },
            "backends": {},
            "failures": [],
            "figures": figures,
        }

    def settings(self) -> dict[str, Any]:
        """What the record says under ``settings`` beside :func:`settings`."""
        return {}

    def table(self) -> str:
        """The records as text."""
        return table(self.records)

    @property
    def failed(self) -> bool:
        """Whether any measurement raised an error."""
        return any(record["failures"] for record in self.records)

    def left_out(self) -> list[str]:
        """What the budget did not reach."""
        found = []
        for case, record in zip(self.cases, self.records, strict=True):
            for group in ("fixed", "solved"):
                figures = record["figures"][group]
                if lacks_time(figures):
                    found.append(f"{case} ({group})")
                elif lacks_time(figures.get("split", {})):
                    found.append(f"{case} ({group}: split)")
        return found

    def _measure(self, record: dict[str, Any], group: str, sampler: Sampler, seconds: float) -> None:
        label = f"{sampler.case} ({group})"
        fixed = group == "fixed"
        try:
            self.plan.budget.check()
            figures, backends = time_sampling(
                sampler,
                FIXED_TOL if fixed else record["parameters"]["tol"],
                self.plan.budget,
                # The fixed runs have warmed everything up for the solved ones: same shapes, same code. Those can be
                # long, and are repeated as their share of the time allows.
                warmup=self.plan.warmup if fixed else 0,
                fewest=self.plan.fewest if fixed else 1,
                most=self.plan.most,
                seconds=seconds,
            )
        except OutOfTime as error:
            record["figures"][group] = not_measured(str(error))
            print(f"  {label}: left out, {error}", flush=True)
        except Exception as error:  # recorded, so that one case does not cost the others
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            record["figures"][group] = not_measured(reason)
            record["failures"].append(f"{group}: {reason}")
            print(f"  {label}: {reason}", flush=True)
        else:
            record["figures"][group] = figures
            record["backends"] = backends
            print(
                f"  {label}: {figures['total']['median']:.4f} s/batch, NFE {figures['nfe']['median']:g}, "
                f"{figures['total']['n']} repeats",
                flush=True,
            )
        self.save()

    def _todo(self, preset: str) -> list[tuple[Case, dict[str, Any]]]:
        """The cases of one preset that this device can run, with their records."""
        return [
            (case, record)
            for case, record in zip(self.cases, self.records, strict=True)
            if case.preset == preset and unsupported(case, self.device) is None
        ]

    def _build(self, preset: str) -> LSGM:
        """The model with random weights, in which every layer has a say."""
        print(f"{preset}: building", flush=True)
        torch.manual_seed(0)
        model = lsgm_fast.build(preset, self.device)
        enliven(model)
        return model

    def time_preset(self, preset: str, share: float) -> None:
        """Time all cases of one preset in about ``share`` seconds: first ``fixed`` for all, then ``solved``."""
        started = time.perf_counter()
        todo = self._todo(preset)
        if not todo or self.plan.budget.remaining() <= 0:
            return
        model = self._build(preset)
        groups = ("fixed", "solved") if self.plan.solved else ("fixed",)
        waiting = len(todo) * len(groups)
        for group in groups:
            for case, record in todo:
                if group == "solved" and record["failures"]:
                    record["figures"][group] = not_measured(f"not tried: {record['failures'][0]}")
                elif group == "fixed" or not lacks_time(record["figures"]["fixed"]):
                    seconds = max(share - (time.perf_counter() - started), 0.0) / waiting
                    sampler = Sampler(model, case, self.device, self.plan.budget)
                    self._measure(record, group, sampler, seconds)
                    del sampler
                waiting -= 1
        for case, record in todo:
            record["figures"]["published_nfe"] = at_published_nfe(
                preset, case.batch, record["figures"]["fixed"]
            )
        self.save()
        del model
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def lacks_time(figures: dict[str, Any]) -> bool:
    """Whether a group is missing because the budget ended."""
    reason = figures.get("reason", "")
    return figures.get("kind") == "not_measured" and (
        reason == NOT_REACHED or reason.startswith(measure.OUT_OF_TIME)
    )


def settings() -> dict[str, Any]:
    """The switches of PyTorch that a timing depends on, as they are."""
    return {
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_matrix_products": torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as text, one line per case; ``-`` where nothing was measured."""

    def cell(figures: dict[str, Any], *path: str, scale: float = 1.0, digits: int = 2) -> str:
        value: Any = figures
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, dict) or value.get("kind") in (None, "not_measured"):
            return "-"
        number = value["median"] if value["kind"] == "measured" else value["value"]
        return f"{number * scale:.{digits}f}"

    head = (
        f"{'preset':<31}{'batch':>5} {'solver':<6} {'precision':<14}{'ms/eval':>9}{'score':>9}{'solver':>9}"
        f"{'decode':>10}{'solved s':>10}{'NFE':>6}{'at published NFE':>18}"
    )
    lines = [head]
    for record in records:
        p, f = record["parameters"], record["figures"]
        nfe = f["fixed"].get("nfe", {}).get("median", 1.0)
        lines.append(
            f"{p['preset']:<31}{p['batch']:>5} {p['solver']:<6} {p['precision']:<14}"
            f"{cell(f, 'fixed', 'per_evaluation', scale=1e3):>9}"
            f"{cell(f, 'fixed', 'split', 'score', scale=1e3 / nfe):>9}"
            f"{cell(f, 'fixed', 'split', 'solver', scale=1e3 / nfe):>9}"
            f"{cell(f, 'fixed', 'decode', scale=1e3):>10}"
            f"{cell(f, 'solved', 'total', digits=3):>10}"
            f"{cell(f, 'solved', 'nfe', digits=0):>6}"
            f"{cell(f, 'published_nfe', 'total', digits=3):>18}"
        )
    lines.append(
        "ms per evaluation with its split, ms per decoded batch, s per solved batch with random weights and"
    )
    lines.append("their NFE, s per batch extrapolated to the published NFE; medians")
    return "\n".join(lines)


def benchmark(
    cases: Sequence[Case],
    *,
    name: str,
    device: str,
    plan: Plan,
    out: Path,
    command: str,
    force: bool = False,
    dry_run: bool = False,
    stated_commit: str | None = None,
    sample_seconds: float = 2.0,
    make: type[Session] = Session,
) -> tuple[dict[str, Any], bool]:
    """Time the cases, write ``<out>/<machine>/<name>.json``, and return the record and whether all went well.

    The file is rewritten after every measurement, so an interrupted run keeps what it has. ``make``: what times them.

    Raises:
        MachineBusy: others use the machine and ``force`` is false; nothing is written.
    """
    watch = measure.Watch(force=force, sample_seconds=sample_seconds)
    torch.backends.cudnn.benchmark = True
    date = measure.now()
    described = measure.environment(stated_commit)

    def save(finished: bool = False) -> dict[str, Any]:
        return measure.write_record(
            out,
            device,
            name=name,
            command=command,
            dry_run=dry_run,
            machine=watch.entries(sample_seconds if finished else 0.05),
            environment=described,
            settings=settings() | session.settings(),
            cases=session.records,
            left_out=session.left_out(),
            date=date,
        )

    session = make(cases, device, plan, save)
    presets = list(dict.fromkeys(case.preset for case in cases))
    for index, preset in enumerate(presets):
        session.time_preset(preset, max(plan.budget.remaining(), 0.0) / (len(presets) - index))
    record = save(finished=True)
    print(session.table())
    if record["left_out"]:
        print(f"left out ({len(record['left_out'])}): " + "; ".join(record["left_out"]))
    if not record["idle"]:
        print("NOT IDLE: " + "; ".join(record["not_idle_because"]))
    print(f"wrote {name}.json")
    return record, not session.failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 0: done, 1: a case failed, 2: wrong usage, 3: refused on a busy machine."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.published", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--presets", nargs="+", required=True, metavar="NAME", help="presets to time, in order"
    )
    parser.add_argument("--name", required=True, help="name of the record")
    parser.add_argument("--out", type=Path, help="folder that holds <machine>/<name>.json")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1], help="batch sizes (default: 16 1)")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), help="default: scipy rk45")
    parser.add_argument(
        "--precisions", nargs="+", help="default: fp32 fp16-autocast; CPU: fp32 bf16-autocast"
    )
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds, then stop cleanly (default: 420)"
    )
    parser.add_argument("--repeats", type=int, nargs=2, default=[3, 10], metavar=("FEWEST", "MOST"))
    parser.add_argument("--no-solved", action="store_true", help="skip solving to the recipe's tolerance")
    parser.add_argument("--force", action="store_true", help="time a busy machine; the record says so")
    parser.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    parser.add_argument("--commit", help="commit to record in place of what git says")
    options = parser.parse_args(arguments)
    plan_budget = Budget(options.budget)
    if options.precisions is None:
        options.precisions = [
            "fp32",
            "fp16-autocast" if options.device.startswith("cuda") else "bf16-autocast",
        ]
    for kind, values, valid in (
        ("preset", options.presets, PRESETS),
        ("solver", options.solvers, SOLVERS),
        ("precision", options.precisions, PRECISIONS),
    ):
        for value in values:
            if value not in valid:
                parser.error(str(unknown_name(kind, value, valid)))
    fewest, most = options.repeats
    if not 1 <= fewest <= most:
        parser.error(f"--repeats expects 1 <= FEWEST <= MOST, got {fewest} {most}")
    if min(options.batch) < 1:
        parser.error(f"--batch must be at least 1, got {min(options.batch)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is usable here: try --device cpu, or validate.sh --dry-run")
    cases = [
        Case(preset, batch, solver, precision)
        for preset in options.presets
        for batch in options.batch
        for precision in options.precisions
        for solver in options.solvers
    ]
    try:
        _, ok = benchmark(
            cases,
            name=options.name,
            device=options.device,
            plan=Plan(plan_budget, fewest=fewest, most=most, solved=not options.no_solved),
            out=measure.results_folder(options.out, options.dry_run),
            command=measure.command_line("benchmarks.published", arguments),
            force=options.force,
            dry_run=options.dry_run,
            stated_commit=options.commit,
        )
    except MachineBusy as error:
        print(f"refused: {error}", file=sys.stderr)
        return BUSY_EXIT
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
