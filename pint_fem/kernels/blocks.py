"""Sparse products and solves on blocks of states, bitwise identical for every distribution of the steps over ranks.

A C-ordered ``(width, n)`` array is a column-major ``n x width`` PETSc dense matrix, so a block of states is one
multi-right-hand-side solve. BLAS kernels may round a column differently with the number of columns and its place
among them. Here all blocks have the same width and a state has the *lane* ``number % WIDTH`` that follows from its
place on the time axis, never from its rank: the results on any number of time ranks are bitwise identical.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from firedrake.petsc import PETSc
from petsctools import OptionsManager

from pint_fem.errors import InputError, is_numerical
from pint_fem.kernels.direct import completed, default_solver, factor_bytes, is_finite, matrix_bytes, trial_residual
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.nullspace import Nullspace

__all__ = [
    "WIDTH",
    "BlockOperator",
    "Factor",
    "StateBlock",
    "is_symmetric",
    "lanes",
    "multiply",
    "new_states",
    "product",
]

WIDTH = 8
"""Number of states of a block."""


_ACCURATE = 1e-11
"""Largest backward error of a Cholesky factor's trial solve."""


def lanes(count: int, lane: int) -> Iterator[tuple[slice, slice]]:
    """Cut ``count`` states whose first is number ``lane`` into blocks: ``(rows of the states, lanes of the block)``."""
    row = 0
    while row < count:
        first = (lane + row) % WIDTH
        size = min(WIDTH - first, count - row)
        yield slice(row, row + size), slice(first, first + size)
        row += size


class StateBlock:
    """A block of states: a dense ``n x WIDTH`` PETSc matrix, and its storage as a writable ``array`` ``(WIDTH, n)``."""

    def __init__(self, matrix: PETSc.Mat):
        self.matrix = matrix
        self.array = matrix.getDenseArray().T

    @classmethod
    def zeros(cls, sizes: tuple[int, int | None], comm: PETSc.Comm) -> StateBlock:
        """Zero states, for local and global ``sizes`` of a state."""
        matrix = PETSc.Mat().createDense((sizes, (None, WIDTH)), comm=comm)
        matrix.setUp()
        matrix.zeroEntries()
        matrix.assemble()
        return cls(matrix)

    def duplicate(self) -> StateBlock:
        """A block of zero states of the same size."""
        return self.zeros(self.matrix.getSizes()[0], self.matrix.comm)

    def load(self, states: np.ndarray, where: slice) -> None:
        """Copy states to the lanes ``where``; the other lanes become zero."""
        self.array[: where.start] = 0
        self.array[where.stop :] = 0
        self.array[where] = states


def new_states(sizes: tuple[int, int | None], comm: PETSc.Comm, *, single: bool) -> StateBlock | PETSc.Vec:
    """A zero block of states, or a zero vector of a single one, for local and global ``sizes`` of a state."""
    if not single:
        return StateBlock.zeros(sizes, comm)
    vector = PETSc.Vec().createMPI(sizes, comm=comm)
    vector.set(0.0)
    return vector


def product(matrix: PETSc.Mat, states: StateBlock | PETSc.Vec) -> StateBlock | PETSc.Vec:
    """The product with a block or a vector, as a new one that :func:`multiply` may overwrite for the same matrix."""
    if isinstance(states, StateBlock):
        return StateBlock(matrix.matMult(states.matrix))
    out = matrix.createVecLeft()
    matrix.mult(states, out)
    return out


def multiply(matrix: PETSc.Mat, states: StateBlock | PETSc.Vec, out: StateBlock | PETSc.Vec) -> None:
    """Write the product with a block or a vector to what :func:`product` returned for the same matrix."""
    if isinstance(states, StateBlock):
        matrix.matMult(states.matrix, out.matrix)
    else:
        matrix.mult(states, out)


class _SolveRecord:
    """The smallest ``KSPConvergedReason`` since it was last read; an object of its own, as PETSc's solver owns what it
    calls.
    """

    def __init__(self) -> None:
        self.worst = 0

    def note(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """Callback after each solve."""
        self.worst = min(self.worst, int(ksp.getConvergedReason()))


class Factor:
    """Solves with a fixed matrix, one vector or a block at a time, plain or transposed.

    Parameters
    ----------
    matrix
        Assembled AIJ matrix.
    parameters
        PETSc options, completed by :func:`~pint_fem.kernels.direct.completed`; empty for the default solver.
    symmetric
        Whether the matrix is symmetric.
    prefix
        Options prefix.
    geometry
        Space of the unknowns, for preconditioners that require it.
    nullspace
        Nullspace of the matrix; right-hand sides are then projected in place.

    Raises
    ------
    InputError
        If the matrix is not finite, or the nullspace not that of the matrix.
    """

    def __init__(
        self,
        matrix: PETSc.Mat,
        parameters: dict,
        *,
        symmetric: bool,
        prefix: str = "pint_",
        geometry: Geometry | None = None,
        nullspace: Nullspace | None = None,
    ):
        if not is_finite(matrix):
            raise InputError(
                "an operator has entries that are infinite or NaN, or too large: check the coefficients in the forms"
            )
        self.symmetric, self._geometry, self._nullspace = symmetric, geometry, nullspace
        self._parameters: dict = {}
        self._solves = _SolveRecord()
        self.ksp = self._build(matrix, parameters, prefix, nullspace)
        # a transposed block solve is missing in most packages: the transpose has a factor of its own
        self.ksp_T = self.ksp
        if not symmetric:
            turned = None if nullspace is None else nullspace.transposed
            self.ksp_T = self._build(matrix.transpose(PETSc.Mat()), parameters, prefix, turned)

    def _build(self, matrix: PETSc.Mat, parameters: dict, prefix: str, nullspace: Nullspace | None) -> PETSc.KSP:
        """A solver by the given options, or by Cholesky where that is accurate, else by LU."""
        comm, unknowns = matrix.comm, matrix.getSize()[0]
        given = completed(parameters, comm, unknowns) if parameters else {}
        singular = None
        if nullspace is not None:
            nullspace.check(matrix)
            if given.get("ksp_type", "preonly") != "preonly":
                singular = matrix
                nullspace.attach(singular)
            matrix = nullspace.pinned(matrix)
        if parameters:
            return self._set_up(matrix, given, prefix, singular)
        if self.symmetric and matrix.getDiagonal().min()[1] > 0:  # else it is not positive definite
            matrix.setOption(PETSc.Mat.Option.SPD, True)
            try:
                ksp = self._set_up(matrix, default_solver(comm, unknowns, spd=True), prefix)
                if self._is_accurate(ksp, matrix):
                    return ksp
            except (PETSc.Error, ArithmeticError) as error:
                if not is_numerical(error):
                    raise
            matrix.setOption(PETSc.Mat.Option.SPD, False)  # it is not positive definite
        return self._set_up(matrix, default_solver(comm, unknowns), prefix)

    def _is_accurate(self, ksp: PETSc.KSP, matrix: PETSc.Mat) -> bool:
        """Whether a trial solve is accurate to round-off: CHOLMOD factors indefinite matrices too, without pivots."""
        x, b = matrix.createVecs()
        start, stop = b.getOwnershipRange()
        b.array[:] = np.cos(np.arange(start, stop) ** 2)
        residual, norm = trial_residual(ksp, b, x), PETSc.NormType.NORM_INFINITY
        self._check()
        limit = _ACCURATE * (matrix.norm(norm) * x.norm(norm) + b.norm(norm))
        x.destroy()
        b.destroy()
        return residual <= limit

    def _set_up(self, matrix: PETSc.Mat, parameters: dict, prefix: str, singular: PETSc.Mat | None = None) -> PETSc.KSP:
        """A solver of a regular matrix, or of the singular one that it was made of with it as preconditioner."""
        ksp = PETSc.KSP().create(matrix.comm)
        ksp.setOperators(matrix if singular is None else singular, matrix)
        self._parameters = parameters
        options = OptionsManager(parameters, prefix)
        if self._geometry is not None and parameters.get("pc_type") in ("mg", "python"):
            self._geometry.prepare(ksp, parameters)
        options.set_from_options(ksp)
        ksp.setErrorIfNotConverged(True)
        with options.inserted_options():
            ksp.setUp()
        if matrix.comm.size > 1 or ksp.getType() != PETSc.KSP.Type.PREONLY:
            # PETSc cannot continue a block after an error in the middle of it: record failures, and raise afterwards
            ksp.setErrorIfNotConverged(False)
            ksp.setPostSolve(self._solves.note)
        return ksp

    def _check(self) -> None:
        """Raise if a solve since the last call has failed; the solver remains usable."""
        worst, self._solves.worst = self._solves.worst, 0
        if worst < 0:
            raise ArithmeticError(f"PETSc's linear solver failed (KSPConvergedReason {worst})")

    @property
    def is_direct(self) -> bool:
        """Whether solves are by factors of the whole matrix."""
        return self.ksp.getType() == PETSc.KSP.Type.PREONLY

    @cached_property
    def nbytes(self) -> dict[str, int]:
        """Bytes of matrices and factors on this rank; collective at first where each rank has a factor of the whole."""
        ksps = [self.ksp] if self.ksp_T is self.ksp else [self.ksp, self.ksp_T]
        return {
            "matrices": sum(matrix_bytes(ksp.getOperators()[0]) for ksp in ksps),
            "factors": sum(factor_bytes(ksp, self._parameters) for ksp in ksps),
        }

    def solve(self, b: StateBlock | PETSc.Vec, x: StateBlock | PETSc.Vec, *, transposed: bool = False) -> None:
        """Solve for one vector or a block of states, with the matrix or its transpose (collective).

        Parameters
        ----------
        b, x
            Right-hand sides and solutions, blocks or vectors; with a nullspace ``b`` is projected in place.
        transposed
            Whether to solve with the transpose.

        Raises
        ------
        ArithmeticError, PETSc.Error
            If the solver fails.
        """
        ksp = self.ksp_T if transposed else self.ksp
        if self._nullspace is not None:
            self._nullspace.project_source(b.array, transposed=transposed)
        if isinstance(b, StateBlock):
            ksp.matSolve(b.matrix, x.matrix)
        else:
            ksp.solve(b, x)
        self._check()
        if self._nullspace is not None:
            self._nullspace.project_solution(x.array, transposed=transposed)


def is_symmetric(matrix: PETSc.Mat) -> bool:
    """Whether a matrix is symmetric up to round-off; without rows of boundary conditions, which have another scale."""
    return bool(matrix.isSymmetric(1e-13 * matrix.norm(PETSc.NormType.INFINITY)))


class BlockOperator:
    """Products ``out[i] = A u[i]`` of an AIJ matrix with many states, ``WIDTH`` at a time."""

    def __init__(self, matrix: PETSc.Mat):
        self.matrix = matrix
        rows, columns = matrix.getSizes()
        self.rows = rows[0]
        self._in = StateBlock.zeros(columns, matrix.comm)
        self._out = product(matrix, self._in)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the matrix and the blocks on this rank."""
        return {"matrices": matrix_bytes(self.matrix), "blocks": self._in.array.nbytes + self._out.array.nbytes}

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """The products ``(k, rows)`` with states ``(k, columns)``, for the same ``k`` on all ranks (collective)."""
        out = np.empty((len(states), self.rows))
        for rows, where in lanes(len(states), 0):
            self._in.load(states[rows], where)
            multiply(self.matrix, self._in, self._out)
            out[rows] = self._out.array[where]
        return out
