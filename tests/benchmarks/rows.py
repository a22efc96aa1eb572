"""A ratio measured side by side, the benchmark problem, and a stopwatch: what the benchmarks share."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from firedrake import COMM_SELF, DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, grad, inner
from irksome import Dt

from pint_fem.adjoint import RunningMisfit, TimeParallelReducedFunctional
from pint_fem.propagators import Evolution, named_tableau
from pint_fem.spacetime import SpaceTime
from problems.serial_pyadjoint import SQUARE_TIME, square_functionals

__all__ = ["SIZE", "Row", "Stopwatch", "field", "row", "square", "timed"]

SIZE = 64


@dataclass
class Row:
    """One ratio.

    Attributes
    ----------
    section, what : str
    ours, theirs : float
        Milliseconds a step (of the fine time grid).
    ratio : float
    target : float or None
    at_most : bool
        Whether the target is an upper bound.
    note : str
    """

    section: str
    what: str
    ours: float
    theirs: float
    ratio: float
    target: float | None
    at_most: bool
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the ratio meets the target; ``None`` without one."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def timed(*actions: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each action; they take turns."""
    seconds = [[] for _ in actions]
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for action, row in zip(actions, seconds, strict=True):
                start = time.perf_counter()
                action()
                row.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return [statistics.median(row) for row in seconds]


def square(
    steps: int, integrator: str = "BackwardEuler", *, spacetime: SpaceTime | None = None, **solver_parameters
) -> TimeParallelReducedFunctional:
    """The time-parallel twin of :func:`problems.serial_pyadjoint.serial_square`; default: on this rank alone."""
    spacetime = spacetime or SpaceTime("1x1", comm=COMM_SELF)
    mesh = UnitSquareMesh(SIZE, SIZE, comm=spacetime.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    forms = square_functionals(V)
    u, q, v = Function(V), Function(V), TestFunction(V)
    evolution = Evolution(
        Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx,
        u,
        tableau=named_tableau(integrator),
        dt=SQUARE_TIME / steps,
        nsteps=steps,
        control=q,
        bcs=DirichletBC(V, 0, "on_boundary"),
    )
    return TimeParallelReducedFunctional(
        evolution,
        RunningMisfit(forms["misfit"](u)),
        regularisation=forms["regularisation"](q),
        spacetime=spacetime,
        solver_parameters=solver_parameters,
    )


def field(rf, name: str, scale: float = 1.0) -> np.ndarray:
    """Coefficients of the control or the direction of :func:`~problems.serial_pyadjoint.square_functionals`."""
    V = rf.controls[0].control.function_space()
    return scale * Function(V).interpolate(square_functionals(V)[name]()).dat.data_ro


def row(section, what, ours, theirs, steps, target, at_most, note="") -> Row:
    """A row of ours over theirs (``at_most``), or theirs over ours; times are in seconds for all steps."""
    ratio = ours / theirs if at_most else theirs / ours
    return Row(section, what, 1e3 * ours / steps, 1e3 * theirs / steps, ratio, target, at_most, note)


class Stopwatch:
    """Seconds spent in the functions it wraps."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, function: Callable) -> Callable:
        """The function, timed."""

        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return wrapped
