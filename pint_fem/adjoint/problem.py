r"""The reduced problem on arrays: ``J(z)``, ``J'(z)``, ``J''(z) dz`` by time-parallel sweeps, each computed once for
a ``z``.

.. math::
    J(z) = \sum_n j_n(u_n) + R(z), \qquad
    J'(z) = \sum_n \Phi_{n,z}^T \lambda_{n+1} + R'(z), \qquad
    J''(z)\,dz = \sum_n \Phi_{n,z}^T \mu_{n+1} + \text{second-order terms of the steps} + R''(z)\,dz,

with the adjoint :math:`\lambda` driven by :math:`j_n'(u_n)` and the second-order adjoint :math:`\mu` by
:math:`j_n''(u_n)\,\delta u_n`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pint_fem.adjoint.misfits import Misfit
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.adjoint.sweeps import Sweeps
from pint_fem.errors import InputError
from pint_fem.mgrit.norms import gather_in_order

__all__ = ["ReducedProblem"]


class ReducedProblem:
    """See the module. A control is ``(nz,)``, or ``(k, nz)`` for the own steps; derivatives are dual vectors of that
    shape.

    Parameters
    ----------
    sweeps
        The solvers.
    misfits
        At least one.
    regularisation
        UFL functional of the control, or ``None``.

    Attributes
    ----------
    U : ndarray, shape (k + 1, n)
        State of the control evaluated last; the first guess of the next solve.
    """

    def __init__(self, sweeps: Sweeps, misfits: Sequence[Misfit], regularisation=None):
        self.sweeps, self.evolution, self.spacetime = sweeps, sweeps.evolution, sweeps.spacetime
        self.misfits = [misfits] if isinstance(misfits, Misfit) else list(misfits)
        if not self.misfits or not all(isinstance(m, Misfit) for m in self.misfits):
            raise InputError("misfits: give RunningMisfit, TerminalMisfit or PointSensors objects")
        if self.evolution.control is None:
            raise InputError("the evolution has no control=: there is nothing to optimise")
        for misfit in self.misfits:
            misfit.bind(self.evolution, self.spacetime, sweeps.slab)
        self.regularisation = None
        if regularisation is not None:
            self.regularisation = Regularisation(
                regularisation, self.evolution.control, self.evolution.u, self.spacetime.sum_over_space
            )
        self.U, self.L = sweeps.new_slab(), sweeps.new_slab()
        self.U[:] = sweeps.initial
        self._cold = {"state": True, "adjoint": True}  # no solution yet to start from
        self._z: np.ndarray | None = None
        self._value = self._gradient = None
        self._parts: dict[str, float] = {}

    @property
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the control: affine steps, quadratic misfits and regularisation."""
        regularisation = self.regularisation is None or self.regularisation.quadratic
        return self.sweeps.is_linear and all(m.quadratic for m in self.misfits) and regularisation

    def forget(self) -> None:
        """Forget what was solved: the next solves start cold."""
        self._z = self._value = self._gradient = None
        self.U[:] = self.sweeps.initial
        self.L[:] = 0
        self._cold = dict.fromkeys(self._cold, True)

    # -- caches --------------------------------------------------------------------------------------------------------
    def _is_current(self, z: np.ndarray) -> bool:
        """Whether the state of ``z`` is at hand, on all ranks alike."""
        same = self._z is not None and np.array_equal(self._z, z)
        return bool(min(self.spacetime.comm.allgather(same)))

    def _solve_state(self, z: np.ndarray) -> None:
        z = np.asarray(z, dtype=float)
        shape = (
            (self.sweeps.slab.k, self.evolution.control_size)
            if self.evolution.per_step
            else (self.evolution.control_size,)
        )
        if z.shape != shape:
            raise InputError(f"control of shape {z.shape}: give {shape}")
        if self._is_current(z):
            return
        self._z = self._value = self._gradient = None
        try:
            self.sweeps.state(z, self.U, cold=self._cold["state"])
        except Exception:
            self.U[:] = self.sweeps.initial  # a failed trajectory is no first guess
            self._cold["state"] = True
            raise
        self._cold["state"] = False
        self._z = z.copy()

    def _over_steps(self, method, z, *args):
        """Apply a regularisation method to the control, or to that of each own step with weight ``dt``."""
        if not self.evolution.per_step:
            return method(z, *args)
        rows = [self.evolution.dt * method(zi, *(a[i] for a in args)) for i, zi in enumerate(z)]
        return np.array(rows)

    # -- values --------------------------------------------------------------------------------------------------------
    def value(self, z: np.ndarray) -> float:
        """``J(z)``; the same bits on every rank."""
        self._solve_state(z)
        if self._value is None:
            points = np.stack([m.values(self.U) for m in self.misfits], axis=1)
            sums = gather_in_order(points, self.spacetime.time_comm).sum(axis=0)
            regularisation = 0.0
            if self.regularisation is not None:
                terms = self._over_steps(self.regularisation.value, z)
                if self.evolution.per_step:
                    terms = gather_in_order(terms, self.spacetime.time_comm).sum()
                regularisation = float(terms)
            self._parts = {"misfit": float(sums.sum()), "regularisation": regularisation}
            self._value = self._parts["misfit"] + regularisation
        return self._value

    @property
    def parts(self) -> dict[str, float]:
        """Misfit and regularisation of the value computed last."""
        return dict(self._parts)

    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """``J'(z) dz`` by a tangent sweep."""
        self._solve_state(z)
        dU = self.sweeps.new_slab()
        self.sweeps.tangent(z, self.U, dz, dU)
        points = sum(m.directional(self.U, dU) for m in self.misfits)
        total = float(gather_in_order(points, self.spacetime.time_comm).sum())
        if self.regularisation is not None:
            terms = self._over_steps(self.regularisation.gradient, z)
            local = self.spacetime.sum_over_space(np.array([np.vdot(terms, dz)]))
            total += float((self.spacetime.sum_over_time(local) if self.evolution.per_step else local)[0])
        return total

    def derivative(self, z: np.ndarray) -> np.ndarray:
        """``J'(z)`` as a dual vector."""
        self._solve_state(z)
        if self._gradient is None:
            g = sum(m.gradient(self.U) for m in self.misfits)
            try:
                self.sweeps.adjoint(z, self.U, g, self.L, cold=self._cold["adjoint"])
            except Exception:
                self.L[:] = 0  # a failed trajectory is no first guess
                self._cold["adjoint"] = True
                raise
            self._cold["adjoint"] = False
            self._gradient = self.sweeps.control_gradient(z, self.U, self.L)
            if self.regularisation is not None:
                self._gradient = self._gradient + self._over_steps(self.regularisation.gradient, z)
        return self._gradient.copy()

    def hessian_action(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """``J''(z) dz`` as a dual vector."""
        self._solve_state(z)
        sweeps = self.sweeps
        if not sweeps.is_linear:
            self.derivative(z)  # the second-order terms want the adjoint
        dU, M = sweeps.new_slab(), sweeps.new_slab()
        sweeps.tangent(z, self.U, dz, dU)
        g = sum(m.hessian(self.U, dU) for m in self.misfits)
        second = sweeps.second_order(z, self.U, dz, dU, self.L)
        if second is not None:
            g[:-1] += second[0]
        sweeps.adjoint(z, self.U, g, M, cold=True)
        out = sweeps.control_gradient(z, self.U, M)
        if second is not None:
            out = out + second[1]
        if self.regularisation is not None:
            out = out + self._over_steps(self.regularisation.hessian, z, dz)
        return out
