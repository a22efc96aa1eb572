"""Products of a sparse matrix with many states on lanes."""

from __future__ import annotations

import ctypes

import numpy as np
from scipy.sparse import csr_matrix

from pint_fem.kernels.lanes.compiled import address
from pint_fem.kernels.lanes.structures import MatrixStruct, StatesStruct, kernels, scratch

__all__ = ["LaneProduct"]

_WIDE, _NARROW = 16, 8


class LaneProduct:
    """Products ``out[i] = A u[i]``, bitwise the same for any number of states and any place among them.

    Parameters
    ----------
    matrix
        A real matrix, ``(rows, columns)``.
    """

    def __init__(self, matrix: csr_matrix):
        rows, columns = matrix.shape
        self._products = kernels().product
        self._arrays = matrix.indptr.astype(np.int32), matrix.indices.astype(np.int32), matrix.data.astype(float)
        self._matrix = MatrixStruct(rows, *(address(a) for a in self._arrays))
        self._places = [np.arange(n, dtype=np.int32) for n in (columns, rows)]
        self._vector_nbytes = [8 * (n + 1) * _WIDE for n in (columns, rows)]

    def __call__(self, states: np.ndarray, out: np.ndarray) -> None:
        """Write the products with states ``(k, columns)`` to ``out``, ``(k, rows)``; states are contiguous.

        Raises
        ------
        ValueError
            If arrays have other shapes.
        """
        if any(a.shape != (len(out), len(place)) for a, place in zip((states, out), self._places, strict=True)):
            raise ValueError(f"products of states {states.shape} for {out.shape} do not fit the matrix")
        width = 1 if len(states) == 1 else _NARROW if len(states) <= _NARROW else _WIDE
        given = [
            StatesStruct(a.ctypes.data, a.strides[0] // 8, 0, place.ctypes.data, len(place))
            for a, place in zip((states, out), self._places, strict=True)
        ]
        memory, first = scratch(sum(self._vector_nbytes)), self._vector_nbytes[0]
        work = address(memory), address(memory[first:])
        structs = [ctypes.byref(s) for s in (self._matrix, *given)]
        self._products[width](structs[0], len(states), structs[1], structs[2], *work)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return sum(a.nbytes for a in (*self._arrays, *self._places))
