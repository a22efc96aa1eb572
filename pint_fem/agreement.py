"""Whether ranks decide the same and are given the same, in one small reduction each.

What leads to communication has to be decided alike on all ranks that communicate, and they have to be given the same
arguments: else they wait for each other for ever, or messages do not fit. All functions here but :func:`digest` are
collective over the communicator that they take, and give the same answer on all ranks. They need mpi4py and numpy only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from pint_fem.errors import InputError

__all__ = ["all_alike", "all_ranks", "any_rank", "digest", "require_same"]


def any_rank(comm, condition) -> bool:
    """Whether a condition holds on any rank (collective).

    Parameters
    ----------
    comm
        Communicator of the ranks that act on the answer.
    condition
        On this rank; anything that has a truth value.

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
    return not _agreed(comm, vote if error is not None else 1 - vote, error)


def all_ranks(comm, condition) -> bool:
    """Whether a condition holds on every rank (collective).

    Parameters
    ----------
    comm, condition
        As for :func:`any_rank`.

    Returns
    -------
    bool
        The same on every rank.
    """
    return all_alike(comm, condition)


def all_alike(comm, well: bool, *seen: tuple[int, ...] | None) -> bool:
    """Whether ``well`` is true and what is seen the same on all ranks.

    Parameters
    ----------
    comm
        Communicator.
    well
        Nothing is wrong on this rank.
    seen
        Tuples of whole numbers or truth values, or ``None`` on ranks that have nothing to compare.

    Returns
    -------
    bool
        The same on every rank.

    Raises
    ------
    InputError
        As :func:`any_rank` does.
    """
    return _agreed(comm, *_vote(well), *seen)


_NO_TRUTH = -1
"""The vote of a rank whose condition has no truth value; the least of all votes."""


def _vote(condition) -> tuple[int, Exception | None]:
    """A condition as 0 or 1, or why it has no truth value."""
    try:  # to raise before the votes are counted would leave others waiting
        return int(bool(condition)), None
    except Exception as error:  # whatever the condition's type raises
        return _NO_TRUTH, error


def _agreed(comm, vote: int, error: Exception | None, *seen: tuple[int, ...] | None) -> bool:
    """See :func:`all_alike`; the least vote decides."""
    if comm.size == 1 and error is None:
        return bool(vote)
    # the least n is the largest, ~(least ~n), where all ranks have the same
    numbers, nothing = [vote], np.iinfo(np.int64).max
    for item in seen:
        number = None if item is None else hash(item) >> 1
        numbers += [nothing, nothing] if number is None else [number, ~number]
    least = np.array(numbers, dtype=np.int64)
    if comm.size > 1:
        comm.Allreduce(MPI.IN_PLACE, least, op=MPI.MIN)
    if least[0] == _NO_TRUTH:
        where = "a condition" if error is not None else "a condition on another rank"
        raise InputError(f"{where} is neither true nor false: give a truth value") from error
    pairs = least[1:].reshape(-1, 2)
    return bool(least[0]) and all(a == nothing or a == ~b for a, b in pairs)


def require_same(comm, **given: Any) -> None:
    """Require that what ranks are given is the same on all of them (collective, one small reduction).

    Parameters
    ----------
    comm
        Communicator of the ranks that act on it together.
    **given
        Values by name, not necessarily the same names: numbers, strings, truth values, ``None``, arrays, mappings and
        sequences of such. Callables and other objects are compared by their type and name.

    Raises
    ------
    InputError
        On every rank, naming the first value that is not the same, with what ranks were given.
    """
    if comm.size == 1:
        return
    mine = digest(given)
    ends = np.array([mine, ~mine])  # the least ~d is ~(largest d)
    comm.Allreduce(MPI.IN_PLACE, ends, op=MPI.MIN)
    if ends[0] == ~ends[1]:
        return
    everyone = comm.allgather({name: (digest(value), _shown(value)) for name, value in _flat(given).items()})
    names = dict.fromkeys(name for one in everyone for name in one)
    name = next(name for name in names if len({one.get(name, (None,))[0] for one in everyone}) > 1)
    values = "; ".join(
        f"rank {r}: {one[name][1] if name in one else 'not given'}" for r, one in enumerate(everyone[:4])
    )
    raise InputError(f"{name} is not the same on all ranks ({values}): give every rank the same")


def _flat(given: Mapping) -> dict[str, Any]:
    """Mappings among the values by their own names, under theirs but for ``given``."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        inner = isinstance(value, Mapping) and len(value)
        out |= _flat({k if name == "given" else f"{name} {k}": v for k, v in value.items()}) if inner else {name: value}
    return out


def digest(value: Any) -> int:
    """A whole number of 63 bits that follows from a value's type and content, the same in every process.

    Parameters
    ----------
    value
        As for :func:`require_same`.

    Returns
    -------
    int
    """
    found = hashlib.blake2b(digest_size=8)
    _feed(found.update, value)
    return int.from_bytes(found.digest(), "little") >> 1


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Hand a value's type and content to a hash."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        update(f"array{value.shape}{value.dtype}".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(update, vars(value))
    elif isinstance(value, Mapping):
        update(f"mapping{len(value)}".encode())
        for key in sorted(value, key=str):
            update(f"{key}={len(str(key))}".encode())
            _feed(update, value[key])
    elif isinstance(value, (list, tuple, range, np.ndarray)):
        update(f"sequence{len(value)}".encode())
        for item in value:
            _feed(update, item)
    elif isinstance(value, os.PathLike):
        _feed(update, os.fspath(value))
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
        return f"array {value.shape}, digest {digest(value) % 16**8:08x}"
    simple = isinstance(value, (bool, int, float, complex, str, type(None), Mapping, Sequence, np.generic))
    text = repr(value) if simple else _name(value)
    return text if len(text) <= 60 else text[:57] + "..."
