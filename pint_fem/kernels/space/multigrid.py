r"""Multigrid cycles on blocks of states, as a preconditioner of symmetric positive definite matrices.

Each level has a matrix :math:`A`, an interpolation :math:`P` from the next one with :math:`A_c = P^T A P`, and a
smoother: a polynomial of :math:`B A` with a simple approximation :math:`B` of :math:`A^{-1}`, the inverse diagonal or a
sum of the inverses of patches. Polynomials are Chebyshev's of the fourth kind,

.. math::
    d_k = \frac{2k-1}{2k+3} d_{k-1} + \frac{8k+4}{2k+3} \frac{1}{\lambda} B r_k , \qquad r_{k+1} = r_k - A d_k ,
    \qquad x = x_0 + \sum_k \beta_k d_k ,

with :math:`d_0 = \frac{4}{3\lambda} B r_0`, a bound :math:`\lambda` of the eigenvalues of :math:`BA`, and weights
:math:`\beta_k` that minimise the bound of the cycle's convergence (J. Lottes, Numer. Linear Algebra Appl. 30, 2023,
Algorithm 1 and Table 1), which need no estimate of the smallest eigenvalue. Their coefficients are fixed, so that
smoothing has no sums over ranks, and a cycle is a symmetric operator. The coarsest matrix is factored on every rank.

Cycles are computed in single precision, which halves what is read from memory: conjugate gradients in double precision
correct what they round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.norms import sum_in_rank_order
from pint_fem.kernels.lanes.lane_steps import LaneSteps
from pint_fem.kernels.lanes.program import STATE, StepProgram
from pint_fem.kernels.lanes.triangular import TriangularFactors
from pint_fem.kernels.replication import Replication
from pint_fem.kernels.space.compiled import block_kernels
from pint_fem.kernels.space.matrices import BlockMatrix

__all__ = ["CoarsestLevel", "Level", "MultigridCycle", "Smoother", "largest_eigenvalue"]

SINGLE = np.dtype(np.float32)
SAFETY = 1.1
"""Factor by which the estimate of the largest eigenvalue is raised."""
OPTIMAL = {
    1: (1.125,),
    2: (1.02387287570313, 1.26408905371085),
    3: (1.00842544782028, 1.08867839208730, 1.33753125909618),
}
"""Weights of the increments by the degree of the polynomial."""
ESTIMATES = 12
"""Iterations of conjugate gradients for that estimate."""


def largest_eigenvalue(matrix: BlockMatrix, apply: Any, comm: MPI.Comm) -> float:
    """Estimate the largest eigenvalue of ``B A``, from below, by the matrix of Lanczos' method that conjugate gradients
    preconditioned by ``B`` implicitly make (collective).

    Parameters
    ----------
    matrix
        ``A``, in double precision.
    apply
        ``apply(r, z)`` writes ``B r`` to ``z``.
    comm
        Communicator in space.
    """
    kernels, n = block_kernels(1), matrix.rows
    dot = lambda x, y: _dot(kernels, comm, n, x, y)
    r, z, p, q = (matrix.vector(1) for _ in range(4))
    r[:n, 0] = np.cos((np.arange(n) + 1.0 + 17.0 * comm.rank) ** 2)
    diagonal, off = [], []
    apply(r, z)
    rz, beta, alpha = dot(r, z), 0.0, 0.0
    first = rz
    for k in range(ESTIMATES):
        if not rz > 1e-20 * first:
            break
        p[:n] = z[:n] + beta * p[:n]
        matrix.product(p, q)
        pq = dot(p, q)
        if not pq > 0:
            raise ArithmeticError("a matrix is not positive definite")
        last, alpha = alpha, rz / pq
        diagonal.append(1 / alpha + (beta / last if k else 0.0))
        r[:n] -= alpha * q[:n]
        apply(r, z)
        new = dot(r, z)
        beta = new / rz
        off.append(np.sqrt(max(beta, 0.0)) / alpha)
        rz = new
    if not diagonal:
        return 1.0
    T = np.diag(diagonal) + np.diag(off[: len(diagonal) - 1], 1) + np.diag(off[: len(diagonal) - 1], -1)
    return float(np.linalg.eigvalsh(T)[-1])


def _dot(kernels: Any, comm: MPI.Comm, n: int, x: np.ndarray, y: np.ndarray) -> float:
    out = np.empty((1, 1))
    kernels.dots(n, x.ctypes.data, y.ctypes.data, out.ctypes.data)
    return float(sum_in_rank_order(out, comm)[0, 0])


class Smoother:
    """Chebyshev polynomials of the fourth kind in ``B A``.

    Parameters
    ----------
    matrix
        ``A``, in double precision.
    comm
        Communicator in space.
    patches
        ``B``, or ``None`` for the inverse diagonal.
    degree
        Number of products with ``B`` in an application.

    Attributes
    ----------
    matrix : BlockMatrix
        ``A`` in single precision.
    bound : float
        A bound, estimated, of the eigenvalues of ``B A``.

    Raises
    ------
    ArithmeticError
        On every rank, if the matrix or ``B`` is found not to be positive definite.
    """

    def __init__(self, matrix: BlockMatrix, comm: MPI.Comm, *, patches: BlockMatrix | None = None, degree: int = 2):
        self.degree = degree
        self.matrix = matrix.astype(SINGLE)
        self._patches = None if patches is None else patches.astype(SINGLE)
        diagonal = matrix.diagonal
        if comm.allreduce(float(np.min(diagonal, initial=1.0)), op=MPI.MIN) <= 0:
            raise ArithmeticError("a matrix is not positive definite: an entry of its diagonal is not positive")
        inverse = 1 / diagonal

        def apply(r: np.ndarray, z: np.ndarray) -> None:
            if patches is None:
                z[: matrix.rows, 0] = inverse * r[: matrix.rows, 0]
            else:
                own = patches.vector(1)
                own[: matrix.rows] = r[: matrix.rows]
                patches.product(own, z)

        self.bound = SAFETY * largest_eigenvalue(matrix, apply, comm)
        self._diagonal = inverse.astype(SINGLE)
        steps = [((2 * k - 1) / (2 * k + 3), (8 * k + 4) / (2 * k + 3) / self.bound) for k in range(1, degree)]
        self._coefficients = [(0.0, 4 / (3 * self.bound)), *steps]
        self._work: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _arrays(self, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Increment, residual with the other ranks' unknowns that ``B`` refers to, and what the weights add."""
        if lanes not in self._work:
            residual = self.matrix.vector(0) if self._patches is None else self._patches.vector(lanes)
            increment, extra = np.zeros((2, self.matrix.rows, lanes), SINGLE)
            self._work[lanes] = increment, residual, extra
        return self._work[lanes]

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices and the work arrays on this rank."""
        arrays = [self._diagonal, *(a for pair in self._work.values() for a in pair)]
        patches = 0 if self._patches is None else self._patches.nbytes
        return self.matrix.nbytes + patches + sum(a.nbytes for a in arrays)

    def start(self, b: np.ndarray, x: np.ndarray) -> None:
        """``x`` from zero (collective); ``x`` as of :meth:`BlockMatrix.vector`."""
        lanes = b.shape[1]
        kernels, n, (d, r, e) = block_kernels(lanes, SINGLE), self.matrix.rows, self._arrays(lanes)
        first = self._coefficients[0][1]
        if self._patches is None:
            kernels.start(n, self._diagonal.ctypes.data, first, b.ctypes.data, x.ctypes.data, d.ctypes.data)
        else:
            r[:n] = b[:n]
            self._patches.product(r, d, first)
            x[:n] = d
        self._continue(b, x, d, r, e, 1)

    def improve(self, b: np.ndarray, x: np.ndarray) -> None:
        """``x`` from a first guess (collective)."""
        self._continue(b, x, *self._arrays(b.shape[1]), 0)

    def _continue(self, b: np.ndarray, x: np.ndarray, d: np.ndarray, r: np.ndarray, e: np.ndarray, first: int) -> None:
        """Add the increments from number ``first`` on; ``x`` has those before, without weights."""
        kernels, n, weights = block_kernels(b.shape[1], SINGLE), self.matrix.rows, OPTIMAL[self.degree]
        ones = np.ones(b.shape[1], SINGLE)
        if first:
            np.multiply(d, SINGLE.type(weights[0] - 1), out=e)
        for number in range(first, self.degree):
            keep, factor = self._coefficients[number]
            if self._patches is None:
                self.matrix.smooth(self._diagonal, keep, factor, b, x, d)
            else:
                self.matrix.residual(b, x, r)
                self._patches.product(r, d, factor, keep)
            kernels.add(n, d.ctypes.data, x.ctypes.data)
            more = (weights[number] - 1) * ones
            kept = ones if number else 0 * ones
            kernels.combine(n, more.ctypes.data, d.ctypes.data, kept.ctypes.data, e.ctypes.data)
        kernels.add(n, e.ctypes.data, x.ctypes.data)


class Level:
    """A level of multigrid with the interpolation from the next one.

    Parameters
    ----------
    interpolation, restriction
        ``P`` and its transpose, in double precision.
    smoother
        Of ``A``, which it has in single precision.
    """

    def __init__(self, interpolation: BlockMatrix, restriction: BlockMatrix, smoother: Smoother):
        self.matrix, self.smoother = smoother.matrix, smoother
        self.interpolation, self.restriction = interpolation.astype(SINGLE), restriction.astype(SINGLE)
        self._work: dict[int, tuple[np.ndarray, ...]] = {}

    def arrays(self, lanes: int) -> tuple[np.ndarray, ...]:
        """Solution, residual, right-hand side of the next level and its solution."""
        if lanes not in self._work:
            coarse = np.zeros((self.restriction.rows, lanes), SINGLE)
            self._work[lanes] = (
                self.matrix.vector(lanes), self.restriction.vector(lanes), coarse, self.interpolation.vector(lanes),
            )  # fmt: skip
        return self._work[lanes]


class CoarsestLevel:
    """Solves with the coarsest matrix, which every rank factors.

    Parameters
    ----------
    factors
        Of the whole matrix.
    replication
        Of its unknowns.
    """

    def __init__(self, factors: TriangularFactors, replication: Replication):
        self.factors, self._replication, self.rows = factors, replication, replication.own.stop - replication.own.start
        program = StepProgram({"whole": slice(0, replication.total)}, replication.total)
        program.solve(STATE, factors)
        self._steps = LaneSteps(program)

    def solve(self, b: np.ndarray) -> np.ndarray:
        """The solution's own rows for own rows ``(n, W)`` of right-hand sides (collective)."""
        whole = self._replication.gathered(np.ascontiguousarray(b.T, dtype=float))
        out = np.empty((len(whole), 1, self._replication.total))
        self._steps.run(whole, out)
        return out[:, 0, self._replication.own].T


class MultigridCycle:
    """V-cycles in single precision.

    Parameters
    ----------
    levels
        The levels, the finest first; empty: one application of ``smoother``.
    coarsest
        Below them.
    """

    def __init__(self, levels: Sequence[Level], coarsest: CoarsestLevel):
        self.levels, self.coarsest = list(levels), coarsest

    def apply(self, b: np.ndarray) -> np.ndarray:
        """Own rows ``(n, W)`` of the result for those of a right-hand side, in work memory (collective)."""
        return self._cycle(0, b)

    def _cycle(self, number: int, b: np.ndarray) -> np.ndarray:
        if number == len(self.levels):
            return self.coarsest.solve(b)
        level = self.levels[number]
        x, r, coarse, correction = level.arrays(b.shape[1])
        level.smoother.start(b, x)
        level.matrix.residual(b, x, r)
        level.restriction.product(r, coarse)
        found = self._cycle(number + 1, coarse)
        correction[: len(found)] = found
        level.interpolation.product(correction, x, 1.0, 1.0)
        level.smoother.improve(b, x)
        return x[: level.matrix.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices and work arrays on this rank."""
        total = self.coarsest.factors.nbytes
        for level in self.levels:
            total += level.smoother.nbytes + level.interpolation.nbytes + level.restriction.nbytes
            total += sum(a.nbytes for arrays in level._work.values() for a in arrays)
        return total
