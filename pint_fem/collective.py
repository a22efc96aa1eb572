"""One rule for what ranks do together: where it fails on one rank it fails on all, and what they are given is the same.

A rank that raises in the middle of communicating work leaves the others waiting for ever, and so does one that decides
otherwise than they do. All functions here but :func:`reported` are collective over the communicator that they take:
every rank calls them, in the same order, and gets the same answer. They need mpi4py and numpy only.
:mod:`pint_fem.agreement` has the decisions and the arguments.

Four kinds of failure are kept apart. A *numerical* one (:func:`pint_fem.errors.is_numerical`) becomes
:class:`~pint_fem.errors.SolverFailure` on all ranks, which an optimiser may answer by another trial point. A user's
*input* that does not fit becomes :class:`~pint_fem.errors.InputError` on all ranks. A *mistake*, any other exception,
is raised as it is where it happened and as ``RuntimeError`` elsewhere; it is never answered, only reported. An *exit*
(``SystemExit``, ``KeyboardInterrupt``) is one on all ranks. Where ranks fail differently, an exit comes first, then a
mistake, an input, a numerical failure. The first exception is the ``__cause__`` of what is raised, on all ranks where
it can be pickled.
"""

from __future__ import annotations

import itertools
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from pint_fem.agreement import all_ranks, any_rank, require_same
from pint_fem.errors import FAILURES, InputError, SolverFailure, causes, is_numerical

__all__ = [
    "Report",
    "all_ranks",
    "any_rank",
    "collectively",
    "ending_all_ranks",
    "on_first_rank",
    "raise_report",
    "raise_together",
    "reported",
    "require_same",
]


# -- failures ----------------------------------------------------------------------------------------------------------
class Report(NamedTuple):
    """A failure as other ranks get it.

    Attributes
    ----------
    kind : int
        The smaller, the sooner a failure is reported: an exit, a mistake, an input, a numerical failure.
    text : str
        What happened; with the exception's type where its message does not stand alone.
    pickled : tuple of bytes
        The exception, its cause, the cause's cause and so on, as far as they can be pickled.
    trace : str
        Where a mistake was raised, which pickling loses.
    """

    kind: int
    text: str
    pickled: tuple[bytes, ...] = ()
    trace: str = ""

    @property
    def is_numerical(self) -> bool:
        """Whether an optimiser may answer the failure by another trial point."""
        return self.kind == _NUMERICAL

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
            first.add_note(f"there:\n{self.trace}")
        return first


_EXIT, _MISTAKE, _INPUT, _NUMERICAL = range(4)


def _kind(error: BaseException) -> int:
    if not isinstance(error, Exception):  # SystemExit, KeyboardInterrupt
        return _EXIT
    if is_numerical(error):
        return _NUMERICAL
    return _INPUT if isinstance(error, InputError) else _MISTAKE


def reported(error: BaseException, text: str | None = None) -> Report:
    """An exception as other ranks get it; this never fails, whatever the exception's own methods do.

    Parameters
    ----------
    error
        The exception.
    text
        What happened; default: the exception's message.

    Returns
    -------
    Report
    """
    name, pickled = type(error).__name__, []
    try:
        kind, said = _kind(error), str(error)
        trace = "".join(traceback.format_exception(error)) if kind == _MISTAKE else ""
    except FAILURES as failure:  # others would wait for the report for ever
        kind = _MISTAKE if isinstance(error, Exception) else _EXIT
        said, trace = f"its message cannot be had, {type(failure).__name__}", ""
    for one in causes(error):
        try:
            data = pickle.dumps(one)
            pickle.loads(data)
        except FAILURES:  # it takes other arguments than it passes on, holds what cannot be pickled, or raises
            break
        pickled.append(data)
    if text is None:
        plain = kind == _INPUT or isinstance(error, SolverFailure)  # their messages stand alone
        text = said if plain else f"{name}: {said}"
    return Report(kind, text, tuple(pickled), trace)


def raise_report(comm, report: Report, message: str, here: BaseException | None = None) -> NoReturn:
    """Raise what a report says; all ranks of the communicator call it with the same report.

    Parameters
    ----------
    comm
        Communicator of the ranks.
    report
        The failure that all of them raise.
    message
        Of what is raised where the exception itself is not.
    here
        The exception on the ranks that have met the failure, ``None`` on the others.

    Raises
    ------
    SolverFailure, InputError, RuntimeError, SystemExit, KeyboardInterrupt
        By the kind of the report, with the exception as its cause.
    BaseException
        The exception itself where it is a mistake or an exit and was met here.
    """
    if here is not None and report.kind in (_EXIT, _MISTAKE):
        raise _shared(comm, here)
    cause = report.cause() if here is None else here
    if report.kind == _EXIT:
        made = KeyboardInterrupt(message) if isinstance(cause, KeyboardInterrupt) else SystemExit(_code(cause, message))
    else:
        made = {_MISTAKE: RuntimeError, _INPUT: InputError, _NUMERICAL: SolverFailure}[report.kind](message)
    raise _shared(comm, made) from cause


def _code(cause: BaseException, message: str) -> int | str:
    """With what a rank exits because another one does: its status, and never less than a failure's reason."""
    code = getattr(cause, "code", message)
    return 0 if code is None else code


def _shared(comm, error: BaseException) -> BaseException:
    """Mark an exception as one that all ranks of a communicator raise."""
    error.raised_on_ranks = max(comm.size, getattr(error, "raised_on_ranks", 1))
    return error


def raise_together(comm, error: BaseException | None, where: str = "") -> None:
    """Raise on every rank if a rank has failed (collective).

    Parameters
    ----------
    comm
        Communicator of the ranks that would wait for each other.
    error
        What failed on this rank, or ``None``.
    where
        What was being done, for the message.

    Raises
    ------
    SolverFailure
        If all failures are numerical.
    InputError
        If a rank reports an input that does not fit, and none a mistake.
    BaseException
        Otherwise: what failed on this rank, and on ranks where nothing did ``RuntimeError`` (``SystemExit``,
        ``KeyboardInterrupt`` where a rank has met that) with the rank and the first exception as its cause.
    """
    if all_ranks(comm, error is None):
        return
    mine = None if error is None else reported(error)
    reports = [mine] if comm.size == 1 else comm.allgather(mine)
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    rank = min(failed, key=lambda r: reports[r].kind)
    report, everywhere = reports[rank], len({r and (r.kind, r.text) for r in reports}) == 1
    if where and error is not None and mine.kind == _MISTAKE:
        error.add_note(f"({where})")
    if everywhere and (not report.is_numerical or isinstance(error, SolverFailure)):
        raise _shared(comm, error)  # all ranks have it as it is
    place = ", ".join(part for part in (where, "" if everywhere else f"rank {rank}") if part)
    here = error if error is not None and (comm.rank == rank or mine.kind == report.kind < _INPUT) else None
    raise_report(comm, report, f"{place}: {report.text}" if place else report.text, here)


def collectively(comm, where: str, work: Callable, *args) -> Any:
    """``work(*args)`` on all ranks; what goes wrong on one is raised on every one (collective).

    ``work`` may communicate as long as it does not fail before it has on one rank only.

    Parameters
    ----------
    comm
        Communicator of the ranks that work.
    where
        What is being done, for the message.
    work, *args
        What is called.

    Returns
    -------
    object
        What ``work`` returns.

    Raises
    ------
    SolverFailure, InputError, BaseException
        As :func:`raise_together` does.
    """
    out = failure = None
    try:
        out = work(*args)
    except FAILURES as error:  # sys.exit and an interrupt on one rank, too, would leave the others waiting
        failure = error
    raise_together(comm, failure, where)
    return out


def on_first_rank(comm, where: str, work: Callable, *args) -> Any:
    """``work(*args)`` on the first rank, for all of them: files of the whole run, say (collective).

    Parameters
    ----------
    comm
        Communicator of the ranks that wait for it.
    where, work, *args
        As for :func:`collectively`; ``work`` does not communicate.

    Returns
    -------
    object
        What ``work`` returns, on every rank.

    Raises
    ------
    SolverFailure, InputError, BaseException
        What ``work`` raises, on every rank as :func:`raise_together` does.
    """
    return comm.bcast(collectively(comm, where, work if comm.rank == 0 else _nothing, *args))


def _nothing(*_) -> None:
    """What the other ranks do."""


@contextmanager
def ending_all_ranks(comm) -> Iterator[None]:
    """End the whole run where one rank is interrupted or exits by itself, which would leave the others waiting.

    An exit that has gone through :func:`collectively` or :func:`raise_together` is raised on all ranks and passes. One
    that has not (the interrupt of a keyboard may come between any two statements) is printed with its traceback, and
    the run is aborted. On one rank it passes as well.

    Parameters
    ----------
    comm
        Communicator of the ranks that work together.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if getattr(error, "raised_on_ranks", 1) >= comm.size:
            raise
        code = getattr(error, "code", 130)
        sys.stdout.flush()
        sys.stderr.write(f"rank {comm.rank} leaves, which ends the run:\n{traceback.format_exc()}")
        sys.stderr.flush()
        comm.Abort(code if isinstance(code, int) and code else 1)
