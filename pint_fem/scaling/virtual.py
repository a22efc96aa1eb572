"""What stands in for arithmetic: propagators and norms that let a clock run, and a trace with that clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pint_fem.all_at_once.trace import Trace
from pint_fem.scaling.costs import Kernel
from pint_fem.scaling.world import World

__all__ = ["VirtualNorms", "VirtualPropagator", "VirtualTrace", "virtual_propagator"]


class VirtualPropagator:
    """A level's propagator; one serves all ranks.

    Parameters
    ----------
    world
        Whose clocks run.
    level, kind
        Under which work is counted.
    block
        Cost of a call on states.
    bookkeeping
        Seconds a state that the solver takes beside it.
    """

    def __init__(self, world: World, level: int, kind: str, block: Kernel, bookkeeping: float = 0.0):
        self.world, self.level, self.kind, self.kernel = world, level, kind, block
        self.bookkeeping, self.block = bookkeeping, block.width
        self._count = world.counts

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        self.take(steps, u, out, steps.start // steps.step)

    def take(self, steps: range, u: np.ndarray, out: np.ndarray, lane: int) -> None:
        """See :class:`~pint_fem.mgrit.transposed_cycles.TransposedAdjoint`."""
        n = len(steps)
        self._count[self.kind, self.level] += n
        self.world.charge(self.kernel(n, lane) + n * self.bookkeeping)
        out[...] = u


class _Sweeping(VirtualPropagator):
    """With a cheaper way to take one state through many steps."""

    def __init__(self, *args, sweep: Kernel):
        super().__init__(*args)
        self._sweep = sweep

    def sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """See :class:`pint_fem.all_at_once.levels.Propagator`."""
        n = len(U) - 1
        self._count[f"{self.kind} sweep", self.level] += n
        self.world.charge(self._sweep(n))
        U[1:] = U[0]


def virtual_propagator(
    world: World, level: int, kind: str, block: Kernel, sweep: Kernel | None, bookkeeping: float = 0.0
) -> VirtualPropagator:
    """A propagator, with a method ``sweep`` where there is a cost for it."""
    args = (world, level, kind, block, bookkeeping)
    return VirtualPropagator(*args) if sweep is None else _Sweeping(*args, sweep=sweep)


class VirtualNorms:
    """Norms of states: zeros, for ``seconds`` a state and ``more`` a call."""

    def __init__(self, world: World, seconds: float, more: float = 0.0):
        self.world, self.seconds, self.more = world, seconds, more

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """See :class:`~pint_fem.mgrit.solver.MGRIT`."""
        self.world.counts["norm", 0] += len(block)
        self.world.charge(self.more + len(block) * self.seconds)
        return np.zeros(len(block))


class VirtualTrace(Trace):
    """A trace of one virtual rank, by its clock."""

    def __init__(self, comm):
        super().__init__(comm)
        self._clock = _clock(comm.world)
        self._start = self._clock()

    def now(self) -> float:
        """Microseconds since the start."""
        return 1e6 * (self._clock() - self._start)

    def work(self, name: str, level: int, begin: float, **args) -> None:
        """See :class:`~pint_fem.all_at_once.trace.Trace`; with the bytes that the stand-in's numbers stand for."""
        if "bytes" in args:
            args["bytes"] = round(self.comm.true_bytes(args["bytes"] // 8, level))
        super().work(name, level, begin, **args)

    def message(self, name: str, level: int, comm, peer: int, nbytes: int) -> None:
        """See :class:`~pint_fem.all_at_once.trace.Trace`; with the bytes that the stand-in's numbers stand for."""
        super().message(name, level, comm, peer, round(comm.true_bytes(nbytes // 8, level)))


def _clock(world: World) -> Callable[[], float]:
    return lambda: world.clocks[world.current]


def hierarchy(
    world: World, kind: str, blocks: Sequence[Kernel], sweeps: Sequence[Kernel] | None, levels: int, bookkeeping: float
) -> list[VirtualPropagator]:
    """Propagators of a hierarchy; the last kernel goes on to coarser levels."""
    pick = lambda table, level: None if not table else table[min(level, len(table) - 1)]
    return [virtual_propagator(world, i, kind, pick(blocks, i), pick(sweeps, i), bookkeeping) for i in range(levels)]
