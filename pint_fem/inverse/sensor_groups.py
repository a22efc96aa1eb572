r"""Rows of a map from controls to readings by groups of time ranks: the process grid is sensors x time x space.

The ranks in time are divided into groups of :math:`k` neighbours. A group solves for the adjoints of its sensors at all
points at once, by the time solver of the functional on its :math:`k` ranks: a batch ``(points, sensors, n)`` whose only
data is the value :math:`h_s` at the last point. The adjoint at point :math:`N - j` is :math:`\lambda_j`, that of lag
:math:`j`, so that each rank has the lags of its own steps. It computes the adjoints of the stages of these lags, which
are independent of each other, in one call, and the contribution of these lags to the rows of all sensors of the group.
The rows are sums over the group; each rank gets those of its own sensors.

With :math:`k = 1` there is no communication; a larger group pays where there are fewer sensors than ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import is_integer
from pint_fem.capacity import most_items
from pint_fem.collective import collectively, require_same
from pint_fem.communicators import SharedGroups
from pint_fem.errors import InputError
from pint_fem.inverse.impulse_responses import GROUP, LagBlock, lags_of_block
from pint_fem.inverse.response_rows import SensorReadingRows, StepTerm, collectors, own_readings
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.regridding import sweeps_on_grid
from pint_fem.sweeps.sweeps import Sweeps

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["SensorGroup", "ranks_of_group"]

_EXACT = 1e-10
"""Largest relative tolerance of sweeps that stand in for sequential ones without being asked for."""


def ranks_of_group(sweeps: Sweeps, sensors: int, given: int | None) -> int:
    """The number of time ranks that solve for the adjoints of a group of sensors (collective).

    Parameters
    ----------
    sweeps
        The solvers of the evolution.
    sensors
        Number of all sensors.
    given
        What the user gave. Default: 1, or with fewer sensors than time ranks the smallest number with which no rank is
        idle, if sweeps are sequential or have a tolerance of at most 1e-10.

    Raises
    ------
    InputError
        On every rank, if it is no whole number that divides the number of time ranks.
    """
    ranks = sweeps.spacetime.time_size
    require_same(sweeps.spacetime.comm, time_ranks=given)
    if given is None:
        exact = sweeps.solvers.is_sequential or sweeps.options.rtol <= _EXACT
        return next(k for k in range(1, ranks + 1) if ranks % k == 0 and ranks // k <= sensors) if exact else 1
    if not is_integer(given) or given < 1 or ranks % given:
        raise InputError(
            f"parameter_to_observable: time_ranks = {given!r}: give a whole number that divides the {ranks} ranks in "
            "time"
        )
    return int(given)


class SensorGroup:
    """Some neighbouring ranks in time that solve for the adjoints of their sensors together.

    Parameters
    ----------
    sweeps
        The solvers of the evolution on all ranks (collective).
    size
        Ranks in time of the group.

    Attributes
    ----------
    spacetime : SpaceTime
        Process grid of the group.
    sweeps : Sweeps
        The solvers on that grid, with the propagators of the given ones.
    """

    def __init__(self, sweeps: Sweeps, size: int):
        everyone = sweeps.spacetime
        self.propagator: LinearPropagator = sweeps.propagators[0]
        if size == everyone.time_size and sweeps.intervals is None:
            self.spacetime, self.sweeps = everyone, sweeps
            return
        self._shared = SharedGroups(everyone.comm, size * everyone.space_size)
        self.spacetime = SpaceTime((everyone.space_size, size), comm=self._shared.groups.inner)
        self.sweeps = collectively(everyone.comm, "time_ranks", sweeps_on_grid, sweeps, self.spacetime)

    def blocks(self, sources: np.ndarray, lags: int) -> Iterator[LagBlock]:
        """Yield the adjoints of sensors at this rank's lags, a block of lags after the other (collective over the
        group before the first block, and over space).

        Parameters
        ----------
        sources
            Functionals of the sensors, ``(sensors, n)``.
        lags
            Number of lags that are needed.
        """
        slab, count, n = self.sweeps.slab, *sources.shape
        gradient, adjoints = self.sweeps.new_slab(count), self.sweeps.new_slab(count)
        if slab.is_last:
            gradient[-1] = sources
        self.sweeps.adjoint(None, None, gradient, adjoints, cold=True)
        del gradient
        # the adjoint at the right end of a step is that of the step's lag, the one at the first point has the last lag
        own = adjoints[0 if slab.is_first else 1 :][::-1]
        start = slab.nsteps - slab.hi
        own = own[: max(0, min(len(own), lags - start))]
        most = lags_of_block(self.propagator.evolution.V.mesh().comm, n)
        for first in range(0, len(own), most):
            part = np.ascontiguousarray(own[first : first + most].swapaxes(0, 1))
            rows, stages = (
                part.reshape(-1, n),
                np.zeros((self.propagator.dirk.stages, part.shape[0] * part.shape[1], n)),
            )
            self.propagator.apply_transposed(rows, np.empty(rows.shape), stages)
            yield LagBlock(start + first, part, stages.reshape(-1, *part.shape))

    def build(self, F: ParameterToObservable, terms: Sequence[StepTerm], lags: int) -> None:
        """Compute the rows of the sensors of all ranks of the group, and the responses of controls with one value per
        step (collective).

        Parameters
        ----------
        F
            The map, with rows of zero.
        terms
            Of the controls with one value per step, with responses of zero.
        lags
            Number of lags.
        """
        comm = self.spacetime.time_comm
        batch = most_items(F.spacetime.comm, 0, self._bytes_of_sensor(F, len(terms), lags))
        for sensors in _batches(comm.allgather(F.sensors), min(GROUP, batch)):
            numbers, readings = own_readings(F.table, [sensor for own in sensors for sensor in own])
            rows = np.zeros((len(numbers), F.layout.static_size))
            parts = [np.zeros((len(readings), *term.responses.shape[1:])) for term in terms]
            given = np.concatenate(sensors), readings, rows, parts, lags
            collectively(self.spacetime.comm, "map from controls to readings", self._collect, F, *given)
            self._share_out(F, sensors, readings, rows, terms, parts)

    def _collect(
        self,
        F: ParameterToObservable,
        sensors: np.ndarray,
        readings: Sequence[SensorReadingRows],
        rows: np.ndarray,
        parts: Sequence[np.ndarray],
        lags: int,
    ) -> None:
        """Add the contribution of this rank's lags to the rows and responses of a batch (collective over the group)."""
        found = collectors(self.propagator, readings, rows, parts)
        for block in self.blocks(F.table.impulses(sensors), lags):
            for collector in found:
                collector.add(block)
        for collector in found:
            collector.finish()

    def _share_out(
        self,
        F: ParameterToObservable,
        sensors: Sequence[np.ndarray],
        readings: Sequence[SensorReadingRows],
        rows: np.ndarray,
        terms: Sequence[StepTerm],
        parts: Sequence[np.ndarray],
    ) -> None:
        """Sum rows and responses of a batch over the group, each on the rank that owns the sensors."""
        comm, place = self.spacetime.time_comm, 0
        for owner, own in enumerate(sensors):
            if not len(own):
                continue
            mine, group = comm.rank == owner, slice(place, place + len(own))
            place = group.stop
            targets: list[np.ndarray | None] = [None] * (1 + len(terms))
            if mine:
                number = int(np.searchsorted(F.sensors, own[0]))
                local = slice(number, number + len(own))
                ends = F.readings[local]
                targets = [F.rows[ends[0].rows.start : ends[-1].rows.stop], *(t.responses[local] for t in terms)]
            span = slice(readings[group.start].rows.start, readings[group.stop - 1].rows.stop)
            for part, target in zip([rows[span], *(p[group] for p in parts)], targets, strict=True):
                total = np.empty(part.shape) if mine else None
                comm.Reduce(np.ascontiguousarray(part), total, op=MPI.SUM, root=owner)
                if mine:
                    target[...] = total

    def _bytes_of_sensor(self, F: ParameterToObservable, terms: int, lags: int) -> int:
        """Bytes of this rank for a sensor of a batch: four trajectories, coarse levels included, rows and responses."""
        readings = np.bincount(F.table.sensor, minlength=1).max()
        stepwise = F.layout.size - F.layout.static_size
        per_step = stepwise // max(1, F.layout.slab.k)
        numbers = 4 * len(self.sweeps.new_slab()) * self.propagator.evolution.state_size
        return 8 * int(numbers + readings * F.layout.static_size + terms * lags * per_step)


def _batches(sensors: Sequence[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Batches of at most ``size`` of the sensors of all ranks: of each rank those in the batch."""
    ends = np.cumsum([0, *map(len, sensors)])
    for first in range(0, int(ends[-1]), size):
        yield [
            own[max(0, first - a) : max(0, min(len(own), first + size - a))]
            for own, a in zip(sensors, ends[:-1], strict=True)
        ]
