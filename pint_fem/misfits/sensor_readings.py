r"""Readings of sensors at any times: the common part of misfits whose observations are finitely many numbers.

Sensor ``s`` reads a linear function :math:`\ell_s` of the state, linear in time between steps:

.. math::  J = \frac{1}{2} \sum_r \sum_s w_{rs} (\ell_s(u(t_r)) - d_{rs})^2 , \qquad
           u(t_r) = \theta_r u_n + (1 - \theta_r) u_{n-1} \quad\text{for } t_{n-1} < t_r \le t_n .

A reading belongs to the point ``n`` at the end of its step. Missing readings are left out of the sum. What a sensor is,
a point or a functional, is defined by the classes derived from this one, which apply the :math:`\ell_s` to blocks of
states.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.misfits.base import BlockMisfit
from pint_fem.misfits.given_readings import OF_READINGS, copied_readings, require_readings
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["SensorReadings"]

_NEAR = 0.1
"""Relative distance of all readings from their mean up to which states and readings are taken relative to the mean."""


class SensorReadings(BlockMisfit):
    r"""The squared difference of readings of sensors from their predictions, weighted.

    The user's arrays are the attributes ``times``, ``data`` (the values) and ``weight``. They are copied when a
    functional is made; its ``update_data()`` reads them again, and also what was put in their place.

    The map from sources to readings uses :attr:`sensors`, :attr:`reading_times`, :attr:`present`, :attr:`measured`,
    :attr:`weights`, :meth:`impulses`, :meth:`points_and_shares` and :meth:`predicted`: with ``l = impulses(range(
    sensors))``, its products with states summed over space, and ``n, theta = points_and_shares()``, sensor ``s`` reads
    ``theta[r] * l[s] @ u[n[r]] + (1 - theta[r]) * l[s] @ u[n[r] - 1]`` at time number ``r``.

    Parameters
    ----------
    times
        ``(times,)``, increasing, within the evolution's interval.
    values
        ``(times, sensors)``.
        Masked entries of a ``numpy.ma.MaskedArray`` are missing, and have no part in anything but :meth:`readings`,
        which predicts them. So sensors that are read at different times have the union of these as ``times``.
    weight
        A number for all readings, one per sensor ``(sensors,)``, or one per reading ``(times, sensors)``; none of them
        negative.

    Attributes
    ----------
    local : ndarray of int
        Numbers of the sensors whose observations this rank in space holds; set by :meth:`bind`.
    """

    quadratic = takes_batches = True
    #: What observations are called in messages.
    called = "sensors"
    #: Whether all ranks in space hold the observations of all sensors, or each those of its own.
    replicated = False

    local: np.ndarray
    _users: Any

    def __init__(
        self,
        times: ArrayLike,
        values: ArrayLike,
        weight: ArrayLike,
    ):
        self.times, self.data, self.weight = times, values, weight
        self._users = self  # the object that the user has, also of a copy for a second functional
        self._read_input()

    # -- what derived classes define -----------------------------------------------------------------------------------
    @abstractmethod
    def _count(self, given: dict[str, np.ndarray]) -> int:
        """Number of sensors in the user's arrays."""

    @abstractmethod
    def _find_sensors(self) -> None:
        """Set :attr:`local` and prepare for :meth:`_at_sensors` (collective over space)."""

    @abstractmethod
    def _at_sensors(self, U: np.ndarray) -> np.ndarray:
        """Observations ``(..., local)`` of states ``(..., n)`` (collective over space)."""

    @abstractmethod
    def _at_sensors_transposed(self, S: np.ndarray) -> np.ndarray:
        """The transpose of :meth:`_at_sensors`, ``(..., n)`` (collective over space)."""

    # -- the user's input ----------------------------------------------------------------------------------------------
    def _input(self) -> dict[str, np.ndarray]:
        """Copies of times, readings and weight as the user's object has them now."""
        own = self._users
        return copied_readings(self.called, own.times, own.data, own.weight)

    def given(self) -> dict:
        """The user's arrays."""
        return dict(self._input())

    def _read_input(self) -> None:
        """Copy the user's arrays and check them."""
        given = self._input()
        self._check(given)
        self._copied = given

    def _check(self, given: dict[str, np.ndarray]) -> None:
        """Raise an ``InputError`` where arrays do not fit together."""
        require_readings(self.called, given, self._count(given))

    def has_changed(self) -> bool:
        """Whether the user's arrays have other values than when they were copied."""
        now = self._input()
        return not all(np.array_equal(now[name], copy, equal_nan=True) for name, copy in self._copied.items())

    def update_data(self, changed: set, *, own: bool) -> None:
        """Copy the user's arrays again; new readings of the same sensors at the same times change nothing else."""
        if not own:
            return
        before = self._copied
        self._read_input()
        if all(np.array_equal(before[name], now) for name, now in self._copied.items() if name not in OF_READINGS):
            self._take_own_readings()
        else:
            self.bind(self.evolution, self.spacetime, self.slab)

    # -- sensors and readings of this rank -----------------------------------------------------------------------------
    def bind(self, evolution: Evolution, spacetime: SpaceTime, slab: Slab) -> None:
        """Find the sensors in the mesh and the readings among the own points (collective).

        Raises
        ------
        InputError
            If sensors or times do not fit the evolution.
        """
        super().bind(evolution, spacetime, slab)
        self._read_input()
        times = self._copied["times"]
        N, slack = evolution.nsteps, 1e-9 * evolution.dt
        first, last = evolution.time(0), evolution.time(N)
        if times[0] < first - slack or times[-1] > last + slack:
            raise InputError(
                f"{self.called}: times {times[0]:g}..{times[-1]:g} of readings are not within {first:g}..{last:g}"
            )
        self._find_sensors()
        # a reading at t in (t_{n-1}, t_n] belongs to point n: theta u_n + (1 - theta) u_{n-1}
        place = (times - evolution.t0) / evolution.dt
        point = np.clip(np.ceil(place - 1e-9), 1, N).astype(int)
        theta = np.minimum(place - (point - 1), 1.0)
        theta[np.abs(theta - 1) < 1e-9] = 1.0
        self._points_and_shares = point, theta
        self._own = own = np.flatnonzero((point > slab.lo) & (point <= slab.hi))
        self._point, self._theta = point[own] - slab.lo, theta[own]
        self._take_own_readings()
        self.observed, self.state_dependent = np.zeros((2, slab.k + 1), dtype=bool)
        self.observed[self._point] = True
        self.observed[self._point[self._theta != 1] - 1] = True
        self.active = self.observed.copy()
        self.active[0] = True  # by the left neighbour's readings

    def _take_own_readings(self) -> None:
        """Choose the offset that is subtracted from states and readings, and the own readings less the offset.

        It is the mean of the readings if all are near it and a function of that value has it for all its coefficients
        and observations: sums of large values would lose small differences. Otherwise it is zero.
        """
        data, present, weight = self.measured, self.present, self._copied["weight"]
        mean = float(data.mean() if present.all() else data[present].mean())
        sums = self._at_sensors(np.ones((1, self.evolution.state_size)))
        wrong = self.spacetime.sum_over_space(np.array([float((np.abs(sums - 1) > 1e-12).sum())]))[0]
        near = np.abs(data[present] - mean).max() <= _NEAR * abs(mean)
        self._offset = mean if near and not wrong else 0.0
        self._own_data = data[self._own][:, self.local] - self._offset
        self._scale, self._relative = (1.0 if weight.ndim else float(weight)), None
        if weight.ndim or not present.all():
            relative = np.where(present, weight if weight.ndim else 1.0, 0.0)
            self._relative = relative[self._own][:, self.local]

    # -- for the map from sources to readings --------------------------------------------------------------------------
    @property
    def sensors(self) -> int:
        """Number of sensors, those of all ranks."""
        return self._count(self._copied)

    @property
    def reading_times(self) -> np.ndarray:
        """Times of the readings, ``(times,)``."""
        return self._copied["times"]

    @property
    def measured(self) -> np.ndarray:
        """The readings, ``(times, sensors)``, zero where they are missing."""
        return self._copied["readings"]

    @property
    def present(self) -> np.ndarray:
        """Which readings are not missing, bool ``(times, sensors)``."""
        return ~self._copied["missing readings"]

    @property
    def weights(self) -> np.ndarray:
        """Weight of each reading, ``(times, sensors)``, zero where it is missing: the value of the misfit is half the
        sum of ``weights * (predicted - measured)**2``.
        """
        return np.where(self.present, self._copied["weight"], 0.0)

    def impulses(self, numbers: ArrayLike) -> np.ndarray:
        """The linear functions of the state that sensors read, as own values of dual vectors without the weight.

        Parameters
        ----------
        numbers
            Numbers of the sensors, the same on all ranks in space.

        Returns
        -------
        ndarray
            ``(len(numbers), n)``: the reading of a state ``(n,)`` is the sum over the ranks in space of the products
            with its own values (collective over space). Rows of boundary conditions are included.

        Raises
        ------
        InputError
            If there is no sensor of a number.
        """
        which = np.asarray(numbers)
        there = not which.size or (which.dtype.kind in "iu" and 0 <= which.min() <= which.max() < self.sensors)
        if which.ndim != 1 or not there:
            raise InputError(f"numbers of {self.called} = {numbers}: give integers from 0 to {self.sensors - 1}")
        return self._at_sensors_transposed((which[:, None] == self.local).astype(float))

    def points_and_shares(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the readings are among the points in time, the same on all ranks.

        Returns
        -------
        point : ndarray of int, shape (times,)
            Number ``n >= 1`` of the point at the end of the step that a reading is in, among those of all ranks.
        theta : ndarray, shape (times,)
            Its share: a reading is ``theta`` times the observation of point ``n`` and ``1 - theta`` times that of point
            ``n - 1``.
        """
        return self._points_and_shares

    def predicted(self, Y: np.ndarray) -> np.ndarray:
        """Predicted readings; another name of :meth:`readings`."""
        return self.readings(Y)

    def readings(self, Y: np.ndarray) -> np.ndarray:
        """Predicted readings ``(times, sensors)`` on every rank from the observations of the local points, also where
        readings are missing (collective).

        Parameters
        ----------
        Y
            ``(k + 1, local)``, as :meth:`read` or ``ReducedProblem.observations`` return them.
        """
        own = np.zeros(self.measured.shape)
        if not self.replicated or self.spacetime.space_comm.rank == 0:
            own[np.ix_(self._own, self.local)] = self._at_reading_times(Y) + self._offset
        return self.spacetime.sum_over_grid(own)

    # -- interpolation in time -----------------------------------------------------------------------------------------
    def _at_reading_times(self, Y: np.ndarray) -> np.ndarray:
        """Observations ``(k + 1, ..., local)`` interpolated to the times of the own readings."""
        theta = self._theta.reshape(-1, *[1] * (Y.ndim - 1))
        return theta * Y[self._point] + (1 - theta) * Y[self._point - 1]

    def _with_relative_weights(self, r: np.ndarray) -> np.ndarray:
        """Terms ``(own readings, ..., local)`` times the weights that are not the same for all readings."""
        if self._relative is None:
            return r
        return r * self._relative.reshape(len(r), *[1] * (r.ndim - 2), r.shape[-1])

    def _at_reading_times_transposed(self, r: np.ndarray) -> np.ndarray:
        """The transpose of :meth:`_at_reading_times` applied to residuals times weights, contributions of the left
        neighbour's readings to point 0 included (collective).
        """
        r = self._with_relative_weights(r)
        S = np.zeros((self.slab.k + 1, *r.shape[1:]))
        theta = self._scale * self._theta.reshape(-1, *[1] * (r.ndim - 1))
        np.add.at(S, self._point, theta * r)
        np.add.at(S, self._point - 1, (self._scale - theta) * r)
        self.spacetime.add_shared_points(S)
        return S

    def _per_point(self, terms: np.ndarray) -> np.ndarray:
        """Terms of the own readings and sensors times weights, summed for each own point and over space."""
        out = np.zeros(self.slab.k)
        np.add.at(out, self._point - 1, self._with_relative_weights(terms).sum(axis=1))
        out = self._scale * out
        return out if self.replicated else self.spacetime.sum_over_space(out)

    # -- the stages of a block misfit ----------------------------------------------------------------------------------
    @property
    def width(self) -> int:
        """Number of sensors whose observations this rank holds."""
        return len(self.local)

    def observe(self, points: slice, u: np.ndarray) -> np.ndarray:
        """Observations of the states less the offset, ``(b, local)``."""
        return self._at_sensors(u - self._offset if self._offset else u)

    def observe_tangent(self, points: slice, u: np.ndarray, du: np.ndarray) -> np.ndarray:
        """Observations of the direction, ``(b, local)``."""
        return self._at_sensors(du)

    def point_values(self, Y: np.ndarray) -> np.ndarray:
        """Half the weighted squares of the differences from the readings at each own point, ``(k,)``."""
        return self._per_point(0.5 * (self._at_reading_times(Y) - self._own_data) ** 2)

    def point_derivatives(self, Y: np.ndarray | None, dY: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`point_values`, ``(k,)``."""
        return self._per_point((self._at_reading_times(Y) - self._own_data) * self._at_reading_times(dY))

    def pull_back(self, Y: np.ndarray) -> np.ndarray:
        """Weighted differences from the readings, distributed to the points, ``(k + 1, local)``."""
        return self._at_reading_times_transposed(self._at_reading_times(Y) - self._own_data)

    def pull_back_tangent(self, dY: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`pull_back`, ``(k + 1, local)``."""
        return self._at_reading_times_transposed(self._at_reading_times(dY))

    def adjoint_source(self, points: slice, u: np.ndarray, S: np.ndarray | None) -> np.ndarray:
        """Transpose of the observation, applied to ``S`` at the points, ``(b, n)``."""
        return self._at_sensors_transposed(S[points])

    def adjoint_source_tangent(self, points: slice, u: np.ndarray, du: np.ndarray, dS: np.ndarray | None) -> np.ndarray:
        """Transpose of the observation, applied to ``dS`` at the points, ``(b, n)``."""
        return self._at_sensors_transposed(dS[points])
