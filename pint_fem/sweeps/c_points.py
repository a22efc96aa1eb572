r"""Storage of the C-points only: states at F-points are computed again, for a group of intervals at a time.

The own intervals are divided into *groups* of neighbours that advance in lock-step. From the stored state at the start
of each interval,

.. math::  u_{c+j+1} = \Phi_{c+j}(u_{c+j}, z), \qquad j = 0..m-2 ,

gives the states ``(m, width, n)`` of a group, at which derivatives of steps and misfits are evaluated; no array has a
row for each own step. The right-hand side of a linear sweep is *condensed*: propagated through each interval to the
C-point at its end, once before a solve, so that the steps inside are homogeneous and there is one right-hand side per
interval (:mod:`pint_fem.mgrit.c_point_relaxation`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.spacetime import Slab

__all__ = ["ControlDerivative", "IntervalGroup", "Intervals"]

WIDEST = 32
"""Intervals of a group, at most: the states that the kernels of linear steps take at once."""


class IntervalGroup(NamedTuple):
    """``count`` neighbouring intervals of ``m`` steps in lock-step; the first one has the number ``first`` on
    the whole time axis and ``place`` among the own intervals.
    """

    first: int
    place: int
    count: int
    m: int

    @property
    def starts(self) -> slice:
        """The intervals' first points among the stored C-points."""
        return slice(self.place, self.place + self.count)

    @property
    def ends(self) -> slice:
        """The intervals' last points among the stored C-points."""
        return slice(self.place + 1, self.place + self.count + 1)

    def steps(self, j: int) -> slice:
        """Step ``j`` of each interval among the own steps; also the points from which these start among the local."""
        return slice(self.place * self.m + j, (self.place + self.count - 1) * self.m + j + 1, self.m)


class Intervals:
    """The own intervals of the finest level, and the work arrays of a group of them.

    Parameters
    ----------
    propagator
        Propagator of the finest level.
    slab, m
        Own steps, of which the first and the last point are C-points, and steps of an interval.
    is_linear
        Whether all levels are linear; otherwise a group is one interval.

    Attributes
    ----------
    count : int
        Number of own intervals.
    width : int
        Intervals of a group: at most :data:`WIDEST`, and no more states than the stored ones.
    groups : list of IntervalGroup
        The groups in the order of time.
    """

    def __init__(self, propagator: FEPropagator, slab: Slab, m: int, *, is_linear: bool):
        self.propagator, self.slab, self.m = propagator, slab, m
        self.evolution = propagator.evolution
        self.count, first = slab.k // m, slab.lo // m
        self.width = 1
        while is_linear and 2 * self.width <= WIDEST and 2 * self.width * m <= self.count:
            self.width *= 2
        cuts = [first, *range(first + self.width - first % self.width, first + self.count, self.width)]
        self.groups = [
            IntervalGroup(a, a - first, b - a, m) for a, b in zip(cuts, [*cuts[1:], first + self.count], strict=True)
        ]
        self._linearisations = propagator.step_linearisations(m)
        self._buffers: dict[str, np.ndarray] = {}
        self._affine: np.ndarray | None = None
        self.bind(None, None)

    def buffer(self, name: str, rows: int | None = None) -> np.ndarray:
        """The work array ``(width, n)`` or ``(rows, width, n)`` of this name, allocated once."""
        if name not in self._buffers:
            shape = (self.width, self.evolution.state_size)
            self._buffers[name] = np.empty(shape if rows is None else (rows, *shape))
        return self._buffers[name]

    def update_data(self) -> None:
        """Invalidate what has been computed from data."""
        self._affine = None

    def bind(self, z: np.ndarray | None, U: np.ndarray | None) -> None:
        """Set the controls ``(nz,)`` or ``(k, nz)`` and the stored states ``(count + 1, n)`` of the following calls."""
        self._z, self._U, self._current = z, U, None

    def data(self, group: IntervalGroup, j: int, dz: np.ndarray | None = None, *, linearised: bool = True) -> StepData:
        """Data of step ``j`` of the intervals; ``linearised``: with the states, unless the propagator is linear."""
        steps = group.steps(j)
        t = self.evolution.time(self.slab.lo + np.arange(steps.start, steps.stop, steps.step))
        z, dz = (x if x is None or x.ndim == 1 else x[steps] for x in (self._z, dz))
        u = ends = None
        if linearised and not self.propagator.is_affine:
            states = self.states(group)
            u, ends = states[j], states[j + 1] if j + 1 < self.m else self._U[group.ends]
        cached = None if self._linearisations is None else self._linearisations[j : j + 1]
        return StepData(t, z, u, dz, cached, ends=ends)

    # -- forwards ------------------------------------------------------------------------------------------------------
    def states(self, group: IntervalGroup) -> np.ndarray:
        """States from which the steps start, ``(m, count, n)``; valid until those of another group are computed."""
        W = self.buffer("states", self.m)[:, : group.count]
        if self._current == group.first:
            return W
        self._current = None  # as long as a step may fail
        for linearisation in self._linearisations or ():
            linearisation.reset(factors=True)
        W[0] = self._U[group.starts]
        for j in range(self.m - 1):
            self.propagator.step(self.data(group, j, linearised=False), W[j], W[j + 1])
        self._current = group.first
        return W

    def tangents(self, group: IntervalGroup, dz: np.ndarray | None, dU: np.ndarray) -> np.ndarray:
        """Tangents at the same points, ``(m, count, n)``, from those at C-points ``dU`` and the direction ``dz``."""
        D = self.buffer("tangents", self.m)[:, : group.count]
        D[0] = dU[group.starts]
        for j in range(self.m - 1):
            self._tangent(group, j, D[j], D[j + 1], dz)
        return D

    def _tangent(self, group: IntervalGroup, j: int, du: np.ndarray, out: np.ndarray, dz: np.ndarray | None) -> None:
        data = self.data(group, j, dz)
        self.propagator.tangent(data, du, data.dz, out)

    def forcing(self, z: np.ndarray | None) -> np.ndarray:
        """Condensed right-hand side of the state of a linear evolution, ``(count, n)``."""
        affine = self.propagator.is_affine
        if self._affine is None or not affine:
            self.bind(None if affine else z, None)  # an affine step's part without control is the same for all controls
            step = lambda group, j, u, out: self.propagator.step(self.data(group, j, linearised=False), u, out)
            moves = self.evolution.depends_on_time or (not affine and self.evolution.controls_move)
            self._affine = self._propagated_from_zero(step, moves=moves)
        return self._affine if z is None or not affine else self._affine + self.control_forcing(z)

    def control_forcing(self, dz: np.ndarray, z: np.ndarray | None = None, U: np.ndarray | None = None) -> np.ndarray:
        """Condensed right-hand side of the tangent of a linear evolution in the direction ``dz``, ``(count, n)``; ``z``
        and the stored states ``U`` are required where the steps are not affine in the controls.
        """
        self.bind(z, U)
        tangent = lambda group, j, u, out: self._tangent(group, j, u, out, dz)
        moves = dz.ndim == 2 or self.evolution.controls_move or not self.propagator.is_affine
        return self._propagated_from_zero(tangent, moves=moves)

    def _propagated_from_zero(self, step: Callable, *, moves: bool) -> np.ndarray:
        """The ends of the intervals where each begins with zero; where steps do not depend on time (``moves``), the end
        of a single interval, repeated.
        """
        out = np.empty((self.count if moves else 1, self.evolution.state_size))
        for group in self.groups if moves else [IntervalGroup(0, 0, 1, self.m)]:
            a, b = self.pair(group)
            a[...] = 0
            for j in range(self.m):
                step(group, j, a, b)
                a, b = b, a
            out[group.starts] = a
        return np.broadcast_to(out, (self.count, out.shape[1]))

    def pair(self, group: IntervalGroup) -> list[np.ndarray]:
        """Two work arrays ``(count, n)``, the argument and the result of a step by turns."""
        return [self.buffer(name)[: group.count] for name in ("first", "second")]

    # -- backwards -----------------------------------------------------------------------------------------------------
    def adjoint(self, group: IntervalGroup, j: int, lam: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi_u^T lam`` of step ``j`` to ``out``."""
        self.propagator.adjoint(self.data(group, j), lam, out)

    def control_adjoint(self, group: IntervalGroup, j: int, lam: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam`` of step ``j``: ``(count, nz)``, or their sum ``(nz,)`` for a static control."""
        return self.propagator.control_adjoint(self.data(group, j), lam)

    def second_order(
        self,
        group: IntervalGroup,
        j: int,
        du: np.ndarray,
        dz: np.ndarray | None,
        lam: np.ndarray,
        du_ends: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of ``Phi_u^T lam`` and ``Phi_z^T lam`` of step ``j`` in the direction ``(du, dz)``, with the
        tangents at the ends of the steps where they are available.
        """
        data = self.data(group, j, dz)
        if du_ends is not None:
            data = data._replace(tangent_ends=du_ends)
        return self.propagator.second_order(data, du, data.dz, lam)

    def linearised(self, steps: range, *, backwards: bool) -> StepData:
        """Data of a single step with its number in the direction of the sweep, for groups of one interval."""
        (step,) = steps
        if backwards:
            step = self.slab.nsteps - 1 - step
        return self.data(self.groups[(step - self.slab.lo) // self.m], step % self.m)


class ControlDerivative:
    r"""The derivative by the controls, :math:`\Phi_{n,z}^T \lambda_{n+1}`, summed over the steps of the intervals.

    Parameters
    ----------
    intervals
        The own intervals.
    begun
        ``rows`` of another sum that is continued.

    Attributes
    ----------
    rows : ndarray or None
        ``(k, nz)`` per step. For static controls the sum ``(nz,)``; of a linear evolution the propagator's
        ``control_sums`` of the adjoints, so that solves are made once, at the end; where steps are not affine in the
        controls, these end with a derivative ``(nz,)``.
    """

    def __init__(self, intervals: Intervals, begun: np.ndarray | None = None):
        self._intervals, ev = intervals, intervals.evolution
        self._sums_adjoints = intervals.propagator.is_linear and not ev.per_step
        self._any_group = IntervalGroup(0, 0, 1, intervals.m)
        self.rows = None
        if not ev.parameters:
            return
        if begun is not None:
            self.rows = begun.copy()
        elif self._sums_adjoints:
            data = intervals.data(self._any_group, 0, linearised=False)
            self.rows = intervals.propagator.zero_control_sums(data)
        else:
            self.rows = np.zeros((intervals.slab.k, ev.control_size) if ev.per_step else (ev.control_size,))

    def _adjoint_sums(self, group: IntervalGroup, j: int, lam: np.ndarray) -> np.ndarray:
        return self._intervals.propagator.control_sums(self._intervals.data(group, j), lam)

    def add_adjoint(self, group: IntervalGroup, j: int, lam: np.ndarray) -> None:
        """Add the derivative from adjoints ``(count, n)`` at the ends of step ``j`` of the intervals."""
        if self._sums_adjoints and self.rows is not None:
            self.rows += self._adjoint_sums(group, j, lam)
        elif self.rows is not None:
            self.add(group, j, self._intervals.control_adjoint(group, j, lam))

    def add(self, group: IntervalGroup, j: int, derivative: np.ndarray) -> None:
        """Add a derivative ``(count, nz)`` or ``(nz,)`` of step ``j`` of the intervals."""
        if self.rows is not None:
            target = self.rows[group.steps(j)] if self.rows.ndim == 2 else self.rows
            if self._sums_adjoints:
                target = target[len(target) - len(derivative) :]
            target += derivative

    def finish(self) -> np.ndarray | None:
        """The derivative ``(nz,)`` or ``(k, nz)``; ``None`` without parameters."""
        if self.rows is None or not self._sums_adjoints:
            return self.rows
        intervals = self._intervals
        data = intervals.data(self._any_group, 0, linearised=False)
        return intervals.propagator.control_adjoint_of_sums(data, self.rows)
