"""The solve on the coarsest level: step through it, gather it on one rank and step there, or only relax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pint_fem.mgrit.levels import Level
from pint_fem.mgrit.relaxation import Relaxation

__all__ = ["coarsest_solver"]


def coarsest_solver(level: Level, kind: str, sweeps: int, weight: float) -> Callable[[], None]:
    """A function that solves the coarsest level in place.

    Parameters
    ----------
    level
        The coarsest level; with C-points where ``kind`` is ``"relax"``.
    kind
        ``"sequential"``, ``"gathered"`` or ``"relax"``.
    sweeps
        FC-relaxations of ``"relax"``, which an F-relaxation ends.
    weight
        Of its C-relaxation.
    """
    if kind == "gathered":
        return lambda: _solve_gathered(level)
    if kind == "relax":
        relaxation = Relaxation(level, weight)

        def relax():
            for _ in range(sweeps):
                relaxation.f_relax()
                relaxation.c_relax()
            relaxation.f_relax()

        return relax

    return level.solve_sequentially


def _solve_gathered(level: Level) -> None:
    """Gather the right-hand sides (first guesses too, where steps use them) on the first rank, step there, send each
    rank its points: two or three messages a rank instead of a chain of ranks. For coarsest levels that are small, as
    they are: nothing else is gathered.
    """
    comm, shape = level.comm, level.U.shape[1:]
    size = int(np.prod(shape, dtype=int))
    counts = [(b - a) * size for a, b in zip(level.bounds[:-1], level.bounds[1:], strict=True)]
    starts = [a * size for a in level.bounds[:-1]]
    if comm.size == 1:
        level.solve_sequentially()
        return
    first = comm.rank == 0
    begin = level.trace.now() if level.trace else 0.0
    G = np.empty((level.nsteps, *shape)) if first else None
    U = np.empty((level.nsteps + 1, *shape)) if first else None
    comm.Gatherv(np.ascontiguousarray(level.G), [G, counts, starts, _double()] if first else None)
    if level.uses_guess:
        comm.Gatherv(np.ascontiguousarray(level.U[1:]), [U[1:], counts, starts, _double()] if first else None)
    if level.trace:
        level.trace.work("gather", level.index, begin, bytes=level.G.nbytes)
    if first:
        U[0] = level.U[0]
        level.sweep_steps(range(level.nsteps), U, G)
    rows = np.empty((level.k, *shape))
    begin = level.trace.now() if level.trace else 0.0
    comm.Scatterv([U[1:], counts, starts, _double()] if first else None, rows)
    level.U[1:] = rows
    if level.trace:
        level.trace.work("scatter", level.index, begin, bytes=rows.nbytes)
    level.exchange(level.U)


def _double():
    from mpi4py import MPI

    return MPI.DOUBLE
