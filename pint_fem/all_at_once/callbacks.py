"""Calls of the functions that a user gives to the solvers, with the conventions of their results enforced.

A step writes its result to ``out`` and returns nothing. Other packages have other conventions: PyMGRIT's ``step``
returns the new state, XBraid's overwrites the old one. Either would leave ``out`` as it was, and a trajectory of zeros
solves such equations without a residual. So a result that is returned is refused, the input is read-only, and the first
call of each level must overwrite all of ``out``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pint_fem.errors import InputError

if TYPE_CHECKING:
    from pint_fem.all_at_once.propagator import Propagator

__all__ = ["StepCalls", "read_only", "require_block", "require_nothing", "returned_block"]

_FORMS = {
    "step": "step(self, steps, u, out) writes the new states: out[...] = u / (1 + self.dt)",
    "sweep": "sweep(self, first, U, G) writes the states behind U[0]: U[i + 1] = U[i] / (1 + self.dt), plus G[i]",
    "advance": "advance(self, first, m, u, out, G) writes steps from many states: out[:, j] follows from out[:, j - 1]",
    "tangent": "tangent(self, steps, u, du, out) writes the derivatives: out[...] = du / (1 + self.dt)",
    "adjoint": "adjoint(self, steps, u, lam, out) writes the transposed derivatives: out[...] = lam / (1 + self.dt)",
    "all_at_once": "all_at_once(self, level, iterations) writes the states behind level.U[0]: level.U[1:] = ...",
}
_MARKS = {np.dtype(np.float64): np.uint64(0x7FF8_C0DE_0B5E_55ED), np.dtype(np.float32): np.uint32(0x7FC0_DEB5)}
"""Payloads of NaN that no arithmetic makes, by type: an entry that still has one was not written."""


def read_only(array: np.ndarray) -> np.ndarray:
    """A view of an array that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def require_nothing(name: str, result: object) -> None:
    """Refuse a result of a method that has to write in place.

    Raises
    ------
    InputError
        If the result is not ``None``, with the right form of the method.
    """
    if result is not None:
        raise InputError(f"{name} returned a {type(result).__name__}, which would be lost: {_FORMS[name]}")


def require_block(name: str, result: object, shape: tuple[int, ...]) -> np.ndarray:
    """The result of a function that has to return a block, as an array.

    Raises
    ------
    InputError
        If it is ``None`` or has another shape.
    """
    if result is None:
        raise InputError(f"{name} returned None: return an array of shape {shape}, and leave the input as it is")
    block = np.asarray(result)
    if block.shape != shape:
        raise InputError(f"{name} returned shape {block.shape} instead of {shape}")
    return block


def returned_block(name: str, function: Callable, shape: tuple[int, ...], *args: Any) -> np.ndarray:
    """The block that a function returns, called with arguments that are read-only where they are arrays.

    Raises
    ------
    InputError
        If it writes to its input, returns ``None`` or another shape.
    """
    try:
        result = function(*(read_only(a) if isinstance(a, np.ndarray) else a for a in args))
    except ValueError as error:
        if "read-only" in str(error):
            raise InputError(f"{name} writes to its input, which is read-only: return a new array") from error
        raise
    return require_block(name, result, shape)


class StepCalls:
    """Calls ``step`` and ``sweep`` of one level's propagator.

    Parameters
    ----------
    propagator
        A :class:`~pint_fem.all_at_once.propagator.Propagator`. With a true attribute ``keeps_input`` it gets arrays
        that can be written to.
    """

    def __init__(self, propagator: Propagator):
        self._propagator = propagator
        self._protects = not getattr(propagator, "keeps_input", False)
        # a first guess in ``out`` may be the result already
        self._unchecked = set() if getattr(propagator, "uses_guess", False) else {"step", "sweep", "advance"}

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Call ``propagator.step(steps, u, out)``.

        Raises
        ------
        InputError
            If it returns its result, writes to ``u`` or leaves ``out`` as it was.
        """
        mark = _mark(out) if "step" in self._unchecked else None
        if self._protects:
            u = u.view()
            u.setflags(write=False)
        try:
            result = self._propagator.step(steps, u, out)
        except ValueError as error:
            _refuse_writing("step", error)
            raise
        if result is not None:
            require_nothing("step", result)
        if mark is not None:
            self._check_written("step", out, mark)

    def sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """Call ``propagator.sweep(first, U, G)``.

        Raises
        ------
        InputError
            If it returns its result, writes to ``G`` or ``U[0]``, or leaves a part of ``U`` as it was.
        """
        mark = _mark(U[1:]) if "sweep" in self._unchecked else None
        start = None if mark is None else U[:1].copy()
        try:
            result = self._propagator.sweep(first, U, G if G is None or not self._protects else read_only(G))
        except ValueError as error:
            _refuse_writing("sweep", error)
            raise
        require_nothing("sweep", result)
        if mark is not None:
            if not np.array_equal(start, U[:1], equal_nan=True):
                raise InputError(f"sweep changes U[0], the state that it starts from: {_FORMS['sweep']}")
            self._check_written("sweep", U[1:], mark)

    def advance(self, first: int, stride: int, u: np.ndarray, out: np.ndarray, G: np.ndarray | None) -> None:
        """Call ``propagator.advance(first, stride, u, out, G)``.

        Raises
        ------
        InputError
            If it returns its result, writes to ``u`` or ``G``, or leaves a part of ``out`` as it was.
        """
        mark = _mark(out) if "advance" in self._unchecked else None
        if self._protects:
            u, G = read_only(u), None if G is None else read_only(G)
        try:
            result = self._propagator.advance(first, stride, u, out, G)
        except ValueError as error:
            _refuse_writing("advance", error)
            raise
        require_nothing("advance", result)
        if mark is not None:
            self._check_written("advance", out, mark)

    def _check_written(self, name: str, written: np.ndarray, mark: np.generic) -> None:
        """Require that no mark is left, and set no marks in later calls."""
        if (written.view(mark.dtype) == mark).any():
            raise InputError(f"{name} does not write all of its result: {_FORMS[name]}")
        self._unchecked.discard(name)


def _mark(array: np.ndarray) -> np.generic | None:
    """Fill an array that is to be written with a value that no arithmetic makes."""
    mark = _MARKS.get(array.dtype)
    if mark is not None:
        array[...] = mark.view(array.dtype)
    return mark


def _refuse_writing(name: str, error: ValueError) -> None:
    """Raise ``InputError`` for a method's error if that is numpy's about an assignment to a read-only array."""
    if "read-only" in str(error):
        raise InputError(f"{name} writes to its input, which is read-only: {_FORMS[name]}") from error
