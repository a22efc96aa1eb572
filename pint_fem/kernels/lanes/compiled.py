"""Compilation of C sources at run time, by PyOP2's cache of shared libraries, and calls of their functions.

PyOP2 compiles Firedrake's own kernels; its cache on disk is keyed by source, compiler and flags, and the environment
variable ``PYOP2_CFLAGS`` adds flags. Results must not depend on the number of lanes, so that floating point sums are
never reassociated; products and sums are fused wherever the processor can do it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np

from pint_fem.logs import logger

__all__ = ["DISABLE", "address", "aligned", "library", "switch_off"]

DISABLE = "PINT_FEM_NO_KERNELS"
"""Environment variable that, if it is set, switches compiled kernels off."""
_FLAGS = (
    "-fno-fast-math",
    "-ffp-contract=fast",
    "--param=avoid-fma-max-bits=0",  # for some processors GCC fuses chains of vectors otherwise than those of scalars
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize",
    "-Wno-psabi",
)


_switched_off = False
"""Whether :func:`switch_off` has been called."""


def switch_off() -> None:
    """Compile nothing from now on; what has been compiled before can still be called."""
    global _switched_off
    _switched_off = True


def library(source: str, flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """A shared library of C functions, compiled once on each machine.

    Parameters
    ----------
    source
        C code.
    flags
        Further flags of the compiler, a tuple.

    Returns
    -------
    ctypes.CDLL or None
        ``None`` where there is no PyOP2 or no compiler that works, or where the environment variable :data:`DISABLE`
        is set; the reason is logged once.
    """
    return None if _switched_off else _library(source, flags)


@cache
def _library(source: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    if os.environ.get(DISABLE):
        return None
    try:
        from pyop2.compilation import load
        from pyop2.mpi import COMM_SELF
    except ImportError:
        return None
    try:
        with _one_at_a_time():
            return load(source, "c", cppargs=(*_FLAGS, *flags), ldargs=("-lm",), comm=COMM_SELF)
    except Exception as error:  # PyOP2 raises whatever its steps raise: no compiler, no space, an old cache
        _report(type(error).__name__, next(iter(str(error).strip().splitlines()), ""))
        return None


@cache
def _report(kind: str, reason: str) -> None:
    """Log why there are no kernels, once for all sources."""
    logger.warning(
        "kernels are not compiled, PETSc's solvers are used instead, which are several times slower (%s: %s)",
        kind,
        reason,
    )


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let one process of a user on a machine compile at a time: the others find its result in the cache."""
    path = Path(tempfile.gettempdir()) / f"pint_fem_{os.getuid()}.lock"
    handle = None
    with suppress(OSError):
        handle = path.open("a")
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            handle.close()


def address(array: np.ndarray | None) -> ctypes.c_void_p:
    """The address of an array's first entry; the caller keeps the array, and knows its type and strides."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def aligned(shape: int | tuple[int, ...], dtype: np.dtype | type = float, *, zero: bool = True) -> np.ndarray:
    """An array whose first entry has an address that is a multiple of 64 bytes, so that no vector lies in two lines of
    the cache; ``zero``: of zeros, else with arbitrary entries.
    """
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)  # on large pages, where there are any
    if zero:
        memory[:] = 0
    first = -memory.ctypes.data % 64
    return memory[first : first + nbytes].view(dtype).reshape(shape)
