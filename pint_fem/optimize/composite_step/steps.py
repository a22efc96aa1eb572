r"""The parts of a composite step at a point: the quasi-normal step and the tangential one.

The *quasi-normal* step reduces the linearised constraint by a change of the state only,

.. math::  n = \theta\,(n_u, 0), \qquad A\,n_u = -c, \qquad \theta = \min(1, \zeta\Delta / (\sigma|n_u|)),

so that :math:`c + c_x n = (1 - \theta)\,c`. As :math:`A^{-1}` is bounded, the reduction of :math:`|c + c_x n|` is at
least a fraction of that of the Cauchy step, and no dogleg is required [1, Sec. 5].

The *tangential* step :math:`t = T\,dz` with :math:`T = (-A^{-1} c_z, I)` does not change the linearised constraint. It
minimises approximately

.. math::
    q(dz) = (g + w,\ dz) + \tfrac12 (dz,\ T^* H T\,dz) \quad\text{subject to}\quad |dz| \le \Delta,

with the reduced gradient :math:`g`, the Hessian :math:`H` of the Lagrangian and :math:`w = T^* H n`, by conjugate
gradients (:mod:`pint_fem.optimize.trust_region.steihaug`): directions of negative curvature are followed to the
boundary. A product takes a tangent and an adjoint solve. The preconditioner is the control's part of an approximate
solution of the KKT system with the right-hand side :math:`(0, r, 0)`, which is the inverse of :math:`T^* H T` where the
system is solved exactly: then one or two directions are enough.

The radius limits state and control separately (the decoupled approach of [1]); :math:`\sigma` is the ratio of the norms
of the control and of the state in the first tangential step.

References
----------
[1] J. E. Dennis, M. Heinkenschloss, L. N. Vicente, Trust-region interior-point SQP algorithms for a class of nonlinear
programming problems, SIAM J. Control Optim. 36 (1998) 1750-1794.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pint_fem.errors import SolverFailure
from pint_fem.optimize.composite_step.points import Point
from pint_fem.optimize.composite_step.protocol import GuardedConstrainedProblem
from pint_fem.optimize.oracle import Estimate, Gradient, Iterate
from pint_fem.optimize.records import CGStop
from pint_fem.optimize.trust_region.acceptance import FIRST_RADIUS, Step
from pint_fem.optimize.trust_region.steihaug import SteihaugPath

__all__ = ["KKTBreakdown", "LocalModel"]


class KKTBreakdown(SolverFailure):
    """A KKT solve did not converge, or its result is no descent direction.

    Attributes
    ----------
    counts : bool
        Whether it did not converge, so that KKT solves are not worth repeating; where the model has directions of
        negative curvature, an exact solve is no descent direction either.
    """

    def __init__(self, message: str, *, counts: bool):
        super().__init__(message)
        self.counts = counts


class LocalModel:
    """The quadratic model of the Lagrangian at a point, and the steps that follow from it.

    Parameters
    ----------
    problem : GuardedConstrainedProblem
        The problem.
    point : Point
        Where the constraint is linearised.
    tolerance : float
        Norm of the model's gradient at which conjugate gradients stop.
    rtol : float
        Tolerance of the quasi-normal step's solve, at first of the tangential one's, too.
    kkt_rtol : float
        Tolerance of KKT solves.
    cg_max_it : int
        Most directions of conjugate gradients.
    negligible : float
        Norm of the constraint up to which there is no quasi-normal step.
    iteration : int
        For messages.
    preconditioned : bool
        Whether conjugate gradients are preconditioned by KKT solves.

    Attributes
    ----------
    normal : ndarray or None
        The state's change ``n_u`` of the full quasi-normal step.
    normal_norm, normal_residual : float
        Its norm, and that of its equation's residual.
    kkt_iterations : int
        Iterations of the Krylov method in all KKT solves at this point.
    breakdown : str
        Why KKT solves do not precondition any more, if they did.
    fails : bool
        Whether that is because they do not converge.
    """

    def __init__(
        self, problem: GuardedConstrainedProblem, point: Point, *, tolerance: float, rtol: float, kkt_rtol: float,
        cg_max_it: int, negligible: float, iteration: int, preconditioned: bool,
    ):  # fmt: skip
        self.problem, self.point, self.iteration = problem, point, iteration
        self._tolerance, self.rtol, self._kkt_rtol, self._cg_max_it = tolerance, rtol, kkt_rtol, cg_max_it
        self._preconditioned, self.kkt_iterations, self.breakdown, self.fails = preconditioned, 0, "", False
        self.normal: np.ndarray | None = None
        self.normal_norm = self.normal_residual = self._normal_curvature = 0.0
        self._coupling = np.zeros_like(point.gradient)
        self._path: tuple[float, SteihaugPath] | None = None
        if point.constraint_norm > negligible:
            self._make_normal()

    # -- quasi-normal step ---------------------------------------------------------------------------------------------
    def _make_normal(self) -> None:
        """The full quasi-normal step and what the model's gradient changes along it."""
        problem, point = self.problem, self.point
        n, self.normal_residual = problem.solve_linearised(point.u, point.z, -point.c, self.rtol)
        of_state, of_control = problem.lagrangian_hessian(point.u, point.z, point.lam, n, None)
        self._normal_curvature = float(problem.pairing(of_state, n))
        self._coupling = self._reduced(of_state, of_control)
        self.normal, self.normal_norm = n, problem.state_norm(n)
        if not (math.isfinite(self.normal_norm) and math.isfinite(self._normal_curvature)):
            raise SolverFailure(f"iteration {self.iteration}: the quasi-normal step is not finite")

    def fraction(self, radius: float, state_scale: float, share: float) -> float:
        """The share theta of the quasi-normal step within ``share`` times the radius."""
        length = state_scale * self.normal_norm
        return 1.0 if length <= share * radius else share * radius / length

    def normal_reduction(self, theta: float) -> float:
        """The decrease of the model of the Lagrangian along the quasi-normal step; its gradient by the state is 0."""
        return -0.5 * theta**2 * self._normal_curvature

    # -- tangential step -----------------------------------------------------------------------------------------------
    def _reduced(self, of_state: np.ndarray, of_control: np.ndarray) -> np.ndarray:
        """The representative of ``T^T`` times a pair of dual arrays."""
        problem, u, z = self.problem, self.point.u, self.point.z
        mu, _ = problem.solve_adjoint(u, z, -of_state, None)
        return problem.representative(of_control + problem.control_adjoint(u, z, mu))

    def product(self, dz: np.ndarray) -> np.ndarray:
        """The reduced Hessian ``T* H T`` of the Lagrangian times a control."""
        problem, point = self.problem, self.point
        du, _ = problem.tangent(point.u, point.z, dz, None)
        return self._reduced(*problem.lagrangian_hessian(point.u, point.z, point.lam, du, dz))

    # the interface of an oracle, for the path of conjugate gradients
    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product of controls."""
        return float(self.problem.inner(a, b))

    def start_path(self, x: np.ndarray, target: float) -> None:
        """Prepare products for conjugate gradients; here there is nothing to do."""

    def curvature(
        self, x: np.ndarray, d: np.ndarray, dd: float, iteration: int, target: float
    ) -> tuple[np.ndarray, float, float]:
        """The product with a direction, the curvature along it, and the relative error allowed, 0."""
        h = self.product(d)
        curvature = self.inner(d, h)
        if not math.isfinite(curvature):
            raise SolverFailure(f"iteration {iteration}: the product with the reduced Hessian is not finite")
        return h, curvature, 0.0

    def _precondition(self, r: np.ndarray) -> np.ndarray:
        """The control's part of a KKT solve with the right-hand side ``(0, r, 0)``.

        Raises
        ------
        KKTBreakdown
            Where the solve does not converge, or the result is no descent direction.
        """
        point = self.point
        try:
            solved = self.problem.kkt_solve(point.u, point.z, point.lam, (None, r, None), self._kkt_rtol)
        except SolverFailure as failure:
            raise KKTBreakdown(f"the KKT solve failed: {failure}", counts=True) from failure
        dz, report = solved[1], solved[3]
        self.kkt_iterations += report.iterations
        if not report.converged:
            reason = report.message or f"residual {report.residual:.1e} after {report.iterations} iterations"
            raise KKTBreakdown(f"the KKT iteration does not contract ({reason})", counts=True)
        slope = self.inner(r, dz)
        if not 0 < slope < math.inf:
            raise KKTBreakdown(f"the KKT solve gives no descent direction, (r, dz) = {slope:.1e}", counts=False)
        return dz

    def _path_at(self, theta: float) -> SteihaugPath | None:
        """The path of conjugate gradients after a share of the quasi-normal step; ``None`` for a zero gradient."""
        if self._path is None or self._path[0] != theta:
            g = self.point.gradient + theta * self._coupling
            norm = self.problem.norm(g)
            if norm == 0:
                return None
            start = Iterate(np.zeros_like(g), Estimate(self.point.lagrangian), Gradient(g, norm))
            path = SteihaugPath(
                self, start, tolerance=self._tolerance, max_it=self._cg_max_it, iteration=self.iteration,
                preconditioner=self._precondition if self._preconditioned else None,
            )  # fmt: skip
            self._path = theta, path
        return self._path[1]

    def _on_path(self, theta: float, take: Callable[[SteihaugPath], Any]) -> Any:
        """What ``take`` returns for the path; without a preconditioner where that breaks down."""
        path = self._path_at(theta)
        if path is None:
            return None
        try:
            return take(path)
        except KKTBreakdown as failure:
            self.breakdown, self.fails = str(failure), failure.counts
            self._preconditioned, self._path = False, None
            return take(self._path_at(theta))

    def first_radius(self, theta: float) -> float:
        """A multiple of the length of the Cauchy step, as in the reduced trust region, or the length of the first
        preconditioned direction, which is about Newton's step; infinite for a zero gradient.
        """
        radius = self._on_path(theta, lambda path: path.first_radius())
        if radius is None:
            return math.inf
        return radius / FIRST_RADIUS if self._preconditioned else radius

    def tangential(self, theta: float, radius: float) -> Step:
        """The control's part of the tangential step, as the trial point of a path from 0."""
        step = self._on_path(theta, lambda path: path.step(radius))
        return Step(np.zeros_like(self.point.gradient), stop=CGStop.RESIDUAL) if step is None else step
