r"""Steps of a system of two coupled fields, one of which is eliminated from each stage.

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

import numpy as np

from pint_fem.evolution.fields import Fields
from pint_fem.kernels.blocks import Factor, Workspace
from pint_fem.propagators.recursion import Recursion

__all__ = ["BlockFields", "EliminatedRecursion", "FieldBlocks", "StateFields"]


class FieldBlocks:
    """Products and solves with the blocks, on arrays ``(..., n_a)`` and ``(..., n_b)``; results are overwritten by the
    next call of the same kind.

    Parameters
    ----------
    fields
        The blocks.
    factors
        Of matrices of the size of ``a``, by step.
    """

    def __init__(self, fields: Fields, factors: Mapping[float, Factor]):
        self.fields, self.factors = fields, factors

    @property
    def petsc_bytes(self) -> int:
        """Bytes of the blocks that products and solves work on."""
        return 0

    def multiply(self, name: str, x: np.ndarray) -> np.ndarray:
        """The product with the block of that name."""
        raise NotImplementedError

    def solve(self, h: float, r: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """The solution for a right-hand side of ``a``."""
        raise NotImplementedError


class BlockFields(FieldBlocks):
    """On blocks of ``WIDTH`` states."""

    def __init__(self, fields, factors):
        super().__init__(fields, factors)
        self._products = {}
        for name, matrix in fields.matrices.items():
            source = Workspace.zeros(matrix.getSizes()[1], matrix.comm)
            self._products[name] = source, matrix, Workspace(matrix.matMult(source.matrix))
        sizes, comm = fields.matrices["M"].getSizes()[0], fields.matrices["M"].comm
        self._r, self._s = Workspace.zeros(sizes, comm), Workspace.zeros(sizes, comm)

    @property
    def petsc_bytes(self):
        """See :class:`FieldBlocks`."""
        pairs = (source.array.nbytes + result.array.nbytes for source, _, result in self._products.values())
        return sum(pairs) + 2 * self._r.array.nbytes

    def multiply(self, name, x):
        """See :class:`FieldBlocks`."""
        source, matrix, result = self._products[name]
        source.array[...] = x
        matrix.matMult(source.matrix, result.matrix)
        return result.array

    def solve(self, h, r, *, transposed=False):
        """See :class:`FieldBlocks`."""
        self._r.array[...] = r
        self.factors[h].solve_block(self._r, self._s, transposed=transposed)
        return self._s.array


class StateFields(FieldBlocks):
    """On one state."""

    def __init__(self, fields, factors):
        super().__init__(fields, factors)
        self._products = {name: (*matrix.createVecs(), matrix) for name, matrix in fields.matrices.items()}
        self._r, self._s = fields.matrices["M"].createVecs()

    def multiply(self, name, x):
        """See :class:`FieldBlocks`."""
        source, result, matrix = self._products[name]
        source.array[:] = x
        matrix.mult(source, result)
        return result.array_r

    def solve(self, h, r, *, transposed=False):
        """See :class:`FieldBlocks`."""
        self._r.array[:] = r
        self.factors[h].solve(self._r, self._s, transposed=transposed)
        return self._s.array_r


class EliminatedRecursion(Recursion):
    """The recursion over the stages of a step, each by elimination.

    Parameters
    ----------
    blocks
        With factors of the complements.
    workspace
        Of whole states, to start from: a :class:`~pint_fem.kernels.blocks.Workspace`, or an array.
    *args
        See :class:`~pint_fem.propagators.recursion.Recursion`.
    """

    def __init__(self, blocks: FieldBlocks, workspace: Workspace | np.ndarray, *args):
        self.blocks, self.workspace = blocks, workspace
        self.w = workspace if isinstance(workspace, np.ndarray) else workspace.array
        self.x, self.y = np.zeros_like(self.w), np.zeros_like(self.w)
        self.yT = self.y
        super().__init__(*args)

    @property
    def nbytes(self):
        """See the base class."""
        return super().nbytes + self.x.nbytes + self.y.nbytes

    @property
    def petsc_bytes(self):
        """Of the blocks."""
        return self.w.nbytes + self.blocks.petsc_bytes

    def mass(self, *, transposed=False):
        """See the base class; the rows of ``b`` are those of the identity."""
        fields = self.blocks.fields
        self.y[..., fields.a] = self.blocks.multiply("MT" if transposed else "M", self.w[..., fields.a])
        self.y[..., fields.b] = self.w[..., fields.b]

    def solve(self, h, *, transposed=False):
        """See the base class."""
        fields, (first, second) = self.blocks.fields, ("XT", "GT") if transposed else ("G", "X")
        r_b = self.y[..., fields.b]
        r_a = self.y[..., fields.a] - h * self.blocks.multiply(first, r_b)
        a = self.blocks.solve(h, r_a, transposed=transposed)
        self.x[..., fields.a] = a
        self.x[..., fields.b] = r_b - h * self.blocks.multiply(second, a)
