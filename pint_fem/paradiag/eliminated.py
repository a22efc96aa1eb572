r"""Shifted systems of two parts, one of which is eliminated: what is left has the size of the other.

Where a field ``b`` is eliminated from a step (:mod:`pint_fem.propagators.elimination`), with the equation of ``b``
multiplied by :math:`M_b^{-1}`, :math:`X = M_b^{-1} D` and :math:`c = 1 - y`,

.. math::
    S - y M = \begin{pmatrix} S_a - y M_a & h G \\ h X & c I \end{pmatrix} , \qquad
    \Big( S_a - y M_a - \frac{h^2}{c} G X \Big)\, a = r_a - \frac{h}{c}\, G\, r_b , \quad
    b = \frac{1}{c} (r_b - h X a) .

Transposes have :math:`X^T` in the place of ``G`` and :math:`G^T` in that of ``X``. For Maxwell's equations a complex
system for the electric field is left.

This module needs petsc4py, like :mod:`pint_fem.paradiag.distributed_systems`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from petsc4py import PETSc

from pint_fem.paradiag.distributed_systems import Product, distributed_system
from pint_fem.paradiag.lane_kernels import LaneKernels
from pint_fem.paradiag.systems import ShiftedSystem, WrappedSystem

__all__ = ["Coupling", "EliminatedSystem", "eliminated_system"]

Rows = slice | np.ndarray


class Coupling:
    """The matrices that couple the two parts, shared by all stages.

    Parameters
    ----------
    G, X
        Without rows (``G``) and columns (``X``) that have a condition.
    a, b
        Rows of the parts in a state of this rank.
    """

    def __init__(self, G: PETSc.Mat, X: PETSc.Mat, a: Rows, b: Rows):
        self.G, self.X, self.a, self.b = Product(G), Product(X), a, b


class EliminatedSystem(WrappedSystem):
    """``S - y M`` with the second block row multiplied by :math:`M_b^{-1}`, solved by the system of ``a``.

    Parameters
    ----------
    left
        The system of ``a``.
    coupling
        The matrices ``G`` and ``X``.
    h
        Their factor, the time step times the diagonal entry of the stage.
    """

    def __init__(self, left: ShiftedSystem, coupling: Coupling, h: float):
        super().__init__(left)
        self._coupling, self._h = coupling, h

    def solve(self, factor: Any, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for a complex vector with the matrix of ``y`` or its (not conjugate) transpose."""
        its, h, c = self._coupling, self._h, 1.0 - y
        first, second = (its.X, its.G) if transposed else (its.G, its.X)
        out, r_b = np.empty_like(r), r[its.b]
        r_a = r[its.a] - h / c * first(r_b, transposed=transposed)
        out[its.a] = a = self._inner.solve(factor, y, r_a, transposed=transposed)
        out[its.b] = (r_b - h * second(a, transposed=transposed)) / c
        return out

    def mass(self, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r``; the block of ``b`` is the identity."""
        out, its = r.copy(), self._coupling
        out[its.a] = self._inner.mass(r[its.a], transposed=transposed)
        return out

    def solve_lanes(
        self, kernels: LaneKernels, factor: Any, y: np.ndarray, r: np.ndarray, *, transposed: bool
    ) -> np.ndarray:
        """Solve for lanes ``(batch, n, 2, W)``."""
        its, h, c = self._coupling, self._h, 1.0 - y
        first, second = (its.X, its.G) if transposed else (its.G, its.X)
        out, r_b = kernels.empty(*r.shape[:2]), r[:, its.b].copy()
        r_a = r[:, its.a].copy()
        kernels.add_multiple(-h / c, first.on_lanes(kernels, r_b, transposed=transposed), r_a)
        a = self._inner.solve_lanes(kernels, factor, y, r_a, transposed=transposed)
        kernels.multiply(1 / c, r_b)
        kernels.add_multiple(-h / c, second.on_lanes(kernels, a, transposed=transposed), r_b)
        out[:, its.a], out[:, its.b] = a, r_b
        return out

    def mass_lanes(self, kernels: LaneKernels, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r`` of lanes ``(batch, n, 2, W)``."""
        out, its = r.copy(), self._coupling
        out[:, its.a] = self._inner.mass_lanes(kernels, r[:, its.a], transposed=transposed)
        return out


def eliminated_system(
    coupling: Coupling, h: float, parts: Sequence[PETSc.Mat], parameters: Mapping, prefix: str = "paradiag_"
) -> EliminatedSystem:
    """The system of a stage, with the second part eliminated.

    Parameters
    ----------
    coupling, h
        The matrices that couple the parts, and their factor.
    parts
        :math:`S_a`, :math:`M_a` and :math:`-G X`.
    parameters, prefix
        PETSc options of the remaining system, and their prefix in PETSc's database; without any, one rank in space
        has a :class:`~pint_fem.paradiag.sparse_system.SparseSystem`.
    """
    left = distributed_system(parts, parameters, lambda y: (1.0, -y, h * h / (1.0 - y)), prefix)
    return EliminatedSystem(left, coupling, h)
