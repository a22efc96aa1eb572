r"""The KKT operator of all steps at once, without matrices, on slabs.

For directions :math:`u_n`, :math:`z` and :math:`\lambda_n`, ``n = 1 .. N``, at a linearisation of the steps

.. math::
   a_n &= u_n - \Phi_{n,u} u_{n-1} - \Phi_{n,z} z , \qquad u_0 = z_0 , \\
   b_n &= \lambda_n - \Phi_{n+1,u}^T \lambda_{n+1} - (Q u)_n - (\text{second derivatives of the steps}) , \qquad
          \lambda_{N+1} = 0 , \\
   c &= R z + \sum_n \Phi_{n,z}^T \lambda_n + (\text{second derivatives of the steps}) ,

with the derivative ``z_0`` of the initial condition where it is a control, which also receives :math:`\lambda_0`. With
the sign of ``b`` changed the operator is symmetric. Each application takes one step of all states at once, forwards and
transposed, on blocks: it has no sequential part.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pint_fem.collective import collectively
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["KKTOperator"]

Source = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray | None]]
"""``(dU, dz) -> (rows, controls)``: the right-hand side of the second-order adjoint, with rows as an adjoint sweep
takes them, ``(k + 1, n)``, and its own part of the derivative by the controls, shaped as the sweeps', or ``None``.
"""


class KKTOperator:
    """The operator at a control and a state (collective).

    Parameters
    ----------
    sweeps
        The sweeps, with all points stored.
    layout
        The controls.
    z, U
        Control ``(layout.size,)`` and states of the local points, ``(k + 1, n)``.
    source
        Second derivatives of the misfits, and of the steps where they are not affine.
    control_hessian
        Product of the regularisation's second derivative with a direction, ``(layout.size,)``.

    Attributes
    ----------
    products : int
        Number of applications.
    """

    def __init__(
        self,
        sweeps: Sweeps,
        layout: ControlLayout,
        z: np.ndarray,
        U: np.ndarray,
        source: Source,
        control_hessian: Callable[[np.ndarray], np.ndarray],
    ):
        self.sweeps, self.layout, self._source, self._control_hessian = sweeps, layout, source, control_hessian
        self._U, self._steps = U, layout.steps(z)
        self.spacetime, self.slab, self.products = sweeps.spacetime, sweeps.slab, 0

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of this rank's parts of ``u``, ``z`` and ``lam``."""
        k, n = self.slab.k, self.sweeps.evolution.state_size
        return (k, n), (self.layout.size,), (k, n)

    def __call__(self, u: np.ndarray, z: np.ndarray, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The products ``a, b, c`` with the own steps' ``u``, ``lam`` ``(k, n)`` and controls ``(layout.size,)``.

        Raises
        ------
        SolverFailure
            On every rank, where a step fails.
        """
        self.products += 1
        dU = self._with_left(u, self.layout.initial(z))
        a = collectively(self.spacetime.comm, "KKT operator: steps", self._state_rows, dU, z)
        rows, controls = self._source(dU, z)
        b, first = self._adjoint_rows(lam, rows)
        L = np.concatenate([first[None], lam])
        gradient = self.sweeps.control_gradient(self._steps, self._U, L)
        if gradient is not None and controls is not None:
            gradient = gradient + controls
        c = self.layout.gradient(gradient, first) + self._control_hessian(z)
        return a, b, c

    def _state_rows(self, dU: np.ndarray, z: np.ndarray) -> np.ndarray:
        """``u_n - Phi_u u_{n-1} - Phi_z z`` of the own steps."""
        out = np.empty((self.slab.k, dU.shape[1]))
        if len(out):
            data = self.sweeps.data(self._steps, self._U)
            self.sweeps.propagators[0].tangent(data, np.ascontiguousarray(dU[:-1]), self.layout.steps(z), out)
        return dU[1:] - out

    def _adjoint_rows(self, lam: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``b_n`` of the own steps, and the adjoint of the slab's first point."""
        pulled = np.zeros(lam.shape)

        def transposed() -> None:
            if len(lam):
                data = self.sweeps.data(self._steps, self._U)
                self.sweeps.propagators[0].adjoint(data, np.ascontiguousarray(lam), pulled)

        collectively(self.spacetime.comm, "KKT operator: adjoint steps", transposed)
        # row i of the sum belongs to point i of the slab: the last own point is the right neighbour's first
        total = rows.copy()
        total[:-1] += pulled
        first = total[0].copy()
        self._last_from_right(total)
        return lam - total[1:], first

    # -- neighbours in time --------------------------------------------------------------------------------------------
    def _with_left(self, u: np.ndarray, initial: np.ndarray | None) -> np.ndarray:
        """States of the local points, ``(k + 1, n)``, from those of the own steps (collective over time)."""
        comm, dU = self.spacetime.time_comm, np.zeros((len(u) + 1, self.sweeps.evolution.state_size))
        dU[1:] = u
        if comm.rank == 0 and initial is not None:
            dU[0] = initial
        if comm.rank > 0:
            comm.Recv(dU[0], source=comm.rank - 1, tag=11)
        if comm.rank + 1 < comm.size:
            comm.Send(np.ascontiguousarray(dU[-1]), dest=comm.rank + 1, tag=11)
        return dU

    def _last_from_right(self, rows: np.ndarray) -> None:
        """Overwrite the last row by the first row of the right neighbour, which is that of the same point (collective
        over time).
        """
        comm = self.spacetime.time_comm
        received = np.empty_like(rows[-1])
        right, left = comm.rank + 1, comm.rank - 1
        if right < comm.size:
            comm.Recv(received, source=right, tag=12)
            rows[-1] = received
        if left >= 0:
            comm.Send(np.ascontiguousarray(rows[0]), dest=left, tag=12)
