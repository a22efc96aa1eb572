"""PETSc objects that Python has dropped on several ranks: when they are destroyed.

Destroying a PETSc object is collective, and Python drops objects at other times on each rank. So petsc4py puts what is
dropped on a list of its communicator, where it stays, with all its memory, until every rank of the communicator calls
``PETSc.garbage_cleanup``; objects of one rank are destroyed at once. This package calls :func:`clean` before each sweep
and where a functional is made. It reuses the objects of its own steps, so that there is little to clean: one vector for
each function whose values have been exchanged with an array.

UFL's forms and what is assembled from them refer to themselves in cycles, which Python's collector finds too late: it
counts objects and knows nothing of their memory. :class:`Dropped` counts functionals instead.
"""

from __future__ import annotations

import gc
import weakref

from petsc4py import PETSc

__all__ = ["Dropped", "clean"]


def clean(comm) -> None:
    """Destroy the PETSc objects that all ranks of a communicator have dropped (collective; 40 us where there are none).

    Parameters
    ----------
    comm
        An mpi4py communicator that PETSc objects live on; nothing is done for one rank.
    """
    if comm.size > 1:
        PETSc.garbage_cleanup(comm)


class Dropped:
    """Counts objects that have died, and collects cycles of references once there are many.

    Parameters
    ----------
    most
        Objects that may be dead before their cycles are collected.
    """

    def __init__(self, most: int = 8):
        self.most, self._count = most, 0

    def watch(self, thing: object) -> None:
        """Count an object when it dies."""
        weakref.finalize(thing, self._died).atexit = False

    def _died(self) -> None:
        self._count += 1

    def collect(self) -> None:
        """Collect cycles if enough objects have died; a rank's own decision, as no rank waits for another here."""
        if self._count >= self.most:
            self._count = 0
            gc.collect()
