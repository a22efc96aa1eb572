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
complements: nothing is factored again for a candidate. With fewer controls than reduced rows the same follows in the
space of the controls (:mod:`~pint_fem.inverse.inference.sensor_designs`).

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
from scipy.linalg import cholesky

from pint_fem.all_at_once.grids import is_integer
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.inverse.inference.sensor_designs import ParameterDesign, ReadingDesign, SensorDesign
from pint_fem.inverse.laws.gaussian_fields import EXACT
from pint_fem.inverse.laws.noise import Noise
from pint_fem.inverse.laws.priors import Prior, make_prior
from pint_fem.inverse.reduction import estimated_size
from pint_fem.inverse.spectra import ParameterSpace

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["SensorChoice", "choose_sensors"]

CRITERIA = ("A", "D")
"""Names of the criteria."""
_ROWS = 256
"""Rows that are multiplied by a matrix at once."""
_SAMPLES = 2000
"""Samples of the prior from which the trace of a large covariance is estimated."""


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
    """The matrices of all sensors in the smaller space (collective)."""
    spacetime, partition = F.spacetime, F.partition
    unknowns = int(spacetime.space_comm.allreduce(F.layout.static_size))
    if unknowns <= F.table.sensors or unknowns <= estimated_size(F.rows, [own.rows for own in F.readings], spacetime):
        return _parameter_design(F, prior, noise, product, traces)
    rows = F.reduced
    D = partition.columns(prior.covariance(rows.C, shared=False))
    M = rows.gram(noise, len(F.data))
    ends = np.cumsum([0, *(Q.shape[1] for _, Q in rows.blocks)]).tolist()
    blocks = [slice(a, b) for a, b in pairwise(ends)]
    T = [cholesky(M[p, p], lower=True, check_finite=False) if p.stop > p.start else M[p, p] for p in blocks]

    def whitened(A: np.ndarray) -> np.ndarray:
        A = np.concatenate([A[:0], *(t.T @ A[p] for t, p in zip(T, blocks, strict=True))])
        return np.concatenate([A[:, :0], *(A[:, p] @ t for t, p in zip(T, blocks, strict=True))], axis=1)

    G = whitened(spacetime.sum_over_grid(partition.columns(rows.C) @ D.T))
    if not traces:
        return ReadingDesign(G, blocks)
    H = whitened(spacetime.sum_over_grid(D @ _products(F, product, D).T))
    return ReadingDesign(G, blocks, 0.5 * (H + H.T), _trace(prior, product))


def _products(F: ParameterToObservable, product: Prior | None, D: np.ndarray) -> np.ndarray:
    """The inner product's matrix times own entries of primal vectors, ``(k, own)`` (collective)."""
    if product is None:
        return D
    parts = [F.partition.spread(D[i : i + _ROWS]) for i in range(0, len(D), _ROWS)]
    return np.concatenate([D[:0], *(product.precision(part)[:, F.partition.own] for part in parts)])


def _parameter_design(
    F: ParameterToObservable, prior: Prior, noise: Noise, product: Prior | None, traces: bool
) -> SensorDesign:
    """The matrices of all sensors in the space of the controls (collective)."""
    spectrum = ParameterSpace(F, prior, noise)
    B = noise.whitened(F.product(spectrum.expand(np.eye(len(spectrum.lam))))).T
    rows = [F.table.of_sensor(s) for s in range(F.table.sensors)]
    if not traces:
        return ParameterDesign(B, rows)
    X = F.spacetime.sum_over_grid(spectrum.W @ _products(F, product, spectrum.W).T)
    return ParameterDesign(B, rows, 0.5 * (X + X.T))


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
