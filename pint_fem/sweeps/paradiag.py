"""ParaDiag as a time solver of sweeps, and as the solver of MGRIT's coarsest level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pint_fem.all_at_once.levels import Level
from pint_fem.errors import FAILURES
from pint_fem.paradiag.circulant import AlphaCirculant
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.systems import ShiftedSteps
from pint_fem.sweeps.frequency_systems import AveragedSystems

__all__ = ["CoarsestParaDiag", "paradiag_solver"]


def paradiag_solver(
    steps: Sequence, nsteps: int, *, paradiag: ParaDiagOptions, systems: ShiftedSteps | AveragedSystems, **given: Any
) -> ParaDiag:
    """A solver for the single level ``steps[0]`` with options ``paradiag`` and the systems of the frequencies.

    ``given`` are arguments of MGRIT, of which those that concern a hierarchy are ignored.
    """
    for unused in ("transfers", "linear", "options"):
        given.pop(unused, None)
    (step,) = steps
    solve = systems.solve_transposed if step.transposed else systems.solve
    return ParaDiag(step, nsteps, solve, options=paradiag, backwards=step.transposed, **given)


class CoarsestParaDiag:
    """Solves MGRIT's coarsest level by iterations of ParaDiag (``coarse_solver="paradiag"``), without sequential steps.

    Parameters
    ----------
    systems, alpha
        The systems of the frequencies of the level's propagator; parameter of the circulant.
    transposed
        Whether the level is that of an adjoint sweep.
    """

    def __init__(self, systems: ShiftedSteps, alpha: float, *, transposed: bool):
        self._solve = systems.solve_transposed if transposed else systems.solve
        self.alpha, self._transposed = alpha, transposed
        self._circulant: AlphaCirculant | None = None
        self._level: Level | None = None
        self._size, self._members = 0, 1

    def __call__(self, level: Level, iterations: int) -> None:
        """Do some iterations for ``level.U`` and ``level.G``, on every rank of the level's communicator."""
        k, size = len(level.G), level.U[0].size
        self._members = level.U.shape[1] if level.U.ndim > 2 else 1
        if self._level is not level or self._size != size:
            self._level, self._size = level, size
            self._circulant = AlphaCirculant(
                level.nsteps, self.alpha, self._solve_or_nan, size, comm=level.comm, bounds=level.bounds,
                backwards=self._transposed, trace=level.trace,
            )  # fmt: skip
        r = np.empty_like(level.G)
        for _ in range(iterations):
            level.phi_of_all(level.U, r)
            r += level.G
            r -= level.U[1:]
            level.U[1:] += self._circulant(r.reshape(k, size)).reshape(r.shape)
        level.exchange(level.U)

    def _solve_or_nan(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """The solution for a frequency, one member of a batch after another; NaN where it fails, which reaches all
        ranks.
        """
        try:
            return np.concatenate([self._solve(k, mu, row) for row in r.reshape(self._members, -1)])
        except FAILURES as error:
            if np.isfinite(r).all() or not isinstance(error, Exception):
                self._level.note(f"frequency {k}", error)
            return np.full_like(r, np.nan)
