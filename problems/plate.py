"""Heat conduction in a plate of two metals with a notch and two holes.

The temperature rise u over the surroundings solves

    rho_c du/dt - div(kappa grad u) = q(x)        in the plate, 0 < t <= FINAL_TIME,
    kappa du/dn = h (u_amb - u)                   on the outer edge and hole 1 (convection, u_amb = 0),
    u = 0                                         on the cooled edge,
    kappa du/dn = 0                               on hole 2 (insulated),
    u = 0                                         at t = 0.

The source q does not depend on time; it is what the inverse problem recovers from `SENSORS`.

Units. Lengths are in 10 cm and conductivities in 100 W/(m K). Heat capacities are relative to aluminium's, which
makes the unit of time 4 min (aluminium's diffusivity, 8e-5 m^2/s, becomes 2). The slowest mode then decays at a rate
of about 6, so readings up to `FINAL_TIME` see the transient and, at the end, almost the steady state.

The mesh is `meshes/plate.msh`; `meshes/plate.geo` draws it.
"""

from pathlib import Path

import numpy as np
from firedrake import DirichletBC, cos, dot, ds, dx, exp, grad, sin
from irksome import Dt

__all__ = [
    "AMBIENT",
    "BOUNDARIES",
    "CONVECTION",
    "FINAL_TIME",
    "KAPPA",
    "MESH",
    "MESH_FINE",
    "REGIONS",
    "RHO_C",
    "SENSORS",
    "boundary_conditions",
    "residual",
    "true_source",
]

_MESHES = Path(__file__).resolve().parent.parent / "meshes"
MESH = _MESHES / "plate.msh"
MESH_FINE = _MESHES / "plate_fine.msh"

ALUMINIUM, STEEL = 1, 2
OUTER_EDGE, COOLED_EDGE, HOLE_1, HOLE_2 = 11, 12, 13, 14

#: Names of the mesh's regions and boundaries by their tags.
REGIONS = {ALUMINIUM: "aluminium", STEEL: "steel insert"}
BOUNDARIES = {OUTER_EDGE: "outer edge", COOLED_EDGE: "cooled edge", HOLE_1: "hole 1", HOLE_2: "hole 2"}

#: Conductivity and heat capacity of each region: 200 and 50 W/(m K), 2.4 and 3.8 MJ/(m^3 K).
KAPPA = {ALUMINIUM: 2.0, STEEL: 0.5}
RHO_C = {ALUMINIUM: 1.0, STEEL: 1.6}
#: Heat transfer coefficient h: water along the edge and through hole 1, 2,000 W/(m^2 K).
CONVECTION = 2.0
AMBIENT = 0.0
FINAL_TIME = 1.0

#: Places of the 24 sensors, well inside the plate: every one is 0.03 or more away from all boundaries.
SENSORS = np.array(
    [
        (0.25, 0.12),
        (0.60, 0.12),
        (0.95, 0.12),
        (1.25, 0.12),
        (1.55, 0.12),
        (1.88, 0.12),
        (0.48, 0.38),
        (0.74, 0.38),
        (1.00, 0.38),
        (1.27, 0.38),
        (1.77, 0.38),
        (0.22, 0.58),
        (0.66, 0.58),
        (0.90, 0.58),
        (1.20, 0.58),
        (1.58, 0.62),
        (1.86, 0.62),
        (0.16, 0.86),
        (0.70, 0.86),
        (0.98, 0.84),
        (1.25, 0.84),
        (0.45, 1.08),
        (0.85, 1.08),
        (1.22, 1.08),
    ]
)


def residual(u, v, q, factor=1):
    """Semi-discrete residual of the heat equation, to be stepped by Irksome or by `pint_fem`.

    Parameters
    ----------
    u : firedrake.Function
        Temperature rise, in a space on the plate's mesh.
    v : firedrake.TestFunction
        From the space of `u`.
    q : ufl.core.expr.Expr
        Heat source, for instance a `Function`, a control or `true_source`.
    factor : ufl.core.expr.Expr, optional
        By which the conductivities `KAPPA` are multiplied.

    Returns
    -------
    ufl.Form
        Linear in `v`; zero for the solution. Contains ``Dt(u)``.
    """
    inside = sum((RHO_C[r] * Dt(u) * v + KAPPA[r] * factor * dot(grad(u), grad(v))) * dx(r) for r in REGIONS)
    convection = CONVECTION * (u - AMBIENT) * v * ds((OUTER_EDGE, HOLE_1))
    return inside + convection - q * v * dx


def boundary_conditions(V):
    """Return the Dirichlet conditions: no temperature rise on the cooled edge.

    Parameters
    ----------
    V : firedrake.FunctionSpace
        Space of the temperature rise.

    Returns
    -------
    list of firedrake.DirichletBC
    """
    return [DirichletBC(V, AMBIENT, COOLED_EDGE)]


def true_source(x):
    """Heat source behind the shipped readings: a heater, a smaller sink and a slanted ridge.

    Parameters
    ----------
    x : ufl.SpatialCoordinate
        Or any pair of UFL expressions or floats.

    Returns
    -------
    ufl.core.expr.Expr
        Heat per volume and time, of order 10.
    """

    def bump(centre, widths, angle=0.0):
        dx0, dx1 = x[0] - centre[0], x[1] - centre[1]
        along, across = cos(angle) * dx0 + sin(angle) * dx1, cos(angle) * dx1 - sin(angle) * dx0
        return exp(-((along / widths[0]) ** 2) - (across / widths[1]) ** 2)

    heater = 24 * bump((0.60, 0.33), (0.20, 0.20))
    sink = -14 * bump((1.20, 0.90), (0.17, 0.17))
    ridge = 16 * bump((1.72, 0.55), (0.32, 0.10), angle=2.2)
    return heater + sink + ridge
