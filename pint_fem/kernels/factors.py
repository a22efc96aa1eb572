r"""Solves with the Jacobians of many stages, by as few factorisations as pay, within a memory budget.

A factorisation costs as much as some dozens of solves. A stage whose Jacobian :math:`J` has changed is first solved
with an earlier factor :math:`P`, by GMRES on :math:`P^{-1} J x = P^{-1} b` to round-off: :math:`P^{-1} J` is the
identity and something small and smooth, so this is faster than refinement, :math:`x \leftarrow x + P^{-1} (b - J x)`.
The stage is factored again once that has cost about as much as a factorisation, or where many solves are certain to
come (time-parallel sweeps). So a gradient by sequential stepping, with one solve for each stage, needs no
factorisation, and the cost is at most twice that of the best choice in hindsight (the rent-or-buy rule). The choice
follows from earlier solves of the step only, never from other steps, so results are bitwise identical however steps are
distributed (as long as the budget lasts). Stages that exceed the budget are factored again whenever another one was
factored in between.

Up to :data:`SMALL` unknowns on one rank the default is PETSc's own LU with nested dissection, which is faster there
than UMFPACK. As it does not pivot, each of its factors is tested on one right-hand side, and a matrix for which that
fails is factored by UMFPACK. For larger systems UMFPACK's dense kernels are faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from mpi4py import MPI
from petsctools import flatten_parameters

from pint_fem.errors import SolverFailure, is_numerical
from pint_fem.kernels.direct import completed, factor_bytes, with_finite_entries
from pint_fem.kernels.nullspace import Nullspace
from pint_fem.kernels.regularity import is_singular, singular_message
from pint_fem.kernels.updatable_factor import UpdatableFactor, diagonal

__all__ = ["FACTOR_MEMORY", "QUICK", "StageFactors"]

FACTOR_MEMORY = 1 << 30
"""Default bytes of factors that a level stores on a rank."""
MOST_ITERATIONS = 24
"""Iterations with an earlier factor before a stage is factored, which cost about as much as a factorisation."""
ROUND_OFF = 1e-14
"""Reduction of the preconditioned residual by GMRES."""
SMALL = {1: 12_000, 2: 12_000, 3: 3_000}
"""Unknowns up to which factors are PETSc's own, by the dimension of the mesh."""
QUICK = {
    "ksp_type": "preonly",
    "pc_type": "lu",
    "pc_factor_mat_solver_type": "petsc",
    "pc_factor_mat_ordering_type": "nd",
}
"""PETSc options of its own factors."""
SIMILAR = 1e4
"""Largest ratio of entries on the diagonals of a matrix and of one that preconditions it."""
SOLVED = 1e-10
"""Largest true residual of a solve with an earlier factor, relative to the terms that it is the difference of."""
_MAX = PETSc.NormType.NORM_INFINITY


class StageFactors:
    """The factors of the stages of one level.

    A stage is an object with the attributes of :class:`~pint_fem.propagators.linearisation.StageLinearisation`.

    Parameters
    ----------
    parameters
        PETSc options of the solvers, which replace default ones.
    space
        Function space of the unknowns.
    memory
        Bytes of factors that are stored on a rank.
    counts
        Counter of every ``"factorisation"`` and ``"solve"``.
    nullspace
        Nullspace of all matrices, or ``None``.
    prefix
        Prefix of options in PETSc's database.
    reproducible
        Whether results on several ranks in space have to be the same bits in each run.

    Attributes
    ----------
    parameters : dict
        The completed PETSc options.
    stored : int
        Number of stages with a solver of their own.
    bytes : int or None
        Bytes of one factor, the largest over the ranks in space; ``None`` before the first factorisation.
    refines : bool
        Whether solves may be by GMRES with an earlier factor, which pays where solvers are direct.
    """

    def __init__(
        self,
        parameters: Mapping,
        space: WithGeometry,
        memory: int,
        counts: Counter,
        nullspace: Nullspace | None = None,
        prefix: str = "pint_form_",
        reproducible: bool = False,
    ):
        self._space, self._nullspace, self._tried, self._prefix = space, nullspace, False, prefix
        comm = space.mesh().comm
        self.parameters = completed(parameters, comm, space.dim(), reproducible=reproducible)
        chosen = any(name.startswith(("ksp_", "pc_", "mat_")) for name in flatten_parameters(parameters))
        small = space.dim() <= SMALL[space.mesh().unique().topological_dimension]
        self._quick = QUICK if comm.size == 1 and not chosen and small else None
        self.memory, self.counts = memory, counts
        self.stored, self.bytes = 0, None
        self.refines = self.parameters.get("ksp_type") == "preonly"
        self._spare: dict[int, UpdatableFactor] = {}
        self._constant: dict[float, UpdatableFactor] = {}
        self._refinement: _Refinement | None = None

    # -- factors of stages ---------------------------------------------------------------------------------------------
    def nearby(self, stage: Any) -> UpdatableFactor | None:
        """A stored solver of a nearby Jacobian of the same step: the stage's own one or that of an earlier stage."""
        if stage.constant:
            return self._constant.get(stage.h)
        solver = stage.earlier.solver if stage.solver is None and stage.earlier is not None else stage.solver
        return None if solver is None or solver.version is None else solver

    def exact(self, stage: Any) -> UpdatableFactor | None:
        """The solver whose matrix is the stage's present Jacobian, or ``None``."""
        if stage.constant:
            return self._constant.get(stage.h)
        solver = stage.solver or self._spare.get(stage.index)
        return solver if solver is not None and solver.version is stage.version else None

    def factor(self, stage: Any, matrix: PETSc.Mat, version: object) -> UpdatableFactor:
        """Factor a Jacobian, identified by ``version``, in the stage's own solver, a new one within the budget, or a
        common one (collective over space).

        Raises
        ------
        SolverFailure
            If the matrix is not finite or singular.
        """
        solver = stage.solver or self._spare.get(stage.index)
        if stage.constant:
            solver = self._constant[stage.h] = self._new()
        elif (
            stage.solver is None and stage.may_keep and (self.bytes is None or self.stored < self.memory // self.bytes)
        ):
            solver = stage.solver = self._new()
            self.stored += 1
        elif solver is None:
            solver = self._spare[stage.index] = self._new()
        self.counts["factorisation"] += 1
        self._factor(solver, matrix, version)
        if self.bytes is None:
            self.bytes = self._bytes_of(solver)
            if solver is stage.solver and self.bytes > self.memory:
                self._spare[stage.index], stage.solver = solver, None
                self.stored -= 1
        return solver

    def drop(self, stage: Any) -> None:
        """Discard the factors of a stage whose solve has failed."""
        stage.correction = None
        for solver in (stage.solver, self._spare.get(stage.index)):
            if solver is not None:
                solver.version = None

    def _new(self) -> UpdatableFactor:
        return UpdatableFactor(self.parameters, self._quick, self._nullspace, self._prefix)

    def _factor(self, solver: UpdatableFactor, matrix: PETSc.Mat, version: object) -> None:
        """Factor; report the first matrix if it is singular, and later ones where the factorisation fails."""
        try:
            solver.factor(matrix, version)
        except PETSc.Error as error:
            if not is_numerical(error):
                raise
            raise SolverFailure(f"{singular_message(matrix, self._space)} ({error})") from error
        if not self._tried and self.refines and is_singular(solver.ksp.getOperators()[1], solver.ksp.solve):
            solver.version = None
            raise SolverFailure(singular_message(matrix, self._space))
        self._tried = True

    def _bytes_of(self, solver: UpdatableFactor) -> int:
        """The largest number of bytes of a solver's factor on any rank (collective over space)."""
        own = factor_bytes(solver.ksp, self.parameters)
        return max(1, solver.matrix.comm.tompi4py().allreduce(own, op=MPI.MAX))

    def measure(self, matrix: PETSc.Mat) -> None:
        """Measure the bytes of a factor of a matrix with the nonzero pattern of the others (collective over space)."""
        solver, like = UpdatableFactor(self.parameters, self._quick, prefix=self._prefix), with_finite_entries(matrix)
        solver.factor(like if self._nullspace is None else self._nullspace.pinned(like), None)
        self.bytes = self._bytes_of(solver)
        solver.destroy()
        if like is not matrix:
            like.destroy()

    # -- solves --------------------------------------------------------------------------------------------------------
    def solve(self, stage: Any, b: PETSc.Vec, x: PETSc.Vec, *, transposed: bool = False) -> None:
        """Solve ``J x = b`` with a stage's Jacobian, or with its transpose (collective over space).

        Raises
        ------
        SolverFailure, PETSc.Error
            If the matrix cannot be factored.
        """
        solver = self.exact(stage)
        if solver is None:
            if self._refine(stage, b, x, transposed):
                return
            solver = self.factor(stage, stage.J, stage.version)
        self.counts["solve"] += 1
        solver.solve(b, x, transposed=transposed)

    def _refine(self, stage: Any, b, x, transposed: bool) -> bool:
        """Solve with a factor of another matrix; whether the residual is round-off."""
        solver = self.nearby(stage)
        most = MOST_ITERATIONS - stage.iterations if stage.may_refine and self.refines else 0
        if solver is None or stage.expected > most or not self._is_near(solver, stage.J):
            return False
        if self._refinement is None:
            self._refinement = _Refinement(b.comm)
        count, converged = self._refinement.solve(solver, stage.J, b, x, transposed=transposed, most=most)
        self.counts["solve"] += 1 + count
        stage.iterations += count
        converged = converged and self._is_solved(stage.J, b, x, transposed)
        stage.expected = max(1, count) if converged else MOST_ITERATIONS + 1  # not again in this linearisation
        return converged

    @staticmethod
    def _is_near(solver: UpdatableFactor, matrix: PETSc.Mat) -> bool:
        """Whether the diagonals of a solver's matrix and another one are similar: GMRES does not reduce the residual in
        rows where the preconditioner's matrix has huge entries.
        """
        a, b = solver.diagonal, diagonal(matrix)
        return _largest(matrix, float(np.any(a > SIMILAR * b) or np.any(b > SIMILAR * a))) == 0

    @staticmethod
    def _is_solved(matrix: PETSc.Mat, b: PETSc.Vec, x: PETSc.Vec, transposed: bool) -> bool:
        """Whether the true residual is small relative to the terms that it is the difference of."""
        r = b.duplicate()
        (matrix.multTranspose if transposed else matrix.mult)(x, r)
        r.axpy(-1.0, b)
        bound = SOLVED * (diagonal(matrix) * x.norm(_MAX) + b.norm(_MAX))
        solved = _largest(matrix, float(np.any(~(np.abs(r.array_r) <= bound)))) == 0
        r.destroy()
        return solved


def _largest(matrix: PETSc.Mat, value: float) -> float:
    """The largest of the values on all ranks of a matrix (collective)."""
    comm = matrix.comm.tompi4py()
    return value if comm.size == 1 else comm.allreduce(value, op=MPI.MAX)


class _Refinement:
    """GMRES preconditioned by a factor of another matrix.

    The preconditioner is a Python context, not the factor's ``PC``: with a nullspace the factor is that of a pinned
    matrix, whose solves are between projections.
    """

    def __init__(self, comm: PETSc.Comm):
        self.ksp = PETSc.KSP().create(comm)
        self.ksp.setType(PETSc.KSP.Type.GMRES)
        self.ksp.setGMRESRestart(MOST_ITERATIONS)
        pc = self.ksp.getPC()
        pc.setType(PETSc.PC.Type.PYTHON)
        # a separate object: PETSc owns its contexts, so that one with a reference to this object would never be freed
        self._context = _Apply()
        pc.setPythonContext(self._context)

    def solve(self, solver, matrix, b, x, *, transposed: bool, most: int) -> tuple[int, bool]:
        """Solve; the number of iterations, and whether GMRES has converged."""
        self._context.solver = solver
        self.ksp.setOperators(matrix)
        self.ksp.setTolerances(rtol=ROUND_OFF, atol=0.0, max_it=most)
        (self.ksp.solveTranspose if transposed else self.ksp.solve)(b, x)
        return self.ksp.getIterationNumber(), self.ksp.getConvergedReason() > 0


class _Apply:
    """Context of a Python preconditioner that applies a factor."""

    def __init__(self) -> None:
        self.solver: UpdatableFactor | None = None

    def apply(self, pc, x, y):
        """Apply the factor."""
        self.solver.solve(x, y)

    def applyTranspose(self, pc, x, y):
        """Apply the transposed factor."""
        self.solver.solve(x, y, transposed=True)
