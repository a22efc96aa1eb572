"""The process grid data x layers: batches are distributed over ``data_comm``, layers over ``layer_comm``."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from mpi4py import MPI

from pint_fem.communicators import ProcessGrid
from pint_fem.errors import InputError

__all__ = ["Grid"]


class Grid(ProcessGrid):
    """A data x layers grid of processes; ranks that share a batch are neighbours in the numbering.

    Parameters
    ----------
    grid
        ``"2x4"`` (2 groups with a batch each x 4 ranks that share the layers), ``(2, 4)``, or ``None`` for all ranks in
        the layers.
    comm
        The communicator to split; default the world. All grids of the same shape on one communicator share what it is
        split into; ``with Grid("2x4") as grid:`` or :meth:`free` free it.
    data, layers
        In place of ``grid``: the number of groups and of ranks that share the layers, ``Grid(data=2, layers=4)``. From
        one of them the other follows.

    Attributes
    ----------
    data_size, layer_size : int
        Number of groups, and of ranks that share the layers.
    layer_comm, reversed_layer_comm, data_comm : mpi4py communicators
        Of the ranks that share the layers, from the first layers to the last and the other way round; of the ranks with
        the same layers in all groups.

    Raises
    ------
    InputError
        On every rank, if the grid does not match the number of ranks, is given in two ways or differs between ranks.
    """

    _released = dict.fromkeys(("layer_comm", "data_comm", "reversed_layer_comm"), MPI.COMM_NULL)

    def __init__(
        self,
        grid: str | tuple[int, int] | None = None,
        comm: MPI.Comm = MPI.COMM_WORLD,
        *,
        data: int | None = None,
        layers: int | None = None,
    ):
        super().__init__(comm, grid, {"data": data, "layers": layers})
        self.data_size, self.layer_size = self.shape
        groups = self._groups(comm, self.layer_size)
        self.layer_comm, self.data_comm = groups.inner, groups.outer
        self.reversed_layer_comm = groups.reversed_inner

    def __deepcopy__(self, memo: dict) -> Grid:
        """Copies of what is on a grid are on the same one."""
        return self

    def __reduce__(self) -> tuple:
        """A grid of the same shape on all ranks of the run that reads it.

        Raises
        ------
        InputError
            If the grid has a communicator of its own, which is not in another run.
        """
        if MPI.Comm.Compare(self.comm, MPI.COMM_WORLD) not in (MPI.IDENT, MPI.CONGRUENT):
            raise InputError("a grid on some of the ranks cannot be pickled: save the parameters (full_state_dict)")
        return type(self), (tuple(self.shape),)

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first layers, and with them the opening layer."""
        return self.layer_comm.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last layers, and with them the classification layer."""
        return self.layer_comm.rank == self.layer_size - 1

    def mean_over_data(self, values: np.ndarray) -> None:
        """Replace an array by its mean over ``data_comm``, bitwise identical on all of its ranks (collective).

        Every rank sums up one part in rank order and sends it to the others: a ring's traffic, in a fixed order.

        Parameters
        ----------
        values
            Array of float64 or float32, overwritten.
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
