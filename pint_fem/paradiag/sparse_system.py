"""The shifted systems of one rank's sparse matrices: W frequencies on lanes, or SuperLU for one at a time.

Without pivots off the diagonal, an ordering holds for all frequencies. They are hardly ever needed: real parts of these
matrices are positive definite for heat, and complex shifts keep those of waves away from zero. A trial solve shows it
for each frequency, and a factor that is not accurate is made by SuperLU with pivoting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix, identity
from scipy.sparse.linalg import splu

from pint_fem.paradiag.lane_factors import LaneFactor, LaneSystem
from pint_fem.paradiag.lane_kernels import LaneKernels, groups, lane_kernels
from pint_fem.paradiag.panels import minimum_degree, on_pattern, ones, permuted, real_product
from pint_fem.paradiag.systems import ShiftedSystem

__all__ = ["SparseSystem", "Weights", "plain_weights", "trial"]

Weights = Callable[[complex], Sequence[complex]]


def plain_weights(y: complex) -> Sequence[complex]:
    """The weights of ``S`` and ``M`` in ``S - y M``."""
    return 1.0, -y


class SparseSystem(ShiftedSystem):
    """A system on one rank, with one ordering for all shifts.

    Parameters
    ----------
    parts
        Real matrices whose weighted sum the system is: ``S``, ``M``, and others; with structurally symmetric union.
    weights
        Weights of the parts as a function of the shift.
    """

    def __init__(self, parts: Sequence[csr_matrix], weights: Weights = plain_weights):
        self._parts, self._weights = [csr_matrix(X) for X in parts], weights
        self._M, self._MT = self._parts[1], csr_matrix(parts[1].T)
        self._trial = trial(parts[0].shape[0])

    @property
    def has_lanes(self) -> bool:
        """Whether there are kernels for several frequencies at once."""
        return lane_kernels("f", 4) is not None

    @cached_property
    def _lanes(self) -> LaneSystem:
        return LaneSystem(self._parts, self._weights)

    @cached_property
    def _pattern(self) -> tuple[np.ndarray, csc_matrix, list[np.ndarray]]:
        """SuperLU's order, the reordered pattern by columns and the parts' entries on it."""
        n = self._parts[0].shape[0]
        pattern = sum((ones(X) + ones(X.T) for X in self._parts), identity(n, format="csr"))
        # the ordering depends on the pattern alone, with the entries that couple boundary values: without them there is
        # several times the fill when they are not zero
        order = minimum_degree(pattern)
        # by columns: rows of the transpose
        across = permuted(pattern, order)
        return order, across, [on_pattern(permuted(csr_matrix(X.T), order), across) for X in self._parts]

    def factor(self, y: complex) -> tuple[Any, int]:
        """SuperLU's factor of the matrix of ``y``, and its size in bytes."""
        _, pattern, parts = self._pattern
        data = sum(w * part for w, part in zip(self._weights(y), parts, strict=True))
        matrix = csc_matrix((data, pattern.indices, pattern.indptr), shape=pattern.shape)
        try:
            lu = splu(matrix, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        except RuntimeError:  # a pivot is zero, as in a saddle point
            lu = None
        if lu is None or not np.abs(matrix @ lu.solve(self._trial) - self._trial).max(initial=0) <= _WRONG:
            lu = splu(matrix, permc_spec="COLAMD", diag_pivot_thresh=1.0)
        return lu, 20 * lu.nnz  # a complex number and its row for each entry

    def solve(self, factor: Any, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for a complex vector with the matrix of ``y`` or its (not conjugate) transpose."""
        out, order = np.empty_like(r), self._pattern[0]
        out[order] = factor.solve(r[order], "T" if transposed else "N")
        return out

    def mass(self, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r``."""
        return real_product(self._MT if transposed else self._M, r)

    def factor_lanes(self, kernels: LaneKernels, y: np.ndarray) -> tuple[LaneFactor, int]:
        """Factors of the matrices of at most W shifts, and their bytes.

        Shifts for which single precision is not accurate have double precision, and those that require pivots SuperLU.
        """
        factor = self._lanes.factor(kernels, y)
        nbytes, wrong = factor.nbytes, self._lanes.inaccurate(factor)
        if kernels.dtype.char == "d":
            for lane in wrong:
                other, size = self.factor(complex(y[lane]))
                factor.others.append((lane, other))
                nbytes += size
            return factor, nbytes
        for lanes, precise in groups(wrong, "d"):
            other, size = self.factor_lanes(precise, y[lanes])
            factor.others.append((lanes, other))
            nbytes += size
        return factor, nbytes

    def solve_lanes(
        self, kernels: LaneKernels, factor: LaneFactor, y: np.ndarray, r: np.ndarray, *, transposed: bool
    ) -> np.ndarray:
        """Solve for lanes ``(batch, n, 2, W)``."""
        out = self._lanes.solve(factor, r, transposed=transposed)
        for lanes, other in factor.others:
            if isinstance(other, LaneFactor):
                precise, count = other.kernels, len(lanes)
                source = precise.empty(*r.shape[:2])
                source[..., :count], source[..., count:] = r[..., lanes], 0
                result = self.solve_lanes(precise, other, other.y, source, transposed=transposed)
                out[..., lanes] = result[..., :count]
                continue
            for source, target in zip(r[..., lanes], out[..., lanes], strict=True):
                x = self.solve(other, complex(y[lanes]), source[:, 0] + 1j * source[:, 1], transposed=transposed)
                target[:, 0], target[:, 1] = x.real, x.imag
        return out

    def step_lanes(
        self, kernels: LaneKernels, factor: LaneFactor, y: np.ndarray, r: np.ndarray, *, transposed: bool
    ) -> None:
        """Add ``y (S - y M)^-1 M r`` to lanes, or ``y M^T (S - y M)^-T r``, in place."""
        if factor.others or not self._lanes.masks_boundary:
            super().step_lanes(kernels, factor, y, r, transposed=transposed)
        else:
            self._lanes.step(factor, y, r, transposed=transposed)

    def mass_lanes(self, kernels: LaneKernels, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r`` of lanes ``(batch, n, 2, W)``."""
        return self._lanes.multiply(kernels, 1, r, transposed=transposed)


def trial(n: int) -> np.ndarray:
    """The right-hand side by whose solution a factor is judged, complex ``(n,)``."""
    return np.exp(1j * np.arange(n) ** 2)


_WRONG = 1e-9
"""Relative residual of a trial solve above which a factor is made anew with pivoting."""
