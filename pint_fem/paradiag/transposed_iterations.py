r"""Adjoint sweeps by a fixed number of transposed ParaDiag iterations: what makes an inexact Hessian symmetric.

``K`` iterations from zero are the linear map :math:`M_K = \sum_{j<K} (I - P^{-1} A)^j P^{-1}` of right-hand sides
(:mod:`~pint_fem.paradiag.circulant`), and :math:`M_K^T = \sum_{j<K} (I - P^{-T} A^T)^j P^{-T}` are as many iterations
for :math:`A^T` with the circulant :math:`P^T`: those of an adjoint sweep whose unknowns are
:math:`\lambda_N, \ldots, \lambda_1`. (The sweep of a gradient begins with :math:`\lambda_N` and has :math:`\lambda_0`
for its last unknown, which differs by :math:`O(\alpha)`.) Then :math:`\lambda_0 = \Phi^T \lambda_1 + g_0`. What
follows from the symmetry is in :mod:`pint_fem.mgrit.transposed_cycles`.

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
    rows : int
        States that it keeps.
    """

    start = "skip"

    def __init__(self, adjoint: ParaDiag, steps: int):
        self.solver, self.rows = adjoint, steps + 2
        self._rows: np.ndarray | None = None  # lambda_{hi+1}, ..., lambda_lo

    @property
    def adjoints(self) -> np.ndarray:
        """Of the own points, ``(k + 1, n)``, after :meth:`collect`."""
        return self._rows[:0:-1]

    def arrays(self, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unknowns, zero, and right-hand side of the own steps, for misfit gradients ``(k + 1, n)`` (collective). Their
        last row counts on the last rank; on the others it becomes the next one's first.
        """
        if self._rows is None:
            self._rows = np.empty((self.rows, gradient.shape[1]))
        self._rows[...] = 0
        self._rows[-1] = gradient[0]
        self._pass(gradient[0], gradient[-1], 1)
        return self._rows[:-1], gradient[:0:-1]

    def collect(self) -> np.ndarray:
        """The adjoints of a solve (collective).

        Raises
        ------
        SolverFailure
            On every rank, if the step to the first point failed.
        """
        rows, fine = self._rows, self.solver.levels[0]
        if self.solver.comm.rank == self.solver.comm.size - 1:  # the first one in time
            first = np.empty_like(rows[:1])
            fine.phi(range(1), rows[-2:-1], first)
            rows[-1:] += first
        self._pass(rows[1], rows[-1], -1)
        self.solver.raise_failures()
        return self.adjoints

    def _pass(self, mine: np.ndarray, here: np.ndarray, way: int) -> None:
        """A row from each rank to the next one of the reversed communicator (1) or the one before (-1)."""
        comm, request = self.solver.comm, None
        if 0 <= comm.rank + way < comm.size:
            request = comm.Isend(np.ascontiguousarray(mine), comm.rank + way, _TAG)
        if 0 <= comm.rank - way < comm.size:
            comm.Recv(here, comm.rank - way, _TAG)
        if request is not None:
            request.Wait()
