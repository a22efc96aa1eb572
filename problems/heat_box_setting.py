r"""Heat conduction in a box of two metals.

The temperature rise u over the surroundings solves

.. math::
    \rho c\, \partial_t u - \nabla \cdot (\kappa \nabla u) &= q(x) && \text{in the box}, 0 < t \le 1, \\
    u &= 0 && \text{on the cooled bottom}, z = 0, \\
    \kappa\, \partial_n u &= -h u && \text{on the top and the back (convection)}, z = 1 \text{ and } y = 1, \\
    \kappa\, \partial_n u &= 0 && \text{on the other sides (insulated)}, \\
    u &= u_0(x) && \text{at } t = 0.

The box is a cube of aluminium with a block of steel, whose conductivity is a quarter; its temperature at first rises
from the bottom and falls with x. Units are those of :mod:`problems.plate`: lengths in 10 cm, conductivities in 100
W/(m K), times in 4 min, heat sources in 10 kW/m^3.
"""

from __future__ import annotations

import numpy as np
import ufl
from firedrake import DirichletBC, conditional, cos, ds, dx, exp, grad, inner, pi, sin
from irksome import Dt
from ufl.core.expr import Expr

from problems.box import between, grid_of_points, squared_distance
from problems.plate import ALUMINIUM, CONVECTION, KAPPA, RHO_C, STEEL

__all__ = [
    "BLOBS",
    "BLOCK",
    "CELLS",
    "COLUMNS",
    "FINAL_TIME",
    "SENSORS",
    "bilinear_forms",
    "boundary_conditions",
    "initial_temperature",
    "residual",
    "true_source",
]

#: Cells along a side of the coarsest mesh; borders of the block are at multiples of 1/6.
CELLS = 6
COLUMNS = ("sensor", "x", "y", "z", "time", "temperature")
FINAL_TIME = 1.0
#: Two corners of the block of steel.
BLOCK = ((1 / 2, 1 / 2, 1 / 3), (5 / 6, 5 / 6, 5 / 6))
COOLED, CONVECTING = 5, (4, 6)

#: Centre, width and strength of the two warm blobs.
BLOBS = (((0.30, 0.35, 0.42), 0.20, 30.0), ((0.68, 0.64, 0.52), 0.17, 24.0))

_ALONG = (0.17, 0.5, 0.83)
_FACES = [
    grid_of_points(*[(value,) if i == axis else _ALONG for i in range(3)])
    for axis, value in ((0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0), (2, 1.0))
]
#: Places of the sensors, ``(72, 3)``: nine on each side but for the bottom, and 27 inside.
SENSORS = np.concatenate([*_FACES, grid_of_points(*[(0.24, 0.51, 0.77)] * 3)])


def _by_material(x, values: dict[int, float]) -> Expr:
    return conditional(between(*BLOCK)(x), values[STEEL], values[ALUMINIUM])


def bilinear_forms(w, v) -> tuple[ufl.Form, ufl.Form]:
    """Return the mass, weighted by the heat capacity, and the conduction with convection of trial and test functions
    on a mesh of the box.
    """
    x = ufl.SpatialCoordinate(ufl.domain.extract_unique_domain(v))
    mass = _by_material(x, RHO_C) * w * v * dx
    return mass, _by_material(x, KAPPA) * inner(grad(w), grad(v)) * dx + CONVECTION * w * v * ds(CONVECTING)


def residual(u, v, q) -> ufl.Form:
    """Return the semi-discrete residual, to be stepped by Irksome or by ``pint_fem``.

    Parameters
    ----------
    u, v
        Temperature rise, and the test function of its space.
    q
        Heat source, in UFL.
    """
    x = ufl.SpatialCoordinate(u.function_space().mesh())
    return _by_material(x, RHO_C) * Dt(u) * v * dx + bilinear_forms(u, v)[1] - q * v * dx


def boundary_conditions(V) -> list[DirichletBC]:
    """Return the condition on the cooled bottom."""
    return [DirichletBC(V, 0, COOLED)]


def initial_temperature(x) -> Expr:
    """Return the temperature rise at first at ``x``, a ``SpatialCoordinate``."""
    return 0.5 * sin(pi * x[2] / 2) * (1 + cos(pi * x[0]) / 2)


def true_source(x) -> Expr:
    """Return the heat source behind the shipped readings at ``x``, a ``SpatialCoordinate``: two warm blobs, the smaller
    one in the block of steel.
    """
    return sum(strength * exp(-squared_distance(x, centre) / width**2) for centre, width, strength in BLOBS)
