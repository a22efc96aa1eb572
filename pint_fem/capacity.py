"""Comparison of the memory that a run needs at least with that of its machines, before anything is allocated."""

from __future__ import annotations

import os
import resource
from functools import cache
from pathlib import Path

from mpi4py import MPI

from pint_fem.errors import InputError

__all__ = ["machine_memory", "most_items", "readable", "require_memory"]

_SHARE = 0.5
"""Part of the memory that :func:`most_items` counts with."""
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


@cache
def machine_memory() -> int:
    """Bytes of memory for all processes on this machine: what is built in, or what a control group allows if less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        groups = [line.split(":", 2)[2].strip("/\n") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, IndexError):
        groups = []
    names = [
        f"/sys/fs/cgroup/{place}/{name}".replace("//", "/")
        for group in ["", *groups]
        for place, name in ((group, "memory.max"), (f"memory/{group}", "memory.limit_in_bytes"))
    ]
    for name in names:
        try:
            total = min(total, int(Path(name).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return total


def readable(nbytes: int) -> str:
    """A number of bytes with a unit, such as ``"15.1 TB"``."""
    size, unit = float(nbytes), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}"


def require_memory(comm: MPI.Comm, nbytes: int, what: str, advice: str) -> None:
    """Refuse a run that needs more memory than a machine has, on every rank (collective).

    Parameters
    ----------
    comm
        Communicator of all ranks that need memory; those on one machine share its memory.
    nbytes
        Number of bytes that this rank needs at least.
    what
        What needs them, with the sizes that were given.
    advice
        What the user can do.

    Raises
    ------
    InputError
        On every rank, if a rank exceeds the limit of its process or the ranks of a machine exceed its memory.
    """
    mine = (MPI.Get_processor_name(), int(nbytes), machine_memory(), _limit())
    ranks = [mine] if comm.size == 1 else comm.allgather(mine)
    for machine, _, memory, _ in ranks:
        needed = sum(size for name, size, *_ in ranks if name == machine)
        if needed > memory:
            raise InputError(
                f"{what} need at least {readable(needed)} on machine {machine}, which has {readable(memory)}: {advice}"
            )
    for _, needed, _, limit in ranks:
        if limit is not None and needed > limit:
            raise InputError(
                f"{what} need at least {readable(needed)} in a process, whose limit is {readable(limit)}: {advice}"
            )


def most_items(comm: MPI.Comm, base: int, item: int) -> int:
    """Return how many items of a size fit half of the memory beside all else, at least 1, the same on every rank
    (collective). It depends on what machines and processes may have, not on what is free at the moment.

    Parameters
    ----------
    comm
        Communicator of all ranks that need memory; those on one machine share its memory.
    base, item
        Bytes of this rank for all else, and for an item.
    """
    mine = (MPI.Get_processor_name(), int(base), max(int(item), 1), machine_memory(), _limit())
    ranks = [mine] if comm.size == 1 else comm.allgather(mine)
    counts = [(_SHARE * limit - base) // item for _, base, item, _, limit in ranks if limit is not None]
    for name, _, _, memory, _ in ranks:
        there = [(base, item) for machine, base, item, *_ in ranks if machine == name]
        bases, items = zip(*there, strict=True)
        counts.append((_SHARE * memory - sum(bases)) // sum(items))
    return max(int(min(counts)), 1)


def _limit() -> int | None:
    """Bytes of this process's address space, ``None`` without a limit."""
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if own == resource.RLIM_INFINITY else own
