"""A solver whose matrix is replaced by other ones with the same nonzero pattern, factored as quickly as is accurate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from firedrake.petsc import PETSc
from petsctools import OptionsManager

from pint_fem.errors import is_numerical
from pint_fem.kernels.direct import require_finite, trial_residual
from pint_fem.kernels.nullspace import Nullspace

__all__ = ["UpdatableFactor", "diagonal"]

ACCURATE = 1e-13
"""Largest residual of a solve for ones with a factor as good as a pivoted one, relative to the matrix's norm."""
_MAX = PETSc.NormType.NORM_INFINITY


class UpdatableFactor:
    """A solver with a matrix of its own, which is replaced by other ones with the same nonzero pattern.

    Parameters
    ----------
    parameters
        PETSc options.
    quick
        PETSc options of a solver that is tried first, and used for a matrix where its residuals are at round-off.
    nullspace
        Nullspace of the matrix, or ``None``.
    prefix
        Prefix of options in PETSc's database.

    Attributes
    ----------
    ksp : PETSc.KSP or None
        The solver of the present matrix.
    version : object
        Identifies the matrix that is factored; ``None`` where none is.
    diagonal : ndarray or None
        Magnitudes of the matrix's diagonal.
    """

    def __init__(
        self,
        parameters: Mapping,
        quick: Mapping | None = None,
        nullspace: Nullspace | None = None,
        prefix: str = "pint_form_",
    ):
        self._nullspace, self._direct = nullspace, parameters.get("ksp_type") == "preonly"
        self._options = [OptionsManager(p, prefix) for p in (quick, parameters) if p is not None]
        self._made: list[PETSc.KSP | None] = [None] * len(self._options)
        self.matrix: PETSc.Mat | None = None
        self._pinned: PETSc.Mat | None = None
        self._source: PETSc.Vec | None = None
        self.ksp: PETSc.KSP | None = None
        self.version: object = None
        self.diagonal: np.ndarray | None = None

    def factor(self, matrix: PETSc.Mat, version: object) -> None:
        """Copy a matrix, identified by ``version``, and set up the solver, with the symbolic factorisation of earlier
        ones (collective).

        Raises
        ------
        SolverFailure
            If the matrix is not finite: some packages never return from its factorisation.
        PETSc.Error
            If it cannot be factored.
        """
        self.version = None
        require_finite(matrix, "the Jacobian of a stage")
        if self.matrix is None:
            self.matrix = matrix.copy()
        else:
            matrix.copy(self.matrix, structure=PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
        if self._nullspace is not None:
            self._make_regular()
        if len(self._options) == 1 or not self._is_accurate():
            self.ksp = self._set_up(-1)
        self.diagonal, self.version = diagonal(matrix), version

    def _make_regular(self) -> None:
        """Pin the matrix of a direct solver, and one for the preconditioner of an iterative one."""
        self._nullspace.check(self.matrix)
        self._source = self._source or self.matrix.createVecRight()
        if self._direct:
            self._nullspace.pin(self.matrix)
            return
        if self._pinned is not None:
            self._pinned.destroy()
        self._nullspace.attach(self.matrix)
        self._pinned = self._nullspace.pinned(self.matrix)

    def _set_up(self, which: int) -> PETSc.KSP:
        """Set up one of the solvers, the quick one (0) or the other one (-1), for the present matrix."""
        options, ksp = self._options[which], self._made[which]
        if ksp is None:
            ksp = self._made[which] = PETSc.KSP().create(self.matrix.comm)
            options.set_from_options(ksp)
            ksp.setErrorIfNotConverged(True)
        ksp.setOperators(self.matrix, self._pinned or self.matrix)
        with options.inserted_options():
            ksp.setUp()
        return ksp

    def _is_accurate(self) -> bool:
        """Set up the quick solver, and test whether it solves for a vector of ones."""
        x, b = self.matrix.createVecs()
        x.set(1)
        self.matrix.mult(x, b)
        try:
            self.ksp = self._set_up(0)
            residual = trial_residual(self.ksp.getOperators()[0], self.ksp.solve, b, x)
        except PETSc.Error as error:  # a pivot is zero
            if not is_numerical(error):
                raise
            return False
        return residual <= ACCURATE * self.matrix.norm(_MAX)

    def solve(self, b: PETSc.Vec, x: PETSc.Vec, *, transposed: bool = False) -> None:
        """Solve for one vector, with the matrix or its transpose (collective)."""
        solve = self.ksp.solveTranspose if transposed else self.ksp.solve
        if self._nullspace is None:
            solve(b, x)
            return
        b.copy(self._source)
        self._nullspace.project_source(self._source.array, transposed=transposed)
        solve(self._source, x)
        self._nullspace.project_solution(x.array, transposed=transposed)

    def destroy(self) -> None:
        """Destroy PETSc's objects (collective)."""
        for item in (*self._made, self.matrix, self._pinned, self._source):
            if item is not None:
                item.destroy()
        self._made = [None] * len(self._made)
        self.ksp = self.matrix = self.version = self._pinned = self._source = None


def diagonal(matrix: PETSc.Mat) -> np.ndarray:
    """Magnitudes of the entries of a matrix's diagonal on own rows."""
    vector = matrix.createVecLeft()
    matrix.getDiagonal(vector)
    out = np.abs(vector.array_r)
    vector.destroy()
    return out
