"""Exchange of rows of arrays that are distributed over ranks by layers: each rank gets the rows that it needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mpi4py import MPI

__all__ = ["RowExchange"]


class RowExchange:
    """A communication plan for fixed sets of rows, made once and used in every sweep.

    Parameters
    ----------
    comm
        Communicator over which rows are distributed.
    bounds
        ``comm.size + 1`` bounds: rank ``r`` owns the rows ``bounds[r] .. bounds[r+1] - 1``.
    needed
        Numbers of the rows that each rank needs, the same on all ranks.

    Attributes
    ----------
    numbers : list of int
        Numbers of the rows that this rank gets.
    send, receive : dict
        Local numbers of the rows to send to a rank, and their places in the result by the rank that they come from.
    """

    def __init__(self, comm: MPI.Comm, bounds: Sequence[int], needed: Sequence[Sequence[int]]):
        self.comm = comm
        lo, counts = bounds[comm.rank], [len(rows) for rows in needed]
        self.numbers = list(needed[comm.rank])
        rows = np.fromiter((n for numbers in needed for n in numbers), int, sum(counts))
        receiver = np.repeat(np.arange(comm.size), counts)
        owner = np.searchsorted(bounds, rows, side="right") - 1
        mine = receiver == comm.rank
        owners, self._count = owner[mine], counts[comm.rank]
        self._own = [(i, int(n) - lo) for i, n in enumerate(rows[mine]) if owners[i] == comm.rank]
        sent = (owner == comm.rank) & ~mine
        self.receive = {int(r): np.flatnonzero(owners == r).tolist() for r in np.unique(owners) if r != comm.rank}
        self.send = {int(r): (rows[sent & (receiver == r)] - lo).tolist() for r in np.unique(receiver[sent])}

    def __call__(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The needed rows of some arrays, of which every rank passes its own rows (collective)."""
        flat = [a.detach().reshape(len(a), int(np.prod(a.shape[1:]))) for a in arrays]
        widths = [f.shape[1] for f in flat]
        sends = []
        for r, rows in sorted(self.send.items()):  # one message for all arrays
            message = torch.cat([f[rows] for f in flat], dim=1).contiguous().numpy()
            sends.append((self.comm.Isend(message, dest=r, tag=31), message))
        out = [a.new_empty((self._count, *a.shape[1:])) for a in arrays]
        for place, row in self._own:
            for o, a in zip(out, arrays, strict=True):
                o[place] = a.detach()[row]
        for r, places in sorted(self.receive.items()):
            message = arrays[0].new_empty((len(places), sum(widths)))
            self.comm.Recv(message.numpy(), source=r, tag=31)
            for o, part in zip(out, message.split(widths, dim=1), strict=True):
                o[places] = part.reshape(len(places), *o.shape[1:])
        for request, _ in sends:
            request.Wait()
        return out
