r"""Predicted times of a functional and its gradient on each process grid, from measured kernels.

Of :math:`P` ranks in :math:`e` groups of :math:`d \times t` (space x time) a group has at most :math:`k = \lceil E/e
\rceil` of :math:`E` experiments. One state and one adjoint sweep are run on virtual ranks
(:class:`~pint_fem.scaling.model.Model`) with the kernels of ``d`` space ranks, the network, and the time solver that is
used there. Experiments that share their operators are solved at once, so that a call for ``n`` steps takes as long as
one for ``k n`` states; otherwise one follows another. Coefficients in the operators add an assembly and a factorisation
for each control. The gradients of several groups are added,

.. math::  (e - 1)\, \ell + \lceil\log_2 e\rceil\, \ell + 2 \cdot 8 n / (d \beta) .

Misfits and regularisation are left out: their work is divided by the ranks of all grids alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.space import space_kernels
from pint_fem.theory.costs import sequential_seconds

__all__ = [
    "GROWTH",
    "Measured",
    "Shape",
    "SolverUse",
    "all_shapes",
    "grid_text",
    "joint",
    "least_seconds",
    "seconds_of",
]

Shape = tuple[int, int, int]
"""Ranks in space and in time, and groups of experiments."""
GROWTH = 4 / 3
"""Largest exponent of the unknowns in the work of a step: entries of a factor in three dimensions."""


def all_shapes(ranks: int, steps: int, experiments: int) -> list[Shape]:
    """All grids of ``ranks`` ranks with at most one rank in time per step and one group per experiment; those with
    more groups of experiments and more ranks in time come first.
    """
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    found = [
        (d, ranks // (d * e), e)
        for e in divisors
        for d in divisors
        if ranks % (d * e) == 0 and e <= experiments and ranks // (d * e) <= steps
    ]
    return sorted(found, key=lambda shape: (-shape[2], -shape[1]))


@dataclass(frozen=True)
class SolverUse:
    """A time solver with its options as the model's, and the cycles of a state and an adjoint sweep.

    Attributes
    ----------
    kind : str
        ``"serial"``, ``"mgrit"`` or ``"paradiag"``.
    options, cycles : dict, tuple of int
        Of MGRIT.
    ratio : float
        Time of a sweep by ParaDiag over that of sequential stepping.
    """

    kind: str
    options: Mapping = field(default_factory=lambda: {"levels": 1})
    cycles: tuple[int, int] = (0, 0)
    ratio: float = math.inf


@dataclass
class Measured:
    """What was measured of a problem on the ranks of a run.

    Attributes
    ----------
    costs : Calibration
        Kernels on the measured numbers of space ranks, network and sizes; work of all ranks at once.
    experiments, shares_operators : int, bool
        Number of experiments, and whether these are solved at once.
    update : dict
        Seconds of the assembly and factorisation for a new control, by the number of space ranks.
    """

    costs: Calibration
    experiments: int = 1
    shares_operators: bool = True
    update: dict[int, float] = field(default_factory=dict)

    def own(self, shape: Shape) -> int:
        """Most experiments of a group."""
        return math.ceil(self.experiments / shape[2])

    def costs_on(self, shape: Shape) -> Calibration:
        """The costs of a group's grid, with the kernels of all its experiments where they are solved at once."""
        c, space = self.costs, shape[0]
        count = self.own(shape) if self.shares_operators else 1
        kernels = {
            kind: [joint(k, count) for k in levels] for kind, levels in space_kernels(c, space, c.network).items()
        }
        return c.with_changes(unknowns=c.unknowns * count, kernels={space: kernels})


def grid_text(shape: tuple[int, ...]) -> str:
    """A grid as ``--grid`` takes it, such as ``"2x4"``; the groups of experiments only where there are several."""
    return "x".join(map(str, shape if shape[-1] > 1 else shape[:2]))


def joint(kernel: Kernel, count: int) -> Kernel:
    """The kernel of steps that ``count`` experiments take at once, as a function of the steps in a call of one."""
    if count == 1:
        return kernel
    sizes = sorted({*range(1, 5), *kernel.sizes, 2 * kernel.sizes[-1]})
    return Kernel(tuple(sizes), tuple(kernel(n * count) for n in sizes))


def _sum_over_groups(measured: Measured, shape: Shape) -> float:
    """Seconds of the sum of gradients over the groups of experiments."""
    space, _, groups = shape
    if groups == 1:
        return 0.0
    net, nbytes = measured.costs.network, measured.costs.state_bytes / space
    return net.alltoall(groups, nbytes) + net.collective(groups, nbytes)


def _around(measured: Measured, shape: Shape) -> tuple[float, float]:
    """How often the model's sweeps are done, and seconds beside them."""
    times = 1 if measured.shares_operators else measured.own(shape)
    return times, _sum_over_groups(measured, shape) + measured.update.get(shape[0], 0.0)


def least_seconds(measured: Measured, shape: Shape, use: SolverUse) -> float:
    """A lower bound of :func:`seconds_of`: a sweep's work on one rank in time, with MGRIT over the number of ranks.

    Its chain of coarse steps is no bound, as ranks may begin a cycle before others have ended the last one.
    """
    from pint_fem.scaling.planner import least_time  # requires greenlet

    times, more = _around(measured, shape)
    if use.kind == "paradiag":
        return seconds_of(measured, shape, use)
    c, (space, time, _) = measured.costs_on(shape), shape
    work, _ = least_time(c, use.options, space, use.cycles)
    return times * (work / time if use.kind == "mgrit" else work) + more


def seconds_of(measured: Measured, shape: Shape, use: SolverUse) -> float:
    """Predicted seconds of a functional and its gradient on a grid, from cold.

    Parameters
    ----------
    measured, shape
        The problem and the grid.
    use
        The time solver on it.

    Raises
    ------
    InputError
        If the options do not fit the number of steps.
    """
    from pint_fem.scaling.planner import predict  # requires greenlet

    times, more = _around(measured, shape)
    c, (space, time, _) = measured.costs_on(shape), shape
    if use.kind == "paradiag":
        single = sum(c.kernels[space][kind][0](1) for kind in ("step", "adjoint"))
        return times * use.ratio * sequential_seconds({1: single}, c.nsteps) + more
    return times * predict(c, use.options, (space, time), use.cycles).seconds + more
