r"""The KKT systems of all frequencies where a step has few controls, by small dense Hessians.

With the transfer functions :math:`G_k = A_k^{-1} \Psi`, one complex state per number of the control, the system

.. math::
   A_k u - \Psi z = a , \qquad A_k^H \lambda - Q u = b , \qquad R z + \Psi^T \lambda = c

is solved by block elimination: with :math:`u_0 = A_k^{-1} a`,

.. math::
   (R + G_k^H Q G_k)\, z = c - G_k^H (b + Q u_0) , \qquad u = u_0 + G_k z , \qquad \lambda = A_k^{-H} (b + Q u) .

The matrices in brackets are the reduced Hessians of the frequencies, ``(m, m)``. Any misfit and any scheme is allowed;
:math:`A_k^{-1}` is that of ParaDiag (:mod:`pint_fem.paradiag.systems`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from pint_fem.errors import SolverFailure
from pint_fem.kkt.model import ControlModel

__all__ = ["MOST_CONTROLS", "FewControlsSystems", "control_count"]

MOST_CONTROLS = 64
"""Numbers of controls of a step for which dense Hessians are made."""


def control_count(model: ControlModel) -> tuple[int, int]:
    """The number of the controls of a step that other ranks in space before this one own, and that of all of them."""
    comm = model.spacetime.space_comm
    sizes = comm.allgather(model.control_size)
    return sum(sizes[: comm.rank]), sum(sizes)


class FewControlsSystems:
    """The systems of the frequencies of a rank in time (collective over space).

    Parameters
    ----------
    model
        The problem.
    systems
        Solves with :math:`A_k` (:class:`~pint_fem.paradiag.systems.ShiftedSteps`), of their own for these frequencies.
    own, mu
        Frequencies of this rank; the eigenvalues of the shift of all frequencies.
    single
        Whether systems are solved in single precision.

    Raises
    ------
    SolverFailure
        If a Hessian is not positive definite.
    """

    takes_controls = True

    def __init__(self, model: ControlModel, systems: Any, own: range, mu: np.ndarray, *, single: bool = False):
        self._model, self._systems, self.single, self._own = model, systems, single, own
        self._comm = model.spacetime.space_comm
        first, count = control_count(model)
        self._first = first
        units = np.zeros((count, model.control_size))
        for j in range(model.control_size):
            units[first + j, j] = 1.0
        effects = model.control_effect_of_one_step(units)
        kind = np.complex64 if single and systems.has_lanes else complex
        rows = np.broadcast_to(effects, (len(own), *effects.shape)).astype(kind)
        self._G = self._solve(own, mu, rows)
        weights = np.zeros((2, count, count))
        weights[0, :, first : first + model.control_size] = model.weights.multiply(units)
        weights[1, :, first : first + model.control_size] = model.weights.multiply_rates(units)
        R, R_rates = self._comm.allreduce(weights, op=MPI.SUM)
        H = np.empty((len(own), count, count), complex)
        for i, k in enumerate(own):
            gram = self._comm.allreduce(self._G[i].conj() @ self._misfit(self._G[i]).T, op=MPI.SUM)
            H[i] = R + abs(1 - mu[k]) ** 2 * R_rates + gram
        H = 0.5 * (H + H.conj().swapaxes(1, 2))
        try:
            np.linalg.cholesky(H)
        except np.linalg.LinAlgError as error:
            raise SolverFailure("a Hessian of a frequency is not positive definite: regularise all controls") from error
        self._inverse = np.linalg.inv(H)

    @property
    def factorisations(self) -> int:
        """Number of factorisations so far."""
        return self._systems.factorisations

    @property
    def bytes(self) -> int:
        """Bytes of the factors and transfer functions."""
        return self._systems.bytes + self._G.nbytes

    @property
    def on_lanes(self) -> bool:
        """Whether several frequencies are solved at once."""
        return self._systems.has_lanes

    def _misfit(self, rows: np.ndarray) -> np.ndarray:
        """``Q u`` of complex rows."""
        return self._model.misfit(rows.real) + 1j * self._model.misfit(rows.imag)

    def _solve(self, own: range, mu: np.ndarray, rows: np.ndarray, *, adjoint: bool = False) -> np.ndarray:
        r"""Solve with :math:`A_k`, or :math:`A_k^H`, for complex rows ``(f, n)`` or ``(f, batch, n)``."""
        rows = np.ascontiguousarray(rows.conj() if adjoint else rows)
        if self._systems.has_lanes:
            out = self._systems.solve_all(own, mu, rows, transposed=adjoint)
        else:
            out, solve = np.empty_like(rows), self._systems.solve_transposed if adjoint else self._systems.solve
            for i, k in enumerate(own):
                for index in np.ndindex(*rows.shape[1:-1]):
                    out[(i, *index)] = solve(k, complex(mu[k]), rows[(i, *index)])
        return out.conj() if adjoint else out

    def solve_all(
        self, frequencies: range, mu: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Solve the systems of this rank's frequencies (collective over space).

        Parameters
        ----------
        frequencies, mu
            Their numbers; the eigenvalues of the shift of all frequencies.
        a, b, c
            Right-hand sides, complex ``(frequencies, n)`` and ``(frequencies, nz)``; ``c`` is zero by default.

        Returns
        -------
        u, z, lam : ndarray of complex, shape (frequencies, n), (frequencies, nz) and (frequencies, n)
        """
        u = self._solve(frequencies, mu, a)
        first = self._first
        right = -np.einsum("kmn,kn->km", self._G.conj(), b + self._misfit(u))
        if c is not None:
            right[:, first : first + c.shape[1]] += c
        z = np.einsum("kij,kj->ki", self._inverse, self._comm.allreduce(right, op=MPI.SUM))
        u = u + np.einsum("kmn,km->kn", self._G, z.astype(self._G.dtype))
        lam = self._solve(frequencies, mu, (b + self._misfit(u)).astype(a.dtype), adjoint=True)
        return u, z[:, first : first + self._model.control_size], lam

    def release(self) -> None:
        """Free all factors (collective over space)."""
        self._systems.release()
