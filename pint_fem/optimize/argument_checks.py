"""Checks of options before any work starts.

A value of a wrong type raises :class:`~pint_fem.errors.InputTypeError`, which is a ``TypeError``; a value out of range
:class:`~pint_fem.errors.InputError`, which is a ``ValueError``. Both are caught as ``InputError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np

from pint_fem.errors import InputError, InputTypeError

__all__ = [
    "check",
    "check_bounds",
    "check_callable",
    "check_checkpoint",
    "check_choice",
    "check_count",
    "check_first_guess",
    "check_stopping",
    "is_real",
]


def check(name: str, value: object, allowed: str, accepts: Callable[[Any], bool]) -> None:
    """Check a real number.

    Parameters
    ----------
    name : str
        The option.
    value : object
        Its value.
    allowed : str
        The allowed values, for the message.
    accepts : callable
        Whether a number is one of them.

    Raises
    ------
    InputTypeError
        If the value is no real number.
    InputError
        If it is not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"{name} = {value!r} is refused: give {allowed}")
    if not accepts(value):
        raise InputError(f"{name} = {value!r} is refused: give {allowed}")


def check_count(name: str, value: object, least: int) -> None:
    """Check an integer that is at least `least`; errors are those of :func:`check`."""
    check(name, value, f"an integer >= {least}", lambda v: isinstance(v, Integral) and v >= least)


def check_stopping(gtol_rel: float, gtol_abs: float, max_it: int) -> None:
    """Check the tolerances of the gradient and the number of iterations; errors are those of :func:`check`."""
    check("gtol_rel", gtol_rel, "a number in [0, 1)", lambda v: 0 <= v < 1)
    check("gtol_abs", gtol_abs, "a finite number >= 0", lambda v: 0 <= v < math.inf)
    check_count("max_it", max_it, 0)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that a value is one of the names; otherwise InputError."""
    if value not in choices:
        raise InputError(f"{name} = {value!r} is refused: give {' or '.join(map(repr, choices))}")


def check_callable(name: str, value: object) -> None:
    """Check that a value is None or callable; otherwise InputTypeError."""
    if value is not None and not callable(value):
        raise InputTypeError(f"{name} = {value!r} is refused: give a callable or None")


def check_checkpoint(value: object) -> None:
    """Check that a value is None or has the methods ``save`` and ``load``; otherwise InputTypeError."""
    if value is not None and not all(callable(getattr(value, name, None)) for name in ("save", "load")):
        raise InputTypeError(f"checkpoint = {value!r} is refused: give an object with save and load, or None")


def check_first_guess(x0: np.ndarray) -> None:
    """Check that the first guess is a real vector; otherwise InputError."""
    if np.ndim(x0) != 1 or np.iscomplexobj(x0) or not is_real(x0):
        raise InputError(f"x0 of shape {np.shape(x0)} and type {np.asarray(x0).dtype} is refused: give 1-D real array")


def check_bounds(lower: np.ndarray | float, upper: np.ndarray | float) -> None:
    """Check that bounds are real numbers or arrays of them; otherwise InputTypeError."""
    for name, bound in (("lower", lower), ("upper", upper)):
        if not is_real(bound):
            raise InputTypeError(f"{name} = {bound!r} is refused: give a real number or an array of them")


def is_real(value: object) -> bool:
    """Whether a value can be an array of floats; text that spells numbers is none."""
    if np.asarray(value).dtype.kind not in "biufO":
        return False
    try:
        np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return True
