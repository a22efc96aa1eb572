r"""The two settings of the Maxwell source inversion: a lossy box and a cavity without losses.

In both an impressed current :math:`J(x)\, s(t)` of known time course and unknown shape flows in the plane, and probes
read the electric field. The box holds a dielectric and a conductor.

* ``lossy``: the host conducts, two walls are perfect conductors and two impedance walls. Fields diffuse more than they
  travel, and time-parallel multigrid contracts.
* ``cavity``: nothing conducts and all walls are perfect conductors: fields ring forever, and only solvers that keep
  phases (``paradiag``, ``serial``) do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ufl
from firedrake import SpatialCoordinate, UnitSquareMesh, as_vector, exp

from pint_fem.errors import InputError
from problems.maxwell import Region, Walls

__all__ = ["CELLS", "PROBES", "SETTINGS", "Setting", "box_mesh", "setting", "signal", "true_current"]

#: Cells along a side; region borders are at multiples of 1/8.
CELLS = 16

_SPACING = (np.arange(8) + 0.47) / 8  # off the cells' sides, where E is not continuous
#: Places of the 64 probes.
PROBES = np.array([(x, y) for y in _SPACING for x in _SPACING])


def _between(a, b):
    """The condition of a rectangle."""
    inside = lambda x, i: ufl.And(x[i] > a[i], x[i] < b[i])
    return lambda x: ufl.And(inside(x, 0), inside(x, 1))


_DIELECTRIC, _CONDUCTOR = _between((1 / 8, 1 / 2), (3 / 8, 7 / 8)), _between((5 / 8, 1 / 8), (7 / 8, 3 / 8))


@dataclass(frozen=True)
class Setting:
    """What is given.

    Attributes
    ----------
    regions, walls
        See :mod:`problems.maxwell`; walls are numbered as by ``UnitSquareMesh`` (left, right, bottom, top).
    final_time : float
    pulse : (float, float)
        Time of the current's change of sign, and width.
    steps, integrator
        Of the inverse problem by default.
    """

    name: str
    regions: Sequence[Region]
    walls: Walls
    final_time: float
    pulse: tuple[float, float]
    steps: int
    integrator: str


SETTINGS = {
    "lossy": Setting(
        "lossy",
        (
            Region("host", sigma=40.0),
            Region("dielectric", _DIELECTRIC, epsilon=2.0, sigma=80.0),
            Region("conductor", _CONDUCTOR, mu=1.5, sigma=120.0),
        ),
        Walls(conductor=(1, 3), impedance=(2, 4)),
        0.5,
        (0.15, 0.05),
        256,
        "SDIRK2",
    ),
    "cavity": Setting(
        "cavity",
        (
            Region("vacuum"),
            Region("dielectric", _DIELECTRIC, epsilon=2.0),
            Region("magnetic block", _CONDUCTOR, mu=1.5),
        ),
        Walls(conductor=(1, 2, 3, 4)),
        1.5,
        (0.3, 0.1),
        256,
        "ImplicitMidpoint",
    ),
}


def setting(name: str) -> Setting:
    """A setting by its name.

    Raises
    ------
    InputError
        On another name.
    """
    if name not in SETTINGS:
        raise InputError(f"regime {name!r}: give one of {', '.join(SETTINGS)}")
    return SETTINGS[name]


def box_mesh(cells: int, comm, distribution_parameters=None):
    """The unit square with walls 1 to 4; ``spacetime.mesh(box_mesh, cells)`` divides it over ranks in space.

    Raises
    ------
    InputError
        If region borders would not be on the mesh's lines.
    """
    if cells < 8 or cells % 8:
        raise InputError(f"cells = {cells}: give a multiple of 8, as regions begin and end at multiples of 1/8")
    return UnitSquareMesh(cells, cells, comm=comm, distribution_parameters=distribution_parameters)


def signal(t, given: Setting):
    """Time course of the current: the derivative of a bell, so that no charge stays; at most 1."""
    x = (t - given.pulse[0]) / given.pulse[1]
    return -(np.e**0.5) * 2**0.5 * x * exp(-(x**2))


def true_current(mesh):
    """The current behind the shipped readings: a loop, a dipole and a weaker loop the other way round."""
    x = SpatialCoordinate(mesh)

    def bell(cx, cy, width):
        return exp(-(((x[0] - cx) / width) ** 2) - ((x[1] - cy) / width) ** 2)

    def loop(strength, cx, cy, width):
        scale = strength / width
        return scale * bell(cx, cy, width) * as_vector((-(x[1] - cy), x[0] - cx))

    return loop(2.0, 0.34, 0.36, 0.22) + as_vector((0.6, 1.0)) * bell(0.68, 0.62, 0.2) + loop(-1.2, 0.3, 0.72, 0.18)
