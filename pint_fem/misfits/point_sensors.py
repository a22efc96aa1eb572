r"""Point sensors: the squared difference between readings and the state at points in space, at any times.

.. math::  J = \frac{w}{2} \sum_r \sum_s (u(x_s, t_r) - d_{rs})^2 , \qquad
           u(x, t_r) = \theta_r u_n(x) + (1 - \theta_r) u_{n-1}(x) \quad\text{for } t_{n-1} < t_r \le t_n .

The values at the sensors are the product of the state with a sparse matrix, Firedrake's interpolation to a
``VertexOnlyMesh``. A reading belongs to the point ``n`` at the end of its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from firedrake import FunctionSpace, TensorFunctionSpace, TrialFunction, VertexOnlyMesh, assemble
from firedrake import interpolate as interpolate_
from firedrake.exceptions import VertexOnlyMeshMissingPointsError
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from numpy.typing import ArrayLike

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import as_rows, rows_in_whole
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.kernels.direct import added
from pint_fem.misfits.base import BlockMisfit
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["PointSensors"]

_NEAR = 0.1
"""Relative distance of all readings from their mean up to which states and readings are taken relative to the mean."""


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

    Attributes
    ----------
    local : ndarray of int
        Numbers of the sensors on this rank in space; set by :meth:`bind`.

    Raises
    ------
    InputError
        On shapes that do not match, values that are not finite, times out of range, a sensor outside the mesh, a field
        or component that is missing or not there.
    """

    quadratic = takes_batches = True

    def __init__(
        self,
        points: Sequence[Sequence[float]] | np.ndarray,
        times: Sequence[float] | np.ndarray,
        values: Sequence[Sequence[float]] | np.ndarray,
        *,
        weight: float = 1.0,
        field: int | None = None,
        component: int | None = None,
    ):
        self.field, self.component = field, component
        self.points, self.times, self.data, self.weight = points, times, values, weight
        self._users = self  # the object that the user has, also of a copy for a second functional
        self._read_input()

    # -- the user's input ----------------------------------------------------------------------------------------------
    def _input(self) -> tuple[np.ndarray, ...]:
        """Copies of points, times, readings and weight as the user's object has them now."""
        own = self._users
        try:
            points, times = np.array(own.points, float, ndmin=2), np.array(own.times, float, ndmin=1)
            return points, times, np.array(own.data, float), np.array(own.weight, float)
        except (TypeError, ValueError) as error:
            raise InputError(f"sensors: points, times, readings and weight have to be numbers: {error}") from error

    def given(self) -> dict:
        """The user's arrays, and which field and component are read."""
        out = dict(zip(("points", "times", "readings", "weight"), self._input(), strict=True))
        return out | {"field": self.field, "component": self.component}

    def _read_input(self) -> None:
        """Copy the user's arrays and check them."""
        points, times, data, weight = self._input()
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

    def has_changed(self) -> bool:
        """Whether the user's arrays have other values than when they were copied."""
        copied: tuple[ArrayLike, ...] = (self._points, self._times, self._data, self._weight)
        return not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(self._input(), copied, strict=True))

    def update_data(self, changed: set, *, own: bool) -> None:
        """Copy the user's arrays again; new readings of the same sensors at the same times change nothing else."""
        if not own:
            return
        before = self._points, self._times
        self._read_input()
        if all(np.array_equal(a, b) for a, b in zip(before, (self._points, self._times), strict=True)):
            self._subtract_offset()
        else:
            self.bind(self.evolution, self.spacetime, self.slab)

    # -- sensors and readings of this rank -----------------------------------------------------------------------------
    def bind(self, evolution: Evolution, spacetime: SpaceTime, slab: Slab) -> None:
        """Locate the sensors in the mesh and the readings among the own points (collective).

        Raises
        ------
        InputError
            If sensors, times, field or component do not fit the evolution.
        """
        super().bind(evolution, spacetime, slab)
        self._read_input()
        mesh, space = evolution.V.mesh().unique(), self._observed_space(evolution.V)
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
        H = self._observation_matrix(space, sensors)
        self._H, self._H_T = BlockOperator(H), BlockOperator(H.transpose(type(H)()))
        here = np.asarray(sensors.coordinates.dat.data_ro).reshape(-1, self._points.shape[1])
        self.local = np.array([int(np.argmin(((self._points - x) ** 2).sum(axis=1))) for x in here], dtype=int)
        # a reading at t in (t_{n-1}, t_n] belongs to point n: theta u_n + (1 - theta) u_{n-1}
        place = (self._times - evolution.t0) / evolution.dt
        point = np.clip(np.ceil(place - 1e-9), 1, N).astype(int)
        self._own = own = np.flatnonzero((point > slab.lo) & (point <= slab.hi))
        self._point, self._theta = point[own] - slab.lo, np.minimum(place[own] - (point[own] - 1), 1.0)
        self._theta[np.abs(self._theta - 1) < 1e-9] = 1.0
        self._subtract_offset()
        self.observed, self.state_dependent = np.zeros((2, slab.k + 1), dtype=bool)
        self.observed[self._point] = True
        self.observed[self._point[self._theta != 1] - 1] = True
        self.active = self.observed.copy()
        self.active[0] = True  # by the left neighbour's readings

    def _subtract_offset(self) -> None:
        """Choose the offset that is subtracted from states and readings, and the own readings less the offset.

        It is the mean of the readings if all are near it and a function of that value has it for all its coefficients:
        the interpolation of large values would lose small differences. Otherwise it is zero.
        """
        mean = float(self._data.mean())
        sums = self._at_sensors(np.ones((1, self.evolution.state_size)))
        wrong = self.spacetime.sum_over_space(np.array([float((np.abs(sums - 1) > 1e-12).sum())]))[0]
        near = np.abs(self._data - mean).max() <= _NEAR * abs(mean)
        self._offset = mean if near and not wrong else 0.0
        self._own_data = self._data[self._own][:, self.local] - self._offset

    def _observed_space(self, V: WithGeometry) -> WithGeometry:
        """The space of the state or of the field that is read, by itself."""
        if len(V) > 1:
            if self.field is None or not 0 <= self.field < len(V):
                raise InputError(
                    f"PointSensors: the state has {len(V)} fields and field = {self.field}: give 0 to {len(V) - 1}"
                )
            self._dofs = rows_in_whole(V.sub(self.field))
            V = V.sub(self.field).collapse()
        elif self.field is not None:
            raise InputError(f"PointSensors: field = {self.field} for a state that is not mixed: leave it out")
        else:
            self._dofs = None
        size = int(np.prod(V.value_shape))
        if V.value_shape and (self.component is None or not 0 <= self.component < size):
            raise InputError(
                f"PointSensors: what is read has {size} components and component = {self.component}: "
                f"give 0 to {size - 1}"
            )
        if not V.value_shape and self.component is not None:
            raise InputError(f"PointSensors: component = {self.component} of a scalar: leave it out")
        return V

    def _observation_matrix(self, space: WithGeometry, sensors: WithGeometry) -> PETSc.Mat:
        """The matrix from the own coefficients of a function of the observed space to the own sensors."""
        if not space.value_shape:
            return assemble(interpolate_(TrialFunction(space), FunctionSpace(sensors, "DG", 0))).petscmat
        at_sensors = TensorFunctionSpace(sensors, "DG", 0, shape=space.value_shape)
        H = assemble(interpolate_(TrialFunction(space), at_sensors)).petscmat
        (first, last), size = H.getOwnershipRange(), int(np.prod(space.value_shape))
        rows = PETSc.IS().createStride((last - first) // size, first + self.component, size, comm=H.comm)
        (first, last) = H.getOwnershipRangeColumn()
        return H.createSubMatrix(rows, PETSc.IS().createStride(last - first, first, 1, comm=H.comm))

    def _at_sensors(self, U: np.ndarray) -> np.ndarray:
        """Values of states ``(..., n)`` at the own sensors, ``(..., own sensors)``."""
        U = U if self._dofs is None else U[..., self._dofs]
        return self._H(as_rows(U)).reshape(*U.shape[:-1], len(self.local))

    def _at_sensors_transposed(self, S: np.ndarray) -> np.ndarray:
        """The transpose of :meth:`_at_sensors`, ``(..., n)``."""
        rows = self._H_T(as_rows(S))
        rows = rows.reshape(*S.shape[:-1], rows.shape[1])
        if self._dofs is None:
            return rows
        out = np.zeros((*S.shape[:-1], self.evolution.state_size))
        out[..., self._dofs] = rows
        return out

    def _at_reading_times(self, Y: np.ndarray) -> np.ndarray:
        """Observations ``(k + 1, ..., own sensors)`` interpolated to the times of the own readings."""
        theta = self._theta.reshape(-1, *[1] * (Y.ndim - 1))
        return theta * Y[self._point] + (1 - theta) * Y[self._point - 1]

    def _at_reading_times_transposed(self, r: np.ndarray) -> np.ndarray:
        """``w`` times the transpose of :meth:`_at_reading_times`, contributions of the left neighbour's readings to
        point 0 included (collective).
        """
        S = np.zeros((self.slab.k + 1, *r.shape[1:]))
        theta = self._weight * self._theta.reshape(-1, *[1] * (r.ndim - 1))
        np.add.at(S, self._point, theta * r)
        np.add.at(S, self._point - 1, (self._weight - theta) * r)
        self.spacetime.add_shared_points(S)
        return S

    def readings(self, Y: np.ndarray) -> np.ndarray:
        """Predicted readings ``(times, sensors)`` on every rank from the observations of the local points (collective).

        Parameters
        ----------
        Y
            ``(k + 1, own sensors)``, as :meth:`read` or ``ReducedProblem.observations`` return them.
        """
        own = np.zeros(self._data.shape)
        first = int(self.spacetime.time_comm.exscan(len(self._point)) or 0)  # type: ignore[attr-defined]
        own[first : first + len(self._point), self.local] = self._at_reading_times(Y) + self._offset
        return self.spacetime.sum_over_grid(own)

    def operator_nbytes(self) -> dict[str, int]:
        """Bytes of the interpolation matrix and its transpose on this rank, by part."""
        return added(self._H.nbytes, self._H_T.nbytes)

    # -- the stages of a block misfit ----------------------------------------------------------------------------------
    @property
    def width(self) -> int:
        """Number of own sensors."""
        return len(self.local)

    def observe(self, points: slice, u: np.ndarray) -> np.ndarray:
        """The state at the own sensors less the offset, ``(b, own sensors)``."""
        return self._at_sensors(u - self._offset if self._offset else u)

    def observe_tangent(self, points: slice, u: np.ndarray, du: np.ndarray) -> np.ndarray:
        """The direction at the own sensors, ``(b, own sensors)``."""
        return self._at_sensors(du)

    def _per_point(self, terms: np.ndarray) -> np.ndarray:
        """Terms of the own readings and sensors summed for each own point and over space, times the weight."""
        out = np.zeros(self.slab.k)
        np.add.at(out, self._point - 1, terms.sum(axis=1))
        return self.spacetime.sum_over_space(self._weight * out)

    def point_values(self, Y: np.ndarray) -> np.ndarray:
        """Half the weighted squares of the differences from the readings at each own point, ``(k,)``."""
        return self._per_point(0.5 * (self._at_reading_times(Y) - self._own_data) ** 2)

    def point_derivatives(self, Y: np.ndarray | None, dY: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`point_values`, ``(k,)``."""
        return self._per_point((self._at_reading_times(Y) - self._own_data) * self._at_reading_times(dY))

    def pull_back(self, Y: np.ndarray) -> np.ndarray:
        """Weighted differences from the readings, distributed to the points, ``(k + 1, own sensors)``."""
        return self._at_reading_times_transposed(self._at_reading_times(Y) - self._own_data)

    def pull_back_tangent(self, dY: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`pull_back`, ``(k + 1, own sensors)``."""
        return self._at_reading_times_transposed(self._at_reading_times(dY))

    def adjoint_source(self, points: slice, u: np.ndarray, S: np.ndarray | None) -> np.ndarray:
        """Transpose of the interpolation to the sensors, applied to ``S`` at the points, ``(b, n)``."""
        return self._at_sensors_transposed(S[points])

    def adjoint_source_tangent(self, points: slice, u: np.ndarray, du: np.ndarray, dS: np.ndarray | None) -> np.ndarray:
        """Transpose of the interpolation to the sensors, applied to ``dS`` at the points, ``(b, n)``."""
        return self._at_sensors_transposed(dS[points])
