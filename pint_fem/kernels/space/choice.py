r"""The solver of a large symmetric matrix on the ranks in space, by the bytes that a solve reads.

Solves are limited by what they read from memory. A solve by substructuring reads the rank's factor twice, and its rows
of the interface's inverse; an iteration of conjugate gradients reads the matrix once in double precision, and a
multigrid cycle about six times in single precision:

.. math::
    b_\text{direct} = 16\, f + 8\, n_\Gamma^2 / P , \qquad
    b_\text{diagonal} = i \,(12\, e + 100\, n) , \qquad
    b_\text{multigrid} = i \,(12\, e + 46\, e + 200\, n) ,

with ``f`` nonzeros of the rank's factor, ``e`` entries and ``n`` rows of its part of the matrix, and ``i`` iterations,
which are counted by a solve. All numbers are the largest over the ranks; nothing is timed, so that the choice is the
same in each run.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.collective import all_ranks
from pint_fem.kernels.direct import solves_accurately
from pint_fem.kernels.lanes.triangular import ACCURATE
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.space.compiled import block_kernels
from pint_fem.kernels.space.conjugate_gradients import ConjugateGradients
from pint_fem.kernels.space.hierarchies import algebraic_cycle, geometric_cycle, has_hierarchy
from pint_fem.kernels.space.matrices import BlockMatrix
from pint_fem.kernels.space.multigrid import MultigridCycle
from pint_fem.kernels.space.patches import requires_patches
from pint_fem.kernels.space.substructuring import Partition, Substructuring

__all__ = ["BlockSolver", "Iterative", "block_solver"]

FEW = 40
"""Iterations with the inverse diagonal up to which nothing else is set up for a few solves."""
MOST_DIAGONAL, MOST_MULTIGRID = 100, 60
"""Iterations above which a preconditioner is not taken."""
EXPECTED = 12
"""Iterations that multigrid is expected to take before it is set up."""
_RANGE = 1e15  # of entries on a diagonal that need no scaling for single precision
LARGEST_FACTOR = 200_000_000
"""Nonzeros of a rank's factor above which there is none: 1.6 GB."""


class BlockSolver(Protocol):
    """A solver for blocks of states.

    Attributes
    ----------
    description : str
        What it is, for reports.
    is_direct : bool
        Whether it is by factors of the whole matrix.
    """

    description: str
    is_direct: bool

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """The solutions ``(k, n)`` for right-hand sides ``(k, n)``, own unknowns (collective)."""

    def solve_within(self, tolerance: float | None) -> None:
        """Set the reduction of residuals at which iterations stop; ``None``: the one they were made with."""

    @property
    def in_space(self) -> tuple[str, dict[str, float]]:
        """Its kind and sizes, for the performance model."""

    @property
    def nbytes(self) -> int:
        """Bytes of factors, matrices and work arrays on this rank."""


class Iterative:
    """Conjugate gradients with a preconditioner.

    Parameters
    ----------
    method
        The iteration.
    name
        Of the preconditioner.
    """

    is_direct = False

    def __init__(self, method: ConjugateGradients, name: str):
        self.method, self._name, self.expected = method, name, method.iterations
        self.solve, self._tolerance = method.solve, method.tolerance

    def solve_within(self, tolerance: float | None) -> None:
        """Set the reduction of residuals at which iterations stop, at least the one they were made with; ``None``: that
        one.
        """
        self.method.tolerance = max(self._tolerance, tolerance or 0.0)

    @property
    def description(self) -> str:
        """The method with its number of iterations."""
        return f"conjugate gradients with {self._name}, {self.expected} iterations to {self._tolerance:.0e}"

    @property
    def in_space(self) -> tuple[str, dict[str, float]]:
        """Multigrid, of one level without coarse ones, with the number of iterations."""
        levels = len(self.method.cycle.levels) + 1 if isinstance(self.method.cycle, MultigridCycle) else 1
        return "multigrid", {"iterations": float(self.expected), "levels": float(levels)}

    @property
    def nbytes(self) -> int:
        """Bytes of matrices and work arrays on this rank."""
        cycle = self.method.cycle
        return (
            self.method.matrix.nbytes + self.method.nbytes + (cycle.nbytes if isinstance(cycle, MultigridCycle) else 0)
        )


def block_solver(
    matrix: PETSc.Mat,
    geometry: Geometry | None,
    *,
    prefix: str,
    reproducible: bool = False,
    few: bool = False,
    like: BlockSolver | None = None,
) -> BlockSolver | None:
    """The solver of a symmetric matrix, or ``None`` where none of these is suitable (collective).

    Parameters
    ----------
    matrix
        An assembled AIJ matrix.
    geometry
        Its space and conditions, for multigrid.
    prefix
        Prefix of options in PETSc's database.
    reproducible
        Whether results have to be the same bits in each run: without algebraic multigrid, and with direct solves
        wherever they are possible.
    few
        Whether few solves are expected, for which a factorisation does not pay.
    like
        A solver of a matrix with the same pattern.
    """
    comm = matrix.comm.tompi4py()
    if not all_ranks(comm, block_kernels(1) is not None):
        return None
    block = BlockMatrix.of_petsc(matrix)
    diagonal = _tried(block, comm, None, FEW if few else MOST_DIAGONAL, "the inverse diagonal")
    if few and diagonal is not None:
        return diagonal
    entries, rows = (comm.allreduce(float(value), op=MPI.MAX) for value in (block.nnz, block.rows))
    by_diagonal, by_multigrid = 12 * entries + 100 * rows, 58 * entries + 200 * rows  # bytes of an iteration
    limit = EXPECTED * by_multigrid
    if diagonal is not None:
        limit = min(limit, diagonal.expected * by_diagonal)
    direct = _direct(matrix, np.inf if reproducible else limit, like)
    if direct is not None:
        return direct
    multigrid = None
    if not reproducible and (diagonal is None or diagonal.expected > FEW):
        multigrid = _multigrid(matrix, block, geometry, prefix)
    if multigrid is None or diagonal is None:
        return multigrid or diagonal
    return multigrid if multigrid.expected * by_multigrid < diagonal.expected * by_diagonal else diagonal


def _tried(block: BlockMatrix, comm: MPI.Comm, cycle: MultigridCycle | None, most: int, name: str) -> Iterative | None:
    """Conjugate gradients, if they solve for a right-hand side of all frequencies in at most so many iterations."""
    try:
        method = ConjugateGradients(block, comm, cycle, most=most)
        method.solve(np.cos((np.arange(block.rows) + 1.0 + 7.0 * comm.rank) ** 2)[None])
    except ArithmeticError:
        return None
    made = Iterative(method, name)
    method.most = 10 * most
    return made


def _direct(matrix: PETSc.Mat, limit: float, like: BlockSolver | None) -> Substructuring | None:
    """Substructuring, where a solve reads at most ``limit`` bytes."""
    comm = matrix.comm.tompi4py()
    if comm.size == 1:
        return None
    known = like if isinstance(like, Substructuring) else None
    partition = Partition.of_matrix(matrix, None if known is None else known.partition.order)
    if partition is None:
        return None
    interface = 8 * float(partition.counts.sum()) ** 2 / comm.size
    most = min((limit - interface) / 16, LARGEST_FACTOR)
    if most <= 0:
        return None
    tree = None
    with suppress(ArithmeticError, MemoryError):
        tree = partition.tree(most)
    if comm.allreduce(np.inf if tree is None else float(tree.fill), op=MPI.MAX) > most:
        return None
    try:
        made = Substructuring(partition, tree)
    except ArithmeticError:
        return None

    def solve(b: PETSc.Vec, x: PETSc.Vec) -> None:
        x.array[:] = made.solve(b.array_r[None])[0]

    return made if solves_accurately(matrix, solve, ACCURATE) else None


def _multigrid(matrix: PETSc.Mat, block: BlockMatrix, geometry: Geometry | None, prefix: str) -> Iterative | None:
    """Conjugate gradients with multigrid, where the space has it and it converges."""
    comm = matrix.comm.tompi4py()
    if geometry is None or len(geometry.space) > 1:
        return None
    if not all_ranks(comm, block.halo.own == geometry.space.dof_dset.layout_vec.local_size):
        return None
    geometric = has_hierarchy(geometry)
    if requires_patches(geometry.space) and not geometric:
        return None
    matrix = _in_range(matrix)
    for kind in ("geometric", "algebraic")[0 if geometric else 1 :]:
        if kind == "algebraic" and requires_patches(geometry.space):
            continue
        try:
            cycle = geometric_cycle(matrix, geometry) if kind == "geometric" else algebraic_cycle(matrix, prefix)
        except (ArithmeticError, PETSc.Error):
            continue
        name = f"{kind} multigrid on {len(cycle.levels) + 1} levels"
        found = _tried(block, comm, cycle, MOST_MULTIGRID, name)
        if found is not None:
            return found
    return None


def _in_range(matrix: PETSc.Mat) -> PETSc.Mat:
    """The matrix, or a multiple of it by a power of two whose diagonal is in the range of single precision: a
    preconditioner may be of any multiple (collective).
    """
    diagonal = matrix.getDiagonal()
    least, largest = diagonal.min()[1], diagonal.max()[1]
    diagonal.destroy()
    if not 0 < least or (least > 1 / _RANGE and largest < _RANGE):
        return matrix
    scaled = matrix.copy()
    scaled.scale(2.0 ** -round((np.log2(least) + np.log2(largest)) / 2))
    return scaled
