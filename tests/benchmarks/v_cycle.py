r"""Bounds of the norm of a V-cycle's error propagation, by cycles on unit errors of small matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pint_fem.theory.block_modes import block_norms

__all__ = ["v_cycle_norm"]


def v_cycle_norm(propagators: Sequence[np.ndarray], coarsening: Sequence[int], steps: int, nu: int = 1) -> np.ndarray:
    """Bound of the norm of a V-cycle's error propagation at the C-points, for each block.

    The cycle is applied to unit errors at as many C-points as one step of the coarsest level holds: it is invariant
    under shifts by those. The bound is the geometric mean of the 1- and the infinity-norm of what comes out.

    Parameters
    ----------
    propagators
        ``(k, d, d)`` of each level.
    coarsening
        Factors between levels; their product divides ``steps``.
    steps
        Of the finest level.
    nu
        C-relaxations on each level but the coarsest.

    Returns
    -------
    ndarray
        ``(k,)``.
    """
    k, d = propagators[0].shape[:2]
    period, points = math.prod(coarsening[1:]), steps // coarsening[0]
    e = np.zeros((steps + 1, period, k, d, d))
    for j in range(min(period, points)):
        e[(j + 1) * coarsening[0], j] = np.eye(d)
    _cycle(e, None, list(propagators), list(coarsening), nu)
    sizes = block_norms(e[coarsening[0] :: coarsening[0]])  # (points, period, k)
    columns = sizes.sum(axis=0).max(axis=0)
    rows = np.zeros((period, k))
    for i in range(points - 1, max(points - 1 - period, -1), -1):
        rows[points - 1 - i] = sum(sizes[r].sum(axis=0) for r in range(i, -1, -period))
    return np.sqrt(columns * rows.max(axis=0))


def _cycle(e: np.ndarray, g: np.ndarray | None, propagators: list, coarsening: list, nu: int) -> None:
    """One V-cycle for ``e[i] = Phi e[i-1] + g[i]`` with ``e[0]`` given, in place."""
    phi = propagators[0]
    if not coarsening:
        for i in range(1, len(e)):
            e[i] = phi @ e[i - 1] + g[i]
        return
    m, add = coarsening[0], (lambda i: 0.0) if g is None else (lambda i: g[i])

    def relax_f():
        for j in range(1, m):
            rows = slice(j, None, m)
            e[rows] = phi @ e[j - 1 : -1 : m] + add(rows)

    relax_f()
    for _ in range(nu):
        e[m::m] = phi @ e[m - 1 :: m] + add(slice(m, None, m))
        relax_f()
    residual = np.zeros_like(e[::m])
    residual[1:] = phi @ e[m - 1 :: m] + add(slice(m, None, m)) - e[m::m]
    correction = np.zeros_like(residual)
    _cycle(correction, residual, propagators[1:], coarsening[1:], nu)
    e[::m] += correction
    relax_f()
