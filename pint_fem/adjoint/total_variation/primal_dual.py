r"""The primal-dual operator of total variation, which a trust region uses in the place of the second derivative.

The gradient of the smoothed total variation is :math:`\alpha \int p \cdot \nabla v` with :math:`p = \nabla q / N`,
:math:`N = |\nabla q|_\varepsilon`. For small :math:`\varepsilon` it is a very nonlinear function of q, and Newton's
method converges from nearby only. Chan, Golub and Mulet [1] apply Newton's method to the pair of equations

.. math:: N w - \nabla q = 0, \qquad \alpha \int w \cdot \nabla v + (\text{misfit})' v = 0

for q and a *dual* field w, of which the first is far less nonlinear. Elimination of :math:`\delta w` leaves Newton's
equation for :math:`\delta q`, with the gradient of the functional and the operator

.. math::
    H_w(d, v) = \alpha \int \frac1N \left(I - \tfrac12 (w\, p^T + p\, w^T)\right) \nabla d \cdot \nabla v,

symmetrised, in the place of the second derivative, which it is where :math:`w = p`. It is positive semidefinite for
:math:`|w| \le 1`, as :math:`|p| < 1`. After a step :math:`\delta q` the dual becomes :math:`w + s\,\delta w` with

.. math:: \delta w = \frac1N \left(\nabla \delta q - w\, (p \cdot \nabla \delta q)\right) + p - w,

p and N those before the step. The length is :math:`s = 1` where then :math:`|w| \le 1` at all points, and otherwise a
part of the largest for which that holds, so that :math:`|w| < 1` always [1, 2].
The trust region compares the model with the functional itself, so the operator decides on the number of iterations,
not on the result.

The dual begins with zero, for which :math:`H_w` is the operator of lagged diffusivity.

References
----------
[1] T. F. Chan, G. H. Golub, P. Mulet, A nonlinear primal-dual method for total variation-based image restoration, SIAM
    J. Sci. Comput. 20 (1999) 1964-1977.
[2] C. R. Vogel, Computational Methods for Inverse Problems, SIAM 2002, chapter 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from firedrake import Function
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.adjoint.total_variation.smoothed import SmoothedVariation
from pint_fem.collective import any_rank

if TYPE_CHECKING:
    from pint_fem.adjoint.interface import ControlProblem
    from pint_fem.adjoint.regularisation import Regularisation

__all__ = ["DualField", "PrimalDualModel"]

_INTERIOR = 0.99
"""Part of the length to the boundary of the unit ball."""


class DualField:
    """The dual of one total variation at an iterate, and the operator that it gives.

    Parameters
    ----------
    variation
        The total variation.
    space_comm
        The ranks in space.
    fixed
        Keep the dual zero: the operator of lagged diffusivity.

    Attributes
    ----------
    w : ndarray, shape (rows, points, components)
        The dual at the own points; several rows for a control with one value per step.
    """

    def __init__(self, variation: SmoothedVariation, space_comm: MPI.Comm, *, fixed: bool = False):
        self.variation, self._space_comm, self._fixed = variation, space_comm, fixed
        self.w = np.zeros((0, 0, 0))
        self._G: np.ndarray | None = None

    def move_to(self, rows: np.ndarray) -> None:
        """Update the dual by the step from the last iterate to one with the values ``(rows, nz)`` (collective)."""
        G = np.array([self.variation.gradients(row) for row in rows])
        if self._G is None:
            self.w = np.zeros_like(G)
        elif not self._fixed:
            dw = (G - self._G - self.w * _dot(self._p, G - self._G)) / self._N + self._p - self.w
            lengths = longest_steps(self.w, dw).min(axis=(1, 2), initial=1.0)
            self.w = self.w + self._least(lengths)[:, None, None] * dw
        self._G = G
        self._N = np.sqrt(_dot(G, G) + self.variation.smoothing)
        self._p = G / self._N

    def _least(self, lengths: np.ndarray) -> np.ndarray:
        """The smallest of each entry over the ranks in space (collective over space)."""
        least = np.empty_like(lengths)
        self._space_comm.Allreduce(lengths, least, op=MPI.MIN)
        return least

    def matrix(self, row: int, number: int) -> PETSc.Mat:
        """Return the matrix of the operator of a row for one of the functions (collective over space)."""
        w, p, N = self.w[row], self._p[row], self._N[row]
        blocks = 0.5 * (w[:, :, None] * p[:, None, :] + p[:, :, None] * w[:, None, :])
        blocks = (np.eye(w.shape[1]) - blocks) / N[:, :, None]
        return self.variation.matrix(blocks, number)

    def difference(self, row: int, dz: np.ndarray) -> np.ndarray:
        """Return the difference of the operator and of the second derivative, applied to a direction ``(nz,)``: a dual
        vector (collective over space).
        """
        w, p, N, dG = self.w[row], self._p[row], self._N[row], self.variation.gradients(dz)
        along = _dot(p, dG)
        return self.variation.pulled_back((p * along - 0.5 * (w * along + p * _dot(w, dG))) / N)


def longest_steps(w: np.ndarray, dw: np.ndarray) -> np.ndarray:
    """Return the lengths ``s``, ``(..., 1)``, of steps along ``dw`` from points ``w`` of the unit ball, ``(...,
    components)``: 1 where the step stays in it, otherwise a part of the length to its boundary.
    """
    a, b, c = _dot(dw, dw), _dot(w, dw), 1.0 - _dot(w, w)
    leaves = a + 2 * b > c
    root = np.sqrt(np.maximum(b * b + a * c, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        length = np.where(b > 0, c / (root + b), (root - b) / a)
    return np.where(leaves, _INTERIOR * np.minimum(length, 1.0), 1.0)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of vectors along the last axis, which stays."""
    return np.sum(a * b, axis=-1, keepdims=True)


class _Node:
    """The duals of a problem's own regularisation, and of the terms of its sum."""

    def __init__(self, problem: ControlProblem, weight: float):
        self.regularisation: Regularisation | None = problem.regularisation
        self.duals: list[tuple[DualField, tuple[Function, ...]]] = []
        space_comm = problem.spacetime.space_comm
        if self.regularisation is not None and weight > 0:
            self.duals = [
                (DualField(functional, space_comm, fixed=functional.model == "lagged-diffusivity"), controls)
                for functional, controls in self.regularisation.variations
                if functional.model != "newton"
            ]
        nodes = [(term, _Node(term.problem, weight * term.weight)) for term in problem.terms]
        self.terms = [(term, node) for term, node in nodes if node.found]

    @property
    def found(self) -> Sequence[DualField]:
        """The duals of all total variations."""
        return [dual for dual, _ in self.duals] + [dual for _, node in self.terms for dual in node.found]

    def move_to(self, z: np.ndarray) -> None:
        """Update all duals."""
        for dual, controls in self.duals:
            dual.move_to(self.regularisation.rows(z, controls))
        for term, node in self.terms:
            node.move_to(term.map.value(z))

    def matrices(self, control: Function) -> list[PETSc.Mat]:
        """The matrices of the operators of all total variations of a control, one per row; none where there are none.

        They are those of :class:`~pint_fem.adjoint.composed.Selection`, by which a control of a term is one of the sum.
        """
        found = [
            [dual.matrix(row, controls.index(control)) for row in range(len(dual.w))]
            for dual, controls in self.duals
            if control in controls
        ]
        for term, node in self.terms:
            rows = node.matrices(control)
            for matrix in rows:
                matrix.scale(term.weight)
            found += [rows] if rows else []
        for others in found[1:]:
            for total, matrix in zip(found[0], others, strict=True):
                total.axpy(1.0, matrix, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
        return found[0] if found else []

    def difference(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """The sum of all operators' differences, applied to a direction."""
        out = np.zeros_like(z)
        for dual, controls in self.duals:
            rows = self.regularisation.rows(dz, controls)
            parts = [dual.difference(i, row) for i, row in enumerate(rows)]
            self.regularisation.add_rows(out, controls, dual.variation, parts)
        for term, node in self.terms:
            h = node.difference(term.map.value(z), term.map.tangent(z, dz))
            term.map.add_adjoint(out, z, h, term.weight)
        return out


class PrimalDualModel:
    """The operators of all total variations of a functional in one minimisation, with the duals at its iterate.

    The duals follow from the iterates of the run, and are no part of a checkpoint: where a run is continued from one
    they begin with zero again. In a difference of functionals a total variation with a negative weight keeps its second
    derivative.

    Parameters
    ----------
    problem
        The functional.
    """

    def __init__(self, problem: ControlProblem):
        self._root, self._comm = _Node(problem, 1.0), problem.spacetime.comm
        self._z: np.ndarray | None = None

    @property
    def duals(self) -> Sequence[DualField]:
        """The duals of all total variations; none where the functional has no total variation."""
        return self._root.found

    def move_to(self, z: np.ndarray) -> None:
        """Update the duals by the step to an iterate ``(layout.size,)`` (collective); the first one begins with zero.
        The same iterate once more changes nothing.
        """
        if self.duals and any_rank(self._comm, self._z is None or not np.array_equal(self._z, z)):
            self._root.move_to(z)
            self._z = np.array(z)

    @property
    def iterate(self) -> np.ndarray | None:
        """The last iterate, not to be modified; ``None`` before the first."""
        return self._z

    def matrices(self, control: Function) -> list[PETSc.Mat]:
        """Return the matrices of the operators of a control at the iterate, new ones: one, or one for each own step;
        none where the control has no total variation (collective over space).
        """
        return self._root.matrices(control)

    def add(self, action: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """Return a Hessian action at the iterate, a dual vector, with the operators in the place of the second
        derivatives (collective over space).
        """
        return action if self._z is None else action + self._root.difference(self._z, dz)
