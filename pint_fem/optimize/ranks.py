"""Minimisers on several processes: the same options, failures and stops on all of them.

A problem with an attribute ``comm`` (mpi4py) has its functions called on all processes of it. The options of a run are
compared once, at its start; a failure of a function, a monitor, a callback, a preconditioner or a checkpoint on one
process is raised on all of them; and a callback that returns true on any process stops all. A problem without ``comm``
belongs to this process alone, or follows these rules by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
from mpi4py import MPI

from pint_fem.collective import any_rank, collectively, ending_all_ranks, require_same
from pint_fem.errors import InputError
from pint_fem.optimize.argument_checks import check_callable, check_checkpoint, check_first_guess
from pint_fem.optimize.guarded_problem import GuardedCheckpoint, GuardedOperator, GuardedProblem

__all__ = ["check_run", "collective_callback", "on_all_ranks"]

P = ParamSpec("P")
R = TypeVar("R")

_LOCAL = ("monitor", "callback", "lower", "upper", "l1", "normals")
"""Arguments that may differ between processes: their own functions, and parts of vectors."""


def on_all_ranks(minimise: Callable[P, R]) -> Callable[P, R]:
    """Make a minimiser behave the same on all processes (decorator).

    Parameters
    ----------
    minimise : callable
        ``minimise(problem, x0, ..., monitor=None, callback=None, **options)``.

    Returns
    -------
    callable
        The same with a :class:`~pint_fem.optimize.guarded_problem.GuardedProblem`, and a monitor and a callback that
        are the same on all processes. The monitor also gets the reason where J could not be computed at a trial point.
    """

    @functools.wraps(minimise)
    def run(
        problem: Any, x0: np.ndarray, *args: Any, monitor: Callable | None = None, callback: Callable | None = None,
        **options: Any,
    ) -> R:  # fmt: skip
        guarded = GuardedProblem(problem)
        comm = guarded.comm
        with ending_all_ranks(comm):
            compared = {name: value for name, value in options.items() if name not in _LOCAL}
            require_same(comm, minimiser=minimise.__name__, given=compared)
            collectively(comm, "", check_run, x0, monitor, callback)
            if callable(options.get("preconditioner")):
                options["preconditioner"] = GuardedOperator(comm, "preconditioner", options["preconditioner"])
            checkpoint = options.get("checkpoint")
            if checkpoint is not None:
                collectively(comm, "", check_checkpoint, checkpoint)
                options["checkpoint"] = GuardedCheckpoint(comm, checkpoint)
            has_monitor = any_rank(comm, monitor is not None)
            has_callback = any_rank(comm, callback is not None)
            return minimise(
                guarded, x0, *args, monitor=_collective_monitor(guarded, monitor) if has_monitor else None,
                callback=collective_callback(comm, callback) if has_callback else None, **options,
            )  # fmt: skip

    return run  # type: ignore[return-value]


def check_run(x0: np.ndarray, monitor: object, callback: object) -> None:
    """Check the arguments that may differ between processes.

    Raises
    ------
    InputError
        If `x0` is no real vector, or `monitor` or `callback` is not callable.
    """
    check_first_guess(x0)
    check_callable("monitor", monitor)
    check_callable("callback", callback)


def _no_op(*_: object) -> None:
    """The monitor or callback of processes that were given none."""


def _collective_monitor(problem: GuardedProblem, given: Callable[[str], object] | None) -> Callable[[str], None]:
    """A monitor that adds to a line why J could not be computed since the last one, and fails on all processes."""
    printed = None

    def monitor(line: str) -> None:
        nonlocal printed
        failure = problem.failure
        if failure is not None and failure is not printed:
            line += f"\n     no J at the trial point: {' '.join(str(failure).split())}"
        printed = failure
        collectively(problem.comm, "monitor", given or _no_op, line)

    return monitor


def collective_callback(comm: MPI.Comm, given: Callable | None) -> Callable[..., bool]:
    """A callback that returns true on all processes where it does on any.

    Parameters
    ----------
    comm : mpi4py communicator
        The processes.
    given : callable or None
        The callback of this process.

    Returns
    -------
    callable
    """
    return lambda *args: any_rank(comm, collectively(comm, "callback", _stops, given or _no_op, *args))


def _stops(callback: Callable, *args: Any) -> bool:
    """Whether the result of a callback is true."""
    answer = callback(*args)
    try:
        return bool(answer)
    except Exception as error:  # such as an array of several entries
        raise InputError(
            f"the callback returned {type(answer).__name__}, which is neither true nor false: give a truth value or "
            "nothing"
        ) from error
