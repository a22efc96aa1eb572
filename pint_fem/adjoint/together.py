"""Work that may fail on one rank only, between what all do together: it then fails on all, and none waits for ever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from firedrake.exceptions import ConvergenceError
from petsc4py import PETSc

from pint_fem.mgrit.stopping import SolverFailure

__all__ = ["together"]

NUMERICAL = (SolverFailure, ConvergenceError, PETSc.Error, ArithmeticError, np.linalg.LinAlgError)
"""What a bad control may cause, and a better one cure; anything else is a mistake in a program."""


def together(comm, where: str, work: Callable, *args):
    """``work(*args)`` on all ranks of a communicator; what goes wrong on one is raised on every one (collective).

    ``work`` may communicate as long as it does not fail before it has.

    Raises
    ------
    SolverFailure
        On every rank, if all failures are numerical: optimisers try another control then.
    Exception
        Otherwise: what was raised on this rank, and ``RuntimeError`` with the report on those where nothing was.
    """
    out = failure = None
    try:
        out = work(*args)
    except Exception as error:
        failure = error
    mine = failure and (isinstance(failure, NUMERICAL), f"{type(failure).__name__}: {failure}")
    reports = [(rank, *report) for rank, report in enumerate(comm.allgather(mine)) if report]
    if not reports:
        return out
    rank, numerical, cause = min(reports, key=lambda report: report[1])  # the first mistake, if there is one
    message = f"{where}, rank {rank}: {cause}"
    if numerical:
        raise SolverFailure(message) from failure
    if failure is not None and not isinstance(failure, NUMERICAL):
        raise failure
    raise RuntimeError(message) from failure
