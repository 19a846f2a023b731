"""What the log-likelihood of latents costs at equal standard error: the published procedure and this library's.

    python -m benchmarks.likelihood                           the trained digit model of the tests, held-out digits
    python -m benchmarks.likelihood --model checkpoint.pt --data images/ --images 8 --sets 16 16

Every procedure solves the probability-flow ODE for the same latents (posterior draws of held-out images), again and
again with other probes of the trace:

``published``  RK45 at the tolerance 1e-5, new normal probes at every evaluation, of the divergence of the whole drift
``fixed``      Rademacher probes that stay the same for the solve; several tolerances, several probes
``fresh``      new Rademacher probes at every evaluation, which take no part in the step control; RK23
               (``evaluate_nelbo(trace="fresh")``, the default there; ``trace="fixed"`` is the other)

An evaluation of the network is one forward pass and one vector-Jacobian product, so a solve with P probes counts as
``nfe (1 + P) / 2``. ``spread`` is the standard deviation of -log p of one latent between sets of probes. The standard
error after n solves of a latent is ``spread / sqrt(n)``, so ``relative_cost`` is ``evaluations spread^2`` over the
published procedure's: the evaluations for equal standard error as a ratio. ``bias`` is the mean difference of -log p to
the reference (many probes, network and state in float64) with ``bias_error``, the standard error that the probes of
both leave in it. ``tolerance_bias`` is far sharper: the difference to the tightest solve with the same probes, which is
what a loose tolerance alone does. Evaluations are counted, not timed.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lsgm_fast
from benchmarks import measure
from benchmarks.accuracy import DIGITS, ROOT
from lsgm_fast import random
from lsgm_fast.data import DataConfig, batches, check_data, open_data, spread
from lsgm_fast.evaluation import TRACES
from lsgm_fast.models import LSGM, NVAE
from lsgm_fast.sampling import log_prior, solve_ode

PUBLISHED_TOL = 1e-5
FIXED = ((1e-5, 1), (1e-3, 1), (1e-2, 1), (1e-3, 4), (1e-2, 4), (1e-3, 16))
"""Tolerance and number of probes; the first is the one that the others with as many probes are compared with."""
FRESH = ((1e-2, 1), (1e-3, 1), (1e-4, 1), (1e-2, 4), (1e-3, 4))
REFERENCE_SEED = 1 << 32  # apart from those of the sets


def latents(model: LSGM, data: DataConfig, images: int) -> Tensor:
    """Posterior draws of held-out images, as many, evenly spread: (images, C, h, w)."""
    assert isinstance(model.vae, NVAE) and model.config is not None
    if data.binarise == "none" and model.config.vae.decoder_distribution == "bernoulli":
        data = data.replace(binarise="static")
    source = open_data(data, "held_out")
    check_data(source, model.config.vae)
    chosen = spread(source, images)
    (batch,) = batches(chosen, data, batch_size=len(chosen), seed=0, train=False)
    with torch.no_grad():
        groups = model.encode(batch.images.to(model.device))
        covered = groups[: model.config.vae.groups_per_scale]
        return model.vae.merge_groups([group.eps for group in covered])


def published(model: LSGM, z0: Tensor, seed: int, tol: float) -> tuple[Tensor, int]:
    """(log p (B,), evaluations) by the published procedure; SciPy's RK45 on the host, the network in its own dtype."""
    term, n, calls = model._term(), z0.shape[0], 0

    def drift(t: float, packed: Tensor) -> Tensor:
        nonlocal calls
        with torch.enable_grad():
            z = packed[: z0.numel()].view_as(z0).detach().requires_grad_()
            dz = term(t, z)
            probe = random.normal(
                seed, range(n), "published.probe", z.shape[1:], device=z.device, substream=calls
            )
            (gradient,) = torch.autograd.grad(dz, z, probe.to(dz.dtype))
        calls += 1
        return torch.cat((dz.detach().flatten(), (gradient * probe).flatten(1).sum(dim=1)))

    start = torch.cat((z0.flatten(), z0.new_zeros(n)))
    solution = solve_ode(
        drift, start, t_start=model.sampling.ode_eps, t_end=1.0, solver="scipy", rtol=tol, atol=tol
    )
    z1, divergence = solution.z[: z0.numel()].view_as(z0).double(), solution.z[z0.numel() :].double()
    prior = torch.distributions.Normal(0.0, model.sde.prior_std).log_prob(z1).flatten(1).sum(dim=1)
    return prior + divergence, solution.nfe


def reference(model: LSGM, z0: Tensor, tol: float, probes: int) -> tuple[dict[str, Any], Tensor, float]:
    """A record's case; -log p (B,) by ``probes`` probes in float64; and the standard error of its mean over latents."""
    precise = copy.deepcopy(model).double()
    solved = [
        log_prior(
            precise._term(),
            z0.double(),
            t_start=model.sampling.ode_eps,
            rtol=tol,
            atol=tol,
            probes=probes // 2,
            seed=REFERENCE_SEED + half,
        )
        for half in range(2)
    ]
    first, second = (-log_p.cpu() for log_p, _ in solved)
    # Half the difference of two independent halves has the standard error of their mean.
    error = float(((first - second) / 2.0).square().mean().sqrt()) / math.sqrt(len(z0))
    exact = (first + second) / 2.0
    case = {
        "parameters": {"procedure": "reference", "tol": tol, "probes": probes, "images": len(z0)},
        "backends": {},
        "failures": [],
        "figures": {
            "evaluations": measure.measured(
                [s.nfe * (1 + probes // 2) / 2 for _, s in solved], "evaluations"
            ),
            "value": measure.measured(exact.tolist(), "nats"),
            "error": measure.measured([error], "nats"),
        },
    }
    return case, exact, error


def compare(
    model: LSGM, z0: Tensor, exact: Tensor, exact_error: float, noisy_sets: int, fixed_sets: int
) -> list[dict[str, Any]]:
    """A record's case for every procedure; printed as soon as it is there.

    ``noisy_sets``: solves by the published procedure. ``fixed_sets``: by the others.
    """

    def ours(seed: int, tol: float, **options: Any) -> tuple[Tensor, int]:
        log_p, solution = log_prior(
            model._term(), z0, t_start=model.sampling.ode_eps, rtol=tol, atol=tol, seed=seed, **options
        )
        return log_p, solution.nfe

    procedures: list[tuple[str, dict[str, Any]]] = [
        ("published", {"tol": PUBLISHED_TOL}),
        *(
            (trace, {"tol": tol, "probes": probes, **TRACES[trace]})
            for trace, settings in (("fixed", FIXED), ("fresh", FRESH))
            for tol, probes in settings
        ),
    ]
    cases: list[dict[str, Any]] = []
    tightest, base = torch.empty(0), math.nan
    for name, options in procedures:
        sets = noisy_sets if name == "published" else fixed_sets
        probes = options.get("probes", 1)
        solved = [
            published(model, z0, seed, options["tol"]) if name == "published" else ours(seed, **options)
            for seed in range(sets)
        ]
        values = -torch.stack([log_p.cpu().double() for log_p, _ in solved])
        between = float(values.var(dim=0).mean().sqrt())
        evaluations = [nfe * (1 + probes) / 2 for _, nfe in solved]
        cost = sum(evaluations) / sets * between**2
        if name == "published":
            base = cost
        alone = measure.not_measured("no solve with the same probes and a tighter tolerance")
        if name == "fixed" and (options["tol"], probes) == FIXED[0]:
            tightest = values
        elif name == "fixed" and probes == FIXED[0][1]:
            alone = measure.measured((values - tightest).mean(dim=1).tolist(), "nats")
        noise = math.hypot(between / math.sqrt(values.numel()), exact_error)
        cases.append(
            {
                "parameters": {
                    "procedure": name,
                    "tol": options["tol"],
                    "probes": probes,
                    "images": len(z0),
                    "sets": sets,
                },
                "backends": {},
                "failures": [],
                "figures": {
                    "evaluations": measure.measured(evaluations, "evaluations"),
                    "spread": measure.measured([between], "nats"),
                    "bias": measure.measured([float((values - exact).mean())], "nats"),
                    "bias_error": measure.measured([noise], "nats"),
                    "tolerance_bias": alone,
                    "relative_cost": measure.extrapolated(
                        cost / base, "ratio", "mean evaluations times spread squared, over the published ones"
                    ),
                },
            }
        )
        print(row(cases[-1]), flush=True)
    return cases


HEAD = (
    "| procedure | tol | probes | evaluations | spread | bias | of the tolerance | relative evaluations |",
    "|---|---|---|---|---|---|---|---|",
)


def row(case: dict[str, Any]) -> str:
    """One line of the Markdown table that :data:`HEAD` begins."""
    p, f = case["parameters"], case["figures"]
    values = f["evaluations"]["values"]
    alone = f["tolerance_bias"]
    of_tolerance = f"{sum(alone['values']) / len(alone['values']):+.2f}" if "values" in alone else ""
    return (
        f"| {p['procedure']} | {p['tol']:g} | {p['probes']} | {sum(values) / len(values):.0f} | "
        f"{f['spread']['median']:.2f} | {f['bias']['median']:+.2f} +- {f['bias_error']['median']:.2f} | "
        f"{of_tolerance} | {f['relative_cost']['value']:.3f} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write ``<machine>/<name>.json``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.likelihood", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default=str(DIGITS), help="a checkpoint, or `demo`; default: %(default)s")
    parser.add_argument("--data", default="digits", help="as for `lsgm-fast evaluate`; default: %(default)s")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument(
        "--sets",
        type=int,
        nargs=2,
        default=[3, 6],
        metavar=("PUBLISHED", "OURS"),
        help="solves, each with other probes, by the published procedure and by the others (default: 3 6)",
    )
    parser.add_argument(
        "--exact", type=float, default=1e-5, help="tolerance of the reference (default: 1e-5)"
    )
    parser.add_argument(
        "--exact-probes", type=int, default=16, help="of the reference, an even number (default: 16)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="likelihood", help="of the record")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="mark the record as a trial")
    parser.add_argument("--commit", help="in place of what git says")
    options = parser.parse_args(arguments)
    if options.images < 1 or min(options.sets) < 2 or options.exact_probes < 2 or options.exact_probes % 2:
        parser.error(
            "--images must be at least 1, --sets at least 2 each, and --exact-probes even and at least 2, got "
            f"{options.images}, {options.sets} and {options.exact_probes}"
        )
    # Nothing is timed here, so the machine need not be idle.
    watch = measure.Watch(force=True, sample_seconds=0.1)
    model = lsgm_fast.load(options.model, device=options.device).eval()
    z0 = latents(model, DataConfig(options.data), options.images)
    exact_case, exact, error = reference(model, z0, options.exact, options.exact_probes)
    print("\n".join(HEAD), flush=True)
    cases = compare(model, z0, exact, error, *options.sets)
    measure.write_record(
        measure.results_folder(options.out, options.dry_run),
        options.device,
        name=options.name,
        command=measure.command_line("benchmarks.likelihood", arguments),
        dry_run=options.dry_run,
        machine=watch.entries(0.1),
        environment=measure.environment(options.commit),
        settings={
            "model": options.model if options.model != str(DIGITS) else str(DIGITS.relative_to(ROOT)),
            "data": options.data,
            "torch_threads": torch.get_num_threads(),
        },
        cases=[exact_case, *cases],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
