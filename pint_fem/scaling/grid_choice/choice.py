"""The choice of a process grid by measurement, before a problem is posed on it.

A problem is posed on each number of ranks in space that may pay, its steps and transposed steps of one state and of
blocks are timed with all ranks at work (:mod:`pint_fem.scaling.grid_choice.measurement`), and the grid with the least
predicted time of the functional and its gradient (:mod:`pint_fem.scaling.grid_choice.shapes`) is returned on all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from pint_fem.collective import require_same
from pint_fem.errors import InputError
from pint_fem.progress import waiting
from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.grid_choice.measurement import Measurement, in_few_words
from pint_fem.scaling.grid_choice.shapes import grid_text
from pint_fem.spacetime import SpaceTime

__all__ = ["BUDGET", "GridChoice", "choose_grid", "measured_costs"]

BUDGET = 20.0
"""Default seconds of all measurements."""


@dataclass(frozen=True)
class GridChoice:
    """A process grid and why it was chosen.

    Attributes
    ----------
    shape : tuple of int
        Numbers of ranks in space and in time, and of groups of experiments.
    seconds : dict
        Predicted seconds of the functional and its gradient by grid, from fast to slow; empty where nothing was
        predicted.
    left_out : tuple of str
        Grids that were not predicted, with the reasons.
    why : str
        One line on the choice.
    """

    shape: tuple[int, int, int]
    seconds: Mapping[tuple[int, int, int], float]
    left_out: tuple[str, ...]
    why: str

    @property
    def grid(self) -> str:
        """The grid as :class:`~pint_fem.spacetime.SpaceTime` and ``--grid`` take it, such as ``"2x4"``."""
        return grid_text(self.shape)


def choose_grid(
    pose: Callable[[SpaceTime], Any],
    *,
    comm: MPI.Comm = MPI.COMM_WORLD,
    experiments: int = 1,
    solver_parameters: Mapping | None = None,
    budget: float = BUDGET,
) -> GridChoice:
    """Choose the process grid of all ranks with the least predicted time of a functional and its gradient, by steps
    that are measured here (collective).

    Parameters
    ----------
    pose
        ``pose(spacetime)`` poses one experiment on ``spacetime.space_comm`` and returns an
        :class:`~pint_fem.evolution.evolution.Evolution`, or an object with one as ``evolution`` (a reduced functional)
        or several as ``evolutions``. It is called for the largest number of ranks in space, and for each measured one.
    comm
        All ranks of the grid.
    experiments
        Number of experiments of which the functional is the sum.
    solver_parameters
        ``time_solver``, ``typical_rtol``, ``mgrit`` and ``paradiag`` as for the functional.
    budget
        Seconds after which no further measurement begins, > 0. One that has begun is not interrupted.

    Returns
    -------
    GridChoice
        The same on all ranks. Where a measurement fails it is the grid of all ranks in time, with the reason.

    Raises
    ------
    InputError
        On every rank, if an argument is out of range or differs between ranks.

    Notes
    -----
    Time solver and cycles on each grid are those that ``time_solver="auto"`` would use, by
    :mod:`pint_fem.theory`; seconds are predicted by the solver's own code on virtual ranks (:mod:`pint_fem.scaling`).
    """
    require_same(comm, experiments=experiments, budget=budget, given=dict(solver_parameters or {}))
    if not callable(pose):
        raise InputError(f"pose {pose!r}: give a function of a SpaceTime that returns an Evolution")
    if isinstance(experiments, bool) or not isinstance(experiments, int) or experiments < 1:
        raise InputError(f"experiments {experiments!r}: give a whole number, at least 1")
    if not 0 < budget < float("inf"):
        raise InputError(f"budget {budget!r}: give a positive number of seconds")
    if comm.size == 1:
        return GridChoice((1, 1, 1), {}, (), "grid auto: 1x1, as there is one rank")
    start = time.perf_counter()
    try:
        with waiting("grid auto: measuring steps on the grids that may pay"):
            run = Measurement(pose, comm, experiments, dict(solver_parameters or {}), budget)
            found = run.choice()
    except Exception as error:  # on all ranks; posing the problem itself reports what is wrong with it
        reason = comm.bcast(in_few_words(error))
        shape = (1, comm.size, 1)
        why = f"grid auto: {grid_text(shape)}, all ranks in time, as nothing is predicted: {reason}"
        return GridChoice(shape, {}, (), why)
    took = comm.bcast(time.perf_counter() - start)
    return comm.bcast(_with_line(found, took, run))


def _with_line(found: tuple[dict, tuple[str, ...]], took: float, run: Measurement) -> GridChoice:
    """The choice, with one line that names the alternatives."""
    seconds, left_out = found
    ranked = dict(sorted(seconds.items(), key=lambda item: item[1]))
    shape = next(iter(ranked))
    without = f"; left out: {'; '.join(left_out)}" if left_out else ""
    if math.isnan(ranked[shape]):
        return GridChoice(shape, {}, left_out, f"grid auto: {grid_text(shape)}, the only one that may pay{without}")
    others = ", ".join(f"{grid_text(s)} {t:.3g} s" for s, t in ranked.items() if s != shape)
    axes = "space x time" + " x experiments" * (run.experiments > 1)
    line = (
        f"grid auto: {grid_text(shape)} ({axes}), predicted {ranked[shape]:.3g} s for the functional and its gradient "
        f"from steps measured here (in {took:.1f} s)"
    )
    line += f"; {others}" if others else ""
    return GridChoice(shape, ranked, left_out, line + without)


def measured_costs(
    pose: Callable[[SpaceTime], Any],
    *,
    comm: MPI.Comm = MPI.COMM_WORLD,
    solver_parameters: Mapping | None = None,
    budget: float = BUDGET,
) -> Calibration:
    """Measure the steps of a problem on the ranks of this run, for predictions on more ranks by
    :func:`~pint_fem.scaling.planner.plan` (collective).

    Cycles are those of the a-priori estimates, and the work around the sweeps is left out: a calibration by
    ``pint-fem scaling calibrate`` is more accurate and takes minutes.

    Parameters
    ----------
    pose, comm, solver_parameters, budget
        As for :func:`choose_grid`.

    Raises
    ------
    InputError, SolverFailure, RuntimeError
        On every rank, if the problem cannot be posed or no step be measured.
    """
    require_same(comm, budget=budget, given=dict(solver_parameters or {}))
    return Measurement(pose, comm, 1, dict(solver_parameters or {}), budget).costs_here()
