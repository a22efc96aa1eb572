"""Sparse complex systems of several frequencies at once, against numpy's dense solves."""

import platform

import numpy as np
import pytest
from mpi4py import MPI
from scipy.sparse import bmat, csr_matrix, identity, kron, random

from pint_fem.kernels.lanes import compiled
from pint_fem.kernels.lanes.compiled import DISABLE
from pint_fem.kernels.lanes.ordering import nested_dissection
from pint_fem.mgrit import SolverFailure
from pint_fem.paradiag import AlphaCirculant, ParaDiag, shifts
from pint_fem.paradiag.lane_kernels import WIDTHS, lane_kernels
from pint_fem.paradiag.panels import Panels, minimum_degree
from pint_fem.paradiag.sparse_system import SparseSystem
from pint_fem.paradiag.systems import FrequencyBlocks, ShiftedSteps
from pint_fem.paradiag.transforms import time_transform
from pint_fem.theory import dirk_stability
from tests.stepping import sequential
from tests.test_without_compiler import run

pytestmark = pytest.mark.skipif(lane_kernels("f", 4) is None, reason="no compiler")
KINDS = [(kind, width) for kind, widths in WIDTHS.items() for width in widths]
EPSILON = {"f": 2e-4, "d": 1e-12}
COMM = MPI.COMM_WORLD
G = 1 - 1 / np.sqrt(2)


def laplacian(n):
    """Five-point matrix on ``n x n`` points."""
    line = csr_matrix(np.diag(np.full(n, 2.0)) - np.diag(np.ones(n - 1), 1) - np.diag(np.ones(n - 1), -1))
    return csr_matrix(kron(line, identity(n)) + kron(identity(n), line))


def matrices(kind, n=7, seed=0):
    """``S`` and ``M``: symmetric, with boundary rows, or with another matrix than its transpose."""
    rng = np.random.default_rng(seed)
    K = laplacian(n)
    M = csr_matrix(4 * identity(n * n) + 0.3 * (identity(n * n) - 0.2 * K))
    S = csr_matrix(M + 0.7 * K)
    if kind == "convection":
        S.data += 0.2 * rng.standard_normal(S.nnz)
    if kind == "boundary":
        rows = np.array([0, 3, 4, 20])
        S, M = S.tolil(), M.tolil()
        S[rows], S[:, rows], M[rows] = 0, 0, 0
        S[rows, rows] = 1
    return csr_matrix(S), csr_matrix(M)


def solved(system, kernels, y, rows, *, transposed=False):
    """Solutions ``(w, batch, n)`` for right-hand sides of at most W shifts."""
    factor, _ = system.factor_lanes(kernels, y)
    padded = np.concatenate([y, np.repeat(y[-1:], kernels.width - len(y))])
    lanes = system.solve_lanes(kernels, factor, padded, kernels.to_lanes(rows), transposed=transposed)
    out = np.empty(rows.shape, kernels.complex)
    kernels.from_lanes(lanes, out)
    return out, factor


def right_hand_sides(count, batch, n, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, batch, n)) + 1j * rng.standard_normal((count, batch, n))


# -- the factors -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "width"), KINDS)
@pytest.mark.parametrize("matrix", ["symmetric", "boundary", "convection"])
@pytest.mark.parametrize("transposed", [False, True])
def test_solves_are_those_of_the_dense_matrices(matrix, kind, width, transposed):
    """For each frequency and each right-hand side of a batch, with a group that is not full, and boundary values."""
    (S, M), kernels = matrices(matrix), lane_kernels(kind, width)
    system, y = SparseSystem([S, M]), 0.9 * np.exp(1j * np.arange(max(width - 1, 1)))
    rows = right_hand_sides(len(y), 3, S.shape[0])
    found, factor = solved(system, kernels, y, rows, transposed=transposed)
    assert not factor.others
    assert system._lanes.is_symmetric == (matrix != "convection")
    assert (factor.upper is factor.lower) == (matrix != "convection")
    for k, shift in enumerate(y):
        A = (S - shift * M).toarray()
        exact = np.linalg.solve(A.T if transposed else A, rows[k].T).T
        np.testing.assert_allclose(found[k], exact, rtol=0, atol=EPSILON[kind] * np.abs(exact).max())


@pytest.mark.parametrize("kind", "fd")
@pytest.mark.parametrize("matrix", ["symmetric", "convection"])
def test_bits_depend_neither_on_the_lane_nor_on_the_width(matrix, kind):
    """All frequencies in one wide group, and each alone in the first and in the last lane of a narrow one."""
    S, M = matrices(matrix)
    wide, narrow = (lane_kernels(kind, width) for width in WIDTHS[kind])
    y = 0.9 * np.exp(1j * np.arange(wide.width))
    rows = right_hand_sides(len(y), 2, S.shape[0]).astype(wide.complex)
    together, _ = solved(SparseSystem([S, M]), wide, y, rows)
    for k in range(len(y)):
        other = (k + 3) % len(y)
        first, _ = solved(SparseSystem([S, M]), narrow, y[[k]], rows[[k]])
        pair, _ = solved(SparseSystem([S, M]), narrow, y[[other, k]], rows[[other, k]])
        alone, _ = solved(SparseSystem([S, M]), narrow, y[[k]], rows[[k], 1:])
        assert np.array_equal(first[0], together[k])
        assert np.array_equal(pair[1], together[k])
        assert np.array_equal(alone[0, 0], together[k, 1])


@pytest.mark.parametrize("mass", [0.0, 3.0])
@pytest.mark.parametrize("kind", "fd")
@pytest.mark.parametrize("transposed", [False, True])
def test_stages_with_boundary_rows(mass, kind, transposed):
    """``r + y (S - y M)^-1 M r``, where the mass of boundary values is zero or not, and its transpose."""
    S, M = matrices("boundary")
    boundary = [0, 3, 4, 20]
    M = M.tolil()
    M[boundary, boundary] = mass
    M, system, kernels = csr_matrix(M), SparseSystem([S, M]), lane_kernels(kind, WIDTHS[kind][1])
    y = np.exp(1j * np.arange(kernels.width)) / 2
    rows = right_hand_sides(kernels.width, 2, S.shape[0])
    factor, _ = system.factor_lanes(kernels, y)
    lanes = kernels.to_lanes(rows)
    system.step_lanes(kernels, factor, y, lanes, transposed=transposed)
    assert system._lanes.masks_boundary == (mass == 0)
    found = np.empty(rows.shape, kernels.complex)
    kernels.from_lanes(lanes, found)
    for k, shift in enumerate(y):
        step = np.eye(S.shape[0]) + shift * np.linalg.solve((S - shift * M).toarray(), M.toarray())
        exact = rows[k] @ (step if transposed else step.T)
        np.testing.assert_allclose(found[k], exact, rtol=0, atol=EPSILON[kind] * np.abs(exact).max())


@pytest.mark.parametrize("kind", "fd")
def test_a_frequency_that_requires_pivots(kind):
    """A zero pivot in one frequency of a group, and a saddle point, where every frequency has some."""
    kernels = lane_kernels(kind, WIDTHS[kind][0])
    S = csr_matrix(np.array([[1.0, 2, 0], [2, 1, 1], [0, 1, 3]]))
    M = csr_matrix(np.eye(3))
    y = np.array([0.5, 1.0, 0.2 + 0.3j])  # S - M has zeros on its diagonal
    rows = right_hand_sides(3, 2, 3)
    for transposed in (False, True):
        found, factor = solved(SparseSystem([S, M]), kernels, y, rows, transposed=transposed)
        assert len(factor.others) == 1
        for k, shift in enumerate(y):
            A = (S - shift * M).toarray()
            exact = np.linalg.solve(A.T if transposed else A, rows[k].T).T
            np.testing.assert_allclose(found[k], exact, rtol=0, atol=EPSILON[kind] * np.abs(exact).max())
    rng = np.random.default_rng(3)
    D, A = rng.standard_normal((4, 9)), np.diag(rng.uniform(1, 2, 9))
    S = csr_matrix(bmat([[A, D.T], [D, None]]))
    M = csr_matrix(bmat([[np.eye(9), np.zeros((9, 4))], [np.zeros((4, 9)), np.zeros((4, 4))]]))
    y, rows = 0.5 * np.exp(1j * np.arange(kernels.width)), right_hand_sides(kernels.width, 1, 13)
    found, _ = solved(SparseSystem([S, M]), kernels, y, rows)
    for k, shift in enumerate(y):
        exact = np.linalg.solve((S - shift * M).toarray(), rows[k].T).T
        np.testing.assert_allclose(found[k], exact, rtol=0, atol=EPSILON[kind] * np.abs(exact).max())


@pytest.mark.parametrize("kind", "fd")
@pytest.mark.parametrize("transposed", [False, True])
def test_stages_of_a_frequency_that_requires_pivots(kind, transposed):
    """One frequency of a group has another factor than the rest."""
    S, kernels = csr_matrix(np.array([[1.0, 2, 0], [2, 1, 1], [0, 1, 3]])), lane_kernels(kind, WIDTHS[kind][1])
    system, y, rows = SparseSystem([S, csr_matrix(np.eye(3))]), np.array([1.0, 0.5]), right_hand_sides(2, 2, 3)
    factor, _ = system.factor_lanes(kernels, y)
    assert len(factor.others) == 1
    padded = np.concatenate([y, np.repeat(y[-1:], kernels.width - 2)])
    lanes, found = kernels.to_lanes(rows), np.empty(rows.shape, kernels.complex)
    system.step_lanes(kernels, factor, padded, lanes, transposed=transposed)
    kernels.from_lanes(lanes, found)
    for k, shift in enumerate(y):  # symmetric
        exact = rows[k] @ (np.eye(3) + shift * np.linalg.inv(S.toarray() - shift * np.eye(3)))
        np.testing.assert_allclose(found[k], exact, rtol=0, atol=EPSILON[kind] * np.abs(exact).max())


def test_frequencies_that_are_not_accurate_in_single_precision_have_double():
    """Nearly singular matrices lose digits; their frequencies are solved to single precision's round-off."""
    S, M = matrices("symmetric")
    eigenvalue = np.linalg.eigvals(np.linalg.solve(M.toarray(), S.toarray())).real.min()
    y = np.array([eigenvalue * (1 - 1e-5), 0.3, 0.5j])
    rows, kernels = right_hand_sides(3, 1, S.shape[0]).astype(np.complex64), lane_kernels("f", 4)
    found, factor = solved(SparseSystem([S, M]), kernels, y, rows)
    ((lanes, other),) = factor.others
    assert lanes == [0]
    assert other.kernels.dtype == float
    exact = np.linalg.solve((S - y[0] * M).toarray(), rows[0, 0])
    assert np.abs(found[0, 0] - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("size", [1e-14, 1e12])
def test_matrices_of_any_size_in_single_precision(size):
    """Entries whose squares exceed the range of single precision."""
    S, M = (size**2 * X for X in matrices("symmetric"))
    y, kernels = np.array([0.3, 0.5j]), lane_kernels("f", 4)
    rows = right_hand_sides(2, 1, S.shape[0])
    found, factor = solved(SparseSystem([S, M]), kernels, y, rows * size**2)
    assert not factor.others
    for k, shift in enumerate(y):
        exact = np.linalg.solve((S - shift * M).toarray(), rows[k, 0] * size**2)
        np.testing.assert_allclose(found[k, 0], exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_pattern_of_the_factor_is_that_of_dense_elimination():
    """Panels have the rows of the exact fill, whatever the order, and nested dissection is an order."""
    rng, n = np.random.default_rng(5), 40
    X = random(n, n, 0.06, random_state=6)
    pattern = csr_matrix(X + X.T + identity(n))
    orders = [minimum_degree(pattern), rng.permutation(n)]
    metis = nested_dissection(pattern)
    if metis is not None:
        assert sorted(metis) == list(range(n))
        orders.append(metis)
    for order in orders:
        panels = Panels(lane_kernels("d", 2), pattern, order)
        dense = pattern[panels.order][:, panels.order].toarray() != 0
        for j in range(n):
            below = np.flatnonzero(dense[:, j] & (np.arange(n) > j))
            dense[np.ix_(below, below)] = True
        fill = np.tril(dense, -1)
        assert panels.entries == fill.sum()
        for p in range(panels.count):
            columns = range(panels.first[p], panels.first[p + 1])
            rows = panels.rows[panels.begin[p] : panels.begin[p + 1]]
            for j in columns:
                assert np.flatnonzero(fill[:, j]).tolist() == [*range(j + 1, columns.stop), *rows]


# -- the frequencies of steps ------------------------------------------------------------------------------------------
class Steps:
    """SDIRK2 steps of ``M u' + K u = 0``, by a dense matrix, and the systems of their frequencies."""

    A, b, dt = np.array([[G, 0], [1 - G, G]]), np.array([1 - G, G]), 0.7

    def __init__(self, memory=1e9):
        n, self.M = 6, matrices("symmetric", 6)[1]
        K = laplacian(n)
        w, V = np.linalg.eig(np.linalg.solve(self.M.toarray(), K.toarray()))
        self.Phi = (V * dirk_stability(self.A, self.b, -self.dt * w)) @ np.linalg.inv(V)
        system = SparseSystem([csr_matrix(self.M + G * self.dt * K), self.M])
        self.systems = ShiftedSteps(self.A, self.b, {G: system}, memory)

    def step(self, steps, u, out):
        for row, target in zip(u, out, strict=True):
            target[...] = self.Phi @ row


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_all_frequencies_of_steps(transposed, dtype):
    """``(I - mu_k Phi)^-1`` for 21 frequencies, for single states and for a batch; and one after the other."""
    steps, mu = Steps(), shifts(40, 1e-2)
    n = len(steps.Phi)
    rows = right_hand_sides(21, 3, n).astype(dtype)
    found = steps.systems.solve_all(range(21), mu, rows, transposed=transposed)
    assert found.dtype == dtype
    assert steps.systems.factorisations == steps.systems.kept == 2 * 21
    for k in range(21):
        A = np.eye(n) - mu[k] * (steps.Phi.T if transposed else steps.Phi)
        exact = np.linalg.solve(A, rows[k].T).T
        size = np.abs(exact).max()
        np.testing.assert_allclose(found[k], exact, rtol=0, atol=(1e-5 if dtype == np.complex64 else 1e-12) * size)
        one = steps.systems.solve_transposed if transposed else steps.systems.solve
        np.testing.assert_allclose(one(k, mu[k], rows[k, 0]), exact[0], rtol=0, atol=1e-6 * size)
    single = steps.systems.solve_all(range(3, 8), mu, rows[3:8, 1], transposed=transposed)
    assert np.array_equal(single, found[3:8, 1])  # another group, without a batch


def test_bits_do_not_depend_on_frequencies_of_the_group_that_have_other_factors():
    """Two frequencies in double precision and one by SuperLU: the others are solved as without these."""
    mu, rows, found = shifts(40, 1e-2), right_hand_sides(21, 2, 36).astype(np.complex64), []
    for parts in ([range(21)], [range(0, 5), range(5, 16), range(16, 21)]):
        steps = Steps()
        lanes, at = steps.systems.systems[0]._lanes, steps.systems._at
        special = {kind: [y for k in ks for y in at(k, mu[k])[1]] for kind, ks in {"f": (2, 9), "d": (9,)}.items()}
        lanes.inaccurate = lambda factor, special=special: [
            i for i, y in enumerate(factor.y[: factor.count]) if y in special[factor.kernels.dtype.char]
        ]
        found.append(np.concatenate([steps.systems.solve_all(p, mu, rows[p.start : p.stop]) for p in parts]))
    assert np.array_equal(*found)
    plain = Steps().systems.solve_all(range(21), mu, rows)
    others = [k for k in range(21) if k not in (2, 9)]
    assert np.array_equal(plain[others], found[0][others])
    for k in (2, 9):
        exact = np.linalg.solve(np.eye(36) - mu[k] * Steps().Phi, rows[k].T).T
        np.testing.assert_allclose(found[0][k], exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_memory_of_factors_on_lanes():
    """Groups that have no room are factored at each solve, to the same results."""
    mu, found = shifts(80, 1e-2), []
    rows = right_hand_sides(41, 1, 36).astype(np.complex64)
    complete = Steps().systems
    found.append(complete.solve_all(range(41), mu, rows))
    assert complete.kept == 2 * 41
    limit = 0.6 * complete.bytes
    limited = Steps(limit).systems
    found += [limited.solve_all(range(41), mu, rows) for _ in range(2)]
    assert 0 < limited.bytes <= limit
    assert 0 < limited.kept < 2 * 41
    assert limited.factorisations == limited.kept + 2 * (2 * 41 - limited.kept)
    assert all(np.array_equal(found[0], other) for other in found[1:])
    complete.release()
    assert (complete.bytes, complete.kept) == (0, 0)
    assert np.array_equal(complete.solve_all(range(41), mu, rows), found[0])


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("precision", ["single", "double"])
def test_same_bits_for_every_number_of_time_ranks(precision):
    """Iterates and residuals of ParaDiag on lanes, which solves to the tolerance in both precisions."""
    nsteps, steps, alone = 44, Steps(), Steps()
    rng = np.random.default_rng(2)
    u0, g = rng.standard_normal(36), rng.standard_normal((nsteps, 36))
    results, U = [], []
    for comm, its in ((COMM, steps), (MPI.COMM_SELF, alone)):
        bounds = [nsteps * r // comm.size for r in range(comm.size + 1)]
        lo, hi = bounds[comm.rank], bounds[comm.rank + 1]
        V = np.zeros((hi - lo + 1, 36))
        V[0] = u0 if lo == 0 else 0
        solver = ParaDiag(
            its, nsteps, its.systems.solve, options=dict(alpha=1e-3, rtol=1e-13, precision=precision), comm=comm,
            bounds=bounds, blocks=FrequencyBlocks(its.systems, transposed=False),
        )  # fmt: skip
        results.append(solver.solve(V, g[lo:hi]))
        assert results[-1].converged
        U.append(V)
        if comm is COMM:
            first = lo
    assert results[0].residuals == results[1].residuals
    assert np.array_equal(U[0][1:], U[1][first + 1 : first + len(U[0])])
    exact = sequential(steps, u0, nsteps, g)
    np.testing.assert_allclose(U[1], exact, rtol=0, atol=1e-11 * np.abs(exact).max())
    kinds = {key[2] for key in alone.systems._factors}
    assert kinds == {"f" if precision == "single" else "d"}


def test_precision_of_a_solve():
    """By default single to a tolerance; double for a number of iterations, and for a small ``alpha``."""
    for options, call, kinds in (
        ({}, {}, {"f"}),
        ({}, {"cycles": 2}, {"d"}),
        ({"alpha": 1e-6}, {}, {"d"}),
        ({"rtol": 0.0, "max_it": 2, "stagnation": None}, {}, {"d"}),
        ({"precision": "double"}, {}, {"d"}),
        ({"precision": "single"}, {"cycles": 2}, {"f"}),
    ):
        steps = Steps()
        blocks = FrequencyBlocks(steps.systems, transposed=False)
        solver = ParaDiag(steps, 20, steps.systems.solve, options=options, blocks=blocks)
        solver.solve(np.ones((21, 36)), **call)
        assert {key[2] for key in steps.systems._factors} == kinds


def test_without_a_compiler(monkeypatch):
    """The environment variable switches kernels off; SuperLU solves the same systems."""
    found = []
    for switch in (False, True):
        if switch:
            monkeypatch.setenv(DISABLE, "1")
            compiled._library.cache_clear()
        steps, U = Steps(), np.ones((41, 36))
        blocks = FrequencyBlocks(steps.systems, transposed=False)
        assert blocks.available != switch
        ParaDiag(steps, 40, steps.systems.solve, options=dict(rtol=1e-13), blocks=blocks).solve(U)
        assert all(len(key) == (2 if switch else 4) for key in steps.systems._factors)
        found.append(U)
    compiled._library.cache_clear()
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parallel([1, 2])
def test_a_rank_without_a_compiler(monkeypatch):
    """All ranks then solve one frequency after the other."""
    nsteps, steps = 24, Steps()
    bounds = [nsteps * r // COMM.size for r in range(COMM.size + 1)]
    lo, hi = bounds[COMM.rank], bounds[COMM.rank + 1]
    if COMM.rank == COMM.size - 1:
        monkeypatch.setattr("pint_fem.paradiag.circulant.lane_kernels", lambda kind, width: None)
    blocks, U = FrequencyBlocks(steps.systems, transposed=False), np.ones((hi - lo + 1, 36))
    solver = ParaDiag(
        steps, nsteps, steps.systems.solve, options=dict(rtol=1e-13), comm=COMM, bounds=bounds, blocks=blocks
    )
    solver.solve(U)
    assert all(len(key) == 2 for key in steps.systems._factors)
    exact = sequential(steps, np.ones(36), nsteps)
    np.testing.assert_allclose(U[1:], exact[lo + 1 : hi + 1], rtol=0, atol=1e-12)


@pytest.mark.parallel([1, 2])
def test_an_error_of_all_frequencies_is_reported():
    """A mistake in a program on one rank ends the solve on all; the next solve is well."""
    nsteps, steps, broken = 12, Steps(), [COMM.rank == COMM.size - 1]
    bounds = [nsteps * r // COMM.size for r in range(COMM.size + 1)]
    rows = bounds[COMM.rank + 1] - bounds[COMM.rank] + 1

    class Blocks(FrequencyBlocks):
        def __call__(self, *args):
            if broken[0]:
                raise KeyError("missing")
            super().__call__(*args)

    blocks = Blocks(steps.systems, transposed=False)
    solver = ParaDiag(steps, nsteps, steps.systems.solve, comm=COMM, bounds=bounds, blocks=blocks)
    with pytest.raises(KeyError if broken[0] else RuntimeError, match="missing"):
        solver.solve(np.ones((rows, 36)))
    broken[0] = False
    assert solver.solve(np.ones((rows, 36))).converged


def test_a_singular_frequency_is_named():
    """A matrix that no factorisation solves is reported with its frequency; the others are not blamed."""
    nsteps, steps = 12, Steps()
    system, factor = steps.systems.systems[0], steps.systems.systems[0].factor
    bad = shifts(nsteps, 1e-4)[4]
    at = steps.systems._at

    def fails(y):
        if any(abs(y - shift) < 1e-12 for shift in at(4, bad)[1]):
            raise RuntimeError("Factor is exactly singular")
        return factor(y)

    system.factor = fails
    system._lanes.inaccurate = lambda lanes: [k for k in range(lanes.count)] if lanes.kernels.dtype == float else [0]
    blocks = FrequencyBlocks(steps.systems, transposed=False)
    solver = ParaDiag(steps, nsteps, steps.systems.solve, options=dict(precision="double"), blocks=blocks)
    with pytest.raises(SolverFailure, match="frequency 4: RuntimeError: Factor is exactly singular"):
        solver.solve(np.ones((nsteps + 1, 36)))


def forward(transform, rows, *scale):
    out = np.empty((len(rows) // 2 + 1, rows.shape[1]), transform.complex)
    transform.forward(rows, out, *scale)
    return out


BITS = """
import hashlib
import numpy as np
from pint_fem.paradiag import shifts
from pint_fem.paradiag.lane_kernels import WIDTHS
from pint_fem.paradiag.transforms import time_transform
from tests.test_frequency_lanes import Steps, forward, right_hand_sides

digest, widths = hashlib.sha256(), dict(WIDTHS)
steps, mu, rows = Steps(), shifts(40, 1e-2), right_hand_sides(21, 2, 36)
for kind in "fd":
    given = rows.astype(np.dtype(kind.upper()))
    results = []
    for each in (widths[kind], widths[kind][1:]):
        WIDTHS[kind] = each
        results.append(Steps().systems.solve_all(range(21), mu, given))
    assert np.array_equal(*results)
    exact = [np.linalg.solve(np.eye(36) - m * steps.Phi, r.T).T for m, r in zip(mu, rows)]
    assert np.abs(results[0] - exact).max() < {"f": 1e-4, "d": 1e-11}[kind] * np.abs(exact).max()
    WIDTHS[kind] = widths[kind]
    digest.update(results[0].tobytes())
    digest.update(forward(time_transform(30, kind), rows.real[:15].reshape(30, 36).copy(), np.ones(30)).tobytes())
print("digest", digest.hexdigest())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of another processor")
def test_bits_are_the_same_with_narrower_vectors():
    """Without AVX-512, and for both widths; without fused sums the results are right, too."""
    flags = "", "-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-avx -mno-fma"
    found = [run(BITS, PYOP2_CFLAGS=each)[0] for each in flags]
    assert found[0]["digest"] == found[1]["digest"]
    assert found[2]["digest"]


# -- transforms --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", "fd")
@pytest.mark.parametrize("nsteps", [1, 2, 3, 4, 7, 12, 30, 44, 49, 64, 66, 105, 122, 250])
def test_transforms_are_those_of_numpy(nsteps, kind):
    """Of even and odd lengths with all radices, on columns that do not fill the vectors, scaled on the way in and out;
    the parts of a distributed transform have the same bits.
    """
    transform, eps = time_transform(nsteps, kind), {"f": 1e-6, "d": 1e-14}[kind]
    rng, scale = np.random.default_rng(nsteps), 0.5 ** (np.arange(nsteps) / nsteps)
    rows = rng.standard_normal((nsteps, 37))
    exact = np.fft.rfft(rows * scale[:, None], axis=0)
    found = forward(transform, rows, scale)
    np.testing.assert_allclose(found, exact, rtol=0, atol=eps * np.abs(exact).max())
    part = np.ascontiguousarray((rows * scale[:, None])[:, 16:32]).astype(kind)
    assert np.array_equal(forward(transform, part), found[:, 16:32])
    found += 1j * rng.standard_normal(found.shape).astype(kind)  # imaginary parts of the ends are ignored
    exact, U, V = np.fft.irfft(found.astype(complex), nsteps, axis=0), rows.copy(), rows.copy()
    transform.backward(found, U, 1 / scale)
    np.testing.assert_allclose(U, rows + exact / scale[:, None], rtol=0, atol=4 * eps * np.abs(U).max())
    columns = np.empty((nsteps, 37), kind)
    transform.backward(found, columns)
    transform.add(columns, V, 1 / scale)
    assert np.array_equal(U, V)
    part = np.empty((nsteps, 16), kind)
    transform.backward(np.ascontiguousarray(found[:, 16:32]), part)
    assert np.array_equal(part, columns[:, 16:32])


def test_lengths_without_kernels():
    """A large prime factor is left to scipy."""
    assert time_transform(2 * 67, "d") is None
    nsteps, steps = 67, Steps()
    blocks, U = FrequencyBlocks(steps.systems, transposed=False), np.ones((nsteps + 1, 36))
    for precision in ("single", "double"):
        U[1:] = 0
        options = dict(rtol=1e-13, precision=precision)
        assert ParaDiag(steps, nsteps, steps.systems.solve, options=options, blocks=blocks).solve(U).converged
        exact = sequential(steps, np.ones(36), nsteps)
        np.testing.assert_allclose(U, exact, rtol=0, atol=1e-12)


def test_states_that_are_not_contiguous():
    """Every second column of an array."""
    nsteps, steps = 20, Steps()
    blocks, memory = FrequencyBlocks(steps.systems, transposed=False), np.ones((nsteps + 1, 72))
    circulant = AlphaCirculant(
        nsteps, 1e-3, steps.systems.solve, 36, blocks=blocks, comm=MPI.COMM_SELF, bounds=[0, nsteps]
    )
    r = np.random.default_rng(0).standard_normal((nsteps, 72))[:, ::2]
    circulant.add(r, memory[1:, ::2])
    np.testing.assert_allclose(memory[1:, ::2], 1 + circulant(np.ascontiguousarray(r)), rtol=0, atol=1e-14)
    assert (memory[:, 1::2] == 1).all()
