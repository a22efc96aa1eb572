"""MGRIT whose coarse level is on the next coarser mesh of a hierarchy: its predicted time.

There is no a-priori estimate of its convergence: what the coarser mesh does not represent is damped by C-relaxation
only (:mod:`~pint_fem.propagators.spatial`). So cycles are counted in an adjoint sweep of few intervals from an impulse
at all points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from firedrake.mg.utils import get_level
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.collective import collectively
from pint_fem.errors import InputError, SolverFailure
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import Repeated
from pint_fem.mgrit.solver import MGRIT
from pint_fem.propagators import make_propagator
from pint_fem.propagators.mesh_transfers import mesh_transfer
from pint_fem.propagators.spatial import coarse_evolution
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.predictions.ratios import MOST_CYCLES, candidates, mean_ratio
from pint_fem.sweeps.steps import LinearStep
from pint_fem.theory.costs import CLEARLY, TwoLevel
from pint_fem.theory.model_residuals import ModelResiduals

__all__ = ["OnCoarserMesh", "on_coarser_mesh"]

INTERVALS = 32
"""Intervals in which cycles are counted, at most."""


@dataclass(frozen=True)
class OnCoarserMesh:
    """MGRIT whose coarse level is on the next coarser mesh.

    Attributes
    ----------
    options : TwoLevel or None
        Its best options; ``None`` where there is no coarser mesh, or none that pays.
    ratio : float
        Its predicted time over that of sequential stepping.
    why : str
        Why it is not chosen, for the line on the choice.
    """

    options: TwoLevel | None = None
    ratio: float = math.inf
    why: str = ""


def on_coarser_mesh(
    evolution: Evolution,
    spacetime: SpaceTime,
    seconds: Mapping[int, float],
    residuals: ModelResiduals,
    tolerances: Sequence[float],
    best: float,
) -> OnCoarserMesh:
    """The predicted time of MGRIT with its coarse level on the next coarser mesh (collective).

    Parameters
    ----------
    evolution, spacetime
        The problem and the process grid.
    seconds
        Times of a step on the fine mesh by the number of states.
    residuals, tolerances
        Predicted residuals of MGRIT on one mesh, and the tolerances of solves.
    best
        Least ratio of all other choices, the same on all ranks.
    """
    hierarchy, level = get_level(evolution.V.mesh().unique())
    if hierarchy is None or level < 1:
        return OnCoarserMesh()
    steps, ranks = evolution.nsteps, spacetime.time_size
    damped = [options for options in candidates(steps, ranks) if options.c_relaxations]
    few = {o: residuals.cycles(o.m, o.coarse_steps, o.relax, tolerances, MOST_CYCLES) for o in damped}
    few = spacetime.comm.bcast({o: cycles for o, cycles in few.items() if all(map(math.isfinite, cycles))})

    def least(cost: float) -> tuple[float, TwoLevel | None]:
        ratios = [(mean_ratio(seconds, steps, ranks, o, k, cost), o.m, o.coarse_steps, o) for o, k in few.items()]
        ratio, *_, options = min(ratios, default=(math.inf, None))
        return ratio, options

    if not (bound := least(0.0)[0]) < CLEARLY * best:
        return OnCoarserMesh(why=f"a coarser mesh could not bring it below {bound:.2g}")
    try:
        cost, made = collectively(spacetime.comm, "coarser mesh", _coarser_steps, evolution, spacetime)
        ratio, options = least(cost)
        if not ratio < CLEARLY * best:
            return OnCoarserMesh(why=f"with a coarser mesh {ratio:.2g} at best")
        counted = _counted_cycles(made, options, spacetime, residuals.coarse_tableau, tolerances)
    except (InputError, SolverFailure) as error:
        return OnCoarserMesh(why=f"no coarser mesh, as {error}")
    if not all(map(math.isfinite, counted)):
        return OnCoarserMesh(why=f"on a coarser mesh more than {MOST_CYCLES} cycles")
    ratio = mean_ratio(seconds, steps, ranks, options, counted, cost)
    if not ratio < CLEARLY * best:
        return OnCoarserMesh(why=f"on a coarser mesh {ratio:.2g}, {counted[0]:.0f} cycles to {tolerances[0]:g}")
    return OnCoarserMesh(options, ratio)


def _coarser_steps(evolution: Evolution, spacetime: SpaceTime) -> tuple[float, tuple]:
    """Time of a step on the next coarser mesh over that on the evolution's; both evolutions and the transfer between
    them.
    """
    coarse = coarse_evolution(evolution)
    transfer = mesh_transfer(evolution.V, coarse.V, evolution.bcs, coarse.bcs)
    times = [make_propagator(ev).lane_seconds() for ev in (evolution, coarse)]
    times = [None if t is None else t[1] for t in times]
    fine, cheap = spacetime.comm.bcast(times)
    if fine is None or cheap is None:
        raise InputError("times of a step on it are not known")
    return 2 ** (round(4 * math.log2(cheap / fine)) / 4), (evolution, coarse, transfer)


def _counted_cycles(
    made: tuple, options: TwoLevel, spacetime: SpaceTime, tableau: ButcherTableau | None, tolerances: Sequence[float]
) -> list[float]:
    """Cycles that an adjoint sweep of few intervals takes to each tolerance; infinite for too many."""
    evolution, coarse, transfer = made
    own = tableau or coarse.tableau
    own = Repeated(own, options.coarse_steps) if options.coarse_steps > 1 else own
    propagators = [make_propagator(evolution), make_propagator(coarse, stride=options.m, tableau=own)]
    steps = options.m * min(evolution.nsteps // options.m, INTERVALS)
    given = dict(levels=2, coarsening=options.m, relax=options.relax, rtol=min(tolerances), max_it=MOST_CYCLES)
    solver = MGRIT(
        [LinearStep(propagator, transposed=True) for propagator in propagators], steps,
        options=given | {"check": "cycle", "start": "nested"}, transfers=[transfer.transposed], linear=True,
        point_norms=spacetime.point_norms, everyone=spacetime.comm,
    )  # fmt: skip
    U = np.zeros((steps + 1, evolution.state_size))
    U[0] = np.random.default_rng(spacetime.space_comm.rank).standard_normal(evolution.state_size)
    result = solver.solve(U)
    relative = np.array(result.residuals) / result.scale
    below = [np.flatnonzero(relative <= tolerance) for tolerance in tolerances]
    return spacetime.comm.bcast([float(found[0]) if len(found) else math.inf for found in below])
