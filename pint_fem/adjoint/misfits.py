r"""Misfits: what of the trajectory is compared with data. ``J = sum of misfits + regularisation``.

A misfit is bound to a slab. It sees all local points, the ghost in row 0 included, and returns

* ``values``: its share at each own point (rows ``1..k``), summed over space, so that the sum over time is in point
  order;
* ``gradient``: :math:`dJ/dU_n` in rows ``0..k-1`` (and ``k`` on the last rank), which is what the adjoint of the slab
  needs;
* ``hessian``: the directional derivative of that.

Data in a functional are read when it is bound; later changes of their values are not seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import ufl
from firedrake import (
    Function,
    FunctionSpace,
    TensorFunctionSpace,
    TestFunction,
    TrialFunction,
    VertexOnlyMesh,
    action,
    assemble,
    derivative,
)
from firedrake import interpolate as interpolate_
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.propagators.arrays import get, put, rows_in_whole
from pint_fem.propagators.blocks import BlockOperator
from pint_fem.propagators.evolution import Evolution
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["Misfit", "PointSensors", "RunningMisfit", "TerminalMisfit"]


class Misfit(ABC):
    """See the module."""

    #: Whether it is a quadratic function of the trajectory.
    quadratic = False

    def bind(self, evolution: Evolution, spacetime: SpaceTime, slab: Slab) -> None:
        """Prepare for the points of a slab; called once, on every rank."""
        self.evolution, self.spacetime, self.slab = evolution, spacetime, slab

    @abstractmethod
    def values(self, U: np.ndarray) -> np.ndarray:
        """Share of each own point, ``(k,)``, from states ``(k + 1, n)``."""

    @abstractmethod
    def directional(self, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`values` in the direction ``dU``, ``(k,)``."""

    @abstractmethod
    def gradient(self, U: np.ndarray) -> np.ndarray:
        """``dJ/dU_n``, ``(k + 1, n)``."""

    @abstractmethod
    def hessian(self, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`gradient` in the direction ``dU``, ``(k + 1, n)``."""


class _FormMisfit(Misfit):
    r"""A UFL functional ``j(u, t)`` at some points with weights.

    Where its second derivative is constant it is :math:`\tfrac12 u^T Q u + g^T u + c`, and slabs are products with
    one matrix; ``g`` and ``c`` are assembled for each point once (once in all if ``j`` does not depend on time).
    Otherwise forms compiled once are assembled for each point.
    """

    def __init__(self, form: ufl.Form):
        if not isinstance(form, ufl.Form) or form.arguments():
            raise InputError(
                f"{type(self).__name__}: give a functional such as inner(u - d, u - d)*dx, without test functions"
            )
        self.form = form

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Weight of each local point, ``(k + 1,)``."""

    def bind(self, evolution, spacetime, slab):
        """See :class:`Misfit`."""
        super().bind(evolution, spacetime, slab)
        u, t = evolution.u, evolution.t
        coefficients = extract_coefficients(self.form)
        if u not in coefficients:
            raise InputError(f"{type(self).__name__}: the functional does not contain the evolution's state u")
        if set(evolution.controls) & set(coefficients):
            raise InputError(f"{type(self).__name__}: the functional contains a control; use regularisation= for it")
        self.weight = self.weights()
        self.times = evolution.time(np.arange(slab.lo, slab.hi + 1))
        self._du = Function(evolution.V)
        gradient = derivative(self.form, u, TestFunction(evolution.V))
        second = expand_derivatives(derivative(gradient, u, TrialFunction(evolution.V)))
        moving = {u, t}
        self.quadratic = second.empty() or not moving & set(extract_coefficients(second))
        if self.quadratic:
            self._Q = None if second.empty() else BlockOperator(assemble(second, mat_type="aij").petscmat)
            at_zero = {u: Function(evolution.V)}
            self._g = self._at_points(ufl.replace(expand_derivatives(gradient), at_zero), t in coefficients)
            self._c = self._at_points(ufl.replace(self.form, at_zero), t in coefficients)
        else:
            self._assemble = [
                get_assembler(expand_derivatives(f)) for f in (self.form, gradient, action(second, self._du))
            ]

    def _at_points(self, form, depends_on_time: bool) -> np.ndarray:
        """Assembled values of a form without ``u``, one a local point or one row for all."""
        form = expand_derivatives(form)
        scalar = not form.arguments()
        if form.empty():
            return np.zeros((1,) if scalar else (1, self.evolution.state_size))
        rows = []
        for time in self.times if depends_on_time else self.times[:1]:
            if depends_on_time:
                self.evolution.t.assign(time)
            result = assemble(form)
            rows.append(result if scalar else get(result))
        return np.array(rows)

    def _each(self, which: int, U, dU=None):
        """Assemble form ``which`` at each local point with a weight."""
        rows = []
        for i, weight in enumerate(self.weight):
            if not weight:
                rows.append(0.0 if which == 0 else np.zeros(self.evolution.state_size))
                continue
            put(self.evolution.u, U[i])
            if dU is not None:
                put(self._du, dU[i])
            if self.evolution.t is not None:
                self.evolution.t.assign(self.times[i])
            result = self._assemble[which].assemble()
            rows.append(result if which == 0 else get(result))
        return np.array(rows)

    def _dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Dot product of each row over space, ``(k,)`` for rows ``1..k``."""
        return self.spacetime.sum_over_space(np.array([x @ y for x, y in zip(a[1:], b[1:], strict=True)]))

    def _Qu(self, U):
        """``Q u`` at the points that have a weight."""
        out = np.zeros_like(U)
        if self._Q is not None and self.weight.any():
            rows = np.flatnonzero(self.weight)
            out[rows] = self._Q(U[rows])
        return out

    def values(self, U):
        """See :class:`Misfit`."""
        if not self.quadratic:
            return self.weight[1:] * self._each(0, U)[1:]
        c = np.broadcast_to(self._c, len(U))[1:]
        return self.weight[1:] * (self._dots(0.5 * self._Qu(U) + self._g, U) + c)

    def directional(self, U, dU):
        """See :class:`Misfit`."""
        return self._dots(self.gradient(U), dU)

    def gradient(self, U):
        """See :class:`Misfit`."""
        return (
            self.weight[:, None] * (self._Qu(U) + self._g)
            if self.quadratic
            else self.weight[:, None] * self._each(1, U)
        )

    def hessian(self, U, dU):
        """See :class:`Misfit`."""
        return self.weight[:, None] * (self._Qu(dU) if self.quadratic else self._each(2, U, dU))


class RunningMisfit(_FormMisfit):
    r""":math:`\sum_{n=1}^{N} \Delta t\, j(u_n, t_n)`, for ``j`` a UFL functional of the evolution's ``u`` and ``t``.

    Raises
    ------
    InputError
        If the form is no functional, or has no ``u``, or contains the control.
    """

    def weights(self):
        """``dt`` at the points ``1..N``."""
        weight = np.full(self.slab.k + 1, self.evolution.dt)
        if self.slab.is_first:
            weight[0] = 0
        return weight


class TerminalMisfit(_FormMisfit):
    """``j(u_N)``, for ``j`` a UFL functional of the evolution's ``u``; errors as for :class:`RunningMisfit`."""

    def weights(self):
        """1 at the last point."""
        weight = np.zeros(self.slab.k + 1)
        if self.slab.is_last:
            weight[-1] = 1
        return weight


class PointSensors(Misfit):
    r"""Sensors at points: :math:`\frac{w}{2} \sum_r \sum_s (u(x_s, t_r) - d_{rs})^2`, ``u`` linear in time between
    steps.

    ``u`` is the state, or a component of it or of one of its fields.

    Parameters
    ----------
    points
        ``(sensors, dim)`` coordinates, distinct.
    times
        ``(readings,)``, increasing, within the evolution's interval.
    values
        ``(readings, sensors)``.
    weight
        ``w``, for instance one over (variance times number of values).
    field
        Number of the field of a mixed state that is read.
    component
        Of a vector-valued state or field, counted from 0 (of a tensor row by row).

    Raises
    ------
    InputError
        On shapes that do not match, values that are not finite, times out of range, a sensor outside the mesh, a field
        or component that is missing or not there.
    """

    quadratic = True

    def __init__(
        self, points, times, values, *, weight: float = 1.0, field: int | None = None, component: int | None = None
    ):
        self.field, self.component = field, component
        self.points, self.times = np.atleast_2d(np.asarray(points, float)), np.atleast_1d(np.asarray(times, float))
        self.data, self.weight = np.asarray(values, dtype=float), float(weight)
        if self.data.shape != (len(self.times), len(self.points)):
            raise InputError(
                f"readings have shape {self.data.shape}: give (times, sensors) = {(len(self.times), len(self.points))}"
            )
        if not all(np.isfinite(a).all() for a in (self.points, self.times, self.data)):
            raise InputError("sensor points, times and readings must be finite numbers")
        if len(self.times) == 0 or (np.diff(self.times) <= 0).any():
            raise InputError("sensor times must increase")
        if len(np.unique(self.points, axis=0)) < len(self.points):
            raise InputError("two sensors are at the same point: merge their readings")

    def bind(self, evolution, spacetime, slab):
        """See :class:`Misfit`."""
        super().bind(evolution, spacetime, slab)
        mesh, space = evolution.V.mesh().unique(), self._read_space(evolution.V)
        if self.points.shape[1] != mesh.geometric_dimension:
            raise InputError(
                f"sensors have {self.points.shape[1]} coordinates on a {mesh.geometric_dimension}-dimensional mesh"
            )
        N, slack = evolution.nsteps, 1e-9 * evolution.dt
        first, last = evolution.time(0), evolution.time(N)
        if self.times[0] < first - slack or self.times[-1] > last + slack:
            raise InputError(f"sensor times {self.times[0]:g}..{self.times[-1]:g} are not within {first:g}..{last:g}")
        try:
            sensors = VertexOnlyMesh(mesh, self.points, missing_points_behaviour="error")
        except Exception as error:  # Firedrake raises it on every rank
            raise InputError(f"a sensor is outside the mesh: {str(error).splitlines()[0]}") from error
        H = self._matrix(space, sensors)
        self._read, self._read_T = BlockOperator(H), BlockOperator(H.transpose(type(H)()))
        here = np.asarray(sensors.coordinates.dat.data_ro).reshape(-1, self.points.shape[1])
        #: Numbers of the sensors that this space rank holds.
        self.local = np.array([int(np.argmin(((self.points - x) ** 2).sum(axis=1))) for x in here], dtype=int)
        # a reading at t in (t_{n-1}, t_n] belongs to point n: theta u_n + (1 - theta) u_{n-1}
        place = (self.times - evolution.t0) / evolution.dt
        point = np.clip(np.ceil(place - 1e-9), 1, N).astype(int)
        own = np.flatnonzero((point > slab.lo) & (point <= slab.hi))
        self._row, self._theta = point[own] - slab.lo, np.minimum(place[own] - (point[own] - 1), 1.0)
        self._theta[np.abs(self._theta - 1) < 1e-9] = 1.0
        self._own_data = self.data[own][:, self.local]

    def _read_space(self, V):
        """The space of what is read, by itself."""
        if len(V) > 1:
            if self.field is None or not 0 <= self.field < len(V):
                raise InputError(
                    f"PointSensors: the state has {len(V)} fields and field = {self.field}: give 0 to {len(V) - 1}"
                )
            self._rows = rows_in_whole(V.sub(self.field))
            V = V.sub(self.field).collapse()
        elif self.field is not None:
            raise InputError(f"PointSensors: field = {self.field} for a state that is not mixed: leave it out")
        else:
            self._rows = None
        size = int(np.prod(V.value_shape))
        if V.value_shape and (self.component is None or not 0 <= self.component < size):
            raise InputError(
                f"PointSensors: what is read has {size} components and component = {self.component}: "
                f"give 0 to {size - 1}"
            )
        if not V.value_shape and self.component is not None:
            raise InputError(f"PointSensors: component = {self.component} of a scalar: leave it out")
        return V

    def _matrix(self, space, sensors):
        """The matrix from the own values of what is read to the own sensors."""
        if not space.value_shape:
            return assemble(interpolate_(TrialFunction(space), FunctionSpace(sensors, "DG", 0))).petscmat
        at_sensors = TensorFunctionSpace(sensors, "DG", 0, shape=space.value_shape)
        H = assemble(interpolate_(TrialFunction(space), at_sensors)).petscmat
        (first, last), size = H.getOwnershipRange(), int(np.prod(space.value_shape))
        rows = PETSc.IS().createStride((last - first) // size, first + self.component, size, comm=H.comm)
        (first, last) = H.getOwnershipRangeColumn()
        return H.createSubMatrix(rows, PETSc.IS().createStride(last - first, first, 1, comm=H.comm))

    def _observe(self, U: np.ndarray) -> np.ndarray:
        """Readings of states ``(k, n)`` at the own sensors, ``(k, own sensors)``."""
        return self._read(U if self._rows is None else U[:, self._rows])

    def _observe_T(self, S: np.ndarray) -> np.ndarray:
        """The transpose."""
        if self._rows is None:
            return self._read_T(S)
        out = np.zeros((len(S), self.evolution.state_size))
        out[:, self._rows] = self._read_T(S)
        return out

    def predict(self, U: np.ndarray) -> np.ndarray:
        """Readings of the own times and own sensors, ``(own readings, own sensors)``."""
        Y, theta = self._observe(U), self._theta[:, None]
        return theta * Y[self._row] + (1 - theta) * Y[self._row - 1]

    def predict_all(self, U: np.ndarray) -> np.ndarray:
        """All readings ``(times, sensors)`` on every rank (data, not fields)."""
        own = np.zeros(self.data.shape)
        first = int(self.spacetime.time_comm.exscan(len(self._row)) or 0)
        own[first : first + len(self._row), self.local] = self.predict(U)
        return self.spacetime.sum_over_grid(own)

    def _per_point(self, terms: np.ndarray) -> np.ndarray:
        out = np.zeros(self.slab.k)
        np.add.at(out, self._row - 1, terms.sum(axis=1))
        return self.spacetime.sum_over_space(self.weight * out)

    def _pull_back(self, r: np.ndarray) -> np.ndarray:
        """Transpose of :meth:`predict`, with what the left neighbour's readings put on the ghost."""
        S, theta = np.zeros((self.slab.k + 1, len(self.local))), self.weight * self._theta[:, None]
        np.add.at(S, self._row, theta * r)
        np.add.at(S, self._row - 1, (self.weight - theta) * r)
        comm = self.spacetime.time_comm
        send = None if self.slab.is_last else comm.Isend(S[-1].copy(), dest=comm.rank + 1, tag=1)
        if not self.slab.is_first:
            from_left = np.empty(len(self.local))
            comm.Recv(from_left, source=comm.rank - 1, tag=1)
            S[0] += from_left
        if send is not None:
            send.Wait()
        return self._observe_T(S)

    def values(self, U):
        """See :class:`Misfit`."""
        return self._per_point(0.5 * (self.predict(U) - self._own_data) ** 2)

    def directional(self, U, dU):
        """See :class:`Misfit`."""
        return self._per_point((self.predict(U) - self._own_data) * self.predict(dU))

    def gradient(self, U):
        """See :class:`Misfit`."""
        return self._pull_back(self.predict(U) - self._own_data)

    def hessian(self, U, dU):
        """See :class:`Misfit`."""
        return self._pull_back(self.predict(dU))
