r"""The recursion over the stages of a linear step and its transpose, in place, on a block of states or on one.

With :math:`d_j = U_j - W_j` (see :class:`~pint_fem.evolution.tableaux.DIRK`)

.. math::  W_i = u_0 + \sum_{j<i} \alpha_{ij} d_j , \qquad S_i U_i = M W_i + b_i ,

and :math:`u_1 = U_s` for a stiffly accurate method, else :math:`u_1 = u_0 + \sum_i \beta_i d_i`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.blocks import Factor, Workspace

__all__ = ["BlockRecursion", "Recursion", "StateRecursion"]


class Recursion:
    """The recursion on the arrays ``w`` (what a stage starts from), ``x`` (a solution), ``y`` and ``yT`` (products).

    Parameters
    ----------
    dirk, steps
        Coefficients; :math:`a_{ii} \\Delta t` of each stage.
    factors
        Of :math:`S` by step.
    bc_rows
        Rows with a condition.
    drop_rows
        Whether nobody wants their adjoints; ``M^T`` does not see them.
    """

    w: np.ndarray
    x: np.ndarray
    y: np.ndarray
    yT: np.ndarray

    def __init__(
        self,
        dirk: DIRK,
        steps: Sequence[float],
        factors: Mapping[float, Factor],
        bc_rows: np.ndarray,
        drop_rows: bool,
    ):
        self.dirk, self.steps, self.factors = dirk, steps, factors
        self.bc_rows, self.drop_rows = bc_rows, drop_rows
        # stage increments that later stages or the end need
        kept = dirk.stages - dirk.stiffly_accurate
        self._stages = [np.zeros_like(self.w) for _ in range(kept)]
        self._start, self._term = np.zeros_like(self.w), np.zeros_like(self.w)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are not PETSc's."""
        return (len(self._stages) + 2) * self._start.nbytes

    def mass(self, *, transposed: bool = False) -> None:
        """``y = M w``, or ``yT = M^T w``."""
        raise NotImplementedError

    def solve(self, h: float, *, transposed: bool = False) -> None:
        """``x = S^{-1} y``, or ``x = S^{-T} yT``."""
        raise NotImplementedError

    def forward(self, load: Callable[[np.ndarray, int], None] | None = None) -> np.ndarray:
        """``u_1`` of what is in ``w``; ``load(rhs, i)`` adds to the right-hand side of stage ``i``."""
        dirk, start, d = self.dirk, self._start, self._stages
        if len(d):
            start[...] = self.w
        for i, h in enumerate(self.steps):
            if i:
                w = self.w
                w[...] = start
                for j in range(i):
                    if dirk.alpha[i, j]:
                        w += np.multiply(d[j], dirk.alpha[i, j], out=self._term)
                del w  # PETSc sees the change when the array is given back
            self.mass()
            if load is not None:
                load(self.y, i)
            self.solve(h)
            if i < len(d):
                np.subtract(self.x, self.w, out=d[i])
        if dirk.stiffly_accurate:
            return self.x
        for beta, di in zip(dirk.beta, d, strict=True):
            start += np.multiply(di, beta, out=self._term)
        return start

    def backward(self, on_stage: Callable[[int, np.ndarray], None] | None = None) -> np.ndarray:
        """The transpose, of what is in ``w``; ``on_stage(i, y)`` sees the adjoint of a stage's right-hand side."""
        dirk, out, bar, accurate = self.dirk, self._start, self._stages, self.dirk.stiffly_accurate
        for di, beta in zip(bar, dirk.beta, strict=False):
            if accurate:
                di[...] = 0
            else:
                np.multiply(self.w, beta, out=di)
        if not accurate:
            out[...] = self.w
        for i in reversed(range(dirk.stages)):
            last = accurate and i == dirk.stages - 1
            rhs = self.yT
            rhs[...] = self.w if last else bar[i]
            if self.drop_rows:
                rhs[..., self.bc_rows] = 0
            del rhs
            self.solve(self.steps[i], transposed=True)
            if on_stage is not None:
                on_stage(i, self.x)
            self.w[...] = self.x
            self.mass(transposed=True)
            W_bar = self.yT
            if last and not len(bar):
                return W_bar
            if last:
                out[...] = W_bar
            else:
                W_bar -= bar[i]
                out += W_bar
            for j in range(i):
                if dirk.alpha[i, j]:
                    bar[j] += np.multiply(W_bar, dirk.alpha[i, j], out=self._term)
            del W_bar
        return out


class BlockRecursion(Recursion):
    """On a block of ``WIDTH`` states, arrays ``(WIDTH, n)``."""

    def __init__(self, M: PETSc.Mat, MT: PETSc.Mat, *args):
        self._M, self._MT = M, MT
        sizes = M.getSizes()[0]
        self.workspace, self._x = Workspace.zeros(sizes, M.comm), Workspace.zeros(sizes, M.comm)
        # products keep their data in the result: one for each operator
        self._y = Workspace(M.matMult(self.workspace.matrix))
        self._yT = self._y if MT is M else Workspace(MT.matMult(self.workspace.matrix))
        self.w, self.x, self.y, self.yT = self.workspace.array, self._x.array, self._y.array, self._yT.array
        super().__init__(*args)

    @property
    def petsc_bytes(self) -> int:
        """Bytes of the blocks."""
        return (3 if self._yT is self._y else 4) * self.w.nbytes

    def mass(self, *, transposed=False):
        """See the base class."""
        M, y = (self._MT, self._yT) if transposed else (self._M, self._y)
        M.matMult(self.workspace.matrix, y.matrix)

    def solve(self, h, *, transposed=False):
        """See the base class."""
        self.factors[h].solve_block(self._yT if transposed else self._y, self._x, transposed=transposed)


class StateRecursion(Recursion):
    """On one state, arrays ``(n,)``; each is taken from its vector anew, so that PETSc knows of changes."""

    def __init__(self, M: PETSc.Mat, MT: PETSc.Mat, *args):
        self._M, self._MT = M, MT
        self._w, self._x = M.createVecs()
        self._y = self._w.duplicate()
        super().__init__(*args)

    w = property(lambda self: self._w.array)
    x = property(lambda self: self._x.array)
    y = yT = property(lambda self: self._y.array)

    def mass(self, *, transposed=False):
        """See the base class."""
        (self._MT if transposed else self._M).mult(self._w, self._y)

    def solve(self, h, *, transposed=False):
        """See the base class."""
        self.factors[h].solve(self._y, self._x, transposed=transposed)
