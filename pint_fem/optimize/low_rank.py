r"""Inverses of :math:`A + R` from a low-rank approximation of :math:`A`, found by products with random vectors.

:math:`A` is symmetric positive semidefinite (a misfit's Hessian) and known by products; :math:`R` is positive definite
(the regularisation's) and known by its inverse. For an :math:`R`-orthonormal basis :math:`Q` of random vectors, with
:math:`Y = A Q` and :math:`T = Q^T Y`, Nyström's approximation is

.. math::  \hat A = Y T^{+} Y^T = R V \Lambda V^T R, \qquad V^T R V = I ,

so that each random vector costs one product, and all products of a block are independent of each other. The remainder
:math:`E = A - \hat A` is positive semidefinite [1, 2]. For weights :math:`m` of the misfit and :math:`c` of the
regularisation,

.. math::
    P = (m \hat A + c R)^{-1} = \frac1c \Big(R^{-1} - V \frac{m \Lambda}{c + m \Lambda} V^T\Big)

needs no further product, and the eigenvalues of :math:`P (m A + c R)` are between 1 and
:math:`1 + \tfrac mc \|E\|_R`, where :math:`\|E\|_R` is the largest eigenvalue of :math:`E x = \theta R x`.

Blocks of vectors are added until this is small. It is estimated by the next block :math:`X`, before that is added: the
largest eigenvalue of the pencil :math:`(X^T E R^{-1} E X, X^T E X)`, which is the quotient of :math:`E` after one power
iteration and never exceeds :math:`\|E\|_R`.

References
----------
[1] N. Halko, P.-G. Martinsson, J. A. Tropp, SIAM Review 53(2), 2011.
[2] Z. Frangella, J. A. Tropp, M. Udell, Randomized Nyström preconditioning, SIAM J. Matrix Anal. Appl. 44(2), 2023.
[3] U. Villa, N. Petra, O. Ghattas, hIPPYlib, ACM Trans. Math. Softw. 47(2), 2021: the same pencil of the Hessians of
    misfit and prior, by two products per vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh

__all__ = ["LowRankHessian", "Pencil", "probe"]

_RANK = 1e-13
"""Relative size of eigenvalues that are round-off."""
_DEPENDENT = 1e-10
"""Relative size below which a vector depends on others."""


class Pencil(NamedTuple):
    """The two matrices, on rows of own values; calls are collective.

    Attributes
    ----------
    product
        Dual vectors ``A x`` of vectors ``(k, n)``.
    metric, inverse
        Dual vectors ``R x`` of vectors, and vectors ``R^-1 y`` of dual vectors, ``(k, n)``.
    pairing
        Values ``(a, b)`` of dual vectors ``(a, n)`` at vectors ``(b, n)``, identical on all ranks.
    noise
        ``noise(first, count)``: random dual vectors ``(count, n)`` with numbers from ``first``.
    size
        Number of unknowns of all ranks.
    on_first
        ``on_first(work, *args)``: the results of dense algebra, computed on one rank and identical on all.
    """

    product: Callable[[np.ndarray], np.ndarray]
    metric: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    pairing: Callable[[np.ndarray, np.ndarray], np.ndarray]
    noise: Callable[[int, int], np.ndarray]
    size: int
    on_first: Callable = lambda work, *args: work(*args)


@dataclass(frozen=True)
class LowRankHessian:
    """Eigenpairs of the pencil ``(A, R)``, for weights of both matrices.

    Attributes
    ----------
    eigenvalues : ndarray, shape (rank,)
        In decreasing order, for weights of one.
    vectors : ndarray, shape (rank, n)
        Own values; orthonormal in the inner product of ``R``.
    remainder : float
        Estimated largest eigenvalue of what is left out, for weights of one; 0 where nothing is.
    products : int
        Number of products that have been computed.
    complete : bool
        Whether the remainder was as small as required when the pairs were computed.
    misfit, regularisation : float
        Weights ``m`` and ``c``.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray
    remainder: float
    products: int
    complete: bool
    misfit: float = 1.0
    regularisation: float = 1.0

    @property
    def rank(self) -> int:
        """Number of eigenpairs."""
        return len(self.eigenvalues)

    @property
    def ratio(self) -> float:
        """The factor ``m / c`` of the pencil's eigenvalues."""
        return self.misfit / self.regularisation

    def rescaled(self, *, misfit: float = 1.0, regularisation: float = 1.0) -> LowRankHessian:
        """Return the same pairs for a multiple of the misfit (of the inverse variance of the noise) and of the
        regularisation, without a product.
        """
        return replace(self, misfit=misfit * self.misfit, regularisation=regularisation * self.regularisation)

    def apply(self, solved: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return ``P y``.

        Parameters
        ----------
        solved
            The vector ``R^-1 y`` for weights of one, ``(n,)``.
        values
            Values of ``y`` at the :attr:`vectors`, ``(rank,)``.
        """
        weights = self.misfit * self.eigenvalues
        weights = weights / (self.regularisation + weights)
        return (solved - (weights * values) @ self.vectors) / self.regularisation


def probe(
    pencil: Pencil, *, tolerance: float, block: int, most: int, start: np.ndarray | None = None
) -> LowRankHessian:
    """Compute eigenpairs until the remainder's largest eigenvalue is at most a tolerance (collective).

    Parameters
    ----------
    pencil
        The matrices.
    tolerance
        Bound of the remainder.
    block
        Vectors whose products are computed at once, or a quarter of those before where that is more.
    most
        Largest number of products.
    start
        Vectors ``(k, n)`` that span the wanted space approximately, such as the eigenvectors at another iterate; their
        products are computed first, all at once.

    Returns
    -------
    LowRankHessian
        With weights of one. Where ``most`` products do not suffice it has the largest eigenvalues and is not
        ``complete``.
    """
    basis, most = _Basis(pencil), min(most, pencil.size)
    remainder, drawn = np.inf, 0
    if start is not None and len(start):
        basis.extend(start[:most])
    while remainder > tolerance and len(basis.Q) < most:
        count = min(max(block, len(basis.Q) // 4), most - len(basis.Q))
        remainder = basis.extend(pencil.inverse(pencil.noise(drawn, count)))
        drawn += count
    if len(basis.Q) == pencil.size:
        remainder = 0.0
    eigenvalues, vectors = basis.pairs()
    return LowRankHessian(eigenvalues, vectors, float(remainder), len(basis.Q), bool(remainder <= tolerance))


class _Basis:
    """An orthonormal basis ``Q`` of probing vectors, their products ``Y`` and ``T = Q^T Y``."""

    def __init__(self, pencil: Pencil):
        self.pencil = pencil
        n = pencil.noise(0, 1).shape[1]
        self.Q, self.Y, self.T = np.zeros((0, n)), np.zeros((0, n)), np.zeros((0, 0))

    def extend(self, X: np.ndarray) -> float:
        """Add vectors ``(k, n)`` with their products, and return the estimate of the remainder without them; zero where
        no vector is independent of the basis.
        """
        pairing, on_first = self.pencil.pairing, self.pencil.on_first
        for _ in range(2):  # the second time for what round-off has left of the first
            if len(self.Q):
                X = X - pairing(self.pencil.metric(X), self.Q) @ self.Q
            X = on_first(_orthonormal, pairing(self.pencil.metric(X), X)) @ X
        if not len(X):
            return 0.0
        Y = self.pencil.product(X)
        C, S = pairing(Y, self.Q), _symmetric(pairing(Y, X))
        E = Y
        if len(self.Q):
            E = Y - on_first(_coefficients, self.T, C) @ self.Y
        forms = _symmetric(pairing(E, X)), _symmetric(pairing(E, self.pencil.inverse(E)))
        floor = _RANK * max(float(np.abs(self.T).max(initial=0.0)), float(np.abs(S).max(initial=0.0)))
        remainder = on_first(_largest, *forms, floor)
        self.T = np.block([[self.T, C.T], [C, S]])
        self.Q, self.Y = np.concatenate([self.Q, X]), np.concatenate([self.Y, Y])
        return remainder

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return eigenvalues ``(rank,)`` and vectors ``(rank, n)`` of the approximation."""
        on_first = self.pencil.on_first
        F = on_first(_root, self.T) @ self.Y  # the approximation is F^T F
        X = self.pencil.inverse(F)
        eigenvalues, W = on_first(_scaled_eigenvectors, _symmetric(self.pencil.pairing(F, X)))
        return eigenvalues, W @ X


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    """The symmetric part: products with inexact sweeps are not quite symmetric."""
    return 0.5 * (matrix + matrix.T)


def _orthonormal(gram: np.ndarray) -> np.ndarray:
    """Combinations of vectors with this Gram matrix that are orthonormal, without those that depend on others."""
    scale = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    inside = scale > _DEPENDENT * scale.max(initial=0.0)
    unit = np.eye(len(gram))[inside] / scale[inside][:, None]
    values, U = np.linalg.eigh(_symmetric(unit @ gram @ unit.T))
    some = values > _DEPENDENT * values.max(initial=0.0)
    return (U[:, some] / np.sqrt(values[some])).T @ unit


def _spectrum(T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eigenpairs of a matrix that are positive above round-off."""
    values, U = np.linalg.eigh(_symmetric(T))
    some = values > _RANK * values.max(initial=0.0)
    return values[some], U[:, some]


def _root(T: np.ndarray) -> np.ndarray:
    """``S`` with ``S^T S`` the pseudoinverse of the positive part of a matrix."""
    values, U = _spectrum(T)
    return (U / np.sqrt(values)).T


def _coefficients(T: np.ndarray, C: np.ndarray) -> np.ndarray:
    """``C T^+``."""
    S = _root(T)
    return (C @ S.T) @ S


def _largest(first: np.ndarray, second: np.ndarray, floor: float) -> float:
    """The largest eigenvalue of the pencil ``(second, first)``, where ``first`` is above a floor."""
    values, U = np.linalg.eigh(first)
    some = values > max(floor, _DEPENDENT * values.max(initial=0.0))
    if not some.any():
        return 0.0
    U = U[:, some] / np.sqrt(values[some])
    return float(np.linalg.eigvalsh(U.T @ second @ U)[-1])


def _scaled_eigenvectors(G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in decreasing order, and eigenvectors as rows divided by the roots of these."""
    if not len(G):
        return np.zeros(0), np.zeros((0, 0))
    values, U = eigh(G)
    some = values > _RANK * values.max(initial=0.0)
    values, U = values[some][::-1], U[:, some][:, ::-1]
    return values, (U / np.sqrt(values)).T
