"""Meshes of ``SpaceTime.mesh``: parts of small surface and equal size, the same for all groups of ranks in space."""

from importlib import import_module

import numpy as np
import pytest
from mpi4py import MPI

pytest.importorskip("firedrake")

import firedrake as fd

import pint_fem as pf
from pint_fem.errors import InputError
from problems.meshfile import read_mesh
from problems.plate import BOUNDARIES, MESH, REGIONS
from tests.heat import heat
from tests.limits import time_limit
from tests.meshes import SIMPLE

COMM = MPI.COMM_WORLD
GRIDS = {1: ["1x1"], 2: ["2x1", "1x2"], 3: ["3x1", "1x3"], 4: ["4x1", "2x2", "2x1x2"]}[COMM.size]


def surface(mesh):
    """Number of vertices of owned cells of several ranks, counted once less than the ranks that have them."""
    nodes = mesh.coordinates.function_space()
    own = len(np.unique(mesh.coordinates.cell_node_map().values[: mesh.cell_set.size]))
    return mesh.comm.allreduce(own) - nodes.dim() // nodes.block_size


def sizes(mesh):
    return mesh.comm.allgather(mesh.cell_set.size)


def same_on_all_members(mesh, st):
    """Bitwise: cells by their nodes, the coordinates of these, and which nodes are owned."""
    mine = (
        mesh.coordinates.cell_node_map().values_with_halo.tobytes(),
        mesh.coordinates.dat.data_ro_with_halos.tobytes(),
        mesh.coordinates.dat.data_ro.shape,
    )
    return all(len(set(comm.allgather(mine))) == 1 for comm in (st.time_comm, st.experiments_comm))


def column(layers, comm, distribution_parameters):
    """A function of a user's own: an extruded mesh."""
    base = fd.UnitSquareMesh(4, 3, comm=comm, distribution_parameters=distribution_parameters)
    return fd.ExtrudedMesh(base, layers)


ON_FOUR = ("cube", "quadrilaterals", "sphere", "column", "read")
"""Meshes that four ranks make in the usual run: one for each kind of cell, and a file's. Two and three make all."""
MESHES = {
    "cube": (fd.UnitCubeMesh, (3, 3, 3), {}, 162),
    "hexahedra": (fd.UnitCubeMesh, (3, 3, 3), {"hexahedral": True}, 27),
    "quadrilaterals": (fd.UnitSquareMesh, (5, 4), {"quadrilateral": True}, 20),
    "interval": (fd.UnitIntervalMesh, (7,), {}, 7),
    "circle": (fd.PeriodicUnitIntervalMesh, (7,), {}, 7),
    "torus": (fd.PeriodicUnitSquareMesh, (4, 4), {}, 32),
    "periodic box": (fd.PeriodicUnitCubeMesh, (3, 3, 3), {}, 162),
    "sphere": (fd.UnitIcosahedralSphereMesh, (1,), {}, 80),
    "disk": (fd.UnitDiskMesh, (2,), {}, 128),
    "column": (column, (2,), {}, 24),
    "own numbering": (fd.UnitSquareMesh, (4, 4), {"reorder": False}, 32),
    "file": (fd.Mesh, (str(MESH),), {}, None),
    "read": (read_mesh, (MESH,), {"required_regions": REGIONS, "required_boundaries": BOUNDARIES}, None),
}


@pytest.mark.parallel([1, 2, 3, 4])
@time_limit(60)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.grid if COMM.size == 4 and n not in ON_FOUR else ()) for n in MESHES]
)
def test_all_members_have_the_same_parts(name):
    make, args, options, cells = MESHES[name]
    for grid in GRIDS[-2:]:  # of four ranks, those with two ranks in space
        st = pf.SpaceTime(grid)
        mesh = st.mesh(make, *args, **options)
        assert mesh.comm == st.space_comm
        assert same_on_all_members(mesh, st)
        assert min(sizes(mesh)) > 0
        if cells is not None:
            assert sum(sizes(mesh)) == cells


@pytest.mark.parallel([2, 3, 4])
@time_limit(60)
@pytest.mark.parametrize("dimension", [2, 3])
def test_parts_are_balanced_and_their_surface_is_small(dimension):
    """For two ranks the least surface is one face of the square or cube."""
    st = pf.SpaceTime(space=COMM.size)
    n = {2: 24, 3: 8}[dimension]
    make, face = {2: fd.UnitSquareMesh, 3: fd.UnitCubeMesh}[dimension], (n + 1) ** (dimension - 1)
    good = st.mesh(make, *[n] * dimension)
    simple = make(*[n] * dimension, comm=st.space_comm, distribution_parameters=SIMPLE)
    assert max(sizes(good)) <= 1.05 * np.mean(sizes(good))
    assert surface(good) <= 1.5 * (COMM.size - 1) * face
    if COMM.size == 4:  # simple parts of a box are slabs, which are best for two ranks
        assert surface(good) <= 0.75 * surface(simple)


@pytest.mark.parallel([2, 3])
@time_limit(60)
def test_parts_of_a_file_are_compact():
    """The triangles of a gmsh file are in no order of places, so that simple parts are scattered."""
    st = pf.SpaceTime(space=COMM.size)
    good, simple = st.mesh(read_mesh, MESH), read_mesh(MESH, st.space_comm, distribution_parameters=SIMPLE)
    assert max(sizes(good)) <= 1.05 * np.mean(sizes(good))
    assert surface(good) <= 0.1 * surface(simple)


@pytest.mark.parallel([2, 3, 4])
@time_limit(60)
def test_parts_are_the_same_in_each_call():
    """Whatever was partitioned before, and on any number of members."""
    found = []
    for n in range(3):
        for grid in GRIDS:
            st = pf.SpaceTime(grid)
            x = st.mesh(fd.UnitCubeMesh, 4, 4, 4).coordinates.dat.data_ro.copy()
            found.append((st.space_size, x.tobytes()))
        fd.UnitSquareMesh(5 + n, 5)  # takes random numbers
    assert len(set(found)) == len({size for size, _ in found})


# -- hierarchies -------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 3, 4])
@time_limit(60)
def test_refined_meshes_stay_with_their_parents():
    for grid in GRIDS[:2]:
        st = pf.SpaceTime(grid)
        overlap = {"overlap_type": (fd.DistributedMeshOverlapType.VERTEX, 1)}
        for meshes in (
            st.mesh_hierarchy(2, fd.UnitSquareMesh, 4, 4, distribution_parameters=overlap),
            st.mesh(lambda comm, distribution_parameters: fd.MeshHierarchy(
                fd.UnitSquareMesh(4, 4, comm=comm, distribution_parameters=distribution_parameters), 2
            )),
            fd.MeshHierarchy(st.mesh(fd.UnitSquareMesh, 4, 4), 2),
        ):  # fmt: skip
            assert len(meshes) == 3
            assert all(same_on_all_members(mesh, st) for mesh in meshes)
            own = [mesh.cell_set.size for mesh in meshes]
            assert own == [own[0], 4 * own[0], 16 * own[0]]
            assert meshes.comm.allreduce(own[0]) == 32
        skipping = st.mesh_hierarchy(1, fd.UnitSquareMesh, 4, 4, refinements_per_level=2)
        assert skipping[1].cell_set.size == own[2]


# -- numbers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parallel(4)
@time_limit(120)
def test_the_number_of_time_ranks_changes_no_bit():
    """States, adjoints, value and gradient on 2 x 2 ranks and on each pair of ranks alone."""

    many = pf.SpaceTime("2x2")
    found = []
    for st in (many, pf.SpaceTime("2x1", comm=many.space_comm)):
        ev = heat(st.mesh(fd.UnitSquareMesh, 5, 4), steps=6)
        misfit = pf.RunningMisfit(ev.u**2 * fd.dx)
        J = pf.TimeParallelReducedFunctional(ev, misfit, spacetime=st, solver_parameters={"time_solver": "serial"})
        found.append((J(J.controls[0].control), J.derivative().dat.data_ro.copy(), J.problem))
    (value, gradient, a), (expected, expected_gradient, b) = found
    lo, hi = a.sweeps.slab.lo, a.sweeps.slab.hi
    assert value == expected
    assert np.array_equal(a.U, b.U[lo : hi + 1])
    assert np.array_equal(a.L, b.L[lo : hi + 1])
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12)  # the sum of the slabs' parts, in another order


@pytest.mark.parallel([2, 3])
@time_limit(60)
def test_given_parts_and_partitioners_are_used():
    st = pf.SpaceTime(space=COMM.size)
    simple = fd.UnitSquareMesh(4, 4, comm=st.space_comm, distribution_parameters=SIMPLE)
    given = st.mesh(fd.UnitSquareMesh, 4, 4, distribution_parameters=SIMPLE)
    assert np.array_equal(given.coordinates.dat.data_ro, simple.coordinates.dat.data_ro)
    rest = [0] * (COMM.size - 1)
    parts = ([9, *[1] * (COMM.size - 2), 32 - 9 - (COMM.size - 2)], range(32)) if COMM.rank == 0 else ([0, *rest], [])
    own = st.mesh(fd.UnitSquareMesh, 4, 4, distribution_parameters={"partition": parts})
    assert sizes(own)[0] == 9


# -- what is refused ---------------------------------------------------------------------------------------------------
def one_cell(comm, distribution_parameters):
    return fd.UnitIntervalMesh(1, comm=comm, distribution_parameters=distribution_parameters)


def failing(comm, distribution_parameters):
    raise LookupError("no such geometry")


def moved(comm, distribution_parameters):
    """Another mesh on each rank in time."""
    mesh = one_cell(comm, distribution_parameters)
    mesh.coordinates.dat.data_wo[...] *= 1 + 1e-6 * COMM.rank
    return mesh


REFUSED = {
    "no function": (lambda st: st.mesh(fd.UnitSquareMesh(1, 1, comm=MPI.COMM_SELF)), "give the function that makes"),
    "communicator": (lambda st: st.mesh(fd.UnitSquareMesh, 4, 4, comm=COMM), "leave comm out"),
    "signature": (lambda st: st.mesh(lambda comm: None), "does not take distribution_parameters: give a function"),
    "parameters": (lambda st: st.mesh(fd.UnitSquareMesh, 4, 4, distribution_parameters="simple"), "give a dictionary"),
    "no mesh": (lambda st: st.mesh(lambda **given: 3), "returned int: return a mesh"),
    "levels": (lambda st: st.mesh_hierarchy(fd.UnitSquareMesh, 4, 4), "refinement_levels = .*give a whole number"),
    "per level": (lambda st: st.mesh_hierarchy(1, fd.UnitSquareMesh, 4, 4, refinements_per_level=0), "at least 1"),
}


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("what", REFUSED)
def test_wrong_arguments_are_refused(what):
    call, message = REFUSED[what]
    for grid in GRIDS:
        with pytest.raises(InputError, match=message):
            call(pf.SpaceTime(grid))


@pytest.mark.parallel([2, 3, 4])
@time_limit(60)
def test_what_fails_raises_on_all_ranks():
    for grid in GRIDS:
        st = pf.SpaceTime(grid)
        with pytest.raises(LookupError, match="no such geometry"):
            st.mesh(failing)
        with pytest.raises(InputError, match="not the same on all ranks"):
            st.mesh(fd.UnitSquareMesh, 4, 4 + COMM.rank)
        if st.space_size > 1:
            with pytest.raises(InputError, match=rf"mesh of 1 cells? for {st.space_size} ranks in space"):
                st.mesh(one_cell)
        else:
            with pytest.raises(InputError, match=r"not have the same parts of the mesh.*by st\.mesh"):
                st.mesh(moved)


@pytest.mark.parallel(4)
@time_limit(60)
@pytest.mark.parametrize("grid", ["2x2", "2x1x2"])
def test_a_functional_refuses_parts_that_differ(grid):
    """The first half of the cells is on the first rank of one member, the second half on that of the other."""
    st = pf.SpaceTime(grid)
    cells = np.arange(32, dtype=np.int32)[:: 1 if COMM.rank < 2 else -1].copy()
    parts = ([16, 16], cells) if st.space_comm.rank == 0 else ([0, 0], [])
    mesh = fd.UnitSquareMesh(4, 4, comm=st.space_comm, distribution_parameters={"partition": parts})
    ev = heat(mesh)
    experiments = pf.Experiments(ev, [({}, pf.RunningMisfit(ev.u**2 * fd.dx))] * 2)
    with pytest.raises(InputError, match=r"st\.mesh\(UnitSquareMesh, 8, 8\)"):
        pf.TimeParallelReducedFunctional(experiments, spacetime=st)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_a_petsc_without_graph_partitioners_is_reported(monkeypatch, log_lines):
    for module in (import_module("firedrake.petsc"), import_module("firedrake.mesh")):
        monkeypatch.setattr(module, "DEFAULT_PARTITIONER", "simple")
    st = pf.SpaceTime(space=COMM.size)
    mesh = st.mesh(fd.UnitSquareMesh, 4, 4)
    assert sum(sizes(mesh)) == 32
    expected = ["PETSc has none of the partitioners PT-Scotch, ParMETIS and Chaco"] if COMM.size > 1 else []
    assert [line[:64] for line in log_lines] == [line[:64] for line in expected if COMM.rank == 0]
