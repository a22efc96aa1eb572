r"""Largest eigenvalues of a positive semidefinite matrix by products with random vectors.

Blocks of products :math:`G \Omega` with Gaussian vectors extend an orthonormal basis ``Q`` until the norm of
:math:`(I - Q Q^T) G` is at most a tolerance. With ``b`` vectors of a block,

.. math::  \|(I - Q Q^T) G\| \leq 10 \sqrt{2/\pi}\, \max_i \|(I - Q Q^T) G\, \omega_i\|

but for a probability of :math:`10^{-b}`. The eigenpairs are those of :math:`Q^T G Q`.

Source: N. Halko, P.-G. Martinsson, J. A. Tropp, SIAM Review 53(2), 2011: algorithm 4.2, in blocks, and lemma 4.1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mpi4py import MPI
from scipy.linalg import eigh, qr

from pint_fem.collective import on_first_rank

__all__ = ["BLOCK", "low_rank_eigenpairs"]

BLOCK = 32
"""Vectors whose products are computed at once; the estimate of the remainder is wrong with probability 1e-32."""
_ROUND_OFF = 1e-13
"""Part of the largest norm of a product below which remainders are round-off."""


def low_rank_eigenpairs(
    product: Callable[[np.ndarray], np.ndarray], m: int, *, tolerance: float, comm: MPI.Comm, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, float]:
    """Eigenvalues and vectors of a matrix but for those that are smaller than a tolerance (collective).

    Parameters
    ----------
    product
        Products of the symmetric positive semidefinite matrix with rows ``(k, m)``, the same on all ranks.
    m
        Size of the matrix.
    tolerance
        Bound of the remainder's norm.
    comm
        Communicator of the ranks that compute the products; dense algebra is done on the first of them.
    seed
        Of the random vectors.

    Returns
    -------
    lam : ndarray, shape (rank,)
        Eigenvalues in increasing order.
    U : ndarray, shape (m, rank)
        Orthonormal vectors.
    remainder : float
        Estimate of the norm of what is left out, at most the tolerance or round-off.
    """
    rng = np.random.default_rng(seed)
    Q, GQ = np.zeros((0, m)), np.zeros((0, m))
    scale = 0.0
    while True:
        block = product(rng.standard_normal((min(BLOCK, m), m)))
        scale = max(scale, float(np.linalg.norm(block, axis=1).max(initial=0.0)))
        new, remainder = on_first_rank(comm, "low-rank eigenpairs", _orthonormal, block, Q)
        if remainder <= max(tolerance, _ROUND_OFF * scale) or not len(new) or len(Q) == m:
            break
        new = new[: m - len(Q)]
        Q, GQ = np.concatenate([Q, new]), np.concatenate([GQ, product(new)])

    def ritz() -> tuple[np.ndarray, np.ndarray]:
        H = Q @ GQ.T
        lam, V = eigh(0.5 * (H + H.T), driver="evd", check_finite=False)
        return np.maximum(lam, 0.0), Q.T @ V

    lam, U = on_first_rank(comm, "low-rank eigenpairs", ritz)
    return lam, U, 0.0 if len(Q) == m else remainder


def _orthonormal(block: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, float]:
    """An orthonormal basis of what rows have outside a basis's span, and the estimate of the remainder's norm."""
    for _ in range(2):  # the second time for what round-off has left of the first
        block = block - (block @ Q.T) @ Q
    remainder = 10 * np.sqrt(2 / np.pi) * float(np.linalg.norm(block, axis=1).max(initial=0.0))
    basis, R, _ = qr(block.T, mode="economic", pivoting=True, check_finite=False)
    size = np.abs(R.diagonal())
    rank = int((size > 1e-10 * size.max(initial=0.0)).sum()) if size.any() else 0
    new = basis[:, :rank].T
    new = new - (new @ Q.T) @ Q
    return np.ascontiguousarray(qr(new.T, mode="economic", check_finite=False)[0].T), remainder
