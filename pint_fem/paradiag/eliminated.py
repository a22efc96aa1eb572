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

import numpy as np
from petsc4py import PETSc

from pint_fem.paradiag.distributed_systems import Product, distributed_system
from pint_fem.paradiag.systems import ShiftedSystem

__all__ = ["Coupling", "EliminatedSystem", "eliminated_system"]

Rows = slice | np.ndarray


class Coupling:
    """How the parts are coupled; all stages share it.

    Parameters
    ----------
    G, X
        Without rows (``G``) and columns (``X``) that have a condition.
    a, b
        Own rows of the parts in the state.
    """

    def __init__(self, G: PETSc.Mat, X: PETSc.Mat, a: Rows, b: Rows):
        self.G, self.X, self.a, self.b = Product(G), Product(X), a, b


class EliminatedSystem:
    """``S - y M`` with the second block row multiplied by :math:`M_b^{-1}`; see
    :class:`~pint_fem.paradiag.systems.ShiftedSystem`.

    Parameters
    ----------
    left
        The system of ``a``.
    coupling, h
        See above.
    """

    def __init__(self, left: ShiftedSystem, coupling: Coupling, h: float):
        self._left, self._coupling, self._h = left, coupling, h

    def factor(self, y):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        return self._left.factor(y)

    def solve(self, factor, y, r, *, transposed):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        its, h, c = self._coupling, self._h, 1.0 - y
        first, second = (its.X, its.G) if transposed else (its.G, its.X)
        out, r_b = np.empty_like(r), r[its.b]
        r_a = r[its.a] - h / c * first(r_b, transposed=transposed)
        out[its.a] = a = self._left.solve(factor, y, r_a, transposed=transposed)
        out[its.b] = (r_b - h * second(a, transposed=transposed)) / c
        return out

    def release(self, factor):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        self._left.release(factor)

    def mass(self, r, *, transposed):
        """See :class:`~pint_fem.paradiag.systems.ShiftedSystem`."""
        out, its = r.copy(), self._coupling
        out[its.a] = self._left.mass(r[its.a], transposed=transposed)
        return out


def eliminated_system(
    coupling: Coupling, h: float, parts: Sequence[PETSc.Mat], parameters: Mapping, prefix: str = "paradiag_"
) -> EliminatedSystem:
    """The system of a stage.

    Parameters
    ----------
    coupling, h
        See above.
    parts
        :math:`S_a`, :math:`M_a` and :math:`-G X`.
    parameters, prefix
        PETSc options of the system, and the prefix of options in PETSc's database.
    """
    left = distributed_system(parts, parameters, lambda y: (1.0, -y, h * h / (1.0 - y)), prefix)
    return EliminatedSystem(left, coupling, h)
