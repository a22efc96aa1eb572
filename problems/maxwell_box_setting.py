r"""The setting of the Maxwell source inversion in space: a cavity with a conducting block, a current and antennas.

An impressed current :math:`J(x)\, s(t)` of known time course and unknown shape flows in a cube with perfectly
conducting walls that holds a dielectric and a conductor; what else is in it conducts a little. Antennas read averages
of the components of E,

.. math::  \ell_{ai}(E) = \int b_a E_i \Big/ \int b_a , \qquad b_a(x) = e^{-|x - x_a|^2/w^2} ,

so that readings are as smooth functions of the field as its discretisation allows: components of N1curl are not
continuous, and their values at points are not accurate.
"""

from __future__ import annotations

import numpy as np
from firedrake import Constant, SpatialCoordinate, as_vector, dx, exp, inner
from firedrake.assemble import get_assembler
from ufl import Form
from ufl.core.expr import Expr

from problems.box import between, grid_of_points, squared_distance
from problems.maxwell import Region, Walls
from problems.maxwell_setting import Setting

__all__ = ["ANTENNAS", "CELLS", "COLUMNS", "SETTING", "antenna_functionals", "true_current"]

#: Cells along a side of the coarsest mesh; borders of regions are at multiples of 1/4.
CELLS = 4
COLUMNS = ("sensor", "x", "y", "z", "time", "ex", "ey", "ez")

SETTING = Setting(
    "box",
    (
        Region("lossy medium", sigma=3.0),
        Region("dielectric", between((0, 1 / 2, 0), (1 / 2, 1, 1 / 2)), epsilon=2.0, sigma=3.0),
        Region("conductor", between((1 / 2, 1 / 4, 1 / 4), (3 / 4, 1 / 2, 3 / 4)), sigma=40.0),
    ),
    Walls(conductor=(1, 2, 3, 4, 5, 6)),
    final_time=1.5,
    pulse=(0.5, 0.2),
    steps=64,
    integrator="ImplicitMidpoint",
)

#: Places of the antennas, ``(64, 3)``, and the width w of each.
ANTENNAS = grid_of_points(*[(0.14, 0.38, 0.62, 0.86)] * 3)
ANTENNA_WIDTH = 0.1
_DEGREE = 5
"""Of the rule for integrals with bells, whose points are the same for every order of a cell's vertices. Of FIAT's rules
for tetrahedra only those of degrees 1, 2 and 5 are: with others readings depend on the numbering of the mesh, hence on
the number of ranks in space, by as much as the rule is inexact (1e-3 on the coarsest mesh)."""


def true_current(x) -> Expr:
    """Return the current behind the shipped readings at ``x``, a ``SpatialCoordinate``: a loop around a tilted axis and
    a short antenna.
    """
    centre, axis, width = (0.34, 0.36, 0.5), (0.408, 0.408, 0.816), 0.26
    away = [x[i] - centre[i] for i in range(3)]
    turn = [axis[(i + 1) % 3] * away[(i + 2) % 3] - axis[(i + 2) % 3] * away[(i + 1) % 3] for i in range(3)]
    loop = 2.0 / width * exp(-squared_distance(x, centre) / width**2) * as_vector(turn)
    antenna = exp(-squared_distance(x, (0.7, 0.68, 0.56)) / 0.22**2) * as_vector((0.7, 0.2, -0.9))
    return loop + antenna


def antenna_functionals(electric: Expr, mesh, points: np.ndarray = ANTENNAS) -> list[Form]:
    """Return what the antennas read, ``3 count`` functionals, the components of an antenna one after another
    (collective).

    Parameters
    ----------
    electric
        The electric field, a function or a part of the state's.
    mesh
        Its mesh.
    points
        ``(count, 3)`` places.
    """
    x, measure, functionals = SpatialCoordinate(mesh), dx(domain=mesh, degree=_DEGREE), []
    bell = lambda place: exp(-squared_distance(x, place) / ANTENNA_WIDTH**2)
    place = Constant(np.zeros(3))
    integral = get_assembler(bell(place) * measure)
    for point in np.asarray(points, dtype=float):
        place.assign(point)
        size = float(integral.assemble())
        for i in range(3):
            direction = Constant(np.eye(3)[i] / size)  # data, so that all functionals are one compiled form
            functionals.append(inner(electric, direction) * bell(Constant(point)) * measure)
    return functionals
