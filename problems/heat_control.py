r"""Steer the temperature of a plate by four heaters at its edges: optimal control with bounds.

The temperature rise u of a unit plate, from zero, loses heat to the surroundings and gets it from four heaters, one in
the middle half of each side, with the powers :math:`q_i(t)`:

.. math::
    \partial_t u - \kappa \Delta u + h u = 0, \qquad
    \kappa\, \partial_n u = \sum_i q_i(t)\, \chi_i(x) \text{ on the boundary.}

The target is a warm spot that grows at the left heater, rests there, moves along the lower edge to the right heater and
rests again:

.. math::
    J(q) = \tfrac12 \int_0^T \!\! \int (u - u_d)^2 \, dx\, dt + \tfrac{\beta}{2} \int_0^T \sum_i q_i^2 \, dt, \qquad
    0 \le q_i \le q_{\max} .

Heaters do not cool: where the spot leaves, the lower bound is active; and where it grows, the upper one.
"""

from __future__ import annotations

from dataclasses import dataclass

from firedrake import (
    Function,
    FunctionSpace,
    SpatialCoordinate,
    UnitSquareMesh,
    conditional,
    cos,
    ds,
    dx,
    exp,
    grad,
    inner,
    max_value,
    min_value,
    pi,
    sin,
)

from pint_fem.errors import InputError
from pint_fem.spacetime import SpaceTime
from problems.control import Bounds, ControlForms, ControlProblem, checked_bounds, pose, require_positive

__all__ = ["HEATERS", "HeatControl", "heat_control", "heat_control_forms", "target"]

KAPPA = 0.15
"""Conductivity: heat gets sqrt(KAPPA / LOSS) = 0.32 into the plate before it is lost."""
LOSS = 1.5
"""Rate at which the plate loses heat to the surroundings."""
FINAL_TIME = 3.0
HEATERS = {"left": 1, "bottom": 3, "right": 2, "top": 4}
"""Names of the heaters, and the numbers of their sides of the mesh."""
REST, END = 1.0, 2.2
"""The spot rests until the first time, and is at the right heater from the second one."""
_DEGREE = 4
"""Of the quadrature of the misfit: the target is no polynomial, and serial and parallel functionals are to be one."""


@dataclass(frozen=True)
class HeatControl:
    """Settings of the problem.

    Attributes
    ----------
    cells : int
        Squares along a side, a multiple of 4, so that heaters end at corners of cells.
    steps, integrator : int, str
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    regularisation : float
        The weight beta of the controls' squares.
    bounds : pair or None
        Lower and upper bound of each heater's power.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    cells: int = 32
    steps: int = 128
    integrator: str = "SDIRK2"
    regularisation: float = 1e-4
    bounds: Bounds | None = (0.0, 0.8)

    def __post_init__(self):
        if self.cells < 4 or self.cells % 4:
            raise InputError(f"cells {self.cells}: give a multiple of 4, so that heaters end at corners of cells")
        require_positive(steps=self.steps, regularisation=self.regularisation)
        checked_bounds(self.bounds)


def target(x, t):
    """Return the temperature that the plate is to have.

    Parameters
    ----------
    x, t
        UFL coordinates and time.
    """
    angle = pi * (1 + max_value(0.0, min_value(1.0, (t - REST) / (END - REST))))
    centre = (0.5 + 0.5 * cos(angle), 0.5 + 0.5 * sin(angle))
    square = (x[0] - centre[0]) ** 2 + (x[1] - centre[1]) ** 2
    return min_value(1.0, t / 0.4) * exp(-square / (2 * 0.25**2))


def heat_control_forms(settings: HeatControl, spacetime: SpaceTime) -> ControlForms:
    """Return the forms of the problem on a mesh of a process grid."""
    mesh = spacetime.mesh(UnitSquareMesh, settings.cells, settings.cells)
    V, R, x = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0), SpatialCoordinate(mesh)
    beta = settings.regularisation

    def rest(u, v, controls):
        form = (KAPPA * inner(grad(u), grad(v)) + LOSS * u * v) * dx
        for q, side in zip(controls, HEATERS.values(), strict=True):
            along = x[1] if side in (1, 2) else x[0]
            form -= q * conditional(abs(along - 0.5) < 0.25, 1.0, 0.0) * v * ds(side, degree=2)
        return form

    return ControlForms(
        V=V,
        controls=tuple(Function(R, name=f"{name} heater") for name in HEATERS),
        mass=lambda rate, v: rate * v * dx,
        rest=rest,
        running=lambda u, t: 0.5 * (u - target(x, t)) ** 2 * dx(degree=_DEGREE),
        regularisation=lambda controls: 0.5 * beta * sum(q**2 for q in controls) * dx,
        initial=0 * x[0],
        final_time=FINAL_TIME,
        target=lambda t: target(x, t),
    )


def heat_control(
    spacetime: SpaceTime, settings: HeatControl = HeatControl(), *, solver_parameters: dict | None = None
) -> ControlProblem:
    """Pose the problem on a process grid.

    Parameters
    ----------
    spacetime
        Process grid.
    settings
        Of the problem.
    solver_parameters
        Of :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.

    Raises
    ------
    InputError
        On every rank, on a bad value.
    """
    forms = heat_control_forms(settings, spacetime)
    given = dict(steps=settings.steps, integrator=settings.integrator, bounds=settings.bounds)
    return pose(forms, spacetime, **given, solver_parameters=solver_parameters)
