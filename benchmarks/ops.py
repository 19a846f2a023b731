"""Time every operation on every backend, beside plain PyTorch and ``torch.compile`` of it, all in one run.

What a case is
    One operation, shape, dtype, memory layout and mode: ``forward`` (no gradients) or ``forward+backward`` (one call
    and the gradients of all differentiable arguments). Its contenders are ``reference`` (plain PyTorch, eager),
    ``compile`` (``torch.compile`` of it, static shapes) and every fused backend that can run the inputs, called
    through the dispatcher as a user calls it.

Correctness first
    Every contender but the reference is compared with float64 (:mod:`lsgm_fast.testing`) on the very inputs it is
    timed on. A wrong one is not timed: its figures say so, the case has a failure, and the program ends with 1.

How it is timed
    Rounds in which every contender runs once, in turn, so that a disturbance hits all of them; a round's value is the
    mean over enough calls to last ``--min-time``. Inputs rotate through copies that together exceed the cache twice,
    so that small shapes do not come out of it (``--hot``: one copy). On CUDA a round is a captured graph that is
    replayed, or, where the calls cannot be captured, a stream of calls between two events; ``parameters.clock`` says
    which.

GB/s
    The bytes that the operation must move (:func:`lsgm_fast.testing.traffic`) over the time. ``copy`` is this
    machine's own ``tensor.copy_`` between buffers beyond the cache, timed in the same rounds (bytes read plus bytes
    written); ``of_copy`` the ratio of the two, round by round. ``clone`` is ``tensor.clone()`` of the operation's own
    inputs: as a result's memory is new, it is what an operation of that size can reach where fresh pages are dear.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import lsgm_fast.ops  # registers the operations  # noqa: F401
from benchmarks import measure
from benchmarks.measure import BUSY_EXIT, Budget, Figure, MachineBusy, OutOfTime, measured, not_measured
from lsgm_fast import native, testing
from lsgm_fast.dispatch import REGISTRY, Op, record, use_backend
from lsgm_fast.errors import unknown_name
from lsgm_fast.testing import OpSamples, Sample

MODES = ("forward", "forward+backward")
LAYOUTS = ("contiguous", "channels_last")
# dtype of the state <- dtype of the network's output
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
    "float64<-float32": (torch.float64, torch.float32),
    "float32<-bfloat16": (torch.float32, torch.bfloat16),
    "float32<-float16": (torch.float32, torch.float16),
}
# More copies of the inputs than this would only show how the allocator behaves.
MOST_BUFFERS = 512
COPY_FACTOR = 4  # size of the copied buffer in caches
FALLBACK_CACHE = 32 * 2**20
# Inductor adds long sums up in one go, so its error is many times that of PyTorch's pairwise sums. It is what people
# would use all the same, so it is a baseline and not a kernel to be held to a kernel's tolerance.
COMPILE_TOLERANCE = 64.0


@dataclass(frozen=True)
class Case:
    """What is timed; ``shape`` is whole, with the batch."""

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    mode: str

    def __str__(self) -> str:
        size = testing.describe_shape(self.shape)
        return f"{self.op} {self.name} {size} {self.dtype} {self.layout} {self.mode}"


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    budget: Budget
    rounds: int = 15
    min_time: float = 2e-3
    compile: bool = True
    hot: bool = False
    device: str = "cpu"


@dataclass
class Contender:
    """A way to compute the operation; ``fn`` takes the operation's arguments."""

    name: str
    fn: Callable[..., Any]
    run: Callable[[], float] | None = None  # seconds per call, one round
    values: list[float] = field(default_factory=list)


# -- the machine ----------------------------------------------------------------------------------------------------


def cache_bytes(device: str) -> int:
    """Size of the last-level cache, or a generous guess."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size or FALLBACK_CACHE
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * scale)
    return max(sizes, default=FALLBACK_CACHE)


def settings(plan: Plan, op_names: Sequence[str]) -> dict[str, Any]:
    """What a timing depends on and the environment does not say."""
    return {
        "kernel_sources": {name: native.source_hash(name) for name in op_names},
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(plan.device),
        "rounds": plan.rounds,
        "min_time_s": plan.min_time,
        "torch_compile": plan.compile,
        "hot": plan.hot,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


# -- one round ------------------------------------------------------------------------------------------------------


def rotating(described: OpSamples, case: Case, plan: Plan) -> list[Sample]:
    """Copies of the case's inputs, together beyond the cache twice (one copy with ``hot``)."""
    dtype, network_dtype = DTYPES[case.dtype]
    first = described.at(case.shape, dtype, network_dtype, case.layout, device=plan.device, name=case.name)
    size = max(sum(t.numel() * t.element_size() for t in first.tensors()), 1)
    wanted = 1 if plan.hot else -(-2 * cache_bytes(plan.device) // size) + 1
    count = max(1, min(wanted, MOST_BUFFERS))
    return [first, *(clone(first) for _ in range(count - 1))]


def clone(sample: Sample) -> Sample:
    """The same call in memory of its own, with the same strides."""

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone(memory_format=torch.preserve_format)
        if isinstance(value, (list, tuple)):
            return type(value)(copied(v) for v in value)
        return value

    kwargs = {key: copied(value) for key, value in sample.kwargs.items()}
    return replace(sample, args=copied(sample.args), kwargs=kwargs)


def calls(fn: Callable[..., Any], samples: Sequence[Sample], mode: str) -> list[Callable[[], Any]]:
    """One function without arguments per copy of the inputs."""
    return [_call(fn, sample, mode) for sample in samples]


def _call(fn: Callable[..., Any], sample: Sample, mode: str) -> Callable[[], Any]:
    args, kwargs = sample.args, sample.kwargs
    if mode == "forward":
        return lambda: fn(*args, **kwargs)
    with torch.no_grad():
        results = [t.clone() for t in Sample("", (fn(*args, **kwargs),)).tensors()]
    grads: list[torch.Tensor | None] = [torch.ones_like(t) for t in results]
    return lambda: testing.gradients(fn, args, kwargs, sample.differentiable, grads)


def cpu_round(functions: Sequence[Callable[[], Any]], min_time: float) -> Callable[[], float]:
    """A function that runs one round and returns the seconds per call."""
    cycle = itertools.cycle(functions)

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            next(cycle)()
        return (time.perf_counter() - start) / count

    for function in functions[:2]:
        function()  # warm-up: compiles, allocates
    count = 1
    while (seconds := run(count)) * count < min_time / 2 and count < 2**16:
        count *= 2
    count = max(1, round(min_time / max(seconds, 1e-9)))
    run(count)
    return lambda: run(count)


def cuda_round(
    functions: Sequence[Callable[[], Any]], min_time: float, device: str
) -> tuple[Callable[[], float], str]:
    """As :func:`cpu_round`, timed by events on the device; and which clock was used."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for function in [*functions[:3], *functions[:3]]:
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    captured = torch.cuda.CUDAGraph()
    graph: torch.cuda.CUDAGraph | None = captured
    try:
        with torch.cuda.graph(captured):
            for function in functions:
                function()
    except RuntimeError:
        graph = None  # something in it waits for the device
        torch.cuda.synchronize(device)

    def burst() -> None:
        if graph is not None:
            graph.replay()
        else:
            for function in functions:
                function()

    def run(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            burst()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (count * len(functions))

    run(2)
    count = max(1, round(min_time / max(run(2) * len(functions), 1e-9)))
    return lambda: run(count), "events" if graph is None else "graph replay"


def copy_round(device: str, min_time: float) -> tuple[Callable[[], float], int]:
    """A round of ``copy_`` between buffers beyond the cache (seconds per copy), and the bytes that a copy moves."""
    size = COPY_FACTOR * cache_bytes(device) // 4
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)

    def copy() -> torch.Tensor:
        return target.copy_(source)

    run = (
        cuda_round([copy], min_time, device)[0] if device.startswith("cuda") else cpu_round([copy], min_time)
    )
    return run, 2 * size * 4


# -- one case -------------------------------------------------------------------------------------------------------


def contenders(op: Op[Any, Any], sample: Sample, plan: Plan) -> list[Contender]:
    """The reference, its compiled form, and every fused backend that can run the inputs."""
    plain = op.impl("reference").fn
    found = [Contender("reference", plain)]
    if plan.compile:
        found.append(Contender("compile", torch.compile(plain, fullgraph=True, dynamic=False)))
    composite = _calls_operations(plain, sample)
    for backend in op.backends():
        if backend != "reference" and not testing.unsupported(op, backend, sample):
            found.append(Contender(backend, _through_dispatcher(op, backend, composite)))
    return found


def _calls_operations(fn: Callable[..., Any], sample: Sample) -> bool:
    with torch.no_grad(), record() as log:
        fn(*sample.args, **sample.kwargs)
    return bool(log.backends())


def _through_dispatcher(op: Op[Any, Any], backend: str, composite: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, backend=backend, **kwargs)

    def whole(*args: Any, **kwargs: Any) -> Any:
        # Of an operation made of others, those too are what a user would get.
        with use_backend("auto"):
            return call(*args, **kwargs)

    return whole if composite else call


def verify(op: Op[Any, Any], contender: Contender, sample: Sample, mode: str) -> dict[str, str]:
    """Compare a contender with float64 and return what really ran.

    Raises:
        AssertionError: it is wrong, or another backend ran.
    """
    k = op.impl(contender.name).tolerance if contender.name in op.backends() else COMPILE_TOLERANCE
    plain, label = op.impl("reference").fn, f"{op.name} on {contender.name}"
    with record() as log:
        testing.compare_forward(contender.fn, plain, sample, k=k, label=label)
        if mode != "forward":
            testing.compare_backward(contender.fn, plain, sample, k=k, label=label)
    ran = log.backends()
    if contender.name in ("reference", "compile"):
        right = op.name not in ran and set(ran.values()) <= {"reference"}
    else:
        # The comparison itself ran the references of what an operation is made of.
        right = ran.get(op.name) == contender.name
    if not right:
        raise AssertionError(f"{label}: {ran or 'nothing'} ran")
    return {op.name: ran[op.name]} if op.name in ran else {}


def time_case(case: Case, plan: Plan, copy: tuple[Callable[[], float], int]) -> dict[str, Any]:
    """One entry of the record's ``cases``.

    Raises:
        OutOfTime: the budget ended before every contender had three rounds.
    """
    op = testing.find_op(case.op)
    described = testing.describe_samples(op)
    grad_mode = torch.no_grad() if case.mode == "forward" else torch.enable_grad()
    torch._dynamo.reset()
    # The reference of an operation made of others is plain PyTorch to the bottom.
    with grad_mode, use_backend("reference"):
        samples = rotating(described, case, plan)
        failures: list[str] = []
        figures: dict[str, Any] = {}
        backends: dict[str, str] = {}
        ready: list[Contender] = []
        clocks = set()
        for contender in contenders(op, samples[0], plan):
            plan.budget.check()
            try:
                if contender.name != "reference":
                    for name, backend in verify(op, contender, samples[0], case.mode).items():
                        known = backends.get(name)
                        backends[name] = backend if known is None else f"{known}+{backend}"
                functions = calls(contender.fn, samples, case.mode)
                if plan.device.startswith("cuda"):
                    contender.run, clock = cuda_round(functions, plan.min_time, plan.device)
                else:
                    contender.run, clock = cpu_round(functions, plan.min_time), "perf_counter"
                clocks.add(f"{contender.name}: {clock}")
                ready.append(contender)
            except Exception as error:  # a contender that fails must not cost the others their figures
                reason = f"{type(error).__name__}: {error}"
                failures.append(f"{contender.name}: {reason}")
                figures[contender.name] = not_measured(f"not timed: {reason}")
        largest = [max(sample.tensors(), key=lambda t: t.numel()) for sample in samples]
        clones = [tensor.clone for tensor in largest]
        if plan.device.startswith("cuda"):
            clone_round = cuda_round(clones, plan.min_time, plan.device)[0]
        else:
            clone_round = cpu_round(clones, plan.min_time)
        clone_seconds: list[float] = []
        copies: list[float] = []
        for done in range(plan.rounds):
            if done >= measure.FEWEST_FOR_QUANTILES and plan.budget.remaining() <= 0:
                break
            plan.budget.check()
            # Another order in every round: nobody always follows the same neighbour.
            for index in range(len(ready)):
                contender = ready[(index + done) % len(ready)]
                assert contender.run is not None
                contender.values.append(contender.run())
            clone_seconds.append(clone_round())
            copies.append(copy[0]())
    moved = testing.traffic(op, samples[0], backward=case.mode != "forward")
    rates = [copy[1] / seconds / 1e9 for seconds in copies]
    values = {contender.name: contender.values for contender in ready}
    for name, seconds in values.items():
        figures[name] = {
            "time": measured(seconds, "s/call"),
            "bandwidth": measured([moved / s / 1e9 for s in seconds], "GB/s"),
            "of_copy": measured([moved / s / 1e9 / c for s, c in zip(seconds, rates, strict=True)], "ratio"),
        }
        for other in ("reference", "compile"):
            if other in values and name not in (other, "reference"):
                ratios = [a / b for a, b in zip(seconds, values[other], strict=True)]
                figures[name][f"time_over_{other}"] = measured(ratios, "ratio")
    if not plan.compile:
        figures["compile"] = not_measured("not asked for (--no-compile)")
    figures["copy"] = {"bandwidth": measured(rates, "GB/s")}
    cloned = 2 * largest[0].numel() * largest[0].element_size()
    figures["clone"] = {"bandwidth": measured([cloned / s / 1e9 for s in clone_seconds], "GB/s")}
    parameters = {
        "op": case.op,
        "case": case.name,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "mode": case.mode,
        "device": plan.device,
        "bytes": moved,
        "buffers": len(samples),
        "clock": sorted(clocks),
    }
    return {"parameters": parameters, "backends": backends, "failures": failures, "figures": figures}


# -- the dispatcher -------------------------------------------------------------------------------------------------


_OVERHEAD_SECONDS = 0.02  # of a round


def dispatch_overhead(op_name: str, device: str, rounds: int = 51, most: int = 500) -> dict[str, Any]:
    """What a call through the dispatcher costs beyond one of the implementation, warm, without gradients.

    ``auto``: the operation as a user calls it. ``resolve``: the function that ``op.resolve`` returns. A smaller shape
    than any published one, so that the difference is not lost in the work.
    """
    op = testing.find_op(op_name)
    described = testing.describe_samples(op)
    sample = described.at(described.base, device=device)
    args, kwargs = sample.args, sample.kwargs
    with torch.no_grad():
        bound = op.resolve(*args, **kwargs)
        backend = next(b for b in op.backends() if op.impl(b).fn is bound)
        ways: dict[str, Callable[..., Any]] = {"direct": op.impl(backend).fn, "auto": op, "resolve": bound}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        op(*args, **kwargs)
        start = time.perf_counter()
        op(*args, **kwargs)
        measure.synchronize(device)
        # A whole residual cell takes so long that fewer calls say as much.
        count = min(most, max(10, int(_OVERHEAD_SECONDS / (time.perf_counter() - start))))
        for done in range(rounds + 2):
            for name, fn in ways.items():
                start = time.perf_counter()
                for _ in range(count):
                    fn(*args, **kwargs)
                if done >= 2:
                    seconds[name].append((time.perf_counter() - start) / count)
            measure.synchronize(device)
    figures: dict[str, Any] = {"direct": {"time": measured(seconds["direct"], "s/call")}}
    for name in ("auto", "resolve"):
        beyond = [a - b for a, b in zip(seconds[name], seconds["direct"], strict=True)]
        figures[name] = {"beyond_direct": measured(beyond, "s/call")}
    return {
        "parameters": {
            "op": op_name,
            "case": "dispatch overhead",
            "device": device,
            "calls_per_round": count,
        },
        "backends": {op_name: backend},
        "failures": [],
        "figures": figures,
    }


# -- break-even -----------------------------------------------------------------------------------------------------


def ladder(op_name: str) -> list[tuple[int, ...]]:
    """Shapes from a few elements to millions, each about four times the last."""
    channels = {"mixture_logistic_log_prob": 3, "mixture_logistic_mean": 3}.get(op_name, 16)
    shapes = [(1, channels, side, side) for side in (2, 4, 8, 16, 32, 64)]
    return [*shapes, (4, channels, 64, 64), (16, channels, 64, 64)]


def break_even(cases: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str, int | None]]:
    """From timed ladders: (op, backend, dtype, mode, elements from which it is never slower than the reference).

    None: slower at the largest size too.
    """
    groups: dict[tuple[str, str, str, str], list[tuple[int, float]]] = {}
    for case in cases:
        p = case["parameters"]
        if p["case"] != "ladder":
            continue
        elements = 1
        for size in p["shape"]:
            elements *= size
        for name, figure in case["figures"].items():
            ratio = figure.get("time_over_reference") if name != "compile" else None
            if ratio is not None:
                key = (p["op"], name, p["dtype"], p["mode"])
                groups.setdefault(key, []).append((elements, ratio["median"]))
    found = []
    for key, points in sorted(groups.items()):
        smallest: int | None = None
        for elements, ratio in sorted(points, reverse=True):
            if ratio > 1.0:
                break
            smallest = elements
        found.append((*key, smallest))
    return found


# -- all cases ------------------------------------------------------------------------------------------------------


def select(
    op_names: Sequence[str],
    *,
    batches: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    modes: Sequence[str],
    quick: bool = False,
    crossover: bool = False,
) -> list[Case]:
    """The cases of a run; ``quick``: one shape per operation; ``crossover``: sizes from tiny to large instead."""
    found = []
    for op_name in op_names:
        described = testing.describe_samples(op_name)
        usable = [d for d in dtypes if DTYPES[d] in described.dtypes]
        sizes: list[tuple[str, tuple[int, ...]]]
        if crossover:
            sizes = [("ladder", shape) for shape in ladder(op_name)]
        else:
            shapes = list(described.shapes.items())
            sizes = [(name, (batch, *shape)) for name, shape in shapes for batch in batches]
            sizes = sizes[:1] if quick else sizes
        for mode in modes:
            op = testing.find_op(op_name)
            fused = [op.impl(b) for b in op.backends() if b != "reference"]
            if mode != "forward" and not (described.differentiable and any(i.differentiable for i in fused)):
                continue
            for dtype in usable[:1] if quick else usable:
                for layout in layouts[:1] if quick else layouts:
                    found += [Case(op_name, name, shape, dtype, layout, mode) for name, shape in sizes]
    return found


def default_ops() -> list[str]:
    """Operations with at least one fused implementation."""
    return [name for name, op in sorted(REGISTRY.items()) if len(op.backends()) > 1]


def _rehearse(cases: Sequence[Case], plan: Plan) -> None:
    for case in cases:
        if plan.budget.remaining() > 0:
            with contextlib.suppress(OutOfTime):
                time_case(case, plan, (lambda: 1.0, 1))


def rehearse(cases: Sequence[Case], plan: Plan, processes: int) -> None:
    """Run every case briefly in parallel processes, whose compilers leave their results in the caches on disk.

    What they time is thrown away. On a machine that is lent by the minute, most of a first run is compilation, one
    case after the other; after this it is timing.
    """
    brief = replace(plan, rounds=measure.FEWEST_FOR_QUANTILES, min_time=1e-5)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in [pool.submit(_rehearse, cases[i::processes], brief) for i in range(processes)]:
            future.result()


def benchmark(
    cases: Sequence[Case],
    *,
    name: str,
    plan: Plan,
    out: Path,
    command: str,
    force: bool = False,
    dry_run: bool = False,
    stated_commit: str | None = None,
    sample_seconds: float = 2.0,
    report: Callable[[str], None] = lambda text: print(text, flush=True),
) -> tuple[dict[str, Any], bool]:
    """Time the cases, write ``<out>/<machine>/<name>.json``, and return the record and whether all were right.

    Raises:
        MachineBusy: others use the machine and ``force`` is false; nothing is written.
    """
    watch = measure.Watch(force=force, sample_seconds=sample_seconds)
    entries: list[dict[str, Any]] = []
    left_out: list[str] = []
    copy = copy_round(plan.device, plan.min_time)
    op_names = list(dict.fromkeys(case.op for case in cases))
    for op_name in op_names:
        entries.append(dispatch_overhead(op_name, plan.device))
    for case in cases:
        try:
            plan.budget.check()
            entry = time_case(case, plan, copy)
        except OutOfTime as error:
            if not left_out:
                report(f"{case}: left out, {error}; so are the cases after it")
            left_out.append(str(case))
            continue
        entries.append(entry)
        report(f"{case}: {describe(entry)}")
        gc.collect()
    record_ = measure.write_record(
        out,
        plan.device,
        name=name,
        command=command,
        dry_run=dry_run,
        machine=watch.entries(sample_seconds),
        environment=measure.environment(stated_commit),
        settings=settings(plan, op_names),
        cases=entries,
        left_out=left_out,
    )
    return record_, not any(entry["failures"] for entry in entries)


def _timed(entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Figure]]]:
    for name, figure in entry["figures"].items():
        if "time" in figure and name != "direct":
            yield name, figure


def describe(entry: dict[str, Any]) -> str:
    """One line: what every contender took."""
    parts = [f"{name} {figure['time']['median'] * 1e6:.1f} us" for name, figure in _timed(entry)]
    return ", ".join(parts + [f"FAILED {failure}" for failure in entry["failures"]])


def summary(record_: dict[str, Any]) -> list[str]:
    """The figures that a kernel is judged by: medians over the cases, overhead of dispatch, break-even sizes."""
    lines = []
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for entry in record_["cases"]:
        p = entry["parameters"]
        if p["case"] == "dispatch overhead":
            beyond = entry["figures"]["auto"]["beyond_direct"]["median"] * 1e6
            bound = entry["figures"]["resolve"]["beyond_direct"]["median"] * 1e6
            lines.append(
                f"{p['op']}: dispatch costs {beyond:.2f} us beyond calling {entry['backends'][p['op']]}, "
                f"op.resolve {bound:.2f} us"
            )
            continue
        for name, figure in _timed(entry):
            for other in ("reference", "compile"):
                if f"time_over_{other}" in figure and name != "compile":
                    key = (p["op"], name, other)
                    ratios.setdefault(key, []).append(figure[f"time_over_{other}"]["median"])
    for (op_name, backend, other), values in ratios.items():
        lines.append(
            f"{op_name}: {backend} takes {statistics.median(values):.3f} x the time of {other} "
            f"(median over {len(values)} cases, {min(values):.3f} to {max(values):.3f})"
        )
    for op_name, backend, dtype, mode, elements in break_even(record_["cases"]):
        size = "at no size" if elements is None else f"from {elements} elements on"
        lines.append(f"{op_name}: {backend} is never slower than the reference {size} ({dtype}, {mode})")
    return lines


def table(record_: dict[str, Any]) -> Any:
    """The record as tables for :class:`rich.console.Console`, one for each operation, shape, dtype and layout."""
    from rich.console import Group
    from rich.table import Table

    headings = ("ran", "us per call", "20%", "80%", "GB/s", "of copy", "x reference", "x compile")
    widths = (10, 11, 9, 9, 7, 7, 11, 9)
    parts: list[Any] = []
    for entry in record_["cases"]:
        p = entry["parameters"]
        if p["case"] == "dispatch overhead":
            continue
        label = f"{p['op']} {p['case']} {testing.describe_shape(p['shape'])} {p['dtype']} {p['layout']} {p['mode']}"
        made = Table(title=label, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading, width in zip(headings, widths, strict=True):
            made.add_column(heading, justify="left" if heading == "ran" else "right", min_width=width)
        for name, figure in entry["figures"].items():
            if "time" in figure:
                made.add_row(name, *_cells(figure))
            elif name in ("copy", "clone"):
                made.add_row(name, "", "", "", f"{figure['bandwidth']['median']:.1f}")
            elif not figure["reason"].startswith("not asked"):
                made.add_row(name, "not timed")
        parts += [made, ""]
    return Group(*parts)


def _cells(figure: dict[str, Figure]) -> list[str]:
    seconds = figure["time"]
    times = ["" if seconds[q] is None else f"{seconds[q] * 1e6:.1f}" for q in ("median", "q20", "q80")]
    over = [figure.get(f"time_over_{other}") for other in ("reference", "compile")]
    return [
        *times,
        f"{figure['bandwidth']['median']:.1f}",
        f"{figure['of_copy']['median']:.0%}",
        *("" if ratio is None else f"{ratio['median']:.3f}" for ratio in over),
    ]


def parser() -> argparse.ArgumentParser:
    """The options of ``python3 -m benchmarks.ops``."""
    made = argparse.ArgumentParser(
        prog="python3 -m benchmarks.ops", description=(__doc__ or "").split("\n")[0]
    )
    made.add_argument("ops", nargs="*", metavar="OP", help="operations (default: those with a fused kernel)")
    made.add_argument("--name", default="ops", help="name of the record (default: ops)")
    made.add_argument("--out", type=Path, help="folder that holds <machine>/<name>.json")
    made.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes (default: 1 16)")
    made.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "float32<-bfloat16"],
        help=f"state<-network, of {', '.join(DTYPES)}",
    )
    made.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    made.add_argument("--modes", nargs="+", default=list(MODES))
    made.add_argument("--rounds", type=int, default=15, help="at least 3 (default: 15)")
    made.add_argument("--min-time", type=float, default=2e-3, help="seconds of a round (default: 0.002)")
    made.add_argument("--budget", type=float, default=420.0, help="seconds, then stop cleanly (default: 420)")
    made.add_argument("--quick", action="store_true", help="one shape, dtype and layout per operation")
    made.add_argument(
        "--crossover", action="store_true", help="sizes from tiny to large: where does a kernel start to pay?"
    )
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile of the reference out")
    made.add_argument("--hot", action="store_true", help="one copy of the inputs, which stays in the cache")
    made.add_argument(
        "--rehearse",
        type=int,
        default=0,
        metavar="N",
        help="first run every case in N processes, to fill caches",
    )
    made.add_argument("--force", action="store_true", help="time a busy machine; the record says so")
    made.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    made.add_argument("--commit", help="commit to record in place of what git says")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 0: done, 1: a contender was wrong, 2: wrong usage, 3: refused on a busy machine."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    made = parser()
    options = made.parse_args(arguments)
    try:
        check_options(options)
    except ValueError as error:
        made.error(str(error))
    try:
        record_, ok = run(options, command(arguments))
    except MachineBusy as error:
        print(f"refused: {error}", file=sys.stderr)
        return BUSY_EXIT
    show(record_)
    return 0 if ok else 1


def command(arguments: Sequence[str]) -> str:
    """The command that goes into the record."""
    return measure.command_line("benchmarks.ops", arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raise ``ValueError`` naming the first option that is wrong."""
    for kind, values, valid in (
        ("operation", options.ops, tuple(REGISTRY)),
        ("dtype", options.dtypes, tuple(DTYPES)),
        ("layout", options.layouts, LAYOUTS),
        ("mode", options.modes, MODES),
    ):
        for value in values:
            if value not in valid:
                raise unknown_name(kind, value, valid)
    if min(options.batch) < 1:
        raise ValueError(f"--batch must be at least 1, got {min(options.batch)}")
    if options.rounds < measure.FEWEST_FOR_QUANTILES:
        raise ValueError(f"--rounds must be at least {measure.FEWEST_FOR_QUANTILES}, got {options.rounds}")
    if not 0 < options.min_time < 10:
        raise ValueError(f"--min-time must lie between 0 and 10 seconds, got {options.min_time}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device is usable here: try --device cpu")


def run(options: argparse.Namespace, command: str, *, quiet: bool = False) -> tuple[dict[str, Any], bool]:
    """Time what checked options ask for; see :func:`benchmark`. Progress goes to standard error."""
    # A pool of compiling processes would make this machine look busy with somebody else's work.
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    cases = select(
        options.ops or default_ops(),
        batches=options.batch,
        dtypes=options.dtypes,
        layouts=options.layouts,
        modes=options.modes,
        quick=options.quick,
        crossover=options.crossover,
    )
    plan = Plan(
        Budget(options.budget),
        rounds=options.rounds,
        min_time=options.min_time,
        compile=not options.no_compile,
        hot=options.hot,
        device=options.device,
    )
    if options.rehearse:
        rehearse(cases, plan, options.rehearse)
    return benchmark(
        cases,
        name=options.name,
        plan=plan,
        out=measure.results_folder(options.out, options.dry_run),
        command=command,
        force=options.force,
        dry_run=options.dry_run,
        stated_commit=options.commit,
        report=lambda text: None if quiet else print(text, file=sys.stderr, flush=True),
    )


def show(record_: dict[str, Any]) -> None:
    """Print table and summary."""
    from rich.console import Console

    console = Console()
    console.print(table(record_))
    for line in summary(record_):
        print(line)
    if record_["left_out"]:
        print(f"left out ({len(record_['left_out'])}): " + "; ".join(record_["left_out"]))
    if not record_["idle"]:
        print("NOT IDLE: " + "; ".join(record_["not_idle_because"]))
    for entry in record_["cases"]:
        for failure in entry["failures"]:
            print(f"FAILED {entry['parameters']['op']} {entry['parameters']['case']}: {failure}")
    print(f"wrote {record_['name']}.json")


if __name__ == "__main__":
    sys.exit(main())
