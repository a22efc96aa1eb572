r"""Covariances of readings by the prior of controls with one value per step, from reduced responses.

With prior covariances :math:`\Gamma_1` of a step's controls, independent of the step, and reduced responses
:math:`p^t_{s,j} = \sum_a Q^t_s(j, a)\, C_{s,a}` (:class:`~pint_fem.inverse.reduction.ReducedRows` of all lags and
terms), the covariance of what the sensors ``s`` and ``s'`` read at the points ``n`` and ``n'`` is

.. math::
    G_{ss'}(n, n') = \sum_i A_{i,s}(n)\, K_{ss'}\, A_{i,s'}(n')^T, \qquad K = C\, \Gamma_1 C^T, \qquad
    A_{i,s}(n) = \sum_t w_t(i)\, Q^t_s(n - 1 - i) .

The solves with the prior are those of ``C`` only. Where the one term has the weight 1 in all steps, the sum over
:math:`i` is one along the diagonals of :math:`Q_s K_{ss'} Q_{s'}^T`. Products with :math:`G` are convolutions with the
:math:`Q_s`, and what a matrix of readings gives for the controls of step :math:`i` follows from :math:`A_i D` with
:math:`D = C\, \Gamma_1`.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI
from scipy.fft import irfft, next_fast_len, rfft

from pint_fem.inverse.laws.priors import Prior
from pint_fem.inverse.per_step.toeplitz import ToeplitzMap
from pint_fem.inverse.reduction import ReducedRows

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["CoveredResponses", "covered_responses"]

_NUMBERS = 2e7
"""Numbers in the parameter vectors that are multiplied by the prior's covariance at once."""


def covered_responses(
    F: ParameterToObservable, prior: Prior, static: np.ndarray
) -> tuple[CoveredResponses, np.ndarray]:
    """The reduced responses with their products with the prior's covariance, and such products of this rank's static
    dual vectors ``(a, static_size)`` (collective).
    """
    steps = F.steps
    assert steps is not None
    reduced = _reduced_responses(steps)
    covered, rows = _covered(prior, static, reduced.C, steps)
    D = steps.columns.columns(rows, reduced.counts, axis=0)
    K = F.spacetime.sum_over_grid(steps.columns.columns(reduced.C, reduced.counts, axis=0) @ D.T)
    return CoveredResponses(steps, reduced, D, K), covered


def _reduced_responses(steps: ToeplitzMap) -> ReducedRows:
    """The own sensors' responses at all lags to all terms as reduced rows; row ``(t, j)`` of sensor ``s`` has the
    number ``(s * terms + t) * lags + j`` (collective).
    """
    spacetime, own = steps.layout.spacetime, steps.sensors[steps.layout.spacetime.time_comm.rank]
    stacked = np.stack([term.responses[:, : steps.lags] for term in steps.terms], axis=1)
    count = stacked.shape[1] * stacked.shape[2]
    numbers = (own[:, None] * count + np.arange(count)).ravel()
    slices = [slice(i * count, (i + 1) * count) for i in range(len(own))]
    return ReducedRows(stacked.reshape(len(own) * count, stacked.shape[-1]), slices, numbers, spacetime)


def _covered(prior: Prior, static: np.ndarray, rows: np.ndarray, steps: ToeplitzMap) -> tuple[np.ndarray, np.ndarray]:
    """Products of the prior's covariance with this rank's static dual vectors ``(a, static_size)`` and duals of a
    step's controls ``(b, nz)``, packed into parameter vectors (collective over space).
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
        steps.columns.put_steps(packed, padded.reshape(count, k, rows.shape[1]))
        product = prior.covariance(packed, shared=False)
        out[own] = product[: len(static[own]), : layout.static_size]
        out_rows[own_rows] = steps.columns.steps(product).reshape(padded.shape)[: len(rows[own_rows])]
    return out, out_rows


class CoveredResponses:
    """Reduced responses of all sensors with their covariance.

    Parameters
    ----------
    steps
        The map for controls with one value per step.
    reduced
        The sensors' reduced responses.
    D
        :math:`C\\, \\Gamma_1`, own columns of all reduced rows.
    K
        Covariance of the reduced rows, ``(rows, rows)``.

    Attributes
    ----------
    invariant : bool
        Whether the one term has the weight 1 in all steps, so that covariances do not change when all times are moved.
    """

    def __init__(self, steps: ToeplitzMap, reduced: ReducedRows, D: np.ndarray, K: np.ndarray):
        self.steps, self.D, self.K = steps, D, K
        self._lags, self._weights = steps.lags, np.array([term.weights for term in steps.terms])
        self._length = next_fast_len(2 * self._lags - 1, real=True)
        self.invariant = len(steps.terms) == 1 and bool((self._weights == 1).all())
        terms, table = len(steps.terms), steps.table
        ends = np.cumsum([0, *(Q.shape[1] for _, Q in reduced.blocks)])
        order = np.concatenate(steps.sensors).astype(int)
        self._own = set(steps.sensors[steps.layout.spacetime.time_comm.rank].tolist())
        self._sensors = []
        for sensor, (_, Q), a, b in zip(order, reduced.blocks, ends, ends[1:], strict=False):
            numbers = table.of_sensor(sensor)
            R = steps.readings[numbers][:, sensor :: table.sensors]
            Q = Q.reshape(terms, self._lags, -1) if Q.size else np.zeros((terms, self._lags, 0))
            self._sensors.append((int(sensor), numbers, R, Q, slice(a, b)))

    def of_readings(self, numbers: np.ndarray, step: int) -> np.ndarray:
        """Coefficients ``(len(numbers), rows)`` of the derivatives of readings by a step's controls in terms of the
        reduced rows.
        """
        table, out = self.steps.table, np.zeros((len(numbers), len(self.K)))
        point, theta, sensors = table.point[numbers], table.theta[numbers], table.sensor[numbers]
        for sensor, _, _, Q, part in self._sensors:
            own = np.flatnonzero(sensors == sensor)
            mixed = np.tensordot(self._weights[:, step], Q, axes=1)
            for lag, share in ((point - 1 - step, theta), (point - 2 - step, 1 - theta)):
                some = own[lag[own] >= 0]
                out[some, part] += share[some, None] * mixed[lag[some]]
        return out

    def add_diagonal_sums(self, G: np.ndarray) -> None:
        """Add the covariances of one term with weight 1."""
        L = self._lags
        for s, numbers, R, Q, part in self._sensors:
            if s not in self._own:
                continue
            for _, others, R_other, Q_other, other in self._sensors:
                # in rows of length 2L, an entry per diagonal and column: entry (n, n') is number 2nL + n' - n
                skewed = np.zeros(2 * L * L)
                skewed[: L * (2 * L - 1)].reshape(L, 2 * L - 1)[:, :L] = Q[0] @ self.K[part, other] @ Q_other[0].T
                sums = np.cumsum(skewed.reshape(L, 2 * L), axis=0).ravel()
                at_points = sums[: L * (2 * L - 1)].reshape(L, 2 * L - 1)[:, :L]
                G[np.ix_(numbers, others)] = R @ (R_other @ at_points.T).T

    def _of_step(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each sensor the numbers of the readings that depend on the controls of step ``i``, and :math:`A_{i,s}`."""
        found = []
        for _, numbers, R, Q, _ in self._sensors:
            some = np.flatnonzero(np.diff(R[:, i:].indptr))
            mixed = np.tensordot(self._weights[:, i], Q[:, : self._lags - i], axes=1)
            found.append((numbers[some], R[some][:, i:] @ mixed))
        return found

    def add_steps(self, G: np.ndarray) -> None:
        """Add the covariances, step by step."""
        for i in range(self._lags):
            A = self._of_step(i)
            for (s, *_, part), (numbers, rows) in zip(self._sensors, A, strict=True):
                if s not in self._own:
                    continue
                product = rows @ self.K[part]
                for (*_, other), (others, other_rows) in zip(self._sensors, A, strict=True):
                    G[np.ix_(numbers, others)] += product[:, other] @ other_rows.T

    def contributions(self, step: int, v: np.ndarray) -> np.ndarray:
        """What the controls of a step contribute to all readings, ``(m,)``, for products ``(rows,)`` of the reduced
        rows with these controls.
        """
        out = np.zeros(self.steps.table.size)
        for _, numbers, R, Q, part in self._sensors:
            response = self._weights[:, step] @ (Q[:, : self._lags - step] @ v[part])
            out[numbers] = R @ np.concatenate([np.zeros(step), response])
        return out

    def product(self, y: np.ndarray) -> np.ndarray:
        """Products ``(k, m)`` of the covariance of all readings with data vectors ``(k, m)``, by FFT in time."""
        out = np.zeros(y.shape)
        each = max(1, int(_NUMBERS / (2 * self._length * max(1, len(self.K)))))
        for first in range(0, len(y), each):
            rows = slice(first, first + each)
            Z = np.zeros((self._lags, len(y[rows]), len(self.K)))
            for (_, numbers, R, _, part), kernel in zip(self._sensors, self._kernels, strict=True):
                transforms = rfft((R.T @ y[rows][:, numbers].T), n=self._length, axis=0)
                for weights, of_term in zip(self._weights, kernel, strict=True):
                    g = irfft(transforms[:, :, None] * of_term.conj()[:, None], n=self._length, axis=0)[: self._lags]
                    Z[..., part] += g * weights[: self._lags, None, None]
            Z = Z @ self.K
            for (_, numbers, R, _, part), kernel in zip(self._sensors, self._kernels, strict=True):
                for weights, of_term in zip(self._weights, kernel, strict=True):
                    transforms = rfft(Z[..., part] * weights[: self._lags, None, None], n=self._length, axis=0)
                    values = irfft((transforms @ of_term[:, :, None])[..., 0], n=self._length, axis=0)[: self._lags]
                    out[rows][:, numbers] += (R @ values).T
        return out

    @cached_property
    def _kernels(self) -> list[np.ndarray]:
        """Transforms ``(terms, frequencies, rows)`` of each sensor's basis of lags."""
        return [rfft(Q, n=self._length, axis=1) for _, _, _, Q, _ in self._sensors]

    def squares(self, B: np.ndarray) -> np.ndarray:
        """The diagonal of :math:`D^T A_i^T B A_i D` for a symmetric matrix ``(m, m)`` and all steps, ``(nsteps, own
        columns)``.
        """
        out = np.zeros((self.steps.layout.slab.nsteps, self.D.shape[1]))
        for i in range(self._lags):
            A = self._of_step(i)
            numbers = np.concatenate([own for own, _ in A])
            inner = B[np.ix_(numbers, numbers)]
            ends = np.cumsum([0, *(len(own) for own, _ in A)])
            places = [slice(a, b) for a, b in pairwise(ends)]
            if len(self.K) <= len(numbers):  # in the space of the reduced rows
                right = np.concatenate([inner[:, at] @ rows for at, (_, rows) in zip(places, A, strict=True)], axis=1)
                H = np.concatenate([rows.T @ right[at] for at, (_, rows) in zip(places, A, strict=True)])
                out[i] = np.einsum("ij,ij->j", self.D, H @ self.D)
            else:
                pairs = zip(self._sensors, A, strict=True)
                covered = np.concatenate([rows @ self.D[part] for (*_, part), (_, rows) in pairs])
                out[i] = np.einsum("ij,ij->j", covered, inner @ covered)
        return out
