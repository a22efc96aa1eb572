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

from pint_fem.kernels.lanes.compiled import address, library
from pint_fem.kernels.lanes.structures import scratch

__all__ = ["CellProducts"]

_WIDTH = 32
"""States of a block, as in ``cell_products.c``."""


@cache
def _source() -> str:
    return (Path(__file__).parent / "cell_products.c").read_text()


class CellProducts:
    """Products of two slabs in each cell.

    Parameters
    ----------
    rows, columns
        Numbers of the unknowns of each cell in the two states, ``(cells, a)`` and ``(cells, b)``; -1 for one that is
        left out.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray):
        self._rows, self._columns = (np.ascontiguousarray(a, dtype=np.int32) for a in (rows, columns))
        self.shape = (len(rows), rows.shape[1], columns.shape[1])
        compiled = library(_source())
        self._compiled = None if compiled is None else compiled.cell_products
        if self._compiled is not None:
            integers, pointers = [ctypes.c_int64, ctypes.c_int, ctypes.c_int], [ctypes.c_void_p] * 2
            states = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64] * 2
            lanes = [ctypes.c_int64, ctypes.c_double, *[ctypes.c_void_p] * 3]
            self._compiled.argtypes, self._compiled.restype = [*integers, *pointers, *states, *lanes], None

    def add(self, p: np.ndarray, u: np.ndarray, out: np.ndarray, factor: float = 1.0) -> None:
        """Add ``factor`` times the sums of products of states ``(k, n)`` to ``out``, a contiguous array ``(cells, a,
        b)``.
        """
        if self._compiled is None:
            for first in range(0, len(p), _WIDTH):
                left, right = (np.pad(x[first : first + _WIDTH].T, ((0, 1), (0, 0))) for x in (p, u))
                out += factor * np.einsum("eaw,ebw->eab", left[self._rows], right[self._columns])
            return
        p, u = (x if x.strides[1] == 8 else np.ascontiguousarray(x) for x in (p, u))
        sizes = [8 * (x.shape[1] + 1) * _WIDTH for x in (p, u)]
        memory = scratch(sum(sizes))
        states = [part for x in (p, u) for part in (x.shape[1], address(x), x.strides[0] // 8, x.strides[1] // 8)]
        work = address(memory), address(memory[sizes[0] :])
        self._compiled(
            *self.shape, address(self._rows), address(self._columns), *states, len(p), factor, *work, address(out)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the unknowns' numbers."""
        return self._rows.nbytes + self._columns.nbytes
