"""Evaluation of a model on a data set: the negative evidence lower bound, and two of them compared."""

from __future__ import annotations

from lsgm_fast.evaluation.nelbo import (
    METHODS,
    Estimate,
    NelboReport,
    PairedDifference,
    compare,
    evaluate_nelbo,
    out_of_distribution,
)

__all__ = [
    "METHODS",
    "Estimate",
    "NelboReport",
    "PairedDifference",
    "compare",
    "evaluate_nelbo",
    "out_of_distribution",
]
