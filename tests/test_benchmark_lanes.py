"""The benchmark of kernels on lanes: its operations are right, its table is whole."""

import numpy as np
import pytest
from firedrake import COMM_SELF, FunctionSpace, UnitSquareMesh

from pint_fem.kernels.lanes.structures import kernels
from tests.benchmarks.lanes import Case, Peaks, System, block_rows, roofline

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiler")


@pytest.fixture(scope="module")
def system():
    return System(FunctionSpace(UnitSquareMesh(6, 6, comm=COMM_SELF), "CG", 1))


def test_solves_and_products_are_those_of_the_matrices(system):
    """By residuals: of PETSc's block, of lanes, and of several solves in one step."""
    A = np.array([system.matrix[i, j] for i in range(system.n) for j in range(system.n)]).reshape(system.n, system.n)
    system.petsc_block()()
    assert np.allclose(A @ system.solutions.getDenseArray(), system.states[:8].T, atol=1e-13)
    for width, solves in ((1, 1), (16, 2)):
        system.lanes(width, solves=solves)()
        b = np.linalg.matrix_power(A, solves) @ system.results[:, 0].T
        assert np.allclose(b, system.states[:width].T, atol=1e-12)


def test_rows_have_their_targets(system):
    rows = block_rows(Case("small", None, 6, 1.8), system, 1)
    assert [r.target for r in rows] == [None, None, None, 6, 1.8]
    assert all(r.ratio == pytest.approx(r.theirs / r.ours) and r.ours > 0 for r in rows)
    best = max(r.ratio for r in rows[:3])
    assert rows[3].ratio == best


def test_roofline_counts_operations(system):
    """Of a product two for each entry; a state's share of the matrix is smaller on more lanes."""
    found = {(k.name, k.lanes): k for k in roofline(system, Peaks(), 1)}
    assert {lanes for _, lanes in found} == {1, 8, 16, 32}
    product = found["product", 8]
    assert product.operations == 2 * system.mass.nnz
    assert found["product", 8].nbytes - found["product", 16].nbytes == pytest.approx(12 * system.mass.nnz / 16)
    assert found["triangular solves", 8].operations == 4 * system.factors.left.entries + system.n
    assert found["transposes in and out", 8].nbytes == 32 * system.n
