r"""Value, gradient and Hessian action of a smoothed total variation, on vectors of own values.

With gradients :math:`G = \nabla q` at the points of a quadrature rule
(:mod:`~pint_fem.adjoint.total_variation.differences`), :math:`N = |G|_\varepsilon` and :math:`p = G / N`

.. math::
    R(q) &= \alpha \sum_i \omega_i N_i, \qquad R'(q)\,v = \alpha \sum_i \omega_i\, p_i \cdot \nabla v, \\
    R''(q)(d, v) &= \alpha \sum_i \frac{\omega_i}{N_i}
        \left(\nabla d - p_i\, (p_i \cdot \nabla d)\right) \cdot \nabla v.

No form is assembled after construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import ufl
from firedrake import Function
from firedrake.petsc import PETSc

from pint_fem.adjoint.total_variation.differences import Differences
from pint_fem.adjoint.total_variation.functional import TotalVariation

__all__ = ["SmoothedVariation"]


class SmoothedVariation:
    """A total variation of some functions, on the vector ``(nz,)`` of their own values.

    Parameters
    ----------
    given
        The total variation with its weight, smoothing, model and quadrature degree.
    form
        The same as a functional of ``functions``.
    functions
        The functions, in the order of their values in the vector.
    space_sum
        The sum of an array over the ranks in space.
    """

    quadratic = False
    coupled = False

    def __init__(
        self,
        given: TotalVariation,
        form: ufl.Form,
        functions: Sequence[Function],
        space_sum: Callable[[np.ndarray], np.ndarray],
    ):
        self.form, self.functions, self.model = form, functions, given.model
        self.weight, self.smoothing, self._space_sum = given.weight, given.smoothing, space_sum
        made: dict = {}
        for f in functions:
            made.setdefault(f.function_space(), Differences(f.function_space(), given.degree))
        self._differences = [made[f.function_space()] for f in functions]
        self._weights = self._differences[0].weights
        self._sizes = [f.function_space().dof_dset.layout_vec.local_size for f in functions]

    def split(self, vector: np.ndarray) -> list[np.ndarray]:
        """Return views of the functions' parts of a vector ``(nz,)``."""
        return np.split(vector, np.cumsum(self._sizes)[:-1])

    def gradients(self, z: np.ndarray) -> np.ndarray:
        """Return the gradients (or jumps) of all functions at the own points, ``(points, components)``."""
        parts = [of(part) for of, part in zip(self._differences, self.split(z), strict=True)]
        return np.concatenate(parts, axis=1)

    def norms(self, G: np.ndarray) -> np.ndarray:
        """Return the smoothed norms of gradients ``(points, components)``, ``(points, 1)``."""
        return np.sqrt(np.sum(G * G, axis=1, keepdims=True) + self.smoothing)

    def pulled_back(self, flux: np.ndarray) -> np.ndarray:
        r"""Return the dual vector ``(nz,)`` of :math:`v \mapsto \alpha \sum_i \omega_i F_i \cdot \nabla v`."""
        ends = np.cumsum([of.components for of in self._differences])[:-1]
        parts = np.split(self.weight * flux, ends, axis=1)
        return np.concatenate([of.transposed(part) for of, part in zip(self._differences, parts, strict=True)])

    def matrix(self, blocks: np.ndarray, number: int) -> PETSc.Mat:
        """Return the matrix of a form, given by matrices ``(points, components, components)`` between gradients, for
        one of the functions.
        """
        ends = np.cumsum([0, *(of.components for of in self._differences)])
        own = slice(ends[number], ends[number + 1])
        return self._differences[number].product_matrix(self.weight * blocks[:, own, own])

    def value(self, z: np.ndarray) -> float:
        """Return ``R(z)``."""
        local = self._weights @ self.norms(self.gradients(z))
        return self.weight * float(self._space_sum(local)[0])

    def gradient(self, z: np.ndarray) -> np.ndarray:
        """Return ``R'(z)``, a dual vector ``(nz,)``."""
        G = self.gradients(z)
        return self.pulled_back(G / self.norms(G))

    def hessian(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """Return ``R''(z) dz``, a dual vector ``(nz,)``."""
        G, dG = self.gradients(z), self.gradients(dz)
        N = self.norms(G)
        p = G / N
        return self.pulled_back((dG - p * np.sum(p * dG, axis=1, keepdims=True)) / N)
