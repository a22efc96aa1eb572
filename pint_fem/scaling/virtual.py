"""Stand-ins for arithmetic on virtual ranks: propagators and norms that advance clocks, and a trace by such a clock."""

from __future__ import annotations

from typing import Any

import numpy as np

from pint_fem.all_at_once.trace import Trace
from pint_fem.scaling.communicator import VirtualComm
from pint_fem.scaling.costs import Kernel
from pint_fem.scaling.world import World

__all__ = ["VirtualNorms", "VirtualPropagator", "VirtualTrace"]


class VirtualPropagator:
    """A level's propagator that takes time instead of steps; one serves all ranks.

    Parameters
    ----------
    world, level, kind
        The virtual ranks; what work is counted under.
    kernel, overhead
        Cost of a call that takes a step from some states; seconds per state stepped that the solver takes beside it. A
        kernel on lanes is that of a propagator with the methods ``sweep`` and ``advance``.
    """

    def __init__(self, world: World, level: int, kind: str, kernel: Kernel, overhead: float = 0.0):
        self.world, self.level, self.kind, self.kernel, self.overhead = world, level, kind, kernel, overhead
        if kernel.lanes:
            self.sweep, self.advance = self._sweep, self._advance

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Take the time of a block of steps, as ``step`` of :class:`pint_fem.all_at_once.levels.Propagator`."""
        self._take(len(steps), 1)
        out[...] = u

    def _take(self, states: int, steps: int) -> None:
        """Take the time of steps one after another from each of some states."""
        self.world.counts[self.kind, self.level] += states * steps
        self.world.charge(steps * (self.kernel(states) + states * self.overhead))

    def _advance(self, first: int, stride: int, u: np.ndarray, out: np.ndarray, G: np.ndarray | None) -> None:
        """Take the time of steps one after another from each of some states, as ``advance`` of
        :class:`pint_fem.all_at_once.levels.Propagator`.
        """
        self._take(len(u), out.shape[1])
        out[...] = u[:, None]

    def _sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """Take the time of steps one after another, as ``sweep`` of :class:`pint_fem.all_at_once.levels.Propagator`."""
        n = len(U) - 1
        self.world.counts[f"{self.kind} sweep", self.level] += n
        self.world.charge(n * self.kernel(1))
        U[1:] = U[0]


class VirtualNorms:
    """Squared norms of states, all of them zero, which take ``seconds`` per state and ``more`` per call."""

    def __init__(self, world: World, seconds: float, more: float = 0.0):
        self.world, self.seconds, self.more = world, seconds, more

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Take the time of the norms of a block."""
        self.world.counts["norm", 0] += len(block)
        self.world.charge(self.more + len(block) * self.seconds)
        return np.zeros(len(block))


class VirtualTrace(Trace):
    """A trace of one virtual rank by its clock, with the bytes that the numbers in its messages stand for."""

    def __init__(self, comm: VirtualComm):
        super().__init__(comm, clock=comm.world.now)

    def work(self, name: str, level: int, begin: float, **args: Any) -> None:
        """Record work that began at ``begin``, as :meth:`pint_fem.all_at_once.trace.Trace.work`."""
        if "bytes" in args:
            args["bytes"] = round(self.comm.represented_bytes(args["bytes"] // 8, level))
        super().work(name, level, begin, **args)

    def message(self, name: str, level: int, comm: VirtualComm, peer: int, nbytes: int) -> None:
        """Record a message, as :meth:`pint_fem.all_at_once.trace.Trace.message`."""
        super().message(name, level, comm, peer, round(comm.represented_bytes(nbytes // 8, level)))
