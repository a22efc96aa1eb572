"""The solvers of distributed systems: every rank with the whole factor where systems are small, else iteration."""

import numpy as np
import pytest
from firedrake import FunctionSpace, TestFunction, TrialFunction, UnitSquareMesh, assemble, curl, dx, grad, inner
from firedrake.petsc import PETSc
from mpi4py import MPI

import pint_fem.kernels.direct
from pint_fem.kernels.blocks import Factor, StateBlock
from pint_fem.kernels.direct import REDUNDANT, default_solver, direct_solver


def curl_curl(n=6, mass=1.0):
    V = FunctionSpace(UnitSquareMesh(n, n, distribution_parameters={"partitioner_type": "simple"}), "N1curl", 1)
    u, v = TrialFunction(V), TestFunction(V)
    return assemble(mass * inner(u, v) * dx + 0.1 * inner(curl(u), curl(v)) * dx, mat_type="aij").petscmat


def advection_diffusion(n=6):
    V = FunctionSpace(UnitSquareMesh(n, n, distribution_parameters={"partitioner_type": "simple"}), "CG", 1)
    u, v = TrialFunction(V), TestFunction(V)
    return assemble(u * v * dx + 0.1 * inner(grad(u), grad(v)) * dx + u.dx(0) * v * dx, mat_type="aij").petscmat


def residual(A, x, b):
    r = b.copy()
    r.scale(-1.0)
    A.multAdd(x, r, r)
    return r.norm() / b.norm()


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("most", [REDUNDANT, 0], ids=["direct", "iterated"])
@pytest.mark.parametrize("make", [curl_curl, advection_diffusion])
def test_solves_to_round_off(make, most, monkeypatch):
    """One vector and a block, plain and transposed."""
    monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", most)
    A = make()
    factor = Factor(A, {}, symmetric=make is curl_curl)
    alone = A.comm.size == 1
    assert factor.ksp.getPC().getType() == ("redundant" if most else "asm") or alone
    x, b = A.createVecs()
    start, stop = b.getOwnershipRange()
    B, X = (StateBlock.zeros(A.getSizes()[0], A.comm) for _ in range(2))
    B.array[...] = np.sin(np.outer(np.arange(1, len(B.array) + 1), np.arange(start, stop) ** 2))
    for transposed in (False, True):
        matrix = A.transpose(PETSc.Mat()) if transposed else A
        factor.solve(B, X, transposed=transposed)
        for row, column in zip(B.array, X.array, strict=True):
            b.array[:] = row
            factor.solve(b, x, transposed=transposed)
            assert residual(matrix, x, b) < 1e-12
            x.array[:] = column
            assert residual(matrix, x, b) < 1e-12
    assert factor.nbytes["factors"] > factor.nbytes["matrices"] / 2


@pytest.mark.parallel(3)
def test_bits_do_not_change_from_run_to_run():
    """Of repeated solves, and of solvers that are set up again."""
    A = curl_curl()
    x, b = A.createVecs()
    start, stop = b.getOwnershipRange()
    b.array[:] = np.cos(np.arange(start, stop) ** 2)
    found = []
    for _ in range(3):
        factor = Factor(A, {}, symmetric=True)
        for _ in range(5):
            factor.solve(b, x)
            found.append(x.array_r.copy())
    assert all(np.array_equal(found[0], y) for y in found)


@pytest.mark.parallel([1, 3])
def test_symmetric_matrices_that_cholesky_spoils():
    """Pivots of 1e-17, which CHOLMOD takes without a word: another factorisation is found."""
    n = 40
    A = PETSc.Mat().createAIJ(((n, None), (n, None)), nnz=(2, 2), comm=MPI.COMM_WORLD)
    start, stop = A.getOwnershipRange()
    for i in range(start, stop, 2):
        A.setValues([i, i + 1], [i, i + 1], [1e-17, 1.0, 1.0, 1.0])
    A.assemble()
    factor = Factor(A, {}, symmetric=True)
    x, b = A.createVecs()
    b.array[:] = np.sin(np.arange(start, stop))
    factor.solve(b, x)
    assert residual(A, x, b) < 1e-12
    # a chain of such pairs is symmetric, and LU all the same: of L and U, not of L alone
    found = factor.nbytes["factors"]
    again = Factor(A, factor._parameters, symmetric=False)
    assert "cholesky" not in factor._parameters.values()
    assert found == again.nbytes["factors"] / 2  # which has a factor of the transpose as well


@pytest.mark.parallel([1, 3])
def test_factors_are_counted_as_they_are():
    """A dense matrix, of which all is known: CHOLMOD's own count of L, with the matrix that every rank has a copy of on
    several; twice the entries for LU; and asking again takes no other rank.
    """
    n = 120
    A = PETSc.Mat().createAIJ(((None, n), (None, n)), nnz=(n, n), comm=MPI.COMM_WORLD)
    start, stop = A.getOwnershipRange()
    D = np.cos(np.subtract.outer(np.arange(n), np.arange(n)) ** 2) + 2 * n * np.eye(n)
    A.setValues(np.arange(start, stop, dtype="i"), np.arange(n, dtype="i"), D[start:stop])
    A.assemble()
    copy = 12 * n * n + 4 * (n + 1) if A.comm.size > 1 else 0
    cholesky = Factor(A, {}, symmetric=True)
    assert 8 * n * n / 2 <= cholesky.nbytes["factors"] - copy <= 1.5 * 8 * n * n  # supernodes are dense squares
    lu = Factor(A, direct_solver(A.comm, n), symmetric=True)
    assert lu.nbytes["factors"] - copy == 12 * n * n
    if A.comm.rank == 0:
        assert cholesky.nbytes["factors"] > 0


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "parameters",
    [{"pc_type": "gamg"}, {"ksp_type": "gmres", "pc_type": "jacobi"}, {"ksp_type": "cg"}, {"pc_type": "cholesky"},
     {"ksp_rtol": 1e-13}, {"mat_type": "aij"}],
)  # fmt: skip
def test_a_few_options_are_completed(parameters):
    """What is left open iterates to round-off; only factorisations are applied once."""
    A = curl_curl()
    if A.comm.size > 1 and parameters.get("pc_type") == "cholesky":
        parameters = {**parameters, "pc_factor_mat_solver_type": "mumps"}
    factor = Factor(A, parameters, symmetric=True)
    x, b = A.createVecs()
    b.set(1.0)
    factor.solve(b, x)
    assert residual(A, x, b) < 1e-11


@pytest.mark.parallel([1, 3])
def test_large_systems_are_iterated_on():
    """Beyond the limit on several ranks only."""
    comm = MPI.COMM_WORLD
    assert direct_solver(comm, REDUNDANT)["ksp_type"] == "preonly"
    large = default_solver(comm, REDUNDANT + 1, spd=True)
    assert large["ksp_type"] == ("preonly" if comm.size == 1 else "cg")
    assert (direct_solver(comm, REDUNDANT + 1) is None) == (comm.size > 1)
