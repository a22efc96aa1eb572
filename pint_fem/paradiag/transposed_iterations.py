r"""Adjoint sweeps by a fixed number of transposed ParaDiag iterations.

``K`` iterations from zero are the linear map :math:`M_K = \sum_{j<K} (I - P^{-1} A)^j P^{-1}` of right-hand sides
(:mod:`~pint_fem.paradiag.circulant`), and :math:`M_K^T = \sum_{j<K} (I - P^{-T} A^T)^j P^{-T}` are as many iterations
for :math:`A^T` with the circulant :math:`P^T`: those of an adjoint sweep whose unknowns are
:math:`\lambda_N, \ldots, \lambda_1`. (The sweep of a gradient begins with :math:`\lambda_N` and has :math:`\lambda_0`
for its last unknown, which differs by :math:`O(\alpha)`.) Then :math:`\lambda_0 = \Phi^T \lambda_1 + g_0`.

Point :math:`hi` of a rank, an unknown of its own here, is the first one of the next rank's slab: a row of the
right-hand side comes from there, and an adjoint goes there.
"""

from __future__ import annotations

import numpy as np

from pint_fem.all_at_once.transposed import TransposedSweep
from pint_fem.paradiag.solver import ParaDiag

__all__ = ["TransposedParaDiag"]

_TAG = 41


class TransposedParaDiag(TransposedSweep):
    r"""Transposed iterations of ParaDiag; the array's rows are :math:`\lambda_{hi+1}, \ldots, \lambda_{lo}`.

    Parameters
    ----------
    adjoint
        The adjoint sweep of a linear evolution, on the time communicator in reverse order.
    steps
        Number of own steps ``k``.
    """

    start = "skip"

    def __init__(self, adjoint: ParaDiag, steps: int):
        super().__init__(adjoint, steps + 2)

    @property
    def adjoints(self) -> np.ndarray:
        """Adjoints of the own points, ``(k + 1, n)``, after :meth:`collect`."""
        return self._rows[:0:-1]

    def arrays(self, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The arguments of a solve: unknowns, which are zero, and the right-hand side of the own steps (collective).

        Parameters
        ----------
        gradient
            Misfit gradients of the own points, ``(k + 1, n)``. The last row counts on the last rank; on the others it
            is overwritten by the next rank's first.
        """
        rows = self._zeros(gradient.shape[1:])
        rows[-1] = gradient[0]
        self._pass(gradient[0], gradient[-1], 1)
        return rows[:-1], gradient[:0:-1]

    def collect(self) -> np.ndarray:
        """The adjoints after a solve, ``(k + 1, n)`` (collective).

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

    def _pass(self, sent: np.ndarray, received: np.ndarray, way: int) -> None:
        """Pass a row from each rank to the next one of the reversed communicator (1) or to the one before (-1)."""
        comm, request = self.solver.comm, None
        if 0 <= comm.rank + way < comm.size:
            request = comm.Isend(np.ascontiguousarray(sent), comm.rank + way, _TAG)
        if 0 <= comm.rank - way < comm.size:
            comm.Recv(received, comm.rank - way, _TAG)
        if request is not None:
            request.Wait()
