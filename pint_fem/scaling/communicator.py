"""A communicator with mpi4py's methods on virtual ranks.

Small numbers (norms, agreements) really travel, so that the solver decides as it would. States are a stand-in of one
number; ``row_bytes`` says how many bytes a number of a message with some tag (a level) stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
from mpi4py import MPI

from pint_fem.scaling.world import DeadlockError, World

__all__ = ["OBJECT_BYTES", "VirtualComm", "communicators"]

OBJECT_BYTES = 64
"""Charged for a Python object in a collective."""

_OPERATIONS = [(MPI.SUM, np.add), (MPI.MIN, np.minimum), (MPI.MAX, np.maximum), (MPI.LAND, np.logical_and)]


class _Context:
    """What the members of a communicator share."""

    def __init__(self, world: World, members: Sequence[int]):
        self.world, self.members = world, list(members)
        self.number, world.contexts = world.contexts, world.contexts + 1
        self.size = len(self.members)
        self.slots: dict[int, _Slot] = {}


class _Slot:
    """One collective operation: what the ranks brought, and what they leave with."""

    def __init__(self, size: int, kind: str):
        self.values, self.kind, self.present, self.done = [None] * size, kind, 0, None
        self.clocks, self.last = [0.0] * size, 0.0


class _Request:
    """Of a send that has left, or a receive."""

    def __init__(self, comm: VirtualComm, key: tuple | None = None, into: np.ndarray | None = None):
        self._comm, self._key, self._into = comm, key, into

    def Wait(self) -> bool:
        """See mpi4py."""
        if self._key is not None:
            self._into[...] = self._comm.world.take(self._key)
            self._key = None
        return True

    wait = Wait

    def Test(self) -> bool:
        """Whether it is there; if not, others may run."""
        if self._key is None or self._comm.world.has_mail(self._key):
            return self.Wait()
        self._comm.world.wake(self._comm.world.current)
        self._comm.world.sleep("its turn")
        return False


class _Group:
    """A communicator's group: who is who in another one."""

    def __init__(self, members: Sequence[int]):
        self.members = members

    def Translate_ranks(self, ranks, other: _Group) -> list[int]:
        """See mpi4py."""
        return [other.members.index(self.members[r]) for r in ranks]


class VirtualComm:
    """One rank's end.

    Parameters
    ----------
    context
        Shared by the members.
    rank
        Own rank in it.
    row_bytes
        Bytes that a number of a state stands for, by the messages' tag, the last one going on; default: a number is a
        number.
    """

    def __init__(self, context: _Context, rank: int, row_bytes: Sequence[float] | None = None):
        self._context, self.rank, self.size = context, rank, context.size
        self.world = context.world
        self._row_bytes = row_bytes
        self._calls = count()

    def scaled(self, row_bytes: Sequence[float] | None) -> VirtualComm:
        """The same communicator for states of another size."""
        other = VirtualComm(self._context, self.rank, row_bytes)
        other._calls = self._calls
        return other

    @property
    def group(self) -> _Group:
        """See mpi4py."""
        return _Group(self._context.members)

    Get_rank = lambda self: self.rank
    Get_size = lambda self: self.size

    def true_bytes(self, numbers: int, tag: int) -> float:
        """What some numbers of a message stand for."""
        return numbers * (8 if self._row_bytes is None else self._row_bytes[min(tag, len(self._row_bytes) - 1)])

    def _nbytes(self, array: np.ndarray, tag: int) -> float:
        return array.nbytes if self._row_bytes is None else self.true_bytes(array.size, tag)

    # -- point to point --------------------------------------------------------------------------------------------
    def _key(self, source: int, dest: int, tag: int) -> tuple:
        # of ranks of the world, as the scheduler names them
        members = self._context.members
        return self._context.number, members[source], members[dest], tag

    def Isend(self, buf, dest: int, tag: int = 0) -> _Request:
        """See mpi4py."""
        array = _array(buf)
        self.world.post(self._key(self.rank, dest, tag), array.copy(), self._nbytes(array, tag))
        return _Request(self)

    def Irecv(self, buf, source: int, tag: int = 0) -> _Request:
        """See mpi4py; a source is wanted."""
        return _Request(self, self._key(source, self.rank, tag), _array(buf))

    def Send(self, buf, dest: int, tag: int = 0) -> None:
        """See mpi4py."""
        self.Isend(buf, dest, tag)

    def Recv(self, buf, source: int, tag: int = 0) -> None:
        """See mpi4py; a source is wanted."""
        self.Irecv(buf, source, tag).Wait()

    def Sendrecv(self, sendbuf, dest: int, sendtag: int = 0, recvbuf=None, source: int = 0, recvtag: int = 0) -> None:
        """See mpi4py."""
        self.Isend(sendbuf, dest, sendtag)
        self.Recv(recvbuf, source, recvtag)

    # -- collectives -----------------------------------------------------------------------------------------------
    def _together(
        self, kind: str, value, nbytes: float | None, finish: Callable[[list], object], root: int | None = None
    ):
        """Wait for all; ``finish`` makes one result of all values.

        ``root``: of operations in which the others only send (their clocks go on) or only receive.
        """
        context, world, me = self._context, self.world, self.rank
        number = next(self._calls)
        slot = context.slots.setdefault(number, _Slot(self.size, kind))
        if slot.kind != kind:
            raise DeadlockError(
                f"deadlock: rank {context.members[me]} calls {kind} where others of its communicator call {slot.kind}"
            )
        slot.values[me], slot.clocks[me] = value, world.clocks[world.current]
        slot.present += 1
        if slot.present < self.size:
            missing = lambda: [context.members[r] for r in range(self.size) if slot.values[r] is None]
            world.sleep(lambda: f"{kind}, where {slot.present} of {self.size} have come ({_short(missing())} have not)")
        else:
            slot.done = finish([v[0] for v in slot.values])
            slot.last = max(slot.clocks)
            del context.slots[number]
            for r, member in enumerate(context.members):
                if r != me:
                    world.wake(member)
        collective = world.network.alltoall if kind == "alltoall" else world.network.collective
        cost = 0.0 if nbytes is None else collective(self.size, nbytes)
        if kind in ("bcast", "scatter"):
            world.until(slot.clocks[root] + cost)
        elif kind not in ("reduce", "gather") or me == root:
            world.until(slot.last + cost)
        return slot.done

    def meet(self) -> None:
        """Wait for the last one, at no cost: where the model looks at the clocks."""
        self._together("meeting", (None,), None, lambda values: None)

    def Barrier(self) -> None:
        """See mpi4py."""
        self._together("barrier", (None,), 0, lambda values: None)

    barrier = Barrier

    def allgather(self, value) -> list:
        """See mpi4py; all ranks get the same list."""
        return self._together("allgather", (value,), OBJECT_BYTES * self.size, list)

    def gather(self, value, root: int = 0) -> list | None:
        """See mpi4py."""
        out = self._together("gather", (value,), OBJECT_BYTES * self.size, list, root)
        return out if self.rank == root else None

    def bcast(self, value=None, root: int = 0):
        """See mpi4py; all ranks get the same object."""
        return self._together("bcast", (value,), OBJECT_BYTES, lambda values: values[root], root)

    def allreduce(self, value, op=MPI.SUM):
        """See mpi4py."""
        return self._together("allreduce", (value,), OBJECT_BYTES, lambda values: _reduce(values, op))

    def exscan(self, value, op=MPI.SUM):
        """See mpi4py."""
        sums = self._together("exscan", (value,), OBJECT_BYTES, lambda values: np.cumsum(values).tolist())
        return sums[self.rank - 1] if self.rank else None

    def Allreduce(self, sendbuf, recvbuf, op=MPI.SUM) -> None:
        """See mpi4py."""
        out = _array(recvbuf)
        mine = out if sendbuf is MPI.IN_PLACE else _array(sendbuf)
        out[...] = self._together("allreduce", (mine.copy(),), mine.nbytes, lambda values: _reduce(values, op))

    def Reduce(self, sendbuf, recvbuf, op=MPI.SUM, root: int = 0) -> None:
        """See mpi4py."""
        mine = _array(sendbuf)
        nbytes = self._nbytes(mine, 0)
        total = self._together("reduce", (mine.copy(),), nbytes, lambda values: _reduce(values, op), root)
        if self.rank == root:
            _array(recvbuf)[...] = total

    def Bcast(self, buf, root: int = 0) -> None:
        """See mpi4py."""
        array = _array(buf)
        array[...] = self._together("bcast", (array.copy(),), self._nbytes(array, 0), lambda v: v[root], root)

    def Allgather(self, sendbuf, recvbuf) -> None:
        """See mpi4py."""
        mine, out = _array(sendbuf), _array(recvbuf)
        all_ = self._together("allgather", (mine.ravel().copy(),), mine.nbytes * self.size, np.concatenate)
        out[...] = all_.reshape(out.shape)

    def Allgatherv(self, sendbuf, recvbuf) -> None:
        """See mpi4py; parts in rank order, without gaps."""
        mine, out = _array(sendbuf), _array(recvbuf)
        all_ = self._together("allgather", (mine.ravel().copy(),), out.nbytes, np.concatenate)
        out[...] = all_.reshape(out.shape)

    def Gatherv(self, sendbuf, recvbuf, root: int = 0) -> None:
        """See mpi4py; parts in rank order, without gaps."""
        mine = _array(sendbuf)
        last = len(self._row_bytes or [0]) - 1
        nbytes = self._nbytes(mine if recvbuf is None else _array(recvbuf), last)
        all_ = self._together("gather", (mine.ravel().copy(),), nbytes, np.concatenate, root)
        if self.rank == root:
            out = _array(recvbuf)
            out[...] = all_.reshape(out.shape)

    def Scatterv(self, sendbuf, recvbuf, root: int = 0) -> None:
        """See mpi4py; parts in rank order, without gaps."""
        out, last = _array(recvbuf), len(self._row_bytes or [0]) - 1
        whole = None if sendbuf is None else (_array(sendbuf).ravel().copy(), sendbuf[1], sendbuf[2])
        nbytes = self._nbytes(out if whole is None else whole[0], last)
        data, counts, places = self._together("scatter", (whole,), nbytes, lambda values: values[root], root)
        start = places[self.rank]
        out[...] = data[start : start + counts[self.rank]].reshape(out.shape)

    def Alltoallv(self, sendbuf, recvbuf) -> None:
        """See mpi4py; ``[array, counts]`` or ``[array, (counts, displacements)]``, in rank order without gaps."""
        mine, out = _array(sendbuf).ravel(), _array(recvbuf)
        counts = sendbuf[1][0] if isinstance(sendbuf[1], tuple) else sendbuf[1]
        parts = np.split(mine.copy(), np.cumsum(counts)[:-1])
        all_ = self._together("alltoall", (parts,), self._nbytes(mine, 0), list)
        out[...] = np.concatenate([p[self.rank] for p in all_]).reshape(out.shape)

    def alltoall_bytes(self, nbytes: float) -> None:
        """An ``Alltoallv`` that sends so many bytes to other ranks; nothing travels."""
        self.world.counts["alltoall", 0] += 1
        self.world.counts["alltoall bytes", 0] += nbytes
        self._together("alltoall", (None,), nbytes, lambda values: None)

    def Split(self, color: int = 0, key: int = 0) -> VirtualComm:
        """See mpi4py."""

        def finish(values):
            places: dict[int, list] = {}
            for rank, (c, k) in enumerate(values):
                places.setdefault(c, []).append((k, rank))
            made = [None] * self.size
            for c in sorted(places):
                order = [rank for _, rank in sorted(places[c])]
                context = _Context(self.world, [self._context.members[r] for r in order])
                for place, rank in enumerate(order):
                    made[rank] = (context, place)
            return made

        context, place = self._together("split", ((color, key),), 2 * OBJECT_BYTES, finish)[self.rank]
        return VirtualComm(context, place, self._row_bytes)

    def Free(self) -> None:
        """Nothing to free."""


def communicators(world: World, row_bytes: Sequence[float] | None = None) -> list[VirtualComm]:
    """The communicator of all ranks, one end for each."""
    context = _Context(world, range(world.size))
    return [VirtualComm(context, rank, row_bytes) for rank in range(world.size)]


def _array(buf) -> np.ndarray:
    """The array of ``array`` or ``[array, ...]``."""
    return np.asarray(buf[0] if isinstance(buf, (list, tuple)) else buf)


def _reduce(values: list, op):
    combine = next((function for known, function in _OPERATIONS if known == op), None)
    if combine is None:
        raise NotImplementedError(f"reduction {op} on virtual ranks: known are SUM, MIN, MAX, LAND")
    total = values[0]
    for value in values[1:]:
        total = combine(total, value)
    return total


def _short(ranks: list[int]) -> str:
    return "rank " + ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
