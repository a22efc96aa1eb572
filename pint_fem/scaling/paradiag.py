"""ParaDiag on virtual ranks: its own code, with clocks instead of transforms, solves and the packing of messages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import log2

import numpy as np

from pint_fem.paradiag.circulant import AlphaCirculant
from pint_fem.paradiag.distribution import TimeTransposes
from pint_fem.paradiag.solver import ParaDiag
from pint_fem.paradiag.systems import ShiftedSteps
from pint_fem.scaling.costs import Kernel
from pint_fem.scaling.world import World

__all__ = ["VirtualParaDiag", "transforms", "virtual_systems"]

FEW = 32  # unknowns of the smallest transform that is measured

# of as many stages; times do not depend on the numbers
_TABLEAUX = {1: ([[0.5]], [1.0]), 2: ([[0.25, 0.0], [0.75, 0.25]], [0.75, 0.25])}


class _Transposes(TimeTransposes):
    """Sends as many bytes as the real ones; what is sent is a stand-in."""

    def __init__(self, *args, world: World, pack: float, **kwargs):
        super().__init__(*args, **kwargs)
        self._world, self._pack = world, pack

    def _spread(self, mine, rows):
        here, own = len(rows[self.comm.rank]), len(self._column)
        self._swap(here * (self.size - own), here * self.size + self._total(rows) * own, mine.itemsize)
        return np.zeros((1, 1), mine.dtype)

    def _collect(self, columns, rows):
        here, own = len(rows[self.comm.rank]), len(self._column)
        self._swap((self._total(rows) - here) * own, here * self.size + self._total(rows) * own, columns.itemsize)
        return np.zeros((here, 1), columns.dtype)

    def _total(self, rows) -> int:
        return self.steps if rows is self._rows else self.frequencies

    def _swap(self, sent: int, copied: int, itemsize: int) -> None:
        """Numbers that leave, and those that are packed before and unpacked behind."""
        self.sent = sent * itemsize
        self._world.charge(self._pack * copied * itemsize)
        self.comm.alltoall_bytes(self.sent)


class _Circulant(AlphaCirculant):
    """Transforms let the clock run."""

    def __init__(self, *args, world: World, fft: Kernel, ifft: Kernel, **kwargs):
        super().__init__(*args, **kwargs)
        self._world, self._kernels = world, (fft, ifft)

    def rfft(self, columns):
        """See :class:`~pint_fem.paradiag.circulant.AlphaCirculant`."""
        return self._transform(0, len(self.mu), complex)

    def irfft(self, spectrum):
        """See :class:`~pint_fem.paradiag.circulant.AlphaCirculant`."""
        return self._transform(1, self.nsteps, float)

    def _transform(self, which: int, rows: int, dtype):
        transposes = self._transposes
        self._world.counts["fft", 0] += len(transposes._column)
        self._world.charge(self._kernels[which](len(transposes._column)))
        return np.zeros((rows if transposes.comm.size == 1 else 1, 1), dtype)


class VirtualParaDiag(ParaDiag):
    """With virtual transposes and transforms.

    Parameters
    ----------
    propagator, nsteps, solve, **given
        As ParaDiag's.
    world
        Whose clocks run.
    size
        Local unknowns of a state.
    costs
        ``"fft"``, ``"ifft"`` (kernels), ``"pack"`` (seconds a byte).
    """

    def __init__(self, propagator, nsteps: int, solve, *, world: World, size: int, costs: Mapping[str, float], **given):
        super().__init__(propagator, nsteps, solve, **given)
        self._world, self._unknowns, self._costs = world, size, costs

    def _make_circulant(self, size: int) -> AlphaCirculant:
        costs = self._costs
        return _Circulant(
            self.nsteps, self.options.alpha, self._guarded, self._unknowns, comm=self.comm,
            bounds=self.levels[0].bounds, backwards=self._backwards, trace=self.trace, world=self._world,
            fft=costs["fft"], ifft=costs["ifft"],
            transposes=partial(_Transposes, world=self._world, pack=costs["pack"]),
        )  # fmt: skip


class _System:
    """A frequency's system of one stage."""

    def __init__(self, world: World, costs: Mapping[str, float], stages: int):
        self.world, self.stages = world, stages
        self.seconds = {False: costs["solve"] / stages, True: costs["solve transposed"] / stages}
        self.making, self.size = costs["factor"], costs["factor bytes"]

    def factor(self, y):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        self.world.counts["factor", 0] += 1
        self.world.charge(self.making)
        return True, self.size

    def solve(self, factor, y, r, *, transposed):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`; the product is in its time."""
        self.world.counts["frequency solve", 0] += 1
        self.world.charge(self.seconds[transposed])
        return r

    def release(self, factor):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""

    def mass(self, r, *, transposed):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        return r


def virtual_systems(world: World, costs: Mapping[str, float], stages: int, memory: float) -> ShiftedSteps:
    """One rank's frequencies, with ParaDiag's own book of factors: made at the first solve, kept as memory allows.

    Parameters
    ----------
    costs
        ``"solve"``, ``"solve transposed"`` (a frequency), ``"factor"`` (a frequency and stage): seconds; ``"factor
        bytes"``.
    stages
        Of a step.
    memory
        Bytes of factors.
    """
    A, b = _TABLEAUX[stages]
    system = _System(world, costs, stages)
    return ShiftedSteps(A, b, dict.fromkeys(np.diag(A), system), memory)


def transforms(costs: Mapping[str, float], nsteps: int, factor: float = 1.0) -> dict[str, Kernel]:
    """Seconds of the transforms of some unknowns over another number of steps, as ``N log N``, times a factor."""
    measured = costs["fft steps"]
    ratio, many = factor * nsteps * log2(max(nsteps, 2)) / (measured * log2(measured)), int(costs["fft columns"])
    each = lambda kind: (FEW * costs[f"few {kind}"], max(many * costs[kind], FEW * costs[f"few {kind}"]))
    return {kind: Kernel((FEW, many), tuple(ratio * s for s in each(kind))) for kind in ("fft", "ifft")}
