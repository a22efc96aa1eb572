"""Errors that a user meets, and which of all errors are numerical.

A *numerical* failure is one that another control, start or time step may cure: a factorisation meets a zero pivot, an
iteration does not converge, a value overflows. Optimisers may answer it by rejecting the trial point. Everything else
(a missing attribute, a wrong type, no memory, an unknown PETSc type) is a mistake in a program or an input and ends the
run.
"""

from __future__ import annotations

import sys

import numpy as np

__all__ = ["InputError", "SolverFailure", "is_numerical"]


class InputError(ValueError):
    """Bad input from the user; the command line prints it as one line."""


class SolverFailure(RuntimeError):
    """A solve failed for a numerical reason; the message names the sweep, the level and the steps."""


_PETSC_NUMERICAL = frozenset({71, 72, 76, 81, 82, 91})
"""PETSc's error codes (petscsystypes.h) of numerical failures: a zero pivot of LU or Cholesky (71, 81), a floating-point
exception (72), a failure that a library reports such as UMFPACK of a singular matrix (76), no convergence (82, 91).
"""


def is_numerical(error: BaseException | None) -> bool:
    """Whether an exception is a numerical failure, of numpy, PETSc, Firedrake, torch or this package.

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
    # a type can only be met where its module has been imported, so none is imported here
    petsc = sys.modules.get("petsc4py.PETSc")
    if petsc is not None and isinstance(error, petsc.Error):
        return error.ierr in _PETSC_NUMERICAL
    firedrake = sys.modules.get("firedrake.exceptions")
    if firedrake is not None and isinstance(error, firedrake.ConvergenceError):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.linalg.LinAlgError)
