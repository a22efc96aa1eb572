r"""Simplified Newton for the stages: iterations with a factor that is there, of a nearby Jacobian.

.. math::  U \leftarrow U - P^{-1} F(U), \qquad \theta_k = \|\Delta_k\| / \|\Delta_{k-1}\|

for increments :math:`\Delta_k`, until the error :math:`\theta/(1 - \theta)\, \|\Delta\|` that remains is round-off
(Hairer and Wanner, Solving Ordinary Differential Equations II, section IV.8). The Jacobian is assembled and factored at
the current iterate where there is no factor yet, and again where the iterations that are left at the present rate
would cost more than that. Where it does not converge, PETSc's Newton has the word, from the stage's base value, and
raises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from firedrake import NonlinearVariationalProblem, NonlinearVariationalSolver, TrialFunction, derivative
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives

from pint_fem.propagators.arrays import get, put
from pint_fem.propagators.factors import Factors
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
"""An earlier solve's rate is trusted to be no better than this."""
PATIENCE = 15
"""Iterations left that a new factor is worth."""
ITERATIONS = 50


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
            self._r, self._x = vec.duplicate(), vec.duplicate()

    def solve(self, stage, W: np.ndarray, guess: np.ndarray | None, t: float) -> np.ndarray:
        """``U`` of a stage from its base value ``W`` and a first guess.

        Raises
        ------
        firedrake.exceptions.ConvergenceError, PETSc.Error
            If it cannot be found.
        """
        forms = self.forms
        forms.counts["newton"] += 1
        put(forms.W, W)
        rows, values = forms.bc_rows, forms.boundary(t, stage.index)
        starts = [W.copy()] if guess is None else [guess.copy(), W.copy()]
        for start in starts:
            start[rows] = values
            if forms.evolution.nullspace is not None:
                forms.evolution.nullspace.project_solution(start)
        if self._by_snes:
            return self._by_petsc(starts[0])
        if guess is not None and self.factors.at_hand(stage) is None:
            starts = [self._nearer(*starts)]
        for start in starts:
            U = self._iterate(stage, start)
            if U is not None:
                return U
        return self._by_petsc(starts[-1])

    def _norm(self, array: np.ndarray) -> float:
        """Euclidean norm over space."""
        square = float(array @ array)
        comm = self.forms.comm
        return math.sqrt(square if comm.size == 1 else comm.allreduce(square, op=MPI.SUM))

    def _nearer(self, guess: np.ndarray, W: np.ndarray) -> np.ndarray:
        """That with the smaller residual."""
        norms = []
        for start in (guess, W):
            self.forms.residual(start, self._r)
            norms.append(self._r.norm())
        return guess if norms[0] < norms[1] else W  # a guess that is not finite loses

    def _iterate(self, stage, U: np.ndarray) -> np.ndarray | None:
        """Iterate in place; ``None`` if that does not converge."""
        forms, factors, x = self.forms, self.factors, self._x
        solver, rate, old = factors.at_hand(stage), stage.rate, None
        fresh = stage.constant  # whether the factor is that of the Jacobian at U
        for _ in range(ITERATIONS):
            forms.residual(U, self._r)
            if solver is None:
                solver, fresh, rate, old = factors.factor(stage, forms.J.assemble(), object()), True, None, None
            factors.counts["solve"] += 1
            solver.solve(self._r, x)
            U -= x.array_r
            size, scale = x.norm(), self._norm(U)
            if not math.isfinite(size + scale):
                return None
            if size == 0 or (fresh and (forms.linear or size <= QUADRATIC * scale)):
                return U
            if old is not None:
                rate = stage.rate = size / old
            elif rate is not None:
                rate = max(rate, HINT)
            if rate is not None:
                if rate < 1 and rate / (1 - rate) * size <= ROUND_OFF * scale:
                    return U
                if old is not None and rate > SLOW and size <= FLOOR * scale:
                    return U
            old, fresh = size, stage.constant
            if rate is not None and self._iterations(rate, size, scale) > PATIENCE:
                solver = None
        return None

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
                problem, solver_parameters=self._parameters, post_jacobian_callback=self._make_regular
            )
        put(forms.U, U)
        with stop_annotating():
            self._snes.solve()
        forms.counts["petsc newton"] += 1
        U, nullspace = get(forms.U), forms.evolution.nullspace
        return U if nullspace is None else nullspace.project_solution(U)

    def _make_regular(self, X, J) -> None:
        """What PETSc's Newton calls with an iterate and its Jacobian."""
        if self.forms.evolution.nullspace is not None:
            self.forms.evolution.nullspace.pin(J)
