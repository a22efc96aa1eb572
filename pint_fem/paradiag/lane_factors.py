r"""Factors of sparse complex systems for W frequencies at once, on lanes: LDL^T or LDU without pivoting.

The matrix of a frequency is :math:`A = \sum_p w_p X_p` with real parts :math:`X_p` and complex weights. Rows of
boundary values have a diagonal entry only, while the columns may couple them to the others: with these columns in
:math:`C`, :math:`A = B + C`,

.. math:: A^{-1} r = B^{-1} (r - C D^{-1} r_b) , \qquad A^{-T} r = B^{-1} (r - C^T B^{-1} r)  \quad (B = B^T) ,

where ``D`` is the diagonal and :math:`r_b` the boundary values; :math:`C^T` has their rows only. ``B`` is symmetric in
most cases. Then the factor takes half of the memory, and reading it is what limits a solve. Rows and columns are scaled
by powers of two, so that single precision has the range for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, identity

from pint_fem.kernels.lanes.compiled import aligned
from pint_fem.kernels.lanes.ordering import nested_dissection
from pint_fem.paradiag.lane_kernels import LaneKernels, RealMatrix, long
from pint_fem.paradiag.panels import Panels, minimum_degree, on_pattern, ones, permuted, real_product

__all__ = ["INACCURATE", "LaneFactor", "LaneSystem"]

INACCURATE = {"f": 1e-5, "d": 1e-9}
"""Error of a trial solve in single precision, and residual in double precision, above which a factor is not used."""
_SYMMETRIC = 1e-13
"""Difference from the transpose, relative to the largest entry, up to which a matrix is symmetric."""


class LaneFactor:
    """Factors of W frequencies.

    Parameters
    ----------
    kernels
        Kernels of their precision and width.
    y
        Shifts, padded to W by the last one.
    count
        Number of shifts that count.
    lower, upper, inverse
        ``(entries, 2, W)``; ``upper`` is transposed, and the same array as ``lower`` where matrices are symmetric;
        inverse of the diagonal, ``(n, 2, W)``.

    Attributes
    ----------
    others : list of tuple
        Lanes that require other factors, and these: several lanes and a :class:`LaneFactor` in double precision, or one
        and SuperLU's.
    """

    def __init__(
        self, kernels: LaneKernels, y: np.ndarray, count: int, lower: np.ndarray, upper: np.ndarray, inverse: np.ndarray
    ):
        self.kernels, self.y, self.count = kernels, y, count
        self.lower, self.upper, self.inverse = lower, upper, inverse
        self.others: list[tuple[Any, Any]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the factors on lanes."""
        return self.lower.nbytes + self.inverse.nbytes + (self.upper is not self.lower) * self.upper.nbytes


class LaneSystem:
    """The matrices of many frequencies on lanes.

    Parameters
    ----------
    parts
        Real matrices ``(n, n)``, whose weighted sum a frequency's matrix is.
    weights
        Weights of the parts as a function of the shift.
    """

    def __init__(self, parts: Sequence[csr_matrix], weights: Callable[[complex], Sequence[complex]]):
        self._parts, self._weights = [csr_matrix(X) for X in parts], weights
        self.n = n = parts[0].shape[0]
        largest = np.zeros(n)
        for X in self._parts:
            largest = np.maximum(largest, abs(X).max(axis=1).toarray().ravel())
        self._scale = 2.0 ** -np.round(np.log2(np.where(largest > 0, largest, 1)) / 2)
        self._matrices: dict[tuple, RealMatrix] = {}

    @cached_property
    def _split(self) -> tuple[list[csr_matrix], list[csr_matrix] | None, np.ndarray]:
        """Parts of ``B``, those of ``C`` (``None``: the matrix is factored as it is) and rows of boundary values."""
        alone = np.ones(self.n, bool)
        entries = [(X.tocoo().row, X.tocoo().col, X.tocoo().data) for X in self._parts]
        for row, col, value in entries:
            alone[row[(row != col) & (value != 0)]] = False
        boundary, inner, outer = np.flatnonzero(alone), [], []
        for row, col, value in entries:
            couples = alone[col] & (row != col)
            keep = ~couples & ~(alone[row] & (row != col))
            inner.append(csr_matrix((value[keep], (row[keep], col[keep])), shape=(self.n, self.n)))
            C = csr_matrix((value[couples], (row[couples], col[couples])), shape=(self.n, self.n))
            outer.append(csr_matrix(C[:, boundary]))
            outer[-1].eliminate_zeros()
        if all(map(_is_symmetric, inner)):
            return inner, outer if any(X.nnz for X in outer) else [], boundary
        return self._parts, None, boundary

    @property
    def is_symmetric(self) -> bool:
        """Whether factors are LDL^T."""
        return self._split[1] is not None

    @cached_property
    def _pattern(self) -> csr_matrix:
        parts = self._split[0]
        return csr_matrix(sum((ones(X) + ones(X.T) for X in parts), identity(self.n, format="csr")))

    def _panels(self, kernels: LaneKernels) -> Panels:
        """Panels of the ordering with the least fill."""
        if "panels" not in vars(self):
            orders = minimum_degree(self._pattern), nested_dissection(self._pattern)
            found = [Panels(kernels, self._pattern, order) for order in orders if order is not None]
            self.panels = min(found, key=lambda p: p.entries)
            self._set_values(kernels)
        return self.panels

    def _set_values(self, kernels: LaneKernels) -> None:
        """The parts' entries below the diagonal, on it, and those of their transposes below it."""
        panels, order = self.panels, self.panels.order
        pattern, scale = panels.pattern, self._scale[order]
        rows = np.repeat(np.arange(self.n), np.diff(pattern.indptr))
        below = rows > pattern.indices
        i, j = rows[below], pattern.indices[below]
        self._places = panels.places(kernels, i, j)
        scaled = lambda X: on_pattern(permuted(X, order), pattern)[below] * (scale[i] * scale[j])
        parts = self._split[0]
        self._lower = np.array([scaled(X) for X in parts])
        self._upper = None if self.is_symmetric else np.array([scaled(csr_matrix(X.T)) for X in parts])
        self._diagonal = np.array([X.diagonal()[order] * scale**2 for X in parts])

    def factor(self, kernels: LaneKernels, y: np.ndarray) -> LaneFactor:
        """Factors for at most W shifts; a zero pivot makes numbers that are not finite (:meth:`inaccurate`)."""
        panels, count = self._panels(kernels), len(y)
        y = np.concatenate([y, np.repeat(y[-1:], kernels.width - count)])
        weights = np.array([self._weights(complex(v)) for v in y], complex).T
        packed = aligned((len(weights), 2, kernels.width), zero=False)
        packed[:, 0], packed[:, 1] = weights.real, weights.imag

        def total(values: np.ndarray, places: np.ndarray | None, entries: int) -> np.ndarray:
            out = aligned((entries, 2, kernels.width), kernels.dtype, zero=places is not None)
            kernels.call("weighted_sum", len(values), long(values.shape[1]), values, packed, places, out)
            return out

        lower = total(self._lower, self._places, panels.entries)
        upper = lower if self._upper is None else total(self._upper, self._places, panels.entries)
        diagonal, inverse = total(self._diagonal, None, self.n), kernels.empty(self.n)
        kernels.call(
            "factorise", panels.count, panels.first, panels.panel, panels.begin, panels.rows, panels.start,
            lower, upper, diagonal, inverse, np.empty(2 * panels.count + self.n, np.int32),
            np.empty(panels.count, np.int64),
        )  # fmt: skip
        return LaneFactor(kernels, y, count, lower, upper, inverse)

    def solve(self, factor: LaneFactor, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for lanes ``(batch, n, 2, W)``."""
        _, outer, rows = self._split
        if not outer:
            return self._substitute(factor, r, transposed=transposed)
        if transposed:
            x = self._substitute(factor, r, transposed=True)
            values = np.ascontiguousarray(r[:, rows])
            self._subtract_coupling(factor, x, values, transposed=True)
            x[:, rows] = self._divided(factor, values)
            return x
        values = r[:, rows]
        if values.any():
            r = r.copy()
            self._subtract_coupling(factor, self._divided(factor, values), r, transposed=False)
        return self._substitute(factor, r, transposed=False)

    def _subtract_coupling(self, factor: LaneFactor, x: np.ndarray, out: np.ndarray, *, transposed: bool) -> None:
        """Subtract ``C x``, or ``C^T x``."""
        kernels, outer = factor.kernels, self._split[1]
        for p, X in enumerate(outer):
            if X.nnz:
                w = np.array([self._weights(complex(y))[p] for y in factor.y])
                matrix = self._matrix(kernels, ("outer", p, transposed), lambda X=X: X.T if transposed else X)
                kernels.add_multiple(-w, kernels.product(matrix, x), out)

    def _divided(self, factor: LaneFactor, values: np.ndarray) -> np.ndarray:
        """Boundary values ``(batch, rows, 2, W)`` divided by their diagonal entries."""
        rows = self._split[2]
        weights = np.array([self._weights(complex(y)) for y in factor.y])
        diagonal = sum(np.outer(X.diagonal()[rows], w) for X, w in zip(self._parts, weights.T, strict=True))
        quotient, out = (values[..., 0, :] + 1j * values[..., 1, :]) / diagonal, np.empty_like(values)
        out[..., 0, :], out[..., 1, :] = quotient.real, quotient.imag
        return out

    def _substitute(self, factor: LaneFactor, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Forward and backward substitution."""
        kernels, panels = factor.kernels, self.panels
        r = np.ascontiguousarray(r)
        out = kernels.empty(len(r), self.n)
        first, second = (factor.upper, factor.lower) if transposed else (factor.lower, factor.upper)
        kernels.call(
            "solve", self.n, panels.count, panels.first, panels.begin, panels.rows, panels.start, first, second,
            factor.inverse, panels.order, self._scale_of(kernels), len(r), r, out, kernels.empty(len(r), self.n),
        )  # fmt: skip
        return out

    @cached_property
    def masks_boundary(self) -> bool:
        """Whether part 1 times anything has no boundary values, so that ``C`` does not matter in :meth:`step`."""
        _, outer, rows = self._split
        return not outer or not self._parts[1][rows].count_nonzero()

    def step(self, factor: LaneFactor, y: np.ndarray, r: np.ndarray, *, transposed: bool) -> None:
        r"""Add :math:`y A^{-1} X_1 r` to lanes ``(batch, n, 2, W)``, or :math:`y X_1^T A^{-T} r`, in place; where
        :attr:`masks_boundary`.
        """
        kernels, panels = factor.kernels, self.panels
        X = self._matrix(kernels, ("part", 1, transposed), lambda: self._parts[1].T if transposed else self._parts[1])
        first, second = (factor.upper, factor.lower) if transposed else (factor.lower, factor.upper)
        kernels.call(
            "stage", transposed, self.n, panels.count, panels.first, panels.begin, panels.rows, panels.start, first,
            second, factor.inverse, panels.order, self._scale_of(kernels), X.indptr, X.indices, X.values, len(r),
            kernels.weights(y), r, *kernels.scratch(len(r), self.n),
        )  # fmt: skip

    def multiply(self, kernels: LaneKernels, p: int, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Part ``p``, or its transpose, times lanes ``(batch, n, 2, W)``."""
        X = self._parts[p]
        return kernels.product(self._matrix(kernels, ("part", p, transposed), lambda: X.T if transposed else X), r)

    def inaccurate(self, factor: LaneFactor) -> list[int]:
        r"""Lanes whose solution of a trial system :math:`A x = M t` is not accurate, or not finite.

        The residual, in double precision, is compared with the right-hand side; in single precision, where it may be
        large without harm, the solution's error is: that of :math:`t + y x`, which is what a step takes the solution
        for. It is estimated by another solve, for the residual.
        """
        kernels, y, t = factor.kernels, factor.y, np.exp(1j * np.arange(self.n) ** 2)
        weights = np.array([self._weights(complex(v)) for v in y])
        is_single = kernels.dtype.char == "f"
        b = (self._parts[1] @ (t + 1)) if is_single else t

        def solve(right: np.ndarray) -> np.ndarray:
            lanes = kernels.empty(1, self.n)
            lanes[0, :, 0], lanes[0, :, 1] = right.real, right.imag
            x = self.solve(factor, lanes, transposed=False)[0].astype(float)
            return x[:, 0] + 1j * x[:, 1]

        with np.errstate(invalid="ignore", over="ignore"):
            x = solve(b[:, None])
            residual = b[:, None] - sum(w * real_product(X, x) for X, w in zip(self._parts, weights.T, strict=True))
            if is_single:
                error, scale = np.abs(y) * norm(solve(residual)), norm((t + 1)[:, None] + y * x)
            else:
                error, scale = np.abs(residual).max(axis=0, initial=0), 1
            wrong = ~(error <= INACCURATE[kernels.dtype.char] * scale)
        return np.flatnonzero(wrong[: factor.count]).tolist()

    def _matrix(self, kernels: LaneKernels, key: tuple, make: Callable[[], csr_matrix]) -> RealMatrix:
        """A real matrix for the kernels, made once for each precision."""
        key = (*key, kernels.dtype.char)
        if key not in self._matrices:
            self._matrices[key] = RealMatrix.of(make(), kernels.dtype)
        return self._matrices[key]

    def _scale_of(self, kernels: LaneKernels) -> np.ndarray:
        """Scales of the reordered unknowns."""
        return self._scale[self.panels.order].astype(kernels.dtype)


def _is_symmetric(X: csr_matrix) -> bool:
    """Whether a matrix is its transpose but for round-off."""
    return abs(X - X.T).max() <= _SYMMETRIC * abs(X).max() if X.nnz else True


def norm(x: np.ndarray) -> np.ndarray:
    """Norms of columns."""
    return np.linalg.norm(x, axis=0)
