r"""The recursion over the stages of a linear Runge-Kutta step and its transpose, on a block of states or on one state.

With :math:`d_j = U_j - W_j` (:class:`~pint_fem.evolution.tableaux.DIRK`)

.. math::  W_i = u_0 + \sum_{j<i} \alpha_{ij} d_j , \qquad S_i U_i = M W_i + b_i ,

and :math:`u_1 = U_s` for a stiffly accurate method, else :math:`u_1 = u_0 + \sum_i \beta_i d_i`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.blocks import Factor, StateBlock, multiply, product

__all__ = ["MatrixRecursion", "Recursion"]


class Recursion:
    """The recursion on arrays ``(WIDTH, n)`` of a block of states or ``(n,)`` of one state.

    The arrays are ``w``, from which a stage starts, ``x``, its solution, and ``y`` and ``yT``, products of ``w`` with
    ``M`` and ``M^T``. Those of PETSc's objects are taken from them each time, so that PETSc registers the changes.

    Parameters
    ----------
    start
        The block or vector with the array ``w``.
    dirk
        Coefficients of the integrator.
    steps
        The coefficients ``a_ii dt`` of the stages.
    bc_rows
        Own rows with a condition.
    drop_rows
        Whether the adjoints of those rows are not required; ``M^T`` does not depend on them.
    """

    x: np.ndarray
    y: np.ndarray
    yT: np.ndarray

    def __init__(
        self, start: StateBlock | PETSc.Vec, dirk: DIRK, steps: Sequence[float], bc_rows: np.ndarray, drop_rows: bool
    ):
        self.start, self.dirk, self.steps = start, dirk, steps
        self.bc_rows, self.drop_rows = bc_rows, drop_rows
        # increments of stages that later stages or the end depend on
        count = dirk.stages - dirk.stiffly_accurate
        self._stages = [np.zeros_like(self.w) for _ in range(count)]
        self._sum, self._term = np.zeros_like(self.w), np.zeros_like(self.w)

    w = property(lambda self: self.start.array)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are not PETSc's."""
        return (len(self._stages) + 2) * self._sum.nbytes

    @property
    def petsc_bytes(self) -> int:
        """Bytes of PETSc's blocks."""
        raise NotImplementedError

    def mass(self, *, transposed: bool = False) -> None:
        """Compute ``y = M w``, or ``yT = M^T w``."""
        raise NotImplementedError

    def solve(self, h: float, *, transposed: bool = False) -> None:
        """Compute ``x = S^{-1} y``, or ``x = S^{-T} yT``, for a stage with ``a_ii dt = h``."""
        raise NotImplementedError

    def forward(self, load: Callable[[np.ndarray, int], None] | None = None) -> np.ndarray:
        """The step ``u_1`` from the states in ``w``; ``load(rhs, i)`` adds to the right-hand side of stage ``i``."""
        dirk, out, d = self.dirk, self._sum, self._stages
        if len(d):
            out[...] = self.w
        for i, h in enumerate(self.steps):
            if i:
                w = self.w
                w[...] = out
                for j in range(i):
                    if dirk.alpha[i, j]:
                        w += np.multiply(d[j], dirk.alpha[i, j], out=self._term)
                del w  # PETSc registers the change when the array is released
            self.mass()
            if load is not None:
                load(self.y, i)
            self.solve(h)
            if i < len(d):
                np.subtract(self.x, self.w, out=d[i])
        if dirk.stiffly_accurate:
            return self.x
        for beta, di in zip(dirk.beta, d, strict=True):
            out += np.multiply(di, beta, out=self._term)
        return out

    def backward(self, on_stage: Callable[[int, np.ndarray], None] | None = None) -> np.ndarray:
        """The transposed step from the adjoints in ``w``; ``on_stage(i, y)`` is called with the adjoint of the
        right-hand side of stage ``i``.
        """
        dirk, out, bar, accurate = self.dirk, self._sum, self._stages, self.dirk.stiffly_accurate
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


class MatrixRecursion(Recursion):
    """The recursion with matrices of the whole state.

    Parameters
    ----------
    M, MT
        The mass matrix and its transpose, the same object where it is symmetric.
    factors
        Factors of ``S`` by ``a_ii dt``.
    start, *args
        Parameters of :class:`Recursion`.
    """

    def __init__(
        self, M: PETSc.Mat, MT: PETSc.Mat, factors: Mapping[float, Factor], start: StateBlock | PETSc.Vec, *args: Any
    ):
        self._M, self._MT, self._factors = M, MT, factors
        self._x, self._y = start.duplicate(), product(M, start)
        self._yT = self._y if MT is M else product(MT, start)
        super().__init__(start, *args)

    x = property(lambda self: self._x.array)
    y = property(lambda self: self._y.array)
    yT = property(lambda self: self._yT.array)

    @property
    def petsc_bytes(self) -> int:
        """Bytes of the three or four blocks."""
        return (3 if self._yT is self._y else 4) * self.w.nbytes

    def mass(self, *, transposed: bool = False) -> None:
        """Compute ``y = M w``, or ``yT = M^T w``."""
        M, y = (self._MT, self._yT) if transposed else (self._M, self._y)
        multiply(M, self.start, y)

    def solve(self, h: float, *, transposed: bool = False) -> None:
        """Compute ``x = S^{-1} y``, or ``x = S^{-T} yT``."""
        self._factors[h].solve(self._yT if transposed else self._y, self._x, transposed=transposed)
