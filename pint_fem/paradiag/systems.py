r"""The solves of the frequencies for a finite element step: cached sparse factors, one per frequency and stage.

:math:`(I - \mu \Phi)^{-1}` is a product of :math:`(S_j - y_j M)^{-1} S_j` (:mod:`~pint_fem.paradiag.stage_shifts`) with
the linear propagator's ``S`` and ``M``: ``S`` has unit rows and columns for boundary values and ``M`` zero
rows, so that boundary values are right, too. (With *different* diagonal entries the factors do not commute where
boundary values of a state reach its neighbours; one more iteration corrects that.) A factor is applied as
:math:`I + y_j (S_j - y_j M)^{-1} M`. State, tangent and, transposed, adjoint use the same factors. Factors beyond the
memory limit are made again at each solve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csc_matrix, csr_matrix, identity
from scipy.sparse.linalg import splu

from pint_fem.paradiag.stage_shifts import shifted_factors

__all__ = [
    "ProjectedSystem",
    "ShiftedSteps",
    "ShiftedSystem",
    "SparseSystem",
    "WrappedSystem",
    "on_pattern",
    "ones",
    "plain_weights",
    "real_product",
]


class ShiftedSystem(ABC):
    """The matrices ``S - y M`` for many complex ``y``."""

    @abstractmethod
    def factor(self, y: complex) -> tuple[Any, int]:
        """Something that :meth:`solve` takes, and its size in bytes."""

    @abstractmethod
    def solve(self, factor: Any, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for a complex vector with the matrix of ``y`` or its (not conjugate) transpose."""

    @abstractmethod
    def mass(self, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r``."""

    def release(self, factor: Any) -> None:
        """Free the memory of a factor that is not cached, where that has to be done explicitly."""
        return None


class ShiftedSteps:
    r""":math:`(I - \mu \Phi)^{-1}` and its transpose.

    Parameters
    ----------
    A, b
        Coefficients of the diagonally implicit method, ``(s, s)`` and ``(s,)``.
    systems
        One for each different diagonal entry of ``A``.
    memory
        Bytes of factors that this rank may cache.

    Attributes
    ----------
    systems : list of ShiftedSystem
        One per stage.
    bytes, kept : int
        Size and number of the cached factors.
    factorisations : int
        Number of factorisations so far.
    """

    def __init__(self, A: ArrayLike, b: ArrayLike, systems: Mapping[float, ShiftedSystem], memory: float):
        self.A, self.b = np.asarray(A, dtype=float), np.asarray(b, dtype=float)
        self.systems = [systems[a] for a in np.diag(self.A)]
        self._memory, self._factors, self._shifts = memory, {}, {}
        self.bytes = self.kept = self.factorisations = 0
        self._largest = 0

    def solve(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve ``(I - mu_k Phi) v = r`` for frequency ``k``, complex arrays ``(n,)``."""
        scale, shifts = self._at(k, mu)
        for j, (system, y) in enumerate(zip(self.systems, shifts, strict=True)):
            r = r + y * self._solve(k, j, y, system.mass(r, transposed=False), transposed=False)
        return scale * r

    def solve_transposed(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve ``(I - mu_k Phi^T) v = r`` for frequency ``k``, complex arrays ``(n,)``."""
        scale, shifts = self._at(k, mu)
        for j, (system, y) in reversed(list(enumerate(zip(self.systems, shifts, strict=True)))):
            r = r + y * system.mass(self._solve(k, j, y, r, transposed=True), transposed=True)
        return scale * r

    def _solve(self, k: int, j: int, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve with a system's matrix; a factor beyond the memory limit is released afterwards."""
        system, factor = self.systems[j], self._factor(k, j, y)
        try:
            return system.solve(factor, y, r, transposed=transposed)
        finally:
            if (k, j) not in self._factors:
                system.release(factor)

    def release(self) -> None:
        """Release all factors (collective over space), for example when the operators change."""
        for (_, j), factor in self._factors.items():
            self.systems[j].release(factor)
        self._factors.clear()
        self.bytes = self.kept = 0

    def _at(self, k: int, mu: complex) -> tuple[complex, Sequence[complex]]:
        if k not in self._shifts:
            self._shifts[k] = mu, *shifted_factors(self.A, self.b, mu)
        return self._shifts[k][1:]

    def _factor(self, k: int, j: int, y: complex):
        factor = self._factors.get((k, j))
        if factor is None:
            factor, size = self.systems[j].factor(y)
            self.factorisations += 1
            self._largest = max(self._largest, size)
            if self.bytes + self._largest <= self._memory:
                self._factors[k, j] = factor
                self.bytes, self.kept = self.bytes + size, self.kept + 1
        return factor


class WrappedSystem(ShiftedSystem):
    """A system solved by means of another one, whose factors are used.

    Parameters
    ----------
    inner
        The other system.
    """

    def __init__(self, inner: ShiftedSystem):
        self._inner = inner

    def factor(self, y: complex) -> tuple[Any, int]:
        """A factor of the other system and its size in bytes."""
        return self._inner.factor(y)

    def release(self, factor: Any) -> None:
        """Free the memory of a factor."""
        self._inner.release(factor)


class Projection(Protocol):
    """Removal of a nullspace, as by :class:`pint_fem.kernels.nullspace.Nullspace`."""

    def project_solution(self, values: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Remove from values, in place, their part in the nullspace of the matrix, or of its transpose."""

    def project_source(self, values: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Remove from values, in place, their part in the nullspace of the transpose, or of the matrix."""


class ProjectedSystem(WrappedSystem):
    """A system made regular by pins (:mod:`pint_fem.kernels.nullspace`), its solutions without their nullspace part.

    Parameters
    ----------
    system
        The system of the pinned ``S`` and of ``M``, whose nullspaces contain those of ``S``.
    nullspace
        The nullspace to be removed.
    """

    def __init__(self, system: ShiftedSystem, nullspace: Projection):
        super().__init__(system)
        self._nullspace = nullspace

    def solve(self, factor: Any, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for a complex vector, with source and solution projected."""
        r = self._nullspace.project_source(np.array(r), transposed=transposed)
        out = self._inner.solve(factor, y, r, transposed=transposed)
        return self._nullspace.project_solution(out, transposed=transposed)

    def mass(self, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r``."""
        return self._inner.mass(r, transposed=transposed)


Weights = Callable[[complex], Sequence[complex]]


def plain_weights(y: complex) -> Sequence[complex]:
    """The weights of ``S`` and ``M`` in ``S - y M``."""
    return 1.0, -y


class SparseSystem(ShiftedSystem):
    """A system on one rank: SuperLU for complex matrices, with one ordering for all shifts.

    Parameters
    ----------
    parts
        Real matrices whose weighted sum the system is: ``S``, ``M``, and others; with structurally symmetric union.
    weights
        Weights of the parts as a function of the shift.
    """

    def __init__(self, parts: Sequence[csr_matrix], weights: Weights = plain_weights):
        self._M, self._MT, self._weights = csr_matrix(parts[1]), csr_matrix(parts[1].T), weights
        n = parts[0].shape[0]
        pattern = sum((ones(X) + ones(X.T) for X in parts), identity(n, format="csr"))
        # the ordering depends on the pattern alone, with the entries that couple boundary values: without them there is
        # several times the fill when they are not zero; a dominant diagonal, as that of a saddle point has zeros
        first = splu(
            csc_matrix(ones(pattern) + 2 * np.diff(pattern.indptr).max() * identity(n)),
            permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True},
        )  # fmt: skip
        self._order = np.argsort(first.perm_c)
        permuted = csc_matrix(pattern[self._order][:, self._order])
        permuted.sort_indices()
        self._indices, self._indptr, self._shape = permuted.indices, permuted.indptr, (n, n)
        # by columns: rows of the transpose
        self._parts = [on_pattern(csr_matrix(X[self._order][:, self._order].T), permuted.T) for X in parts]
        self._trial = np.exp(1j * np.arange(n) ** 2)

    def factor(self, y: complex) -> tuple[Any, int]:
        """SuperLU's factor of the matrix of ``y``, and its size in bytes."""
        data = sum(w * part for w, part in zip(self._weights(y), self._parts, strict=True))
        matrix = csc_matrix((data, self._indices, self._indptr), shape=self._shape)
        # pivots off the diagonal would ruin the ordering, and are hardly ever needed: real parts of these matrices are
        # positive definite for heat, and complex shifts keep those of waves away from zero; a trial solve shows it
        try:
            lu = splu(matrix, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        except RuntimeError:  # a pivot is zero, as in a saddle point
            lu = None
        if lu is None or not np.abs(matrix @ lu.solve(self._trial) - self._trial).max(initial=0) <= _WRONG:
            lu = splu(matrix, permc_spec="COLAMD", diag_pivot_thresh=1.0)
        return lu, 20 * lu.nnz  # a complex number and its row for each entry

    def solve(self, factor: Any, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for a complex vector with the matrix of ``y`` or its (not conjugate) transpose."""
        out = np.empty_like(r)
        out[self._order] = factor.solve(r[self._order], "T" if transposed else "N")
        return out

    def mass(self, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r``."""
        return real_product(self._MT if transposed else self._M, r)


def real_product(X: csr_matrix, r: np.ndarray) -> np.ndarray:
    """A real sparse matrix times a complex vector."""
    return (X @ np.ascontiguousarray(r).view(float).reshape(-1, 2)).reshape(-1).view(complex)


_WRONG = 1e-9
"""Relative residual of a trial solve above which a factor is made anew with pivoting."""


def ones(X: csr_matrix) -> csr_matrix:
    """A matrix with ones where another has entries."""
    X = csr_matrix(X).copy()
    X.data[:] = 1.0
    return X


def on_pattern(X: csr_matrix, pattern: csr_matrix) -> np.ndarray:
    """Entries of a matrix on a larger pattern, whose columns are sorted."""
    rows, columns = X.shape
    number = lambda Y: np.repeat(np.arange(rows, dtype=np.int64), np.diff(Y.indptr)) * columns + Y.indices
    out = np.zeros(pattern.nnz)
    out[np.searchsorted(number(pattern), number(X))] = X.data
    return out
