"""The compiled kernels on lanes, and the structs that they take, as in ``types.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from threading import local
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from pint_fem.collective import all_ranks
from pint_fem.kernels.lanes.compiled import aligned, library, switch_off
from pint_fem.logs import logger

__all__ = [
    "WIDTHS",
    "FactorStruct",
    "Kernels",
    "LowerStruct",
    "MatrixStruct",
    "OperationStruct",
    "ProgramStruct",
    "ProjectionStruct",
    "StatesStruct",
    "kernels",
    "kernels_on_all_or_none",
    "pointers",
    "scratch",
]

WIDTHS = {np.dtype(np.float64): (1, 8, 16, 32), np.dtype(np.float32): (16, 32)}
"""Numbers of lanes that kernels are compiled for, by the type of their numbers."""
_SUFFIX = {np.dtype(np.float64): "d", np.dtype(np.float32): "s"}
_C_TYPE = {np.dtype(np.float64): "double", np.dtype(np.float32): "float"}
_VECTOR = """
#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
"""


class LowerStruct(Structure):
    """A unit lower triangular matrix by panels."""

    _fields_ = [
        ("n", c_int), ("panels", c_int), ("starts", c_void_p), ("rows", c_void_p), ("row_ptr", c_void_p),
        ("triangle_ptr", c_void_p), ("tile_ptr", c_void_p), ("triangles", c_void_p), ("tiles", c_void_p),
    ]  # fmt: skip


class FactorStruct(Structure):
    """The factor ``L D R^T``."""

    _fields_ = [("left", POINTER(LowerStruct)), ("right", POINTER(LowerStruct)), ("inverse_diagonal", c_void_p)]


class MatrixStruct(Structure):
    """A sparse matrix by rows."""

    _fields_ = [("rows", c_int), ("ptr", c_void_p), ("columns", c_void_p), ("values", c_void_p)]


class StatesStruct(Structure):
    """States outside the kernels."""

    _fields_ = [("base", c_void_p), ("lane", c_int64), ("step", c_int64), ("place", c_void_p), ("size", c_int)]


class ProjectionStruct(Structure):
    """Two vectors of a projection."""

    _fields_ = [("a", c_void_p), ("b", c_void_p)]


class OperationStruct(Structure):
    """An operation of a program."""

    _fields_ = [
        ("code", c_int), ("out", c_int), ("in_", c_int), ("object", c_int), ("out_row", c_int), ("in_row", c_int),
        ("rows", c_int), ("flag", c_int), ("factor", c_double), ("scale", c_double),
    ]  # fmt: skip


class ProgramStruct(Structure):
    """Operations with their vectors and objects."""

    _fields_ = [
        ("count", c_int), ("vectors", c_int), ("operations", POINTER(OperationStruct)), ("vector", c_void_p),
        ("object", c_void_p),
    ]  # fmt: skip


class Kernels(NamedTuple):
    """The functions of the compiled library."""

    find_panels: ctypes._CFuncPtr
    pack_panels: ctypes._CFuncPtr
    release: ctypes._CFuncPtr
    count_fill: ctypes._CFuncPtr
    solve: ctypes._CFuncPtr
    run: dict[tuple[np.dtype, int], ctypes._CFuncPtr]
    product: dict[int, ctypes._CFuncPtr]


@cache
def _source() -> str:
    """The C code of all kernels: the one on lanes for each type and width."""
    read = lambda name: (Path(__file__).parent / name).read_text()
    parts = [_VECTOR, read("types.c"), read("panels.c"), read("single.c")]
    for dtype, widths in WIDTHS.items():
        for width in widths:
            suffix = f"_{_SUFFIX[dtype]}{width}"
            defined = {"REAL": _C_TYPE[dtype], "SIZE": dtype.itemsize, "W": width, "NAME(x)": f"x##{suffix}"}
            parts += [f"#define {name} {value}" for name, value in defined.items()]
            parts += [read("lanes.c"), "#undef REAL\n#undef SIZE\n#undef W\n#undef NAME\n"]
    return "\n".join(parts)


def kernels_on_all_or_none(comm: MPI.Comm) -> None:
    """Do without compiled kernels from now on where a rank has none, so that all ranks round alike (collective).

    Parameters
    ----------
    comm
        Communicator of ranks whose results have to be the same as on one rank.
    """
    here = kernels() is not None
    if comm.size > 1 and not all_ranks(comm, here) and here:
        logger.warning("kernels are not used, as another rank cannot compile them")
        switch_off()


def kernels() -> Kernels | None:
    """The compiled kernels, or ``None`` where :func:`~pint_fem.kernels.lanes.compiled.library` has none."""
    found = library(_source())
    return None if found is None else _functions(found)


@cache
def _functions(found: ctypes.CDLL) -> Kernels:
    """The functions of the library with the types of their arguments."""
    product = {width: getattr(found, f"product_d{width}") for width in WIDTHS[np.dtype(float)]}
    run = {(dtype, w): getattr(found, f"run_{_SUFFIX[dtype]}{w}") for dtype, widths in WIDTHS.items() for w in widths}
    for function in run.values():
        function.argtypes, function.restype = [POINTER(ProgramStruct), c_int64, c_int64, POINTER(StatesStruct)], None
    for function in product.values():
        function.argtypes, function.restype = [c_void_p, c_int64, *[c_void_p] * 4], None
    found.find_panels.restype = c_int64
    found.count_fill.restype = c_int64
    for function in (found.release, found.solve):
        function.restype = None
    found.release.argtypes = [c_void_p]
    single = (getattr(found, name) for name in Kernels._fields[:-2])
    return Kernels(*single, run, product)


def pointers(arrays: Sequence[np.ndarray | Structure]) -> ctypes.Array:
    """An array of the addresses of arrays and structs, which the caller keeps."""
    found = [a.ctypes.data if isinstance(a, np.ndarray) else ctypes.addressof(a) for a in arrays]
    return (c_void_p * max(1, len(found)))(*found)


class _Scratch(local):
    """The work memory of a thread: calls of C let other threads run."""

    memory = aligned(0, np.uint8)


_SCRATCH = _Scratch()


def scratch(size: int) -> np.ndarray:
    """The work memory that all kernels of a thread share, of at least ``size`` bytes; it moves when it grows, and its
    contents are arbitrary.
    """
    if _SCRATCH.memory.size < size:
        _SCRATCH.memory = aligned(size, np.uint8)
    return _SCRATCH.memory
