"""Exceptions of the package, the kinds of all exceptions, and the form in which one rank sends its exception to others.

One policy holds everywhere. A call that does not match a signature (a missing or unknown argument) is Python's own
``TypeError``. A value that is refused, its type included, is a ``ValueError``: :class:`InputError`, or a plain one in
the algebra (:mod:`pint_fem.mgrit`, :mod:`pint_fem.paradiag`, :mod:`pint_fem.optimize`), so that ``except ValueError``
catches both. The message names the argument, the value that was given and one that would do.

A *numerical* failure is one that another control, start or time step may cure: a factorisation meets a zero pivot, an
iteration does not converge, a value overflows. It reaches the user as :class:`SolverFailure`, or as its subclass
:class:`~pint_fem.all_at_once.stopping.DivergedError`. Optimisers may answer it by rejecting the trial point. Everything
else (a missing attribute, no memory, an unknown PETSc type) is a mistake in a program and ends the run.
:mod:`pint_fem.collective` has the rules by which these exceptions reach all ranks.
"""

from __future__ import annotations

import itertools
import pickle
import re
import sys
import traceback
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np

__all__ = [
    "FAILURES",
    "FailureKind",
    "FailureReport",
    "InputError",
    "InputTypeError",
    "SolverFailure",
    "add_note",
    "causes",
    "is_numerical",
    "release",
]

FAILURES = (Exception, KeyboardInterrupt, SystemExit)
"""What a user's code may raise and all ranks have to learn of. ``BaseException`` has others, by which threads and
greenlets are ended.
"""


class InputError(ValueError):
    """An argument, file or option that is refused, raised by whatever checks it and on every rank that does.

    The message stands alone; the command line prints it as one line, without a traceback.
    """


class InputTypeError(InputError, TypeError):
    """Input of a wrong type, caught as ``TypeError`` and, like every other refused input, as ``InputError``."""


class SolverFailure(RuntimeError):
    """A solve has failed for a numerical reason, raised on every rank that takes part in it.

    Sweeps, Newton's method and factorisations raise it; the message names the sweep, the level and the steps. An
    iteration over all steps that does not reach its tolerance raises the subclass
    :class:`~pint_fem.all_at_once.stopping.DivergedError`.
    """


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


def add_note(error: BaseException, text: str) -> None:
    """Add a line below an exception's message in its traceback, where Python has such notes (3.11 and later)."""
    if hasattr(error, "add_note"):
        error.add_note(text)


def is_numerical(error: BaseException | None) -> bool:
    """Whether an exception is a numerical failure, of Python, numpy, scipy, PETSc, Firedrake, torch or this package.

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
    """An exception, its cause, the cause's cause and so on, each of them once; nothing for ``None``."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def release(error: BaseException) -> None:
    """Free the local variables of the calls in which an exception and its causes were raised.

    An exception that is stored while a run goes on would keep the arrays of a whole evaluation alive; its traceback
    remains.
    """
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)


# -- exceptions of other ranks -----------------------------------------------------------------------------------------
class FailureKind(IntEnum):
    """Kinds of exceptions; where ranks fail differently, the smallest is raised."""

    EXIT = 0
    MISTAKE = 1
    INPUT = 2
    NUMERICAL = 3

    @classmethod
    def of(cls, error: BaseException) -> FailureKind:
        """Kind of an exception."""
        if not isinstance(error, Exception):  # SystemExit, KeyboardInterrupt
            return cls.EXIT
        if is_numerical(error):
            return cls.NUMERICAL
        return cls.INPUT if isinstance(error, InputError) else cls.MISTAKE


class FailureReport(NamedTuple):
    """An exception in the form in which it is sent to other ranks.

    Attributes
    ----------
    kind : FailureKind
    text : str
        What happened; with the exception's type where its message does not stand alone.
    pickled : tuple of bytes
        The exception, its cause, the cause's cause and so on, as far as they can be pickled.
    trace : str
        Traceback of a mistake, which pickling loses.
    """

    kind: FailureKind
    text: str
    pickled: tuple[bytes, ...] = ()
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException, text: str | None = None) -> FailureReport:
        """Report of an exception, with its message or ``text``; never fails, whatever the exception's methods do."""
        pickled = []
        try:
            kind, message = FailureKind.of(error), str(error)
            trace = "".join(traceback.format_exception(error)) if kind == FailureKind.MISTAKE else ""
        except FAILURES as failure:  # others would wait for the report for ever
            kind = FailureKind.MISTAKE if isinstance(error, Exception) else FailureKind.EXIT
            message, trace = f"its message cannot be computed, {type(failure).__name__}", ""
        for one in causes(error):
            try:
                data = pickle.dumps(one)
                pickle.loads(data)
            except FAILURES:  # it takes other arguments than it passes on, holds what cannot be pickled, or raises
                break
            pickled.append(data)
        if text is None:
            stands_alone = kind == FailureKind.INPUT or isinstance(error, SolverFailure)
            text = message if stands_alone else f"{type(error).__name__}: {message}"
        return cls(kind, text, tuple(pickled), trace)

    @property
    def is_numerical(self) -> bool:
        """Whether an optimiser may answer the failure by another trial point."""
        return self.kind == FailureKind.NUMERICAL

    def cause(self) -> BaseException:
        """The exception with its causes; ``RuntimeError`` with its text where it cannot be unpickled on this rank."""
        found = []
        for pickled in self.pickled:
            try:
                found.append(pickle.loads(pickled))
            except FAILURES:  # its class is not there, or raises
                break
        for error, cause in itertools.pairwise(found):
            error.__cause__ = cause
        first = found[0] if found else RuntimeError(self.text)
        if self.trace:
            add_note(first, f"there:\n{self.trace}")
        return first
