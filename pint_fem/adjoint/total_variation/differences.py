r"""Gradients of a field at quadrature points, or its jumps at facets, as a sparse matrix.

With the points :math:`x_i` and weights :math:`\omega_i` of the rule on all cells, the matrix :math:`D` has
:math:`(D q)_i = \omega_i \nabla q(x_i)`. An integral of a function of the gradient is then a sum over the rows of
:math:`G = \operatorname{diag}(\omega)^{-1} D q`, of shape ``(points, components)``, and its derivatives are products
with :math:`D` and :math:`D^T`. Of a field that is constant in each cell, :math:`G` are the jumps, with one point per
interior facet.
"""

from __future__ import annotations

import numpy as np
from finat.ufl import FiniteElement, TensorElement
from firedrake import FunctionSpace, TestFunction, TrialFunction, as_tensor, assemble, dS, dx, grad, inner, jump
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc

from pint_fem.adjoint.total_variation.functional import is_on_facets
from pint_fem.evolution.control_operators import MatrixOperator
from pint_fem.kernels.arrays import get

__all__ = ["Differences"]


class Differences:
    """Gradients of the functions of a space at the points of a quadrature rule, or jumps at facets.

    Parameters
    ----------
    space
        A space of continuous functions, or of functions that are constant in each cell.
    degree
        Degree of the rule.

    Attributes
    ----------
    weights : ndarray, shape (points,)
        Weights of the own points.
    components : int
        Components of a gradient or a jump.
    """

    def __init__(self, space: WithGeometry, degree: int):
        mesh, facets = space.mesh(), is_on_facets(space)
        trial = TrialFunction(space)
        difference = jump(trial) if facets else grad(trial)
        shape = difference.ufl_shape
        self.components = int(np.prod(shape, dtype=int))
        if facets:
            element = FiniteElement("HDiv Trace", mesh.ufl_cell(), degree=0)
        else:
            element = FiniteElement("Quadrature", mesh.ufl_cell(), degree=degree, quad_scheme="default")
        points = FunctionSpace(mesh, TensorElement(element, shape=shape) if shape else element)
        test = TestFunction(points)("+") if facets else TestFunction(points)
        measure = (dS if facets else dx)(domain=mesh, degree=degree)
        matrix = assemble(inner(difference, test) * measure, mat_type="aij").petscmat
        self._matrix = MatrixOperator(matrix, np.zeros(0, dtype=int))
        ones = as_tensor(np.ones(shape)) if shape else 1.0
        weights = get(assemble(inner(ones, test) * measure)).reshape(-1, self.components)[:, 0]
        self._inside = weights > 0  # facets of the boundary have none
        self.weights = weights[self._inside]

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Gradients or jumps of own values ``(n,)``, ``(points, components)`` (collective over space)."""
        return self._matrix(z).reshape(-1, self.components)[self._inside] / self.weights[:, None]

    def transposed(self, flux: np.ndarray) -> np.ndarray:
        r"""The dual vector ``(n,)`` of :math:`v \mapsto \sum_i \omega_i\, F_i \cdot \nabla v(x_i)` for ``F`` of shape
        ``(points, components)`` (collective over space).
        """
        whole = np.zeros((len(self._inside), self.components))
        whole[self._inside] = flux
        return self._matrix.transposed(whole.ravel())

    def product_matrix(self, blocks: np.ndarray) -> PETSc.Mat:
        r"""The matrix of :math:`(d, v) \mapsto \sum_i \omega_i\, B_i \nabla d(x_i) \cdot \nabla v(x_i)` for symmetric
        ``B`` of shape ``(points, components, components)`` (collective over space).
        """
        D, m = self._matrix.matrix, self.components
        whole = np.zeros((len(self._inside), m, m))
        whole[self._inside] = blocks / self.weights[:, None, None]
        first, last = D.getOwnershipRange()
        columns = np.repeat(np.arange(first, last).reshape(-1, 1, m), m, axis=1)
        pointers = m * np.arange(last - first + 1)
        csr = tuple(a.astype(PETSc.IntType) for a in (pointers, columns.ravel()))
        sizes = (D.getSizes()[0], D.getSizes()[0])
        between = PETSc.Mat().createAIJ(sizes, csr=(*csr, whole.ravel()), comm=D.comm)
        return between.ptap(D)
