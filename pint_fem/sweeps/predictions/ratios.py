"""Times of MGRIT by its options and of ParaDiag over that of sequential stepping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pint_fem.evolution.evolution import Evolution
from pint_fem.theory.costs import TwoLevel, mgrit_seconds, sequential_seconds
from pint_fem.theory.estimates import paradiag_contraction
from pint_fem.theory.model_residuals import ModelResiduals

__all__ = ["LEAST", "MOST_CYCLES", "candidates", "mean_ratio", "mgrit_ratios", "paradiag_rate", "paradiag_ratio"]

PARADIAG, LEAST = 10.0, 1.6
"""Time of an iteration of ParaDiag for each step over that of a step in the best block, about, and the least one over
that of a single step; ranks share it.
"""
SINGLE = 6e-8
"""Round-off of single precision, which ``alpha`` enlarges."""
MOST_CYCLES = 12
"""Cycles of a candidate at most."""


def candidates(steps: int, ranks: int) -> list[TwoLevel]:
    """Options of MGRIT whose intervals are equal and at least as many as ranks and four.

    Parameters
    ----------
    steps, ranks
        Numbers of time steps and of ranks in time.
    """
    factors = [m for m in (4, 8, 16, 32, 64, 128) if steps % m == 0 and steps // m >= max(4, ranks)]
    return [TwoLevel(m, s, relax) for m in factors for s in (1, 2, 3, 4) for relax in ("F", "FCF") if s < m]


def mean_ratio(
    seconds: Mapping[int, float], steps: int, ranks: int, options: TwoLevel, cycles: Sequence[float], cost: float
) -> float:
    """Mean time of solves in given numbers of cycles over that of sequential stepping."""
    each = [mgrit_seconds(seconds, steps, ranks, options, int(k), coarse_cost=cost) for k in cycles]
    return sum(each) / len(each) / sequential_seconds(seconds, steps)


def mgrit_ratios(
    seconds: Mapping[int, float], steps: int, ranks: int, residuals: ModelResiduals, tolerances: Sequence[float]
) -> dict[TwoLevel, float]:
    """Predicted times of MGRIT over that of sequential stepping, means of solves to some tolerances; without candidates
    that take too many cycles.
    """
    ratios = {}
    for options in candidates(steps, ranks):
        cycles = residuals.cycles(options.m, options.coarse_steps, options.relax, tolerances, MOST_CYCLES)
        if all(map(math.isfinite, cycles)):
            ratios[options] = mean_ratio(seconds, steps, ranks, options, cycles, 1.0)
    return ratios


def paradiag_rate(evolution: Evolution, alpha: float) -> float | None:
    """The contraction of an iteration of ParaDiag with its rounding errors; ``None`` where there is no theory
    (collective over space).
    """
    rate = paradiag_contraction(evolution, alpha)
    return None if rate is None else max(rate, alpha, SINGLE / alpha)


def paradiag_ratio(seconds: Mapping[int, float], rate: float | None, ranks: int, tolerances: Sequence[float]) -> float:
    """Predicted time of ParaDiag over that of sequential stepping, the mean of solves to some tolerances, where an
    iteration contracts by ``rate``; infinite where it hardly does.
    """
    if rate is None or not rate < 0.5:
        return math.inf
    iterations = [max(1, math.ceil(math.log(tol) / math.log(rate) * (1 - 1e-12))) for tol in tolerances]
    block = min(t / w for w, t in seconds.items()) / seconds[1]
    return max(PARADIAG * block, LEAST) / ranks * sum(iterations) / len(iterations)
