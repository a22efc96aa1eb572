r"""Point sensors: the squared difference between readings and the state at points in space, at any times.

.. math::  J = \frac12 \sum_r \sum_s w_{rs} (u(x_s, t_r) - d_{rs})^2 , \qquad
           u(x, t_r) = \theta_r u_n(x) + (1 - \theta_r) u_{n-1}(x) \quad\text{for } t_{n-1} < t_r \le t_n .

The values at the sensors are the product of the state with a sparse matrix, Firedrake's interpolation to a
``VertexOnlyMesh``. Each sensor belongs to the rank in space that owns the cell it is in. All else is that of readings
in general (:mod:`~pint_fem.misfits.sensor_readings`).
"""

from __future__ import annotations

import numpy as np
from firedrake import FunctionSpace, TensorFunctionSpace, TrialFunction, VertexOnlyMesh, assemble
from firedrake import interpolate as interpolate_
from firedrake.exceptions import VertexOnlyMeshMissingPointsError
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mesh import MeshGeometry
from firedrake.petsc import PETSc
from numpy.typing import ArrayLike

from pint_fem.errors import InputError
from pint_fem.kernels.arrays import as_rows, rows_in_whole
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.kernels.direct import added
from pint_fem.misfits.given_readings import real_numbers
from pint_fem.misfits.sensor_readings import SensorReadings

__all__ = ["PointSensors"]


class PointSensors(SensorReadings):
    r"""Sensors at points: :math:`\frac12 \sum_r \sum_s w_{rs} (u(x_s, t_r) - d_{rs})^2`, ``u`` linear in time between
    steps.

    ``u`` is the state, or a component of it or of one of its fields.

    All arrays are copied when a functional is made; its ``update_data()`` reads them again, and also what was put in
    their place as attributes ``points``, ``times``, ``data`` (the values) and ``weight``.

    Parameters
    ----------
    points
        ``(sensors, dim)`` coordinates, distinct.
    times
        ``(times,)``, increasing, within the evolution's interval.
    values
        ``(times, sensors)``. Masked entries of a ``numpy.ma.MaskedArray`` are missing readings, which have no part in
        the misfit: sensors that are read at different times have the union of these as ``times``.
    weight
        ``w``, for instance one over (variance times number of values): a number for all readings, one per sensor
        ``(sensors,)``, or one per reading ``(times, sensors)``; none of them negative.
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
        On shapes that do not match, values that are not finite, readings that are all missing, times out of range, a
        sensor outside the mesh, a field or component that is missing or not there.
    """

    def __init__(
        self,
        points: ArrayLike,
        times: ArrayLike,
        values: ArrayLike,
        *,
        weight: ArrayLike = 1.0,
        field: int | None = None,
        component: int | None = None,
    ):
        self.points, self.field, self.component = points, field, component
        super().__init__(times, values, weight)

    def _count(self, given: dict[str, np.ndarray]) -> int:
        return len(given["points"])

    def _input(self) -> dict[str, np.ndarray]:
        """Copies of points, times, readings and weight as the user's object has them now."""
        points = real_numbers("sensors: points", self._users.points, ndmin=2)
        return {"points": points} | super()._input()

    def given(self) -> dict:
        """The user's arrays, and which field and component are read."""
        return super().given() | {"field": self.field, "component": self.component}

    def _check(self, given: dict[str, np.ndarray]) -> None:
        super()._check(given)
        if len(np.unique(given["points"], axis=0)) < len(given["points"]):
            raise InputError("two sensors are at the same point: merge their readings")

    def _find_sensors(self) -> None:
        """Locate the points in the mesh and assemble the interpolation to them."""
        evolution, points = self.evolution, self._copied["points"]
        mesh, space = evolution.V.mesh().unique(), self._observed_space(evolution.V)
        if points.shape[1] != mesh.geometric_dimension:
            raise InputError(
                f"sensors have {points.shape[1]} coordinates on a {mesh.geometric_dimension}-dimensional mesh"
            )
        try:
            sensors = VertexOnlyMesh(mesh, points, missing_points_behaviour="error")
        except VertexOnlyMeshMissingPointsError as error:  # on every rank
            raise InputError(_outside(mesh, points)) from error
        H = self._observation_matrix(space, sensors)
        self._H, self._H_T = BlockOperator(H), BlockOperator(H.transpose(type(H)()))
        here = np.asarray(sensors.coordinates.dat.data_ro).reshape(-1, points.shape[1])
        self.local = np.array([int(np.argmin(((points - x) ** 2).sum(axis=1))) for x in here], dtype=int)

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

    def operator_nbytes(self) -> dict[str, int]:
        """Bytes of the interpolation matrix and its transpose on this rank, by part."""
        return added(self._H.nbytes, self._H_T.nbytes)


def _outside(mesh: MeshGeometry, points: np.ndarray) -> str:
    """The message that names the first sensor outside the mesh (collective over space)."""
    found = VertexOnlyMesh(mesh, points, missing_points_behaviour="ignore")
    here = np.asarray(found.coordinates.dat.data_ro).reshape(-1, points.shape[1])
    inside = np.concatenate(mesh.comm.allgather(here))
    near = 1e-9 * (1 + np.abs(points).max())
    missing = [i for i, x in enumerate(points) if not (np.abs(inside - x) <= near).all(axis=1).any()]
    if not missing:
        return "a sensor is outside the mesh"
    place, more = ", ".join(f"{c:g}" for c in points[missing[0]]), len(missing) - 1
    others = f", and so {'are' if more > 1 else 'is'} {more} more" if more else ""
    return f"sensor {missing[0]} at ({place}) is outside the mesh{others}"
