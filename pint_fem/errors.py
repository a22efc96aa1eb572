"""Errors that a user meets, and which of all errors are numerical.

A *numerical* failure is one that another control, start or time step may cure: a factorisation meets a zero pivot, an
iteration does not converge, a value overflows. Optimisers may answer it by rejecting the trial point. Everything else
(a missing attribute, a wrong type, no memory, an unknown PETSc type) is a mistake in a program or an input and ends the
run.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator

import numpy as np

__all__ = ["FAILURES", "InputError", "InputTypeError", "SolverFailure", "causes", "is_numerical", "release"]

FAILURES = (Exception, KeyboardInterrupt, SystemExit)
"""What a user's code may raise and one rank must not keep to itself. ``BaseException`` has others, with which threads
and greenlets are ended.
"""


class InputError(ValueError):
    """Bad input from the user; the command line prints it as one line."""


class InputTypeError(InputError, TypeError):
    """Input of a wrong type, caught as ``TypeError`` and, like every other refused input, as ``InputError``."""


class SolverFailure(RuntimeError):
    """A solve failed for a numerical reason; the message names the sweep, the level and the steps."""


_PETSC_NUMERICAL = frozenset({71, 72, 81, 82, 91})
"""PETSc's error codes (petscsystypes.h) of numerical failures: a zero pivot of LU or Cholesky (71, 81), a
floating-point exception (72), no convergence (82, 91).
"""
_PETSC_LIBRARY = 76
_NO_MEMORY = re.compile(r"INFOG\(1\)=-(5|7|8|13|20)\b|out of memory|CHOLMOD.*status -[23]\b|malloc", re.IGNORECASE)
"""How libraries that PETSc calls report that memory ran out: MUMPS, UMFPACK, CHOLMOD. All else that the direct solvers
report is about the matrix.
"""
_DOMAIN = ("math domain error", "Factor is exactly singular")
"""Messages of ``math.log(-1.0)`` (a ``ValueError``) and scipy's ``splu`` (a ``RuntimeError``), which have no types of
their own.
"""


def is_numerical(error: BaseException | None) -> bool:
    """Whether an exception is a numerical failure, of Python, numpy, scipy, PETSc, Firedrake, torch or this package.

    Parameters
    ----------
    error
        The exception, or ``None``.

    Returns
    -------
    bool
        ``False`` for everything that is a mistake in a program or an input, and for ``None``.
    """
    if isinstance(error, (SolverFailure, ArithmeticError, np.linalg.LinAlgError)):
        return True
    if type(error) in (ValueError, RuntimeError) and str(error).startswith(_DOMAIN):
        return True
    # a type can only be met where its module has been imported, so none is imported here
    petsc = sys.modules.get("petsc4py.PETSc")
    if petsc is not None and isinstance(error, petsc.Error):
        return error.ierr in _PETSC_NUMERICAL or (error.ierr == _PETSC_LIBRARY and not _NO_MEMORY.search(str(error)))
    for module, name in (
        ("firedrake.exceptions", "ConvergenceError"),
        ("torch.linalg", "LinAlgError"),
        ("scipy.sparse.linalg", "ArpackNoConvergence"),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return True
    return False


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, its cause, the cause's cause and so on.

    Parameters
    ----------
    error
        The exception, or ``None``.

    Yields
    ------
    BaseException
        Each of them once.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def release(error: BaseException) -> None:
    """Let go of the local variables of the calls in which an exception and its causes were raised.

    An exception that is kept while a run goes on would keep the arrays of a whole evaluation; its traceback stays.

    Parameters
    ----------
    error
        The exception.
    """
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)
