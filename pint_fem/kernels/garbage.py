"""Destruction of PETSc objects on several ranks after Python has dropped them.

Destroying a PETSc object is collective, but Python drops objects at other times on each rank. petsc4py puts dropped
objects on a list of their communicator, where they stay, with all their memory, until every rank of the communicator
calls ``PETSc.garbage_cleanup``; objects of one rank are destroyed at once. :func:`clean` is called before each sweep
and where a functional is made. Steps reuse their objects, so that there are few to destroy: one vector for each
function whose values have been copied to or from an array.
"""

from __future__ import annotations

from mpi4py import MPI
from petsc4py import PETSc

__all__ = ["clean"]


def clean(comm: MPI.Comm) -> None:
    """Destroy the PETSc objects that all ranks of an mpi4py communicator have dropped (collective)."""
    if comm.size > 1:
        PETSc.garbage_cleanup(comm)
