r"""The covariance :math:`G = F \Gamma F^T` of readings that follows from the prior, for controls with one value per step.

With prior covariances :math:`\Gamma_1` of a step's controls, independent of the step, and reduced responses
:math:`p^t_{s,j} = \sum_a Q^t_s(j, a)\, C_{s,a}` (:class:`~pint_fem.inverse.reduction.ReducedRows` of all lags and terms),
the covariance of what the sensors ``s`` and ``s'`` read at the points ``n`` and ``n'`` is

.. math::
    G_{ss'}(n, n') = \sum_i A_{i,s}(n)\, K_{ss'}\, A_{i,s'}(n')^T, \qquad K = C\, \Gamma_1 C^T, \qquad
    A_{i,s}(n) = \sum_t w_t(i)\, Q^t_s(n - 1 - i) .

The solves with the prior are those of ``C`` only. Where the one term has the weight 1 in all steps, the sum over
:math:`i` is one along the diagonals of :math:`Q_s K_{ss'} Q_{s'}^T`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from pint_fem.inverse.laws.priors import Prior
from pint_fem.inverse.per_step.toeplitz import ToeplitzMap
from pint_fem.inverse.reduction import ReducedRows

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["data_gram"]

_NUMBERS = 2e7
"""Numbers in the parameter vectors that are multiplied by the prior's covariance at once."""


def data_gram(F: ParameterToObservable, prior: Prior) -> np.ndarray:
    """The matrix :math:`F \\Gamma F^T`, ``(m, m)``, on every rank (collective).

    Parameters
    ----------
    F
        The map, with controls that have one value per step.
    prior
        The controls' prior, the same in all steps and independent between them.
    """
    steps, spacetime = F.steps, F.spacetime
    assert steps is not None
    reduced = _reduced_responses(steps)
    static = F.reduced.C if F.layout.static_size else np.zeros((0, 0))
    covered, covered_steps = _covered(prior, static, reduced.C, steps)
    columns = steps.columns
    K = columns.columns(reduced.C, reduced.counts, axis=0) @ columns.columns(covered_steps, reduced.counts, axis=0).T
    K = spacetime.sum_over_grid(K)
    G = np.zeros((F.table.size, F.table.size))
    of_sensors = _OfSensors(steps, reduced, K)
    if len(steps.terms) == 1 and (steps.terms[0].weights == 1).all():
        of_sensors.add_diagonal_sums(G)
    else:
        of_sensors.add_steps(G)
    G = spacetime.sum_over_time(G)
    if spacetime.space_comm.allreduce(F.layout.static_size):
        partition = F.partition
        gram = spacetime.sum_over_grid(partition.columns(static) @ partition.columns(covered).T)
        G += F.reduced.expand(F.reduced.expand(gram, F.table.size).T, F.table.size)
    return 0.5 * (G + G.T)


def _reduced_responses(steps: ToeplitzMap) -> ReducedRows:
    """The own sensors' responses at all lags to all terms as reduced rows; row ``(t, j)`` of sensor ``s`` has the number
    ``(s * terms + t) * lags + j`` (collective).
    """
    spacetime, own = steps.layout.spacetime, steps.sensors[steps.layout.spacetime.time_comm.rank]
    stacked = np.stack([term.responses[:, : steps.lags] for term in steps.terms], axis=1)
    count = stacked.shape[1] * stacked.shape[2]
    numbers = (own[:, None] * count + np.arange(count)).ravel()
    slices = [slice(i * count, (i + 1) * count) for i in range(len(own))]
    return ReducedRows(stacked.reshape(len(own) * count, -1), slices, numbers, spacetime)


def _covered(prior: Prior, static: np.ndarray, rows: np.ndarray, steps: ToeplitzMap) -> tuple[np.ndarray, np.ndarray]:
    """Products of the prior's covariance with this rank's static dual vectors ``(a, static_size)`` and duals of a step's
    controls ``(b, nz)``, packed into parameter vectors (collective over space).
    """
    layout = steps.layout
    largest = layout.spacetime.space_comm.allreduce(layout.size, op=MPI.MAX)
    each, k = max(1, int(_NUMBERS / largest)), layout.slab.k
    out, out_rows = np.empty(static.shape), np.empty(rows.shape)
    for first in range(0, max(len(static), -(-len(rows) // k)), each):
        own, own_rows = slice(first, first + each), slice(first * k, (first + each) * k)
        count = max(len(static[own]), -(-len(rows[own_rows]) // k))
        packed, padded = np.zeros((count, layout.size)), np.zeros((count * k, rows.shape[1]))
        packed[: len(static[own]), : layout.static_size] = static[own]
        padded[: len(rows[own_rows])] = rows[own_rows]
        steps.columns.put_steps(packed, padded.reshape(count, k, -1))
        product = prior.covariance(packed, shared=False)
        out[own] = product[: len(static[own]), : layout.static_size]
        out_rows[own_rows] = steps.columns.steps(product).reshape(count * k, -1)[: len(rows[own_rows])]
    return out, out_rows


class _OfSensors:
    """Rows of the covariance for the readings of this rank's sensors.

    Parameters
    ----------
    steps
        The map for controls with one value per step.
    reduced
        The sensors' reduced responses.
    K
        Covariance of the reduced rows, ``(rows, rows)``.
    """

    def __init__(self, steps: ToeplitzMap, reduced: ReducedRows, K: np.ndarray):
        self._lags, self._weights = steps.lags, np.array([term.weights for term in steps.terms])
        terms, table = len(steps.terms), steps.table
        ends = np.cumsum([0, *(Q.shape[1] for _, Q in reduced.blocks)])
        order = np.concatenate(steps.sensors).astype(int)
        self._own = set(steps.sensors[steps.layout.spacetime.time_comm.rank].tolist())
        self._K, self._sensors = K, []
        for sensor, (_, Q), a, b in zip(order, reduced.blocks, ends, ends[1:], strict=False):
            numbers = table.of_sensor(sensor)
            R = steps.readings[numbers][:, sensor :: table.sensors]
            Q = Q.reshape(terms, self._lags, -1) if Q.size else np.zeros((terms, self._lags, 0))
            self._sensors.append((int(sensor), numbers, R, Q, slice(a, b)))

    def add_diagonal_sums(self, G: np.ndarray) -> None:
        """Add the covariances of one term with weight 1."""
        L = self._lags
        for s, numbers, R, Q, part in self._sensors:
            if s not in self._own:
                continue
            for _, others, R_other, Q_other, other in self._sensors:
                # in rows of length 2L, an entry per diagonal and column: entry (n, n') is number 2nL + n' - n
                skewed = np.zeros(2 * L * L)
                skewed[: L * (2 * L - 1)].reshape(L, 2 * L - 1)[:, :L] = Q[0] @ self._K[part, other] @ Q_other[0].T
                sums = np.cumsum(skewed.reshape(L, 2 * L), axis=0).ravel()
                at_points = sums[: L * (2 * L - 1)].reshape(L, 2 * L - 1)[:, :L]
                G[np.ix_(numbers, others)] = R @ (R_other @ at_points.T).T

    def add_steps(self, G: np.ndarray) -> None:
        """Add the covariances, step by step."""
        for i in range(self._lags):
            A = []
            for _, numbers, R, Q, _ in self._sensors:
                some = np.flatnonzero(np.diff(R[:, i:].indptr))  # readings after the step's start
                mixed = np.tensordot(self._weights[:, i], Q[:, : self._lags - i], axes=1)
                A.append((numbers[some], R[some][:, i:] @ mixed))
            for (s, *_, part), (numbers, rows) in zip(self._sensors, A, strict=True):
                if s not in self._own:
                    continue
                product = rows @ self._K[part]
                for (*_, other), (others, other_rows) in zip(self._sensors, A, strict=True):
                    G[np.ix_(numbers, others)] += product[:, other] @ other_rows.T
