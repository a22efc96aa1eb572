r"""Trajectories of which the C-points are stored: F-points are computed again, a few intervals at a time.

The own intervals go in *windows*, neighbours that advance in lock-step. From the stored state at the start of each,

.. math::  u_{c+j+1} = \Phi_{c+j}(u_{c+j}, z), \qquad j = 0..m-2 ,

gives the states ``(m, width, n)`` that derivatives, misfits and controls want; nothing has a row for each own step.
What enters a linear sweep in an interval is *condensed*: taken to the C-point at the interval's end once before a
solve, so that its cycles are homogeneous but for one row an interval (see :mod:`pint_fem.mgrit.c_point_relaxation`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pint_fem.kernels.blocks import WIDTH
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.spacetime import Slab

__all__ = ["Intervals", "Window"]


class Window(NamedTuple):
    """Neighbouring intervals of ``m`` steps: number of the first on the time axis, its place among the own ones."""

    first: int
    place: int
    count: int
    m: int

    @property
    def starts(self) -> slice:
        """Rows of the intervals' first points among the stored ones."""
        return slice(self.place, self.place + self.count)

    @property
    def ends(self) -> slice:
        """Rows of their last points."""
        return slice(self.place + 1, self.place + self.count + 1)

    def rows(self, j: int) -> slice:
        """Their steps number ``j`` among the own steps, and the points from which these start among the local ones."""
        return slice(self.place * self.m + j, (self.place + self.count - 1) * self.m + j + 1, self.m)


class Intervals:
    """The own intervals of the finest level.

    Parameters
    ----------
    propagator
        Of the finest level.
    slab
        Own steps; they begin and end at C-points.
    m
        Steps of an interval.
    is_linear
        Whether all levels are; else sweeps take one interval after the other.

    Attributes
    ----------
    width : int
        Intervals of a window: a block of the propagator's, or fewer, so that a window's states are no more than the
        stored ones (one interval at least); one where sweeps take one interval after the other.
    windows : list of Window
    """

    def __init__(self, propagator: FEPropagator, slab: Slab, m: int, *, is_linear: bool):
        self.propagator, self.slab, self.m = propagator, slab, m
        self.evolution = propagator.evolution
        self.count, first = slab.k // m, slab.lo // m
        self.width = 1
        while is_linear and 2 * self.width <= WIDTH and 2 * self.width * m <= self.count:
            self.width *= 2
        cuts = [first, *range(first + self.width - first % self.width, first + self.count, self.width)]
        self.windows = [
            Window(a, a - first, b - a, m) for a, b in zip(cuts, [*cuts[1:], first + self.count], strict=True)
        ]
        self._kept = propagator.step_linearisations(m)
        self._buffers: dict[str, np.ndarray] = {}
        self._affine: np.ndarray | None = None
        self.bind(None, None)

    # -- memory --------------------------------------------------------------------------------------------------------
    def buffer(self, name: str, rows: int | None = None) -> np.ndarray:
        """A work array ``(width, n)`` or ``(rows, width, n)``, the same one whenever asked for by this name."""
        if name not in self._buffers:
            shape = (self.width, self.evolution.state_size)
            self._buffers[name] = np.empty(shape if rows is None else (rows, *shape))
        return self._buffers[name]

    def zeros(self) -> np.ndarray:
        """A state for each own interval and one more."""
        return np.zeros((self.count + 1, self.evolution.state_size))

    def update_data(self) -> None:
        """Data have other values now: forget what forcing comes to."""
        self._affine = None

    # -- where steps are taken -----------------------------------------------------------------------------------------
    def bind(self, z: np.ndarray | None, U: np.ndarray | None) -> None:
        """Take controls ``(nz,)`` or ``(k, nz)`` and the stored states ``(count + 1, n)`` from now on."""
        self._z, self._U, self._here = z, U, None

    def data(self, window: Window, j: int, dz: np.ndarray | None = None, *, linearised: bool = True) -> StepData:
        """Data of steps number ``j``; with the states of the window unless the propagator is linear."""
        rows = window.rows(j)
        t = self.evolution.time(self.slab.lo + np.arange(rows.start, rows.stop, rows.step))
        z, dz = (x if x is None or x.ndim == 1 else x[rows] for x in (self._z, dz))
        u = kept = None
        if linearised and not self.propagator.is_linear:
            u = self.states(window)[j]
        if self._kept is not None:
            kept = self._kept[j : j + 1]
        return StepData(t, z, u, dz, kept)

    # -- forwards ------------------------------------------------------------------------------------------------------
    def states(self, window: Window) -> np.ndarray:
        """States at the starts of the steps, ``(m, count, n)``; valid until another window is asked for."""
        W = self.buffer("states", self.m)[:, : window.count]
        if self._here == window.first:
            return W
        self._here = None  # as long as a step may fail
        for memory in self._kept or ():
            memory.reset(factors=True)
        W[0] = self._U[window.starts]
        for j in range(self.m - 1):
            self.propagator.step(self.data(window, j, linearised=False), W[j], W[j + 1], window.first)
        self._here = window.first
        return W

    def tangents(self, window: Window, dz: np.ndarray | None, dU: np.ndarray) -> np.ndarray:
        """The same of a tangent trajectory."""
        D = self.buffer("tangents", self.m)[:, : window.count]
        D[0] = dU[window.starts]
        for j in range(self.m - 1):
            data = self.data(window, j, dz)
            self.propagator.tangent(data, D[j], data.dz, D[j + 1], window.first)
        return D

    def forcing(self, z: np.ndarray | None) -> np.ndarray:
        """Condensed right-hand side of the state of a linear evolution, ``(count, n)``."""
        if self._affine is None:
            self.bind(None, None)  # at no control
            step = lambda window, j, u, out: self.propagator.step(self.data(window, j), u, out, window.first)
            self._affine = self._taken_along(step, moves=self.evolution.depends_on_time)
        return self._affine if z is None else self._affine + self.control_forcing(z)

    def control_forcing(self, dz: np.ndarray) -> np.ndarray:
        """That of its tangent, ``(count, n)``."""
        self.bind(None, None)

        def tangent(window, j, u, out):
            data = self.data(window, j, dz)
            self.propagator.tangent(data, u, data.dz, out, window.first)

        return self._taken_along(tangent, moves=dz.ndim == 2 or self.evolution.controls_move)

    def _taken_along(self, step, *, moves: bool) -> np.ndarray:
        """Where steps lead from zero in each interval; in all alike where nothing ``moves``."""
        out = np.empty((self.count if moves else 1, self.evolution.state_size))
        for window in self.windows if moves else [Window(0, 0, 1, self.m)]:
            a, b = (self.buffer(name)[: window.count] for name in "pq")
            a[...] = 0
            for j in range(self.m):
                step(window, j, a, b)
                a, b = b, a
            out[window.place : window.place + window.count] = a
        return np.broadcast_to(out, (self.count, out.shape[1]))

    # -- backwards -----------------------------------------------------------------------------------------------------
    def adjoint(self, window: Window, j: int, lam: np.ndarray, out: np.ndarray) -> None:
        """``Phi_u^T lam`` of steps number ``j``; blocks are in the order of the adjoint sweep, as its lanes are."""
        last = self.slab.nsteps // self.m - window.first - window.count
        self.propagator.adjoint(_reversed(self.data(window, j)), lam[::-1], out[::-1], last)

    def control_adjoint(self, window: Window, j: int, lam: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam``: ``(count, nz)``, or their sum ``(nz,)``."""
        return self.propagator.control_adjoint(self.data(window, j), lam, window.first)

    def second_order(self, window: Window, j: int, du: np.ndarray, dz, lam: np.ndarray):
        """Second derivatives of steps number ``j``, see :meth:`FEPropagator.second_order`."""
        data = self.data(window, j, dz)
        return self.propagator.second_order(data, du, data.dz, lam)

    # -- for the solver ------------------------------------------------------------------------------------------------
    def linearised(self, steps: range, *, backwards: bool) -> StepData:
        """Data of a step that is numbered in the sweep's direction; windows of one interval only."""
        (step,) = steps
        if backwards:
            step = self.slab.nsteps - 1 - step
        return self.data(self.windows[(step - self.slab.lo) // self.m], step % self.m)


def _reversed(data: StepData) -> StepData:
    return data.part(slice(None, None, -1))
