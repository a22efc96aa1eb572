"""ParaDiag on virtual ranks: its own code, which takes the time of transforms, solves and the packing of messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import log2
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from pint_fem.paradiag.circulant import AlphaCirculant, FrequencySolve
from pint_fem.paradiag.distribution import TimeTransposes
from pint_fem.paradiag.systems import ShiftedSteps
from pint_fem.scaling.costs import Kernel
from pint_fem.scaling.world import World

__all__ = ["FEW", "virtual_circulant", "virtual_systems"]

FEW = 32
"""Unknowns of the smallest transform that is measured."""

# tableaux with the numbers of stages; times do not depend on the entries
_TABLEAUX = {1: ([[0.5]], [1.0]), 2: ([[0.25, 0.0], [0.75, 0.25]], [0.75, 0.25])}


class _Transposes(TimeTransposes):
    """Transposes that send as many bytes as the real ones, without data."""

    def __init__(self, *args: Any, world: World, pack: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._world, self._pack = world, pack

    def spread(self, mine: np.ndarray, rows: Sequence[range]) -> np.ndarray:
        """Take the time of sending all columns of the own rows to the ranks of the columns."""
        own = len(rows[self.comm.rank])
        self._take_time(own * (self.size - len(self.own_columns)), rows, mine.itemsize)
        return np.zeros((1, 1), mine.dtype)

    def collect(self, columns: np.ndarray, rows: Sequence[range]) -> np.ndarray:
        """Take the time of sending the own columns of all rows to the ranks of the rows."""
        own = len(rows[self.comm.rank])
        self._take_time((self._total(rows) - own) * len(self.own_columns), rows, columns.itemsize)
        return np.zeros((own, 1), columns.dtype)

    def _total(self, rows) -> int:
        return self.steps if rows is self.rows else self.frequencies

    def _take_time(self, sent: int, rows, itemsize: int) -> None:
        """Take the time of sending some numbers, and of packing and unpacking the own rows and columns."""
        copied = len(rows[self.comm.rank]) * self.size + self._total(rows) * len(self.own_columns)
        self.sent = sent * itemsize
        self._world.charge(self._pack * copied * itemsize)
        self.comm.alltoall_bytes(self.sent)


class _Circulant(AlphaCirculant):
    """A circulant whose transforms take time only; ``unknowns`` of a state stand in the place of its one number."""

    def __init__(
        self,
        nsteps: int,
        alpha: float,
        solve: FrequencySolve,
        size: int,
        *,
        world: World,
        unknowns: int,
        costs: Mapping,
        **given: Any,
    ):
        transposes = partial(_Transposes, world=world, pack=costs["pack"])
        super().__init__(nsteps, alpha, solve, unknowns, transposes=transposes, **given)
        self._world, self._costs = world, costs

    def rfft(self, columns: np.ndarray) -> np.ndarray:
        return self._transform("fft", len(self.mu), complex)

    def irfft(self, spectrum: np.ndarray) -> np.ndarray:
        return self._transform("ifft", self.nsteps, float)

    def _transform(self, kind: str, rows: int, dtype: DTypeLike):
        columns = len(self.transposes.own_columns)
        self._world.counts["fft", 0] += columns
        self._world.charge(self._costs[kind](columns))
        return np.zeros((rows if self.transposes.comm.size == 1 else 1, 1), dtype)


class _System:
    """The system of a frequency and stage (:class:`pint_fem.paradiag.systems.ShiftedSystem`), which takes time only;
    the products' time is part of the solves'.
    """

    def __init__(self, world: World, costs: Mapping[str, float], stages: int):
        self._world, self._costs, self._stages = world, costs, stages

    def factor(self, y):
        self._world.counts["factor", 0] += 1
        self._world.charge(self._costs["factor"])
        return True, self._costs["factor bytes"]

    def solve(self, factor, y, r, *, transposed):
        self._world.counts["frequency solve", 0] += 1
        self._world.charge(self._costs["solve transposed" if transposed else "solve"] / self._stages)
        return r

    def release(self, factor):
        """Release a factor, which has no memory here."""

    def mass(self, r, *, transposed):
        return r


def virtual_systems(world: World, costs: Mapping[str, float], stages: int, memory: float) -> ShiftedSteps:
    """Make the solves of one rank's frequencies, for steps with one or two stages.

    Parameters
    ----------
    world, costs
        The virtual ranks; ``paradiag`` of :class:`~pint_fem.scaling.costs.Calibration`.
    stages, memory
        Stages of a step; bytes of factors that are kept, by ParaDiag's own rule.
    """
    A, b = _TABLEAUX[stages]
    return ShiftedSteps(A, b, dict.fromkeys(np.diag(A), _System(world, costs, stages)), memory)


def virtual_circulant(
    world: World, costs: Mapping[str, float], unknowns: int, nsteps: int, factor: float
) -> Callable[..., AlphaCirculant]:
    """What makes the circulant of ParaDiag on virtual ranks.

    Parameters
    ----------
    world, costs, factor
        The virtual ranks; ``paradiag`` of :class:`~pint_fem.scaling.costs.Calibration`; a factor of all its times.
    unknowns, nsteps
        Local unknowns of a state, and time steps: transforms take a time that grows as ``nsteps log(nsteps)``.
    """
    measured, many = costs["fft steps"], int(costs["fft columns"])
    ratio = factor * nsteps * log2(max(nsteps, 2)) / (measured * log2(measured))
    times = {"pack": factor * costs["pack"]}
    for kind in ("fft", "ifft"):
        few = FEW * costs[f"few {kind}"]
        times[kind] = Kernel((FEW, many), (ratio * few, ratio * max(many * costs[kind], few)))
    return partial(_Circulant, world=world, unknowns=unknowns, costs=times)
