r"""Memory that evaluations of a functional take on a rank, computed by a formula before a run.

With :math:`n` bytes per state on this rank, :math:`k` own steps and :math:`c` stored points (:math:`c = k + 1`, or
:math:`k/m + 1` with ``storage="C"``), evaluations of a linear evolution take

=====================  =================================================================================================
state, adjoint         :math:`c\,n` each, and as much again for each further cached evaluation
right-hand side        :math:`c\,n` of the adjoint; as much of the state where forcing is not the same in all steps
sweep                  :math:`c\,n` of the tangent, then of the second-order adjoint
coarse levels          :math:`(4 k_l + 2)\,n` for each coarse level of :math:`k_l \approx k/(m_0 \dots m_{l-1})` steps
                       and each solver: two (state and tangent share one), three for a nonlinear evolution
intervals              with ``storage="C"``: at most :math:`3 m w\,n` for ``w`` intervals that are recomputed at a time
data                   states of data that depend on time: loads (one per stage and step), linear parts of misfits
linearisation          of a nonlinear evolution :math:`8 s + 5` states for each cached step: own steps of all levels,
                       with ``storage="C"`` those of coarse levels and of one interval
batch                  for each further direction of Hessian actions on several: a sweep and a right-hand side of
                       :math:`c\,n` each, coarse levels of two solvers, half of a linearisation for each cached step;
                       freed afterwards (:func:`bytes_per_direction`)
model                  for the symmetric model of the Hessian (inexact minimisation): a slab and its coarse levels
kernels                factors and copies of matrices for the kernels, and the work memory that they share
PETSc                  vectors, matrices, and factors as PETSc counts or estimates them
=====================  =================================================================================================

The vectors of a Krylov method (``krylov=``), of Firedrake's functions and compiled code are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pint_fem.collective import collectively
from pint_fem.kernels.direct import added
from pint_fem.misfits.base import BLOCK, BlockMisfit, Misfit
from pint_fem.sweeps.steps import set_precision

if TYPE_CHECKING:
    from pint_fem.adjoint.problem import ReducedProblem

__all__ = ["MemoryEstimate", "bytes_per_direction", "estimate_memory"]


class MemoryEstimate(NamedTuple):
    """Bytes on this rank.

    Attributes
    ----------
    kept : dict
        Arrays that stay from one evaluation to the next, by part.
    passing : dict
        For each evaluation (``"value"``, ``"gradient"``, ``"hessian"``) the further arrays at its peak, by part.
    petsc : dict
        Memory that PETSc allocates, by part.
    """

    kept: dict[str, int]
    passing: dict[str, dict[str, int]]
    petsc: dict[str, int]

    def arrays(self, evaluation: str = "hessian") -> int:
        """Return the bytes of arrays at the peak of an evaluation."""
        return sum(self.kept.values()) + sum(self.passing[evaluation].values())

    def peak(self, evaluation: str = "hessian") -> int:
        """Return the bytes of arrays and in PETSc at the peak of an evaluation."""
        return self.arrays(evaluation) + sum(self.petsc.values())

    @classmethod
    def combined(cls, estimates: Sequence[MemoryEstimate]) -> MemoryEstimate:
        """Return the estimate of several problems of which one at a time is at its peak."""
        largest = lambda name: max((m.passing[name] for m in estimates), key=lambda parts: sum(parts.values()))
        passing = {name: largest(name) for name in estimates[0].passing}
        return cls(added(*(m.kept for m in estimates)), passing, added(*(m.petsc for m in estimates)))

    def __str__(self) -> str:
        text = lambda parts: ", ".join(f"{name} {size / 2**20:.3g}" for name, size in parts.items() if size)
        lines = [f"memory of a rank in MB: {text(self.kept)}; PETSc: {text(self.petsc)}"]
        for name, parts in self.passing.items():
            lines.append(
                f"  peak of a {name} {self.peak(name) / 2**20:.3g}" + (f" (with {text(parts)})" if parts else "")
            )
        return "\n".join(lines)


def estimate_memory(problem: ReducedProblem) -> MemoryEstimate:
    """Return the memory that evaluations of a problem take on this rank, before or after a run (collective).

    Parameters
    ----------
    problem
        That of one evolution.
    """
    sweeps, ev, slab = problem.sweeps, problem.sweeps.evolution, problem.sweeps.slab
    solvers, levels = sweeps.solvers, sweeps.solvers.adjoint.levels
    n, intervals = 8 * ev.state_size, sweeps.intervals
    for solver in solvers:
        set_precision(solver, {}, accelerated=solvers.accelerated)  # kernels in single precision are counted if used
    own, _ = sweeps.stored
    rows, second = own.stop - own.start, not sweeps.is_affine
    observed = [m for m in problem.misfits if isinstance(m, BlockMisfit)]
    layout, evaluations = problem.layout.size * 8, len(problem.evaluations)
    kept = {name: evaluations * rows * n for name in ("state", "adjoint")}
    kept["coarse levels"] = sum(_coarse(solver, n) for solver in solvers)
    if solvers.has_transposed_adjoint:
        kept["model"] = solvers.transposed_adjoint.rows * n + _coarse(solvers.transposed_adjoint.solver, n)
    data, of_misfits = collectively(problem.spacetime.comm, "memory", _of_misfits, problem.misfits)
    kept["data"] = data + sum(p.data_nbytes(k) for p, k, _ in solvers.cached_steps)
    linearised = sum(p.linearisation_nbytes() * count for p, _, count in solvers.cached_steps)
    kept["linearisation"] = linearised + (rows * n + layout if linearised else 0)
    kept["controls"] = 3 * evaluations * layout
    kept["intervals"] = 0 if intervals is None else _recomputed(intervals, observed, n)
    # what an evaluation allocates and frees
    few, moves = BLOCK * n, ev.per_step or ev.depends_on_time
    sources = rows * n
    forcing = (rows if intervals is not None else slab.k) * n if moves and sweeps.is_linear else n
    if sweeps.is_linear and moves:
        forcing += sum(level.k for level in levels[1:]) * n
    guess = 0 if intervals is not None or len(levels) == 1 else 2 * (levels[1].k + 1) * n
    stepwise = slab.k * ev.control_size * 8 if ev.per_step else 0
    direct = 0 if intervals is None else stepwise  # the controls' part of a condensed right-hand side
    kept["controls"] += evaluations * direct
    blocks = 3 * few if intervals is None else 6 * intervals.width * n
    passing = {
        "value": {"right-hand side": forcing, "blocks": blocks},
        "gradient": {"right-hand side": sources + guess, "blocks": blocks, "controls": 2 * (stepwise + direct)},
    }
    several = sources if intervals is None and len(problem.misfits) > 1 else 0
    if second and intervals is None:
        several = 3 * sources
    along = forcing if ev.per_step or (sweeps.is_linear and ev.controls_move) else n
    passing["hessian"] = {
        "sweep": sources,
        "right-hand side": max(sources + max(several, guess), along),
        "blocks": blocks,
        "controls": (3 if second else 2) * stepwise + 2 * (direct + layout),
    }
    petsc = added(*(p.operator_nbytes(count) for p, _, count in solvers.cached_steps), *of_misfits)
    kept["kernels"] = petsc.pop("kernels", 0) + max(p.work_nbytes(k) for p, k, _ in solvers.cached_steps)
    return MemoryEstimate(kept, passing, {part: petsc.get(part, 0) for part in ("vectors", "matrices", "factors")})


def bytes_per_direction(problem: ReducedProblem, estimate: MemoryEstimate) -> int:
    """Return the bytes of this rank for one direction of a batch of Hessian actions (collective): what an action
    allocates, the coarse levels of its two sweeps, and the results that linearised steps cache.

    Parameters
    ----------
    problem, estimate
        The problem of one evolution and the memory of its evaluations.
    """
    solvers, n = problem.sweeps.solvers, 8 * problem.sweeps.evolution.state_size
    arrays = sum(size for name, size in estimate.passing["hessian"].items() if name != "blocks")
    coarse = sum(_coarse(solver, n) for solver in list(solvers)[-2:])
    linearised = sum(p.linearisation_nbytes() * count for p, _, count in solvers.cached_steps)
    return arrays + coarse + linearised // 2


def _of_misfits(misfits: Sequence[Misfit]) -> tuple[int, list[dict[str, int]]]:
    """Bytes of arrays of all misfits, and of each one's matrices by part."""
    return sum(m.nbytes() for m in misfits), [m.operator_nbytes() for m in misfits]


def _coarse(solver, n: int) -> int:
    """Bytes of a solver's work arrays: its coarse levels, and relaxation of the finest level."""
    solver.prepare((n // 8,))
    finest, coarse = solver.memory_estimate(n)
    return finest - solver.local_rows * n + coarse


def _recomputed(intervals, misfits: Sequence[BlockMisfit], n: int) -> int:
    """Bytes of the work arrays for intervals that are recomputed from their C-points."""
    inside = np.arange(intervals.slab.k + 1) % intervals.m != 0
    linear = intervals.propagator.is_linear
    observed = not linear or any((m.observed & inside).any() for m in misfits)
    forced = not linear or any((m.state_dependent & inside).any() for m in misfits)
    arrays = intervals.m * (observed + forced + (not linear)) + 2
    affine = intervals.count if linear and intervals.evolution.depends_on_time else 1
    return (arrays * intervals.width + affine * linear) * n
