r"""Spatial coarsening between levels: a pair of linear maps on blocks of states.

With :math:`R` and :math:`P` the coarse equation is that of :mod:`~pint_fem.mgrit.cycle` for :math:`V = R u`, with
:math:`R r` for the residual, and the correction is :math:`u \leftarrow u + P (U^c - V)`. Transposing a cycle swaps and
transposes them, :math:`R \to P^T, P \to R^T`: then the adjoint's cycle is the exact transpose of the forward one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from pint_fem.all_at_once.arrays import Array, is_tensor, torch_module
from pint_fem.errors import InputError

__all__ = ["Transfer"]

BlockMap = Callable[[Array], Array]


class Matrix(Protocol):
    """What :meth:`Transfer.from_matrices` takes, such as a numpy array, a sparse matrix of scipy or a torch tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of rows and columns."""

    @property
    def T(self) -> Matrix:
        """The transpose."""

    def __matmul__(self, other: Array, /) -> Array: ...


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
        """From matrices ``(n_coarse, n_fine)`` and ``(n_fine, n_coarse)``: anything with ``@`` and ``.T``.

        For tensors, numpy arrays and sparse matrices of scipy are copied to their device once.
        """
        if tuple(R.shape) != tuple(P.shape[::-1]):
            raise ValueError(f"restriction {tuple(R.shape)} and prolongation {tuple(P.shape)} do not fit each other")
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

    def batched(block: Array) -> Array:
        count = block.shape[0] * block.shape[1]
        out = apply(block.reshape(count, *block.shape[2:]))
        out = out if is_tensor(out) else np.asarray(out)
        return out.reshape(*block.shape[:2], *out.shape[1:])

    return batched


def _by_rows(A: Matrix) -> BlockMap:
    """One product per state: a result does not depend on the size of the block."""
    copies: dict[Any, Any] = {}

    def apply(block: Array) -> Array:
        if is_tensor(block):
            kind = block.dtype, block.device
            if kind not in copies:
                copies[kind] = _as_tensor(A, *kind)
            return _product(copies[kind], block)
        out = np.empty((len(block), A.shape[0]))
        for row, result in zip(block, out, strict=True):
            result[:] = A @ row
        return out

    return apply


def _as_tensor(A: Matrix, dtype: Any, device: Any) -> Any:
    """A matrix as a tensor."""
    torch, where = torch_module(), dict(dtype=dtype, device=device)
    if is_tensor(A) or isinstance(A, np.ndarray):
        return torch.as_tensor(A, **where)
    if hasattr(A, "tocoo"):
        entries = A.tocoo()
        places, values = np.stack([entries.row, entries.col]), torch.as_tensor(entries.data, **where)
        return torch.sparse_coo_tensor(places, values, A.shape, check_invariants=True, device=device).coalesce()
    raise InputError(
        f"a transfer's matrix is a {type(A).__name__}: for tensors give a tensor, a numpy array or a matrix of scipy"
    )


def _product(A: Any, block: Array) -> Array:
    """``A u`` for each state of a block: one product per state on a CPU, one of matrices on other devices."""
    if block.device.type != "cpu" and A.layout is torch_module().strided:
        return block @ A.T
    out = block.new_empty((len(block), A.shape[0]))
    for row, result in zip(block, out, strict=True):
        result.copy_(A @ row)
    return out
