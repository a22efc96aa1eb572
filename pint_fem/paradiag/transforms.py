"""Real Fourier transforms over time steps by compiled kernels (``time_transform.c``), W unknowns at once, scaled on the
way in and out. An unknown's numbers do not depend on the other unknowns of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from functools import cache
from pathlib import Path

import numpy as np

from pint_fem.kernels.lanes.compiled import address, aligned, library
from pint_fem.paradiag.lane_kernels import WIDTHS, long

__all__ = ["TimeTransform", "time_transform"]

LARGEST = 64
"""Largest prime factor of a length that the kernels transform."""


_VECTORISED = ("-ftree-loop-vectorize", "-ftree-slp-vectorize", "-ffp-contract=off")
"""Flags for loops that convert and interleave numbers. Products and sums are not fused: results that are added to
states are the same whether that is a pass of its own or not.
"""


class TimeTransform:
    """Transforms of a length and precision.

    Parameters
    ----------
    shared
        The compiled library.
    nsteps
        ``N``.
    dtype
        Type of real and imaginary parts.
    radices
        Lengths of the passes, whose product is ``N/2``, or ``N`` where that is odd.
    """

    def __init__(self, shared: CDLL, nsteps: int, dtype: np.dtype, radices: Sequence[int]):
        self._library, self.nsteps, self.dtype = shared, nsteps, dtype
        self.complex = np.result_type(dtype, np.complex64)
        length = nsteps // 2 if nsteps % 2 == 0 else nsteps
        self._radices = np.array(radices, np.int32)
        self._roots = np.exp(-2j * np.pi * np.arange(length) / length).astype(self.complex)
        self._half = np.exp(-2j * np.pi * np.arange(nsteps // 2 + 1) / nsteps).astype(self.complex)
        self._work = [aligned((length, 2, WIDTHS[dtype.char][0]), dtype, zero=False) for _ in range(2)]
        self._fixed = nsteps, length, len(radices), *map(address, (self._radices, self._roots, self._half))

    def forward(self, rows: np.ndarray, out: np.ndarray, scale: np.ndarray | None = None) -> None:
        """Write the transform of C-contiguous rows ``(N, c)`` to ``(N//2 + 1, c)``: rows in the transforms' precision,
        or in double precision, multiplied by one number ``scale`` for each.
        """
        columns = rows.shape[1]
        self._library.forward_transform(
            *self._fixed, long(columns), long(columns), address(rows), address(scale), long(columns), address(out),
            *map(address, self._work),
        )  # fmt: skip

    def backward(self, spectrum: np.ndarray, out: np.ndarray, scale: np.ndarray | None = None) -> None:
        """The inverse transform of ``(N//2 + 1, c)`` to C-contiguous ``(N, c)``: written to it in the transforms'
        precision, or, with one number ``scale`` for each row, multiplied by it and added in double precision.
        """
        columns = spectrum.shape[1]
        self._library.backward_transform(
            *self._fixed, long(columns), long(columns), address(spectrum), address(scale), long(columns), address(out),
            *map(address, self._work),
        )  # fmt: skip

    def add(self, rows: np.ndarray, out: np.ndarray, scale: np.ndarray) -> None:
        """Add C-contiguous rows ``(k, c)``, one number ``scale`` multiplied by each, to rows of double precision."""
        self._library.add_scaled(len(rows), long(rows.shape[1]), address(rows), address(scale), address(out))


def time_transform(nsteps: int, kind: str) -> TimeTransform | None:
    """Transforms of single (``"f"``) or double precision (``"d"``), ``None`` without kernels or where the length has a
    prime factor above :data:`LARGEST`.
    """
    radices = _radices(nsteps)
    if radices is None:
        return None
    real = {"f": "float", "d": "double"}[kind]
    shared = library(_SOURCE, (*_VECTORISED, f"-DREAL={real}", f"-DW={WIDTHS[kind][0]}"))
    return None if shared is None else _transform(shared, nsteps, kind, radices)


@cache
def _transform(shared: CDLL, nsteps: int, kind: str, radices: tuple[int, ...]) -> TimeTransform:
    return TimeTransform(shared, nsteps, np.dtype(kind), radices)


@cache
def _radices(nsteps: int) -> tuple[int, ...] | None:
    """Lengths of the passes of a transform, ``None`` where there is a large prime factor."""
    rest, radices = nsteps // 2 if nsteps % 2 == 0 else nsteps, []
    for radix in (4, 2, 3, *range(5, LARGEST, 2)):
        while rest % radix == 0:
            radices.append(radix)
            rest //= radix
    return None if rest > 1 else tuple(radices)


_SOURCE = Path(__file__).with_name("time_transform.c").read_text()
