"""Rows of arrays that are distributed by layers: fetch those of other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["RowExchange"]


class RowExchange:
    """Rows by their numbers, from whoever owns them: a plan made once, used in every sweep.

    Parameters
    ----------
    comm
        Over which rows are distributed.
    bounds
        ``comm.size + 1`` bounds: rank ``r`` owns the rows ``bounds[r] .. bounds[r+1] - 1``.
    wanted
        For every rank the numbers of the rows it wants (all ranks know them all).
    """

    def __init__(self, comm, bounds: Sequence[int], wanted: Sequence[Sequence[int]]):
        self.comm, self.lo = comm, bounds[comm.rank]
        self.count = len(wanted[comm.rank])
        counts = [len(rows) for rows in wanted]
        rows = np.fromiter((n for w in wanted for n in w), int, sum(counts))
        who = np.repeat(np.arange(comm.size), counts)  # wants it
        owner = np.searchsorted(bounds, rows, side="right") - 1
        mine, theirs = who == comm.rank, owner == comm.rank
        places, rows = rows[mine], rows - self.lo
        owners = owner[mine]
        self.own = [(i, int(n) - self.lo) for i, n in enumerate(places) if owners[i] == comm.rank]
        others = np.unique(owners[owners != comm.rank])
        self.receive = {int(r): np.flatnonzero(owners == r).tolist() for r in others}
        asked = who[theirs & ~mine]
        self.send = {int(r): rows[theirs & (who == r)].tolist() for r in np.unique(asked)}

    @property
    def is_local(self) -> bool:
        """Whether this rank neither sends nor receives."""
        return not self.send and not self.receive

    def __call__(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The wanted rows of some arrays with the same distribution; a rank's rows go in one message."""
        flat = [a.detach().reshape(len(a), int(np.prod(a.shape[1:]))) for a in arrays]
        widths = [f.shape[1] for f in flat]
        sends = []
        for r, rows in sorted(self.send.items()):
            message = torch.cat([f[rows] for f in flat], dim=1).contiguous().numpy()
            sends.append((self.comm.Isend(message, dest=r, tag=31), message))
        out = [a.new_empty((self.count, *a.shape[1:])) for a in arrays]
        for place, row in self.own:
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
