"""Whether all ranks are well and see the same, in one small reduction: reports are gathered only where they do not."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

__all__ = ["all_alike"]


def all_alike(comm, well: bool, *seen: tuple[int, ...] | None) -> bool:
    """Whether ``well`` is true and what is seen the same on all ranks.

    Parameters
    ----------
    comm
        Communicator.
    well
        Nothing is wrong on this rank.
    seen
        Tuples of whole numbers or truth values, or ``None`` on ranks that have nothing to compare.

    Returns
    -------
    bool
        The same on every rank.
    """
    if comm.size == 1:
        return bool(well)
    # the least n is the largest, ~(least ~n), where all ranks have the same
    numbers, nothing = [int(bool(well))], np.iinfo(np.int64).max
    for item in seen:
        number = None if item is None else hash(item) >> 1
        numbers += [nothing, nothing] if number is None else [number, ~number]
    least = np.array(numbers, dtype=np.int64)
    comm.Allreduce(MPI.IN_PLACE, least, op=MPI.MIN)
    pairs = least[1:].reshape(-1, 2)
    return bool(least[0]) and all(a == nothing or a == ~b for a, b in pairs)
