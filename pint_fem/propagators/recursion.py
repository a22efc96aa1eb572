r"""The recursion over the stages of a linear Runge-Kutta step and its transpose, on a block of states or on one state.

With :math:`d_j = U_j - W_j` (:class:`~pint_fem.evolution.tableaux.DIRK`)

.. math::  W_i = u_0 + \sum_{j<i} \alpha_{ij} d_j , \qquad S_i U_i = M W_i + b_i ,

and :math:`u_1 = U_s` for a stiffly accurate method, else :math:`u_1 = u_0 + \sum_i \beta_i d_i`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.lanes.program import STATE, StepProgram

__all__ = ["MatrixRecursion", "Recursion", "StepPrograms", "append_solve"]


class StepPrograms(ABC):
    """A step of a linear evolution and its transpose, as programs."""

    @abstractmethod
    def forward(self) -> StepProgram:
        """The step; states that are given are added to the right-hand sides of stages by their numbers."""

    @abstractmethod
    def backward(self) -> StepProgram:
        """The transposed step; states that are asked for are the adjoints of the stages' right-hand sides."""


class Recursion(StepPrograms):
    """The recursion over the stages of a Runge-Kutta step.

    Parameters
    ----------
    dirk
        Coefficients of the integrator.
    steps
        The coefficients ``a_ii dt`` of the stages.
    bc_rows
        Own rows with a condition.
    drop_rows
        Whether the adjoints of those rows are not required; ``M^T`` does not depend on them.
    """

    def __init__(self, dirk: DIRK, steps: np.ndarray, bc_rows: np.ndarray, drop_rows: bool):
        self.dirk, self.steps, self.bc_rows, self.drop_rows = dirk, steps, bc_rows, drop_rows

    @abstractmethod
    def program(self) -> StepProgram:
        """A program without operations, with the parts of a state and the vectors that stages use."""

    @abstractmethod
    def mass(
        self, program: StepProgram, out: str, x: str, *, transposed: bool = False, keep: float | None = None
    ) -> None:
        """Append ``out = M x``, or ``out = M^T x``; ``keep``: add ``keep out``."""

    @abstractmethod
    def solve(self, program: StepProgram, y: str, h: float, *, transposed: bool = False) -> None:
        """Append ``y = S^{-1} y``, or ``y = S^{-T} y``, for a stage with ``a_ii dt = h``."""

    def forward(self) -> StepProgram:
        """The step ``u_1`` from ``u_0``; states number ``i`` are added to the right-hand side of stage ``i``."""
        dirk, made = self.dirk, self.program()
        y, accurate = made.vector("y"), dirk.stiffly_accurate
        if accurate and self._parts:
            for part in self._parts:
                self._short(made, y, part)
            return made
        # increments of stages that later stages or the end depend on
        needed = [not accurate or dirk.alpha[i + 1 :, i].any() for i in range(dirk.stages)]
        names = [made.vector(f"d{i}") if needed[i] else "" for i in range(dirk.stages)]
        made.copy(made.vector("start"), STATE)
        for i, h in enumerate(self.steps):
            if i:
                made.copy(STATE, "start")
            for j in range(i):
                if dirk.alpha[i, j]:
                    made.add(STATE, names[j], dirk.alpha[i, j])
            self.mass(made, y, STATE)
            made.load(y, i)
            self.solve(made, y, h)
            if needed[i]:
                made.copy(names[i], y)
                made.add(names[i], STATE, -1.0)
        if accurate:
            made.exchange(STATE, y)
        else:
            made.copy(STATE, "start")
            for beta, name in zip(dirk.beta, names, strict=True):
                made.add(STATE, name, beta)
        return made

    @property
    def _parts(self) -> list[range]:
        """The stages of the methods of one or two stages that the method is a sequence of; empty where it is none."""
        parts = [range(a, b) for a, b in pairwise(self.dirk.restarts)]
        return parts if all(len(part) <= 2 for part in parts) else []

    def _short(self, made: StepProgram, y: str, stages: range) -> None:
        """Append one or two stages: the second one begins at a blend of the start and the first."""
        for i in stages:
            if i > stages.start:
                made.blend(STATE, y, 1.0 - self.dirk.alpha[i, i - 1])
            self.mass(made, y, STATE)
            made.load(y, i)
            self.solve(made, y, self.steps[i])
        made.exchange(STATE, y)

    def first_stages(self) -> StepProgram:
        """The stages but the last; states number ``i`` are added to the right-hand side of stage ``i``, states number
        ``stages + i`` are its value.
        """
        dirk, made = self.dirk, self.program()
        y = made.vector("y")
        names = [made.vector(f"d{i}") for i in range(dirk.stages - 1)]
        made.copy(made.vector("start"), STATE)
        for i, name in enumerate(names):
            if i:
                made.copy(STATE, "start")
            for j in range(i):
                if dirk.alpha[i, j]:
                    made.add(STATE, names[j], dirk.alpha[i, j])
            self.mass(made, y, STATE)
            made.load(y, i)
            self.solve(made, y, self.steps[i])
            made.store(y, dirk.stages + i)
            made.copy(name, y)
            made.add(name, STATE, -1.0)
        return made

    def backward(self, *, sources: bool = False) -> StepProgram:
        """The transposed step; states number ``i`` are the adjoints of the right-hand side of stage ``i``. With
        ``sources`` states number ``stages + i`` are added to the right-hand side of the transposed stage, and those
        number ``2 stages + i`` to the product of its solution with ``M^T``.
        """
        dirk, made = self.dirk, self.program()
        y, accurate, last = made.vector("y"), dirk.stiffly_accurate, dirk.stages - 1
        if accurate and self._parts and not sources:
            for part in reversed(self._parts):
                self._short_transposed(made, y, part)
            return made
        v = made.vector("v")
        names = [made.vector(f"d{i}") for i in range(dirk.stages - accurate)]
        written = set()  # the other ones are zero still
        if not accurate:
            written.update(names)
            for name, beta in zip(names, dirk.beta, strict=False):
                made.copy(name, STATE, beta)
        for i in reversed(range(dirk.stages)):
            from_end = accurate and i == last
            if from_end:
                made.exchange(y, STATE)
            elif names[i] in written:
                made.copy(y, names[i])
            else:
                made.zero(y)
            if sources:
                made.load(y, dirk.stages + i)
            if self.drop_rows:
                made.clear(y, self.bc_rows)
            self.solve(made, y, self.steps[i], transposed=True)
            made.store(y, i)
            if from_end:
                self.mass(made, STATE, y, transposed=True)
                if sources:
                    made.load(STATE, 2 * dirk.stages + i)
                source = STATE
            else:
                self.mass(made, v, y, transposed=True)
                if sources:
                    made.load(v, 2 * dirk.stages + i)
                if names[i] in written:
                    made.add(v, names[i], -1.0)
                made.add(STATE, v)
                source = v
            for j in range(i):
                if dirk.alpha[i, j]:
                    (made.add if names[j] in written else made.copy)(names[j], source, dirk.alpha[i, j])
                    written.add(names[j])
        return made

    def _short_transposed(self, made: StepProgram, y: str, stages: range) -> None:
        """Append the transpose of :meth:`_short`."""
        made.exchange(y, STATE)
        for i in reversed(stages):
            if self.drop_rows:
                made.clear(y, self.bc_rows)
            self.solve(made, y, self.steps[i], transposed=True)
            made.store(y, i)
            last = i == stages[-1]
            self.mass(made, STATE, y, transposed=True, keep=None if last else 1.0 - self.dirk.alpha[i + 1, i])
            if i > stages.start:
                made.copy(y, STATE, self.dirk.alpha[i, i - 1])


class MatrixRecursion(Recursion):
    """The recursion with matrices of the whole state.

    Parameters
    ----------
    M, MT
        The mass matrix and its transpose, the same object where it is symmetric.
    factors
        Factors of ``S`` by ``a_ii dt``.
    *args
        Parameters of :class:`Recursion`.
    """

    def __init__(
        self,
        M: PETSc.Mat,
        MT: PETSc.Mat,
        factors: Mapping[float, Factor],
        dirk: DIRK,
        steps: np.ndarray,
        bc_rows: np.ndarray,
        drop_rows: bool,
    ):
        super().__init__(dirk, steps, bc_rows, drop_rows)
        self._M, self._MT, self._factors = M, MT, factors

    def program(self) -> StepProgram:
        """A program for states of one part."""
        size = self._M.getLocalSize()[0]
        return StepProgram({"whole": slice(0, size)}, size)

    def mass(
        self, program: StepProgram, out: str, x: str, *, transposed: bool = False, keep: float | None = None
    ) -> None:
        """Append ``out = M x``, or ``out = M^T x``; ``keep``: add ``keep out``."""
        program.multiply(out, self._MT if transposed else self._M, x, add=keep is not None, scale=keep or 0.0)

    def solve(self, program: StepProgram, y: str, h: float, *, transposed: bool = False) -> None:
        """Append ``y = S^{-1} y``, or ``y = S^{-T} y``."""
        append_solve(program, y, self._factors[h], transposed=transposed)


def append_solve(program: StepProgram, y: str, factor: Factor, *, transposed: bool = False) -> None:
    """Append a solve between the projections that a nullspace of the matrix requires."""
    nullspace = factor.nullspace
    if nullspace is not None:
        program.project(y, nullspace.right if transposed else nullspace.left)
    program.solve(y, factor, transposed=transposed)
    if nullspace is not None:
        program.project(y, nullspace.left if transposed else nullspace.right)
