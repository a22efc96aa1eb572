"""Calls of the functions that a user gives to the solvers, with the conventions of their results enforced.

A step writes its result to ``out`` and returns nothing. Other packages have other conventions: PyMGRIT's ``step``
returns the new state, XBraid's overwrites the old one. Either would leave ``out`` as it was, and a trajectory of zeros
solves such equations without a residual. So a result that is returned is refused, the input is read-only, and the first
call of each level must overwrite all of ``out``.

A tensor cannot be read-only: a change of the input is found by its version, behind the call. Whether all of ``out`` was
overwritten is decided when values are read anyway (:mod:`~pint_fem.all_at_once.first_failure`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pint_fem.all_at_once.arrays import Array, copied, is_tensor, torch_module
from pint_fem.errors import InputError

if TYPE_CHECKING:
    from pint_fem.all_at_once.propagator import Propagator

__all__ = ["StepCalls", "call_protected", "read_only", "require_block", "require_nothing", "returned_block"]

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
_TENSOR_MARKS = {8: ("int64", 0x7FF8_C0DE_0B5E_55ED), 4: ("int32", 0x7FC0_DEB5), 2: ("int16", 0x7FD5)}
"""The same for tensors, by the bytes of an entry, as integers of as many bytes."""


def read_only(array: np.ndarray) -> np.ndarray:
    """A view of an array that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def _read_only_if_array(value: Any) -> Any:
    return read_only(value) if isinstance(value, np.ndarray) else value


class _Protected:
    """Arrays that a function must not write to, as it gets them: read-only views of numpy arrays, and tensors whose
    versions are compared behind the call.
    """

    def __init__(self, *arrays: Any):
        self.arrays = [read_only(a) if isinstance(a, np.ndarray) else a.data if is_tensor(a) else a for a in arrays]
        self._versions = [
            (a, a._version)
            for a in self.arrays
            if not isinstance(a, np.ndarray) and is_tensor(a) and not a.is_inference()
        ]

    def require_unchanged(self, name: str) -> None:
        """Refuse that the method of a name has written to a tensor among them."""
        if self._versions and any(a._version != version for a, version in self._versions):
            form = _FORMS.get(name, "return a new tensor")
            raise InputError(f"{name} writes to its input, which has to stay as it is: {form}")


def require_nothing(name: str, result: object) -> None:
    """Refuse a result of a method that has to write in place.

    Raises
    ------
    InputError
        If the result is not ``None``, with the right form of the method.
    """
    if result is not None:
        raise InputError(f"{name} returned a {type(result).__name__}, which would be lost: {_FORMS[name]}")


def require_block(name: str, result: object, shape: tuple[int, ...], like: Array | None = None) -> Array:
    """The result of a function that has to return a block, as an array.

    Parameters
    ----------
    name, result, shape
        Name of the function, what it returned, and the shape that this must have.
    like
        A tensor on whose device the result has to be one; ``None``: it may be any array on the host.

    Raises
    ------
    InputError
        If it is ``None``, has another shape, or is no tensor on that device.
    """
    if result is None:
        raise InputError(f"{name} returned None: return an array of shape {shape}, and leave the input as it is")
    if like is not None:
        if not is_tensor(result) or result.device != like.device:  # type: ignore[attr-defined]
            given = f"{type(result).__name__} on {getattr(result, 'device', 'the host')}"
            raise InputError(f"{name} returned a {given} for a tensor on {like.device}: return a tensor there")
        block = result
    else:
        block = np.asarray(result)
    if tuple(block.shape) != tuple(shape):
        raise InputError(f"{name} returned shape {tuple(block.shape)} instead of {tuple(shape)}")
    return block


def returned_block(name: str, function: Callable, shape: tuple[int, ...], *args: Any, on_device: bool = True) -> Array:
    """The block that a function returns, called with arguments that it must not write to where they are arrays.

    ``on_device``: of tensors the result has to be one on their device; else it may be any array.

    Raises
    ------
    InputError
        If it writes to its input, returns ``None`` or another shape.
    """
    like = next(filter(is_tensor, args), None)
    result = call_protected(name, function, *args, tensors=like is not None)
    return require_block(name, result, shape, like if like is not None and (on_device or is_tensor(result)) else None)


def call_protected(name: str, function: Callable, *args: Any, tensors: bool = True) -> Any:
    """What a function returns, called with arguments that it must not write to where they are arrays.

    ``tensors``: whether some of them are tensors.

    Raises
    ------
    InputError
        If it writes to them.
    """
    protected = _Protected(*args) if tensors else None
    try:
        result = function(*(map(_read_only_if_array, args) if protected is None else protected.arrays))
    except ValueError as error:
        if "read-only" in str(error):
            raise InputError(f"{name} writes to its input, which is read-only: return a new array") from error
        raise
    if protected is not None:
        protected.require_unchanged(name)
    return result


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
        #: Truth values on a device, each with the error to be raised where it is true, since the last call.
        self.found: list[tuple[Array, InputError]] = []

    def step(self, steps: range, u: Array, out: Array) -> None:
        """Call ``propagator.step(steps, u, out)``.

        Raises
        ------
        InputError
            If it returns its result, writes to ``u`` or leaves ``out`` as it was.
        """
        mark, protected = _mark(out) if "step" in self._unchecked else None, None
        if self._protects:
            if isinstance(u, np.ndarray):
                u = u.view()
                u.setflags(write=False)
            else:
                protected = _Protected(u)
                [u] = protected.arrays
        try:
            result = self._propagator.step(steps, u, out)
        except ValueError as error:
            _refuse_writing("step", error)
            raise
        if result is not None:
            require_nothing("step", result)
        if protected is not None:
            protected.require_unchanged("step")
        if mark is not None:
            self._check_written("step", out, mark)

    def sweep(self, first: int, U: Array, G: Array | None) -> None:
        """Call ``propagator.sweep(first, U, G)``.

        Raises
        ------
        InputError
            If it returns its result, writes to ``G`` or ``U[0]``, or leaves a part of ``U`` as it was.
        """
        mark = _mark(U[1:]) if "sweep" in self._unchecked else None
        start = None if mark is None else copied(U[:1])
        protected = _Protected(G) if self._protects else None
        try:
            result = self._propagator.sweep(first, U, G if protected is None else protected.arrays[0])
        except ValueError as error:
            _refuse_writing("sweep", error)
            raise
        require_nothing("sweep", result)
        if protected is not None:
            protected.require_unchanged("sweep")
        if mark is not None:
            refused = InputError(f"sweep changes U[0], the state that it starts from: {_FORMS['sweep']}")
            if is_tensor(U):
                changed = (start != U[:1]) & ~((start != start) & (U[:1] != U[:1]))  # NaN that stays is no change
                self.found.append((changed.any(), refused))
            elif not np.array_equal(start, U[:1], equal_nan=True):
                raise refused
            self._check_written("sweep", U[1:], mark)

    def advance(self, first: int, stride: int, u: Array, out: Array, G: Array | None) -> None:
        """Call ``propagator.advance(first, stride, u, out, G)``.

        Raises
        ------
        InputError
            If it returns its result, writes to ``u`` or ``G``, or leaves a part of ``out`` as it was.
        """
        mark = _mark(out) if "advance" in self._unchecked else None
        protected = _Protected(u, G) if self._protects else None
        u, G = (u, G) if protected is None else protected.arrays
        try:
            result = self._propagator.advance(first, stride, u, out, G)
        except ValueError as error:
            _refuse_writing("advance", error)
            raise
        require_nothing("advance", result)
        if protected is not None:
            protected.require_unchanged("advance")
        if mark is not None:
            self._check_written("advance", out, mark)

    def _check_written(self, name: str, written: Array, mark: Any) -> None:
        """Require that no mark is left, and set no marks in later calls."""
        refused = InputError(f"{name} does not write all of its result: {_FORMS[name]}")
        if is_tensor(written):
            self.found.append(((_as_integers(written) == mark).any(), refused))
        elif (written.view(mark.dtype) == mark).any():
            raise refused
        self._unchecked.discard(name)


def _mark(array: Array) -> Any:
    """Fill an array that is to be written with a value that no arithmetic makes, and return that; ``None``: none."""
    if is_tensor(array):
        _, mark = _TENSOR_MARKS[array.dtype.itemsize]
        _as_integers(array).fill_(mark)
        return mark
    mark = _MARKS.get(array.dtype)
    if mark is not None:
        array[...] = mark.view(array.dtype)
    return mark


def _as_integers(tensor: Array) -> Array:
    """A view of a tensor's entries as integers of as many bytes."""
    return tensor.view(getattr(torch_module(), _TENSOR_MARKS[tensor.dtype.itemsize][0]))


def _refuse_writing(name: str, error: ValueError) -> None:
    """Raise ``InputError`` for a method's error if that is numpy's about an assignment to a read-only array."""
    if "read-only" in str(error):
        raise InputError(f"{name} writes to its input, which is read-only: {_FORMS[name]}") from error
