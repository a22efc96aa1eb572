"""Random sparse matrices of many kinds, for tests of factorisations."""

import numpy as np
from scipy.sparse import block_diag, bmat, csr_matrix, diags, random_array

__all__ = ["REGULAR", "ill_scaled", "regular"]


def _random(rng, n, density=None):
    """A random sparse matrix with entries between -1 and 1."""
    density = rng.choice([1 / max(n, 1), 3 / max(n, 3), 0.3]) if density is None else density
    found = random_array((n, n), density=min(1.0, density), rng=rng, data_sampler=lambda size: rng.uniform(-1, 1, size))
    return csr_matrix(found)


def _dominant(rng, n, A):
    """A matrix with a diagonal that makes it regular, of condition number about ten."""
    A = csr_matrix(A - diags(A.diagonal(), shape=(n, n)))
    rows, columns = (np.asarray(abs(A).sum(axis=axis)).ravel() for axis in (1, 0))
    return csr_matrix(A + diags(np.maximum(rows, columns) * 1.2 + rng.uniform(0.5, 1, n)))


def _spd(rng, n):
    A = _random(rng, n)
    return _dominant(rng, n, A + A.T)


def _indefinite(rng, n):
    A = _spd(rng, n)
    signs = rng.choice([-1.0, 1.0], n)
    return csr_matrix(A + diags((signs - 1) * A.diagonal()))


def _nonsymmetric(rng, n):
    return _dominant(rng, n, _random(rng, n))


def _saddle(rng, n):
    """Zero diagonal block: without pivots its first elimination may divide by zero."""
    k = n // 3
    if not k:
        return _spd(rng, n)
    A, B = _spd(rng, n - k), csr_matrix(np.hstack([np.eye(k), 0.3 * rng.uniform(-1, 1, (k, n - 2 * k))]))
    order = rng.permutation(n)
    return csr_matrix(bmat([[A, B.T], [B, None]]))[order][:, order]


def _permuted(rng, n):
    """A nonsymmetric matrix whose diagonal is empty for the most part."""
    return _nonsymmetric(rng, n)[rng.permutation(n)]


def _arrow(rng, n, *, first):
    A = np.diag(rng.uniform(1, 2, n) * n)
    k = 0 if first else n - 1
    A[k], A[:, k] = rng.uniform(-1, 1, n), rng.uniform(-1, 1, n)
    A[k, k] = 2.0 * n
    return csr_matrix(A)


def _blocks(rng, n):
    sizes = [1, 2, 0, 5, max(0, n - 8)]
    return csr_matrix(block_diag([_nonsymmetric(rng, k) for k in sizes if k]))[:n, :n] if n >= 8 else _spd(rng, n)


def _band(rng, n):
    k = min(n - 1, 5)
    return _dominant(rng, n, diags([rng.uniform(-1, 1, n - i) for i in range(k + 1)], range(k + 1), shape=(n, n)))


REGULAR = {
    "spd": _spd,
    "indefinite": _indefinite,
    "nonsymmetric": _nonsymmetric,
    "saddle": _saddle,
    "permuted": _permuted,
    "diagonal": lambda rng, n: csr_matrix(diags(rng.choice([-1.0, 1.0], n) * rng.uniform(1, 2, n))),
    "dense": lambda rng, n: _nonsymmetric(rng, n) if n == 1 else _dominant(rng, n, _random(rng, n, 1.0)),
    "arrow down": lambda rng, n: _arrow(rng, n, first=True),
    "arrow up": lambda rng, n: _arrow(rng, n, first=False),
    "blocks": _blocks,
    "upper band": _band,
    "lower band": lambda rng, n: csr_matrix(_band(rng, n).T),
}
"""Functions of a generator and a number of rows, by the kind of the matrix; all are well conditioned."""


def regular(kind, n, seed):
    """A well-conditioned matrix of a kind, and whether it is symmetric."""
    A = REGULAR[kind](np.random.default_rng([seed, n]), n)
    A.sum_duplicates()
    A.eliminate_zeros()
    return A, kind in ("spd", "indefinite", "saddle", "diagonal")


def ill_scaled(n, seed, *, symmetric):
    """Well-conditioned ``A``, and ``D`` for the matrix ``D A`` (1e-12 to 1e12) or ``D A D`` (1e-6 to 1e6)."""
    rng = np.random.default_rng([seed, n, 1])
    A = (_spd if symmetric else _nonsymmetric)(rng, n)
    return A, 10.0 ** rng.uniform(-6, 6, n) if symmetric else 10.0 ** rng.uniform(-12, 12, n)
