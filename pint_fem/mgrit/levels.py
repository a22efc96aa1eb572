"""Time grids of the MGRIT hierarchy and who owns which steps.

A level with ``N`` steps has the points ``0..N``. Rank ``r`` owns the steps ``lo[r] -> lo[r]+1, ..., hi[r]-1 -> hi[r]``
and the points ``lo[r]+1 .. hi[r]``; it also holds point ``lo[r]`` as the *ghost* row 0 of its array (on the first
rank that is the initial value). A local array therefore has ``k + 1`` rows, ``k = hi - lo``, and row ``i`` is point
``lo + i``.

Every ``m``-th point of a level is a C-point and a point of the next level: point ``j`` there is point ``j m`` here.
So the ranges of a coarse level are ``lo // m`` and ``hi // m``. A rank without a C-point has no step there and stays
out of the levels below, but for the first one, which keeps the initial value.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

__all__ = ["Level", "Propagator", "build_levels", "inject", "split_steps"]


class Propagator(Protocol):
    """What MGRIT asks of a user: one time step, on a block of states at once.

    An optional second method ``sweep(first, U, G)`` takes the steps ``first, first + 1, ...`` one after another in
    place, from ``U[0]`` (``U`` has one row more than there are steps; ``G`` is ``None`` or one row a step). The
    sequential solves use it when it is there.
    """

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi_n(u)`` to ``out`` for each ``n`` in ``steps``.

        Parameters
        ----------
        steps
            The step numbers on this level; step ``n`` goes from point ``n`` to point ``n + 1``. A constant stride.
        u, out
            Arrays of shape ``(len(steps), *state)``, maybe strided along the first axis; they do not overlap.
        """


def split_steps(nsteps: int, parts: int) -> list[int]:
    """Bounds of ``parts`` contiguous, nearly equal ranges of ``nsteps`` steps.

    Parameters
    ----------
    nsteps, parts
        Number of steps and of ranges.

    Returns
    -------
    list of int
        ``parts + 1`` bounds, from 0 to ``nsteps``.
    """
    return [(nsteps * r) // parts for r in range(parts + 1)]


class Level:
    """One time grid, the local part of its unknown ``U`` and right-hand side ``G``, and its messages.

    The equations of a level are ``U[n+1] - Phi_n(U[n]) = G[n]`` for ``n = 0..N-1`` with ``U[0]`` given. Row ``i`` of
    the local ``G`` belongs to row ``i + 1`` of the local ``U``. ``G = None`` stands for zero.

    Attributes
    ----------
    index : int
        0 is the finest level.
    m : int or None
        Coarsening factor to the next level; ``None`` on the coarsest.
    stride : int
        A step of this level in steps of the finest.
    left, right : int or None
        Ranks that own the neighbouring points.
    """

    def __init__(self, index: int, bounds: Sequence[int], m: int | None, stride: int, propagator: Propagator, comm):
        self.index, self.bounds, self.m, self.stride = index, list(bounds), m, stride
        self.propagator, self.comm = propagator, comm
        self.nsteps = self.bounds[-1]
        self.lo, self.hi = self.bounds[comm.rank], self.bounds[comm.rank + 1]
        self.k = self.hi - self.lo
        holds = [r for r in range(comm.size) if r == 0 or self.bounds[r + 1] > self.bounds[r]]
        self.active = comm.rank in holds
        self.left = self.right = None
        if self.active:
            here = holds.index(comm.rank)
            self.left = holds[here - 1] if here > 0 else None
            self.right = holds[here + 1] if here + 1 < len(holds) else None
        self.U: np.ndarray | None = None
        self.G: np.ndarray | None = None
        self.failure: str | None = None
        self.phi_calls = 0  # states stepped, for reports

    @property
    def first_c_row(self) -> int:
        """Row of the first C-point owned (beyond ``k`` if there is none)."""
        return (self.lo // self.m + 1) * self.m - self.lo

    def phi(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Call the propagator; a failure becomes NaN, which the collective norm carries to every rank (no hang)."""
        if not len(steps):
            return
        self.phi_calls += len(steps)
        try:
            self.propagator.step(steps, u, out)
        except Exception as error:
            out[...] = np.nan
            self._failed(steps, u, out, error)
        else:
            if not np.isfinite(out).all():
                self._failed(steps, u, out)

    def sweep(self) -> None:
        """Take all own steps one after another, from row 0."""
        U, G, k = self.U, self.G, self.k
        if not k:
            return
        steps = range(self.lo, self.hi)
        if not hasattr(self.propagator, "sweep"):
            for i, n in enumerate(steps):
                self.phi(range(n, n + 1), U[i : i + 1], U[i + 1 : i + 2])
                if G is not None:
                    U[i + 1] += G[i]
            return
        self.phi_calls += k
        try:
            self.propagator.sweep(self.lo, U, G)
        except Exception as error:
            U[1:] = np.nan
            self._failed(steps, U[:1], U[1:], error)
        else:
            if not np.isfinite(U).all():
                self._failed(steps, U[:-1], U[1:])

    def _failed(self, steps: range, u: np.ndarray, out: np.ndarray, error: Exception | None = None) -> None:
        """Remember the first failure that comes of finite data; what follows from it is not its cause."""
        good = np.isfinite(u).reshape(len(u), -1).all(axis=1)
        if self.failure is not None or (error is not None and not good.all()):
            return
        where, what = f"{steps[0]}..{steps[-1]}", f"{type(error).__name__}: {error}"
        if error is None:
            bad = np.flatnonzero(good & ~np.isfinite(out).reshape(len(out), -1).all(axis=1))
            if not len(bad):
                return
            where, what = ", ".join(str(steps[i]) for i in bad[:5]), "value not finite"
        self.failure = f"level {self.index}, steps {where}: {what}"

    # -- messages: one row to the right, one from the left; the tag is the level -----------------------------------
    def post_receive(self, array: np.ndarray):
        """Start receiving row 0 of ``array`` from the left; ``None`` where there is nobody."""
        return None if self.left is None else self.comm.Irecv(array[:1], source=self.left, tag=self.index)

    def post_send(self, array: np.ndarray):
        """Start sending the last row of ``array`` to the right; ``None`` where there is nobody."""
        return None if self.right is None else self.comm.Isend(array[self.k :], dest=self.right, tag=self.index)

    def exchange(self, array: np.ndarray) -> None:
        """Fill row 0 of ``array`` from the left neighbour's last row."""
        wait(self.post_receive(array), self.post_send(array))


def wait(*requests) -> None:
    """Wait for those of the requests that are not ``None``."""
    for request in requests:
        if request is not None:
            request.Wait()


def build_levels(
    propagators: Sequence[Propagator], coarsening: Sequence[int], bounds: Sequence[int], comm
) -> list[Level]:
    """Build the hierarchy from the finest bounds.

    Parameters
    ----------
    propagators
        One a level, finest first.
    coarsening
        ``len(propagators) - 1`` factors of at least 2.
    bounds
        ``comm.size + 1`` step bounds on the finest level.
    comm
        Time communicator (mpi4py).
    """
    levels, stride = [], 1
    for index, propagator in enumerate(propagators):
        m = coarsening[index] if index < len(coarsening) else None
        levels.append(Level(index, bounds, m, stride, propagator, comm))
        if m is not None:
            bounds, stride = [b // m for b in bounds], stride * m
    return levels


def inject(levels: Sequence[Level], U: np.ndarray) -> list[np.ndarray]:
    """Values of a trajectory at the points of every level, ghost rows included.

    Parameters
    ----------
    levels
        A hierarchy.
    U
        ``(k + 1, *state)`` on the finest level, with a current ghost row.

    Returns
    -------
    list of ndarray
        One array a level; the first is ``U`` itself.
    """
    arrays = [U]
    for fine, coarse in pairwise(levels):
        out = np.zeros((coarse.k + 1, *U.shape[1:]))
        if coarse.active:
            out[1:] = arrays[-1][fine.first_c_row :: fine.m]
            if coarse.left is None:
                out[0] = arrays[-1][0]
            coarse.exchange(out)
        arrays.append(out)
    return arrays
