"""The solvers of distributed systems: every rank with the whole factor where systems are small, else iteration."""

import numpy as np
import pytest
from firedrake import FunctionSpace, TestFunction, TrialFunction, UnitSquareMesh, assemble, curl, dx, grad, inner
from firedrake.petsc import PETSc
from mpi4py import MPI

import pint_fem.kernels.direct
import pint_fem.kernels.factor
from pint_fem.kernels.direct import DISTRIBUTED, REDUNDANT, default_solver, direct_solver
from pint_fem.kernels.factor import Factor
from tests.solves import solutions


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


@pytest.fixture
def without_kernels(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setattr(pint_fem.kernels.factor, "kernels", lambda: None)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("way", ["kernels", "direct", "iterated"])
@pytest.mark.parametrize("make", [curl_curl, advection_diffusion])
def test_solves_to_round_off(make, way, monkeypatch, request):
    """One vector and several, plain and transposed."""
    if way == "direct":
        request.getfixturevalue("without_kernels")
    elif way == "iterated":
        monkeypatch.setattr(pint_fem.kernels.direct, "REDUNDANT", 0)
        monkeypatch.setattr(pint_fem.kernels.factor, "block_solver", lambda *args, **given: None)
    A = make()
    factor = Factor(A, {}, symmetric=make is curl_curl, reproducible=way == "iterated")
    alone = A.comm.size == 1
    assert (factor.triangular is not None) == (way == "kernels" or (way == "iterated" and alone))
    assert factor.is_direct == (way != "iterated" or alone)
    assert factor.ksp.getPC().getType() == ("asm" if way == "iterated" else "redundant") or alone
    x, b = A.createVecs()
    start, stop = b.getOwnershipRange()
    B = np.sin(np.outer(np.arange(1, 20), np.arange(start, stop) ** 2))
    for transposed in (False, True):
        matrix = A.transpose(PETSc.Mat()) if transposed else A
        X = solutions(factor, B, transposed=transposed)
        for row, column in zip(B, X, strict=True):
            b.array[:] = row
            factor.solve(b, x, transposed=transposed)
            assert residual(matrix, x, b) < 1e-12
            x.array[:] = column
            assert residual(matrix, x, b) < 1e-12
    size = factor.nbytes
    assert size["factors" if factor.triangular is None else "kernels"] > size["matrices"] / 2


@pytest.mark.parallel(3)
@pytest.mark.parametrize("broken", ["compiler", "factors"])
def test_kernels_are_used_on_all_ranks_or_on_none(broken, monkeypatch):
    """One rank has no compiler, or no memory for its factors: the solves that they share are PETSc's."""
    A = curl_curl()

    def fail(*args, **given):
        raise MemoryError

    if A.comm.rank == 1:
        name, replaced = ("kernels", lambda: None) if broken == "compiler" else ("TriangularFactors", fail)
        monkeypatch.setattr(pint_fem.kernels.factor, name, replaced)
    factor = Factor(A, {}, symmetric=True)
    assert factor.triangular is None
    x, b = A.createVecs()
    b.set(1.0)
    factor.solve(b, x)
    assert residual(A, x, b) < 1e-12


@pytest.mark.parallel(3)
@pytest.mark.parametrize("way", ["kernels", "direct"])
def test_bits_do_not_change_from_run_to_run(way, request):
    """Of repeated solves, and of solvers that are set up again."""
    if way == "direct":
        request.getfixturevalue("without_kernels")
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
@pytest.mark.parametrize("way", ["kernels", "direct"])
def test_symmetric_matrices_that_need_pivots(way, request):
    """Pivots of 1e-17, which CHOLMOD takes without a word: another factorisation is found."""
    if way == "direct":
        request.getfixturevalue("without_kernels")
    n = 40
    A = PETSc.Mat().createAIJ(((n, None), (n, None)), nnz=(2, 2), comm=MPI.COMM_WORLD)
    start, stop = A.getOwnershipRange()
    for i in range(start, stop, 2):
        A.setValues([i, i + 1], [i, i + 1], [1e-17, 1.0, 1.0, 1.0])
    A.assemble()
    factor = Factor(A, {}, symmetric=True)
    x, b = A.createVecs()
    b.array[:] = np.sin(np.arange(start, stop))
    for transposed in (False, True):
        factor.solve(b, x, transposed=transposed)
        assert residual(A, x, b) < 1e-12
        x.array[:] = solutions(factor, b.array_r[None], transposed=transposed)[0]
        assert residual(A, x, b) < 1e-12
    if way == "kernels":
        assert factor.triangular is not None
        assert not factor.triangular.symmetric
        return
    # a chain of such pairs is symmetric, and LU all the same: of L and U, not of L alone
    found = factor.nbytes["factors"]
    again = Factor(A, factor._parameters, symmetric=False)
    assert "cholesky" not in factor._parameters.values()
    assert found == again.nbytes["factors"] / 2  # which has a factor of the transpose as well


@pytest.mark.parallel([1, 3])
def test_factors_are_counted_as_they_are(without_kernels):
    """A dense matrix, of which all is known: CHOLMOD's own count of L, with the matrix that every rank has a copy of on
    several; twice the entries for LU; and asking again takes no other rank.
    """
    n = 120
    A = dense(n)
    copy = 12 * n * n + 4 * (n + 1) if A.comm.size > 1 else 0
    cholesky = Factor(A, {}, symmetric=True)
    assert 8 * n * n / 2 <= cholesky.nbytes["factors"] - copy <= 1.5 * 8 * n * n  # supernodes are dense squares
    lu = Factor(A, direct_solver(A.comm, n), symmetric=True)
    assert lu.nbytes["factors"] - copy == 12 * n * n
    if A.comm.rank == 0:
        assert cholesky.nbytes["factors"] > 0


@pytest.mark.parallel([1, 3])
def test_factors_for_the_kernels_are_counted_as_they_are():
    """Half of a dense matrix's entries for L, and as many for R where the matrix is not symmetric."""
    n = 120
    for skew in (0.0, 0.5):
        A = dense(n, skew)
        factor = Factor(A, {}, symmetric=not skew)
        entries = 8 * n * n / 2 * (2 if skew else 1)
        if A.comm.rank == 0:  # takes no other rank
            assert entries <= factor.nbytes["kernels"] <= 1.25 * entries  # triangles are squares


def dense(n, skew=0.0):
    """A dense matrix, symmetric without a skew part."""
    A = PETSc.Mat().createAIJ(((None, n), (None, n)), nnz=(n, n), comm=MPI.COMM_WORLD)
    start, stop = A.getOwnershipRange()
    D = np.cos(np.subtract.outer(np.arange(n), np.arange(n)) ** 2) + 2 * n * np.eye(n)
    D += skew * np.sin(np.subtract.outer(np.arange(n), np.arange(n)))
    A.setValues(np.arange(start, stop, dtype="i"), np.arange(n, dtype="i"), D[start:stop])
    A.assemble()
    return A


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
def test_large_systems_are_distributed():
    """Beyond the limit on several ranks only: by MUMPS, or an iteration where each run has to have the same bits."""
    comm = MPI.COMM_WORLD
    assert direct_solver(comm, REDUNDANT)["ksp_type"] == "preonly"
    large = default_solver(comm, REDUNDANT + 1, spd=True, reproducible=True)
    assert large["ksp_type"] == ("preonly" if comm.size == 1 else "cg")
    fastest = default_solver(comm, REDUNDANT + 1, spd=True)
    assert fastest["ksp_type"] == "preonly"
    assert fastest["pc_factor_mat_solver_type"] == ("cholmod" if comm.size == 1 else "mumps")
    assert default_solver(comm, DISTRIBUTED + 1)["ksp_type"] == ("preonly" if comm.size == 1 else "gmres")
    assert (direct_solver(comm, REDUNDANT + 1) is None) == (comm.size > 1)


def test_large_factors_are_left_to_petsc(monkeypatch):
    A = curl_curl()
    ours = Factor(A, {}, symmetric=True)
    monkeypatch.setattr(pint_fem.kernels.lanes.triangular, "LARGEST", 10)
    theirs = Factor(A, {}, symmetric=True)
    assert ours.triangular is not None
    assert theirs.triangular is None
    x, b = A.createVecs()
    b.array[:] = np.sin(np.arange(len(b.array)))
    for factor in (ours, theirs):
        factor.solve(b, x)
        assert residual(A, x, b) < 1e-12
