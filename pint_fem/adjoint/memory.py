r"""Memory of a rank, by a formula that is known before a run.

With :math:`n` bytes a state on this rank, :math:`k` own steps and :math:`c` stored points (:math:`c = k + 1`, or
:math:`k/m + 1` with ``storage="C"``), evaluations of a linear evolution take

=====================  =================================================================================================
state, adjoint         :math:`c\,n` each, and as much again for each further control that is remembered
right-hand side        :math:`c\,n` of the adjoint; as much of the state where forcing is not the same in all steps
sweep                  :math:`c\,n` of the tangent, then of the second-order adjoint
coarse levels          :math:`(4 k_l + 2)\,n` for each coarse level of :math:`k_l \approx k/(m_0 \dots m_{l-1})` steps
                       and each solver: two (state and tangent share one), three for a nonlinear evolution
windows                with ``storage="C"``: :math:`3 m w\,n` at most, of ``w`` intervals computed again together
data                   states that data depending on time take: loads (one a stage and step), linear parts of misfits
linearisation          of a nonlinear evolution :math:`8 s + 5` states for each step remembered: own ones of all levels,
                       with ``storage="C"`` those of coarse levels and of one interval
model                  once a model of the Hessian is made (inexact minimisation): a slab, and its coarse levels
PETSc                  blocks of ``WIDTH`` states, matrices, factors as PETSc counts or estimates them
=====================  =================================================================================================

A Krylov method's own vectors (``krylov=``), Firedrake's functions and compiled code are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pint_fem.collective import collectively
from pint_fem.misfits.base import BLOCK, BlockMisfit

__all__ = ["Memory", "memory"]


class Memory(NamedTuple):
    """Bytes on this rank.

    Attributes
    ----------
    kept : dict
        Arrays that stay from one evaluation to the next, by part.
    passing : dict
        By evaluation (``"value"``, ``"gradient"``, ``"hessian"``): arrays that are there at its peak besides.
    petsc : dict
        What is in PETSc's hands, by part.
    """

    kept: dict[str, int]
    passing: dict[str, dict[str, int]]
    petsc: dict[str, int]

    def arrays(self, evaluation: str = "hessian") -> int:
        """Bytes of arrays at the peak of an evaluation."""
        return sum(self.kept.values()) + sum(self.passing[evaluation].values())

    def peak(self, evaluation: str = "hessian") -> int:
        """Bytes at the peak of an evaluation."""
        return self.arrays(evaluation) + sum(self.petsc.values())

    def __str__(self):
        text = lambda parts: ", ".join(f"{name} {size / 2**20:.3g}" for name, size in parts.items() if size)
        lines = [f"memory of a rank in MB: {text(self.kept)}; PETSc: {text(self.petsc)}"]
        for name, parts in self.passing.items():
            lines.append(
                f"  peak of a {name} {self.peak(name) / 2**20:.3g}" + (f" (with {text(parts)})" if parts else "")
            )
        return "\n".join(lines)


def memory(problem) -> Memory:
    """Of a :class:`~pint_fem.adjoint.problem.ReducedProblem`, before or after a run; collective."""
    sweeps, ev, slab = problem.sweeps, problem.sweeps.evolution, problem.sweeps.slab
    n, intervals = 8 * ev.state_size, sweeps.intervals
    own, _ = sweeps.stored
    rows, second = own.stop - own.start, not sweeps.is_linear
    observed = [m for m in problem.misfits if isinstance(m, BlockMisfit)]
    layout = problem.layout.size * 8
    kept = {name: len(problem.points) * rows * n for name in ("state", "adjoint")}
    kept["coarse levels"] = sum(_coarse(solver, n) for solver in sweeps.solvers)
    if sweeps.has_model:
        kept["model"] = sweeps.transposed_adjoint.rows * n + _coarse(sweeps.transposed_adjoint.solver, n)
    data, of_misfits = collectively(problem.spacetime.comm, "memory", _of_misfits, problem.misfits)
    kept["data"] = data + sum(p.kept_bytes(k) for p, k, _ in sweeps.steps_kept)
    linearised = sum(p.memory_bytes() * count for p, _, count in sweeps.steps_kept)
    kept["linearisation"] = linearised + (rows * n + layout if linearised else 0)
    kept["controls"] = 3 * len(problem.points) * layout
    kept["windows"] = 0 if intervals is None else _windows(intervals, observed, n)
    # what comes and goes
    few, moves = BLOCK * n, ev.per_step or ev.depends_on_time
    sources = rows * n
    forcing = (rows if intervals is not None else slab.k) * n if moves and sweeps.is_linear else n
    if sweeps.is_linear and moves:
        forcing += sum(level.k for level in sweeps.levels[1:]) * n
    guess = 0 if intervals is not None or len(sweeps.levels) == 1 else 2 * (sweeps.levels[1].k + 1) * n
    stepwise = slab.k * ev.control_size * 8 if ev.per_step else 0
    direct = 0 if intervals is None else stepwise  # what comes with a condensed right-hand side
    kept["controls"] += len(problem.points) * direct
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
    held = [p.petsc_bytes(count) for p, _, count in sweeps.steps_kept] + of_misfits
    petsc = {part: sum(h.get(part, 0) for h in held) for part in ("blocks", "matrices", "factors")}
    return Memory(kept, passing, petsc)


def _of_misfits(misfits) -> tuple[int, list[dict[str, int]]]:
    """Bytes that misfits keep, and what they have in PETSc's hands."""
    return sum(m.nbytes() for m in misfits), [m.petsc_bytes() for m in misfits]


def _coarse(solver, n: int) -> int:
    """Work arrays of a solver: coarse levels, and what relaxation of the finest takes."""
    solver.prepare((n // 8,))
    finest, coarse = solver.memory_estimate(n)
    return finest - solver.local_rows * n + coarse


def _windows(intervals, misfits, n: int) -> int:
    """Work arrays of windows."""
    inside = np.arange(intervals.slab.k + 1) % intervals.m != 0
    linear = intervals.propagator.is_linear
    observed = not linear or any((m.observes & inside).any() for m in misfits)
    forced = not linear or any((m.forces & inside).any() for m in misfits)
    arrays = intervals.m * (observed + forced + (not linear)) + 2
    affine = intervals.count if linear and intervals.evolution.depends_on_time else 1
    return (arrays * intervals.width + affine * linear) * n
