r"""Misfits and their derivatives along state, tangent and adjoint, with trajectories stored at all points or C-points.

For the state :math:`u`, a tangent :math:`\delta u` and an adjoint :math:`\lambda` of the own steps the classes compute

* the misfits' contributions :math:`j_n(u_n)` of the own points, and their derivatives :math:`j_n'(u_n)\,\delta u_n`;
* the right-hand side of the adjoint equation, :math:`j_n'(u_n)`;
* that of the second-order adjoint equation, :math:`j_n''(u_n)\,\delta u_n +
  \lambda_{n+1}^T \Phi_n''[\,\cdot\,, (\delta u_n, \delta z)]`;
* the derivative by the controls, :math:`\Phi_{n,z}^T \lambda_{n+1}`.

With C-points only (:mod:`~pint_fem.sweeps.c_points`) right-hand sides are condensed: in an interval the adjoint is a
particular solution, which vanishes at the interval's end, plus the homogeneous solution of the adjoint at the C-point
there. The particular solution is available while the right-hand side is condensed, so its contribution to the
derivative by the controls is summed then, and returned with the right-hand side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pint_fem.adjoint.evaluation import Evaluation
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.misfits.base import BlockMisfit, Misfit, checked_slab, checked_values, hessian_products
from pint_fem.sweeps.c_points import ControlDerivative, IntervalGroup, Intervals
from pint_fem.sweeps.sweeps import Controls, Sweeps

__all__ = ["CPointTrajectories", "Source", "StoredTrajectories", "trajectories"]


class Source(NamedTuple):
    """Right-hand side of an adjoint equation.

    Attributes
    ----------
    rows : ndarray
        ``(k + 1, n)``, or condensed to the C-points; of a batch ``(k + 1, members, n)``.
    controls : ndarray, list or None
        Contribution of the right-hand side to the derivative by the controls, beside that of the adjoint at the stored
        points; of a batch a list with that of each member.
    """

    rows: np.ndarray
    controls: np.ndarray | list | None = None


def trajectories(sweeps: Sweeps, misfits: Sequence[Misfit]) -> StoredTrajectories | CPointTrajectories:
    """Bind the misfits to the steps of this rank, and evaluate them as the sweeps' storage requires (collective).

    Raises
    ------
    InputError
        If only C-points are stored and a misfit is no :class:`~pint_fem.misfits.base.BlockMisfit`.
    """
    compact, spacetime = sweeps.intervals is not None, sweeps.spacetime
    for misfit in misfits:
        if compact and not isinstance(misfit, BlockMisfit):
            raise InputError(
                f"mgrit storage 'C': {type(misfit).__name__} requires the state at all points at once; derive it from "
                "BlockMisfit or give storage='all'"
            )
        if compact:
            misfit.stores_data = False
        collectively(spacetime.comm, "misfit", misfit.bind, sweeps.evolution, spacetime, sweeps.slab)
    return (CPointTrajectories if compact else StoredTrajectories)(sweeps, misfits)


def _sum(slabs: Iterable[np.ndarray]) -> np.ndarray:
    """The sum of arrays, in the first of them."""
    total = None
    for slab in slabs:
        total = slab if total is None else np.add(total, slab, out=total)
    return total


class _Trajectories:
    """Misfits along the trajectories of one kind of storage."""

    where = "misfits"

    def __init__(self, sweeps: Sweeps, misfits: Sequence[Misfit]):
        self.sweeps, self.misfits = sweeps, misfits

    def _collectively(self, work: Callable, *args: Any):
        """The result of ``work``; what fails on one rank raises on all."""
        return collectively(self.sweeps.spacetime.comm, self.where, work, *args)


class StoredTrajectories(_Trajectories):
    """Misfits along trajectories that are stored at all points.

    ``evaluation`` holds the state and the adjoint of a control, and ``z`` are the controls of the own steps.
    """

    def values(self, evaluation: Evaluation, z: Controls) -> np.ndarray:
        """Contributions of the own points to each misfit, ``(k, misfits)``."""
        return np.stack([self._collectively(checked_values, m.values, evaluation.U) for m in self.misfits], axis=1)

    def directional(self, evaluation: Evaluation, z: Controls, dz: Controls, dU: np.ndarray) -> np.ndarray:
        """Derivatives of the contributions along a tangent ``dU``, summed over the misfits, ``(k,)``."""
        return sum(self._collectively(checked_values, m.directional, evaluation.U, dU) for m in self.misfits)

    def gradient(self, evaluation: Evaluation, z: Controls) -> Source:
        """Right-hand side of the adjoint equation."""
        return Source(_sum(self._collectively(checked_slab, m.gradient, evaluation.U) for m in self.misfits))

    def direct_controls(self, evaluation: Evaluation, z: Controls) -> np.ndarray | None:
        """``controls`` of :meth:`gradient`, where only these are required."""
        return None

    def hessian(
        self, evaluation: Evaluation, z: Controls, dz: Controls | list, dU: np.ndarray, *,
        second: bool, symmetric: bool = False,
    ) -> Source:  # fmt: skip
        """Right-hand side of the second-order adjoint equation.

        Parameters
        ----------
        dz, dU
            Direction of the controls and the tangent in this direction; of a batch a list and ``(k + 1, members, n)``.
        second
            Whether the second derivatives of the steps are included.
        symmetric
            Whether they are a symmetric form of ``(dU, dz)`` also where ``dU`` is no exact tangent.
        """
        g = _sum(self._collectively(hessian_products, m, evaluation.U, dU) for m in self.misfits)
        if not second:
            return Source(g)
        given = dict(symmetric=symmetric, computed=evaluation.computed)
        su, sz = self.sweeps.second_order(z, evaluation.U, dz, dU, evaluation.L, **given)
        g += su
        return Source(g, sz)

    def control_gradient(
        self, evaluation: Evaluation, z: Controls, L: np.ndarray, controls: Controls | list
    ) -> np.ndarray | list | None:
        """Derivative by the controls from an adjoint ``L``, summed ``(nz,)`` or per step ``(k, nz)``; ``controls`` are
        those of the adjoint's :class:`Source`. ``None`` without parameters. Of a batch a list with that of each member.
        """
        rows = self.sweeps.control_gradient(z, evaluation.U, L)
        if rows is None or controls is None:
            return rows
        return [a + b for a, b in zip(rows, controls, strict=True)] if L.ndim == 3 else rows + controls

    def observations(self, evaluation: Evaluation, z: Controls, index: int) -> np.ndarray:
        """Observations of misfit number ``index`` at all local points, ``(k + 1, width)``."""
        return self.misfits[index].read(evaluation.U)

    def states(self, evaluation: Evaluation, z: Controls) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of states at all local points in the order of time: number of the first point, and states ``(b, n)``
        that are valid until the next block is computed.
        """
        yield 0, evaluation.U

    def adjoints(self, evaluation: Evaluation, z: Controls) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of adjoints, as :meth:`states`."""
        yield 0, evaluation.L


class CPointTrajectories(_Trajectories):
    """Misfits along trajectories that are stored at the C-points, group by group of the intervals between these.

    The methods are those of :class:`StoredTrajectories`; right-hand sides are condensed.
    """

    where = "states between C-points"

    @property
    def intervals(self) -> Intervals:
        """The own intervals of the sweeps."""
        return self.sweeps.intervals

    # -- observations --------------------------------------------------------------------------------------------------
    def _read(self, evaluation: Evaluation, z: Controls, dz=None, dU: np.ndarray | None = None) -> list[np.ndarray]:
        """Observations of the local points by each misfit, or their derivatives along a tangent."""
        k, intervals, along = self.sweeps.slab.k, self.intervals, dU is not None
        intervals.bind(z, evaluation.U)
        out = [np.zeros((k + 1, m.width)) for m in self.misfits]
        observed = [m.observed for m in self.misfits]
        # derivatives depend on the state where the misfit is not linear in it
        of_state = [m.observed & m.state_dependent if along else m.observed for m in self.misfits]

        def observe(points: slice, u: np.ndarray, du: np.ndarray) -> None:
            for misfit, Y in zip(self.misfits, out, strict=True):
                if misfit.observed[points].any():
                    Y[points] = misfit.observe_tangent(points, u, du) if along else misfit.observe(points, u)

        for group in intervals.groups:
            if not any(_any_at(observed, group, j) for j in range(group.m)):
                continue
            inside = _any_inside(observed, group)
            W = D = None
            if inside and (_any_inside(of_state, group) or not self.sweeps.is_affine):
                W = intervals.states(group)
            if inside and along:
                D = intervals.tangents(group, dz, dU)
            for j in range(group.m if inside else 1):
                u, du = _start_of_step(evaluation.U, W, group, j), _start_of_step(dU, D, group, j)
                observe(group.steps(j), du if u is None else u, du)
        observe(slice(k, k + 1), evaluation.U[-1:], dU[-1:] if along else None)
        return out

    def _readings(self, evaluation: Evaluation, z: Controls) -> list[np.ndarray]:
        """Observations of the state, which the evaluation stores until its state changes."""
        if evaluation.readings is None:
            evaluation.readings = self._collectively(self._read, evaluation, z)
        return evaluation.readings

    def _of_each_misfit(self, method: str, *observations: Sequence) -> list[np.ndarray]:
        """The results of a method of each misfit, called with the misfit's observations."""
        calls = zip(self.misfits, *observations, strict=True)
        return [self._collectively(getattr(misfit, method), *Y) for misfit, *Y in calls]

    @property
    def _uses_observations(self) -> bool:
        return any(m.uses_observations for m in self.misfits)

    # -- the same as of stored trajectories ----------------------------------------------------------------------------
    def values(self, evaluation: Evaluation, z: Controls) -> np.ndarray:
        """Contributions of the own points to each misfit, ``(k, misfits)``."""
        return np.stack(self._of_each_misfit("point_values", self._readings(evaluation, z)), axis=1)

    def directional(self, evaluation: Evaluation, z: Controls, dz: Controls, dU: np.ndarray) -> np.ndarray:
        """Derivatives of the contributions along a tangent, summed over the misfits, ``(k,)``."""
        readings = self._readings(evaluation, z) if self._uses_observations else [None] * len(self.misfits)
        along = self._collectively(self._read, evaluation, z, dz, dU)
        return sum(self._of_each_misfit("point_derivatives", readings, along))

    def gradient(self, evaluation: Evaluation, z: Controls) -> Source:
        """Condensed right-hand side of the adjoint equation."""
        states = [m.state_dependent for m in self.misfits]
        return self._collectively(self._condense, evaluation, z, self._adjoint_source(evaluation, z), states)

    def direct_controls(self, evaluation: Evaluation, z: Controls) -> np.ndarray | None:
        """``controls`` of :meth:`gradient`, where only these are required."""
        return self.gradient(evaluation, z).controls if self.sweeps.evolution.parameters else None

    def observations(self, evaluation: Evaluation, z: Controls, index: int) -> np.ndarray:
        """Observations of misfit number ``index`` at all local points, ``(k + 1, width)``."""
        return self._readings(evaluation, z)[index]

    def states(self, evaluation: Evaluation, z: Controls) -> Iterator[tuple[int, np.ndarray]]:
        """States at all local points, in blocks of one interval."""
        self.intervals.bind(z, evaluation.U)
        for group in self.intervals.groups:
            W = self.intervals.states(group)
            for i in range(group.count):
                yield (group.place + i) * group.m, W[:, i]
        yield self.sweeps.slab.k, evaluation.U[-1:]

    def adjoints(self, evaluation: Evaluation, z: Controls) -> Iterator[tuple[int, np.ndarray]]:
        """Adjoints at all local points, in blocks of one interval."""
        source = self._adjoint_source(evaluation, z)
        self.intervals.bind(z, evaluation.U)
        for group in self.intervals.groups:
            ends = self._adjoints_at_ends(group, self.intervals.states(group), evaluation.L, source)
            for i in range(group.count):
                first = evaluation.L[group.place + i]
                yield (group.place + i) * group.m, np.concatenate([first[None], ends[:-1, i]])
        yield self.sweeps.slab.k, evaluation.L[-1:]

    def _adjoint_source(self, evaluation: Evaluation, z: Controls) -> Callable[[slice, np.ndarray], np.ndarray]:
        """The function ``(points, u) -> sum of j_n'(u_n)``, the adjoint's right-hand side at some points."""
        S = [None] * len(self.misfits)
        if self._uses_observations:
            S = self._of_each_misfit("pull_back", self._readings(evaluation, z))
        terms = list(zip(self.misfits, S, strict=True))
        return lambda points, u: _sum(m.adjoint_source(points, u, s) for m, s in terms)

    def hessian(
        self, evaluation: Evaluation, z: Controls, dz: Controls | list, dU: np.ndarray, *,
        second: bool, symmetric: bool = False,
    ) -> Source:  # fmt: skip
        """Condensed right-hand side of the second-order adjoint equation; symmetric in any case, as tangents are exact
        inside the intervals. For a batch one member follows another, as the intervals advance in lock-step anyway.
        """
        if dU.ndim == 3:
            each = zip(dz or [None] * dU.shape[1], np.moveaxis(dU, 1, 0), strict=True)
            sources = [
                self.hessian(evaluation, z, d, np.ascontiguousarray(du), second=second, symmetric=symmetric)
                for d, du in each
            ]
            return Source(np.stack([s.rows for s in sources], axis=1), [s.controls for s in sources])
        dS = [None] * len(self.misfits)
        if self._uses_observations:
            dS = self._of_each_misfit("pull_back_tangent", self._collectively(self._read, evaluation, z, dz, dU))
        terms = list(zip(self.misfits, dS, strict=True))
        source = lambda points, u, du: _sum(m.adjoint_source_tangent(points, u, du, s) for m, s in terms)
        states = [np.zeros_like(m.state_dependent) if m.quadratic else m.state_dependent for m in self.misfits]
        first = self._adjoint_source(evaluation, z) if second else None
        return self._collectively(self._condense, evaluation, z, source, states, dz, dU, first)

    def _condense(
        self, evaluation: Evaluation, z: Controls, source: Callable, states, dz=None, dU=None, first=None
    ) -> Source:
        """Condense a right-hand side.

        Parameters
        ----------
        source
            The right-hand side ``source(points, u)``, or ``source(points, u, du)`` along a tangent.
        states
            Masks ``(k + 1,)`` of the points at which it depends on the state.
        dz, dU
            Direction of the controls and tangent, for the second-order adjoint.
        first
            Right-hand side of the adjoint itself; then the second derivatives of the steps are included.
        """
        intervals, second, along = self.intervals, first is not None, dU is not None
        intervals.bind(z, evaluation.U)
        out, controls = self.sweeps.new_slab(), ControlDerivative(intervals)
        active = [m.active for m in self.misfits]
        for group in intervals.groups:
            steps = [j for j in range(group.m) if second or _any_at(active, group, j)]
            if not steps:
                continue
            W = D = Lam = None
            if not self.sweeps.is_affine or _any_inside(states, group):
                W = intervals.states(group)
            if second or (along and _any_inside([m.state_dependent for m in self.misfits], group)):
                D = intervals.tangents(group, dz, dU)
            if second:
                Lam = self._adjoints_at_ends(group, W, evaluation.L, first)
            p, q = intervals.pair(group)
            p[...] = 0
            for j in reversed(range(steps[-1] + 1)):
                if j < steps[-1]:
                    controls.add_adjoint(group, j, p)
                    intervals.adjoint(group, j, p, q)
                    p, q = q, p
                u = evaluation.U[group.starts] if W is None else W[j]
                du = None if not along else dU[group.starts] if D is None else D[j]
                if _any_at(active, group, j):
                    p += source(group.steps(j), u, du) if along else source(group.steps(j), u)
                if second:
                    su, sz = intervals.second_order(group, j, du, dz, Lam[j])
                    p += su
                    controls.add(group, j, sz)
            out[group.starts] = p
        if self.sweeps.slab.is_last:
            k = self.sweeps.slab.k
            out[-1:] = source(slice(k, k + 1), evaluation.U[-1:], *((dU[-1:],) if along else ()))
        return Source(out, controls.rows)

    def _adjoints_at_ends(self, group: IntervalGroup, W, L, source) -> np.ndarray:
        """Adjoints at the ends of the steps of a group's intervals, ``(m, count, n)``."""
        intervals, m = self.intervals, group.m
        Lam = intervals.buffer("adjoints", m)[:, : group.count]
        Lam[-1] = L[group.ends]
        for j in reversed(range(1, m)):
            intervals.adjoint(group, j, Lam[j], Lam[j - 1])
            Lam[j - 1] += source(group.steps(j), W[j])
        return Lam

    def control_gradient(
        self, evaluation: Evaluation, z: Controls, L: np.ndarray, controls: Controls | list
    ) -> np.ndarray | list | None:
        """Derivative by the controls from an adjoint at the C-points and the ``controls`` of its :class:`Source`; of a
        batch a list with that of each member.
        """
        if not self.sweeps.evolution.parameters:
            return None
        if L.ndim == 3:
            each = zip(np.moveaxis(L, 1, 0), controls, strict=True)
            return [self.control_gradient(evaluation, z, np.ascontiguousarray(lam), own) for lam, own in each]
        return self._collectively(self._control_gradient, evaluation, z, L, controls)

    def _control_gradient(self, evaluation: Evaluation, z: Controls, L: np.ndarray, controls: Controls) -> np.ndarray:
        intervals = self.intervals
        intervals.bind(z, evaluation.U)
        total = ControlDerivative(intervals, controls)
        for group in intervals.groups:
            p, q = intervals.pair(group)
            p[...] = L[group.ends]
            for j in reversed(range(group.m)):
                total.add_adjoint(group, j, p)
                if j:
                    intervals.adjoint(group, j, p, q)
                    p, q = q, p
        return total.finish()


def _any_at(masks: Sequence[np.ndarray], group: IntervalGroup, j: int) -> bool:
    """Whether a point at which step ``j`` of an interval starts is in one of the masks ``(k + 1,)``."""
    return any(mask[group.steps(j)].any() for mask in masks)


def _any_inside(masks: Sequence[np.ndarray], group: IntervalGroup) -> bool:
    """Whether an F-point of the group is in one of the masks."""
    return any(_any_at(masks, group, j) for j in range(1, group.m))


def _start_of_step(stored: np.ndarray | None, inside: np.ndarray | None, group: IntervalGroup, j: int):
    """Rows of a trajectory at the start of step ``j`` of each interval; ``None`` where they are not available."""
    if stored is not None and j == 0:
        return stored[group.starts]
    return None if inside is None else inside[j]
