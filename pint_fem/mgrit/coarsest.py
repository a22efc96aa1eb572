"""The solve on the coarsest level: step through it, gather it on one rank and step there, relax, or solve all its steps
at once by a method of the propagator.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.callbacks import require_nothing
from pint_fem.all_at_once.levels import Level
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
        self.level, shape = level, level.U.shape[1:]
        size = int(np.prod(shape, dtype=int))
        counts = [(b - a) * size for a, b in zip(level.bounds[:-1], level.bounds[1:], strict=True)]
        dtype = level.U.dtype
        self._layout = [counts, [a * size for a in level.bounds[:-1]], MPI.DOUBLE if dtype.itemsize == 8 else MPI.FLOAT]
        first = level.comm.rank == 0
        self._G = np.empty((level.nsteps, *shape), dtype) if first else None
        self._U = np.empty((level.nsteps + 1, *shape), dtype) if first else None
        self._rows = np.empty((level.k, *shape), dtype)

    def _whole(self, array: np.ndarray | None):
        """MPI's description of an array of all steps on the first rank."""
        return None if array is None else [array, *self._layout]

    def __call__(self) -> None:
        level, comm, trace = self.level, self.level.comm, self.level.trace
        points = None if self._U is None else self._U[1:]
        begin = trace.now() if trace else 0.0
        comm.Gatherv(np.ascontiguousarray(level.G), self._whole(self._G))
        if level.uses_guess:
            comm.Gatherv(np.ascontiguousarray(level.U[1:]), self._whole(points))
        if trace:
            trace.work("gather", level.index, begin, bytes=level.G.nbytes)
        if self._U is not None:
            self._U[0] = level.U[0]
            level.sweep_steps(range(level.nsteps), self._U, self._G)
        begin = trace.now() if trace else 0.0
        comm.Scatterv(self._whole(points), self._rows)
        level.U[1:] = self._rows
        if trace:
            trace.work("scatter", level.index, begin, bytes=self._rows.nbytes)
        level.exchange(level.U)
