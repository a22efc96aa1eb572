r"""Rows of the map from controls to readings, collected from the impulse responses of sensors block by block of lags.

For a static control with a load of the terms :math:`w_k(i)\, O_k q` in step :math:`i`, the row of a reading at point
:math:`n` is

.. math::
    F_r = \sum_k \sum_j \big(\theta\, w_k(n-1-j) + (1-\theta)\, w_k(n-2-j)\big)\, O_k^T y_j ,

with the adjoints :math:`y_j` of the loads at lag :math:`j` and no terms at negative steps. Of one sensor these are the
rows of a matrix product; where :math:`w_k = 1` they are differences of one sequence of partial sums. The row of the
initial condition is :math:`\theta \lambda_n + (1-\theta) \lambda_{n-1}`. For a control with one value per step the
responses :math:`O_k^T y_j` themselves are stored, as the rows of all readings of a sensor contain the same ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg.blas import dgemm

from pint_fem.evolution.evolution import Evolution
from pint_fem.inverse.impulse_responses import LagBlock
from pint_fem.inverse.readings import ReadingTable
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.propagators.loads import StageLoads, Term

__all__ = [
    "Collector",
    "InitialRows",
    "SensorReadingRows",
    "StaticRows",
    "StepResponses",
    "StepTerm",
    "collectors",
    "own_readings",
    "step_terms",
    "terms_of_controls",
]


class SensorReadingRows(NamedTuple):
    """The readings of one sensor: their rows among those of this rank, points and shares of the state there."""

    rows: slice
    point: np.ndarray
    theta: np.ndarray


def own_readings(table: ReadingTable, sensors: Sequence[int]) -> tuple[np.ndarray, list[SensorReadingRows]]:
    """The numbers of all readings of some sensors, one sensor after another, and where those of each sensor are."""
    numbers, found, place = [], [], 0
    for sensor in sensors:
        own = table.of_sensor(sensor)
        numbers.append(own)
        found.append(SensorReadingRows(slice(place, place + len(own)), table.point[own], table.theta[own]))
        place += len(own)
    return np.concatenate([np.zeros(0, dtype=int), *numbers]), found


class Collector(ABC):
    """What collects a part of the map from blocks of lags."""

    @abstractmethod
    def add(self, block: LagBlock) -> None:
        """Add the contribution of a block; blocks are consecutive, from lag 0 or a later one on."""

    def finish(self) -> None:
        """Complete the rows after the last block; most are complete."""
        return


class InitialRows(Collector):
    """Rows of the initial condition.

    Parameters
    ----------
    readings
        The readings of each sensor.
    out
        Rows ``(readings, n)``, zero at first.
    """

    def __init__(self, readings: Sequence[SensorReadingRows], out: np.ndarray):
        self._readings, self._out = readings, out

    def add(self, block: LagBlock) -> None:
        """Add the adjoints at the lags that readings need."""
        last = block.first + block.adjoints.shape[1]
        for own, lam in zip(self._readings, block.adjoints, strict=True):
            target = self._out[own.rows]
            for lags, shares in ((own.point, own.theta), (own.point - 1, 1 - own.theta)):
                some = np.flatnonzero((lags >= block.first) & (lags < last) & (shares != 0))
                target[some] += shares[some, None] * lam[lags[some] - block.first]


class StaticRows(Collector):
    """Rows of static controls, from one term of their loads.

    Parameters
    ----------
    loads, term
        The loads and the term, with its weights in all steps of the evolution.
    readings
        The readings of each sensor.
    out
        Rows ``(readings, nz)``, to which the term's are added.
    """

    def __init__(self, loads: StageLoads, term: Term, readings: Sequence[SensorReadingRows], out: np.ndarray):
        self._loads, self._term, self._readings, self._out = loads, term, readings, out
        self._nz = out.shape[1]
        self._constant = bool((term.weights == 1).all())
        self._sums = np.zeros((len(readings), self._nz))  # of the responses so far
        self._last: int | None = None  # the point after which these are
        needed = [np.concatenate([own.point, own.point[own.theta != 1] - 1]) for own in readings]
        self._points = np.unique(np.concatenate([np.zeros(0, dtype=int), *needed]))
        self._lag_weights: dict[bytes, np.ndarray] = {}

    def _responses(self, adjoints: np.ndarray) -> np.ndarray:
        """Responses ``(sensors, lags, nz)`` of adjoints ``(stages, sensors, lags, n)``."""
        shape = adjoints.shape
        rows = self._loads.pull_back_rows(self._term, adjoints.reshape(shape[0], shape[1] * shape[2], shape[3]))
        return rows.reshape(shape[1], shape[2], -1)[..., : self._nz]

    def add(self, block: LagBlock) -> None:
        """Add the responses of a block."""
        if self._constant:
            self._add_partial_sums(block)
        else:
            P, lags = self._responses(block.stages), slice(block.first, block.first + block.stages.shape[2])
            for own, responses in zip(self._readings, P, strict=True):
                weights, target = self._weights_of_lags(own)[:, lags], self._out[own.rows]
                total = dgemm(1.0, responses.T, weights.T, beta=1.0, c=target.T, overwrite_c=True)
                if not np.may_share_memory(total, target):  # where rows have columns of other controls, c is copied
                    target[...] = total.T

    def _add_partial_sums(self, block: LagBlock) -> None:
        """Add a block of a term whose weight is 1 in all steps: rows are partial sums of the responses."""
        lags = block.stages.shape[2]
        # a partial sum is needed after the lags of which a reading's point is the number
        ends = self._points[(self._points > block.first) & (self._points <= block.first + lags)] - block.first
        starts = np.unique(np.concatenate([[0], ends[ends < lags]])).astype(int)
        segments = block.stages
        if len(starts) < lags:
            chosen = np.zeros((len(starts), lags))
            for row, (a, b) in enumerate(zip(starts, [*starts[1:], lags], strict=True)):
                chosen[row, a:b] = 1.0
            segments = chosen @ block.stages
        P = self._responses(segments)
        sums = np.cumsum(P, axis=1)
        sums += self._sums[:, None]
        stops = np.append(starts[1:], lags) + block.first
        for own, after in zip(self._readings, sums, strict=True):
            target = self._out[own.rows]
            for points, shares in ((own.point, own.theta), (own.point - 1, 1 - own.theta)):
                some = np.flatnonzero((points > block.first) & (points <= block.first + lags) & (shares != 0))
                target[some] += shares[some, None] * after[np.searchsorted(stops, points[some])]
        self._sums[:] = sums[:, -1]
        self._last = block.first + lags

    def finish(self) -> None:
        """Add the sum of all responses to readings after the last lag: other ranks have the lags between."""
        if not self._constant or self._last is None:
            return
        for own, total in zip(self._readings, self._sums, strict=True):
            shares = np.where(own.point > self._last, own.theta, 0) + np.where(
                own.point - 1 > self._last, 1 - own.theta, 0
            )
            some = np.flatnonzero(shares)
            self._out[own.rows][some] += shares[some, None] * total

    def _weights_of_lags(self, own: SensorReadingRows) -> np.ndarray:
        """Weights ``(readings, lags)`` of the responses in the rows of a sensor."""
        key = own.point.tobytes() + own.theta.tobytes()
        if key not in self._lag_weights:
            weights = self._term.weights
            lags = np.arange(len(weights) + 1)
            made = np.zeros((len(own.point), len(lags)))
            for points, shares in ((own.point, own.theta), (own.point - 1, 1 - own.theta)):
                step = points[:, None] - 1 - lags
                made += np.where(step >= 0, shares[:, None] * weights[np.maximum(step, 0)], 0.0)
            self._lag_weights[key] = made
        return self._lag_weights[key]


class StepTerm(NamedTuple):
    """One term of the loads of controls with one value per step.

    Attributes
    ----------
    weights : ndarray, shape (nsteps,)
        Its factor in each step.
    responses : ndarray, shape (sensors, lags, nz)
        Derivatives of each sensor by a step's controls, lag by lag.
    """

    weights: np.ndarray
    responses: np.ndarray


class StepResponses(Collector):
    """Responses of controls with one value per step, from one term of their loads.

    Parameters
    ----------
    loads, term
        The loads and the term, with its weights in all steps of the evolution.
    start
        The first of the controls' entries in the vector of a step's controls.
    responses
        ``(sensors, lags, nz)``, to be filled.
    """

    def __init__(self, loads: StageLoads, term: Term, start: int, responses: np.ndarray):
        self._loads, self._term, self._start, self.responses = loads, term, start, responses

    def add(self, block: LagBlock) -> None:
        """Store the responses of a block."""
        shape = block.stages.shape
        rows = self._loads.pull_back_rows(self._term, block.stages.reshape(shape[0], shape[1] * shape[2], shape[3]))
        lags = slice(block.first, block.first + shape[2])
        self.responses[:, lags] = rows[:, self._start :].reshape(*shape[1:3], self.responses.shape[-1])


def terms_of_controls(propagator: LinearPropagator) -> list[tuple[Term, bool, bool]]:
    """The terms of the controls' loads in all steps, whether static controls are in them, and whether others are
    (collective over space).
    """
    ev, loads = propagator.evolution, propagator.loads
    static = [c not in ev.stepwise for c in ev.parameters]
    boundary = set() if ev.boundary_controls is None else ev.boundary_controls.indices
    found = []
    for term in loads.terms(ev.time(np.arange(ev.nsteps))) if ev.parameters else []:
        inside = {p for p, _ in term.operators} | (boundary if term.constant else set())
        found.append((term, any(static[p] for p in inside), not all(static[p] for p in inside)))
    return found


def _static_size(ev: Evolution) -> int:
    """Length of the static part of a step's vector of controls, which comes first."""
    parts = ev.split_controls(np.zeros(ev.control_size))
    return sum(len(part) for part, c in zip(parts, ev.parameters, strict=True) if c not in ev.stepwise)


def step_terms(propagator: LinearPropagator, sensors: int, lags: int) -> list[StepTerm]:
    """The terms of the loads of controls with one value per step, with responses of zero (collective over space)."""
    shape = sensors, lags, propagator.evolution.control_size - _static_size(propagator.evolution)
    return [StepTerm(term.weights, np.zeros(shape)) for term, _, in_steps in terms_of_controls(propagator) if in_steps]


def collectors(
    propagator: LinearPropagator,
    readings: Sequence[SensorReadingRows],
    dense: np.ndarray,
    steps: Sequence[np.ndarray],
) -> list[Collector]:
    """What collects the map of an evolution from the responses of some sensors.

    Parameters
    ----------
    propagator
        The finest level's.
    readings
        The readings of each of the sensors.
    dense
        Rows of the static controls and then of the initial condition, ``(readings, static size)``, zero at first.
    steps
        The sensors' responses to be filled, ``(sensors, lags, nz)`` for each of the terms of :func:`step_terms`.
    """
    ev, loads, nstatic = propagator.evolution, propagator.loads, _static_size(propagator.evolution)
    found: list[Collector] = []
    if ev.initial_control is not None:
        found.append(InitialRows(readings, dense[:, nstatic:]))
    of_steps = iter(steps)
    for term, in_static, in_steps in terms_of_controls(propagator):
        if in_static:
            found.append(StaticRows(loads, term, readings, dense[:, :nstatic]))
        if in_steps:
            found.append(StepResponses(loads, term, nstatic, next(of_steps)))
    return found
