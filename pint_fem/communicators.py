"""Process grids of ``P = n_1 x n_2 (x n_3)`` ranks and their communicators, which all grids of one shape share.

A grid of ``P`` ranks in groups of ``n`` neighbours has an *inner* communicator (the ranks of a group), an *outer* one
(the ranks with the same place in their groups), and both in reverse order. An MPI library has some thousands of
communicators, and freeing one is collective, while Python deletes objects at other times on each rank. So nothing is
freed where an object is deleted: the communicators are stored as an attribute of the communicator that they were split
from, where the next grid of that shape finds them. They are freed with it, or by :meth:`ProcessGrid.free`, which all
ranks call. This module needs mpi4py and numpy only.
"""

from __future__ import annotations

import atexit
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from pint_fem.collective import any_rank, require_same
from pint_fem.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from typing import Self

__all__ = ["GroupCommunicators", "ProcessGrid", "SharedGroups", "parse_grid"]


class GroupCommunicators:
    """Communicators of the groups of ``n`` neighbouring ranks.

    Parameters
    ----------
    comm
        The communicator that is split (collective).
    n
        Ranks of a group; divides ``comm.size``.
    ensemble
        ``ensemble(comm, n)`` returns an object with attributes ``comm`` and ``ensemble_comm``, the inner and the outer
        communicator, which it frees itself (``firedrake.Ensemble``); ``None``: they are split here.

    Attributes
    ----------
    inner, outer, reversed_inner, reversed_outer : mpi4py communicators
    ensemble : object or None
    users : int
        Number of objects on this rank that use them.
    """

    def __init__(self, comm: MPI.Comm, n: int, ensemble: Callable | None = None):
        self.users = 0
        self.ensemble = None if ensemble is None else ensemble(comm, n)
        if self.ensemble is None:
            self.inner = comm.Split(comm.rank // n, comm.rank)
            self.outer = comm.Split(comm.rank % n, comm.rank)
        else:
            self.inner, self.outer = self.ensemble.comm, self.ensemble.ensemble_comm
        self.reversed_inner = self.inner.Split(0, -self.inner.rank)
        self.reversed_outer = self.outer.Split(0, -self.outer.rank)

    def free(self) -> None:
        """Free all communicators (collective)."""
        self.reversed_inner.Free()
        self.reversed_outer.Free()
        if self.ensemble is None:
            self.inner.Free()
            self.outer.Free()
        self.ensemble = None

    def remove_user(self) -> None:
        """Count one user less on this rank."""
        self.users -= 1


_exiting: list[bool] = []
# registered behind mpi4py's own, so it runs before: MPI's end frees all there is, and Python calls are not safe in it
atexit.register(_exiting.append, True)


def _free_all(comm: MPI.Comm, keyval: int, cache: dict[tuple, GroupCommunicators]) -> None:
    """Called by MPI where a communicator with groups is freed: on all ranks, in the same order of groups."""
    if _exiting:
        return
    for groups in cache.values():
        groups.free()
    cache.clear()


_KEYVAL = MPI.Comm.Create_keyval(delete_fn=_free_all)


class SharedGroups:
    """A counted reference ``groups`` to the :class:`GroupCommunicators` of a communicator, made at the first use."""

    def __init__(self, comm: MPI.Comm, n: int, ensemble: Callable | None = None):
        cache = comm.Get_attr(_KEYVAL)
        if cache is None:
            comm.Set_attr(_KEYVAL, cache := {})
        key = n, ensemble is not None
        if key not in cache:
            cache[key] = GroupCommunicators(comm, n, ensemble)
        self.groups: GroupCommunicators = cache[key]
        self.groups.users += 1
        self._comm, self._cache, self._key = comm, cache, key
        self._finalizer = weakref.finalize(self, self.groups.remove_user)
        self._finalizer.atexit = False

    def free(self) -> None:
        """Give up the reference, and free the communicators if there is no other on any rank (collective)."""
        if not self._finalizer.alive:  # given up before
            return
        self._finalizer()
        if not any_rank(self._comm, self.groups.users > 0):
            del self._cache[self._key]
            self.groups.free()


def parse_grid(text: str, size: int, axes: Sequence[str] = ("space", "time"), optional: int = 0) -> tuple[int, ...]:
    """Numbers of ranks along the ``axes`` of a grid of ``size`` ranks, from a text such as ``"2x4"``.

    ``"auto"`` puts all ranks along the second axis. The last ``optional`` axes may be left out, and have one rank then.

    Raises
    ------
    InputError
        If the text is no grid or its product is not ``size``.
    """
    least = len(axes) - optional
    if text == "auto":
        return (1, size) + (1,) * (len(axes) - 2)
    numbers = text.strip().split("x")
    if not least <= len(numbers) <= len(axes) or not all(re.fullmatch(r"[1-9]\d*", n) for n in numbers):
        named = [axis.upper() for axis in axes]
        forms = ["x".join(named[:count]) for count in range(least, len(axes) + 1)]
        raise InputError(f"grid {text!r} is not of the form {' or '.join(forms)}, such as 1x{size}")
    shape = [int(n) for n in numbers]
    if math.prod(shape) != size:
        n = math.prod(shape)
        raise InputError(f"grid {'x'.join(numbers)} requires {n} ranks, started were {size}: mpiexec -n {n}")
    return tuple(shape) + (1,) * (len(axes) - len(shape))


class ProcessGrid:
    """Base of the process grids: shape, shared communicators, and their release.

    Parameters
    ----------
    comm
        The communicator to split (collective).
    grid
        ``"2x4"``, ``(2, 4)``, ``"auto"`` or ``None``.
    sizes
        Numbers of ranks by the names of the axes, ``None`` where they are not given.
    optional
        Number of the last axes that may be left out, and have one rank then.

    Attributes
    ----------
    shape : tuple of int
        Numbers of ranks along all axes.
    """

    _released: Mapping[str, object]
    """Attributes that refer to communicators, with their values after :meth:`free`."""

    def __init__(
        self, comm: MPI.Comm, grid: tuple[int, ...] | str | None, sizes: dict[str, int | None], optional: int = 0
    ):
        self.comm, self._axes, self._optional = comm, tuple(sizes), optional
        self.shape = _shape(comm, grid, sizes, optional)
        self._shared: list[SharedGroups] = []

    def _groups(self, comm: MPI.Comm, n: int, ensemble: Callable | None = None) -> GroupCommunicators:
        """The communicators of groups of ``n`` neighbouring ranks of a communicator (collective); they are released
        with this grid, the last ones first.
        """
        self._shared.append(SharedGroups(comm, n, ensemble))
        return self._shared[-1].groups

    def __repr__(self) -> str:
        named = list(zip(self._axes, self.shape, strict=True))
        shown = [f"{name}={n}" for i, (name, n) in enumerate(named) if n > 1 or i < len(named) - self._optional]
        return f"{type(self).__name__}({', '.join(shown)}, rank {self.comm.rank} of {self.comm.size})"

    def free(self) -> None:
        """Free the communicators if no other grid of this shape on ``comm`` uses them (collective over ``comm``).

        To be called when nothing that was made on this grid is used any more: meshes, functionals, networks.
        """
        while self._shared:
            self._shared.pop().free()
        vars(self).update(self._released)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # a rank that fails alone must not wait for the others here
            self.free()

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which prints and writes the files of the whole run."""
        return self.comm.rank == 0


def _shape(
    comm: MPI.Comm, grid: tuple[int, ...] | str | None, sizes: dict[str, int | None], optional: int
) -> tuple[int, ...]:
    """Shape of a grid that is given in one of the ways of :class:`ProcessGrid` (collective)."""
    axes, given = tuple(sizes), {name: size for name, size in sizes.items() if size is not None}
    if grid is None:
        text = None if given else "auto"
    else:
        text = "x".join(map(str, grid)) if np.iterable(grid) and not isinstance(grid, str) else str(grid)
    require_same(comm, grid=text, **sizes)
    if not given:
        return parse_grid(text, comm.size, axes, optional)
    if text is not None:
        raise InputError(
            f"grid {text!r} and {' and '.join(given)}: give the grid or the number of ranks along its axes"
        )
    for name, size in given.items():
        whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if not whole or size < 1:
            error = InputError if whole else InputTypeError
            raise error(f"{name} = {size!r}: give a positive whole number of ranks")
        if comm.size % size:
            raise InputError(f"{name} = {size} does not divide the {comm.size} ranks that were started")
    first, second, *others = (given.get(name) for name in axes)
    last = [n or 1 for n in others]
    left, rest = divmod(comm.size, math.prod(last))
    if not rest and not (first and second):  # the other one follows; all that are left are in the second
        first = first or (left // second if second else 1)
        rest = left % first
        second = second or left // first
    if rest:
        named = ", ".join(f"{name} = {size}" for name, size in given.items())
        raise InputError(f"{named}: the product does not divide the {comm.size} ranks that were started")
    shown = [first or 1, second or 1, *last]
    while len(shown) > len(axes) - optional and shown[-1] == 1:
        shown.pop()
    return parse_grid("x".join(map(str, shown)), comm.size, axes, optional)
