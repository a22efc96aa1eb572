"""A communicator with mpi4py's methods for virtual ranks.

Small numbers (norms, decisions) are really exchanged, so that the solver's control flow is that of a real run. A state
is one number; ``row_bytes`` gives the bytes that a number in a message stands for, by the message's tag (its level).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import count
from typing import Any

import numpy as np
from mpi4py import MPI

from pint_fem.scaling.world import DeadlockError, World

__all__ = ["OBJECT_BYTES", "VirtualComm", "communicators"]

OBJECT_BYTES = 64
"""Bytes charged for a Python object in a collective operation."""

_OPERATIONS = ((MPI.SUM, np.add), (MPI.MIN, np.minimum))


class _Operation:
    """A collective operation: the values and clocks of the ranks that have entered it, and the result."""

    def __init__(self, size: int, kind: str):
        self.kind, self.present, self.result = kind, 0, None
        self.values, self.clocks, self.last = [None] * size, [0.0] * size, 0.0


class _Context:
    """What the members of a communicator share."""

    def __init__(self, world: World, members: Sequence[int]):
        self.world, self.members, self.size = world, list(members), len(members)
        self.number, world.contexts = world.contexts, world.contexts + 1
        self.operations: dict[int, _Operation] = {}


class _Request:
    """The request of a nonblocking operation: a send that is complete (no key), or a receive."""

    def __init__(self, world: World, key: tuple | None = None, into: np.ndarray | None = None):
        self._world, self._key, self._into = world, key, into

    def Wait(self) -> bool:
        if self._key is not None:
            self._into[...] = self._world.receive(self._key)
            self._key = None
        return True


class VirtualComm:
    """A communicator of virtual ranks, on one of them.

    Methods with mpi4py's names do what mpi4py documents, and advance clocks; parts of arrays are in rank order, without
    gaps.

    Parameters
    ----------
    context, rank
        What the members share, and the number of this rank among them.
    row_bytes
        Bytes that a number of a state stands for, by the messages' tag; the last entry holds for all larger tags.
        Default: the size of the number itself.
    """

    def __init__(self, context: _Context, rank: int, row_bytes: Sequence[float] | None = None):
        self._context, self.rank, self.size, self.world = context, rank, context.size, context.world
        self._row_bytes, self._calls = row_bytes, count()

    def scaled(self, row_bytes: Sequence[float] | None) -> VirtualComm:
        """The same communicator for states of another size."""
        other = VirtualComm(self._context, self.rank, row_bytes)
        other._calls = self._calls
        return other

    @property
    def group(self) -> VirtualComm:
        """The group of the members: the communicator itself."""
        return self

    def Translate_ranks(self, ranks: Sequence[int], other: VirtualComm) -> list[int]:
        """Return the numbers of ranks in another group."""
        return [other._context.members.index(self._context.members[r]) for r in ranks]

    def represented_bytes(self, numbers: int, tag: int) -> float:
        """Bytes that some numbers of a message stand for."""
        return numbers * (8 if self._row_bytes is None else self._row_bytes[min(tag, len(self._row_bytes) - 1)])

    # -- point to point --------------------------------------------------------------------------------------------
    def _key(self, source: int, dest: int, tag: int) -> tuple:
        members = self._context.members
        return self._context.number, members[source], members[dest], tag

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> _Request:
        """Send an array without blocking."""
        array = _array(buf)
        self.world.send(self._key(self.rank, dest, tag), array.copy(), self.represented_bytes(array.size, tag))
        return _Request(self.world)

    def Irecv(self, buf: Any, source: int, tag: int = 0) -> _Request:
        """Receive an array from a given source without blocking."""
        return _Request(self.world, self._key(source, self.rank, tag), _array(buf))

    Send = Isend  # no send blocks

    def Recv(self, buf: Any, source: int, tag: int = 0) -> None:
        """Receive an array from a given source."""
        self.Irecv(buf, source, tag).Wait()

    # -- collective operations -------------------------------------------------------------------------------------
    def _collective(
        self, kind: str, value, nbytes: float | None, combine: Callable[[list], object], root: int | None = None
    ):
        """Wait for all ranks and return ``combine`` of their values, which is evaluated once.

        ``root``: of operations in which the other ranks only send (their clocks do not wait) or only receive.
        """
        context, world, rank = self._context, self.world, self.rank
        number = next(self._calls)
        operation = context.operations.setdefault(number, _Operation(self.size, kind))
        if operation.kind != kind:
            raise DeadlockError(
                f"deadlock: rank {context.members[rank]} calls {kind} where others of its communicator call "
                f"{operation.kind}"
            )
        operation.values[rank], operation.clocks[rank] = (value,), world.now()
        operation.present += 1
        if operation.present < self.size:
            world.suspend(lambda: self._describe(operation))
        else:
            operation.result = combine([v[0] for v in operation.values])
            operation.last = max(operation.clocks)
            del context.operations[number]
            for member in context.members:
                if member != context.members[rank]:
                    world.resume(member)
        seconds = world.network.alltoall if kind == "alltoall" else world.network.collective
        cost = 0.0 if nbytes is None else seconds(self.size, nbytes)
        if kind in ("bcast", "scatter"):
            world.wait_until(operation.clocks[root] + cost)
        elif kind not in ("reduce", "gather") or rank == root:
            world.wait_until(operation.last + cost)
        return operation.result

    def _describe(self, operation: _Operation) -> str:
        missing = [str(m) for m, v in zip(self._context.members, operation.values, strict=True) if v is None]
        some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        return f"{operation.kind}, where {operation.present} of {self.size} have come (rank {some} have not)"

    def synchronise(self) -> None:
        """Set all clocks to the latest one, at no cost."""
        self._collective("synchronise", None, None, lambda values: None)

    def Barrier(self) -> None:
        """Wait for all ranks."""
        self._collective("barrier", None, 0, lambda values: None)

    def allgather(self, value: Any) -> list:
        """Gather an object from each rank; all ranks get the same list."""
        return self._collective("allgather", value, OBJECT_BYTES * self.size, list)

    def bcast(self, value: Any = None, root: int = 0) -> Any:
        """Broadcast an object; all ranks get the same one."""
        return self._collective("bcast", value, OBJECT_BYTES, lambda values: values[root], root)

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce an array of each rank."""
        out = _array(recvbuf)
        own = out if sendbuf is MPI.IN_PLACE else _array(sendbuf)
        out[...] = self._collective("allreduce", own.copy(), own.nbytes, lambda values: _reduce(values, op))

    def Reduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, root: int = 0) -> None:
        """Reduce an array of each rank to the root."""
        own = _array(sendbuf)
        total = self._collective(
            "reduce", own.copy(), self.represented_bytes(own.size, 0), lambda values: _reduce(values, op), root
        )
        if self.rank == root:
            _array(recvbuf)[...] = total

    def Bcast(self, buf: Any, root: int = 0) -> None:
        """Broadcast an array."""
        array = _array(buf)
        array[...] = self._collective(
            "bcast", array.copy(), self.represented_bytes(array.size, 0), lambda v: v[root], root
        )

    def Allgatherv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Gather parts of an array on all ranks."""
        own, out = _array(sendbuf), _array(recvbuf)
        whole = self._collective("allgather", own.ravel().copy(), out.nbytes, np.concatenate)
        out[...] = whole.reshape(out.shape)

    def Gatherv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Gather parts of an array on the root."""
        own = _array(sendbuf)
        nbytes = self.represented_bytes(
            (own if recvbuf is None else _array(recvbuf)).size, len(self._row_bytes or [0]) - 1
        )
        whole = self._collective("gather", own.ravel().copy(), nbytes, np.concatenate, root)
        if self.rank == root:
            out = _array(recvbuf)
            out[...] = whole.reshape(out.shape)

    def Scatterv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Distribute parts of the root's array."""
        out, whole = _array(recvbuf), None if sendbuf is None else _array(sendbuf).ravel().copy()
        nbytes = self.represented_bytes((out if whole is None else whole).size, len(self._row_bytes or [0]) - 1)
        value = None if whole is None else (whole, sendbuf[1], sendbuf[2])
        data, counts, places = self._collective("scatter", value, nbytes, lambda values: values[root], root)
        start = places[self.rank]
        out[...] = data[start : start + counts[self.rank]].reshape(out.shape)

    def alltoall_bytes(self, nbytes: float) -> None:
        """Take the time of an ``Alltoallv`` that sends ``nbytes`` bytes to other ranks, without data."""
        self.world.counts["alltoall", 0] += 1
        self.world.counts["alltoall bytes", 0] += nbytes
        self._collective("alltoall", None, nbytes, lambda values: None)

    def Split(self, color: int = 0, key: int = 0) -> VirtualComm:
        """Make a communicator of the ranks of each colour, ordered by key and rank."""

        def split(values):
            made = [None] * self.size
            for colour in sorted({c for c, _ in values}):
                order = [rank for _, rank in sorted((k, r) for r, (c, k) in enumerate(values) if c == colour)]
                context = _Context(self.world, [self._context.members[r] for r in order])
                for place, rank in enumerate(order):
                    made[rank] = context, place
            return made

        context, place = self._collective("split", (color, key), 2 * OBJECT_BYTES, split)[self.rank]
        return VirtualComm(context, place, self._row_bytes)


def communicators(world: World, row_bytes: Sequence[float] | None = None) -> list[VirtualComm]:
    """Make the communicator of all ranks of a world, and return it as each rank has it; ``row_bytes`` is that of
    :class:`VirtualComm`.
    """
    context = _Context(world, range(world.size))
    return [VirtualComm(context, rank, row_bytes) for rank in range(world.size)]


def _array(buf) -> np.ndarray:
    """The array of ``array`` or ``[array, ...]``."""
    return np.asarray(buf[0] if isinstance(buf, (list, tuple)) else buf)


def _reduce(values: list, op):
    for operation, combine in _OPERATIONS:
        if operation == op:
            return reduce(combine, values)
    raise NotImplementedError(f"reduction {op} on virtual ranks: give SUM or MIN")
