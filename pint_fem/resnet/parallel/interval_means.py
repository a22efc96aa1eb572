"""Means of what belongs to the layers over the intervals of coarse levels: a coarse layer has the mean of its layers.

A step of a coarse level stands for the ``s`` layers of its interval. With the mean of their parameters it is more
accurate than with the parameters of the first of them by about the spread of the parameters within the interval, for
the same cost. An interval can begin on one rank and end on another: the running sum is passed on, so that the order of
the additions, and with it every bit of the means, does not depend on the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI

from pint_fem.resnet.grid import Grid
from pint_fem.resnet.parallel.solvers import SweepSolvers
from pint_fem.resnet.parallel.transport import host_bytes

__all__ = ["IntervalMeans", "coarse_means"]

Tensor = torch.Tensor
_TAG = 43


class IntervalMeans:
    """Means over the intervals of one coarse level, of which each rank gets those that end with a layer of its own.

    Parameters
    ----------
    comm
        Ranks in the order of the sweep, that of the layers or the reverse.
    bounds
        Numbers of the ranks' first layers in that order, and ``N``.
    stride
        Layers ``s`` of an interval; the first interval begins with the first layer in that order.
    reverse
        Whether rows of arrays are in the order opposite to that of the sweep.
    """

    def __init__(self, comm: MPI.Comm, bounds: Sequence[int], stride: int, *, reverse: bool = False):
        self.comm, self.stride, self.reverse = comm, stride, reverse
        lo, hi = bounds[comm.rank], bounds[comm.rank + 1]
        self._k = hi - lo
        first = -(-lo // stride) * stride  # the first interval that begins here
        self._head = min(first, hi) - lo  # own layers of an interval that began on another rank
        self._ends_head = self._head > 0 and (lo + self._head) % stride == 0
        self._count = max(hi - first, 0) // stride
        self._tail = self._k - self._head - self._count * stride
        passes_on = hi % stride != 0 and comm.rank < comm.size - 1
        self._to = comm.rank + 1 if passes_on else None
        self._source = comm.rank - 1 if lo % stride else None

    def __call__(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """The means (collective), rows in the order of the sweep, from the own rows ``(k, ...)`` of some arrays."""
        arrays = [a.detach() for a in arrays]
        tail = [self._sum(a, self._k - self._tail, self._tail) for a in arrays] if self._tail else []
        sends = []
        if tail and self._to is not None:  # begins here: the next rank need not wait for the one before
            sends = self._send(tail)
        head = self._receive(arrays) if self._source is not None else []
        if head:
            head = [self._add(total, a) for total, a in zip(head, arrays, strict=True)]
            if not self._ends_head and self._to is not None and not tail:
                sends = self._send(head)
        out = []
        for i, a in enumerate(arrays):
            means = [self._whole(a)] if self._count else []
            if self._ends_head:
                means.insert(0, head[i][None])
            out.append((torch.cat(means) if means else a[:0]) / self.stride)
        for request, _ in sends:
            request.Wait()
        return out

    def _row(self, a: Tensor, place: int) -> Tensor:
        """A row by its place in the sweep."""
        return a[self._k - 1 - place] if self.reverse else a[place]

    def _sum(self, a: Tensor, first: int, count: int) -> Tensor:
        """Sum of some rows in the order of the sweep."""
        total = self._row(a, first).clone()
        for place in range(first + 1, first + count):
            total += self._row(a, place)
        return total

    def _add(self, total: Tensor, a: Tensor) -> Tensor:
        """A running sum with the rows of the interval that began on another rank."""
        for place in range(self._head):
            total += self._row(a, place)
        return total

    def _whole(self, a: Tensor) -> Tensor:
        """Sums over the intervals that are on this rank alone, ``(count, ...)``."""
        rows = self._count * self.stride
        start = self._tail if self.reverse else self._head
        blocks = a[start : start + rows].reshape(self._count, self.stride, *a.shape[1:])
        order = range(self.stride - 1, -1, -1) if self.reverse else range(self.stride)
        total = blocks[:, order[0]].clone()
        for j in order[1:]:
            total += blocks[:, j]
        return total.flip(0) if self.reverse else total

    def _send(self, sums: Sequence[Tensor]) -> list[tuple[MPI.Request, object]]:
        out = []
        for total in sums:
            data = host_bytes(total).copy()
            out.append((self.comm.Isend(data, dest=self._to, tag=_TAG), data))
        return out

    def _receive(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for a in arrays:
            host = torch.empty(a.shape[1:], dtype=a.dtype)
            self.comm.Recv(host_bytes(host), source=self._source, tag=_TAG)
            out.append(host.to(a.device))
        return out


def coarse_means(solvers: SweepSolvers, grid: Grid) -> dict[str, list[IntervalMeans]]:
    """Means for each level but the finest, of sweeps ``"forward"`` and ``"backward"``."""
    N, bounds = solvers.nlayers, solvers.bounds
    back = [N - b for b in reversed(bounds)]
    return {
        "forward": [IntervalMeans(grid.layer_comm, bounds, s) for s in solvers.strides[1:]],
        "backward": [IntervalMeans(grid.reversed_layer_comm, back, s, reverse=True) for s in solvers.strides[1:]],
    }
