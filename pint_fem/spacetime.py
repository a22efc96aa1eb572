"""The process grid space x time: which ranks share a state, which share the time axis, and which steps a rank owns.

``P = P_space * P_time`` ranks form ``P_time`` groups (ensemble members). A group shares one state in space over
``space_comm``; the ranks with the same place in their groups share the time axis over ``time_comm``. The grid is that
of ``firedrake.Ensemble``; without Firedrake (plain numpy, torch) the same communicators are split off here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import split_steps
from pint_fem.all_at_once.norms import euclidean
from pint_fem.communicators import ProcessGrid
from pint_fem.errors import InputError

if TYPE_CHECKING:
    from firedrake import Ensemble

__all__ = ["Slab", "SpaceTime"]


@dataclass(frozen=True)
class Slab:
    """The time steps that one time rank owns.

    Attributes
    ----------
    nsteps : int
        Number of steps of all ranks.
    lo, hi : int
        The own steps are ``lo -> lo+1, ..., hi-1 -> hi``; arrays hold the points ``lo..hi``.
    bounds : tuple of int
        ``lo`` of every time rank, and ``nsteps``.
    """

    nsteps: int
    lo: int
    hi: int
    bounds: tuple[int, ...]

    @property
    def k(self) -> int:
        """Number of own steps."""
        return self.hi - self.lo

    @property
    def is_first(self) -> bool:
        """Whether row 0 is the initial value."""
        return self.lo == 0

    @property
    def is_last(self) -> bool:
        """Whether the last row is the final state."""
        return self.hi == self.nsteps


def _ensemble(comm: MPI.Comm, n: int) -> Ensemble:
    """The ``firedrake.Ensemble`` of groups of ``n`` ranks."""
    from firedrake import Ensemble

    return Ensemble(comm, n)


class SpaceTime(ProcessGrid):
    """A space x time grid of processes.

    Parameters
    ----------
    grid
        ``(P_space, P_time)``, a string such as ``"2x4"``, or ``None`` for all ranks in time.
    comm
        The communicator to split; default the world. All grids of the same shape on one communicator share what it is
        split into, so that any number of them can be made and dropped.
    space, time
        In place of ``grid``: the number of ranks in space and in time, ``SpaceTime(space=2, time=4)``. From one of them
        the other follows.

    Attributes
    ----------
    space_size, time_size : int
        Number of ranks in space and in time.
    space_comm, time_comm, reversed_time_comm : mpi4py communicators
        Of a state's degrees of freedom; of the slabs; of the slabs from the last to the first, for adjoint sweeps.
    ensemble : firedrake.Ensemble or None
        That of this grid, where there is Firedrake.

    Notes
    -----
    ``with SpaceTime("2x4") as st:`` or :meth:`free` free the communicators. Where neither is used they stay for the
    next grid of this shape until ``comm`` itself is freed.

    Raises
    ------
    InputError
        On every rank, if the grid does not match the number of ranks, is given in two ways or differs between ranks.
    """

    _released = dict.fromkeys(("space_comm", "time_comm", "reversed_time_comm"), MPI.COMM_NULL) | {"ensemble": None}

    def __init__(
        self,
        grid: tuple[int, int] | str | None = None,
        comm: MPI.Comm = MPI.COMM_WORLD,
        *,
        space: int | None = None,
        time: int | None = None,
    ):
        ensemble = _ensemble if importlib.util.find_spec("firedrake") is not None else None
        super().__init__(comm, grid, {"space": space, "time": time}, 0, ensemble)
        self.space_size, self.time_size = self.shape
        groups = self._shared.groups
        self.space_comm, self.time_comm, self.ensemble = groups.inner, groups.outer, groups.ensemble
        self.reversed_time_comm = groups.reversed_outer

    def slab(self, nsteps: int, group: int = 1) -> Slab:
        """Distribute time steps over the time ranks in contiguous, nearly equal parts.

        Parameters
        ----------
        nsteps
            Number of steps.
        group
            So many neighbouring steps stay on one rank.

        Returns
        -------
        Slab
            The steps of this rank.

        Raises
        ------
        InputError
            On every rank, if there are more time ranks than groups, or ``group`` does not divide ``nsteps``.
        """
        groups, rest = divmod(nsteps, group)
        if rest:
            raise InputError(f"{nsteps} time steps do not go in groups of {group}")
        if groups < self.time_size:
            what = "time steps" if group == 1 else f"groups of {group} time steps"
            each = "step" if group == 1 else "group"
            raise InputError(f"{self.time_size} time ranks for {groups} {what}: use at most one rank per {each}")
        bounds = [group * b for b in split_steps(groups, self.time_size)]
        return Slab(nsteps, bounds[self.time_comm.rank], bounds[self.time_comm.rank + 1], tuple(bounds))

    def sum_over_time(self, array: np.ndarray) -> np.ndarray:
        """Sum of an array over the time ranks, bitwise identical on every rank (collective over ``time_comm``)."""
        if self.time_comm.size == 1:
            return array
        total = np.empty(array.shape, array.dtype)  # C order, as what is sent
        self.time_comm.Reduce(np.ascontiguousarray(array), total, op=MPI.SUM, root=0)
        self.time_comm.Bcast(total, root=0)
        return total

    def sum_over_space(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small array over the space ranks, in rank order (collective over ``space_comm``).

        The result is bitwise identical on every rank, and an entry's does not depend on the length of the array.
        """
        if self.space_comm.size == 1 or not values.size:
            return values
        parts = np.empty((self.space_comm.size, *values.shape))
        self.space_comm.Allgather(np.ascontiguousarray(values, dtype=float), parts)
        return np.add.reduce(parts, axis=0)

    def sum_over_grid(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small array over all ranks, bitwise identical on every rank (collective)."""
        return self.sum_over_time(self.sum_over_space(values))

    def point_norms(self, block: np.ndarray) -> np.ndarray:
        """Squared Euclidean norm ``(k,)`` of each state of a block ``(k, local_dofs)`` over space."""
        return self.sum_over_space(euclidean(block))

    def add_shared_points(self, rows: np.ndarray) -> None:
        """Add the last row of each time rank's array to the first row of the next rank's, which is the same time point
        (collective over time).
        """
        comm, request = self.time_comm, None
        if comm.rank + 1 < comm.size:
            request = comm.Isend(rows[-1].copy(), dest=comm.rank + 1, tag=2)
        if comm.rank > 0:
            from_left = np.empty_like(rows[0])
            comm.Recv(from_left, source=comm.rank - 1, tag=2)
            rows[0] += from_left
        if request is not None:
            request.Wait()
