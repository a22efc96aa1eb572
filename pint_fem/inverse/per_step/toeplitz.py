r"""Products with the map from controls with one value per step to readings, block Toeplitz, by FFT in time.

With the responses :math:`p^t_{s,j}` of sensor :math:`s` at lag :math:`j` to term :math:`t` of the loads, and the
weights :math:`w_t(i)` of the steps, the sensor reads at point :math:`n`

.. math::
    y_s(n) = \sum_t \sum_{i < n} (p^t_{s,n-1-i})^T\, w_t(i)\, z_i ,

and a reading is :math:`\theta\, y_s(n) + (1 - \theta)\, y_s(n-1)`. The sum over :math:`i` is a convolution. Padded by
zeros to :math:`T \geq 2L - 1` steps, with the number :math:`L` of lags, it is a product of transforms: for each of
:math:`T/2 + 1` frequencies a small matrix times the transforms of :math:`w_t z`. The transposed product is a
correlation, by the conjugate matrices.

The ranks in time divide the columns, the entries of a step's control, among them. The responses are moved once, so that
a rank has those of all sensors to its columns. In each product the controls are exchanged between the division by steps
and the division by columns; readings are sums over all ranks. No rank has all steps of a field.

Source: S. Venkat, M. Fernando, S. Henneking, O. Ghattas, Fast and scalable FFT-based GPU-accelerated algorithms for
block-triangular Toeplitz matrices arising in linear inverse problems, arXiv:2407.13066.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.sparse import coo_matrix, csr_matrix

from pint_fem.all_at_once.grids import split_steps
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.inverse.readings import ReadingTable
from pint_fem.inverse.response_rows import StepTerm, terms_of_controls
from pint_fem.propagators.linear import LinearPropagator

__all__ = ["StepColumns", "ToeplitzMap", "reading_matrix", "step_map_bytes"]

_WORK = 2e7
"""Numbers in the transforms of the vectors that are multiplied at once."""


class StepColumns:
    """Controls with one value per step, divided among the ranks in time by steps or by columns.

    Parameters
    ----------
    layout
        The controls; at least one has a value per step.

    Attributes
    ----------
    size : int
        Number of entries of a step's controls, own ones of this rank in space.
    own : slice
        The columns of this rank in time.
    """

    def __init__(self, layout: ControlLayout):
        self.layout, self._comm = layout, layout.spacetime.time_comm
        # in the order of a step's vector of controls, in which responses are
        self._controls = [c for c in layout.evolution.parameters if c in layout.evolution.stepwise]
        sample = np.zeros((1, layout.size))
        self._ends = np.cumsum([layout.part(sample, c).shape[-1] for c in self._controls])
        self.size = int(self._ends[-1])
        self._bounds = split_steps(self.size, self._comm.size)
        self.own = slice(self._bounds[self._comm.rank], self._bounds[self._comm.rank + 1])

    @property
    def width(self) -> int:
        """Number of own columns."""
        return self.own.stop - self.own.start

    @property
    def largest(self) -> int:
        """The largest number of columns of a rank in time."""
        return int(np.diff(self._bounds).max())

    def steps(self, z: np.ndarray) -> np.ndarray:
        """The own steps' controls ``(k, own steps, size)`` of parameter vectors ``(k, layout.size)``."""
        if len(self._controls) == 1:
            return self.layout.part(z, self._controls[0])
        return np.concatenate([self.layout.part(z, control) for control in self._controls], axis=-1)

    def put_steps(self, z: np.ndarray, rows: np.ndarray) -> None:
        """Write the own steps' controls ``(k, own steps, size)`` to parameter vectors ``(k, layout.size)``."""
        for control, values in zip(self._controls, np.split(rows, self._ends[:-1], axis=-1), strict=True):
            self.layout.part(z, control)[...] = values

    def columns(self, rows: np.ndarray, lengths: Sequence[int], axis: int = 1) -> np.ndarray:
        """Own columns of the rows of all ranks in time (collective over time).

        Parameters
        ----------
        rows
            ``(..., size)``, with this rank's part along ``axis``.
        lengths
            Length of each rank's part along the axis.
        axis
            The axis that the ranks divide in ``rows``.
        """
        if self._comm.size == 1:
            return rows
        parts = [rows[..., a:b] for a, b in zip(self._bounds, self._bounds[1:], strict=False)]
        shape = (*rows.shape[:-1], self.width)
        shapes = [(*shape[:axis], length, *shape[axis + 1 :]) for length in lengths]
        return np.concatenate(_exchange(self._comm, parts, shapes), axis=axis)

    def rows(self, columns: np.ndarray) -> np.ndarray:
        """All columns of the own steps, ``(k, own steps, size)``, from own columns of all steps ``(k, nsteps, width)``
        (collective over time).
        """
        if self._comm.size == 1:
            return columns
        slab = self.layout.slab
        parts = [columns[:, a:b] for a, b in zip(slab.bounds, slab.bounds[1:], strict=False)]
        shapes = [(len(columns), slab.k, width) for width in np.diff(self._bounds)]
        return np.concatenate(_exchange(self._comm, parts, shapes), axis=-1)


def _exchange(comm, parts: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """One array to, and one of each shape from, every rank (collective)."""
    counts = [int(np.prod(shape)) for shape in shapes]
    received = np.empty(sum(counts))
    comm.Alltoallv([np.concatenate([np.ravel(part) for part in parts]), [p.size for p in parts]], [received, counts])
    ends = np.cumsum(counts)[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(received, ends), shapes, strict=True)]


def reading_matrix(table: ReadingTable, lags: int) -> csr_matrix:
    """The sparse matrix ``(m, lags * sensors)`` from what all sensors read at the points ``1 .. lags`` to readings."""
    rows, columns, values = [], [], []
    for point, share in ((table.point, table.theta), (table.point - 1, 1 - table.theta)):
        some = np.flatnonzero((point >= 1) & (share != 0))
        rows.append(some)
        columns.append((point[some] - 1) * table.sensors + table.sensor[some])
        values.append(share[some])
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return coo_matrix(entries, shape=(table.size, lags * table.sensors)).tocsr()


def step_map_bytes(
    propagator: LinearPropagator, table: ReadingTable, sensors: np.ndarray, layout: ControlLayout
) -> int:
    """Bytes of a :class:`ToeplitzMap` with these sensors on this rank: their responses, the exchange of these, and the
    transforms (collective over space).
    """
    columns, lags = StepColumns(layout), int(table.point.max(initial=0)) + 1
    terms = sum(in_steps for _, _, in_steps in terms_of_controls(propagator))
    frequencies = next_fast_len(2 * lags, real=True) // 2 + 1
    received = table.sensors * (lags + 2 * frequencies) * columns.width
    return 8 * terms * (len(sensors) * lags * columns.size + received)


class ToeplitzMap:
    """The part of a map from controls to readings for controls with one value per step.

    Parameters
    ----------
    terms
        Responses of the sensors of this rank in time, as many terms on all ranks.
    table
        All readings.
    sensors
        Numbers of this rank's sensors.
    layout
        The controls.

    Attributes
    ----------
    terms : sequence of StepTerm
        The own sensors' responses.
    columns : StepColumns
    sensors : list of ndarray
        Numbers of the sensors of each rank in time.
    lags : int
        Number of lags that readings need; no step from this number on has an effect.
    """

    def __init__(self, terms: Sequence[StepTerm], table: ReadingTable, sensors: np.ndarray, layout: ControlLayout):
        self.layout, self.table, self.terms = layout, table, terms
        self.columns = StepColumns(layout)
        comm = layout.spacetime.time_comm
        self.sensors = [sensors] if comm.size == 1 else comm.allgather(sensors)
        self.lags = max(1, int(table.point.max(initial=0)))
        self._length = next_fast_len(2 * self.lags - 1, real=True)
        self.readings = reading_matrix(table, self.lags)
        self._kernels = [self._transformed(term) for term in terms]

    def _transformed(self, term: StepTerm) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """Weights of the steps where they are not 1, the columns with a response, and the transforms ``(frequencies,
        sensors, columns)``.
        """
        lengths = [len(numbers) for numbers in self.sensors]
        received = self.columns.columns(term.responses[:, : self.lags], lengths, axis=0)
        order = np.argsort(np.concatenate(self.sensors), kind="stable")
        some = np.flatnonzero(received.any(axis=(0, 1)))
        kernel = np.empty((self._length // 2 + 1, self.table.sensors, len(some)), dtype=complex)
        for sensor, row in enumerate(order):
            responses = np.zeros((self.lags, len(some)))
            responses[: received.shape[1]] = received[row][:, some]
            kernel[:, sensor] = rfft(responses, n=self._length, axis=0)
        weights = term.weights[: self.lags]
        return (None if (weights == 1).all() else weights), some, kernel

    def _batches(self, k: int) -> list[slice]:
        """Divisions of ``k`` vectors, the same on all ranks in time, by the size of their transforms."""
        each = max(1, int(_WORK / (self._length * max(1, self.columns.largest))))
        return [slice(first, min(k, first + each)) for first in range(0, k, each)]

    def product(self, z: np.ndarray) -> np.ndarray:
        """This rank's share of the readings ``(k, m)`` of parameter vectors ``(k, layout.size)``: the sum over all
        ranks is the product (collective over time).
        """
        out, lengths = np.empty((len(z), self.table.size)), np.diff(self.layout.slab.bounds)
        for batch in self._batches(len(z)):
            Z = self.columns.columns(self.columns.steps(z[batch]), lengths)[:, : self.lags]
            total = np.zeros((self._length // 2 + 1, len(Z), self.table.sensors), dtype=complex)
            for weights, some, kernel in self._kernels:
                part = Z if len(some) == Z.shape[-1] else Z[..., some]
                if weights is not None:
                    part = part * weights[: part.shape[1], None]
                transforms = rfft(part, n=self._length, axis=1)
                total += transforms.transpose(1, 0, 2) @ kernel.transpose(0, 2, 1)
            values = irfft(total, n=self._length, axis=0)[: self.lags]
            out[batch] = (self.readings @ values.transpose(0, 2, 1).reshape(-1, len(Z))).T
        return out

    def transposed_product(self, y: np.ndarray, out: np.ndarray) -> None:
        """Write the derivatives by the own steps' controls of data vectors ``(k, m)`` to dual vectors ``(k,
        layout.size)`` (collective over time).
        """
        for batch in self._batches(len(y)):
            Y = self.readings.T @ y[batch].T
            Y = Y.reshape(self.lags, self.table.sensors, -1).transpose(0, 2, 1)
            transforms = rfft(Y, n=self._length, axis=0).conj()
            columns = np.zeros((Y.shape[1], self.layout.slab.nsteps, self.columns.width))
            for weights, some, kernel in self._kernels:
                g = irfft((transforms @ kernel).conj(), n=self._length, axis=0)[: self.lags]
                if weights is not None:
                    g *= weights[:, None, None]
                columns[:, : self.lags, some] += g.transpose(1, 0, 2)
            self.columns.put_steps(out[batch], self.columns.rows(columns))
