r"""Simplified Newton for the stages: iterations with a cached factor of a nearby Jacobian.

.. math::  U \leftarrow U - P^{-1} F(U), \qquad \theta_k = \|\Delta_k\| / \|\Delta_{k-1}\|

for increments :math:`\Delta_k`, until the error :math:`\theta/(1 - \theta)\, \|\Delta\|` that remains is round-off
(Hairer and Wanner, Solving Ordinary Differential Equations II, section IV.8). The Jacobian is assembled and factored at
the current iterate where there is no factor yet, and again where the iterations that are left at the present rate
would cost more than that.

The result is a function of the stage's data: base value :math:`W`, control and time. A stage equation may have several
roots; the one that counts is that to which Newton's method leads from :math:`W`, as it does in a plain Firedrake loop.
Every solve therefore starts at :math:`W`, and what earlier solves have left saves iterations only:

* the factor :math:`P` of an earlier Jacobian;
* the *remainder* :math:`D = U - (W - P^{-1} F(W))` that the first iterate had in the stage's last solve: it hardly
  changes with the data, and is added to the first iterate.

What is found with an earlier factor is accepted if

* the true residual has fallen: :math:`\|F(U)\| \le 10^{-8} \|F(W)\|`, or is round-off beside the diagonal of the
  Jacobian at ``U``, which is assembled for that where ``U`` hardly differs from ``W``. A factor of a Jacobian with
  huge or infinite entries makes :math:`P^{-1} F` vanish, but not :math:`F`;
* :math:`\max |W - P^{-1} F(W) - U| \le \max |W - U| / 2`: the iteration contracts from ``W`` towards ``U``, so Newton's
  method leads there, too.

Else the solve is repeated from :math:`W` with Jacobians of these data alone, by Newton's method as long as
simplified iterations contract slowly. Where that does not converge, PETSc's Newton iterates from :math:`W`, and raises.
A solve that fails leaves no factor behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from firedrake import NonlinearVariationalProblem, NonlinearVariationalSolver, TrialFunction, derivative
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives

from pint_fem.errors import SolverFailure, is_numerical
from pint_fem.kernels.arrays import get, put
from pint_fem.kernels.direct import require_finite
from pint_fem.kernels.factors import Factors, Solver
from pint_fem.propagators.linearisation import Remainder
from pint_fem.propagators.stage import StageForms

__all__ = ["NEWTON", "StageNewton"]

NEWTON = {
    "snes_rtol": 1e-13,
    "snes_atol": 1e-50,
    "snes_stol": 1e-10,
    "snes_max_it": 25,
    "snes_linesearch_type": "basic",
}
"""Newton to round-off, as derivatives are those of the exact stage equations: after a last step of relative size
1e-10 the error is its square.
"""
ROUND_OFF = 1e-14
"""Relative error that may remain."""
QUADRATIC = 1e-10
"""Relative size of a step of Newton's own method that leaves round-off behind it."""
SLOW, FLOOR = 0.3, 1e-12
"""Increments that are no smaller than this relative to the last, and than this relative to the solution, are round-off
of the residual."""
HINT = 0.01
"""A rate that was not measured by increments is trusted to be no better than this."""
PATIENCE = 15
"""Iterations left that a new factor is worth."""
ITERATIONS = 50
REDUCED = 1e-8
"""Residual relative to that of the base value from which on a factor is not doubted."""
CONTRACTION = 0.5
"""Largest contraction of the first iteration, from the base value to the root, with a factor of other data."""
NEIGHBOURHOOD = 0.1
"""How far root and base value may move, relative to the distance between them, before a solve begins at the base value
again."""
NEAR = 1e-8
"""Relative distance from the base value within which a root is the base value's own."""


class StageNewton:
    """Solves stages.

    Parameters
    ----------
    forms
        The stage's forms; its values are set by the caller.
    factors
        Where factors come from.
    parameters
        PETSc options of the linear solves; with ``snes_`` options among them, PETSc's Newton is used throughout.
    """

    def __init__(self, forms: StageForms, factors: Factors, parameters: Mapping):
        self.forms, self.factors = forms, factors
        self._by_snes = any(name.startswith("snes_") for name in parameters)
        self._parameters = {**({"snes_type": "ksponly"} if forms.linear else NEWTON), **parameters}
        self._snes: NonlinearVariationalSolver | None = None
        with forms.U.dat.vec_ro as vec:
            self._base, self._r, self._x = vec.duplicate(), vec.duplicate(), vec.duplicate()

    def solve(self, stage, W: np.ndarray, t: float, sweep: object = None) -> np.ndarray:
        """``U`` of a stage from its base value ``W``, in the step from ``t``.

        Parameters
        ----------
        sweep
            Stands for a solve of all steps with one control, or ``None``.

        Raises
        ------
        SolverFailure, firedrake.exceptions.ConvergenceError, PETSc.Error
            If it cannot be found.
        """
        forms, factors = self.forms, self.factors
        forms.counts["newton"] += 1
        put(forms.W, W)
        start = W.copy()
        start[forms.bc_rows] = forms.boundary(t, stage.index)
        self._project(start)
        if self._by_snes:
            return self._by_petsc(start)
        try:
            U = None
            if sweep is not None and stage.sweep is sweep:
                U = self._attempt(self._continued, stage, W, start)
            if U is None:
                U, stage.moved = self._from_base(stage, W, start), 0.0
        except Exception:
            factors.drop(stage)
            raise
        stage.sweep = sweep
        return U

    @staticmethod
    def _attempt(solve, *args) -> np.ndarray | None:
        """What a solve that may fail returns; ``None`` after a numerical failure."""
        try:
            return solve(*args)
        except Exception as error:
            if not is_numerical(error):
                raise
            return None

    def _continued(self, stage, W: np.ndarray, start: np.ndarray) -> np.ndarray | None:
        """From the root that was found for this control, moved along with ``W``, if neither moves far."""
        solver = self.factors.nearby(stage)
        moved, length = self._largest(W - stage.W, stage.U - stage.W)
        if solver is None or stage.moved + 2 * moved > NEIGHBOURHOOD * length:
            return None
        guess = self._moved_along(stage, W, start)
        self.forms.residual(guess, self._base)
        if self._base.norm() == 0:
            return guess
        U = self._iterate(stage, guess, solver, rate=stage.rate)
        if U is None:
            return None
        *moves, length = self._largest(U - stage.U, W - stage.W, U - start)
        stage.moved += sum(moves)
        return U if stage.moved <= NEIGHBOURHOOD * length else None

    def _moved_along(self, stage, W: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The root of the last solve, moved along with ``W``."""
        guess = stage.U + (W - stage.W)
        guess[self.forms.bc_rows] = start[self.forms.bc_rows]
        return self._project(guess)

    def _project(self, U: np.ndarray) -> np.ndarray:
        """Take a nullspace's part out of values, in place."""
        nullspace = self.forms.evolution.nullspace
        return U if nullspace is None else nullspace.project_solution(U)

    def _from_base(self, stage, W: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The root to which Newton's method leads from the base value."""
        self.forms.residual(start, self._base)
        norm, solver = self._base.norm(), self.factors.nearby(stage)
        if norm == 0:
            return start
        if not math.isfinite(norm):
            raise SolverFailure("the residual of a stage is not finite at the state that the stage starts from")
        U = None
        if solver is not None:
            U = self._attempt(self._iterate, stage, start, solver, W, norm)
        if U is None:
            U = self._iterate(stage, start, None)
        if U is None:
            self.factors.drop(stage)
            U = self._by_petsc(start)
        return U

    def _iterate(
        self, stage, start: np.ndarray, solver: Solver | None, W=None, base: float | None = None, rate=None
    ) -> np.ndarray | None:
        """Iterate from a start, whose residual is there.

        Parameters
        ----------
        solver
            The first factor; ``None``: of the Jacobian at the start.
        W, base
            Of a factor of other data: the base value, and the norm of its residual, by which it is judged.
        rate
            That of an earlier solve with this factor for the same control.

        Returns
        -------
        ndarray or None
            ``None`` if that does not converge, or to what may be another root.
        """
        forms, factors, r, x = self.forms, self.factors, self._r, self._x
        doubted = None if stage.constant or base is None else solver
        U, first, old, floor = start.copy(), None, None, self._norm(start)
        rate = None if rate is None else max(rate, HINT)
        self._base.copy(r)
        put(forms.U, U)
        norm = base
        for k in range(ITERATIONS):
            fresh = stage.constant
            if solver is None:  # of the Jacobian at U
                solver = factors.factor(stage, forms.J.assemble(), object())
                fresh, first, rate, old = True, None, None, None
            factors.counts["solve"] += 1
            solver.solve(r, x)
            size = x.norm()
            if not math.isfinite(size):
                return None
            if old is not None:
                rate = stage.rate = size / old
                if not fresh and rate > SLOW and size > FLOOR * max(self._norm(U), floor):
                    if solver is doubted:
                        return None
                    solver = None
                    continue
            U -= x.array_r
            old = size
            if k == 0:
                first = U.copy()
                if base is not None and not fresh and self._jumped(stage, W, start, first, solver, size, U):
                    old = None
            elif rate is None and first is not None:
                moved, left = self._largest(U - start, first - U)
                rate = max(left / moved, HINT) if moved else None
            scale = self._norm(U)
            done = size == 0 or (fresh and (forms.linear or size <= QUADRATIC * scale))
            if rate is not None and not done:
                done = rate < 1 and rate / (1 - rate) * size <= ROUND_OFF * scale
                done = done or (rate > SLOW and size <= FLOOR * max(scale, floor))
            if done:
                if solver is doubted and norm > REDUCED * base and not self._is_small(U, base):
                    return None
                return self._accepted(stage, start, U, first, solver, base)
            if rate is not None and self._iterations(rate, size, max(scale, floor)) > PATIENCE:
                solver = None
            forms.residual(U, r)
            norm = r.norm()
            if not math.isfinite(norm) or (base is not None and norm > base):
                return None
        return None

    def _jumped(self, stage, W, start, first, solver, size: float, U: np.ndarray) -> bool:
        """Take ``U`` from the first iterate to where earlier solves suggest the root, in place; whether that was done.

        ``size``: of the first increment.
        """
        if stage.remainder is not None and stage.remainder.holds is solver.holds:
            far = stage.remainder.array
        elif stage.U is not None:
            far = self._moved_along(stage, W, start) - first
        else:
            return False
        if not self._norm(far) <= size:
            return False
        U += far
        return True

    def _accepted(self, stage, start, U, first, solver, base: float | None) -> np.ndarray | None:
        """``U``, and its remainder for the next solve; ``None`` if what began with a factor of other data may have
        found another root than Newton's method does from the start.
        """
        if stage.constant or (base is None and first is None):
            return U
        if first is None:
            self.factors.counts["solve"] += 1
            solver.solve(self._base, self._x)
            first = start - self._x.array_r
        if base is not None and not self.forms.linear:
            moved, left, largest = self._largest(U - start, first - U, U)
            if not (moved <= NEAR * largest or left <= CONTRACTION * moved):
                return None
        stage.remainder = Remainder(solver.holds, U - first)
        return U

    def _is_small(self, U: np.ndarray, base: float) -> bool:
        """Whether the residual is much smaller at ``U`` than the norm ``base``, or round-off."""
        self.forms.residual(U, self._r)
        return self._r.norm() <= REDUCED * base or self._is_round_off(U)

    def _is_round_off(self, U: np.ndarray) -> bool:
        """Whether the residual, which is that of ``U``, is round-off beside the diagonal of the Jacobian there."""
        matrix = self.forms.J.assemble()
        matrix.getDiagonal(self._x)
        bound = 10 * ROUND_OFF * self._norm(U) * np.abs(self._x.array_r)
        above = float(np.count_nonzero(~(np.abs(self._r.array_r) <= bound)))
        return self._sum(above) == 0

    def _sum(self, value: float) -> float:
        comm = self.forms.comm
        return value if comm.size == 1 else comm.allreduce(value, op=MPI.SUM)

    def _norm(self, array: np.ndarray) -> float:
        """Euclidean norm over space."""
        return math.sqrt(self._sum(float(array @ array)))

    def _largest(self, *arrays: np.ndarray) -> np.ndarray:
        """Largest entry of each array over space."""
        comm, found = self.forms.comm, np.array([np.abs(a).max(initial=0.0) for a in arrays])
        if comm.size > 1:
            comm.Allreduce(MPI.IN_PLACE, found, op=MPI.MAX)
        return found

    @staticmethod
    def _iterations(rate: float, size: float, scale: float) -> float:
        """How many are left at this rate."""
        return math.inf if rate >= 1 else math.log(ROUND_OFF * scale / size) / math.log(rate)

    def _by_petsc(self, U: np.ndarray) -> np.ndarray:
        """PETSc's Newton from ``U``."""
        forms = self.forms
        if self._snes is None:
            J = expand_derivatives(derivative(forms.F, forms.U, TrialFunction(forms.U.function_space())))
            problem = NonlinearVariationalProblem(forms.F, forms.U, bcs=forms.evolution.bcs, J=J)
            self._snes = NonlinearVariationalSolver(
                problem, solver_parameters=self._parameters, post_jacobian_callback=self._prepare
            )
        put(forms.U, U)
        try:
            with stop_annotating():
                self._snes.solve()
        except Exception:
            self._snes = None  # what it has lagged is of a failed iteration
            raise
        forms.counts["petsc newton"] += 1
        return self._project(get(forms.U))

    def _prepare(self, X, J) -> None:
        """What PETSc's Newton calls with an iterate and its Jacobian."""
        require_finite(J, "the Jacobian of a stage")
        if self.forms.evolution.nullspace is not None:
            self.forms.evolution.nullspace.pin(J)
