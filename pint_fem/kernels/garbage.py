"""Destruction of PETSc objects on several ranks, and of cycles of references, after Python has dropped them.

Destroying a PETSc object is collective, but Python drops objects at other times on each rank. petsc4py puts dropped
objects on a list of their communicator, where they stay, with all their memory, until every rank of the communicator
calls ``PETSc.garbage_cleanup``; objects of one rank are destroyed at once. :func:`clean` is called before each sweep
and where a functional is made. Steps reuse their objects, so that there are few to destroy: one vector for each
function whose values have been copied to or from an array.

UFL's forms and what is assembled from them refer to themselves in cycles, which Python's collector finds too late: it
counts objects, not their memory. :class:`Dropped` counts functionals instead.
"""

from __future__ import annotations

import gc
import weakref

from mpi4py import MPI
from petsc4py import PETSc

__all__ = ["Dropped", "clean"]


def clean(comm: MPI.Comm) -> None:
    """Destroy the PETSc objects that all ranks of an mpi4py communicator have dropped (collective)."""
    if comm.size > 1:
        PETSc.garbage_cleanup(comm)


class Dropped:
    """Counts dropped objects, and collects cycles of references once there are many.

    Parameters
    ----------
    most
        Number of dropped objects after which cycles are collected.
    """

    def __init__(self, most: int = 8):
        self.most, self._count = most, 0

    def watch(self, item: object) -> None:
        """Count an object when it is dropped."""
        weakref.finalize(item, self._add).atexit = False

    def _add(self) -> None:
        self._count += 1

    def collect(self) -> None:
        """Collect cycles if enough objects have been dropped; not collective, each rank decides by itself."""
        if self._count >= self.most:
            self._count = 0
            gc.collect()
