"""The process grid: space x time.

``P = P_space * P_time`` ranks form ``P_time`` groups (ensemble members). A group shares one state in space over
``space_comm``; the ranks with the same place in their groups share the time axis over ``time_comm``. The grid is that
of ``firedrake.Ensemble``; without Firedrake (plain numpy, torch) the same communicators are split off here.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import split_steps
from pint_fem.all_at_once.norms import euclidean
from pint_fem.collective import require_same
from pint_fem.communicators import Lease
from pint_fem.errors import InputError

__all__ = ["Slab", "SpaceTime", "parse_grid"]


def parse_grid(text: str, size: int) -> tuple[int, int]:
    """Read ``"2x4"`` (space x time) for ``size`` ranks; ``"auto"`` puts all ranks in time.

    Raises
    ------
    InputError
        If the text is no grid or its product is not ``size``.
    """
    if text == "auto":
        return 1, size
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if not match:
        raise InputError(f"grid {text!r} is not of the form SPACExTIME, such as 1x{size}")
    space, time = int(match[1]), int(match[2])
    if space * time != size:
        raise InputError(
            f"grid {space}x{time} wants {space * time} ranks, started were {size}: mpiexec -n {space * time}"
        )
    return space, time


@dataclass(frozen=True)
class Slab:
    """The steps ``lo -> lo+1, ..., hi-1 -> hi`` of one time rank; its arrays hold the points ``lo..hi``."""

    nsteps: int
    lo: int
    hi: int
    bounds: tuple[int, ...]

    @property
    def k(self) -> int:
        """Own steps."""
        return self.hi - self.lo

    @property
    def is_first(self) -> bool:
        """Whether row 0 is the initial value."""
        return self.lo == 0

    @property
    def is_last(self) -> bool:
        """Whether the last row is the final state."""
        return self.hi == self.nsteps


def _has_firedrake() -> bool:
    return importlib.util.find_spec("firedrake") is not None


def _ensemble(comm, n: int):
    """The ``firedrake.Ensemble`` of groups of ``n`` ranks."""
    from firedrake import Ensemble

    return Ensemble(comm, n)


class SpaceTime:
    """A space x time grid of processes.

    Parameters
    ----------
    grid
        ``(P_space, P_time)``, a string such as ``"2x4"``, or ``None`` for all ranks in time.
    comm
        The communicator to split; default the world. All grids of the same shape on one communicator share what it is
        split into (see :mod:`pint_fem.communicators`), so that any number of them can be made and dropped.

    Attributes
    ----------
    space_comm, time_comm, reversed_time_comm : mpi4py communicators
        A state's degrees of freedom; the slabs; the slabs from the last to the first, for adjoint sweeps.
    ensemble : firedrake.Ensemble or None
        That of this grid, where there is Firedrake.

    Notes
    -----
    ``with SpaceTime("2x4") as st:`` or :meth:`free` give the communicators back. Where neither is used they stay for
    the next grid of this shape until ``comm`` itself is freed.

    Raises
    ------
    InputError
        On every rank, if the grid does not match the ranks.
    """

    def __init__(self, grid: tuple[int, int] | str | None = None, comm=MPI.COMM_WORLD):
        self.comm = comm
        if grid is None:
            grid = "auto"
        text = grid if isinstance(grid, str) else "x".join(map(str, grid))
        require_same(comm, grid=text)
        self.space_size, self.time_size = parse_grid(text, comm.size)
        self._lease = Lease(comm, self.space_size, _ensemble if _has_firedrake() else None)
        groups = self._lease.groups
        self.space_comm, self.time_comm, self.ensemble = groups.inner, groups.outer, groups.ensemble
        self.reversed_time_comm = groups.reversed_outer

    def free(self) -> None:
        """Give the communicators back (collective over ``comm``): they are freed if no other grid of this shape on
        ``comm`` uses them. Call it when the meshes and functionals on them are not used any more.
        """
        self._lease.free()
        self.space_comm = self.time_comm = self.reversed_time_comm = MPI.COMM_NULL
        self.ensemble = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:  # a rank that fails alone must not wait for the others here
            self.free()

    @property
    def is_root(self) -> bool:
        """Whether this rank speaks for all (monitors, files of the whole run)."""
        return self.comm.rank == 0

    def slab(self, nsteps: int, whole: int = 1) -> Slab:
        """Share ``nsteps`` steps among the time ranks, in groups of ``whole`` steps.

        Raises
        ------
        InputError
            On every rank, if there are more time ranks than groups, or steps do not go in groups.
        """
        groups, rest = divmod(nsteps, whole)
        if rest:
            raise InputError(f"{nsteps} time steps do not go in groups of {whole}")
        if groups < self.time_size:
            what = "time steps" if whole == 1 else f"groups of {whole} time steps"
            each = "step" if whole == 1 else "group"
            raise InputError(f"{self.time_size} time ranks for {groups} {what}: use at most one rank a {each}")
        bounds = [whole * b for b in split_steps(groups, self.time_size)]
        return Slab(nsteps, bounds[self.time_comm.rank], bounds[self.time_comm.rank + 1], tuple(bounds))

    def sum_over_time(self, array: np.ndarray) -> np.ndarray:
        """Sum an array over the time ranks; the same bits on every rank."""
        if self.time_comm.size == 1:
            return array
        total = np.empty(array.shape, array.dtype)  # C order, as what is sent
        self.time_comm.Reduce(np.ascontiguousarray(array), total, op=MPI.SUM, root=0)
        self.time_comm.Bcast(total, root=0)
        return total

    def sum_over_space(self, values: np.ndarray) -> np.ndarray:
        """Sum a small array over the space ranks in rank order; the same bits on every rank and for every length."""
        if self.space_comm.size == 1 or not values.size:
            return values
        parts = np.empty((self.space_comm.size, *values.shape))
        self.space_comm.Allgather(np.ascontiguousarray(values, dtype=float), parts)
        return np.add.reduce(parts, axis=0)

    def sum_over_grid(self, values: np.ndarray) -> np.ndarray:
        """Sum a small array over all ranks."""
        return self.sum_over_time(self.sum_over_space(values))

    def point_norms(self, block: np.ndarray) -> np.ndarray:
        """Squared Euclidean norm of each state of ``block`` ``(k, local_dofs)`` over space."""
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
