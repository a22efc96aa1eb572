"""Norms over time, bitwise identical for every number of time ranks.

Squared norms of the points are gathered over the time communicator in point order and added in that order on every
rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.arrays import Array, is_tensor, norms_of_rows
from pint_fem.all_at_once.grids import Bounds

__all__ = ["PointNorms", "euclidean", "gather_in_order", "norm_over_time", "sum_in_rank_order"]

PointNorms = Callable[[Array], Array]


def euclidean(block: Array) -> Array:
    """Squared Euclidean norm of each state of a block, shape ``(k,)``, in float64; of a tensor on its device."""
    if is_tensor(block):
        return norms_of_rows(block) ** 2
    rows = np.asarray(block, dtype=float).reshape(len(block), math.prod(block.shape[1:]))
    return np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0]  # one dot product per state, whatever the block


def norm_over_time(squares: np.ndarray, kind: int | str) -> np.ndarray:
    """The 1, 2 or ``"inf"`` norm over time, ``(c,)``, of the points' squared norms ``(points, c)``."""
    if not len(squares):
        return np.zeros(squares.shape[1:])
    if kind == 2:
        return np.sqrt(squares.sum(axis=0))
    norms = np.sqrt(squares)
    return norms.sum(axis=0) if kind == 1 else norms.max(axis=0)


def gather_in_order(values: np.ndarray, comm: MPI.Comm, bounds: Bounds | None = None) -> np.ndarray:
    """Concatenate the ranks' ``(k_r, c)`` or ``(k_r,)`` arrays in rank order, on every rank.

    For a few numbers per point (norms, misfits), never for states.

    Parameters
    ----------
    values
        Those of this rank.
    comm
        Time communicator.
    bounds
        :class:`~pint_fem.all_at_once.grids.Bounds` with the ``k_r`` of all ranks; default: the ranks exchange them.
    """
    values = np.ascontiguousarray(values, dtype=float)
    if comm.size == 1:
        return values
    width = int(np.prod(values.shape[1:], dtype=int))
    if bounds is None:
        counts = np.array(comm.allgather(len(values))) * width
        places = np.concatenate([[0], np.cumsum(counts)[:-1]])
    else:
        counts, places = bounds.layout(width)
    out = np.empty(((places[-1] + counts[-1]) // width, *values.shape[1:]))
    comm.Allgatherv(values, [out, counts, places, MPI.DOUBLE])
    return out


def sum_in_rank_order(values: np.ndarray, comm: MPI.Comm) -> np.ndarray:
    """Sum of a small array over the ranks of a communicator, in their order (collective): bitwise identical on every
    rank and in each run, and an entry's does not depend on the length of the array.
    """
    if comm.size == 1 or not values.size:
        return values
    parts = np.empty((comm.size, *values.shape))
    comm.Allgather(np.ascontiguousarray(values, dtype=float), parts)
    return np.add.reduce(parts, axis=0)
