"""Collective decisions and failures: what one rank finds is decided, and what one rank raises is raised, on all ranks.

A rank that raises in the middle of work that communicates leaves the others waiting for ever, and so does one that
takes another decision. Every function here is collective over the communicator that it is given: all its ranks call it,
in the same order, and get the same answer, or an exception each.

* :func:`any_rank`, :func:`all_ranks`: whether a condition holds on any, or on every, rank;
* :func:`consistent_across_ranks`: the latter, and whether small integers are equal on all ranks;
* :func:`require_same`: refuses arguments that differ between ranks;
* :func:`raise_collectively`: raises on all ranks what was raised on some;
* :func:`collectively`: calls a function on all ranks and raises on all of them what it raises on some;
* :func:`on_first_rank`: calls a function on rank 0 and returns its result on all ranks;
* :func:`ending_all_ranks`: ends the run where one rank exits by itself;
* :func:`end_run_if_uncaught`: ends the run where one rank does not catch what it alone raises, or is interrupted.

If rank 3 raises an exception, the others raise one of the same kind, with that of rank 3 as its ``__cause__`` where it
can be pickled. Where ranks fail differently, the first kind of this table is raised:

=========  ===============================================================  =================  =================
kind       exceptions                                                       raised on rank 3   on the others
=========  ===============================================================  =================  =================
exit       ``SystemExit``, ``KeyboardInterrupt``                            itself             the same class
mistake    any other                                                        itself             ``RuntimeError``
input      :class:`~pint_fem.errors.InputError`                             ``InputError``     ``InputError``
numerical  those for which :func:`~pint_fem.errors.is_numerical` is true    ``SolverFailure``  ``SolverFailure``
=========  ===============================================================  =================  =================

A NaN raises nothing by itself: the solvers of :mod:`pint_fem.all_at_once` carry it to all ranks in their norms, and all
of them raise :class:`~pint_fem.errors.SolverFailure` with the sweep, level and step where it arose.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from pint_fem.digests import describe, digest
from pint_fem.errors import FAILURES, FailureKind, FailureReport, InputError, SolverFailure, add_note

__all__ = [
    "all_ranks",
    "any_rank",
    "collectively",
    "consistent_across_ranks",
    "end_run_if_uncaught",
    "ending_all_ranks",
    "mark_shared",
    "on_first_rank",
    "raise_collectively",
    "raise_report",
    "require_same",
]


# -- decisions and arguments -------------------------------------------------------------------------------------------
def any_rank(comm: MPI.Comm, condition: Any) -> bool:
    """Whether a condition holds on any rank.

    Parameters
    ----------
    comm
        Communicator of the ranks that act on the answer.
    condition
        Truth value on this rank; any object that has one.

    Returns
    -------
    bool
        The same on every rank.

    Raises
    ------
    InputError
        On every rank, if the condition has no truth value on any (an array of several entries has none).
    """
    vote, error = _vote(condition)
    return not _all_votes(comm, vote if error is not None else 1 - vote, error)


def all_ranks(comm: MPI.Comm, condition: Any) -> bool:
    """Whether a condition holds on every rank; parameters and errors are those of :func:`any_rank`."""
    return _all_votes(comm, *_vote(condition))


def consistent_across_ranks(comm: MPI.Comm, condition: Any, *values: tuple[int, ...] | None) -> bool:
    """Whether a condition holds on every rank and values are equal on all ranks, in one reduction.

    Parameters
    ----------
    comm, condition
        As for :func:`any_rank`, with the same errors.
    *values
        As many on every rank: tuples of integers or truth values, or ``None`` where a rank has nothing to compare.
    """
    return _all_votes(comm, *_vote(condition), *values)


_NO_TRUTH = -1
"""The vote of a rank whose condition has no truth value; the least of all votes."""


def _vote(condition: Any) -> tuple[int, Exception | None]:
    """A condition as 0 or 1, or the exception of its truth value, which raised here would leave others waiting."""
    try:
        return int(bool(condition)), None
    except Exception as error:
        return _NO_TRUTH, error


def _all_votes(comm: MPI.Comm, vote: int, error: Exception | None, *values: tuple[int, ...] | None) -> bool:
    """Whether all votes are 1 and values are equal, by one minimum: ``min h = max h = ~(min ~h)`` for equal hashes."""
    if comm.size == 1 and error is None:
        return bool(vote)
    numbers, absent = [vote], np.iinfo(np.int64).max
    for value in values:
        number = None if value is None else hash(value) >> 1
        numbers += [absent, absent] if number is None else [number, ~number]
    least = np.array(numbers, dtype=np.int64)
    if comm.size > 1:
        comm.Allreduce(MPI.IN_PLACE, least, op=MPI.MIN)
    if least[0] == _NO_TRUTH:
        where = "a condition" if error is not None else "a condition on another rank"
        raise InputError(f"{where} is neither true nor false: give a truth value") from error
    return bool(least[0]) and all(a == absent or a == ~b for a, b in least[1:].reshape(-1, 2))


def require_same(comm: MPI.Comm, **given: Any) -> None:
    """Refuse arguments that differ between ranks; one small reduction where they do not.

    Parameters
    ----------
    comm
        Communicator of the ranks that use the arguments collectively.
    **given
        Values by name, as :func:`pint_fem.digests.digest` takes them; a name may be absent on some ranks.

    Raises
    ------
    InputError
        On every rank, naming the first value that differs, with what ranks were given.
    """
    if comm.size == 1:
        return
    mine = digest(given)
    ends = np.array([mine, ~mine])
    comm.Allreduce(MPI.IN_PLACE, ends, op=MPI.MIN)
    if ends[0] == ~ends[1]:
        return
    on_ranks = comm.allgather({name: (digest(value), describe(value)) for name, value in _flat(given).items()})
    names = dict.fromkeys(name for values in on_ranks for name in values)
    name = next(name for name in names if len({values.get(name, (None,))[0] for values in on_ranks}) > 1)
    shown = [f"rank {r}: {values[name][1] if name in values else 'not given'}" for r, values in enumerate(on_ranks[:4])]
    raise InputError(f"{name} is not the same on all ranks ({'; '.join(shown)}): give every rank the same")


def _flat(given: Mapping) -> dict[str, Any]:
    """Entries of nested mappings, named by the path to them; the name ``given`` is left out of it."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        inner = isinstance(value, Mapping) and len(value)
        out |= _flat({k if name == "given" else f"{name} {k}": v for k, v in value.items()}) if inner else {name: value}
    return out


# -- failures ----------------------------------------------------------------------------------------------------------
def raise_report(comm: MPI.Comm, report: FailureReport, message: str, here: BaseException | None = None) -> NoReturn:
    """Raise a failure that all ranks have the report of.

    Parameters
    ----------
    comm
        Communicator of the ranks; all call this with the same report.
    report
        The failure.
    message
        Message of the exception that is raised in place of the reported one.
    here
        The exception on the ranks where it was raised, ``None`` on the others.

    Raises
    ------
    SolverFailure, InputError, RuntimeError, SystemExit, KeyboardInterrupt
        By the kind of the report, with the exception as its cause.
    BaseException
        ``here`` itself where it is a mistake or an exit.
    """
    if here is not None and report.kind < FailureKind.INPUT:
        raise mark_shared(comm, here)
    cause = report.cause() if here is None else here
    if report.kind != FailureKind.EXIT:
        classes = {FailureKind.INPUT: InputError, FailureKind.NUMERICAL: SolverFailure}
        error: BaseException = classes.get(report.kind, RuntimeError)(message)
    elif isinstance(cause, KeyboardInterrupt):
        error = KeyboardInterrupt(message)
    else:
        status = getattr(cause, "code", message)
        error = SystemExit(0 if status is None else status)
    raise mark_shared(comm, error) from cause


def mark_shared(comm: MPI.Comm, error: BaseException) -> BaseException:
    """Mark an exception as one that all ranks of a communicator raise, and return it.

    Parameters
    ----------
    comm
        Communicator of the ranks.
    error
        The exception; its attribute ``raised_on_ranks`` is set to their number.
    """
    error.raised_on_ranks = max(comm.size, getattr(error, "raised_on_ranks", 1))  # type: ignore[attr-defined]
    return error


def raise_collectively(comm: MPI.Comm, error: BaseException | None, where: str = "") -> None:
    """Raise on every rank if an exception is given on any, and return on all of them otherwise.

    Parameters
    ----------
    comm
        Communicator of the ranks that would wait for each other.
    error
        What was raised on this rank, or ``None``.
    where
        What was being done, for the message.

    Raises
    ------
    SolverFailure
        If all failures are numerical.
    InputError
        If the first kind of failure among the ranks is an input that does not fit.
    BaseException
        Otherwise ``error`` itself; on ranks without one ``RuntimeError`` (``SystemExit`` or ``KeyboardInterrupt`` if
        that is what a rank has raised), naming the rank, with the exception of that rank as its cause. If all ranks
        fail with the same message, each raises its own exception.
    """
    if all_ranks(comm, error is None):
        return
    mine = None if error is None else FailureReport.of(error)
    reports = [mine] if comm.size == 1 else comm.allgather(mine)
    failed = {r: report for r, report in enumerate(reports) if report is not None}
    rank = min(failed, key=lambda r: failed[r].kind)
    report, kind, everywhere = (
        failed[rank],
        None if mine is None else mine.kind,
        len({r and (r.kind, r.text) for r in reports}) == 1,
    )
    if where and error is not None and kind == FailureKind.MISTAKE:
        add_note(error, f"({where})")
    if everywhere and error is not None and (not report.is_numerical or isinstance(error, SolverFailure)):
        raise mark_shared(comm, error)
    place = ", ".join(part for part in (where, "" if everywhere else f"rank {rank}") if part)
    here = error if error is not None and (comm.rank == rank or kind == report.kind < FailureKind.INPUT) else None
    raise_report(comm, report, f"{place}: {report.text}" if place else report.text, here)


def collectively(comm: MPI.Comm, where: str, work: Callable, *args: Any) -> Any:
    """Call ``work(*args)`` on all ranks, and raise on every one what fails on any.

    ``work`` may communicate as long as it does not fail before that on some ranks only.

    Parameters
    ----------
    comm
        Communicator of the ranks.
    where
        What is being done, for the message.
    work, *args
        The function and its arguments; its result on this rank is returned.

    Raises
    ------
    SolverFailure, InputError, BaseException
        What ``work`` raises, on every rank, by the rules of :func:`raise_collectively`.
    """
    out = failure = None
    try:
        out = work(*args)
    except FAILURES as error:  # sys.exit and an interrupt on one rank, too, would leave the others waiting
        failure = error
    raise_collectively(comm, failure, where)
    return out


def on_first_rank(comm: MPI.Comm, where: str, work: Callable, *args: Any) -> Any:
    """Call ``work(*args)`` on rank 0, which writes a file for all ranks, for instance.

    ``work`` does not communicate. All ranks of ``comm`` wait for it, return its result, and raise what it raises by the
    rules of :func:`raise_collectively`; ``where`` is what is being done, for the message.
    """
    made = collectively(comm, where, work if comm.rank == 0 else (lambda *_: None), *args)
    return made if comm.size == 1 else comm.bcast(made)


@contextmanager
def ending_all_ranks(comm: MPI.Comm) -> Iterator[None]:
    """End the whole run where one rank is interrupted or exits by itself, which would leave the others waiting.

    An exit that all ranks raise (:func:`raise_collectively`) passes, and so does any on one rank. Another one, as the
    interrupt of a keyboard may come between any two statements, is printed with its traceback, and the run is aborted.

    Parameters
    ----------
    comm
        Communicator of the ranks that work collectively.
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


class _UncaughtHook:
    """Prints an exception that ends a process, and ends the run unless all ranks have raised it."""

    def __init__(self, before: Callable, comm: MPI.Comm):
        self.before, self.size, self.rank = before, comm.size, comm.rank

    def __call__(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        try:
            self.before(kind, error, trace)
        finally:
            if getattr(error, "raised_on_ranks", 1) < self.size and not MPI.Is_finalized():
                sys.stdout.flush()
                sys.stderr.write(
                    f"rank {self.rank} leaves with an exception of its own, which ends the run of all ranks\n"
                )
                sys.stderr.flush()
                MPI.COMM_WORLD.Abort(1)


def end_run_if_uncaught(comm: MPI.Comm) -> None:
    """Let an exception that one rank alone raises, and does not catch, end the run; the others would wait for ever.

    The first call in a process that is one of several appends to ``sys.excepthook``: the exception is printed as before
    and the run is aborted, unless all ranks have raised it (:func:`raise_collectively`) and end by themselves. Later
    calls do nothing unless their communicator is larger. Where another program catches the exception, as interactive
    shells and test runners do, nothing happens.

    An interrupt signal (SIGINT) of one rank ends the run of all where it is received, in programs of several ranks that
    are not interactive and have no handler of their own: as an exception it could arise between two messages, where no
    rule could bring the ranks together again, or in a destructor, where Python ignores it.

    Parameters
    ----------
    comm
        Communicator of ranks that work collectively.
    """
    if comm.size > 1:
        _end_run_if_interrupted()
    hook = sys.excepthook
    if isinstance(hook, _UncaughtHook):
        hook.size = max(hook.size, comm.size)
    elif comm.size > 1:
        sys.excepthook = _UncaughtHook(hook, comm)


def _end_run_if_interrupted() -> None:
    """Let SIGINT end the run of all ranks, unless this process is interactive or handles that signal itself."""
    interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive) or "ipykernel" in sys.modules
    here = threading.current_thread() is threading.main_thread()
    if here and not interactive and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_run)


def _end_run(_number: int, frame: Any) -> None:
    """Handler of SIGINT: print where this rank was interrupted, and abort the run of all ranks."""
    if MPI.Is_finalized():
        raise KeyboardInterrupt
    sys.stdout.flush()
    trace = "".join(traceback.format_stack(frame))
    sys.stderr.write(
        f"Traceback (most recent call last):\n{trace}KeyboardInterrupt\n"
        f"rank {MPI.COMM_WORLD.rank} is interrupted, which ends the run of all ranks\n"
    )
    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(130)
