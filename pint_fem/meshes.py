r"""Meshes that all members of an ensemble distribute in the same way, with parts of small surface.

The ranks of a process grid that share one state are a *member*, and every member has a mesh of its own. Values are
sent between ranks of the same place in their members as arrays, so that all members need the same parts and the same
numbering in them. A graph partitioner (PT-Scotch, ParMETIS, Chaco) makes parts of nearly equal size and small surface,
but need not find the same parts in each call: threads race, and random numbers go on. The mesh is therefore partitioned
once, on the first member, and its parts are given to the others:

1. The first member makes the mesh with Firedrake's default partitioner. PETSc's star forest from the mesh as it was
   made (for all generated meshes and gmsh files it is on the first rank of the member) to the distributed one has the
   new rank of each cell.
2. The other members make it with ``distribution_parameters={"partition": (sizes, points)}``: the numbers of cells that
   go from this rank to each, and those cells. PETSc sorts the points of a part, so that the numbering follows from the
   set of its cells.
3. All members compare connectivity and coordinates.
"""

from __future__ import annotations

import ctypes
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import split_steps
from pint_fem.collective import any_rank, collectively, raise_collectively, require_same
from pint_fem.digests import digest
from pint_fem.errors import FAILURES, FailureReport, InputError, InputTypeError
from pint_fem.logs import logger

if TYPE_CHECKING:
    from firedrake import MeshGeometry

__all__ = ["Members", "Parts", "make_hierarchy", "make_mesh", "require_same_meshes"]

_SCOTCH_THREADS = "SCOTCH_PTHREAD_NUMBER"
_RTOL = 1e-9
"""Of coordinates, relative to their norm: far above the round-off of copies, far below what moves a vertex."""


class Members:
    """The ranks of a process grid, by member and by place in the members.

    Parameters
    ----------
    comm
        All ranks.
    space_comm
        Those of the own member.
    *between
        Communicators of the ranks of the own place in all members; the first one joins the members of a group, the
        next one the groups.
    """

    def __init__(self, comm: MPI.Comm, space_comm: MPI.Comm, *between: MPI.Comm):
        self.comm, self.space_comm, self.between = comm, space_comm, between

    @property
    def is_first(self) -> bool:
        """Whether this rank belongs to the first member."""
        return all(comm.rank == 0 for comm in self.between)

    @property
    def several(self) -> bool:
        """Whether there is more than one member."""
        return any(comm.size > 1 for comm in self.between)

    def on_first(self, work: Callable, *args: Any) -> Any:
        """The result of work on the ranks of the first member, ``None`` on the others (collective).

        What is raised there is raised on the ranks of the same place in the other members, as if they did the work.
        """
        made = failure = None
        if self.is_first:
            try:
                made = work(*args)
            except FAILURES as error:  # others would wait for ever
                failure = error
        report = self.from_first(None if failure is None else FailureReport.of(failure))
        raise_collectively(self.comm, failure if report is None or failure is not None else report.cause())
        return made

    def from_first(self, value: Any) -> Any:
        """A value of the same place in the first member (collective)."""
        for comm in self.between:
            if comm.size > 1:
                value = comm.bcast(value)
        return value

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Largest minus least of each number over all members (collective)."""
        ends = np.concatenate([values, -values])
        for comm in self.between:
            if comm.size > 1:
                comm.Allreduce(MPI.IN_PLACE, ends, op=MPI.MAX)
        return ends[: len(values)] + ends[len(values) :]


class Parts(tuple):
    """``(sizes, points)``, as Firedrake takes them for ``"partition"``.

    ``sizes`` has the number of this rank's cells that go to each rank, ``points`` the numbers of those cells, rank by
    rank. As a text, of which Firedrake forms names in checkpoint files, it is short and depends on all of it.
    """

    __slots__ = ()

    def __new__(cls, sizes: Sequence[int] | np.ndarray, points: Sequence[int] | np.ndarray) -> Parts:
        """Copies both as arrays of PETSc's integers."""
        from firedrake.petsc import PETSc

        return super().__new__(cls, (np.array(sizes, dtype=PETSc.IntType), np.array(points, dtype=PETSc.IntType)))

    def __getnewargs__(self) -> tuple:
        return tuple(self)

    def __str__(self) -> str:
        return f"parts-{digest(list(self)):016x}"


# -- making ------------------------------------------------------------------------------------------------------------
def make_mesh(members: Members, make: Callable, args: Sequence, options: Mapping[str, Any]) -> Any:
    """Make a mesh on every member, distributed in the same way; see :meth:`pint_fem.spacetime.SpaceTime.mesh`.

    Parameters
    ----------
    members
        The ranks; collective over all of them.
    make
        Function that makes a mesh or a hierarchy of meshes.
    args, options
        Its arguments; ``comm`` is added to them, and ``distribution_parameters`` are completed.

    Returns
    -------
    firedrake.MeshGeometry or firedrake.HierarchyBase
        What ``make`` returns, on ``members.space_comm``.

    Raises
    ------
    InputError
        On every rank, if arguments cannot be used or differ between ranks, there are more ranks than cells, or the
        members' meshes differ.
    """
    comm, name = members.comm, getattr(make, "__name__", type(make).__name__)
    options = collectively(comm, "", _checked, make, name, options)
    parameters = dict(options.pop("distribution_parameters", None) or {})
    compared = {key: value for key, value in parameters.items() if key != "partition"}  # it has each rank's own cells
    require_same(comm, make=make, arguments=list(args), options=options, distribution_parameters=compared)

    def build(parts: Parts | None) -> Any:
        complete = parameters if parts is None else parameters | {"partition": parts}
        with _scotch_in_one_thread():  # on all members, as a function may distribute a mesh twice
            return make(*args, comm=members.space_comm, distribution_parameters=complete, **options)

    if members.space_comm.size == 1 or parameters.get("partition", True) not in (None, True):
        made = collectively(comm, "", build, None)
    else:
        _say_if_simple(members, parameters)
        made = members.on_first(build, None)
        found = members.on_first(_parts_of, made, members.space_comm)
        parts, keep = members.from_first(found)
        if not keep or members.several:  # the first member has its mesh
            again = collectively(comm, "", _nothing if keep and members.is_first else build, parts)
            made = made if keep and members.is_first else again
    require_same_meshes(members, made)
    return made


def make_hierarchy(
    members: Members, levels: int, per_level: int, make: Callable, args: Sequence, options: Mapping[str, Any]
) -> Any:
    """Make a mesh and its uniform refinements; see :meth:`pint_fem.spacetime.SpaceTime.mesh_hierarchy`."""
    from firedrake import MeshHierarchy

    from pint_fem.refinement import shorten_diagonals

    for name, least, value in (("refinement_levels", 0, levels), ("refinements_per_level", 1, per_level)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise InputTypeError(f"{name} = {value!r}: give a whole number, at least {least}")
    require_same(members.comm, refinement_levels=levels, refinements_per_level=per_level)
    mesh = make_mesh(members, make, args, options)
    callbacks = shorten_diagonals, lambda _plex, _number: None
    given = dict(refinements_per_level=per_level, reorder=options.get("reorder"), callbacks=callbacks)
    refine = partial(MeshHierarchy, mesh, levels, **given)
    made = collectively(members.comm, "", refine)
    require_same_meshes(members, made)
    return made


def _nothing(*_: Any) -> None:
    """The work of ranks that wait for others."""


def _checked(make: Callable, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if the function can take them together with those that are added."""
    if not callable(make):
        raise InputTypeError(
            f"st.mesh({make!r}, ...): give the function that makes a mesh and its arguments, "
            "st.mesh(UnitSquareMesh, 8, 8) or st.mesh(Mesh, 'file.msh')"
        )
    if "comm" in options:
        raise InputError(f"st.mesh({name}, ..., comm=...): leave comm out, the mesh is made on st.space_comm")
    given = options.get("distribution_parameters")
    if not isinstance(given, Mapping | None):
        raise InputTypeError(f"distribution_parameters = {given!r}: give a dictionary")
    try:
        accepted = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some functions have no signature
        return dict(options)
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in accepted.values()):
        missing = [added for added in ("comm", "distribution_parameters") if added not in accepted]
        if missing:
            raise InputError(
                f"{name} does not take {' and '.join(missing)}: give a function that takes comm= and "
                "distribution_parameters= and passes them to the mesh"
            )
    return dict(options)


@contextmanager
def _scotch_in_one_thread() -> Iterator[None]:
    """Scotch with one thread and the seed of its start, so that it finds the same parts in each call and run.

    Its threads race for vertices, and its random numbers go on from call to call. The function that resets them is
    looked up among the libraries that PETSc is linked to.
    """
    from petsc4py import PETSc

    reset = getattr(ctypes.CDLL(PETSc.__file__), "SCOTCH_randomReset", None)
    if reset is not None:
        reset()
    before = os.environ.get(_SCOTCH_THREADS)
    os.environ[_SCOTCH_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SCOTCH_THREADS]
        else:
            os.environ[_SCOTCH_THREADS] = before


def _say_if_simple(members: Members, parameters: Mapping[str, Any]) -> None:
    """Warn on the first rank where PETSc has no graph partitioner."""
    from firedrake.petsc import DEFAULT_PARTITIONER

    if parameters.get("partitioner_type") is None and DEFAULT_PARTITIONER == "simple" and members.comm.rank == 0:
        logger.warning(
            "PETSc has none of the partitioners PT-Scotch, ParMETIS and Chaco: meshes are cut by the order of their "
            "cells, which makes ranks in space exchange more than necessary (configure PETSc with --with-ptscotch)"
        )


# -- parts -------------------------------------------------------------------------------------------------------------
def _topology(mesh: Any) -> Any:
    """The topology that was distributed: of the base of an extruded mesh, the coarsest mesh of a hierarchy."""
    topology = _meshes(mesh)[0].topology
    return getattr(topology, "_base_mesh", topology)


def _meshes(made: Any) -> list:
    """All meshes of a hierarchy, or the one mesh."""
    from firedrake import HierarchyBase, MeshGeometry

    meshes = list(made) if isinstance(made, HierarchyBase) else [made]
    for mesh in meshes:
        if not isinstance(mesh, MeshGeometry):
            raise InputTypeError(
                f"the function of st.mesh returned {type(mesh).__name__}: return a mesh or a hierarchy"
            )
    return meshes


def _parts_of(made: Any, comm: MPI.Comm) -> tuple[Parts | None, bool]:
    """Parts of the cells that were on this rank before the distribution, and whether to keep the mesh (collective).

    No parts where the mesh was not distributed by Firedrake. Where the partitioner leaves a rank without cells, the
    cells are divided in their order, and the mesh is to be made again.
    """
    topology = _topology(made)
    forest, own = getattr(topology, "sfBC_orig", None), topology.cell_set.size
    counts = comm.allgather(own)
    if sum(counts) < comm.size:
        raise InputError(
            f"a mesh of {sum(counts)} cells for {comm.size} ranks in space: use at most one rank per cell, or a finer "
            "mesh"
        )
    if any_rank(comm, forest is None):
        return None, True
    _, local, remote = forest.getGraph()
    rank, point = np.reshape(remote, (-1, 2))[local < own].T  # cells are numbered before all other points
    found = comm.alltoall([np.sort(point[rank == r]) for r in range(comm.size)])
    sizes = np.array([len(points) for points in found])
    keep, serial = min(counts) > 0, all(n == 0 for n in comm.allgather(sizes.sum())[1:])
    if not keep and serial:
        return Parts(np.diff(split_steps(int(sizes.sum()), comm.size)), np.sort(np.concatenate(found))), False
    return Parts(sizes, np.concatenate(found)), True


# -- comparison --------------------------------------------------------------------------------------------------------
def require_same_meshes(members: Members, made: Any) -> None:
    """Require the same parts and the same numbering of a mesh, or all meshes of a hierarchy, on all members.

    Parameters
    ----------
    members
        The ranks; collective over all of them.
    made
        The own member's mesh or hierarchy.

    Raises
    ------
    InputError
        On every rank, if connectivity or coordinates differ between ranks of one place in the members.
    """
    meshes = collectively(members.comm, "", _meshes, made)
    if not members.several:
        return
    found = [_numbers(mesh) for mesh in meshes]
    cells = float(digest([number for number, _ in found]) >> 10)  # 53 bits, exact as a float
    sketches = np.concatenate([sketch for _, sketch in found])
    differ = members.spread(np.array([cells])).any()  # also where members have different numbers of meshes
    if not any_rank(members.comm, differ):
        differ = (members.spread(sketches) > _RTOL * np.repeat(sketches[::2], 2)).any()
    if any_rank(members.comm, differ):
        raise InputError(
            "the groups of ranks in space do not have the same parts of the mesh, or number them differently: make it "
            "by st.mesh, such as st.mesh(UnitSquareMesh, 8, 8), with the same arguments and data on all ranks"
        )


def _numbers(mesh: MeshGeometry) -> tuple[int, np.ndarray]:
    """A digest of a mesh's connectivity; norm and a weighted sum of its coordinates, which may differ by round-off."""
    nodes = mesh.coordinates.cell_node_map().values_with_halo
    x = np.ravel(mesh.coordinates.dat.data_ro_with_halos)
    weights = np.cos(np.arange(x.size, dtype=float) ** 2)
    return digest([mesh.cell_set.size, len(x), nodes]), np.array([np.linalg.norm(x), weights @ x])
