r"""Solves with the Jacobians of many stages, by as few factorisations as pay, within a memory budget.

A factorisation costs as much as some dozens of solves. A stage whose Jacobian :math:`J` has moved is first solved with
the factor :math:`P` that is there, by GMRES on :math:`P^{-1} J x = P^{-1} b` to round-off: :math:`P^{-1} J` is the
identity and something small and smooth, so this is faster than refinement, :math:`x \leftarrow x + P^{-1} (b - J x)`.
The stage is factored anew once that has cost about as much as a factorisation, or many solves are sure to come
(time-parallel sweeps). So a gradient by sequential stepping, one solve a stage, gets by without a factorisation,
and no past is regretted by more than a factor of two (the rent-or-buy rule). What is done follows from the step's own
past only, never from other steps', so bits do not depend on how steps are shared out (as long as the budget lasts).

A factor takes about 12 bytes for each of its nonzeros; UMFPACK's were measured at 9.4 bytes for each nonzero of PETSc's
own factor with nested dissection: 1.9 MB for 4,225 unknowns of P1, 7 to 8 MB for 8,450 of vector P1 or P2 (the matrix
itself: 0.3 to 2.3 MB). Stages that the budget has no room for are factored again whenever another one was between.

Up to :data:`SMALL` unknowns on one rank, PETSc's own LU with nested dissection is used unless told otherwise: with
8,450 unknowns of vector P1 in the plane a factorisation takes 29 ms and a solve 0.4 (transposed 1.3), UMFPACK's 42 and
2.7. As it does not pivot, each of its factors is tried on one right-hand side, and UMFPACK takes over for a matrix
where that fails. Beyond, UMFPACK's dense kernels pay: 116 ms against 480 with 40,000 unknowns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI
from petsctools import OptionsManager, flatten_parameters

from pint_fem.errors import SolverFailure, is_numerical
from pint_fem.kernels.direct import completed, factor_bytes, require_finite, trial_residual, with_finite_entries
from pint_fem.kernels.nullspace import Nullspace
from pint_fem.kernels.regularity import is_singular, singular_message

__all__ = ["FACTOR_MEMORY", "QUICK", "Factors", "Solver"]

FACTOR_MEMORY = 1 << 30
"""Bytes of factors that a level keeps on a rank, unless told otherwise."""
PATIENCE = 24
"""Iterations with an old factor before a stage is factored: a factorisation costs 20 to 40 of them (1,000 to 8,450
unknowns)."""
ROUND_OFF = 1e-14
"""Reduction of the preconditioned residual."""
SMALL = {1: 12_000, 2: 12_000, 3: 3_000}
"""Unknowns up to which factors are PETSc's own, by the mesh's dimension."""
ACCURATE = 1e-13
"""Largest residual of a solve for ones with a factor as good as a pivoted one, relative to the matrix's norm."""
QUICK = {
    "ksp_type": "preonly",
    "pc_type": "lu",
    "pc_factor_mat_solver_type": "petsc",
    "pc_factor_mat_ordering_type": "nd",
}
"""Options of these."""
ALIKE = 1e4
"""Largest ratio of entries on the diagonals of a matrix and of one that preconditions it."""
SOLVED = 1e-10
"""Largest true residual of a solve with an old factor, relative to what it is the difference of."""
_MAX = PETSc.NormType.NORM_INFINITY


class Solver:
    """A matrix of its own and PETSc's solver for it.

    Parameters
    ----------
    parameters
        PETSc options.
    quick
        Those of a solver that is tried first, and used for a matrix where its residuals are at round-off.
    nullspace
        Of the matrix.
    prefix
        Prefix of options in PETSc's database.

    Attributes
    ----------
    holds : object
        What the matrix was taken from.
    diagonal : ndarray or None
        Magnitudes of the matrix's diagonal.
    """

    def __init__(
        self,
        parameters: Mapping,
        quick: Mapping | None = None,
        nullspace: Nullspace | None = None,
        prefix: str = "pint_form_",
    ):
        self._nullspace, self._direct = nullspace, parameters.get("ksp_type") == "preonly"
        self._options = [OptionsManager(p, prefix) for p in (quick, parameters) if p is not None]
        self._made: list[PETSc.KSP | None] = [None] * len(self._options)
        self.matrix: PETSc.Mat | None = None
        self._pinned: PETSc.Mat | None = None
        self._source: PETSc.Vec | None = None
        self.ksp: PETSc.KSP | None = None
        self.holds: object = None
        self.diagonal: np.ndarray | None = None

    def factor(self, matrix: PETSc.Mat, holds: object) -> None:
        """Take a copy of the matrix and set up the solver; structure found before is used again.

        Raises
        ------
        SolverFailure
            If the matrix is not finite: some packages never return from its factorisation.
        """
        self.holds = None
        require_finite(matrix, "the Jacobian of a stage")
        if self.matrix is None:
            self.matrix = matrix.copy()
        else:
            matrix.copy(self.matrix, structure=PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
        if self._nullspace is not None:
            self._make_regular()
        if len(self._options) == 1 or not self._is_accurate():
            self.ksp = self._set_up(-1)
        self.diagonal, self.holds = diagonal(matrix), holds

    def _make_regular(self) -> None:
        """Pin the matrix of a direct solver, and one for the preconditioner of an iterative one."""
        self._nullspace.check(self.matrix)
        self._source = self._source or self.matrix.createVecRight()
        if self._direct:
            self._nullspace.pin(self.matrix)
            return
        if self._pinned is not None:
            self._pinned.destroy()
        self._nullspace.attach(self.matrix)
        self._pinned = self._nullspace.pinned(self.matrix)

    def _set_up(self, which: int) -> PETSc.KSP:
        options, ksp = self._options[which], self._made[which]
        if ksp is None:
            ksp = self._made[which] = PETSc.KSP().create(self.matrix.comm)
            options.set_from_options(ksp)
            ksp.setErrorIfNotConverged(True)
        ksp.setOperators(self.matrix, self._pinned or self.matrix)
        with options.inserted_options():
            ksp.setUp()
        return ksp

    def _is_accurate(self) -> bool:
        """Set up the quick solver: whether it solves for ones."""
        x, b = self.matrix.createVecs()
        x.set(1)
        self.matrix.mult(x, b)
        try:
            self.ksp = self._set_up(0)
            residual = trial_residual(self.ksp, b, x)
        except PETSc.Error as error:  # a pivot is zero
            if not is_numerical(error):
                raise
            return False
        return residual <= ACCURATE * self.matrix.norm(_MAX)

    def solve(self, b: PETSc.Vec, x: PETSc.Vec, *, transposed: bool = False) -> None:
        """One vector."""
        solve = self.ksp.solveTranspose if transposed else self.ksp.solve
        if self._nullspace is None:
            solve(b, x)
            return
        b.copy(self._source)
        self._nullspace.project_source(self._source.array, transposed=transposed)
        solve(self._source, x)
        self._nullspace.project_solution(x.array, transposed=transposed)

    def destroy(self) -> None:
        """Give back PETSc's memory (collective)."""
        for thing in (*self._made, self.matrix, self._pinned, self._source):
            if thing is not None:
                thing.destroy()
        self._made = [None] * len(self._made)
        self.ksp = self.matrix = self.holds = self._pinned = self._source = None


class Factors:
    """Solvers of the stages of a level.

    Parameters
    ----------
    parameters
        PETSc options of the solvers, over those that are used by default.
    space
        Function space of the unknowns.
    memory
        Bytes of factors kept on a rank.
    counts
        ``"factorisation"`` and ``"solve"`` are counted.
    nullspace
        Of all matrices.
    prefix
        Prefix of options in PETSc's database.

    Attributes
    ----------
    kept : int
        Solvers that stages have for themselves.
    bytes : int or None
        Of one of them, the greatest over the ranks in space; known after the first factorisation.
    """

    def __init__(
        self,
        parameters: Mapping,
        space,
        memory: int,
        counts: Counter,
        nullspace: Nullspace | None = None,
        prefix: str = "pint_form_",
    ):
        self._space, self._nullspace, self._tried, self._prefix = space, nullspace, False, prefix
        comm = space.mesh().comm
        self.parameters = completed(parameters, comm, space.dim())
        chosen = any(name.startswith(("ksp_", "pc_", "mat_")) for name in flatten_parameters(parameters))
        small = space.dim() <= SMALL[space.mesh().unique().topological_dimension]
        self._quick = QUICK if comm.size == 1 and not chosen and small else None
        self.memory, self.counts = memory, counts
        self.kept, self.bytes = 0, None
        # refinement by an iterative solver would cost more than setting it up
        self.refines = self.parameters.get("ksp_type") == "preonly"
        self._spare: dict[int, Solver] = {}
        self._constant: dict[float, Solver] = {}
        self._old: _OldFactor | None = None

    # -- who has a factor ----------------------------------------------------------------------------------------------
    def nearby(self, stage) -> Solver | None:
        """A solver of a nearby Jacobian of the same step, that stays: the stage's own one or an earlier stage's."""
        if stage.constant:
            return self._constant.get(stage.h)
        solver = stage.lender.solver if stage.solver is None and stage.lender is not None else stage.solver
        return None if solver is None or solver.holds is None else solver

    def exact(self, stage) -> Solver | None:
        """The solver that holds the stage's Jacobian as it is."""
        if stage.constant:
            return self._constant.get(stage.h)
        solver = stage.solver or self._spare.get(stage.index)
        return solver if solver is not None and solver.holds is stage.token else None

    def factor(self, stage, matrix: PETSc.Mat, holds: object) -> Solver:
        """Factor a matrix for a stage: in its own solver, in a new one if there is room, else in one for all."""
        solver = stage.solver or self._spare.get(stage.index)
        if stage.constant:
            solver = self._constant[stage.h] = self._new()
        elif stage.solver is None and stage.may_keep and (self.bytes is None or self.kept < self.memory // self.bytes):
            solver = stage.solver = self._new()
            self.kept += 1
        elif solver is None:
            solver = self._spare[stage.index] = self._new()
        self.counts["factorisation"] += 1
        self._factor(solver, matrix, holds)
        if self.bytes is None:
            self.bytes = self._bytes_of(solver)
            if solver is stage.solver and self.bytes > self.memory:
                self._spare[stage.index], stage.solver = solver, None
                self.kept -= 1
        return solver

    def drop(self, stage) -> None:
        """Leave a stage without a factor of its own: its solve has failed."""
        stage.remainder = None
        for solver in (stage.solver, self._spare.get(stage.index)):
            if solver is not None:
                solver.holds = None

    def _new(self) -> Solver:
        return Solver(self.parameters, self._quick, self._nullspace, self._prefix)

    def _factor(self, solver: Solver, matrix: PETSc.Mat, holds: object) -> None:
        """Factor, and name a singular matrix: the first one is tried, later ones where the factorisation fails."""
        try:
            solver.factor(matrix, holds)
        except PETSc.Error as error:
            if not is_numerical(error):
                raise
            raise SolverFailure(f"{singular_message(matrix, self._space)} ({error})") from error
        if not self._tried and self.refines and is_singular(solver.ksp):
            solver.holds = None
            raise SolverFailure(singular_message(matrix, self._space))
        self._tried = True

    def _bytes_of(self, solver: Solver) -> int:
        """The most that a solver's factor takes on any rank (collective over space)."""
        own = factor_bytes(solver.ksp, self.parameters)
        return max(1, solver.matrix.comm.tompi4py().allreduce(own, op=MPI.MAX))

    def measure(self, matrix: PETSc.Mat) -> None:
        """Find out what a factor takes, from a matrix with the entries of the others (collective over space)."""
        solver, like = Solver(self.parameters, self._quick, prefix=self._prefix), with_finite_entries(matrix)
        solver.factor(like if self._nullspace is None else self._nullspace.pinned(like), None)
        self.bytes = self._bytes_of(solver)
        solver.destroy()
        if like is not matrix:
            like.destroy()

    # -- solves --------------------------------------------------------------------------------------------------------
    def solve(self, stage, b: PETSc.Vec, x: PETSc.Vec, *, transposed: bool = False) -> None:
        """``x = J^{-1} b`` for the stage's Jacobian, or with its transpose."""
        solver = self.exact(stage)
        if solver is None:
            if self._refine(stage, b, x, transposed):
                return
            solver = self.factor(stage, stage.J, stage.token)
        self.counts["solve"] += 1
        solver.solve(b, x, transposed=transposed)

    def _refine(self, stage, b, x, transposed: bool) -> bool:
        """Solve with a factor of another matrix; whether that reached round-off."""
        solver = self.nearby(stage)
        left = PATIENCE - stage.spent if stage.may_refine and self.refines else 0
        if solver is None or stage.needed > left or not self._is_near(solver, stage.J):
            return False
        if self._old is None:
            self._old = _OldFactor(b.comm)
        count, converged = self._old.solve(solver, stage.J, b, x, transposed=transposed, most=left)
        self.counts["solve"] += 1 + count
        stage.spent += count
        converged = converged and self._is_solved(stage.J, b, x, transposed)
        stage.needed = max(1, count) if converged else PATIENCE + 1  # not again in this linearisation
        return converged

    @staticmethod
    def _is_near(solver: Solver, matrix: PETSc.Mat) -> bool:
        """Whether the diagonals of a solver's matrix and another one are alike: GMRES preconditioned by a matrix with
        huge entries in some rows does not see the residual of these.
        """
        a, b = solver.diagonal, diagonal(matrix)
        return _largest(matrix, float(np.any(a > ALIKE * b) or np.any(b > ALIKE * a))) == 0

    @staticmethod
    def _is_solved(matrix: PETSc.Mat, b: PETSc.Vec, x: PETSc.Vec, transposed: bool) -> bool:
        """Whether the true residual is small beside what it is the difference of."""
        r = b.duplicate()
        (matrix.multTranspose if transposed else matrix.mult)(x, r)
        r.axpy(-1.0, b)
        bound = SOLVED * (diagonal(matrix) * x.norm(_MAX) + b.norm(_MAX))
        solved = _largest(matrix, float(np.any(~(np.abs(r.array_r) <= bound)))) == 0
        r.destroy()
        return solved


def diagonal(matrix: PETSc.Mat) -> np.ndarray:
    """Magnitudes of the own entries of a matrix's diagonal."""
    vector = matrix.createVecLeft()
    matrix.getDiagonal(vector)
    out = np.abs(vector.array_r)
    vector.destroy()
    return out


def _largest(matrix: PETSc.Mat, value: float) -> float:
    """Of the values of all ranks of a matrix (collective)."""
    comm = matrix.comm.tompi4py()
    return value if comm.size == 1 else comm.allreduce(value, op=MPI.MAX)


class _OldFactor:
    """GMRES preconditioned by a solver of another matrix."""

    def __init__(self, comm):
        self.ksp = PETSc.KSP().create(comm)
        self.ksp.setType(PETSc.KSP.Type.GMRES)
        self.ksp.setGMRESRestart(PATIENCE)
        pc = self.ksp.getPC()
        pc.setType(PETSc.PC.Type.PYTHON)
        # an object of its own: PETSc's objects hold on to their contexts, so one that led back here would never die
        self._context = _Apply()
        pc.setPythonContext(self._context)

    def solve(self, solver, matrix, b, x, *, transposed: bool, most: int) -> tuple[int, bool]:
        """Iterations, and whether they were enough."""
        self._context.solver = solver
        self.ksp.setOperators(matrix)
        self.ksp.setTolerances(rtol=ROUND_OFF, atol=0.0, max_it=most)
        (self.ksp.solveTranspose if transposed else self.ksp.solve)(b, x)
        return self.ksp.getIterationNumber(), self.ksp.getConvergedReason() > 0


class _Apply:
    """Context of a Python preconditioner that applies a solver."""

    def __init__(self):
        self.solver: Solver | None = None

    def apply(self, pc, x, y):
        """PETSc's PCApply."""
        self.solver.solve(x, y)

    def applyTranspose(self, pc, x, y):
        """PETSc's PCApplyTranspose."""
        self.solver.solve(x, y, transposed=True)
