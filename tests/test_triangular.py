"""Triangular factors by panels against dense algebra, for random matrices of many patterns."""

import gc
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
from firedrake import BoxMesh, FunctionSpace, TestFunction, TrialFunction, UnitSquareMesh, assemble, dx, grad, inner
from scipy.sparse import csc_matrix, csr_matrix, diags, eye_array, tril

from pint_fem.kernels.lanes import structures, triangular
from pint_fem.kernels.lanes.triangular import Lower, TriangularFactors, fill_reducing_order
from pint_fem.kernels.replication import whole_matrix
from tests.random_matrices import REGULAR, ill_scaled, regular

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 33, 47, 60]


def condition(A):
    return np.linalg.cond(A.toarray())


def close(x, y, A):
    """Whether solutions agree up to round-off of a backward stable solve."""
    return np.abs(x - y).max() <= 1e-13 * max(10.0, condition(A)) * np.abs(y).max()


def test_there_is_a_compiler():
    """Without kernels every test here would be left out in silence."""
    assert structures.kernels() is not None


@pytest.mark.parametrize("kind", REGULAR)
def test_factors_solve(kind):
    """Plain and transposed, in the order found and in that of a factor of the same pattern."""
    for n in SIZES:
        for seed in range(3):
            A, symmetric = regular(kind, n, seed)
            b = np.random.default_rng(seed).standard_normal(n)
            factors = TriangularFactors(A, symmetric=symmetric)
            assert sorted(factors.order) == list(range(n))
            rng = np.random.default_rng(seed + 7)
            other = A.copy()
            change = rng.uniform(0.99, 1.01, n)
            other = csr_matrix(diags(change) @ A @ diags(change if symmetric else rng.uniform(0.99, 1.01, n)))
            for B, f in ((A, factors), (other, TriangularFactors(other, symmetric=symmetric, order=factors.order))):
                assert close(f.solve(b), np.linalg.solve(B.toarray(), b), B), (n, seed)
                assert close(f.solve(b, transposed=True), np.linalg.solve(B.toarray().T, b), B), (n, seed)
                assert np.array_equal(f.order, factors.order)


def test_symmetric_factors_are_stored_once():
    for kind, once in (("spd", True), ("indefinite", True), ("nonsymmetric", False)):
        A, symmetric = regular(kind, 30, 0)
        factors = TriangularFactors(A, symmetric=symmetric)
        assert (factors.left is factors.right) == once
        both = [factors.left] if once else [factors.left, factors.right]
        assert factors.nbytes == sum(part.nbytes for part in both) + 8 * 30


def test_a_matrix_that_is_not_symmetric_as_was_claimed_is_solved_all_the_same():
    """The trial solve shows that the factors are not those of the matrix."""
    A, _ = regular("nonsymmetric", 20, 1)
    b = np.arange(20.0)
    assert close(TriangularFactors(A, symmetric=True).solve(b), np.linalg.solve(A.toarray(), b), A)


def test_pivots_that_are_small_but_not_zero():
    """Diagonal entries of 1e-20 beside ones of order one: elimination without pivots would lose all digits."""
    A = csr_matrix([[1e-20, 1.0, 0.0], [1.0, 1e-20, 0.5], [0.0, 0.5, 1.0]])
    for symmetric in (True, False):
        x = TriangularFactors(A, symmetric=symmetric).solve(np.array([1.0, 2.0, 3.0]))
        assert np.allclose(A @ x, [1.0, 2.0, 3.0], rtol=1e-13)


@pytest.mark.parametrize("A", [[[1e-310, 1.0], [1.0, 1.0]], [[1e-200, 1e200], [1e200, 1.0]]])
def test_elimination_without_pivots_that_overflows(A):
    """A pivot, or its inverse, is not finite: the matrix is factored with pivots, without a warning."""
    b = np.array([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = TriangularFactors(csr_matrix(A), symmetric=True, order=np.arange(2)).solve(b)
    assert np.allclose(np.array(A) @ x, b, rtol=1e-12)


def test_rows_of_another_scale_are_not_less_accurate():
    """Errors relative to each solution of the matrix without the scales; a norm over all rows would see the largest."""
    for n in (3, 8, 20, 45):
        for seed in range(4):
            b = np.random.default_rng(seed).standard_normal(n)
            A, d = ill_scaled(n, seed, symmetric=False)
            factors = TriangularFactors(csr_matrix(diags(d) @ A), symmetric=False)
            assert close(factors.solve(d * b), np.linalg.solve(A.toarray(), b), A)
            assert close(d * factors.solve(b, transposed=True), np.linalg.solve(A.toarray().T, b), A)
            A, d = ill_scaled(n, seed, symmetric=True)
            factors = TriangularFactors(csr_matrix(diags(d) @ A @ diags(d)), symmetric=True)
            assert close(d * factors.solve(d * b), np.linalg.solve(A.toarray(), b), A)


def test_a_field_of_small_units_that_needs_pivots():
    """The trial solve tests each row on its own scale: in the norm of all rows, garbage in these ones is round-off."""
    small, pivots = 1e-12, np.array([[1e-20, 1.0], [1.0, 1.0]])
    A = np.kron(np.eye(3), pivots) * small
    A = csr_matrix(np.block([[np.diag([1e3, 2e3]), np.zeros((2, 6))], [np.zeros((6, 2)), A]]))
    x = np.arange(1.0, 9.0)
    found = TriangularFactors(A, symmetric=True, order=np.arange(8)).solve(A @ x)
    assert np.allclose(found, x, rtol=1e-10)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "A",
    [np.zeros((1, 1)), np.zeros((4, 4)), np.ones((3, 3)), np.diag([1.0, 0.0, 2.0]),
     np.array([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]]), np.diag(np.ones(3), 1)],
)  # fmt: skip
def test_singular_matrices(A, symmetric):
    with pytest.raises(ArithmeticError):
        TriangularFactors(csr_matrix(A), symmetric=symmetric and np.array_equal(A, A.T))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_matrices_that_are_not_finite(value):
    A = regular("spd", 9, 0)[0].toarray()
    A[4, 4] = value
    with pytest.raises(ArithmeticError):
        TriangularFactors(csr_matrix(A), symmetric=True)


def test_stored_zeros_duplicates_and_unsorted_rows():
    """A matrix is what its entries add up to, and is not changed."""
    rows, columns = [2, 0, 1, 0, 2, 1, 0, 0], [0, 2, 1, 0, 2, 0, 0, 1]
    values = [1.0, 0.5, 3.0, 2.0, 4.0, 0.0, 2.0, -1.0]
    ptr, order = [0, 4, 6, 8], np.argsort(rows, kind="stable")
    A = csr_matrix((np.array(values)[order], np.array(columns)[order], ptr), shape=(3, 3))
    before = A.data.copy(), A.indices.copy(), A.indptr.copy()
    dense = A.toarray()
    x = TriangularFactors(A, symmetric=False).solve(np.array([1.0, 2.0, 3.0]))
    assert np.allclose(dense @ x, [1.0, 2.0, 3.0])
    assert all(np.array_equal(a, b) for a, b in zip(before, (A.data, A.indices, A.indptr), strict=True))


# -- panels ------------------------------------------------------------------------------------------------------------
def unpacked(L):
    """The dense matrix that panels store, without the diagonal."""
    out = np.zeros((L.n + 1, L.n + 1))
    for s in range(L.panels):
        c0, c1 = L.starts[s : s + 2]
        w = c1 - c0
        out[c0:c1, c0:c1] += L.triangles[L.triangle_ptr[s] :][: w * w].reshape(w, w)
        rows = L.rows[L.row_ptr[s] : L.row_ptr[s + 1]].reshape(-1, 4)
        tiles = L.tiles[L.tile_ptr[s] :][: 4 * w * len(rows)].reshape(-1, w, 4)
        for at, tile in zip(rows, tiles, strict=True):
            for i, row in enumerate(at):
                out[row, c0:c1] += tile[:, i]
    assert not out[-1].any()
    return out[:-1, :-1]


@pytest.mark.parametrize("costs", [None, (0.0, 0.0, 1.0), (1e6, 1e6, 1.0)], ids=["usual", "never merged", "widest"])
def test_panels_store_the_matrix(costs, monkeypatch):
    """For the usual estimate of costs, for the narrowest and for the widest panels; rows come by fours."""
    if costs is not None:
        monkeypatch.setattr(triangular, "COSTS", np.array(costs))
    widths, counts = set(), set()
    for n in range(1, 61):
        rng = np.random.default_rng(n)
        A = tril(regular(("spd", "dense", "arrow up", "upper band", "blocks")[n % 5], n, n)[0], -1, format="csc")
        if n % 3 == 0:  # columns without rows below, between others
            A = csc_matrix(A @ diags(rng.integers(0, 2, n).astype(float)))
            A.eliminate_zeros()
        L = Lower(A)
        assert np.array_equal(unpacked(L), A.toarray())
        assert L.starts[[0, -1]].tolist() == [0, n]
        assert (np.diff(L.starts) > 0).all()
        widths |= set(np.diff(L.starts).tolist())
        counts |= set(np.diff(L.row_ptr).tolist())
        assert not {count % 4 for count in counts} - {0}
    assert max(widths) <= 16
    assert costs is None or max(widths) == (16 if costs[0] else max(widths))
    if costs is None or costs[0]:
        assert len(widths) > 12
        assert 16 in widths
        assert 0 in counts


def test_bytes_of_panels_are_those_of_their_arrays():
    L = Lower(tril(regular("spd", 40, 3)[0], -1, format="csc"))
    assert L.nbytes == sum(a.nbytes for a in (L.starts, L.rows, L.row_ptr, L.triangles, L.tiles))
    before = L.nbytes
    L.struct(np.dtype(float))
    assert L.nbytes == before + sum(a.nbytes for a in (L.triangle_ptr, L.tile_ptr))
    L.struct(np.dtype(np.float32))
    assert L.nbytes >= before + (L.triangles.nbytes + L.tiles.nbytes) // 2


# -- finite elements ---------------------------------------------------------------------------------------------------
def fe_matrix(name, n):
    mesh = BoxMesh(n, n, n, 1, 1, 1) if "3-D" in name else UnitSquareMesh(n, n)
    family, degree = ("N1curl", 1) if "N1curl" in name else ("CG", 2 if "P2" in name else 1)
    V = FunctionSpace(mesh, family, degree)
    u, v = TrialFunction(V), TestFunction(V)
    form = inner(u, v) * dx + 0.01 * inner(grad(u), grad(v)) * dx
    if "advection" in name:
        form += u.dx(0) * v * dx
    return whole_matrix(assemble(form, mat_type="aij").petscmat)


@pytest.mark.parametrize(("name", "n"), [("P1", 12), ("P2", 8), ("N1curl", 8), ("advection", 10), ("P1 3-D", 5)])
def test_finite_element_matrices(name, n):
    A = fe_matrix(name, n)
    factors = TriangularFactors(A, symmetric=name != "advection")
    assert factors.enter is None
    b = np.cos(np.arange(A.shape[0]) ** 2)
    dense = A.toarray()
    assert close(factors.solve(b), np.linalg.solve(dense, b), A)
    assert close(factors.solve(b, transposed=True), np.linalg.solve(dense.T, b), A)


def test_orders_reduce_the_fill():
    """Below the fill of the mesh's order and of a random one; the count is that of the factor."""
    A = csc_matrix(fe_matrix("P1", 20))
    n = A.shape[0]
    order, lu = fill_reducing_order(A)
    fill = triangular._fill(A, order)
    assert fill == lu.L.nnz - n
    assert fill < triangular._fill(A, np.random.default_rng(0).permutation(n)) / 4
    assert fill < triangular._fill(A, np.arange(n))


def test_fill_of_known_patterns():
    """A chain has none, an arrow all or none, a dense matrix n (n - 1) / 2."""
    n = 10
    chain = diags([np.ones(n - 1), np.ones(n), np.ones(n - 1)], [-1, 0, 1])
    arrow = eye_array(n).tolil()
    arrow[0], arrow[:, 0] = 1.0, 1.0
    for A, order, fill in (
        (chain, np.arange(n), n - 1),
        (arrow, np.arange(n), n * (n - 1) // 2),
        (arrow, np.arange(n)[::-1], n - 1),
        (csr_matrix(np.ones((n, n))), np.arange(n), n * (n - 1) // 2),
        (eye_array(n), np.arange(n), 0),
    ):
        assert triangular._fill(csc_matrix(A), order) == fill


# -- memory ------------------------------------------------------------------------------------------------------------
def test_factors_are_freed():
    """Thousands of factors: no array, struct or list of the C code stays."""
    matrices = [regular(kind, 60, 0) for kind in ("dense", "saddle", "spd")]

    def make(count):
        for _ in range(count):
            for A, symmetric in matrices:
                factors = TriangularFactors(A, symmetric=symmetric)
                factors.struct(np.dtype(np.float32))
        gc.collect()

    make(50)
    before = resident_bytes()
    make(500)
    size = sum(TriangularFactors(A, symmetric=symmetric).nbytes for A, symmetric in matrices)
    assert resident_bytes() - before < 0.2 * 500 * size


def resident_bytes():
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
