"""Sensors at points: the state there at some times is compared with readings."""

from __future__ import annotations

import numpy as np
from firedrake import FunctionSpace, TensorFunctionSpace, TrialFunction, VertexOnlyMesh, assemble
from firedrake import interpolate as interpolate_
from firedrake.petsc import PETSc

from pint_fem.adjoint.misfit import BlockMisfit
from pint_fem.errors import InputError
from pint_fem.propagators.arrays import rows_in_whole
from pint_fem.propagators.blocks import BlockOperator

__all__ = ["PointSensors"]

_NEAR = 0.1
"""Readings that differ by no more than this from their mean, relative to it, are taken relative to it."""


class PointSensors(BlockMisfit):
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
        self._at_sensors, self._at_sensors_T = BlockOperator(H), BlockOperator(H.transpose(type(H)()))
        here = np.asarray(sensors.coordinates.dat.data_ro).reshape(-1, self.points.shape[1])
        #: Numbers of the sensors that this space rank holds.
        self.local = np.array([int(np.argmin(((self.points - x) ** 2).sum(axis=1))) for x in here], dtype=int)
        # a reading at t in (t_{n-1}, t_n] belongs to point n: theta u_n + (1 - theta) u_{n-1}
        place = (self.times - evolution.t0) / evolution.dt
        point = np.clip(np.ceil(place - 1e-9), 1, N).astype(int)
        own = np.flatnonzero((point > slab.lo) & (point <= slab.hi))
        self._row, self._theta = point[own] - slab.lo, np.minimum(place[own] - (point[own] - 1), 1.0)
        self._theta[np.abs(self._theta - 1) < 1e-9] = 1.0
        #: What states and readings are taken relative to: interpolation of large values would lose small differences.
        self.offset = self._offset()
        self._own_data = self.data[own][:, self.local] - self.offset
        self.observes, self.forces = np.zeros(slab.k + 1, dtype=bool), np.zeros(slab.k + 1, dtype=bool)
        self.observes[self._row] = True
        self.observes[self._row[self._theta != 1] - 1] = True
        self.acts = self.observes.copy()
        self.acts[0] = True  # by the left neighbour's readings

    def _offset(self) -> float:
        """A number near all readings, where there is one and functions of it have it as all their coefficients."""
        offset = float(self.data.mean())
        sums = self._observe(np.full((1, self.evolution.state_size), 1.0))
        wrong = self.spacetime.sum_over_space(np.array([float((np.abs(sums - 1) > 1e-12).sum())]))[0]
        near = np.abs(self.data - offset).max() <= _NEAR * abs(offset)
        return offset if near and not wrong else 0.0

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
        own = np.zeros(self.data.shape)
        first = int(self.spacetime.time_comm.exscan(len(self._row)) or 0)
        own[first : first + len(self._row), self.local] = self._readings(Y) + self.offset
        return self.spacetime.sum_over_grid(own)

    def petsc_bytes(self):
        """See :class:`~pint_fem.adjoint.misfit.Misfit`."""
        there, back = self._at_sensors.nbytes, self._at_sensors_T.nbytes
        return {part: there[part] + back[part] for part in there}

    # -- see BlockMisfit -----------------------------------------------------------------------------------------------
    def observe(self, rows, u):
        """The state at the sensors, less the offset."""
        return self._observe(u - self.offset if self.offset else u)

    def observe_tangent(self, rows, u, du):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return self._observe(du)

    def _per_point(self, terms: np.ndarray) -> np.ndarray:
        out = np.zeros(self.slab.k)
        np.add.at(out, self._row - 1, terms.sum(axis=1))
        return self.spacetime.sum_over_space(self.weight * out)

    def point_values(self, Y):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return self._per_point(0.5 * (self._readings(Y) - self._own_data) ** 2)

    def point_derivatives(self, Y, dY):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return self._per_point((self._readings(Y) - self._own_data) * self._readings(dY))

    def pull_back(self, Y):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return self._on_points(self._readings(Y) - self._own_data)

    def pull_back_tangent(self, dY):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return self._on_points(self._readings(dY))

    def _on_points(self, r: np.ndarray) -> np.ndarray:
        """Transpose of reading, with what the left neighbour's readings put on the ghost."""
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
        return S

    def force(self, rows, u, S):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return self._observe_T(S[rows])

    def force_tangent(self, rows, u, du, dS):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return self._observe_T(dS[rows])
