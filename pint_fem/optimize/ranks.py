"""Minimisers on several processes: one rule for failures, stops and options in all of them.

A problem with an attribute ``comm`` (mpi4py) has its functions called on all ranks of it. Then the options of a run are
compared once, at its start; a failure of a function, a monitor, a callback, a preconditioner or a checkpoint on one
rank is one on all ranks; and what a callback answers on any rank stops all of them. What they return is checked in the
same place, so that all ranks refuse what one cannot use, and functions get copies of vectors, which they may overwrite.
Problems without ``comm`` are this process's alone, or keep to that rule by themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from pint_fem.collective import all_ranks, any_rank, collectively, ending_all_ranks, require_same
from pint_fem.errors import InputError, SolverFailure, release
from pint_fem.optimize.argument_checks import check_callable, check_checkpoint, check_first_guess
from pint_fem.optimize.evaluator import error_estimate, number, shaped

__all__ = ["RankedProblem", "check_run", "holds_anywhere", "on_all_ranks", "ranked_callback"]

_VECTORS = ("gradient", "hessian_action", "gauss_newton_action", "hessian_action_within", "gauss_newton_action_within")
_MODELS = ("hessian_model", "gauss_newton_model")
_CALLED = (*_VECTORS, *_MODELS, "value", "value_within", "gradient_within", "advance")
"""Methods of a problem that may fail on one rank; ``inner`` is called too often to be looked after."""
_OWN = ("monitor", "callback", "lower", "upper", "normals")
"""Arguments that may differ between ranks: functions of one rank's own, and parts of vectors."""


class RankedProblem:
    """A problem whose methods fail on all ranks where they fail on one.

    Everything else is the problem's own.

    Parameters
    ----------
    problem
        See :class:`pint_fem.optimize.Problem`.
    comm
        Instead of the problem's own.

    Attributes
    ----------
    given
        The problem.
    comm : mpi4py communicator
        The ranks on which the methods are called.
    failure : SolverFailure or None
        Why the last value was not finite, if the problem said so.
    """

    def __init__(self, problem, comm=None):
        comm = getattr(problem, "comm", None) if comm is None else comm
        self.given, self._failure = problem, None
        self.comm = MPI.COMM_SELF if comm is None else comm

    @property
    def failure(self) -> Exception | None:
        """See the class."""
        return self._failure or getattr(self.given, "failure", None)

    def __getattr__(self, name: str):
        method = getattr(self.given, name)
        return functools.partial(self._call, name, method) if name in _CALLED and callable(method) else method

    def _call(self, name: str, method: Callable, x: np.ndarray, *args):
        """A method on all ranks; a value that cannot be computed for a numerical reason is infinite."""
        self._failure = None
        try:
            out = collectively(self.comm, name, _checked, name, method, x, *args)
        except SolverFailure as failure:
            if name not in ("value", "value_within", "advance"):
                raise
            release(failure)
            self._failure = failure
            return {"value": math.inf, "value_within": (math.inf, 0.0)}.get(
                name, (math.inf, np.zeros_like(x), math.inf)
            )
        if name in _MODELS:  # a rank without one leaves the others without it
            return None if any_rank(self.comm, out is None) else _RankedOperator(self.comm, name, out)
        return out


def _checked(name: str, method: Callable, x: np.ndarray, *args):
    """What a method returns, as the minimisers use it; it gets copies of vectors, which it may overwrite or keep."""
    out = method(x.copy(), *(arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args))
    if name in _VECTORS:
        return shaped(x, out, name)
    if name in _MODELS:
        check_callable(name, out)
        return out
    if name == "value":
        return number(name, out)
    if name == "gradient_within":
        g, error = _parts(name, out, 2)
        return shaped(x, g, name), error_estimate(name, error)
    value, *rest = _parts(name, out, 3 if name == "advance" else 2)
    value = number(name, value)
    if not math.isfinite(value):
        return value, *((math.inf,) if name == "value_within" else (np.zeros_like(x), math.inf))
    if name == "value_within":
        return value, error_estimate(name, rest[0])
    residual = number(name, rest[1])
    if not 0 <= residual < math.inf:
        raise InputError(f"advance returned the residual {residual}: give a finite number >= 0, or a J of inf")
    return value, shaped(x, rest[0], name), residual


def _parts(name: str, out: object, count: int) -> tuple:
    """What is returned together."""
    if not isinstance(out, (tuple, list)) or len(out) != count:
        raise InputError(f"{name} returned {type(out).__name__}: give a tuple of {count}")
    return tuple(out)


class _RankedOperator:
    """A linear operator of the user's that fails on all ranks where it fails on one; so does its ``update``, if any."""

    def __init__(self, comm, name: str, given: Callable):
        self._comm, self._name, self._given = comm, name, given
        if callable(getattr(given, "update", None)):
            self.update = self._update

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """The given one's result, of the shape of ``r``; it gets a copy."""
        return collectively(self._comm, self._name, lambda: shaped(r, self._given(r.copy()), self._name))

    def _update(self, pairs: list) -> None:
        collectively(self._comm, f"{self._name}.update", self._given.update, pairs)


class _RankedCheckpoint:
    """A checkpoint that fails on all ranks where it fails on one, and has a state on all or on none."""

    def __init__(self, comm, given):
        self._comm, self._given = comm, given

    def save(self, scalars: dict, vectors: dict[str, np.ndarray]) -> None:
        """Keep a state."""
        collectively(self._comm, "checkpoint.save", self._given.save, scalars, vectors)

    def load(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """The last state, vectors as arrays of floats of one's own; None if there is none.

        Raises
        ------
        InputError
            On all ranks, if only some have a state, or another one than others.
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


def holds_anywhere(problem, x: np.ndarray, condition: bool) -> bool:
    """Whether a condition holds on any rank (collective).

    Parameters
    ----------
    problem
        Its ``comm`` is asked. Without one the votes are entries of a vector, whose norm is positive where there is any
        vote: ranks without entries have none then but for themselves.
    x
        A vector, for its shape.
    condition
        On this rank.

    Returns
    -------
    bool
    """
    comm = getattr(problem, "comm", None)
    if comm is not None and comm.size > 1:
        return any_rank(comm, condition)
    vote = np.full_like(x, bool(condition), dtype=float)
    return bool(float(problem.inner(vote, vote)) > 0 or condition)


def on_all_ranks(minimise: Callable) -> Callable:
    """Make a minimiser follow the rule of the module.

    Parameters
    ----------
    minimise
        ``minimise(problem, x0, ..., monitor=None, callback=None, **options)``.

    Returns
    -------
    callable
        The same with a :class:`RankedProblem`, and a monitor and a callback that are the same on all ranks. The
        monitor also gets the reason where J could not be computed at a trial point.
    """

    @functools.wraps(minimise)
    def run(problem, x0, *args, monitor=None, callback=None, **options):
        ranked = problem if isinstance(problem, RankedProblem) else RankedProblem(problem)
        comm = ranked.comm
        with ending_all_ranks(comm):
            compared = {name: value for name, value in options.items() if name not in _OWN}
            require_same(comm, minimiser=minimise.__name__, given=compared)
            collectively(comm, "", check_run, x0, monitor, callback)
            if callable(options.get("preconditioner")):
                options["preconditioner"] = _RankedOperator(comm, "preconditioner", options["preconditioner"])
            checkpoint = options.get("checkpoint")
            if checkpoint is not None:
                collectively(comm, "", check_checkpoint, checkpoint)
                options["checkpoint"] = _RankedCheckpoint(comm, checkpoint)
            shows = any_rank(comm, monitor is not None)
            asks = any_rank(comm, callback is not None)
            return minimise(
                ranked, x0, *args, monitor=_monitor(ranked, monitor) if shows else None,
                callback=ranked_callback(comm, callback) if asks else None, **options,
            )  # fmt: skip

    return run


def check_run(x0: np.ndarray, monitor: object, callback: object) -> None:
    """Refuse what this rank alone is given and a minimiser cannot use.

    Raises
    ------
    InputError
        With what was given and what would do.
    """
    check_first_guess(x0)
    check_callable("monitor", monitor)
    check_callable("callback", callback)


def _nothing(*_) -> None:
    """What is called on ranks that have no monitor or callback."""


def _monitor(problem: RankedProblem, given: Callable[[str], object] | None) -> Callable[[str], None]:
    """Show a line, and why J could not be computed since the last one."""
    shown = None

    def monitor(line: str) -> None:
        nonlocal shown
        failure = problem.failure
        if failure is not None and failure is not shown:
            line += f"\n     no J at the trial point: {' '.join(str(failure).split())}"
        shown = failure
        collectively(problem.comm, "monitor", given or _nothing, line)

    return monitor


def ranked_callback(comm, given: Callable | None) -> Callable[..., bool]:
    """A callback that is the same on all ranks: it stops where that of any rank does.

    Parameters
    ----------
    comm
        The ranks.
    given
        This rank's own, or ``None``.

    Returns
    -------
    callable
    """
    return lambda *args: any_rank(comm, collectively(comm, "callback", _stops, given or _nothing, *args))


def _stops(callback: Callable, *args) -> bool:
    """Whether a callback asks to stop."""
    answer = callback(*args)
    try:
        return bool(answer)
    except Exception as error:  # an array of several entries, say
        raise InputError(
            f"the callback returned {type(answer).__name__}, which is neither true nor false: give a truth value or "
            "nothing"
        ) from error
