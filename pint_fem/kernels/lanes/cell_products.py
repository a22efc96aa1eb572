r"""Sums over states of outer products, restricted to the unknowns that share a cell.

For states :math:`p_i` and :math:`u_i` and the unknowns ``a``, ``b`` of a cell ``e``

.. math::  C_{e,ab} = \sum_i p_{i,a}\, u_{i,b} ,

which is all that the derivative of :math:`\sum_i p_i^T A(z) u_i` by ``z`` requires of them where ``A`` is assembled
from integrals over cells: a sampled product of two slabs, read once, in blocks of states on lanes.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from pint_fem.kernels.lanes.compiled import address, aligned, library

__all__ = ["CellProducts"]

_WIDTH = 16
"""States of a block, as in ``cell_products.c``."""


@cache
def _source() -> str:
    return (Path(__file__).parent / "cell_products.c").read_text()


class CellProducts:
    """Products of two slabs in each cell.

    Parameters
    ----------
    rows, columns
        Numbers of the unknowns of each cell in the two states, ``(cells, a)`` and ``(cells, b)``.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray):
        self._rows, self._columns = (np.ascontiguousarray(a, dtype=np.int32) for a in (rows, columns))
        self.shape = (len(rows), rows.shape[1], columns.shape[1])
        compiled = library(_source())
        self._compiled = None if compiled is None else compiled.cell_products
        if self._compiled is not None:
            pointers, sizes = [ctypes.c_void_p] * 5, [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
            self._compiled.argtypes, self._compiled.restype = [*sizes, *pointers], None

    def add(self, p: np.ndarray, u: np.ndarray, out: np.ndarray) -> None:
        """Add the sums of products of states ``(k, n)`` to ``out``, a contiguous array ``(cells, a, b)``."""
        left, right = (aligned((states.shape[1], _WIDTH)) for states in (p, u))
        for first in range(0, len(p), _WIDTH):
            count = min(_WIDTH, len(p) - first)
            for lanes, states in ((left, p), (right, u)):
                lanes[:, :count] = states[first : first + count].T
                lanes[:, count:] = 0.0
            if self._compiled is not None:
                given = (self._rows, self._columns, left, right, out)
                self._compiled(*self.shape, *map(address, given))
            else:
                out += np.einsum("eaw,ebw->eab", left[self._rows], right[self._columns])

    @property
    def nbytes(self) -> int:
        """Bytes of the unknowns' numbers."""
        return self._rows.nbytes + self._columns.nbytes
