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

__all__ = ["FEW", "VirtualBlocks", "virtual_circulant", "virtual_systems"]

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
        self, nsteps: int, alpha: float, solve: FrequencySolve, size: int, *,
        world: World, unknowns: int, costs: Mapping, **given: Any,
    ):  # fmt: skip
        transposes = partial(_Transposes, world=world, pack=costs["pack"])
        super().__init__(nsteps, alpha, solve, unknowns, transposes=transposes, **given)
        self._world, self._costs = world, costs

    def rfft(self, columns: np.ndarray) -> np.ndarray:
        return self.transformed("fft", len(self.mu), complex)

    def irfft(self, spectrum: np.ndarray) -> np.ndarray:
        return self.transformed("ifft", self.nsteps, float)

    def transform(self, kind: str) -> _Transform:
        return _Transform(self, kind)

    def transformed(self, kind: str, rows: int, dtype: DTypeLike) -> np.ndarray:
        """Take the time of the transforms of the own unknowns; the result."""
        columns = len(self.transposes.own_columns)
        self._world.counts["fft", 0] += columns
        single = np.dtype(dtype).char in "fF"
        self._world.charge(self._costs[kind](columns) * (self._costs["single"] if single else 1.0))
        return np.zeros((rows if self.transposes.comm.size == 1 else 1, 1), dtype)


class _Transform:
    """Transforms by kernels (:class:`~pint_fem.paradiag.transforms.TimeTransform`), which take time only."""

    def __init__(self, circulant: _Circulant, kind: str):
        self._circulant, self._dtype = circulant, np.dtype(kind)
        self.complex = np.result_type(self._dtype, np.complex64)

    def forward(self, rows: np.ndarray, out: np.ndarray, scale: np.ndarray | None = None) -> None:
        """Take the time of a transform."""
        self._circulant.transformed("fft", 1, self.complex)

    def backward(self, spectrum: np.ndarray, out: np.ndarray, scale: np.ndarray | None = None) -> None:
        """Take the time of an inverse transform."""
        self._circulant.transformed("ifft", 1, self._dtype)

    def add(self, rows: np.ndarray, out: np.ndarray, scale: np.ndarray) -> None:
        """Add the result, whose time is part of the transform's."""


class VirtualBlocks:
    """Solves for all frequencies of a rank on lanes (:class:`~pint_fem.paradiag.circulant.BlockSolve`), which take time
    only.

    Parameters
    ----------
    systems, transposed, single
        The systems of one rank; whether their transposes are solved; seconds of a solve in single precision relative to
        double precision.
    """

    available = True

    def __init__(self, systems: ShiftedSteps, *, transposed: bool, single: float):
        self._solve = systems.solve_transposed if transposed else systems.solve
        self._systems, self._single = systems, single

    def __call__(self, frequencies: range, mu: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        """Take the time of the solves."""
        for system in self._systems.systems:
            system.relative = self._single if rows.dtype == np.complex64 else 1.0
        for k in frequencies:
            self._solve(k, complex(mu[k]), np.zeros(1, complex))
        out[...] = 0


class _System:
    """The system of a frequency and stage (:class:`pint_fem.paradiag.systems.ShiftedSystem`), which takes time only;
    the products' time is part of the solves'.
    """

    def __init__(self, world: World, costs: Mapping[str, float], stages: int):
        self._world, self._costs, self._stages, self.relative = world, costs, stages, 1.0

    def factor(self, y):
        self._world.counts["factor", 0] += 1
        self._world.charge(self._costs["factor"])
        return True, self._costs["factor bytes"]

    def solve(self, factor, y, r, *, transposed):
        self._world.counts["frequency solve", 0] += 1
        seconds = self._costs["solve transposed" if transposed else "solve"] * self.relative
        self._world.charge(seconds / self._stages)
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
    times = {"pack": factor * costs["pack"], "single": costs.get("single", 1.0)}
    for kind in ("fft", "ifft"):
        few = FEW * costs[f"few {kind}"]
        times[kind] = Kernel((FEW, many), (ratio * few, ratio * max(many * costs[kind], few)))
    return partial(_Circulant, world=world, unknowns=unknowns, costs=times)
