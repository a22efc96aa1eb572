"""The process grid data x layers: batches are shared out over ``data_comm``, layers over ``layer_comm``."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from mpi4py import MPI

from pint_fem.collective import require_same
from pint_fem.communicators import Lease
from pint_fem.errors import InputError
from pint_fem.spacetime import parse_grid

__all__ = ["Grid"]


class Grid:
    """``P = P_data * P_layers`` ranks; those that share a batch are neighbours in the numbering.

    Parameters
    ----------
    grid
        ``"2x4"`` (2 groups with a batch each x 4 ranks that share the layers), ``(2, 4)``, or ``None`` for all ranks in
        the layers.
    comm
        The communicator to split; default the world. All grids of the same shape on one communicator share what it is
        split into (see :mod:`pint_fem.communicators`); ``with Grid("2x4") as grid:`` or :meth:`free` give it back.

    Attributes
    ----------
    layer_comm, reversed_layer_comm, data_comm : mpi4py communicators

    Raises
    ------
    InputError
        On every rank, if the grid does not match the ranks.
    """

    def __init__(self, grid: str | tuple[int, int] | None = None, comm=MPI.COMM_WORLD):
        text = "auto" if grid is None else grid if isinstance(grid, str) else "x".join(map(str, grid))
        require_same(comm, grid=text)
        try:
            self.data_size, self.layer_size = parse_grid(text, comm.size)
        except InputError as error:
            raise InputError(str(error).replace("SPACExTIME", "DATAxLAYERS")) from None
        self.comm = comm
        self._lease = Lease(comm, self.layer_size)
        groups = self._lease.groups
        self.layer_comm, self.data_comm = groups.inner, groups.outer
        self.reversed_layer_comm = groups.reversed_inner

    def free(self) -> None:
        """Give the communicators back (collective over ``comm``): they are freed if no other grid of this shape on
        ``comm`` uses them. Call it when no network on them is used any more.
        """
        self._lease.free()
        self.layer_comm = self.data_comm = self.reversed_layer_comm = MPI.COMM_NULL

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:  # a rank that fails alone must not wait for the others here
            self.free()

    @property
    def is_root(self) -> bool:
        """Whether this rank speaks for all."""
        return self.comm.rank == 0

    @property
    def is_first(self) -> bool:
        """Whether it has the first layers, and with them the opening one."""
        return self.layer_comm.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the last layers, and with them the classification layer."""
        return self.layer_comm.rank == self.layer_size - 1

    def mean_over_data(self, values: np.ndarray) -> None:
        """Replace an array by its mean over ``data_comm``, summed in rank order: the same bits everywhere.

        Every rank adds up a part and hands it to the others: as much traffic as a ring, in a fixed order.
        """
        comm, size = self.data_comm, self.data_comm.size
        if size == 1:
            return
        flat = np.ascontiguousarray(values).reshape(-1)
        bounds = [(len(flat) * r) // size for r in range(size + 1)]
        counts = [b - a for a, b in pairwise(bounds)]
        mine = counts[comm.rank]
        kind = MPI.DOUBLE if flat.dtype == np.float64 else MPI.FLOAT
        parts = np.empty((size, mine), flat.dtype)
        comm.Alltoallv([flat, counts, bounds[:-1], kind], [parts, [mine] * size, [mine * r for r in range(size)], kind])
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        total /= size
        comm.Allgatherv(total, [flat, counts, bounds[:-1], kind])
        values[...] = flat.reshape(values.shape)
