r"""Stages of a system of two coupled fields, one of which is eliminated.

With the blocks of :mod:`pint_fem.evolution.fields` and :math:`X = M_b^{-1} D`, a stage of step ``h`` is

.. math::
    (M_a + h K_a - h^2 G X)\, a = r_a - h\, G\, r_b , \qquad  b = r_b - h X a ,

for :math:`r_a = M_a W_a + b_a` and :math:`r_b = W_b + M_b^{-1} b_b` with the stage's base ``W`` and load ``b`` (the
second block row is multiplied by :math:`M_b^{-1}`, so that no solve with :math:`M_b` is left in a step). For Maxwell's
equations the matrix is that of :math:`\epsilon + h \sigma + h^2 \nabla\times \mu^{-1} \nabla\times`, symmetric and
positive definite. Transposes have :math:`X^T` in the place of ``G`` and :math:`G^T` in that of ``X``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.evolution.fields import Fields
from pint_fem.kernels.blocks import Factor, StateBlock, multiply, new_states, product
from pint_fem.propagators.recursion import Recursion

__all__ = ["EliminatedRecursion", "FieldBlocks", "FieldRecursion"]


class FieldBlocks:
    """Products and solves with the blocks of two fields, on arrays ``(..., n_a)`` and ``(..., n_b)``.

    A result is overwritten by the next call for the same block.

    Parameters
    ----------
    fields
        The blocks.
    factors
        Factors of matrices of the size of ``a``, by ``a_ii dt``.
    single
        Whether arrays are of one state, not of a block of states.
    """

    def __init__(self, fields: Fields, factors: Mapping[float, Factor], *, single: bool):
        self.fields, self._factors = fields, factors
        self._products = {}
        for name, matrix in fields.matrices.items():
            source = new_states(matrix.getSizes()[1], matrix.comm, single=single)
            self._products[name] = source, matrix, product(matrix, source)
        mass = fields.matrices["M"]
        self._r, self._s = (new_states(mass.getSizes()[0], mass.comm, single=single) for _ in range(2))

    @property
    def petsc_bytes(self) -> int:
        """Bytes of PETSc's blocks."""
        pairs = (source.array.nbytes + result.array.nbytes for source, _, result in self._products.values())
        return sum(pairs) + 2 * self._r.array.nbytes

    def multiply(self, name: str, x: np.ndarray) -> np.ndarray:
        """The product of the block ``name`` with states."""
        source, matrix, result = self._products[name]
        source.array[...] = x
        multiply(matrix, source, result)
        return result.array

    def solve(self, h: float, r: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """The solution ``a`` of the system of ``a_ii dt = h`` for right-hand sides ``r``."""
        self._r.array[...] = r
        self._factors[h].solve(self._r, self._s, transposed=transposed)
        return self._s.array


class FieldRecursion(Recursion):
    """A recursion by the blocks of two fields.

    Parameters
    ----------
    blocks
        Products and solves with the blocks.
    start, *args
        Parameters of :class:`~pint_fem.propagators.recursion.Recursion`.
    """

    def __init__(self, blocks: FieldBlocks, start: StateBlock | PETSc.Vec, *args: Any):
        self.blocks = blocks
        self.x, self.y = np.zeros_like(start.array), np.zeros_like(start.array)
        self.yT = self.y
        super().__init__(start, *args)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are not PETSc's."""
        return super().nbytes + self.x.nbytes + self.y.nbytes

    @property
    def petsc_bytes(self) -> int:
        """Bytes of the states and of the blocks."""
        return self.w.nbytes + self.blocks.petsc_bytes


class EliminatedRecursion(FieldRecursion):
    """The recursion over the stages of a Runge-Kutta step, each solved by elimination."""

    def mass(self, *, transposed: bool = False) -> None:
        """Compute ``y = M w``, or ``yT = M^T w``; the rows of ``b`` are those of the identity."""
        fields = self.blocks.fields
        self.y[..., fields.a] = self.blocks.multiply("MT" if transposed else "M", self.w[..., fields.a])
        self.y[..., fields.b] = self.w[..., fields.b]

    def solve(self, h: float, *, transposed: bool = False) -> None:
        """Compute the stage ``x`` from ``y``, or its transpose from ``yT``."""
        fields, (first, second) = self.blocks.fields, ("XT", "GT") if transposed else ("G", "X")
        r_b = self.y[..., fields.b]
        r_a = self.y[..., fields.a] - h * self.blocks.multiply(first, r_b)
        a = self.blocks.solve(h, r_a, transposed=transposed)
        self.x[..., fields.a] = a
        self.x[..., fields.b] = r_b - h * self.blocks.multiply(second, a)
