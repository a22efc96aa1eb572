"""The solve on the coarsest level: step through it, gather it on one rank and step there, relax, or solve all its steps
at once by a method of the propagator.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pint_fem.all_at_once.arrays import kind_of
from pint_fem.all_at_once.callbacks import require_nothing
from pint_fem.all_at_once.levels import Level
from pint_fem.all_at_once.messages import gather_rows, scatter_rows
from pint_fem.all_at_once.trace import timed
from pint_fem.errors import FAILURES
from pint_fem.mgrit.relaxation import Relaxation

__all__ = ["coarsest_solver"]


def coarsest_solver(level: Level, kind: str, sweeps: int, weight: float) -> Callable[[], None]:
    """A function that solves the coarsest level in place.

    Parameters
    ----------
    level
        The coarsest level; with C-points where ``kind`` is ``"relax"``.
    kind
        ``"sequential"``, ``"gathered"``, ``"relax"`` or ``"paradiag"``.
    sweeps
        FC-relaxations of ``"relax"``, which an F-relaxation ends; iterations of ``"paradiag"``.
    weight
        Weight of its C-relaxation.

    Raises
    ------
    ValueError
        For ``"paradiag"``, if the propagator has no ``all_at_once(level, iterations)``.
    """
    if kind == "gathered" and level.comm.size > 1:
        return _Gathered(level)
    if kind == "relax":
        relaxation = Relaxation(level, weight)
        return lambda: relaxation.relax(sweeps)
    if kind == "paradiag":
        if not hasattr(level.propagator, "all_at_once"):
            raise ValueError(
                "mgrit coarse_solver 'paradiag': the coarsest level's propagator has no all_at_once(level, "
                "iterations); give 'sequential'"
            )
        return lambda: _solve_all_at_once(level, sweeps)
    return level.solve_sequentially


def _solve_all_at_once(level: Level, iterations: int) -> None:
    """Call the propagator's own solve of all steps, which has to write its result in place."""
    try:
        require_nothing("all_at_once", level.propagator.all_at_once(level, iterations))
    except FAILURES as error:
        level.note("all_at_once", error)
        level.U[1:] = np.nan


class _Gathered:
    """Gather the right-hand sides (first guesses too, where steps use them) on the first rank, step there, send each
    rank its points: two or three messages per rank instead of a chain of ranks. A coarsest level is small; no other
    level is gathered.

    Parameters
    ----------
    level
        The coarsest level with its array ``U``.
    """

    def __init__(self, level: Level):
        self.level, shape, kind = level, level.U.shape[1:], kind_of(level.U)
        first = level.comm.rank == 0
        self._G = kind.empty(level.nsteps, *shape) if first else None
        self._U = kind.empty(level.nsteps + 1, *shape) if first else None
        self._rows = kind.empty(level.k, *shape)

    def __call__(self) -> None:
        level, comm = self.level, self.level.comm
        points = None if self._U is None else self._U[1:]
        with timed(level.trace, "gather", level.index, bytes=level.G.nbytes):
            gather_rows(comm, level.G, self._G, level.bounds)
            if level.uses_guess:
                gather_rows(comm, level.U[1:], points, level.bounds)
        if self._U is not None:
            self._U[:1] = level.U[:1]
            level.sweep_steps(range(level.nsteps), self._U, self._G)
        with timed(level.trace, "scatter", level.index, bytes=self._rows.nbytes):
            scatter_rows(comm, points, self._rows, level.bounds)
            level.U[1:] = self._rows
        level.exchange(level.U)
