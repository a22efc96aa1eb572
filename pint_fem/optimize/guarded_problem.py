"""A problem as the minimisers call it: its results counted, copied, checked, and the same decisions on all processes.

A failure on one process is raised on all of them. Methods get copies of vectors, which they may overwrite. What they
return is checked where they are called, so that all processes refuse a result that one of them cannot use. Finiteness
is decided by reduced numbers only, so that all processes agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from pint_fem.collective import all_ranks, any_rank, collectively, require_same
from pint_fem.errors import InputError, SolverFailure, release
from pint_fem.optimize.argument_checks import check_callable
from pint_fem.optimize.protocol import RETURNS, GradientOverflowError, NonFiniteError

__all__ = ["GuardedCheckpoint", "GuardedOperator", "GuardedProblem"]

_COUNTERS = {"value": "value_calls", "gradient": "gradient_calls", "advance": "advance_calls"}
"""Counters of the methods by what their names begin with; all others are Hessian actions."""


class GuardedProblem:
    """A problem with the methods of :data:`~pint_fem.optimize.protocol.RETURNS` guarded; all else is the problem's own.

    Parameters
    ----------
    problem : Problem
        The problem; an optional method that it lacks is absent here as well.
    comm : mpi4py communicator, optional
        The processes on which the methods are called; default: the problem's ``comm``, or this process alone.

    Attributes
    ----------
    given : Problem
        The problem.
    comm : mpi4py communicator
        The processes on which the methods are called.
    value_calls, gradient_calls, hessian_calls, advance_calls : int
        How often J, its gradient and a product with the Hessian were evaluated, and the solvers advanced.
    """

    def __init__(self, problem: Any, comm: MPI.Comm | None = None):
        comm = getattr(problem, "comm", None) if comm is None else comm
        self.given, self._failure = problem, None
        self.comm = MPI.COMM_SELF if comm is None else comm
        self.value_calls = self.gradient_calls = self.hessian_calls = self.advance_calls = 0

    @property
    def failure(self) -> Exception | None:
        """Why the last value was not finite, if the problem raised or reported a reason."""
        return self._failure or getattr(self.given, "failure", None)

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The problem's inner product (a, b); called too often to be guarded."""
        return float(self.given.inner(a, b))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.given, name)
        return functools.partial(self._call, name, method) if name in RETURNS and callable(method) else method

    def _call(self, name: str, method: Callable, x: np.ndarray, *args: Any):
        """The checked result of a method on all processes; J is infinite where it fails for a numerical reason."""
        if RETURNS[name] not in (("operator",), ("nothing",)):
            self._count(name, len(args[0]) if RETURNS[name] == ("vectors",) else 1)
        evaluates = RETURNS[name][0] == "number"
        if evaluates:
            self._failure = None
        try:
            out = collectively(self.comm, name, _checked, name, method, x, *args)
        except SolverFailure as failure:
            if not evaluates:
                raise
            release(failure)
            self._failure = failure
            return _without_value(name, math.inf, x)
        if RETURNS[name] == ("operator",):  # a process without one leaves the others without it
            return None if any_rank(self.comm, out is None) else GuardedOperator(self.comm, name, out, self._count)
        return out

    def _count(self, name: str, calls: int = 1) -> None:
        """Count a call of a method of this name, or the products of one with several directions."""
        counter = _COUNTERS.get(name.removesuffix("_within"), "hessian_calls")
        setattr(self, counter, getattr(self, counter) + calls)

    def no_value(self, message: str, x: np.ndarray) -> NonFiniteError:
        """The error of a J that is not finite where it has to be, with the reason as its cause."""
        error = NonFiniteError(message if self.failure is None else f"{message} ({self.failure})", x)
        error.__cause__ = self.failure
        return error

    def gradient_norm(self, g: np.ndarray, iteration: int, last_good: np.ndarray) -> float:
        """The norm of a gradient.

        Raises
        ------
        NonFiniteError
            If the gradient is not finite: a GradientOverflowError where ``(g, g)`` overflows.
        ValueError
            If ``(g, g) < 0``.
        """
        square = self.inner(g, g)
        if not math.isfinite(square):
            kind = GradientOverflowError if square == math.inf else NonFiniteError
            raise kind(f"iteration {iteration}: the gradient is not finite, (g, g) = {square}", last_good)
        if square < 0:
            raise ValueError(f"(g, g) = {square} < 0: the problem's inner product must be positive definite")
        return math.sqrt(square)

    def curvature(self, d: np.ndarray, h: np.ndarray, iteration: int, x: np.ndarray) -> float:
        """The curvature ``(d, h)`` of a product ``h = H d`` at the iterate `x`.

        Raises
        ------
        NonFiniteError
            If it is not finite.
        """
        curvature = self.inner(d, h)
        if not math.isfinite(curvature):
            raise NonFiniteError(f"iteration {iteration}: the Hessian action is not finite, (d, Hd) = {curvature}", x)
        return curvature

    def holds_anywhere(self, x: np.ndarray, condition: bool) -> bool:
        """Whether a condition holds on any process (collective).

        Without a communicator the vector ``x`` gives the shape of one with an entry 1 where the condition holds, whose
        norm is positive where there is any; a process without entries then counts for itself only.
        """
        if self.comm.size > 1:
            return any_rank(self.comm, condition)
        indicator = np.full_like(x, bool(condition), dtype=float)
        return bool(self.inner(indicator, indicator) > 0 or condition)


class GuardedOperator:
    """A linear operator of the user's that fails on all processes where it fails on one; so does its ``update``, if
    any.

    Parameters
    ----------
    comm : mpi4py communicator
        The processes that apply it.
    name : str
        What it is, for messages.
    given : callable
        The operator; it gets copies of vectors.
    count : callable, optional
        Called with the name before each application.
    """

    def __init__(self, comm: MPI.Comm, name: str, given: Callable, count: Callable[[str], None] | None = None):
        self._comm, self._name, self._given, self._count = comm, name, given, count
        if callable(getattr(given, "update", None)):
            self.update = self._update

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """The operator's result, of the shape of ``r``."""
        if self._count is not None:
            self._count(self._name)
        return collectively(self._comm, self._name, lambda: _vector(self._name, self._given(r.copy()), r))

    def _update(self, pairs: list) -> None:
        collectively(self._comm, f"{self._name}.update", self._given.update, pairs)


class GuardedCheckpoint:
    """A checkpoint that fails on all processes where it fails on one, and has a state on all or on none.

    Parameters
    ----------
    comm : mpi4py communicator
        The processes that save and load.
    given : Checkpoint
        The checkpoint.
    """

    def __init__(self, comm: MPI.Comm, given: Any):
        self._comm, self._given = comm, given

    def save(self, scalars: dict, vectors: dict[str, np.ndarray]) -> None:
        """Save a state."""
        collectively(self._comm, "checkpoint.save", self._given.save, scalars, vectors)

    def load(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """The last state with its vectors as new arrays of floats; None if there is none.

        Raises
        ------
        InputError
            On all processes, if only some have a state, or another one than others.
        """
        loaded = collectively(self._comm, "checkpoint.load", self._loaded)
        if all_ranks(self._comm, loaded is None):
            return None
        if any_rank(self._comm, loaded is None):
            raise InputError("the checkpoint has a state on some ranks only: give all of them theirs, or none")
        require_same(self._comm, checkpoint=loaded[0], vectors=sorted(loaded[1]))
        return loaded

    def _loaded(self):
        loaded = self._given.load()
        if loaded is None:
            return None
        scalars, vectors = loaded
        return dict(scalars), {name: np.array(v, dtype=np.float64) for name, v in vectors.items()}


# -- what methods return -----------------------------------------------------------------------------------------------
def _checked(name: str, method: Callable, x: np.ndarray, *args: Any):
    """The result of a method, called with copies of vectors, as a float, a new array, an operator or a tuple."""
    out, kinds = method(x.copy(), *map(_copied, args)), RETURNS[name]
    parts = (out,)
    if kinds == ("vectors",) and (not isinstance(out, (tuple, list)) or len(out) != len(args[0])):
        raise InputError(f"{name} returned {type(out).__name__}: give a list of {len(args[0])}, one for each direction")
    if len(kinds) > 1:
        if not isinstance(out, (tuple, list)) or len(out) != len(kinds):
            raise InputError(f"{name} returned {type(out).__name__}: give a tuple of {len(kinds)}")
        parts = tuple(out)
    if kinds[0] == "number":
        value = _number(name, parts[0])
        if not math.isfinite(value):
            return _without_value(name, value, x)
    checked = tuple(_CHECKS[kind](name, part, x) for kind, part in zip(kinds, parts, strict=True))
    return checked if len(checked) > 1 else checked[0]


def _copied(arg: Any) -> Any:
    """A copy of a vector or of a list of them; what is neither as it is."""
    if isinstance(arg, np.ndarray):
        return arg.copy()
    return [v.copy() for v in arg] if isinstance(arg, list) else arg


def _without_value(name: str, value: float, x: np.ndarray):
    """What stands for the result of a method where J is not finite."""
    rest = {"error": math.inf, "vector": np.zeros_like(x), "residual": math.inf}
    out = (value, *(rest[kind] for kind in RETURNS[name][1:]))
    return out if len(out) > 1 else value


def _vector(name: str, v: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A new array of floats, as the problem may reuse its memory; refused unless it has the shape of `x`."""
    try:
        v = np.array(v, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} returned {_described(v)}: give an array of numbers of the shape of x, {x.shape}"
        ) from error
    if v.shape != x.shape:
        raise InputError(f"{name} returned an array of shape {v.shape}: give one of the shape of x, {x.shape}")
    return v


def _vectors(name: str, vectors: list, x: np.ndarray) -> list[np.ndarray]:
    """New arrays of floats of the shape of `x`."""
    return [_vector(name, v, x) for v in vectors]


def _number(name: str, value: float, _=None) -> float:
    """A number, finite or not."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} returned {_described(value)}: give a number") from error


def _error_estimate(name: str, error: float, _=None) -> float:
    """A number >= 0, which may be infinite."""
    error = _number(name, error)
    if not error >= 0:
        raise InputError(f"{name} returned the error {error}: give a number >= 0, infinity where there is no estimate")
    return error


def _residual(name: str, residual: float, _=None) -> float:
    """A finite number >= 0."""
    residual = _number(name, residual)
    if not 0 <= residual < math.inf:
        raise InputError(f"{name} returned the residual {residual}: give a finite number >= 0, or a J of inf")
    return residual


def _operator(name: str, operator: Callable | None, _=None) -> Callable | None:
    """A callable, or None where a process has no such operator."""
    check_callable(name, operator)
    return operator


_CHECKS = {
    "nothing": lambda *_: None,
    "number": _number,
    "vector": _vector,
    "vectors": _vectors,
    "error": _error_estimate,
    "residual": _residual,
    "operator": _operator,
}


def _described(value: object) -> str:
    """What a value is, in an error message."""
    shape = f" of shape {value.shape}" if isinstance(value, np.ndarray) else ""
    return "None" if value is None else f"a {type(value).__name__}{shape}"
