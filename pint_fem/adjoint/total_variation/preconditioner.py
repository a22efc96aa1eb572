r"""A preconditioner of conjugate gradients from the operators of total variations at the iterate.

For each control

.. math:: P = (H_w + Q + \sigma M)^{-1},

with the primal-dual operator :math:`H_w` of :mod:`~pint_fem.adjoint.total_variation.primal_dual`, which is that of
lagged diffusivity for :math:`w = 0` [1, section 8.2], the second derivative Q of quadratic functionals of the control,
and the mass matrix M. :math:`H_w` is almost singular along edges, where :math:`\sigma M` stands for the second
derivative of the misfit. For :math:`\sigma` the quotient :math:`(v, A v) / (v, v)` of the misfit's Gauss-Newton form A
in :math:`L^2` is taken at the first iterate of the run for white noise v, whose expectation is the mean of the
eigenvalues of A. It costs two sweeps. Numbers of iterations hardly depend on :math:`\sigma`.

A matrix of the control's size is factored at each iterate. Couplings between controls are left out.

References
----------
[1] C. R. Vogel, Computational Methods for Inverse Problems, SIAM 2002, chapter 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from firedrake import Function, TestFunction, TrialFunction, assemble, dx, inner
from firedrake.petsc import PETSc

from pint_fem.adjoint.riesz import ControlInner, RieszMap
from pint_fem.kernels.arrays import is_real
from pint_fem.kernels.factor import Factor

if TYPE_CHECKING:
    from pint_fem.adjoint.minimisation.objective import Objective

__all__ = ["VariationPreconditioner"]

_ACCURACY = 0.1
"""Relative accuracy of the one product with the misfit's Hessian, where it can be chosen."""
_LEAST = 1e-8
"""Smallest shift in terms of that of the operators themselves."""


class VariationPreconditioner:
    """The inverse of the operators of the regularisation at the iterate of a run, on representatives.

    Parameters
    ----------
    objective
        The objective of the run, whose ``prepare`` is called at each iterate.
    inner_product
        The inner product of the run.

    Attributes
    ----------
    shift : float or None
        The factor of the mass matrix; ``None`` before the first application.
    """

    def __init__(self, objective: Objective, inner_product: ControlInner):
        self._objective, self._model, self._inner = objective, objective.model, inner_product
        self._layout = inner_product.layout
        self.shift: float | None = None
        self._iterate: np.ndarray | None = None
        self._solvers: dict[Function, list] = {}

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """Return ``P r`` (collective)."""
        if self.shift is None:
            self.shift = self._measured(self._noise())
        if self._iterate is not self._model.iterate:
            self._iterate = self._model.iterate
            for control in self._layout.evolution.controls:
                self._solvers[control] = self._inverses(control)
        dual, out = self._inner.dual(r), np.empty_like(r)
        for control, solvers in self._solvers.items():
            weight, sources = self._rows(control, dual)
            targets = self._rows(control, out)[1]
            for i, (b, x) in enumerate(zip(sources, targets, strict=True)):
                x[:] = solvers[i % len(solvers)].primal(b) / weight
        if self._layout.spacetime.space_size > 1:
            self._layout.share(out)
        return out

    def _rows(self, control: Function, z: np.ndarray) -> tuple[float, np.ndarray]:
        """The weight of a step for a control, and its values in a vector as rows, views."""
        evolution = self._layout.evolution
        weight = evolution.dt if control in evolution.stepwise else 1.0
        return weight, np.atleast_2d(self._layout.part(z, control))

    def _quadratic(self, control: Function) -> list:
        """The second derivatives of quadratic functionals by a control, as forms."""
        found = self._objective.problem.regularisations()
        forms = [w * r.second_derivative(control, quadratic_part=True) for w, r in found if w > 0]
        return [form for form in forms if not form.empty()]

    def _inverses(self, control: Function) -> list:
        """The inverses of the matrices of a control: one for all rows, or one for each."""
        space = control.function_space()
        form = sum(self._quadratic(control), start=self.shift * inner(TrialFunction(space), TestFunction(space)) * dx)
        matrices = self._model.matrices(control)
        if not matrices:
            return self._solvers.get(control) or [RieszMap(space, form)]
        fixed = assemble(form, mat_type="aij").petscmat
        before = self._solvers.get(control) or [None] * len(matrices)
        for matrix in matrices:
            matrix.axpy(1.0, fixed, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
        return [_Inverse(matrix, like) for matrix, like in zip(matrices, before, strict=True)]

    def _noise(self) -> np.ndarray:
        """White noise, the same for each number of ranks in time."""
        out, rank = np.empty(self._layout.size), self._layout.spacetime.space_comm.rank
        for number, control in enumerate(self._layout.evolution.controls):
            rows = self._rows(control, out)[1]
            first = self._layout.slab.lo if control in self._layout.evolution.stepwise else 0
            for i, row in enumerate(rows, start=first):
                row[:] = np.random.default_rng((number, i, rank)).standard_normal(len(row))
        return out / np.sqrt(ControlInner(self._layout, "lumped").weights)

    def _measured(self, r: np.ndarray) -> float:
        """The quotient of the misfit's Gauss-Newton form for one vector (collective)."""
        objective, z = self._objective, self._model.iterate
        within = getattr(objective, "gauss_newton_action_within", None)
        h = objective.gauss_newton_action(z, r) if within is None else within(z, r, _ACCURACY)
        out = np.zeros_like(r)
        for control in self._layout.evolution.controls:
            if is_real(control.function_space()):
                continue
            fixed = [assemble(form, mat_type="aij").petscmat for form in self._quadratic(control)]
            variations, (weight, targets) = self._model.matrices(control), self._rows(control, out)
            for i, (source, target) in enumerate(zip(self._rows(control, r)[1], targets, strict=True)):
                for matrix in fixed + variations[i : i + 1]:
                    target += weight * _product(matrix, source)
        own, size = self._layout.pairing(out, r), ControlInner(self._layout, "L2").inner(r, r)
        measured = self._inner.inner(h, r) - own
        return max(measured, _LEAST * own, np.finfo(float).tiny) / size


class _Inverse:
    """The inverse of a matrix by its factors.

    Parameters
    ----------
    matrix
        Symmetric and positive definite.
    like
        The inverse of a matrix with the same nonzero pattern, whose order of elimination is used.
    """

    def __init__(self, matrix: PETSc.Mat, like: _Inverse | None):
        self._factor = Factor(
            matrix, {}, symmetric=True, prefix="pint_variation_", like=None if like is None else like._factor
        )
        self._x, self._b = matrix.createVecs()

    def primal(self, dual: np.ndarray) -> np.ndarray:
        """The solution for a right-hand side ``(n,)``."""
        self._b.array[:] = dual
        self._factor.solve(self._b, self._x)
        return self._x.array_r.copy()


def _product(matrix: PETSc.Mat, z: np.ndarray) -> np.ndarray:
    """The product of a matrix and a vector ``(n,)``."""
    x, y = matrix.createVecs()
    x.array[:] = z
    matrix.mult(x, y)
    return y.array_r.copy()
