"""The process grid space x time x experiments: which ranks share a state or the time axis, and which steps they own.

``P = P_space * P_time * P_experiments`` ranks form ``P_experiments`` groups of neighbouring ranks. Each group solves
its own experiments (evolutions of which a functional is the sum) on a space x time grid of its own: the ranks that
share one state have the communicator ``space_comm``, those with the same place in them share the time axis over
``time_comm``. The grid of a group is that of ``firedrake.Ensemble``; without Firedrake (plain numpy, torch) the same
communicators are split off here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import split_steps
from pint_fem.all_at_once.norms import euclidean, sum_in_rank_order
from pint_fem.collective import end_run_if_uncaught, on_first_rank
from pint_fem.communicators import ProcessGrid
from pint_fem.errors import InputError
from pint_fem.logs import logger
from pint_fem.meshes import Members, make_hierarchy, make_mesh

if TYPE_CHECKING:
    from firedrake import Ensemble, HierarchyBase, MeshGeometry

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


def _print_nothing(text: str) -> None:
    """What groups of experiments other than the first log."""


class SpaceTime(ProcessGrid):
    """A space x time grid of processes, or several of them for groups of experiments.

    Parameters
    ----------
    grid
        ``(P_space, P_time)`` or ``(P_space, P_time, P_experiments)``, a string such as ``"2x4"`` or ``"1x2x4"``, or
        ``None`` for all ranks in time. Two numbers stand for one group of experiments.
    comm
        The communicator to split; default the world. All grids of the same shape on one communicator share what it is
        split into, so that any number of them can be made and dropped.
    space, time, experiments
        In place of ``grid``: the numbers of ranks along the axes, ``SpaceTime(space=2, time=4, experiments=2)``. Of
        space and time one follows from the other; there is one group of experiments by default.

    Attributes
    ----------
    comm : mpi4py communicator
        All ranks. Errors and comparisons of arguments are collective over them.
    space_size, time_size, experiments_size : int
        Number of ranks in space and in time, and of groups of experiments.
    space_comm, time_comm, reversed_time_comm : mpi4py communicators
        Of a state's degrees of freedom; of the slabs; of the slabs from the last to the first, for adjoint sweeps. They
        are those of this rank's group.
    experiments_comm : mpi4py communicator
        The ranks of the same place in space and time in all groups, in the order of the groups.
    ensemble : firedrake.Ensemble or None
        That of this group, where there is Firedrake.
    prints : bool
        Whether lines and files that all groups of experiments would repeat are those of this grid: of the grid of all
        ranks, and of that of the first group.

    Notes
    -----
    ``with SpaceTime("2x4") as st:`` or :meth:`free` free the communicators. Where neither is used they stay for the
    next grid of this shape until ``comm`` itself is freed.

    Raises
    ------
    InputError
        On every rank, if the grid does not match the number of ranks, is given in two ways or differs between ranks.
    """

    _released = dict.fromkeys(("space_comm", "time_comm", "reversed_time_comm", "experiments_comm"), MPI.COMM_NULL) | {
        "ensemble": None,
        "_group": None,
    }

    def __init__(
        self,
        grid: tuple[int, ...] | str | None = None,
        comm: MPI.Comm = MPI.COMM_WORLD,
        *,
        space: int | None = None,
        time: int | None = None,
        experiments: int | None = None,
    ):
        super().__init__(comm, grid, {"space": space, "time": time, "experiments": experiments}, optional=1)
        end_run_if_uncaught(comm)
        self.space_size, self.time_size, self.experiments_size = self.shape
        self._group: SpaceTime | None = None
        self.prints = True
        if self.experiments_size > 1:
            of_experiments = self._groups(comm, self.space_size * self.time_size)
            self.experiments_comm = of_experiments.outer
            self._group = SpaceTime(self.shape[:2], of_experiments.inner)
            self._group.prints = self.experiments_comm.rank == 0
            for name in ("space_comm", "time_comm", "reversed_time_comm", "ensemble"):
                setattr(self, name, getattr(self._group, name))
            return
        self.experiments_comm = MPI.COMM_SELF
        ensemble = _ensemble if importlib.util.find_spec("firedrake") is not None else None
        groups = self._groups(comm, self.space_size, ensemble)
        self.space_comm, self.time_comm, self.ensemble = groups.inner, groups.outer, groups.ensemble
        self.reversed_time_comm = groups.reversed_outer

    @property
    def group(self) -> SpaceTime:
        """The space x time grid of this rank's group of experiments, on which sweeps are collective; the grid itself
        where there is one group.
        """
        return self if self._group is None else self._group

    @property
    def used_shape(self) -> tuple[int, ...]:
        """Numbers of ranks in space and in time, and of groups of experiments where there are several."""
        return self.shape if self.experiments_size > 1 else self.shape[:2]

    @property
    def is_root(self) -> bool:
        """Whether this is the first rank of the whole run, which prints and writes the files; of the grid of another
        group of experiments than the first it is none.
        """
        return self.prints and self.comm.rank == 0

    @property
    def owns_static(self) -> bool:
        """Whether this rank's part of a static field is the one that counts, as it does for files: that of the ranks in
        space that are the first in time of the first group of experiments; all others have copies.
        """
        return self.time_comm.rank == 0 and self.experiments_comm.rank == 0

    # -- meshes --------------------------------------------------------------------------------------------------------
    def mesh(self, make: Callable, *args: Any, **options: Any) -> MeshGeometry:
        """Make a mesh on ``space_comm``, distributed in the same way on all ranks in time and for all groups of
        experiments (collective over ``comm``).

        The cells are partitioned once, by PETSc's graph partitioner (PT-Scotch, ParMETIS or Chaco), into parts of
        nearly equal size and small surface; ``"simple"`` takes its place where PETSc has none.

        Parameters
        ----------
        make
            A function of Firedrake or of your own that takes ``comm`` and ``distribution_parameters`` and returns a
            mesh: ``st.mesh(UnitCubeMesh, 48, 48, 48)``, ``st.mesh(Mesh, "file.msh")``. It makes one mesh, which may be
            extruded, or refined to a ``MeshHierarchy``.
        *args, **options
            Its other arguments; ``distribution_parameters`` may have an ``"overlap_type"`` and a
            ``"partitioner_type"``.

        Returns
        -------
        firedrake.MeshGeometry
            What ``make`` returns.

        Raises
        ------
        InputError
            On every rank, if arguments cannot be used or differ between ranks, if there are more ranks in space than
            cells, or if the groups' meshes differ, as those of a function with random numbers may.
        """
        return make_mesh(self.members, make, args, options)

    def mesh_hierarchy(
        self, refinement_levels: int, make: Callable, *args: Any, refinements_per_level: int = 1, **options: Any
    ) -> HierarchyBase:
        """Make a mesh as :meth:`mesh` does and its uniform refinements, ``st.mesh_hierarchy(3, UnitCubeMesh, 4, 4, 4)``
        (collective over ``comm``).

        The cells of a refined mesh stay on the rank of the cell that they are cut from, so that the coarsest mesh
        should have many cells per rank. All meshes have its overlap.

        Parameters
        ----------
        refinement_levels
            Number of refined meshes.
        make, *args, **options
            As for :meth:`mesh`; for smoothers on patches around vertices, with
            ``distribution_parameters={"overlap_type": (DistributedMeshOverlapType.VERTEX, 1)}``.
        refinements_per_level
            Number of bisections of the edges from one mesh to the next.

        Returns
        -------
        firedrake.HierarchyBase
            The ``MeshHierarchy``, from the coarsest mesh to the finest.

        Raises
        ------
        InputError
            As :meth:`mesh`.
        """
        return make_hierarchy(self.members, refinement_levels, refinements_per_level, make, args, options)

    @property
    def members(self) -> Members:
        """The groups of ranks that share one state, of which each has a mesh of its own."""
        return Members(self.comm, self.space_comm, self.time_comm, self.experiments_comm)

    # -- steps and experiments -----------------------------------------------------------------------------------------
    def log(self, text: str) -> None:
        """Log a line on the first rank of the whole run (collective over ``comm``)."""
        on_first_rank(self.comm, "logging", logger.info if self.prints else _print_nothing, text)

    def free(self) -> None:
        """Free the communicators if no other grid of this shape on ``comm`` uses them (collective over ``comm``).

        To be called when nothing that was made on this grid is used any more: meshes, functionals.
        """
        if self._group is not None:
            self._group.free()
        super().free()

    def own_experiments(self, count: int) -> range:
        """Distribute experiments over the groups in contiguous, nearly equal parts.

        Parameters
        ----------
        count
            Number of experiments.

        Returns
        -------
        range
            The numbers of those of this rank's group.

        Raises
        ------
        InputError
            On every rank, if there are more groups than experiments.
        """
        bounds = self._experiment_bounds(count)
        place = self.experiments_comm.rank
        return range(bounds[place], bounds[place + 1])

    def group_of_experiment(self, number: int, count: int) -> int:
        """Number of the group that has an experiment out of ``count``."""
        return int(np.searchsorted(self._experiment_bounds(count), number, side="right")) - 1

    def _experiment_bounds(self, count: int) -> list[int]:
        """The first experiment of each group, and ``count``."""
        groups = self.experiments_size
        if count < groups:
            given = f"{count} experiment" + ("s" if count != 1 else "")
            best = max(n for n in range(1, count + 1) if self.comm.size % (n * self.space_size) == 0)
            instead = (self.space_size, self.comm.size // (self.space_size * best), best)
            raise InputError(
                f"grid {'x'.join(map(str, self.shape))} (space x time x experiments) has {groups} groups of ranks for "
                f"{given}: give at most one group per experiment, such as {'x'.join(map(str, instead))}"
            )
        return split_steps(count, groups)

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
        return sum_in_rank_order(values, self.space_comm)

    def sum_over_grid(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small array over all ranks of a group, bitwise identical on each of them (collective over these)."""
        return self.sum_over_time(self.sum_over_space(values))

    def point_norms(self, block: np.ndarray) -> np.ndarray:
        """Squared Euclidean norm ``(k,)`` of each state of a block ``(k, local_dofs)`` over space."""
        return self.sum_over_space(euclidean(block))

    def sum_over_experiments(self, array: np.ndarray) -> np.ndarray:
        """Sum of an array over the groups of experiments, in the order of the groups, bitwise identical on all ranks of
        one place in space and time (collective over ``experiments_comm``).

        Each rank adds up one part of the array and sends it to the others.
        """
        comm = self.experiments_comm
        if comm.size == 1:
            return array
        flat = np.ascontiguousarray(array, dtype=float).reshape(-1)
        bounds = split_steps(len(flat), comm.size)
        counts, mine = np.diff(bounds), bounds[comm.rank + 1] - bounds[comm.rank]
        parts = np.empty((comm.size, mine))
        received = [mine] * comm.size, [mine * r for r in range(comm.size)]
        comm.Alltoallv([flat, (counts, bounds[:-1]), MPI.DOUBLE], [parts, received, MPI.DOUBLE])
        total = np.empty_like(flat)
        comm.Allgatherv(np.add.reduce(parts, axis=0), [total, (counts, bounds[:-1]), MPI.DOUBLE])
        return total.reshape(array.shape)

    def from_group(self, number: int, array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        """An array of floats of a group of experiments on the ranks of the same place in all groups (collective over
        ``experiments_comm``). ``array`` is given in that group only, ``shape`` everywhere.
        """
        out = np.empty(shape) if array is None else np.ascontiguousarray(array, dtype=float)
        if self.experiments_comm.size > 1:
            self.experiments_comm.Bcast(out, root=number)
        return out

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
