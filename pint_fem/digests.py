"""Hash numbers of values, equal in every process, by which ranks compare what they are given without exchanging it, and
differences of descriptions, by which a run finds that a file is of another problem.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["describe", "differences", "digest"]

_RTOL = 1e-9  # far above round-off, far below deliberate differences


def digest(value: Any) -> int:
    """A 63-bit hash (BLAKE2b) of a value's type and content.

    Parameters
    ----------
    value
        A number, string, truth value, ``None``, array, path, dataclass, or a mapping or sequence of such. Callables and
        other objects are hashed by their qualified name, as addresses differ from rank to rank.

    Returns
    -------
    int
        Not negative; the same in every process.
    """
    found = hashlib.blake2b(digest_size=8)
    _feed(found.update, value)
    return int.from_bytes(found.digest(), "little") >> 1


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Pass a value's type and content to a hash function."""
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
        update(_qualified_name(value).encode())


def _qualified_name(value: Any) -> str:
    """Qualified name of a callable, or of the class of another object."""
    while isinstance(value, functools.partial):
        value = value.func
    kind = type(value)
    return getattr(value, "__qualname__", f"{kind.__module__}.{kind.__qualname__}")


def describe(value: Any) -> str:
    """A value as text of at most 60 characters, for error messages.

    Parameters
    ----------
    value
        As for :func:`digest`.

    Returns
    -------
    str
        Its ``repr``; shape and digest of an array, the qualified name of a callable or another object.
    """
    if isinstance(value, np.ndarray):
        return f"array {value.shape}, digest {digest(value) % 16**8:08x}"
    simple = isinstance(value, (bool, int, float, complex, str, type(None), Mapping, Sequence, np.generic))
    text = repr(value) if simple else _qualified_name(value)
    return text if len(text) <= 60 else text[:57] + "..."


def differences(stored: dict, given: dict) -> str:
    """The entries in which the stored description differs from that of this run, as text; empty if there are none."""
    names = [name for name in {**given, **stored} if not _same(stored.get(name), given.get(name))]
    return "; ".join(f"{name}: the file has {stored.get(name)}, this run {given.get(name)}" for name in names)


def _same(a, b) -> bool:
    """Whether two descriptions are equal up to round-off of their numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_RTOL)
    return a == b
