r"""What misfits and controls want of trajectories, whether these are stored at all points or at the C-points only.

Both kinds do the same things with the state :math:`u`, a tangent :math:`\delta u` and an adjoint
:math:`\lambda` of the own steps:

* ``values``: shares of the own points in the misfits, and ``directional``, their derivative along :math:`\delta u`;
* ``gradient``: the adjoint's right-hand side :math:`j_n'(u_n)`;
* ``hessian``: the second-order adjoint's, :math:`j_n''(u_n)\,\delta u_n` and the steps' second derivatives;
* ``control_gradient``: :math:`\Phi_{n,z}^T \lambda_{n+1}`;
* ``observations`` of misfits and ``states`` of all local points, for reports.

With C-points only, right-hand sides are condensed (:mod:`~pint_fem.sweeps.c_points`). In an interval the adjoint is a
particular solution that vanishes at its end, and a homogeneous one that the C-point there gives. The particular one is
at hand while its right-hand side is condensed: what controls want of it is collected then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.misfits.base import BlockMisfit, Misfit, on_points, on_slab
from pint_fem.sweeps.c_points import Intervals, Window
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["CPointTrajectories", "Source", "StoredTrajectories", "trajectories"]


class Source(NamedTuple):
    """Right-hand side of an adjoint sweep, ``(k + 1, n)`` or condensed, and what controls get of it directly."""

    rows: np.ndarray
    controls: np.ndarray | None = None


def trajectories(sweeps: Sweeps, misfits: Sequence[Misfit]) -> StoredTrajectories | CPointTrajectories:
    """The kind that fits the sweeps' storage; binds the misfits.

    Raises
    ------
    InputError
        If a misfit wants whole slabs where only C-points are stored.
    """
    compact, spacetime = sweeps.intervals is not None, sweeps.spacetime
    for misfit in misfits:
        if compact and not isinstance(misfit, BlockMisfit):
            raise InputError(
                f"mgrit storage 'C': {type(misfit).__name__} wants the state at all points at once; derive it from "
                "BlockMisfit or give storage='all'"
            )
        if compact:
            misfit.keeps_data = False
        collectively(spacetime.comm, "misfit", misfit.bind, sweeps.evolution, spacetime, sweeps.slab)
    return (CPointTrajectories if compact else StoredTrajectories)(sweeps, misfits)


class _Trajectories:
    """Of one kind or the other."""

    where = "misfits"

    def __init__(self, sweeps: Sweeps, misfits: Sequence[Misfit]):
        self.sweeps, self.misfits = sweeps, misfits

    def _together(self, work: Callable, *args):
        """See :func:`~pint_fem.collective.collectively`."""
        return collectively(self.sweeps.spacetime.comm, self.where, work, *args)


class StoredTrajectories(_Trajectories):
    """Of states at all points."""

    def values(self, point, z) -> np.ndarray:
        """``(k, misfits)``; ``z`` are the controls of the own steps."""
        return np.stack([self._together(on_points, m.values, point.U) for m in self.misfits], axis=1)

    def directional(self, point, z, dz, dU: np.ndarray) -> np.ndarray:
        """``(k,)``."""
        return sum(self._together(on_points, m.directional, point.U, dU) for m in self.misfits)

    def gradient(self, point, z) -> Source:
        """See the module."""
        return Source(_sum(self._together(on_slab, m.gradient, point.U) for m in self.misfits))

    def direct_controls(self, point, z) -> None:
        """``controls`` of :meth:`gradient`."""
        return None

    def hessian(self, point, z, dz, dU: np.ndarray, *, second: bool, symmetric: bool = False) -> Source:
        """See the module; ``second``: with the second derivatives of the steps, ``symmetric`` for any ``dU``."""
        g = _sum(self._together(on_slab, m.hessian, point.U, dU) for m in self.misfits)
        if not second:
            return Source(g)
        su, sz = self.sweeps.second_order(z, point.U, dz, dU, point.L, symmetric=symmetric)
        g += su
        return Source(g, sz)

    def control_gradient(self, point, z, L: np.ndarray, controls) -> np.ndarray | None:
        """``(nz,)`` summed, or ``(k, nz)`` a step; with the ``controls`` of the source of ``L``."""
        rows = self.sweeps.control_gradient(z, point.U, L)
        return rows if rows is None or controls is None else rows + controls

    def observations(self, point, z, index: int) -> np.ndarray:
        """Of misfit number ``index``, ``(k + 1, width)``."""
        return self.misfits[index].read(point.U)

    def states(self, point, z) -> Iterator[tuple[int, np.ndarray]]:
        """Number of the first one and states ``(b, n)`` of neighbouring local points, from left to right, valid until
        the next are asked for.
        """
        yield 0, point.U

    def adjoints(self, point, z) -> Iterator[tuple[int, np.ndarray]]:
        """The same of the adjoint."""
        yield 0, point.L


def _sum(slabs) -> np.ndarray:
    total = None
    for slab in slabs:
        total = slab if total is None else np.add(total, slab, out=total)
    return total


class CPointTrajectories(_Trajectories):
    """Of states at the C-points."""

    where = "states between C-points"

    def __init__(self, sweeps: Sweeps, misfits: Sequence[BlockMisfit]):
        super().__init__(sweeps, misfits)

    @property
    def intervals(self) -> Intervals:
        """Those of the sweeps."""
        return self.sweeps.intervals

    # -- passes --------------------------------------------------------------------------------------------------------
    def _inside(self, window: Window, points: Sequence[np.ndarray]) -> bool:
        """Whether F-points of a window are among the points, given by masks ``(k + 1,)``."""
        return any(mask[window.rows(j)].any() for j in range(1, window.m) for mask in points)

    def _read(self, point, z, dz=None, dU=None) -> list[np.ndarray]:
        """What the misfits observe of the local points, or its derivative along a tangent."""
        k, intervals, along = self.sweeps.slab.k, self.intervals, dU is not None
        intervals.bind(z, point.U)
        out = [np.zeros((k + 1, m.width)) for m in self.misfits]
        observed = [m.observes for m in self.misfits]
        # derivatives look at the state where values are not linear in it
        of_state = [m.observes & m.forces if along else m.observes for m in self.misfits]

        def look(rows, u, du):
            for misfit, Y in zip(self.misfits, out, strict=True):
                if misfit.observes[rows].any():
                    Y[rows] = misfit.observe_tangent(rows, u, du) if along else misfit.observe(rows, u)

        for window in intervals.windows:
            if not any(mask[window.rows(j)].any() for j in range(window.m) for mask in observed):
                continue
            inside = self._inside(window, observed)
            W = D = None
            if inside and (self._inside(window, of_state) or not self.sweeps.is_linear):
                W = intervals.states(window)
            if inside and along:
                D = intervals.tangents(window, dz, dU)
            for j in range(window.m if inside else 1):
                at_start = lambda slab, rows, j=j, window=window: (
                    slab[window.starts] if j == 0 else None if rows is None else rows[j]
                )
                u, du = at_start(point.U, W), at_start(dU, D) if along else None
                look(window.rows(j), du if u is None else u, du)
        look(slice(k, k + 1), point.U[-1:], dU[-1:] if along else None)
        return out

    def _readings(self, point, z) -> list[np.ndarray]:
        """Observations of the state, kept while it is what it is: a few numbers a point."""
        if point.readings is None:
            point.readings = self._together(self._read, point, z)
        return point.readings

    def _each(self, method: str, *observed) -> list[np.ndarray]:
        """What the misfits make of what they observed."""
        return [self._together(getattr(m, method), *Y) for m, *Y in zip(self.misfits, *observed, strict=True)]

    # -- see StoredTrajectories ----------------------------------------------------------------------------------------
    def values(self, point, z) -> np.ndarray:
        """See :class:`StoredTrajectories`."""
        readings = self._readings(point, z)
        return np.stack(self._each("point_values", readings), axis=1)

    def directional(self, point, z, dz, dU):
        """See :class:`StoredTrajectories`."""
        back = any(m.looks_back for m in self.misfits)
        readings = self._readings(point, z) if back else [None] * len(self.misfits)
        along = self._together(self._read, point, z, dz, dU)
        return sum(self._each("point_derivatives", readings, along))

    def gradient(self, point, z) -> Source:
        """See :class:`StoredTrajectories`; condensed."""
        return self._together(self._condense, point, z, self._force(point, z), [m.forces for m in self.misfits])

    def direct_controls(self, point, z) -> np.ndarray | None:
        """See :class:`StoredTrajectories`."""
        return self.gradient(point, z).controls if self.sweeps.evolution.parameters else None

    def observations(self, point, z, index: int) -> np.ndarray:
        """See :class:`StoredTrajectories`."""
        return self._readings(point, z)[index]

    def states(self, point, z) -> Iterator[tuple[int, np.ndarray]]:
        """See :class:`StoredTrajectories`; an interval at a time."""
        self.intervals.bind(z, point.U)
        for window in self.intervals.windows:
            W = self.intervals.states(window)
            for i in range(window.count):
                yield (window.place + i) * window.m, W[:, i]
        yield self.sweeps.slab.k, point.U[-1:]

    def adjoints(self, point, z) -> Iterator[tuple[int, np.ndarray]]:
        """See :class:`StoredTrajectories`; an interval at a time."""
        force = self._force(point, z)
        self.intervals.bind(z, point.U)
        for window in self.intervals.windows:
            Lam = self._adjoints(window, self.intervals.states(window), point.L, force)
            for i in range(window.count):
                first = point.L[window.place + i]
                yield (window.place + i) * window.m, np.concatenate([first[None], Lam[:-1, i]])
        yield self.sweeps.slab.k, point.L[-1:]

    def _force(self, point, z) -> Callable:
        """``force(rows, u)``: the adjoint's right-hand side at some points."""
        pulled = [None] * len(self.misfits)
        if any(m.looks_back for m in self.misfits):
            readings = self._readings(point, z)
            pulled = self._each("pull_back", readings)
        return lambda rows, u: _sum(m.force(rows, u, S) for m, S in zip(self.misfits, pulled, strict=True))

    def hessian(self, point, z, dz, dU, *, second: bool, symmetric: bool = False) -> Source:
        """See :class:`StoredTrajectories`; condensed, and ``symmetric`` in any case: intervals are exact."""
        pulled = [None] * len(self.misfits)
        if any(m.looks_back for m in self.misfits):
            along = self._together(self._read, point, z, dz, dU)
            pulled = self._each("pull_back_tangent", along)
        terms = list(zip(self.misfits, pulled, strict=True))
        force = lambda rows, u, du: _sum(m.force_tangent(rows, u, du, dS) for m, dS in terms)
        states = [m.forces if not m.quadratic else np.zeros_like(m.forces) for m in self.misfits]
        first = self._force(point, z) if second else None
        return self._together(self._condense, point, z, force, states, dz, dU, first)

    def _condense(self, point, z, force, states, dz=None, dU=None, first=None) -> Source:
        """Condense a right-hand side.

        Parameters
        ----------
        force
            ``force(rows, u)``, or ``force(rows, u, du)`` along a tangent.
        states
            Masks of the points at which it looks at the state.
        first
            The adjoint's own ``force``: with the steps' second derivatives.
        """
        intervals, second, along = self.intervals, first is not None, dU is not None
        intervals.bind(z, point.U)
        out, controls = intervals.zeros(), ControlSum(intervals)
        acts = [m.acts for m in self.misfits]
        linear = self.sweeps.is_linear
        for window in intervals.windows:
            steps = [j for j in range(window.m) if any(mask[window.rows(j)].any() for mask in acts)]
            if second:
                steps = list(range(window.m))
            if not steps:
                continue
            W = D = Lam = None
            if not linear or self._inside(window, states):
                W = intervals.states(window)
            if second or (along and self._inside(window, [m.forces for m in self.misfits])):
                D = intervals.tangents(window, dz, dU)
            if second:
                Lam = self._adjoints(window, W, point.L, first)
            p, q = (intervals.buffer(name)[: window.count] for name in "pq")
            p[...] = 0
            for j in reversed(range(steps[-1] + 1)):
                if j < steps[-1]:
                    controls.add(window, j, p)
                    intervals.adjoint(window, j, p, q)
                    p, q = q, p
                u = point.U[window.starts] if W is None else W[j]
                du = None if not along else dU[window.starts] if D is None else D[j]
                if any(mask[window.rows(j)].any() for mask in acts):
                    p += force(window.rows(j), u, du) if along else force(window.rows(j), u)
                if second:
                    su, sz = intervals.second_order(window, j, du, dz, Lam[j])
                    p += su
                    controls.add_rows(window, j, sz)
            out[window.starts] = p
        if self.sweeps.slab.is_last:
            k = self.sweeps.slab.k
            out[-1:] = force(slice(k, k + 1), point.U[-1:], *((dU[-1:],) if along else ()))
        return Source(out, controls.rows)

    def _adjoints(self, window: Window, W, L, force) -> np.ndarray:
        """Adjoints at the ends of a window's steps, ``(m, count, n)``."""
        intervals, m = self.intervals, window.m
        Lam = intervals.buffer("adjoints", m)[:, : window.count]
        Lam[-1] = L[window.ends]
        for j in reversed(range(1, m)):
            intervals.adjoint(window, j, Lam[j], Lam[j - 1])
            Lam[j - 1] += force(window.rows(j), W[j])
        return Lam

    def control_gradient(self, point, z, L, controls):
        """See :class:`StoredTrajectories`."""
        if not self.sweeps.evolution.parameters:
            return None
        return self._together(self._control_gradient, point, z, L, controls)

    def _control_gradient(self, point, z, L, controls) -> np.ndarray:
        intervals = self.intervals
        intervals.bind(z, point.U)
        total = ControlSum(intervals, controls)
        for window in intervals.windows:
            p, q = (intervals.buffer(name)[: window.count] for name in "pq")
            p[...] = L[window.ends]
            for j in reversed(range(window.m)):
                total.add(window, j, p)
                if j:
                    intervals.adjoint(window, j, p, q)
                    p, q = q, p
        return total.finish()


class ControlSum:
    """Derivatives by the controls that are collected step by step.

    Parameters
    ----------
    intervals
        The own intervals.
    begun
        ``rows`` of another one to go on from.

    Attributes
    ----------
    rows : ndarray or None
        ``(k, nz)`` a step; for static controls the sum ``(nz,)``, or of a linear evolution the propagator's
        ``control_sums`` of the adjoints: then solves at the end do for all.
    """

    def __init__(self, intervals: Intervals, begun: np.ndarray | None = None):
        self._intervals, ev = intervals, intervals.evolution
        self._adjoints = intervals.propagator.is_linear and not ev.per_step
        self._first = Window(0, 0, 1, intervals.m)
        self.rows = None
        if not ev.parameters:
            return
        if begun is not None:
            self.rows = begun.copy()
        elif self._adjoints:
            self.rows = self._sums(self._first, 0, np.zeros((1, ev.state_size)))
        else:
            self.rows = np.zeros((intervals.slab.k, ev.control_size) if ev.per_step else (ev.control_size,))

    def _sums(self, window: Window, j: int, lam: np.ndarray) -> np.ndarray:
        return self._intervals.propagator.control_sums(self._intervals.data(window, j), lam)

    def add(self, window: Window, j: int, lam: np.ndarray) -> None:
        """Of adjoints at the ends of steps number ``j``."""
        if self._adjoints and self.rows is not None:
            self.rows += self._sums(window, j, lam)
        elif self.rows is not None:
            self.add_rows(window, j, self._intervals.control_adjoint(window, j, lam))

    def add_rows(self, window: Window, j: int, rows: np.ndarray) -> None:
        """Of derivatives by the controls of these steps."""
        if self.rows is not None:
            target = self.rows[window.rows(j)] if self.rows.ndim == 2 else self.rows
            target += rows

    def finish(self) -> np.ndarray | None:
        """``(nz,)`` or ``(k, nz)``."""
        if self.rows is None or not self._adjoints:
            return self.rows
        intervals = self._intervals
        return intervals.propagator.control_adjoint_of_sums(intervals.data(self._first, 0), self.rows)
