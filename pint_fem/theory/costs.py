r"""Predicted times of one sweep over all steps: sequential, by MGRIT on two levels, by ParaDiag.

From :math:`t_W`, the seconds of one step of ``W`` states at once, follow :math:`B(k)`, those of one step of ``k``
states. ``N`` steps are ``c = N/m`` intervals, of which a rank in time has at most :math:`k = \lceil c/P \rceil`. A step
of the coarse level is ``s`` steps of its integrator, each as expensive as a fine one on the same mesh. Then

.. math::
   F = (m - 1)\, B(k), \qquad C = c\, s\, t_1

are the seconds of an F-relaxation and of the solve on the coarse level, which is sequential on any number of ranks.
Nested iteration restricts the right-hand side by an F-relaxation from zero, solves the coarse level and interpolates,

.. math::  2 F + 2 B(k) + C ,

the residual of the result included. A cycle takes

.. math::  (1 + \nu)\,(F + B(k)) + s\, B(k) + C

with :math:`\nu` C-relaxations, the first of which uses the residual: the coarse step of all C-points, the coarse solve,
F-relaxations and the residual. Messages, vector operations and right-hand sides are left out. All functions are of
numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["TwoLevel", "block_seconds", "fastest", "mgrit_seconds", "rounded", "sequential_seconds"]

CLEARLY = 0.85
"""Ratio of times from which one choice is preferred to the canonical one."""


@dataclass(frozen=True)
class TwoLevel:
    """Options of MGRIT on two levels.

    Attributes
    ----------
    m : int
        Steps in an interval.
    coarse_steps : int
        Steps of the coarse integrator for each of them.
    relax : str
        ``"F"`` or ``"FCF"``.
    """

    m: int
    coarse_steps: int = 1
    relax: str = "F"

    @property
    def c_relaxations(self) -> int:
        """C-relaxations of a cycle."""
        return self.relax.count("C")


def rounded(seconds: Mapping[int, float]) -> dict[int, float]:
    """Times of a step relative to that of one state, to powers of the fourth root of two: small differences from run to
    run disappear.

    Parameters
    ----------
    seconds
        Seconds of a step by the number of states, 1 among them.
    """
    return {w: 2 ** (round(4 * math.log2(t / seconds[1])) / 4) for w, t in seconds.items()}


def block_seconds(seconds: Mapping[int, float], count: int) -> float:
    """Least time of a step of ``count`` states in calls of given widths.

    Parameters
    ----------
    seconds
        Time of a call by its width; a call with fewer states takes as long.
    count
        Number of states.
    """
    widest = min(seconds, key=lambda w: seconds[w] / w)
    best = [0.0]
    for left in range(1, count % widest + 1):
        best.append(min(best[max(left - w, 0)] + t for w, t in seconds.items()))
    return count // widest * seconds[widest] + best[-1]


def sequential_seconds(seconds: Mapping[int, float], steps: int) -> float:
    """Time of ``steps`` steps one after another, on any number of ranks."""
    return steps * seconds[1]


def mgrit_seconds(
    seconds: Mapping[int, float], steps: int, ranks: int, options: TwoLevel, cycles: int, *, coarse_cost: float = 1.0
) -> float:
    """Time of a solve by nested iteration and a number of cycles.

    Parameters
    ----------
    seconds
        Time of a step by the number of states.
    steps, ranks
        Steps on the fine level; ranks in time.
    options
        Those of MGRIT.
    cycles
        Cycles after nested iteration.
    coarse_cost
        Time of a step of the coarse level's integrator over that of a fine one; less on a coarser mesh.
    """
    count = steps // options.m
    block = block_seconds(seconds, math.ceil(count / ranks))
    relaxation, coarse = (options.m - 1) * block, count * options.coarse_steps * coarse_cost * seconds[1]
    cycle = (1 + options.c_relaxations) * (relaxation + block) + options.coarse_steps * coarse_cost * block + coarse
    return 2 * relaxation + 2 * block + coarse + cycles * cycle


def fastest(times: Mapping[TwoLevel, float], canonical: Sequence[TwoLevel]) -> TwoLevel:
    """The options with the least time, or the first of the ``canonical`` ones among them unless that is clearly slower.

    Parameters
    ----------
    times
        Predicted times, at least one.
    canonical
        Options that are preferred.
    """
    best = min(times, key=lambda options: (times[options], options.m, options.coarse_steps, options.relax))
    for options in canonical:
        if options in times:
            return best if times[best] < CLEARLY * times[options] else options
    return best
