"""One rule for what ranks do together: where it fails on one rank it fails on all, and what they are given is the same.

A rank that raises in the middle of communicating work leaves the others waiting for ever, and so does one that decides
otherwise than they do. All functions here are collective over the communicator that they take: every rank calls them,
in the same order, and gets the same answer. They need mpi4py and numpy only.

Three kinds of failure are kept apart. A *numerical* one (:func:`pint_fem.errors.is_numerical`) becomes
:class:`~pint_fem.errors.SolverFailure` on all ranks, which an optimiser may answer by another trial point. A user's
*input* that does not fit becomes :class:`~pint_fem.errors.InputError` on all ranks. A *mistake*, any other exception,
is raised as it is where it happened and as ``RuntimeError`` elsewhere; it is never answered, only reported. A mistake
on any rank comes before an input, and that before a numerical failure. The first exception is the ``__cause__`` of what
is raised, on all ranks where it can be pickled.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from pint_fem.errors import InputError, SolverFailure, is_numerical

__all__ = ["all_ranks", "any_rank", "collectively", "raise_together", "require_same"]


def any_rank(comm, condition) -> bool:
    """Whether a condition holds on any rank (collective)."""
    return bool(condition if comm.size == 1 else comm.allreduce(bool(condition), op=MPI.LOR))


def all_ranks(comm, condition) -> bool:
    """Whether a condition holds on every rank (collective)."""
    return bool(condition if comm.size == 1 else comm.allreduce(bool(condition), op=MPI.LAND))


class _Report(NamedTuple):
    """A failure as other ranks get it; reports of a worse kind come first."""

    kind: int
    text: str
    pickled: bytes | None


_EXIT, _MISTAKE, _INPUT, _NUMERICAL = range(4)


def _kind(error: BaseException) -> int:
    if not isinstance(error, Exception):  # SystemExit, KeyboardInterrupt
        return _EXIT
    if is_numerical(error):
        return _NUMERICAL
    return _INPUT if isinstance(error, InputError) else _MISTAKE


def _report(error: BaseException) -> _Report:
    kind = _kind(error)
    plain = kind == _INPUT or isinstance(error, SolverFailure)  # their messages stand alone
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # an exception with arguments of its own or objects that cannot be pickled: its text has to do
        pickled = None
    return _Report(kind, str(error) if plain else f"{type(error).__name__}: {error}", pickled)


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
    mine = None if error is None else _report(error)
    reports = [mine] if comm.size == 1 else comm.allgather(mine)
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    rank = min(failed, key=lambda r: reports[r].kind)
    report = reports[rank]
    on = f"rank {rank}" if comm.size > 1 else ""
    place = ", ".join(part for part in (where, on) if part)
    message = f"{place}: {report.text}" if place else report.text
    cause = error if error is not None and comm.rank == rank else _loaded(report)
    if error is not None and _kind(error) == report.kind and report.kind in (_EXIT, _MISTAKE):
        raise error
    if report.kind == _EXIT:
        raise (KeyboardInterrupt(message) if isinstance(cause, KeyboardInterrupt) else SystemExit(message)) from cause
    made = {_MISTAKE: RuntimeError, _INPUT: InputError, _NUMERICAL: SolverFailure}[report.kind]
    raise made(message) from cause


def _loaded(report: _Report) -> BaseException | None:
    return None if report.pickled is None else pickle.loads(report.pickled)


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
    except BaseException as error:  # sys.exit and an interrupt on one rank, too, would leave the others waiting
        failure = error
    raise_together(comm, failure, where)
    return out


def require_same(comm, **given: Any) -> None:
    """Require that what ranks are given is the same on all of them (collective, one exchange).

    Parameters
    ----------
    comm
        Communicator of the ranks that act on it together.
    **given
        Values by name: numbers, strings, truth values, ``None``, arrays, mappings and sequences of such. Callables and
        other objects are compared by their type and name.

    Raises
    ------
    InputError
        On every rank, naming the first value that is not the same, with what ranks were given.
    """
    if comm.size == 1:
        return
    digests = np.frombuffer(b"".join(_digest(value) for value in given.values()), dtype=np.int64)
    least = np.concatenate([digests, ~digests])  # the least ~d is ~(largest d)
    comm.Allreduce(MPI.IN_PLACE, least, op=MPI.MIN)
    low, high = np.split(least, 2)
    different = np.flatnonzero(low != ~high)
    if len(different):
        name = list(given)[int(different[0])]
        values = comm.allgather(_shown(given[name]))
        shown = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values[:4]))
        raise InputError(f"{name} is not the same on all ranks ({shown}): give every rank the same")


def _digest(value: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest.update, value)
    return digest.digest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Hand a value's type and content to a hash."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        update(f"array{value.shape}{value.dtype}".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        update(f"mapping{len(value)}".encode())
        for key in sorted(value, key=str):
            update(str(key).encode())
            _feed(update, value[key])
    elif isinstance(value, (list, tuple, np.ndarray)):
        update(f"sequence{len(value)}".encode())
        for item in value:
            _feed(update, item)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        plain = value.item() if isinstance(value, np.generic) else value
        update(f"{type(plain).__name__}:{plain!r};".encode())
    else:
        update(_name(value).encode())


def _name(value: Any) -> str:
    """A callable or another object by its name: addresses differ from rank to rank."""
    while isinstance(value, functools.partial):
        value = value.func
    kind = type(value)
    return getattr(value, "__qualname__", f"{kind.__module__}.{kind.__qualname__}")


def _shown(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, np.ndarray):
        return f"array {value.shape}, digest {_digest(value).hex()[:8]}"
    simple = isinstance(value, (bool, int, float, complex, str, type(None), Mapping, Sequence, np.generic))
    text = repr(value) if simple else _name(value)
    return text if len(text) <= 60 else text[:57] + "..."
