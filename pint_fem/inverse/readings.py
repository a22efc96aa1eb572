r"""The readings of all sensors of some misfits, in the order of data vectors.

Reading :math:`r` is :math:`\theta_r\, h_s^T u_n + (1 - \theta_r)\, h_s^T u_{n-1}` with the observation functional
:math:`h_s` of its sensor and the point :math:`n` at the end of the step in which it is taken. A data vector ``(m,)``
has the readings of one misfit after the other, time by time; missing readings are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pint_fem.misfits.sensor_readings import SensorReadings

__all__ = ["ReadingTable"]


class ReadingTable:
    """All readings of some misfits.

    Parameters
    ----------
    misfits
        Bound misfits whose observations are finitely many.

    Attributes
    ----------
    size : int
        Number of readings ``m``.
    sensors : int
        Number of sensors of all misfits, one misfit after the other.
    sensor, point, theta : ndarray, shape (m,)
        Number of the reading's sensor; point at the end of its step; its share of the state there.
    values, weights : ndarray, shape (m,)
        What was measured, and the weights in the misfits: :math:`J = \\frac12 \\sum_r w_r (y_r - d_r)^2`.
    """

    def __init__(self, misfits: Sequence[SensorReadings]):
        self.misfits = list(misfits)
        self._first = np.cumsum([0, *(misfit.sensors for misfit in self.misfits)])
        self.sensors = int(self._first[-1])
        found = []
        for first, misfit in zip(self._first, self.misfits, strict=False):
            times, sensors = np.nonzero(misfit.present)
            points, theta = misfit.points_and_shares()
            parts = first + sensors, points[times], theta[times]
            found.append((*parts, misfit.measured[times, sensors], misfit.weights[times, sensors]))
        columns = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        self.sensor, self.point, self.theta, self.values, self.weights = columns
        self.size, self._factors = len(self.sensor), np.ones(len(self.sensor))

    def scale_weights(self, factors: np.ndarray) -> None:
        """Multiply the weights of the readings of each sensor by a factor, ``(sensors,)``."""
        self._factors = factors[self.sensor]
        self.weights = self._factors * self.weights

    def read_again(self) -> None:
        """Take values and weights as the misfits have them now."""
        self.values = np.concatenate([misfit.measured[misfit.present] for misfit in self.misfits])
        self.weights = self._factors * np.concatenate([misfit.weights[misfit.present] for misfit in self.misfits])

    def of_sensor(self, number: int) -> np.ndarray:
        """The numbers of a sensor's readings, in the order of time."""
        return np.flatnonzero(self.sensor == number)

    def impulses(self, numbers: np.ndarray) -> np.ndarray:
        """The observation functionals of some sensors as dual vectors of the state, ``(len(numbers), n)`` (collective
        over space).
        """
        parts = []
        for first, last, misfit in zip(self._first, self._first[1:], self.misfits, strict=False):
            own = numbers[(numbers >= first) & (numbers < last)] - first
            parts.append(misfit.impulses(own))
        return np.concatenate(parts)

    def split(self, y: np.ndarray) -> list[np.ma.MaskedArray]:
        """A data vector as one array ``(times, sensors)`` for each misfit, missing readings masked."""
        out, place = [], 0
        for misfit in self.misfits:
            present = misfit.present
            values = np.ma.masked_array(np.zeros(present.shape), mask=~present)
            values[present] = y[place : place + present.sum()]
            out.append(values)
            place += int(present.sum())
        return out
