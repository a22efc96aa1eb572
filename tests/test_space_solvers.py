"""Solvers of large systems on the ranks in space: by substructuring, conjugate gradients and multigrid on blocks."""

import numpy as np
import pytest
from firedrake import (
    BoxMesh,
    Constant,
    DirichletBC,
    FunctionSpace,
    MeshHierarchy,
    TestFunction,
    TrialFunction,
    UnitCubeMesh,
    UnitSquareMesh,
    assemble,
    curl,
    div,
    dx,
    grad,
    inner,
)
from firedrake.petsc import PETSc
from mpi4py import MPI
from scipy.sparse import csr_matrix, random

import pint_fem.kernels.direct
import pint_fem.kernels.space.choice as choice
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.lanes.multifrontal import EliminationTree, eliminate
from pint_fem.kernels.lanes.ordering import nested_dissection
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.replication import whole_matrix
from pint_fem.kernels.space.conjugate_gradients import ConjugateGradients
from pint_fem.kernels.space.hierarchies import algebraic_cycle, geometric_cycle
from pint_fem.kernels.space.matrices import BlockMatrix
from pint_fem.kernels.space.substructuring import Partition, Substructuring
from tests.benchmarks.space_iterations import CASES, counts

OPERATORS = {"CG": grad, "N1curl": curl, "RT": div}


def mesh_of(dim, n):
    make = {2: UnitSquareMesh, 3: UnitCubeMesh}[dim]
    return make(*[n] * dim, distribution_parameters={"partitioner_type": "simple"})


def matrix_of(mesh, family="CG", degree=1, h=1e-2, fixed=True):
    """``M + h K`` with conditions, its space and the conditions."""
    V = FunctionSpace(mesh, family, degree)
    u, v, D = TrialFunction(V), TestFunction(V), OPERATORS[family]
    bcs = [DirichletBC(V, 0, 1 if family == "CG" else "on_boundary")] if fixed else []
    form = inner(u, v) * dx + Constant(h) * inner(D(u), D(v)) * dx
    return assemble(form, bcs=bcs, mat_type="aij").petscmat, Geometry(V, bcs)


def residuals(A, X, B):
    """Largest relative residual of some solutions."""
    x, b = A.createVecs()
    worst = 0.0
    for row, right in zip(X, B, strict=True):
        x.array[:] = row
        A.mult(x, b)
        b.array[:] -= right
        size = b.norm()
        b.array[:] = right
        worst = max(worst, size / b.norm())
    return worst


def sources(A, count, seed=0):
    rng = np.random.default_rng(seed + 100 * A.comm.rank)
    return rng.standard_normal((count, A.getLocalSize()[0]))


# -- dense fronts ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dim", "n", "kept"), [(2, 20, 0), (2, 20, 31), (3, 7, 0), (3, 7, 90), (2, 3, 5), (2, 3, 16)])
def test_fronts_give_the_factor_and_the_schur_complement(dim, n, kept):
    """Against dense algebra; the pattern's count of nonzeros bounds those of the factor."""
    A = whole_matrix(matrix_of(mesh_of(dim, n))[0])
    order = nested_dissection(A)
    tree = EliminationTree.of_pattern(A, order, kept)
    made = eliminate(A, tree)
    assert sorted(tree.order) == list(range(A.shape[0]))
    dense = A[tree.order][:, tree.order].toarray()
    m = len(order) - kept
    L = made.lower.toarray()[:, :m] + np.eye(len(order), m)
    assert np.allclose((L * made.diagonal) @ L[:m].T, dense[:, :m], rtol=0, atol=1e-14 * np.abs(dense).max())
    S = dense[m:, m:] - dense[m:, :m] @ np.linalg.solve(dense[:m, :m], dense[:m, m:])
    assert np.allclose(made.schur, S, rtol=0, atol=1e-13 * np.abs(dense).max())
    assert made.lower.nnz <= tree.fill


def test_a_tree_is_counted_up_to_a_limit():
    A = whole_matrix(matrix_of(mesh_of(2, 12))[0])
    order = nested_dissection(A)
    fill = EliminationTree.of_pattern(A, order).fill
    assert EliminationTree.of_pattern(A, order, most=fill // 2).fill > fill // 2


def test_fronts_refuse_indefinite_matrices():
    A = whole_matrix(matrix_of(mesh_of(2, 6))[0])
    B = csr_matrix(A - 2 * A.diagonal().max() * csr_matrix(np.eye(A.shape[0])))
    with pytest.raises(ArithmeticError, match="positive definite"):
        eliminate(B, EliminationTree.of_pattern(B, nested_dissection(B)))


# -- distributed matrices ----------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2, 3])
def test_products_are_petscs_for_any_number_of_states():
    """A rectangular matrix with empty rows; one exchange for all states, and the same bits for each alone."""
    comm = MPI.COMM_WORLD
    whole = random(37, 23, 0.2, format="csr", random_state=3)
    rows, columns = np.array_split(np.arange(37), comm.size)[comm.rank], np.array_split(np.arange(23), comm.size)
    own = columns[comm.rank]
    A = BlockMatrix.of_rows(comm, whole[rows], len(own))
    states = np.random.default_rng(1).standard_normal((21, 23))
    out = np.empty((21, len(rows)))
    A.product_of_rows(states[:, own], out)
    assert np.allclose(out, (whole @ states.T).T[:, rows], rtol=1e-13, atol=1e-13)
    for state, found in zip(states, out, strict=True):
        alone = np.empty((1, len(rows)))
        A.product_of_rows(state[None, own], alone)
        assert np.array_equal(alone[0], found)


# -- substructuring ----------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(("dim", "n", "family"), [(2, 12, "CG"), (3, 4, "CG"), (2, 5, "N1curl")])
def test_substructuring_solves_to_round_off(dim, n, family):
    """For some states at once, and the same bits for each alone."""
    A, _ = matrix_of(mesh_of(dim, n), family)
    partition = Partition.of_matrix(A)
    solver = Substructuring(partition, partition.tree())
    B = sources(A, 19)
    X = solver.solve(B)
    assert residuals(A, X, B) < 1e-13
    for i in (0, 18):
        assert np.array_equal(solver.solve(B[i : i + 1])[0], X[i])
    assert str(int(partition.counts.sum())) in solver.description
    assert solver.solve(B[:0]).shape == (0, B.shape[1])


@pytest.mark.parallel([2, 3])
def test_roots_and_determinants():
    """The product of the root with its transpose is the inverse, column by column; by dense algebra."""
    A, _ = matrix_of(mesh_of(2, 7))
    dense = whole_matrix(A).toarray()
    partition = Partition.of_matrix(A)
    solver = Substructuring(partition, partition.tree())
    own = solver.root(np.eye(len(dense)))
    root = np.concatenate(A.comm.tompi4py().allgather(own.T))
    assert np.allclose(root @ root.T @ dense, np.eye(len(dense)), rtol=0, atol=1e-11)
    assert solver.log_det == pytest.approx(np.linalg.slogdet(dense)[1], rel=1e-12)
    assert np.array_equal(solver.root(np.eye(len(dense))[3:4])[0], own[3])


@pytest.mark.parallel(3)
def test_ranks_without_interior_or_interface():
    """More ranks than the matrix has blocks of coupled unknowns, and a rank with a single row."""
    comm = MPI.COMM_WORLD
    sizes = [6, 1, 5]
    n, first = sum(sizes), sum(sizes[: comm.rank])
    dense = 4 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    rows = csr_matrix(dense[first : first + sizes[comm.rank]])
    A = PETSc.Mat().createAIJ(((sizes[comm.rank], n),) * 2, csr=(rows.indptr, rows.indices, rows.data), comm=comm)
    partition = Partition.of_matrix(A)
    solver = Substructuring(partition, partition.tree())
    B = sources(A, 3)
    assert residuals(A, solver.solve(B), B) < 1e-14


@pytest.mark.parallel([2, 3])
def test_indefinite_matrices_are_refused_on_all_ranks():
    A, _ = matrix_of(mesh_of(2, 6))
    A.shift(-0.5 * A.norm(PETSc.NormType.INFINITY))
    partition = Partition.of_matrix(A)
    with pytest.raises(ArithmeticError, match="positive definite"):
        Substructuring(partition, partition.tree())
    with pytest.raises(ArithmeticError):
        ConjugateGradients(BlockMatrix.of_petsc(A), MPI.COMM_WORLD, None).solve(sources(A, 1))


# -- multigrid ---------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    ("dim", "family", "degree", "coarse"),
    [(2, "CG", 1, 3), (2, "CG", 2, 3), (3, "CG", 1, 2), (2, "N1curl", 1, 3), (2, "N1curl", 2, 2), (2, "RT", 1, 3)],
)
def test_multigrid_converges(dim, family, degree, coarse):
    """Geometric multigrid, of all states as of each alone, and algebraic multigrid for Lagrange elements."""
    hierarchy = MeshHierarchy(mesh_of(dim, coarse), 2 if dim == 2 else 1)
    A, geometry = matrix_of(hierarchy[-1], family, degree)
    cycles = [geometric_cycle(A, geometry)]
    if family == "CG":
        cycles.append(algebraic_cycle(A, "test_"))
    for cycle in cycles:
        method = ConjugateGradients(BlockMatrix.of_petsc(A), MPI.COMM_WORLD, cycle)
        B = sources(A, 3)
        X = method.solve(B)
        assert method.iterations <= 20
        assert residuals(A, X, B) < 1e-10
        assert np.array_equal(method.solve(B[1:2])[0], X[1])


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == 2], ids=str)
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_iterations_do_not_grow(case, steps):
    """Over three refinements (four meshes) by at most 20 % for steps from the explicit limit of each mesh to 100 times
    that; by at most two where the step is that of the finest mesh, which is small for the others.
    """
    found = counts(*case, steps, 4)
    assert found["own"][-1] <= 1.2 * found["own"][0], found
    assert max(found["finest"]) <= found["finest"][0] + 2, found


@pytest.mark.parametrize(("family", "degree", "most"), [("CG", 1, 1.2), ("CG", 2, 1.2), ("N1curl", 1, 1.4)])
def test_iterations_in_three_dimensions(family, degree, most):
    """On hierarchies along shortest diagonals, for the largest of these steps: by at most 20 % for heat; edge elements
    begin with some hundred unknowns, of which the coarsest level solves nearly all.
    """
    found = counts(3, family, degree, 2, 100, 3 if (family, degree) == ("CG", 1) else 2)
    assert found["own"][-1] <= most * found["own"][0], found


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_units_do_not_matter(scale):
    """Matrices and right-hand sides in other units, zero right-hand sides, and large boundary values."""
    A, geometry = matrix_of(MeshHierarchy(mesh_of(2, 4), 2)[-1])
    A.scale(scale)
    B = sources(A, 3) * np.array([[1e-8], [0.0], [1e8]])
    method = ConjugateGradients(BlockMatrix.of_petsc(A), MPI.COMM_WORLD, geometric_cycle(A, geometry))
    X = method.solve(B)
    assert not X[1].any()
    assert residuals(A, X[[0, 2]], B[[0, 2]]) < 1e-10


@pytest.mark.parallel(2)
@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_multigrid_of_matrices_beyond_single_precision(scale, monkeypatch):
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
    monkeypatch.setattr(choice, "LARGEST_FACTOR", 0)
    monkeypatch.setattr(choice, "MOST_DIAGONAL", 5)
    A, geometry = matrix_of(mesh_of(2, 16), h=1.0, fixed=False)
    A.scale(scale)
    factor = Factor(A, {}, symmetric=True, geometry=geometry)
    assert "multigrid" in factor.description
    B = sources(A, 2)
    assert residuals(A, factor.solve_rows(B), B) < 1e-10


@pytest.mark.parallel([1, 2])
def test_boundary_values_do_not_hide_the_inside():
    """The residual of the inside is reduced beside boundary values that are much larger."""
    A, geometry = matrix_of(MeshHierarchy(mesh_of(2, 4), 2)[-1])
    B = 1e-8 * sources(A, 1)
    fixed = np.unique(geometry.bcs[0].nodes)
    own = fixed[fixed < B.shape[1]]
    B[0, own] = 1e6
    method = ConjugateGradients(BlockMatrix.of_petsc(A), MPI.COMM_WORLD, geometric_cycle(A, geometry))
    X, zero = method.solve(B), B.copy()
    zero[0, own] = 0
    # columns of conditions are zero, so that the inside does not depend on them
    inside = np.setdiff1d(np.arange(B.shape[1]), own)
    expected = method.solve(zero)
    assert np.allclose(X[0, inside], expected[0, inside], rtol=0, atol=1e-10 * np.abs(expected).max(initial=0) + 1e-300)
    assert np.allclose(X[0, own], 1e6, rtol=1e-15)


# -- the choice --------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("reproducible", [False, True])
def test_factors_of_large_systems_are_on_blocks(reproducible, monkeypatch):
    """One state and several, transposed ones too; the description names the solver."""
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
    A, geometry = matrix_of(mesh_of(2, 16))
    factor = Factor(A, {}, symmetric=True, geometry=geometry, reproducible=reproducible)
    assert factor.triangular is None
    assert factor.is_direct
    assert "substructuring" in factor.description
    B = sources(A, 5)
    for transposed in (False, True):
        X = factor.solve_rows(B, transposed=transposed)
        assert residuals(A, X, B) < 1e-13
    x, b = A.createVecs()
    b.array[:] = B[2]
    factor.solve(b, x)
    assert np.array_equal(x.array_r, X[2])
    assert factor.nbytes["kernels"] > 0


@pytest.mark.parallel([1, 2])
def test_few_solves_with_a_mass_matrix_take_no_factorisation(monkeypatch):
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
    for family, degree in (("CG", 1), ("CG", 2)):
        A, geometry = matrix_of(mesh_of(2, 12), family, degree, h=0.0, fixed=False)
        factor = Factor(A, {}, symmetric=True, geometry=geometry, few=True)
        assert "inverse diagonal" in factor.description
        assert not factor.is_direct
        B = sources(A, 2)
        assert residuals(A, factor.solve_rows(B), B) < 1e-11


@pytest.mark.parallel(2)
def test_multigrid_where_factors_are_large(monkeypatch):
    """Without room for factors: on a hierarchy geometric multigrid, else algebraic; neither if reproducible."""
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
    monkeypatch.setattr(choice, "LARGEST_FACTOR", 0)
    monkeypatch.setattr(choice, "MOST_DIAGONAL", 5)
    for mesh, kind in ((MeshHierarchy(mesh_of(2, 8), 1)[-1], "geometric"), (mesh_of(2, 16), "algebraic")):
        A, geometry = matrix_of(mesh, h=1.0)
        factor = Factor(A, {}, symmetric=True, geometry=geometry)
        assert kind in factor.description
        B = sources(A, 2)
        assert residuals(A, factor.solve_rows(B), B) < 1e-10
        assert "multigrid" not in Factor(A, {}, symmetric=True, geometry=geometry, reproducible=True).description
    A, geometry = matrix_of(mesh_of(2, 8), "N1curl", h=1.0)  # no hierarchy for the patches
    assert Factor(A, {}, symmetric=True, geometry=geometry).blocks is None


@pytest.mark.parallel(2)
def test_parts_that_are_stretched_or_discontinuous():
    """Coefficients with a jump of 1e6 and cells with an aspect ratio of 50."""
    mesh = BoxMesh(6, 6, 6, 1.0, 1.0, 0.02, distribution_parameters={"partitioner_type": "simple"})
    V = FunctionSpace(mesh, "CG", 1)
    u, v, kappa = TrialFunction(V), TestFunction(V), Constant(1e6)
    A = assemble(inner(u, v) * dx + 1e-3 * kappa * inner(grad(u), grad(v)) * dx, mat_type="aij").petscmat
    partition = Partition.of_matrix(A)
    B = sources(A, 2)
    method = ConjugateGradients(BlockMatrix.of_petsc(A), MPI.COMM_WORLD, algebraic_cycle(A, "test_"))
    for solver in (Substructuring(partition, partition.tree()), method):
        X = solver.solve(B)
        size = A.comm.tompi4py().allreduce(float(np.abs(X).max()), op=MPI.MAX)
        # relative to the terms of the residual: 1e6 times the right-hand side
        assert residuals(A, X, B) < 1e-13 * A.norm(PETSc.NormType.INFINITY) * size
