r"""The time solver and the options of MGRIT with the least predicted time, from measured times of a step.

The time of a step of ``W`` states is measured on the fine propagator (those of coarse levels have factors of the same
size), the numbers of cycles are those of :mod:`~pint_fem.theory.model_residuals`, and
:mod:`~pint_fem.theory.costs` predicts the time of a solve to the tolerance ``typical_rtol`` of most solves. Unless it
is given, the time of a candidate is the mean of those to ``rtol`` and to its square root.

Where the mesh is one of a ``MeshHierarchy``, the coarse level may be on the next coarser mesh. There is no a-priori
estimate of that: what the coarser mesh does not represent is damped by C-relaxation only
(:mod:`~pint_fem.propagators.spatial`). So the best candidate's cycles are counted in an adjoint sweep of few intervals
from an impulse at all points, with measured times of a step on both meshes; unless it would not pay even if coarse
steps took no time and cycles were as many as on one mesh.

Times are measured once in a process for each size of a problem; those of the first rank decide on all of them, rounded,
so that two runs differ only where a choice hardly matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from firedrake.mg.utils import get_level
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.collective import any_rank, collectively
from pint_fem.errors import InputError, SolverFailure
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import Repeated
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.propagators import make_propagator
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.mesh_transfers import mesh_transfer
from pint_fem.propagators.spatial import coarse_evolution
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.steps import LinearStep
from pint_fem.theory.costs import CLEARLY, TwoLevel, fastest, mgrit_seconds, rounded, sequential_seconds
from pint_fem.theory.estimates import paradiag_contraction
from pint_fem.theory.model_residuals import ModelResiduals
from pint_fem.theory.spectrum import spectrum

__all__ = [
    "Automatic",
    "MadePropagator",
    "OnCoarserMesh",
    "automatic",
    "candidates",
    "measured_seconds",
    "on_coarser_mesh",
    "share_measured_seconds",
]

CANONICAL = (TwoLevel(16, 2, "F"), TwoLevel(32, 2, "F"))
"""Options that are preferred where no other ones are clearly faster."""
PARADIAG, LEAST = 10.0, 1.6
"""Time of an iteration of ParaDiag for each step over that of a step in the best block, about, and the least one over
that of a single step; ranks share it.
"""
SINGLE = 6e-8
"""Round-off of single precision, which ``alpha`` enlarges."""
MOST_CYCLES, INTERVALS = 12, 32
"""Cycles of a candidate, and intervals in which those with a coarser mesh are counted, at most."""
_SECONDS: dict[tuple, dict[int, float]] = {}


@dataclass
class Automatic:
    """A time solver, chosen by predicted times.

    Attributes
    ----------
    kind : str
        ``"mgrit"``, ``"paradiag"`` or ``"serial"``.
    mgrit : MGRITOptions
        With the levels, coarsening, relaxation and steps of the coarse level of ``"mgrit"``.
    why : str
        The reason in one line.
    meshes : int
        Number of meshes by which the coarse level is coarser.
    """

    kind: str
    mgrit: MGRITOptions
    why: str
    meshes: int = 0


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


class MadePropagator:
    """``propagator(evolution, stride=, tableau=)`` that returns a propagator that has been made before, once, and
    otherwise makes one.

    Parameters
    ----------
    made
        A step of the finest level, or ``None``.
    """

    def __init__(self, made: FEPropagator | None = None):
        self.made = made

    def __call__(self, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None) -> FEPropagator:
        """The propagator of a level."""
        made = self.made
        if made is not None and stride == 1 and evolution is made.evolution and tableau in (None, made.tableau):
            self.made = None
            return made
        return make_propagator(evolution, stride=stride, tableau=tableau)


def candidates(steps: int, ranks: int) -> list[TwoLevel]:
    """Options of MGRIT whose intervals are equal and at least as many as ranks and four.

    Parameters
    ----------
    steps, ranks
        Numbers of time steps and of ranks in time.
    """
    factors = [m for m in (4, 8, 16, 32, 64, 128) if steps % m == 0 and steps // m >= max(4, ranks)]
    return [TwoLevel(m, s, relax) for m in factors for s in (1, 2, 3, 4) for relax in ("F", "FCF") if s < m]


def measured_seconds(evolution: Evolution, spacetime: SpaceTime, propagator: MadePropagator) -> dict[int, float] | None:
    """Seconds of a step by the number of states, relative to one state and rounded; ``None`` where steps are not taken
    on lanes (collective).

    Parameters
    ----------
    evolution, spacetime
        The problem and the process grid.
    propagator
        Takes the step that is made for the measurement.
    """
    key = str(evolution.V.ufl_element()), evolution.V.dim(), repr(evolution.tableau), evolution.fields is None
    key = (*key, len(evolution.bcs), spacetime.space_size, spacetime.time_size)
    if any_rank(spacetime.comm, key not in _SECONDS):  # some ranks may have been in another grid of this size
        propagator.made = collectively(spacetime.comm, "propagator", make_propagator, evolution)
        try:
            seconds = collectively(spacetime.comm, "measured steps", propagator.made.lane_seconds)
        except SolverFailure:  # the operators are not defined for the controls' first values
            seconds = None
        found = spacetime.comm.bcast(None if seconds is None else rounded(seconds))
        if found is None:
            return None
        _SECONDS[key] = found
    return _SECONDS[key]


def share_measured_seconds(evolution: Evolution, spacetime: SpaceTime) -> None:
    """Measure the steps of an evolution, and use the times of the first group of experiments in all groups, which then
    make the same choice for evolutions of this size (collective over all ranks).
    """
    if evolution.linear_operators() is not None:
        measured_seconds(evolution, spacetime.group, MadePropagator())
        _SECONDS.update(spacetime.experiments_comm.bcast(_SECONDS))


def automatic(
    evolution: Evolution,
    spacetime: SpaceTime,
    mgrit: MGRITOptions,
    paradiag: ParaDiagOptions,
    coarse_tableau: ButcherTableau | None,
    propagator: MadePropagator,
    typical_rtol: float | None = None,
) -> Automatic | None:
    """The fastest time solver by predicted times, the same on all ranks; ``None`` where nothing is predicted: for
    evolutions that are not linear with constant operators, steps that are not taken on lanes, and numbers of steps
    without equal intervals (collective).

    Parameters
    ----------
    evolution, spacetime
        The problem and the process grid.
    mgrit, paradiag
        Options for stopping, and ParaDiag's ``alpha``.
    coarse_tableau
        Integrator of the coarse levels; default: the evolution's.
    propagator
        Takes the step that is made for the measurement.
    typical_rtol
        Relative tolerance of most solves; ``None``: between ``rtol`` and its square root.
    """
    if evolution.affine_parts is None or not candidates(evolution.nsteps, spacetime.time_size):
        return None
    found = spectrum(evolution)
    if found is None or (seconds := measured_seconds(evolution, spacetime, propagator)) is None:
        return None
    rtol = mgrit.rtol if 0 < mgrit.rtol < 1 else 1e-8
    tolerances = [rtol, math.sqrt(rtol)] if typical_rtol is None else [max(typical_rtol, rtol)]
    ranks, residuals = spacetime.time_size, ModelResiduals(found, evolution, coarse_tableau)
    times = mgrit_ratios(seconds, evolution.nsteps, ranks, residuals, tolerances)
    rate = paradiag_contraction(evolution, paradiag.alpha)
    rate = None if rate is None else max(rate, paradiag.alpha, SINGLE / paradiag.alpha)
    others = paradiag_ratio(seconds, rate, ranks, tolerances)
    best = spacetime.comm.bcast(min([1.0, others, *times.values()]))
    coarser = on_coarser_mesh(evolution, spacetime, seconds, residuals, tolerances, best)
    return spacetime.comm.bcast(_decide(times, others, mgrit, coarser))


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
        ratios = [(_ratio(seconds, steps, ranks, o, k, cost), o.m, o.coarse_steps, o) for o, k in few.items()]
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
    ratio = _ratio(seconds, steps, ranks, options, counted, cost)
    if not ratio < CLEARLY * best:
        return OnCoarserMesh(why=f"on a coarser mesh {ratio:.2g}, {counted[0]:.0f} cycles to {tolerances[0]:g}")
    return OnCoarserMesh(options, ratio)


def _ratio(
    seconds: Mapping[int, float], steps: int, ranks: int, options: TwoLevel, cycles: Sequence[float], cost: float
) -> float:
    """Mean time of solves in given numbers of cycles over that of sequential stepping."""
    each = [mgrit_seconds(seconds, steps, ranks, options, int(k), coarse_cost=cost) for k in cycles]
    return sum(each) / len(each) / sequential_seconds(seconds, steps)


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


def mgrit_ratios(
    seconds: Mapping[int, float], steps: int, ranks: int, residuals: ModelResiduals, tolerances: Sequence[float]
) -> dict[TwoLevel, float]:
    """Predicted times of MGRIT over that of sequential stepping, means of solves to some tolerances; without candidates
    that take too many cycles.
    """
    ratios = {}
    for options in candidates(steps, ranks):
        cycles = residuals.cycles(options.m, options.coarse_steps, options.relax, tolerances, MOST_CYCLES)
        if all(map(math.isfinite, cycles)):
            ratios[options] = _ratio(seconds, steps, ranks, options, cycles, 1.0)
    return ratios


def paradiag_ratio(seconds: Mapping[int, float], rate: float | None, ranks: int, tolerances: Sequence[float]) -> float:
    """Predicted time of ParaDiag over that of sequential stepping, the mean of solves to some tolerances, where an
    iteration contracts by ``rate``; infinite where it hardly does.
    """
    if rate is None or not rate < 0.5:
        return math.inf
    iterations = [max(1, math.ceil(math.log(tol) / math.log(rate) * (1 - 1e-12))) for tol in tolerances]
    block = min(t / w for w, t in seconds.items()) / seconds[1]
    return max(PARADIAG * block, LEAST) / ranks * sum(iterations) / len(iterations)


def _decide(times: Mapping[TwoLevel, float], paradiag: float, mgrit: MGRITOptions, coarser: OnCoarserMesh) -> Automatic:
    """The choice between MGRIT, ParaDiag and sequential stepping, given times relative to the last one."""
    best = fastest(times, CANONICAL) if times else None
    ratio = math.inf if best is None else times[best]
    if coarser.options is not None:
        best, ratio = coarser.options, coarser.ratio
    remark = f"; {coarser.why}" if coarser.why else ""
    said = lambda kind, what, ratio: (
        f"time_solver auto: {kind}, {what}: by measured times of a step a solve takes about {ratio:.2g} of sequential "
        f"stepping{remark}"
    )
    if best is not None and ratio < CLEARLY and not paradiag < CLEARLY * ratio:
        options = MGRITOptions.make(
            mgrit, levels=2, coarsening=best.m, relax=best.relax, coarse_steps=best.coarse_steps
        )
        where = ", the coarse level on the next coarser mesh" if coarser.options is not None else ""
        what = f"m = {best.m}, {best.relax}-relaxation, {best.coarse_steps} coarse steps an interval{where}"
        return Automatic("mgrit", options, said("mgrit", what, ratio), meshes=int(coarser.options is not None))
    if paradiag < CLEARLY:
        return Automatic("paradiag", mgrit, said("paradiag", "for all steps at once", paradiag))
    least = min(ratio, paradiag)
    why = f"MGRIT or ParaDiag take {least:.2g} of its time" if math.isfinite(least) else "no other solver converges"
    return Automatic("serial", mgrit, f"time_solver auto: serial, sequential stepping is fastest: {why}{remark}")
