"""Exact termination of MGRIT: the number of cycles after which the iteration is exact for any propagators."""

from __future__ import annotations

import math

__all__ = ["exact_termination"]


def exact_termination(coarse_steps: float, nu: int, weight: float = 1.0) -> float:
    """Cycles after which the iteration is exact whatever the propagators: each makes ``1 + nu`` more C-points exact,
    and one more where weighted C-relaxation keeps part of the old values.

    Parameters
    ----------
    coarse_steps
        Steps of the second level; may be infinite.
    nu
        C-relaxations a cycle on the finest level.
    weight
        Of C-relaxation.
    """
    shifts = 1 + nu if weight == 1 else 1  # powers of the shift that a cycle contains
    return math.ceil(coarse_steps / shifts) if math.isfinite(coarse_steps) else math.inf
