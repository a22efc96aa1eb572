r"""Spatial coarsening between levels: a pair of linear maps on blocks of states.

With :math:`R` and :math:`P` the coarse equation is that of :mod:`~pint_fem.mgrit.cycle` for :math:`V = R u`, with
:math:`R r` for the residual, and the correction is :math:`u \leftarrow u + P (U^c - V)`. Transposing a cycle swaps and
transposes them, :math:`R \to P^T, P \to R^T`: then the adjoint's cycle is the exact transpose of the forward one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

__all__ = ["Transfer"]

BlockMap = Callable[[np.ndarray], np.ndarray]


class Matrix(Protocol):
    """What :meth:`Transfer.from_matrices` takes, such as a numpy array or a sparse matrix of scipy."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of rows and columns."""

    @property
    def T(self) -> Matrix:
        """The transpose."""

    def __matmul__(self, other: np.ndarray, /) -> np.ndarray: ...


class Transfer:
    """Restriction and prolongation between a level and the next.

    Parameters
    ----------
    restrict, prolong
        ``(k, *fine) -> (k, *coarse)`` and back; a state's result must not depend on the others in the block.
    restrict_transposed, prolong_transposed
        Their transposes, for :attr:`transposed`.
    """

    def __init__(
        self,
        restrict: BlockMap,
        prolong: BlockMap,
        restrict_transposed: BlockMap | None = None,
        prolong_transposed: BlockMap | None = None,
    ):
        self.restrict, self.prolong = restrict, prolong
        self.restrict_transposed, self.prolong_transposed = restrict_transposed, prolong_transposed

    @classmethod
    def from_matrices(cls, R: Matrix, P: Matrix) -> Transfer:
        """From matrices ``(n_coarse, n_fine)`` and ``(n_fine, n_coarse)``: anything with ``@`` and ``.T``."""
        if R.shape != P.shape[::-1]:
            raise ValueError(f"restriction {R.shape} and prolongation {P.shape} do not fit each other")
        return cls(*(_by_rows(A) for A in (R, P, R.T, P.T)))

    @classmethod
    def make(cls, given: Transfer | Sequence | None) -> Transfer | None:
        """From a transfer, a pair of maps, a pair of matrices, or nothing (same space)."""
        if given is None or isinstance(given, Transfer):
            return given
        pair = tuple(given)
        if len(pair) != 2:
            raise ValueError(f"transfer {given!r}: give a pair (restriction, prolongation)")
        return cls(*pair) if all(map(callable, pair)) else cls.from_matrices(*pair)

    @property
    def transposed(self) -> Transfer:
        """The transfer of the adjoint hierarchy.

        Raises
        ------
        ValueError
            If the transposed maps were not given.
        """
        if self.restrict_transposed is None or self.prolong_transposed is None:
            raise ValueError("the transfer has no transposed maps: give restrict_transposed and prolong_transposed")
        return Transfer(self.prolong_transposed, self.restrict_transposed, self.prolong, self.restrict)

    def of_batches(self) -> Transfer:
        """The transfer of batches of states, ``(k, members, *fine) -> (k, members, *coarse)`` and back."""
        back = [None if f is None else _of_batch(f) for f in (self.restrict_transposed, self.prolong_transposed)]
        return Transfer(_of_batch(self.restrict), _of_batch(self.prolong), *back)


def _of_batch(apply: BlockMap) -> BlockMap:
    """A map of blocks ``(k, *state)`` for batches ``(k, members, *state)``."""

    def batched(block: np.ndarray) -> np.ndarray:
        count = block.shape[0] * block.shape[1]
        out = np.asarray(apply(block.reshape(count, *block.shape[2:])))
        return out.reshape(*block.shape[:2], *out.shape[1:])

    return batched


def _by_rows(A: Matrix) -> BlockMap:
    """One product per state: a result does not depend on the size of the block."""

    def apply(block: np.ndarray) -> np.ndarray:
        out = np.empty((len(block), A.shape[0]))
        for row, result in zip(block, out, strict=True):
            result[:] = A @ row
        return out

    return apply
