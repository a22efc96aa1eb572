"""Residuals of given trajectories, and their derivatives by the controls and of second order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pint_fem.collective import collectively
from pint_fem.errors import FAILURES, InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.spacetime import Slab, SpaceTime
from pint_fem.sweeps.c_points import Intervals

if TYPE_CHECKING:
    from pint_fem.sweeps.sweeps import Controls

__all__ = ["GivenTrajectories"]


class GivenTrajectories:
    """What :class:`~pint_fem.sweeps.sweeps.Sweeps`, whose attributes these are, computes of given trajectories."""

    evolution: Evolution
    spacetime: SpaceTime
    slab: Slab
    is_affine: bool
    is_linear: bool
    initial: np.ndarray
    _update: Callable[..., None]
    propagators: list[FEPropagator]
    intervals: Intervals | None
    data: Callable[..., StepData]
    _cause: BaseException | None

    def state_residual(self, z: Controls, U: np.ndarray, *, initial: np.ndarray | None = None) -> tuple[float, float]:
        """Norms over the stored points of ``Phi(U) - U`` and of ``U``, by one pass over the steps.

        ``U``, whose first row on each rank is current, is not changed.
        """
        r = collectively(self.spacetime.comm, "residual of a state", self._step_residuals, z, U)
        first = self.slab.is_first
        if first:
            r = np.concatenate([U[:1] - (self.initial if initial is None else initial), r])
        squares = [self.spacetime.point_norms(block).sum() for block in (r, U if first else U[1:])]
        return tuple(np.sqrt(self.spacetime.sum_over_time(np.array(squares))).tolist())

    def step_residuals(self, z: Controls, U: np.ndarray, *, initial: np.ndarray | None = None) -> np.ndarray:
        """``Phi(U_n) - U_{n+1}`` at the local points, ``(k + 1, n)``, by one pass over the steps, and at the first
        point of all the initial condition less ``U_0`` (collective). Row 0 of other ranks is the left neighbour's
        last one.

        The steps are those that are linearised for ``U`` afterwards. Trajectories have to be stored at all points.
        """
        if self.intervals is not None:
            raise InputError("residuals of all steps require mgrit storage='all'")
        if self.is_linear:
            self._update(z, "state")

        def compute() -> np.ndarray:
            fine, out = self.propagators[0], np.zeros_like(U)
            out[1:] = U[1:]
            fine.step(self.data(z, U)._replace(guess=fine.uses_guess), U[:-1], out[1:])
            out[1:] -= U[1:]
            if self.slab.is_first:
                out[0] = (self.initial if initial is None else initial) - U[0]
            return out

        out = collectively(self.spacetime.comm, "residuals of the steps", compute)
        self.spacetime.add_shared_points(out)
        return out

    def _step_residuals(self, z: Controls, U: np.ndarray) -> np.ndarray:
        """``Phi(U) - U`` at the own stored points but the first."""
        fine, out = self.propagators[0], U[1:].copy()
        if self.intervals is None:
            fine.step(self.data(z)._replace(guess=fine.uses_guess), U[:-1], out)
            return out - U[1:]
        self.intervals.bind(z, U)
        for group in self.intervals.groups:
            last = self.intervals.states(group)[-1]
            data = self.intervals.data(group, group.m - 1, linearised=False)
            fine.step(data, last, out[group.starts])
        return out - U[1:]

    def control_gradient(self, z: Controls, U: np.ndarray, L: np.ndarray) -> np.ndarray | list | None:
        """``Phi_z^T lam_{n+1}`` of the own steps: their sum ``(nz,)``, or ``(k, nz)`` for one control per step; of a
        batch of adjoints a list of these. ``None`` for an evolution without parameters.
        """
        if not self.evolution.parameters:
            return None
        data = self.data(z, U)

        def of_member(number: int, lam: np.ndarray) -> np.ndarray:
            return self.propagators[0].control_adjoint(data._replace(member=number), lam)

        def compute() -> np.ndarray | list:
            if L.ndim == 2:
                return of_member(0, L[1:])
            return [of_member(number, np.ascontiguousarray(L[1:, number])) for number in range(L.shape[1])]

        return collectively(self.spacetime.comm, "derivative by the controls", compute)

    def second_order(
        self, z: Controls, U: np.ndarray, dz: Controls | list, dU: np.ndarray, L: np.ndarray, *,
        symmetric: bool = False, computed: dict | None = None,
    ) -> tuple[np.ndarray, np.ndarray | list] | None:  # fmt: skip
        """Second derivatives of the steps along the tangent ``dU`` in the direction ``dz``, for the adjoint ``L``.

        Parameters
        ----------
        z, U, L
            Control, state and adjoint, ``(k + 1, n)``.
        dz, dU
            Direction and tangent; of a batch a list and ``(k + 1, members, n)``.
        symmetric
            Whether they are a symmetric form of ``(dU, dz)`` also where ``dU`` is no exact tangent; this takes one more
            adjoint per step.
        computed
            What earlier calls have computed from ``U`` and ``L`` alone, to which it is added.

        Returns
        -------
        tuple, or None
            Right-hand side of the second-order adjoint, shaped as ``dU``, and the contribution to the derivative by the
            controls, as :meth:`control_gradient` returns it; ``None`` where they vanish.
        """
        if self.is_affine:
            return None
        data, su = self.data(z, U)._replace(computed=computed), np.zeros_like(dU)
        end = None if symmetric else np.zeros_like(dU[1:])

        def of_member(data: StepData, du: np.ndarray, dz: Controls, out: np.ndarray, own_end: np.ndarray | None):
            out[:-1], controls = self.propagators[0].second_order(data, du, dz, L[1:], own_end)
            return controls

        try:
            if dU.ndim == 2:
                sz = of_member(data._replace(tangent_ends=dU[1:]), dU[:-1], dz, su, end)
            else:
                sz, ends = [], [None] * dU.shape[1] if end is None else np.moveaxis(end, 1, 0)
                for b, (d, own_end) in enumerate(zip(dz or [None] * dU.shape[1], ends, strict=True)):
                    du = np.ascontiguousarray(dU[:, b])
                    own = data._replace(member=b, tangent_ends=du[1:])
                    sz.append(of_member(own, du[:-1], d, su[:, b], own_end))
        except FAILURES as error:  # the sweep with this right-hand side raises on every rank
            self._cause, su[...] = error, np.nan
            sz = np.zeros((self.slab.k, self.evolution.control_size)[0 if self.evolution.per_step else 1 :])
            sz = sz if dU.ndim == 2 else [sz] * dU.shape[1]
        if end is not None:
            su[1:] += end
            self.spacetime.add_shared_points(su)
        return su, sz
