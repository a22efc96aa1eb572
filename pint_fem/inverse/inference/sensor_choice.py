r"""Where sensors should be: greedy A- and D-optimal choice among the sensors of a map, before there are readings.

With reduced rows :math:`F_s = Q_s C_s` of a sensor, :math:`Q_s^T N_s^{-1} Q_s = T_s T_s^T` and :math:`B_s = T_s^T C_s`,
a set :math:`S` of sensors with independent noise has

.. math::
    \text{D}:&\quad \log\det(I + G_{SS}), & G_{st} &= B_s \Gamma B_t^T ,\\
    \text{A}:&\quad \mathrm{tr}(M \Gamma) - \mathrm{tr}\big((I + G_{SS})^{-1} H_{SS}\big), &
    H_{st} &= B_s \Gamma M \Gamma B_t^T .

The first is twice the expected gain of information, the second the trace of the posterior covariance :math:`M
\mathrm{Cov}`, with the matrix of an inner product or :math:`M = I`. With the sensors chosen so far both gains of a
further sensor are those of its diagonal blocks of :math:`I + G` and :math:`H`, conditioned on the chosen ones by Schur
complements: nothing is factored again for a candidate.

The D-optimal value of a set is submodular, so that a greedy choice reaches at least :math:`1 - 1/e` of the optimal one
(G. L. Nemhauser, L. A. Wolsey, M. L. Fisher, Math. Program. 14, 1978). Criteria: A. Alexanderian, Inverse Problems
37(4), 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from firedrake import TestFunction, TrialFunction, dx, inner
from scipy.linalg import cholesky, solve_triangular

from pint_fem.all_at_once.grids import is_integer
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.inverse.laws.gaussian_fields import EXACT
from pint_fem.inverse.laws.noise import Noise
from pint_fem.inverse.laws.priors import Prior, make_prior

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["SensorChoice", "SensorDesign", "choose_sensors"]

CRITERIA = ("A", "D")
"""Names of the criteria."""
_ROWS = 256
"""Rows that are multiplied by a matrix at once."""
_SAMPLES = 2000
"""Samples of the prior from which the trace of a large covariance is estimated."""


class SensorDesign:
    """Values of sets of sensors.

    Parameters
    ----------
    G
        Covariance of the reduced readings of all sensors, relative to their noise, ``(r, r)``.
    blocks
        The rows of each sensor.
    H
        ``B Γ M Γ B^T``, ``(r, r)``, for the trace of the covariance; default: the criterion is the determinant.
    trace
        Trace of the prior covariance.
    """

    def __init__(self, G: np.ndarray, blocks: Sequence[slice], H: np.ndarray | None = None, trace: float = 0.0):
        self.blocks, self.trace, self._H = list(blocks), trace, H
        self._P = np.eye(len(G)) + 0.5 * (G + G.T)

    @property
    def sensors(self) -> int:
        """Number of sensors."""
        return len(self.blocks)

    def _rows(self, sensors: Sequence[int]) -> tuple[np.ndarray, list[slice]]:
        """The rows of some sensors, and where those of each are among them."""
        rows = [np.arange(self.blocks[s].start, self.blocks[s].stop) for s in sensors]
        ends = np.cumsum([0, *map(len, rows)]).tolist()
        places = [slice(a, b) for a, b in pairwise(ends)]
        return np.concatenate([np.zeros(0, dtype=int), *rows]), places

    def _gain(self, P: np.ndarray, H: np.ndarray | None) -> float:
        """What readings add whose blocks of ``I + G`` and of ``H`` are given."""
        if not len(P):
            return 0.0
        L = cholesky(P, lower=True, check_finite=False)
        if H is None:
            return float(2 * np.log(L.diagonal()).sum())
        half = solve_triangular(L, H, lower=True, check_finite=False)
        return float(np.trace(solve_triangular(L, half.T, lower=True, check_finite=False)))

    def _after(self, gains: float) -> float:
        return gains if self._H is None else self.trace - gains

    def value(self, sensors: Sequence[int]) -> float:
        """The criterion of a set of sensors: the logarithm of the determinant, or the trace of the covariance."""
        rows, _ = self._rows(sensors)
        at = np.ix_(rows, rows)
        return self._after(self._gain(self._P[at], None if self._H is None else self._H[at]))

    def contributions(self, sensors: Sequence[int]) -> np.ndarray:
        """What each sensor of a set adds to the others, ``(len(sensors),)``: by how much the logarithm of the
        determinant is less, or the trace of the covariance more, without it.
        """
        rows, places = self._rows(sensors)
        at = np.ix_(rows, rows)
        L = cholesky(self._P[at], lower=True, check_finite=False)
        half = solve_triangular(L, np.eye(len(L)), lower=True, check_finite=False)
        R = half.T @ half
        if self._H is None:
            return np.array([-float(np.linalg.slogdet(R[p, p])[1]) for p in places])
        X = R @ self._H[at] @ R
        return np.array([float(np.trace(np.linalg.solve(R[p, p], X[p, p]))) for p in places])

    def choose(self, count: int, candidates: Sequence[int]) -> tuple[list[int], list[float]]:
        """Choose one sensor after another, each time the one that adds most; of equal ones the first.

        Returns
        -------
        order : list of int
            The chosen sensors.
        values : list of float
            The criterion before the first and after each.
        """
        rows, places = self._rows(candidates)
        at = np.ix_(rows, rows)
        P, H = self._P[at], None if self._H is None else self._H[at]
        left, order, total = dict(zip(candidates, places, strict=True)), [], 0.0
        values = [self._after(0.0)]
        for _ in range(count):
            gains = {s: self._gain(P[p, p], None if H is None else H[p, p]) for s, p in left.items()}
            best = max(gains, key=gains.__getitem__)
            total += gains[best]
            order.append(best)
            values.append(self._after(total))
            p = left.pop(best)
            L = cholesky(P[p, p], lower=True, check_finite=False)
            X = solve_triangular(L, P[p], lower=True, check_finite=False)
            if H is not None:
                Y = solve_triangular(L, H[p], lower=True, check_finite=False)
                Z = solve_triangular(L, Y[:, p].T, lower=True, check_finite=False)
                cross = X.T @ (Y - 0.5 * Z @ X)
                H = H - cross - cross.T
            P = P - X.T @ X
        return order, values


@dataclass(frozen=True)
class SensorChoice:
    """Sensors in the order in which they were chosen.

    Attributes
    ----------
    criterion : str
        ``"A"``, the trace of the posterior covariance, or ``"D"``, the logarithm of the determinant of the prior's
        covariance over the posterior's, which is twice the expected gain of information.
    order : list of int
        Numbers of the sensors among those of all misfits, one misfit after the other.
    values : ndarray, shape (len(order) + 1,)
        The criterion without sensors, and after each.
    adds : ndarray, shape (len(order),)
        What each adds to all others together, not negative: the change of the criterion if it is left out.
    """

    criterion: str
    order: list[int]
    values: np.ndarray
    adds: np.ndarray
    design: SensorDesign = field(repr=False)

    def value(self, sensors: Sequence[int]) -> float:
        """The criterion of any set of sensors."""
        return self.design.value(_numbers(sensors, self.design.sensors))

    def contributions(self, sensors: Sequence[int]) -> np.ndarray:
        """What each sensor of any set adds to the others of it, ``(len(sensors),)``."""
        return self.design.contributions(_numbers(sensors, self.design.sensors))


def _numbers(given: Any, sensors: int) -> list[int]:
    """Different numbers of sensors; others are an ``InputError``."""
    numbers = list(given)
    fits = all(is_integer(s) and 0 <= s < sensors for s in numbers)
    if not fits or len(set(numbers)) < len(numbers):
        raise InputError(f"sensors {given!r}: give different numbers from 0 to {sensors - 1}")
    return [int(s) for s in numbers]


def choose_sensors(
    F: ParameterToObservable,
    prior: Prior,
    noise: Noise,
    count: int,
    criterion: str,
    *,
    candidates: Sequence[int] | None = None,
    product: Any = None,
) -> SensorChoice:
    """Choose sensors of a map (collective); see
    :meth:`~pint_fem.inverse.map.ParameterToObservable.choose_sensors`.
    """
    comm, sensors = F.spacetime.comm, F.table.sensors
    require_same(comm, count=count, criterion=criterion, candidates=candidates)
    if criterion not in CRITERIA:
        raise InputError(f"choose_sensors: criterion = {criterion!r}: give 'A' or 'D'")
    if product is not None and criterion == "D":
        raise InputError("choose_sensors: the D-optimal choice does not depend on an inner product: leave it out")
    among = _numbers(range(sensors) if candidates is None else candidates, sensors)
    if not is_integer(count) or not 0 < count <= len(among):
        raise InputError(f"choose_sensors: count = {count!r}: give a whole number from 1 to {len(among)}")
    if F.layout.evolution.stepwise:
        raise InputError(
            "choose_sensors: there are controls with one value per step: it is for static controls and initial "
            "conditions"
        )
    _require_independent(noise, F.table.sensor, sensors)
    design = _design(F, prior, noise, _inner_product(F, product) if criterion == "A" else None, criterion == "A")

    def chosen() -> tuple | None:
        if comm.rank:
            return None
        order, values = design.choose(int(count), among)
        return order, np.array(values), design.contributions(order)

    return SensorChoice(criterion, *comm.bcast(collectively(comm, "choice of sensors", chosen)), design)


def _require_independent(noise: Noise, sensor: np.ndarray, sensors: int) -> None:
    """Refuse noise that couples readings of different sensors: sets of them have no noise of their own then."""
    if noise.is_diagonal:
        return
    random = np.random.default_rng(0).uniform(0.5, 1.5, len(sensor))
    rows = np.where(sensor == np.arange(sensors)[:, None], random, 0.0)
    correlated = noise.covariance(rows)
    if (np.abs(correlated[rows == 0]) > 1e-12 * np.abs(correlated).max()).any():
        raise InputError(
            "choose_sensors: the noise of different sensors is correlated: give noise= with independent sensors"
        )


def _inner_product(F: ParameterToObservable, product: Any) -> Prior | None:
    """The inner product of controls, as the law of which it is the precision (collective)."""
    if product is None or isinstance(product, Prior):
        return product
    if isinstance(product, str):
        if product != "L2":
            raise InputError(f"choose_sensors: inner_product = {product!r}: give 'L2', a form, or a list of forms")
        spaces = [control.function_space() for control in F.layout.evolution.controls]
        product = [inner(TrialFunction(V), TestFunction(V)) * dx for V in spaces]
    return make_prior(product, F.layout)


def _design(F: ParameterToObservable, prior: Prior, noise: Noise, product: Prior | None, traces: bool) -> SensorDesign:
    """The matrices of all sensors (collective)."""
    rows, partition, spacetime = F.reduced, F.partition, F.spacetime
    D = partition.columns(prior.covariance(rows.C, shared=False))
    basis = rows.expand(np.eye(rows.size), len(F.data))
    M = rows.contract(noise.inverse(basis))
    ends = np.cumsum([0, *(Q.shape[1] for _, Q in rows.blocks)]).tolist()
    blocks = [slice(a, b) for a, b in pairwise(ends)]
    T = np.zeros_like(M)
    for p in blocks:
        if p.stop > p.start:
            T[p, p] = cholesky(0.5 * (M[p, p] + M[p, p].T), lower=True, check_finite=False)
    G = T.T @ spacetime.sum_over_grid(partition.columns(rows.C) @ D.T) @ T
    if not traces:
        return SensorDesign(G, blocks)
    MD = D
    if product is not None:
        parts = [D[i : i + _ROWS] for i in range(0, len(D), _ROWS)]
        MD = np.concatenate([D[:0], *(product.precision(partition.spread(p))[:, partition.own] for p in parts)])
    H = T.T @ spacetime.sum_over_grid(D @ MD.T) @ T
    return SensorDesign(G, blocks, 0.5 * (H + H.T), _trace(prior, product))


def _trace(prior: Prior, product: Prior | None) -> float:
    """The trace of the prior covariance, for an inner product times its matrix (collective)."""
    spacetime, n = prior.layout.spacetime, prior.layout.size
    if product is None:
        return float(spacetime.sum_over_space(np.array([prior.variance().sum()]))[0])
    sizes = spacetime.space_comm.allgather(n)
    if sum(sizes) > EXACT:
        x = prior.sample(_SAMPLES, 0)
        return float(spacetime.sum_over_space(np.array([(x * product.precision(x)).sum()]))[0]) / _SAMPLES
    total = 0.0
    for rank, size in enumerate(sizes):
        for first in range(0, size, _ROWS):
            numbers = np.arange(first, min(first + _ROWS, size))
            units = np.zeros((len(numbers), n))
            mine = rank == spacetime.space_comm.rank
            if mine:
                units[np.arange(len(numbers)), numbers] = 1.0
            found = product.precision(prior.covariance(units))
            total += float(found[np.arange(len(numbers)), numbers].sum()) if mine else 0.0
    return float(spacetime.sum_over_space(np.array([total]))[0])
