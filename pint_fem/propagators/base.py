r"""The interface of propagators: one time step ``Phi`` on one level with its derivatives, on blocks of steps.

All arrays have a leading axis of steps, ``(k, n)``, with a rank's own degrees of freedom. For a step ``u_1 =
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
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.evolution.evolution import Evolution

__all__ = ["FEPropagator", "StepData", "direction"]


class StepData(NamedTuple):
    """Where a block of ``k`` steps is evaluated: start times, controls and linearisation states.

    Attributes
    ----------
    t : ndarray, shape (k,)
        Start times.
    z : ndarray, shape (nz,) or (k, nz), or None
        The static control, or the control of each step.
    u : ndarray, shape (k, n), or None
        States at the start of the steps, where derivatives are evaluated.
    dz : ndarray or None
        Direction of the control for a tangent sweep, shaped as ``z``.
    linearisations : list or None
        Cached linearisation of each step (:meth:`FEPropagator.step_linearisations`).
    guess : bool
        Whether ``out`` of :meth:`FEPropagator.step` holds first guesses.
    sweep : object or None
        Identifies a solve of all steps with one control, in which steps may be evaluated repeatedly.
    member : int
        Number of the direction or right-hand side in a batch: what a linearisation caches for one member is not
        overwritten by that of another.
    ends, tangent_ends : ndarray, shape (k, n), or None
        States, and tangents in the direction for which second derivatives are evaluated, at the ends of the steps,
        where they are available.
    computed : dict or None
        Results for the states and adjoints of a block, kept by the caller as long as these do not change.
    """

    t: np.ndarray
    z: np.ndarray | None
    u: np.ndarray | None = None
    dz: np.ndarray | None = None
    linearisations: list | None = None
    guess: bool = False
    sweep: object = None
    member: int = 0
    ends: np.ndarray | None = None
    tangent_ends: np.ndarray | None = None
    computed: dict | None = None

    def part(self, rows: slice) -> StepData:
        """The data of a slice of the steps."""
        z, dz = (x if x is None or x.ndim == 1 else x[rows] for x in (self.z, self.dz))
        u, ends, tangent_ends = (x if x is None else x[rows] for x in (self.u, self.ends, self.tangent_ends))
        return self._replace(
            t=self.t[rows], z=z, dz=dz, u=u, ends=ends, tangent_ends=tangent_ends,
            linearisations=None if self.linearisations is None else self.linearisations[rows],
        )  # fmt: skip

    def control(self, i: int) -> np.ndarray | None:
        """The control ``(nz,)`` of step ``i`` of the block."""
        return direction(self.z, i)


def direction(dz: np.ndarray | None, i: int) -> np.ndarray | None:
    """The control, or its direction, of step ``i`` of a block, ``(nz,)``, from ``None``, ``(nz,)`` or ``(k, nz)``."""
    return dz if dz is None or dz.ndim == 1 else dz[i]


class FEPropagator(ABC):
    """A propagator of an :class:`~pint_fem.evolution.evolution.Evolution` with step size ``stride * dt``.

    Parameters
    ----------
    evolution
        The problem; attribute ``evolution`` is a private copy of it, to which steps may write.
    stride
        Step size of the level in fine steps.
    tableau
        Butcher tableau of the level; default: the evolution's.
    """

    #: Whether steps are affine in the state with the same operators in all steps, for a given control.
    is_linear = False
    #: Whether steps are affine in state and control at once: derivatives depend on neither.
    is_affine = False
    #: Whether :meth:`step` makes use of first guesses in ``out`` (``StepData.guess``).
    uses_guess = False

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None):
        self.evolution, self.stride = evolution.private(), stride
        self.dt = evolution.dt * stride
        self.tableau = evolution.tableau if tableau is None else tableau

    def update(self, z: np.ndarray | None) -> None:
        """Assemble and factor the operators of a static control ``(nz,)``, where they depend on it and it is not that
        of the last call (collective over space).
        """
        return  # here operators depend on no control, or each step assembles its own

    def update_data(self, changed: set) -> bool:
        """Discard what was assembled from data, which have changed; it is assembled again when next used.

        Parameters
        ----------
        changed
            Functions and constants of the evolution's copies that have other values now.

        Returns
        -------
        bool
            Whether that is enough; else a new propagator has to replace this one.
        """
        return not changed

    def solve_within(self, tolerance: float | None) -> None:
        """Set the reduction of residuals at which iterative solvers of the steps' linear systems stop; ``None``: that
        of exact steps.
        """
        return  # here there are no such solvers, or their tolerances are options

    def step_linearisations(self, count: int, *, repeated: bool = True) -> list | None:
        """Empty linearisations of steps for ``StepData.linearisations``; ``None`` where nothing can be cached.

        Parameters
        ----------
        count
            Number of steps.
        repeated
            Whether a sweep evaluates each step many times, or once.

        Returns
        -------
        list of StepLinearisation, or None
            Objects with the methods of :class:`~pint_fem.propagators.linearisation.StepLinearisation`.
        """
        return None

    def data_nbytes(self, count: int) -> int:
        """Bytes of arrays that are stored for ``count`` steps, without linearisations."""
        return 0

    def linearisation_nbytes(self) -> int:
        """Bytes of arrays in the linearisation of a step."""
        return 0

    def operator_nbytes(self, count: int) -> dict[str, int]:
        """Bytes of operators and factors on this rank with ``count`` linearisations (collective over space): of PETSc's
        ``"matrices"``, ``"factors"`` and ``"vectors"``, and of arrays for the ``"kernels"``.
        """
        return {}

    def work_nbytes(self, count: int) -> int:
        """Bytes of work memory in a call with ``count`` steps, which all propagators share."""
        return 0

    @abstractmethod
    def step(self, data: StepData, u: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi(u)`` of each step to ``out``.

        Parameters
        ----------
        data
            The steps.
        u, out
            States ``(k, n)``.
        """

    @abstractmethod
    def tangent(self, data: StepData, du: np.ndarray, dz: np.ndarray | None, out: np.ndarray) -> None:
        """Write ``Phi_u du + Phi_z dz`` of each step to ``out``; ``dz`` is ``None``, ``(nz,)`` or ``(k, nz)``."""

    @abstractmethod
    def adjoint(self, data: StepData, lam: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi_u^T lam`` of each step to ``out``."""

    @abstractmethod
    def control_adjoint(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam``: ``(k, nz)`` for a control of each step, else summed over the block, ``(nz,)``."""

    def zero_control_sums(self, data: StepData) -> np.ndarray:
        """Sums of no adjoints, shaped as those of :meth:`control_sums`; ``data`` of any step."""
        return self.control_sums(data, np.zeros((1, self.evolution.state_size)))

    def control_sums(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """Sums of a linear propagator's adjoints from which :meth:`control_adjoint_of_sums` computes the derivative by
        static controls, ``(rows, n)``: those of all steps are added. Here ``Phi_z`` is the same in all steps.
        """
        return np.add.reduce(lam, axis=0)[None]

    def control_adjoint_of_sums(self, data: StepData, sums: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam`` summed over all steps, ``(nz,)``, from their :meth:`control_sums`; ``data`` of any step."""
        return self.control_adjoint(data, sums)

    @abstractmethod
    def second_order(
        self, data: StepData, du: np.ndarray, dz: np.ndarray | None, lam: np.ndarray, end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of :meth:`adjoint` and :meth:`control_adjoint` in the direction ``(du, dz)`` at fixed ``lam``.

        Parameters
        ----------
        data
            The steps.
        du, dz
            Directions of the states ``(k, n)`` and of the control.
        lam
            Adjoints ``(k, n)``.
        end
            Zeros ``(k, n)``, to which a propagator may write a part of the sources: the results then lack ``adjoint``
            and ``control_adjoint`` of ``end``, which the caller adds in a sweep that it does anyway.

        Returns
        -------
        tuple of ndarray
            ``(k, n)``, and ``(k, nz)`` or ``(nz,)``.
        """

    def _collect(self, rows: list[np.ndarray]) -> np.ndarray:
        """Control derivatives of the steps of a block, stacked for a control of each step, else summed."""
        nz = self.evolution.control_size
        if self.evolution.per_step:
            return np.stack(rows) if rows else np.zeros((0, nz))
        return np.add.reduce(rows, axis=0) if rows else np.zeros(nz)
