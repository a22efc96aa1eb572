r"""The covariance :math:`G = F \Gamma F^T` of readings by the prior, for controls with one value per step.

It is the sum of what controls with one value per step contribute
(:mod:`pint_fem.inverse.per_step.covered_responses`) and of :math:`Q\, (C\, \Gamma_0 C^T)\, Q^T` of static ones, in
reduced rows (:mod:`pint_fem.inverse.reduction`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pint_fem.all_at_once.grids import split_steps
from pint_fem.inverse.laws.priors import Prior
from pint_fem.inverse.per_step.covered_responses import covered_responses

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["ReadingCovariance"]


class ReadingCovariance:
    """The covariance of the readings, as a matrix and by products (collective).

    Parameters
    ----------
    F
        The map, with controls that have one value per step.
    prior
        The controls' prior, the same in all steps and independent between them.
    """

    def __init__(self, F: ParameterToObservable, prior: Prior):
        self._F, self._spacetime, self._m = F, F.spacetime, F.table.size
        self._with_static = self._spacetime.space_comm.allreduce(F.layout.static_size) > 0
        static = F.reduced.C if self._with_static else np.zeros((0, F.layout.static_size))
        self._steps, covered = covered_responses(F, prior, static)
        if self._with_static:
            self._covered = F.partition.columns(covered)  # own static columns of all reduced rows
            self._gram = self._spacetime.sum_over_grid(F.partition.columns(static) @ self._covered.T)

    def dense(self) -> np.ndarray:
        """The matrix ``(m, m)``, on every rank (collective over time)."""
        G = np.zeros((self._m, self._m))
        if self._steps.invariant:
            self._steps.add_diagonal_sums(G)
        else:
            self._steps.add_steps(G)
        G = self._spacetime.sum_over_time(G)
        if self._with_static:
            reduced = self._F.reduced
            G += reduced.expand(reduced.expand(self._gram, self._m).T, self._m)
        return 0.5 * (G + G.T)

    def product(self, y: np.ndarray) -> np.ndarray:
        """Products with data vectors ``(k, m)``, which all ranks divide among them (collective)."""
        comm = self._spacetime.comm
        bounds = split_steps(len(y), comm.size)
        own = y[bounds[comm.rank] : bounds[comm.rank + 1]]
        out = self._steps.product(own)
        if self._with_static:
            reduced = self._F.reduced
            out += reduced.expand(reduced.contract(own) @ self._gram, self._m)
        if comm.size == 1:
            return out
        everything = np.empty(y.shape)
        counts = np.diff(bounds) * self._m
        comm.Allgatherv(out, [everything, counts])
        return everything

    def squares(self, B: np.ndarray) -> np.ndarray:
        """The diagonal of :math:`\\Gamma F^T B F \\Gamma` for a symmetric matrix ``(m, m)``, ``(layout.size,)``
        (collective over time).
        """
        columns, partition = self._F.steps.columns, self._F.partition
        out = np.zeros((1, self._F.layout.size))
        columns.put_steps(out, columns.rows(self._steps.squares(B)[None]))
        if not self._with_static:
            return out[0]
        own = out[:, partition.own]
        rows = self._F.reduced.expand(np.ascontiguousarray(self._covered.T), self._m)
        own[0, : len(rows)] = np.einsum("ij,ij->i", rows @ B, rows)
        return partition.spread(own)[0]
