r"""The functional of an evolution as an objective of state *and* control, with the time steps as constraint.

With the trajectory :math:`u = (u_0, \dots, u_N)` the constraint is

.. math:: c_0 = \hat u_0(z) - u_0, \qquad c_n = \Phi_{n-1}(u_{n-1}, z) - u_n ,

which all steps evaluate at once, as none of them waits for another. Its derivative is :math:`A = -(I - \Phi_u S)` with
the shift ``S`` by a step, so that :math:`A^{-1}` is a tangent sweep and :math:`A^{-T}` an adjoint one, with the signs
of :mod:`pint_fem.adjoint.problem`: multipliers are the adjoints :math:`\lambda_n = \Phi_u^T \lambda_{n+1} + j_n'(u_n)`.
Steps are linearised at the states :math:`u_{n-1}`, whether the constraint holds or not.

Arrays are slabs ``(k + 1, n)``, whose row 0 is a copy of the left neighbour's last one, except in dual arrays: there
the *last* row belongs to the right neighbour.
"""

from __future__ import annotations

import numpy as np

from pint_fem.adjoint.evaluation import Evaluation
from pint_fem.adjoint.newton_kkt.averaged import AveragedKKT
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.optimize.composite_step.protocol import KKTReport
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["ConstrainedEvolution"]


class ConstrainedEvolution:
    """A :class:`~pint_fem.optimize.composite_step.protocol.ConstrainedProblem` made of a reduced problem.

    Parameters
    ----------
    problem : ReducedProblem
        The functional of one evolution, with trajectories stored at all points.
    inner : ControlInner
        The inner product of the controls.
    averaged : AveragedKKT, optional
        Approximate solves of KKT systems.

    Attributes
    ----------
    comm : mpi4py communicator
        The ranks that evaluate collectively.
    """

    def __init__(self, problem: ReducedProblem, inner: ControlInner, averaged: AveragedKKT | None = None):
        self.problem, self.controls = problem, inner
        self.sweeps, self.layout, self.spacetime = problem.sweeps, problem.layout, problem.spacetime
        self.comm = problem.spacetime.comm
        self._last = Evaluation(problem.sweeps)
        self._averaged, self._averaged_at = averaged, None
        if averaged is not None:
            self.kkt_solve = self._kkt_solve

    def _at(self, u: np.ndarray, z: np.ndarray, lam: np.ndarray | None = None) -> Evaluation:
        """An evaluation with these trajectories; what was computed from them is kept as long as they are the same."""
        last = self._last
        same = last.U is u and last.z is not None and np.array_equal(last.z, z) and (lam is None or last.L is lam)
        if not self.comm.allreduce(int(not same)):
            return last
        last.U, last.z, last.computed = u, z.copy(), {}
        if lam is not None:
            last.L = lam
        return last

    # -- objective and constraint --------------------------------------------------------------------------------------
    def value(self, u: np.ndarray, z: np.ndarray) -> float:
        """J(u, z), the identical number on every rank."""
        problem = self.problem
        shares = problem.trajectories.values(self._at(u, z), self.layout.steps(z))
        total = float(gather_in_order(shares, self.spacetime.time_comm).sum(axis=0).sum())
        return total if problem.regularisation is None else total + problem.regularisation.value(z)

    def gradient(self, u: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The partial derivatives of J: ``j_n'(u_n)``, and that of the regularisation."""
        problem = self.problem
        of_control = np.zeros_like(z) if problem.regularisation is None else problem.regularisation.gradient(z)
        return problem.trajectories.gradient(self._at(u, z), self.layout.steps(z)).rows, of_control

    def constraint(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The residuals of all steps, ``(k + 1, n)``."""
        return self.sweeps.step_residuals(self.layout.steps(z), u, initial=self.layout.initial(z))

    # -- linear solves -------------------------------------------------------------------------------------------------
    def solve_linearised(
        self, u: np.ndarray, z: np.ndarray, r: np.ndarray, rtol: float | None
    ) -> tuple[np.ndarray, float]:
        """The ``du`` with ``A du = r``, by a tangent sweep with the right-hand side ``-r``."""
        du = self.sweeps.new_slab()
        result = self.sweeps.tangent_of_source(self.layout.steps(z), u, -r, du, **_accuracy(rtol, self.sweeps))
        return du, _residual(result)

    def tangent(self, u: np.ndarray, z: np.ndarray, dz: np.ndarray, rtol: float | None) -> tuple[np.ndarray, float]:
        """The derivative of the state in the direction ``dz``."""
        du, layout = self.sweeps.new_slab(), self.layout
        given = layout.steps(z), u, layout.steps(dz), du
        result = self.sweeps.tangent(*given, initial=layout.initial(dz), **_accuracy(rtol, self.sweeps))
        return du, _residual(result)

    def solve_adjoint(
        self, u: np.ndarray, z: np.ndarray, r: np.ndarray, rtol: float | None
    ) -> tuple[np.ndarray, float]:
        """The ``lam`` with ``A^T lam = r``, by an adjoint sweep with the right-hand side ``-r``."""
        lam = self.sweeps.new_slab()
        given = self.layout.steps(z), u, -r, lam
        result = self.sweeps.adjoint(*given, cold=True, **_accuracy(rtol, self.sweeps))
        return lam, _residual(result)

    def control_adjoint(self, u: np.ndarray, z: np.ndarray, lam: np.ndarray) -> np.ndarray:
        """``c_z^T lam``, a dual vector of the controls."""
        rows = self.problem.trajectories.control_gradient(self._at(u, z), self.layout.steps(z), lam, None)
        return self.layout.gradient(rows, lam[0])

    def lagrangian_hessian(
        self, u: np.ndarray, z: np.ndarray, lam: np.ndarray, du: np.ndarray, dz: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The second derivatives of the Lagrangian along a tangent, or along any states where ``dz`` is ``None``."""
        problem, layout, evaluation = self.problem, self.layout, self._at(u, z, lam)
        steps = None if dz is None else layout.steps(dz)
        source = problem.trajectories.hessian(
            evaluation, layout.steps(z), steps, du, second=not self.sweeps.is_affine, symmetric=dz is None
        )
        of_control = np.zeros_like(z)
        if source.controls is not None:
            of_control += layout.gradient(source.controls, np.zeros_like(lam[0]))
        if dz is not None and problem.regularisation is not None:
            of_control += problem.regularisation.hessian(z, dz)
        return source.rows, of_control

    def _kkt_solve(self, u: np.ndarray, z: np.ndarray, lam: np.ndarray, rhs: tuple, rtol: float) -> tuple:
        """The controls of an approximate solution of the KKT system for ``rhs = (None, r, None)``."""
        if self._averaged_at is not u:
            self._averaged.move_to(u, z)
            self._averaged_at = u
        dz, iterations, residual = self._averaged.solve(self.controls.dual(rhs[1]))
        return None, dz, None, KKTReport(True, iterations, residual)

    # -- inner products ------------------------------------------------------------------------------------------------
    def representative(self, dual: np.ndarray) -> np.ndarray:
        """The control that represents a dual vector."""
        return self.controls.primal(dual)

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """The inner product of controls."""
        return self.controls.inner(a, b)

    def inner_states(self, a: np.ndarray, b: np.ndarray) -> float:
        """The sum over all points of the products of coefficients."""
        first = 0 if self.sweeps.slab.is_first else 1
        return self._sum(a[first:], b[first:])

    def pairing(self, dual: np.ndarray, primal: np.ndarray) -> float:
        """The value of a dual slab at a primal one."""
        last = None if self.sweeps.slab.is_last else -1
        return self._sum(dual[:last], primal[:last])

    def multiplier_norm(self, lam: np.ndarray) -> float:
        """The norm of coefficients of all points."""
        return float(np.sqrt(self.pairing(lam, lam)))

    def _sum(self, a: np.ndarray, b: np.ndarray) -> float:
        """The sum of products of rows in the order of the points, the identical number for any number of ranks."""
        rows = np.matmul(a[:, None, :], b[:, :, None])[:, 0, 0]  # one dot product per state, whatever the block
        return float(gather_in_order(self.spacetime.sum_over_space(rows), self.spacetime.time_comm).sum())


def _accuracy(rtol: float | None, sweeps: Sweeps) -> dict[str, float]:
    """The tolerance of a sweep: never below that of its options."""
    return {} if rtol is None or rtol <= sweeps.options.rtol else {"rtol": rtol}


def _residual(result: SolveResult) -> float:
    """The norm of the last residual; 0 for sequential solves, and where none was computed."""
    return result.residuals[-1] if result.residuals and result.reason not in ("exact", "serial") else 0.0
