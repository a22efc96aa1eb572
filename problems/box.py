"""What the inverse problems in a box share: a hierarchy of meshes that is generated, and the posed problem.

The box is the unit cube, with cells of equal size on all levels: ``cells`` along a side on the coarsest mesh, and twice
as many after each refinement. Its walls are numbered as by Firedrake's ``UnitCubeMesh``: x = 0, x = 1, y = 0, y = 1,
z = 0, z = 1 are 1 to 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import ufl
from firedrake import (
    DistributedMeshOverlapType,
    Function,
    TestFunction,
    TrialFunction,
    UnitCubeMesh,
)
from ufl.core.expr import Expr

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.capacity import require_memory
from pint_fem.errors import InputError
from pint_fem.evolution import Evolution
from pint_fem.misfits.sensor_readings import SensorReadings
from pint_fem.propagators import make_propagator
from pint_fem.spacetime import SpaceTime
from problems.priors import prior_of
from problems.readings import Readings

__all__ = [
    "BoxSource",
    "between",
    "box_hierarchy",
    "box_source",
    "first_readings",
    "grid_of_points",
    "require_refinements",
    "squared_distance",
]

_BYTES_OF_CELL = 600
"""Memory of a tetrahedron with its share of faces, edges and vertices, at least."""


def box_hierarchy(spacetime: SpaceTime, cells: int, refine: int):
    """Return the hierarchy of meshes of the box, with the same parts in all groups of ranks in space.

    Parameters
    ----------
    spacetime
        Process grid; the meshes live on its ``space_comm``.
    cells, refine
        Cells along a side of the coarsest mesh, and number of refinements.
    """
    # cells around the own vertices of a rank are there, as preconditioners by patches require
    parameters = {"overlap_type": (DistributedMeshOverlapType.VERTEX, 1)}
    return spacetime.mesh_hierarchy(refine, UnitCubeMesh, cells, cells, cells, distribution_parameters=parameters)


def require_refinements(spacetime: SpaceTime, cells: int, refine: int, most: int, unknowns: int) -> None:
    """Refuse numbers of refinements out of range, and those whose meshes and states are larger than the memory
    (collective).

    Parameters
    ----------
    spacetime
        Process grid.
    cells, refine, most
        Cells along a side of the coarsest mesh, number of refinements, and the largest number.
    unknowns
        Of a state, about.

    Raises
    ------
    InputError
        On every rank.
    """
    if not isinstance(refine, (int, np.integer)) or not 0 <= refine <= most:
        raise InputError(f"refine = {refine}: give a whole number from 0 to {most}")
    along = cells * 2**refine
    least = (6 * along**3 * _BYTES_OF_CELL + 8 * 4 * unknowns) // spacetime.space_size
    what = f"{along} x {along} x {along} cells, of six tetrahedra each,"
    require_memory(spacetime.comm, least, what, "give fewer refinements or more ranks in space")


# -- geometry ----------------------------------------------------------------------------------------------------------
def between(low: Sequence[float], high: Sequence[float]) -> Callable[[Expr], Expr]:
    """Return the condition, a function of ``SpatialCoordinate``, of a block with two opposite corners; borders should
    be on facets of the coarsest mesh.
    """
    inside = lambda x, i: ufl.And(x[i] > low[i], x[i] < high[i])
    return lambda x: ufl.And(inside(x, 0), ufl.And(inside(x, 1), inside(x, 2)))


def squared_distance(x, centre: Sequence[float]):
    """Return the squared distance of ``x`` from a point."""
    return sum((x[i] - centre[i]) ** 2 for i in range(3))


def grid_of_points(*coordinates: Sequence[float]) -> np.ndarray:
    """Return all points ``(count, 3)`` with one of the given coordinates in each direction, the first one slowest."""
    return np.stack(np.meshgrid(*coordinates, indexing="ij"), axis=-1).reshape(-1, 3)


# -- the posed problem -------------------------------------------------------------------------------------------------
@dataclass
class BoxSource:
    """A posed problem, for a source.

    Attributes
    ----------
    spacetime : SpaceTime
    readings : Readings
    evolution : Evolution
    misfits : list of SensorReadings
        One for each quantity that is read.
    rf : TimeParallelReducedFunctional
    true_source : Function
        What made the shipped readings, in the control's space.
    """

    spacetime: SpaceTime
    readings: Readings
    evolution: Evolution
    misfits: list[SensorReadings]
    rf: TimeParallelReducedFunctional
    true_source: Function

    def predicted(self, z: np.ndarray) -> np.ndarray:
        """Return the readings ``(times, sensors, quantities)`` of a control's state, on every rank (collective)."""
        tables = [self.rf.problem.readings(z, m) for m in self.misfits]
        return np.concatenate([np.reshape(t, (len(t), len(self.readings.points), -1)) for t in tables], axis=-1)


def first_readings(data: Readings, until: float) -> Readings:
    """Return the readings up to a time.

    Raises
    ------
    InputError
        If there are none.
    """
    kept = data.times <= until * (1 + 1e-9)
    if not kept.any():
        raise InputError(f"no reading until the time {until:g}: the first one is at {data.times[0]:g}; take more steps")
    return Readings(data.points, data.times[kept], data.values[kept], data.path, data.sensors)


def box_source(
    spacetime: SpaceTime,
    data: Readings,
    evolution: Evolution,
    misfits: list[SensorReadings],
    truth: Expr,
    *,
    alpha: float,
    beta: float,
    solver_parameters: dict | None,
    propagator: Callable = make_propagator,
) -> BoxSource:
    """Return the problem of an evolution with its readings, with the regularisation of :mod:`problems.priors`, whose
    inner product is that of the trust region.

    Parameters
    ----------
    spacetime, data, evolution, misfits
        Process grid, readings, the evolution with its control, and the misfits.
    truth
        The source behind the readings, in UFL.
    alpha, beta
        Weights of the regularisation.
    solver_parameters, propagator
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.
    """
    q, prior = evolution.control, prior_of(alpha, beta)
    a, b = TrialFunction(q.function_space()), TestFunction(q.function_space())
    rf = TimeParallelReducedFunctional(
        evolution,
        misfits,
        regularisation=0.5 * prior(q, q),
        spacetime=spacetime,
        solver_parameters=solver_parameters,
        riesz_map=prior(a, b),
        propagator=propagator,
    )
    true_source = Function(q.function_space(), name=f"true {q.name()}").interpolate(truth)
    return BoxSource(spacetime, data, evolution, misfits, rf, true_source)
