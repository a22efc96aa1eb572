"""The low-rank preconditioner against dense matrices, and conjugate gradients with it on source inversions."""

import numpy as np
import pytest
from scipy.linalg import eigh

from pint_fem.optimize.low_rank import LowRankHessian, Pencil, probe


def dense_pencil(n=60, decay=2.0, size=1e6, seed=0, rank=None):
    """Matrices ``A`` and ``R`` with algebraically decaying eigenvalues, and what probing calls."""
    rng = np.random.default_rng(seed)
    B = rng.standard_normal((n, n))
    R = B @ B.T / n + np.eye(n)
    lam = size * np.arange(1, n + 1.0) ** -decay
    lam[n if rank is None else rank :] = 0.0
    L = np.linalg.cholesky(R)
    U = np.linalg.qr(rng.standard_normal((n, n)))[0]
    A = L @ (U * lam) @ U.T @ L.T
    A = 0.5 * (A + A.T)
    inverse, calls = np.linalg.inv(R), []

    def product(X):
        calls.append(len(X))
        return X @ A

    noise = lambda first, count: np.array(
        [np.random.default_rng((seed, i)).standard_normal(n) for i in range(first, first + count)]
    )
    pencil = Pencil(product, lambda X: X @ R, lambda Y: Y @ inverse, lambda D, X: D @ X.T, noise, n)
    return A, R, lam, pencil, calls


def operator(hessian, R):
    """The matrix of ``P``."""
    inverse, V = np.linalg.inv(R), hessian.vectors
    return np.array([hessian.apply(inverse @ y, V @ y) for y in np.eye(len(R))]).T


def condition(hessian, A, R, m=1.0, c=1.0):
    """The extreme eigenvalues of ``P (m A + c R)``."""
    values = eigh(m * A + c * R, np.linalg.inv(operator(hessian, R)), eigvals_only=True)
    return values[0], values[-1]


def test_it_is_the_inverse_where_the_rank_is_found():
    """Seven eigenvalues, blocks of four: the third block finds nothing more."""
    A, R, lam, pencil, calls = dense_pencil(rank=7)
    found = probe(pencil, tolerance=1e-3, block=4, most=60)
    assert found.complete
    assert calls == [4, 4, 4]
    assert np.allclose(found.eigenvalues[:7], lam[:7], rtol=1e-8)
    assert found.rank == 7
    V = found.vectors
    assert np.allclose(V @ R @ V.T, np.eye(7), atol=1e-9)
    assert np.allclose(operator(found, R) @ (A + R), np.eye(60), atol=1e-8)


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("tolerance", [0.3, 3.0])
def test_the_condition_is_one_and_the_remainder(block, tolerance):
    A, R, lam, pencil, calls = dense_pencil(n=120, decay=3.0, size=1e4)
    found = probe(pencil, tolerance=tolerance, block=block, most=120)
    assert found.complete
    assert found.remainder <= tolerance
    assert found.products == sum(calls) < 120
    low, high = condition(found, A, R)
    assert 1 - 1e-6 <= low  # the remainder is positive
    assert high <= 1 + 2 * tolerance
    best = int((lam > tolerance).sum())
    assert found.products <= 2 * best + 2 * max(block, best // 2)


def test_other_weights_need_no_product():
    A, R, _, pencil, calls = dense_pencil(n=50, decay=4.0)
    found = probe(pencil, tolerance=0.1, block=8, most=50)
    before = len(calls)
    other = found.rescaled(misfit=3.0).rescaled(regularisation=40.0)
    assert (other.misfit, other.regularisation, other.ratio) == (3.0, 40.0, 0.075)
    low, high = condition(other, A, R, 3.0, 40.0)
    assert 1 - 1e-6 <= low <= high <= 1 + 2 * other.ratio * 0.1
    assert len(calls) == before


def test_the_vectors_of_a_similar_pencil_are_a_start():
    """A change of 1e-4 in the matrix: the start has all but the last block of probing."""
    A, R, lam, pencil, _ = dense_pencil(n=120, decay=3.0, size=1e4)
    old = probe(pencil, tolerance=0.3, block=8, most=120)
    A2, _, _, changed, calls = dense_pencil(n=120, decay=3.0, size=1e4)
    changed = changed._replace(product=lambda X: calls.append(len(X)) or X @ (1.1 * A))
    keep = old.vectors[old.eigenvalues > 0.3]
    new = probe(changed, tolerance=0.3, block=8, most=120, start=keep)
    assert new.complete
    assert new.products < old.products
    assert calls[0] == len(keep)
    assert condition(new, 1.1 * A, R)[1] <= 1.6


def test_a_budget_leaves_the_largest_and_says_so():
    A, R, lam, pencil, calls = dense_pencil(n=60, decay=2.0)
    found = probe(pencil, tolerance=0.1, block=8, most=20)
    assert not found.complete
    assert found.products == sum(calls) == 20
    assert found.remainder > 0.1
    assert np.allclose(found.eigenvalues[:3], lam[:3], rtol=0.1)
    whole = condition(LowRankHessian(np.zeros(0), np.zeros((0, 60)), np.inf, 0, False), A, R)
    assert condition(found, A, R)[1] < 0.05 * whole[1]


def test_all_directions_are_exact_and_nothing_is_left():
    A, R, lam, pencil, calls = dense_pencil(n=12, decay=1.0, size=1e8)
    found = probe(pencil, tolerance=1e-3, block=8, most=100)
    assert found.complete
    assert found.remainder == 0.0
    assert found.products == 12
    low, high = condition(found, A, R)
    assert max(abs(low - 1), abs(high - 1)) < 1e-5


def test_no_information_is_the_regularisation_alone():
    A, R, _, pencil, _ = dense_pencil(rank=0)
    found = probe(pencil, tolerance=0.1, block=5, most=60)
    assert found.complete
    assert found.rank == 0
    assert np.allclose(operator(found, R), np.linalg.inv(R))
