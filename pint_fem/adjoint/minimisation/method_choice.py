r"""The choice between the map from controls to readings and sweeps, by estimated times.

The map takes one adjoint sweep per sensor, on lanes and divided among the ranks in time, products of the responses with
what the controls are multiplied by, and dense algebra with as many reduced readings as there are combinations of the
controls that the sensors determine. The trust region takes a number of sweeps that is known afterwards only: it grows
with the number of such combinations. Here it is the one that the inversion of a source in a plate from 24 sensors takes
with inexact sweeps and a limited-memory preconditioner; other problems take more, so that the map is chosen only where
it is faster by any account.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pint_fem.capacity import readable, require_memory
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.inverse.per_step.spectrum_choice import LARGEST_DENSE
from pint_fem.inverse.readings import ReadingTable
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.theory.costs import block_seconds

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional
    from pint_fem.adjoint.problem import ReducedProblem

__all__ = ["MapWork", "choose_method"]

SWEEPS = 60
"""Sweeps of an inversion by the inexact trust region with a limited-memory preconditioner, at least."""
RATE = 3e9
"""Multiplications and additions of a core in a second, in products of dense matrices, about."""
COMBINATIONS = 20
"""Combinations of static controls that the readings of one sensor depend on, about."""


class MapWork(NamedTuple):
    """The size of a map and of what is made of it.

    Attributes
    ----------
    sensors, readings, lags : int
        Numbers of sensors, of all readings, and of steps of an adjoint sweep.
    unknowns : int
        Number of the values of static controls and initial conditions of all ranks in space.
    stepwise : int
        Number of values of the other controls in one step.
    ranks, space_ranks : int
        Ranks in time and in space.
    """

    sensors: int
    readings: int
    lags: int
    unknowns: int
    stepwise: int
    ranks: int
    space_ranks: int

    @classmethod
    def of(cls, problem: ReducedProblem) -> MapWork:
        """The size of the map of a problem (collective over space)."""
        layout, spacetime = problem.layout, problem.spacetime
        table = ReadingTable(problem.misfits)
        steps = max(layout.slab.k, 1)
        own = np.array([layout.static_size, (layout.size - layout.static_size) / steps])
        static, stepwise = (int(n) for n in spacetime.space_comm.allreduce(own))
        lags = int(table.point.max(initial=0)) + (problem.evolution.initial_control is not None)
        ranks = spacetime.time_size, spacetime.space_size
        return cls(table.sensors, table.size, lags, static, stepwise, *ranks)

    @property
    def modes(self) -> int:
        """Size of the dense matrices, about."""
        most = self.readings if self.stepwise else COMBINATIONS * self.sensors
        return min(self.readings, self.unknowns + self.stepwise * self.lags, most, LARGEST_DENSE)

    @property
    def nbytes(self) -> int:
        """Bytes of a rank for rows, responses, modes and dense matrices."""
        static = (self.readings + 2 * self.modes) * self.unknowns
        moving = self.sensors * self.lags * self.stepwise
        return int(8 * ((static + moving) / (self.ranks * self.space_ranks) + 4 * self.modes**2))

    def seconds(self, step: Mapping[int, float]) -> float:
        """Estimated time of map and posterior, given the seconds of a step by the number of states."""
        own = -(-self.sensors // self.ranks)
        sweep = self.lags * block_seconds(step, own)
        each = self.readings / max(self.sensors, 1)
        rows = own * each * self.lags * self.unknowns + own * each**2 * self.unknowns
        dense = 4 * self.modes**2 * self.unknowns / (self.ranks * self.space_ranks) + 5 * self.modes**3
        return sweep + (rows / self.space_ranks + dense) / RATE


def choose_method(
    functional: ControlFunctional,
    require: Callable[[ControlFunctional], ReducedProblem],
    options: Mapping,
    *,
    no_kkt: str = "",
) -> tuple[str, str]:
    """The name of the method, of those without KKT systems, and the reason, the same on all ranks (collective).

    Parameters
    ----------
    functional
        What is minimised.
    require
        Returns the problem of a functional that has a map, or raises an ``InputError``.
    options
        Options of the minimiser.
    no_kkt
        Why there is no KKT system.
    """
    comm = functional.spacetime.comm
    try:
        problem = collectively(comm, "", require, functional)
    except InputError as error:
        reason = f"as there is no map: {str(error).removeprefix('parameter_to_observable: ')}"
        if no_kkt and functional.evolution.stepwise:
            reason = no_kkt if "observes the state everywhere" in reason else f"{no_kkt}; {reason}"
        return "trust-region", reason
    if options.get("checkpoint") is not None:
        return "trust-region", "as checkpoint= is given, and a run on the map has no trajectories to continue from"
    work = collectively(comm, "", MapWork.of, problem)
    try:
        require_memory(comm, work.nbytes, f"{work.readings} rows of the map from controls to readings", "")
    except InputError as error:
        return "trust-region", f"as the map does not fit the memory: {str(error).removesuffix(': ')}"
    if functional._map.is_made:
        return "map", "which has been made before"
    step = collectively(comm, "time of a step", _seconds_of_a_step, problem)
    steps = problem.evolution.nsteps
    sweep = steps * step[1] / (1 if problem.sweeps.solvers.is_sequential else work.ranks)
    times = work.seconds(step), SWEEPS * sweep
    name = "map" if times[0] <= times[1] else "trust-region"
    reason = (
        f"by measured times of a step: {work.sensors} sensors over {work.lags} steps, {work.readings} readings and "
        f"dense algebra take about {times[0]:.2g} s and {readable(work.nbytes)} of memory, at least {SWEEPS} sweeps of "
        f"the trust region {times[1]:.2g} s"
    )
    return comm.bcast((name, reason))


def _seconds_of_a_step(problem: ReducedProblem) -> dict[int, float]:
    """Seconds of a step by the number of states, those of this rank (collective over space)."""
    propagator = problem.sweeps.propagators[0]
    assert isinstance(propagator, LinearPropagator)
    seconds = propagator.lane_seconds()
    if seconds is not None:
        return seconds
    out = np.zeros((1, 2, problem.evolution.state_size))
    propagator.advance(out[:, 0].copy(), out)
    begin = time.perf_counter()
    propagator.advance(out[:, 0].copy(), out)
    return {1: (time.perf_counter() - begin) / 2}
