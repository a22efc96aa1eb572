r"""Conjugate gradients for many right-hand sides at once, with the reductions and exchanges of one.

Every state has an iteration of its own (the same numbers as if it were alone); what communicates does so for all of
them. The preconditioner is a multigrid cycle in single precision or the inverse diagonal; as the former is symmetric up
to its rounding only, search directions are those of the flexible method (Y. Notay, SIAM J. Sci. Comput. 22, 2000),

.. math:: \beta_k = \frac{(z_k, r_k - r_{k-1})}{(z_{k-1}, r_{k-1})} .

Residuals are measured in the norm :math:`(r^T D^{-1} r)^{1/2}` with the diagonal ``D`` of the matrix, which has no
units of the unknowns' own, relative to that of the right-hand side after rows without couplings, such as those of
boundary values, are solved exactly.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.norms import sum_in_rank_order
from pint_fem.kernels.lanes.compiled import aligned
from pint_fem.kernels.space.compiled import block_kernels, lanes_for
from pint_fem.kernels.space.matrices import BlockMatrix

__all__ = ["ConjugateGradients", "Cycle"]

TOLERANCE = 1e-12
"""Reduction of the residual."""
ROUND_OFF = 4e-16
"""Residual relative to the magnitudes of the terms that it is the difference of, below which it is round-off."""
MOST = 400
"""Largest number of iterations."""
_RESTARTS = 3  # from the true residual


class Cycle(Protocol):
    """A preconditioner in single precision."""

    def apply(self, b: np.ndarray) -> np.ndarray:
        """Its product with own rows ``(n, W)``, float32 (collective)."""


class ConjugateGradients:
    """Solves with a symmetric positive definite matrix, for blocks of states.

    Parameters
    ----------
    matrix
        The matrix.
    comm
        Communicator in space.
    cycle
        Preconditioner; ``None``: the inverse diagonal.
    tolerance
        Reduction of the residual.
    most
        Largest number of iterations.

    Attributes
    ----------
    iterations : int
        Largest number of iterations of a state in the last call.
    """

    def __init__(
        self, matrix: BlockMatrix, comm: MPI.Comm, cycle: Cycle | None, *,
        tolerance: float = TOLERANCE, most: int = MOST,
    ):  # fmt: skip
        self.matrix, self.comm, self.cycle, self.tolerance, self.most = matrix, comm, cycle, tolerance, most
        local, diagonal = matrix.local, matrix.diagonal
        if comm.allreduce(float(np.min(diagonal, initial=1.0)), op=MPI.MIN) <= 0:
            raise ArithmeticError("a matrix is not positive definite: an entry of its diagonal is not positive")
        self._inverse = aligned(max(1, len(diagonal)))
        self._inverse[: len(diagonal)] = 1 / diagonal
        self._diagonal = aligned(max(1, len(diagonal)))
        self._diagonal[: len(diagonal)] = diagonal
        magnitudes = np.asarray(abs(local).sum(axis=1)).ravel()
        self._alone = np.flatnonzero(magnitudes == diagonal)  # rows without couplings
        self._diagonal[self._alone] = 0.0  # no other row depends on these
        scaled = magnitudes * self._inverse[: len(diagonal)]
        self._norm = float(comm.allreduce(float(np.max(scaled, initial=1.0)), op=MPI.MAX))
        self._arrays: dict[int, list[np.ndarray]] = {}
        self.iterations = 0

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """Solve for right-hand sides ``(k, n)``, own unknowns, the same ``k`` on all ranks; solutions ``(k, n)``
        (collective).

        Raises
        ------
        ArithmeticError
            On every rank, if a right-hand side is not finite, the matrix is found not to be positive definite or an
            iteration does not converge.
        """
        out, self.iterations = np.empty(rows.shape), 0
        first = 0
        while first < len(rows):
            lanes = lanes_for(len(rows) - first)
            count = min(lanes, len(rows) - first)
            self._solve(rows[first : first + count], out[first : first + count], lanes)
            first += count
        return out

    def _work(self, lanes: int) -> list[np.ndarray]:
        """Arrays ``x, p`` with other ranks' unknowns, ``b, r, z, q``, and ``r`` in single precision."""
        if lanes not in self._arrays:
            n = self.matrix.rows
            made = [self.matrix.vector(lanes) for _ in range(2)] + [aligned((n, lanes)) for _ in range(4)]
            self._arrays[lanes] = [*made, aligned((n, lanes), np.float32)]
        return self._arrays[lanes]

    @property
    def nbytes(self) -> int:
        """Bytes of the work arrays."""
        return sum(a.nbytes for arrays in self._arrays.values() for a in arrays)

    def _dots(self, lanes: int, *pairs: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
        """Inner products of pairs of blocks, ``(pairs, lanes)``; ``None``: of a block with itself and the weights of
        the norm.
        """
        kernels, out, n = block_kernels(lanes), np.zeros((len(pairs), lanes)), self.matrix.rows
        for (a, b), row in zip(pairs, out, strict=True):
            if b is None:
                kernels.squares(n, self._inverse.ctypes.data, a.ctypes.data, row.ctypes.data)
            else:
                kernels.dots(n, a.ctypes.data, b.ctypes.data, row.ctypes.data)
        return sum_in_rank_order(out, self.comm)

    def _solve(self, rows: np.ndarray, out: np.ndarray, lanes: int) -> None:
        x, p, b, r, z, q, single = self._work(lanes)
        n, count = self.matrix.rows, len(rows)
        b[:, :count], b[:, count:] = rows.T, 0.0
        x[:n] = 0.0
        x[self._alone] = self._inverse[self._alone, None] * b[self._alone]
        self._residual(b, x, r)
        (start,) = np.sqrt(self._dots(lanes, (r, None)))
        if not np.isfinite(start).all():
            raise ArithmeticError("a right-hand side is not finite")
        done, size = start == 0, start.copy()
        for attempt in range(_RESTARTS):
            goal = np.maximum(self.tolerance * start, ROUND_OFF * self._magnitude(lanes, x, start))
            done = size <= goal
            if done.all():
                break
            if attempt:
                goal = np.where(done, goal, 0.5 * goal)
            self._iterate(lanes, goal, done.copy(), x, p, r, z, q, single)
            self._residual(b, x, r)
            (size,) = np.sqrt(self._dots(lanes, (r, None)))
        else:
            goal = np.maximum(self.tolerance * start, 30 * ROUND_OFF * self._magnitude(lanes, x, start))
            if not (size <= 10 * goal).all():
                worst = float(np.max(size / np.where(start > 0, start, 1)))
                raise ArithmeticError(f"conjugate gradients reduced a residual to {worst:.1e} only")
        out[:] = x[:n, :count].T

    def _residual(self, b: np.ndarray, x: np.ndarray, r: np.ndarray) -> None:
        """``r = b - A x``, zero in rows without couplings, where it is the round-off of a division only."""
        self.matrix.residual(b, x, r)
        r[self._alone] = 0.0

    def _magnitude(self, lanes: int, x: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The norms, about, of the terms that a residual is the difference of."""
        scaled = np.sqrt(self._dots_of_solution(lanes, x))
        return self._norm * scaled + start

    def _dots_of_solution(self, lanes: int, x: np.ndarray) -> np.ndarray:
        """Squares ``(lanes,)`` of the norms ``(x^T D x)^(1/2)``."""
        kernels, out = block_kernels(lanes), np.zeros((1, lanes))
        kernels.squares(self.matrix.rows, self._diagonal.ctypes.data, x.ctypes.data, out.ctypes.data)
        return sum_in_rank_order(out, self.comm)[0]

    def _iterate(self, lanes, goal, done, x, p, r, z, q, single) -> None:
        """Iterate until the residuals, by their recurrence, are at the goal; ``x`` and ``r`` are updated."""
        kernels, n, ones = block_kernels(lanes), self.matrix.rows, np.ones(lanes)
        combine = lambda a, u, c, v: kernels.combine(n, a.ctypes.data, u.ctypes.data, c.ctypes.data, v.ctypes.data)
        old, alpha, size = None, np.zeros(lanes), None
        p[:] = 0.0
        for number in range(self.most):
            if number == 0:
                (size,) = np.sqrt(self._dots(lanes, (r, None)))
            self._precondition(lanes, r, z, size, single)
            pairs = [(r, z)] if number == 0 else [(r, z), (q, z)]
            found = self._dots(lanes, *pairs)
            rz = found[0]
            if number == 0:
                beta = np.zeros(lanes)
            else:
                # r is the last one minus alpha q
                beta = np.divide(-alpha * found[1], old, out=np.zeros(lanes), where=~done & (old > 0))
            combine(ones, z, beta, p)
            self.matrix.product(p, q)
            (pq,) = self._dots(lanes, (p, q))
            wrong = ~done & ~((pq > 0) & (rz > 0))
            if wrong.any():
                if not number or not (size[wrong] <= 1e3 * goal[wrong]).all():
                    raise ArithmeticError("a matrix, or its preconditioner, is not positive definite")
                done |= wrong  # round-off of the search direction: the true residual decides
                if done.all():
                    return
            alpha = np.divide(rz, pq, out=np.zeros(lanes), where=~done & (pq > 0))
            combine(alpha, p, ones, x)
            combine(-alpha, q, ones, r)
            (size,) = np.sqrt(self._dots(lanes, (r, None)))
            old = rz
            self.iterations = max(self.iterations, number + 1)
            if not np.isfinite(size).all():
                raise ArithmeticError("an iteration of conjugate gradients is not finite")
            done |= size <= goal
            if done.all():
                return
        raise ArithmeticError(f"conjugate gradients have not converged in {self.most} iterations")

    def _precondition(self, lanes: int, r, z, size: np.ndarray, single) -> None:
        """``z = M r``; a cycle in single precision takes residuals of norm one."""
        n = self.matrix.rows
        if self.cycle is None:
            np.multiply(r, self._inverse[:n, None], out=z)
            return
        kernels = block_kernels(lanes, np.float32)
        scale = np.divide(1.0, size, out=np.zeros(lanes), where=size > 0)
        # the norm has the weights of the inverse diagonal: entries of r are about the diagonal's size
        kernels.narrow(n, scale.ctypes.data, r.ctypes.data, single.ctypes.data)
        found = self.cycle.apply(single)
        found = np.ascontiguousarray(found, np.float32)
        kernels.widen(n, size.ctypes.data, found.ctypes.data, z.ctypes.data)
