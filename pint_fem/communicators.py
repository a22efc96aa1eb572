"""The communicators of process grids: split once for each communicator and grid, and used by all grids alike.

A grid of ``P`` ranks in groups of ``n`` neighbours has an *inner* communicator (the ranks of a group), an *outer* one
(the ranks with the same place in their groups), and both in reverse order. An MPI library has some thousands of
communicators, and freeing one is collective. Python drops objects at other times on each rank, so nothing may be freed
where an object dies: the groups' communicators are attributes of the communicator that they were split from, where the
next grid of that kind finds them. They are freed with it, or by :meth:`Lease.free`, which all ranks call.

This module needs mpi4py only.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable

from mpi4py import MPI

from pint_fem.collective import any_rank

__all__ = ["Groups", "Lease"]


class Groups:
    """Communicators of the groups of ``n`` neighbouring ranks.

    Parameters
    ----------
    comm
        The communicator that is split (collective).
    n
        Ranks of a group; divides ``comm.size``.
    ensemble
        Makes something with attributes ``comm`` and ``ensemble_comm``, the inner and the outer communicator, which it
        frees when it dies (``firedrake.Ensemble``); ``None``: they are split here.

    Attributes
    ----------
    inner, outer, reversed_inner, reversed_outer : mpi4py communicators
    ensemble : object or None
    users : int
        Grids of this rank that use them.
    """

    def __init__(self, comm, n: int, ensemble: Callable | None = None):
        self.users = 0
        self.ensemble = None if ensemble is None else ensemble(comm, n)
        if self.ensemble is None:
            self.inner = comm.Split(comm.rank // n, comm.rank)
            self.outer = comm.Split(comm.rank % n, comm.rank)
        else:
            self.inner, self.outer = self.ensemble.comm, self.ensemble.ensemble_comm
        self.reversed_inner = self.inner.Split(0, -self.inner.rank)
        self.reversed_outer = self.outer.Split(0, -self.outer.rank)

    def free(self) -> None:
        """Free all (collective)."""
        self.reversed_inner.Free()
        self.reversed_outer.Free()
        if self.ensemble is None:
            self.inner.Free()
            self.outer.Free()
        self.ensemble = None


_exiting: list[bool] = []
# registered behind mpi4py's own, so it runs before: MPI's end frees all there is, and Python calls are not safe in it
atexit.register(_exiting.append, True)


def _free_all(comm, keyval: int, groups: dict[tuple, Groups]) -> None:
    """Called by MPI where a communicator with groups is freed: on all ranks, in the same order of groups."""
    if _exiting:
        return
    for one in groups.values():
        one.free()
    groups.clear()


_KEYVAL = MPI.Comm.Create_keyval(delete_fn=_free_all)


class Lease:
    """A grid's use of the communicators of its groups.

    Parameters
    ----------
    comm
        The communicator that is split.
    n
        Ranks of a group.
    ensemble
        See :class:`Groups`.
    """

    def __init__(self, comm, n: int, ensemble: Callable | None = None):
        known = comm.Get_attr(_KEYVAL)
        if known is None:
            comm.Set_attr(_KEYVAL, known := {})
        key = n, ensemble is not None
        if key not in known:
            known[key] = Groups(comm, n, ensemble)
        self.groups: Groups | None = known[key]
        self.groups.users += 1
        self._comm, self._known, self._key = comm, known, key
        self._end = weakref.finalize(self, _leave, self.groups)
        self._end.atexit = False

    def free(self) -> None:
        """End the use, and free the communicators if no other grid uses them on any rank (collective)."""
        groups, self.groups = self.groups, None
        if groups is None:
            return
        self._end()
        if not any_rank(self._comm, groups.users > 0):
            del self._known[self._key]
            groups.free()


def _leave(groups: Groups) -> None:
    """A grid is gone, on this rank."""
    groups.users -= 1
