"""Solvers of large systems on the ranks in space, as a user meets them: diagonal matrices, and ranks without memory."""

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, SpatialCoordinate, TestFunction, TrialFunction, assemble, dx, inner
from mpi4py import MPI

import pint_fem.kernels.direct
import pint_fem.kernels.space.choice as choice
import pint_fem.kernels.space.substructuring as substructuring
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.space.conjugate_gradients import ConjugateGradients
from pint_fem.kernels.space.hierarchies import geometric_cycle
from pint_fem.kernels.space.matrices import BlockMatrix
from tests.limits import time_limit
from tests.test_space_solvers import matrix_of, mesh_of, residuals, sources


@pytest.fixture(autouse=True)
def _all_systems_are_large(monkeypatch):
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)


@pytest.mark.parallel([1, 2, 3])
def test_diagonal_matrices_are_solved_by_a_division():
    """The mass matrix of piecewise constants on cells of many sizes: the round-off of the division is no residual."""
    mesh = mesh_of(2, 9)
    x = SpatialCoordinate(mesh)
    moved = Function(mesh.coordinates.function_space()).interpolate(x + x[0] * x / 3)
    mesh.coordinates.assign(moved)
    V = FunctionSpace(mesh, "DG", 0)
    A = assemble(inner(TrialFunction(V), TestFunction(V)) * dx, mat_type="aij").petscmat
    for few in (False, True):
        factor = Factor(A, {}, symmetric=True, geometry=Geometry(V), few=few)
        if factor.blocks is None:  # on one rank, where it is factored
            assert MPI.COMM_WORLD.size == 1
            assert not few
            continue
        B = sources(A, 9)
        diagonal = A.getDiagonal().array_r
        assert np.allclose(factor.solve_rows(B), B / diagonal, rtol=1e-15, atol=0)
        assert factor.blocks.method.iterations == 0


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("what", ["order", "tree", "schur"])
@time_limit(60)
def test_a_rank_without_memory_for_factors_leaves_none_waiting(what, monkeypatch):
    """All ranks take another solver where one cannot allocate."""
    A, geometry = matrix_of(mesh_of(2, 10))

    def fails(*args, **kwargs):
        raise MemoryError

    if MPI.COMM_WORLD.rank == 1:
        if what == "order":
            monkeypatch.setattr(substructuring, "nested_dissection", fails)
        elif what == "tree":
            monkeypatch.setattr(substructuring.Partition, "tree", fails)
        else:
            monkeypatch.setattr(substructuring, "_rows_of_inverse", fails)
    factor = Factor(A, {}, symmetric=True, geometry=geometry)
    assert not isinstance(factor.blocks, substructuring.Substructuring)
    B = sources(A, 2)
    assert residuals(A, factor.solve_rows(B), B) < 1e-10


@pytest.mark.parallel([1, 2])
def test_bytes_of_multigrid_are_those_of_its_arrays():
    """Patches and smoothers are counted, and a level has one copy of its matrix."""
    from firedrake import MeshHierarchy

    A, geometry = matrix_of(MeshHierarchy(mesh_of(2, 4), 1)[-1], "N1curl")
    cycle = geometric_cycle(A, geometry)
    (level,) = cycle.levels
    assert level.matrix is level.smoother.matrix
    parts = level.matrix, level.smoother._patches, level.interpolation, level.restriction
    before = cycle.nbytes
    assert before >= sum(part.nbytes for part in parts)
    block = BlockMatrix.of_petsc(A)
    solver = choice.Iterative(ConjugateGradients(block, MPI.COMM_WORLD, cycle), "multigrid")
    solver.solve(sources(A, 1))
    assert solver.nbytes > before + block.nbytes
