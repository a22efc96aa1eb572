"""Disjoint parts of parameter vectors: static controls, which all ranks in time have, are divided among these."""

from __future__ import annotations

import numpy as np

from pint_fem.all_at_once.grids import split_steps
from pint_fem.evolution.control_layout import ControlLayout

__all__ = ["Partition"]


class Partition:
    """The entries of a parameter vector that a rank works on: a part of its static ones, and all others.

    Parameters
    ----------
    layout
        The controls.

    Attributes
    ----------
    own : ndarray of int
        Their numbers in this rank's vector ``(layout.size,)``.
    static : slice
        Own static entries.
    """

    def __init__(self, layout: ControlLayout):
        self.layout, self._comm = layout, layout.spacetime.time_comm
        self._bounds = split_steps(layout.static_size, self._comm.size)
        self.static = slice(self._bounds[self._comm.rank], self._bounds[self._comm.rank + 1])
        stepwise = np.arange(layout.static_size, layout.size)
        self.own = np.concatenate([np.arange(layout.static_size)[self.static], stepwise])

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Vectors ``(k, layout.size)`` from own entries ``(k, own)`` of all ranks in time (collective over time)."""
        count = self.static.stop - self.static.start
        out = np.empty((len(values), self.layout.size))
        out[:, self.layout.static_size :] = values[:, count:]
        if self._comm.size == 1:
            out[:, : self.layout.static_size] = values[:, :count]
            return out
        sizes = np.diff(self._bounds)
        received = np.empty(len(values) * self.layout.static_size)
        self._comm.Allgatherv(np.ascontiguousarray(values[:, :count]), [received, len(values) * sizes])
        ends = len(values) * np.array(self._bounds)
        for rank, (a, b) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
            out[:, a:b] = received[ends[rank] : ends[rank + 1]].reshape(len(values), b - a)
        return out

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """Own static entries of the rows of all ranks in time, ``(all rows, own)``, from this rank's rows ``(rows,
        static_size)``: rows in the order of ranks (collective over time).
        """
        if self._comm.size == 1:
            return rows
        counts = np.array(self._comm.allgather(len(rows)))
        sizes = np.diff(self._bounds)
        parts = zip(self._bounds, self._bounds[1:], strict=False)
        sent = np.concatenate([np.ravel(rows[:, a:b]) for a, b in parts])
        width = self.static.stop - self.static.start
        received = np.empty(int(counts.sum()) * width)
        self._comm.Alltoallv([sent, len(rows) * sizes], [received, counts * width])
        return received.reshape(int(counts.sum()), width)
