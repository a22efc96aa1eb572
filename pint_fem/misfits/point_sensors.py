"""Sensors at points: the state there at some times is compared with readings."""

from __future__ import annotations

import numpy as np
from firedrake import FunctionSpace, TensorFunctionSpace, TrialFunction, VertexOnlyMesh, assemble
from firedrake import interpolate as interpolate_
from firedrake.exceptions import VertexOnlyMeshMissingPointsError
from firedrake.petsc import PETSc

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import rows_in_whole
from pint_fem.kernels.blocks import BlockOperator
from pint_fem.misfits.base import BlockMisfit

__all__ = ["PointSensors"]

_NEAR = 0.1
"""Readings that differ by no more than this from their mean, relative to it, are taken relative to it."""


class PointSensors(BlockMisfit):
    r"""Sensors at points: :math:`\frac{w}{2} \sum_r \sum_s (u(x_s, t_r) - d_{rs})^2`, ``u`` linear in time between
    steps.

    ``u`` is the state, or a component of it or of one of its fields.

    All arrays are copied when a functional is made; its ``update_data()`` reads them again, and also what was put in
    their place as attributes ``points``, ``times``, ``data`` (the values) and ``weight``.

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
        self.points, self.times, self.data, self.weight = points, times, values, weight
        self._users = self  # the object that the user has, also of a copy for a second functional
        self._take()

    def _given(self) -> tuple[np.ndarray, ...]:
        """Copies of what the user gave."""
        own = self._users
        try:
            points, times = np.array(own.points, float, ndmin=2), np.array(own.times, float, ndmin=1)
            return points, times, np.array(own.data, float), np.array(own.weight, float)
        except (TypeError, ValueError) as error:
            raise InputError(f"sensors: points, times, readings and weight have to be numbers: {error}") from error

    def given(self):
        """See :class:`~pint_fem.misfits.base.Misfit`."""
        out = dict(zip(("points", "times", "readings", "weight"), self._given(), strict=True))
        return out | {"field": self.field, "component": self.component}

    def _take(self) -> None:
        """Take a copy of what the user gave, and check it."""
        points, times, data, weight = self._given()
        if weight.ndim:
            raise InputError(
                f"sensors: weight of shape {weight.shape}: give one number, and sensors of another accuracy as "
                "PointSensors of their own"
            )
        if data.shape != (len(times), len(points)):
            raise InputError(f"readings have shape {data.shape}: give (times, sensors) = {(len(times), len(points))}")
        if not all(np.isfinite(a).all() for a in (points, times, data)):
            raise InputError("sensor points, times and readings must be finite numbers")
        if not np.isfinite(weight):
            raise InputError(f"sensors: weight = {weight}: give a finite number, such as 1/(variance * readings)")
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            total = 0.5 * weight * np.square(data).sum()
        if not np.isfinite(total):
            largest = np.abs(data).max()
            raise InputError(
                f"sensors: readings as large as {largest:g} with weight {weight:g} overflow in the sum of squares; "
                "give readings in other units, or repair them"
            )
        if len(times) == 0 or (np.diff(times) <= 0).any():
            raise InputError("sensor times must increase")
        if len(np.unique(points, axis=0)) < len(points):
            raise InputError("two sensors are at the same point: merge their readings")
        self._points, self._times, self._data, self._weight = points, times, data, float(weight)

    def has_changed(self):
        """See :class:`~pint_fem.misfits.base.Misfit`."""
        read = (self._points, self._times, self._data, self._weight)
        return not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(self._given(), read, strict=True))

    def update_data(self, changed, *, own):
        """See :class:`~pint_fem.misfits.base.Misfit`; new readings of the same sensors change nothing else."""
        if not own:
            return
        places = self._points, self._times
        self._take()
        if all(np.array_equal(a, b) for a, b in zip(places, (self._points, self._times), strict=True)):
            self._take_readings()
        else:
            self.bind(self.evolution, self.spacetime, self.slab)

    def bind(self, evolution, spacetime, slab):
        """See :class:`Misfit`."""
        super().bind(evolution, spacetime, slab)
        self._take()
        mesh, space = evolution.V.mesh().unique(), self._read_space(evolution.V)
        if self._points.shape[1] != mesh.geometric_dimension:
            raise InputError(
                f"sensors have {self._points.shape[1]} coordinates on a {mesh.geometric_dimension}-dimensional mesh"
            )
        N, slack = evolution.nsteps, 1e-9 * evolution.dt
        first, last = evolution.time(0), evolution.time(N)
        if self._times[0] < first - slack or self._times[-1] > last + slack:
            raise InputError(f"sensor times {self._times[0]:g}..{self._times[-1]:g} are not within {first:g}..{last:g}")
        try:
            sensors = VertexOnlyMesh(mesh, self._points, missing_points_behaviour="error")
        except VertexOnlyMeshMissingPointsError as error:  # on every rank
            raise InputError(f"a sensor is outside the mesh: {str(error).splitlines()[0]}") from error
        H = self._matrix(space, sensors)
        self._at_sensors, self._at_sensors_T = BlockOperator(H), BlockOperator(H.transpose(type(H)()))
        here = np.asarray(sensors.coordinates.dat.data_ro).reshape(-1, self._points.shape[1])
        #: Numbers of the sensors that this space rank holds.
        self.local = np.array([int(np.argmin(((self._points - x) ** 2).sum(axis=1))) for x in here], dtype=int)
        # a reading at t in (t_{n-1}, t_n] belongs to point n: theta u_n + (1 - theta) u_{n-1}
        place = (self._times - evolution.t0) / evolution.dt
        point = np.clip(np.ceil(place - 1e-9), 1, N).astype(int)
        own = np.flatnonzero((point > slab.lo) & (point <= slab.hi))
        self._row, self._theta = point[own] - slab.lo, np.minimum(place[own] - (point[own] - 1), 1.0)
        self._theta[np.abs(self._theta - 1) < 1e-9] = 1.0
        self._own = own
        self._take_readings()
        self.observes, self.forces = np.zeros(slab.k + 1, dtype=bool), np.zeros(slab.k + 1, dtype=bool)
        self.observes[self._row] = True
        self.observes[self._row[self._theta != 1] - 1] = True
        self.acts = self.observes.copy()
        self.acts[0] = True  # by the left neighbour's readings

    def _take_readings(self) -> None:
        """The own readings, relative to a number near all of them where there is one and functions of that value have
        it as all their coefficients: interpolation of large values would lose small differences.
        """
        mean = float(self._data.mean())
        sums = self._observe(np.ones((1, self.evolution.state_size)))
        wrong = self.spacetime.sum_over_space(np.array([float((np.abs(sums - 1) > 1e-12).sum())]))[0]
        near = np.abs(self._data - mean).max() <= _NEAR * abs(mean)
        self._offset = mean if near and not wrong else 0.0
        self._own_data = self._data[self._own][:, self.local] - self._offset

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
        return self._at_sensors(U if self._rows is None else U[:, self._rows])

    def _observe_T(self, S: np.ndarray) -> np.ndarray:
        """The transpose."""
        if self._rows is None:
            return self._at_sensors_T(S)
        out = np.zeros((len(S), self.evolution.state_size))
        out[:, self._rows] = self._at_sensors_T(S)
        return out

    @property
    def width(self):
        """Own sensors."""
        return len(self.local)

    def _readings(self, Y: np.ndarray) -> np.ndarray:
        theta = self._theta[:, None]
        return theta * Y[self._row] + (1 - theta) * Y[self._row - 1]

    def readings(self, Y: np.ndarray) -> np.ndarray:
        """All readings ``(times, sensors)`` on every rank (data, not fields), from what was observed of the local
        points, ``(k + 1, own sensors)``; collective.
        """
        own = np.zeros(self._data.shape)
        first = int(self.spacetime.time_comm.exscan(len(self._row)) or 0)
        own[first : first + len(self._row), self.local] = self._readings(Y) + self._offset
        return self.spacetime.sum_over_grid(own)

    def petsc_bytes(self):
        """See :class:`~pint_fem.misfits.base.Misfit`."""
        there, back = self._at_sensors.nbytes, self._at_sensors_T.nbytes
        return {part: there[part] + back[part] for part in there}

    # -- see BlockMisfit -----------------------------------------------------------------------------------------------
    def observe(self, rows, u):
        """The state at the sensors, less the offset."""
        return self._observe(u - self._offset if self._offset else u)

    def observe_tangent(self, rows, u, du):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return self._observe(du)

    def _per_point(self, terms: np.ndarray) -> np.ndarray:
        out = np.zeros(self.slab.k)
        np.add.at(out, self._row - 1, terms.sum(axis=1))
        return self.spacetime.sum_over_space(self._weight * out)

    def point_values(self, Y):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return self._per_point(0.5 * (self._readings(Y) - self._own_data) ** 2)

    def point_derivatives(self, Y, dY):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return self._per_point((self._readings(Y) - self._own_data) * self._readings(dY))

    def pull_back(self, Y):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return self._on_points(self._readings(Y) - self._own_data)

    def pull_back_tangent(self, dY):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return self._on_points(self._readings(dY))

    def _on_points(self, r: np.ndarray) -> np.ndarray:
        """Transpose of reading, with what the left neighbour's readings put on the ghost."""
        S, theta = np.zeros((self.slab.k + 1, len(self.local))), self._weight * self._theta[:, None]
        np.add.at(S, self._row, theta * r)
        np.add.at(S, self._row - 1, (self._weight - theta) * r)
        comm = self.spacetime.time_comm
        send = None if self.slab.is_last else comm.Isend(S[-1].copy(), dest=comm.rank + 1, tag=1)
        if not self.slab.is_first:
            from_left = np.empty(len(self.local))
            comm.Recv(from_left, source=comm.rank - 1, tag=1)
            S[0] += from_left
        if send is not None:
            send.Wait()
        return S

    def force(self, rows, u, S):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return self._observe_T(S[rows])

    def force_tangent(self, rows, u, du, dS):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return self._observe_T(dS[rows])
