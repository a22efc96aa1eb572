"""Calls of the compiled kernels for W frequencies at once (``frequency_lanes.c``), by precision and number of lanes.

*Lanes* are arrays ``(..., n, 2, W)``: real and imaginary parts of W frequencies side by side for each unknown. Arrays
are C-contiguous, of the kernels' type, and begin at multiples of 64 bytes where they are large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import CDLL, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pint_fem.kernels.lanes.compiled import address, aligned, library

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["WIDTHS", "LaneKernels", "RealMatrix", "groups", "lane_kernels", "long"]

WIDTHS = {"f": (16, 4), "d": (8, 2)}
"""Numbers of lanes by type: the widest vectors, and those of a few frequencies that remain."""


class RealMatrix(NamedTuple):
    """A real sparse matrix by rows, as the kernels read it."""

    shape: tuple[int, int]
    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, X: csr_matrix, dtype: np.dtype) -> RealMatrix:
        """The matrix with entries of type ``dtype``."""
        from scipy.sparse import csr_matrix  # the algebra of ParaDiag does without

        X = csr_matrix(X)
        X.sort_indices()
        return cls(X.shape, X.indptr.astype(np.int32), X.indices.astype(np.int32), X.data.astype(dtype))


class LaneKernels:
    """The kernels of one precision and width.

    Parameters
    ----------
    shared
        The compiled library.
    dtype, width
        Type of real and imaginary parts; number of lanes ``W``.
    """

    def __init__(self, shared: CDLL, dtype: np.dtype, width: int):
        self._library, self.dtype, self.width = shared, dtype, width
        self._scratch: list[np.ndarray] = []
        self.complex = np.result_type(dtype, np.complex64)

    def empty(self, *shape: int) -> np.ndarray:
        """Lanes of uninitialised numbers, ``(*shape, 2, W)``."""
        return aligned((*shape, 2, self.width), self.dtype, zero=False)

    def scratch(self, batch: int, n: int) -> Sequence[np.ndarray]:
        """Two arrays of lanes ``(batch, n, 2, W)`` for use within a kernel, the same ones at every call."""
        if not self._scratch or self._scratch[0].shape[:2] != (batch, n):
            self._scratch = [self.empty(batch, n) for _ in range(2)]
        return self._scratch

    def weights(self, values: np.ndarray) -> np.ndarray:
        """Complex numbers ``(..., W)`` as lanes ``(..., 2, W)``."""
        out = self.empty(*values.shape[:-1])
        out[..., 0, :], out[..., 1, :] = values.real, values.imag
        return out

    def to_lanes(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """At most W rows of frequencies ``(w, batch, n)`` as lanes ``(batch, n, 2, W)``, in ``out`` if it is given."""
        rows = np.ascontiguousarray(rows, dtype=self.complex)
        count, batch, n = rows.shape
        out = self.empty(batch, n) if out is None else out
        for b in range(batch):
            self._library.to_lanes(count, long(n), long(batch * n), address(rows[:, b]), address(out[b]))
        return out

    def from_lanes(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """Write lanes ``(batch, n, 2, W)`` to C-contiguous rows of frequencies, ``(w, batch, n)``."""
        count, batch, n = rows.shape
        for b in range(batch):
            self._library.from_lanes(count, long(n), long(batch * n), address(lanes[b]), address(rows[:, b]))

    def product(self, X: RealMatrix, x: np.ndarray) -> np.ndarray:
        """A real matrix times lanes ``(batch, columns, 2, W)``."""
        rows, columns = X.shape
        out = self.empty(len(x), rows)
        x = np.ascontiguousarray(x)
        self._library.product(
            rows, columns, address(X.indptr), address(X.indices), address(X.values), len(x), address(x), address(out)
        )
        return out

    def add_multiple(self, factors: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """``y += factors x`` in place, with a complex number of each frequency, ``(W,)``."""
        factors = self.weights(factors)
        self._library.add_multiple(long(x.size // (2 * self.width)), address(factors), address(x), address(y))

    def combine(self, factors: np.ndarray, arrays: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Write the sum of products of C-contiguous arrays of lanes with complex numbers ``(arrays, W)`` to ``out``, of
        their shape.
        """
        weights = self.weights(factors)
        pointers = (c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
        size = long(out.size // (2 * self.width))
        self._library.combine(len(arrays), size, address(weights), pointers, address(out))

    def multiply(self, factors: np.ndarray, x: np.ndarray) -> None:
        """``x *= factors`` in place, with a complex number of each frequency, ``(W,)``."""
        factors = self.weights(factors)
        self._library.add_multiple(long(x.size // (2 * self.width)), address(factors), address(x), None)

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function of the library with arrays and integers, of 32 bits where they are Python's."""
        return getattr(self._library, name)(*(address(a) if isinstance(a, np.ndarray) else a for a in arguments))


def long(number: int) -> c_int64:
    """A 64-bit argument of a kernel."""
    return c_int64(number)


def lane_kernels(kind: str, width: int) -> LaneKernels | None:
    """The kernels for single (``"f"``) or double precision (``"d"``), ``None`` where there are none."""
    real = {"f": "float", "d": "double"}[kind]
    shared = library(_SOURCE, (f"-DREAL={real}", f"-DW={width}"))
    return None if shared is None else _kernels(shared, kind, width)


@cache
def _kernels(shared: CDLL, kind: str, width: int) -> LaneKernels:
    return LaneKernels(shared, np.dtype(kind), width)


def groups(indices: Sequence[int], kind: str) -> Iterator[tuple[Sequence[int], LaneKernels]]:
    """Groups of frequencies and their kernels; a few that remain have narrower vectors."""
    begin = 0
    while begin < len(indices):
        rest = len(indices) - begin
        width = next((w for w in reversed(WIDTHS[kind]) if rest <= w), WIDTHS[kind][0])
        yield indices[begin : begin + width], lane_kernels(kind, width)
        begin += width


_SOURCE = Path(__file__).with_name("frequency_lanes.c").read_text()
