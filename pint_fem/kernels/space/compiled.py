"""The compiled kernels on blocks of states that are stored by rows, ``(n, W)``."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

from pint_fem.kernels.lanes.compiled import library

__all__ = ["LANES", "BlockKernels", "block_kernels", "lanes_for"]

LANES = (1, 8, 16)
"""Numbers of states that kernels are compiled for."""
_VECTOR = """
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
"""
_TYPES = {np.dtype(np.float64): ("double", "d"), np.dtype(np.float32): ("float", "s")}
_CSR = [c_int, c_void_p, c_void_p, c_void_p]
_ARGUMENTS = {
    "product": [*_CSR, c_double, c_double, c_void_p, c_void_p],
    "residual": [*_CSR, c_void_p, c_void_p, c_void_p],
    "smooth": [*_CSR, c_void_p, c_double, c_double, c_void_p, c_void_p, c_void_p],
    "start": [c_int, c_void_p, c_double, c_void_p, c_void_p, c_void_p],
    "add": [c_int, c_void_p, c_void_p],
    "dots": [c_int, c_void_p, c_void_p, c_void_p],
    "squares": [c_int, c_void_p, c_void_p, c_void_p],
    "combine": [c_int, c_void_p, c_void_p, c_void_p, c_void_p],
    "gather": [c_int, c_void_p, c_void_p, c_void_p],
    "full": [c_int, c_int, c_void_p, c_void_p, c_void_p],
    "narrow": [c_int, c_void_p, c_void_p, c_void_p],
    "widen": [c_int, c_void_p, c_void_p, c_void_p],
}


class BlockKernels:
    """The functions for a number of states and a type of numbers, by the names of ``blocks.c``."""

    product: ctypes._CFuncPtr
    residual: ctypes._CFuncPtr
    smooth: ctypes._CFuncPtr
    start: ctypes._CFuncPtr
    add: ctypes._CFuncPtr
    dots: ctypes._CFuncPtr
    squares: ctypes._CFuncPtr
    combine: ctypes._CFuncPtr
    gather: ctypes._CFuncPtr
    full: ctypes._CFuncPtr
    narrow: ctypes._CFuncPtr
    widen: ctypes._CFuncPtr

    def __init__(self, found: ctypes.CDLL, suffix: str):
        for name, arguments in _ARGUMENTS.items():
            if name in ("narrow", "widen") and "_s" not in suffix:
                continue
            function = getattr(found, name + suffix)
            function.argtypes, function.restype = arguments, None
            setattr(self, name, function)


@cache
def _source() -> str:
    body = (Path(__file__).parent / "blocks.c").read_text()
    parts = [_VECTOR]
    for dtype, (name, letter) in _TYPES.items():
        for width in LANES:
            defined = {"REAL": name, "SIZE": dtype.itemsize, "W": width, "NAME(x)": f"x##_{letter}{width}"}
            parts += [f"#define {key} {value}" for key, value in defined.items()]
            parts += [body, "#undef REAL\n#undef SIZE\n#undef W\n#undef NAME\n"]
    return "\n".join(parts)


@cache
def block_kernels(lanes: int, dtype: np.dtype | type = np.float64) -> BlockKernels | None:
    """The kernels for blocks of ``lanes`` states, one of :data:`LANES`, or ``None`` where nothing is compiled."""
    found = library(_source())
    return None if found is None else BlockKernels(found, f"_{_TYPES[np.dtype(dtype)][1]}{lanes}")


def lanes_for(count: int) -> int:
    """The number of lanes by which some states are solved for: the smallest one that holds them, or the largest."""
    return next((width for width in LANES if width >= count), LANES[-1])
