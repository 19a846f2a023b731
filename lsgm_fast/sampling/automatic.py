"""``solver="auto"``: which solver serves a tolerance or a budget of evaluations, and why."""

from __future__ import annotations

from dataclasses import dataclass

ANCHOR, EXPONENT = 1e-2, 0.55
TIGHTEST = 1e-5


@dataclass(frozen=True)
class Choice:
    """What ``"auto"`` stands for: a solver, its tolerance or its evaluations, and the reason in words."""

    solver: str
    tol: float | None
    evaluations: int | None
    reason: str


def equivalent_tolerance(tol: float) -> float:
    """The tolerance at which adaptive exponential steps end about as near to the exact latents as rk45 at ``tol``.

    ``1e-2 (tol / 1e-2)^0.55`` below 1e-2, and tol above: the controller of ``"exponential"`` is the stricter one of the
    two on these equations. The exponent was fitted on four models, down to 1e-5 (``docs/solvers.md``).
    """
    return tol if tol >= ANCHOR else ANCHOR * (tol / ANCHOR) ** EXPONENT


def choose(tol: float | None, evaluations: int | None, recipe_tol: float) -> Choice:
    """What ``solver="auto"`` stands for.

    Args:
        tol: the accuracy of rk45 at this tolerance is wanted; None with ``evaluations`` None: the recipe's.
        evaluations: a budget of network evaluations.

    Raises:
        ValueError: both are given.
    """
    if tol is not None and evaluations is not None:
        raise ValueError(
            f"tol={tol} and evaluations={evaluations} exclude each other: give a tolerance or a budget"
        )
    if evaluations is not None:
        reason = (
            f"exponential with {evaluations} evaluations: of the methods with a fixed budget the nearest to the exact "
            "latents on the measured models, with few evaluations by far"
        )
        return Choice("exponential", None, evaluations, reason)
    wanted = recipe_tol if tol is None else tol
    if wanted < TIGHTEST:
        reason = f"rk45 at tolerance {wanted:g}: below {TIGHTEST:g} its fifth order pays, on smooth networks at least"
        return Choice("rk45", wanted, None, reason)
    own = equivalent_tolerance(wanted)
    reason = (
        f"exponential at tolerance {own:.2g}: on the measured models about as near to the exact latents as rk45 at "
        f"{wanted:g}, in 0.1 to 0.6 of its evaluations; solver='rk45' is the published one"
    )
    return Choice("exponential", own, None, reason)
