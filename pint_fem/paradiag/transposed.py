r"""Adjoint sweeps by a fixed number of transposed ParaDiag iterations: what makes an inexact Hessian symmetric.

``K`` iterations from zero are the linear map :math:`M_K = \sum_{j<K} (I - P^{-1} A)^j P^{-1}` of right-hand sides
(:mod:`~pint_fem.paradiag.circulant`), and :math:`M_K^T = \sum_{j<K} (I - P^{-T} A^T)^j P^{-T}` are as many iterations
for :math:`A^T` with the circulant :math:`P^T`: those of an adjoint sweep whose unknowns are
:math:`\lambda_N, \ldots, \lambda_1`. (The sweep of a gradient begins with :math:`\lambda_N` and has :math:`\lambda_0`
for its last unknown, which differs by :math:`O(\alpha)`.) Then :math:`\lambda_0 = \Phi^T \lambda_1 + g_0`. What
follows from the symmetry is in :mod:`pint_fem.mgrit.transposed`.

Point :math:`hi` of a rank, an unknown of its own here, is the first one of the next rank's slab: a row of the
right-hand side comes from there, and an adjoint goes there.
"""

from __future__ import annotations

import numpy as np

from pint_fem.paradiag.solver import ParaDiag

__all__ = ["TransposedParaDiag"]

_TAG = 41


class TransposedParaDiag:
    """The solver and its arrays.

    Parameters
    ----------
    adjoint
        The adjoint sweep of a linear evolution, on the time communicator in reverse order.
    steps
        Own steps ``k``.

    Attributes
    ----------
    solver : ParaDiag
    start : str
        With which sweeps of the model begin, from zero.
    adjoints : ndarray, shape (k + 1, n)
        Of the own points, after :meth:`collect`.
    """

    start = "skip"

    def __init__(self, adjoint: ParaDiag, steps: int):
        self.solver, self._steps = adjoint, steps
        self.adjoints = self._unknowns = np.empty((0, 0))

    def arrays(self, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unknowns, zero, and right-hand side of the own steps, for misfit gradients ``(k + 1, n)``, whose last row
        counts on the last rank (collective).
        """
        k, (_, n) = self._steps, gradient.shape
        if self._unknowns.shape != (k + 1, n):
            self._unknowns, self._G, self.adjoints = (np.empty((rows, n)) for rows in (k + 1, k, k + 1))
        self._unknowns[...] = 0
        self._G[1:] = gradient[k - 1 : 0 : -1]
        self._G[0] = gradient[k]
        self._pass(gradient[0], self._G[0], 1)
        self._first = gradient[0]
        return self._unknowns, self._G

    def collect(self) -> np.ndarray:
        """The adjoints of a solve (collective)."""
        out = self.adjoints
        out[1:] = self._unknowns[:0:-1]
        fine = self.solver.levels[0]
        if self.solver.comm.rank == self.solver.comm.size - 1:  # the first one in time
            fine.phi(range(1), self._unknowns[-1:], out[:1])
            out[0] += self._first
        self._pass(self._unknowns[1], out[0], -1)
        return out

    def _pass(self, mine: np.ndarray, here: np.ndarray, way: int) -> None:
        """A row from each rank to the next one of the reversed communicator (1) or the one before (-1)."""
        comm, request = self.solver.comm, None
        if 0 <= comm.rank + way < comm.size:
            request = comm.Isend(np.ascontiguousarray(mine), comm.rank + way, _TAG)
        if 0 <= comm.rank - way < comm.size:
            comm.Recv(here, comm.rank - way, _TAG)
        if request is not None:
            request.Wait()
