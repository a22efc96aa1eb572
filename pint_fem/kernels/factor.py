"""Solves with a fixed matrix: by triangular factors for kernels on lanes, or by one of PETSc's solvers."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property

import numpy as np
from firedrake.petsc import PETSc
from petsctools import OptionsManager

from pint_fem.collective import all_ranks, any_rank
from pint_fem.errors import InputError, is_numerical
from pint_fem.kernels.direct import (
    completed,
    default_solver,
    direct_solver,
    factor_bytes,
    is_finite,
    is_large,
    matrix_bytes,
    solves_accurately,
)
from pint_fem.kernels.lanes.structures import kernels
from pint_fem.kernels.lanes.triangular import ACCURATE, TriangularFactors
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.nullspace import Nullspace
from pint_fem.kernels.replication import Replication, whole_matrix
from pint_fem.kernels.space.choice import BlockSolver, block_solver

__all__ = ["Factor", "is_symmetric"]


def is_symmetric(matrix: PETSc.Mat) -> bool:
    """Whether a matrix is symmetric up to round-off; without rows of boundary conditions, which have another scale."""
    return bool(matrix.isSymmetric(1e-13 * matrix.norm(PETSc.NormType.INFINITY)))


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
    """Solves with a fixed matrix or its transpose.

    Without options, small systems are factored for the kernels on lanes, on every rank in space; others, and those for
    which these factors are not accurate, by PETSc.

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
    like
        A factor of a matrix with the same nonzero pattern, whose order of elimination is used.
    reproducible
        Whether results have to be the same bits in each run on several ranks in space.
    few
        Whether few solves are expected, for which a factorisation of a large matrix does not pay.

    Attributes
    ----------
    matrix : PETSc.Mat
        The matrix, made regular where there is a nullspace.
    triangular : TriangularFactors or None
        The factors for kernels on lanes, the same on all ranks of the matrix.
    blocks : BlockSolver or None
        The solver of a large symmetric matrix for blocks of states.

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
        like: Factor | None = None,
        reproducible: bool = False,
        few: bool = False,
    ):
        if not is_finite(matrix):
            raise InputError(
                "an operator has entries that are infinite or NaN, or too large: check the coefficients in the forms"
            )
        self.symmetric, self._geometry, self.nullspace = symmetric, geometry, nullspace
        self._given, self._prefix, self._reproducible = parameters, prefix, reproducible
        self._parameters: dict = {}
        self._solves = _SolveRecord()
        self._singular = matrix
        self.matrix = matrix
        if nullspace is not None:
            nullspace.check(matrix)
            self.matrix = nullspace.pinned(matrix)
        self.blocks: BlockSolver | None = None
        self.triangular: TriangularFactors | None = None
        if few:
            self.blocks = self._blocks(like, few=True)
        if self.blocks is None:
            self.triangular = self._triangular(like)
        if self.blocks is None and self.triangular is None:
            self.blocks = self._blocks(like)
        self._replication = Replication(matrix.getLocalSize()[0], matrix.comm.tompi4py())
        if self.triangular is None and self.blocks is None:
            _ = self.ksp  # a matrix that cannot be factored raises its error here

    def _triangular(self, like: Factor | None) -> TriangularFactors | None:
        """The factors for the kernels, where PETSc's options do not choose another solver (collective)."""
        comm, unknowns = self.matrix.comm, self.matrix.getSize()[0]
        if self._is_chosen or not unknowns or direct_solver(comm, unknowns) is None:
            return None
        if any_rank(comm.tompi4py(), kernels() is None):
            return None
        whole, made = whole_matrix(self.matrix), None
        order = None if like is None or like.triangular is None else like.triangular.order
        with suppress(ArithmeticError, MemoryError):
            made = TriangularFactors(whole, symmetric=self.symmetric, order=order)
        return made if all_ranks(comm.tompi4py(), made is not None) else None

    @property
    def _is_chosen(self) -> bool:
        """Whether PETSc's options choose a solver."""
        return bool(self._given or PETSc.Options(self._prefix).getAll())

    def _blocks(self, like: Factor | None, *, few: bool = False) -> BlockSolver | None:
        """A solver for blocks of states of a large symmetric matrix, where options choose no other (collective)."""
        if self._is_chosen or not self.symmetric or not is_large(self.matrix.getSize()[0]):
            return None
        known = None if like is None else like.blocks
        given = dict(prefix=self._prefix, reproducible=self._reproducible, few=few, like=known)
        return block_solver(self.matrix, self._geometry, **given)

    # -- PETSc ---------------------------------------------------------------------------------------------------------
    @cached_property
    def ksp(self) -> PETSc.KSP:
        """PETSc's solver (collective when first used)."""
        return self._build(self.matrix, self._singular)

    @cached_property
    def _ksp_transposed(self) -> PETSc.KSP:
        """PETSc's solver of the transpose, which some solvers lack (collective when first used)."""
        if self.symmetric:
            return self.ksp
        turned = singular = self.matrix.transpose(PETSc.Mat())
        if self._singular is not self.matrix:
            singular = self._singular.transpose(PETSc.Mat())
        return self._build(turned, singular, transposed=True)

    def _build(self, matrix: PETSc.Mat, singular: PETSc.Mat, *, transposed: bool = False) -> PETSc.KSP:
        """A solver by the given options, or by Cholesky where that is accurate, else by LU."""
        comm, unknowns = matrix.comm, matrix.getSize()[0]
        if self._given:
            given = completed(self._given, comm, unknowns, reproducible=self._reproducible)
            if self.nullspace is None or given.get("ksp_type", "preonly") == "preonly":
                return self._set_up(matrix, given)
            (self.nullspace.transposed if transposed else self.nullspace).attach(singular)
            return self._set_up(matrix, given, singular)
        if self.symmetric and matrix.getDiagonal().min()[1] > 0:  # else it is not positive definite
            matrix.setOption(PETSc.Mat.Option.SPD, True)
            try:
                ksp = self._set_up(matrix, default_solver(comm, unknowns, spd=True, reproducible=self._reproducible))
                if self._is_accurate(ksp, matrix):
                    return ksp
            except (PETSc.Error, ArithmeticError) as error:
                if not is_numerical(error):
                    raise
            matrix.setOption(PETSc.Mat.Option.SPD, False)  # it is not positive definite
        return self._set_up(matrix, default_solver(comm, unknowns, reproducible=self._reproducible))

    def _is_accurate(self, ksp: PETSc.KSP, matrix: PETSc.Mat) -> bool:
        """Whether a trial solve is accurate to round-off: CHOLMOD factors indefinite matrices too, without pivots."""

        def solve(b: PETSc.Vec, x: PETSc.Vec) -> None:
            ksp.solve(b, x)
            self._check()

        return solves_accurately(matrix, solve, ACCURATE)

    def _set_up(self, matrix: PETSc.Mat, parameters: dict, singular: PETSc.Mat | None = None) -> PETSc.KSP:
        """A solver of a regular matrix, or of the singular one that it was made of with it as preconditioner."""
        ksp = PETSc.KSP().create(matrix.comm)
        ksp.setOperators(matrix if singular is None else singular, matrix)
        self._parameters = parameters
        options = OptionsManager(parameters, self._prefix)
        ksp.setOptionsPrefix(options.options_prefix)  # solvers on multigrid's levels take theirs from it
        if self._geometry is not None and parameters.get("pc_type") in ("mg", "python"):
            self._geometry.prepare(ksp, parameters)
        options.set_from_options(ksp)
        ksp.setErrorIfNotConverged(True)
        with options.inserted_options():
            ksp.setUp()
        if matrix.comm.size > 1 or ksp.getType() != PETSc.KSP.Type.PREONLY:
            # all ranks have to continue after an error: failures are recorded, and raised afterwards
            ksp.setErrorIfNotConverged(False)
            ksp.setPostSolve(self._solves.note)
        return ksp

    def _check(self) -> None:
        """Raise if a solve since the last call has failed; the solver remains usable."""
        worst, self._solves.worst = self._solves.worst, 0
        if worst < 0:
            raise ArithmeticError(f"PETSc's linear solver failed (KSPConvergedReason {worst})")

    # -- solves --------------------------------------------------------------------------------------------------------
    @property
    def is_direct(self) -> bool:
        """Whether solves are by factors of the whole matrix."""
        if self.blocks is not None:
            return self.blocks.is_direct
        return self.triangular is not None or self.ksp.getType() == PETSc.KSP.Type.PREONLY

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes on this rank of PETSc's matrices and factors, or of the factors for the kernels; collective where each
        rank has PETSc's factor of the whole.
        """
        if self.triangular is not None:
            return {"matrices": matrix_bytes(self.matrix), "kernels": self.triangular.nbytes}
        if self.blocks is not None:
            return {"matrices": matrix_bytes(self.matrix), "kernels": self.blocks.nbytes}
        return self._petsc_bytes

    @cached_property
    def _petsc_bytes(self) -> dict[str, int]:
        ksps = [self.ksp] if self.symmetric else [self.ksp, self._ksp_transposed]
        return {
            "matrices": sum(matrix_bytes(ksp.getOperators()[0]) for ksp in ksps),
            "factors": sum(factor_bytes(ksp, self._parameters) for ksp in ksps),
        }

    def solve(self, b: PETSc.Vec, x: PETSc.Vec, *, transposed: bool = False) -> None:
        """Solve for one vector, with the matrix or its transpose (collective).

        Parameters
        ----------
        b, x
            Right-hand side and solution; with a nullspace ``b`` is projected in place.
        transposed
            Whether to solve with the transpose.

        Raises
        ------
        ArithmeticError, PETSc.Error
            If the solver fails.
        """
        if self.nullspace is not None:
            self.nullspace.project_source(b.array, transposed=transposed)
        self.solve_regular(b, x, transposed=transposed)
        if self.nullspace is not None:
            self.nullspace.project_solution(x.array, transposed=transposed)

    def solve_regular(self, b: PETSc.Vec, x: PETSc.Vec, *, transposed: bool = False) -> None:
        """Solve for one vector with :attr:`matrix`, without projections (collective); errors as for :meth:`solve`."""
        if self.triangular is not None:
            whole = self._replication.gathered(b.array_r)
            x.array[:] = self.triangular.solve(whole, transposed=transposed)[self._replication.own]
        elif self.blocks is not None:
            x.array[:] = self.blocks.solve(b.array_r[None])[0]
        else:
            (self._ksp_transposed if transposed else self.ksp).solve(b, x)
            self._check()

    @property
    def on_blocks(self) -> bool:
        """Whether :meth:`solve_rows` solves for all right-hand sides at once."""
        return self.blocks is not None or self.triangular is not None

    def solve_rows(self, rows: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """The solutions ``(k, n)`` of :attr:`matrix` for right-hand sides ``(k, n)``, own unknowns, without projections
        (collective); errors as for :meth:`solve`.
        """
        if self.blocks is not None:  # the matrix is symmetric
            return self.blocks.solve(rows)
        out = np.empty(rows.shape)
        if self.triangular is not None:
            copies = self._replication  # a right-hand side on one rank where every rank has one
            divided = 1 < copies.comm.size <= len(rows)
            solved = [
                self.triangular.solve(row, transposed=transposed)
                for row in (copies.divided(rows) if divided else copies.gathered(rows))
            ]
            if divided:
                copies.returned(np.array(solved).reshape(-1, copies.total), out)
            else:
                out[:] = [row[copies.own] for row in solved]
            return out
        x, b = self.matrix.createVecs()
        for row, result in zip(rows, out, strict=True):
            b.array[:] = row
            self.solve_regular(b, x, transposed=transposed)
            result[:] = x.array_r
        return out

    def solve_within(self, tolerance: float | None) -> None:
        """Set the reduction of residuals at which an iterative solver on blocks stops; ``None``: that of exact solves.
        Direct solvers, and those that PETSc's options choose, have no such tolerance.
        """
        if self.blocks is not None:
            self.blocks.solve_within(tolerance)

    @property
    def in_space(self) -> tuple[str, dict[str, float]] | None:
        """The kind of the solver on blocks and its sizes, for the performance model; ``None`` for other solvers."""
        return None if self.blocks is None else self.blocks.in_space

    @property
    def description(self) -> str:
        """The solver in a few words."""
        if self.triangular is not None:
            size = self.matrix.comm.size
            whole = "" if size == 1 else f", of the whole on each of {size} ranks"
            return f"triangular factors of {self.triangular.left.entries:,} entries{whole}"
        if self.blocks is not None:
            return self.blocks.description
        return f"PETSc's {self.ksp.getType()} with {self.ksp.getPC().getType()}"
