r"""Rates of change :math:`(D z)_n = (z_{n+1} - z_n) / \Delta t` of values per step on the slabs of several time ranks.

A rank has the rates between its own steps and that between its last step and the first one of the next rank, which
sends this row. The transpose :math:`(D^T w)_n = (w_{n-1} - w_n) / \Delta t` takes one row from the rank before. Each
number is the difference of the same two numbers for every number of time ranks.
"""

from __future__ import annotations

import numpy as np

from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["StepDifferences"]

_FROM_RIGHT, _FROM_LEFT = 3, 4  # tags of messages


class StepDifferences:
    """Difference quotients in time of the rows of an array, and their transposes.

    Parameters
    ----------
    spacetime, slab
        Process grid and own steps, at least one on each rank.
    dt
        Length of a step.
    """

    def __init__(self, spacetime: SpaceTime, slab: Slab, dt: float):
        self._comm, self._slab, self._dt = spacetime.time_comm, slab, dt

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the rates after the own steps, ``(k, nz)``, of own values ``(k, nz)``; on the last rank ``(k - 1,
        nz)`` (collective over time).
        """
        after = self._neighbour(rows[0], -1, _FROM_RIGHT)
        rows = rows if after is None else np.concatenate([rows, after[None]])
        return np.diff(rows, axis=0) / self._dt

    def transposed(self, rates: np.ndarray) -> np.ndarray:
        """Return the products of the transpose, ``(k, nz)``, with dual vectors of the shape that rates have (collective
        over time).
        """
        edge = np.zeros((1, rates.shape[1]))
        last = rates[-1] if len(rates) else edge[0]  # only the last rank may have none, and has no next one
        before = self._neighbour(last, 1, _FROM_LEFT)
        padded = [edge if before is None else before[None], rates, *([edge] if self._slab.is_last else [])]
        return -np.diff(np.concatenate(padded), axis=0) / self._dt

    def _neighbour(self, row: np.ndarray, way: int, tag: int) -> np.ndarray | None:
        """Send a row to the next rank in a direction, and return that of the rank on the other side, if there is
        one.
        """
        comm, request, received = self._comm, None, None
        if 0 <= comm.rank + way < comm.size:
            request = comm.Isend(np.ascontiguousarray(row), dest=comm.rank + way, tag=tag)
        if 0 <= comm.rank - way < comm.size:
            received = np.empty_like(row)
            comm.Recv(received, source=comm.rank - way, tag=tag)
        if request is not None:
            request.Wait()
        return received
