r"""The V-cycle in full approximation form.

On a level, after relaxation, with ``V`` the C-points' values and ``r`` the residual there, the next level solves

.. math::  U^c_j - \Phi^c_j(U^c_{j-1}) = V_j - \Phi^c_j(V_{j-1}) + r_j ,\qquad U^c_0 = V_0,

from the first guess ``V``, and the C-points take its solution. The exact solution has ``r = 0``, then ``U^c = V``
solves the coarse problem: it is a fixed point, whatever the coarse propagator. (Falgout, Friedhoff, Kolev,
MacLachlan, Schroder, SISC 36(6), 2014.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pint_fem.mgrit.levels import Level
from pint_fem.mgrit.relaxation import c_residual, f_relax, relax, solve_sequentially

__all__ = ["Cycle"]


class Cycle:
    """Work arrays of a hierarchy and one V-cycle on it.

    Parameters
    ----------
    levels
        Finest first; the finest level's ``U`` and ``G`` are set by the caller.
    schemes
        Relaxation of each level but the coarsest.
    state_shape
        Shape of one state.
    """

    def __init__(self, levels: Sequence[Level], schemes: Sequence[str], state_shape: tuple[int, ...]):
        self.levels, self.schemes = list(levels), list(schemes)
        self.residuals, self.restricted = [], []
        for coarse in self.levels[1:]:
            coarse.U = np.zeros((coarse.k + 1, *state_shape))
            coarse.G = np.zeros((coarse.k, *state_shape))
            self.residuals.append(np.zeros((coarse.k, *state_shape)))
            self.restricted.append(np.zeros((coarse.k + 1, *state_shape)))

    def relax_and_restrict(self, index: int, *, f_is_done: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Relax a level; return the residual and the values at its own C-points."""
        level, coarse = self.levels[index], self.levels[index + 1]
        relax(level, self.schemes[index], f_is_done=f_is_done)
        r, V = self.residuals[index], self.restricted[index]
        c_residual(level, r)
        if coarse.active:
            V[1:] = level.U[level.first_c_row :: level.m]
            if coarse.left is None:
                V[0] = level.U[0]
        return r, V[1:]

    def correct(self, index: int) -> None:
        """Solve the next level for the C-points of ``index`` and interpolate by F-relaxation."""
        level, coarse = self.levels[index], self.levels[index + 1]
        if coarse.active:
            V = self.restricted[index]
            coarse.exchange(V)
            coarse.phi(range(coarse.lo, coarse.hi), V[:-1], coarse.G)
            np.subtract(V[1:], coarse.G, out=coarse.G)
            coarse.G += self.residuals[index]
            coarse.U[...] = V
            self.solve(index + 1)
            level.U[level.first_c_row :: level.m] = coarse.U[1:]
        f_relax(level)

    def solve(self, index: int) -> None:
        """One V-cycle on ``index`` and the levels below it."""
        if index == len(self.levels) - 1:
            solve_sequentially(self.levels[index])
            return
        self.relax_and_restrict(index)
        self.correct(index)
