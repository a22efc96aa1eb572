r"""What a propagator is: one time step ``Phi`` on one level and its derivatives, on blocks of steps.

All arrays have a leading axis of steps, ``(k, dofs)``, with a rank's own degrees of freedom. For a step ``u_1 =
Phi(u_0, z)`` with an adjoint variable ``lam`` belonging to ``u_1``:

===================  ===========================================================================================
``step``             :math:`\Phi(u_0, z)`
``tangent``          :math:`\Phi_u\, du + \Phi_z\, dz`
``adjoint``          :math:`\Phi_u^T \lambda`
``control_adjoint``  :math:`\Phi_z^T \lambda`
``second_order``     the derivative of the last two in the direction ``(du, dz)`` at fixed ``lam``
===================  ===========================================================================================

Adjoint quantities are coefficient vectors of the dual space: transposes are plain transposes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from pint_fem.evolution.evolution import Evolution

__all__ = ["FEPropagator", "StepData"]


class StepData(NamedTuple):
    """Where a block of steps is taken: start times, control and linearisation states.

    Attributes
    ----------
    t : ndarray, shape (k,)
        Start times.
    z : ndarray, shape (nz,) or (k, nz), or None
        The static control, or the control of each step.
    u : ndarray, shape (k, n), or None
        States at the start of the steps, where derivatives are taken.
    dz : ndarray or None
        Direction of the control for a tangent sweep, shaped as ``z``.
    kept : list or None
        A memory of each step (:meth:`FEPropagator.memory`) of this linearisation.
    guess : bool
        Whether ``out`` of :meth:`FEPropagator.step` holds first guesses.
    sweep : object or None
        Stands for a solve of all steps with one control, in which steps may be taken repeatedly.
    """

    t: np.ndarray
    z: np.ndarray | None
    u: np.ndarray | None = None
    dz: np.ndarray | None = None
    kept: list | None = None
    guess: bool = False
    sweep: object = None

    def part(self, rows: slice) -> StepData:
        """The data of some of the steps."""
        z, dz = (x if x is None or x.ndim == 1 else x[rows] for x in (self.z, self.dz))
        u, kept = (None if x is None else x[rows] for x in (self.u, self.kept))
        return StepData(self.t[rows], z, u, dz, kept, self.guess, self.sweep)

    def control(self, i: int) -> np.ndarray | None:
        """Control of step ``i`` of the block."""
        return self.z if self.z is None or self.z.ndim == 1 else self.z[i]


class FEPropagator(ABC):
    """A propagator of an :class:`~pint_fem.evolution.evolution.Evolution` with step size ``stride * dt``.

    Parameters
    ----------
    evolution
        The problem; attribute ``evolution`` is a private copy of it, which steps may write to.
    stride
        Step size of the level in fine steps.
    tableau
        Butcher tableau of the level; default: the evolution's.
    """

    #: Whether derivatives do not depend on the state and the control.
    is_linear = False
    #: Whether :meth:`step` makes use of first guesses in ``out`` (see ``StepData.guess``).
    uses_guess = False

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau=None):
        self.evolution, self.stride = evolution.private(), stride
        self.dt = evolution.dt * stride
        self.tableau = evolution.tableau if tableau is None else tableau

    def update_data(self, changed: set) -> bool:
        """Take new values of data: what was assembled from them is assembled again when it is next used.

        Parameters
        ----------
        changed
            Functions and constants of the evolution's copies that have other values now.

        Returns
        -------
        bool
            Whether that was enough; else a new propagator takes this one's place.
        """
        return not changed

    def memory(self, count: int, *, often: bool = True) -> list | None:
        """Memories of ``count`` steps for ``StepData.kept``, each to be taken once or ``often`` in a sweep, each with
        methods ``renew`` (the control or the trajectory is another one now), ``forget`` (first guesses, too) and
        ``restart`` (another step takes its place); ``None`` where there is nothing to remember.
        """
        return None

    def kept_bytes(self, count: int) -> int:
        """Bytes of arrays that it keeps for ``count`` steps, memories left out."""
        return 0

    def memory_bytes(self) -> int:
        """Bytes of arrays in the memory of a step."""
        return 0

    def petsc_bytes(self, memories: int) -> dict[str, int]:
        """Bytes on this rank in PETSc's hands by part, with ``memories`` of steps; collective over space."""
        return {}

    @abstractmethod
    def step(self, data: StepData, u: np.ndarray, out: np.ndarray, lane: int = 0) -> None:
        """Write ``Phi(u)`` to ``out``; ``lane`` is the number of the block's first state among its like (see
        ``blocks``).
        """

    @abstractmethod
    def tangent(self, data: StepData, du: np.ndarray, dz, out: np.ndarray, lane: int = 0) -> None:
        """Write ``Phi_u du + Phi_z dz`` to ``out``; ``dz`` is ``None``, ``(nz,)`` or ``(k, nz)``."""

    @abstractmethod
    def adjoint(self, data: StepData, lam: np.ndarray, out: np.ndarray, lane: int = 0) -> None:
        """Write ``Phi_u^T lam`` to ``out``."""

    @abstractmethod
    def control_adjoint(self, data: StepData, lam: np.ndarray, lane: int = 0) -> np.ndarray:
        """``Phi_z^T lam``: ``(k, nz)`` for a control a step, else summed over the block, ``(nz,)``."""

    def control_sums(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """What static controls want of a linear propagator's adjoints, ``(rows, n)``: over all steps these are added.

        Here ``Phi_z`` is the same in all steps.
        """
        return np.add.reduce(lam, axis=0)[None]

    def control_adjoint_of_sums(self, data: StepData, sums: np.ndarray) -> np.ndarray:
        """``control_adjoint`` of all steps, ``(nz,)``, from their ``control_sums``; ``data`` are a step's."""
        return self.control_adjoint(data, sums)

    @abstractmethod
    def second_order(
        self, data: StepData, du: np.ndarray, dz, lam: np.ndarray, end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of ``adjoint`` ``(k, n)`` and ``control_adjoint`` in the direction ``(du, dz)`` at fixed ``lam``.

        With ``end`` ``(k, n)``, zeros, a propagator may put a part of the sources of that derivative there: the
        results then lack ``adjoint`` and ``control_adjoint`` of ``end``, which the caller leaves to a sweep that it
        does anyway.
        """

    def _collect(self, rows: list[np.ndarray]) -> np.ndarray:
        """Control derivatives of the steps of a block, stacked or summed as the control's kind wants."""
        nz = self.evolution.control_size
        if self.evolution.per_step:
            return np.stack(rows) if rows else np.zeros((0, nz))
        return np.add.reduce(rows, axis=0) if rows else np.zeros(nz)


def direction(dz, i: int):
    """Direction of the control in step ``i`` of a block."""
    return dz if dz is None or dz.ndim == 1 else dz[i]
