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
from collections.abc import Mapping
from dataclasses import dataclass

from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.collective import any_rank, collectively
from pint_fem.errors import SolverFailure
from pint_fem.evolution.evolution import Evolution
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.progress import waiting
from pint_fem.propagators import make_propagator
from pint_fem.propagators.base import FEPropagator
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.predictions.coarser_mesh import OnCoarserMesh, on_coarser_mesh
from pint_fem.sweeps.predictions.ratios import candidates, mgrit_ratios, paradiag_rate, paradiag_ratio
from pint_fem.theory.costs import CLEARLY, TwoLevel, fastest, rounded
from pint_fem.theory.model_residuals import ModelResiduals
from pint_fem.theory.spectrum import spectrum

__all__ = ["Automatic", "MadePropagator", "automatic", "decide", "measured_seconds", "share_measured_seconds"]

CANONICAL = (TwoLevel(16, 2, "F"), TwoLevel(32, 2, "F"))
"""Options that are preferred where no other ones are clearly faster."""
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
        with waiting("compiling and factorising a step"):
            propagator.made = collectively(spacetime.comm, "propagator", make_propagator, evolution)
        try:
            with waiting("time_solver auto: measuring the seconds of a step"):
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
    rate = paradiag_rate(evolution, paradiag.alpha)
    others = paradiag_ratio(seconds, rate, ranks, tolerances)
    best = spacetime.comm.bcast(min([1.0, others, *times.values()]))
    coarser = on_coarser_mesh(evolution, spacetime, seconds, residuals, tolerances, best)
    return spacetime.comm.bcast(decide(times, others, mgrit, coarser))


def decide(
    times: Mapping[TwoLevel, float], paradiag: float, mgrit: MGRITOptions, coarser: OnCoarserMesh | None = None
) -> Automatic:
    """The choice between MGRIT, ParaDiag and sequential stepping.

    Parameters
    ----------
    times, paradiag
        Predicted times of MGRIT by its options, and of ParaDiag, over that of sequential stepping.
    mgrit
        Options for stopping.
    coarser
        MGRIT with its coarse level on a coarser mesh; default: there is none.
    """
    coarser = OnCoarserMesh() if coarser is None else coarser
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
