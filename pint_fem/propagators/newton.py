r"""Solution of the stages of a nonlinear step by simplified Newton iterations with a factor of a nearby Jacobian.

.. math::  U \leftarrow U - P^{-1} F(U), \qquad \theta_k = \|\Delta_k\| / \|\Delta_{k-1}\|

for increments :math:`\Delta_k`, until the error :math:`\theta/(1 - \theta)\, \|\Delta\|` that remains is round-off
(Hairer and Wanner, Solving Ordinary Differential Equations II, section IV.8). The Jacobian is assembled and factored at
the current iterate where there is no factor yet, and again where the iterations that are left at the present rate
would cost more than that.

The result is a function of the stage's data: base value :math:`W`, control and time. A stage equation may have several
roots; the one that counts is that to which Newton's method leads from :math:`W`, as it does in a plain Firedrake loop.
Every solve therefore starts at :math:`W`, and results of earlier solves save iterations only:

* the factor :math:`P` of an earlier Jacobian;
* the *correction* :math:`D = U - (W - P^{-1} F(W))` of the first iterate in the stage's last solve: it hardly changes
  with the data, and is added to the first iterate.

A root that is found with an earlier factor is accepted if

* the true residual has fallen: :math:`\|F(U)\| \le 10^{-8} \|F(W)\|`, or is round-off beside the diagonal of the
  Jacobian at ``U``, which is assembled for that where ``U`` hardly differs from ``W``. A factor of a Jacobian with
  huge or infinite entries makes :math:`P^{-1} F` vanish, but not :math:`F`;
* :math:`\max |W - P^{-1} F(W) - U| \le \max |W - U| / 2`: the iteration contracts from ``W`` towards ``U``, so Newton's
  method leads there, too.

Else the solve is repeated from :math:`W` with Jacobians of these data alone, by Newton's method as long as
simplified iterations contract slowly. Where that does not converge, PETSc's Newton iterates from :math:`W`, and raises.
After a solve that fails the stage has no factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from firedrake import NonlinearVariationalProblem, NonlinearVariationalSolver, TrialFunction, derivative
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives

from pint_fem.errors import SolverFailure, is_numerical
from pint_fem.kernels.arrays import get, put
from pint_fem.kernels.direct import require_finite
from pint_fem.kernels.factors import StageFactors
from pint_fem.kernels.updatable_factor import UpdatableFactor
from pint_fem.propagators.linearisation import FirstCorrection, StageLinearisation
from pint_fem.propagators.stage import StageForms

__all__ = ["NEWTON", "StageNewton"]

NEWTON = {
    "snes_rtol": 1e-13,
    "snes_atol": 1e-50,
    "snes_stol": 1e-10,
    "snes_max_it": 25,
    "snes_linesearch_type": "basic",
}
"""PETSc options of Newton's method to round-off, as derivatives are those of the exact stage equations: after a last
step of relative size 1e-10 the error is its square.
"""
ROUND_OFF = 1e-14
"""Relative error that is accepted."""
QUADRATIC = 1e-10
"""Relative size of an increment with the Jacobian at the iterate after which the error is round-off."""
SLOW, FLOOR = 0.3, 1e-12
"""Increments that are larger than ``SLOW`` times the last one, and smaller than ``FLOOR`` relative to the solution, are
round-off of the residual."""
LEAST_RATE = 0.01
"""Least contraction that is assumed where it was not measured by increments."""
MOST_REMAINING = 15
"""Largest number of remaining iterations that is cheaper than a new factor."""
ITERATIONS = 50
"""Largest number of iterations of a solve."""
REDUCED = 1e-8
"""Residual relative to that of the base value below which a root found with an earlier factor is accepted."""
CONTRACTION = 0.5
"""Largest contraction of the first iteration, from the base value to the root, with an earlier factor."""
NEIGHBOURHOOD = 0.1
"""Largest movement of root and base value since a solve began at the base value, relative to their distance."""
NEAR = 1e-8
"""Relative distance from the base value below which a root is the base value's own."""


class StageNewton:
    """Solves the equations of stages.

    Parameters
    ----------
    forms
        The stage's forms; their values are set by the caller.
    factors
        The factors of the stages.
    parameters
        PETSc options of the linear solves; with ``snes_`` options among them, PETSc's Newton is used throughout.
    """

    def __init__(self, forms: StageForms, factors: StageFactors, parameters: Mapping):
        self.forms, self.factors = forms, factors
        self._by_snes = any(name.startswith("snes_") for name in parameters)
        self._parameters = {**({"snes_type": "ksponly"} if forms.linear else NEWTON), **parameters}
        self._snes: NonlinearVariationalSolver | None = None
        with forms.U.dat.vec_ro as vec:
            self._start_residual, self._r, self._x = vec.duplicate(), vec.duplicate(), vec.duplicate()

    def solve(self, stage: StageLinearisation, W: np.ndarray, t: float, sweep: object = None) -> np.ndarray:
        """Solve a stage's equation for ``U`` (collective over space).

        Parameters
        ----------
        stage
            The stage, with results of earlier solves.
        W
            Its base value, ``(n,)``.
        t
            Start time of the step.
        sweep
            Identifies a solve of all steps with one control, or ``None``.

        Raises
        ------
        SolverFailure, firedrake.exceptions.ConvergenceError, PETSc.Error
            If no root is found.
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
    def _attempt(solve, *args: Any) -> np.ndarray | None:
        """The result of a solve; ``None`` after a numerical failure."""
        try:
            return solve(*args)
        except Exception as error:
            if not is_numerical(error):
                raise
            return None

    # -- where an iteration starts -------------------------------------------------------------------------------------
    def _continued(self, stage: StageLinearisation, W: np.ndarray, start: np.ndarray) -> np.ndarray | None:
        """Iterate from the root that was found for this control, translated with ``W``; ``None`` if one moves far."""
        solver = self.factors.nearby(stage)
        moved, length = self._largest(W - stage.W, stage.U - stage.W)
        if solver is None or stage.moved + 2 * moved > NEIGHBOURHOOD * length:
            return None
        guess = self._translated(stage, W, start)
        self.forms.residual(guess, self._start_residual)
        if self._start_residual.norm() == 0:
            return guess
        U = self._iterate(stage, guess, solver, rate=stage.rate)
        if U is None:
            return None
        *moves, length = self._largest(U - stage.U, W - stage.W, U - start)
        stage.moved += sum(moves)
        return U if stage.moved <= NEIGHBOURHOOD * length else None

    def _translated(self, stage: StageLinearisation, W: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The root of the last solve, translated with ``W``."""
        guess = stage.U + (W - stage.W)
        guess[self.forms.bc_rows] = start[self.forms.bc_rows]
        return self._project(guess)

    def _project(self, U: np.ndarray) -> np.ndarray:
        """Remove the part of values in the nullspace, in place."""
        nullspace = self.forms.evolution.nullspace
        return U if nullspace is None else nullspace.project_solution(U)

    def _from_base(self, stage: StageLinearisation, W: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The root to which Newton's method leads from the base value."""
        self.forms.residual(start, self._start_residual)
        norm, solver = self._start_residual.norm(), self.factors.nearby(stage)
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

    # -- the iteration -------------------------------------------------------------------------------------------------
    def _iterate(
        self,
        stage: StageLinearisation,
        start: np.ndarray,
        solver: UpdatableFactor | None,
        W: np.ndarray | None = None,
        base: float | None = None,
        rate: float | None = None,
    ) -> np.ndarray | None:
        """Iterate from ``start``, whose residual is in ``_start_residual``.

        Parameters
        ----------
        solver
            The first factor; ``None``: that of the Jacobian at the start.
        W, base
            For a factor of other data: the base value, and the norm of its residual, to which others are compared.
        rate
            The contraction in an earlier solve with this factor for the same control.

        Returns
        -------
        ndarray or None
            ``None`` if the iteration does not converge, or to what may be another root.
        """
        forms, r, x = self.forms, self._r, self._x
        inherited = None if stage.constant or base is None else solver  # a factor whose results are to be checked
        U, first, last_size, start_norm = start.copy(), None, None, self._norm(start)
        rate = None if rate is None else max(rate, LEAST_RATE)
        self._start_residual.copy(r)
        put(forms.U, U)
        norm = base
        for k in range(ITERATIONS):
            exact = stage.constant  # whether the factor is that of the Jacobian at U
            if solver is None:
                solver = self.factors.factor(stage, forms.J.assemble(), object())
                exact, first, rate, last_size = True, None, None, None
            size = self._increment(solver, r)
            if not math.isfinite(size):
                return None
            if last_size is not None:
                rate = stage.rate = size / last_size
                if not exact and rate > SLOW and size > FLOOR * max(self._norm(U), start_norm):
                    if solver is inherited:
                        return None
                    solver = None
                    continue
            U -= x.array_r
            last_size = size
            if k == 0:
                first = U.copy()
                if base is not None and not exact and self._add_correction(stage, W, start, first, solver, size, U):
                    last_size = None
            elif rate is None and first is not None:
                moved, remaining = self._largest(U - start, first - U)
                rate = max(remaining / moved, LEAST_RATE) if moved else None
            scale = self._norm(U)
            if self._has_converged(size, scale, max(scale, start_norm), rate, exact):
                if solver is inherited and norm > REDUCED * base and not self._is_small(U, base):
                    return None
                return self._accepted(stage, start, U, first, solver, base)
            if rate is not None and self._remaining(rate, size, max(scale, start_norm)) > MOST_REMAINING:
                solver = None
            forms.residual(U, r)
            norm = r.norm()
            if not math.isfinite(norm) or (base is not None and norm > base):
                return None
        return None

    def _increment(self, solver: UpdatableFactor, residual: PETSc.Vec) -> float:
        """Solve for the increment, in ``_x``; its norm."""
        self.factors.counts["solve"] += 1
        solver.solve(residual, self._x)
        return self._x.norm()

    def _has_converged(self, size: float, scale: float, largest: float, rate: float | None, exact: bool) -> bool:
        """Whether the error is round-off after an increment of norm ``size`` to an iterate of norm ``scale``;
        ``largest`` is the larger norm of the iterate and the start, ``exact`` whether the increment is Newton's own.
        """
        if size == 0 or (exact and (self.forms.linear or size <= QUADRATIC * scale)):
            return True
        if rate is None:
            return False
        small = rate < 1 and rate / (1 - rate) * size <= ROUND_OFF * scale
        return small or (rate > SLOW and size <= FLOOR * largest)

    @staticmethod
    def _remaining(rate: float, size: float, scale: float) -> float:
        """Number of iterations that remain at a contraction ``rate`` after an increment of norm ``size``."""
        return math.inf if rate >= 1 else math.log(ROUND_OFF * scale / size) / math.log(rate)

    def _add_correction(self, stage, W, start, first, solver, size: float, U: np.ndarray) -> bool:
        """Move the first iterate ``U`` in place to where earlier solves suggest the root; whether that was done.

        ``size`` is the norm of the first increment, which a correction must not exceed.
        """
        if stage.correction is not None and stage.correction.version is solver.version:
            correction = stage.correction.array
        elif stage.U is not None:
            correction = self._translated(stage, W, start) - first
        else:
            return False
        if not self._norm(correction) <= size:
            return False
        U += correction
        return True

    def _accepted(self, stage, start, U: np.ndarray, first, solver, base: float | None) -> np.ndarray | None:
        """The root ``U``, with its correction for the next solve; ``None`` if an iteration with a factor of other data
        may have found another root than Newton's method does from the start.
        """
        if stage.constant or (base is None and first is None):
            return U
        if first is None:
            self._increment(solver, self._start_residual)
            first = start - self._x.array_r
        if base is not None and not self.forms.linear:
            moved, remaining, largest = self._largest(U - start, first - U, U)
            if not (moved <= NEAR * largest or remaining <= CONTRACTION * moved):
                return None
        stage.correction = FirstCorrection(solver.version, U - first)
        return U

    def _is_small(self, U: np.ndarray, base: float) -> bool:
        """Whether the residual is much smaller at ``U`` than the norm ``base``, or round-off."""
        self.forms.residual(U, self._r)
        return self._r.norm() <= REDUCED * base or self._is_round_off(U)

    def _is_round_off(self, U: np.ndarray) -> bool:
        """Whether the residual in ``_r``, that of ``U``, is round-off beside the diagonal of the Jacobian there."""
        matrix = self.forms.J.assemble()
        matrix.getDiagonal(self._x)
        bound = 10 * ROUND_OFF * self._norm(U) * np.abs(self._x.array_r)
        above = float(np.count_nonzero(~(np.abs(self._r.array_r) <= bound)))
        return self._sum(above) == 0

    # -- over space ----------------------------------------------------------------------------------------------------
    def _sum(self, value: float) -> float:
        comm = self.forms.comm
        return value if comm.size == 1 else comm.allreduce(value, op=MPI.SUM)

    def _norm(self, array: np.ndarray) -> float:
        """Euclidean norm."""
        return math.sqrt(self._sum(float(array @ array)))

    def _largest(self, *arrays: np.ndarray) -> np.ndarray:
        """Largest magnitude of the entries of each array."""
        comm, found = self.forms.comm, np.array([np.abs(a).max(initial=0.0) for a in arrays])
        if comm.size > 1:
            comm.Allreduce(MPI.IN_PLACE, found, op=MPI.MAX)
        return found

    # -- PETSc's Newton ------------------------------------------------------------------------------------------------
    def _by_petsc(self, U: np.ndarray) -> np.ndarray:
        """The root that PETSc's Newton finds from ``U``."""
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
            self._snes = None  # a lagged Jacobian would be that of a failed iteration
            raise
        forms.counts["petsc newton"] += 1
        return self._project(get(forms.U))

    def _prepare(self, X: PETSc.Vec, J: PETSc.Mat) -> None:
        """Callback of PETSc's Newton with an iterate and its Jacobian: require finite entries, and pin the matrix."""
        require_finite(J, "the Jacobian of a stage")
        if self.forms.evolution.nullspace is not None:
            self.forms.evolution.nullspace.pin(J)
